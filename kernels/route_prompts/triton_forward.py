"""A routed layer's prompts and their norm in one launch: every program makes its samples' scores anew.

README.md beside this file has the derivation and the floors.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.launch import facts_of
from epic_fast.kernels.common.plan import Tape, unit_last_stride
from epic_fast.kernels.common.rows import contiguous, row_strides

# Rows of products that every program sums for itself; of more, a launch before it sums as many a program.
LONGEST = 1024
# Numbers of a query at a time, and products of a sample at a time.
QUERY, DOTS = 8, 256
# Experts whose rows are asked for together, where there are few; with many that costs registers that an A100 spills.
UNROLL, FEW_EXPERTS = 4, 16
# Small tensors that may start anywhere, as slices do.
SCALARS = ["token_dots", "prompt_dots", "router_bias", "projected", "embeddings"]


@dataclass(frozen=True)
class RouteTile:
    """``samples`` whole rows of ``block`` columns (a power of two, the width or more) in the registers of ``warps``."""

    samples: int
    block: int
    warps: int


@functools.cache
def route_tile(width: int) -> RouteTile:
    """Four samples and 16 columns a thread from 512 columns on, fewer samples from 4096 on; by the width alone, so that
    a sample's bits do not depend on the batch."""
    block = padded(width, 16)
    samples = max(1, min(4, 8192 // block))
    return RouteTile(samples, block, min(max(4, samples * block // 512), 16))


def padded(size: int, smallest: int = 1) -> int:
    """A power of two that holds so many."""
    return max(smallest, 1 << (max(size, 1) - 1).bit_length())


@triton.jit
def _add_dots(
    total,  # [BLOCK_B, BLOCK_T, BLOCK_J]
    dots,  # (B, T, J)
    sample,  # [BLOCK_B]
    number,  # [BLOCK_J], of the query
    batch,
    begin,
    end,
    dots_sample,
    dots_row,
    OWN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The rows ``begin`` to ``end`` of each sample, every ``BLOCK_T``-th into the same place."""
    known = ((sample < batch)[:, None] & (number < OWN)[None, :])[:, None, :]
    start = dots + sample.to(tl.int64)[:, None, None] * dots_sample + number[None, None, :]
    for first in range(begin, end, BLOCK_T):
        row = first + tl.arange(0, BLOCK_T)
        mask = known & (row < end)[None, :, None]
        total += tl.load(start + row.to(tl.int64)[None, :, None] * dots_row, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit(
    do_not_specialize=["batch", "rows", "parts", "dots_sample", "dots_row"], do_not_specialize_on_alignment=["dots"]
)
def _part_kernel(
    dots,  # (B, T, J)
    sums,  # (B, parts, J) float32, contiguous, written
    batch,
    rows,
    parts,
    dots_sample,
    dots_row,
    OWN: tl.constexpr,
    LONGEST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One program: the sum of ``LONGEST`` rows of a sample.  Grid: (B * parts,)."""
    program = tl.program_id(0)
    sample, part = program // parts, program % parts
    begin = part * LONGEST
    end = tl.minimum(begin + LONGEST, rows)
    for first in range(0, OWN, BLOCK_J):
        number = first + tl.arange(0, BLOCK_J)
        total = tl.zeros([1, BLOCK_T, BLOCK_J], tl.float32)
        one = sample + tl.arange(0, 1)
        total = _add_dots(total, dots, one, number, batch, begin, end, dots_sample, dots_row, OWN, BLOCK_T)
        target = sums + program.to(tl.int64) * OWN + number[None, :]
        tl.store(target, tl.sum(total, 1), mask=(number < OWN)[None, :])


@triton.jit
def _routing_scores(
    token_dots,
    prompt_dots,
    router_bias,
    projected,
    embeddings,
    sample,  # [BLOCK_B]
    batch,
    tokens,
    old_prompts,
    count,
    top_k,
    token_sample,
    token_row,
    prompt_sample,
    prompt_row,
    projected_sample,
    sharpness,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    EXPERTS: tl.constexpr,
    SPARSE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The scores of each sample, ``[BLOCK_B, BLOCK_E]``; zeros beyond samples and experts.

    The largest logit is subtracted before the temperature divides: the largest numbers that there are stay finite.
    """
    expert = tl.arange(0, BLOCK_E)
    logits = tl.zeros([BLOCK_B, BLOCK_E], tl.float32)
    for first in range(0, OWN, BLOCK_J):
        number = first + tl.arange(0, BLOCK_J)
        total = tl.zeros([BLOCK_B, BLOCK_T, BLOCK_J], tl.float32)
        if token_dots is not None:
            total = _add_dots(
                total, token_dots, sample, number, batch, 0, tokens, token_sample, token_row, OWN, BLOCK_T
            )  # fmt: skip
        if prompt_dots is not None:
            total = _add_dots(
                total, prompt_dots, sample, number, batch, 0, old_prompts, prompt_sample, prompt_row, OWN, BLOCK_T
            )  # fmt: skip
        query = tl.sum(total, 1) / count  # [BLOCK_B, BLOCK_J]
        if router_bias is not None:
            query += tl.load(router_bias + number, mask=number < OWN, other=0.0).to(tl.float32)[None, :]
        mask = (number < OWN)[:, None] & (expert < EXPERTS)[None, :]
        weight = tl.load(embeddings + number[:, None] * EXPERTS + expert[None, :], mask=mask, other=0.0)
        logits += tl.sum(query[:, :, None] * weight.to(tl.float32)[None, :, :], 1)
    for first in range(0, OTHER, BLOCK_D):
        number = first + tl.arange(0, BLOCK_D)
        source = projected + sample.to(tl.int64)[:, None] * projected_sample + number[None, :]
        query = tl.load(source, mask=(sample < batch)[:, None] & (number < OTHER)[None, :], other=0.0).to(tl.float32)
        mask = (number < OTHER)[:, None] & (expert < EXPERTS)[None, :]
        weight = tl.load(embeddings + (OWN + number)[:, None] * EXPERTS + expert[None, :], mask=mask, other=0.0)
        logits += tl.sum(query[:, :, None] * weight.to(tl.float32)[None, :, :], 1)
    expert = expert[None, :]  # [1, BLOCK_E]
    own = tl.where(expert < EXPERTS, logits, float("-inf"))
    if SPARSE:
        better = tl.zeros([BLOCK_B, BLOCK_E], tl.int32)
        for other in range(EXPERTS):
            theirs = tl.sum(tl.where(expert == other, logits, 0.0), 1)[:, None]
            # Of equal logits the first ones are taken.
            better += ((theirs > own) | ((theirs == own) & (other < expert))).to(tl.int32)
        own = tl.where(better < top_k, own, float("-inf"))
    largest = tl.max(own, 1)[:, None]  # [BLOCK_B, 1]
    weights = tl.exp2((own - largest) * sharpness)
    exists = (sample < batch)[:, None] & (expert < EXPERTS)
    return tl.where(exists, weights / tl.sum(weights, 1)[:, None], 0.0)


@triton.jit(
    do_not_specialize=[
        "eps",
        "sharpness",
        "batch",
        "static_rows",
        "mixed_rows",
        "rows",
        "tokens",
        "old_prompts",
        "count",
        "top_k",
        "token_sample",
        "token_row",
        "prompt_sample",
        "prompt_row",
        "projected_sample",
        "mapped_sample",
        "mapped_row",
    ],
    do_not_specialize_on_alignment=SCALARS,
)
def _forward_kernel(
    out,  # (B, P, C), contiguous, written
    normed,  # (B, P, C), contiguous, written
    scores,  # (B, E) float32, contiguous, written, or None: the mixture is even
    norm_weight,  # (C,)
    norm_bias,  # (C,)
    static,  # (L, C), contiguous, or None
    experts,  # (E, L, C), contiguous, or None
    mapped,  # (B, m, C), unit last stride, or None
    token_dots,  # (B, T, J), unit last stride, or None
    prompt_dots,  # (B, O, J), unit last stride, or None
    router_bias,  # (J,) or None
    projected,  # (B, D), unit last stride; None with scores
    embeddings,  # (J + D, E), contiguous; None with scores
    eps,
    sharpness,  # log2(e) / temperature
    batch,
    static_rows,
    mixed_rows,
    rows,  # P
    tokens,
    old_prompts,
    count,
    top_k,
    token_sample,  # strides of sample and row
    token_row,
    prompt_sample,
    prompt_row,
    projected_sample,
    mapped_sample,  # in units of UNIT elements
    mapped_row,
    OWN: tl.constexpr,  # J, or 0
    OTHER: tl.constexpr,  # D
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    SPARSE: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: one prompt of ``BLOCK_B`` samples, all columns.  Grid: (sample tiles * P,)."""
    row = tl.program_id(0) % rows
    sample = tl.program_id(0) // rows * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    column = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    inside = column < WIDTH
    exists = (sample < batch)[:, None] & inside[None, :]
    # Rows before the mixed ones have a negative number, rows behind them one of mixed_rows or more.
    inner = (row - static_rows).to(tl.int64)
    mixes = (inner >= 0) & (inner < mixed_rows)

    expert = tl.arange(0, BLOCK_E)  # [BLOCK_E]
    found = tl.zeros([BLOCK_B, BLOCK_E], tl.float32)
    if scores is not None:  # noqa: SIM102 (known when the kernel is compiled)
        if mixes | (row == 0):
            found = _routing_scores(
                token_dots, prompt_dots, router_bias, projected, embeddings, sample, batch, tokens, old_prompts, count,
                top_k, token_sample, token_row, prompt_sample, prompt_row, projected_sample, sharpness, OWN, OTHER,
                EXPERTS, SPARSE, BLOCK_B, BLOCK_T, BLOCK_J, BLOCK_D, BLOCK_E,
            )  # fmt: skip
            if row == 0:
                target = scores + sample.to(tl.int64)[:, None] * EXPERTS + expert[None, :]
                tl.store(target, found, mask=(sample < batch)[:, None] & (expert < EXPERTS)[None, :])

    x = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    if static is not None:  # noqa: SIM102 (known when the kernel is compiled)
        if row < static_rows:
            own = tl.load(static + row.to(tl.int64) * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
            x += own[None, :]
    if experts is not None:  # noqa: SIM102 (known when the kernel is compiled)
        if mixes:
            for each in tl.range(0, EXPERTS, loop_unroll_factor=UNROLL):
                source = experts + (each * mixed_rows + inner) * WIDTH + column
                own = tl.load(source, mask=inside, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_C]
                if scores is not None:
                    x += tl.sum(tl.where(expert[None, :] == each, found, 0.0), 1)[:, None] * own
                else:
                    x += own
            if scores is None:
                x = x / EXPERTS
    if mapped is not None:  # noqa: SIM102 (known when the kernel is compiled)
        if inner >= mixed_rows:
            start = (sample.to(tl.int64) * mapped_sample + (inner - mixed_rows) * mapped_row) * UNIT
            x += tl.load(mapped + start[:, None] + column[None, :], mask=exists, other=0.0).to(tl.float32)

    # What is normalised is what is written.
    rounded = x.to(out.dtype.element_ty)
    target = ((sample.to(tl.int64) * rows + row) * WIDTH)[:, None] + column[None, :]
    tl.store(out + target, rounded, mask=exists)
    x = rounded.to(tl.float32)
    center = tl.sum(x, 1) * (1.0 / WIDTH)
    x = tl.where(inside[None, :], x - center[:, None], 0.0)
    variance = tl.sum(x * x, 1) * (1.0 / WIDTH)
    inverse = tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), tl.sqrt_rn(variance + eps))
    gain = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + column, mask=inside, other=0.0).to(tl.float32)
    y = x * inverse[:, None] * gain[None, :] + shift[None, :]
    tl.store(normed + target, y.to(normed.dtype.element_ty), mask=exists)


def route_prompts(
    out: Tensor,
    normed: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    token_dots: Tensor | None,
    prompt_dots: Tensor | None,
    count: int,
    router_bias: Tensor | None,
    projected: Tensor | None,
    embeddings: Tensor | None,
    static: Tensor | None,
    experts: Tensor | None,
    mapped: Tensor | None,
    *,
    temperature: float,
    top_k: int | None = None,
) -> Tensor | None:
    """Shapes and meanings are those of :func:`epic_fast.ops.route_prompts.route_prompts`."""
    router = (token_dots, prompt_dots, router_bias, projected, embeddings)
    tensors = (out, normed, norm_weight, norm_bias, *router, static, experts, mapped)
    return plan.run(forward, tensors, (float(eps), count, float(temperature), top_k))[0]


def forward(
    tape: Tape,
    out: Tensor,
    normed: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    token_dots: Tensor | None,
    prompt_dots: Tensor | None,
    router_bias: Tensor | None,
    projected: Tensor | None,
    embeddings: Tensor | None,
    static: Tensor | None,
    experts: Tensor | None,
    mapped: Tensor | None,
    eps: float,
    count: int,
    temperature: float,
    top_k: int | None,
) -> tuple[Tensor | None, ...]:
    """:func:`route_prompts` on a tape; also returns the two tensors that it writes."""
    batch, rows, width = out.shape
    if embeddings is not None:
        found = embeddings.shape[1]
    else:
        found = 1 if experts is None else experts.shape[0]
    scores = None if embeddings is None else tape.empty((batch, found), torch.float32)
    if not batch:
        return scores, out, normed
    own = 0
    if token_dots is not None or prompt_dots is not None:
        own = (prompt_dots if token_dots is None else token_dots).shape[2]
    other = 0 if projected is None else projected.shape[1]
    block_j = padded(min(own, QUERY))
    token_dots, prompt_dots, projected, mapped = (
        unit_last_stride(tape, each) for each in (token_dots, prompt_dots, projected, mapped)
    )
    if token_dots is not None and token_dots.shape[1] > LONGEST:
        token_dots = _summed(tape, token_dots, block_j)
    router_bias, embeddings, static, experts = (
        None if each is None else contiguous(tape, each) for each in (router_bias, embeddings, static, experts)
    )
    norm_weight, norm_bias = contiguous(tape, norm_weight), contiguous(tape, norm_bias)
    sparse = top_k is not None and top_k < found
    _, mapped_strides, unit = row_strides((mapped,))
    tile = route_tile(width)
    blocks = (tile.samples, DOTS // block_j, block_j, padded(min(other, QUERY)), padded(found), tile.block)
    constants = (own, other, found, width, unit, sparse, UNROLL if found <= FEW_EXPERTS else 1, *blocks)
    lengths = [0 if each is None else each.shape[-2] for each in (static, experts, token_dots, prompt_dots)]
    integers = (
        batch,
        lengths[0],
        lengths[1],
        rows,
        *lengths[2:],
        count,
        top_k if sparse else found,
        *((0, 0) if token_dots is None else token_dots.stride()[:2]),
        *((0, 0) if prompt_dots is None else prompt_dots.stride()[:2]),
        0 if projected is None else projected.stride(0),
        *mapped_strides,
    )
    tensors = (out, normed, scores, norm_weight, norm_bias, static, experts, mapped)
    scalars = (token_dots, prompt_dots, router_bias, projected, embeddings)
    known = (constants, tile.warps, tuple(each is None for each in scalars))
    tape.launch(
        _forward_kernel,
        -(-batch // tile.samples) * rows,
        (*tensors, *scalars, eps, math.log2(math.e) / temperature, *integers, *constants),
        {"num_warps": tile.warps},
        facts_of(tensors, [each for each in scalars if each is not None], integers, known),
    )
    return scores, out, normed


def _summed(tape: Tape, dots: Tensor, block_j: int) -> Tensor:
    """``(B, T, J)`` as ``(B, parts, J)``."""
    batch, rows, own = dots.shape
    parts = -(-rows // LONGEST)
    sums = tape.scratch((batch, parts, own), torch.float32)
    constants = (own, LONGEST, DOTS // block_j, block_j)
    integers = (batch, rows, parts, *dots.stride()[:2])
    tape.launch(
        _part_kernel,
        batch * parts,
        (dots, sums, *integers, *constants),
        {"num_warps": 4},
        facts_of((sums,), (dots,), integers, constants),
    )
    return sums
