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
    tensors = (grad_normed, grad_total, total, weight, mean, rstd)
    if grad_dtype is None:
        grad_dtype = grad_normed.dtype if total.dtype == torch.int8 else total.dtype
    return plan.run(backward, tensors, (grad_dtype, tile))[0]  # pyright: ignore[reportReturnType]


def backward(
    tape: Tape,
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    grad_dtype: torch.dtype,
    tile: RowTile | None,
) -> tuple[Tensor, ...]:
    """:func:`residual_norm_backward` on a tape."""
    width = total.shape[-1]
    rows = total.numel() // width
    grad = tape.empty(total.shape, grad_dtype)
    if not rows:
        return (grad,)
    if tile is None:
        tile = norm_tile(width)
    grad_normed, total = rows_of(tape, grad_normed), rows_of(tape, total)
    if grad_total is not None:
        grad_total = rows_of(tape, grad_total)
    inner_rows, strides, unit = row_strides((grad_normed, grad_total, total))
    constants = (width, unit, total.dtype == torch.int8, tile.rows, tile.block)
    per_row = None if mean is None else contiguous(tape, mean), contiguous(tape, rstd)
    tensors = (grad_normed, grad_total, total, contiguous(tape, weight), *per_row, grad)
    integers = (rows, inner_rows, *strides)
    facts = facts_of(tensors, integers, (constants, tile.warps))
    tape.launch(backward_kernel, -(-rows // tile.rows), (*tensors, *integers, *constants), tile.options, facts)
    return (grad,)
