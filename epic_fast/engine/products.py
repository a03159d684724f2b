"""Products of rows of any shape with a frozen weight, forward and backward, as the backbone has it or in 8 bits."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from epic_fast.errors import ConfigError
from epic_fast.ops import library
from epic_fast.ops.activation import activation_backward_8bit, activation_forward
from epic_fast.ops.frozen_linear import (
    EightBitWeight,  # pyright: ignore[reportAttributeAccessIssue]
    linear_backward,
    linear_backward_8bit,
    linear_forward,
    linear_forward_8bit,
    quantise_rows,
)

logger = logging.getLogger("epic_fast")

OLDEST_FP8 = (8, 9)
# Below this neither the products nor the rows of 8 bits have a kernel.
OLDEST_INT8 = library.OLDEST_CAPABILITY


@dataclass(frozen=True)
class EightBitRows:
    """Rows ``(..., K)`` in 8 bits that stand for ``data * scale`` of their row.

    Attributes:
        data: ``(..., K)``, contiguous.
        scale: ``(rows,)`` float32.
        dtype: the type of what is computed from them.
    """

    data: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Of the rows."""
        return self.data.shape


Rows = Tensor | EightBitRows
FrozenWeight = Any
"""A tensor ``(N, K)``, or an :class:`~epic_fast.ops.frozen_linear.EightBitWeight` of that shape."""


def eight_bit_kind(weights: str, device: torch.device) -> str | None:
    """``"fp8"`` or ``"int8"``, whichever ``EngineConfig.weights`` means on a device; None: no 8 bits.

    ``"8bit"`` is fp8 where a card multiplies e4m3 (and on the CPU, which emulates either), int8 on older ones, and
    nothing, said once, on those that have no kernel for that.

    Raises:
        ConfigError: ``"fp8"`` or ``"int8"`` where the card has no such products.
    """
    if weights == "frozen":
        return None
    if device.type != "cuda":
        return "fp8" if weights == "8bit" else weights
    return _kind_of(weights, torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _kind_of(weights: str, index: int) -> str | None:
    found = library.capability(index)
    # AMD's numbering is another one; its fp8 is not always e4m3 as NVIDIA has it.
    fp8 = found is not None and found >= OLDEST_FP8
    int8 = found is None or found >= OLDEST_INT8
    card = "an AMD GPU" if found is None else "a GPU of compute capability {}.{}".format(*found)
    if weights == "8bit":
        if not int8:
            logger.info(
                "engine: weights='8bit' leaves the weights as they are on %s; 8 bits need {}.{}".format(*OLDEST_INT8),
                card,
            )
        return "fp8" if fp8 else "int8" if int8 else None
    if not (fp8 if weights == "fp8" else int8):
        least, other = (OLDEST_FP8, "'int8' or '8bit'") if weights == "fp8" else (OLDEST_INT8, "'frozen'")
        raise ConfigError(
            f"EngineConfig.weights={weights!r} on {card}; wanted one of {least[0]}.{least[1]} or newer: take {other}"
        )
    return weights


def product(
    rows: Rows, weight: FrozenWeight, bias: Tensor | None, *, activation: str | None = None, keep: str = "none"
) -> tuple[Tensor, Tensor | None]:
    """``act(rows @ weight.T + bias)`` of ``(..., K)``: ``(..., N)``, and what backward needs of the activation.

    With a weight in 8 bits, rows that are not get a scale each.
    """
    if isinstance(weight, EightBitWeight):
        given = _quantised(rows, weight.kind)
        flat = given.data.flatten(0, -2)
        output, kept = linear_forward_8bit(
            flat, given.scale, weight, bias, out_dtype=given.dtype, activation=activation, keep=keep
        )
        return output.view(*given.shape[:-1], len(weight.data)), kept
    assert isinstance(rows, Tensor)
    output, kept = linear_forward(rows.flatten(0, -2), weight, bias, activation=activation, keep=keep)
    return output.view(*rows.shape[:-1], len(weight)), kept


def activated_product(
    rows: Rows, weight: FrozenWeight, bias: Tensor | None, activation: str, keep: str
) -> tuple[Rows, Tensor | None]:
    """:func:`product` for a next product to read: in 8 bits where the weight is.

    A row's scale is known when the whole row is, so that in 8 bits the activation is a pass of its own.
    """
    if not isinstance(weight, EightBitWeight):
        return product(rows, weight, bias, activation=activation, keep=keep)
    pre = product(rows, weight, bias)[0]
    output, kept, scale = activation_forward(pre.flatten(0, -2), activation, keep=keep, eight_bit=weight.kind)
    assert scale is not None
    return EightBitRows(output.view(pre.shape), scale, pre.dtype), kept


def product_backward(grad: Rows, weight: FrozenWeight) -> Tensor:
    """The gradient of the rows ``(..., K)`` from that of the output ``(..., N)``.

    With a weight in 8 bits, a gradient that is not gets a scale a row.
    """
    if isinstance(grad, EightBitRows):
        transposed = EightBitWeight(weight.kind, weight.transposed, weight.transposed_scale)
        return product(grad, transposed, None)[0]
    flat = grad.flatten(0, -2)
    eight_bit = isinstance(weight, EightBitWeight)
    found = linear_backward_8bit(flat, weight) if eight_bit else linear_backward(flat, weight)
    return found.view(*grad.shape[:-1], found.shape[-1])


def activated_product_backward(grad: Tensor, weight: FrozenWeight, *, kept: Tensor, keep: str, activation: str) -> Rows:
    """:func:`product_backward` through the activation below the product, for a next product to read.

    Args:
        kept: ``(M, K)``: what :func:`activated_product` kept, or the pre-activation with ``keep="full"``.
    """
    if not isinstance(weight, EightBitWeight):
        found = linear_backward(grad.flatten(0, -2), weight, kept=kept, keep=keep, activation=activation)
        return found.view(*grad.shape[:-1], found.shape[-1])
    found = product_backward(grad, weight)
    data, scale = activation_backward_8bit(found.flatten(0, -2), kept, activation, keep, weight.kind)
    return EightBitRows(data.view(found.shape), scale, grad.dtype)


def _quantised(rows: Rows, kind: str) -> EightBitRows:
    if isinstance(rows, EightBitRows):
        return rows
    data, scale = quantise_rows(rows.flatten(0, -2), kind)
    return EightBitRows(data.view(rows.shape), scale, rows.dtype)
