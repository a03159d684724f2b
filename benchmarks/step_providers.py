"""Who computes a step: plain PyTorch, compiled, other methods beside it, and the engine, one part after the other."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.registry import CannotRun
from benchmarks.step_cases import CLASSES, LORA_RANK, Setting, StepCase
from epic_fast import functional, wrap
from epic_fast.engine import EngineConfig
from epic_fast.engine.graphs import GraphCache, backend_for, prepared, ready
from epic_fast.models import PromptedModel
from epic_fast.nn import Head

Result = tuple[Tensor, tuple[Tensor, ...]]
"""Logits ``(B, K)`` and the gradients of the trainable tensors (none of inference)."""


@dataclass
class Step:
    """A provider at a case, ready to be called.

    Attributes:
        compute: a step on inputs.  What it returns is valid until the next call.
        names: of the gradients.
        model: what is run.
        inputs: what one step takes.
        notes: for the row.
    """

    compute: Callable[[dict[str, Any]], Result]
    names: list[str]
    model: Any
    inputs: dict[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)

    def call(self) -> Result:
        return self.compute(self.inputs)


@dataclass(frozen=True)
class StepProvider:
    """Someone who computes a step.

    Attributes:
        name: on the command line and in the rows.
        label: in tables and figures.
        method: whose step it is: ``"epic"``, ``"lora"``, ``"full"`` or ``"frozen"`` (the towers forward, no prompts,
            no head, no gradients: what others pay before they have trained anything).
        group: ``"plain"``, ``"rival"`` or ``"engine"``.
        engine: parts that are switched on; None is the plain path.
        hub: whether the interaction between prompts runs in the project's kernel or in PyTorch's operations.
        compile: mode of ``torch.compile``, or None.
        from_prefix: starts from what the layers below the first prompts computed.
        slack: what the error may exceed that of plain PyTorch by, relative, ``(logits, gradients)``: 0 for all that
            is exact.
        modes: what it is measured in.
        seconds: about what one case costs on a GPU, for the command's time budget.
        copies: whether a graph's results are copied out of its memory; where not, the next call overwrites them.
        graph: its call becomes a CUDA graph, whoever it is.
    """

    name: str
    label: str
    method: str = "epic"
    group: str = "engine"
    engine: EngineConfig | None = None
    hub: bool = True
    compile: str | None = None
    from_prefix: bool = False
    slack: tuple[float, float] = (0.0, 0.0)
    modes: tuple[str, ...] = ("step", "inference")
    seconds: float = 8.0
    copies: bool = True
    graph: bool = False

    @property
    def graphed(self) -> bool:
        return self.graph or bool(self.engine and self.engine.graphs)

    @property
    def parts(self) -> dict[str, Any] | None:
        """For a row: the engine's configuration."""
        return None if self.engine is None else self.engine.to_dict()

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """What has to hold while its calls are prepared and run."""
        if self.hub:
            yield
            return
        reference = functools.partial(functional.prompt_interaction, impl="reference")
        with mock.patch.object(functional, "prompt_interaction", reference):
            yield

    def prepare(self, setting: Setting, case: StepCase) -> Step:
        """The step at a case, not called yet and (:func:`captured`) not captured.

        Raises:
            CannotRun: with the reason.
        """
        if self.method != "epic":
            return _other_method(self, setting, case)
        if self.engine is None:
            model = build_epic(setting, case)
            return step_of(self, model, setting.batch(case), case)
        return _engine_step(self, setting, case)


# -- models ----------------------------------------------------------------------------------------------------------


def build_epic(setting: Setting, case: StepCase, engine: EngineConfig | None = None, clip: Any = None) -> PromptedModel:
    """EPIC on the setting's weights; its trainable tensors are float32, as the library trains them, and never vary."""
    torch.manual_seed(0)
    clip = setting.clip if clip is None else clip
    model = wrap(clip, setting.epic(case.layout), CLASSES, self_check=False, engine=engine)
    return model.train()


