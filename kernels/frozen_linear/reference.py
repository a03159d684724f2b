"""Products with a frozen weight, and the activation that follows or precedes them, in plain PyTorch.

No gradient with respect to a weight or a bias exists.  What backward needs of the activation is kept in one of three
forms: nothing, the pre-activation, or the activation's derivative in eight bits (``kernels/activation``).
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from epic_fast.kernels.activation.reference import KEEPS, activation_backward, activation_forward
from epic_fast.kernels.common.eight_bit import quantise_rows

__all__ = [
    "KEEPS",
    "EightBitWeight",
    "linear_backward",
    "linear_backward_8bit",
    "linear_forward",
    "linear_forward_8bit",
    "quantise_rows",
    "quantise_weight",
]


@dataclass(frozen=True)
class EightBitWeight:
    """A frozen weight ``(N, K)`` in eight bits, with one scale a channel of the product's result.

    Attributes:
        kind: ``"fp8"`` (e4m3) or ``"int8"``.
        data, scale: ``(N, K)`` and ``(N,)`` float32 with ``weight ~= data * scale[:, None]``, for ``input @ weight.T``.
        transposed, transposed_scale: ``(K, N)`` and ``(K,)``, so that ``transposed * transposed_scale[:, None]`` is
            about ``weight.T``, for ``grad @ weight``; None where no backward product is wanted.
    """

    kind: str
    data: Tensor
    scale: Tensor
    transposed: Tensor | None = None
    transposed_scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        tensors = (self.data, self.scale, self.transposed, self.transposed_scale)
        return sum(each.nbytes for each in tensors if each is not None)


def finish(pre: Tensor, kind: str | None, keep: str) -> tuple[Tensor, Tensor | None]:
    """The output of a pre-activation and what is kept of it."""
    if kind is None:
        return pre, None
    return activation_forward(pre, kind, keep=keep)[:2]


def linear_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None = None, keep: str = "none"
) -> tuple[Tensor, Tensor | None]:
    """``act(input @ weight.T + bias)`` and what is kept for backward: ``(M, K), (N, K), (N,) -> (M, N), (M, N)``."""
    return finish(linear(input, weight, bias), activation, keep)


def linear_backward(
    grad: Tensor, weight: Tensor, *, kept: Tensor | None = None, keep: str = "none", activation: str | None = None
) -> Tensor:
    """``grad @ weight``, times ``act'`` of what the layer below kept: ``(M, N), (N, K), (M, K) -> (M, K)``."""
    product = grad @ weight
    return product if kept is None else activation_backward(product, kept, activation or "", keep)


def quantise_weight(weight: Tensor, kind: str, *, backward: bool = True) -> EightBitWeight:
    """``(N, K)`` quantised per row for forward products and, with ``backward``, per column for backward ones."""
    data, scale = quantise_rows(weight, kind)
    if not backward:
        return EightBitWeight(kind, data, scale)
    return EightBitWeight(kind, data, scale, *quantise_rows(weight.t().contiguous(), kind))


def product_8bit(
    left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``(M, K), (M,), (N, K), (N,), (N,) -> (M, N)``: the product of what the eight bits stand for, plus a bias.

    Sums run in float32 (float64 for int8, whose products may pass 2**24 and are exact on the card), scales follow.
    """
    wide = torch.float64 if dtype == torch.float64 or left.dtype == torch.int8 else torch.float32
    product = left.to(wide) @ right.to(wide).t() * left_scale.to(wide)[:, None] * right_scale.to(wide)
    return (product if bias is None else product + bias.to(wide)).to(dtype)


def linear_forward_8bit(
    input: Tensor,
    input_scale: Tensor,
    weight: EightBitWeight,
    bias: Tensor | None,
    *,
    out_dtype: torch.dtype,
    activation: str | None = None,
    keep: str = "none",
) -> tuple[Tensor, Tensor | None]:
    """:func:`linear_forward` of ``input * input_scale[:, None]`` and the weight in eight bits."""
    return finish(product_8bit(input, input_scale, weight.data, weight.scale, bias, out_dtype), activation, keep)


def linear_backward_8bit(
    grad: Tensor,
    weight: EightBitWeight,
    *,
    kept: Tensor | None = None,
    keep: str = "none",
    activation: str | None = None,
) -> Tensor:
    """:func:`linear_backward` with the gradient quantised row by row."""
    assert weight.transposed is not None
    assert weight.transposed_scale is not None
    data, scale = quantise_rows(grad, weight.kind)
    product = product_8bit(data, scale, weight.transposed, weight.transposed_scale, None, grad.dtype)
    return product if kept is None else activation_backward(product, kept, activation or "", keep)
