"""MiT on a frozen language model of LLaMA-2-7B's shape: the infusion's overhead, a training step, and its rivals.

    python -m benchmarks.mit_step --cases forward-40 forward-64 --seconds 280  # goes on where the last call stopped
    python -m benchmarks.mit_step --cases step-40 step-64 --seconds 560
    python -m benchmarks.mit_step --table                               # the README's tables, in Markdown
    python -m benchmarks.mit_step --profile step-40 ours                # where the time goes, by kinds of kernels
    python -m benchmarks.mit_step --tiny                                # does everything run?  Seconds on a CPU

Cases ``forward-N``: logits of 8 texts padded to N tokens with one feature of width 768 each, beside the frozen language
model as transformers runs it, which gives the last valid token's hidden state.  Cases ``step-N``: forward, loss and the
gradients of the trainable tensors, without an optimiser; beside them the usual 576 visual tokens in front of the same
texts, where the gradient of the projector has to pass all layers.

Weights, features and texts are random; frozen weights are bfloat16 and shared by everybody, trainable tensors float32.
Eight layers are infused, spread as the published six are (12 to 31, the last one included), from the released
initialisation, so that nothing of the infusion is zero.  The vocabulary is cut, because nobody reads it.  Of N tokens
half are the instruction, the same for all, the rest captions, whose lengths are drawn like those of the other
benchmarks and of which the longest fills the row; everybody gets the same padded batch and its mask.

``eager`` and ``compiled`` are ``benchmarks/mit_rival.py``, which infuses every key and value; in float32 it is also
what is right.  Rows, and the gate before each time, are those of ``python -m benchmarks.step``.  Graphs have the N
tokens as they are (the engine's own fill texts up to multiples of 16), and gradients stay in their memory, where an
optimiser reads them: a copy would be of half a gigabyte.

Floors [ARITH], which every row has as ``floor_bytes`` and ``flops``: a forward pass reads 12.95 GB of weights and 0.57
GB of transforms, 4.0 ms at 3.35 TB/s, 2.8 ms at 4.8 TB/s.  Products of the valid tokens are 3.1 TFLOP at n = 40 and 5.0
at 64, of all padded rows 4.0 and 6.5; at 600 TFLOP/s these take 6.7 and 10.8 ms, so products and not bytes bound it.
The infusion adds the transforms, 0.17 ms at 3.35 TB/s, and a reduction over values; one row in the last layer saves
2.5 % of all products.  A step goes back through the 20 layers from the last to the first infused one, 1.6 times the
products of a forward pass, and writes 0.57 GB of gradients; with visual tokens it is 125 TFLOP, 25 times as much.

On an H200 a case costs about 15 s for its float32 reference (30 s with visual tokens), 8 s for each eager provider, 12
s for the graphs, and where something is compiled 50 s (forward) to 150 s (step) [estimates].
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

from benchmarks.mit_rival import FrozenText, VisualTokens, infused_naively
from benchmarks.step import GIB, Benchmark, footnotes, main, overhead_cell, ratio_cell, time_cell
from benchmarks.step_cases import CLASSES, StepCase, describe_lengths
from benchmarks.step_gate import Wanted, held_against
from benchmarks.step_providers import Step, StepProvider, refuse_plain_layers, refuse_without_graphs, step_of
from epic_fast import MitConfig, wrap
from epic_fast.engine import EngineConfig
from epic_fast.engine.graphs import prepared
from epic_fast.models import PromptedModel

ROWS = Path(__file__).parent / "results" / "mit_step.jsonl"
BATCH, TOKENS = 8, (40, 64)
# Of LLaMA-2-7B; eight over the span of the published (12, 16, 20, 24, 28, 31).
LAYERS = (12, 15, 17, 20, 23, 26, 28, 31)
SOURCE, VOCABULARY = 768, 512
PATCHES, PATCH_WIDTH = 576, 1024
PICTURES = ("feature", "patches")
# The reference of visual tokens in float32 keeps 6 GB a sample.
VISUAL_PART = 2


@dataclass(frozen=True)
class MitCase(StepCase):
    """A forward pass or a step at texts of so many tokens, padding included."""

    tokens: int = 40

    @property
    def name(self) -> str:
        """Such as ``step-40``, ``forward-64``."""
        return f"{self.mode}-{self.tokens}"

    def draw_lengths(self, longest: int) -> list[int]:
        """Tokens of each text: half of ``longest`` for the instruction, and captions of which one fills the rest."""
        instruction = longest // 2
        captions = StepCase(self.layout, self.batch).draw_lengths(77)
        return [instruction + max(1, round(each * (longest - instruction) / max(captions))) for each in captions]


CASES: dict[str, StepCase] = {
    case.name: case
    for mode in ("forward", "step")
    for case in (MitCase("mit", BATCH, mode, tokens=tokens) for tokens in TOKENS)
}


@dataclass
class MitSetting:
    """Frozen weights on a device, and batches for them.

    Attributes:
        language: a ``LlamaModel`` with random weights in ``dtype``.
        tiny: a model of a few small layers and a quarter of the tokens.
    """

    language: Any
    device: torch.device
    dtype: torch.dtype
    tiny: bool
    _batches: dict[StepCase, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def make(cls, device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> MitSetting:
        """LLaMA-2-7B with a vocabulary of 512, or a tiny one with grouped queries."""
        torch.manual_seed(0)
        if tiny:
            from epic_fast.testing import tiny_llama
            from epic_fast.testing.probes import lively

            language = lively(tiny_llama(language_model=False))
            for parameter in language.parameters():
                parameter.data = parameter.data.to(device, dtype)
            language.to(device)
        else:
            from transformers import LlamaConfig, LlamaModel

            shape = LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=32,
                max_position_embeddings=4096,
                rms_norm_eps=1e-5,
                pad_token_id=None,
            )
            before = torch.get_default_dtype()
            try:
                # So that tables of angles stay float32 and no second copy of the weights is made.
                torch.set_default_dtype(dtype)
                with torch.device(device):
                    language = LlamaModel(shape)
            finally:
                torch.set_default_dtype(before)
        language.eval().requires_grad_(False)
        return cls(language, device, dtype, tiny)

    @property
    def layers(self) -> list[int]:
        """Those that are infused."""
        return [1, 3] if self.tiny else list(LAYERS)

    def tokens(self, case: StepCase) -> int:
        """Of a text, padding included."""
        assert isinstance(case, MitCase)
        return case.tokens // 4 if self.tiny else case.tokens

    def batch(self, case: StepCase) -> dict[str, Tensor]:
        """A random feature, patches, text and label of each sample."""
        if case not in self._batches:
            generator = torch.Generator().manual_seed(1)
            tokens, vocabulary = self.tokens(case), self.language.config.vocab_size
            lengths = torch.tensor(case.draw_lengths(tokens))
            valid = torch.arange(tokens) < lengths[:, None]
            ids = torch.randint(3, min(vocabulary, VOCABULARY), valid.shape, generator=generator)
            patches = (6, 16) if self.tiny else (PATCHES, PATCH_WIDTH)
            self._batches[case] = {
                "feature": torch.randn(case.batch, 1, SOURCE, generator=generator).to(self.device),
                "patches": torch.randn(case.batch, *patches, generator=generator).to(self.device, self.dtype),
                "input_ids": torch.where(valid, ids, 0).to(self.device),
                "attention_mask": valid.long().to(self.device),
                "text_lengths": lengths.to(self.device, torch.int32),
                "labels": torch.randint(0, CLASSES, (case.batch,), generator=generator).to(self.device),
            }
        return self._batches[case]

    def forget(self) -> None:
        """Drop the batches made so far."""
        self._batches.clear()

    def in_float32(self) -> MitSetting:
        """A copy with the same numbers."""
        return MitSetting(copy.deepcopy(self.language).float(), self.device, torch.float32, self.tiny, self._batches)


class GivenFeature(nn.Module):
    """In the place of a sequence's encoder: the feature as it is given, ``(B, 1, S)`` to ``(B, S)``."""

    def forward(self, frames: Tensor, lengths: Tensor | None = None) -> Tensor:
        return frames[:, 0]


