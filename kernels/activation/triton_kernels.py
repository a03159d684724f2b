"""The activation by itself, forward and backward, where it cannot live in a product's epilogue."""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.activation.tiles import ActivationTile, activation_tile
from epic_fast.kernels.activation.triton_functions import (
    activate,
    activate_with_derivative,
    decode_derivative,
    derivative,
    encode_derivative,
)
from epic_fast.kernels.common import plan
from epic_fast.kernels.common.eight_bit import EIGHT_BIT_TYPES
from epic_fast.kernels.common.plan import Tape
from epic_fast.kernels.common.rows import facts_of, row_strides, rows_of
from epic_fast.kernels.common.triton_eight_bit import quantise, row_scales
from epic_fast.kernels.common.triton_rows import row_offsets


@triton.jit(do_not_specialize=["rows", "inner_rows", "pre_outer", "pre_inner"])
def forward_kernel(
    pre,  # (rows, F) by outer and inner strides, unit last stride
    output,  # (rows, F), contiguous, written
    kept,  # (rows, F) uint8, contiguous, written: the derivative; or None
    scale,  # (rows,) float32, written; None unless EIGHT_BIT
    rows,
    inner_rows,
    pre_outer,
    pre_inner,
    F: tl.constexpr,
    UNIT: tl.constexpr,  # elements that a stride counts in
    KIND: tl.constexpr,
    EIGHT_BIT: tl.constexpr,  # None, "fp8" or "int8": a program then holds whole rows
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """``output = act(pre)``, ``ROWS`` rows and ``BLOCK_F`` columns a program."""
    BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    row = tl.program_id(0) // BLOCKS * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % BLOCKS * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    exists = (row < rows)[:, None] & (column < F)
    start = row_offsets(row, inner_rows, pre_outer, pre_inner, UNIT)
    x = tl.load(pre + start + column, mask=exists, other=0.0).to(tl.float32)  # [ROWS, BLOCK_F]
    start = row.to(tl.int64)[:, None] * F
    if kept is None:
        y = activate(x, KIND)
    else:
        y, slope = activate_with_derivative(x, KIND)
        tl.store(kept + start + column, encode_derivative(slope), mask=exists)
    if EIGHT_BIT is None:
        tl.store(output + start + column, y.to(output.dtype.element_ty), mask=exists)
    else:
        step = row_scales(y, EIGHT_BIT)
        tl.store(output + start + column, quantise(y, step, EIGHT_BIT), mask=exists)
        tl.store(scale + row, step, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "inner_rows", "grad_outer", "grad_inner", "kept_outer", "kept_inner"])
