"""What forward and backward share: the two per-channel factors, and how a launcher hands vectors over."""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common.plan import Tape, unit_last_stride
from epic_fast.kernels.prompt_attention.triton_rows import load_rows


@triton.jit
def load_vector(
    base,  # (B, Hk, D)
    batch,  # int64
    head,  # int64
    stride_batch,
    stride_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``[BLOCK_D]``, float32; zeros beyond the head."""
    columns = tl.arange(0, BLOCK_D)
    start = base + batch * stride_batch + head * stride_head
    return tl.load(start + columns, mask=columns < HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit
def channel_factor(
    multiplier,  # [BLOCK_D]
    gate,
    REPLACE: tl.constexpr,
):
    """What a channel of a key or value is multiplied by, ``[BLOCK_D]``."""
    factor = gate * multiplier
    if not REPLACE:
        factor += 1.0
    return factor


@triton.jit
def load_token_rows(
    base,  # (N, D) of one head
    rows,  # [BLOCK]
    stop,
    stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``[BLOCK, BLOCK_D]``; zeros from row ``stop`` on."""
    return load_rows(None, base, rows, 0, stop, 0, stride, HEAD_DIM, BLOCK_D, True, ALIGN, WIDE)


@triton.jit
def load_scaled_rows(
    base,
    factor,  # [BLOCK_D]
    rows,  # [BLOCK]
    stop,
    stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rows times a factor a channel, in their own type: scaled in float32, rounded once."""
    tile = load_token_rows(base, rows, stop, stride, HEAD_DIM, BLOCK_D, ALIGN, WIDE)
    return (tile.to(tl.float32) * factor[None, :]).to(base.dtype.element_ty)


def vectors_on(tape: Tape, *vectors: Tensor) -> tuple[list[Tensor], list[int]]:
    """The vectors with unit last strides (copies only where no view is one), and the strides of batch and head; those
    of the last, the gate, which has no channels, as they are."""
    *wide, gate = vectors
    given = [unit_last_stride(tape, each) if each.shape[-1] != 1 else each for each in wide]
    strides = [stride for each in (*given, gate) for stride in each.stride()[:2]]
    return [*given, gate], strides  # pyright: ignore[reportReturnType]
