"""Tile sizes, from a table: head_dim, width of the type, rows of a window, and the shared memory of the card.

Never the batch: how many windows a program takes decides in which order a prompt's mean is summed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class WindowTile:
    """One kernel's tile.

    ``rows`` and ``keys`` are the sides of the score tile (``BLOCK_M``, ``BLOCK_N``); where a window with its prompts
    fits into both, the kernel holds it whole.  ``windows``: of one sample, that a program takes one after the other.
    ``hold``: the prompts' rows stay in registers meanwhile.  ``registers``: the most that a thread may have, so that
    more programs share a multiprocessor.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    windows: int = 8
    hold: bool = True
    registers: int | None = None

    def whole(self, count: int) -> bool:
        """Whether a window of so many rows, prompts included, lies in one tile."""
        return count <= min(self.rows, self.keys)

    @functools.cached_property
    def options(self) -> dict[str, int]:
        """Launch options."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, **limit}


@dataclass(frozen=True)
class BackwardTiles:
    """``query`` for dq over row tiles and ``key`` for dk and dv over key tiles; ``whole`` takes a window at once."""

    query: WindowTile
    key: WindowTile
    whole: WindowTile | None = None


# A window of 7 x 7 tokens with up to 15 prompts.
WHOLE_ROWS = 64
# Wider heads leave no registers for the sums over windows.
WHOLE_WIDTH = 64


@functools.cache
def forward_tile(width: int, itemsize: int, count: int, shared: int) -> WindowTile:
    """The forward's tile.  ``width`` is the padded head_dim, ``count`` the rows of a window with its prompts."""
    if itemsize == 4:
        # IEEE products run on the plain units and keep operands in registers, so many warps share a small tile.
        if width > 64:
            return WindowTile(rows=16, keys=32, warps=8, stages=1, hold=False)
        return WindowTile(rows=32, keys=32, warps=8, stages=1, hold=False)
    if count <= WHOLE_ROWS and width <= WHOLE_WIDTH:
        return WindowTile(rows=64, keys=64, warps=4, stages=2, registers=168)
    return WindowTile(rows=64, keys=32 if width > 64 else 64, warps=4, stages=2, windows=4, hold=False)


@functools.cache
def backward_tiles(width: int, itemsize: int, count: int, shared: int) -> BackwardTiles:
    """The backward's tiles; arguments as those of :func:`forward_tile`."""
    fits = count <= WHOLE_ROWS and width <= WHOLE_WIDTH
    if itemsize == 4:
        side = 32 if width <= 64 else 16
        small = WindowTile(rows=side, keys=side, warps=8, stages=1, hold=False)
        whole = WindowTile(rows=64, keys=64, warps=16, stages=1, hold=False)
        return BackwardTiles(query=small, key=small, whole=whole if fits else None)
    if width > 64:
        small = WindowTile(rows=32, keys=32, warps=4, stages=1, windows=4, hold=False)
        return BackwardTiles(query=small, key=small)
    loop = WindowTile(rows=64, keys=32, warps=4, stages=2, windows=4, hold=False)
    key = WindowTile(rows=32, keys=64, warps=4, stages=1, windows=4, hold=False)
    whole = WindowTile(rows=64, keys=64, warps=4, stages=1)
    return BackwardTiles(query=loop, key=key, whole=whole if fits else None)
