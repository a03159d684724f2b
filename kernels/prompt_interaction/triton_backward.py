"""The prompt interaction, backward, in three launches (two where the forward pass kept the projections).

README.md beside this file has the derivation, the floors and what was tried.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportOperatorIssue=false, reportOptionalIterable=false, reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.cards import shared_memory
from epic_fast.kernels.common.launch import facts_of
from epic_fast.kernels.common.plan import Tape, precision, unit_last_stride
from epic_fast.kernels.prompt_interaction.tiles import (
    GradientTile,
    MixTile,
    ProductTile,
    gradient_tile,
    mix_backward_tile,
)
from epic_fast.kernels.prompt_interaction.triton_forward import (
    SCALARS,
    SIZES,
    alignment,
    contiguous,
    load_gate,
    load_rows,
    precision_of,
    product,
    project,
    prompt_block,
    same_types,
    scores,
    setting_of,
)


@triton.jit
def store_rows(base, row, stride, row_exists, column, WIDTH: tl.constexpr, value):
    tl.store(
        base + row.to(tl.int64)[:, None] * stride + column[None, :],
        value.to(base.dtype.element_ty),
        mask=row_exists[:, None] & (column < WIDTH)[None, :],
    )


@triton.jit(
    do_not_specialize=["batch", *SIZES, "stride_gtb", "stride_gtp", "stride_gvb", "stride_gvp"],
    do_not_specialize_on_alignment=SCALARS,
)
def mix_backward_kernel(
    grad_next_text,  # (B, P_TEXT, D_TEXT)
    grad_next_vision,  # (B, P_VISION, D_VISION)
    text_prompt,  # (B, P_TEXT, D_TEXT)
    vision_in_text,  # (B, P_VISION, D_TEXT), contiguous
    text_in_vision,  # (B, P_TEXT, D_VISION), contiguous
    text_gate,  # () or (D_TEXT,)
    vision_gate,  # () or (D_VISION,)
    temperature,  # ()
    grad_text_prompt,  # (B, P_TEXT, D_TEXT), contiguous, written: all but what comes through the projection
    grad_vision_in_text,  # (B, P_VISION, D_TEXT), contiguous, written
    grad_text_in_vision,  # (B, P_TEXT, D_VISION), contiguous, written
    partials,  # float32, written: the gates' (B, TEXT_SUMS) and (B, VISION_SUMS), the temperature's (B,)
    eps,
    batch,
    P_TEXT,
    P_VISION,
    stride_tb,
    stride_tp,
    stride_gtb,
    stride_gtp,
    stride_gvb,
    stride_gvp,
    D_TEXT: tl.constexpr,
    D_VISION: tl.constexpr,
    TEXT_CHANNELS: tl.constexpr,
    VISION_CHANNELS: tl.constexpr,
    NEED_TEXT: tl.constexpr,  # grad_text_prompt
    NEED_VISION_IN_TEXT: tl.constexpr,
    NEED_TEXT_IN_VISION: tl.constexpr,
    NEED_TEXT_GATE: tl.constexpr,
    NEED_VISION_GATE: tl.constexpr,
    NEED_TEMPERATURE: tl.constexpr,
    TEXT_SUMS: tl.constexpr,  # partial sums of one sample for the text gate: one a channel, or one a part
    VISION_SUMS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TEXT_PARTS: tl.constexpr,  # programs of one sample for columns of the text space; 0 where nothing is needed there
    VISION_PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every program finds the similarity of its sample again, then writes the gradients of its part of the columns.

    Columns of the text space also need the similarity's gradient; those of the vision space do without it.
    """
    program = tl.program_id(0)
    sample = (program // (TEXT_PARTS + VISION_PARTS)).to(tl.int64)
    part = program % (TEXT_PARTS + VISION_PARTS)
    text_prompt += sample * (stride_tb // ALIGNMENT * ALIGNMENT)
    grad_next_text += sample * (stride_gtb // ALIGNMENT * ALIGNMENT)
    grad_next_vision += sample * (stride_gvb // ALIGNMENT * ALIGNMENT)
    vision_in_text += sample * P_VISION * D_TEXT
    text_in_vision += sample * P_TEXT * D_VISION
    stride_tp = stride_tp // ALIGNMENT * ALIGNMENT
    stride_gtp = stride_gtp // ALIGNMENT * ALIGNMENT
    stride_gvp = stride_gvp // ALIGNMENT * ALIGNMENT
    text_gate_partial = partials + sample * TEXT_SUMS
    vision_gate_partial = partials + batch.to(tl.int64) * TEXT_SUMS + sample * VISION_SUMS
    temperature_partial = partials + batch.to(tl.int64) * (TEXT_SUMS + VISION_SUMS) + sample
    i = tl.arange(0, BLOCK_T)
    j = tl.arange(0, BLOCK_V)
    text_exists = i < P_TEXT
    vision_exists = j < P_VISION
    NEED_SCORES: tl.constexpr = NEED_TEXT or NEED_VISION_IN_TEXT or NEED_TEMPERATURE

    raw = tl.zeros([BLOCK_T, BLOCK_V], dtype=tl.float32)
    grad_by_text = tl.zeros([BLOCK_T, BLOCK_V], dtype=tl.float32)
    text_squares = tl.zeros([BLOCK_T, BLOCK_S], dtype=tl.float32)
    vision_squares = tl.zeros([BLOCK_V, BLOCK_S], dtype=tl.float32)
    for d in tl.range(0, D_TEXT, BLOCK_S, num_stages=STAGES):
        column = d + tl.arange(0, BLOCK_S)
        t = load_rows(text_prompt, i, stride_tp, text_exists, column, D_TEXT)  # [BLOCK_T, BLOCK_S]
        z = load_rows(vision_in_text, j, D_TEXT, vision_exists, column, D_TEXT)  # [BLOCK_V, BLOCK_S]
        raw = product(t, z.T, raw, PRECISION)
        text_squares += t.to(tl.float32) * t.to(tl.float32)
        vision_squares += z.to(tl.float32) * z.to(tl.float32)
        if NEED_SCORES:
            g = load_rows(grad_next_text, i, stride_gtp, text_exists, column, D_TEXT)  # [BLOCK_T, BLOCK_S]
            if TEXT_CHANNELS:
                gated = g.to(tl.float32) * load_gate(text_gate, column, D_TEXT, TEXT_CHANNELS)[None, :]
                grad_by_text = product(gated, z.T, grad_by_text, PRECISION)
            else:
                grad_by_text = product(g, z.T, grad_by_text, PRECISION)
    text_square = tl.sum(text_squares, axis=1)
    vision_square = tl.sum(vision_squares, axis=1)
    inverse_temperature = 1.0 / tl.load(temperature).to(tl.float32)
    similarity, by_text, by_vision, text_inverse, vision_inverse = scores(
        raw, text_square, vision_square, inverse_temperature, eps, text_exists, vision_exists
    )

    if part < TEXT_PARTS:
        if NEED_SCORES:
            grad_by_vision = tl.zeros([BLOCK_V, BLOCK_T], dtype=tl.float32)
            for d in tl.range(0, D_VISION, BLOCK_S, num_stages=STAGES):
                column = d + tl.arange(0, BLOCK_S)
                z = load_rows(text_in_vision, i, D_VISION, text_exists, column, D_VISION)  # [BLOCK_T, BLOCK_S]
                g = load_rows(grad_next_vision, j, stride_gvp, vision_exists, column, D_VISION)  # [BLOCK_V, BLOCK_S]
                if VISION_CHANNELS:
                    gated = g.to(tl.float32) * load_gate(vision_gate, column, D_VISION, VISION_CHANNELS)[None, :]
                    grad_by_vision = product(gated, z.T, grad_by_vision, PRECISION)
                else:
                    grad_by_vision = product(g, z.T, grad_by_vision, PRECISION)
            if not TEXT_CHANNELS:
                grad_by_text *= tl.load(text_gate).to(tl.float32)
            if not VISION_CHANNELS:
                grad_by_vision *= tl.load(vision_gate).to(tl.float32)
            through_text = by_text * grad_by_text  # [BLOCK_T, BLOCK_V]
            through_vision = by_vision * grad_by_vision.T
            grad_similarity = through_text - by_text * tl.sum(through_text, axis=1)[:, None]
            grad_similarity += through_vision - by_vision * tl.sum(through_vision, axis=0)[None, :]
            along = grad_similarity * similarity  # [BLOCK_T, BLOCK_V]
            if NEED_TEMPERATURE:  # noqa: SIM102 (known when the kernel is compiled)
                if part == 0:
                    tl.store(temperature_partial, -tl.sum(along) * inverse_temperature)
            # A norm below eps is a constant: nothing flows through it.
            text_pull = tl.where(tl.sqrt(text_square) < eps, 0.0, tl.sum(along, axis=1) * text_inverse * text_inverse)
            vision_pull = tl.where(
                tl.sqrt(vision_square) < eps, 0.0, tl.sum(along, axis=0) * vision_inverse * vision_inverse
            )
            mixing = grad_similarity * text_inverse[:, None] * vision_inverse[None, :] * inverse_temperature
        if NEED_TEXT or NEED_VISION_IN_TEXT or NEED_TEXT_GATE:
            text_gate_sum = tl.zeros([BLOCK_D], dtype=tl.float32)
            for d in tl.range(part * BLOCK_D, D_TEXT, TEXT_PARTS * BLOCK_D):
                column = d + tl.arange(0, BLOCK_D)
                z = load_rows(vision_in_text, j, D_TEXT, vision_exists, column, D_TEXT)  # [BLOCK_V, BLOCK_D]
                g = load_rows(grad_next_text, i, stride_gtp, text_exists, column, D_TEXT)  # [BLOCK_T, BLOCK_D]
                if NEED_TEXT or NEED_VISION_IN_TEXT:
                    t = load_rows(text_prompt, i, stride_tp, text_exists, column, D_TEXT)  # [BLOCK_T, BLOCK_D]
                if NEED_VISION_IN_TEXT:
                    grad = tl.zeros([BLOCK_V, BLOCK_D], dtype=tl.float32)
                    grad = product(by_text.T, g, grad, PRECISION)
                    grad *= load_gate(text_gate, column, D_TEXT, TEXT_CHANNELS)[None, :]
                    grad = product(mixing.T, t, grad, PRECISION) - vision_pull[:, None] * z.to(tl.float32)
                    to = grad_vision_in_text + sample * P_VISION * D_TEXT
                    store_rows(to, j, D_TEXT, vision_exists, column, D_TEXT, grad)
                if NEED_TEXT:
                    grad = g.to(tl.float32) - text_pull[:, None] * t.to(tl.float32)  # [BLOCK_T, BLOCK_D]
                    grad = product(mixing, z, grad, PRECISION)
                    to = grad_text_prompt + sample * P_TEXT * D_TEXT
                    store_rows(to, i, D_TEXT, text_exists, column, D_TEXT, grad)
                if NEED_TEXT_GATE:
                    mixed = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
                    mixed = product(by_text, z, mixed, PRECISION)
                    channel = tl.sum(mixed * g.to(tl.float32), axis=0)  # [BLOCK_D]
                    if TEXT_CHANNELS:
                        tl.store(text_gate_partial + column, channel, mask=column < D_TEXT)
                    else:
                        text_gate_sum += channel
            if NEED_TEXT_GATE and not TEXT_CHANNELS:
                tl.store(text_gate_partial + part, tl.sum(text_gate_sum))
    elif NEED_TEXT_IN_VISION or NEED_VISION_GATE:
        part -= TEXT_PARTS
        vision_gate_sum = tl.zeros([BLOCK_D], dtype=tl.float32)
        for d in tl.range(part * BLOCK_D, D_VISION, VISION_PARTS * BLOCK_D):
            column = d + tl.arange(0, BLOCK_D)
            g = load_rows(grad_next_vision, j, stride_gvp, vision_exists, column, D_VISION)  # [BLOCK_V, BLOCK_D]
            if NEED_TEXT_IN_VISION:
                grad = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
                grad = product(by_vision, g, grad, PRECISION)
                grad *= load_gate(vision_gate, column, D_VISION, VISION_CHANNELS)[None, :]
                to = grad_text_in_vision + sample * P_TEXT * D_VISION
                store_rows(to, i, D_VISION, text_exists, column, D_VISION, grad)
            if NEED_VISION_GATE:
                z = load_rows(text_in_vision, i, D_VISION, text_exists, column, D_VISION)  # [BLOCK_T, BLOCK_D]
                mixed = tl.zeros([BLOCK_V, BLOCK_D], dtype=tl.float32)
                mixed = product(by_vision.T, z, mixed, PRECISION)
                channel = tl.sum(mixed * g.to(tl.float32), axis=0)  # [BLOCK_D]
                if VISION_CHANNELS:
                    tl.store(vision_gate_partial + column, channel, mask=column < D_VISION)
                else:
                    vision_gate_sum += channel
        if NEED_VISION_GATE and not VISION_CHANNELS:
            tl.store(vision_gate_partial + part, tl.sum(vision_gate_sum))


@triton.jit
def sum_rows(source, result, rows, first_column, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums of BLOCK_C columns of a contiguous (rows, WIDTH) over the rows, in one fixed order."""
    row = tl.arange(0, BLOCK_R)
    column = first_column + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for r in range(0, rows, BLOCK_R):
        total += load_rows(source, r + row, WIDTH, r + row < rows, column, WIDTH).to(tl.float32)
    total = tl.sum(total, axis=0)  # [BLOCK_C]
    tl.store(result + column, total.to(result.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def sum_all(source, result, count, BLOCK: tl.constexpr):
    """The sum of ``count`` numbers, in one fixed order."""
    index = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, count, BLOCK):
        total += tl.load(source + first + index, mask=first + index < count, other=0.0)
    tl.store(result, tl.sum(total).to(result.dtype.element_ty))


@triton.jit(
    do_not_specialize=[
        "batch",
        "rows_0",
        "rows_1",
        "P_0",
        "P_1",
        "stride_pb0",
        "stride_pp0",
        "stride_pb1",
        "stride_pp1",
        "stride_rb0",
        "stride_rp0",
        "stride_rb1",
        "stride_rp1",
    ],
    do_not_specialize_on_alignment=["grad_gate_0", "grad_gate_1", "grad_temperature"],
)
def gradients_kernel(
    grad_projected_0,  # (B, P_0, K_0), contiguous: the gradient of prompt_0 @ weight_0.T + bias_0
    grad_projected_1,  # (B, P_1, K_1)
    weight_0,  # (K_0, N_0), contiguous
    weight_1,  # (K_1, N_1)
    prompt_0,  # (B, P_0, N_0)
    prompt_1,  # (B, P_1, N_1)
    residual_0,  # (B, P_0, N_0): what reaches the prompt by other ways; may be grad_prompt_0 itself
    residual_1,  # (B, P_1, N_1)
    partials,  # float32: (B, GATE_SUMS_0), (B, GATE_SUMS_1), (B,)
    grad_prompt_0,  # (B, P_0, N_0), contiguous, written
    grad_prompt_1,  # (B, P_1, N_1)
    grad_weight_0,  # (K_0, N_0), contiguous, written
    grad_weight_1,  # (K_1, N_1)
    grad_bias_0,  # (K_0,), written
    grad_bias_1,  # (K_1,)
    grad_gate_0,  # () or (N_0,), written
    grad_gate_1,  # () or (N_1,)
    grad_temperature,  # (), written
    batch,
    rows_0,  # B * P_0
    rows_1,
    P_0,
    P_1,
    stride_pb0,
    stride_pp0,
    stride_pb1,
    stride_pp1,
    stride_rb0,
    stride_rp0,
    stride_rb1,
    stride_rp1,
    K_0: tl.constexpr,
    N_0: tl.constexpr,
    K_1: tl.constexpr,
    N_1: tl.constexpr,
    NEED_PROMPT_0: tl.constexpr,
    NEED_PROMPT_1: tl.constexpr,
    NEED_WEIGHT_0: tl.constexpr,
    NEED_WEIGHT_1: tl.constexpr,
    NEED_BIAS_0: tl.constexpr,
    NEED_BIAS_1: tl.constexpr,
    NEED_GATE_0: tl.constexpr,
    NEED_GATE_1: tl.constexpr,
    NEED_TEMPERATURE: tl.constexpr,
    CHANNELS_0: tl.constexpr,
    CHANNELS_1: tl.constexpr,
    GATE_SUMS_0: tl.constexpr,
    GATE_SUMS_1: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,  # tiles of the prompts' gradients, the sum over K in steps of BLOCK_K
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHT_M: tl.constexpr,  # tiles of the weights' gradients, the sum over rows in steps of WEIGHT_R
    WEIGHT_N: tl.constexpr,
    WEIGHT_R: tl.constexpr,
    BLOCK_R: tl.constexpr,  # tiles of the sums over rows
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All that is a matrix product or a sum over rows: every program takes one tile of one of them.

    They do not wait for one another, so that they share a launch and fill the card together.  The two products of a
    kind share one loop, because each loop would keep its own stages in shared memory.
    """
    tile = tl.program_id(0)

    if NEED_PROMPT_0 or NEED_PROMPT_1:
        first = 0
        both = 0
        if NEED_PROMPT_0:
            first = tl.cdiv(rows_0, BLOCK_M) * ((N_0 + BLOCK_N - 1) // BLOCK_N)
        both = first
        if NEED_PROMPT_1:
            both = first + tl.cdiv(rows_1, BLOCK_M) * ((N_1 + BLOCK_N - 1) // BLOCK_N)
        if tile < both:
            if tile < first:
                grad_projected, weight, residual, grad_prompt = grad_projected_0, weight_0, residual_0, grad_prompt_0
            else:
                grad_projected, weight, residual, grad_prompt = grad_projected_1, weight_1, residual_1, grad_prompt_1
            one = tile >= first
            rows = tl.where(one, rows_1, rows_0)
            P = tl.where(one, P_1, P_0)
            stride_b = tl.where(one, stride_rb1, stride_rb0) // ALIGNMENT * ALIGNMENT
            stride_p = tl.where(one, stride_rp1, stride_rp0) // ALIGNMENT * ALIGNMENT
            K = tl.where(one, K_1, K_0)
            N = tl.where(one, N_1, N_0)
            here = tl.where(one, tile - first, tile)
            tiles_n = tl.cdiv(N, BLOCK_N)
            row = (here // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
            column = (here % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
            inner = tl.arange(0, BLOCK_K)
            row_exists = row < rows
            column_exists = column < N
            grad_projected += row.to(tl.int64)[:, None] * K + inner[None, :]
            weight += inner[:, None] * N + column[None, :]
            accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            for k in range(0, K, BLOCK_K):
                inner_exists = k + inner < K
                d = tl.load(grad_projected, mask=row_exists[:, None] & inner_exists[None, :], other=0.0)
                w = tl.load(weight, mask=inner_exists[:, None] & column_exists[None, :], other=0.0)
                accumulator = tl.dot(d, w, accumulator, input_precision=PRECISION)
                grad_projected += BLOCK_K  # [BLOCK_M, BLOCK_K]
                weight += BLOCK_K * N  # [BLOCK_K, BLOCK_N]
            exists = row_exists[:, None] & column_exists[None, :]
            residual += ((row // P).to(tl.int64) * stride_b + (row % P).to(tl.int64) * stride_p)[:, None]
            accumulator += tl.load(residual + column[None, :], mask=exists, other=0.0).to(tl.float32)
            tl.store(
                grad_prompt + row.to(tl.int64)[:, None] * N + column[None, :],
                accumulator.to(grad_prompt.dtype.element_ty),
                mask=exists,
            )
        tile -= both

    if NEED_WEIGHT_0 or NEED_WEIGHT_1:
        first = 0
        if NEED_WEIGHT_0:
            first = ((K_0 + WEIGHT_M - 1) // WEIGHT_M) * ((N_0 + WEIGHT_N - 1) // WEIGHT_N)
        both = first
        if NEED_WEIGHT_1:
            both = first + ((K_1 + WEIGHT_M - 1) // WEIGHT_M) * ((N_1 + WEIGHT_N - 1) // WEIGHT_N)
        if tile >= 0 and tile < both:
            if tile < first:
                grad_projected, prompt, grad_weight = grad_projected_0, prompt_0, grad_weight_0
            else:
                grad_projected, prompt, grad_weight = grad_projected_1, prompt_1, grad_weight_1
            one = tile >= first
            rows = tl.where(one, rows_1, rows_0)
            P = tl.where(one, P_1, P_0)
            stride_b = tl.where(one, stride_pb1, stride_pb0) // ALIGNMENT * ALIGNMENT
            stride_p = tl.where(one, stride_pp1, stride_pp0) // ALIGNMENT * ALIGNMENT
            K = tl.where(one, K_1, K_0)
            N = tl.where(one, N_1, N_0)
            here = tl.where(one, tile - first, tile)
            tiles_n = tl.cdiv(N, WEIGHT_N)
            line = (here // tiles_n) * WEIGHT_M + tl.arange(0, WEIGHT_M)
            column = (here % tiles_n) * WEIGHT_N + tl.arange(0, WEIGHT_N)
            step = tl.arange(0, WEIGHT_R)
            line_exists = line < K
            column_exists = column < N
            accumulator = tl.zeros([WEIGHT_M, WEIGHT_N], dtype=tl.float32)
            for r in range(0, rows, WEIGHT_R):
                row = r + step
                row_exists = (row < rows)[:, None]
                offset = (row // P).to(tl.int64) * stride_b + (row % P).to(tl.int64) * stride_p
                d = tl.load(
                    grad_projected + row.to(tl.int64)[:, None] * K + line[None, :],
                    mask=row_exists & line_exists[None, :],
                    other=0.0,
                )  # [WEIGHT_R, WEIGHT_M]
                x = tl.load(
                    prompt + offset[:, None] + column[None, :],
                    mask=row_exists & column_exists[None, :],
                    other=0.0,
                )  # [WEIGHT_R, WEIGHT_N]
                accumulator = tl.dot(d.T, x.to(d.dtype), accumulator, input_precision=PRECISION)
            tl.store(
                grad_weight + line[:, None] * N + column[None, :],
                accumulator.to(grad_weight.dtype.element_ty),
                mask=line_exists[:, None] & column_exists[None, :],
            )
        tile -= both

    if NEED_BIAS_0:
        count = (K_0 + BLOCK_C - 1) // BLOCK_C
        if tile >= 0 and tile < count:
            sum_rows(grad_projected_0, grad_bias_0, rows_0, tile * BLOCK_C, K_0, BLOCK_R, BLOCK_C)
        tile -= count
    if NEED_BIAS_1:
        count = (K_1 + BLOCK_C - 1) // BLOCK_C
        if tile >= 0 and tile < count:
            sum_rows(grad_projected_1, grad_bias_1, rows_1, tile * BLOCK_C, K_1, BLOCK_R, BLOCK_C)
        tile -= count
    if NEED_GATE_0:
        if CHANNELS_0:
            count = (N_0 + BLOCK_C - 1) // BLOCK_C
            if tile >= 0 and tile < count:
                sum_rows(partials, grad_gate_0, batch, tile * BLOCK_C, N_0, BLOCK_R, BLOCK_C)
            tile -= count
        else:
            if tile == 0:
                sum_all(partials, grad_gate_0, batch * GATE_SUMS_0, BLOCK_R)
            tile -= 1
    partials += batch.to(tl.int64) * GATE_SUMS_0
    if NEED_GATE_1:
        if CHANNELS_1:
            count = (N_1 + BLOCK_C - 1) // BLOCK_C
            if tile >= 0 and tile < count:
                sum_rows(partials, grad_gate_1, batch, tile * BLOCK_C, N_1, BLOCK_R, BLOCK_C)
            tile -= count
        else:
            if tile == 0:
                sum_all(partials, grad_gate_1, batch * GATE_SUMS_1, BLOCK_R)
            tile -= 1
    partials += batch.to(tl.int64) * GATE_SUMS_1
    if NEED_TEMPERATURE:  # noqa: SIM102 (known when the kernel is compiled)
        if tile == 0:
            sum_all(partials, grad_temperature, batch, BLOCK_R)


def prompt_interaction_backward(
    grad_next_text: Tensor | None,
    grad_next_vision: Tensor | None,
    text_prompt: Tensor,
    vision_prompt: Tensor,
    text_to_vision_weight: Tensor,
    text_to_vision_bias: Tensor,
    vision_to_text_weight: Tensor,
    vision_to_text_bias: Tensor,
    text_gate: Tensor,
    vision_gate: Tensor,
    temperature: Tensor,
    *,
    eps: float,
    needs: tuple[bool, ...],
    projections: tuple[Tensor, Tensor] | None = None,
    project_tile: ProductTile | None = None,
    mix_tile: MixTile | None = None,
    tile: GradientTile | None = None,
    alike: Hashable = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the nine inputs, in their order; None, neither computed nor allocated, where not needed.

    Args:
        grad_next_text, grad_next_vision: in the shapes of the prompts; None is zero.
        needs: nine booleans, in the order of the inputs.
        projections: ``(vision_in_text, text_in_vision)`` from the forward pass; computed again if None.
        project_tile, mix_tile, tile: tile sizes other than the tables'.
        alike: see :func:`epic_fast.kernels.common.plan.run`.
    """
    inputs = (text_prompt, vision_prompt, text_to_vision_weight, text_to_vision_bias, vision_to_text_weight)
    inputs = (*inputs, vision_to_text_bias, text_gate, vision_gate, temperature)
    tensors = (grad_next_text, grad_next_vision, *inputs, *((None, None) if projections is None else projections))
    setting = setting_of(*inputs[:6])
    for grad in tensors[:2]:
        if grad is not None and grad.dtype == torch.float32:
            setting = precision(torch.float32)
    return plan.run(backward, tensors, (float(eps), needs, setting, project_tile, mix_tile, tile), alike)


def backward(
    tape: Tape,
    grad_next_text: Tensor | None,
    grad_next_vision: Tensor | None,
    text_prompt: Tensor,
    vision_prompt: Tensor,
    text_to_vision_weight: Tensor,
    text_to_vision_bias: Tensor,
    vision_to_text_weight: Tensor,
    vision_to_text_bias: Tensor,
    text_gate: Tensor,
    vision_gate: Tensor,
    temperature: Tensor,
    vision_in_text: Tensor | None,
    text_in_vision: Tensor | None,
    eps: float,
    needs: tuple[bool, ...],
    setting: str,
    project_tile: ProductTile | None,
    mix_tile: MixTile | None,
    tile: GradientTile | None,
) -> tuple[Tensor | None, ...]:
    """:func:`prompt_interaction_backward` on a tape."""
    need_text, need_vision, *need_weights, need_text_gate, need_vision_gate, need_temperature = needs
    need_text_weight, need_text_bias, need_vision_weight, need_vision_bias = need_weights
    if not any(needs):
        return (None,) * 9
    inputs = (text_prompt, vision_prompt, text_to_vision_weight, text_to_vision_bias, vision_to_text_weight)
    inputs = (*inputs, vision_to_text_bias, text_gate, vision_gate, temperature)
    batch, text_prompts, text_width = text_prompt.shape
    _, vision_prompts, vision_width = vision_prompt.shape
    if not batch:
        return tuple(
            tape.derive(torch.zeros_like, each) if need else None for each, need in zip(inputs, needs, strict=True)
        )
    grads = tuple(
        tape.empty(each.shape, each.dtype) if need else None for each, need in zip(inputs, needs, strict=True)
    )
    grad_text, grad_vision, grad_text_weight, grad_text_bias, grad_vision_weight, grad_vision_bias = grads[:6]

    text_prompt, vision_prompt = unit_last_stride(tape, text_prompt), unit_last_stride(tape, vision_prompt)
    text_to_vision_weight, text_to_vision_bias, vision_to_text_weight, vision_to_text_bias, text_gate, vision_gate = (
        contiguous(tape, each) for each in inputs[2:8]
    )
    if grad_next_text is None:
        grad_next_text = tape.derive(torch.zeros_like, text_prompt)
    if grad_next_vision is None:
        grad_next_vision = tape.derive(torch.zeros_like, vision_prompt)
    grad_next_text, grad_next_vision = unit_last_stride(tape, grad_next_text), unit_last_stride(tape, grad_next_vision)

    need_text_in_vision = need_text or need_text_weight or need_text_bias
    need_vision_in_text = need_vision or need_vision_weight or need_vision_bias
    text_channels, vision_channels = text_gate.dim() == 1, vision_gate.dim() == 1
    block_t, block_v = prompt_block(text_prompts), prompt_block(vision_prompts)
    if vision_in_text is None or text_in_vision is None:
        vision_in_text, text_in_vision = project(
            tape,
            text_prompt,
            vision_prompt,
            text_to_vision_weight,
            text_to_vision_bias,
            vision_to_text_weight,
            vision_to_text_bias,
            setting,
            project_tile,
            False,
        )
    grad_vision_in_text = (
        tape.scratch(vision_in_text.shape, vision_in_text.dtype) if need_vision_in_text else vision_in_text
    )
    grad_text_in_vision = (
        tape.scratch(text_in_vision.shape, text_in_vision.dtype) if need_text_in_vision else text_in_vision
    )

    shared = shared_memory(text_prompt.device)
    types = (text_prompt.dtype, vision_prompt.dtype, vision_in_text.dtype, text_in_vision.dtype)
    if mix_tile is None:
        widest = torch.float32 if len(set(types)) > 1 else types[0]
        mix_tile = mix_backward_tile(widest, text_width, vision_width, max(block_t, block_v), text_channels, shared)
    text_parts, vision_parts = mix_tile.text_parts, mix_tile.vision_parts
    if not (need_text or need_vision_in_text or need_text_gate):
        text_parts = 1 if need_temperature else 0
    if not (need_text_in_vision or need_vision_gate):
        vision_parts = 0
    text_sums = (text_width if text_channels else text_parts) if need_text_gate else 0
    vision_sums = (vision_width if vision_channels else vision_parts) if need_vision_gate else 0
    sums = text_sums + vision_sums + need_temperature
    # What is not needed still stands in the kernels' arguments, as any tensor that is there and aligned.
    partials = vision_in_text
    if sums:
        partials = tape.scratch((batch * sums,), torch.float32)
    strides = (*text_prompt.stride()[:2], *grad_next_text.stride()[:2], *grad_next_vision.stride()[:2])
    constants = (
        text_width,
        vision_width,
        text_channels,
        vision_channels,
        need_text,
        need_vision_in_text,
        need_text_in_vision,
        need_text_gate,
        need_vision_gate,
        need_temperature,
        text_sums,
        vision_sums,
        alignment(*strides),
        block_t,
        block_v,
        mix_tile.similarity,
        mix_tile.columns,
        text_parts,
        vision_parts,
        mix_tile.stages,
        precision_of(setting, *types, grad_next_text.dtype, grad_next_vision.dtype),
    )
    sources = (grad_next_text, grad_next_vision, text_prompt, vision_in_text, text_in_vision)
    scalars = (text_gate, vision_gate, temperature)
    results = (grad_text if need_text else text_prompt, grad_vision_in_text, grad_text_in_vision, partials)
    integers = (batch, text_prompts, vision_prompts, *strides)
    tape.launch(
        mix_backward_kernel,
        batch * (text_parts + vision_parts),
        (*sources, *scalars, *results, eps, *integers, *constants),
        mix_tile.options,
        facts_of((*sources, *results), scalars, integers, (constants, mix_tile.warps, mix_tile.stages)),
    )

    if tile is None:
        tile = gradient_tile(torch.promote_types(vision_in_text.dtype, text_in_vision.dtype), shared)
    text_side = (
        grad_text_in_vision,
        text_to_vision_weight,
        text_prompt,
        grad_text if need_text else text_prompt,
        grad_text if need_text else text_prompt,
        grad_text_weight if need_text_weight else text_to_vision_weight,
        grad_text_bias if need_text_bias else text_to_vision_bias,
        grads[6] if need_text_gate else text_gate,
    )
    vision_side = (
        grad_vision_in_text,
        vision_to_text_weight,
        vision_prompt,
        grad_next_vision,
        grad_vision if need_vision else vision_prompt,
        grad_vision_weight if need_vision_weight else vision_to_text_weight,
        grad_vision_bias if need_vision_bias else vision_to_text_bias,
        grads[7] if need_vision_gate else vision_gate,
    )
    text_needs = (need_text, need_text_weight, need_text_bias, need_text_gate)
    vision_needs = (need_vision, need_vision_weight, need_vision_bias, need_vision_gate)
    last = grads[8] if need_temperature else temperature
    if same_types(text_side[:6], vision_side[:6]):
        _gradients(
            tape,
            setting,
            text_side,
            vision_side,
            text_needs,
            vision_needs,
            need_temperature,
            partials,
            (text_sums, vision_sums),
            last,
            batch,
            tile,
        )
    else:
        none = (False,) * 4
        _gradients(
            tape,
            setting,
            text_side,
            text_side,
            text_needs,
            none,
            need_temperature,
            partials,
            (text_sums, vision_sums),
            last,
            batch,
            tile,
        )
        _gradients(
            tape,
            setting,
            vision_side,
            vision_side,
            none,
            vision_needs,
            False,
            partials,
            (text_sums, vision_sums),
            last,
            batch,
            tile,
        )
    return grads


def _gradients(
    tape: Tape,
    setting: str,
    zero: tuple[Tensor, ...],
    one: tuple[Tensor, ...],
    needs_0: tuple[bool, ...],
    needs_1: tuple[bool, ...],
    need_temperature: bool,
    partials: Tensor,
    gate_sums: tuple[int, int],
    grad_temperature: Tensor,
    batch: int,
    tile: GradientTile,
) -> None:
    """Launches what is needed of the products and sums of both sides, if anything is."""
    (_, prompts_0, k_0), (_, prompts_1, k_1) = zero[0].shape, one[0].shape
    n_0, n_1 = zero[2].shape[2], one[2].shape[2]
    rows_0, rows_1 = batch * prompts_0, batch * prompts_1
    channels_0, channels_1 = zero[7].dim() == 1, one[7].dim() == 1
    programs = int(need_temperature)
    for needs, rows, k, n, channels in (
        (needs_0, rows_0, k_0, n_0, channels_0),
        (needs_1, rows_1, k_1, n_1, channels_1),
    ):
        if needs[0]:
            programs += -(-rows // tile.rows) * -(-n // tile.columns)
        if needs[1]:
            programs += -(-k // tile.weight_rows) * -(-n // tile.weight_columns)
        if needs[2]:
            programs += -(-k // tile.sum_columns)
        if needs[3]:
            programs += -(-n // tile.sum_columns) if channels else 1
    if not programs:
        return
    strides = (*zero[2].stride()[:2], *one[2].stride()[:2], *zero[3].stride()[:2], *one[3].stride()[:2])
    pairs = [each for pair in zip(zero, one, strict=True) for each in pair]
    constants = (
        k_0,
        n_0,
        k_1,
        n_1,
        needs_0[0],
        needs_1[0],
        needs_0[1],
        needs_1[1],
        needs_0[2],
        needs_1[2],
        needs_0[3],
        needs_1[3],
        need_temperature,
        channels_0,
        channels_1,
        *gate_sums,
        alignment(*strides),
        tile.rows,
        tile.columns,
        tile.depth,
        tile.weight_rows,
        tile.weight_columns,
        tile.weight_depth,
        tile.sum_rows,
        tile.sum_columns,
        precision_of(setting, zero[1].dtype),
    )
    tensors, scalars = (*pairs[:8], partials, *pairs[8:14]), (*pairs[14:], grad_temperature)
    integers = (batch, rows_0, rows_1, prompts_0, prompts_1, *strides)
    tape.launch(
        gradients_kernel,
        programs,
        (*tensors, *scalars, *integers, *constants),
        tile.options,
        facts_of(tensors, scalars, integers, (constants, tile.warps, tile.stages)),
    )
