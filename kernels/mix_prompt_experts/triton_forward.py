"""The mixture of prompt experts, forward, in one launch: every program makes its samples' scores anew.

README.md beside this file has the derivation and the floors.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.launch import facts_of
from epic_fast.kernels.common.plan import Tape, unit_last_stride
from epic_fast.kernels.common.rows import contiguous

# Samples and columns of a program; never by the batch.
SAMPLES, COLUMNS = 16, 64
# Elements that a stride counts in where all are multiples of it, so that rows load 16 bytes at a time.
UNIT = 16


@triton.jit
def routing_scores(
    logits,  # (B, E)
    sample,  # [BLOCK_B]
    batch,
    logits_row,
    sharpness,  # log2(e) / temperature
    top_k,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SPARSE: tl.constexpr,
):
    """The softmax of each sample's logits over its experts, ``[BLOCK_B, BLOCK_E]``; zeros beyond both.

    The largest logit is subtracted before the temperature divides: the largest numbers that there are stay finite.
    """
    expert = tl.arange(0, BLOCK_E)[None, :]  # [1, BLOCK_E]
    row = logits + sample.to(tl.int64) * logits_row  # [BLOCK_B]
    exists = (sample < batch)[:, None] & (expert < EXPERTS)
    own = tl.load(row[:, None] + expert, mask=exists, other=float("-inf")).to(tl.float32)  # [BLOCK_B, BLOCK_E]
    if SPARSE:
        better = tl.zeros(own.shape, tl.int32)
        for other in range(EXPERTS):
            theirs = tl.load(row + other, mask=sample < batch, other=float("-inf")).to(tl.float32)[:, None]
            # Of equal logits the first ones are taken.
            better += ((theirs > own) | ((theirs == own) & (other < expert))).to(tl.int32)
        own = tl.where(better < top_k, own, float("-inf"))
    largest = tl.max(own, 1)[:, None]  # [BLOCK_B, 1]
    weights = tl.exp2((own - largest) * sharpness)
    return tl.where(exists, weights / tl.sum(weights, 1)[:, None], 0.0)


@triton.jit(
    do_not_specialize=["logits_row", "prompts_sample", "prompts_row", "batch", "length", "top_k", "sharpness"],
)
def _forward_kernel(
    logits,  # (B, E)
    experts,  # (E, L, C), contiguous
    prompts,  # (B, L, C), written
    scores,  # (B, E), contiguous, written
    logits_row,
    prompts_sample,  # strides of sample and row in units of UNIT elements
    prompts_row,
    batch,
    length,
    top_k,
    sharpness,  # log2(e) / temperature
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    SPARSE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: ``BLOCK_C`` columns of one prompt for ``BLOCK_B`` samples.  Grid: (sample tiles * L * C tiles,)."""
    # Without a row or a column there are scores all the same.
    tiles: tl.constexpr = max((WIDTH + BLOCK_C - 1) // BLOCK_C, 1)
    parts = tl.maximum(length * tiles, 1)
    part = tl.program_id(0) % parts
    row = part // tiles
    column = (part % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]  # [1, BLOCK_C]
    sample = tl.program_id(0) // parts * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    expert = tl.arange(0, BLOCK_E)  # [BLOCK_E]
    found = routing_scores(logits, sample, batch, logits_row, sharpness, top_k, EXPERTS, BLOCK_E, SPARSE)
    offset = (expert[:, None] * length + row) * WIDTH + column
    inside = column < tl.where(row < length, WIDTH, 0)  # [1, BLOCK_C]
    mask = (expert < EXPERTS)[:, None] & inside
    own = tl.load(experts + offset, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_E, BLOCK_C]
    mixed = tl.dot(found, own, input_precision="ieee")  # [BLOCK_B, BLOCK_C]
    target = prompts + (sample.to(tl.int64)[:, None] * prompts_sample + row.to(tl.int64) * prompts_row) * UNIT + column
    tl.store(target, mixed.to(prompts.dtype.element_ty), mask=(sample < batch)[:, None] & inside)
    if part == 0:
        own_scores = scores + sample.to(tl.int64)[:, None] * EXPERTS + expert[None, :]
        exists = (sample < batch)[:, None] & (expert < EXPERTS)[None, :]
        tl.store(own_scores, found.to(scores.dtype.element_ty), mask=exists)


def mix_prompt_experts_forward(
    router_logits: Tensor,
    experts: Tensor,
    *,
    temperature: float,
    top_k: int | None,
    prompts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Prompts (B, L, C) and scores (B, E); ``prompts`` may be a view with a unit last stride, to be written into."""
    tensors, options = (router_logits, experts, prompts), (float(temperature), top_k)
    return plan.run(forward, tensors, options)  # pyright: ignore[reportReturnType]


def forward(
    tape: Tape, logits: Tensor, experts: Tensor, prompts: Tensor | None, temperature: float, top_k: int | None
) -> tuple[Tensor | None, ...]:
    """:func:`mix_prompt_experts_forward` on a tape."""
    count, length, width = experts.shape
    batch = logits.shape[0]
    if prompts is None:
        prompts = tape.empty((batch, length, width), experts.dtype)
    scores = tape.empty((batch, count), logits.dtype)
    if not batch:
        return prompts, scores
    logits, experts = unit_last_stride(tape, logits), contiguous(tape, experts)
    strides, unit = in_units(prompts.stride()[:2], width)
    options, routing = routing_of(count, temperature, top_k)
    constants = (count, width, unit, routing, SAMPLES, block_of(count), COLUMNS)
    integers = (logits.stride(0), *strides, batch, length, options[0])
    tensors = (logits, experts, prompts, scores)
    parts = max(length * -(-width // COLUMNS), 1)
    tape.launch(
        _forward_kernel,
        -(-batch // SAMPLES) * parts,
        (*tensors, *integers, options[1], *constants),
        {"num_warps": 4},
        facts_of(tensors, (), integers, constants),
    )
    return prompts, scores


def in_units(strides: Any, width: int) -> tuple[tuple[int, ...], int]:
    """Strides in the largest unit, and that unit in elements."""
    if any(each % UNIT for each in (*strides, width)):
        return tuple(strides), 1
    return tuple(each // UNIT for each in strides), UNIT


def routing_of(count: int, temperature: float, top_k: int | None) -> tuple[tuple[int, float], bool]:
    """``(top_k, sharpness)`` of the kernels, and whether some experts are left out."""
    sparse = top_k is not None and top_k < count
    return (top_k if sparse else count, math.log2(math.e) / temperature), sparse  # pyright: ignore[reportReturnType]


def block_of(count: int) -> int:
    """The block that holds so many experts: a power of two, at least the 16 of a product's side."""
    return max(16, 1 << (count - 1).bit_length())
