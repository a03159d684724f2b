"""The specification of the activations, in plain PyTorch, and how a derivative is kept in 8 bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import gelu

from epic_fast.kernels.common.eight_bit import quantise_rows  # pyright: ignore[reportMissingImports]

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh")
KEEPS = ("none", "full", "eight_bit")

# The derivatives of all three lie within [-0.129, 1.13].  In steps of 1/202, with code 27 for 0, codes 0 to 255 reach
# from -0.1337 to 1.1287 (and half a step beyond), and 0 and 1, where a saturated activation's derivative is, are exact.
DERIVATIVE_STEPS = 202
DERIVATIVE_ZERO = 27

_TANH_SCALE = 2 * math.sqrt(2 / math.pi)


def activation(pre: Tensor, kind: str) -> Tensor:
    """``quick_gelu``: x sigmoid(1.702 x); ``gelu``: x Φ(x) by erf; ``gelu_tanh``: its approximation by tanh."""
    if kind == "quick_gelu":
        return pre * torch.sigmoid(1.702 * pre)
    return gelu(pre, approximate="tanh" if kind == "gelu_tanh" else "none")


def derivative(pre: Tensor, kind: str) -> Tensor:
    """act'(pre), in at least float32.

    With p(x) = 1.702 x, or 2 √(2/π) (x + 0.044715 x³), and s = sigmoid(p): s + x s (1 - s) p'; for erf Φ(x) + x φ(x).
    """
    x = pre.to(torch.promote_types(pre.dtype, torch.float32))
    if kind == "gelu":
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if kind == "quick_gelu":
        slope, gate = torch.full_like(x, 1.702), torch.sigmoid(1.702 * x)
    else:
        slope = _TANH_SCALE * (1 + 3 * 0.044715 * x * x)
        gate = torch.sigmoid(_TANH_SCALE * (x + 0.044715 * x * x * x))
    return gate + x * gate * (1 - gate) * slope


def encode_derivative(values: Tensor) -> Tensor:
    """uint8 codes of derivatives, the nearest; a derivative that is not finite has no code."""
    return (values * DERIVATIVE_STEPS + DERIVATIVE_ZERO).round().clamp(0, 255).to(torch.uint8)


def decode_derivative(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The derivative that a code stands for, within 1/404 of the one that was encoded."""
    return (codes.to(dtype) - DERIVATIVE_ZERO) * (1 / DERIVATIVE_STEPS)


def activation_forward(
    pre: Tensor, kind: str, *, keep: str, eight_bit: str | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The public contract is that of :func:`epic_fast.ops.activation.activation_forward`."""
    if eight_bit is None:
        output, scale = activation(pre, kind), None
    else:
        output, scale = quantise_rows(activation(pre.float(), kind), eight_bit)
    kept = {"none": None, "full": pre}[keep] if keep != "eight_bit" else encode_derivative(derivative(pre, kind))
    return output, kept, scale


def activation_backward(grad: Tensor, kept: Tensor, kind: str, keep: str) -> Tensor:
    """``grad * act'(pre)`` in the type of ``grad``; see :func:`epic_fast.ops.activation.activation_backward`."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    slope = derivative(kept, kind) if keep == "full" else decode_derivative(kept, wide)
    return (grad.to(wide) * slope).to(grad.dtype)


def activation_backward_8bit(grad: Tensor, kept: Tensor, kind: str, keep: str, eight_bit: str) -> tuple[Tensor, Tensor]:
    """:func:`activation_backward` in 8 bits, never rounded in between."""
    return quantise_rows(activation_backward(grad.float(), kept, kind, keep), eight_bit)
