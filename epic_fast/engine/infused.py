"""Infusion in one layer of a frozen language model: the gates of all sources, and attention in either of two ways.

The multipliers and the shift fold into the query and the output (kernels/infused_attention/README.md), so the plain
way is the backbone's own attention over its own keys and values, between two elementwise steps: an infusion that
changes nothing gives the backbone's own bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from epic_fast import functional

Form = Literal["residual", "replace"]


class SourceInfusion(Protocol):
    """What one source puts into one layer, see :class:`epic_fast.nn.LayerInfusion`."""

    @property
    def key_multiplier(self) -> Tensor: ...
    @property
    def value_multiplier(self) -> Tensor: ...
    @property
    def value_shift(self) -> Tensor: ...
    @property
    def mlp_multiplier(self) -> Tensor: ...
    @property
    def head_bias(self) -> Tensor: ...


@dataclass(frozen=True)
class GatedInfusion:
    """What goes into one layer's attention, the gates known; Hk key/value heads of width D.

    Attributes:
        key_multiplier, value_multiplier, value_shift: ``(B, Hk, D)``.
        gate: ``(B, Hk)``.
    """

    key_multiplier: Tensor
    value_multiplier: Tensor
    value_shift: Tensor
    gate: Tensor

    @classmethod
    def of(cls, sources: Sequence[SourceInfusion], value: Tensor, lengths: Tensor | None) -> GatedInfusion:
        """The updates of all sources, each with its own gate, as one.

        Args:
            sources: at least one.
            value: ``(B, Hk, N, D)`` the layer's values.
            lengths: ``(B,)`` tokens that the gates read; None: all.
        """
        gates = [functional.infusion_gate(value, each.value_shift, each.head_bias, lengths=lengths) for each in sources]
        if len(sources) == 1:
            only = sources[0]
            return cls(only.key_multiplier, only.value_multiplier, only.value_shift, gates[0])
        # An update is linear in what its gate multiplies, so the gated ones add up to one with the gate 1.
        sums = [
            torch.stack([getattr(each, name) * gate[:, :, None] for each, gate in zip(sources, gates, strict=True)])
            for name in ("key_multiplier", "value_multiplier", "value_shift")
        ]
        return cls(*(each.sum(dim=0) for each in sums), gate=gates[0].new_ones(1, 1).expand_as(gates[0]))

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        form: Form,
        lengths: Tensor | None,
        scale: float,
    ) -> Tensor:
        """By the operation: ``(B, H, N, D)`` as the query, of which a single row is the last valid token's."""
        return functional.infused_attention(
            query,
            key,
            value,
            self.key_multiplier,
            self.value_multiplier,
            self.value_shift,
            self.gate,
            form=form,
            causal=True,
            lengths=lengths,
            scale=scale,
        )

    def around(
        self,
        attention: Callable[[Tensor, Tensor, Tensor], Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        form: Form,
    ) -> Tensor:
        """By the backbone's own attention.

        Args:
            attention: query ``(B, H, N, D)``, key and value ``(B, Hk, N, D)`` to ``(B, N, H, D)``.

        Returns:
            ``(B, N, H, D)``.
        """
        group = query.shape[1] // key.shape[1]
        start = 1.0 if form == "residual" else 0.0
        gate = self.gate[:, :, None]
        # Of each query head: (B, H, 1, D) before the attention, (B, 1, H, D) behind it.
        of_query, of_output, shift = (
            each.repeat_interleave(group, dim=1)
            for each in (
                start + gate * self.key_multiplier,
                start + gate * self.value_multiplier,
                gate * self.value_shift,
            )
        )
        output = attention((query * of_query[:, :, None]).to(query.dtype), key, value)
        return (output * of_output[:, None] + shift[:, None]).to(output.dtype)


def infused_swiglu(gate_projection: Tensor, up_projection: Tensor, sources: Sequence[SourceInfusion]) -> Tensor:
    """The hidden units ``(B, N, F)`` of a feed-forward, times what all sources make of them."""
    return functional.infused_swiglu(gate_projection, up_projection, joint_mlp_multiplier(sources))


def joint_mlp_multiplier(sources: Sequence[SourceInfusion]) -> Tensor:
    """``(B, F)``: that of the only source, else ``1 + Σ (f - 1)``, which knows no order either."""
    if len(sources) == 1:
        return sources[0].mlp_multiplier
    return 1.0 + torch.stack([each.mlp_multiplier - 1.0 for each in sources]).sum(dim=0)
