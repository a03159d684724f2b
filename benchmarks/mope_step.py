"""One training step of MoPE on Swin-B 224 and BERT-base: the published form, with and without a compiler, and ours.

    python -m benchmarks.mope_step --cases step-64 --seconds 280        # goes on where the last call stopped
    python -m benchmarks.mope_step --cases forward-64 forward-8 step-8
    python -m benchmarks.mope_step --table                              # the tables of docs/speed.md
    python -m benchmarks.mope_step --profile step-64 ours               # where the time goes, by kinds of kernels
    python -m benchmarks.mope_step --tiny                               # does everything run?  Seconds on a CPU

Cases ``step-B``: forward, loss (importance loss included) and the gradients of the trainable tensors, without an
optimiser.  Cases ``forward-B``: logits from pictures alone, the text having been read before, so that what prompts,
router and experts add to the frozen Swin can be seen: beside them stands the promptless Swin as transformers runs it,
eager, compiled and in a graph, and by the engine's blocks.

Weights and pictures are random; frozen weights are bfloat16, trainable tensors float32.  MoPE as its authors set it:
4 experts, 13 prompt rows a window, 4 prompts in each layer of BERT.  Without dropout and noise, so that everybody
computes the same, and with an importance loss that no threshold cuts off: no rounding decides whether it counts.
Texts have lengths of captions (``StepCase.draw_lengths``, of at most 128 tokens) and are padded to the longest of the
batch, rounded up to 16, for everybody: what a collator does, and no one has an advantage from cutting them.

``eager``, ``compiled`` and ``reduce-overhead`` (compiled and captured) are ``benchmarks/mope_rival.py``, which copies
the prompts into every window; it is also what is right: in float32, the whole batch at once, because the importance
loss is no mean over samples.  Rows, and the gate before each time, are those of ``python -m benchmarks.step``.  Rows of
the same commit are not measured again (unless ``--again``).

On an H200 a case costs about 10 s for its float32 reference, then 5 s for each of ``eager``, ``ours-plain``, ``ours``,
``frozen`` and 8 s for the graphs; ``compiled`` about 180 s (a forward case 70 s), ``frozen-compiled`` 50 s [estimates].
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.mope_rival import attach_dense_biases, copied_windows
from benchmarks.step import GIB, Benchmark, footnotes, main, overhead_cell, ratio_cell, time_cell
from benchmarks.step_cases import CLASSES, StepCase, describe_lengths
from benchmarks.step_gate import Wanted, held_against
from benchmarks.step_providers import Step, StepProvider, batch_for, refuse_plain_layers, refuse_without_graphs, step_of
from epic_fast import MopeConfig, wrap
from epic_fast.engine import EngineConfig, Prefix, TowerState
from epic_fast.models import PromptedModel

ROWS = Path(__file__).parent / "results" / "mope_step.jsonl"
BATCHES = (64, 8)
LONGEST, MULTIPLE = 128, 16


@dataclass(frozen=True)
class MopeCase(StepCase):
    """A step, or the pictures' way forward, at a batch."""

    @property
    def name(self) -> str:
        """Such as ``step-64``, ``forward-8``."""
        return f"{self.mode}-{self.batch}"


CASES: dict[str, StepCase] = {
    case.name: case for mode in ("step", "forward") for case in (MopeCase("mope", batch, mode) for batch in BATCHES)
}


