"""Residual sum and layer norm or RMS norm, forward: a row is read once, held in registers, and written once.

README.md beside this file has the derivation, the floors and what was tried.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.eight_bit import EIGHT_BIT_TYPES
from epic_fast.kernels.common.plan import Tape
from epic_fast.kernels.common.rows import contiguous, facts_of, row_strides, rows_of
from epic_fast.kernels.common.triton_eight_bit import quantise, row_scales
from epic_fast.kernels.common.triton_rows import row_offsets
from epic_fast.kernels.residual_norm.tiles import RowTile, ended_tile, norm_tile


@triton.jit
def _norm_rows(
    program,
    stream,  # (rows, D) by outer and inner strides, unit last stride
    branch,  # (rows, D) or None
    total,  # (rows, D), written; None without branch; the stream itself in place
    weight,  # (D,)
    bias,  # (D,); None: RMS norm, without a mean
    normed,  # (rows, D), contiguous, written
    mean,  # (rows,) float32, written; None with kept, and without bias
    rstd,  # (rows,) float32, written
    scale,  # (rows,) float32, written; None unless EIGHT_BIT
    kept,  # (rows, D) int8, contiguous, written: the row before weight and bias; or None
    step,  # (rows,) float32, written: the scales of these; None with them
    branch_at,  # (rows,) int64: the branch's row for each row of the stream; None: the same
    normed_at,  # (rows,) int64: where each row's norm goes; None: to the same
    probe,  # (PROBES, D) or None
    probed,  # (rows, PROBES) float32, written: products of the sum's rows with the probe's; None with it
    eps,
    rows,
    inner_rows,
    stream_outer,
    stream_inner,
    branch_outer,
    branch_inner,
    total_outer,
    total_inner,
    D: tl.constexpr,
    UNIT: tl.constexpr,  # elements that a stride counts in
    EIGHT_BIT: tl.constexpr,  # None, "fp8" or "int8"
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PROBES: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """``total = stream + branch`` and its norm, ``ROWS`` rows a program."""
    row = program * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)[None, :]
    column_exists = column < D
    exists = (row < rows)[:, None] & column_exists

    start = row_offsets(row, inner_rows, stream_outer, stream_inner, UNIT)
    x = tl.load(stream + start + column, mask=exists, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    if branch is not None:
        if branch_at is not None:
            own = tl.load(branch_at + row, mask=row < rows, other=0)
            start = own[:, None] * branch_inner * UNIT
        else:
            start = row_offsets(row, inner_rows, branch_outer, branch_inner, UNIT)
        x += tl.load(branch + start + column, mask=exists, other=0.0).to(tl.float32)
        # What is normalised is what is written: backward will read the rounded sum.
        rounded = x.to(total.dtype.element_ty)
        x = rounded.to(tl.float32)
    if probe is not None:
        # What is multiplied is asked for before anything is stored, which no load passes.
        gain = tl.load(weight + column, mask=column_exists, other=0.0)
        if bias is not None:
            shift = tl.load(bias + column, mask=column_exists, other=0.0)
        number = tl.arange(0, BLOCK_P)[None, :]
        products = tl.zeros([ROWS, BLOCK_P], tl.float32)
        for each in tl.static_range(PROBES):
            direction = tl.load(probe + each * D + column, mask=column_exists, other=0.0).to(tl.float32)
            products = tl.where(number == each, tl.sum(x * direction, axis=1)[:, None], products)
        target = probed + row.to(tl.int64)[:, None] * PROBES + number
        tl.store(target, products, mask=(row < rows)[:, None] & (number < PROBES))
    if branch is not None:
        tl.store(total + row_offsets(row, inner_rows, total_outer, total_inner, UNIT) + column, rounded, mask=exists)

    if bias is not None:
        center = tl.sum(x, axis=1) * (1.0 / D)  # [ROWS]
        x = tl.where(column_exists, x - center[:, None], 0.0)
    variance = tl.sum(x * x, axis=1) * (1.0 / D)
    inverse = tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), tl.sqrt_rn(variance + eps))
    if mean is not None:
        tl.store(mean + row, center, mask=row < rows)
    tl.store(rstd + row, inverse, mask=row < rows)
    x *= inverse[:, None]
    if kept is not None:
        size = row_scales(x, "int8")
        tl.store(kept + row.to(tl.int64)[:, None] * D + column, quantise(x, size, "int8"), mask=exists)
        tl.store(step + row, size, mask=row < rows)

    if probe is None:
        gain = tl.load(weight + column, mask=column_exists, other=0.0)  # [1, BLOCK_D]
    y = x * gain.to(tl.float32)
    if bias is not None:
        if probe is None:
            shift = tl.load(bias + column, mask=column_exists, other=0.0)
        y += shift.to(tl.float32)
    place = row.to(tl.int64)
    if normed_at is not None:
        place = tl.load(normed_at + row, mask=row < rows, other=0)
    start = place[:, None] * D
    if EIGHT_BIT is None:
        tl.store(normed + start + column, y.to(normed.dtype.element_ty), mask=exists)
    else:
        size = row_scales(y, EIGHT_BIT)
        tl.store(normed + start + column, quantise(y, size, EIGHT_BIT), mask=exists)
        tl.store(scale + row, size, mask=row < rows)


@triton.jit(
    do_not_specialize=[
        "rows",
        "inner_rows",
        "stream_outer",
        "stream_inner",
        "branch_outer",
        "branch_inner",
        "total_outer",
        "total_inner",
    ]
)
def forward_kernel(
    stream,  # (rows, D) by outer and inner strides, unit last stride
    branch,  # (rows, D) or None
    total,  # (rows, D), written; None without branch; the stream itself in place
    weight,  # (D,)
    bias,  # (D,); None: RMS norm, without a mean
    normed,  # (rows, D), contiguous, written
    mean,  # (rows,) float32, written; None with kept, and without bias
    rstd,  # (rows,) float32, written
    scale,  # (rows,) float32, written; None unless EIGHT_BIT
    kept,  # (rows, D) int8, contiguous, written: the row before weight and bias; or None
    step,  # (rows,) float32, written: the scales of these; None with them
    branch_at,  # (rows,) int64: the branch's row for each row of the stream; None: the same
    normed_at,  # (rows,) int64: where each row's norm goes; None: to the same
    probe,  # (PROBES, D) or None
    probed,  # (rows, PROBES) float32, written: products of the sum's rows with the probe's; None with it
    eps,
    rows,
    inner_rows,
    stream_outer,
    stream_inner,
    branch_outer,
    branch_inner,
    total_outer,
    total_inner,
    D: tl.constexpr,
    UNIT: tl.constexpr,  # elements that a stride counts in
    EIGHT_BIT: tl.constexpr,  # None, "fp8" or "int8"
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PROBES: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program: ``ROWS`` rows.  Grid: (row tiles,)."""
    _norm_rows(
        tl.program_id(0), stream, branch, total, weight, bias, normed, mean, rstd, scale, kept, step,
        branch_at, normed_at, probe, probed, eps, rows, inner_rows, stream_outer, stream_inner,
        branch_outer, branch_inner, total_outer, total_inner, D, UNIT, EIGHT_BIT, ROWS, BLOCK_D, PROBES, BLOCK_P,
    )  # fmt: skip


