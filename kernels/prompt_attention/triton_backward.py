"""Backward of prompt-concatenated attention: three kernels, and what each call needs of them.  No atomics.

- ``_query_kernel``: one program a row tile; dq, and delta = rowsum(dO * O) for the kernel after it.
- ``_key_kernel``: one program a key tile; dk and dv, over those rows that see the tile.
- ``_one_pass_kernel``: one program a head, for short sequences; all of it with five products in place of seven.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportAssignmentType=false, reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.cards import is_hopper, shared_memory
from epic_fast.kernels.common.plan import Tape, precision, unit_last_stride
from epic_fast.kernels.prompt_attention.tiles import BackwardTiles, Tile, backward_tiles, size_class, split_of
from epic_fast.kernels.prompt_attention.triton_rows import (
    Layout,
    base_2,
    begin_gradients,
    end_gradients,
    facts_of,
    head_base,
    layout_of,
    load_rows,
    load_statistic,
    no_gradients,
    padded,
    row_limits,
    store_rows,
    tile_limits,
    valid_tokens,
)


@triton.jit
def _query_step(
    accumulator,  # [BLOCK_M, BLOCK_D]
    queries,  # [BLOCK_M, BLOCK_D]
    grads,  # [BLOCK_M, BLOCK_D]
    statistic,  # [BLOCK_M]
    delta,  # [BLOCK_M]
    limit,  # [BLOCK_M]
    first_key,
    prompt_key,
    prompt_value,
    key,
    value,
    prompts,
    stop,
    prompt_key_row,
    prompt_value_row,
    key_row,
    value_row,
    scale,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEGATE: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one key tile adds to dq / scale."""
    columns = first_key + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    keys = load_rows(
        prompt_key, key, columns, prompts, stop, prompt_key_row, key_row, HEAD_DIM, BLOCK_D, MASKED, ALIGN, WIDE
    )  # [BLOCK_N, BLOCK_D]
    values = load_rows(
        prompt_value, value, columns, prompts, stop, prompt_value_row, value_row, HEAD_DIM, BLOCK_D, MASKED, ALIGN, WIDE
    )  # [BLOCK_N, BLOCK_D]
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if NEGATE:
        scores = -scores
    weights = tl.exp2(scores * scale - statistic[:, None])  # [BLOCK_M, BLOCK_N]
    if MASKED:
        weights = tl.where(columns[None, :] < limit[:, None], weights, 0.0)
    grad_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    grad_scores = weights * (grad_weights - delta[:, None])  # [BLOCK_M, BLOCK_N]
    return tl.dot(grad_scores.to(keys.dtype), keys, accumulator, input_precision=PRECISION)


