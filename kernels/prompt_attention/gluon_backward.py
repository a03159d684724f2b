"""Backward of prompt-concatenated attention for Hopper, in Gluon, for heads that fit shared memory.

Two kernels of the shape of the resident one in ``gluon_forward.py``: dq over tiles of rows (three products: scores, dP,
dq), dk and dv over tiles of keys (four).  What the tiles meet lies in shared memory for the whole head: keys and values
for dq, queries and gradients for dk and dv.  Seven products instead of the five that one pass takes, and in return no
sum over programs and several programs on a multiprocessor.  Of heads too long for that, one program of twice as many
warps has a multiprocessor for dk and dv, and the portable kernel takes dq.

With lse to base 2, P = exp2(scale S - lse), dS = P (dP - delta), delta = sum over a row of gradient times output.
"""

# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportMissingImports=false

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.plan import Tape, precision, unit_last_stride
from epic_fast.kernels.prompt_attention.gluon_forward import (
    _ITEMSIZE,
    UNIT,
    async_load,
    await_copies,
    call_limits,
    copy_layout,
    layout_limits,
    load_rows,
    mma_layout,
    row_layout,
    row_limits,
    row_pointers,
    start_copy,
    tile_limits,
    valid_tokens,
)
from epic_fast.kernels.prompt_attention.tiles import Tile, size_class
from epic_fast.kernels.prompt_attention.tiles import backward_tiles as portable_tiles
from epic_fast.kernels.prompt_attention.triton_backward import launch_query_kernel
from epic_fast.kernels.prompt_attention.triton_rows import (
    base_2,
    begin_gradients,
    end_gradients,
    facts_of,
    layout_of,
    no_gradients,
)

MOST_KEYS = 608  # prompts and tokens of a head whose queries and gradients, or keys and values, fit shared memory


@gluon.jit
def start_grad_copy(
    destination,  # shared memory, [ROWS, D]
    base,
    prompt_base,
    row_stride,
    prompt_row_stride,
    first,
    prompts,
    begin,
    stop,
    layout: gl.constexpr,
):
    """``start_copy`` with zeros before ``begin`` too."""
    row = first + gl.arange(0, destination.shape[0], gl.SliceLayout(1, layout))
    column = gl.arange(0, destination.shape[1], gl.SliceLayout(0, layout))
    pointers = row_pointers(base, prompt_base, row_stride, prompt_row_stride, row, column, prompts)
    async_load(destination, pointers, mask=((row >= begin) & (row < stop))[:, None])


@gluon.jit
def load_grad_rows(
    base,
    prompt_base,
    row_stride,
    prompt_row_stride,
    first,
    prompts,
    begin,
    stop,
    ROWS: gl.constexpr,
    D: gl.constexpr,
    layout: gl.constexpr,
):
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, D, gl.SliceLayout(0, layout))
    pointers = row_pointers(base, prompt_base, row_stride, prompt_row_stride, row, column, prompts)
    return gl.load(pointers, mask=((row >= begin) & (row < stop))[:, None], other=0.0)  # [ROWS, D]


@gluon.jit
def store_gradient(
    tile,  # [ROWS, D] float32
    base,
    prompt_base,
    row_stride,
    prompt_row_stride,
    first,
    prompts,
    stop,
    TOKENS: gl.constexpr,
    PROMPTS: gl.constexpr,
    layout: gl.constexpr,
):
    """To the tokens and the prompts, whose types may differ: shares of a shared prompt's gradient are float32."""
    row = first + gl.arange(0, tile.shape[0], gl.SliceLayout(1, layout))
    column = gl.arange(0, tile.shape[1], gl.SliceLayout(0, layout))
    if TOKENS and PROMPTS and base.dtype == prompt_base.dtype:
        pointers = row_pointers(base, prompt_base, row_stride, prompt_row_stride, row, column, prompts)
        gl.store(pointers, gl.convert_layout(tile.to(base.dtype.element_ty), layout), mask=(row < stop)[:, None])
    else:
        if TOKENS:
            pointers = row_pointers(base, base, row_stride, row_stride, row, column, prompts)
            mask = ((row >= prompts) & (row < stop))[:, None]
            gl.store(pointers, gl.convert_layout(tile.to(base.dtype.element_ty), layout), mask=mask)
        if PROMPTS:
            prompt_pointers = row_pointers(
                prompt_base, prompt_base, prompt_row_stride, prompt_row_stride, row, column, prompts
            )
            prompt_mask = ((row < prompts) & (row < stop))[:, None]
            prompt_tile = gl.convert_layout(tile.to(prompt_base.dtype.element_ty), layout)
            gl.store(prompt_pointers, prompt_tile, mask=prompt_mask)


@gluon.jit
def hide_weights(
    weights,  # [BLOCK_M, BLOCK_N]
    limit,  # [BLOCK_M]
    stop,
    first_key,
    first_row,
    VARIED: gl.constexpr,
):
    """As ``gluon_forward.hide``, after the exponential."""
    layout: gl.constexpr = weights.type.layout
    column = first_key + first_row + gl.arange(0, weights.shape[1], gl.SliceLayout(0, layout))
    if VARIED:
        bound = gl.convert_layout(limit, gl.SliceLayout(1, layout)) + first_row
        return gl.where(column[None, :] < bound[:, None], weights, 0.0)
    else:
        return gl.where((column < stop + first_row)[None, :], weights, 0.0)