def build_mit(setting: MitSetting, case: StepCase, engine: EngineConfig | None = None) -> PromptedModel:
    """MiT on the setting's weights; its trainable tensors never vary."""
    torch.manual_seed(0)
    config = MitConfig(
        layers=setting.layers,
        sequences={"feature": SOURCE},
        sequence_size=SOURCE,
        init="released",
        prompt_template="{text}",
        head_dropout=0.0,
    )
    model = wrap(setting.language, config, CLASSES, self_check=False, engine=engine)
    model.encoders["feature"] = GivenFeature()
    return model.train(case.mode == "step")


class FrozenInEngine(nn.Module):
    """The language model in the engine, without an infusion: what the infusion costs is measured against it too."""

    def __init__(self, setting: MitSetting, engine: EngineConfig):
        super().__init__()
        config = MitConfig(layers=[], prompt_template="{text}")
        self.model = wrap(setting.language, config, CLASSES, self_check=False, engine=engine).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, text_lengths: Tensor) -> tuple[None, Tensor]:
        prefix = self.model.extract(input_ids=input_ids, attention_mask=attention_mask, text_lengths=text_lengths)
        return None, self.model.features(prefix)


def plain_model(setting: MitSetting, case: StepCase, method: str) -> nn.Module:
    """What takes :func:`inputs_of` a case, without an engine."""
    torch.manual_seed(0)
    if method == "frozen":
        return FrozenText(setting.language)
    if method == "visual":
        return VisualTokens(setting.language, setting.batch(case)["patches"].shape[2], CLASSES)
    return build_mit(setting, case)


