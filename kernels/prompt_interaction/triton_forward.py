"""The prompt interaction, forward, in two launches: both projections, then all that a sample does by itself.

README.md beside this file has the derivation, the floors and what was tried.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.cards import shared_memory
from epic_fast.kernels.common.launch import facts_of
from epic_fast.kernels.common.plan import Tape, precision, unit_last_stride
from epic_fast.kernels.prompt_interaction.tiles import MixTile, ProductTile, mix_tile, projection_tile

MAX_PROMPTS = 64

# Addresses and counts that change from call to call must not compile anything again.  A gate is one element of a
# hub's tensor as often as not, so its address is aligned by chance only.
SIZES = ["P_TEXT", "P_VISION", "stride_tb", "stride_tp", "stride_vb", "stride_vp"]
SCALARS = ["text_gate", "vision_gate", "temperature"]


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """``accumulator + a @ b`` with float32's accuracy in ``a``, whatever the type of ``b``.

    Operands of one type are multiplied as they are: products of half-width numbers are exact in float32.  A float32
    ``a`` against half-width ``b`` is split into two numbers that the tensor cores hold exactly.
    """
    if a.dtype == b.dtype:
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
    elif a.dtype == tl.float32 and b.dtype == tl.bfloat16:
        high = a.to(tl.bfloat16)
        low = (a - high.to(tl.float32)).to(tl.bfloat16)
        accumulator = tl.dot(low, b, accumulator)
        accumulator = tl.dot(high, b, accumulator)
    elif a.dtype == tl.float32 and b.dtype == tl.float16:
        # Not in float16, whose range the gradients would leave: TF32 has 11 significant bits, as float16 has.
        wide = b.to(tl.float32)
        high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        accumulator = tl.dot(a - high, wide, accumulator, input_precision="tf32")
        accumulator = tl.dot(high, wide, accumulator, input_precision="tf32")
    else:
        accumulator = tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def load_rows(base, row, stride, row_exists, column, WIDTH: tl.constexpr):
    """Rows of a matrix with unit last stride, zero beyond it.  # [rows, columns]"""
    return tl.load(
        base + row.to(tl.int64)[:, None] * stride + column[None, :],
        mask=row_exists[:, None] & (column < WIDTH)[None, :],
        other=0.0,
    )