@dataclass
class MopeSetting:
    """Frozen weights on a device, and batches for them.

    Attributes:
        swin, bert: models with random weights in ``dtype``; the Swin's blocks also hold the rival's padded biases.
        tiny: towers of a few small layers.
    """

    swin: Any
    bert: Any
    device: torch.device
    dtype: torch.dtype
    tiny: bool
    _batches: dict[StepCase, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def make(cls, device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> MopeSetting:
        """Swin-B (24 blocks in stages of 128 to 1024 channels) and BERT-base, or tiny ones."""
        torch.manual_seed(0)
        if tiny:
            from epic_fast.testing import tiny_bert, tiny_swin
            from epic_fast.testing.probes import lively

            swin, bert = lively((tiny_swin(depths=(2, 3)), tiny_bert(layers=2)))
        else:
            from transformers import BertConfig, BertModel, SwinConfig, SwinModel

            shape = SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=7)
            swin: Any
            bert: Any
            with torch.device(device):
                swin, bert = SwinModel(shape), BertModel(BertConfig(), add_pooling_layer=False)
            for stage in swin.encoder.layers:
                for block in stage.blocks:
                    # A bias of zeros, as fresh weights have it, would hide a bias in the wrong place.
                    nn.init.normal_(block.attention.relative_position_bias.relative_position_bias_table, std=0.5)
        swin, bert = (each.eval().requires_grad_(False).to(device=device, dtype=dtype) for each in (swin, bert))
        attach_dense_biases(swin, configuration(CASES["step-8"]).rows)
        return cls(swin, bert, device, dtype, tiny)

    @property
    def longest(self) -> int:
        """Tokens that a text has at most."""
        return min(LONGEST, self.bert.config.max_position_embeddings)

    def lengths(self, case: StepCase) -> Tensor:
        """Tokens of each text."""
        return torch.tensor(case.draw_lengths(self.longest))

    def padded(self, case: StepCase) -> int:
        """Tokens that the texts are padded to."""
        return min(-(-int(self.lengths(case).max()) // MULTIPLE) * MULTIPLE, self.longest)

    def batch(self, case: StepCase) -> dict[str, Tensor]:
        """Random pictures, texts and labels."""
        if case not in self._batches:
            generator = torch.Generator().manual_seed(1)
            size, vocabulary = self.swin.config.image_size, self.bert.config.vocab_size
            valid = torch.arange(self.padded(case)) < self.lengths(case)[:, None]
            ids = torch.randint(3, vocabulary, valid.shape, generator=generator)
            self._batches[case] = {
                "pixel_values": torch.randn(case.batch, 3, size, size, generator=generator).to(self.device, self.dtype),
                "input_ids": torch.where(valid, ids, 0).to(self.device),
                "attention_mask": valid.long().to(self.device),
                "labels": torch.randint(0, CLASSES, (case.batch,), generator=generator).to(self.device),
            }
        return self._batches[case]

    def forget(self) -> None:
        """Drop the batches made so far."""
        self._batches.clear()

    def in_float32(self) -> MopeSetting:
        """A copy with the same numbers."""
        swin, bert = (copy.deepcopy(each).float() for each in (self.swin, self.bert))
        return MopeSetting(swin, bert, self.device, torch.float32, self.tiny, self._batches)


def configuration(case: StepCase) -> MopeConfig:
    """The authors' settings, without what is random or undecided between two roundings.

    In a forward case the text has no prompts, so that it can be read before; the picture's are the same.
    """
    return MopeConfig(
        complement_prompt_length=0 if case.mode == "forward" else 4,
        prompt_dropout=0.0,
        router_noise_std=0.0,
        importance_threshold=0.0,
    )


def build_mope(setting: MopeSetting, case: StepCase, engine: EngineConfig | None = None) -> PromptedModel:
    """MoPE on the setting's weights; its trainable tensors never vary."""
    torch.manual_seed(0)
    backbone = (setting.swin, setting.bert)
    model = wrap(backbone, configuration(case), CLASSES, self_check=False, engine=engine)
    return model.train(case.mode == "step")


class PicturesOnly(nn.Module):
    """MoPE from pictures to logits; the texts of the batch are read when it is made."""

    def __init__(self, model: PromptedModel, batch: dict[str, Tensor]):
        super().__init__()
        self.model = model
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        self.text = model.extract(batch["pixel_values"], **given).text

    def forward(self, pixel_values: Tensor) -> tuple[None, Tensor]:
        vision = self.model.backbone.vision.enter(pixel_values, self.model.engine)
        return None, self.model(prefix=Prefix(text=self.text, vision=vision)).logits


class FrozenPictures(nn.Module):
    """The promptless Swin, as transformers runs it, to its pooled output."""

    def __init__(self, swin: Any):
        super().__init__()
        self.swin = swin

    def forward(self, pixel_values: Tensor) -> tuple[None, Tensor]:
        return None, self.swin(pixel_values=pixel_values).pooler_output


class FrozenInEngine(nn.Module):
    """The promptless Swin in the engine: what prompts cost is measured against it too."""

    def __init__(self, setting: MopeSetting, engine: EngineConfig):
        super().__init__()
        towers = (setting.swin, setting.bert)
        self.model = wrap(towers, MopeConfig(prompt_length=0), CLASSES, self_check=False, engine=engine).eval()

    def forward(self, pixel_values: Tensor) -> tuple[None, Tensor]:
        vision = self.model.backbone.vision.enter(pixel_values, self.model.engine)
        nothing = TowerState(pixel_values.new_zeros(len(pixel_values), 1, 1))
        return None, self.model.features(Prefix(nothing, vision))


def plain_model(setting: MopeSetting, case: StepCase, method: str) -> nn.Module:
    """What takes :func:`inputs_of` a case, without an engine."""
    if method == "frozen":
        return FrozenPictures(setting.swin)
    model = build_mope(setting, case)
    return PicturesOnly(model, setting.batch(case)) if case.mode == "forward" else model


def inputs_of(setting: MopeSetting, case: StepCase) -> dict[str, Tensor]:
    """What a step of a case takes."""
    batch = setting.batch(case)
    return {"pixel_values": batch["pixel_values"]} if case.mode == "forward" else batch


def wanted_of(setting: MopeSetting, case: StepCase, method: str) -> Wanted:
    """What is right: the published form in float32."""
    with copied_windows():
        return held_against(
            lambda: plain_model(setting.in_float32(), case, method),
            lambda: plain_model(setting, case, method),
            inputs_of(setting, case),
            gradients=case.mode == "step",
            part=case.batch,
        )


@dataclass(frozen=True)
class MopeProvider(StepProvider):
    """Someone who computes a step of MoPE; of group ``"plain"`` without a kernel of this project."""

    method: str = "mope"
    modes: tuple[str, ...] = ("step", "forward")
    seconds: float = 5.0

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        with copied_windows() if self.group == "plain" else contextlib.nullcontext():
            yield

    def prepare(self, setting: Any, case: StepCase) -> Step:
        inputs = inputs_of(setting, case)
        refuse_without_graphs(self, setting.device)
        if self.engine is None:
            model = plain_model(setting, case, self.method)
        elif self.method == "frozen":
            model = FrozenInEngine(setting, self.engine)
        else:
            model = build_mope(setting, case, self.engine)
            if case.mode == "step":
                refuse_plain_layers(model, inputs)
                inputs = batch_for(self.engine, model, inputs)
            else:
                model = PicturesOnly(model, setting.batch(case))
        # With tiny towers the question is whether everything runs, and a compiler's minutes of C++ do not answer it.
        compiler = "trace" if setting.tiny and self.compile else self.compile
        made = step_of(replace(self, compile=compiler), model, inputs, case)
        # The wrapped model is what holds memory and is unwrapped at the end.
        made.model = model.model if isinstance(model, (PicturesOnly, FrozenInEngine)) else model
        return made


_ENGINE = EngineConfig(blocks="fused", save="eight_bit")

PROVIDERS: dict[str, StepProvider] = {
    each.name: each
    for each in (
        MopeProvider("eager", "PyTorch, prompts copied, eager", group="plain"),
        MopeProvider("compiled", "PyTorch, prompts copied, compiled", group="plain", compile="default", seconds=180),
        MopeProvider(
            "reduce-overhead",
            "PyTorch, prompts copied, compiled, reduce-overhead",
            group="plain",
            compile="reduce-overhead",
            seconds=180,
        ),
        MopeProvider("frozen", "the promptless Swin, eager", method="frozen", group="rival", modes=("forward",)),
        MopeProvider(
            "frozen-compiled",
            "the promptless Swin, compiled",
            method="frozen",
            group="rival",
            compile="default",
            modes=("forward",),
            seconds=50,
        ),
        MopeProvider(
            "frozen-graph",
            "the promptless Swin, CUDA graph",
            method="frozen",
            group="rival",
            modes=("forward",),
            graph=True,
        ),
        MopeProvider(
            "frozen-ours",
            "the promptless Swin, engine and CUDA graph",
            method="frozen",
            engine=_ENGINE,
            modes=("forward",),
            graph=True,
        ),
        MopeProvider("ours-plain", "epic_fast, no engine (kernels)"),
        MopeProvider("ours", "+ engine", engine=_ENGINE, slack=(0.0, 0.02)),
        MopeProvider("graphs", "+ CUDA graph", engine=replace(_ENGINE, graphs=True), slack=(0.0, 0.02), seconds=8),
    )
}
"""Of the promptless Swins the last one is the engine's: what MoPE's graph takes longer than it is prompts, router and
experts, and nothing else."""


# -- rows and tables -------------------------------------------------------------------------------------------------


def describe(setting: MopeSetting, case: StepCase, provider: StepProvider) -> dict[str, Any]:
    """For a row: towers, texts and the method's sizes; operations are not counted."""
    config = configuration(case)
    return {
        "towers": "tiny" if setting.tiny else "Swin-B 224 + BERT-base",
        "texts": {**describe_lengths(case, setting.longest), "padded_to": setting.padded(case)},
        "prompt_rows": config.rows,
        "experts": config.num_experts,
        "flops": None,
    }


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: steps, and what the targets ask for at the largest batch; then the pictures' way forward."""
    last = {(row["mode"], row["batch"], row["provider"]): row for row in rows}
    lines = []
    for mode in ("step", "forward"):
        batches = sorted({row["batch"] for row in last.values() if row["mode"] == mode})
        if not batches:
            continue
        most = batches[-1]
        here = {name: last[mode, most, name] for name in PROVIDERS if (mode, most, name) in last}
        if mode == "step":
            header = ["MoPE, one step", *(f"B={batch}, ms" for batch in batches), f"B={most}: × eager", "× compiled"]
            header += ["memory added, GiB", "of compiled's"]
        else:
            header = ["pictures, forward", *(f"B={batch}, ms" for batch in batches)]
            frozen = {"frozen": "eager", "frozen-compiled": "compiled", "frozen-graph": "CUDA graph"}
            frozen = {name: how for name, how in (frozen | {"frozen-ours": "engine and graph"}).items() if name in here}
            header += [f"B={most}: over promptless, {how}" for how in frozen.values()]
        lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for name, provider in PROVIDERS.items():
            kin = [last.get((mode, batch, name)) for batch in batches]
            if not any(row is not None and row["kind"] != "skipped" for row in kin):
                continue
            cells = [provider.label, *map(time_cell, kin)]
            if mode == "step":
                cells += [ratio_cell(here, rival, name, "p50_ms", "{:.2f}×") for rival in ("eager", "compiled")]
                memory = here.get(name, {}).get("peak_mib")
                cells.append("–" if memory is None else f"{memory / GIB:.2f}")
                cells.append(ratio_cell(here, name, "compiled", "peak_mib", "{:.2f}"))
            else:
                cells += [overhead_cell(here, name, rival) for rival in frozen]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, *footnotes(list(last.values()))])


MOPE = Benchmark(
    name="mope_step",
    about=__doc__,
    output=ROWS,
    cases=CASES,
    providers=PROVIDERS,
    usual=list(CASES),
    make=MopeSetting.make,
    measured_at=lambda provider, case: case.mode in provider.modes,
    wanted=wanted_of,
    describe=describe,
    tables=tables,
)

if __name__ == "__main__":
    sys.exit(main(benchmark=MOPE))