def inputs_of(setting: MitSetting, case: StepCase, method: str) -> dict[str, Tensor]:
    """What a step of a method takes: of the pictures only what it reads."""
    mine = {"mit": "feature", "visual": "patches"}.get(method)
    return {name: each for name, each in setting.batch(case).items() if name not in PICTURES or name == mine}


def wanted_of(setting: MitSetting, case: StepCase, method: str) -> Wanted:
    """What is right: the published form in float32."""
    with infused_naively():
        return held_against(
            lambda: plain_model(setting.in_float32(), case, method),
            lambda: plain_model(setting, case, method),
            inputs_of(setting, case, method),
            gradients=case.mode == "step",
            part=VISUAL_PART if method == "visual" else case.batch,
        )


@dataclass(frozen=True)
class MitProvider(StepProvider):
    """Someone who computes a step; of group ``"plain"`` without a kernel of this project."""

    method: str = "mit"
    modes: tuple[str, ...] = ("forward", "step")
    seconds: float = 8.0
    copies: bool = False

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        with infused_naively() if self.group == "plain" else contextlib.nullcontext():
            yield

    def prepare(self, setting: Any, case: StepCase) -> Step:
        inputs = inputs_of(setting, case, self.method)
        refuse_without_graphs(self, setting.device)
        inner = None
        if self.engine is None:
            model = plain_model(setting, case, self.method)
        elif self.method == "frozen":
            model = FrozenInEngine(setting, self.engine)
            inner = model.model
            inputs.pop("labels")
            refuse_plain_layers(inner, inputs)
        else:
            model = build_mit(setting, case, self.engine)
            refuse_plain_layers(model, inputs)
            inputs = prepared(model, inputs)
        # With a tiny model the question is whether everything runs, and a compiler's minutes of C++ do not answer it.
        compiler = "trace" if setting.tiny and self.compile else self.compile
        made = step_of(replace(self, compile=compiler), model, inputs, case)
        # The wrapped model is what is unwrapped at the end.
        made.model = model if inner is None else inner
        return made


_ENGINE = EngineConfig(blocks="fused")

PROVIDERS: dict[str, StepProvider] = {
    each.name: each
    for each in (
        MitProvider("frozen", "the frozen model, eager", method="frozen", group="rival", modes=("forward",)),
        MitProvider(
            "frozen-compiled",
            "the frozen model, compiled",
            method="frozen",
            group="rival",
            compile="default",
            modes=("forward",),
            seconds=50,
        ),
        MitProvider(
            "frozen-graph",
            "the frozen model, CUDA graph",
            method="frozen",
            group="rival",
            modes=("forward",),
            graph=True,
        ),
        MitProvider(
            "frozen-ours",
            "the frozen model, engine and CUDA graph",
            method="frozen",
            engine=_ENGINE,
            modes=("forward",),
            graph=True,
        ),
        MitProvider("eager", "PyTorch, keys and values infused, eager", group="plain"),
        MitProvider(
            "compiled", "PyTorch, keys and values infused, compiled", group="plain", compile="default", seconds=150
        ),
        MitProvider("visual", "576 visual tokens, eager", method="visual", group="rival", modes=("step",), seconds=40),
        MitProvider(
            "visual-compiled",
            "576 visual tokens, compiled",
            method="visual",
            group="rival",
            compile="default",
            modes=("step",),
            seconds=150,
        ),
        MitProvider("ours-plain", "epic_fast, no engine (kernels)"),
        MitProvider("ours", "+ engine", engine=_ENGINE),
        MitProvider("graphs", "+ CUDA graph", engine=_ENGINE, graph=True, seconds=12),
        MitProvider(
            "recompute-graphs",
            "+ the MLP computed twice",
            engine=replace(_ENGINE, save="recompute"),
            modes=("step",),
            graph=True,
            seconds=12,
        ),
    )
}
"""``ours`` and its graph keep both halves of each MLP for the backward pass; the last one makes them again.  Of the
frozen models the last one is the engine's: what MiT's graph takes longer than it is the infusion, and nothing else."""


# -- floors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Floor:
    """What nobody gets around: operations (two for a multiplication and addition), and bytes of weights [ARITH]."""

    flops: float
    bytes: float


