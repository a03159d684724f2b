"""Forward of prompt-concatenated attention: one online softmax over the virtual keys ``[prompts ; tokens]``."""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportAssignmentType=false, reportOptionalMemberAccess=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.cards import is_hopper, shared_memory
from epic_fast.kernels.common.plan import Tape, precision
from epic_fast.kernels.prompt_attention.tiles import Tile, forward_tile, size_class, split_of
from epic_fast.kernels.prompt_attention.triton_rows import (
    base_2,
    facts_of,
    forward_memory,
    head_base,
    layout_of,
    load_rows,
    padded,
    row_limits,
    store_rows,
    tile_limits,
    valid_tokens,
)


@triton.jit
def _attend(
    accumulator,  # [BLOCK_M, BLOCK_D]
    maximum,  # [BLOCK_M], of raw scores
    total,  # [BLOCK_M]
    queries,  # [BLOCK_M, BLOCK_D]
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
    """One key tile's step of the online softmax."""
    columns = first_key + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    keys = load_rows(
        prompt_key, key, columns, prompts, stop, prompt_key_row, key_row, HEAD_DIM, BLOCK_D, MASKED, ALIGN, WIDE
    )  # [BLOCK_N, BLOCK_D]
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if NEGATE:
        scores = -scores
    if MASKED:
        scores = tl.where(columns[None, :] < limit[:, None], scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))  # [BLOCK_M]
    # A row that has seen nothing yet keeps a finite pivot: exp2(-inf - 0) = 0, never exp2(-inf + inf).
    pivot = tl.where(new_maximum == float("-inf"), 0.0, new_maximum) * scale  # [BLOCK_M]
    weights = tl.exp2(scores * scale - pivot[:, None])  # [BLOCK_M, BLOCK_N]
    decay = tl.exp2(maximum * scale - pivot)  # [BLOCK_M]
    total = total * decay + tl.sum(weights, 1)
    accumulator = accumulator * decay[:, None]
    values = load_rows(
        prompt_value, value, columns, prompts, stop, prompt_value_row, value_row, HEAD_DIM, BLOCK_D, MASKED, ALIGN, WIDE
    )  # [BLOCK_N, BLOCK_D]
    accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision=PRECISION)
    return accumulator, new_maximum, total


