"""Backward of prompt-concatenated attention for heads of at most 128 rows and 128 keys: one program a head.

All that a head has is asked for before the first product, so its loads wait for each other once, and a program is small
enough for three or more to share a multiprocessor: while one waits the others multiply.  Tiles are unrolled, and count
only as many rows and keys as there are.  Five products, no atomics.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportAssignmentType=false, reportOptionalMemberAccess=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common.launch import launch
from epic_fast.kernels.prompt_attention.triton_rows import (
    base_2,
    facts_of,
    head_base,
    layout_of,
    load_rows,
    load_statistic,
    padded,
    row_limits,
    row_offsets,
    store_rows,
    valid_tokens,
)

MOST_ROWS = 128
MOST_HEAD_DIM = 64


@triton.jit
def sees(
    first_row,
    stop_row,
    first_key,
    prompt_rows,
    prompts,
    length,
    CAUSAL: tl.constexpr,
    PREFIX: tl.constexpr,
):
    """Whether a row of ``first_row <= row < stop_row`` sees a key from ``first_key`` on."""
    last = tl.minimum(stop_row - prompt_rows, length)
    has_token = tl.maximum(first_row - prompt_rows, 0) < last
    high = prompts + length
    if CAUSAL:
        high = prompts + last
    prompt_high = prompts + length
    if PREFIX:
        prompt_high = prompts
    return (has_token & (first_key < high)) | ((first_row < prompt_rows) & (first_key < prompt_high))


@triton.jit
def load_tile(
    prompt_base,  # pointer to (prompts, D), or None: those rows count as zeros
    token_base,  # pointer to (tokens, D), or None: those rows count as zeros
    rows,  # [BLOCK]
    prompts,
    stop,
    prompt_stride,
    token_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    ONCE: tl.constexpr,
):
    """``load_rows``; if ONCE, of what nobody reads again: it is the first to leave the cache."""
    if not ONCE or (prompt_base is not None and token_base is not None and prompt_base.dtype != token_base.dtype):
        return load_rows(
            prompt_base, token_base, rows, prompts, stop, prompt_stride, token_stride,
            HEAD_DIM, BLOCK_D, True, ALIGN, WIDE,
        )  # fmt: skip
    else:
        columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
        inside = rows < stop  # [BLOCK]
        if prompt_base is None:
            inside = inside & (rows >= prompts)
            start = token_base + row_offsets(rows - prompts, token_stride, ALIGN, WIDE)  # [BLOCK]
        elif token_base is None:
            inside = inside & (rows < prompts)
            start = prompt_base + row_offsets(rows, prompt_stride, ALIGN, WIDE)
        else:
            apart = (prompt_base.to(tl.int64) - token_base.to(tl.int64)) // (
                token_base.dtype.element_ty.primitive_bitwidth // 8
            )
            offset = tl.where(
                rows < prompts,
                apart + row_offsets(rows, prompt_stride, ALIGN, WIDE),
                row_offsets(rows - prompts, token_stride, ALIGN, WIDE).to(tl.int64),
            )  # [BLOCK]
            start = token_base + tl.multiple_of(offset, ALIGN)
        mask = inside[:, None]
        if HEAD_DIM != BLOCK_D:
            mask = mask & (columns < HEAD_DIM)[None, :]
        return tl.load(start[:, None] + columns[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def store_tile(
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
    """``store_rows``, once for prompts and tokens together where their types are the same."""
    if prompt_base is None or token_base is None or prompt_base.dtype != token_base.dtype:
        store_rows(
            prompt_base, token_base, tile, rows, prompts, stop, prompt_stride, token_stride,
            HEAD_DIM, BLOCK_D, ALIGN, WIDE,
        )  # fmt: skip
    else:
        columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
        apart = (prompt_base.to(tl.int64) - token_base.to(tl.int64)) // (
            token_base.dtype.element_ty.primitive_bitwidth // 8
        )
        offset = tl.where(
            rows < prompts,
            apart + row_offsets(rows, prompt_stride, ALIGN, WIDE),
            row_offsets(rows - prompts, token_stride, ALIGN, WIDE).to(tl.int64),
        )  # [BLOCK]
        pointers = (token_base + tl.multiple_of(offset, ALIGN))[:, None] + columns[None, :]  # [BLOCK, BLOCK_D]
        mask = (rows < stop)[:, None]
        if HEAD_DIM != BLOCK_D:
            mask = mask & (columns < HEAD_DIM)[None, :]
        tl.store(pointers, tile.to(token_base.dtype.element_ty), mask=mask)


@triton.jit
def prefetch_rows(
    prompt_base,  # pointer to (prompts, D), or None
    token_base,  # pointer to (tokens, D), or None
    prompts,
    stop,
    prompt_stride,
    token_stride,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Asks for the first ``stop`` rows, at most BLOCK, to be brought to the L2 cache.  Waits for nothing."""
    rows = tl.minimum(tl.arange(0, BLOCK), stop - 1)  # [BLOCK]
    if prompt_base is not None or token_base is not None:
        if prompt_base is None:
            rows = tl.maximum(rows, prompts)
            address = (token_base + row_offsets(rows - prompts, token_stride, ALIGN, WIDE)).to(tl.int64)
        elif token_base is None:
            rows = tl.minimum(rows, prompts - 1)
            address = (prompt_base + row_offsets(rows, prompt_stride, ALIGN, WIDE)).to(tl.int64)
        else:
            address = tl.where(
                rows < prompts,
                (prompt_base + row_offsets(rows, prompt_stride, ALIGN, WIDE)).to(tl.int64),
                (token_base + row_offsets(rows - prompts, token_stride, ALIGN, WIDE)).to(tl.int64),
            )  # [BLOCK]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _prefetch_head(
    tokens_of,
    prompts_of,
    batch,
    head,
    stride_batch,
    stride_head,
    stride_row,
    prompt_stride_batch,
    prompt_stride_head,
    prompt_stride_row,
    prompts,
    stop,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``prefetch_rows`` of one tensor's head."""
    if prompts_of is not None:
        prompts_of = head_base(prompts_of, batch, head, prompt_stride_batch, prompt_stride_head, ALIGN)
    if tokens_of is not None:
        tokens_of = head_base(tokens_of, batch, head, stride_batch, stride_head, ALIGN)
    if PACKED:
        prefetch_rows(None, prompts_of, 0, stop, 0, stride_row, BLOCK, ALIGN, WIDE)
    else:
        prefetch_rows(prompts_of, tokens_of, prompts, stop, prompt_stride_row, stride_row, BLOCK, ALIGN, WIDE)