class PooledTowers(nn.Module):
    """Both towers as transformers runs them, and EPIC's head on the pooled features; ``head=False`` gives these."""

    def __init__(self, clip: Any, *, head: bool = True):
        super().__init__()
        self.clip = clip
        config = clip.config
        width = config.text_config.hidden_size + config.vision_config.hidden_size
        self.head = Head(width, CLASSES) if head else None

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        text = self.clip.text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        vision = self.clip.vision_model(pixel_values=pixel_values).pooler_output
        features = torch.cat([text, vision], dim=-1)
        if self.head is None:
            return None, features
        logits = self.head(features)
        return None if labels is None else nn.functional.cross_entropy(logits, labels), logits


def build_other(setting: Setting, method: str) -> PooledTowers:
    """Another method on the same weights.

    LoRA's adapters have the type of the frozen weights, which is the faster and smaller choice for it.

    Raises:
        CannotRun: peft is not installed.
    """
    torch.manual_seed(0)
    if method == "frozen":
        return PooledTowers(setting.clip.requires_grad_(False), head=False).eval()
    clip = copy.deepcopy(setting.clip).requires_grad_(method == "full")
    for module in clip.modules():
        # What no loss reaches would have no gradient.
        if method == "full" and module in (clip.visual_projection, clip.text_projection):
            module.requires_grad_(False)
    if method == "full":
        clip.logit_scale.requires_grad_(False)
    if method == "lora":
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise CannotRun(f"peft does not load: {error}; pip install peft") from error
        config = LoraConfig(
            r=LORA_RANK,
            lora_alpha=LORA_RANK,
            target_modules=["q_proj", "v_proj"],
            # Random in both factors: from the usual zero in one the other has no gradient to compare.
            init_lora_weights=False,
        )
        inject_adapter_in_model(config, clip)
        for name, parameter in clip.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(setting.device, setting.dtype)
    model = PooledTowers(clip)
    assert model.head is not None
    model.head.to(setting.device)
    return model.train(method != "full")


def reference_model(setting: Setting, case: StepCase, method: str) -> Any:
    """The method's plain path in float32, with the same numbers in all its tensors."""
    if method != "epic":
        return copy.deepcopy(build_other(setting, method)).float()
    return build_epic(setting, case, clip=copy.deepcopy(setting.clip).float())


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


# -- steps -----------------------------------------------------------------------------------------------------------


def _loss_and_logits(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor | None, Tensor]:
    found: Any = model(**inputs)
    return (found[0], found[1]) if isinstance(found, tuple) else (found.loss, found.logits)


def step_call(model: nn.Module, inputs: dict[str, Any], *, gradients: bool, compile: str | None = None) -> Step:
    """Forward, loss and gradients of the trainable tensors, as a user writes it; without gradients, logits alone.

    Args:
        compile: mode of ``torch.compile`` for the forward pass, loss included; its backward pass comes with it.
            ``"trace"`` leaves the compiler itself out.
    """
    named = trainable(model) if gradients else {}
    leaves = list(named.values())
    forward: Callable[..., tuple[Tensor | None, Tensor]] = _loss_and_logits
    if compile is not None:
        torch._dynamo.reset()
        if compile == "trace":
            forward = torch.compile(_loss_and_logits, dynamic=False, backend="aot_eager")
        else:
            forward = torch.compile(_loss_and_logits, dynamic=False, mode=None if compile == "default" else compile)
    marks = compile == "reduce-overhead"

    def compute(given: dict[str, Any]) -> Result:
        if marks:
            torch.compiler.cudagraph_mark_step_begin()
        if not leaves:
            with torch.no_grad():
                return forward(model, given)[1], ()
        loss, logits = forward(model, given)
        assert loss is not None
        return logits.detach(), torch.autograd.grad(loss, leaves)

    return Step(compute, list(named), model, inputs)


