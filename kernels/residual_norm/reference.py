"""The specification of residual sum + layer norm and of its gradient, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from epic_fast.kernels.common.eight_bit import quantise_rows  # pyright: ignore[reportMissingImports]


def residual_norm_forward(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    normed_dtype: torch.dtype | None = None,
    in_place: bool = False,
    eight_bit: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The public contract is that of :func:`epic_fast.ops.residual_norm.residual_norm_forward`.

    Statistics, and everything between the rounded sum and the rounded norm, in float32 (float64 for float64).
    """
    wide = torch.promote_types(stream.dtype, torch.float32)
    if branch is None:
        total = stream
    elif in_place:
        total = stream.copy_(stream.to(wide) + branch) if stream.dtype != wide else stream.add_(branch)
    else:
        total = (stream.to(wide) + branch.to(wide)).to(stream.dtype)
    normed, mean, rstd = torch.native_layer_norm(
        total.to(wide), (total.shape[-1],), weight.to(wide), bias.to(wide), eps
    )
    mean, rstd = mean.reshape(-1), rstd.reshape(-1)
    if eight_bit is not None:
        data, scale = quantise_rows(normed, eight_bit)
        return total, data, mean, rstd, scale
    if normed_dtype is None:
        normed_dtype = stream.dtype if branch is None else branch.dtype
    return total, normed.to(normed_dtype), mean, rstd, None


def residual_norm_backward(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """``grad_total`` + the norm's gradient, in the type of ``total``; README.md has the equation."""
    wide = torch.promote_types(total.dtype, torch.float32)
    statistics = (*total.shape[:-1], 1)
    grad, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad_normed.to(wide),
        total.to(wide),
        (total.shape[-1],),
        mean.reshape(statistics),
        rstd.reshape(statistics),
        weight.to(wide),
        None,
        (True, False, False),
    )
    if grad_total is not None:
        grad = grad + grad_total.to(wide)
    return grad.to(total.dtype)
