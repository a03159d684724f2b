"""Backward of prompt-concatenated attention for Hopper, in Gluon, for heads of at most 128 rows and 128 keys.

One program a head.  Queries, keys, values and gradients of the whole head are copied to shared memory at once, and from
there on are only read: first dq over tiles of rows (three products: scores, dP, dq), then dk and dv over tiles of keys
(four).  Seven products instead of the five that one pass takes, and in return nothing is exchanged between warps but
delta, and three programs share a multiprocessor.

A tile of rows has all of its keys at once, so delta is the sum over a row of P dP, which equals that of gradient times
output: the output is not read.  With lse to base 2, P = exp2(scale S - lse), dS = P (dP - delta).
"""

# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportMissingImports=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.cards import processors
from epic_fast.kernels.common.plan import Tape, unit_last_stride
from epic_fast.kernels.prompt_attention.gluon_backward import (
    hide_weights,
    key_step,
    start_grad_copy,
    store_gradient,
)
from epic_fast.kernels.prompt_attention.gluon_forward import (
    _ITEMSIZE,
    UNIT,
    await_copies,
    call_limits,
    copy_layout,
    layout_limits,
    mma_layout,
    row_layout,
    row_limits,
    start_copy,
    tile_limits,
    valid_tokens,
)
from epic_fast.kernels.prompt_attention.triton_rows import (
    base_2,
    begin_gradients,
    end_gradients,
    facts_of,
    layout_of,
    no_gradients,
)

MOST_ROWS = 128


@gluon.jit
def prefetch_rows(
    base,  # one head of the tokens, (N, D)
    prompt_base,  # one head of the prompts, (P, D)
    row_stride,
    prompt_row_stride,
    prompts,
    stop,
    layout: gl.constexpr,
):
    """Asks for virtual rows ``0..stop``, 128 at most, to be brought to the L2 cache.  Waits for nothing."""
    row = gl.minimum(gl.arange(0, 128, layout), stop - 1)  # [128]
    is_prompt = row < prompts
    offset = gl.where(is_prompt, row * prompt_row_stride, (row - prompts) * row_stride) * UNIT
    pointers = gl.where(is_prompt, prompt_base, base) + offset  # [128]
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def part(buffer, tile: gl.constexpr, FULL: gl.constexpr, TAIL: gl.constexpr):
    """A tile of shared memory; the one after the full ones, as far as it is used."""
    if tile < FULL:
        return buffer.index(tile)
    else:
        return buffer.index(tile).slice(0, TAIL)


