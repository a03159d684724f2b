"""Rows of a matrix in eight bits, each with its own scale."""

# pyright: basic, reportMissingImports=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.activation.tiles import MAX_QUANTISED_WIDTH, activation_tile
from epic_fast.kernels.common import plan
from epic_fast.kernels.common.eight_bit import EIGHT_BIT_TYPES
from epic_fast.kernels.common.plan import Tape
from epic_fast.kernels.common.rows import facts_of, row_strides, rows_of
from epic_fast.kernels.common.triton_eight_bit import quantise, row_scales
from epic_fast.kernels.common.triton_rows import row_offsets


@triton.jit(do_not_specialize=["rows", "inner_rows", "values_outer", "values_inner"])
def quantise_kernel(
    values,  # (rows, D) by outer and inner strides, unit last stride
    data,  # (rows, D), contiguous, written
    scale,  # (rows,) float32, written
    rows,
    inner_rows,
    values_outer,
    values_inner,
    D: tl.constexpr,
    UNIT: tl.constexpr,  # elements that a stride counts in
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``values ~= data * scale``, ``ROWS`` whole rows a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)[None, :]
    exists = (row < rows)[:, None] & (column < D)
    start = row_offsets(row, inner_rows, values_outer, values_inner, UNIT)
    x = tl.load(values + start + column, mask=exists, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    step = row_scales(x, KIND)
    tl.store(data + row.to(tl.int64)[:, None] * D + column, quantise(x, step, KIND), mask=exists)
    tl.store(scale + row, step, mask=row < rows)


def quantise_rows(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """As :func:`epic_fast.kernels.common.eight_bit.quantise_rows`, bit for bit, for up to 16384 columns."""
    width = values.shape[-1]
    if width > MAX_QUANTISED_WIDTH:
        raise ValueError(f"quantise_rows: rows have {width} elements; the kernel takes up to {MAX_QUANTISED_WIDTH}")
    return plan.run(quantise_all, (values,), (kind,))  # pyright: ignore[reportReturnType]


def quantise_all(tape: Tape, values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """:func:`quantise_rows` on a tape."""
    width = values.shape[-1]
    rows = values.numel() // width if width else 0
    data = tape.empty(values.shape, EIGHT_BIT_TYPES[kind])
    scale = tape.empty((rows,), torch.float32)
    if not rows:
        return data, scale
    tile = activation_tile(width, True)
    values = rows_of(tape, values)
    inner_rows, strides, unit = row_strides((values,))
    constants = (width, unit, kind, tile.rows, tile.block)
    tensors = (values, data, scale)
    integers = (rows, inner_rows, *strides)
    facts = facts_of(tensors, integers, (constants, tile.warps))
    tape.launch(quantise_kernel, -(-rows // tile.rows), (*tensors, *integers, *constants), tile.options, facts)
    return data, scale
