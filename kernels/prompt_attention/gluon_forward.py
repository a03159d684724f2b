"""Forward of prompt-concatenated attention for Hopper, in Gluon.

Two forms of one computation, both without a concatenation and without TMA descriptors:

- *resident*: a program owns one head of one sample.  The keys and values of the whole virtual sequence
  ``[prompts ; tokens]`` lie in shared memory and every tile of queries meets them there: they cross the L2 cache once.
- *streamed*: a program owns one tile of queries; tiles of keys and values pass through a ring in shared memory.

Queries go from global memory to registers, 16 bytes a thread, and become the A operand of wgmma inside their warp;
outputs take the same way back.
"""

# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportMissingImports=false

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.cards import is_hopper
from epic_fast.kernels.common.plan import Tape
from epic_fast.kernels.prompt_attention.triton_rows import (
    Layout,
    base_2,
    facts_of,
    forward_memory,
    layout_of,
)

# Triton 3.9 has other names for these than 3.6.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
UNIT = gl.constexpr(8)  # strides count in units of 8 elements: 16 bytes, the width of one copy
_ITEMSIZE = 2  # of float16 and bfloat16


@gluon.constexpr_function
def row_layout(rows, head_dim, warps):
    """16 bytes of a row to a thread, and each row to the warp that has it in a wgmma accumulator."""
    registers = [[0, 1], [0, 2], [0, 4], [0, 32]] + ([[0, 64]] if head_dim == 128 else []) + [[8, 0]]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    bases = [[16, 0], [32, 0]] + ([[64, 0]] if warps == 8 else [])
    return gl.DistributedLinearLayout(registers, lanes, bases, [], [rows, head_dim])


@gluon.constexpr_function
def mma_layout(columns, warps):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def copy_layout(head_dim, warps):
    return gl.BlockedLayout([1, 8], [256 // head_dim, head_dim // 8], [warps, 1], [1, 0])


@gluon.jit
def row_pointers(base, prompt_base, row_stride, prompt_row_stride, row, column, prompts):
    """Rows below ``prompts`` lie in the prompts, the others in the tokens; one head is shorter than 2**31 elements."""
    is_prompt = row < prompts
    offset = gl.where(is_prompt, row * prompt_row_stride, (row - prompts) * row_stride) * UNIT
    pointers = gl.where(is_prompt, prompt_base, base)[:, None] + (offset[:, None] + column[None, :])
    return gl.max_contiguous(gl.multiple_of(pointers, [1, 16]), [1, 8])


@gluon.jit
def start_copy(
    destination,  # shared memory, [ROWS, D]
    base,  # one head of the tokens, (N, D)
    prompt_base,  # one head of the prompts, (P, D)
    row_stride,
    prompt_row_stride,
    first,
    prompts,
    stop,
    layout: gl.constexpr,
):
    """Start copying virtual rows ``first..first + ROWS``; what is at or past ``stop`` becomes zero."""
    ROWS: gl.constexpr = destination.shape[0]
    D: gl.constexpr = destination.shape[1]
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, D, gl.SliceLayout(0, layout))
    pointers = row_pointers(base, prompt_base, row_stride, prompt_row_stride, row, column, prompts)
    async_load(destination, pointers, mask=(row < stop)[:, None])


@gluon.jit
def load_rows(
    base,
    prompt_base,
    row_stride,
    prompt_row_stride,
    first,
    prompts,
    stop,
    ROWS: gl.constexpr,
    D: gl.constexpr,
    layout: gl.constexpr,
):
    """Virtual rows ``first..first + ROWS`` in registers; zero at or past ``stop``."""
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, D, gl.SliceLayout(0, layout))
    pointers = row_pointers(base, prompt_base, row_stride, prompt_row_stride, row, column, prompts)
    return gl.load(pointers, mask=(row < stop)[:, None], other=0.0)  # [ROWS, D]


