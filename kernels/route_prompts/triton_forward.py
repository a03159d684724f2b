"""A routed layer's prompts and their norm in one launch: every program makes its sample's scores anew.

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
QUERY, DOTS = 8, 512
# Experts' rows are asked for at once, before the scores are known, where they are so many numbers a warp or fewer.
AT_ONCE, MOST_AT_ONCE = 2048, 32768
# Small tensors that may start anywhere, as slices do.
SCALARS = ["token_dots", "prompt_dots", "router_bias", "projected", "embeddings"]


@dataclass(frozen=True)
class RouteTile:
    """A whole row of ``block`` columns (a power of two, the width or more) in the registers of ``warps``."""

    block: int
    warps: int


@functools.cache
def route_tile(width: int) -> RouteTile:
    """16 columns a thread from 512 columns on: up to there a program is one warp, which waits for no other."""
    block = padded(width, 16)
    return RouteTile(block, min(max(1, block // 512), 16))


def padded(size: int, smallest: int = 1) -> int:
    """A power of two that holds so many."""
    return max(smallest, 1 << (max(size, 1) - 1).bit_length())


@triton.jit
def _add_dots(
    total,  # [BLOCK_T, BLOCK_J]
    dots,  # (T, J), of a sample
    number,  # [BLOCK_J], of the query
    begin,
    end,
    dots_row,
    OWN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The rows ``begin`` to ``end``, every ``BLOCK_T``-th into the same place."""
    for first in range(begin, end, BLOCK_T):
        row = first + tl.arange(0, BLOCK_T)
        mask = (row < end)[:, None] & (number < OWN)[None, :]
        total += tl.load(dots + row.to(tl.int64)[:, None] * dots_row + number[None, :], mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["rows", "parts", "dots_sample", "dots_row"], do_not_specialize_on_alignment=["dots"])
