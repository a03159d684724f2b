"""The virtual sequence ``[prompts ; tokens]``: where a row of it lies, and what it sees.

Rows of queries and rows of keys are counted alike: row ``r < prompts`` is a prompt, row ``r`` above that is token
``r - prompts``.  In prefix tuning there are no prompt rows on the query side (``prompt_rows = 0``), but there are
prompt keys.  A row sees a prefix of the virtual keys, those below its limit; a row past the length has limit 0.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common import launch
from epic_fast.kernels.common.launch import VECTOR_BYTES
from epic_fast.kernels.common.plan import Tape

LOG2_E = math.log2(math.e)
# From this many elements on, an offset inside one (batch, head) is computed in 64 bits.
INT32_EXTENT = launch.INT32_EXTENT
# A masked tile reaches this many rows beyond the last one, at most.
_LARGEST_TILE = 512
_NO_STRIDES = (0, 0, 0)
# A scale of zero must not turn the -inf of a hidden key into NaN.
_LEAST_SCALE = 1e-30


@triton.jit
def head_base(
    base,  # pointer to (B or 1, H, rows, D)
    batch,  # int64
    head,  # int64
    stride_batch,
    stride_head,
    ALIGN: tl.constexpr,
):
    """The pointer to row 0 of one head.  Strides count in units of ``ALIGN`` elements, so that loads stay wide."""
    return base + (batch * stride_batch + head * stride_head) * ALIGN


@triton.jit
def row_offsets(
    rows,  # [BLOCK]
    stride,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    if WIDE:
        rows = rows.to(tl.int64)
    return rows * stride * ALIGN


@triton.jit
def load_rows(
    prompt_base,  # pointer to (prompts, D), or None: those rows count as zeros
    token_base,  # pointer to (tokens, D), or None: those rows count as zeros
    rows,  # [BLOCK]
    prompts,
    stop,
    prompt_stride,
    token_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rows of the virtual sequence, ``[BLOCK, BLOCK_D]``; zeros from row ``stop`` on (looked at only if ``MASKED``)."""
    columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    if prompt_base is None:
        start = token_base + row_offsets(rows - prompts, token_stride, ALIGN, WIDE)  # [BLOCK]
    elif token_base is None:
        start = prompt_base + row_offsets(rows, prompt_stride, ALIGN, WIDE)
    else:
        # One base and an offset, since not every backend takes a choice between pointers.
        apart = (prompt_base.to(tl.int64) - token_base.to(tl.int64)) // (
            token_base.dtype.element_ty.primitive_bitwidth // 8
        )
        offset = tl.where(
            rows < prompts,
            apart + row_offsets(rows, prompt_stride, ALIGN, WIDE),
            row_offsets(rows - prompts, token_stride, ALIGN, WIDE).to(tl.int64),
        )  # [BLOCK]
        # The compiler forgets through `where` that rows start at multiples of 16 bytes.
        start = token_base + tl.multiple_of(offset, ALIGN)
    pointers = start[:, None] + columns[None, :]  # [BLOCK, BLOCK_D]
    if MASKED:
        inside = rows < stop  # [BLOCK]
        if prompt_base is None:
            inside = inside & (rows >= prompts)
        elif token_base is None:
            inside = inside & (rows < prompts)
        mask = inside[:, None]
        if HEAD_DIM != BLOCK_D:
            mask = mask & (columns < HEAD_DIM)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    elif HEAD_DIM != BLOCK_D:
        return tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(
    prompt_base,  # pointer to (prompts, D), or None: not wanted
    token_base,  # pointer to (tokens, D), or None: not wanted
    tile,  # [BLOCK, BLOCK_D]
    rows,  # [BLOCK]
    prompts,
    stop,
    prompt_stride,
    token_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write a tile to rows below ``stop`` of the virtual sequence, in the type of where each lies."""
    columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    if prompt_base is not None:
        start = prompt_base + row_offsets(rows, prompt_stride, ALIGN, WIDE)  # [BLOCK]
        mask = ((rows < prompts) & (rows < stop))[:, None] & (columns < HEAD_DIM)[None, :]
        tl.store(start[:, None] + columns[None, :], tile.to(prompt_base.dtype.element_ty), mask=mask)
    if token_base is not None:
        start = token_base + row_offsets(rows - prompts, token_stride, ALIGN, WIDE)
        mask = ((rows >= prompts) & (rows < stop))[:, None] & (columns < HEAD_DIM)[None, :]
        tl.store(start[:, None] + columns[None, :], tile.to(token_base.dtype.element_ty), mask=mask)


@triton.jit
def load_statistic(
    base,  # pointer to (rows,), float32
    rows,  # [BLOCK]
    stop,
    other,
):
    """One number a row, ``[BLOCK]``; ``other`` from row ``stop`` on.

    The sum over a single entry stands between the load and its use along the columns of a score tile.  Without it the
    compiler loads straight into the layout of those columns, and each thread keeps copies of half of all the numbers.
    """
    column = tl.load((base + rows)[:, None], mask=(rows < stop)[:, None], other=other)  # [BLOCK, 1]
    return tl.sum(column, 1)


@triton.jit
def valid_tokens(
    lengths,  # (B,) integers, or None
    batch,
    tokens,
):
    """How many tokens of this sample are valid; a length beyond the tokens counts as all of them."""
    if lengths is None:
        return tokens
    else:
        return tl.minimum(tl.maximum(tl.load(lengths + batch), 0), tokens).to(tl.int32)


@triton.jit
def row_limits(
    rows,  # [BLOCK]
    prompt_rows,
    prompts,
    length,
    CAUSAL: tl.constexpr,
    PREFIX: tl.constexpr,
):
    """How many virtual keys each row sees, ``[BLOCK]``."""
    if CAUSAL:
        limit = prompts + tl.minimum(rows - prompt_rows + 1, length)
    else:
        limit = tl.where(rows >= 0, prompts + length, 0)
    if PREFIX:
        limit = tl.where(rows < prompt_rows, prompts, limit)
    elif CAUSAL:
        limit = tl.where(rows < prompt_rows, prompts + length, limit)
    return tl.where(rows < prompt_rows + length, limit, 0)


@triton.jit
def tile_limits(
    first,
    stop,
    prompt_rows,
    prompts,
    length,
    CAUSAL: tl.constexpr,
    PREFIX: tl.constexpr,
):
    """The smallest and the largest limit among the valid rows ``first <= row < stop`` of a tile; 0, 0 if none is."""
    first_token = tl.maximum(first - prompt_rows, 0)
    stop_token = tl.minimum(stop - prompt_rows, length)
    token_low = prompts + length
    token_high = prompts + length
    if CAUSAL:
        token_low = prompts + tl.minimum(first_token + 1, length)
        token_high = prompts + tl.minimum(stop_token, length)
    prompt_limit = prompts + length
    if PREFIX:
        prompt_limit = prompts
    has_prompt = first < tl.minimum(prompt_rows, stop)
    has_token = first_token < stop_token
    high = tl.maximum(tl.where(has_prompt, prompt_limit, 0), tl.where(has_token, token_high, 0))
    low = tl.minimum(tl.where(has_prompt, prompt_limit, high), tl.where(has_token, token_low, high))
    return low, high


def padded(head_dim: int) -> int:
    """The width of a tile that holds ``head_dim`` columns: the power of two at or above it, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


class Layout(NamedTuple):
    """Where the rows of a launch's tensors lie.

    Attributes:
        align: the elements of 16 bytes if every row of every tensor starts at a multiple of them, else 1.
        wide: whether an offset inside one head passes 32 bits.
        strides: of (batch, head, row), tensor after tensor, in units of ``align`` elements; the batch's is 0 where all
            samples share a batch of 1, and all three are 0 for None.
        types: of the tensors, None for None.
    """

    align: int
    wide: bool
    strides: list[int]
    types: tuple[torch.dtype | None, ...]


def layout_of(tensors: Sequence[Tensor | None], itemsize: int) -> Layout:
    """Looks at each tensor once."""
    strides: list[int] = []
    types: list[torch.dtype | None] = []
    lowest = addresses = farthest = 0
    for tensor in tensors:
        if tensor is None:
            strides += _NO_STRIDES
            types.append(None)
            continue
        batch, head, row, _ = tensor.stride()
        batches, _, rows, width = tensor.shape
        lowest |= batch | head | row
        addresses |= tensor.data_ptr()
        extent = (rows + _LARGEST_TILE) * (row if row > 0 else -row) + width
        if extent > farthest:
            farthest = extent
        strides += (0 if batches == 1 else batch, head, row)
        types.append(tensor.dtype)
    vector = VECTOR_BYTES // itemsize
    align = 1 if lowest & (vector - 1) or addresses & (VECTOR_BYTES - 1) else vector
    if align > 1:
        strides = [stride // align for stride in strides]
    return Layout(align, farthest >= INT32_EXTENT, strides, tuple(types))


def facts_of(
    layout: Layout, others: Sequence[Tensor | None], constants: Hashable, integers: Sequence[int] = ()
) -> Hashable:
    """What :func:`epic_fast.kernels.common.launch.launch` keeps a compiled kernel under; None where Triton is to look
    for itself.

    Args:
        layout: of the tensors with rows.
        others: the remaining pointers of the launch.
        constants: every constexpr and option that neither ``layout`` nor the types of ``others`` decide.
        integers: what else there is besides the strides of rows and counts of them.
    """
    if layout.align == 1 or layout.wide:
        return None
    return launch.facts_of(others, (), (*layout.strides, *integers), (layout.align, layout.types, constants))


def base_2(scale: float) -> float:
    """The factor that makes scaled scores of raw ones, for powers of two; the sign travels by itself."""
    return max(abs(scale) * LOG2_E, _LEAST_SCALE)


def empty_rows(tape: Tape, like: Tensor, batch: int | None = None) -> Tensor:
    """Memory for ``(batch, heads, rows, head_dim)`` that runs over (batch, rows, heads, head_dim)."""
    own_batch, heads, rows, width = like.shape
    if batch is None:
        batch = own_batch
    row, sample = max(width, 1) * max(heads, 1), max(width, 1) * max(heads, 1) * max(rows, 1)
    return tape.empty((batch, heads, rows, width), like.dtype, (sample, max(width, 1), row, 1))


def forward_memory(
    tape: Tape,
    query: Tensor,
    prompt_query: Tensor | None,
    output: Tensor | None,
    prompt_output: Tensor | None,
    save_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Where a forward writes output, prompt_output and lse: into what is given, or into memory of its own."""
    batch, heads, rows, _ = query.shape
    if output is None:
        output = empty_rows(tape, query)
    if prompt_query is None:
        prompt_output = None
    else:
        rows += prompt_query.shape[2]
        if prompt_output is None:
            prompt_output = empty_rows(tape, prompt_query, batch)
    return output, prompt_output, tape.empty((batch, heads, rows), torch.float32) if save_lse else None


class Gradients(NamedTuple):
    """What every backward begins with.

    Attributes:
        results: the gradients to return, in the order of the inputs; None where not needed.
        targets: what kernels write: the results, but float32 shares, one a sample, of prompts that the batch shares.
        first, stop: the virtual rows of queries with a gradient; the others add nothing to any dk or dv.
    """

    results: tuple[Tensor | None, ...]
    targets: tuple[Tensor | None, ...]
    first: int
    stop: int


def begin_gradients(
    tape: Tape,
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    given: Sequence[Tensor | None] | None,
    has_grad: bool,
    has_prompt_grad: bool,
) -> Gradients:
    """Memory for the gradients.

    Args:
        inputs: query, key, value, prompt_query, prompt_key, prompt_value.
        given: gradients to write into.
        has_grad, has_prompt_grad: whether there are gradients of output and prompt_output.
    """
    query, prompt_query = inputs[0], inputs[3]
    assert query is not None
    batch, heads, tokens, head_dim = query.shape
    prompt_rows = 0 if prompt_query is None else prompt_query.shape[2]
    results: list[Tensor | None] = [None] * 6
    targets: list[Tensor | None] = [None] * 6
    for index, (source, needed) in enumerate(zip(inputs, needs, strict=True)):
        if not needed or source is None:
            continue
        result = None if given is None else given[index]
        if result is None:
            result = empty_rows(tape, source)
        results[index] = targets[index] = result
        if source.shape[0] != batch:
            targets[index] = tape.empty((batch, heads, source.shape[2], head_dim), torch.float32)
    first = 0 if has_prompt_grad else prompt_rows
    stop = prompt_rows + tokens if has_grad else prompt_rows
    return Gradients(tuple(results), tuple(targets), first, stop)


def no_gradients(tape: Tape, gradients: Gradients, query: Tensor) -> bool:
    """Whether there is nothing to launch; all gradients are zero then, and so is what this leaves."""
    if gradients.stop > gradients.first and query.shape[0] * query.shape[1] * query.shape[3]:
        return False
    for result in gradients.results:
        if result is not None:
            tape.apply(Tensor.zero_, result)
    return True


def end_gradients(tape: Tape, gradients: Gradients) -> None:
    """The sums over the batch, of float32 shares in a fixed order."""
    for result, target in zip(gradients.results, gradients.targets, strict=True):
        if result is not None and target is not None and result is not target:
            tape.apply(_sum_shares, result, target)


def _sum_shares(result: Tensor, shares: Tensor) -> None:
    result.copy_(shares.sum(0, keepdim=True))