def backward_kernel(
    grad,  # (rows, F) by outer and inner strides, unit last stride
    kept,  # (rows, F): pre, or uint8 codes of the derivative
    grad_pre,  # (rows, F), contiguous, written
    scale,  # (rows,) float32, written; None unless EIGHT_BIT
    rows,
    inner_rows,
    grad_outer,
    grad_inner,
    kept_outer,
    kept_inner,
    F: tl.constexpr,
    UNIT: tl.constexpr,  # elements that a stride counts in
    KIND: tl.constexpr,
    CODED: tl.constexpr,
    EIGHT_BIT: tl.constexpr,  # None, "fp8" or "int8": a program then holds whole rows
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """``grad_pre = grad act'(pre)``."""
    BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    row = tl.program_id(0) // BLOCKS * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % BLOCKS * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    exists = (row < rows)[:, None] & (column < F)
    start = row_offsets(row, inner_rows, grad_outer, grad_inner, UNIT)
    g = tl.load(grad + start + column, mask=exists, other=0.0).to(tl.float32)  # [ROWS, BLOCK_F]
    start = row_offsets(row, inner_rows, kept_outer, kept_inner, UNIT)
    known = tl.load(kept + start + column, mask=exists, other=0)
    if CODED:
        slope = decode_derivative(known)
    else:
        slope = derivative(known.to(tl.float32), KIND)
    result = g * slope
    target = grad_pre + row.to(tl.int64)[:, None] * F + column
    if EIGHT_BIT is None:
        tl.store(target, result.to(grad_pre.dtype.element_ty), mask=exists)
    else:
        # Where there is no column the gradient is zero, whatever the derivative of nothing is.
        step = row_scales(result, EIGHT_BIT)
        tl.store(target, quantise(result, step, EIGHT_BIT), mask=exists)
        tl.store(scale + row, step, mask=row < rows)


def activation_forward(
    pre: Tensor, kind: str, *, keep: str, eight_bit: str | None = None, tile: ActivationTile | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Shapes and meanings are those of :func:`epic_fast.ops.activation.activation_forward`; ``tile`` is one other than
    the table's, as wide as a row where ``eight_bit`` is given."""
    output, codes, scale = plan.run(forward, (pre,), (kind, keep == "eight_bit", eight_bit, tile))
    return output, pre if keep == "full" else codes, scale  # pyright: ignore[reportReturnType]


def forward(
    tape: Tape, pre: Tensor, kind: str, coded: bool, eight_bit: str | None, tile: ActivationTile | None
) -> tuple[Tensor | None, ...]:
    """:func:`activation_forward` on a tape; in place of what is kept the codes, or None."""
    shape, width = pre.shape, pre.shape[-1]
    rows = pre.numel() // width
    output = tape.empty(shape, pre.dtype if eight_bit is None else EIGHT_BIT_TYPES[eight_bit])
    codes = tape.empty(shape, torch.uint8) if coded else None
    scale = None if eight_bit is None else tape.empty((rows,), torch.float32)
    if not rows:
        return output, codes, scale
    if tile is None:
        tile = activation_tile(width, eight_bit is not None)
    pre = rows_of(tape, pre)
    inner_rows, strides, unit = row_strides((pre,))
    constants = (width, unit, kind, eight_bit, tile.rows, tile.block)
    tensors = (pre, output, codes, scale)
    integers = (rows, inner_rows, *strides)
    facts = facts_of(tensors, integers, (constants, tile.warps))
    programs = -(-rows // tile.rows) * -(-width // tile.block)
    tape.launch(forward_kernel, programs, (*tensors, *integers, *constants), tile.options, facts)
    return output, codes, scale


def activation_backward(
    grad: Tensor, kept: Tensor, kind: str, keep: str, *, tile: ActivationTile | None = None
) -> Tensor:
    """Shapes and meanings are those of :func:`epic_fast.ops.activation.activation_backward`; ``tile`` is one other than
    the table's."""
    found = plan.run(backward, (grad, kept), (kind, keep == "eight_bit", None, tile))
    return found[0]  # pyright: ignore[reportReturnType]


def activation_backward_8bit(
    grad: Tensor, kept: Tensor, kind: str, keep: str, eight_bit: str, *, tile: ActivationTile | None = None
) -> tuple[Tensor, Tensor]:
    """Shapes and meanings are those of :func:`epic_fast.ops.activation.activation_backward_8bit`; ``tile`` is one other
    than the table's, as wide as a row."""
    found = plan.run(backward, (grad, kept), (kind, keep == "eight_bit", eight_bit, tile))
    return found  # pyright: ignore[reportReturnType]


def backward(
    tape: Tape,
    grad: Tensor,
    kept: Tensor,
    kind: str,
    coded: bool,
    eight_bit: str | None,
    tile: ActivationTile | None,
) -> tuple[Tensor | None, ...]:
    """:func:`activation_backward` and :func:`activation_backward_8bit` on a tape."""
    width = grad.shape[-1]
    rows = grad.numel() // width
    grad_pre = tape.empty(grad.shape, grad.dtype if eight_bit is None else EIGHT_BIT_TYPES[eight_bit])
    scale = None if eight_bit is None else tape.empty((rows,), torch.float32)
    if not rows:
        return grad_pre, scale
    if tile is None:
        tile = activation_tile(width, eight_bit is not None)
    grad, kept = rows_of(tape, grad), rows_of(tape, kept)
    inner_rows, strides, unit = row_strides((grad, kept))
    constants = (width, unit, kind, coded, eight_bit, tile.rows, tile.block)
    tensors = (grad, kept, grad_pre, scale)
    integers = (rows, inner_rows, *strides)
    facts = facts_of(tensors, integers, (constants, tile.warps))
    programs = -(-rows // tile.rows) * -(-width // tile.block)
    tape.launch(backward_kernel, programs, (*tensors, *integers, *constants), tile.options, facts)
    return grad_pre, scale
