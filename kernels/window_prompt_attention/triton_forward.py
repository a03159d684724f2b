"""Forward of attention in windows that share their sample's prompts: a program takes several windows of one head.

README.md beside this file has the derivation, the floors and what was tried.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportAssignmentType=false, reportOptionalMemberAccess=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.cards import is_hopper, shared_memory
from epic_fast.kernels.common.plan import Tape, precision
from epic_fast.kernels.prompt_attention.triton_rows import (
    LOG2_E,
    empty_rows,
    facts_of,
    head_base,
    layout_of,
    load_rows,
    padded,
    store_rows,
)
from epic_fast.kernels.window_prompt_attention.tiles import WindowTile, forward_tile
from epic_fast.kernels.window_prompt_attention.triton_windows import (
    bias_of,
    pack_mask,
    positions,
    shares_of,
    sum_shares,
    visible,
    window_rows,
)


@triton.jit(
    do_not_specialize=[
        "query_batch", "query_head", "query_row",
        "key_batch", "key_head", "key_row",
        "value_batch", "value_head", "value_row",
        "prompt_query_batch", "prompt_query_head", "prompt_query_row",
        "prompt_key_batch", "prompt_key_head", "prompt_key_row",
        "prompt_value_batch", "prompt_value_head", "prompt_value_row",
        "output_batch", "output_head", "output_row",
        "prompt_output_batch", "prompt_output_head", "prompt_output_row",
        "bias_head", "bias_row",
        "heads", "windows", "chunk", "tokens", "prompts", "scale", "mean",
    ]
)  # fmt: skip
def _forward_kernel(
    query,  # (B * nW, H, M, D), as are key, value
    key,
    value,
    prompt_query,  # (B, H, P, D), as are prompt_key, prompt_value
    prompt_key,
    prompt_value,
    output,  # (B * nW, H, M, D)
    prompt_output,  # (B * chunks, H, P, D), in any type
    bias,  # (H, M, M) or None
    words,  # (nW, R, W) int32 or None
    lse,  # (B * nW, H, R) or None
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
    bias_head,
    bias_row,
    heads,
    windows,
    chunk,  # windows of a program
    tokens,
    prompts,
    scale,  # scale * log2(e)
    mean,  # what a sum over the program's windows is multiplied with
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
    HOLD: tl.constexpr,
    STAGES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one row tile of one head in ``chunk`` windows of a sample.  Grid: (B * chunks * row tiles * H,).

    Heads run fastest, because next to each other in memory is what they read.
    """
    stop = prompts + tokens
    row_tiles = tl.cdiv(stop, BLOCK_M)
    chunks = tl.cdiv(windows, chunk)
    head = (tl.program_id(0) % heads).to(tl.int64)
    rest = tl.program_id(0) // heads
    first = (rest % row_tiles) * BLOCK_M
    part = (rest // row_tiles).to(tl.int64)
    batch = part // chunks
    first_window = (part % chunks).to(tl.int32) * chunk

    rows = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    held_query = 0
    held_key = 0
    held_value = 0
    position = 0
    if HOLD:
        own_query = head_base(prompt_query, batch, head, prompt_query_batch, prompt_query_head, ALIGN)
        own_key = head_base(prompt_key, batch, head, prompt_key_batch, prompt_key_head, ALIGN)
        own_value = head_base(prompt_value, batch, head, prompt_value_batch, prompt_value_head, ALIGN)
        held_query = load_rows(
            own_query, None, rows, prompts, prompts, prompt_query_row, 0, HEAD_DIM, BLOCK_D, True, ALIGN, WIDE
        )  # [BLOCK_M, BLOCK_D]
        held_key = load_rows(
            own_key, None, rows, prompts, prompts, prompt_key_row, 0, HEAD_DIM, BLOCK_D, True, ALIGN, WIDE
        )  # [BLOCK_N, BLOCK_D]
        held_value = load_rows(
            own_value, None, rows, prompts, prompts, prompt_value_row, 0, HEAD_DIM, BLOCK_D, True, ALIGN, WIDE
        )  # [BLOCK_N, BLOCK_D]
    if WHOLE:
        position = positions(bias, head, rows, tl.arange(0, BLOCK_N), prompts, stop, bias_head, bias_row)
    of_prompts = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for window in tl.range(first_window, tl.minimum(first_window + chunk, windows), num_stages=STAGES if WHOLE else 1):
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
        accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if WHOLE:
            accumulator, maximum, total = _attend(
                accumulator,
                maximum,
                total,
                queries,
                rows,
                0,
                position,
                held_key,
                held_value,
                prompt_key,
                prompt_value,
                key,
                value,
                words,
                batch,
                index,
                window,
                head,
                prompts,
                stop,
                prompt_key_batch,
                prompt_key_head,
                prompt_key_row,
                prompt_value_batch,
                prompt_value_head,
                prompt_value_row,
                key_batch,
                key_head,
                key_row,
                value_batch,
                value_head,
                value_row,
                scale,
                BLOCK_N,
                HOLD,
                HEAD_DIM,
                BLOCK_D,
                ALIGN,
                WIDE,
                PRECISION,
            )
        else:
            for first_key in tl.range(0, stop, BLOCK_N, num_stages=STAGES):
                columns = first_key + tl.arange(0, BLOCK_N)  # [BLOCK_N]
                biased = positions(bias, head, rows, columns, prompts, stop, bias_head, bias_row)
                accumulator, maximum, total = _attend(
                    accumulator,
                    maximum,
                    total,
                    queries,
                    rows,
                    first_key,
                    biased,
                    0,
                    0,
                    prompt_key,
                    prompt_value,
                    key,
                    value,
                    words,
                    batch,
                    index,
                    window,
                    head,
                    prompts,
                    stop,
                    prompt_key_batch,
                    prompt_key_head,
                    prompt_key_row,
                    prompt_value_batch,
                    prompt_value_head,
                    prompt_value_row,
                    key_batch,
                    key_head,
                    key_row,
                    value_batch,
                    value_head,
                    value_row,
                    scale,
                    BLOCK_N,
                    False,
                    HEAD_DIM,
                    BLOCK_D,
                    ALIGN,
                    WIDE,
                    PRECISION,
                )
        seen = total != 0  # [BLOCK_M], and where it is NaN
        total = tl.where(seen, total, 1.0)
        accumulator = accumulator / total[:, None]
        of_prompts += accumulator
        own_output = head_base(output, index, head, output_batch, output_head, ALIGN)
        store_rows(None, own_output, accumulator, rows, prompts, stop, 0, output_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE)
        if lse is not None:
            statistic = tl.where(seen, maximum + tl.log2(total), float("inf"))
            tl.store(lse + (index * heads + head) * stop + rows, statistic, mask=rows < stop)
    own_prompts = head_base(prompt_output, part, head, prompt_output_batch, prompt_output_head, ALIGN)
    store_rows(
        own_prompts, None, of_prompts * mean, rows, prompts, prompts, prompt_output_row, 0, HEAD_DIM, BLOCK_D, ALIGN,
        WIDE,
    )  # fmt: skip


@triton.jit
def _attend(
    accumulator,  # [BLOCK_M, BLOCK_D]
    maximum,  # [BLOCK_M], of scaled scores
    total,  # [BLOCK_M]
    queries,  # [BLOCK_M, BLOCK_D]
    rows,  # [BLOCK_M]
    first_key,
    position,  # [BLOCK_M or 1, BLOCK_N]
    held_key,
    held_value,
    prompt_key,
    prompt_value,
    key,
    value,
    words,
    batch,
    index,
    window,
    head,
    prompts,
    stop,
    prompt_key_batch,
    prompt_key_head,
    prompt_key_row,
    prompt_value_batch,
    prompt_value_head,
    prompt_value_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    scale,
    BLOCK_N: tl.constexpr,
    HOLD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One key tile's step of the online softmax; the only one where a window is held whole."""
    columns = first_key + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    keys = window_rows(
        held_key,
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
        HOLD,
        HEAD_DIM,
        BLOCK_D,
        ALIGN,
        WIDE,
    )  # [BLOCK_N, BLOCK_D]
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale + position  # [BLOCK_M, BLOCK_N]
    if words is not None:
        scores = tl.where(visible(words, window, rows, first_key, stop, BLOCK_N), scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))  # [BLOCK_M]
    # A row that has seen nothing yet keeps a finite pivot: exp2(-inf - 0) = 0, never exp2(-inf + inf).
    pivot = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # [BLOCK_M]
    weights = tl.exp2(scores - pivot[:, None])  # [BLOCK_M, BLOCK_N]
    decay = tl.exp2(maximum - pivot)  # [BLOCK_M]
    total = total * decay + tl.sum(weights, 1)
    values = window_rows(
        held_value,
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
        HOLD,
        HEAD_DIM,
        BLOCK_D,
        ALIGN,
        WIDE,
    )  # [BLOCK_N, BLOCK_D]
    accumulator = tl.dot(weights.to(values.dtype), values, accumulator * decay[:, None], input_precision=PRECISION)
    return accumulator, new_maximum, total


def window_prompt_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    relative_position_bias: Tensor | None,
    window_mask: Tensor | None,
    *,
    scale: float,
    save_lse: bool = True,
    tile: WindowTile | None = None,
    output: Tensor | None = None,
    prompt_output: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the forward; it writes into ``output`` and ``prompt_output``, of any strides but a unit last one, or into
    new memory.

    Returns output, prompt_output and ``lse`` (B * nW, H, R), float32: the log-sum-exp of scaled and biased scores in
    base 2 over rows ``[prompts ; tokens]`` of every window, +inf for rows that see nothing.
    """
    tensors = (
        query, key, value, prompt_query, prompt_key, prompt_value, relative_position_bias, window_mask, output,
        prompt_output,
    )  # fmt: skip
    return plan.run(forward, tensors, (float(scale), save_lse, precision(query.dtype), tile))  # pyright: ignore[reportReturnType]


def forward(
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    output: Tensor | None,
    prompt_output: Tensor | None,
    scale: float,
    save_lse: bool,
    precision: str,
    tile: WindowTile | None,
) -> tuple[Tensor | None, ...]:
    """:func:`window_prompt_attention_forward` on a tape."""
    rows, heads, tokens, head_dim = query.shape
    batch, _, prompts, _ = prompt_query.shape
    count = prompts + tokens
    output = empty_rows(tape, query) if output is None else output
    prompt_output = empty_rows(tape, prompt_query) if prompt_output is None else prompt_output
    lse = tape.empty((rows, heads, count), torch.float32) if save_lse else None
    if not rows * heads * count * head_dim:
        tape.apply(Tensor.zero_, prompt_output)
        return output, prompt_output, lse
    windows = rows // batch
    itemsize, width = query.dtype.itemsize, padded(head_dim)
    if tile is None:
        tile = forward_tile(width, itemsize, count, is_hopper(query.device), shared_memory(query.device))
    chunk = min(tile.windows, windows)
    chunks = -(-windows // chunk)
    (target,) = shares_of(tape, (prompt_output,), chunks)
    bias, bias_strides = bias_of(tape, bias)
    words = pack_mask(tape, mask, prompts)
    tensors = (query, key, value, prompt_query, prompt_key, prompt_value, output, target)
    layout = layout_of(tensors, itemsize)
    whole = tile.whole(count)
    flags = (head_dim, width, layout.align, layout.wide, precision)
    constants = (tile.rows, tile.keys, whole, whole and tile.hold, tile.stages, *flags)
    integers = (*bias_strides, heads, windows, chunk, tokens, prompts)
    factors = (scale * LOG2_E, 1 / windows if chunks == 1 else 1.0)
    tape.launch(
        _forward_kernel,
        batch * chunks * -(-count // tile.rows) * heads,
        (*tensors, bias, words, lse, *layout.strides, *integers, *factors, *constants),
        tile.options,
        facts_of(layout, (bias, words, lse), (constants, tile.warps, tile.registers), integers),
    )
    sum_shares(tape, (prompt_output,), (target,), chunks, 1 / windows)
    return output, prompt_output, lse
