"""Swin's merging of patches up to its product, tokens and prompts at once: sum, gather of four neighbours, layer norm.

A raw operation of inference: it has no backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from epic_fast.errors import ConfigError
from epic_fast.kernels.merge_patches import reference  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.residual_norm.tiles import MAX_WIDTH  # pyright: ignore[reportMissingImports]
from epic_fast.ops import library
from epic_fast.ops.dispatch import Operation, check_without_backward

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows are numbered in 32 bits.
MOST_ROWS = 2**31 - 1


def merge_patches(
    stream: Tensor,
    branch: Tensor | None,
    batch: int,
    grid: tuple[int, int],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    normed_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """The norm that Swin's merging of patches multiplies with its reduction, of tokens and prompts in one matrix.

    Each 2 x 2 group of a sample's grid becomes a row, its tokens side by side in the order of transformers'
    ``SwinPatchMerging`` (upper left, lower left, upper right, lower right); where a side is odd, zeros stand for what
    is missing, and count in the norm.  A prompt is a group whose four members are itself.

    Args:
        stream: ``(R, C)``, R = batch * (rows * columns + P): the tokens of all samples, sample by sample and row by row
            of the grid, behind them the prompts of all samples.  P follows from R.  Rows may lie anywhere.
        branch: ``(R, C)``, what the last block adds: the row that counts is ``stream + branch``, rounded to the type
            of ``stream``.  None: the stream itself.
        batch: samples B; may be 0.
        grid: (rows, columns) that the tokens of a sample fill, odd or even.
        weight, bias: ``(4 C,)``, of the norm.
        eps: added to the variance.
        normed_dtype: of the result; that of ``stream`` if None.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        ``(B * ceil(rows / 2) * ceil(columns / 2) + B * P, 4 C)``, contiguous: groups sample by sample and row by row,
        then prompts.

    Raises:
        ConfigError: shapes, types or devices that do not fit, or a gradient that would be lost.
    """
    _check(stream, branch, batch, grid, weight, bias, normed_dtype)
    return _MERGE(stream, branch, batch, grid, weight, bias, eps, normed_dtype, impl=impl)


def _wrong(found: str, wanted: str) -> ConfigError:
    return ConfigError(f"merge_patches: {found}; wanted {wanted}")


def _check(
    stream: Tensor,
    branch: Tensor | None,
    batch: int,
    grid: tuple[int, int],
    weight: Tensor,
    bias: Tensor,
    normed_dtype: torch.dtype | None,
) -> None:
    if stream.dim() != 2 or not stream.shape[1]:
        raise _wrong(f"stream has shape {tuple(stream.shape)}", "rows (R, C), at least one column")
    named = [("stream", stream), ("branch", branch), ("weight", weight), ("bias", bias)]
    check_without_backward("merge_patches", named)
    if normed_dtype is not None and not normed_dtype.is_floating_point:
        raise _wrong(f"normed_dtype={normed_dtype}", "a floating-point type, or None for that of stream")
    count, width = stream.shape
    if branch is not None and branch.shape != stream.shape:
        raise _wrong(f"branch has shape {tuple(branch.shape)}", f"{(count, width)}, as stream has")
    for label, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dim() != 1 or tensor.shape[0] != 4 * width:
            raise _wrong(f"{label} has shape {tuple(tensor.shape)}", f"({4 * width},), four times stream's columns")
    if not _counts(batch):
        raise _wrong(f"batch={batch!r}", "an integer, 0 or more samples")
    if len(grid) != 2 or not (_counts(grid[0]) and _counts(grid[1])):
        raise _wrong(f"grid={grid!r}", "(rows, columns), two integers, neither below 0")
    prompts = count - batch * grid[0] * grid[1]
    if prompts < 0 or (prompts % batch if batch else prompts):
        raise _wrong(
            f"stream has {count} rows",
            f"{batch} * {grid[0]} * {grid[1]} tokens, and behind them as many prompts for each of {batch} samples",
        )


def _counts(number: Any) -> bool:
    return isinstance(number, int | torch.SymInt) and number >= 0


@functools.cache
def _launcher() -> Callable[..., Any]:
    from epic_fast.kernels.merge_patches import triton_forward  # pyright: ignore[reportMissingImports]

    return triton_forward.merge_patches


def _forward(
    stream: Tensor,
    branch: Tensor | None,
    batch: int,
    rows: int,
    columns: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    normed_dtype: torch.dtype | None,
) -> Tensor:
    return _launcher()(stream, branch, batch, (rows, columns), weight, bias, eps, normed_dtype)


def _forward_fake(
    stream: Tensor,
    branch: Tensor | None,
    batch: int,
    rows: int,
    columns: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    normed_dtype: torch.dtype | None,
) -> Tensor:
    count, width = stream.shape
    merged = batch * ((rows + 1) // 2) * ((columns + 1) // 2)
    return stream.new_empty(merged + count - batch * rows * columns, 4 * width, dtype=normed_dtype or stream.dtype)


FORWARD = library.register(
    "merge_patches(Tensor stream, Tensor? branch, SymInt batch, SymInt rows, SymInt columns, Tensor weight, "
    "Tensor bias, float eps, ScalarType? normed_dtype) -> Tensor",
    _forward,
    _forward_fake,
)


def _triton(
    stream: Tensor,
    branch: Tensor | None,
    batch: int,
    grid: tuple[int, int],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    normed_dtype: torch.dtype | None,
) -> Tensor:
    if library.direct(stream, branch, weight, bias):
        return _launcher()(stream, branch, batch, grid, weight, bias, eps, normed_dtype)
    return FORWARD(stream, branch, batch, *grid, weight, bias, eps, normed_dtype)


def _limits(
    stream: Tensor,
    branch: Tensor | None,
    batch: int,
    grid: tuple[int, int],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    normed_dtype: torch.dtype | None,
) -> Sequence[str]:
    old = library.too_old(stream.get_device()) if stream.is_cuda else ""
    reasons = [old] if old else []
    for label, tensor in (("stream", stream), ("branch", branch), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in KERNEL_TYPES:
            reasons.append(f"{label} is {tensor.dtype}; the kernel takes float32, bfloat16 and float16")
    if normed_dtype is not None and normed_dtype not in KERNEL_TYPES:
        reasons.append(f"normed_dtype is {normed_dtype}; the kernel writes float32, bfloat16 and float16")
    count, width = stream.shape
    if 4 * width > MAX_WIDTH:
        reasons.append(f"four rows are {4 * width} wide; the kernel takes up to {MAX_WIDTH}")
    if count > MOST_ROWS:
        reasons.append(f"stream has {count} rows; the kernel takes fewer than 2**31")
    return reasons


_MERGE = Operation("merge_patches", reference=reference.merge_patches, triton=_triton, limits=_limits)
