"""What one step is measured at: layer pairs, batches, texts, the weights, and how many operations a step is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from epic_fast import EpicConfig

BATCHES = (1, 8, 64, 256)
CLASSES = 101
LORA_RANK = 16
LAYOUTS = {
    "late": "EPIC's default: prompts in the last six layers of each tower",
    "deep": "text layer j with vision layer 2j + 1, twelve pairs",
}
# Start and end included; about what one-sentence captions have.  An assumption, the same for all providers.
MEDIAN_LENGTH, SPREAD, FEWEST = 16 / 77, 0.45, 4


@dataclass(frozen=True)
class StepCase:
    """A layout at a batch.

    Attributes:
        layout: one of :data:`LAYOUTS`, or another method's name.
        batch: B.
        mode: ``"step"`` (forward, loss, gradients of the trainable tensors), ``"inference"`` (logits alone) or
            ``"forward"`` (logits from pictures alone, texts having been read before).
        lengths: ``"captions"`` (see :meth:`draw_lengths`) or ``"full"``, every text as long as the tower takes.
    """

    layout: Literal["late", "deep", "mope", "mit"]
    batch: int
    mode: Literal["step", "inference", "forward"] = "step"
    lengths: Literal["captions", "full"] = "captions"

    @property
    def name(self) -> str:
        """Such as ``late-64``, ``deep-64-inference``, ``late-64-full``."""
        more = [self.mode] if self.mode != "step" else []
        more += [self.lengths] if self.lengths != "captions" else []
        return "-".join([self.layout, str(self.batch), *more])

    def draw_lengths(self, longest: int) -> list[int]:
        """Tokens of each text, start and end included.

        Captions: the quantiles of a log-normal with median ``longest * 16 / 77`` and deviation 0.45 in the logarithm,
        cut to ``[4, longest]``, in random order (seed 0); so no batch has an odd longest text by chance.
        """
        if self.lengths == "full":
            return [longest] * self.batch
        quantiles = (torch.arange(self.batch, dtype=torch.float64) + 0.5) / self.batch
        tokens = (longest * MEDIAN_LENGTH * (SPREAD * torch.special.ndtri(quantiles)).exp()).round().long()
        order = torch.randperm(self.batch, generator=torch.Generator().manual_seed(0))
        return [int(each) for each in tokens.clamp(FEWEST, longest)[order]]


CASES: dict[str, StepCase] = {
    case.name: case
    for case in (
        *(StepCase(layout, batch) for layout in ("late", "deep") for batch in BATCHES),
        *(StepCase(layout, batch, "inference") for layout in ("late", "deep") for batch in (1, 64)),
        *(StepCase(layout, 64, lengths="full") for layout in ("late", "deep")),
    )
}


@dataclass(frozen=True)
class TowerShape:
    """Layers, width, width of the MLP, and the most rows of tokens of one tower."""

    layers: int
    width: int
    mlp: int
    tokens: int


@dataclass
class Setting:
    """Frozen weights on a device, and batches for them.

    Attributes:
        clip: a ``CLIPModel`` with random weights in ``dtype``.
        tiny: towers of a few small layers, for a look at whether everything runs.
    """

    clip: Any
    device: torch.device
    dtype: torch.dtype
    tiny: bool
    _batches: dict[StepCase, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def make(cls, device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Setting:
        """CLIP ViT-L/14 (24 vision layers of width 1024, 12 text layers of width 768), or a tiny one."""
        torch.manual_seed(0)
        if tiny:
            from epic_fast.testing import tiny_clip

            return cls(tiny_clip(text_layers=3, vision_layers=6).to(device, dtype), device, dtype, tiny)
        from transformers import CLIPConfig, CLIPModel

        text = {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 77,
            "vocab_size": 49408,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": 49407,
            "hidden_act": "quick_gelu",
        }
        vision = {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "hidden_act": "quick_gelu",
        }
        with torch.device(device):
            clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))
        clip.eval().to(device=device, dtype=dtype)  # pyright: ignore[reportCallIssue]
        return cls(clip, device, dtype, tiny)

    @property
    def text(self) -> TowerShape:
        config = self.clip.config.text_config
        return TowerShape(
            config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.max_position_embeddings
        )

    @property
    def vision(self) -> TowerShape:
        config = self.clip.config.vision_config
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        return TowerShape(config.num_hidden_layers, config.hidden_size, config.intermediate_size, tokens)

    def epic(self, layout: str) -> EpicConfig:
        """The method's configuration.

        Open gates instead of the default's 0, so that the hub's projections have gradients to compare, and no
        dropout, so that two providers compute the same; neither changes what is computed or how long that takes.
        """
        pairs = [(text, 2 * text + 1) for text in range(self.text.layers)] if layout == "deep" else None
        return EpicConfig(layer_pairs=pairs, num_layer_pairs=2 if self.tiny else 6, gate_init=0.1, head_dropout=0.0)

    def pairs(self, layout: str) -> list[tuple[int, int]]:
        return self.epic(layout).resolve_layer_pairs(self.text.layers, self.vision.layers)

    def batch(self, case: StepCase) -> dict[str, Tensor]:
        """Random pictures, texts padded to the longest that the tower takes, and labels."""
        if case not in self._batches:
            generator = torch.Generator().manual_seed(1)
            config, longest = self.clip.config.text_config, self.text.tokens
            size = self.clip.config.vision_config.image_size
            lengths = torch.tensor(case.draw_lengths(longest))
            ids = torch.randint(3, config.vocab_size - 3, (case.batch, longest), generator=generator)
            position = torch.arange(longest)
            ids[:, 0] = config.bos_token_id
            ids = torch.where(position == lengths[:, None] - 1, config.eos_token_id, ids)
            valid = position < lengths[:, None]
            ids = torch.where(valid, ids, config.pad_token_id)
            self._batches[case] = {
                "pixel_values": torch.randn(case.batch, 3, size, size, generator=generator).to(self.device, self.dtype),
                "input_ids": ids.to(self.device),
                "attention_mask": valid.long().to(self.device),
                "labels": torch.randint(0, CLASSES, (case.batch,), generator=generator).to(self.device),
            }
        return self._batches[case]

    def forget(self) -> None:
        """Drop the batches made so far."""
        self._batches.clear()


# -- operations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What has to be done for one sample in one layer of a tower, in rows.

    Attributes:
        rows: rows whose keys and values are read: tokens and prompts.
        read: of these, rows whose output is read later (all, or in the last layer the pooled one).
        pairs: (query, key) pairs that see each other, queries among ``read``.
        wanted: rows whose input needs a gradient (0 below the first prompts).
        wanted_pairs: pairs that these gradients pass: all, or those with a wanted query or key.
    """

    rows: int
    read: int
    pairs: int
    wanted: int = 0
    wanted_pairs: int = 0

    def forward(self, width: int, mlp: int) -> float:
        """Keys and values ``4 n d²``, queries and output ``4 q d²``, MLP ``4 q d f``, attention ``4 pairs d``."""
        return 4.0 * width * (self.rows * width + self.read * (width + mlp) + self.pairs)

    def backward(self, width: int, mlp: int) -> float:
        """Gradients of activations only: each product once more, attention's two products twice."""
        if not self.wanted:
            return 0.0
        queries = min(self.read, self.wanted)
        inputs = 2.0 * width * width * (queries + 2 * self.wanted)
        return inputs + 2.0 * self.read * width * (width + 2 * mlp) + 8.0 * self.wanted_pairs * width


