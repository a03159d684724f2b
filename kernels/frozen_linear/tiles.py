"""Tile sizes, from a table: type and card; where several are given, the length of a sum and the number of tiles choose.

A row's bits must not depend on how many others there are.  So the tiles of one entry differ in their extent, and in how
much is on its way, alone: the steps of a sum are as long and come in the same order, and a test on the GPU holds all of
them to the same bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ProductTile:
    """``rows`` x ``columns`` of the result are one tile, its sum runs in steps of ``depth``.

    ``group``: so many rows of tiles go through all columns before the next ones, so that their operands stay in the L2
    cache.  ``parts``: the epilogue takes a tile in so many parts.  ``descriptors``: operands and results go by
    tensor descriptors (TMA).  ``persistent``: as many programs as the card runs at once, each with several tiles.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    parts: int = 1
    descriptors: bool = False
    persistent: bool = False

    def count(self, rows: int, columns: int) -> int:
        """Tiles of a result."""
        return -(-rows // self.rows) * -(-columns // self.columns)

    @functools.cached_property
    def options(self) -> dict[str, int]:
        """Launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# From here on (H100, B200) products read both operands from shared memory, and there are descriptors.
_MUCH_SHARED = 200_000
# Time of a wide tile in that of two small ones, from one H100 at 16960 x 4096 x 1024.
WIDE_TIME = 0.93
# Wide tiles of 16 bits need so deep a sum and so many rounds of small ones; README.md has what they took.
WIDE_DEPTH, WIDE_ROUNDS = 1024, 16
# Up to here a third tile at once on a multiprocessor is worth more than a third step on its way, unless an epilogue
# that keeps the derivative wants the registers.
SHORT_DEPTH = 512
# Up to here (MI300) one buffer an operand is what fits.
_LITTLE_SHARED = 70_000


def product_tile(
    itemsize: int,
    descriptors: bool,
    hopper: bool,
    shared: int,
    rows: int,
    columns: int,
    depth: int,
    processors: int,
    keeps: bool = False,
) -> ProductTile:
    """The tile for a result of ``rows`` x ``columns``.

    Args:
        itemsize: of the operands.
        descriptors: card and layout allow them.
        hopper: the card is one, where wide tiles were measured.
        shared: bytes of shared memory that a block may have.
        rows, columns: of the result.
        depth: terms of a sum.
        processors: multiprocessors of the card.
        keeps: the epilogue also writes what backward needs of the activation.
    """
    tiles = product_tiles(itemsize, descriptors, hopper, shared)
    if len(tiles) == 1:
        return tiles[0]
    small, wide, *short = tiles
    if short and depth <= SHORT_DEPTH and not keeps:
        return short[0]
    # A multiprocessor takes a wide tile in the time of two small ones; the last round need not be full.
    rounds = -(-small.count(rows, columns) // processors)
    if itemsize == 2 and (depth < WIDE_DEPTH or rounds < WIDE_ROUNDS):
        return small
    wide_rounds = -(-wide.count(rows, columns) // processors)
    return wide if 2 * WIDE_TIME * wide_rounds < rounds else small


@functools.cache
def product_tiles(itemsize: int, descriptors: bool, hopper: bool, shared: int) -> tuple[ProductTile, ...]:
    """All tiles among which :func:`product_tile` chooses: one, or a small and a wide one and, of 16 bits, a small one
    with less on its way."""
    if itemsize == 4:
        return (ProductTile(rows=64, columns=64, depth=32, warps=8, stages=2),)
    depth = 64 if itemsize == 2 else 128
    if descriptors and shared >= _MUCH_SHARED:
        small = ProductTile(rows=128, columns=128, depth=depth, warps=4, stages=3, parts=2, descriptors=True)
        if not hopper:
            return (small,)
        wide = replace(small, columns=256, warps=8, persistent=True)
        return (small, wide) if itemsize == 1 else (small, wide, replace(small, stages=2))
    if shared <= _LITTLE_SHARED:
        return (ProductTile(rows=128, columns=128, depth=depth // 2, warps=4, stages=2),)
    return (ProductTile(rows=128, columns=128 if itemsize == 2 else 64, depth=depth // 2, warps=8, stages=4),)