@triton.jit
def _end_rows(
    program,
    stream,  # (before + ended, D) by outer and inner strides
    hidden,  # (ended, K), contiguous
    through,  # (PROBES, K) float32, contiguous
    offset,  # (D,) or None
    probe,  # (PROBES, D)
    probed,  # (before + ended, PROBES) float32, written
    before,
    ended,
    inner_rows,
    stream_outer,
    stream_inner,
    D: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    K: tl.constexpr,
    ENDED_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROBES: tl.constexpr,
):
    """``(stream + offset) . probe + hidden . through`` of ``ENDED_ROWS`` rows."""
    own = program * ENDED_ROWS + tl.arange(0, ENDED_ROWS)
    row = before + own
    exists = own < ended
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = exists[:, None] & (column < D)
    start = row_offsets(row, inner_rows, stream_outer, stream_inner, UNIT)
    x = tl.load(stream + start + column, mask=inside, other=0.0).to(tl.float32)  # [ENDED_ROWS, BLOCK_D]
    if offset is not None:
        x += tl.load(offset + column, mask=column < D, other=0.0).to(tl.float32)
    for number in tl.static_range(PROBES):
        direction = tl.load(probe + number * D + column, mask=column < D, other=0.0).to(tl.float32)
        product = tl.sum(x * direction, axis=1)  # [ENDED_ROWS]
        total = tl.zeros([ENDED_ROWS, BLOCK_K], tl.float32)
        for first in tl.static_range(0, K, BLOCK_K):
            inner = first + tl.arange(0, BLOCK_K)[None, :]
            source = hidden + own.to(tl.int64)[:, None] * K + inner
            wide = tl.load(source, mask=exists[:, None] & (inner < K), other=0.0).to(tl.float32)
            total += wide * tl.load(through + number * K + inner, mask=inner < K, other=0.0)
        product += tl.sum(total, axis=1)
        tl.store(probed + row.to(tl.int64) * PROBES + number, product, mask=exists)


