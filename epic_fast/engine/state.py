"""What flows through a tower between two layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TowerState:
    """The tokens of one tower at some layer, and what later layers and the pooling need to know of its input.

    Attributes:
        hidden: ``(B, N, D)`` tokens, never prompts.
        layer: how many layers they have been through; 0 after the embeddings.
        valid: ``(B, N)`` boolean, True for tokens that are not padding; None where all are (vision).
        pool_index: ``(B,)`` the row that the tower's own rule pools; None where that is row 0.
        native_mask: the mask that the tower's own layers want for these tokens, made once by the tower and
            carried along; None both before it is made and where the tower needs none.
        has_native_mask: whether ``native_mask`` was made.
        lengths: ``(B,)`` int32, how many tokens of each sample are valid, where those are known to come first.
        irregular: whether it is known that they do not: padding on the left or in the middle.
        grid: (rows, columns) that the tokens fill, where a tower needs to know and the input said so.
        branch: ``(B, N, D)`` what the last layer adds to ``hidden``, where that sum was left to whoever reads on; None:
            nothing.
        positions: ``(N, D)`` cosines and sines of a decoder's positions, made once by the tower and carried along.
    """

    hidden: Tensor
    layer: int = 0
    valid: Tensor | None = None
    pool_index: Tensor | None = None
    native_mask: Any = None
    has_native_mask: bool = False
    lengths: Tensor | None = None
    irregular: bool = False
    grid: tuple[int, int] | None = None
    branch: Tensor | None = None
    positions: tuple[Tensor, Tensor] | None = None

    def after(self, hidden: Tensor, layer: int, branch: Tensor | None = None) -> TowerState:
        """The same input, further along."""
        return replace(self, hidden=hidden, layer=layer, branch=branch)

    def settled(self) -> TowerState:
        """With ``hidden`` as the whole sum."""
        return self if self.branch is None else replace(self, hidden=self.hidden + self.branch, branch=None)

    def one_row(self, hidden: Tensor) -> TowerState:
        """The same input with one token a sample left, ``(B, 1, D)``: the one that is pooled."""
        return replace(self, hidden=hidden, valid=None, pool_index=None, lengths=None)

    def measured(self) -> TowerState:
        """With ``lengths``, or known to be ``irregular``; waits for the device where neither is known yet."""
        if self.valid is None or self.lengths is not None or self.irregular:
            return self
        lengths, regular, _ = measure(self.valid, self.pool_index)
        return replace(self, lengths=lengths) if regular else replace(self, irregular=True)

    def tensors(self) -> Iterator[Tensor]:
        """All that lies in memory."""
        for field in fields(self):
            value = getattr(self, field.name)
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, Tensor):
                    yield each

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TowerState:
        """On another device; the native mask is made anew there."""
        hidden, valid, pool_index, lengths = (
            None if each is None else each.to(device, non_blocking=non_blocking)
            for each in (self.settled().hidden, self.valid, self.pool_index, self.lengths)
        )
        assert hidden is not None
        return TowerState(
            hidden, self.layer, valid, pool_index, lengths=lengths, irregular=self.irregular, grid=self.grid
        )


def measure(valid: Tensor, pool_index: Tensor | None = None) -> tuple[Tensor, bool, int]:
    """Where texts end, with one wait for the device.

    Args:
        valid: ``(B, N)`` boolean, True for tokens that are not padding.
        pool_index: ``(B,)`` rows that are pooled, if not the first.

    Returns:
        Valid tokens of each sample ``(B,)`` int32; whether they come first in every row, at least one and the pooled
        one among them; and the most of them.
    """
    lengths = valid.sum(dim=1, dtype=torch.int32)
    if not valid.numel():
        return lengths, False, valid.shape[1]
    first = torch.arange(valid.shape[1], device=valid.device) < lengths[:, None]
    irregular = (valid != first).any() | (lengths < 1).any()
    if pool_index is not None:
        irregular = irregular | (pool_index >= lengths).any()
    longest, wrong = torch.stack([lengths.max(), irregular.to(torch.int32)]).tolist()
    return lengths, not wrong, longest
