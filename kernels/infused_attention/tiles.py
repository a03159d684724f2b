"""Tile sizes, from a table: head_dim, width of the type, rows, and the shared memory of the card.  Never the batch."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """One kernel's tile: the sides of the score tile, warps, stages of the loop."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class BackwardTiles:
    """``row`` for what belongs to queries and channels, ``key`` for dk and dv."""

    row: Tile
    key: Tile


# From here on (H100, B200) registers are what is scarce, not shared memory.
_MUCH_SHARED = 160_000


def size_class(count: int) -> int:
    """All that the tables look at of a number of rows, so that few kernels serve all lengths."""
    return 16 if count <= 16 else 32 if count <= 32 else 64


@functools.cache
def forward_tile(width: int, itemsize: int, rows: int, keys: int, shared: int) -> Tile:
    """The forward's tile.  ``width`` is the padded head_dim, ``rows`` and ``keys`` are classes (:func:`size_class`)."""
    if itemsize == 4:
        # Products of float32 keep their operands in registers: many warps share a small tile.
        most = 16 if width > 128 else 32
        return Tile(rows=min(rows, most), keys=most, warps=8, stages=1)
    if width > 128:
        return Tile(rows=min(rows, 64), keys=32, warps=8 if rows > 32 else 4, stages=2 if shared > _MUCH_SHARED else 1)
    warps = 4 if rows > 16 else 2
    return Tile(rows=min(rows, 64), keys=64 if shared > _MUCH_SHARED else 32, warps=warps, stages=2)


@functools.cache
def backward_tiles(width: int, itemsize: int, rows: int, keys: int, shared: int) -> BackwardTiles:
    """The backward's tiles; arguments as those of :func:`forward_tile`."""
    if itemsize == 4:
        most = 16 if width > 64 else 32
        small = Tile(rows=min(rows, most), keys=most, warps=8, stages=1)
        return BackwardTiles(row=small, key=small)
    # What lives longest are two tiles of rows in float32 and vectors, which threads of different rows hold alike:
    # four warps would not hold them.
    if width > 128:
        small = Tile(rows=min(rows, 32), keys=32, warps=8, stages=1)
        return BackwardTiles(row=small, key=small)
    row = Tile(rows=min(rows, 64), keys=32, warps=8 if rows > 32 else 4, stages=1)
    key = Tile(rows=min(rows, 32), keys=min(keys, 64), warps=8 if width > 64 and keys > 32 else 4, stages=1)
    return BackwardTiles(row=row, key=key)
