"""Residual sum and layer norm, backward: one gradient for both terms of the sum, and none for the weights.

README.md beside this file has the equation.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.plan import Tape
from epic_fast.kernels.common.rows import contiguous, facts_of, row_strides, rows_of
from epic_fast.kernels.common.triton_rows import row_offsets
from epic_fast.kernels.residual_norm.tiles import RowTile, norm_tile


@triton.jit(
    do_not_specialize=[
        "rows",
        "inner_rows",
        "normed_outer",
        "normed_inner",
        "residual_outer",
        "residual_inner",
        "total_outer",
        "total_inner",
    ]
)
def backward_kernel(
    grad_normed,  # (rows, D) by outer and inner strides, unit last stride
    grad_total,  # (rows, D) or None
    total,  # (rows, D); or the normalised rows in 8 bits
    weight,  # (D,)
    mean,  # (rows,) float32; or the scales of these rows; None: RMS norm
    rstd,  # (rows,) float32
    grad,  # (rows, D), contiguous, written
    normed_at,  # (rows,) int64: the row of grad_normed for each row; None: the same
    moved,  # (rows, D), contiguous, written: the gradient a second time, in another order; or None
    moved_at,  # (rows,) int64: where each row goes there; None with it
    rows,
    inner_rows,
    normed_outer,
    normed_inner,
    residual_outer,
    residual_inner,
    total_outer,
    total_inner,
    D: tl.constexpr,
    UNIT: tl.constexpr,  # elements that a stride counts in
    KEPT: tl.constexpr,  # whether total is in 8 bits
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``grad = grad_total + rstd (g - mean(g) - x mean(g x))``, ``g = grad_normed weight``, x the normalised row.

    Of an RMS norm without ``mean(g)``.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)[None, :]
    column_exists = column < D
    exists = (row < rows)[:, None] & column_exists

    if normed_at is not None:
        own = tl.load(normed_at + row, mask=row < rows, other=0)
        start = own[:, None] * normed_inner * UNIT
    else:
        start = row_offsets(row, inner_rows, normed_outer, normed_inner, UNIT)
    g = tl.load(grad_normed + start + column, mask=exists, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    start = row_offsets(row, inner_rows, total_outer, total_inner, UNIT)
    x = tl.load(total + start + column, mask=exists, other=0.0).to(tl.float32)
    if grad_total is not None:
        start = row_offsets(row, inner_rows, residual_outer, residual_inner, UNIT)
        residual = tl.load(grad_total + start + column, mask=exists, other=0.0).to(tl.float32)
    if mean is not None:
        first = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
    inverse = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
    gain = tl.load(weight + column, mask=column_exists, other=0.0).to(tl.float32)  # [1, BLOCK_D]

    # Beyond the last column g is zero, and so are both sums' terms.
    g *= gain
    if KEPT:
        x *= first
    elif mean is not None:
        x = (x - first) * inverse
    else:
        x *= inverse
    along_x = tl.sum(g * x, axis=1) * (1.0 / D)  # [ROWS]
    if mean is not None:
        g -= (tl.sum(g, axis=1) * (1.0 / D))[:, None]
    result = (g - x * along_x[:, None]) * inverse
    if grad_total is not None:
        result += residual
    tl.store(grad + row.to(tl.int64)[:, None] * D + column, result.to(grad.dtype.element_ty), mask=exists)
    if moved is not None:
        place = tl.load(moved_at + row, mask=row < rows, other=0)
        tl.store(moved + place[:, None] * D + column, result.to(moved.dtype.element_ty), mask=exists)


def residual_norm_backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    grad_dtype: torch.dtype | None = None,
    tile: RowTile | None = None,
) -> Tensor:
    """Shapes and meanings are those of :func:`epic_fast.ops.residual_norm.residual_norm_backward`; ``tile`` is one
    other than the table's."""
    tensors = (grad_normed, grad_total, total, weight, mean, rstd, None, None)
    if grad_dtype is None:
        grad_dtype = grad_normed.dtype if total.dtype == torch.int8 else total.dtype
    return plan.run(backward, tensors, (grad_dtype, None, tile))[0]  # pyright: ignore[reportReturnType]


def moved_norm_backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    normed_at: Tensor | None = None,
    moved_at: Tensor | None = None,
    moved_dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
    tile: RowTile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Shapes and meanings are those of :func:`epic_fast.ops.residual_norm.moved_norm_backward`."""
    tensors = (grad_normed, grad_total, total, weight, mean, rstd, normed_at, moved_at)
    if grad_dtype is None:
        grad_dtype = grad_normed.dtype if total.dtype == torch.int8 else total.dtype
    return plan.run(backward, tensors, (grad_dtype, moved_dtype or grad_dtype, tile))  # pyright: ignore[reportReturnType]


def backward(
    tape: Tape,
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    normed_at: Tensor | None,
    moved_at: Tensor | None,
    grad_dtype: torch.dtype,
    moved_dtype: torch.dtype | None,
    tile: RowTile | None,
) -> tuple[Tensor | None, ...]:
    """:func:`moved_norm_backward` on a tape."""
    width = total.shape[-1]
    rows = total.numel() // width
    grad = tape.empty(total.shape, grad_dtype)
    moved = None if moved_at is None else tape.empty(total.shape, moved_dtype)
    if not rows:
        return grad, moved
    if tile is None:
        tile = norm_tile(width)
    grad_normed, total = rows_of(tape, grad_normed), rows_of(tape, total)
    if grad_total is not None:
        grad_total = rows_of(tape, grad_total)
    inner_rows, strides, unit = row_strides((grad_normed, grad_total, total))
    constants = (width, unit, total.dtype == torch.int8, tile.rows, tile.block)
    per_row = None if mean is None else contiguous(tape, mean), contiguous(tape, rstd)
    tensors = (grad_normed, grad_total, total, contiguous(tape, weight), *per_row, grad)
    normed_at, moved_at = (None if each is None else contiguous(tape, each) for each in (normed_at, moved_at))
    tensors = (*tensors, normed_at, moved, moved_at)
    integers = (rows, inner_rows, *strides)
    facts = facts_of(tensors, integers, (constants, tile.warps))
    tape.launch(backward_kernel, -(-rows // tile.rows), (*tensors, *integers, *constants), tile.options, facts)
    return grad, moved