@gluon.jit
def store_rows(
    tile,  # [ROWS, D]
    base,
    prompt_base,
    row_stride,
    prompt_row_stride,
    first,
    prompts,
    stop,
    layout: gl.constexpr,
):
    row = first + gl.arange(0, tile.shape[0], gl.SliceLayout(1, layout))
    column = gl.arange(0, tile.shape[1], gl.SliceLayout(0, layout))
    pointers = row_pointers(base, prompt_base, row_stride, prompt_row_stride, row, column, prompts)
    gl.store(pointers, gl.convert_layout(tile, layout), mask=(row < stop)[:, None])


@gluon.jit
def valid_tokens(lengths, sample, tokens, HAS_LENGTHS: gl.constexpr):
    if HAS_LENGTHS:
        return gl.minimum(gl.maximum(gl.load(lengths + sample), 0), tokens).to(gl.int32)
    else:
        return tokens


@gluon.jit
def row_limits(row, prompt_rows, prompts, length, CAUSAL: gl.constexpr, PREFIX: gl.constexpr):
    """How many virtual keys each row sees; 0 from the length on."""
    limit = prompts + length + 0 * row
    if CAUSAL:
        limit = prompts + gl.minimum(row - prompt_rows + 1, length)
        limit = gl.where(row < prompt_rows, prompts + length, limit)
    if PREFIX:
        limit = gl.where(row < prompt_rows, prompts, limit)
    return gl.where(row < prompt_rows + length, limit, 0)


@gluon.jit
def tile_limits(first, stop, prompt_rows, prompts, length, CAUSAL: gl.constexpr, PREFIX: gl.constexpr):
    """The smallest and the largest limit among the valid rows ``first..stop`` of a tile; 0, 0 if none is."""
    first_token = gl.maximum(first - prompt_rows, 0)
    stop_token = gl.minimum(stop - prompt_rows, length)
    low = prompts + length
    high = prompts + length
    if CAUSAL:
        low = prompts + gl.minimum(first_token + 1, length)
        high = prompts + gl.minimum(stop_token, length)
    prompt_limit = prompts + length
    if PREFIX:
        prompt_limit = prompts
    if first_token >= stop_token:
        low = prompt_limit
        high = 0
    if first < gl.minimum(prompt_rows, stop):
        low = gl.minimum(low, prompt_limit)
        high = gl.maximum(high, prompt_limit)
    return low, high


@gluon.jit
def hide(
    scores,  # [BLOCK_M, BLOCK_N]
    limit,  # [BLOCK_M]
    stop,
    first_key,
    first_row,
    VARIED: gl.constexpr,
):
    """Scores of keys ``first_key..`` that a row does not see become -inf; all rows see ``stop`` keys unless VARIED.

    ``first_row``, which changes from tile to tile, is on both sides, so that no register keeps columns across tiles.
    """
    layout: gl.constexpr = scores.type.layout
    column = first_key + first_row + gl.arange(0, scores.shape[1], gl.SliceLayout(0, layout))
    if VARIED:
        bound = gl.convert_layout(limit, gl.SliceLayout(1, layout)) + first_row
        return gl.where(column[None, :] < bound[:, None], scores, float("-inf"))
    else:
        return gl.where((column < stop + first_row)[None, :], scores, float("-inf"))


@gluon.jit
def weigh(
    scores,  # [BLOCK_M, BLOCK_N]
    maximum,  # [BLOCK_M], of raw scores
    total,  # [BLOCK_M]
    scale,
    DTYPE: gl.constexpr,
    OPERAND: gl.constexpr,
    VARIED: gl.constexpr,
):
    """One tile's step of the online softmax: weights as an operand, new statistics, the factor on what was."""
    ROW: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    STATE: gl.constexpr = maximum.type.layout
    old = gl.convert_layout(maximum, ROW)
    new = gl.maximum(old, gl.max(scores, 1))
    pivot = new
    if VARIED:
        # A row that has seen nothing yet keeps a finite pivot: exp2(-inf - 0) = 0, never exp2(-inf + inf).
        pivot = gl.where(new == float("-inf"), 0.0, new)
    decay = gl.exp2((old - pivot) * scale)
    weights = gl.exp2(scores * scale - (pivot * scale)[:, None])  # [BLOCK_M, BLOCK_N]
    total = total * gl.convert_layout(decay, STATE) + gl.convert_layout(gl.sum(weights, 1), STATE)
    operand = gl.convert_layout(weights.to(DTYPE), OPERAND)
    return operand, gl.convert_layout(new, STATE), total, gl.convert_layout(decay, STATE)


