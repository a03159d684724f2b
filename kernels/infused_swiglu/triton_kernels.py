"""SwiGLU times an infused vector, forward in one launch and backward in one or two.  No atomics.

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
from epic_fast.kernels.common.plan import Tape, unit_last_stride
from epic_fast.kernels.common.rows import facts_of, row_strides

# Rows and columns of a forward program; of a step of a backward program; rows of such a program in all.
ROWS, COLUMNS = 4, 1024
STEP_ROWS, STEP_COLUMNS = 16, 128
PART = 64
SUM_COLUMNS = 256


@triton.jit(
    do_not_specialize=["gate_sample", "gate_row", "up_sample", "up_row", "multiplier_sample", "tokens"],
)
def _forward_kernel(
    gate,  # (B, N, F), as is up
    up,
    multiplier,  # (B, F)
    hidden,  # (B, N, F), contiguous, written
    gate_sample,  # strides of sample and row in units of UNIT elements
    gate_row,
    up_sample,
    up_row,
    multiplier_sample,
    tokens,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: ``ROWS`` rows of one sample, ``COLUMNS`` columns.  Grid: (B * row tiles * column tiles,)."""
    blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    row_tiles = tl.cdiv(tokens, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    program = tl.program_id(0) // blocks
    sample = (program // row_tiles).to(tl.int64)
    row = (program % row_tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # [ROWS, 1]
    inside = column < WIDTH
    factor = tl.load(multiplier + sample * multiplier_sample + column, mask=inside, other=0.0).to(tl.float32)
    exists = (row < tokens) & inside[None, :]
    g = tl.load(gate + (sample * gate_sample + row * gate_row) * UNIT + column[None, :], mask=exists, other=0.0)
    u = tl.load(up + (sample * up_sample + row * up_row) * UNIT + column[None, :], mask=exists, other=0.0)
    g = g.to(tl.float32)  # [ROWS, COLUMNS]
    result = g * tl.sigmoid(g) * u.to(tl.float32) * factor[None, :]
    target = hidden + (sample * tokens + row) * WIDTH + column[None, :]
    tl.store(target, result.to(hidden.dtype.element_ty), mask=exists)


@triton.jit(
    do_not_specialize=[
        "grad_sample",
        "grad_row",
        "gate_sample",
        "gate_row",
        "up_sample",
        "up_row",
        "multiplier_sample",
        "tokens",
        "parts",
    ],
)
def _backward_kernel(
    grad,  # (B, N, F), as are gate, up
    gate,
    up,  # or None: neither d_gate nor d_multiplier is wanted
    multiplier,  # (B, F), or None: neither d_gate nor d_up is wanted
    d_gate,  # (B, N, F), contiguous, written, or None, as is d_up
    d_up,
    d_multiplier,  # (B, parts, F), contiguous, written, or None
    grad_sample,  # strides of sample and row in units of UNIT elements
    grad_row,
    gate_sample,
    gate_row,
    up_sample,
    up_row,
    multiplier_sample,
    tokens,
    parts,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
):
    """One program: ``PART`` rows of one sample in order, ``COLUMNS`` columns.  Grid: (B * parts * column tiles,)."""
    blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    program = tl.program_id(0) // blocks
    sample, part = (program // parts).to(tl.int64), program % parts
    inside = column < WIDTH
    if multiplier is not None:
        factor = tl.load(multiplier + sample * multiplier_sample + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(part * PART, tl.minimum(part * PART + PART, tokens), ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # [ROWS, 1]
        exists = (row < tokens) & inside[None, :]
        sent = tl.load(grad + (sample * grad_sample + row * grad_row) * UNIT + column[None, :], mask=exists, other=0.0)
        sent = sent.to(tl.float32)  # [ROWS, COLUMNS]
        g = tl.load(gate + (sample * gate_sample + row * gate_row) * UNIT + column[None, :], mask=exists, other=0.0)
        g = g.to(tl.float32)
        sigmoid = tl.sigmoid(g)
        activated = g * sigmoid
        target = (sample * tokens + row) * WIDTH + column[None, :]
        if d_up is not None:
            tl.store(d_up + target, (sent * activated * factor[None, :]).to(d_up.dtype.element_ty), mask=exists)
        if up is not None:
            u = tl.load(up + (sample * up_sample + row * up_row) * UNIT + column[None, :], mask=exists, other=0.0)
            sent *= u.to(tl.float32)
            if d_multiplier is not None:
                total += tl.sum(sent * activated, 0)
            if d_gate is not None:
                slope = sigmoid * (1.0 + g * (1.0 - sigmoid))
                tl.store(d_gate + target, (sent * slope * factor[None, :]).to(d_gate.dtype.element_ty), mask=exists)
    if d_multiplier is not None:
        target = d_multiplier + program.to(tl.int64) * WIDTH + column
        tl.store(target, total.to(d_multiplier.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["parts"])
def _sum_kernel(
    shares,  # (B, parts, F) float32, contiguous
    d_multiplier,  # (B, F), contiguous, written
    parts,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: the sum of one sample's parts, in order, in ``COLUMNS`` columns.  Grid: (B * column tiles,)."""
    blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    total = tl.zeros([COLUMNS], tl.float32)
    for part in range(parts):
        total += tl.load(shares + (sample * parts + part) * WIDTH + column, mask=column < WIDTH, other=0.0)
    target = d_multiplier + sample * WIDTH + column
    tl.store(target, total.to(d_multiplier.dtype.element_ty), mask=column < WIDTH)


def infused_swiglu_forward(gate_projection: Tensor, up_projection: Tensor, multiplier: Tensor) -> Tensor:
    """The hidden layer (B, N, F)."""
    (hidden,) = plan.run(forward, (gate_projection, up_projection, multiplier), ())
    assert hidden is not None
    return hidden


def forward(tape: Tape, gate: Tensor, up: Tensor, multiplier: Tensor) -> tuple[Tensor | None, ...]:
    """:func:`infused_swiglu_forward` on a tape."""
    batch, tokens, width = gate.shape
    hidden = tape.empty(gate.shape, gate.dtype)
    if batch * tokens * width:
        gate, up, multiplier = (unit_last_stride(tape, each) for each in (gate, up, multiplier))
        _, strides, unit = row_strides((gate, up))
        constants = (width, unit, ROWS, COLUMNS)
        integers = (*strides, multiplier.stride(0), tokens)
        tensors = (gate, up, multiplier, hidden)
        programs = batch * -(-tokens // ROWS) * -(-width // COLUMNS)
        arguments, facts = (*tensors, *integers, *constants), facts_of(tensors, integers, constants)
        tape.launch(_forward_kernel, programs, arguments, {"num_warps": 8}, facts)
    return (hidden,)


def infused_swiglu_backward(
    grad: Tensor,
    gate_projection: Tensor,
    up_projection: Tensor | None,
    multiplier: Tensor | None,
    *,
    multiplier_dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of gate, up and multiplier, None for what is not needed.

    ``up_projection`` may be None where neither gate nor multiplier needs a gradient, ``multiplier`` where neither
    projection does.
    """
    tensors = (grad, gate_projection, up_projection, multiplier)
    return plan.run(backward, tensors, (multiplier_dtype, needs))


def backward(
    tape: Tape,
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    multiplier: Tensor | None,
    multiplier_dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """:func:`infused_swiglu_backward` on a tape."""
    batch, tokens, width = gate.shape
    d_gate, d_up = (tape.empty(gate.shape, gate.dtype) if needed else None for needed in needs[:2])
    d_multiplier = tape.empty((batch, width), multiplier_dtype) if needs[2] else None
    if not batch * tokens * width:
        if d_multiplier is not None and d_multiplier.numel():
            tape.apply(Tensor.zero_, d_multiplier)
        return d_gate, d_up, d_multiplier
    parts = -(-tokens // PART)
    shares = d_multiplier
    if d_multiplier is not None and parts > 1:
        shares = tape.scratch((batch, parts, width), torch.float32)
    up = up if needs[0] or needs[2] else None
    multiplier = multiplier if needs[0] or needs[1] else None
    grad, gate, up, multiplier = (unit_last_stride(tape, each) for each in (grad, gate, up, multiplier))
    _, strides, unit = row_strides((grad, gate, up))
    constants = (width, unit, STEP_ROWS, STEP_COLUMNS, PART)
    integers = (*strides, 0 if multiplier is None else multiplier.stride(0), tokens, parts)
    tensors = (grad, gate, up, multiplier, d_gate, d_up, shares)
    programs = batch * parts * -(-width // STEP_COLUMNS)
    arguments, facts = (*tensors, *integers, *constants), facts_of(tensors, integers, constants)
    tape.launch(_backward_kernel, programs, arguments, {"num_warps": 4}, facts)
    if shares is not d_multiplier:
        constants, tensors = (width, SUM_COLUMNS), (shares, d_multiplier)
        programs, facts = batch * -(-width // SUM_COLUMNS), facts_of(tensors, (parts,), constants)
        tape.launch(_sum_kernel, programs, (*tensors, parts, *constants), {"num_warps": 4}, facts)
    return d_gate, d_up, d_multiplier
