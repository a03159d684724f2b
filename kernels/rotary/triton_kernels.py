"""Rotary positions of packed heads: in place, and back into a packed row.

README.md beside this file has the derivation and the floors.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.plan import Tape, unit_last_stride
from epic_fast.kernels.common.rows import contiguous, facts_of

# Of half a head, in all heads of a program.
ELEMENTS = 1024
WARPS = 4


@triton.jit
def _table(table, position, half, HALF: tl.constexpr):
    """Both halves of a row of a table (N, 2 * HALF), [1, BLOCK] each."""
    start = table + position * (2 * HALF) + half[None, :]
    exists = (half < HALF)[None, :]
    first = tl.load(start, mask=exists, other=0.0).to(tl.float32)
    return first, tl.load(start + HALF, mask=exists, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "heads", "rotated", "head_tiles"])
def _forward_kernel(
    rows,  # (B, N, T, D), contiguous; its first heads are overwritten
    cos,  # (N, D), contiguous, as is sin
    sin,
    tokens,
    heads,  # T
    rotated,
    head_tiles,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """One program: one row, ``HEADS`` of its heads.  Grid: (B * N * head tiles,)."""
    row = (tl.program_id(0) // head_tiles).to(tl.int64)
    head = tl.program_id(0) % head_tiles * HEADS + tl.arange(0, HEADS)  # [HEADS]
    half = tl.arange(0, BLOCK)
    exists = (head < rotated)[:, None] & (half < HALF)[None, :]
    position = row % tokens
    cos_first, cos_second = _table(cos, position, half, HALF)
    sin_first, sin_second = _table(sin, position, half, HALF)
    start = rows + row * heads * (2 * HALF) + head[:, None] * (2 * HALF) + half[None, :]
    first = tl.load(start, mask=exists, other=0.0).to(tl.float32)  # [HEADS, BLOCK]
    second = tl.load(start + HALF, mask=exists, other=0.0).to(tl.float32)
    turned = first * cos_first - second * sin_first
    tl.store(start, turned.to(rows.dtype.element_ty), mask=exists)
    turned = second * cos_second + first * sin_second
    tl.store(start + HALF, turned.to(rows.dtype.element_ty), mask=exists)


@triton.jit
def _halves(base, sample, position, head, half, exists, batch_stride, head_stride, row_stride, UNIT, HALF):
    """Both halves of heads of a row of (B, heads, N, D), [HEADS, BLOCK] each, in float32."""
    start = base + (sample * batch_stride + position * row_stride) * UNIT
    start = start + (head.to(tl.int64) * head_stride * UNIT)[:, None] + half[None, :]
    first = tl.load(start, mask=exists, other=0.0).to(tl.float32)
    return first, tl.load(start + HALF, mask=exists, other=0.0).to(tl.float32)


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
        "tokens",
        "query_heads",
        "key_heads",
        "head_tiles",
    ]
)
def _backward_kernel(
    key,  # (B, Hk, N, D), as is value
    query,  # (B, H, N, D), or None and H is 0
    value,
    rows,  # (B, N, H + 2 Hk, D), contiguous, written
    cos,  # (N, D), contiguous, as is sin
    sin,
    query_batch,  # strides of the dimensions batch, head, row, in units of UNIT elements
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    tokens,
    query_heads,
    key_heads,
    head_tiles,
    UNIT: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """One program: one row, ``HEADS`` of its heads.  Grid: (B * N * head tiles,)."""
    row = (tl.program_id(0) // head_tiles).to(tl.int64)
    head = tl.program_id(0) % head_tiles * HEADS + tl.arange(0, HEADS)  # [HEADS]
    half = tl.arange(0, BLOCK)
    inside = (half < HALF)[None, :]
    sample, position = row // tokens, row % tokens
    of_key, of_value = head - query_heads, head - query_heads - key_heads
    exists = ((of_key >= 0) & (of_value < 0))[:, None] & inside
    first, second = _halves(
        key, sample, position, of_key, half, exists, key_batch, key_head, key_row, UNIT, HALF
    )  # [HEADS, BLOCK]
    if query is not None:
        exists = (of_key < 0)[:, None] & inside
        more, other = _halves(
            query, sample, position, head, half, exists, query_batch, query_head, query_row, UNIT, HALF
        )
        first += more
        second += other
    cos_first, cos_second = _table(cos, position, half, HALF)
    sin_first, sin_second = _table(sin, position, half, HALF)
    found_first = first * cos_first + second * sin_second
    found_second = second * cos_second - first * sin_first
    exists = ((of_value >= 0) & (of_value < key_heads))[:, None] & inside
    more, other = _halves(
        value, sample, position, of_value, half, exists, value_batch, value_head, value_row, UNIT, HALF
    )
    found_first += more
    found_second += other
    heads = query_heads + 2 * key_heads
    exists = (head < heads)[:, None] & inside
    start = rows + row * heads * (2 * HALF) + head[:, None] * (2 * HALF) + half[None, :]
    tl.store(start, found_first.to(rows.dtype.element_ty), mask=exists)
    tl.store(start + HALF, found_second.to(rows.dtype.element_ty), mask=exists)


def rotate_heads(rows: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> Tensor:
    """Shapes and meanings are those of :func:`epic_fast.ops.rotary.rotate_heads`."""
    plan.run(forward, (rows, cos, sin), (rotated,))
    return rows


def forward(tape: Tape, rows: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> tuple[Tensor | None, ...]:
    """:func:`rotate_heads` on a tape."""
    batch, tokens, heads, depth = rows.shape
    if batch * tokens * rotated:
        constants = _tile(depth)
        tiles = -(-rotated // constants[-1])
        tensors, integers = (rows, contiguous(tape, cos), contiguous(tape, sin)), (tokens, heads, rotated, tiles)
        facts = facts_of(tensors, integers, constants)
        arguments = (*tensors, *integers, *constants)
        tape.launch(_forward_kernel, batch * tokens * tiles, arguments, {"num_warps": WARPS}, facts)
    return (rows,)


def join_rotated_back(query: Tensor | None, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Shapes and meanings are those of :func:`epic_fast.ops.rotary.join_rotated_back`."""
    (rows,) = plan.run(backward, (key, query, value, cos, sin), ())
    assert rows is not None
    return rows