@triton.jit
def _row_tile(
    first,
    batch_head,
    query,  # (N, D) of this head, as are key, value, output
    key,
    value,
    prompt_query,  # (P, D) of this head or None, as is prompt_output
    prompt_key,  # (P, D) of this head, as is prompt_value
    prompt_value,
    output,
    prompt_output,
    lse,  # (B, H, R) or None
    query_row,
    key_row,
    value_row,
    prompt_query_row,
    prompt_key_row,
    prompt_value_row,
    output_row,
    prompt_output_row,
    tokens,
    prompts,
    prompt_rows,
    length,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    SPLIT: tl.constexpr,
    SINGLE: tl.constexpr,
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
    """All keys for the rows ``first`` to ``first + BLOCK_M``."""
    row_count = prompt_rows + tokens
    stop = prompts + length
    rows = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    limit = row_limits(rows, prompt_rows, prompts, length, CAUSAL, PREFIX)  # [BLOCK_M]
    low, high = tile_limits(first, tl.minimum(first + BLOCK_M, row_count), prompt_rows, prompts, length, CAUSAL, PREFIX)
    queries = load_rows(
        prompt_query,
        query,
        rows,
        prompt_rows,
        prompt_rows + length,
        prompt_query_row,
        query_row,
        HEAD_DIM,
        BLOCK_D,
        True,
        ALIGN,
        WIDE,
    )  # [BLOCK_M, BLOCK_D]
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINGLE:
        accumulator, maximum, total = _attend(
            accumulator,
            maximum,
            total,
            queries,
            limit,
            0,
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
            BLOCK_N,
            True,
            HEAD_DIM,
            BLOCK_D,
            NEGATE,
            ALIGN,
            WIDE,
            PRECISION,
        )
    else:
        whole = 0
        if SPLIT:
            whole = (low // BLOCK_N) * BLOCK_N
            for first_key in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
                accumulator, maximum, total = _attend(
                    accumulator,
                    maximum,
                    total,
                    queries,
                    limit,
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
                    BLOCK_N,
                    False,
                    HEAD_DIM,
                    BLOCK_D,
                    NEGATE,
                    ALIGN,
                    WIDE,
                    PRECISION,
                )
        for first_key in tl.range(whole, high, BLOCK_TAIL, num_stages=STAGES):
            accumulator, maximum, total = _attend(
                accumulator,
                maximum,
                total,
                queries,
                limit,
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
                BLOCK_TAIL,
                True,
                HEAD_DIM,
                BLOCK_D,
                NEGATE,
                ALIGN,
                WIDE,
                PRECISION,
            )
    sees = limit > 0  # [BLOCK_M]
    accumulator = tl.where(sees[:, None], accumulator / total[:, None], 0.0)
    store_rows(
        prompt_output,
        output,
        accumulator,
        rows,
        prompt_rows,
        row_count,
        prompt_output_row,
        output_row,
        HEAD_DIM,
        BLOCK_D,
        ALIGN,
        WIDE,
    )
    if lse is not None:
        statistic = tl.where(sees, maximum * scale + tl.log2(total), float("inf"))
        tl.store(lse + batch_head.to(tl.int64) * row_count + rows, statistic, mask=rows < row_count)


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
        "prompt_query_batch",
        "prompt_query_head",
        "prompt_query_row",
        "prompt_key_batch",
        "prompt_key_head",
        "prompt_key_row",
        "prompt_value_batch",
        "prompt_value_head",
        "prompt_value_row",
        "output_batch",
        "output_head",
        "output_row",
        "prompt_output_batch",
        "prompt_output_head",
        "prompt_output_row",
        "heads",
        "tokens",
        "prompts",
        "scale",
    ]
)
def _forward_kernel(
    query,  # (B, H, N, D), as are key, value, output
    key,
    value,
    prompt_query,  # (B or 1, H, P, D) or None
    prompt_key,  # (B or 1, H, P, D), as is prompt_value
    prompt_value,
    output,
    prompt_output,  # (B, H, P, D) or None
    lse,  # (B, H, R) or None
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
    output_batch,
    output_head,
    output_row,
    prompt_output_batch,
    prompt_output_head,
    prompt_output_row,
    heads,
    tokens,
    prompts,
    scale,  # |scale| * log2(e)
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    ROW_TAIL: tl.constexpr,
    SPLIT: tl.constexpr,
    SINGLE: tl.constexpr,
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
    """One program: one row tile of one head.  Grid: (row tiles * B * H,)."""
    prompt_rows = prompts
    if prompt_query is None:
        prompt_rows = 0
    row_count = prompt_rows + tokens
    row_tiles = tl.cdiv(row_count, BLOCK_M)
    program = tl.program_id(0)
    first = (program % row_tiles) * BLOCK_M
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
    output = head_base(output, batch, head, output_batch, output_head, ALIGN)
    if prompt_output is not None:
        prompt_output = head_base(prompt_output, batch, head, prompt_output_batch, prompt_output_head, ALIGN)
    if (row_count - first <= ROW_TAIL) if ROW_TAIL > 0 else False:
        _row_tile(
            first, batch_head, query, key, value, prompt_query, prompt_key, prompt_value, output, prompt_output,
            lse, query_row, key_row, value_row, prompt_query_row, prompt_key_row, prompt_value_row, output_row,
            prompt_output_row, tokens, prompts, prompt_rows, length, scale, ROW_TAIL, BLOCK_N, BLOCK_TAIL, SPLIT,
            SINGLE, STAGES, HEAD_DIM, BLOCK_D, CAUSAL, PREFIX, NEGATE, ALIGN, WIDE, PRECISION,
        )  # fmt: skip
    else:
        _row_tile(
            first, batch_head, query, key, value, prompt_query, prompt_key, prompt_value, output, prompt_output,
            lse, query_row, key_row, value_row, prompt_query_row, prompt_key_row, prompt_value_row, output_row,
            prompt_output_row, tokens, prompts, prompt_rows, length, scale, BLOCK_M, BLOCK_N, BLOCK_TAIL, SPLIT,
            SINGLE, STAGES, HEAD_DIM, BLOCK_D, CAUSAL, PREFIX, NEGATE, ALIGN, WIDE, PRECISION,
        )  # fmt: skip


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
    tiles: Tile | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Launch the forward.

    ``output`` and ``prompt_output`` may be views with a unit last stride, to be written in place.  Returns them and
    ``lse`` (B, H, R), float32: the log-sum-exp of the scaled scores in base 2 over rows ``[prompts ; tokens]``, +inf
    for rows that see nothing.
    """
    tensors = (query, key, value, prompt_query, prompt_key, prompt_value, lengths, output, prompt_output)
    options = (prefix, causal, float(scale), save_lse, precision(query.dtype), tiles)
    return plan.run(forward, tensors, options)  # pyright: ignore[reportReturnType]


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
    precision: str,
    tiles: Tile | None = None,
) -> tuple[Tensor | None, ...]:
    """:func:`prompt_attention_forward` on a tape."""
    batch, heads, tokens, head_dim = query.shape
    prompts = prompt_key.shape[2]
    prompt_rows = 0 if prompt_query is None else prompts
    rows = prompt_rows + tokens
    output, prompt_output, lse = forward_memory(tape, query, prompt_query, output, prompt_output, save_lse)
    if batch * heads * rows == 0:
        return output, prompt_output, lse

    dtype = query.dtype
    itemsize = dtype.itemsize
    width = padded(head_dim)
    if tiles is None:
        tiles = forward_tile(
            width,
            itemsize,
            size_class(rows),
            size_class(prompts + tokens),
            causal or (prefix and prompt_rows > 0),
            shared_memory(query.device),
            split_of(precision, is_hopper(query.device)),
        )
    tensors = (query, key, value, prompt_query, prompt_key, prompt_value, output, prompt_output)
    layout = layout_of(tensors, itemsize)
    constants = (
        tiles.rows,
        tiles.keys,
        tiles.tail_keys,
        tiles.row_tail,
        tiles.split,
        tiles.single,
        tiles.stages,
        head_dim,
        width,
        causal,
        prefix,
        scale < 0,
        layout.align,
        layout.wide,
        precision,
    )
    arguments = (*tensors, lse, lengths, *layout.strides, heads, tokens, prompts, base_2(scale), *constants)
    facts = facts_of(layout, (lse, lengths), (constants, tiles.warps, tiles.registers))
    tape.launch(_forward_kernel, -(-rows // tiles.rows) * batch * heads, arguments, tiles.options, facts)
    return output, prompt_output, lse