def vision_work(shape: TowerShape, prompted: Sequence[int], prompts: int) -> list[Work]:
    """Of each vision layer: everybody sees everybody; the last layer's class token is pooled."""
    work, tokens = [], shape.tokens
    first = min(prompted, default=shape.layers)
    for layer in range(shape.layers):
        rows = tokens + (prompts if layer in prompted else 0)
        read = 1 if layer == shape.layers - 1 else rows
        work.append(_gradients(Work(rows, read, read * rows), layer - first, prompts))
    return work


def text_work(shape: TowerShape, prompted: Sequence[int], prompts: int, length: int) -> list[Work]:
    """Of each text layer, for a text of ``length`` tokens: causal; prompts are seen by all and see all."""
    work = []
    first = min(prompted, default=shape.layers)
    for layer in range(shape.layers):
        here = prompts if layer in prompted else 0
        last = layer == shape.layers - 1
        pairs = length + here if last else length * (length + 1) // 2 + length * here + here * (here + length)
        rows = length + here
        work.append(_gradients(Work(rows, 1 if last else rows, pairs), layer - first, prompts))
    return work


def _gradients(work: Work, above: int, prompts: int) -> Work:
    """With what the gradients of a layer ``above`` the first prompts want; in the first one only prompts want any."""
    if above < 0:
        return work
    if above > 0:
        return Work(work.rows, work.read, work.pairs, work.rows, work.pairs)
    pairs = prompts * (work.rows + work.read - prompts if work.read > 1 else 1)
    return Work(work.rows, work.read, work.pairs, prompts, pairs)