@triton.jit(
    do_not_specialize=[
        "ended",
        "ended_tiles",
        "rows",
        "inner_rows",
        "stream_outer",
        "stream_inner",
        "branch_outer",
        "branch_inner",
        "total_outer",
        "total_inner",
    ]
)
def ending_kernel(
    stream,  # (rows, D) by outer and inner strides, unit last stride
    branch,  # (rows, D) or None
    total,  # (rows, D), written; None without branch; the stream itself in place
    weight,  # (D,)
    bias,  # (D,); None: RMS norm, without a mean
    normed,  # (rows, D), contiguous, written
    mean,  # (rows,) float32, written; None with kept, and without bias
    rstd,  # (rows,) float32, written
    scale,  # (rows,) float32, written; None unless EIGHT_BIT
    kept,  # (rows, D) int8, contiguous, written: the row before weight and bias; or None
    step,  # (rows,) float32, written: the scales of these; None with them
    branch_at,  # (rows,) int64: the branch's row for each row of the stream; None: the same
    normed_at,  # (rows,) int64: where each row's norm goes; None: to the same
    probe,  # (PROBES, D) or None
    probed,  # (rows, PROBES) float32, written: products of the sum's rows with the probe's; None with it
    hidden,  # (ended, K), contiguous
    through,  # (PROBES, K) float32, contiguous
    offset,  # (D,) or None
    eps,
    rows,
    inner_rows,
    stream_outer,
    stream_inner,
    branch_outer,
    branch_inner,
    total_outer,
    total_inner,
    ended,
    ended_tiles,
    D: tl.constexpr,
    UNIT: tl.constexpr,  # elements that a stride counts in
    EIGHT_BIT: tl.constexpr,  # None, "fp8" or "int8"
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PROBES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    K: tl.constexpr,
    ENDED_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: ``ROWS`` rows as in :func:`forward_kernel`, or ``ENDED_ROWS`` of those behind them, whose products
    alone are wanted.  Grid: (tiles of these + row tiles,)."""
    if tl.program_id(0) < ended_tiles:
        _end_rows(
            tl.program_id(0), stream, hidden, through, offset, probe, probed, rows, ended, inner_rows, stream_outer,
            stream_inner, D, UNIT, BLOCK_D, K, ENDED_ROWS, BLOCK_K, PROBES,
        )  # fmt: skip
    else:
        _norm_rows(
            tl.program_id(0) - ended_tiles, stream, branch, total, weight, bias, normed, mean, rstd,
            scale, kept, step, branch_at, normed_at, probe, probed, eps, rows, inner_rows, stream_outer,
            stream_inner, branch_outer, branch_inner, total_outer, total_inner, D, UNIT, EIGHT_BIT,
            ROWS, BLOCK_D, PROBES, BLOCK_P,
        )  # fmt: skip


def residual_norm_forward(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    normed_dtype: torch.dtype | None = None,
    in_place: bool = False,
    eight_bit: str | None = None,
    keep: bool = False,
    tile: RowTile | None = None,
) -> tuple[Tensor, ...]:
    """Shapes and meanings are those of :func:`epic_fast.ops.residual_norm.residual_norm_forward`; with ``keep`` the
    results are those of ``residual_norm_forward_kept``, ``(total, normed, data, step, rstd, scale)``.

    Args:
        in_place: the sum goes into ``stream``, which then needs a unit last stride and rows that a view can list.
        tile: other than the table's.
    """
    if normed_dtype is None:
        normed_dtype = stream.dtype if branch is None else branch.dtype
    if eight_bit is not None:
        normed_dtype = EIGHT_BIT_TYPES[eight_bit]
    tensors = (stream, branch, weight, bias, None, None, None, None, None, None)
    options = (float(eps), normed_dtype, in_place, eight_bit, keep, tile)
    return plan.run(forward, tensors, options)[:-1]  # pyright: ignore[reportReturnType]


def moved_norm_forward(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    branch_at: Tensor | None = None,
    normed_at: Tensor | None = None,
    probe: Tensor | None = None,
    ended: tuple[Tensor, Tensor, Tensor | None] | None = None,
    normed_dtype: torch.dtype | None = None,
    keep: bool = False,
    tile: RowTile | None = None,
) -> tuple[Tensor | None, ...]:
    """Shapes and meanings are those of :func:`epic_fast.ops.residual_norm.moved_norm_forward`."""
    if normed_dtype is None:
        normed_dtype = stream.dtype if branch is None else branch.dtype
    ending = (None, None, None) if ended is None else ended
    tensors = (stream, branch, weight, bias, branch_at, normed_at, probe, *ending)
    total, normed, *saved, _, probed = plan.run(forward, tensors, (float(eps), normed_dtype, False, None, keep, tile))
    return total, normed, *(saved if keep else (total, *saved)), probed


def forward(
    tape: Tape,
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    branch_at: Tensor | None,
    normed_at: Tensor | None,
    probe: Tensor | None,
    hidden: Tensor | None,
    through: Tensor | None,
    offset: Tensor | None,
    eps: float,
    normed_dtype: torch.dtype,
    in_place: bool,
    eight_bit: str | None,
    keep: bool,
    tile: RowTile | None,
) -> tuple[Tensor | None, ...]:
    """:func:`residual_norm_forward` on a tape, with what its rows were multiplied by the probe's behind it."""
    shape, width = stream.shape, stream.shape[-1]
    rows = stream.numel() // width
    ended = 0 if hidden is None else hidden.shape[0]
    normed = tape.empty(shape, normed_dtype)
    data = tape.empty(shape, torch.int8) if keep else None
    # The mean, or where the rows are kept their scales.
    first = tape.empty((rows,), torch.float32) if keep or bias is not None else None
    rstd = tape.empty((rows,), torch.float32)
    scale = None if eight_bit is None else tape.empty((rows,), torch.float32)
    total = stream if branch is None or in_place else tape.empty(shape, stream.dtype)
    probes = 0 if probe is None else probe.shape[0]
    probed = None if probe is None else tape.empty((rows, probes), torch.float32)
    results = (total, normed, data, first, rstd, scale) if keep else (total, normed, first, rstd, scale)
    results = (*results, probed)
    if not rows:
        return results
    read, written = rows_of(tape, stream), None
    if branch is not None:
        # With rows that end it is shorter than the stream, and lies as the stream's first rows do.
        branch = rows_of(tape, branch)
        written = read if in_place else rows_of(tape, total)
        if in_place and read.data_ptr() != stream.data_ptr():
            raise ValueError(
                f"residual_norm_forward: in_place=True wants a stream with unit last stride; got shape {tuple(shape)} "
                f"with strides {stream.stride()}; give a view with unit last stride or in_place=False"
            )
    if tile is None:
        tile = norm_tile(width)
    inner_rows, strides, unit = row_strides((read, branch, written))
    constants = (width, unit, eight_bit, tile.rows, tile.block, probes, 1 << max(0, probes - 1).bit_length())
    mean, step = (None, first) if keep else (first, None)
    frozen = contiguous(tape, weight), None if bias is None else contiguous(tape, bias)
    tensors = (read, branch, written, *frozen, normed, mean, rstd, scale, data, step)
    extra = (None if each is None else contiguous(tape, each) for each in (branch_at, normed_at, probe))
    tensors = (*tensors, *extra, probed)
    integers = (rows - ended, inner_rows, *strides)
    if hidden is None or through is None:
        facts = facts_of(tensors, integers, (constants, tile.warps))
        tape.launch(forward_kernel, -(-rows // tile.rows), (*tensors, eps, *integers, *constants), tile.options, facts)
        return results
    depth = hidden.shape[1]
    ending = (contiguous(tape, hidden), contiguous(tape, through), None if offset is None else contiguous(tape, offset))
    ending_tile = ended_tile(depth, tile)
    constants = (*constants, depth, ending_tile.rows, ending_tile.block)
    tiles = -(-ended // ending_tile.rows)
    integers = (*integers, ended, tiles)
    tensors = (*tensors, *ending)
    facts = facts_of(tensors, integers, (constants, tile.warps))
    tape.launch(
        ending_kernel,
        tiles + -(-(rows - ended) // tile.rows),
        (*tensors, eps, *integers, *constants),
        tile.options,
        facts,
    )
    return results
