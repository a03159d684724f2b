"""Tile sizes, from a table: head_dim, width of the type, rows of a window, and the card.

Never the batch: how many windows a program takes decides in which order a prompt's mean is summed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

# Windows of 7 x 7 tokens with up to 15 prompts.
WHOLE_ROWS = 64
# Wider heads leave no registers for the sums over windows.
WHOLE_WIDTH = 64
# B200 has this and more, A100 and MI300 have not; what spills is another tile on each.
_MUCH_SHARED = 200_000


@dataclass(frozen=True)
class WindowTile:
    """One kernel's tile.

    ``rows`` and ``keys`` are the sides of the score tile (``BLOCK_M``, ``BLOCK_N``); where a window with its prompts
    fits into both, the kernel holds it whole.  ``windows``: of one sample, that a program takes one after the other.
    ``hold``: the prompts' rows stay in registers meanwhile, if windows are whole; else they come from the caches.
    ``registers``: the most that a thread may have, so that more programs share a multiprocessor.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    windows: int = 8
    hold: bool = False
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
    """``query`` for dq over row tiles and ``key`` for dk and dv over key tiles.

    ``whole`` takes a window at once; ``bias`` does so where the gradient of the bias is wanted as well.
    """

    query: WindowTile
    key: WindowTile
    whole: WindowTile | None = None
    bias: WindowTile | None = None


def holds_whole(width: int, count: int) -> bool:
    """Whether one program can hold a window; ``width`` is the padded head_dim, ``count`` rows, prompts included."""
    return count <= WHOLE_ROWS and width <= WHOLE_WIDTH


@functools.cache
def forward_tile(width: int, itemsize: int, count: int, hopper: bool, shared: int) -> WindowTile:
    """The forward's tile; arguments as those of :func:`holds_whole`, and the bytes of shared memory of a block."""
    if itemsize == 4:
        # IEEE products run on the plain units and keep operands in registers, so many warps share a small tile.
        return WindowTile(rows=32 if width <= 64 else 16, keys=32, warps=8, stages=1)
    if holds_whole(width, count):
        # Three programs share a multiprocessor of an H100; with the prompts held as well they would spill.
        return WindowTile(rows=64, keys=64, warps=4, stages=2, registers=168 if hopper else None)
    if not hopper:
        return WindowTile(rows=32, keys=32, warps=4, stages=2, windows=4)
    return WindowTile(rows=64, keys=64 if width <= 64 else 32, warps=4, stages=2, windows=4)


@functools.cache
def backward_tiles(width: int, itemsize: int, count: int, hopper: bool, shared: int) -> BackwardTiles:
    """The backward's tiles; arguments as those of :func:`forward_tile`."""
    whole = bias = None
    if holds_whole(width, count):
        bias = WindowTile(rows=64, keys=64, warps=8, stages=1)
    if itemsize == 4:
        side = 32 if width <= 64 else 16
        small = WindowTile(rows=side, keys=side, warps=8, stages=1)
        return BackwardTiles(query=small, key=small, bias=bias)
    if width > 64:
        small = WindowTile(rows=32, keys=32, warps=4, stages=1, windows=4)
        return BackwardTiles(query=small, key=small)
    if bias is not None:
        whole = WindowTile(rows=64, keys=64, warps=4, stages=2 if hopper else 1)
    if hopper:
        query = WindowTile(rows=64, keys=32, warps=4, stages=2, windows=4)
    elif shared < _MUCH_SHARED:
        query = WindowTile(rows=64, keys=32, warps=8, stages=1, windows=4)
    else:
        query = WindowTile(rows=32, keys=16, warps=4, stages=1, windows=4)
    return BackwardTiles(
        query=query,
        key=WindowTile(rows=32, keys=64 if hopper else 32, warps=4, stages=1, windows=4),
        whole=whole,
        bias=bias,
    )
