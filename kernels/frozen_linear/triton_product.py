"""Products with a frozen weight whose epilogue does what would be another pass over the result.

Forward: scales of eight-bit operands, bias, activation, and what backward needs of it.  Backward: times the derivative
of the activation below.  Two forms of one computation: operands by pointers (any card) and by tensor descriptors
(Hopper and newer), there also persistent.  No sum is split: a result's bits depend on its own row and column alone.
"""

# pyright: basic, reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from epic_fast.kernels.activation.triton_functions import (
    activate,
    activate_with_derivative,
    decode_derivative,
    derivative,
    encode_derivative,
)
from epic_fast.kernels.common import launch, plan
from epic_fast.kernels.common.cards import has_descriptors, is_hopper, processors, shared_memory
from epic_fast.kernels.common.descriptors import Described
from epic_fast.kernels.common.plan import Tape
from epic_fast.kernels.frozen_linear.tiles import (
    ProductTile,
    product_tile,
)


@triton.jit
def tile_place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles go through all columns before the next ones."""
    first = tile // (GROUP * tiles_n) * GROUP
    high = tl.minimum(tiles_m - first, GROUP)
    rest = tile % (GROUP * tiles_n)
    return first + rest % high, rest // high


@triton.jit
def finish(
    total,  # [BLOCK_M, BLOCK_N], float32 or int32
    left_scale,  # (M,)
    right_scale,  # (N,)
    bias,  # (N,)
    row,  # [BLOCK_M]
    column,  # [BLOCK_N]
    rows,
    columns,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """The pre-activation of a tile in float32."""
    total = total.to(tl.float32)
    if SCALED:
        scale = tl.load(left_scale + row, row < rows, other=0.0)
        other = tl.load(right_scale + column, column < columns, other=0.0)
        total = total * scale[:, None] * other[None, :]
    if HAS_BIAS:
        total += tl.load(bias + column, column < columns, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def derivative_of(kept, ACTIVATION: tl.constexpr, KEEP: tl.constexpr):
    """``act'`` of what a layer kept, in float32."""
    if KEEP == "eight_bit":
        return decode_derivative(kept)
    else:
        return derivative(kept.to(tl.float32), ACTIVATION)