@gluon.jit
def start_product(left, right, WARPS: gl.constexpr):
    """``left @ right.T``, left running."""
    layout: gl.constexpr = mma_layout(right.shape[0], WARPS)
    nothing = gl.full([left.shape[0], right.shape[0]], 0.0, gl.float32, layout)
    return warpgroup_mma(left, right.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def weigh_rows(
    scores,  # [BLOCK_M, BLOCK_N]
    statistic,  # [BLOCK_M], as is limit
    limit,
    stop,
    first_key,
    first_row,
    low,
    scale,
    VARIED: gl.constexpr,
    MASK: gl.constexpr,  # not all these keys are seen: True, False or, to be found out here, None
):
    """P; the layout of the scores is that of the result."""
    layout: gl.constexpr = scores.type.layout
    weights = gl.exp2(scores * scale - gl.convert_layout(statistic, gl.SliceLayout(1, layout))[:, None])
    if MASK is None:
        if first_key + scores.shape[1] > low:
            weights = hide_weights(weights, limit, stop, first_key, first_row, VARIED)
    elif MASK:
        weights = hide_weights(weights, limit, stop, first_key, first_row, VARIED)
    return weights


TENSORS = (
    "query",
    "key",
    "value",
    "prompt_query",
    "prompt_key",
    "prompt_value",
    "grad_output",
    "grad_prompt_output",
    "d_query",
    "d_key",
    "d_value",
    "d_prompt_query",
    "d_prompt_key",
    "d_prompt_value",
)
STRIDES = [f"{tensor}_{name}" for tensor in TENSORS for name in ("batch", "head", "row")]
NUMBERS = [
    "heads", "tokens", "prompts", "prompt_rows", "total", "ahead", "first_grad", "stop_grad", "scale", "raw_scale",
]  # fmt: skip


@gluon.jit(do_not_specialize=[*STRIDES, *NUMBERS])
def _short_kernel(
    query,  # (B, H, N, D), as are key, value, grad_output
    key,
    value,
    prompt_query,  # (B or 1, H, P, D), as are the other prompts
    prompt_key,
    prompt_value,
    grad_output,
    grad_prompt_output,
    d_query,  # (B, H, N, D) or, of prompts, (B, H, P, D)
    d_key,
    d_value,
    d_prompt_query,
    d_prompt_key,
    d_prompt_value,
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
    grad_output_batch,
    grad_output_head,
    grad_output_row,
    grad_prompt_output_batch,
    grad_prompt_output_head,
    grad_prompt_output_row,
    d_query_batch,
    d_query_head,
    d_query_row,
    d_key_batch,
    d_key_head,
    d_key_row,
    d_value_batch,
    d_value_head,
    d_value_row,
    d_prompt_query_batch,
    d_prompt_query_head,
    d_prompt_query_row,
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
    ahead,  # the head that is brought to the L2 cache lies so many further on
    first_grad,  # rows first_grad..stop_grad have a gradient
    stop_grad,
    scale,  # log2(e) included
    raw_scale,
    D: gl.constexpr,
    BLOCK: gl.constexpr,
    FULL_KEYS: gl.constexpr,  # tiles of BLOCK keys
    TAIL_KEYS: gl.constexpr,  # width of the tile after them, 0 for none
    FULL_ROWS: gl.constexpr,
    TAIL_ROWS: gl.constexpr,
    HELD: gl.constexpr,  # dq's products take queries and gradients from registers
    OVERLAP: gl.constexpr,  # a tile's last products for dk and dv run on beside the next one's first
    PREFETCH: gl.constexpr,
    PREFIX: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    QUERIES: gl.constexpr,  # which gradients are wanted
    KEYS: gl.constexpr,
    VALUES: gl.constexpr,
    PROMPT_QUERIES: gl.constexpr,
    PROMPT_KEYS: gl.constexpr,
    PROMPT_VALUES: gl.constexpr,
):
    """All gradients of one head.  Grid: (B * H,)."""
    WARPS: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = key.dtype.element_ty
    VARIED: gl.constexpr = PREFIX or CAUSAL or HAS_LENGTHS
    ROWS: gl.constexpr = row_layout(BLOCK, D, WARPS)
    COPY: gl.constexpr = copy_layout(D, WARPS)
    SCORES: gl.constexpr = mma_layout(BLOCK, WARPS)
    OUTPUT: gl.constexpr = mma_layout(D, WARPS)
    INPUT: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, D], DTYPE)
    ROW: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    KEY_TILES: gl.constexpr = FULL_KEYS + (1 if TAIL_KEYS > 0 else 0)
    ROW_TILES: gl.constexpr = FULL_ROWS + (1 if TAIL_ROWS > 0 else 0)
    last_row: gl.constexpr = FULL_ROWS * BLOCK

    program = gl.program_id(0)
    sample = (program // heads).to(gl.int64)
    head = (program % heads).to(gl.int64)
    length = valid_tokens(lengths, sample, tokens, HAS_LENGTHS)
    stop_key = prompts + length
    live = prompt_rows + length
    rows = prompt_rows + tokens
    live_grad = gl.minimum(live, stop_grad)

    queries = gl.allocate_shared_memory(DTYPE, [ROW_TILES, BLOCK, D], SHARED)
    keys = gl.allocate_shared_memory(DTYPE, [KEY_TILES, BLOCK, D], SHARED)
    values = gl.allocate_shared_memory(DTYPE, [KEY_TILES, BLOCK, D], SHARED)
    grads = gl.allocate_shared_memory(DTYPE, [ROW_TILES, BLOCK, D], SHARED)
    statistics = gl.allocate_shared_memory(gl.float32, [ROW_TILES, BLOCK], PLAIN)
    inners = gl.allocate_shared_memory(gl.float32, [ROW_TILES, BLOCK], PLAIN)
    bounds = gl.allocate_shared_memory(gl.int32, [ROW_TILES, BLOCK], PLAIN)

    query_base = query + (sample * query_batch + head * query_head) * UNIT
    prompt_query_base = prompt_query + (sample * prompt_query_batch + head * prompt_query_head) * UNIT
    key_base = key + (sample * key_batch + head * key_head) * UNIT
    prompt_key_base = prompt_key + (sample * prompt_key_batch + head * prompt_key_head) * UNIT
    value_base = value + (sample * value_batch + head * value_head) * UNIT
    prompt_value_base = prompt_value + (sample * prompt_value_batch + head * prompt_value_head) * UNIT
    grad_base = grad_output + (sample * grad_output_batch + head * grad_output_head) * UNIT
    prompt_grad_base = grad_prompt_output + (sample * grad_prompt_output_batch + head * grad_prompt_output_head) * UNIT
    # Of a last tile that is not full, rows past TAIL stay unwritten: they only make rows that nobody stores.
    for j in gl.static_range(ROW_TILES):
        start_copy(
            part(queries, j, FULL_ROWS, TAIL_ROWS),
            query_base,
            prompt_query_base,
            query_row,
            prompt_query_row,
            j * BLOCK,
            prompt_rows,
            live,
            COPY,
        )
    for j in gl.static_range(KEY_TILES):
        start_copy(
            part(keys, j, FULL_KEYS, TAIL_KEYS),
            key_base,
            prompt_key_base,
            key_row,
            prompt_key_row,
            j * BLOCK,
            prompts,
            stop_key,
            COPY,
        )
    for j in gl.static_range(ROW_TILES):
        start_grad_copy(
            part(grads, j, FULL_ROWS, TAIL_ROWS),
            grad_base,
            prompt_grad_base,
            grad_output_row,
            grad_prompt_output_row,
            j * BLOCK,
            prompt_rows,
            first_grad,
            live_grad,
            COPY,
        )
    for j in gl.static_range(KEY_TILES):
        start_copy(
            part(values, j, FULL_KEYS, TAIL_KEYS),
            value_base,
            prompt_value_base,
            value_row,
            prompt_value_row,
            j * BLOCK,
            prompts,
            stop_key,
            COPY,
        )
    async_copy.commit_group()
    lse += program.to(gl.int64) * rows
    for j in gl.static_range(ROW_TILES):
        line = j * BLOCK + gl.arange(0, BLOCK, LINE)
        statistics.index(j).store(gl.load(lse + line, mask=line < live, other=float("inf")))
    if PREFETCH:
        later = program + ahead
        if later < total:
            later_sample = (later // heads).to(gl.int64)
            later_head = (later % heads).to(gl.int64)
            later_length = valid_tokens(lengths, later_sample, tokens, HAS_LENGTHS)
            if later_length > 0:
                prefetch_rows(
                    query + (later_sample * query_batch + later_head * query_head) * UNIT,
                    prompt_query + (later_sample * prompt_query_batch + later_head * prompt_query_head) * UNIT,
                    query_row,
                    prompt_query_row,
                    prompt_rows,
                    prompt_rows + later_length,
                    LINE,
                )
                prefetch_rows(
                    key + (later_sample * key_batch + later_head * key_head) * UNIT,
                    prompt_key + (later_sample * prompt_key_batch + later_head * prompt_key_head) * UNIT,
                    key_row,
                    prompt_key_row,
                    prompts,
                    prompts + later_length,
                    LINE,
                )
                prefetch_rows(
                    grad_output + (later_sample * grad_output_batch + later_head * grad_output_head) * UNIT,
                    grad_prompt_output
                    + (later_sample * grad_prompt_output_batch + later_head * grad_prompt_output_head) * UNIT,
                    grad_output_row,
                    grad_prompt_output_row,
                    prompt_rows,
                    prompt_rows + later_length,
                    LINE,
                )
                prefetch_rows(
                    value + (later_sample * value_batch + later_head * value_head) * UNIT,
                    prompt_value + (later_sample * prompt_value_batch + later_head * prompt_value_head) * UNIT,
                    value_row,
                    prompt_value_row,
                    prompts,
                    prompts + later_length,
                    LINE,
                )
    await_copies(0)

    d_query += (sample * d_query_batch + head * d_query_head) * UNIT
    d_prompt_query += (sample * d_prompt_query_batch + head * d_prompt_query_head) * UNIT
    for start in range(0, live, BLOCK):
        tile = start // BLOCK
        row = start + gl.arange(0, BLOCK, ROW)  # [BLOCK]
        limit = row_limits(row, prompt_rows, prompts, length, CAUSAL, PREFIX)  # [BLOCK]
        low, _ = tile_limits(start, gl.minimum(start + BLOCK, rows), prompt_rows, prompts, length, CAUSAL, PREFIX)
        statistic = statistics.index(tile).load(ROW)  # [BLOCK]
        if HELD:
            query_tile = queries.index(tile).load(INPUT)  # [BLOCK, D]
            grad_tile = grads.index(tile).load(INPUT)  # [BLOCK, D]
        else:
            query_tile = queries.index(tile)
            grad_tile = grads.index(tile)
        weights = ()
        d_weights = ()
        for j in gl.static_range(KEY_TILES):
            weights += (start_product(query_tile, part(keys, j, FULL_KEYS, TAIL_KEYS), WARPS),)
        for j in gl.static_range(KEY_TILES):
            d_weights += (start_product(grad_tile, part(values, j, FULL_KEYS, TAIL_KEYS), WARPS),)
        scores = weights
        weights = ()
        for j in gl.static_range(KEY_TILES):
            score_tile = warpgroup_mma_wait(2 * KEY_TILES - 1 - j, deps=(scores[j],))
            weights += (
                weigh_rows(
                    score_tile,
                    statistic,
                    limit,
                    stop_key,
                    j * BLOCK,
                    start,
                    low,
                    scale,
                    VARIED,
                    None if VARIED else j == KEY_TILES - 1,
                ),
            )
        inner = gl.full([BLOCK], 0.0, gl.float32, ROW)
        arrived = ()
        for j in gl.static_range(KEY_TILES):
            d_weight_tile = warpgroup_mma_wait(KEY_TILES - 1 - j, deps=(d_weights[j],))
            inner += gl.convert_layout(gl.sum(weights[j] * d_weight_tile, 1), ROW)
            arrived += (d_weight_tile,)
        inners.index(tile).store(inner)
        if VARIED:
            bounds.index(tile).store(limit)
        d_queries = warpgroup_mma_init(gl.full([BLOCK, D], 0.0, gl.float32, OUTPUT))
        for j in gl.static_range(KEY_TILES):
            d_scores = weights[j] * (
                arrived[j] - gl.convert_layout(inner, gl.SliceLayout(1, arrived[j].type.layout))[:, None]
            )
            d_queries = warpgroup_mma(
                gl.convert_layout(d_scores.to(DTYPE), OPERAND),
                part(keys, j, FULL_KEYS, TAIL_KEYS),
                d_queries,
                is_async=True,
            )
        d_queries = warpgroup_mma_wait(0, deps=(d_queries,))
        if QUERIES or PROMPT_QUERIES:
            store_gradient(
                d_queries * raw_scale,
                d_query,
                d_prompt_query,
                d_query_row,
                d_prompt_query_row,
                start,
                prompt_rows,
                rows,
                QUERIES,
                PROMPT_QUERIES,
                ROWS,
            )

    if HAS_LENGTHS:
        # Tiles past the length.  What else uses these statistics multiplies them by zero.
        for start in range(gl.cdiv(live, BLOCK) * BLOCK, rows, BLOCK):
            inners.index(start // BLOCK).store(gl.full([BLOCK], 0.0, gl.float32, ROW))
            bounds.index(start // BLOCK).store(gl.full([BLOCK], 0, gl.int32, ROW))
            if QUERIES or PROMPT_QUERIES:
                store_gradient(
                    gl.full([BLOCK, D], 0.0, gl.float32, OUTPUT),
                    d_query,
                    d_prompt_query,
                    d_query_row,
                    d_prompt_query_row,
                    start,
                    prompt_rows,
                    rows,
                    QUERIES,
                    PROMPT_QUERIES,
                    ROWS,
                )

    if KEYS or VALUES or PROMPT_KEYS or PROMPT_VALUES:
        d_key += (sample * d_key_batch + head * d_key_head) * UNIT
        d_value += (sample * d_value_batch + head * d_value_head) * UNIT
        d_prompt_key += (sample * d_prompt_key_batch + head * d_prompt_key_head) * UNIT
        d_prompt_value += (sample * d_prompt_value_batch + head * d_prompt_value_head) * UNIT
        for start in range(0, stop_key, BLOCK):
            tile = start // BLOCK
            # Zero, but not for the compiler, which else keeps what it computes of all tiles in registers.
            zero = start >> 30
            d_keys = warpgroup_mma_init(gl.full([BLOCK, D], 0.0, gl.float32, OUTPUT))
            d_values = warpgroup_mma_init(gl.full([BLOCK, D], 0.0, gl.float32, OUTPUT))
            for j in gl.static_range(FULL_ROWS):
                seen = bounds.index(j + zero).load(COLUMN)  # [BLOCK]
                low, _ = tile_limits(
                    j * BLOCK + zero,
                    gl.minimum(j * BLOCK + zero + BLOCK, rows),
                    prompt_rows,
                    prompts,
                    length,
                    CAUSAL,
                    PREFIX,
                )
                d_keys, d_values = key_step(
                    keys.index(tile),
                    values.index(tile),
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
            if TAIL_ROWS > 0:
                SCORES_TAIL: gl.constexpr = mma_layout(TAIL_ROWS, WARPS)
                COLUMN_TAIL: gl.constexpr = gl.SliceLayout(0, SCORES_TAIL)
                seen_tail = bounds.index(FULL_ROWS + zero).slice(0, TAIL_ROWS).load(COLUMN_TAIL)  # [TAIL_ROWS]
                low, _ = tile_limits(
                    last_row + zero,
                    gl.minimum(last_row + zero + TAIL_ROWS, rows),
                    prompt_rows,
                    prompts,
                    length,
                    CAUSAL,
                    PREFIX,
                )
                d_keys, d_values = key_step(
                    keys.index(tile),
                    values.index(tile),
                    queries.index(FULL_ROWS + zero).slice(0, TAIL_ROWS),
                    grads.index(FULL_ROWS + zero).slice(0, TAIL_ROWS),
                    d_keys,
                    d_values,
                    statistics.index(FULL_ROWS + zero).slice(0, TAIL_ROWS).load(COLUMN_TAIL),
                    inners.index(FULL_ROWS + zero).slice(0, TAIL_ROWS).load(COLUMN_TAIL),
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
            d_keys, d_values = warpgroup_mma_wait(0, deps=(d_keys, d_values))
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
        if HAS_LENGTHS:
            for start in range(gl.cdiv(stop_key, BLOCK) * BLOCK, prompts + tokens, BLOCK):
                store_gradient(
                    gl.full([BLOCK, D], 0.0, gl.float32, OUTPUT),
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
                store_gradient(
                    gl.full([BLOCK, D], 0.0, gl.float32, OUTPUT),
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


@dataclass(frozen=True)
class ShortForm:
    """A form of the kernel.

    Attributes:
        registers: the most that a thread may have, or None; 168 let three programs share a multiprocessor.
        held: dq's products take queries and gradients from registers.
        overlap: a tile's last products for dk and dv run on beside the next one's first.
        prefetch: a program asks for the rows of the head that lies so many heads a multiprocessor further on to be
            brought to the L2 cache; 0 for not.
    """

    registers: int | None = 168
    held: bool = True
    overlap: bool = False
    prefetch: int = 3

    @property
    def options(self) -> dict[str, int | None]:
        return {"num_warps": 4, "maxnreg": self.registers}


_BLOCK = 64


def _tiles(count: int) -> tuple[int, int]:
    """Tiles of 64 and the width of the last one (32 or none) that hold ``count`` rows."""
    full, rest = divmod(count, _BLOCK)
    return max(full + (rest > 32), 1), 32 if full > 0 and 0 < rest <= 32 else 0


def short_form(rows: int, keys: int, crowded: bool = False) -> ShortForm:
    """By the numbers of rows and virtual keys, never by the batch: scores of more than 96 keys want more registers.

    Args:
        crowded: prompts are shared by the batch and texts have lengths, whose addresses want registers too.
    """
    return ShortForm() if max(rows, keys) <= 96 and not crowded else ShortForm(registers=None, prefetch=2)


def limits(
    grad_output: Tensor | None,
    grad_prompt_output: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor | None,
    prompt_key: Tensor,
    prompt_value: Tensor,
    *,
    scale: float,
    grads: tuple[Tensor | None, ...] | None = None,
) -> list[str]:
    """Why this kernel cannot take a call; an empty list if it can.  As everywhere, last strides are 1."""
    reasons = call_limits(query, scale)
    if query.shape[3] == 128:
        reasons.append("head_dim is 128; wanted 64")
    keys = query.shape[2] + prompt_key.shape[2]
    if keys > MOST_ROWS:
        reasons.append(f"there are {keys} prompts and tokens; wanted {MOST_ROWS} at most")
    if reasons:
        return reasons
    inputs = (query, key, value, prompt_query, prompt_key, prompt_value)
    tensors = (*inputs, grad_output, grad_prompt_output, *(grads or ()))
    return layout_limits(layout_of(tensors, _ITEMSIZE))


def short_backward_gluon(
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
    form: ShortForm | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As ``triton_backward.prompt_attention_backward``, for calls to which :func:`limits` has no objection.

    ``output`` and ``prompt_output`` are not read.
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
        (prefix, causal, float(scale), needs, form),
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
    """:func:`short_backward_gluon` on a tape: six ``grads`` or none, then the options in their order."""
    *given, prefix, causal, scale, needs, form = grads_and_options
    inputs = (query, key, value, prompt_query, prompt_key, prompt_value)
    batch, heads, tokens, head_dim = query.shape
    prompts = prompt_key.shape[2]
    prompt_rows = 0 if prompt_query is None else prompts
    rows, keys = prompt_rows + tokens, prompts + tokens
    form = form or short_form(rows, keys, crowded=lengths is not None and prompt_key.shape[0] < batch)

    gradients = begin_gradients(
        tape, inputs, needs, given or None, grad_output is not None, grad_prompt_output is not None
    )
    if no_gradients(tape, gradients, query):
        return gradients.results
    if keys > MOST_ROWS:
        raise ValueError(f"there are {prompts} prompts and {tokens} tokens; this kernel takes {MOST_ROWS} at most")
    targets = gradients.targets
    read = (*inputs, unit_last_stride(tape, grad_output), unit_last_stride(tape, grad_prompt_output))
    layout = layout_of((*read, *targets), _ITEMSIZE)
    reasons = layout_limits(layout)
    if reasons:
        raise ValueError(f"this kernel cannot take this call: {'; '.join(reasons)}")
    wanted = [target is not None and target.shape[2] > 0 for target in targets]
    programs = batch * heads
    constants = (
        head_dim,
        _BLOCK,
        *_tiles(keys),
        *_tiles(rows),
        form.held,
        form.overlap,
        form.prefetch > 0,
        prefix and prompt_rows > 0,
        causal,
        lengths is not None,
        *wanted,
    )
    known = facts_of(layout, (lse, lengths), (constants, *form.options.values()))
    # A pointer that the kernel never follows still has to be one.
    pointers = [query if each is None else each for each in (*read, *targets, lse, lengths)]
    tape.launch(
        _short_kernel,
        programs,
        (
            *pointers,
            *layout.strides,
            heads,
            tokens,
            prompts,
            prompt_rows,
            programs,
            form.prefetch * processors(query.device),
            gradients.first,
            gradients.stop,
            base_2(scale),
            float(scale),
            *constants,
        ),
        form.options,
        known,
    )
    end_gradients(tape, gradients)
    return gradients.results