def useful_flops(setting: Setting, case: StepCase, method: str = "epic", *, from_prefix: bool = False) -> float:
    """Operations (two for a multiplication and addition) that the method needs for one step [ARITH].

    The same for everybody who computes the method, however much more they do: valid tokens only, causal attention
    over what is seen, in the last layer the pooled row alone (queries, output projection, MLP), no gradients of
    frozen weights, none below the first prompts, and in the first prompted layer those of the prompts alone.

    For n rows of width d, MLP width f, s pairs that see each other: a whole layer is ``8 n d² + 4 n d f + 4 s d``
    forward, and backward as much with attention twice (recomputed scores are not counted).  To that come the patch
    embedding, the hub (two maps of P rows, cosines and two mixes a step; backward twice that) and the head.

    Args:
        method: ``"epic"``; ``"frozen"``, the two towers forward without prompts; ``"lora"``, rank 16 on queries and
            values of all layers; ``"full"``, gradients of all weights.
        from_prefix: without what lies below the first prompts.
    """
    text, vision = setting.text, setting.vision
    gradients = case.mode == "step" and method != "frozen"
    config = setting.epic(case.layout)
    pairs = setting.pairs(case.layout) if method == "epic" else []
    prompts = config.prompt_length if pairs else 0
    in_text, in_vision = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    lengths = case.draw_lengths(text.tokens)
    towers = [(vision, vision_work(vision, in_vision, prompts), case.batch, in_vision)]
    towers += [(text, text_work(text, in_text, prompts, length), 1, in_text) for length in lengths]
    total = 0.0
    for shape, layers, samples, prompted in towers:
        for layer, work in enumerate(layers):
            if from_prefix and layer < min(prompted, default=0):
                continue
            forward = work.forward(shape.width, shape.mlp)
            backward = work.backward(shape.width, shape.mlp)
            if method in ("lora", "full"):
                everything = Work(work.rows, work.read, work.pairs, work.rows, work.pairs)
                backward = everything.backward(shape.width, shape.mlp)
            if method == "lora":
                adapters = 2.0 * 2 * shape.width * LORA_RANK * (work.read + work.rows)
                forward, backward = forward + adapters, backward + 2 * adapters
            if method == "full":
                backward += forward - 4.0 * work.pairs * shape.width
            total += samples * (forward + (backward if gradients else 0.0))
    if not from_prefix:
        patch = setting.clip.config.vision_config.patch_size**2 * 3
        patches = 2.0 * case.batch * (vision.tokens - 1) * patch * vision.width
        total += patches * (2 if gradients and method == "full" else 1)
    times = 3 if gradients else 1
    if pairs:
        maps = 4.0 * prompts * text.width * vision.width
        mixes = 2.0 * prompts * prompts * (2 * text.width + vision.width)
        total += times * ((len(pairs) - 1) * case.batch * (maps + mixes) + maps / 2)
    if method != "frozen":
        total += times * 2.0 * case.batch * (text.width + vision.width) * CLASSES
    return total


def describe_lengths(case: StepCase, longest: int) -> dict[str, Any]:
    """For a row: how texts were drawn, and what came out."""
    lengths = sorted(case.draw_lengths(longest))
    return {
        "drawn": case.lengths,
        "median": lengths[math.floor(len(lengths) / 2)],
        "longest": lengths[-1],
        "padded_to": longest,
    }