@triton.jit(do_not_specialize=["rows", "columns"])
def _product_kernel(
    left,  # (M, K)
    right,  # (N, K), or (K, N) unless DEPTH_LAST
    left_scale,  # (M,) float32
    right_scale,  # (N,) float32
    bias,  # (N,)
    output,  # (M, N)
    kept,  # (M, N): written, or read with BACKWARD
    rows,
    columns,
    depth,
    left_row,  # strides of a row
    right_row,
    output_row,
    kept_row,
    DEPTH_LAST: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,  # None, "quick_gelu", "gelu" or "gelu_tanh"
    KEEP: tl.constexpr,  # "none", "full" or "eight_bit"
    BACKWARD: tl.constexpr,  # the output is multiplied by the derivative
    TOTAL: tl.constexpr,  # the type of sums
    PRECISION: tl.constexpr,  # of float32 products
    EVEN: tl.constexpr,  # BLOCK_K divides the depth
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program: one tile of the result.  Grid: (tiles,)."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    tile_m, tile_n = tile_place(tl.program_id(0), tiles_m, tiles_n, GROUP)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    inner = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    # Rows and columns past the end read the first ones: what comes of them is stored nowhere.
    safe_row = tl.where(row < rows, row, 0).to(tl.int64)
    safe_column = tl.where(column < columns, column, 0)
    safe_column = tl.max_contiguous(tl.multiple_of(safe_column, BLOCK_N), BLOCK_N)
    lefts = left + safe_row[:, None] * left_row + inner[None, :]  # [BLOCK_M, BLOCK_K]
    if DEPTH_LAST:
        rights = right + safe_column.to(tl.int64)[None, :] * right_row + inner[:, None]  # [BLOCK_K, BLOCK_N]
        step = BLOCK_K
    else:
        rights = right + inner.to(tl.int64)[:, None] * right_row + safe_column[None, :]
        step = BLOCK_K * right_row
    total = tl.zeros((BLOCK_M, BLOCK_N), TOTAL)
    for first in range(0, depth, BLOCK_K):
        if EVEN:
            a = tl.load(lefts)
            b = tl.load(rights)
        else:
            a = tl.load(lefts, inner[None, :] < depth - first, other=0.0)
            b = tl.load(rights, inner[:, None] < depth - first, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=TOTAL)
        lefts += BLOCK_K
        rights += step
    value = finish(total, left_scale, right_scale, bias, row, column, rows, columns, SCALED, HAS_BIAS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    outputs = output + row.to(tl.int64)[:, None] * output_row + column[None, :]
    kepts = kept + row.to(tl.int64)[:, None] * kept_row + column[None, :]
    if BACKWARD:
        value *= derivative_of(tl.load(kepts, inside, other=0), ACTIVATION, KEEP)
        tl.store(outputs, value.to(output.dtype.element_ty), inside)
    else:
        if KEEP == "full":
            tl.store(kepts, value.to(kept.dtype.element_ty), inside)
        if KEEP == "eight_bit":
            value, slope = activate_with_derivative(value, ACTIVATION)
            tl.store(kepts, encode_derivative(slope), inside)
        elif ACTIVATION is not None:
            value = activate(value, ACTIVATION)
        tl.store(outputs, value.to(output.dtype.element_ty), inside)


@triton.jit
def finish_part(
    total,  # [BLOCK_M, PART]
    left_scale,
    right_scale,
    bias,
    output,
    kept,
    first_row,
    first_column,
    rows,
    columns,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """The epilogue of one part of a tile, by descriptors: what lies outside is not written."""
    row = first_row + tl.arange(0, total.shape[0])
    column = first_column + tl.arange(0, total.shape[1])
    value = finish(total, left_scale, right_scale, bias, row, column, rows, columns, SCALED, HAS_BIAS)
    if BACKWARD:
        value *= derivative_of(kept.load([first_row, first_column]), ACTIVATION, KEEP)
    else:
        if KEEP == "full":
            kept.store([first_row, first_column], value.to(kept.dtype))
        if KEEP == "eight_bit":
            value, slope = activate_with_derivative(value, ACTIVATION)
            kept.store([first_row, first_column], encode_derivative(slope))
        elif ACTIVATION is not None:
            value = activate(value, ACTIVATION)
    output.store([first_row, first_column], value.to(output.dtype))


@triton.jit
def left_and_right(total):
    """Both halves of a tile's columns."""
    WIDTH: tl.constexpr = total.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(total, (total.shape[0], 2, WIDTH)), (0, 2, 1)))


@triton.jit
def one_tile(
    left,
    right,
    left_scale,
    right_scale,
    bias,
    output,
    kept,
    first_row,
    first_column,
    rows,
    columns,
    depth,
    DEPTH_LAST: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    BACKWARD: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    total = tl.zeros((BLOCK_M, BLOCK_N), TOTAL)
    for first in range(0, depth, BLOCK_K):
        a = left.load([first_row, first])
        if DEPTH_LAST:
            b = right.load([first_column, first]).T
        else:
            b = right.load([first, first_column])
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=TOTAL)
    if PARTS == 1:
        finish_part(total, left_scale, right_scale, bias, output, kept, first_row, first_column, rows, columns,
                    SCALED, HAS_BIAS, ACTIVATION, KEEP, BACKWARD)  # fmt: skip
    else:
        QUARTERED: tl.constexpr = PARTS == 4
        tl.static_assert(PARTS == 2 or QUARTERED, "a tile has one part, two or four")
        one, two = left_and_right(total)
        for part in tl.static_range(2):
            half = one if part == 0 else two
            column = first_column + part * (BLOCK_N // 2)
            if QUARTERED:
                start, end = left_and_right(half)
                finish_part(start, left_scale, right_scale, bias, output, kept, first_row, column, rows, columns,
                            SCALED, HAS_BIAS, ACTIVATION, KEEP, BACKWARD)  # fmt: skip
                finish_part(end, left_scale, right_scale, bias, output, kept, first_row, column + BLOCK_N // 4, rows,
                            columns, SCALED, HAS_BIAS, ACTIVATION, KEEP, BACKWARD)  # fmt: skip
            else:
                finish_part(half, left_scale, right_scale, bias, output, kept, first_row, column, rows, columns,
                            SCALED, HAS_BIAS, ACTIVATION, KEEP, BACKWARD)  # fmt: skip


@triton.jit(do_not_specialize=["rows", "columns", "depth"])
def _descriptor_kernel(
    left,  # descriptors; shapes as in _product_kernel
    right,
    left_scale,  # pointers
    right_scale,
    bias,
    output,  # descriptors
    kept,
    rows,
    columns,
    depth,
    DEPTH_LAST: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    BACKWARD: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """One program: one tile of the result, or every so manieth.  Grid: (tiles,), or (programs,) if PERSISTENT."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
            tile_m, tile_n = tile_place(tile, tiles_m, tiles_n, GROUP)
            one_tile(left, right, left_scale, right_scale, bias, output, kept, tile_m * BLOCK_M, tile_n * BLOCK_N,
                     rows, columns, depth, DEPTH_LAST, SCALED, HAS_BIAS, ACTIVATION, KEEP, BACKWARD, TOTAL, PRECISION,
                     BLOCK_M, BLOCK_N, BLOCK_K, PARTS)  # fmt: skip
    else:
        tile_m, tile_n = tile_place(tl.program_id(0), tiles_m, tiles_n, GROUP)
        one_tile(left, right, left_scale, right_scale, bias, output, kept, tile_m * BLOCK_M, tile_n * BLOCK_N,
                 rows, columns, depth, DEPTH_LAST, SCALED, HAS_BIAS, ACTIVATION, KEEP, BACKWARD, TOTAL, PRECISION,
                 BLOCK_M, BLOCK_N, BLOCK_K, PARTS)  # fmt: skip


def matrix_rows(tensor: Tensor) -> Tensor:
    """The matrix itself if its rows are contiguous, else a copy."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def rows_of(tape: Tape, tensor: Tensor) -> Tensor:
    """:func:`matrix_rows` on a tape."""
    return tensor if tensor.stride(1) == 1 else tape.derive(matrix_rows, tensor)


def describable(*tensors: Tensor | None) -> bool:
    """Whether tensor descriptors reach these matrices: rows start at multiples of 16 bytes."""
    return all(
        each is None or (each.data_ptr() % 16 == 0 and each.stride(0) * each.element_size() % 16 == 0)
        for each in tensors
    )


@functools.cache
def describer(*block: int):
    """What makes a descriptor of a matrix, in blocks."""
    return functools.partial(TensorDescriptor.from_tensor, block_shape=list(block))


def product(
    left: Tensor,
    right: Tensor,
    *,
    depth_last: bool = True,
    bias: Tensor | None = None,
    activation: str | None = None,
    keep: str = "none",
    kept: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
    tile: ProductTile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One product and its epilogue.

    Args:
        left: ``(M, K)``, unit last stride.
        right: ``(N, K)`` with ``depth_last``, else ``(K, N)``; the type of ``left``.
        bias: ``(N,)``, any floating type.
        activation: None or one of ``kernels/activation``.
        keep: what to keep of the pre-activation, or what ``kept`` holds.
        kept: ``(M, N)``: the product is multiplied by ``act'`` of it, and nothing else is returned.
        scales: ``(M,)`` and ``(N,)`` float32, of operands in eight bits.
        out_dtype: of the output; the type of ``left`` if not given.
        tile: another one than the table's.

    Returns:
        The output ``(M, N)``, and what was kept: ``(M, N)``, uint8 with ``"eight_bit"``; or None.
    """
    options = (depth_last, activation, keep, out_dtype or left.dtype, plan.precision(left.dtype), tile)
    return plan.run(multiply, (left, right, *(scales or (None, None)), bias, kept), options)  # pyright: ignore[reportReturnType]


def multiply(
    tape: Tape,
    left: Tensor,
    right: Tensor,
    left_scale: Tensor | None,
    right_scale: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    depth_last: bool,
    activation: str | None,
    keep: str,
    out_dtype: torch.dtype,
    precision: str,
    tile: ProductTile | None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`product` on a tape."""
    left, right = rows_of(tape, left), rows_of(tape, right)
    rows, depth = left.shape
    columns = right.shape[0 if depth_last else 1]
    output = tape.empty((rows, columns), out_dtype)
    backward = kept is not None
    made = None
    if backward:
        kept = rows_of(tape, kept)
    elif keep != "none":
        kept = made = tape.empty((rows, columns), torch.uint8 if keep == "eight_bit" else out_dtype)
    if output.numel() == 0:
        return output, made
    if tile is None:
        describes = has_descriptors(left.device) and describable(left, right, output, kept) and depth > 0
        card = (is_hopper(left.device), shared_memory(left.device))
        extent = (rows, columns, depth, processors(left.device))
        tile = product_tile(left.element_size(), describes, *card, *extent, keeps=made is not None)
    total = tl.int32 if left.dtype == torch.int8 else tl.float32
    flags = (depth_last, left_scale is not None, bias is not None, activation, keep, backward, total, precision)
    tiles = tile.count(rows, columns)
    # A pointer that the kernel never follows still has to be one.
    vectors = tuple(output if each is None else each for each in (left_scale, right_scale, bias))
    results = (output, output if kept is None else kept)
    sizes = (rows, columns, depth)
    blocks = (tile.rows, tile.columns, tile.depth)
    if tile.descriptors:
        part = describer(tile.rows, tile.columns // tile.parts)
        described = (
            Described(left, describer(tile.rows, tile.depth)),
            Described(
                right, describer(tile.columns, tile.depth) if depth_last else describer(tile.depth, tile.columns)
            ),
        )
        programs = min(tiles, processors(left.device)) if tile.persistent else tiles
        constants = (*flags, *blocks, tile.parts, tile.group, tile.persistent)
        facts = launch.facts_of((left, right, *vectors, *results), (), sizes, (constants, tile.warps, tile.stages))
        arguments = (*described, *vectors, *(Described(each, part) for each in results), *sizes, *constants)
        tape.launch(_descriptor_kernel, programs, arguments, tile.options, facts)
    else:
        strides = (left.stride(0), right.stride(0), output.stride(0), 0 if kept is None else kept.stride(0))
        constants = (*flags, depth % tile.depth == 0, *blocks, tile.group)
        # Depth and strides are compiled for where they are multiples of 16.
        facts = launch.facts_of(
            (left, right, *vectors, *results),
            (),
            (*sizes, *strides),
            (depth, strides, constants, tile.warps, tile.stages),
        )
        arguments = (left, right, *vectors, *results, *sizes, *strides, *constants)
        tape.launch(_product_kernel, tiles, arguments, tile.options, facts)
    return output, made
