"""The gate of an infusion, forward in one launch and backward in at most two.  No atomics.

README.md beside this file has the derivation and the floors.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.launch import facts_of as plain_facts_of
from epic_fast.kernels.common.plan import Tape, unit_last_stride
from epic_fast.kernels.common.rows import contiguous
from epic_fast.kernels.infusion_gate.reference import EPS
from epic_fast.kernels.prompt_attention.triton_rows import (
    empty_rows,
    facts_of,
    head_base,
    layout_of,
    load_rows,
    padded,
    store_rows,
    valid_tokens,
)

# Elements of a tile: its rows are as many as fit.
TILE = 8192
# Heads of a program of the last kernel.
HEADS = 64


@triton.jit(
    do_not_specialize=[
        "value_batch",
        "value_head",
        "value_row",
        "shift_batch",
        "shift_head",
        "bias_head",
        "heads",
        "tokens",
    ]
)
def _forward_kernel(
    value,  # (B, Hk, N, D)
    shift,  # (B, Hk, D)
    bias,  # (Hk,)
    gate,  # (B, Hk), contiguous, written
    sums,  # (B, Hk, D) float32, contiguous, written: the sum of the rows; or None
    norms,  # (B, Hk, 2) float32, contiguous, written: ‖V‖ and √n; or None
    lengths,  # (B,) or None
    value_batch,  # strides of the dimensions batch, head, row, in units of ALIGN elements
    value_head,
    value_row,
    shift_batch,
    shift_head,
    bias_head,
    heads,
    tokens,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: one head of one sample.  Grid: (B * Hk,)."""
    slot = tl.program_id(0).to(tl.int64)
    batch, head = slot // heads, slot % heads
    length = valid_tokens(lengths, batch, tokens)
    value = head_base(value, batch, head, value_batch, value_head, ALIGN)
    channels = tl.arange(0, BLOCK_D)
    mask = channels < HEAD_DIM
    total = tl.zeros([BLOCK_D], tl.float32)
    square = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, length, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        tile = load_rows(None, value, rows, 0, length, 0, value_row, HEAD_DIM, BLOCK_D, True, ALIGN, WIDE)
        tile = tile.to(tl.float32)  # [BLOCK_N, BLOCK_D]
        total += tl.sum(tile, 0)
        square += tl.sum(tile * tile, 0)
    value_norm, root = tl.sqrt(tl.sum(square, 0)), tl.sqrt(length.to(tl.float32))
    own = tl.load(shift + batch * shift_batch + head * shift_head + channels, mask=mask, other=0.0).to(tl.float32)
    shift_norm = root * tl.sqrt(tl.sum(own * own, 0))
    # Divided one by one: the product of two small norms is no number to divide by.
    cosine = tl.sum(total * own, 0) / tl.maximum(value_norm, EPS) / tl.maximum(shift_norm, EPS)
    found = tl.sigmoid(tl.load(bias + head * bias_head).to(tl.float32) + cosine)
    tl.store(gate + slot, found.to(gate.dtype.element_ty))
    if sums is not None:
        tl.store(sums + slot * HEAD_DIM + channels, total, mask=mask)
        tl.store(norms + 2 * slot, value_norm)
        tl.store(norms + 2 * slot + 1, root)


