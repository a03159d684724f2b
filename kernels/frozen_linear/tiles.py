"""Tile sizes, from a table: type, card and what the epilogue does.  Never the number of rows, so that a row's bits do
not depend on how many others there are."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ProductTile:
    """``rows`` x ``columns`` of the result are one tile, its sum runs in steps of ``depth``.

    ``group``: so many rows of tiles go through all columns before the next ones, so that their operands stay in the L2
    cache.  ``parts``: the epilogue takes a tile in so many parts.  ``descriptors``: operands and results go by
    tensor descriptors (TMA).  ``persistent``: as many programs as the card runs at once, each with several tiles.
    ``specialised``: some warps load while others multiply (a persistent kernel only).
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
    specialised: bool = False

    @functools.cached_property
    def options(self) -> dict[str, int]:
        """Launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# The data-centre cards have this or less; the interpreter counts as one of them.
_DEFAULT_SHARED = 232448
# From here on (H100, B200) products read both operands from shared memory, and there are descriptors.
_MUCH_SHARED = 200_000
# Up to here (MI300) one buffer an operand is what fits.
_LITTLE_SHARED = 70_000


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may have."""
    if device.type != "cuda":
        return _DEFAULT_SHARED
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the card; the interpreter counts as a card with two."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def has_descriptors(device: torch.device) -> bool:
    """Whether the card copies tiles by tensor descriptors (Hopper and newer)."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def product_tile(itemsize: int, descriptors: bool, shared: int) -> ProductTile:
    """``itemsize`` of the operands; ``descriptors`` says that card and layout allow them."""
    if itemsize == 4:
        return ProductTile(rows=64, columns=64, depth=32, warps=8, stages=2)
    depth = 64 if itemsize == 2 else 128
    if descriptors and shared >= _MUCH_SHARED:
        return ProductTile(rows=128, columns=128, depth=depth, warps=4, stages=3, parts=2, descriptors=True)
    if shared <= _LITTLE_SHARED:
        return ProductTile(rows=128, columns=128, depth=depth // 2, warps=4, stages=2)
    return ProductTile(rows=128, columns=128 if itemsize == 2 else 64, depth=depth // 2, warps=8, stages=4)


@dataclass(frozen=True)
class HopperTile:
    """For the kernel in which two groups of four warps multiply in turn: each has a tile of ``rows`` x ``columns``.

    ``stages`` steps of the sum lie in the ring.  ``registers``: a multiplying thread's; ``maximum``: with which the
    kernel starts, before the loading warps give theirs away.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    group: int = 8
    registers: int = 240
    maximum: int = 168


@functools.cache
def hopper_tile(itemsize: int) -> HopperTile:
    """``itemsize`` of the operands."""
    return HopperTile(rows=128, columns=128, depth=128 // itemsize, stages=5)