@gluon.jit
def query_step(
    queries,  # [BLOCK_M, D], as are grads and d_queries
    grads,
    key_tile,  # shared memory, [BLOCK_N, D], as is value_tile
    value_tile,
    d_queries,  # still being added to by the step before
    statistic,  # [BLOCK_M], as are delta and limit
    delta,
    limit,
    stop,
    first_key,
    first_row,
    low,
    scale,
    DTYPE: gl.constexpr,
    OPERAND: gl.constexpr,
    SCORES: gl.constexpr,
    VARIED: gl.constexpr,
    OVERLAP: gl.constexpr,
    MASK: gl.constexpr,  # not all these keys are seen: True, False or, to be found out here, None
):
    """One key tile's share of dq; its product is left running if OVERLAP."""
    BLOCK_M: gl.constexpr = queries.shape[0]
    BLOCK_N: gl.constexpr = key_tile.shape[0]
    nothing = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, SCORES)
    scores = warpgroup_mma(queries, key_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
    d_weights = warpgroup_mma(grads, value_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores, d_queries = warpgroup_mma_wait(1, deps=(scores, d_queries))
    weights = gl.exp2(scores * scale - gl.convert_layout(statistic, gl.SliceLayout(1, SCORES))[:, None])
    if MASK is None:
        if first_key + BLOCK_N > low:
            weights = hide_weights(weights, limit, stop, first_key, first_row, VARIED)
    elif MASK:
        weights = hide_weights(weights, limit, stop, first_key, first_row, VARIED)
    d_weights = warpgroup_mma_wait(0, deps=(d_weights,))
    d_scores = weights * (d_weights - gl.convert_layout(delta, gl.SliceLayout(1, SCORES))[:, None])
    operand = gl.convert_layout(d_scores.to(DTYPE), OPERAND)
    d_queries = warpgroup_mma(operand, key_tile, d_queries, is_async=True)
    if not OVERLAP:
        d_queries = warpgroup_mma_init(warpgroup_mma_wait(0, deps=(d_queries,)))
    return d_queries


@gluon.jit
def key_step(
    keys,  # [BLOCK_M, D], as are values, d_keys, d_values
    values,
    query_tile,  # shared memory, [BLOCK_N, D], as is grad_tile
    grad_tile,
    d_keys,  # these two are still being added to by the step before
    d_values,
    statistic,  # [BLOCK_N], as are delta and limit
    delta,
    limit,
    first_key,
    low,
    scale,
    DTYPE: gl.constexpr,
    OPERAND: gl.constexpr,
    SCORES: gl.constexpr,
    VARIED: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """One row tile's share of dk and dv; their products are left running if OVERLAP."""
    BLOCK_M: gl.constexpr = keys.shape[0]
    BLOCK_N: gl.constexpr = query_tile.shape[0]
    nothing = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, SCORES)
    scores = warpgroup_mma(keys, query_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
    d_weights = warpgroup_mma(values, grad_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores, d_keys, d_values = warpgroup_mma_wait(1, deps=(scores, d_keys, d_values))
    weights = gl.exp2(scores * scale - statistic[None, :])
    if VARIED:  # noqa: SIM102
        if first_key + BLOCK_M > low:
            key = first_key + gl.arange(0, BLOCK_M, gl.SliceLayout(1, SCORES))
            weights = gl.where(key[:, None] < limit[None, :], weights, 0.0)
    d_values = warpgroup_mma(gl.convert_layout(weights.to(DTYPE), OPERAND), grad_tile, d_values, is_async=True)
    d_weights = warpgroup_mma_wait(1, deps=(d_weights,))
    d_scores = weights * (d_weights - delta[None, :])
    d_keys = warpgroup_mma(gl.convert_layout(d_scores.to(DTYPE), OPERAND), query_tile, d_keys, is_async=True)
    if not OVERLAP:
        d_keys, d_values = warpgroup_mma_wait(0, deps=(d_keys, d_values))
        d_keys = warpgroup_mma_init(d_keys)
        d_values = warpgroup_mma_init(d_values)
    return d_keys, d_values


TENSORS = (
    "query",
    "key",
    "value",
    "prompt_query",
    "prompt_key",
    "prompt_value",
    "grad_output",
    "grad_prompt_output",
)
OUTPUTS = ("output", "prompt_output", "d_query", "d_prompt_query")
GRADIENTS = ("d_key", "d_value", "d_prompt_key", "d_prompt_value")
QUERY_STRIDES = [f"{tensor}_{name}" for tensor in (*TENSORS, *OUTPUTS) for name in ("batch", "head", "row")]
KEY_STRIDES = [f"{tensor}_{name}" for tensor in (*TENSORS, *GRADIENTS) for name in ("batch", "head", "row")]
NUMBERS = [
    "heads", "tokens", "prompts", "prompt_rows", "first", "stop", "first_grad", "stop_grad", "scale", "raw_scale",
]  # fmt: skip


@gluon.jit(do_not_specialize=[*QUERY_STRIDES, *NUMBERS])
def _query_kernel(
    query,  # (B, H, N, D), as are key, value, grad_output, output
    key,
    value,
    prompt_query,  # (B or 1, H, P, D), as are the other prompts
    prompt_key,
    prompt_value,
    grad_output,
    grad_prompt_output,
    output,
    prompt_output,
    lse,  # (B, H, R), as is delta
    delta,
    d_query,  # (B, H, N, D) or, of prompts, (B, H, P, D)
    d_prompt_query,
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
    grad_output_batch,
    grad_output_head,
    grad_output_row,
    grad_prompt_output_batch,
    grad_prompt_output_head,
    grad_prompt_output_row,
    output_batch,
    output_head,
    output_row,
    prompt_output_batch,
    prompt_output_head,
    prompt_output_row,
    d_query_batch,
    d_query_head,
    d_query_row,
    d_prompt_query_batch,
    d_prompt_query_head,
    d_prompt_query_row,
    heads,
    tokens,
    prompts,
    prompt_rows,
    first,  # this program's tiles cover first..stop
    stop,
    first_grad,  # rows first_grad..stop_grad have a gradient
    stop_grad,
    scale,  # log2(e) included
    raw_scale,
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    FULL: gl.constexpr,  # tiles of BLOCK_N in shared memory
    TAIL: gl.constexpr,  # width of the tile after them, 0 for none
    OVERLAP: gl.constexpr,  # a tile's last product runs on beside the next one's first
    PREFIX: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    TOKENS: gl.constexpr,  # which gradients are wanted
    PROMPTS: gl.constexpr,
    SAVE_DELTA: gl.constexpr,
):
    """dq, delta.  One program: the row tiles of one head.  Grid: (B * H,)."""
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = key.dtype.element_ty
    VARIED: gl.constexpr = PREFIX or CAUSAL or HAS_LENGTHS
    ROWS: gl.constexpr = row_layout(BLOCK_M, D, WARPS)
    COPY: gl.constexpr = copy_layout(D, WARPS)
    SCORES: gl.constexpr = mma_layout(BLOCK_N, WARPS)
    OUTPUT: gl.constexpr = mma_layout(D, WARPS)
    INPUT: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], DTYPE)
    ROW: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    GROUPS: gl.constexpr = FULL + (1 if TAIL > 0 else 0)

    program = gl.program_id(0)
    sample = (program // heads).to(gl.int64)
    head = (program % heads).to(gl.int64)
    length = valid_tokens(lengths, sample, tokens, HAS_LENGTHS)
    stop_key = prompts + length
    live = prompt_rows + length
    rows = prompt_rows + tokens
    live_grad = gl.minimum(live, stop_grad)
    query += (sample * query_batch + head * query_head) * UNIT
    key += (sample * key_batch + head * key_head) * UNIT
    value += (sample * value_batch + head * value_head) * UNIT
    prompt_query += (sample * prompt_query_batch + head * prompt_query_head) * UNIT
    prompt_key += (sample * prompt_key_batch + head * prompt_key_head) * UNIT
    prompt_value += (sample * prompt_value_batch + head * prompt_value_head) * UNIT
    grad_output += (sample * grad_output_batch + head * grad_output_head) * UNIT
    grad_prompt_output += (sample * grad_prompt_output_batch + head * grad_prompt_output_head) * UNIT
    output += (sample * output_batch + head * output_head) * UNIT
    prompt_output += (sample * prompt_output_batch + head * prompt_output_head) * UNIT
    d_query += (sample * d_query_batch + head * d_query_head) * UNIT
    d_prompt_query += (sample * d_prompt_query_batch + head * d_prompt_query_head) * UNIT
    lse += program.to(gl.int64) * rows
    delta += program.to(gl.int64) * rows

    keys = gl.allocate_shared_memory(DTYPE, [FULL, BLOCK_N, D], SHARED)
    values = gl.allocate_shared_memory(DTYPE, [FULL, BLOCK_N, D], SHARED)
    for j in gl.static_range(FULL):
        start_copy(keys.index(j), key, prompt_key, key_row, prompt_key_row, j * BLOCK_N, prompts, stop_key, COPY)
        start_copy(
            values.index(j), value, prompt_value, value_row, prompt_value_row, j * BLOCK_N, prompts, stop_key, COPY
        )
        async_copy.commit_group()
    if TAIL > 0:
        SHARED_TAIL: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TAIL, D], DTYPE)
        SCORES_TAIL: gl.constexpr = mma_layout(TAIL, WARPS)
        last: gl.constexpr = FULL * BLOCK_N
        tail_keys = gl.allocate_shared_memory(DTYPE, [1, TAIL, D], SHARED_TAIL)
        tail_values = gl.allocate_shared_memory(DTYPE, [1, TAIL, D], SHARED_TAIL)
        start_copy(tail_keys.index(0), key, prompt_key, key_row, prompt_key_row, last, prompts, stop_key, COPY)
        start_copy(
            tail_values.index(0), value, prompt_value, value_row, prompt_value_row, last, prompts, stop_key, COPY
        )
        async_copy.commit_group()

    raw_query = load_rows(query, prompt_query, query_row, prompt_query_row, first, prompt_rows, live, BLOCK_M, D, ROWS)
    raw_grad = load_grad_rows(
        grad_output,
        grad_prompt_output,
        grad_output_row,
        grad_prompt_output_row,
        first,
        prompt_rows,
        first_grad,
        live_grad,
        BLOCK_M,
        D,
        ROWS,
    )
    raw_output = load_rows(
        output, prompt_output, output_row, prompt_output_row, first, prompt_rows, live, BLOCK_M, D, ROWS
    )
    for start in range(first, stop, BLOCK_M):
        # Zero, but not for the compiler, which else keeps what it computes of all tiles in registers from pass to pass.
        zero = start >> 30
        queries = gl.convert_layout(raw_query, INPUT)  # [BLOCK_M, D]
        grads = gl.convert_layout(raw_grad, INPUT)  # [BLOCK_M, D]
        inner = gl.convert_layout(gl.sum(raw_grad.to(gl.float32) * raw_output.to(gl.float32), 1), ROW)  # [BLOCK_M]
        row = start + gl.arange(0, BLOCK_M, ROW)  # [BLOCK_M]
        limit = row_limits(row, prompt_rows, prompts, length, CAUSAL, PREFIX)  # [BLOCK_M]
        low, _ = tile_limits(start, gl.minimum(start + BLOCK_M, rows), prompt_rows, prompts, length, CAUSAL, PREFIX)
        statistic = gl.load(lse + row, mask=row < rows, other=float("inf"))  # [BLOCK_M]
        if SAVE_DELTA:
            gl.store(delta + row, inner, mask=row < rows)
        d_queries = warpgroup_mma_init(gl.full([BLOCK_M, D], 0.0, gl.float32, OUTPUT))
        for j in gl.static_range(FULL):
            if start == first:
                await_copies(GROUPS - 1 - j)
            d_queries = query_step(
                queries,
                grads,
                keys.index(j + zero),
                values.index(j + zero),
                d_queries,
                statistic,
                inner,
                limit,
                stop_key,
                j * BLOCK_N,
                start,
                low,
                scale,
                DTYPE,
                OPERAND,
                SCORES,
                VARIED,
                OVERLAP,
                None if VARIED else TAIL == 0 and j == FULL - 1,
            )
        if TAIL > 0:
            if start == first:
                await_copies(0)
            d_queries = query_step(
                queries,
                grads,
                tail_keys.index(zero),
                tail_values.index(zero),
                d_queries,
                statistic,
                inner,
                limit,
                stop_key,
                last,
                start,
                low,
                scale,
                DTYPE,
                OPERAND,
                SCORES_TAIL,
                VARIED,
                OVERLAP,
                None if VARIED else True,
            )
        raw_query = load_rows(
            query, prompt_query, query_row, prompt_query_row, start + BLOCK_M, prompt_rows, live, BLOCK_M, D, ROWS
        )
        raw_grad = load_grad_rows(
            grad_output,
            grad_prompt_output,
            grad_output_row,
            grad_prompt_output_row,
            start + BLOCK_M,
            prompt_rows,
            first_grad,
            live_grad,
            BLOCK_M,
            D,
            ROWS,
        )
        raw_output = load_rows(
            output, prompt_output, output_row, prompt_output_row, start + BLOCK_M, prompt_rows, live, BLOCK_M, D, ROWS
        )
        d_queries = warpgroup_mma_wait(0, deps=(d_queries,))
        store_gradient(
            d_queries * raw_scale,
            d_query,
            d_prompt_query,
            d_query_row,
            d_prompt_query_row,
            start,
            prompt_rows,
            rows,
            TOKENS,
            PROMPTS,
            ROWS,
        )


@gluon.jit(do_not_specialize=[*KEY_STRIDES, *NUMBERS])
def _key_kernel(
    query,  # (B, H, N, D), as are key, value, grad_output, output
    key,
    value,
    prompt_query,  # (B or 1, H, P, D), as are the other prompts
    prompt_key,
    prompt_value,
    grad_output,
    grad_prompt_output,
    lse,  # (B, H, R), as is delta
    delta,
    d_key,  # (B, H, N, D) or, of prompts, (B, H, P, D)
    d_value,
    d_prompt_key,
    d_prompt_value,
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
    grad_output_batch,
    grad_output_head,
    grad_output_row,
    grad_prompt_output_batch,
    grad_prompt_output_head,
    grad_prompt_output_row,
    d_key_batch,
    d_key_head,
    d_key_row,
    d_value_batch,
    d_value_head,
    d_value_row,
    d_prompt_key_batch,
    d_prompt_key_head,
    d_prompt_key_row,
    d_prompt_value_batch,
    d_prompt_value_head,
    d_prompt_value_row,
    heads,
    tokens,
    prompts,
    prompt_rows,
    first,  # the tiles cover virtual keys first..stop
    stop,
    first_grad,  # rows first_grad..stop_grad have a gradient
    stop_grad,
    scale,  # log2(e) included
    raw_scale,
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    FULL: gl.constexpr,  # tiles of BLOCK_N in shared memory
    TAIL: gl.constexpr,  # width of the tile after them, 0 for none
    OVERLAP: gl.constexpr,  # a tile's last product runs on beside the next one's first
    PREFIX: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    KEYS: gl.constexpr,  # which gradients are wanted
    VALUES: gl.constexpr,
    PROMPT_KEYS: gl.constexpr,
    PROMPT_VALUES: gl.constexpr,
):
    """dk, dv.  One program: the key tiles of one head.  Grid: (B * H,)."""
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = key.dtype.element_ty
    VARIED: gl.constexpr = PREFIX or CAUSAL or HAS_LENGTHS
    ROWS: gl.constexpr = row_layout(BLOCK_M, D, WARPS)
    COPY: gl.constexpr = copy_layout(D, WARPS)
    SCORES: gl.constexpr = mma_layout(BLOCK_N, WARPS)
    OUTPUT: gl.constexpr = mma_layout(D, WARPS)
    INPUT: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], DTYPE)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    GROUPS: gl.constexpr = FULL + (1 if TAIL > 0 else 0)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])

    program = gl.program_id(0)
    sample = (program // heads).to(gl.int64)
    head = (program % heads).to(gl.int64)
    length = valid_tokens(lengths, sample, tokens, HAS_LENGTHS)
    stop_key = prompts + length
    live = prompt_rows + length
    rows = prompt_rows + tokens
    live_grad = gl.minimum(live, stop_grad)
    query += (sample * query_batch + head * query_head) * UNIT
    key += (sample * key_batch + head * key_head) * UNIT
    value += (sample * value_batch + head * value_head) * UNIT
    prompt_query += (sample * prompt_query_batch + head * prompt_query_head) * UNIT
    prompt_key += (sample * prompt_key_batch + head * prompt_key_head) * UNIT
    prompt_value += (sample * prompt_value_batch + head * prompt_value_head) * UNIT
    grad_output += (sample * grad_output_batch + head * grad_output_head) * UNIT
    grad_prompt_output += (sample * grad_prompt_output_batch + head * grad_prompt_output_head) * UNIT
    d_key += (sample * d_key_batch + head * d_key_head) * UNIT
    d_value += (sample * d_value_batch + head * d_value_head) * UNIT
    d_prompt_key += (sample * d_prompt_key_batch + head * d_prompt_key_head) * UNIT
    d_prompt_value += (sample * d_prompt_value_batch + head * d_prompt_value_head) * UNIT
    lse += program.to(gl.int64) * rows
    delta += program.to(gl.int64) * rows

    queries = gl.allocate_shared_memory(DTYPE, [FULL, BLOCK_N, D], SHARED)
    grads = gl.allocate_shared_memory(DTYPE, [FULL, BLOCK_N, D], SHARED)
    statistics = gl.allocate_shared_memory(gl.float32, [FULL, BLOCK_N], PLAIN)
    inners = gl.allocate_shared_memory(gl.float32, [FULL, BLOCK_N], PLAIN)
    for j in gl.static_range(FULL):
        start_copy(
            queries.index(j), query, prompt_query, query_row, prompt_query_row, j * BLOCK_N, prompt_rows, live, COPY
        )
        start_grad_copy(
            grads.index(j),
            grad_output,
            grad_prompt_output,
            grad_output_row,
            grad_prompt_output_row,
            j * BLOCK_N,
            prompt_rows,
            first_grad,
            live_grad,
            COPY,
        )
        async_copy.commit_group()
    if TAIL > 0:
        SHARED_TAIL: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TAIL, D], DTYPE)
        SCORES_TAIL: gl.constexpr = mma_layout(TAIL, WARPS)
        last: gl.constexpr = FULL * BLOCK_N
        tail_queries = gl.allocate_shared_memory(DTYPE, [1, TAIL, D], SHARED_TAIL)
        tail_grads = gl.allocate_shared_memory(DTYPE, [1, TAIL, D], SHARED_TAIL)
        tail_statistics = gl.allocate_shared_memory(gl.float32, [1, TAIL], PLAIN)
        tail_inners = gl.allocate_shared_memory(gl.float32, [1, TAIL], PLAIN)
        start_copy(
            tail_queries.index(0), query, prompt_query, query_row, prompt_query_row, last, prompt_rows, live, COPY
        )
        start_grad_copy(
            tail_grads.index(0),
            grad_output,
            grad_prompt_output,
            grad_output_row,
            grad_prompt_output_row,
            last,
            prompt_rows,
            first_grad,
            live_grad,
            COPY,
        )
        async_copy.commit_group()
        line = last + gl.arange(0, TAIL, LINE)
        tail_statistics.index(0).store(gl.load(lse + line, mask=line < live, other=float("inf")))
        tail_inners.index(0).store(gl.load(delta + line, mask=line < live, other=0.0))
    for j in gl.static_range(FULL):
        line = j * BLOCK_N + gl.arange(0, BLOCK_N, LINE)
        statistics.index(j).store(gl.load(lse + line, mask=line < live, other=float("inf")))
        inners.index(j).store(gl.load(delta + line, mask=line < live, other=0.0))

    raw_key = load_rows(key, prompt_key, key_row, prompt_key_row, first, prompts, stop_key, BLOCK_M, D, ROWS)
    raw_value = load_rows(value, prompt_value, value_row, prompt_value_row, first, prompts, stop_key, BLOCK_M, D, ROWS)
    for start in range(first, stop, BLOCK_M):
        # Zero, but not for the compiler, which else keeps what it computes of all tiles in registers from pass to pass.
        zero = start >> 30
        keys = gl.convert_layout(raw_key, INPUT)  # [BLOCK_M, D]
        values = gl.convert_layout(raw_value, INPUT)  # [BLOCK_M, D]
        d_keys = warpgroup_mma_init(gl.full([BLOCK_M, D], 0.0, gl.float32, OUTPUT))
        d_values = warpgroup_mma_init(gl.full([BLOCK_M, D], 0.0, gl.float32, OUTPUT))
        for j in gl.static_range(FULL):
            if start == first:
                await_copies(GROUPS - 1 - j)
            seen = row_limits(
                j * BLOCK_N + zero + gl.arange(0, BLOCK_N, COLUMN), prompt_rows, prompts, length, CAUSAL, PREFIX
            )  # [BLOCK_N]
            low, _ = tile_limits(
                j * BLOCK_N + zero,
                gl.minimum(j * BLOCK_N + zero + BLOCK_N, rows),
                prompt_rows,
                prompts,
                length,
                CAUSAL,
                PREFIX,
            )
            d_keys, d_values = key_step(
                keys,
                values,
                queries.index(j + zero),
                grads.index(j + zero),
                d_keys,
                d_values,
                statistics.index(j + zero).load(COLUMN),
                inners.index(j + zero).load(COLUMN),
                seen,
                start,
                low,
                scale,
                DTYPE,
                OPERAND,
                SCORES,
                VARIED,
                OVERLAP,
            )
        if TAIL > 0:
            COLUMN_TAIL: gl.constexpr = gl.SliceLayout(0, SCORES_TAIL)
            if start == first:
                await_copies(0)
            seen_tail = row_limits(
                last + zero + gl.arange(0, TAIL, COLUMN_TAIL), prompt_rows, prompts, length, CAUSAL, PREFIX
            )  # [TAIL]
            low, _ = tile_limits(
                last + zero, gl.minimum(last + zero + TAIL, rows), prompt_rows, prompts, length, CAUSAL, PREFIX
            )
            d_keys, d_values = key_step(
                keys,
                values,
                tail_queries.index(zero),
                tail_grads.index(zero),
                d_keys,
                d_values,
                tail_statistics.index(zero).load(COLUMN_TAIL),
                tail_inners.index(zero).load(COLUMN_TAIL),
                seen_tail,
                start,
                low,
                scale,
                DTYPE,
                OPERAND,
                SCORES_TAIL,
                VARIED,
                OVERLAP,
            )
        raw_key = load_rows(
            key, prompt_key, key_row, prompt_key_row, start + BLOCK_M, prompts, stop_key, BLOCK_M, D, ROWS
        )
        raw_value = load_rows(
            value, prompt_value, value_row, prompt_value_row, start + BLOCK_M, prompts, stop_key, BLOCK_M, D, ROWS
        )
        d_keys, d_values = warpgroup_mma_wait(0, deps=(d_keys, d_values))
        store_gradient(
            d_keys * raw_scale,
            d_key,
            d_prompt_key,
            d_key_row,
            d_prompt_key_row,
            start,
            prompts,
            prompts + tokens,
            KEYS,
            PROMPT_KEYS,
            ROWS,
        )
        store_gradient(
            d_values,
            d_value,
            d_prompt_value,
            d_value_row,
            d_prompt_value_row,
            start,
            prompts,
            prompts + tokens,
            VALUES,
            PROMPT_VALUES,
            ROWS,
        )