@triton.jit
def load_gate(gate, column, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """A gate in float32: one value a channel, or one for all of them.  # [columns]"""
    if CHANNELS:
        value = tl.load(gate + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    else:
        value = tl.zeros_like(column).to(tl.float32) + tl.load(gate).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["rows_0", "rows_1", "P_0", "P_1", "stride_b0", "stride_p0", "stride_b1", "stride_p1"])
def project_kernel(
    prompt_0,  # (B, P_0, K_0), unit last stride
    prompt_1,  # (B, P_1, K_1)
    weight_0,  # (N_0, K_0), contiguous
    weight_1,  # (N_1, K_1)
    bias_0,  # (N_0,)
    bias_1,  # (N_1,)
    projected_0,  # (B, P_0, N_0), contiguous, written
    projected_1,  # (B, P_1, N_1)
    rows_0,  # B * P_0
    rows_1,  # B * P_1; 0 where there is one product only
    P_0,
    P_1,
    stride_b0,
    stride_p0,
    stride_b1,
    stride_p1,
    K_0: tl.constexpr,
    N_0: tl.constexpr,
    K_1: tl.constexpr,
    N_1: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # of the strides
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``projected = prompt @ weight.T + bias``, twice: the tiles of the one product, then those of the other.

    The two share one loop, because each loop would keep its own stages in shared memory.
    """
    tile = tl.program_id(0)
    first = tl.cdiv(rows_0, BLOCK_M) * ((N_0 + BLOCK_N - 1) // BLOCK_N)
    if tile < first:
        prompt, weight, bias, projected = prompt_0, weight_0, bias_0, projected_0
    else:
        prompt, weight, bias, projected = prompt_1, weight_1, bias_1, projected_1
    one = tile >= first
    rows = tl.where(one, rows_1, rows_0)
    P = tl.where(one, P_1, P_0)
    stride_b = tl.where(one, stride_b1, stride_b0) // ALIGNMENT * ALIGNMENT
    stride_p = tl.where(one, stride_p1, stride_p0) // ALIGNMENT * ALIGNMENT
    K = tl.where(one, K_1, K_0)
    N = tl.where(one, N_1, N_0)
    tile = tl.where(one, tile - first, tile)
    tiles_n = tl.cdiv(N, BLOCK_N)
    row = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    row_exists = row < rows
    column_exists = column < N
    prompt += ((row // P).to(tl.int64) * stride_b + (row % P).to(tl.int64) * stride_p)[:, None] + inner[None, :]
    weight += column[:, None] * K + inner[None, :]
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        inner_exists = (k + inner < K)[None, :]
        x = tl.load(prompt + k, mask=row_exists[:, None] & inner_exists, other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(weight + k, mask=column_exists[:, None] & inner_exists, other=0.0)  # [BLOCK_N, BLOCK_K]
        accumulator = tl.dot(x.to(w.dtype), w.T, accumulator, input_precision=PRECISION)
    accumulator += tl.load(bias + column, mask=column_exists, other=0.0).to(tl.float32)[None, :]
    tl.store(
        projected + row.to(tl.int64)[:, None] * N + column[None, :],
        accumulator.to(projected.dtype.element_ty),
        mask=row_exists[:, None] & column_exists[None, :],
    )


@triton.jit
def scores(raw, text_square, vision_square, inverse_temperature, eps, text_exists, vision_exists):
    """Similarity over temperature and both its softmaxes; what does not exist weighs nothing.

    raw: [BLOCK_T, BLOCK_V] inner products; text_square, vision_square: squared norms.
    """
    text_inverse = 1.0 / tl.maximum(tl.sqrt(text_square), eps, propagate_nan=tl.PropagateNan.ALL)
    vision_inverse = 1.0 / tl.maximum(tl.sqrt(vision_square), eps, propagate_nan=tl.PropagateNan.ALL)
    similarity = raw * text_inverse[:, None] * vision_inverse[None, :] * inverse_temperature  # [BLOCK_T, BLOCK_V]
    exists = text_exists[:, None] & vision_exists[None, :]
    by_text = tl.where(vision_exists[None, :], similarity, float("-inf"))
    by_text = tl.exp(by_text - tl.max(by_text, axis=1)[:, None])
    by_text = tl.where(exists, by_text / tl.sum(by_text, axis=1)[:, None], 0.0)
    by_vision = tl.where(text_exists[:, None], similarity, float("-inf"))
    by_vision = tl.exp(by_vision - tl.max(by_vision, axis=0)[None, :])
    by_vision = tl.where(exists, by_vision / tl.sum(by_vision, axis=0)[None, :], 0.0)
    return similarity, by_text, by_vision, text_inverse, vision_inverse


@triton.jit
def add_mix_tile(
    prompt,  # (P, D) of this sample
    other,  # (P_OTHER, D) of this sample, contiguous
    gate,
    result,  # (P, D) of this sample, written
    weights,  # [BLOCK_P, BLOCK_OTHER]
    row,
    row_exists,
    other_row,
    other_exists,
    first_column,
    stride_p,
    stride_r,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``result = prompt + gate * (weights @ other)`` on BLOCK_D columns."""
    column = first_column + tl.arange(0, BLOCK_D)
    own = load_rows(prompt, row, stride_p, row_exists, column, D)  # [BLOCK_P, BLOCK_D]
    z = load_rows(other, other_row, D, other_exists, column, D)  # [BLOCK_OTHER, BLOCK_D]
    mixed = tl.zeros([weights.shape[0], BLOCK_D], dtype=tl.float32)
    mixed = product(weights, z, mixed, PRECISION)
    moved = own.to(tl.float32) + load_gate(gate, column, D, CHANNELS)[None, :] * mixed
    tl.store(
        result + row.to(tl.int64)[:, None] * stride_r + column[None, :],
        moved.to(result.dtype.element_ty),
        mask=row_exists[:, None] & (column < D)[None, :],
    )


@triton.jit(
    do_not_specialize=[*SIZES, "stride_ntb", "stride_ntp", "stride_nvb", "stride_nvp"],
    do_not_specialize_on_alignment=SCALARS,
)
def mix_kernel(
    text_prompt,  # (B, P_TEXT, D_TEXT)
    vision_prompt,  # (B, P_VISION, D_VISION)
    vision_in_text,  # (B, P_VISION, D_TEXT), contiguous
    text_in_vision,  # (B, P_TEXT, D_VISION), contiguous
    text_gate,  # () or (D_TEXT,)
    vision_gate,  # () or (D_VISION,)
    temperature,  # ()
    next_text,  # (B, P_TEXT, D_TEXT), written
    next_vision,  # (B, P_VISION, D_VISION), written
    eps,
    P_TEXT,
    P_VISION,
    stride_tb,
    stride_tp,
    stride_vb,
    stride_vp,
    stride_ntb,
    stride_ntp,
    stride_nvb,
    stride_nvp,
    D_TEXT: tl.constexpr,
    D_VISION: tl.constexpr,
    TEXT_CHANNELS: tl.constexpr,  # a gate a channel
    VISION_CHANNELS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,  # columns at a time for the similarity
    BLOCK_D: tl.constexpr,  # columns at a time for the mixes
    TEXT_PARTS: tl.constexpr,  # programs of one sample that write text columns
    VISION_PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every program finds the similarity of its sample, then writes its part of the columns."""
    program = tl.program_id(0)
    sample = (program // (TEXT_PARTS + VISION_PARTS)).to(tl.int64)
    part = program % (TEXT_PARTS + VISION_PARTS)
    text_prompt += sample * (stride_tb // ALIGNMENT * ALIGNMENT)
    vision_prompt += sample * (stride_vb // ALIGNMENT * ALIGNMENT)
    next_text += sample * (stride_ntb // ALIGNMENT * ALIGNMENT)
    next_vision += sample * (stride_nvb // ALIGNMENT * ALIGNMENT)
    vision_in_text += sample * P_VISION * D_TEXT
    text_in_vision += sample * P_TEXT * D_VISION
    stride_tp = stride_tp // ALIGNMENT * ALIGNMENT
    i = tl.arange(0, BLOCK_T)
    j = tl.arange(0, BLOCK_V)
    text_exists = i < P_TEXT
    vision_exists = j < P_VISION

    raw = tl.zeros([BLOCK_T, BLOCK_V], dtype=tl.float32)
    text_squares = tl.zeros([BLOCK_T, BLOCK_S], dtype=tl.float32)
    vision_squares = tl.zeros([BLOCK_V, BLOCK_S], dtype=tl.float32)
    for d in tl.range(0, D_TEXT, BLOCK_S, num_stages=STAGES):
        column = d + tl.arange(0, BLOCK_S)
        t = load_rows(text_prompt, i, stride_tp, text_exists, column, D_TEXT)  # [BLOCK_T, BLOCK_S]
        z = load_rows(vision_in_text, j, D_TEXT, vision_exists, column, D_TEXT)  # [BLOCK_V, BLOCK_S]
        raw = product(t, z.T, raw, PRECISION)
        text_squares += t.to(tl.float32) * t.to(tl.float32)
        vision_squares += z.to(tl.float32) * z.to(tl.float32)
    _, by_text, by_vision, _, _ = scores(
        raw,
        tl.sum(text_squares, axis=1),
        tl.sum(vision_squares, axis=1),
        1.0 / tl.load(temperature).to(tl.float32),
        eps,
        text_exists,
        vision_exists,
    )

    if part < TEXT_PARTS:
        for d in tl.range(part * BLOCK_D, D_TEXT, TEXT_PARTS * BLOCK_D):
            add_mix_tile(
                text_prompt,
                vision_in_text,
                text_gate,
                next_text,
                by_text,
                i,
                text_exists,
                j,
                vision_exists,
                d,
                stride_tp,
                stride_ntp // ALIGNMENT * ALIGNMENT,
                D_TEXT,
                TEXT_CHANNELS,
                BLOCK_D,
                PRECISION,
            )
    else:
        for d in tl.range((part - TEXT_PARTS) * BLOCK_D, D_VISION, VISION_PARTS * BLOCK_D):
            add_mix_tile(
                vision_prompt,
                text_in_vision,
                vision_gate,
                next_vision,
                by_vision.T,
                j,
                vision_exists,
                i,
                text_exists,
                d,
                stride_vp // ALIGNMENT * ALIGNMENT,
                stride_nvp // ALIGNMENT * ALIGNMENT,
                D_VISION,
                VISION_CHANNELS,
                BLOCK_D,
                PRECISION,
            )


def alignment(*strides: int) -> int:
    """16 if every stride is a multiple of it, else 1: two variants of a kernel, whatever the sizes."""
    together = 0
    for stride in strides:
        together |= stride
    return 1 if together % 16 else 16


@functools.cache
def prompt_block(prompts: int) -> int:
    """Rows of a tile that holds all prompts of one side; 16 is the least that a product of tiles takes."""
    if prompts > MAX_PROMPTS:
        raise ValueError(f"prompt_interaction: {prompts} prompts; the kernels take up to {MAX_PROMPTS}")
    return max(16, triton.next_power_of_2(prompts))


def project_prompts(
    text_prompt: Tensor,
    vision_prompt: Tensor,
    text_to_vision_weight: Tensor,
    text_to_vision_bias: Tensor,
    vision_to_text_weight: Tensor,
    vision_to_text_bias: Tensor,
    *,
    tile: ProductTile | None = None,
) -> tuple[Tensor, Tensor]:
    """``vision_in_text`` (B, P_v, D_t) and ``text_in_vision`` (B, P_t, D_v), each in its weight's type.

    Prompts have a unit last stride, weights and biases are contiguous.  One launch; two where types differ.
    """
    tensors = (
        text_prompt,
        vision_prompt,
        text_to_vision_weight,
        text_to_vision_bias,
        vision_to_text_weight,
        vision_to_text_bias,
    )
    options = (setting_of(*tensors), tile, True)
    return plan.run(project, tensors, options)  # pyright: ignore[reportReturnType]


def setting_of(text_prompt: Tensor, vision_prompt: Tensor, *parameters: Tensor) -> str:
    """How this call multiplies float32, if it does."""
    return precision(text_prompt.dtype, vision_prompt.dtype, parameters[0].dtype, parameters[2].dtype)


def precision_of(setting: str, *dtypes: torch.dtype) -> str:
    return setting if torch.float32 in dtypes else "ieee"


def project(
    tape: Tape,
    text_prompt: Tensor,
    vision_prompt: Tensor,
    text_to_vision_weight: Tensor,
    text_to_vision_bias: Tensor,
    vision_to_text_weight: Tensor,
    vision_to_text_bias: Tensor,
    setting: str,
    tile: ProductTile | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`project_prompts` on a tape; what it returns is scratch unless told to ``keep`` it."""
    batch, text_prompts, text_width = text_prompt.shape
    _, vision_prompts, vision_width = vision_prompt.shape
    text_type, vision_type = vision_to_text_weight.dtype, text_to_vision_weight.dtype
    allocate = tape.empty if keep else tape.scratch
    vision_in_text = allocate((batch, vision_prompts, text_width), text_type)
    text_in_vision = allocate((batch, text_prompts, vision_width), vision_type)
    vision_side = (vision_prompt, vision_to_text_weight, vision_to_text_bias, vision_in_text)
    text_side = (text_prompt, text_to_vision_weight, text_to_vision_bias, text_in_vision)
    if same_types(vision_side, text_side):
        _project(tape, vision_side, text_side, setting, tile)
    else:
        _project(tape, vision_side, vision_side, setting, tile, once=True)
        _project(tape, text_side, text_side, setting, tile, once=True)
    return vision_in_text, text_in_vision


def contiguous(tape: Tape, tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tape.derive(Tensor.contiguous, tensor)


def same_types(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return [each.dtype for each in one] == [each.dtype for each in other]


def _project(
    tape: Tape,
    zero: tuple[Tensor, ...],
    one: tuple[Tensor, ...],
    setting: str,
    tile: ProductTile | None,
    once: bool = False,
) -> None:
    prompt_0, weight_0, bias_0, projected_0 = zero
    prompt_1, weight_1, bias_1, projected_1 = one
    batch, prompts_0, k_0 = prompt_0.shape
    _, prompts_1, k_1 = prompt_1.shape
    n_0, n_1 = weight_0.shape[0], weight_1.shape[0]
    dtype = weight_0.dtype
    if tile is None:
        tile = projection_tile(dtype, shared_memory(prompt_0.device))
    rows_0, rows_1 = batch * prompts_0, 0 if once else batch * prompts_1
    strides = (*prompt_0.stride()[:2], *prompt_1.stride()[:2])
    constants = (
        k_0,
        n_0,
        k_1,
        n_1,
        alignment(*strides),
        tile.rows,
        tile.columns,
        tile.depth,
        precision_of(setting, dtype),
    )
    tensors = (prompt_0, prompt_1, weight_0, weight_1, bias_0, bias_1, projected_0, projected_1)
    integers = (rows_0, rows_1, prompts_0, prompts_1, *strides)
    facts = facts_of(tensors, (), integers, (constants, tile.warps, tile.stages))
    programs = -(-rows_0 // tile.rows) * -(-n_0 // tile.columns) + -(-rows_1 // tile.rows) * -(-n_1 // tile.columns)
    tape.launch(project_kernel, programs, (*tensors, *integers, *constants), tile.options, facts)


def prompt_interaction_forward(
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
    next_text: Tensor | None = None,
    next_vision: Tensor | None = None,
    save_projections: bool = False,
    project_tile: ProductTile | None = None,
    tile: MixTile | None = None,
    alike: Hashable = None,
) -> Any:
    """The next prompts, and with ``save_projections`` also what the backward pass can spare itself to recompute.

    Shapes and meanings are those of :func:`epic_fast.functional.prompt_interaction`.  The projections run in the
    type of the weights, whatever that of the prompts, so that autocast is a matter of casting weights and biases.

    Args:
        next_text, next_vision: where to write, views with a unit last stride that overlap no input; made if None.
        save_projections: return ``(next_text, next_vision, (vision_in_text, text_in_vision))``.
        project_tile, tile: tile sizes other than the table's.
        alike: see :func:`epic_fast.kernels.common.plan.run`.
    """
    parameters = (text_to_vision_weight, text_to_vision_bias, vision_to_text_weight, vision_to_text_bias)
    results = plan.run(
        forward,
        (text_prompt, vision_prompt, *parameters, text_gate, vision_gate, temperature, next_text, next_vision),
        (
            float(eps),
            save_projections,
            setting_of(text_prompt, vision_prompt, *parameters),
            project_tile,
            tile,
        ),
        alike,
    )
    return (*results[:2], results[2:]) if save_projections else results


def forward(
    tape: Tape,
    text_prompt: Tensor,
    vision_prompt: Tensor,
    text_to_vision_weight: Tensor,
    text_to_vision_bias: Tensor,
    vision_to_text_weight: Tensor,
    vision_to_text_bias: Tensor,
    text_gate: Tensor,
    vision_gate: Tensor,
    temperature: Tensor,
    next_text: Tensor | None,
    next_vision: Tensor | None,
    eps: float,
    save_projections: bool,
    setting: str,
    project_tile: ProductTile | None,
    tile: MixTile | None,
) -> tuple[Tensor | None, ...]:
    """:func:`prompt_interaction_forward` on a tape; projections, if asked for, come after the results."""
    text_prompt, vision_prompt = unit_last_stride(tape, text_prompt), unit_last_stride(tape, vision_prompt)
    text_gate, vision_gate = contiguous(tape, text_gate), contiguous(tape, vision_gate)
    batch, text_prompts, text_width = text_prompt.shape
    _, vision_prompts, vision_width = vision_prompt.shape
    if next_text is None:
        next_text = tape.empty(text_prompt.shape, text_prompt.dtype)
    if next_vision is None:
        next_vision = tape.empty(vision_prompt.shape, vision_prompt.dtype)
    if not batch:
        if not save_projections:
            return next_text, next_vision
        return (
            next_text,
            next_vision,
            tape.empty((0, vision_prompts, text_width), vision_to_text_weight.dtype),
            tape.empty((0, text_prompts, vision_width), text_to_vision_weight.dtype),
        )
    projections = project(
        tape,
        text_prompt,
        vision_prompt,
        contiguous(tape, text_to_vision_weight),
        contiguous(tape, text_to_vision_bias),
        contiguous(tape, vision_to_text_weight),
        contiguous(tape, vision_to_text_bias),
        setting,
        project_tile,
        save_projections,
    )
    block_t, block_v = prompt_block(text_prompts), prompt_block(vision_prompts)
    types = (text_prompt.dtype, vision_prompt.dtype, projections[0].dtype, projections[1].dtype)
    if tile is None:
        widest = 4 if torch.float32 in types or len(set(types)) > 1 else 2
        tile = mix_tile(widest, text_width, vision_width, max(block_t, block_v), shared_memory(text_prompt.device))
    strides = (
        *text_prompt.stride()[:2],
        *vision_prompt.stride()[:2],
        *next_text.stride()[:2],
        *next_vision.stride()[:2],
    )
    constants = (
        text_width,
        vision_width,
        text_gate.dim() == 1,
        vision_gate.dim() == 1,
        alignment(*strides),
        block_t,
        block_v,
        tile.similarity,
        tile.columns,
        tile.text_parts,
        tile.vision_parts,
        tile.stages,
        precision_of(setting, *types),
    )
    inputs, scalars = (text_prompt, vision_prompt, *projections), (text_gate, vision_gate, temperature)
    integers = (text_prompts, vision_prompts, *strides)
    facts = facts_of((*inputs, next_text, next_vision), scalars, integers, (constants, tile.warps, tile.stages))
    tape.launch(
        mix_kernel,
        batch * (tile.text_parts + tile.vision_parts),
        (*inputs, *scalars, next_text, next_vision, eps, *integers, *constants),
        tile.options,
        facts,
    )
    return (next_text, next_vision, *projections) if save_projections else (next_text, next_vision)