@gluon.jit
def await_copies(OUTSTANDING: gl.constexpr):
    """All groups of copies but the last OUTSTANDING are there, and wgmma may read them."""
    async_copy.wait_group(OUTSTANDING)
    # At once: between these two the compiler would put a barrier of its own.
    barrier()
    fence_async_shared()


@gluon.jit
def finish_rows(
    accumulator,  # [BLOCK_M, D]
    maximum,  # [BLOCK_M]
    total,  # [BLOCK_M]
    limit,  # [BLOCK_M]
    scale,
    DTYPE: gl.constexpr,
    VARIED: gl.constexpr,
):
    """Output rows and their base-2 log-sum-exp; 0 and +inf for rows that see nothing."""
    statistic = maximum * scale + gl.log2(total)
    inverse = 1.0 / total
    if VARIED:
        sees = limit > 0
        statistic = gl.where(sees, statistic, float("inf"))
        inverse = gl.where(sees, inverse, 0.0)
    return (accumulator * inverse[:, None]).to(DTYPE), statistic


STRIDES = [
    f"{tensor}_{dimension}"
    for tensor in ("query", "key", "value", "prompt_query", "prompt_key", "prompt_value", "output", "prompt_output")
    for dimension in ("batch", "head", "row")
]


@gluon.jit(do_not_specialize=[*STRIDES, "heads", "tokens", "prompts", "prompt_rows", "scale"])
def _resident_kernel(
    query,  # (B, H, N, D), as are key, value, output
    key,
    value,
    prompt_query,  # (B or 1, H, P, D), as are prompt_key, prompt_value, prompt_output
    prompt_key,
    prompt_value,
    output,
    prompt_output,
    lse,  # (B, H, R)
    lengths,  # (B,)
    query_batch,  # strides of the dimensions batch, head, row, in units of 8 elements
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    prompt_query_batch,
    prompt_query_head,
    prompt_query_row,
    prompt_key_batch,
    prompt_key_head,
    prompt_key_row,
    prompt_value_batch,
    prompt_value_head,
    prompt_value_row,
    output_batch,
    output_head,
    output_row,
    prompt_output_batch,
    prompt_output_head,
    prompt_output_row,
    heads,
    tokens,
    prompts,
    prompt_rows,
    scale,  # log2(e) included
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    FULL: gl.constexpr,  # key tiles of BLOCK_N
    TAIL: gl.constexpr,  # width of the key tile after them, 0 for none
    PREFIX: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    SAVE_LSE: gl.constexpr,
):
    """One program: one head.  Grid: (B * H,)."""
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = key.dtype.element_ty
    VARIED: gl.constexpr = PREFIX or CAUSAL or HAS_LENGTHS
    ROWS: gl.constexpr = row_layout(BLOCK_M, D, WARPS)
    COPY: gl.constexpr = copy_layout(D, WARPS)
    SCORES: gl.constexpr = mma_layout(BLOCK_N, WARPS)
    OUTPUT: gl.constexpr = mma_layout(D, WARPS)
    QUERY: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], DTYPE)
    GROUPS: gl.constexpr = 2 * FULL + (2 if TAIL > 0 else 0)

    program = gl.program_id(0)
    sample = (program // heads).to(gl.int64)
    head = (program % heads).to(gl.int64)
    length = valid_tokens(lengths, sample, tokens, HAS_LENGTHS)
    stop = prompts + length
    live = prompt_rows + length
    rows = prompt_rows + tokens
    query += (sample * query_batch + head * query_head) * UNIT
    key += (sample * key_batch + head * key_head) * UNIT
    value += (sample * value_batch + head * value_head) * UNIT
    prompt_query += (sample * prompt_query_batch + head * prompt_query_head) * UNIT
    prompt_key += (sample * prompt_key_batch + head * prompt_key_head) * UNIT
    prompt_value += (sample * prompt_value_batch + head * prompt_value_head) * UNIT
    output += (sample * output_batch + head * output_head) * UNIT
    prompt_output += (sample * prompt_output_batch + head * prompt_output_head) * UNIT
    lse += program.to(gl.int64) * rows

    keys = gl.allocate_shared_memory(DTYPE, [FULL, BLOCK_N, D], SHARED)
    values = gl.allocate_shared_memory(DTYPE, [FULL, BLOCK_N, D], SHARED)
    for j in gl.static_range(FULL):
        start_copy(keys.index(j), key, prompt_key, key_row, prompt_key_row, j * BLOCK_N, prompts, stop, COPY)
        async_copy.commit_group()
        start_copy(values.index(j), value, prompt_value, value_row, prompt_value_row, j * BLOCK_N, prompts, stop, COPY)
        async_copy.commit_group()
    if TAIL > 0:
        SHARED_TAIL: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TAIL, D], DTYPE)
        SCORES_TAIL: gl.constexpr = mma_layout(TAIL, WARPS)
        last: gl.constexpr = FULL * BLOCK_N
        tail_keys = gl.allocate_shared_memory(DTYPE, [1, TAIL, D], SHARED_TAIL)
        tail_values = gl.allocate_shared_memory(DTYPE, [1, TAIL, D], SHARED_TAIL)
        start_copy(tail_keys.index(0), key, prompt_key, key_row, prompt_key_row, last, prompts, stop, COPY)
        async_copy.commit_group()
        start_copy(tail_values.index(0), value, prompt_value, value_row, prompt_value_row, last, prompts, stop, COPY)
        async_copy.commit_group()

    upcoming = load_rows(
        query, prompt_query, query_row, prompt_query_row, 0, prompt_rows, live, BLOCK_M, D, ROWS
    )  # [BLOCK_M, D]
    for first in range(0, rows, BLOCK_M):
        # Zero, but not for the compiler, which else keeps what it computes of all tiles in registers from pass to pass.
        zero = first >> 30
        queries = gl.convert_layout(upcoming, QUERY)  # [BLOCK_M, D]
        row = first + gl.arange(0, BLOCK_M, ROW)  # [BLOCK_M]
        limit = row_limits(row, prompt_rows, prompts, length, CAUSAL, PREFIX)  # [BLOCK_M]
        maximum = gl.full([BLOCK_M], float("-inf"), gl.float32, ROW)
        total = gl.full([BLOCK_M], 0.0, gl.float32, ROW)
        accumulator = gl.full([BLOCK_M, D], 0.0, gl.float32, OUTPUT)
        for j in gl.static_range(FULL):
            if first == 0:
                await_copies(GROUPS - 1 - 2 * j)
            scores = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, SCORES)
            scores = warpgroup_mma(queries, keys.index(j + zero).permute((1, 0)), scores, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            if TAIL == 0 and j == FULL - 1:
                upcoming = load_rows(
                    query,
                    prompt_query,
                    query_row,
                    prompt_query_row,
                    first + BLOCK_M,
                    prompt_rows,
                    live,
                    BLOCK_M,
                    D,
                    ROWS,
                )
            if VARIED or (TAIL == 0 and j == FULL - 1):
                scores = hide(scores, limit, stop, j * BLOCK_N, first, VARIED)
            weights, maximum, total, decay = weigh(scores, maximum, total, scale, DTYPE, WEIGHTS, VARIED)
            if j > 0:
                accumulator = accumulator * decay[:, None]
            if first == 0:
                await_copies(GROUPS - 2 - 2 * j)
            accumulator = warpgroup_mma(weights, values.index(j + zero), accumulator, is_async=True)
            accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
        if TAIL > 0:
            if first == 0:
                await_copies(1)
            scores = gl.full([BLOCK_M, TAIL], 0.0, gl.float32, SCORES_TAIL)
            scores = warpgroup_mma(queries, tail_keys.index(zero).permute((1, 0)), scores, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            upcoming = load_rows(
                query, prompt_query, query_row, prompt_query_row, first + BLOCK_M, prompt_rows, live, BLOCK_M, D, ROWS
            )
            scores = hide(scores, limit, stop, last, first, VARIED)
            weights, maximum, total, decay = weigh(scores, maximum, total, scale, DTYPE, WEIGHTS, VARIED)
            accumulator = accumulator * decay[:, None]
            if first == 0:
                await_copies(0)
            accumulator = warpgroup_mma(weights, tail_values.index(zero), accumulator, is_async=True)
            accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
        result, statistic = finish_rows(accumulator, maximum, total, limit, scale, DTYPE, VARIED)
        store_rows(result, output, prompt_output, output_row, prompt_output_row, first, prompt_rows, rows, ROWS)
        if SAVE_LSE:
            gl.store(lse + row, statistic, mask=row < rows)


@gluon.jit(do_not_specialize=[*STRIDES, "heads", "tokens", "prompts", "prompt_rows", "scale"])
def _streamed_kernel(
    query,  # (B, H, N, D), as are key, value, output
    key,
    value,
    prompt_query,  # (B or 1, H, P, D), as are prompt_key, prompt_value, prompt_output
    prompt_key,
    prompt_value,
    output,
    prompt_output,
    lse,  # (B, H, R)
    lengths,  # (B,)
    query_batch,  # strides of the dimensions batch, head, row, in units of 8 elements
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    prompt_query_batch,
    prompt_query_head,
    prompt_query_row,
    prompt_key_batch,
    prompt_key_head,
    prompt_key_row,
    prompt_value_batch,
    prompt_value_head,
    prompt_value_row,
    output_batch,
    output_head,
    output_row,
    prompt_output_batch,
    prompt_output_head,
    prompt_output_row,
    heads,
    tokens,
    prompts,
    prompt_rows,
    scale,  # log2(e) included
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    TAIL: gl.constexpr,  # width of the last key tile where that is enough, 0 for never
    PREFIX: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    SAVE_LSE: gl.constexpr,
):
    """One program: one tile of rows of one head, the last tiles first.  Grid: (row tiles * B * H,).

    A tile's scores and the output of the tile before it are multiplied together.  That is not for speed alone: with
    one product after the other, ptxas of CUDA 12.8 gives weights the registers of the queries, which it thinks dead.
    """
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = key.dtype.element_ty
    VARIED: gl.constexpr = PREFIX or CAUSAL or HAS_LENGTHS
    ROWS: gl.constexpr = row_layout(BLOCK_M, D, WARPS)
    COPY: gl.constexpr = copy_layout(D, WARPS)
    SCORES: gl.constexpr = mma_layout(BLOCK_N, WARPS)
    OUTPUT: gl.constexpr = mma_layout(D, WARPS)
    QUERY: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], DTYPE)

    rows = prompt_rows + tokens
    row_tiles = gl.cdiv(rows, BLOCK_M)
    batch_head = gl.program_id(0) // row_tiles
    first = (row_tiles - 1 - gl.program_id(0) % row_tiles) * BLOCK_M
    sample = (batch_head // heads).to(gl.int64)
    head = (batch_head % heads).to(gl.int64)
    length = valid_tokens(lengths, sample, tokens, HAS_LENGTHS)
    stop = prompts + length
    live = prompt_rows + length
    query += (sample * query_batch + head * query_head) * UNIT
    key += (sample * key_batch + head * key_head) * UNIT
    value += (sample * value_batch + head * value_head) * UNIT
    prompt_query += (sample * prompt_query_batch + head * prompt_query_head) * UNIT
    prompt_key += (sample * prompt_key_batch + head * prompt_key_head) * UNIT
    prompt_value += (sample * prompt_value_batch + head * prompt_value_head) * UNIT
    output += (sample * output_batch + head * output_head) * UNIT
    prompt_output += (sample * prompt_output_batch + head * prompt_output_head) * UNIT
    lse += batch_head.to(gl.int64) * rows

    low, high = tile_limits(first, gl.minimum(first + BLOCK_M, rows), prompt_rows, prompts, length, CAUSAL, PREFIX)
    # A tail, if there is one, comes after these.
    key_tiles = gl.maximum(gl.cdiv(high - TAIL, BLOCK_N), 1)
    keys = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], SHARED)
    values = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], SHARED)
    for j in gl.static_range(STAGES - 1):
        start_copy(keys.index(j), key, prompt_key, key_row, prompt_key_row, j * BLOCK_N, prompts, stop, COPY)
        start_copy(values.index(j), value, prompt_value, value_row, prompt_value_row, j * BLOCK_N, prompts, stop, COPY)
        async_copy.commit_group()
    queries = gl.convert_layout(
        load_rows(query, prompt_query, query_row, prompt_query_row, first, prompt_rows, live, BLOCK_M, D, ROWS), QUERY
    )  # [BLOCK_M, D]
    row = first + gl.arange(0, BLOCK_M, ROW)  # [BLOCK_M]
    limit = row_limits(row, prompt_rows, prompts, length, CAUSAL, PREFIX)  # [BLOCK_M]
    maximum = gl.full([BLOCK_M], float("-inf"), gl.float32, ROW)
    total = gl.full([BLOCK_M], 0.0, gl.float32, ROW)
    accumulator = gl.full([BLOCK_M, D], 0.0, gl.float32, OUTPUT)
    nothing = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, SCORES)
    slot = 0
    free = STAGES - 1
    await_copies(STAGES - 2)
    scores = warpgroup_mma(queries, keys.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    if low < BLOCK_N:
        scores = hide(scores, limit, stop, 0, first, VARIED)
    weights, maximum, total, decay = weigh(scores, maximum, total, scale, DTYPE, WEIGHTS, VARIED)
    for j in range(1, key_tiles):
        await_copies(STAGES - 3)
        previous = slot
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
        scores = warpgroup_mma(queries, keys.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
        accumulator = warpgroup_mma(weights, values.index(previous), accumulator, is_async=True)
        ahead = (j + STAGES - 2) * BLOCK_N
        if ahead < high:
            start_copy(keys.index(free), key, prompt_key, key_row, prompt_key_row, ahead, prompts, stop, COPY)
            start_copy(values.index(free), value, prompt_value, value_row, prompt_value_row, ahead, prompts, stop, COPY)
        async_copy.commit_group()
        free = gl.where(free == STAGES - 1, 0, free + 1)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        if (j + 1) * BLOCK_N > low:
            scores = hide(scores, limit, stop, j * BLOCK_N, first, VARIED)
        weights, maximum, total, decay = weigh(scores, maximum, total, scale, DTYPE, WEIGHTS, VARIED)
        accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
        accumulator = accumulator * decay[:, None]
    accumulator = warpgroup_mma(weights, values.index(slot), accumulator, is_async=True)
    if TAIL > 0:  # noqa: SIM102
        if high > key_tiles * BLOCK_N:
            SCORES_TAIL: gl.constexpr = mma_layout(TAIL, WARPS)
            await_copies(0)
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)
            nothing_tail = gl.full([BLOCK_M, TAIL], 0.0, gl.float32, SCORES_TAIL)
            tail_keys = keys.index(slot).slice(0, TAIL).permute((1, 0))
            scores_tail = warpgroup_mma(queries, tail_keys, nothing_tail, use_acc=False, is_async=True)
            scores_tail, accumulator = warpgroup_mma_wait(0, deps=(scores_tail, accumulator))
            scores_tail = hide(scores_tail, limit, stop, key_tiles * BLOCK_N, first, VARIED)
            weights_tail, maximum, total, decay = weigh(scores_tail, maximum, total, scale, DTYPE, WEIGHTS, VARIED)
            accumulator = accumulator * decay[:, None]
            tail_values = values.index(slot).slice(0, TAIL)
            accumulator = warpgroup_mma(weights_tail, tail_values, accumulator, is_async=True)
    accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
    async_copy.wait_group(0)
    result, statistic = finish_rows(accumulator, maximum, total, limit, scale, DTYPE, VARIED)
    # The first row still, but not for the compiler, which else keeps the masks of the queries for these stores.
    first += first >> 30
    row = first + gl.arange(0, BLOCK_M, ROW)
    store_rows(result, output, prompt_output, output_row, prompt_output_row, first, prompt_rows, rows, ROWS)
    if SAVE_LSE:
        gl.store(lse + row, statistic, mask=row < rows)


@dataclass(frozen=True)
class HopperTile:
    """How one call runs.  ``keys`` is the width of a key tile; *resident* if ``full`` is not 0.

    Resident: ``full`` tiles of ``keys`` and one of ``tail`` (or none) hold all keys.  Streamed: ``stages`` tiles in
    the ring, and the last one is multiplied in a width of ``tail`` where that is enough.  ``registers`` caps those of
    a thread, so that several programs share a multiprocessor.
    """

    keys: int
    full: int = 0
    tail: int = 0
    stages: int = 0
    warps: int = 4
    registers: int | None = None

    def __post_init__(self) -> None:
        if not self.full and self.stages < 3:
            raise ValueError(f"{self}: a ring has 3 tiles at least")

    @property
    def rows(self) -> int:
        return 16 * self.warps

    @property
    def held(self) -> int:
        return self.full * self.keys + self.tail


@functools.cache
def forward_tile(head_dim: int, keys: int, causal: bool, lengths: bool) -> HopperTile:
    """By the number of virtual keys and the mask; never by the batch."""
    if head_dim == 128:
        if keys <= 128:
            return HopperTile(keys=64, full=-(-keys // 64))
        return HopperTile(keys=64, tail=32, stages=3, warps=8)
    if keys <= 64:
        return HopperTile(keys=64, full=1, registers=128)
    if keys <= 96:
        return HopperTile(keys=64, full=1, tail=32, registers=128)
    if keys <= 288:
        full, rest = divmod(keys, 128)
        return HopperTile(keys=128, full=full + (rest > 32), tail=32 if 0 < rest <= 32 else 0, registers=168)
    if causal:
        # Smaller tiles of rows: fewer of their products are hidden.
        return HopperTile(keys=64, tail=32, stages=4, warps=4, registers=168)
    if lengths:
        return HopperTile(keys=64, tail=32, stages=4, warps=8, registers=128)
    return HopperTile(keys=64, tail=32, stages=3, warps=4, registers=128)


def layout_limits(layout: Layout) -> list[str]:
    """Why tensors that lie so cannot be copied 16 bytes at a time with 32-bit offsets inside a head."""
    reasons = []
    if layout.align == 1:
        reasons.append("a row of a tensor does not start at a multiple of 16 bytes")
    if layout.wide:
        reasons.append("one head of a tensor spans 2**31 elements or more")
    return reasons


def call_limits(query: Tensor, scale: float) -> list[str]:
    """Why these kernels cannot take a call, as far as that shows without a look at where rows lie."""
    reasons = []
    if not is_hopper(query.device):
        reasons.append("wgmma needs a Hopper GPU (compute capability 9.0)")
    if query.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"the dtype is {query.dtype}; wanted bfloat16 or float16")
    if query.shape[3] not in (64, 128):
        reasons.append(f"head_dim is {query.shape[3]}; wanted 64 or 128")
    if not scale > 0:
        reasons.append(f"scale is {scale}; wanted a positive one")
    return reasons


def limits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor | None,
    prompt_key: Tensor,
    prompt_value: Tensor,
    *,
    scale: float,
    output: Tensor | None = None,
    prompt_output: Tensor | None = None,
) -> list[str]:
    """Why these kernels cannot take a call; an empty list if they can.  As everywhere, last strides are 1."""
    reasons = call_limits(query, scale)
    if reasons:
        return reasons
    return layout_limits(
        layout_of((query, key, value, prompt_query, prompt_key, prompt_value, output, prompt_output), _ITEMSIZE)
    )


def prompt_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor | None,
    prompt_key: Tensor,
    prompt_value: Tensor,
    lengths: Tensor | None,
    *,
    prefix: bool,
    causal: bool,
    scale: float,
    output: Tensor | None = None,
    prompt_output: Tensor | None = None,
    save_lse: bool = True,
    tiles: HopperTile | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As ``triton_forward.prompt_attention_forward``, for calls to which :func:`limits` has no objection."""
    tensors = (query, key, value, prompt_query, prompt_key, prompt_value, lengths, output, prompt_output)
    return plan.run(forward, tensors, (prefix, causal, float(scale), save_lse, tiles))  # pyright: ignore[reportReturnType]


def forward(
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor | None,
    prompt_key: Tensor,
    prompt_value: Tensor,
    lengths: Tensor | None,
    output: Tensor | None,
    prompt_output: Tensor | None,
    prefix: bool,
    causal: bool,
    scale: float,
    save_lse: bool,
    tiles: HopperTile | None = None,
) -> tuple[Tensor | None, ...]:
    """:func:`prompt_attention_forward` on a tape."""
    batch, heads, tokens, head_dim = query.shape
    prompts = prompt_key.shape[2]
    prompt_rows = 0 if prompt_query is None else prompts
    rows = prompt_rows + tokens
    output, prompt_output, lse = forward_memory(tape, query, prompt_query, output, prompt_output, save_lse)
    if batch * heads * rows == 0:
        return output, prompt_output, lse
    keys = prompts + tokens
    if tiles is None:
        tiles = forward_tile(head_dim, keys, causal, lengths is not None)
    if tiles.full and not tiles.held - (tiles.tail or tiles.keys) < keys <= tiles.held:
        raise ValueError(f"{tiles} holds {tiles.held} keys and masks its last tile only; it was given {keys}")
    tensors = (query, key, value, prompt_query, prompt_key, prompt_value, output, prompt_output)
    layout = layout_of(tensors, _ITEMSIZE)
    reasons = layout_limits(layout)
    if reasons:
        raise ValueError(f"these kernels cannot take this call: {'; '.join(reasons)}")
    held = (tiles.full, tiles.tail) if tiles.full else (tiles.stages, tiles.tail)
    constants = (
        head_dim,
        tiles.rows,
        tiles.keys,
        *held,
        prefix and prompt_rows > 0,
        causal,
        lengths is not None,
        save_lse,
    )
    # A pointer that the kernel never follows still has to be one.
    arguments = (
        *(query if each is None else each for each in (*tensors, lse, lengths)),
        *layout.strides,
        heads,
        tokens,
        prompts,
        prompt_rows,
        base_2(scale),
        *constants,
    )
    facts = facts_of(layout, (lse, lengths), (constants, tiles.warps, tiles.registers))
    options = {"num_warps": tiles.warps, "maxnreg": tiles.registers}
    if tiles.full:
        tape.launch(_resident_kernel, batch * heads, arguments, options, facts)
    else:
        tape.launch(_streamed_kernel, -(-rows // tiles.rows) * batch * heads, arguments, options, facts)
    return output, prompt_output, lse
