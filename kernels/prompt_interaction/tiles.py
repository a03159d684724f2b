"""Tile sizes, from a table: type, widths, blocks of prompts and the shared memory of the card.  Never the batch: a
sample's bits must not depend on its company."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ProductTile:
    """Products with a weight: ``rows`` x ``columns`` of the result, the sum in steps of ``depth``."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @functools.cached_property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class GradientTile(ProductTile):
    """:class:`ProductTile` for the prompts' gradients, and the tiles of the weights' and of the sums over rows."""

    weight_rows: int
    weight_columns: int
    weight_depth: int
    sum_rows: int = 128
    sum_columns: int = 32


@dataclass(frozen=True)
class MixTile:
    """The fused kernels: ``similarity`` columns at a time for ``S``, then ``columns`` at a time for what is written.

    A sample's columns are split over ``text_parts`` and ``vision_parts`` programs.  ``stages`` of the loop for ``S``.
    """

    similarity: int
    columns: int
    text_parts: int
    vision_parts: int
    warps: int
    stages: int

    @functools.cached_property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# From here on (A100, H100, B200) the larger tiles fit with all their stages.
_MUCH_SHARED = 160_000


@functools.cache
def projection_tile(dtype: torch.dtype, shared: int) -> ProductTile:
    if dtype == torch.float32:
        return ProductTile(rows=64, columns=32, depth=32, warps=4, stages=3)
    return ProductTile(rows=128 if shared > _MUCH_SHARED else 64, columns=64, depth=64, warps=4, stages=4)


@functools.cache
def gradient_tile(dtype: torch.dtype, shared: int) -> GradientTile:
    if dtype == torch.float32:
        return GradientTile(64, 32, 32, warps=4, stages=3, weight_rows=64, weight_columns=32, weight_depth=32)
    if shared > _MUCH_SHARED:
        return GradientTile(128, 64, 64, warps=8, stages=3, weight_rows=128, weight_columns=128, weight_depth=64)
    return GradientTile(64, 64, 64, warps=4, stages=3, weight_rows=64, weight_columns=64, weight_depth=64)


@functools.cache
def mix_tile(itemsize: int, text: int, vision: int, block: int, shared: int) -> MixTile:
    """For widths, the larger block of prompts and the widest type."""
    parts = (-(-text // 1024), -(-vision // 1024))
    if itemsize == 2 and block == 16 and shared > _MUCH_SHARED and 512 < max(text, vision) <= 1024:
        # All of a sample in one go: its loads are waited for once.
        return MixTile(1024, 1024, *parts, warps=8, stages=1)
    if itemsize == 4:
        similarity, columns = {16: (64, 64), 32: (32, 32), 64: (16, 32)}[block]
    elif block == 16:
        similarity, columns = (256, 256) if shared > _MUCH_SHARED else (128, 256)
    else:
        similarity, columns = {32: (128, 128), 64: (64, 64)}[block]
    return MixTile(similarity, columns, *parts, warps=4 if block < 64 else 8, stages=3 if block < 64 else 2)


@functools.cache
def mix_backward_tile(dtype: torch.dtype, text: int, vision: int, block: int, channels: bool, shared: int) -> MixTile:
    """``dtype``: the widest type.  ``channels``: the text gate is one value a channel, which makes gated gradients
    operands in registers."""
    parts = (-(-text // 1024), -(-vision // 1024))
    if dtype == torch.float32:
        similarity, columns = {16: (32, 32), 32: (16, 32), 64: (16, 32)}[block]
    elif block == 16:
        similarity, columns = 64 if channels or shared <= _MUCH_SHARED else 128, 128
    else:
        similarity, columns = {32: (64, 64 if dtype == torch.float16 else 128), 64: (32, 32)}[block]
    warps = 8 if block == 64 or (block == 32 and dtype == torch.float32) else 4
    return MixTile(similarity, columns, *parts, warps=warps, stages=3 if block < 64 else 1)
