"""Infusion: a feature of another modality made into what multiplies and shifts keys, values and hidden MLP units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerInfusion:
    """What one source puts into one layer; Hk key/value heads of width D, F hidden units.

    Attributes:
        key_multiplier, value_multiplier, value_shift: ``(B, Hk, D)``.
        mlp_multiplier: ``(B, F)``.
        head_bias: ``(Hk,)``, the learned scalar L of each head's gate.
    """

    key_multiplier: Tensor
    value_multiplier: Tensor
    value_shift: Tensor
    mlp_multiplier: Tensor
    head_bias: Tensor


class Infusion(nn.Module):
    """One source's transforms into all infused layers (arXiv 2403.05060): full-rank, one linear of its own for each.

    They lie in one matrix, so that all of them are one product.  The released code has a fifth transform, a shift of
    the keys.  It moves all scores of a query alike, so the softmax takes it out again and its gradient is exactly
    zero; ``key_shift`` keeps it, for whoever wants the published number of parameters.

    Args:
        source_width: S, of the source's feature.
        layers: number of infused layers.
        kv_heads, head_dim, mlp_width: Hk, D and F of the language model.
        form: ``"residual"`` or ``"replace"``, see :func:`epic_fast.functional.infused_attention`.
        init: ``"identity"`` starts from the frozen model (in the form ``"replace"`` up to rounding, and to the cosine
            in the gate if ``value_shift_std`` is not 0), ``"released"`` as ``nn.Linear`` does.
        value_shift_std: standard deviation of the value shift's weights under ``"identity"``, in the form ``"replace"``
            of its biases too.
        head_bias_init: L of every head at the start.
        key_shift: keep the transform without effect.
        sources: how many sources add up.  In the form ``"replace"`` each starts with its part of the frozen model's
            keys and values.
    """

    def __init__(
        self,
        source_width: int,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        mlp_width: int,
        form: Literal["residual", "replace"] = "residual",
        init: Literal["identity", "released"] = "identity",
        value_shift_std: float = 0.0,
        head_bias_init: float = 1.0,
        key_shift: bool = False,
        sources: int = 1,
    ):
        super().__init__()
        self.layers = layers
        self.heads = (kv_heads, head_dim)
        inner = kv_heads * head_dim
        # Rows of each layer's part of the matrix.
        self.parts = {
            "key_multiplier": inner,
            "value_multiplier": inner,
            "value_shift": inner,
            "mlp_multiplier": mlp_width,
            **({"key_shift": inner} if key_shift else {}),
        }
        self.transform = nn.Linear(source_width, layers * sum(self.parts.values()))
        self.head_bias = nn.Parameter(torch.full((layers, kv_heads), float(head_bias_init)))
        if init == "identity":
            self._start_from_identity(form, value_shift_std, head_bias_init, sources)

    @torch.no_grad()
    def _start_from_identity(self, form: str, value_shift_std: float, head_bias_init: float, sources: int) -> None:
        nn.init.zeros_(self.transform.weight)
        nn.init.zeros_(self.transform.bias)
        # (layers, rows of a layer, S) and (layers, rows of a layer)
        weight = self.transform.weight.unflatten(0, (self.layers, -1)).split(list(self.parts.values()), dim=1)
        bias = self.transform.bias.unflatten(0, (self.layers, -1)).split(list(self.parts.values()), dim=1)
        named = {name: (weight[place], bias[place]) for place, name in enumerate(self.parts)}
        nn.init.normal_(named["value_shift"][0], std=value_shift_std)
        named["mlp_multiplier"][1].fill_(1.0)
        if form == "replace":
            # What the gate takes away at the start, 1 / σ(L), dealt out to the sources, whose sum it is.
            reopened = (1.0 + math.exp(-head_bias_init)) / sources
            named["key_multiplier"][1].fill_(reopened)
            named["value_multiplier"][1].fill_(reopened)
            # A feature of zeros (no frame at all) would leave a shift of zeros, where the cosine has a slope of 1e8.
            nn.init.normal_(named["value_shift"][1], std=value_shift_std)

    @property
    def parameters_per_layer(self) -> int:
        """Weights and biases of the transforms into one layer, the gate's scalars not counted."""
        return sum(self.parts.values()) * (self.transform.in_features + 1)

    def forward(self, source: Tensor) -> list[LayerInfusion]:
        """Features ``(B, S)`` to what goes into each infused layer, in order; float32 under autocast too."""
        with torch.autocast(source.device.type, enabled=False):
            made = self.transform(source.to(self.transform.weight.dtype)).unflatten(1, (self.layers, -1))
        infusions = []
        for layer, rows in enumerate(made.unbind(dim=1)):
            each = dict(zip(self.parts, rows.split(list(self.parts.values()), dim=1), strict=True))
            infusions.append(
                LayerInfusion(
                    key_multiplier=each["key_multiplier"].unflatten(1, self.heads),
                    value_multiplier=each["value_multiplier"].unflatten(1, self.heads),
                    value_shift=each["value_shift"].unflatten(1, self.heads),
                    mlp_multiplier=each["mlp_multiplier"],
                    head_bias=self.head_bias[layer],
                )
            )
        return infusions


class SequenceEncoder(nn.Module):
    """A sequence of features to one: layer norm, linear, GELU, mean over its valid frames.

    Args:
        width: of a frame.
        size: of the feature that comes out.
    """

    def __init__(self, width: int, size: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, size)

    def forward(self, frames: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Frames ``(B, T, width)`` to ``(B, size)``; a sample without a frame gives zeros.

        Args:
            lengths: ``(B,)`` valid frames of each sample, the first ones; None: all.
        """
        with torch.autocast(frames.device.type, enabled=False):
            frames = frames.to(self.linear.weight.dtype)
            if lengths is None:
                return nn.functional.gelu(self.linear(self.norm(frames))).sum(dim=1) / max(frames.shape[1], 1)
            lengths = lengths.clamp(0, frames.shape[1])
            valid = torch.arange(frames.shape[1], device=frames.device) < lengths[:, None]
            # What stands behind the end is never read, not even where it is no number.
            frames = torch.where(valid[:, :, None], frames, 0.0)
            made = nn.functional.gelu(self.linear(self.norm(frames))) * valid[:, :, None]
            return made.sum(dim=1) / lengths.clamp_min(1)[:, None].to(made.dtype)
