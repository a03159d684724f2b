"""Attention over infused keys and values, backward, in at most three launches.  No atomics.

- ``_row_kernel`` owns a row tile of a query head: dq, what its rows add to the gradients of the vectors, and the number
  a row that the key kernel needs.
- ``_key_kernel`` owns a key tile of a key head and visits the query heads of its group in order: dk and dv.
- ``_vector_kernel`` adds what the row tiles and query heads of a key head found, in order.  Where there is only one of
  them, ``_row_kernel`` has written the gradients already.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportAssignmentType=false, reportOptionalMemberAccess=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.cards import shared_memory
from epic_fast.kernels.common.launch import facts_of as plain_facts_of
from epic_fast.kernels.common.plan import Tape, precision, unit_last_stride
from epic_fast.kernels.common.rows import contiguous
from epic_fast.kernels.infused_attention.tiles import BackwardTiles, backward_tiles, size_class
from epic_fast.kernels.infused_attention.triton_infusion import (
    channel_factor,
    load_scaled_rows,
    load_token_rows,
    load_vector,
    vectors_on,
)
from epic_fast.kernels.prompt_attention.triton_rows import (
    base_2,
    empty_rows,
    facts_of,
    head_base,
    layout_of,
    load_statistic,
    padded,
    row_limits,
    store_rows,
    valid_tokens,
)


@triton.jit
def _store_vector(
    target,  # (B, Hk, D), contiguous, or None
    vector,  # [BLOCK_D]
    slot,  # b * Hk + head
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    if target is not None:
        columns = tl.arange(0, BLOCK_D)
        tl.store(target + slot * HEAD_DIM + columns, vector.to(target.dtype.element_ty), mask=columns < HEAD_DIM)


@triton.jit
def _weights(
    queries,  # [BLOCK_M, BLOCK_D]
    keys,  # [BLOCK_N, BLOCK_D]
    columns,  # [BLOCK_N]
    limit,  # [BLOCK_M]
    statistic,  # [BLOCK_M], +inf for rows that see nothing
    scale,
    PRECISION: tl.constexpr,
):
    """The softmax's weights again, ``[BLOCK_M, BLOCK_N]``."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    weights = tl.exp2(scores * scale - statistic[:, None])
    return tl.where(columns[None, :] < limit[:, None], weights, 0.0)


