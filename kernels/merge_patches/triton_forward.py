"""Sum, gather of four neighbours and layer norm in one pass: a row of the result is read once and held in registers.

README.md beside this file has the derivation and the floors.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.plan import Tape
from epic_fast.kernels.common.rows import contiguous, facts_of, row_strides, rows_of
from epic_fast.kernels.residual_norm.tiles import MAX_WIDTH, RowTile


@functools.cache
def merge_tile(width: int) -> RowTile:
    """For rows of ``4 * width`` columns: two rows of 16 columns a thread from 512 columns on, one of 32 from 16384 on,
    and more rows a warp below; by the width alone, so that a row's bits do not depend on the batch."""
    block = max(16, 1 << (4 * width - 1).bit_length())
    rows = max(2, 1024 // block) if block < MAX_WIDTH else 1
    return RowTile(rows=rows, block=block, warps=min(max(1, block // 512), 16))


@triton.jit(
    do_not_specialize=[
        "eps",
        "total",
        "merged",
        "tokens",
        "rows",
        "columns",
        "down",
        "across",
        "stream_row",
        "branch_row",
    ]
)
def forward_kernel(
    normed,  # (total, 4 C), contiguous, written
    stream,  # (R, C) by a row's stride, unit last stride
    branch,  # (R, C) likewise, or None
    weight,  # (4 C,)
    bias,  # (4 C,)
    eps,
    total,  # rows of the result
    merged,  # those of them that are groups of tokens; prompts stand behind them
    tokens,  # rows of stream that are tokens
    rows,  # sides of the grid
    columns,
    down,  # groups of a sample in a column and in a row, at least 1
    across,
    stream_row,  # strides in units of UNIT elements
    branch_row,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``ROWS`` rows of the result a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    column = tl.arange(0, BLOCK)[None, :]
    column_exists = column < 4 * C
    # Which of the four a column belongs to, and the member's own column.
    member, inner = column // C, column % C
    below, right = member % 2, member // 2

    group = row // across
    x = row - group * across
    sample = group // down
    y = group - sample * down
    # A prompt is all four itself: one row, from where no step leads away.
    is_prompt = row >= merged
    first = tl.where(is_prompt, tokens + (row - merged), (sample * rows + 2 * y) * columns + 2 * x)
    step_below = tl.where(is_prompt, 0, columns)
    step_right = tl.where(is_prompt, 0, 1)
    has_below = is_prompt | (2 * y + 1 < rows)
    has_right = is_prompt | (2 * x + 1 < columns)

    source = first[:, None] + below * step_below[:, None] + right * step_right[:, None]  # [ROWS, BLOCK]
    row_exists = (row < total)[:, None]
    exists = ((below == 0) | has_below[:, None]) & ((right == 0) | has_right[:, None]) & row_exists & column_exists
    source = source.to(tl.int64)
    values = tl.load(stream + source * stream_row * UNIT + inner, mask=exists, other=0.0).to(tl.float32)
    if branch is not None:
        values += tl.load(branch + source * branch_row * UNIT + inner, mask=exists, other=0.0).to(tl.float32)
        # What counts is the sum as the stream would hold it.
        values = values.to(stream.dtype.element_ty).to(tl.float32)

    center = tl.sum(values, axis=1) * (1.0 / (4 * C))  # [ROWS]
    values = tl.where(column_exists, values - center[:, None], 0.0)
    variance = tl.sum(values * values, axis=1) * (1.0 / (4 * C))
    inverse = tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), tl.sqrt_rn(variance + eps))
    gain = tl.load(weight + column, mask=column_exists, other=0.0).to(tl.float32)  # [1, BLOCK]
    offset = tl.load(bias + column, mask=column_exists, other=0.0).to(tl.float32)
    result = values * inverse[:, None] * gain + offset
    target = normed + row.to(tl.int64)[:, None] * (4 * C) + column
    tl.store(target, result.to(normed.dtype.element_ty), mask=row_exists & column_exists)


def merge_patches(
    stream: Tensor,
    branch: Tensor | None,
    batch: int,
    grid: tuple[int, int],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    normed_dtype: torch.dtype | None = None,
    *,
    tile: RowTile | None = None,
) -> Tensor:
    """Shapes and meanings are those of :func:`epic_fast.ops.merge_patches.merge_patches`.

    Args:
        tile: other than the table's.
    """
    options = (batch, *grid, float(eps), normed_dtype or stream.dtype, tile)
    return plan.run(forward, (stream, branch, weight, bias), options)[0]  # pyright: ignore[reportReturnType]


def forward(
    tape: Tape,
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    batch: int,
    rows: int,
    columns: int,
    eps: float,
    normed_dtype: torch.dtype,
    tile: RowTile | None,
) -> tuple[Tensor]:
    """:func:`merge_patches` on a tape."""
    width = stream.shape[1]
    tokens = batch * rows * columns
    down, across = (rows + 1) // 2, (columns + 1) // 2
    merged = batch * down * across
    total = merged + stream.shape[0] - tokens
    normed = tape.empty((total, 4 * width), normed_dtype)
    if not total:
        return (normed,)
    stream = rows_of(tape, stream)
    branch = None if branch is None else rows_of(tape, branch)
    _, (_, stream_row, _, branch_row), unit = row_strides((stream, branch))
    tile = tile or merge_tile(width)
    constants = (width, unit, tile.rows, tile.block)
    integers = (total, merged, tokens, rows, columns, max(down, 1), max(across, 1), stream_row, branch_row)
    tensors = (normed, stream, branch, contiguous(tape, weight), contiguous(tape, bias))
    facts = facts_of(tensors, integers, (constants, tile.warps))
    tape.launch(forward_kernel, -(-total // tile.rows), (*tensors, eps, *integers, *constants), tile.options, facts)
    return (normed,)
