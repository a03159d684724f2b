"""The mixture of prompt experts, backward, in at most two launches.  No atomics.

- ``_expert_kernel`` owns columns of all experts and visits the batch in order: their gradient, and the share of its
  columns in the gradient of every score.
- ``_logit_kernel`` owns samples: these shares in order, what came in through the scores, and the softmax.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.launch import facts_of
from epic_fast.kernels.common.plan import Tape, unit_last_stride
from epic_fast.kernels.common.rows import contiguous
from epic_fast.kernels.mix_prompt_experts.triton_forward import block_of, in_units, routing_of, routing_scores

# Samples and columns of a step of the first kernel; shares and samples of a step of the second.
SAMPLES, COLUMNS = 16, 32
SHARES, OWN_SAMPLES = 16, 4


@triton.jit(
    do_not_specialize=["logits_row", "grad_sample", "grad_row", "batch", "length", "top_k", "sharpness"],
)
def _expert_kernel(
    grad,  # (B, L, C)
    logits,  # (B, E)
    experts,  # (E, L, C), contiguous
    d_experts,  # (E, L, C), contiguous, or None (not wanted)
    shares,  # (L * C tiles, B, E) float32, contiguous, or None (not wanted)
    logits_row,
    grad_sample,  # strides of sample and row in units of UNIT elements
    grad_row,
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
    """One program: ``BLOCK_C`` columns of one prompt of all experts.  Grid: (L * C tiles,)."""
    tiles: tl.constexpr = (WIDTH + BLOCK_C - 1) // BLOCK_C
    part = tl.program_id(0)
    row = part // tiles
    column = (part % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]  # [1, BLOCK_C]
    expert = tl.arange(0, BLOCK_E)  # [BLOCK_E]
    offset = (expert[:, None] * length + row) * WIDTH + column
    mask = (expert < EXPERTS)[:, None] & (column < WIDTH)
    if shares is not None:
        own = tl.load(experts + offset, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_E, BLOCK_C]
    total = tl.zeros([BLOCK_E, BLOCK_C], tl.float32)
    for first in range(0, batch, BLOCK_B):
        sample = first + tl.arange(0, BLOCK_B)  # [BLOCK_B]
        source = grad + (sample.to(tl.int64)[:, None] * grad_sample + row.to(tl.int64) * grad_row) * UNIT + column
        grads = tl.load(source, mask=(sample < batch)[:, None] & (column < WIDTH), other=0.0)
        grads = grads.to(tl.float32)  # [BLOCK_B, BLOCK_C]
        if d_experts is not None:
            scores = routing_scores(logits, sample, batch, logits_row, sharpness, top_k, EXPERTS, BLOCK_E, SPARSE)
            total = tl.dot(tl.trans(scores), grads, total, input_precision="ieee")
        if shares is not None:
            share = tl.dot(grads, tl.trans(own), input_precision="ieee")  # [BLOCK_B, BLOCK_E]
            target = shares + (part.to(tl.int64) * batch + sample[:, None]) * EXPERTS + expert[None, :]
            tl.store(target, share, mask=(sample < batch)[:, None] & (expert < EXPERTS)[None, :])
    if d_experts is not None:
        tl.store(d_experts + offset, total.to(d_experts.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["logits_row", "grad_sample", "batch", "parts", "top_k", "sharpness", "inverse"],
)
def _logit_kernel(
    logits,  # (B, E)
    d_logits,  # (B, E), contiguous, written
    shares,  # (parts, B, E) float32, contiguous, or None
    grad_scores,  # (B, E) or None
    logits_row,
    grad_sample,
    batch,
    parts,
    top_k,
    sharpness,  # log2(e) / temperature
    inverse,  # 1 / temperature
    EXPERTS: tl.constexpr,
    SPARSE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program: the gradient of ``BLOCK_B`` samples' logits.  Grid: (sample tiles,)."""
    sample = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    expert = tl.arange(0, BLOCK_E)  # [BLOCK_E]
    exists = (sample < batch)[:, None] & (expert < EXPERTS)[None, :]
    inner = sample.to(tl.int64)[:, None] * EXPERTS + expert[None, :]  # [BLOCK_B, BLOCK_E]
    grads = tl.zeros([BLOCK_B, BLOCK_E], tl.float32)
    if shares is not None:
        for first in range(0, parts, BLOCK_P):
            part = first + tl.arange(0, BLOCK_P)
            offset = part.to(tl.int64)[:, None, None] * batch * EXPERTS + inner[None, :, :]
            mask = (part < parts)[:, None, None] & exists[None, :, :]
            grads += tl.sum(tl.load(shares + offset, mask=mask, other=0.0), 0)
    if grad_scores is not None:
        source = grad_scores + sample.to(tl.int64)[:, None] * grad_sample + expert[None, :]
        grads += tl.load(source, mask=exists, other=0.0).to(tl.float32)
    scores = routing_scores(logits, sample, batch, logits_row, sharpness, top_k, EXPERTS, BLOCK_E, SPARSE)
    mean = tl.sum(scores * grads, 1)[:, None]  # [BLOCK_B, 1]
    found = scores * (grads - mean) * inverse
    tl.store(d_logits + inner, found.to(d_logits.dtype.element_ty), mask=exists)


