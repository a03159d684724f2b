"""What flows through a tower between two layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    """

    hidden: Tensor
    layer: int = 0
    valid: Tensor | None = None
    pool_index: Tensor | None = None
    native_mask: Any = None
    has_native_mask: bool = False

    def after(self, hidden: Tensor, layer: int) -> TowerState:
        """The same input, further along."""
        return replace(self, hidden=hidden, layer=layer)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TowerState:
        """On another device; the native mask is made anew there."""
        hidden, valid, pool_index = (
            None if each is None else each.to(device, non_blocking=non_blocking)
            for each in (self.hidden, self.valid, self.pool_index)
        )
        assert hidden is not None
        return TowerState(hidden, self.layer, valid, pool_index)