@gluon.jit(
    do_not_specialize=[
        "grad_output_batch",
        "grad_output_head",
        "grad_output_row",
        "grad_prompt_output_batch",
        "grad_prompt_output_head",
        "grad_prompt_output_row",
        "output_batch",
        "output_head",
        "output_row",
        "prompt_output_batch",
        "prompt_output_head",
        "prompt_output_row",
        "heads",
        "tokens",
        "prompt_rows",
        "first_grad",
        "stop_grad",
    ]
)
def _delta_kernel(
    grad_output,  # (B, H, N, D), as is output
    grad_prompt_output,  # (B, H, P, D), as is prompt_output
    output,
    prompt_output,
    delta,  # (B, H, R)
    lengths,  # (B,)
    grad_output_batch,  # strides in units of 8 elements
    grad_output_head,
    grad_output_row,
    grad_prompt_output_batch,
    grad_prompt_output_head,
    grad_prompt_output_row,
    output_batch,
    output_head,
    output_row,
    prompt_output_batch,
    prompt_output_head,
    prompt_output_row,
    heads,
    tokens,
    prompt_rows,
    first_grad,
    stop_grad,
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
):
    """delta alone, where no dq over all rows is wanted.  Grid: (row tiles * B * H,)."""
    ROWS: gl.constexpr = row_layout(BLOCK_M, D, gl.num_warps())
    rows = prompt_rows + tokens
    tiles = gl.cdiv(rows, BLOCK_M)
    program = gl.program_id(0) // tiles
    first = (gl.program_id(0) % tiles) * BLOCK_M
    sample = (program // heads).to(gl.int64)
    head = (program % heads).to(gl.int64)
    live = prompt_rows + valid_tokens(lengths, sample, tokens, HAS_LENGTHS)
    live_grad = gl.minimum(live, stop_grad)
    grad_output += (sample * grad_output_batch + head * grad_output_head) * UNIT
    grad_prompt_output += (sample * grad_prompt_output_batch + head * grad_prompt_output_head) * UNIT
    output += (sample * output_batch + head * output_head) * UNIT
    prompt_output += (sample * prompt_output_batch + head * prompt_output_head) * UNIT
    grad = load_grad_rows(
        grad_output,
        grad_prompt_output,
        grad_output_row,
        grad_prompt_output_row,
        first,
        prompt_rows,
        first_grad,
        live_grad,
        BLOCK_M,
        D,
        ROWS,
    )  # [BLOCK_M, D]
    result = load_rows(output, prompt_output, output_row, prompt_output_row, first, prompt_rows, live, BLOCK_M, D, ROWS)
    inner = gl.sum(grad.to(gl.float32) * result.to(gl.float32), 1)  # [BLOCK_M]
    row = first + gl.arange(0, BLOCK_M, gl.SliceLayout(1, ROWS))
    gl.store(delta + program.to(gl.int64) * rows + row, inner, mask=row < rows)


@dataclass(frozen=True)
class HopperTile:
    """One kernel's tile: ``full`` tiles of ``other`` and one of ``tail`` (or none) hold all that it meets in shared
    memory (keys for dq, rows for dk and dv).  ``registers`` caps those of a thread."""

    other: int
    full: int
    tail: int = 0
    warps: int = 4
    registers: int | None = None
    overlap: bool = True

    @property
    def own(self) -> int:
        return 16 * self.warps

    @property
    def held(self) -> int:
        return self.full * self.other + self.tail

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.own, self.other, self.full, self.tail, self.overlap)

    @property
    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.warps, "maxnreg": self.registers}