def mix_prompt_experts_backward(
    grad_prompts: Tensor | None,
    grad_scores: Tensor | None,
    router_logits: Tensor,
    experts: Tensor,
    *,
    temperature: float,
    top_k: int | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of logits and experts; one that comes in as None counts as zeros, one that is not needed is None."""
    tensors = (router_logits, experts, grad_prompts, grad_scores)
    return plan.run(backward, tensors, (float(temperature), top_k, needs))  # pyright: ignore[reportReturnType]


def backward(
    tape: Tape,
    logits: Tensor,
    experts: Tensor,
    grad_prompts: Tensor | None,
    grad_scores: Tensor | None,
    temperature: float,
    top_k: int | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, ...]:
    """:func:`mix_prompt_experts_backward` on a tape."""
    count, length, width = experts.shape
    batch = logits.shape[0]
    d_logits = tape.empty(logits.shape, logits.dtype) if needs[0] else None
    d_experts = tape.empty(experts.shape, experts.dtype) if needs[1] else None
    parts = length * -(-width // COLUMNS)
    mixes = grad_prompts is not None and batch > 0 and parts > 0
    if d_experts is not None and not mixes:
        tape.apply(Tensor.zero_, d_experts)
    logits = unit_last_stride(tape, logits)
    options, sparse = routing_of(count, temperature, top_k)
    shares = None
    if mixes and any(needs):
        if needs[0]:
            shares = tape.scratch((parts, batch, count), torch.float32)
        grad = unit_last_stride(tape, grad_prompts)
        strides, unit = in_units(grad.stride()[:2], width)
        constants = (count, width, unit, sparse, SAMPLES, block_of(count), COLUMNS)
        integers = (logits.stride(0), *strides, batch, length, options[0])
        tensors = (grad, logits, contiguous(tape, experts), d_experts, shares)
        tape.launch(
            _expert_kernel,
            parts,
            (*tensors, *integers, options[1], *constants),
            {"num_warps": 4},
            facts_of(tensors, (), integers, constants),
        )
    if d_logits is not None and batch:
        grad_scores = unit_last_stride(tape, grad_scores)
        constants = (count, sparse, OWN_SAMPLES, block_of(count), SHARES)
        grad_sample = 0 if grad_scores is None else grad_scores.stride(0)
        integers = (logits.stride(0), grad_sample, batch, parts, options[0])
        tensors = (logits, d_logits, shares, grad_scores)
        tape.launch(
            _logit_kernel,
            -(-batch // OWN_SAMPLES),
            (*tensors, *integers, options[1], 1 / temperature, *constants),
            {"num_warps": 4},
            facts_of(tensors, (), integers, constants),
        )
    return d_logits, d_experts