def _part_kernel(
    dots,  # (B, T, J)
    sums,  # (B, parts, J) float32, contiguous, written
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
        total = tl.zeros([BLOCK_T, BLOCK_J], tl.float32)
        total = _add_dots(total, dots + sample.to(tl.int64) * dots_sample, number, begin, end, dots_row, OWN, BLOCK_T)
        tl.store(sums + program.to(tl.int64) * OWN + number, tl.sum(total, 0), mask=number < OWN)


@triton.jit
def _routing_scores(
    token_dots,  # of the sample, as all that follow
    prompt_dots,
    router_bias,
    projected,
    embeddings,
    tokens,
    old_prompts,
    count,
    top_k,
    token_row,
    prompt_row,
    sharpness,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    EXPERTS: tl.constexpr,
    SPARSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The scores of a sample, ``[BLOCK_E]``; zeros beyond the experts.

    The largest logit is subtracted before the temperature divides: the largest numbers that there are stay finite.
    """
    expert = tl.arange(0, BLOCK_E)
    logits = tl.zeros([BLOCK_E], tl.float32)
    for first in tl.static_range(0, OTHER, BLOCK_D):
        number = first + tl.arange(0, BLOCK_D)
        query = tl.load(projected + number, mask=number < OTHER, other=0.0).to(tl.float32)
        mask = (number < OTHER)[:, None] & (expert < EXPERTS)[None, :]
        weight = tl.load(embeddings + (OWN + number)[:, None] * EXPERTS + expert[None, :], mask=mask, other=0.0)
        logits += tl.sum(query[:, None] * weight.to(tl.float32), 0)
    for first in tl.static_range(0, OWN, BLOCK_J):
        number = first + tl.arange(0, BLOCK_J)
        mask = (number < OWN)[:, None] & (expert < EXPERTS)[None, :]
        weight = tl.load(embeddings + number[:, None] * EXPERTS + expert[None, :], mask=mask, other=0.0)
        total = tl.zeros([BLOCK_T, BLOCK_J], tl.float32)
        if prompt_dots is not None:
            total = _add_dots(total, prompt_dots, number, 0, old_prompts, prompt_row, OWN, BLOCK_T)
        if token_dots is not None:
            total = _add_dots(total, token_dots, number, 0, tokens, token_row, OWN, BLOCK_T)
        query = tl.sum(total, 0) / count  # [BLOCK_J]
        if router_bias is not None:
            query += tl.load(router_bias + number, mask=number < OWN, other=0.0).to(tl.float32)
        logits += tl.sum(query[:, None] * weight.to(tl.float32), 0)
    own = tl.where(expert < EXPERTS, logits, float("-inf"))
    if SPARSE:
        better = tl.zeros([BLOCK_E], tl.int32)
        for other in range(EXPERTS):
            theirs = tl.sum(tl.where(expert == other, logits, 0.0), 0)
            # Of equal logits the first ones are taken.
            better += ((theirs > own) | ((theirs == own) & (other < expert))).to(tl.int32)
        own = tl.where(better < top_k, own, float("-inf"))
    weights = tl.exp2((own - tl.max(own, 0)) * sharpness)
    return tl.where(expert < EXPERTS, weights / tl.sum(weights, 0), 0.0)


@triton.jit(
    do_not_specialize=[
        "eps",
        "sharpness",
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
    AT_ONCE: tl.constexpr,  # experts' rows are asked for together
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: one prompt of a sample, all columns.  Grid: (B * P,)."""
    row = tl.program_id(0) % rows
    sample = (tl.program_id(0) // rows).to(tl.int64)
    column = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    inside = column < WIDTH
    gain = tl.load(norm_weight + column, mask=inside, other=0.0)
    shift = tl.load(norm_bias + column, mask=inside, other=0.0)
    # Rows before the mixed ones have a negative number, rows behind them one of mixed_rows or more.
    inner = (row - static_rows).to(tl.int64)
    mixes = (inner >= 0) & (inner < mixed_rows)

    x = tl.zeros([BLOCK_C], tl.float32)
    if static is not None:  # noqa: SIM102 (known when the kernel is compiled)
        if row < static_rows:
            x += tl.load(static + row.to(tl.int64) * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if mapped is not None:  # noqa: SIM102 (known when the kernel is compiled)
        if inner >= mixed_rows:
            start = (sample * mapped_sample + (inner - mixed_rows) * mapped_row) * UNIT
            x += tl.load(mapped + start + column, mask=inside, other=0.0).to(tl.float32)
    if (scores is not None) | (experts is not None):  # noqa: SIM102 (known when the kernel is compiled)
        if mixes | ((row == 0) & (scores is not None)):
            expert = tl.arange(0, BLOCK_E)  # [BLOCK_E]
            # The first row makes the scores that are returned, also where it is no mixture.
            place = tl.where(mixes, inner, 0)
            if (experts is not None) and AT_ONCE:
                source = experts + (expert[:, None] * mixed_rows + place) * WIDTH + column[None, :]
                wanted = (expert < EXPERTS)[:, None] & inside[None, :]
                # On their way while the scores are made.
                together = tl.load(source, mask=wanted, other=0.0)  # [BLOCK_E, BLOCK_C]
            if scores is not None:
                own_tokens = token_dots
                if token_dots is not None:
                    own_tokens = token_dots + sample * token_sample
                own_prompts = prompt_dots
                if prompt_dots is not None:
                    own_prompts = prompt_dots + sample * prompt_sample
                share = _routing_scores(
                    own_tokens, own_prompts, router_bias, projected + sample * projected_sample, embeddings, tokens,
                    old_prompts, count, top_k, token_row, prompt_row, sharpness, OWN, OTHER, EXPERTS, SPARSE, BLOCK_T,
                    BLOCK_J, BLOCK_D, BLOCK_E,
                )  # fmt: skip
                if row == 0:
                    tl.store(scores + sample * EXPERTS + expert, share, mask=expert < EXPERTS)
            else:
                share = tl.where(expert < EXPERTS, 1.0 / EXPERTS, 0.0)
            if experts is not None:
                if AT_ONCE:
                    mixed = tl.sum(together.to(tl.float32) * share[:, None], 0)
                else:
                    mixed = tl.zeros([BLOCK_C], tl.float32)
                    for each in range(0, EXPERTS):
                        start = (each * mixed_rows + place) * WIDTH
                        own = tl.load(experts + start + column, mask=inside, other=0.0).to(tl.float32)
                        mixed += tl.sum(tl.where(expert == each, share, 0.0), 0) * own
                if mixes:
                    x += mixed

    # What is normalised is what is written.
    rounded = x.to(out.dtype.element_ty)
    target = (sample * rows + row) * WIDTH + column
    tl.store(out + target, rounded, mask=inside)
    x = rounded.to(tl.float32)
    x = tl.where(inside, x - tl.sum(x, 0) * (1.0 / WIDTH), 0.0)
    variance = tl.sum(x * x, 0) * (1.0 / WIDTH)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    y = x * inverse * gain.to(tl.float32) + shift.to(tl.float32)
    tl.store(normed + target, y.to(normed.dtype.element_ty), mask=inside)


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
    block_e = padded(found)
    blocks = (DOTS // block_j, block_j, padded(min(other, QUERY)), block_e, tile.block)
    at_once = block_e * tile.block <= AT_ONCE * tile.warps < MOST_AT_ONCE
    constants = (own, other, found, width, unit, sparse, at_once, *blocks)
    lengths = [0 if each is None else each.shape[-2] for each in (static, experts, token_dots, prompt_dots)]
    integers = (
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
        batch * rows,
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
    integers = (rows, parts, *dots.stride()[:2])
    tape.launch(
        _part_kernel,
        batch * parts,
        (dots, sums, *integers, *constants),
        {"num_warps": 4},
        facts_of((sums,), (dots,), integers, constants),
    )
    return sums