@dataclass(frozen=True)
class HopperBackwardTiles:
    """``query`` for dq and ``key`` for dk and dv; a portable tile for dq takes the portable kernel."""

    query: HopperTile | Tile
    key: HopperTile


# Up to here dq is faster with its keys in shared memory; above, the portable kernel runs more programs at once.
_RESIDENT_QUERIES = 288
# Up to here two programs of the dk, dv kernel share a multiprocessor; above, one of twice as many warps has it.
_TWO_PROGRAMS = 416
_SHARED = 232_448  # bytes that a program may have on Hopper


def _resident(count: int) -> tuple[int, int]:
    """Tiles of 64 and the width of the last one (32 or none) that hold ``count`` rows."""
    full, rest = divmod(count, 64)
    return max(full + (rest > 32), 1), 32 if full > 0 and 0 < rest <= 32 else 0


@functools.cache
def backward_tiles(rows: int, keys: int, varied: bool) -> HopperBackwardTiles:
    """By the numbers of rows and virtual keys, and whether all rows see the same; never by the batch."""
    full, tail = _resident(rows)
    key = HopperTile(other=64, full=full, tail=tail, warps=4 if rows <= _TWO_PROGRAMS else 8, overlap=not varied)
    if max(rows, keys) > _RESIDENT_QUERIES:
        classes = size_class(rows), size_class(keys)
        return HopperBackwardTiles(portable_tiles(64, _ITEMSIZE, *classes, varied, _SHARED).query, key)
    full, tail = _resident(keys)
    return HopperBackwardTiles(HopperTile(other=64, full=full, tail=tail, registers=168 if varied else None), key)