def floor_of(setting: MitSetting, case: StepCase, method: str) -> Floor:
    """Of a step or forward pass, whoever computes it.

    Operations: valid tokens alone, causal attention over what is seen, in the last layer queries, output and MLP of the
    row that is read.  Backward: each product once more for the rows' gradients, attention twice, in the first infused
    layer from the output projection on; no gradients of frozen weights.  Bytes: the layers' weights once a pass that
    uses them, the trainable transforms read once and their gradients written once; no activations.
    """
    config = setting.language.config
    width, mlp, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    depth = getattr(config, "head_dim", None) or width // config.num_attention_heads
    inner, kv_inner = config.num_attention_heads * depth, config.num_key_value_heads * depth
    itemsize, steps = setting.dtype.itemsize, case.mode == "step" and method != "frozen"
    extra = setting.batch(case)["patches"].shape[1] if method == "visual" else 0
    infused = setting.layers if method == "mit" else []
    first = infused[0] if infused else 0
    key_value, query, feed = 4.0 * width * kv_inner, 2.0 * width * inner, 6.0 * width * mlp
    flops = 0.0
    for length in case.draw_lengths(setting.tokens(case)):
        rows = length + extra
        for layer in range(layers):
            read = 1 if layer == layers - 1 else rows
            pairs = rows if read == 1 else rows * (rows + 1) / 2
            attention = 4.0 * pairs * inner
            flops += rows * key_value + read * (2 * query + feed) + attention
            if steps and layer >= first:
                flops += read * (query + feed) + 2 * attention
                if layer > first or method == "visual":
                    flops += rows * key_value + read * query
    weights = itemsize * width * (2 * kv_inner + 2 * inner + 3 * mlp)
    read_bytes = weights * (layers + (layers - first if steps else 0))
    trained = len(infused) * (SOURCE + 1) * (3 * kv_inner + mlp)
    flops += 2.0 * trained * case.batch * (2 if steps else 1)
    return Floor(flops, read_bytes + 4.0 * trained * (2 if steps else 1))


# -- rows and tables -------------------------------------------------------------------------------------------------


def describe(setting: MitSetting, case: StepCase, provider: StepProvider) -> dict[str, Any]:
    """For a row: model, texts, infused layers and floors."""
    tokens, floor = setting.tokens(case), floor_of(setting, case, provider.method)
    return {
        "towers": "tiny" if setting.tiny else "LLaMA-2-7B",
        "tokens": case.tokens if isinstance(case, MitCase) else tokens,
        "texts": {**describe_lengths(case, tokens), "padded_to": tokens},
        "infused_layers": setting.layers if provider.method == "mit" else [],
        "floor_bytes": floor.bytes,
        "flops": floor.flops,
    }


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: the forward pass with what it costs over the frozen model, then steps with what the targets ask for."""
    last = {(row["mode"], row["tokens"], row["provider"]): row for row in rows}
    lines = []
    for mode in ("forward", "step"):
        sizes = sorted({row["tokens"] for row in last.values() if row["mode"] == mode})
        if not sizes:
            continue
        header = [f"MiT, {'one step' if mode == 'step' else mode}, B={BATCH}", *(f"n={size}, ms" for size in sizes)]
        for size in sizes:
            if mode == "forward":
                header += [f"n={size}: over the frozen model, eager", "compiled", "CUDA graph", "engine and graph"]
            else:
                header += [
                    f"n={size}: compiled / this",
                    "576 visual tokens / this",
                    "memory added, GiB",
                    "of compiled's",
                ]
        lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for name, provider in PROVIDERS.items():
            kin = [last.get((mode, size, name)) for size in sizes]
            if not any(row is not None and row["kind"] != "skipped" for row in kin):
                continue
            cells = [provider.label, *map(time_cell, kin)]
            for size in sizes:
                here = {each: last[mode, size, each] for each in PROVIDERS if (mode, size, each) in last}
                if mode == "forward":
                    cells += [
                        overhead_cell(here, name, f"frozen{kind}") for kind in ("", "-compiled", "-graph", "-ours")
                    ]
                    continue
                cells += [ratio_cell(here, rival, name, "p50_ms", "{:.2f}×") for rival in ("compiled", _visual(here))]
                memory = here.get(name, {}).get("peak_mib")
                cells.append("–" if memory is None else f"{memory / GIB:.2f}")
                cells.append(ratio_cell(here, name, "compiled", "peak_mib", "{:.2f}"))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, *footnotes(list(last.values()))])


def _visual(rows: dict[str, dict[str, Any]]) -> str:
    """The faster of the two with visual tokens."""
    times = [(rows.get(name, {}).get("p50_ms") or float("inf"), name) for name in ("visual", "visual-compiled")]
    return min(times)[1]


MIT = Benchmark(
    name="mit_step",
    about=__doc__,
    output=ROWS,
    cases=CASES,
    providers=PROVIDERS,
    usual=list(CASES),
    make=MitSetting.make,
    measured_at=lambda provider, case: case.mode in provider.modes,
    wanted=wanted_of,
    describe=describe,
    tables=tables,
)

if __name__ == "__main__":
    sys.exit(main(benchmark=MIT))
