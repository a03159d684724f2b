"""Backward of attention in windows that share their sample's prompts.  No atomics.

- ``_whole_kernel``: a window with its prompts in one tile; all gradients of one head's windows, one after the other.
- ``_query_kernel``, ``_key_kernel``: larger windows; dq and delta over row tiles, then dk and dv over key tiles.

What the prompts' rows get is summed over the windows of a program in float32, and over programs by ``sum_shares``.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportAssignmentType=false, reportOptionalMemberAccess=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.cards import is_hopper, shared_memory
from epic_fast.kernels.common.plan import Tape, precision, unit_last_stride
from epic_fast.kernels.prompt_attention.triton_rows import (
    LOG2_E,
    empty_rows,
    facts_of,
    head_base,
    layout_of,
    load_rows,
    load_statistic,
    padded,
    store_rows,
)
from epic_fast.kernels.window_prompt_attention.tiles import (
    WHOLE_ROWS,
    WHOLE_WIDTH,
    BackwardTiles,
    WindowTile,
    backward_tiles,
)
from epic_fast.kernels.window_prompt_attention.triton_windows import (
    bias_of,
    pack_mask,
    positions,
    shares_of,
    sum_shares,
    visible,
    window_rows,
)

Needs = tuple[bool, bool, bool, bool, bool, bool, bool]


@triton.jit
def _scaled(
    grads,  # [BLOCK, BLOCK_D]
    rows,  # [BLOCK]
    prompts,
    mean,
):
    """Gradients of rows in one window: that of a mean is shared by its windows."""
    return tl.where((rows < prompts)[:, None], grads.to(tl.float32) * mean, grads.to(tl.float32)).to(grads.dtype)


@triton.jit
def _weights(
    queries,  # [BLOCK_M, BLOCK_D]
    keys,  # [BLOCK_N, BLOCK_D]
    position,  # [BLOCK_M or 1, BLOCK_N]
    statistic,  # [BLOCK_M]
    words,
    window,
    rows,  # [BLOCK_M]
    first_key,
    stop,
    scale,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the softmax gave, ``[BLOCK_M, BLOCK_N]``."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale + position  # [BLOCK_M, BLOCK_N]
    weights = tl.exp2(scores - statistic[:, None])
    if words is not None:
        weights = tl.where(visible(words, window, rows, first_key, stop, BLOCK_N), weights, 0.0)
    return weights


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
        "d_query_batch", "d_query_head", "d_query_row",
        "d_prompt_query_batch", "d_prompt_query_head", "d_prompt_query_row",
        "d_key_batch", "d_key_head", "d_key_row",
        "d_value_batch", "d_value_head", "d_value_row",
        "d_prompt_key_batch", "d_prompt_key_head", "d_prompt_key_row",
        "d_prompt_value_batch", "d_prompt_value_head", "d_prompt_value_row",
        "bias_head", "bias_row",
        "heads", "windows", "chunk", "tokens", "prompts", "scale", "factor", "mean",
    ]
)  # fmt: skip
def _whole_kernel(
    query,  # (B * nW, H, M, D), as are key, value
    key,
    value,
    prompt_query,  # (B, H, P, D), as are prompt_key, prompt_value
    prompt_key,
    prompt_value,
    grad,  # (B * nW, H, M, D) or None (zeros)
    prompt_grad,  # (B, H, P, D) or None (zeros)
    d_query,  # (B * nW, H, M, D) or None (not wanted), as are d_key, d_value
    d_prompt_query,  # (B * chunks, H, P, D), in any type, or None, as are d_prompt_key, d_prompt_value
    d_key,
    d_value,
    d_prompt_key,
    d_prompt_value,
    d_bias,  # (B * chunks, H, M, M) float32, contiguous, or None
    bias,  # (H, M, M) or None
    lse,  # (B * nW, H, R)
    words,  # (nW, R, W) int32 or None
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
    bias_head,
    bias_row,
    heads,
    windows,
    chunk,  # windows of a program
    tokens,
    prompts,
    scale,  # scale * log2(e)
    factor,  # scale
    mean,  # 1 / nW, of what comes in through the prompts' mean
    HOLD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: all gradients of one head in ``chunk`` windows of a sample.  Grid: (B * chunks * H,)."""
    NEED_QUERY: tl.constexpr = d_query is not None or d_prompt_query is not None
    NEED_KEY: tl.constexpr = d_key is not None or d_prompt_key is not None
    NEED_VALUE: tl.constexpr = d_value is not None or d_prompt_value is not None
    stop = prompts + tokens
    chunks = tl.cdiv(windows, chunk)
    head = (tl.program_id(0) % heads).to(tl.int64)
    rest = tl.program_id(0) // heads
    part = rest.to(tl.int64)
    batch = part // chunks
    first_window = (part % chunks).to(tl.int32) * chunk
    stop_window = tl.minimum(first_window + chunk, windows)

    rows = tl.arange(0, BLOCK_M)  # [BLOCK_M], of queries and of keys
    held_query = 0
    held_key = 0
    held_value = 0
    held_grad = 0
    if HOLD:
        own_query = head_base(prompt_query, batch, head, prompt_query_batch, prompt_query_head, ALIGN)
        held_query = load_rows(
            own_query, None, rows, prompts, prompts, prompt_query_row, 0, HEAD_DIM, BLOCK_D, True, ALIGN, WIDE
        )  # [BLOCK_M, BLOCK_D]
        own_key = head_base(prompt_key, batch, head, prompt_key_batch, prompt_key_head, ALIGN)
        held_key = load_rows(
            own_key, None, rows, prompts, prompts, prompt_key_row, 0, HEAD_DIM, BLOCK_D, True, ALIGN, WIDE
        )  # [BLOCK_M, BLOCK_D]
        own_value = head_base(prompt_value, batch, head, prompt_value_batch, prompt_value_head, ALIGN)
        held_value = load_rows(
            own_value, None, rows, prompts, prompts, prompt_value_row, 0, HEAD_DIM, BLOCK_D, True, ALIGN, WIDE
        )  # [BLOCK_M, BLOCK_D]
        if prompt_grad is not None:
            own_grad = head_base(prompt_grad, batch, head, prompt_grad_batch, prompt_grad_head, ALIGN)
            held_grad = load_rows(
                own_grad, None, rows, prompts, prompts, prompt_grad_row, 0, HEAD_DIM, BLOCK_D, True, ALIGN, WIDE
            )  # [BLOCK_M, BLOCK_D]
            held_grad = _scaled(held_grad, rows, prompts, mean)
    position = positions(bias, head, rows, tl.arange(0, BLOCK_N), prompts, stop, bias_head, bias_row)
    # Of these the prompts' rows are looked at in the end.
    query_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    key_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    score_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for window in tl.range(first_window, stop_window, num_stages=STAGES):
        index = batch * windows + window
        queries = window_rows(
            held_query,
            prompt_query,
            query,
            batch,
            index,
            head,
            rows,
            prompts,
            stop,
            prompt_query_batch,
            prompt_query_head,
            prompt_query_row,
            query_batch,
            query_head,
            query_row,
            HOLD,
            HEAD_DIM,
            BLOCK_D,
            ALIGN,
            WIDE,
        )  # [BLOCK_M, BLOCK_D]
        keys = window_rows(
            held_key,
            prompt_key,
            key,
            batch,
            index,
            head,
            rows,
            prompts,
            stop,
            prompt_key_batch,
            prompt_key_head,
            prompt_key_row,
            key_batch,
            key_head,
            key_row,
            HOLD,
            HEAD_DIM,
            BLOCK_D,
            ALIGN,
            WIDE,
        )  # [BLOCK_N, BLOCK_D]
        grads = window_rows(
            held_grad,
            prompt_grad,
            grad,
            batch,
            index,
            head,
            rows,
            prompts,
            stop,
            prompt_grad_batch,
            prompt_grad_head,
            prompt_grad_row,
            grad_batch,
            grad_head,
            grad_row,
            HOLD,
            HEAD_DIM,
            BLOCK_D,
            ALIGN,
            WIDE,
        )  # [BLOCK_M, BLOCK_D]
        if not HOLD and prompt_grad is not None:
            grads = _scaled(grads, rows, prompts, mean)
        statistic = tl.load(lse + (index * heads + head) * stop + rows, mask=rows < stop, other=float("inf"))
        weights = _weights(
            queries, keys, position, statistic, words, window, rows, 0, stop, scale, BLOCK_N, PRECISION
        )  # [BLOCK_M, BLOCK_N]
        if NEED_VALUE:
            d_values = tl.dot(tl.trans(weights.to(grads.dtype)), grads, input_precision=PRECISION)
            if d_value is not None:
                own_d_value = head_base(d_value, index, head, d_value_batch, d_value_head, ALIGN)
                store_rows(
                    None, own_d_value, d_values, rows, prompts, stop, 0, d_value_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE
                )
            if d_prompt_value is not None:
                value_sum += d_values
        if NEED_QUERY or NEED_KEY or d_bias is not None:
            values = window_rows(
                held_value,
                prompt_value,
                value,
                batch,
                index,
                head,
                rows,
                prompts,
                stop,
                prompt_value_batch,
                prompt_value_head,
                prompt_value_row,
                value_batch,
                value_head,
                value_row,
                HOLD,
                HEAD_DIM,
                BLOCK_D,
                ALIGN,
                WIDE,
            )  # [BLOCK_N, BLOCK_D]
            grad_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            # The output of a prompt in one window is kept nowhere, so this sum is not taken from the output.
            delta = tl.sum(weights * grad_weights, 1)  # [BLOCK_M]
            grad_scores = weights * (grad_weights - delta[:, None])  # [BLOCK_M, BLOCK_N]
            if d_bias is not None:
                score_sum += grad_scores
            low = grad_scores.to(queries.dtype)
            if NEED_KEY:
                d_keys = tl.dot(tl.trans(low), queries, input_precision=PRECISION) * factor  # [BLOCK_N, BLOCK_D]
                if d_key is not None:
                    own_d_key = head_base(d_key, index, head, d_key_batch, d_key_head, ALIGN)
                    store_rows(
                        None, own_d_key, d_keys, rows, prompts, stop, 0, d_key_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE
                    )
                if d_prompt_key is not None:
                    key_sum += d_keys
            if NEED_QUERY:
                d_queries = tl.dot(low, keys, input_precision=PRECISION) * factor  # [BLOCK_M, BLOCK_D]
                if d_query is not None:
                    own_d_query = head_base(d_query, index, head, d_query_batch, d_query_head, ALIGN)
                    store_rows(
                        None,
                        own_d_query,
                        d_queries,
                        rows,
                        prompts,
                        stop,
                        0,
                        d_query_row,
                        HEAD_DIM,
                        BLOCK_D,
                        ALIGN,
                        WIDE,
                    )
                if d_prompt_query is not None:
                    query_sum += d_queries
    if d_prompt_query is not None:
        own_query = head_base(d_prompt_query, part, head, d_prompt_query_batch, d_prompt_query_head, ALIGN)
        store_rows(
            own_query, None, query_sum, rows, prompts, prompts, d_prompt_query_row, 0, HEAD_DIM, BLOCK_D, ALIGN, WIDE
        )
    if d_prompt_key is not None:
        own_key = head_base(d_prompt_key, part, head, d_prompt_key_batch, d_prompt_key_head, ALIGN)
        store_rows(own_key, None, key_sum, rows, prompts, prompts, d_prompt_key_row, 0, HEAD_DIM, BLOCK_D, ALIGN, WIDE)
    if d_prompt_value is not None:
        own_value = head_base(d_prompt_value, part, head, d_prompt_value_batch, d_prompt_value_head, ALIGN)
        store_rows(
            own_value, None, value_sum, rows, prompts, prompts, d_prompt_value_row, 0, HEAD_DIM, BLOCK_D, ALIGN, WIDE
        )
    if d_bias is not None:
        columns = tl.arange(0, BLOCK_N)  # [BLOCK_N]
        own_bias = d_bias + (part * heads + head) * tokens * tokens
        offset = (rows - prompts)[:, None] * tokens + (columns - prompts)[None, :]
        of_tokens = ((rows >= prompts) & (rows < stop))[:, None] & ((columns >= prompts) & (columns < stop))[None, :]
        tl.store(own_bias + offset, score_sum, mask=of_tokens)


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
        "d_query_batch", "d_query_head", "d_query_row",
        "d_prompt_query_batch", "d_prompt_query_head", "d_prompt_query_row",
        "bias_head", "bias_row",
        "heads", "windows", "chunk", "tokens", "prompts", "scale", "factor", "mean",
    ]
)  # fmt: skip
def _query_kernel(
    query,  # (B * nW, H, M, D), as are key, value
    key,
    value,
    prompt_query,  # (B, H, P, D), as are prompt_key, prompt_value
    prompt_key,
    prompt_value,
    grad,  # (B * nW, H, M, D) or None (zeros)
    prompt_grad,  # (B, H, P, D) or None (zeros)
    d_query,  # (B * nW, H, M, D) or None (not wanted)
    d_prompt_query,  # (B * chunks, H, P, D), in any type, or None
    bias,  # (H, M, M) or None
    lse,  # (B * nW, H, R)
    delta,  # (B * nW, H, R), written, or None
    words,  # (nW, R, W) int32 or None
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
    d_query_batch,
    d_query_head,
    d_query_row,
    d_prompt_query_batch,
    d_prompt_query_head,
    d_prompt_query_row,
    bias_head,
    bias_row,
    heads,
    windows,
    chunk,  # windows of a program
    tokens,
    prompts,
    scale,  # scale * log2(e)
    factor,  # scale
    mean,  # 1 / nW, of what comes in through the prompts' mean
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: dq and delta of one row tile of one head in some windows.  Grid: (B * chunks * row tiles * H,)."""
    NEED_QUERY: tl.constexpr = d_query is not None or d_prompt_query is not None
    stop = prompts + tokens
    chunks = tl.cdiv(windows, chunk)
    head = (tl.program_id(0) % heads).to(tl.int64)
    rest = tl.program_id(0) // heads
    tiles = tl.cdiv(stop, BLOCK_M)
    first = (rest % tiles) * BLOCK_M
    part = (rest // tiles).to(tl.int64)
    batch = part // chunks
    first_window = (part % chunks).to(tl.int32) * chunk
    stop_window = tl.minimum(first_window + chunk, windows)

    rows = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    query_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for window in range(first_window, stop_window):
        index = batch * windows + window
        queries = window_rows(
            0,
            prompt_query,
            query,
            batch,
            index,
            head,
            rows,
            prompts,
            stop,
            prompt_query_batch,
            prompt_query_head,
            prompt_query_row,
            query_batch,
            query_head,
            query_row,
            False,
            HEAD_DIM,
            BLOCK_D,
            ALIGN,
            WIDE,
        )  # [BLOCK_M, BLOCK_D]
        grads = window_rows(
            0,
            prompt_grad,
            grad,
            batch,
            index,
            head,
            rows,
            prompts,
            stop,
            prompt_grad_batch,
            prompt_grad_head,
            prompt_grad_row,
            grad_batch,
            grad_head,
            grad_row,
            False,
            HEAD_DIM,
            BLOCK_D,
            ALIGN,
            WIDE,
        )  # [BLOCK_M, BLOCK_D]
        if prompt_grad is not None:
            grads = _scaled(grads, rows, prompts, mean)
        statistics = (index * heads + head) * stop
        statistic = tl.load(lse + statistics + rows, mask=rows < stop, other=float("inf"))  # [BLOCK_M]
        sums = tl.zeros([BLOCK_M], tl.float32)
        for first_key in tl.range(0, stop, BLOCK_N, num_stages=STAGES):
            columns = first_key + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            keys = window_rows(
                0,
                prompt_key,
                key,
                batch,
                index,
                head,
                columns,
                prompts,
                stop,
                prompt_key_batch,
                prompt_key_head,
                prompt_key_row,
                key_batch,
                key_head,
                key_row,
                False,
                HEAD_DIM,
                BLOCK_D,
                ALIGN,
                WIDE,
            )  # [BLOCK_N, BLOCK_D]
            values = window_rows(
                0,
                prompt_value,
                value,
                batch,
                index,
                head,
                columns,
                prompts,
                stop,
                prompt_value_batch,
                prompt_value_head,
                prompt_value_row,
                value_batch,
                value_head,
                value_row,
                False,
                HEAD_DIM,
                BLOCK_D,
                ALIGN,
                WIDE,
            )  # [BLOCK_N, BLOCK_D]
            position = positions(bias, head, rows, columns, prompts, stop, bias_head, bias_row)
            weights = _weights(
                queries, keys, position, statistic, words, window, rows, first_key, stop, scale, BLOCK_N, PRECISION
            )  # [BLOCK_M, BLOCK_N]
            sums += tl.sum(weights * tl.dot(grads, tl.trans(values), input_precision=PRECISION), 1)
        if delta is not None:
            tl.store(delta + statistics + rows, sums, mask=rows < stop)
        if NEED_QUERY:
            accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for first_key in tl.range(0, stop, BLOCK_N, num_stages=STAGES):
                columns = first_key + tl.arange(0, BLOCK_N)  # [BLOCK_N]
                keys = window_rows(
                    0,
                    prompt_key,
                    key,
                    batch,
                    index,
                    head,
                    columns,
                    prompts,
                    stop,
                    prompt_key_batch,
                    prompt_key_head,
                    prompt_key_row,
                    key_batch,
                    key_head,
                    key_row,
                    False,
                    HEAD_DIM,
                    BLOCK_D,
                    ALIGN,
                    WIDE,
                )  # [BLOCK_N, BLOCK_D]
                values = window_rows(
                    0,
                    prompt_value,
                    value,
                    batch,
                    index,
                    head,
                    columns,
                    prompts,
                    stop,
                    prompt_value_batch,
                    prompt_value_head,
                    prompt_value_row,
                    value_batch,
                    value_head,
                    value_row,
                    False,
                    HEAD_DIM,
                    BLOCK_D,
                    ALIGN,
                    WIDE,
                )  # [BLOCK_N, BLOCK_D]
                position = positions(bias, head, rows, columns, prompts, stop, bias_head, bias_row)
                weights = _weights(
                    queries,
                    keys,
                    position,
                    statistic,
                    words,
                    window,
                    rows,
                    first_key,
                    stop,
                    scale,
                    BLOCK_N,
                    PRECISION,
                )  # [BLOCK_M, BLOCK_N]
                grad_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
                grad_scores = weights * (grad_weights - sums[:, None])
                accumulator = tl.dot(grad_scores.to(keys.dtype), keys, accumulator, input_precision=PRECISION)
            accumulator *= factor
            if d_query is not None:
                own_d_query = head_base(d_query, index, head, d_query_batch, d_query_head, ALIGN)
                store_rows(
                    None, own_d_query, accumulator, rows, prompts, stop, 0, d_query_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE
                )
            query_sum += accumulator
    if d_prompt_query is not None:
        own_query = head_base(d_prompt_query, part, head, d_prompt_query_batch, d_prompt_query_head, ALIGN)
        store_rows(
            own_query, None, query_sum, rows, prompts, prompts, d_prompt_query_row, 0, HEAD_DIM, BLOCK_D, ALIGN, WIDE
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
        "d_key_batch", "d_key_head", "d_key_row",
        "d_value_batch", "d_value_head", "d_value_row",
        "d_prompt_key_batch", "d_prompt_key_head", "d_prompt_key_row",
        "d_prompt_value_batch", "d_prompt_value_head", "d_prompt_value_row",
        "bias_head", "bias_row",
        "heads", "windows", "chunk", "tokens", "prompts", "scale", "factor", "mean",
    ]
)  # fmt: skip
def _key_kernel(
    query,  # (B * nW, H, M, D), as are key, value
    key,
    value,
    prompt_query,  # (B, H, P, D), as are prompt_key, prompt_value
    prompt_key,
    prompt_value,
    grad,  # (B * nW, H, M, D) or None (zeros)
    prompt_grad,  # (B, H, P, D) or None (zeros)
    d_key,  # (B * nW, H, M, D) or None (not wanted), as is d_value
    d_value,
    d_prompt_key,  # (B * chunks, H, P, D), in any type, or None, as is d_prompt_value
    d_prompt_value,
    bias,  # (H, M, M) or None
    lse,  # (B * nW, H, R)
    delta,  # (B * nW, H, R); None if dk is not wanted
    words,  # (nW, R, W) int32 or None
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
    bias_head,
    bias_row,
    heads,
    windows,
    chunk,  # windows of a program
    tokens,
    prompts,
    scale,  # scale * log2(e)
    factor,  # scale
    mean,  # 1 / nW, of what comes in through the prompts' mean
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: dk and dv of one key tile of one head in some windows.  Grid: (B * chunks * key tiles * H,)."""
    NEED_KEY: tl.constexpr = d_key is not None or d_prompt_key is not None
    NEED_VALUE: tl.constexpr = d_value is not None or d_prompt_value is not None
    stop = prompts + tokens
    chunks = tl.cdiv(windows, chunk)
    head = (tl.program_id(0) % heads).to(tl.int64)
    rest = tl.program_id(0) // heads
    tiles = tl.cdiv(stop, BLOCK_N)
    first = (rest % tiles) * BLOCK_N
    part = (rest // tiles).to(tl.int64)
    batch = part // chunks
    first_window = (part % chunks).to(tl.int32) * chunk
    stop_window = tl.minimum(first_window + chunk, windows)

    columns = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    key_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for window in range(first_window, stop_window):
        index = batch * windows + window
        keys = window_rows(
            0,
            prompt_key,
            key,
            batch,
            index,
            head,
            columns,
            prompts,
            stop,
            prompt_key_batch,
            prompt_key_head,
            prompt_key_row,
            key_batch,
            key_head,
            key_row,
            False,
            HEAD_DIM,
            BLOCK_D,
            ALIGN,
            WIDE,
        )  # [BLOCK_N, BLOCK_D]
        values = window_rows(
            0,
            prompt_value,
            value,
            batch,
            index,
            head,
            columns,
            prompts,
            stop,
            prompt_value_batch,
            prompt_value_head,
            prompt_value_row,
            value_batch,
            value_head,
            value_row,
            False,
            HEAD_DIM,
            BLOCK_D,
            ALIGN,
            WIDE,
        )  # [BLOCK_N, BLOCK_D]
        statistics = (index * heads + head) * stop
        d_keys = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        d_values = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for first_row in tl.range(0, stop, BLOCK_M, num_stages=STAGES):
            rows = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
            queries = window_rows(
                0,
                prompt_query,
                query,
                batch,
                index,
                head,
                rows,
                prompts,
                stop,
                prompt_query_batch,
                prompt_query_head,
                prompt_query_row,
                query_batch,
                query_head,
                query_row,
                False,
                HEAD_DIM,
                BLOCK_D,
                ALIGN,
                WIDE,
            )  # [BLOCK_M, BLOCK_D]
            grads = window_rows(
                0,
                prompt_grad,
                grad,
                batch,
                index,
                head,
                rows,
                prompts,
                stop,
                prompt_grad_batch,
                prompt_grad_head,
                prompt_grad_row,
                grad_batch,
                grad_head,
                grad_row,
                False,
                HEAD_DIM,
                BLOCK_D,
                ALIGN,
                WIDE,
            )  # [BLOCK_M, BLOCK_D]
            if prompt_grad is not None:
                grads = _scaled(grads, rows, prompts, mean)
            statistic = load_statistic(lse + statistics, rows, stop, float("inf"))  # [BLOCK_M]
            position = positions(bias, head, rows, columns, prompts, stop, bias_head, bias_row)
            weights = _weights(
                queries, keys, position, statistic, words, window, rows, first, stop, scale, BLOCK_N, PRECISION
            )  # [BLOCK_M, BLOCK_N]
            if NEED_VALUE:
                d_values = tl.dot(
                    tl.trans(weights.to(grads.dtype)), grads, d_values, input_precision=PRECISION
                )  # [BLOCK_N, BLOCK_D]
            if NEED_KEY:
                sums = load_statistic(delta + statistics, rows, stop, 0.0)  # [BLOCK_M]
                grad_weights = tl.dot(grads, tl.trans(values), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
                grad_scores = (weights * (grad_weights - sums[:, None])).to(queries.dtype)
                d_keys = tl.dot(tl.trans(grad_scores), queries, d_keys, input_precision=PRECISION)
        d_keys *= factor
        if d_key is not None:
            own_d_key = head_base(d_key, index, head, d_key_batch, d_key_head, ALIGN)
            store_rows(None, own_d_key, d_keys, columns, prompts, stop, 0, d_key_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE)
        if d_value is not None:
            own_d_value = head_base(d_value, index, head, d_value_batch, d_value_head, ALIGN)
            store_rows(
                None, own_d_value, d_values, columns, prompts, stop, 0, d_value_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE
            )
        key_sum += d_keys
        value_sum += d_values
    if d_prompt_key is not None:
        own_key = head_base(d_prompt_key, part, head, d_prompt_key_batch, d_prompt_key_head, ALIGN)
        store_rows(
            own_key, None, key_sum, columns, prompts, prompts, d_prompt_key_row, 0, HEAD_DIM, BLOCK_D, ALIGN, WIDE
        )
    if d_prompt_value is not None:
        own_value = head_base(d_prompt_value, part, head, d_prompt_value_batch, d_prompt_value_head, ALIGN)
        store_rows(
            own_value, None, value_sum, columns, prompts, prompts, d_prompt_value_row, 0, HEAD_DIM, BLOCK_D, ALIGN, WIDE
        )


def window_prompt_attention_backward(
    grad_output: Tensor | None,
    grad_prompt_output: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    relative_position_bias: Tensor | None,
    window_mask: Tensor | None,
    lse: Tensor,
    *,
    scale: float,
    needs: Needs,
    grads: tuple[Tensor | None, ...] | None = None,
    tiles: BackwardTiles | None = None,
) -> tuple[Tensor | None, ...]:
    """Launch the backward: gradients of query, key, value, prompt_query, prompt_key, prompt_value and the bias.

    A gradient of an output that is None counts as zeros.  Only what ``needs`` names is computed and allocated, the
    rest is None.  The bias's gradient is there for windows that one program holds whole.  ``grads`` may give tensors to
    write the first six into.
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
            relative_position_bias,
            window_mask,
            lse,
            *(() if grads is None else grads),
        ),
        (float(scale), needs, precision(query.dtype), tiles),
    )


def backward(
    tape: Tape,
    grad_output: Tensor | None,
    grad_prompt_output: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    lse: Tensor,
    *grads_and_options: Any,
) -> tuple[Tensor | None, ...]:
    """:func:`window_prompt_attention_backward` on a tape: six ``grads`` or none, then the options in their order."""
    *given, scale, needs, precision, tiles = grads_and_options
    inputs = (query, key, value, prompt_query, prompt_key, prompt_value)
    rows, heads, tokens, head_dim = query.shape
    batch, _, prompts, _ = prompt_query.shape
    count = prompts + tokens
    results: list[Tensor | None] = [
        None if not needed else empty_rows(tape, each) if own is None else own
        for each, needed, own in zip(inputs, needs[:6], given or (None,) * 6, strict=True)
    ]
    needs_bias = bias is not None and needs[6]
    d_bias = tape.empty(bias.shape, bias.dtype) if bias is not None and needs_bias else None
    results.append(d_bias)
    if (grad_output is None and (grad_prompt_output is None or not prompts)) or not rows * heads * count * head_dim:
        for result in results:
            if result is not None:
                tape.apply(Tensor.zero_, result)
        return tuple(results)
    windows = rows // batch
    itemsize, width = query.dtype.itemsize, padded(head_dim)
    if tiles is None:
        tiles = backward_tiles(width, itemsize, count, is_hopper(query.device), shared_memory(query.device))
    bias, bias_strides = bias_of(tape, bias)
    words = pack_mask(tape, mask, prompts)
    read = (*inputs, unit_last_stride(tape, grad_output), unit_last_stride(tape, grad_prompt_output))
    factors = (scale * LOG2_E, float(scale), 1 / windows)

    def launch(
        kernel: Any,
        tile: WindowTile,
        tiles_of_head: int,
        written: list[Tensor | None],
        others: tuple[Any, ...],
        *more: Any,
    ) -> None:
        layout = layout_of((*read, *written), itemsize)
        integers = (*bias_strides, heads, windows, min(tile.windows, windows), tokens, prompts)
        flags = (head_dim, width, layout.align, layout.wide, precision)
        constants = (*more, tile.rows, tile.keys, tile.stages, *flags)
        tape.launch(
            kernel,
            batch * _chunks(tile, windows) * tiles_of_head * heads,
            (*read, *written, *others, *layout.strides, *integers, *factors, *constants),
            tile.options,
            facts_of(layout, others, (constants, tile.warps, tile.registers), integers),
        )

    tile = tiles.bias if needs_bias else tiles.whole
    if tile is not None and tile.whole(count):
        chunks = _chunks(tile, windows)
        shares = shares_of(tape, results[3:6], chunks)
        bias_share = None
        if needs_bias:
            bias_share = tape.empty((batch * chunks, heads, tokens, tokens), torch.float32)
        written = [results[0], shares[0], results[1], results[2], *shares[1:]]
        if any(each is not None for each in written) or needs_bias:
            launch(_whole_kernel, tile, 1, written, (bias_share, bias, lse, words), tile.hold)
            sum_shares(tape, results[3:6], shares, chunks)
        if d_bias is not None and bias_share is not None:
            tape.apply(_sum_samples, d_bias, bias_share)
        return tuple(results)

    if needs_bias:
        raise ValueError(
            f"window_prompt_attention_backward: the gradient of relative_position_bias needs windows that one program "
            f"holds whole; got {count} rows of head_dim {head_dim}; wanted at most {WHOLE_ROWS} of {WHOLE_WIDTH}"
        )
    wants_key = results[1] is not None or results[4] is not None
    wants_value = results[2] is not None or results[5] is not None
    delta = tape.scratch(lse.shape, torch.float32) if wants_key else None
    if wants_key or results[0] is not None or results[3] is not None:
        tile = tiles.query
        chunks = _chunks(tile, windows)
        shares = shares_of(tape, results[3:4], chunks)
        launch(_query_kernel, tile, -(-count // tile.rows), [results[0], shares[0]], (bias, lse, delta, words))
        sum_shares(tape, results[3:4], shares, chunks)
    if wants_key or wants_value:
        tile = tiles.key
        chunks = _chunks(tile, windows)
        shares = shares_of(tape, results[4:6], chunks)
        launch(_key_kernel, tile, -(-count // tile.keys), [*results[1:3], *shares], (bias, lse, delta, words))
        sum_shares(tape, results[4:6], shares, chunks)
    return tuple(results)


def _chunks(tile: WindowTile, windows: int) -> int:
    return -(-windows // min(tile.windows, windows))


def _sum_samples(result: Tensor, shares: Tensor) -> None:
    result.copy_(shares.sum(0))
