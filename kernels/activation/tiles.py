"""Rows, columns and warps of a program, by width alone: a row's bits must not depend on how many rows there are."""

from __future__ import annotations

import functools
from dataclasses import dataclass

MAX_QUANTISED_WIDTH = 16384


@dataclass(frozen=True)
class ActivationTile:
    """``rows`` x ``block`` elements (powers of two) in the registers of ``warps``."""

    rows: int
    block: int
    warps: int

    @functools.cached_property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps}


@functools.cache
def activation_tile(width: int, whole_rows: bool) -> ActivationTile:
    """16 elements a thread; ``whole_rows``, which a scale of the row needs, from 16384 columns on 32."""
    block = max(16, 1 << (width - 1).bit_length())
    if not whole_rows:
        block = min(block, 2048)
    return ActivationTile(rows=max(1, 512 // block), block=block, warps=min(max(1, block // 512), 16))