@triton.jit(
    do_not_specialize=[
        "grad_batch",
        "grad_head",
        "grad_row",
        "query_batch",
        "query_head",
        "query_row",
        "key_batch",
        "key_head",
        "key_row",
        "value_batch",
        "value_head",
        "value_row",
        "d_query_batch",
        "d_query_head",
        "d_query_row",
        "key_multiplier_batch",
        "key_multiplier_head",
        "value_multiplier_batch",
        "value_multiplier_head",
        "value_shift_batch",
        "value_shift_head",
        "gate_batch",
        "gate_head",
        "heads",
        "group",
        "rows",
        "tokens",
        "scale",
        "slope",
    ]
)
def _row_kernel(
    grad,  # (B, H, R, D), as is query
    query,
    key,  # (B, Hk, N, D), as is value
    value,
    d_query,  # (B, H, R, D), written, or None
    key_multiplier,  # (B, Hk, D), as are value_multiplier, value_shift
    value_multiplier,
    value_shift,
    gate,  # (B, Hk)
    lse,  # (B, H, R) float32
    lengths,  # (B,) or None
    deltas,  # (B, H, R) float32, written, or None
    parts,  # (B, H, row tiles, 3, D) float32, written, or None; then the four gradients below are None
    d_key_multiplier,  # as the vectors, contiguous, written, or None
    d_value_multiplier,
    d_value_shift,
    d_gate,
    grad_batch,  # strides of the dimensions batch, head, row, in units of ALIGN elements
    grad_head,
    grad_row,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    d_query_batch,
    d_query_head,
    d_query_row,
    key_multiplier_batch,  # strides of the dimensions batch, head, in elements
    key_multiplier_head,
    value_multiplier_batch,
    value_multiplier_head,
    value_shift_batch,
    value_shift_head,
    gate_batch,
    gate_head,
    heads,
    group,
    rows,
    tokens,
    scale,  # |scale| * log2(e)
    slope,  # |scale|
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    SCORES: tl.constexpr,  # whether anything goes back through the softmax to the queries
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    REPLACE: tl.constexpr,
    NEGATE: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one row tile of one query head.  Grid: (row tiles * B * H,)."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    first = (program % row_tiles) * BLOCK_M
    batch_head = program // row_tiles
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    key_side = head // group
    length = valid_tokens(lengths, batch, tokens)
    grad = head_base(grad, batch, head, grad_batch, grad_head, ALIGN)
    query = head_base(query, batch, head, query_batch, query_head, ALIGN)
    key = head_base(key, batch, key_side, key_batch, key_head, ALIGN)
    value = head_base(value, batch, key_side, value_batch, value_head, ALIGN)

    amount = tl.load(gate + batch * gate_batch + key_side * gate_head).to(tl.float32)
    of_key = load_vector(
        key_multiplier, batch, key_side, key_multiplier_batch, key_multiplier_head, HEAD_DIM, BLOCK_D
    )  # [BLOCK_D]
    key_factor = channel_factor(of_key, amount, REPLACE)
    if NEGATE:
        key_factor = -key_factor

    own = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_stop = tl.minimum(length, rows)
    limit = row_limits(own, 0, 0, length, CAUSAL, False)  # [BLOCK_M]
    stop = length
    if CAUSAL:
        stop = tl.minimum(first + BLOCK_M, length)
    queries = load_scaled_rows(query, key_factor, own, row_stop, query_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE)
    statistic = load_statistic(lse + batch_head.to(tl.int64) * rows, own, row_stop, float("inf"))  # [BLOCK_M]

    # The output before its affine map.
    plain = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first_key in tl.range(0, stop, BLOCK_N, num_stages=STAGES):
        columns = first_key + tl.arange(0, BLOCK_N)
        keys = load_token_rows(key, columns, length, key_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE)
        weights = _weights(queries, keys, columns, limit, statistic, scale, PRECISION)
        values = load_token_rows(value, columns, length, value_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE)
        plain = tl.dot(weights.to(values.dtype), values, plain, input_precision=PRECISION)

    grads = load_token_rows(grad, own, row_stop, grad_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE).to(tl.float32)
    slot = batch_head.to(tl.int64)
    # Gradients of vectors are stored as soon as they are known: a vector takes a quarter of its channels of registers.
    if d_value_shift is not None or d_gate is not None or parts is not None:
        vector = tl.sum(grads, 0)  # [BLOCK_D]
        if parts is not None:
            _store_vector(parts, vector, 3 * program.to(tl.int64) + 2, HEAD_DIM, BLOCK_D)
        else:
            _store_vector(d_value_shift, amount * vector, slot, HEAD_DIM, BLOCK_D)
            if d_gate is not None:
                shift = load_vector(
                    value_shift, batch, key_side, value_shift_batch, value_shift_head, HEAD_DIM, BLOCK_D
                )
                of_gate = tl.sum(shift * vector, 0)
    of_value = load_vector(
        value_multiplier, batch, key_side, value_multiplier_batch, value_multiplier_head, HEAD_DIM, BLOCK_D
    )  # [BLOCK_D]
    if d_value_multiplier is not None or d_gate is not None or parts is not None:
        vector = tl.sum(grads * plain, 0)
        if parts is not None:
            _store_vector(parts, vector, 3 * program.to(tl.int64) + 1, HEAD_DIM, BLOCK_D)
        else:
            _store_vector(d_value_multiplier, amount * vector, slot, HEAD_DIM, BLOCK_D)
            if d_gate is not None:
                of_gate += tl.sum(of_value * vector, 0)
    value_factor = channel_factor(of_value, amount, REPLACE)
    # The gradient of that plain output, in the type of a product's operand.
    grads = (grads * value_factor[None, :]).to(value.dtype.element_ty)
    delta = tl.sum(grads.to(tl.float32) * plain, 1)  # [BLOCK_M]
    if deltas is not None:
        tl.store(deltas + batch_head.to(tl.int64) * rows + own, delta, mask=own < rows)

    if SCORES:
        found = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first_key in tl.range(0, stop, BLOCK_N, num_stages=STAGES):
            columns = first_key + tl.arange(0, BLOCK_N)
            keys = load_token_rows(key, columns, length, key_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE)
            weights = _weights(queries, keys, columns, limit, statistic, scale, PRECISION)
            values = load_token_rows(value, columns, length, value_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE)
            slopes = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            slopes = weights * (slopes - delta[:, None])
            found = tl.dot(slopes.to(keys.dtype), keys, found, input_precision=PRECISION)
        found *= slope
        if d_query is not None:
            d_query = head_base(d_query, batch, head, d_query_batch, d_query_head, ALIGN)
            result = found * key_factor[None, :]
            store_rows(None, d_query, result, own, 0, rows, 0, d_query_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE)
        if d_key_multiplier is not None or d_gate is not None or parts is not None:
            raw = load_token_rows(query, own, row_stop, query_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE)
            vector = tl.sum(found * raw.to(tl.float32), 0)
            if NEGATE:
                vector = -vector
            if parts is not None:
                _store_vector(parts, vector, 3 * program.to(tl.int64), HEAD_DIM, BLOCK_D)
            else:
                _store_vector(d_key_multiplier, amount * vector, slot, HEAD_DIM, BLOCK_D)
                if d_gate is not None:
                    of_gate += tl.sum(of_key * vector, 0)
                    tl.store(d_gate + slot, of_gate.to(d_gate.dtype.element_ty))


@triton.jit(
    do_not_specialize=[
        "key_multiplier_batch",
        "key_multiplier_head",
        "value_multiplier_batch",
        "value_multiplier_head",
        "value_shift_batch",
        "value_shift_head",
        "gate_batch",
        "gate_head",
        "key_heads",
        "count",
    ]
)
def _vector_kernel(
    parts,  # (B, Hk, count, 3, D) float32
    key_multiplier,  # (B, Hk, D), as are value_multiplier, value_shift
    value_multiplier,
    value_shift,
    gate,  # (B, Hk)
    d_key_multiplier,  # as the vectors, contiguous, written, or None
    d_value_multiplier,
    d_value_shift,
    d_gate,
    key_multiplier_batch,
    key_multiplier_head,
    value_multiplier_batch,
    value_multiplier_head,
    value_shift_batch,
    value_shift_head,
    gate_batch,
    gate_head,
    key_heads,
    count,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: one key head.  Grid: (B * Hk,)."""
    slot = tl.program_id(0).to(tl.int64)
    batch, head = slot // key_heads, slot % key_heads
    channels = tl.arange(0, BLOCK_D)
    mask = channels < HEAD_DIM
    key_sum = tl.zeros([BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_D], tl.float32)
    shift_sum = tl.zeros([BLOCK_D], tl.float32)
    for part in range(count):
        source = parts + (slot * count + part) * (3 * HEAD_DIM) + channels
        if d_key_multiplier is not None or d_gate is not None:
            key_sum += tl.load(source, mask=mask, other=0.0)
        value_sum += tl.load(source + HEAD_DIM, mask=mask, other=0.0)
        shift_sum += tl.load(source + 2 * HEAD_DIM, mask=mask, other=0.0)
    amount = tl.load(gate + batch * gate_batch + head * gate_head).to(tl.float32)
    _store_vector(d_key_multiplier, amount * key_sum, slot, HEAD_DIM, BLOCK_D)
    _store_vector(d_value_multiplier, amount * value_sum, slot, HEAD_DIM, BLOCK_D)
    _store_vector(d_value_shift, amount * shift_sum, slot, HEAD_DIM, BLOCK_D)
    if d_gate is not None:
        of_key = load_vector(key_multiplier, batch, head, key_multiplier_batch, key_multiplier_head, HEAD_DIM, BLOCK_D)
        of_value = load_vector(
            value_multiplier, batch, head, value_multiplier_batch, value_multiplier_head, HEAD_DIM, BLOCK_D
        )
        shift = load_vector(value_shift, batch, head, value_shift_batch, value_shift_head, HEAD_DIM, BLOCK_D)
        terms = of_key * key_sum + of_value * value_sum + shift * shift_sum
        tl.store(d_gate + slot, tl.sum(terms, 0).to(d_gate.dtype.element_ty))


@triton.jit(
    do_not_specialize=[
        "grad_batch",
        "grad_head",
        "grad_row",
        "query_batch",
        "query_head",
        "query_row",
        "key_batch",
        "key_head",
        "key_row",
        "value_batch",
        "value_head",
        "value_row",
        "d_key_batch",
        "d_key_head",
        "d_key_row",
        "d_value_batch",
        "d_value_head",
        "d_value_row",
        "key_multiplier_batch",
        "key_multiplier_head",
        "value_multiplier_batch",
        "value_multiplier_head",
        "value_shift_batch",
        "value_shift_head",
        "gate_batch",
        "gate_head",
        "key_heads",
        "group",
        "rows",
        "tokens",
        "scale",
        "slope",
    ]
)
def _key_kernel(
    grad,  # (B, H, R, D), as is query
    query,
    key,  # (B, Hk, N, D), as is value
    value,
    d_key,  # (B, Hk, N, D), written, or None, as is d_value
    d_value,
    key_multiplier,  # (B, Hk, D), as is value_multiplier
    value_multiplier,
    gate,  # (B, Hk)
    lse,  # (B, H, R) float32
    deltas,  # (B, H, R) float32, or None if d_key is
    lengths,  # (B,) or None
    grad_batch,  # strides of the dimensions batch, head, row, in units of ALIGN elements
    grad_head,
    grad_row,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    d_key_batch,
    d_key_head,
    d_key_row,
    d_value_batch,
    d_value_head,
    d_value_row,
    key_multiplier_batch,  # strides of the dimensions batch, head, in elements
    key_multiplier_head,
    value_multiplier_batch,
    value_multiplier_head,
    value_shift_batch,
    value_shift_head,
    gate_batch,
    gate_head,
    key_heads,
    group,
    rows,
    tokens,
    scale,  # |scale| * log2(e)
    slope,  # |scale|
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    REPLACE: tl.constexpr,
    NEGATE: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one key tile of one key head.  Grid: (key tiles * B * Hk,)."""
    key_tiles = tl.cdiv(tokens, BLOCK_N)
    program = tl.program_id(0)
    first_key = (program % key_tiles) * BLOCK_N
    batch_head = program // key_tiles
    batch = (batch_head // key_heads).to(tl.int64)
    key_side = (batch_head % key_heads).to(tl.int64)
    length = valid_tokens(lengths, batch, tokens)
    key = head_base(key, batch, key_side, key_batch, key_head, ALIGN)
    value = head_base(value, batch, key_side, value_batch, value_head, ALIGN)

    amount = tl.load(gate + batch * gate_batch + key_side * gate_head).to(tl.float32)
    vector = load_vector(key_multiplier, batch, key_side, key_multiplier_batch, key_multiplier_head, HEAD_DIM, BLOCK_D)
    key_factor = channel_factor(vector, amount, REPLACE)
    if NEGATE:
        key_factor = -key_factor
    vector = load_vector(
        value_multiplier, batch, key_side, value_multiplier_batch, value_multiplier_head, HEAD_DIM, BLOCK_D
    )
    value_factor = channel_factor(vector, amount, REPLACE)

    columns = first_key + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    keys = load_token_rows(key, columns, length, key_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE)  # [BLOCK_N, BLOCK_D]
    if d_key is not None:
        values = load_token_rows(value, columns, length, value_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE)
        of_keys = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if d_value is not None:
        of_values = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    start = 0
    if CAUSAL:
        start = (first_key // BLOCK_M) * BLOCK_M
    # A tile beyond the length has no row to visit.
    stop = tl.where(first_key < length, tl.minimum(length, rows), 0)
    for member in range(group):
        head = key_side * group + member
        own_grad = head_base(grad, batch, head, grad_batch, grad_head, ALIGN)
        own_query = head_base(query, batch, head, query_batch, query_head, ALIGN)
        statistics = (batch * key_heads * group + head) * rows
        for first in tl.range(start, stop, BLOCK_M, num_stages=STAGES):
            own = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
            limit = row_limits(own, 0, 0, length, CAUSAL, False)  # [BLOCK_M]
            queries = load_scaled_rows(own_query, key_factor, own, stop, query_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE)
            grads = load_scaled_rows(own_grad, value_factor, own, stop, grad_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE)
            statistic = load_statistic(lse + statistics, own, stop, float("inf"))  # [BLOCK_M]
            scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
            weights = tl.exp2(scores * scale - statistic[None, :])
            weights = tl.where(columns[:, None] < limit[None, :], weights, 0.0)
            if d_value is not None:
                of_values = tl.dot(weights.to(grads.dtype), grads, of_values, input_precision=PRECISION)
            if d_key is not None:
                delta = load_statistic(deltas + statistics, own, stop, 0.0)  # [BLOCK_M]
                slopes = tl.dot(values, tl.trans(grads), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
                slopes = weights * (slopes - delta[None, :])
                of_keys = tl.dot(slopes.to(queries.dtype), queries, of_keys, input_precision=PRECISION)
    if d_key is not None:
        d_key = head_base(d_key, batch, key_side, d_key_batch, d_key_head, ALIGN)
        of_keys *= slope
        store_rows(None, d_key, of_keys, columns, 0, tokens, 0, d_key_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE)
    if d_value is not None:
        d_value = head_base(d_value, batch, key_side, d_value_batch, d_value_head, ALIGN)
        store_rows(None, d_value, of_values, columns, 0, tokens, 0, d_value_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE)


def infused_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_multiplier: Tensor,
    value_multiplier: Tensor,
    value_shift: Tensor,
    gate: Tensor,
    lengths: Tensor | None,
    lse: Tensor,
    *,
    replace: bool,
    causal: bool,
    scale: float,
    needs: tuple[bool, ...],
    tiles: BackwardTiles | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, the three vectors and the gate; None for what is not needed."""
    tensors = (grad, query, key, value, key_multiplier, value_multiplier, value_shift, gate, lengths, lse)
    return plan.run(backward, tensors, (replace, causal, float(scale), needs, precision(query.dtype), tiles))


def backward(
    tape: Tape,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_multiplier: Tensor,
    value_multiplier: Tensor,
    value_shift: Tensor,
    gate: Tensor,
    lengths: Tensor | None,
    lse: Tensor,
    replace: bool,
    causal: bool,
    scale: float,
    needs: tuple[bool, ...],
    precision: str,
    tiles: BackwardTiles | None = None,
) -> tuple[Tensor | None, ...]:
    """:func:`infused_attention_backward` on a tape."""
    batch, heads, rows, head_dim = query.shape
    _, key_heads, tokens, _ = key.shape
    group = heads // key_heads
    given = (query, key, value)
    d_query, d_key, d_value = (
        empty_rows(tape, each) if needed else None for each, needed in zip(given, needs[:3], strict=True)
    )
    inputs = (key_multiplier, value_multiplier, value_shift, gate)
    of_vectors = tuple(
        tape.empty(each.shape, each.dtype) if needed else None for each, needed in zip(inputs, needs[3:], strict=True)
    )
    results = (d_query, d_key, d_value, *of_vectors)
    if not batch * heads * rows * head_dim * tokens:
        for result in results:
            if result is not None and result.numel():
                tape.apply(Tensor.zero_, result)
        return results

    itemsize, width = query.dtype.itemsize, padded(head_dim)
    if tiles is None:
        tiles = backward_tiles(width, itemsize, size_class(rows), size_class(tokens), shared_memory(query.device))
    grad, lse = unit_last_stride(tape, grad), contiguous(tape, lse)
    vectors, vector_strides = vectors_on(tape, *inputs)
    common = (head_dim, width, causal and rows != 1, replace, scale < 0)
    row_tiles = -(-rows // tiles.row.rows)
    scores = needs[0] or needs[3] or needs[6]
    deltas = tape.scratch((batch, heads, rows), torch.float32) if needs[1] else None
    parts = None
    if any(needs[3:]) and group * row_tiles > 1:
        parts = tape.scratch((batch, heads, row_tiles, 3, head_dim), torch.float32)
    if needs[0] or needs[1] or any(needs[3:]):
        tile = tiles.row
        layout = layout_of((grad, query, key, value, d_query), itemsize)
        constants = (tile.rows, tile.keys, tile.stages, scores, *common, layout.align, layout.wide)
        constants = (*constants, precision)
        direct = of_vectors if parts is None else (None,) * 4
        others = (*vectors, lse, lengths, deltas, parts, *direct)
        numbers = (*vector_strides, heads, group, rows, tokens)
        arguments = (grad, query, key, value, d_query, *others, *layout.strides, *numbers, base_2(scale), abs(scale))
        facts = facts_of(layout, others, (constants, tile.warps), numbers)
        programs = row_tiles * batch * heads
        tape.launch(_row_kernel, programs, (*arguments, *constants), {"num_warps": tile.warps}, facts)
    if parts is not None:
        constants = (head_dim, width)
        pointers = (parts, *vectors, *of_vectors)
        numbers = (*vector_strides, key_heads, group * row_tiles)
        facts = plain_facts_of(pointers, (), numbers, constants)
        tape.launch(
            _vector_kernel, batch * key_heads, (*pointers, *numbers, *constants), {"num_warps": 1}, facts
        )  # fmt: skip
    if needs[1] or needs[2]:
        tile = tiles.key
        layout = layout_of((grad, query, key, value, d_key, d_value), itemsize)
        constants = (tile.rows, tile.keys, tile.stages, *common, layout.align, layout.wide, precision)
        others = (vectors[0], vectors[1], vectors[3], lse, deltas, lengths)
        numbers = (*vector_strides, key_heads, group, rows, tokens)
        arguments = (grad, query, key, value, d_key, d_value, *others, *layout.strides, *numbers)
        arguments = (*arguments, base_2(scale), abs(scale))
        facts = facts_of(layout, others, (constants, tile.warps), numbers)
        programs = -(-tokens // tile.keys) * batch * key_heads
        tape.launch(_key_kernel, programs, (*arguments, *constants), {"num_warps": tile.warps}, facts)
    return results