def step_of(provider: StepProvider, model: nn.Module, inputs: dict[str, Any], case: StepCase) -> Step:
    """A provider's model as a step of a case."""
    if case.mode != "step":
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
    if provider.compile is not None:
        # What a model asks itself once, at its first step, is no part of the graph.
        with torch.no_grad():
            _loss_and_logits(model, inputs)
    return step_call(
        model, inputs, gradients=case.mode == "step" and provider.method != "frozen", compile=provider.compile
    )


def _other_method(provider: StepProvider, setting: Setting, case: StepCase) -> Step:
    return step_of(provider, build_other(setting, provider.method), setting.batch(case), case)


def _engine_step(provider: StepProvider, setting: Setting, case: StepCase) -> Step:
    engine = provider.engine
    assert engine is not None
    refuse_without_graphs(provider, setting.device)
    model = build_epic(setting, case, engine)
    inputs = dict(setting.batch(case))
    refuse_plain_layers(model, inputs)
    if engine.weights != "frozen" or engine.save == "eight_bit":
        _refuse_if_unchanged(setting, case, engine, model)
    inputs = batch_for(engine, model, inputs)
    if provider.from_prefix:
        prefix = model.extract(**{name: value for name, value in inputs.items() if name != "labels"})
        inputs, reason = ready(model, {"prefix": prefix, "labels": inputs["labels"]})
        _refuse(reason)
    return step_of(provider, model, inputs, case)


def refuse_without_graphs(provider: StepProvider, device: torch.device) -> None:
    """Say so, before anything is built, where a provider's call is to become a CUDA graph and there are none."""
    if provider.graphed and backend_for(device) is None:
        raise CannotRun(f"CUDA graphs need a GPU; this is {device}")


def refuse_plain_layers(model: PromptedModel, inputs: dict[str, Any]) -> None:
    """A time in which layers ran that the engine did not take over would not be the engine's."""
    plain = count_plain_layers(model, inputs)
    if plain:
        raise CannotRun(f"the engine leaves {plain} layers to the backbone's own modules")