def limits(
    grad_output: Tensor | None,
    grad_prompt_output: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor | None,
    prompt_key: Tensor,
    prompt_value: Tensor,
    output: Tensor,
    prompt_output: Tensor | None,
    *,
    scale: float,
    grads: tuple[Tensor | None, ...] | None = None,
) -> list[str]:
    """Why these kernels cannot take a call; an empty list if they can.  As everywhere, last strides are 1."""
    reasons = call_limits(query, scale)
    if query.shape[3] == 128:
        reasons.append("head_dim is 128; wanted 64")
    keys = query.shape[2] + prompt_key.shape[2]
    if keys > MOST_KEYS:
        reasons.append(f"there are {keys} prompts and tokens; wanted {MOST_KEYS} at most")
    if reasons:
        return reasons
    inputs = (query, key, value, prompt_query, prompt_key, prompt_value)
    tensors = (*inputs, grad_output, grad_prompt_output, output, prompt_output, *(grads or ()))
    return layout_limits(layout_of(tensors, _ITEMSIZE))


def prompt_attention_backward(
    grad_output: Tensor | None,
    grad_prompt_output: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor | None,
    prompt_key: Tensor,
    prompt_value: Tensor,
    lengths: Tensor | None,
    output: Tensor,
    prompt_output: Tensor | None,
    lse: Tensor,
    *,
    prefix: bool,
    causal: bool,
    scale: float,
    needs: tuple[bool, bool, bool, bool, bool, bool],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    | None = None,
    tiles: HopperBackwardTiles | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As ``triton_backward.prompt_attention_backward``, for calls to which :func:`limits` has no objection.

    ``launchers.py`` sends no call of 128 rows or fewer here: there the portable kernel, one pass over the head, is
    faster.
    """
    return plan.run(
        backward,
        (
            grad_output,
            grad_prompt_output,
            query,
            key,
            value,
            prompt_query,
            prompt_key,
            prompt_value,
            lengths,
            output,
            prompt_output,
            lse,
            *(() if grads is None else grads),
        ),
        (prefix, causal, float(scale), needs, tiles),
    )  # pyright: ignore[reportReturnType]


def backward(
    tape: Tape,
    grad_output: Tensor | None,
    grad_prompt_output: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor | None,
    prompt_key: Tensor,
    prompt_value: Tensor,
    lengths: Tensor | None,
    output: Tensor,
    prompt_output: Tensor | None,
    lse: Tensor,
    *grads_and_options: Any,
) -> tuple[Tensor | None, ...]:
    """:func:`prompt_attention_backward` on a tape: six ``grads`` or none, then the options in their order."""
    *given, prefix, causal, scale, needs, tiles = grads_and_options
    inputs = (query, key, value, prompt_query, prompt_key, prompt_value)
    batch, heads, tokens, head_dim = query.shape
    prompts = prompt_key.shape[2]
    prompt_rows = 0 if prompt_query is None else prompts
    rows, keys = prompt_rows + tokens, prompts + tokens

    gradients = begin_gradients(
        tape, inputs, needs, given or None, grad_output is not None, grad_prompt_output is not None
    )
    if no_gradients(tape, gradients, query):
        return gradients.results
    targets, first_grad, stop_grad = gradients.targets, gradients.first, gradients.stop
    if tiles is None:
        varied = causal or prefix or lengths is not None
        most = _RESIDENT_QUERIES if varied else MOST_KEYS
        if keys > most:
            what = " of which not every row sees all" if varied else ""
            raise ValueError(f"there are {keys} prompts and tokens{what}; these kernels hold {most} at most")
        tiles = backward_tiles(rows, keys, varied)
    for tile, count in ((tiles.query, keys), (tiles.key, rows)):
        if isinstance(tile, HopperTile) and not tile.held - (tile.tail or tile.other) < count <= tile.held:
            raise ValueError(f"{tile} holds {tile.held} rows and masks its last tile only; it was given {count}")

    read = (*inputs, unit_last_stride(tape, grad_output), unit_last_stride(tape, grad_prompt_output))
    outputs = (output, prompt_output)
    layout = layout_of((*read, *outputs, *targets), _ITEMSIZE)
    reasons = layout_limits(layout)
    if reasons:
        raise ValueError(f"these kernels cannot take this call: {'; '.join(reasons)}")
    every = layout.strides
    read_strides, output_strides, target_strides = every[:24], every[24:30], every[30:]
    strides = [target_strides[3 * index : 3 * index + 3] for index in range(6)]
    counts = (heads, tokens, prompts, prompt_rows)
    factors = (first_grad, stop_grad, base_2(scale), float(scale))
    flags = (prefix and prompt_rows > 0, causal, lengths is not None)
    wanted = [target is not None for target in targets]
    wants_prompt_query = wanted[3] and prompt_rows > 0
    wants_keys = wanted[1] or wanted[2]
    wants_prompt_keys = (wanted[4] or wanted[5]) and prompts > 0

    delta = tape.scratch(lse.shape, torch.float32)
    known = facts_of(layout, (lse, delta, lengths), ())

    def run(kernel: Any, programs: int, pointers: Any, numbers: Any, constants: Any, options: Any) -> None:
        # A pointer that the kernel never follows still has to be one.
        filled = (query if each is None else each for each in pointers)
        facts = None if known is None else (known, constants, *options.values())
        tape.launch(kernel, programs, (*filled, *numbers, *constants), options, facts)

    covered = False
    if wanted[0] or wants_prompt_query:
        first = 0 if wants_prompt_query else prompt_rows
        stop = rows if wanted[0] else prompt_rows
        covered = first <= first_grad and stop >= stop_grad
        if isinstance(tiles.query, Tile):
            launch_query_kernel(
                tape,
                layout,
                (*read, *outputs),
                (lse, delta if covered else None),
                (targets[0], targets[3]),
                lengths,
                (*read_strides, *output_strides, *strides[0], *strides[3]),
                (batch, *counts, first, stop),
                factors[2:],
                tiles.query,
                (head_dim, head_dim, causal, prefix, False, layout.align, layout.wide, precision(query.dtype)),
            )
        else:
            run(
                _query_kernel,
                batch * heads,
                (*read, *outputs, lse, delta, targets[0], targets[3], lengths),
                (*read_strides, *output_strides, *strides[0], *strides[3], *counts, first, stop, *factors),
                (head_dim, *tiles.query.shape, *flags, wanted[0], wants_prompt_query, covered),
                tiles.query.options,
            )
    if wants_keys or wants_prompt_keys:
        if not covered:
            run(
                _delta_kernel,
                -(-rows // 64) * batch * heads,
                (*read[6:], *outputs, delta, lengths),
                (*read_strides[18:], *output_strides, heads, tokens, prompt_rows, first_grad, stop_grad),
                (head_dim, 64, lengths is not None),
                {"num_warps": 4},
            )
        first = 0 if wants_prompt_keys else prompts
        stop = keys if wants_keys else prompts
        run(
            _key_kernel,
            batch * heads,
            (*read, lse, delta, targets[1], targets[2], targets[4], targets[5], lengths),
            (
                *read_strides,
                *strides[1],
                *strides[2],
                *strides[4],
                *strides[5],
                *counts,
                first,
                stop,
                *factors,
            ),
            (
                head_dim,
                *tiles.key.shape,
                *flags,
                wanted[1],
                wanted[2],
                wanted[4] and prompts > 0,
                wanted[5] and prompts > 0,
            ),
            tiles.key.options,
        )
    end_gradients(tape, gradients)
    return gradients.results