def backward(
    tape: Tape, key: Tensor, query: Tensor | None, value: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor | None, ...]:
    """:func:`join_rotated_back` on a tape."""
    batch, key_heads, tokens, depth = key.shape
    query_heads = 0 if query is None else query.shape[1]
    heads = query_heads + 2 * key_heads
    rows = tape.empty((batch, tokens, heads, depth), key.dtype)
    if batch * tokens * heads:
        query, key, value = (unit_last_stride(tape, each) for each in (query, key, value))
        strides: tuple[int, ...] = ()
        for each in (query, key, value):
            strides = (*strides, *((0, 0, 0) if each is None else each.stride()[:3]))
        unit = 16 if not any(stride % 16 for stride in strides) else 1
        strides = tuple(stride // unit for stride in strides)
        tile = _tile(depth)
        tiles = -(-heads // tile[-1])
        tensors = (key, query, value, rows, contiguous(tape, cos), contiguous(tape, sin))
        integers, constants = (*strides, tokens, query_heads, key_heads, tiles), (unit, *tile)
        facts = facts_of(tensors, integers, constants)
        arguments = (*tensors, *integers, *constants)
        tape.launch(_backward_kernel, batch * tokens * tiles, arguments, {"num_warps": WARPS}, facts)
    return (rows,)


def _tile(depth: int) -> tuple[int, int, int]:
    """Half a head, its padded width, heads of a program."""
    half = depth // 2
    block = triton.next_power_of_2(half)
    return half, block, max(1, ELEMENTS // block)
