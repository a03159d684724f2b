"""Tile sizes, from a table: head_dim, width of the type, rows, and the shared memory of the card.  Never the batch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Tile:
    """One kernel's tile.

    ``rows`` and ``keys`` are the sides of the score tile (``BLOCK_M``, ``BLOCK_N``).  ``tail`` is the width of the key
    tiles from the first one that needs a mask on; equal to ``keys`` with ``split=False``, where one loop takes all.
    ``row_tail`` > 0: a last row tile with at most that many rows runs in a tile of that many.  ``single``: all keys lie
    in one tile, no loop.  ``registers``: the most that a thread may have, so that more programs share a multiprocessor.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    tail: int = 0
    split: bool = True
    row_tail: int = 0
    single: bool = False
    registers: int | None = None

    @property
    def tail_keys(self) -> int:
        return self.tail or self.keys

    @functools.cached_property
    def options(self) -> dict[str, int]:
        """Launch options."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, **limit}


@dataclass(frozen=True)
class BackwardTiles:
    """``query`` for dq over row tiles, ``key`` for dk and dv over key tiles; ``one_pass`` takes both in one kernel."""

    query: Tile
    key: Tile
    one_pass: Tile | None = None


# From here on (H100, B200) products read both operands from shared memory, and registers are free for larger tiles.
_MUCH_SHARED = 200_000
# Up to here (MI300) one buffer a tensor is what fits.
_LITTLE_SHARED = 70_000
_SHORT = 128
_MEDIUM = 384
_LONG = 560


Split = Literal["hopper", "portable"]
"""Where products of float32 run on tensor cores, in pieces (:func:`epic_fast.kernels.common.plan.precision`): on Hopper
one operand comes from shared memory, elsewhere the pieces of both fill the registers."""


def split_of(precision: str, hopper: bool) -> Split | None:
    if precision == "ieee":
        return None
    return "hopper" if hopper else "portable"


def size_class(count: int) -> int:
    """Short, medium, long or longer: all that the tables look at, so that few kernels serve all lengths."""
    return next((bound for bound in (_SHORT, _MEDIUM, _LONG) if count <= bound), 1 << 30)


@functools.cache
def forward_tile(
    width: int, itemsize: int, rows: int, keys: int, masked: bool, shared: int, split: Split | None = None
) -> Tile:
    """The forward's tile.  ``width`` is the padded head_dim, ``rows`` and ``keys`` are classes (:func:`size_class`),
    ``masked`` says that not all rows see the same keys."""
    if itemsize == 4:
        if split == "hopper" and width <= 64:
            return Tile(rows=64, keys=32, warps=4, stages=2)
        if split is not None and width <= 64:
            return Tile(rows=32, keys=32, warps=8, stages=1)
        # IEEE products run on the plain units and keep operands in registers, so many warps share a small tile.
        if width > 128:
            return Tile(rows=16, keys=16, warps=8, stages=1)
        return Tile(rows=32 if width > 64 else 64, keys=32, warps=8, stages=2 if width <= 64 else 1)
    if width > 128:
        return Tile(rows=64, keys=32, warps=8, stages=2 if shared > 160_000 else 1)
    if width > 64:
        return Tile(rows=64, keys=64 if shared > 160_000 else 32, warps=4, stages=2)
    if keys == _SHORT:
        return Tile(rows=64 if shared > _LITTLE_SHARED else 32, keys=128, warps=4, stages=1, single=True)
    if keys == _MEDIUM or shared < _MUCH_SHARED:
        return Tile(rows=64, keys=32, warps=4, stages=3)
    return Tile(rows=64, keys=64, tail=32, warps=4, stages=3)


@functools.cache
def backward_tiles(
    width: int, itemsize: int, rows: int, keys: int, masked: bool, shared: int, split: Split | None = None
) -> BackwardTiles:
    """The backward's tiles; arguments as those of :func:`forward_tile`."""
    if itemsize == 4:
        if split == "hopper" and width <= 64:
            query = Tile(rows=64, keys=32, warps=4, stages=1, split=False)
            return BackwardTiles(query=query, key=Tile(rows=32, keys=64, warps=4, stages=1))
        if split is not None and width <= 64:
            query = Tile(rows=32, keys=16, warps=8, stages=1, split=False)
            return BackwardTiles(query=query, key=Tile(rows=16, keys=32, warps=8, stages=1))
        side = 32 if width <= 64 else 16
        small = Tile(rows=32 if width <= 128 else 16, keys=side, warps=8, stages=1)
        return BackwardTiles(query=small, key=small)
    if width > 128:
        small = Tile(rows=32, keys=32, warps=4, stages=1)
        return BackwardTiles(query=small, key=small)
    if width > 64:
        return BackwardTiles(
            query=Tile(rows=64, keys=32, warps=4, stages=1), key=Tile(rows=32, keys=64, warps=4, stages=1)
        )
    hopper = shared >= _MUCH_SHARED
    query = Tile(rows=64, keys=32, warps=4, stages=3 if hopper else 2, split=not hopper)
    if hopper and not masked and rows > _LONG:
        # Twice the rows read keys and values half as often; below, more of them would be none.
        query = Tile(rows=128, keys=64, tail=32, warps=8, stages=3, registers=128)
    key = Tile(rows=32, keys=64, warps=4, stages=2 if shared > _LITTLE_SHARED else 1)
    if hopper:
        key = Tile(rows=32 if masked else 64, keys=64, warps=4, stages=3)
    one_pass = None
    if rows == _SHORT and keys == _SHORT:
        query = Tile(rows=64, keys=32, warps=4, stages=2)
        key = Tile(rows=64 if hopper else 32, keys=32, warps=4, stages=2 if shared > _LITTLE_SHARED else 1)
        if shared > _LITTLE_SHARED:
            one_pass = Tile(rows=128, keys=64 if hopper else 32, warps=8, stages=1)
    return BackwardTiles(query=query, key=key, one_pass=one_pass)
