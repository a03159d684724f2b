"""Rows and warps of a program, by width alone: a row's bits must not depend on how many rows there are."""

from __future__ import annotations

import functools
from dataclasses import dataclass

MAX_WIDTH = 16384


@dataclass(frozen=True)
class RowTile:
    """``rows`` whole rows of ``block`` columns (a power of two, the width or more) in the registers of ``warps``."""

    rows: int
    block: int
    warps: int

    @functools.cached_property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps}


@functools.cache
def norm_tile(width: int) -> RowTile:
    """16 columns a thread from 512 columns on, 32 from 16384 on; several rows a warp below.

    No two warps may hold the same element: rows are summed in place.
    """
    block = max(16, 1 << (width - 1).bit_length())
    return RowTile(rows=max(1, 512 // block), block=block, warps=min(max(1, block // 512), 16))


@functools.cache
def ended_tile(depth: int, norm: RowTile) -> RowTile:
    """For rows of which products alone are wanted: parts of a row, or some rows, of at most 32 columns a thread, both
    of what is read (``depth``) and of the row itself, which ``norm`` holds whole."""
    room = 1024 * norm.warps
    block = min(max(16, 1 << (depth - 1).bit_length()), room)
    return RowTile(rows=room // max(block, norm.block), block=block, warps=norm.warps)
