"""The ways into a Swin and from stage to stage, by their own weights: embedding and merging of patches.

As in :mod:`epic_fast.engine.fused`, what is frozen is computed without asking its modules, here where no graph is made:
an embedding is a product of patches and a norm (a convolution is the same, with more passes over its result), a merging
one kernel and a product for tokens and prompts.
"""

from __future__ import annotations

import functools
import logging
import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from epic_fast.engine.fused import no_autocast
from epic_fast.engine.packed import SAME, relative_error
from epic_fast.engine.products import product
from epic_fast.engine.windows import merge_prompts
from epic_fast.errors import ConfigError
from epic_fast.hooks import is_hooked, untouched
from epic_fast.ops.merge_patches import merge_patches
from epic_fast.ops.residual_norm import residual_norm_forward

logger = logging.getLogger("epic_fast")


class _OwnWeights(ABC):
    """A module computed from its weights without calling it.

    Args:
        module: of the class that this is for, or anything else, which is not for this.
    """

    def __init__(self, module: nn.Module):
        self.module: Any = module
        self._error = math.inf

    def usable(self) -> bool:
        """Whether the module still is one that this computes."""
        if not self.is_plain():
            return False
        # Of weights that are no numbers nothing is known; those of a moment later may be.
        if not math.isfinite(self._error):
            self._error = self.differs()
        if math.isfinite(self._error) and self._error > SAME:
            _say_differs(type(self.module).__name__, self._error)
        return self._error <= SAME

    @abstractmethod
    def is_plain(self) -> bool:
        """Whether nothing of the module is hooked, replaced or of another kind."""

    @abstractmethod
    def differs(self) -> float:
        """How far it is from the module on little input, relative; infinite where one of them is not finite."""


@functools.cache
def _say_differs(name: str, error: float) -> None:
    """Log, once, why a module is called."""
    logger.info("engine: this release's %s runs itself: its fused form differs by %.1e", name, error)


class FrozenEmbedding(_OwnWeights):
    """Pictures as the first tokens of a Swin; of ``SwinEmbeddings``."""

    def is_plain(self) -> bool:
        parts = self.module
        return (
            _is(parts, "SwinEmbeddings")
            and not parts.training
            and parts.position_embeddings is None
            and untouched(parts.norm, nn.LayerNorm)
            and _has_both(parts.norm)
            and untouched(parts.dropout, nn.Dropout)
            and _is(parts.patch_embeddings, "SwinPatchEmbeddings")
            and _cuts_patches(parts.patch_embeddings.projection)
        )

    def __call__(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Pictures ``(B, channels, height, width)``, filled up with zeros to whole patches, to tokens ``(B, N, C)`` and
        the grid that they fill."""
        norm, projection = self.module.norm, self.module.patch_embeddings.projection
        (down, across), weight = projection.kernel_size, projection.weight
        if pixels.dim() != 4 or pixels.shape[1] != weight.shape[1]:
            raise ConfigError(
                f"pixel_values has shape {tuple(pixels.shape)}; wanted (batch, {weight.shape[1]}, height, width)"
            )
        pixels = pad(pixels, (0, -pixels.shape[3] % across, 0, -pixels.shape[2] % down))
        grid = pixels.shape[2] // down, pixels.shape[3] // across
        with no_autocast(pixels) as dtype:
            # (B, rows, columns, channels, down, across)
            patches = pixels.unflatten(3, (-1, across)).unflatten(2, (-1, down)).permute(0, 2, 4, 1, 3, 5)
            kind = weight.dtype if dtype is None else dtype
            bias = None if projection.bias is None else projection.bias.to(kind)
            rows = product(patches.flatten(3).flatten(0, 2).to(kind), weight.flatten(1).to(kind), bias)[0]
            # Autocast gives norms in float32 on a GPU, and leaves them alone elsewhere.
            kind = torch.float32 if dtype is not None and pixels.is_cuda else None
            hidden = residual_norm_forward(rows, None, norm.weight, norm.bias, norm.eps, normed_dtype=kind)[1]
        return hidden.view(len(pixels), grid[0] * grid[1], hidden.shape[1]), grid

    @torch.no_grad()
    def differs(self) -> float:
        projection = self.module.patch_embeddings.projection
        (down, across), weight = projection.kernel_size, projection.weight
        shape = (1, weight.shape[1], 2 * down, 3 * across - 1)
        pixels = torch.arange(math.prod(shape), device=weight.device).view(shape).sin().to(weight.dtype)
        with torch.autocast(weight.device.type, enabled=False):
            (wanted, sides), (found, grid) = self.module(pixels), self(pixels)
        return relative_error(found, wanted) if tuple(sides) == grid else math.inf


class FrozenMerge(_OwnWeights):
    """Swin's merging of patches, of tokens and prompts at once; of ``SwinPatchMerging``."""

    def is_plain(self) -> bool:
        parts = self.module
        return (
            _is(parts, "SwinPatchMerging")
            and untouched(parts.norm, nn.LayerNorm)
            and _has_both(parts.norm)
            and untouched(parts.reduction, nn.Linear)
        )

    def __call__(self, rows: Tensor, branch: Tensor | None, batch: int, grid: tuple[int, int]) -> Tensor:
        """Rows ``(B * (N + P), C)`` and what is yet to be added to them, as those of the next stage, ``2 C`` wide."""
        norm, reduction = self.module.norm, self.module.reduction
        with no_autocast(rows) as dtype:
            dtype = reduction.weight.dtype if dtype is None else dtype
            normed = merge_patches(rows, branch, batch, grid, norm.weight, norm.bias, norm.eps, normed_dtype=dtype)
            bias = None if reduction.bias is None else reduction.bias.to(dtype)
            return product(normed, reduction.weight.to(dtype), bias)[0]

    @torch.no_grad()
    def differs(self) -> float:
        weight = self.module.reduction.weight
        grid, width = (3, 4), weight.shape[1] // 4
        rows = torch.arange(13 * width, device=weight.device).view(1, 13, width).sin().to(weight.dtype)
        tokens, prompts = rows.split([12, 1], dim=1)
        with torch.autocast(weight.device.type, enabled=False):
            wanted = torch.cat([self.module(tokens, grid), merge_prompts(self.module, prompts)], dim=1)[0]
            found = self(rows[0], None, 1, grid)
        return relative_error(found, wanted)


def _is(module: nn.Module, name: str) -> bool:
    """Whether a module is the class of that name of transformers, not hooked."""
    kind = type(module)
    return kind.__name__ == name and kind.__module__.split(".")[0] == "transformers" and not is_hooked(module)


def _has_both(norm: nn.LayerNorm) -> bool:
    return norm.weight is not None and norm.bias is not None


def _cuts_patches(projection: nn.Module) -> bool:
    """Whether a convolution takes each pixel once."""
    return (
        untouched(projection, nn.Conv2d)
        and isinstance(projection, nn.Conv2d)
        and projection.kernel_size == projection.stride
        and projection.padding == (0, 0)
        and projection.dilation == (1, 1)
        and projection.groups == 1
    )