@triton.jit(
    do_not_specialize=[
        "query_batch", "query_head", "query_row",
        "key_batch", "key_head", "key_row",
        "value_batch", "value_head", "value_row",
        "prompt_query_batch", "prompt_query_head", "prompt_query_row",
        "prompt_key_batch", "prompt_key_head", "prompt_key_row",
        "prompt_value_batch", "prompt_value_head", "prompt_value_row",
        "grad_batch", "grad_head", "grad_row",
        "prompt_grad_batch", "prompt_grad_head", "prompt_grad_row",
        "output_batch", "output_head", "output_row",
        "prompt_output_batch", "prompt_output_head", "prompt_output_row",
        "d_query_batch", "d_query_head", "d_query_row",
        "d_prompt_query_batch", "d_prompt_query_head", "d_prompt_query_row",
        "heads", "tokens", "prompts", "prompt_rows", "first_row", "stop_row", "scale", "factor",
    ]
)  # fmt: skip
def _query_kernel(
    query,  # (B, H, N, D), as are key, value
    key,
    value,
    prompt_query,  # (B or 1, H, P, D) or None
    prompt_key,  # (B or 1, H, P, D), as is prompt_value
    prompt_value,
    grad,  # (B, H, N, D) or None (zeros)
    prompt_grad,  # (B, H, P, D) or None (zeros)
    output,  # (B, H, N, D)
    prompt_output,  # (B, H, P, D) or None
    lse,  # (B, H, R)
    delta,  # (B, H, R) to be written, or None
    d_query,  # (B, H, N, D) or None (not wanted)
    d_prompt_query,  # (B, H, P, D) or None (not wanted)
    lengths,  # (B,) or None
    query_batch,  # strides of the dimensions batch, head, row, in units of ALIGN elements
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
    grad_batch,
    grad_head,
    grad_row,
    prompt_grad_batch,
    prompt_grad_head,
    prompt_grad_row,
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
    first_row,  # the rows whose gradient is wanted: first_row <= row < stop_row
    stop_row,
    scale,  # |scale| * log2(e)
    factor,  # scale
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PREFIX: tl.constexpr,
    NEGATE: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: dq of one row tile of one head.  Grid: (row tiles * B * H,)."""
    row_tiles = tl.cdiv(stop_row - first_row, BLOCK_M)
    program = tl.program_id(0)
    first = first_row + (program % row_tiles) * BLOCK_M
    batch_head = program // row_tiles
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    length = valid_tokens(lengths, batch, tokens)
    query = head_base(query, batch, head, query_batch, query_head, ALIGN)
    key = head_base(key, batch, head, key_batch, key_head, ALIGN)
    value = head_base(value, batch, head, value_batch, value_head, ALIGN)
    if prompt_query is not None:
        prompt_query = head_base(prompt_query, batch, head, prompt_query_batch, prompt_query_head, ALIGN)
    prompt_key = head_base(prompt_key, batch, head, prompt_key_batch, prompt_key_head, ALIGN)
    prompt_value = head_base(prompt_value, batch, head, prompt_value_batch, prompt_value_head, ALIGN)
    if grad is not None:
        grad = head_base(grad, batch, head, grad_batch, grad_head, ALIGN)
    if prompt_grad is not None:
        prompt_grad = head_base(prompt_grad, batch, head, prompt_grad_batch, prompt_grad_head, ALIGN)
    output = head_base(output, batch, head, output_batch, output_head, ALIGN)
    if prompt_output is not None:
        prompt_output = head_base(prompt_output, batch, head, prompt_output_batch, prompt_output_head, ALIGN)
    if d_query is not None:
        d_query = head_base(d_query, batch, head, d_query_batch, d_query_head, ALIGN)
    if d_prompt_query is not None:
        d_prompt_query = head_base(d_prompt_query, batch, head, d_prompt_query_batch, d_prompt_query_head, ALIGN)
    statistics = batch_head.to(tl.int64) * (prompt_rows + tokens)

    stop = prompts + length
    live = tl.minimum(prompt_rows + length, stop_row)
    rows = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    limit = row_limits(rows, prompt_rows, prompts, length, CAUSAL, PREFIX)  # [BLOCK_M]
    low, high = tile_limits(first, tl.minimum(first + BLOCK_M, stop_row), prompt_rows, prompts, length, CAUSAL, PREFIX)
    queries = load_rows(
        prompt_query, query, rows, prompt_rows, live, prompt_query_row, query_row, HEAD_DIM, BLOCK_D, True, ALIGN, WIDE
    )  # [BLOCK_M, BLOCK_D]
    grads = load_rows(
        prompt_grad, grad, rows, prompt_rows, live, prompt_grad_row, grad_row, HEAD_DIM, BLOCK_D, True, ALIGN, WIDE
    )  # [BLOCK_M, BLOCK_D]
    outputs = load_rows(
        prompt_output,
        output,
        rows,
        prompt_rows,
        live,
        prompt_output_row,
        output_row,
        HEAD_DIM,
        BLOCK_D,
        True,
        ALIGN,
        WIDE,
    )  # [BLOCK_M, BLOCK_D]
    statistic = tl.load(lse + statistics + rows, mask=rows < live, other=float("inf"))  # [BLOCK_M]
    sums = tl.sum(outputs.to(tl.float32) * grads.to(tl.float32), 1)  # [BLOCK_M]
    if delta is not None:
        tl.store(delta + statistics + rows, sums, mask=rows < stop_row)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole = 0
    if SPLIT:
        whole = (low // BLOCK_N) * BLOCK_N
        for first_key in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
            accumulator = _query_step(
                accumulator, queries, grads, statistic, sums, limit, first_key, prompt_key, prompt_value, key, value,
                prompts, stop, prompt_key_row, prompt_value_row, key_row, value_row, scale, BLOCK_N, False, HEAD_DIM,
                BLOCK_D, NEGATE, ALIGN, WIDE, PRECISION,
            )  # fmt: skip
    for first_key in tl.range(whole, high, BLOCK_TAIL, num_stages=STAGES):
        accumulator = _query_step(
            accumulator, queries, grads, statistic, sums, limit, first_key, prompt_key, prompt_value, key, value,
            prompts, stop, prompt_key_row, prompt_value_row, key_row, value_row, scale, BLOCK_TAIL, True, HEAD_DIM,
            BLOCK_D, NEGATE, ALIGN, WIDE, PRECISION,
        )  # fmt: skip
    if BLOCK_M > 64:
        # The first row still, but not for the compiler, which else keeps what it knows of the rows in registers until
        # here; smaller tiles have registers to spare.
        first += first >> 30
        rows = first + tl.arange(0, BLOCK_M)
        limit = row_limits(rows, prompt_rows, prompts, length, CAUSAL, PREFIX)
    store_rows(
        d_prompt_query,
        d_query,
        tl.where((limit > 0)[:, None], accumulator * factor, 0.0),
        rows,
        prompt_rows,
        stop_row,
        d_prompt_query_row,
        d_query_row,
        HEAD_DIM,
        BLOCK_D,
        ALIGN,
        WIDE,
    )


@triton.jit(
    do_not_specialize=[
        "query_batch", "query_head", "query_row",
        "key_batch", "key_head", "key_row",
        "value_batch", "value_head", "value_row",
        "prompt_query_batch", "prompt_query_head", "prompt_query_row",
        "prompt_key_batch", "prompt_key_head", "prompt_key_row",
        "prompt_value_batch", "prompt_value_head", "prompt_value_row",
        "grad_batch", "grad_head", "grad_row",
        "prompt_grad_batch", "prompt_grad_head", "prompt_grad_row",
        "output_batch", "output_head", "output_row",
        "prompt_output_batch", "prompt_output_head", "prompt_output_row",
        "d_key_batch", "d_key_head", "d_key_row",
        "d_value_batch", "d_value_head", "d_value_row",
        "d_prompt_key_batch", "d_prompt_key_head", "d_prompt_key_row",
        "d_prompt_value_batch", "d_prompt_value_head", "d_prompt_value_row",
        "heads", "tokens", "prompts", "prompt_rows", "first_key", "stop_key", "first_row", "stop_row",
        "scale", "factor",
    ]
)  # fmt: skip
def _key_kernel(
    query,  # (B, H, N, D), as are key, value
    key,
    value,
    prompt_query,  # (B or 1, H, P, D) or None
    prompt_key,  # (B or 1, H, P, D), as is prompt_value
    prompt_value,
    grad,  # (B, H, N, D) or None (zeros)
    prompt_grad,  # (B, H, P, D) or None (zeros)
    output,  # (B, H, N, D), read only if delta is None
    prompt_output,  # (B, H, P, D) or None
    lse,  # (B, H, R)
    delta,  # (B, H, R), or None: computed here
    d_key,  # (B, H, N, D) or None (not wanted), as is d_value
    d_value,
    d_prompt_key,  # (B, H, P, D) or None (not wanted), as is d_prompt_value
    d_prompt_value,
    lengths,  # (B,) or None
    query_batch,  # strides of the dimensions batch, head, row, in units of ALIGN elements
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
    grad_batch,
    grad_head,
    grad_row,
    prompt_grad_batch,
    prompt_grad_head,
    prompt_grad_row,
    output_batch,
    output_head,
    output_row,
    prompt_output_batch,
    prompt_output_head,
    prompt_output_row,
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
    first_key,  # the virtual keys whose gradient is wanted: first_key <= key < stop_key
    stop_key,
    first_row,  # the rows that have a gradient: first_row <= row < stop_row
    stop_row,
    scale,  # |scale| * log2(e)
    factor,  # scale
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PREFIX: tl.constexpr,
    NEGATE: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: dk and dv of one key tile of one head.  Grid: (key tiles * B * H,)."""
    NEED_KEY: tl.constexpr = d_key is not None or d_prompt_key is not None
    NEED_VALUE: tl.constexpr = d_value is not None or d_prompt_value is not None
    key_tiles = tl.cdiv(stop_key - first_key, BLOCK_N)
    program = tl.program_id(0)
    first = first_key + (program % key_tiles) * BLOCK_N
    batch_head = program // key_tiles
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    length = valid_tokens(lengths, batch, tokens)
    query = head_base(query, batch, head, query_batch, query_head, ALIGN)
    key = head_base(key, batch, head, key_batch, key_head, ALIGN)
    value = head_base(value, batch, head, value_batch, value_head, ALIGN)
    if prompt_query is not None:
        prompt_query = head_base(prompt_query, batch, head, prompt_query_batch, prompt_query_head, ALIGN)
    prompt_key = head_base(prompt_key, batch, head, prompt_key_batch, prompt_key_head, ALIGN)
    prompt_value = head_base(prompt_value, batch, head, prompt_value_batch, prompt_value_head, ALIGN)
    if grad is not None:
        grad = head_base(grad, batch, head, grad_batch, grad_head, ALIGN)
    if prompt_grad is not None:
        prompt_grad = head_base(prompt_grad, batch, head, prompt_grad_batch, prompt_grad_head, ALIGN)
    output = head_base(output, batch, head, output_batch, output_head, ALIGN)
    if prompt_output is not None:
        prompt_output = head_base(prompt_output, batch, head, prompt_output_batch, prompt_output_head, ALIGN)
    if d_key is not None:
        d_key = head_base(d_key, batch, head, d_key_batch, d_key_head, ALIGN)
    if d_value is not None:
        d_value = head_base(d_value, batch, head, d_value_batch, d_value_head, ALIGN)
    if d_prompt_key is not None:
        d_prompt_key = head_base(d_prompt_key, batch, head, d_prompt_key_batch, d_prompt_key_head, ALIGN)
    if d_prompt_value is not None:
        d_prompt_value = head_base(d_prompt_value, batch, head, d_prompt_value_batch, d_prompt_value_head, ALIGN)
    statistics = batch_head.to(tl.int64) * (prompt_rows + tokens)

    stop = prompts + length
    columns = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    keys = load_rows(
        prompt_key, key, columns, prompts, stop, prompt_key_row, key_row, HEAD_DIM, BLOCK_D, True, ALIGN, WIDE
    )  # [BLOCK_N, BLOCK_D]
    values = load_rows(
        prompt_value, value, columns, prompts, stop, prompt_value_row, value_row, HEAD_DIM, BLOCK_D, True, ALIGN, WIDE
    )  # [BLOCK_N, BLOCK_D]
    d_keys = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_values = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    # The rows that see something of this tile are one range, or two where causal tokens leave a gap after the
    # prompts: near_first <= row < near_stop, far_first <= row < far_stop.
    live = tl.minimum(prompt_rows + length, stop_row)
    near_first = first_row
    if PREFIX:
        near_first = tl.where(first >= prompts, tl.maximum(first_row, prompt_rows), first_row)
    near_stop = live
    far_first = live
    if CAUSAL:
        seeing = tl.maximum(prompt_rows + tl.maximum(first - prompts, 0), near_first)
        near_stop = tl.minimum(prompt_rows, live)
        far_first = seeing
        gap = seeing - near_stop >= BLOCK_M
        near_stop = tl.where(gap, near_stop, live)
        far_first = tl.where(gap, far_first, live)
    # A tile past the length is seen by nobody.
    near_tiles = tl.where(first < stop, tl.cdiv(tl.maximum(near_stop - near_first, 0), BLOCK_M), 0)
    far_tiles = tl.where(first < stop, tl.cdiv(tl.maximum(live - far_first, 0), BLOCK_M), 0)
    for tile in tl.range(0, near_tiles + far_tiles, num_stages=STAGES):
        is_near = tile < near_tiles
        start = tl.where(is_near, near_first + tile * BLOCK_M, far_first + (tile - near_tiles) * BLOCK_M)
        end = tl.where(is_near, near_stop, live)
        rows = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        queries = load_rows(
            prompt_query,
            query,
            rows,
            prompt_rows,
            end,
            prompt_query_row,
            query_row,
            HEAD_DIM,
            BLOCK_D,
            True,
            ALIGN,
            WIDE,
        )  # [BLOCK_M, BLOCK_D]
        grads = load_rows(
            prompt_grad, grad, rows, prompt_rows, end, prompt_grad_row, grad_row, HEAD_DIM, BLOCK_D, True, ALIGN, WIDE
        )  # [BLOCK_M, BLOCK_D]
        # Rows outside have lse = +inf, so their weights are zero.
        statistic = load_statistic(lse + statistics, rows, end, float("inf"))  # [BLOCK_M]
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        if NEGATE:
            scores = -scores
        weights = tl.exp2(scores * scale - statistic[None, :])  # [BLOCK_N, BLOCK_M]
        if CAUSAL or PREFIX:
            limit = row_limits(rows, prompt_rows, prompts, length, CAUSAL, PREFIX)  # [BLOCK_M]
            weights = tl.where(columns[:, None] < limit[None, :], weights, 0.0)
        if NEED_VALUE:
            d_values = tl.dot(weights.to(grads.dtype), grads, d_values, input_precision=PRECISION)
        if NEED_KEY:
            if delta is None:
                outputs = load_rows(
                    prompt_output,
                    output,
                    rows,
                    prompt_rows,
                    end,
                    prompt_output_row,
                    output_row,
                    HEAD_DIM,
                    BLOCK_D,
                    True,
                    ALIGN,
                    WIDE,
                )  # [BLOCK_M, BLOCK_D]
                sums = tl.sum(outputs.to(tl.float32) * grads.to(tl.float32), 1)  # [BLOCK_M]
            else:
                sums = load_statistic(delta + statistics, rows, end, 0.0)  # [BLOCK_M]
            grad_weights = tl.dot(values, tl.trans(grads), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
            grad_scores = weights * (grad_weights - sums[None, :])  # [BLOCK_N, BLOCK_M]
            d_keys = tl.dot(grad_scores.to(queries.dtype), queries, d_keys, input_precision=PRECISION)
    # Keys past the length were zeros with a weight of their own; nobody sees them.
    seen = (columns < stop)[:, None]
    if NEED_KEY:
        store_rows(
            d_prompt_key,
            d_key,
            tl.where(seen, d_keys * factor, 0.0),
            columns,
            prompts,
            stop_key,
            d_prompt_key_row,
            d_key_row,
            HEAD_DIM,
            BLOCK_D,
            ALIGN,
            WIDE,
        )
    if NEED_VALUE:
        store_rows(
            d_prompt_value,
            d_value,
            tl.where(seen, d_values, 0.0),
            columns,
            prompts,
            stop_key,
            d_prompt_value_row,
            d_value_row,
            HEAD_DIM,
            BLOCK_D,
            ALIGN,
            WIDE,
        )


@triton.jit(
    do_not_specialize=[
        "query_batch", "query_head", "query_row",
        "key_batch", "key_head", "key_row",
        "value_batch", "value_head", "value_row",
        "prompt_query_batch", "prompt_query_head", "prompt_query_row",
        "prompt_key_batch", "prompt_key_head", "prompt_key_row",
        "prompt_value_batch", "prompt_value_head", "prompt_value_row",
        "grad_batch", "grad_head", "grad_row",
        "prompt_grad_batch", "prompt_grad_head", "prompt_grad_row",
        "output_batch", "output_head", "output_row",
        "prompt_output_batch", "prompt_output_head", "prompt_output_row",
        "d_query_batch", "d_query_head", "d_query_row",
        "d_prompt_query_batch", "d_prompt_query_head", "d_prompt_query_row",
        "d_key_batch", "d_key_head", "d_key_row",
        "d_value_batch", "d_value_head", "d_value_row",
        "d_prompt_key_batch", "d_prompt_key_head", "d_prompt_key_row",
        "d_prompt_value_batch", "d_prompt_value_head", "d_prompt_value_row",
        "heads", "tokens", "prompts", "prompt_rows", "scale", "factor",
    ]
)  # fmt: skip
def _one_pass_kernel(
    query,  # (B, H, N, D), as are key, value
    key,
    value,
    prompt_query,  # (B or 1, H, P, D) or None
    prompt_key,  # (B or 1, H, P, D), as is prompt_value
    prompt_value,
    grad,  # (B, H, N, D) or None (zeros)
    prompt_grad,  # (B, H, P, D) or None (zeros)
    output,  # (B, H, N, D)
    prompt_output,  # (B, H, P, D) or None
    lse,  # (B, H, R)
    d_query,  # (B, H, N, D) or None (not wanted)
    d_prompt_query,  # (B, H, P, D) or None (not wanted)
    d_key,  # (B, H, N, D) or None (not wanted), as is d_value
    d_value,
    d_prompt_key,  # (B, H, P, D) or None (not wanted), as is d_prompt_value
    d_prompt_value,
    lengths,  # (B,) or None
    query_batch,  # strides of the dimensions batch, head, row, in units of ALIGN elements
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
    grad_batch,
    grad_head,
    grad_row,
    prompt_grad_batch,
    prompt_grad_head,
    prompt_grad_row,
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
    scale,  # |scale| * log2(e)
    factor,  # scale
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PREFIX: tl.constexpr,
    NEGATE: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: all gradients of one head, whose rows (at most BLOCK_M) it holds.  Grid: (B * H,)."""
    batch_head = tl.program_id(0)
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    length = valid_tokens(lengths, batch, tokens)
    query = head_base(query, batch, head, query_batch, query_head, ALIGN)
    key = head_base(key, batch, head, key_batch, key_head, ALIGN)
    value = head_base(value, batch, head, value_batch, value_head, ALIGN)
    if prompt_query is not None:
        prompt_query = head_base(prompt_query, batch, head, prompt_query_batch, prompt_query_head, ALIGN)
    prompt_key = head_base(prompt_key, batch, head, prompt_key_batch, prompt_key_head, ALIGN)
    prompt_value = head_base(prompt_value, batch, head, prompt_value_batch, prompt_value_head, ALIGN)
    if grad is not None:
        grad = head_base(grad, batch, head, grad_batch, grad_head, ALIGN)
    if prompt_grad is not None:
        prompt_grad = head_base(prompt_grad, batch, head, prompt_grad_batch, prompt_grad_head, ALIGN)
    output = head_base(output, batch, head, output_batch, output_head, ALIGN)
    if prompt_output is not None:
        prompt_output = head_base(prompt_output, batch, head, prompt_output_batch, prompt_output_head, ALIGN)
    if d_query is not None:
        d_query = head_base(d_query, batch, head, d_query_batch, d_query_head, ALIGN)
    if d_prompt_query is not None:
        d_prompt_query = head_base(d_prompt_query, batch, head, d_prompt_query_batch, d_prompt_query_head, ALIGN)
    if d_key is not None:
        d_key = head_base(d_key, batch, head, d_key_batch, d_key_head, ALIGN)
    if d_value is not None:
        d_value = head_base(d_value, batch, head, d_value_batch, d_value_head, ALIGN)
    if d_prompt_key is not None:
        d_prompt_key = head_base(d_prompt_key, batch, head, d_prompt_key_batch, d_prompt_key_head, ALIGN)
    if d_prompt_value is not None:
        d_prompt_value = head_base(d_prompt_value, batch, head, d_prompt_value_batch, d_prompt_value_head, ALIGN)

    row_count = prompt_rows + tokens
    live = prompt_rows + length
    stop = prompts + length
    rows = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    limit = row_limits(rows, prompt_rows, prompts, length, CAUSAL, PREFIX)  # [BLOCK_M]
    queries = load_rows(
        prompt_query, query, rows, prompt_rows, live, prompt_query_row, query_row, HEAD_DIM, BLOCK_D, True, ALIGN, WIDE
    )  # [BLOCK_M, BLOCK_D]
    grads = load_rows(
        prompt_grad, grad, rows, prompt_rows, live, prompt_grad_row, grad_row, HEAD_DIM, BLOCK_D, True, ALIGN, WIDE
    )  # [BLOCK_M, BLOCK_D]
    outputs = load_rows(
        prompt_output,
        output,
        rows,
        prompt_rows,
        live,
        prompt_output_row,
        output_row,
        HEAD_DIM,
        BLOCK_D,
        True,
        ALIGN,
        WIDE,
    )  # [BLOCK_M, BLOCK_D]
    statistic = tl.load(lse + batch_head.to(tl.int64) * row_count + rows, mask=rows < live, other=float("inf"))
    sums = tl.sum(outputs.to(tl.float32) * grads.to(tl.float32), 1)  # [BLOCK_M]
    d_queries = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in tl.range(0, prompts + tokens, BLOCK_N, num_stages=STAGES):
        columns = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        keys = load_rows(
            prompt_key, key, columns, prompts, stop, prompt_key_row, key_row, HEAD_DIM, BLOCK_D, True, ALIGN, WIDE
        )  # [BLOCK_N, BLOCK_D]
        values = load_rows(
            prompt_value,
            value,
            columns,
            prompts,
            stop,
            prompt_value_row,
            value_row,
            HEAD_DIM,
            BLOCK_D,
            True,
            ALIGN,
            WIDE,
        )  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if NEGATE:
            scores = -scores
        weights = tl.exp2(scores * scale - statistic[:, None])  # [BLOCK_M, BLOCK_N]
        weights = tl.where(columns[None, :] < limit[:, None], weights, 0.0)
        d_values = tl.dot(tl.trans(weights.to(grads.dtype)), grads, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
        store_rows(
            d_prompt_value,
            d_value,
            d_values,
            columns,
            prompts,
            prompts + tokens,
            d_prompt_value_row,
            d_value_row,
            HEAD_DIM,
            BLOCK_D,
            ALIGN,
            WIDE,
        )
        grad_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        grad_scores = (weights * (grad_weights - sums[:, None])).to(queries.dtype)  # [BLOCK_M, BLOCK_N]
        d_keys = tl.dot(tl.trans(grad_scores), queries, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
        d_queries = tl.dot(grad_scores, keys, d_queries, input_precision=PRECISION)
        store_rows(
            d_prompt_key,
            d_key,
            d_keys * factor,
            columns,
            prompts,
            prompts + tokens,
            d_prompt_key_row,
            d_key_row,
            HEAD_DIM,
            BLOCK_D,
            ALIGN,
            WIDE,
        )
    store_rows(
        d_prompt_query,
        d_query,
        tl.where((limit > 0)[:, None], d_queries * factor, 0.0),
        rows,
        prompt_rows,
        row_count,
        d_prompt_query_row,
        d_query_row,
        HEAD_DIM,
        BLOCK_D,
        ALIGN,
        WIDE,
    )


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
    tiles: BackwardTiles | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Launch the backward: gradients of query, key, value, prompt_query, prompt_key and prompt_value.

    A gradient of an output that is None counts as zeros.  Only what ``needs`` names is computed and allocated, the
    rest is None.  ``grads`` may give tensors to write into.  The gradient of a prompt shared by the batch is summed
    over it from float32 shares, one a sample.
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
        (prefix, causal, float(scale), needs, precision(query.dtype), tiles),
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
    *given, prefix, causal, scale, needs, precision, tiles = grads_and_options
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
    d_query, d_key, d_value, d_prompt_query, d_prompt_key, d_prompt_value = gradients.targets
    first_grad, stop_grad = gradients.first, gradients.stop

    itemsize = query.dtype.itemsize
    width = padded(head_dim)
    if tiles is None:
        tiles = backward_tiles(
            width,
            itemsize,
            size_class(rows),
            size_class(keys),
            causal or (prefix and prompt_rows > 0),
            shared_memory(query.device),
            split_of(precision, is_hopper(query.device)),
        )
    grad_output, grad_prompt_output = unit_last_stride(tape, grad_output), unit_last_stride(tape, grad_prompt_output)
    read = (*inputs, grad_output, grad_prompt_output, output, prompt_output)
    # The order in which the kernels take what they write: (dq, dq of prompts), then (dk, dv, dk of prompts, dv of ...).
    written = (d_query, d_prompt_query, d_key, d_value, d_prompt_key, d_prompt_value)
    layout = layout_of((*read, *written), itemsize)
    first_written = 3 * len(read)
    read_strides = layout.strides[:first_written]
    query_strides = layout.strides[first_written : first_written + 6]
    key_strides = layout.strides[first_written + 6 :]
    flags = (head_dim, width, causal, prefix, scale < 0, layout.align, layout.wide, precision)
    factors = (base_2(scale), float(scale))

    wants_tokens = d_key is not None or d_value is not None
    wants_prompts = prompts > 0 and (d_prompt_key is not None or d_prompt_value is not None)
    wants_query = d_query is not None
    wants_prompt_query = prompt_rows > 0 and d_prompt_query is not None
    one_pass = tiles.one_pass
    if one_pass is not None and rows <= one_pass.rows and wants_query and (wants_tokens or wants_prompts):
        constants = (one_pass.rows, one_pass.keys, one_pass.stages, *flags)
        tape.launch(
            _one_pass_kernel,
            batch * heads,
            (
                *read,
                lse,
                *written,
                lengths,
                *layout.strides,
                heads,
                tokens,
                prompts,
                prompt_rows,
                *factors,
                *constants,
            ),
            one_pass.options,
            facts_of(layout, (lse, lengths), (constants, one_pass.warps, one_pass.registers)),
        )
    else:
        delta = None
        if wants_query or wants_prompt_query:
            first_row = 0 if wants_prompt_query else prompt_rows
            stop_row = rows if wants_query else prompt_rows
            tile = tiles.query
            if (wants_tokens or wants_prompts) and first_row <= first_grad and stop_row >= stop_grad:
                delta = tape.scratch(lse.shape, torch.float32)
            launch_query_kernel(
                tape,
                layout,
                read,
                (lse, delta),
                written[:2],
                lengths,
                (*read_strides, *query_strides),
                (batch, heads, tokens, prompts, prompt_rows, first_row, stop_row),
                factors,
                tile,
                flags,
            )
        if wants_tokens or wants_prompts:
            first_key = 0 if wants_prompts else prompts
            stop_key = keys if wants_tokens else prompts
            tile = tiles.key
            constants = (tile.rows, tile.keys, tile.stages, *flags)
            tape.launch(
                _key_kernel,
                -(-(stop_key - first_key) // tile.keys) * batch * heads,
                (
                    *read,
                    lse,
                    delta,
                    *written[2:],
                    lengths,
                    *read_strides,
                    *key_strides,
                    heads,
                    tokens,
                    prompts,
                    prompt_rows,
                    first_key,
                    stop_key,
                    first_grad,
                    stop_grad,
                    *factors,
                    *constants,
                ),
                tile.options,
                facts_of(layout, (lse, delta, lengths), (constants, tile.warps, tile.registers)),
            )
    end_gradients(tape, gradients)
    return gradients.results


def launch_query_kernel(
    tape: Tape,
    layout: Layout,
    read: Sequence[Tensor | None],
    statistics: tuple[Tensor, Tensor | None],
    written: Sequence[Tensor | None],
    lengths: Tensor | None,
    strides: Sequence[int],
    counts: tuple[int, ...],
    factors: tuple[float, float],
    tile: Tile,
    flags: tuple[Any, ...],
) -> None:
    """Launch dq over rows ``first <= row < stop``.

    Args:
        read: the six inputs, the gradients of both outputs, and these.
        statistics: lse, and delta to be written, or None.
        written: dq of the tokens and of the prompts, or None.
        strides: of ``read`` and ``written``.
        counts: batch, heads, tokens, prompts, prompt rows, first, stop.
        factors: the scale to base 2, and as it is.
        flags: the constants that do not belong to the tile.
    """
    batch, heads, *_, first, stop = counts
    constants = (tile.rows, tile.keys, tile.tail_keys, tile.split, tile.stages, *flags)
    tape.launch(
        _query_kernel,
        -(-(stop - first) // tile.rows) * batch * heads,
        (*read, *statistics, *written, lengths, *strides, *counts[1:], *factors, *constants),
        tile.options,
        facts_of(layout, (*statistics, lengths), (constants, tile.warps, tile.registers)),
    )