@triton.jit(
    do_not_specialize=[
        "value_batch",
        "value_head",
        "value_row",
        "d_value_batch",
        "d_value_head",
        "d_value_row",
        "grad_batch",
        "grad_head",
        "shift_batch",
        "shift_head",
        "bias_head",
        "heads",
        "tokens",
    ]
)
def _backward_kernel(
    grad,  # (B, Hk)
    value,  # (B, Hk, N, D), or None if d_value is
    d_value,  # (B, Hk, N, D), written, or None
    shift,  # (B, Hk, D)
    bias,  # (Hk,)
    sums,  # (B, Hk, D) float32
    norms,  # (B, Hk, 2) float32
    lengths,  # (B,), or None; looked at only for d_value
    d_shift,  # (B, Hk, D), contiguous, written, or None
    shares,  # (B, Hk) float32, contiguous, written: each sample's part in the gradient of the bias; or None
    value_batch,  # strides of the dimensions batch, head, row, in units of ALIGN elements
    value_head,
    value_row,
    d_value_batch,
    d_value_head,
    d_value_row,
    grad_batch,
    grad_head,
    shift_batch,
    shift_head,
    bias_head,
    heads,
    tokens,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: one head of one sample.  Grid: (B * Hk,)."""
    slot = tl.program_id(0).to(tl.int64)
    batch, head = slot // heads, slot % heads
    channels = tl.arange(0, BLOCK_D)
    mask = channels < HEAD_DIM
    own = tl.load(shift + batch * shift_batch + head * shift_head + channels, mask=mask, other=0.0).to(tl.float32)
    total = tl.load(sums + slot * HEAD_DIM + channels, mask=mask, other=0.0)
    value_norm, root = tl.load(norms + 2 * slot), tl.load(norms + 2 * slot + 1)
    shift_norm = root * tl.sqrt(tl.sum(own * own, 0))
    value_side, shift_side = tl.maximum(value_norm, EPS), tl.maximum(shift_norm, EPS)
    cosine = tl.sum(total * own, 0) / value_side / shift_side
    found = tl.sigmoid(tl.load(bias + head * bias_head).to(tl.float32) + cosine)
    slope = tl.load(grad + batch * grad_batch + head * grad_head).to(tl.float32) * found * (1.0 - found)
    if shares is not None:
        tl.store(shares + slot, slope)
    if d_shift is not None:
        # A norm below EPS counts as EPS and has no slope.
        pull = tl.where(shift_norm >= EPS, cosine * root * root / shift_side, 0.0)
        result = slope * ((total / value_side - pull * own) / shift_side)
        tl.store(d_shift + slot * HEAD_DIM + channels, result.to(d_shift.dtype.element_ty), mask=mask)
    if d_value is not None:
        length = valid_tokens(lengths, batch, tokens)
        value = head_base(value, batch, head, value_batch, value_head, ALIGN)
        d_value = head_base(d_value, batch, head, d_value_batch, d_value_head, ALIGN)
        push = own / shift_side  # [BLOCK_D]
        pull = tl.where(value_norm >= EPS, cosine / value_side, 0.0)
        for first in range(0, tokens, BLOCK_N):
            rows = first + tl.arange(0, BLOCK_N)
            tile = load_rows(None, value, rows, 0, length, 0, value_row, HEAD_DIM, BLOCK_D, True, ALIGN, WIDE)
            slopes = slope * ((push[None, :] - pull * tile.to(tl.float32)) / value_side)  # [BLOCK_N, BLOCK_D]
            slopes = tl.where((rows < length)[:, None], slopes, 0.0)
            store_rows(None, d_value, slopes, rows, 0, tokens, 0, d_value_row, HEAD_DIM, BLOCK_D, ALIGN, WIDE)


@triton.jit(do_not_specialize=["batch", "heads"])
def _bias_kernel(
    shares,  # (B, Hk) float32, contiguous
    d_bias,  # (Hk,), contiguous, written
    batch,
    heads,
    BLOCK_H: tl.constexpr,
):
    """One program: the sum over the batch, in order, of ``BLOCK_H`` heads.  Grid: (head tiles,)."""
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H], tl.float32)
    for sample in range(batch):
        total += tl.load(shares + sample * heads + head, mask=head < heads, other=0.0)
    tl.store(d_bias + head, total.to(d_bias.dtype.element_ty), mask=head < heads)


def infusion_gate_forward(
    value: Tensor, value_shift: Tensor, head_bias: Tensor, lengths: Tensor | None, *, save: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gate (B, Hk), and what backward needs, in float32: the sum of the valid rows (B, Hk, D), and the norm of the
    values beside the root of the number of valid rows (B, Hk, 2)."""
    return plan.run(forward, (value, value_shift, head_bias, lengths), (save,))  # pyright: ignore[reportReturnType]


def forward(
    tape: Tape, value: Tensor, value_shift: Tensor, head_bias: Tensor, lengths: Tensor | None, save: bool
) -> tuple[Tensor | None, ...]:
    """:func:`infusion_gate_forward` on a tape."""
    batch, heads, tokens, head_dim = value.shape
    gate = tape.empty((batch, heads), head_bias.dtype)
    sums = norms = None
    if save:
        sums, norms = tape.empty(value_shift.shape, torch.float32), tape.empty((batch, heads, 2), torch.float32)
    if not batch * heads:
        return gate, sums, norms
    layout = layout_of((value,), value.dtype.itemsize)
    shift = _with_unit_stride(tape, value_shift)
    constants = (*_tile(head_dim), layout.align, layout.wide)
    numbers = (*shift.stride()[:2], head_bias.stride(0), heads, tokens)
    others = (shift, head_bias, gate, sums, norms, lengths)
    facts = facts_of(layout, others, constants, numbers)
    arguments = (value, *others, *layout.strides, *numbers, *constants)
    tape.launch(_forward_kernel, batch * heads, arguments, {"num_warps": 4}, facts)
    return gate, sums, norms


def infusion_gate_backward(
    grad: Tensor,
    value: Tensor | None,
    value_shift: Tensor,
    head_bias: Tensor,
    lengths: Tensor | None,
    sums: Tensor,
    norms: Tensor,
    *,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of value, shift and bias, None for what is not needed; ``value`` may be None where its gradient is."""
    tensors = (grad, value, value_shift, head_bias, lengths, sums, norms)
    return plan.run(backward, tensors, (needs,))


def backward(
    tape: Tape,
    grad: Tensor,
    value: Tensor | None,
    value_shift: Tensor,
    head_bias: Tensor,
    lengths: Tensor | None,
    sums: Tensor,
    norms: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """:func:`infusion_gate_backward` on a tape."""
    batch, heads, head_dim = value_shift.shape
    tokens = 0 if value is None else value.shape[2]
    d_value = empty_rows(tape, value) if needs[0] and value is not None else None
    d_shift = tape.empty(value_shift.shape, value_shift.dtype) if needs[1] else None
    d_bias = tape.empty(head_bias.shape, head_bias.dtype) if needs[2] else None
    shares = tape.scratch((batch, heads), torch.float32) if needs[2] else None
    if batch * heads and any(needs):
        rows = (value if needs[0] else None, d_value)
        layout = layout_of(rows, (value if needs[0] and value is not None else sums).dtype.itemsize)
        shift = _with_unit_stride(tape, value_shift)
        constants = (*_tile(head_dim), layout.align, layout.wide)
        numbers = (*grad.stride(), *shift.stride()[:2], head_bias.stride(0), heads, tokens)
        others = (shift, head_bias, contiguous(tape, sums), contiguous(tape, norms), lengths, d_shift, shares)
        facts = facts_of(layout, (grad, *others), constants, numbers)
        arguments = (grad, *rows, *others, *layout.strides, *numbers, *constants)
        tape.launch(_backward_kernel, batch * heads, arguments, {"num_warps": 4}, facts)
    if d_bias is not None and heads:
        arguments = (shares, d_bias, batch, heads, HEADS)
        facts = plain_facts_of((shares, d_bias), (), (batch, heads), (HEADS,))
        tape.launch(_bias_kernel, -(-heads // HEADS), arguments, {"num_warps": 2}, facts)
    return d_value, d_shift, d_bias


def _with_unit_stride(tape: Tape, tensor: Tensor) -> Tensor:
    found = tensor if tensor.shape[-1] == 1 else unit_last_stride(tape, tensor)
    assert found is not None
    return found


def _tile(head_dim: int) -> tuple[float, int, int, int]:
    """EPS, rows, head_dim and its padded width."""
    width = padded(head_dim)
    return EPS, TILE // width, head_dim, width
