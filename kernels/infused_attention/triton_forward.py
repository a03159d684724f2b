"""Attention over infused keys and values, forward: a rescaled query, one online softmax, one affine map of the output.

README.md beside this file has the derivation and the floors.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportAssignmentType=false, reportOptionalMemberAccess=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.cards import shared_memory
from epic_fast.kernels.common.plan import Tape, precision
from epic_fast.kernels.infused_attention.tiles import Tile, forward_tile, size_class
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
    padded,
    row_limits,
    store_rows,
    valid_tokens,
)


@triton.jit(
    do_not_specialize=[
        "query_batch",
        "query_head",
        "query_row",
        "key_batch",
        "key_head",
        "key_row",
        "value_batch",
        "value_head",
        "value_row",
        "output_batch",
        "output_head",
        "output_row",
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
    ]
)
def _forward_kernel(
    query,  # (B, H, R, D), R = N or 1, as is output
    key,  # (B, Hk, N, D), as is value
    value,
    output,
    key_multiplier,  # (B, Hk, D), as are value_multiplier, value_shift
    value_multiplier,
    value_shift,
    gate,  # (B, Hk)
    lse,  # (B, H, R) float32, or None
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
    output_batch,
    output_head,
    output_row,
    key_multiplier_batch,  # strides of the dimensions batch, head, in elements
    key_multiplier_head,
    value_multiplier_batch,
    value_multiplier_head,
    value_shift_batch,
    value_shift_head,
    gate_batch,
    gate_head,
    heads,
    group,  # H / Hk
    rows,
    tokens,
    scale,  # |scale| * log2(e)
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
    """One program: one row tile of one query head.  Grid: (row tiles * B * H,)."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    first = (program % row_tiles) * BLOCK_M
    batch_head = program // row_tiles
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    key_side = head // group
    length = valid_tokens(lengths, batch, tokens)
    query = head_base(query, batch, head, query_batch, query_head, ALIGN)
    key = head_base(key, batch, key_side, key_batch, key_head, ALIGN)
    value = head_base(value, batch, key_side, value_batch, value_head, ALIGN)
    output = head_base(output, batch, head, output_batch, output_head, ALIGN)

    amount = tl.load(gate + batch * gate_batch + key_side * gate_head).to(tl.float32)
    vector = load_vector(
        key_multiplier, batch, key_side, key_multiplier_batch, key_multiplier_head, HEAD_DIM, BLOCK_D
    )  # [BLOCK_D]
    factor = channel_factor(vector, amount, REPLACE)
    if NEGATE:
        factor = -factor
    own = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    queries = load_scaled_rows(query, factor, own, tl.minimum(length, rows), query_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE)
    limit = row_limits(own, 0, 0, length, CAUSAL, False)  # [BLOCK_M]
    stop = length
    if CAUSAL:
        stop = tl.minimum(first + BLOCK_M, length)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)  # of raw scores
    total = tl.zeros([BLOCK_M], tl.float32)
    for first_key in tl.range(0, stop, BLOCK_N, num_stages=STAGES):
        columns = first_key + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        keys = load_token_rows(key, columns, length, key_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE)  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        scores = tl.where(columns[None, :] < limit[:, None], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))  # [BLOCK_M]
        # A row that has seen nothing yet keeps a finite pivot: exp2(-inf - 0) = 0, never exp2(-inf + inf).
        pivot = tl.where(new_maximum == float("-inf"), 0.0, new_maximum) * scale  # [BLOCK_M]
        weights = tl.exp2(scores * scale - pivot[:, None])  # [BLOCK_M, BLOCK_N]
        decay = tl.exp2(maximum * scale - pivot)  # [BLOCK_M]
        total = total * decay + tl.sum(weights, 1)
        values = load_token_rows(value, columns, length, value_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE)
        accumulator = tl.dot(
            weights.to(values.dtype), values, accumulator * decay[:, None], input_precision=PRECISION
        )  # [BLOCK_M, BLOCK_D]
        maximum = new_maximum

    sees = limit > 0  # [BLOCK_M]
    vector = load_vector(
        value_multiplier, batch, key_side, value_multiplier_batch, value_multiplier_head, HEAD_DIM, BLOCK_D
    )
    factor = channel_factor(vector, amount, REPLACE)
    shift = amount * load_vector(
        value_shift, batch, key_side, value_shift_batch, value_shift_head, HEAD_DIM, BLOCK_D
    )  # [BLOCK_D]
    found = accumulator / total[:, None] * factor[None, :] + shift[None, :]  # [BLOCK_M, BLOCK_D]
    found = tl.where(sees[:, None], found, 0.0)
    store_rows(None, output, found, own, 0, rows, 0, output_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE)
    if lse is not None:
        statistic = tl.where(sees, maximum * scale + tl.log2(total), float("inf"))
        tl.store(lse + batch_head.to(tl.int64) * rows + own, statistic, mask=own < rows)


def infused_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_multiplier: Tensor,
    value_multiplier: Tensor,
    value_shift: Tensor,
    gate: Tensor,
    lengths: Tensor | None,
    *,
    replace: bool,
    causal: bool,
    scale: float,
    save_lse: bool = True,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The output, and ``lse`` (B, H, R), float32: the log-sum-exp of the scaled scores in base 2, +inf for rows that
    see nothing.  A query of one row sees all valid tokens."""
    tensors = (query, key, value, key_multiplier, value_multiplier, value_shift, gate, lengths)
    options = (replace, causal, float(scale), save_lse, precision(query.dtype), tile)
    return plan.run(forward, tensors, options)  # pyright: ignore[reportReturnType]


def forward(
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_multiplier: Tensor,
    value_multiplier: Tensor,
    value_shift: Tensor,
    gate: Tensor,
    lengths: Tensor | None,
    replace: bool,
    causal: bool,
    scale: float,
    save_lse: bool,
    precision: str,
    tile: Tile | None = None,
) -> tuple[Tensor | None, ...]:
    """:func:`infused_attention_forward` on a tape."""
    batch, heads, rows, head_dim = query.shape
    tokens, group = key.shape[2], heads // key.shape[1]
    output = empty_rows(tape, query)
    lse = tape.empty((batch, heads, rows), torch.float32) if save_lse else None
    if not batch * heads * rows:
        return output, lse
    itemsize, width = query.dtype.itemsize, padded(head_dim)
    if tile is None:
        tile = forward_tile(width, itemsize, size_class(rows), size_class(tokens), shared_memory(query.device))
    layout = layout_of((query, key, value, output), itemsize)
    vectors, vector_strides = vectors_on(tape, key_multiplier, value_multiplier, value_shift, gate)
    constants = (
        tile.rows,
        tile.keys,
        tile.stages,
        head_dim,
        width,
        causal and rows != 1,
        replace,
        scale < 0,
        layout.align,
        layout.wide,
        precision,
    )
    numbers = (*vector_strides, heads, group, rows, tokens)
    arguments = (query, key, value, output, *vectors, lse, lengths, *layout.strides, *numbers, base_2(scale))
    facts = facts_of(layout, (*vectors, lse, lengths), (constants, tile.warps), numbers)
    programs = -(-rows // tile.rows) * batch * heads
    tape.launch(_forward_kernel, programs, (*arguments, *constants), {"num_warps": tile.warps}, facts)
    return output, lse