@triton.jit
def rows_tile(
    queries,  # [BLOCK_M, BLOCK_D], as are grads
    grads,
    keys,  # [BLOCK_N, BLOCK_D], as are values
    values,
    statistic,  # [BLOCK_M], as are delta and limit
    delta,
    limit,
    columns,  # [BLOCK_N]
    d_queries,  # [BLOCK_M, BLOCK_D]
    d_keys,  # [BLOCK_N, BLOCK_D] or, if TURNED, [BLOCK_D, BLOCK_N], as is d_values
    d_values,
    scale,
    TURNED: tl.constexpr,
    NEGATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile's share of everything, with scores as [rows, keys]."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if NEGATE:
        scores = -scores
    weights = tl.exp2(scores * scale - statistic[:, None])  # [BLOCK_M, BLOCK_N]
    weights = tl.where(columns[None, :] < limit[:, None], weights, 0.0)
    grad_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    grad_scores = (weights * (grad_weights - delta[:, None])).to(queries.dtype)  # [BLOCK_M, BLOCK_N]
    weights = weights.to(grads.dtype)
    if TURNED:
        d_values = tl.dot(tl.trans(grads), weights, d_values, input_precision=PRECISION)
        d_keys = tl.dot(tl.trans(queries), grad_scores, d_keys, input_precision=PRECISION)
    else:
        d_values = tl.dot(tl.trans(weights), grads, d_values, input_precision=PRECISION)
        d_keys = tl.dot(tl.trans(grad_scores), queries, d_keys, input_precision=PRECISION)
    d_queries = tl.dot(grad_scores, keys, d_queries, input_precision=PRECISION)
    return d_queries, d_keys, d_values


@triton.jit
def keys_tile(
    queries,  # [BLOCK_M, BLOCK_D], as are grads
    grads,
    keys,  # [BLOCK_N, BLOCK_D], as are values
    values,
    statistic,  # [BLOCK_M], as are delta and limit
    delta,
    limit,
    columns,  # [BLOCK_N]
    d_queries,  # [BLOCK_M, BLOCK_D] or, if TURNED, [BLOCK_D, BLOCK_M]
    d_keys,  # [BLOCK_N, BLOCK_D], as is d_values
    d_values,
    scale,
    TURNED: tl.constexpr,
    NEGATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile's share of everything, with scores as [keys, rows]."""
    scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    if NEGATE:
        scores = -scores
    weights = tl.exp2(scores * scale - statistic[None, :])  # [BLOCK_N, BLOCK_M]
    weights = tl.where(columns[:, None] < limit[None, :], weights, 0.0)
    d_values = tl.dot(weights.to(grads.dtype), grads, d_values, input_precision=PRECISION)
    grad_weights = tl.dot(values, tl.trans(grads), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    grad_scores = (weights * (grad_weights - delta[None, :])).to(queries.dtype)  # [BLOCK_N, BLOCK_M]
    d_keys = tl.dot(grad_scores, queries, d_keys, input_precision=PRECISION)
    if TURNED:
        d_queries = tl.dot(tl.trans(keys), grad_scores, d_queries, input_precision=PRECISION)
    else:
        d_queries = tl.dot(tl.trans(grad_scores), keys, d_queries, input_precision=PRECISION)
    return d_queries, d_keys, d_values


@triton.jit
def _head(
    batch_head,
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
    d_query,  # (B, H, N, D) or None (not wanted), as are d_key, d_value
    d_prompt_query,  # (B, H, P, D) or None (not wanted), as are d_prompt_key, d_prompt_value
    d_key,
    d_value,
    d_prompt_key,
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
    total,  # B * H
    step,  # programs of the launch
    ahead,  # the head that is brought to the L2 cache lies so many further on
    scale,  # |scale| * log2(e)
    factor,  # scale
    BLOCK_M: tl.constexpr,  # rows of a tile, and how many tiles there are
    ROW_TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,  # keys of a tile, and how many tiles there are
    KEY_TILES: tl.constexpr,
    BY_KEYS: tl.constexpr,  # score tiles are [keys, rows]
    TURNED: tl.constexpr,  # what has BLOCK_M or BLOCK_N rows less than a warp group multiplies is summed as [D, rows]
    SKIP: tl.constexpr,  # tiles that nobody sees are left out
    PACKED: tl.constexpr,  # tokens lie behind prompts, row after row, in every tensor
    LOOP: tl.constexpr,  # head after head
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,  # what of a later head is brought to the L2 cache, as Variant.parts
    ONCE: tl.constexpr,  # what is read is not kept in the cache
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PREFIX: tl.constexpr,
    NEGATE: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of one head."""
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    length = valid_tokens(lengths, batch, tokens)
    query_base = head_base(query, batch, head, query_batch, query_head, ALIGN)
    key_base = head_base(key, batch, head, key_batch, key_head, ALIGN)
    value_base = head_base(value, batch, head, value_batch, value_head, ALIGN)
    prompt_query_base = prompt_query
    if prompt_query is not None:
        prompt_query_base = head_base(prompt_query, batch, head, prompt_query_batch, prompt_query_head, ALIGN)
    prompt_key_base = head_base(prompt_key, batch, head, prompt_key_batch, prompt_key_head, ALIGN)
    prompt_value_base = head_base(prompt_value, batch, head, prompt_value_batch, prompt_value_head, ALIGN)
    grad_base = grad
    if grad is not None:
        grad_base = head_base(grad, batch, head, grad_batch, grad_head, ALIGN)
    prompt_grad_base = prompt_grad
    if prompt_grad is not None:
        prompt_grad_base = head_base(prompt_grad, batch, head, prompt_grad_batch, prompt_grad_head, ALIGN)
    output_base = head_base(output, batch, head, output_batch, output_head, ALIGN)
    prompt_output_base = prompt_output
    if prompt_output is not None:
        prompt_output_base = head_base(prompt_output, batch, head, prompt_output_batch, prompt_output_head, ALIGN)
    d_query_base = d_query
    if d_query is not None:
        d_query_base = head_base(d_query, batch, head, d_query_batch, d_query_head, ALIGN)
    d_prompt_query_base = d_prompt_query
    if d_prompt_query is not None:
        d_prompt_query_base = head_base(d_prompt_query, batch, head, d_prompt_query_batch, d_prompt_query_head, ALIGN)
    d_key_base = d_key
    if d_key is not None:
        d_key_base = head_base(d_key, batch, head, d_key_batch, d_key_head, ALIGN)
    d_value_base = d_value
    if d_value is not None:
        d_value_base = head_base(d_value, batch, head, d_value_batch, d_value_head, ALIGN)
    d_prompt_key_base = d_prompt_key
    if d_prompt_key is not None:
        d_prompt_key_base = head_base(d_prompt_key, batch, head, d_prompt_key_batch, d_prompt_key_head, ALIGN)
    d_prompt_value_base = d_prompt_value
    if d_prompt_value is not None:
        d_prompt_value_base = head_base(d_prompt_value, batch, head, d_prompt_value_batch, d_prompt_value_head, ALIGN)
    row_count = prompt_rows + tokens
    row_split = prompt_rows
    key_split = prompts
    if PACKED:
        row_split = 0
        key_split = 0
        query_base, prompt_query_base = prompt_query_base, None
        key_base, prompt_key_base = prompt_key_base, None
        value_base, prompt_value_base = prompt_value_base, None
        grad_base, prompt_grad_base = prompt_grad_base, None
        output_base, prompt_output_base = prompt_output_base, None
        d_query_base, d_prompt_query_base = d_prompt_query_base, None
        d_key_base, d_prompt_key_base = d_prompt_key_base, None
        d_value_base, d_prompt_value_base = d_prompt_value_base, None
    live = prompt_rows + length
    stop = prompts + length

    keys = ()
    values = ()
    for tile in tl.static_range(KEY_TILES):
        columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        keys += (
            load_tile(
                prompt_key_base, key_base, columns, key_split, stop, prompt_key_row, key_row,
                HEAD_DIM, BLOCK_D, ALIGN, WIDE, ONCE,
            ),  # [BLOCK_N, BLOCK_D]
        )  # fmt: skip
        values += (
            load_tile(
                prompt_value_base, value_base, columns, key_split, stop, prompt_value_row, value_row,
                HEAD_DIM, BLOCK_D, ALIGN, WIDE, ONCE,
            ),  # [BLOCK_N, BLOCK_D]
        )  # fmt: skip
    queries = ()
    grads = ()
    deltas = ()
    d_queries = ()
    statistics = ()
    for tile in tl.static_range(ROW_TILES):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        queries += (
            load_tile(
                prompt_query_base, query_base, rows, row_split, live, prompt_query_row, query_row,
                HEAD_DIM, BLOCK_D, ALIGN, WIDE, ONCE,
            ),  # [BLOCK_M, BLOCK_D]
        )  # fmt: skip
        grad_tile = load_tile(
            prompt_grad_base, grad_base, rows, row_split, live, prompt_grad_row, grad_row,
            HEAD_DIM, BLOCK_D, ALIGN, WIDE, ONCE,
        )  # [BLOCK_M, BLOCK_D]  # fmt: skip
        output_tile = load_tile(
            prompt_output_base, output_base, rows, row_split, live, prompt_output_row, output_row,
            HEAD_DIM, BLOCK_D, ALIGN, WIDE, ONCE,
        )  # [BLOCK_M, BLOCK_D]  # fmt: skip
        grads += (grad_tile,)
        deltas += (tl.sum(output_tile.to(tl.float32) * grad_tile.to(tl.float32), 1),)  # [BLOCK_M]
        lse_base = lse + batch_head.to(tl.int64) * row_count
        if BY_KEYS:
            statistics += (load_statistic(lse_base, rows, live, float("inf")),)  # [BLOCK_M]
        else:
            statistics += (tl.load(lse_base + rows, mask=rows < live, other=float("inf")),)  # [BLOCK_M]
        if BY_KEYS and TURNED:
            d_queries += (tl.zeros([BLOCK_D, BLOCK_M], tl.float32),)
        else:
            d_queries += (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)

    if AHEAD:
        later = batch_head + ahead
        if later < total:
            later_batch = (later // heads).to(tl.int64)
            later_head = (later % heads).to(tl.int64)
            later_length = valid_tokens(lengths, later_batch, tokens)
            if later_length > 0:
                if AHEAD & 1:
                    _prefetch_head(
                        query, prompt_query, later_batch, later_head, query_batch, query_head, query_row,
                        prompt_query_batch, prompt_query_head, prompt_query_row,
                        prompt_rows, prompt_rows + later_length, 128, PACKED, ALIGN, WIDE,
                    )  # fmt: skip
                    _prefetch_head(
                        key, prompt_key, later_batch, later_head, key_batch, key_head, key_row,
                        prompt_key_batch, prompt_key_head, prompt_key_row, prompts, prompts + later_length,
                        128, PACKED, ALIGN, WIDE,
                    )  # fmt: skip
                    _prefetch_head(
                        value, prompt_value, later_batch, later_head, value_batch, value_head, value_row,
                        prompt_value_batch, prompt_value_head, prompt_value_row, prompts, prompts + later_length,
                        128, PACKED, ALIGN, WIDE,
                    )  # fmt: skip
                if AHEAD & 2:
                    _prefetch_head(
                        grad, prompt_grad, later_batch, later_head, grad_batch, grad_head, grad_row,
                        prompt_grad_batch, prompt_grad_head, prompt_grad_row, prompt_rows, prompt_rows + later_length,
                        128, PACKED, ALIGN, WIDE,
                    )  # fmt: skip
                    _prefetch_head(
                        output, prompt_output, later_batch, later_head, output_batch, output_head, output_row,
                        prompt_output_batch, prompt_output_head, prompt_output_row,
                        prompt_rows, prompt_rows + later_length, 128, PACKED, ALIGN, WIDE,
                    )  # fmt: skip
    if not LOOP:
        tl.debug_barrier()  # the sums above are finished, and their registers free, before the first product
    for key_tile in tl.static_range(KEY_TILES):
        columns = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        if TURNED and not BY_KEYS:
            d_keys = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
            d_values = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
        else:
            d_keys = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            d_values = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        added = ()
        for tile in tl.static_range(ROW_TILES):
            rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
            limit = row_limits(rows, prompt_rows, prompts, length, CAUSAL, PREFIX)  # [BLOCK_M]
            d_query_tile = d_queries[tile]
            if not SKIP or sees(
                tile * BLOCK_M, tile * BLOCK_M + BLOCK_M, key_tile * BLOCK_N, prompt_rows, prompts, length,
                CAUSAL, PREFIX,
            ):  # fmt: skip
                if BY_KEYS:
                    d_query_tile, d_keys, d_values = keys_tile(
                        queries[tile], grads[tile], keys[key_tile], values[key_tile], statistics[tile],
                        deltas[tile], limit, columns, d_query_tile, d_keys, d_values, scale,
                        TURNED, NEGATE, PRECISION,
                    )  # fmt: skip
                else:
                    d_query_tile, d_keys, d_values = rows_tile(
                        queries[tile], grads[tile], keys[key_tile], values[key_tile], statistics[tile],
                        deltas[tile], limit, columns, d_query_tile, d_keys, d_values, scale,
                        TURNED, NEGATE, PRECISION,
                    )  # fmt: skip
            added += (d_query_tile,)
        d_queries = added
        if TURNED and not BY_KEYS:
            d_keys = tl.trans(d_keys)
            d_values = tl.trans(d_values)
        store_tile(
            d_prompt_value_base, d_value_base, d_values, columns, key_split, prompts + tokens,
            d_prompt_value_row, d_value_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE,
        )  # fmt: skip
        store_tile(
            d_prompt_key_base, d_key_base, d_keys * factor, columns, key_split, prompts + tokens,
            d_prompt_key_row, d_key_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE,
        )  # fmt: skip
    for tile in tl.static_range(ROW_TILES):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        d_query_tile = d_queries[tile]
        if BY_KEYS and TURNED:
            d_query_tile = tl.trans(d_query_tile)
        store_tile(
            d_prompt_query_base, d_query_base, tl.where((rows < live)[:, None], d_query_tile * factor, 0.0),
            rows, row_split, row_count, d_prompt_query_row, d_query_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE,
        )  # fmt: skip


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
        "heads", "tokens", "prompts", "prompt_rows", "total", "step", "ahead", "scale", "factor",
    ]
)  # fmt: skip
def _short_kernel(
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
    d_query,  # (B, H, N, D) or None (not wanted), as are d_key, d_value
    d_prompt_query,  # (B, H, P, D) or None (not wanted), as are d_prompt_key, d_prompt_value
    d_key,
    d_value,
    d_prompt_key,
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
    total,  # B * H
    step,  # programs of the launch
    ahead,  # the head that is brought to the L2 cache lies so many further on
    scale,  # |scale| * log2(e)
    factor,  # scale
    BLOCK_M: tl.constexpr,  # rows of a tile, and how many tiles there are
    ROW_TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,  # keys of a tile, and how many tiles there are
    KEY_TILES: tl.constexpr,
    BY_KEYS: tl.constexpr,  # score tiles are [keys, rows]
    TURNED: tl.constexpr,  # what has BLOCK_M or BLOCK_N rows less than a warp group multiplies is summed as [D, rows]
    SKIP: tl.constexpr,  # tiles that nobody sees are left out
    PACKED: tl.constexpr,  # tokens lie behind prompts, row after row, in every tensor
    LOOP: tl.constexpr,  # head after head
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,  # what of a later head is brought to the L2 cache, as Variant.parts
    ONCE: tl.constexpr,  # what is read is not kept in the cache
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PREFIX: tl.constexpr,
    NEGATE: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: all gradients of one head, or of every ``step``-th one.  Grid: (step,)."""
    if LOOP:
        for later in tl.range(0, total - tl.program_id(0), step, num_stages=STAGES):
            _head(
                tl.program_id(0) + later,
                query, key, value, prompt_query, prompt_key, prompt_value, grad, prompt_grad, output, prompt_output,
                lse, d_query, d_prompt_query, d_key, d_value, d_prompt_key, d_prompt_value, lengths, query_batch,
                query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
                prompt_query_batch, prompt_query_head, prompt_query_row, prompt_key_batch, prompt_key_head,
                prompt_key_row, prompt_value_batch, prompt_value_head, prompt_value_row, grad_batch, grad_head,
                grad_row, prompt_grad_batch, prompt_grad_head, prompt_grad_row, output_batch, output_head,
                output_row, prompt_output_batch, prompt_output_head, prompt_output_row, d_query_batch, d_query_head,
                d_query_row, d_prompt_query_batch, d_prompt_query_head, d_prompt_query_row, d_key_batch, d_key_head,
                d_key_row, d_value_batch, d_value_head, d_value_row, d_prompt_key_batch, d_prompt_key_head,
                d_prompt_key_row, d_prompt_value_batch, d_prompt_value_head, d_prompt_value_row, heads, tokens,
                prompts, prompt_rows, total, step, ahead, scale, factor, BLOCK_M, ROW_TILES, BLOCK_N, KEY_TILES,
                BY_KEYS, TURNED, SKIP, PACKED, LOOP, STAGES, AHEAD, ONCE, HEAD_DIM, BLOCK_D,
                CAUSAL, PREFIX, NEGATE, ALIGN, WIDE, PRECISION,
            )  # fmt: skip
    else:
        _head(
            tl.program_id(0),
            query, key, value, prompt_query, prompt_key, prompt_value, grad, prompt_grad, output, prompt_output, lse,
            d_query, d_prompt_query, d_key, d_value, d_prompt_key, d_prompt_value, lengths, query_batch, query_head,
            query_row, key_batch, key_head, key_row, value_batch, value_head, value_row, prompt_query_batch,
            prompt_query_head, prompt_query_row, prompt_key_batch, prompt_key_head, prompt_key_row,
            prompt_value_batch, prompt_value_head, prompt_value_row, grad_batch, grad_head, grad_row,
            prompt_grad_batch, prompt_grad_head, prompt_grad_row, output_batch, output_head, output_row,
            prompt_output_batch, prompt_output_head, prompt_output_row, d_query_batch, d_query_head, d_query_row,
            d_prompt_query_batch, d_prompt_query_head, d_prompt_query_row, d_key_batch, d_key_head, d_key_row,
            d_value_batch, d_value_head, d_value_row, d_prompt_key_batch, d_prompt_key_head, d_prompt_key_row,
            d_prompt_value_batch, d_prompt_value_head, d_prompt_value_row, heads, tokens, prompts, prompt_rows,
            total, step, ahead, scale, factor, BLOCK_M, ROW_TILES, BLOCK_N, KEY_TILES, BY_KEYS, TURNED, SKIP, PACKED,
            LOOP, STAGES, AHEAD, ONCE, HEAD_DIM, BLOCK_D, CAUSAL, PREFIX, NEGATE, ALIGN, WIDE, PRECISION,
        )  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A form of the kernel.

    Attributes:
        rows, keys: the sides of a tile.
        by_keys: score tiles lie as [keys, rows], so that two of the products with them need no turning.
        turned: the remaining products are summed transposed, [head_dim, rows or keys], so that head_dim takes the side
            of a product that a warp group wants 64 long.
        skip: tiles that nobody sees are left out, by a branch.
        warps, registers: of a program; the most registers that a thread may have, or None.
        programs: how many there are a multiprocessor, each taking head after head; 0 for one a head.
        prefetch: a program asks for the rows of the head that lies so many heads a multiprocessor further on to be
            brought to the L2 cache while it multiplies its own; 0 for not (nor where the card is not NVIDIA's).
        parts: of what is brought to the L2 cache: 1 queries, keys and values, 2 gradients and outputs, 3 all.
        once: what is read is the first to leave the cache.
        stages: loads of so many heads are on their way at once.
    """

    rows: int
    keys: int
    by_keys: bool
    turned: bool
    warps: int
    skip: bool = False
    registers: int | None = None
    programs: int = 0
    prefetch: int = 0
    parts: int = 3
    once: bool = False
    stages: int = 1

    @property
    def options(self) -> dict[str, int]:
        """Launch options."""
        limit = {} if self.registers is None or torch.version.hip is not None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, **limit}


# Forms of 4 warps want the PTX assembler of CUDA 12.9 or later: that of 12.8, which Triton 3.6 takes for compute
# capability 9.0, runs out of uniform registers and hands some of the products the address of another tile.
DEFAULT = Variant(rows=128, keys=32, by_keys=False, turned=True, warps=8, skip=True, registers=128, prefetch=2)


def limits(query: Tensor, prompt_key: Tensor, needs: tuple[bool, ...]) -> str:
    """What of a call this kernel does not cover; the empty string if nothing."""
    if query.device.type == "cuda" and not _reads_shared_operands(query.device):
        return "a card that multiplies from registers alone; it takes compute capability 9.0 and later"
    head_dim = query.shape[3]
    if head_dim > MOST_HEAD_DIM:
        return f"head_dim {head_dim}; it takes at most {MOST_HEAD_DIM}"
    if query.dtype.itemsize != 2:
        return f"tensors of {query.dtype}; it takes 16-bit types"
    tokens, prompts = query.shape[2], prompt_key.shape[2]
    if tokens + prompts > MOST_ROWS:
        return f"{prompts} prompts and {tokens} tokens; it takes at most {MOST_ROWS} together"
    if not (needs[0] and any((*needs[1:3], *needs[4:]))):
        return (
            "gradients of the queries of tokens, or of all keys and values, are not wanted; other kernels do less then"
        )
    return ""


def short_backward(
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
    variant: Variant | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As :func:`triton_backward.prompt_attention_backward`, for at most 128 prompts and tokens together.

    Everything is computed, and what ``needs`` names is written.
    """
    inputs = (query, key, value, prompt_query, prompt_key, prompt_value)
    batch, heads, tokens, head_dim = query.shape
    prompts = prompt_key.shape[2]
    prompt_rows = 0 if prompt_query is None else prompts
    rows, keys = prompt_rows + tokens, prompts + tokens
    if keys > MOST_ROWS:
        raise ValueError(f"{prompts} prompts and {tokens} tokens; short_backward takes at most {MOST_ROWS} together")
    variant = variant or DEFAULT

    results: list[Tensor | None] = [None] * 6
    targets: list[Tensor | None] = [None] * 6
    for index, (source, needed) in enumerate(zip(inputs, needs, strict=True)):
        if not needed or source is None:
            continue
        given = None if grads is None else grads[index]
        if given is None:
            given = source.new_empty(source.shape[0], source.shape[2], heads, head_dim).transpose(1, 2)
        results[index] = targets[index] = given
        if source.shape[0] != batch:
            targets[index] = torch.empty(
                batch, heads, source.shape[2], head_dim, dtype=torch.float32, device=source.device
            )
    d_query, d_key, d_value, d_prompt_query, d_prompt_key, d_prompt_value = targets

    without_grads = grad_output is None and (grad_prompt_output is None or not prompt_rows)
    if without_grads or batch * heads * head_dim * keys == 0:
        for result in results:
            if result is not None:
                result.zero_()
        return tuple(results)  # pyright: ignore[reportReturnType]

    dtype = query.dtype
    width = padded(head_dim)
    grad_output, grad_prompt_output = _unit_last_stride(grad_output), _unit_last_stride(grad_prompt_output)
    if not prompt_rows:
        grad_prompt_output = None
    read = (*inputs, grad_output, grad_prompt_output, output, prompt_output)
    written = (d_query, d_prompt_query, d_key, d_value, d_prompt_key, d_prompt_value)
    layout = layout_of((*read, *written), dtype.itemsize)
    total = batch * heads
    step = total
    if variant.programs:
        step = min(total, variant.programs * _processors(query.device))
    ahead = 0
    compiled = query.device.type != "cpu" and torch.version.hip is None
    if variant.prefetch and compiled:
        ahead = variant.prefetch * _processors(query.device)
    constants = (
        variant.rows,
        -(-rows // variant.rows),
        variant.keys,
        -(-keys // variant.keys),
        variant.by_keys,
        variant.turned,
        variant.skip,
        _joined(read, written, prompts),
        variant.programs > 0,
        variant.stages,
        variant.parts * (ahead > 0),
        variant.once,
        head_dim,
        width,
        causal,
        prefix,
        scale < 0,
        layout.align,
        layout.wide,
        "ieee",
    )
    with _on_device(query):
        launch(
            _short_kernel,
            step,
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
                total,
                step,
                ahead,
                base_2(scale),
                float(scale),
                *constants,
            ),
            variant.options,
            facts_of(layout, (lse, lengths), (constants, variant.warps, variant.registers)),
        )
        for result, target in zip(results, targets, strict=True):
            if result is not None and target is not None and result is not target:
                result.copy_(target.sum(0, keepdim=True))
    return tuple(results)  # pyright: ignore[reportReturnType]


@functools.cache
def _reads_shared_operands(device: torch.device) -> bool:
    """Elsewhere queries, gradients, keys and values of a whole head would have to be in registers, and are spilled."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _joined(read: tuple[Tensor | None, ...], written: tuple[Tensor | None, ...], prompts: int) -> bool:
    """Whether everywhere the tokens lie behind the prompts, row after row: one address then serves both."""
    query, key, value, prompt_query, prompt_key, prompt_value, grad, prompt_grad, output, prompt_output = read
    d_query, d_prompt_query, d_key, d_value, d_prompt_key, d_prompt_value = written
    for tokens_of, prompts_of in (
        (query, prompt_query),
        (key, prompt_key),
        (value, prompt_value),
        (grad, prompt_grad),
        (output, prompt_output),
        (d_query, d_prompt_query),
        (d_key, d_prompt_key),
        (d_value, d_prompt_value),
    ):
        if tokens_of is None or prompts_of is None or tokens_of.shape[0] != prompts_of.shape[0]:
            return False
        stride = tokens_of.stride()
        behind = prompts * stride[2] * tokens_of.element_size()
        if (
            prompts_of.dtype != tokens_of.dtype
            or prompts_of.stride() != stride
            or prompts_of.data_ptr() + behind != tokens_of.data_ptr()
        ):
            return False
    return True


def _on_device(tensor: Tensor) -> AbstractContextManager[object]:
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _unit_last_stride(tensor: Tensor | None) -> Tensor | None:
    """Autograd may hand over any strides, those of an expanded scalar among them."""
    return tensor if tensor is None or tensor.stride(3) == 1 else tensor.contiguous()
