"""Products, norms and activations of a frozen layer: tensors in, tensors out, no graph and no weight gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def residual_norm_forward(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    normed_dtype: torch.dtype | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``total = stream + branch`` and ``LayerNorm(total)``, with the norm's mean and 1/deviation a row."""
    if branch is None:
        total = stream
    else:
        total = stream.add_(branch) if in_place else stream + branch
    wide = torch.promote_types(total.dtype, torch.float32)
    normed, mean, rstd = torch.native_layer_norm(
        total.to(wide), (total.shape[-1],), weight.to(wide), bias.to(wide), eps
    )
    if normed_dtype is None:
        normed_dtype = stream.dtype if branch is None else branch.dtype
    return total, normed.to(normed_dtype), mean.reshape(-1), rstd.reshape(-1)


def residual_norm_backward(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """Gradient of stream and of branch alike."""
    wide = torch.promote_types(total.dtype, torch.float32)
    statistics = (*total.shape[:-1], 1)
    grad, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad_normed.to(wide), total.to(wide), (total.shape[-1],), mean.reshape(statistics), rstd.reshape(statistics),
        weight.to(wide), None, (True, False, False),
    )  # fmt: skip
    return (grad if grad_total is None else grad + grad_total.to(wide)).to(total.dtype)


def linear_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None = None, keep: str = "none"
) -> tuple[Tensor, Tensor | None]:
    """``act(input @ weight.T + bias)`` and what backward keeps of the pre-activation."""
    pre = F.linear(input, weight, bias)
    if activation is None:
        return pre, pre if keep == "full" else None
    kept = pre if keep == "full" else None
    if keep == "eight_bit":
        kept = ((_derivative(pre, activation) + 0.13) * (255 / 1.26)).round().clamp_(0, 255).to(torch.uint8)
    if activation == "quick_gelu":
        return pre * torch.sigmoid(1.702 * pre), kept
    return F.gelu(pre, approximate="tanh" if activation == "gelu_tanh" else "none"), kept


def linear_backward(
    grad: Tensor, weight: Tensor, *, kept: Tensor | None = None, keep: str = "none", activation: str | None = None
) -> Tensor:
    """``grad @ weight``, times the activation's derivative where something of it was kept."""
    product = grad @ weight
    if kept is None or activation is None:
        return product
    slope = _derivative(kept, activation) if keep == "full" else kept.float() * (1.26 / 255) - 0.13
    return (product * slope).to(product.dtype)


def _derivative(pre: Tensor, kind: str) -> Tensor:
    x = pre.to(torch.promote_types(pre.dtype, torch.float32))
    if kind == "gelu":
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if kind == "quick_gelu":
        slope, gate = 1.702, torch.sigmoid(1.702 * x)
    else:
        scale = 2 * math.sqrt(2 / math.pi)
        slope = scale * (1 + 3 * 0.044715 * x * x)
        gate = torch.sigmoid(scale * (x + 0.044715 * x * x * x))
    return gate * (1 + x * (1 - gate) * slope)