def batch_for(engine: EngineConfig, model: PromptedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """What a collator and the training loop make of a batch before it reaches the device."""
    found, reason = ready(model, inputs) if engine.graphs else (prepared(model, inputs), None)
    _refuse(reason)
    return found


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise CannotRun(f"no graph of this batch: {reason}")


def count_plain_layers(model: PromptedModel, inputs: dict[str, Any]) -> int:
    """How many of the backbone's own layers run in a forward pass: none, where the engine runs all of them."""
    ran: set[int] = set()
    kinds = {type(layer) for tower in (model.backbone.text, model.backbone.vision) for layer in tower.layers}
    few = {name: value[:2] for name, value in inputs.items() if name != "labels"}
    with contextlib.ExitStack() as patches, torch.no_grad():
        # Before the engine takes over a tower, it runs the first layer in both ways, once.
        model(**few)
        for kind in kinds:

            def noting(self: nn.Module, *given: Any, forward: Any = kind.forward, **named: Any) -> Any:
                ran.add(id(self))
                return forward(self, *given, **named)

            patches.enter_context(mock.patch.object(kind, "forward", noting))
        model(**few)
    return len(ran)


def _refuse_if_unchanged(setting: Setting, case: StepCase, engine: EngineConfig, model: PromptedModel) -> None:
    """What is rounded has to show: a part that changes no bit is not running, and its time would be a lie."""
    # Two samples are enough to see it.
    few = {name: value[:2] for name, value in setting.batch(case).items()}
    exact = EngineConfig(**{**engine.to_dict(), "weights": "frozen", "save": "full", "graphs": False})
    other = build_epic(setting, case, exact)
    results = []
    for each in (model, other):
        logits, gradients = step_call(each, few, gradients=True).call()
        results.append([logits, *gradients])
    other.unwrap()
    if all(torch.equal(one, two) for one, two in zip(*results, strict=True)):
        what = f"weights={engine.weights!r}" if engine.weights != "frozen" else f"save={engine.save!r}"
        raise CannotRun(f"{what} changes no bit of the result: this version does not run it here")


def captured(step: Step, device: torch.device, *, copies: bool = True) -> Step:
    """The whole step as a CUDA graph of the engine's: inputs are copied in, results are copied out (if ``copies``).

    Raises:
        CannotRun: something in the step cannot be captured.
    """
    backend = backend_for(device)
    assert backend is not None
    take = None if copies else (lambda result: result)
    graphs = GraphCache("benchmarks.step", step.compute, backend, device, take=take)
    graphs(step.inputs)
    if graphs.refused or not len(graphs):
        raise CannotRun(f"no graph of this step: {graphs.refused or 'no memory for it'}")
    return Step(graphs, step.names, step.model, step.inputs, step.notes)


def release(step: Step | None, device: torch.device) -> None:
    """Give back what a provider held, so that the next one starts as the first did."""
    if step is not None and isinstance(step.model, PromptedModel):
        step.model.unwrap()
    if step is not None:
        step.model = step.inputs = step.compute = None  # pyright: ignore[reportAttributeAccessIssue]
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


# -- everybody -------------------------------------------------------------------------------------------------------

_BLOCKS = EngineConfig(blocks="fused", pooled_rows=False, trim_text=False)
_POOLED = EngineConfig(blocks="fused", trim_text=False)
_TRIMMED = EngineConfig(blocks="fused")
_SAVED = EngineConfig(blocks="fused", save="eight_bit")
_GRAPHS = EngineConfig(blocks="fused", save="eight_bit", graphs=True)
_FP8 = EngineConfig(blocks="fused", save="eight_bit", graphs=True, weights="fp8")

PROVIDERS: dict[str, StepProvider] = {
    each.name: each
    for each in (
        StepProvider("eager", "PyTorch, eager", group="plain", hub=False),
        StepProvider("compiled", "PyTorch, compiled", group="plain", hub=False, compile="default", seconds=100),
        StepProvider(
            "reduce-overhead",
            "PyTorch, compiled, reduce-overhead",
            group="plain",
            hub=False,
            compile="reduce-overhead",
            seconds=100,
        ),
        StepProvider("lora", "LoRA r=16 (peft), eager", method="lora", group="rival", modes=("step",)),
        StepProvider(
            "lora-compiled",
            "LoRA r=16 (peft), compiled",
            method="lora",
            group="rival",
            compile="default",
            modes=("step",),
            seconds=120,
        ),
        StepProvider("full", "full fine-tuning's gradients, eager", method="full", group="rival", modes=("step",)),
        StepProvider("frozen", "the frozen towers forward, eager", method="frozen", group="rival"),
        StepProvider(
            "frozen-compiled",
            "the frozen towers forward, compiled",
            method="frozen",
            group="rival",
            compile="default",
            seconds=60,
        ),
        StepProvider("hub", "epic_fast, no engine (interaction's kernel)"),
        StepProvider("blocks", "+ fused blocks", engine=_BLOCKS),
        StepProvider("pooled", "+ pooled rows only", engine=_POOLED),
        StepProvider("trimmed", "+ text cut to length", engine=_TRIMMED),
        StepProvider("saved", "+ derivative kept in 8 bits", engine=_SAVED, slack=(0.0, 0.02), modes=("step",)),
        StepProvider("graphs", "+ CUDA graph", engine=_GRAPHS, slack=(0.0, 0.02)),
        StepProvider("fp8", "+ fp8 weights", engine=_FP8, slack=(0.1, 0.3)),
        StepProvider("prefix", "+ prefix cache", engine=_GRAPHS, slack=(0.0, 0.02), from_prefix=True, modes=("step",)),
        StepProvider(
            "fp8-prefix",
            "+ fp8 weights and prefix cache",
            engine=_FP8,
            slack=(0.1, 0.3),
            from_prefix=True,
            modes=("step",),
        ),
    )
}
"""Each part of the engine stands on those before it, up to the graph; the last three stand on the graph."""
