"""The specification of residual sum + layer norm or RMS norm and of its gradient, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from epic_fast.kernels.common.eight_bit import quantise_rows  # pyright: ignore[reportMissingImports]


def residual_norm_forward(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    normed_dtype: torch.dtype | None = None,
    in_place: bool = False,
    eight_bit: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
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
    if bias is None:
        rows = total.to(wide)
        rstd = (rows.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        mean, normed = None, rows * rstd * weight.to(wide)
    else:
        normed, mean, rstd = torch.native_layer_norm(
            total.to(wide), (total.shape[-1],), weight.to(wide), bias.to(wide), eps
        )
        mean = mean.reshape(-1)
    rstd = rstd.reshape(-1)
    if eight_bit is not None:
        data, scale = quantise_rows(normed, eight_bit)
        return total, data, mean, rstd, scale
    if normed_dtype is None:
        normed_dtype = stream.dtype if branch is None else branch.dtype
    return total, normed.to(normed_dtype), mean, rstd, None


def residual_norm_forward_kept(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    normed_dtype: torch.dtype | None = None,
    in_place: bool = False,
    eight_bit: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The public contract is that of :func:`epic_fast.ops.residual_norm.residual_norm_forward_kept`."""
    total, normed, mean, rstd, scale = residual_norm_forward(
        stream, branch, weight, bias, eps, normed_dtype=normed_dtype, in_place=in_place, eight_bit=eight_bit
    )
    assert mean is not None
    statistics = (*total.shape[:-1], 1)
    data, step = quantise_rows((total.to(mean.dtype) - mean.view(statistics)) * rstd.view(statistics), "int8")
    return total, normed, data, step.to(rstd.dtype), rstd, scale


def residual_norm_backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    grad_dtype: torch.dtype | None = None,
) -> Tensor:
    """``grad_total`` + the norm's gradient, in the type of ``total``; README.md has the equation.

    ``total`` as int8 is the normalised rows, and ``mean`` their scales; the type is then ``grad_dtype``.  Without a
    mean it is an RMS norm.
    """
    statistics = (*total.shape[:-1], 1)
    if mean is None:
        wide = rstd.dtype
        rows = total.to(wide) * rstd.view(statistics)
        scaled = grad_normed.to(wide) * weight.to(wide)
        grad = (scaled - rows * (scaled * rows).mean(dim=-1, keepdim=True)) * rstd.view(statistics)
        return (grad if grad_total is None else grad + grad_total.to(wide)).to(grad_dtype or total.dtype)
    if total.dtype == torch.int8:
        grad_dtype = grad_dtype or grad_normed.dtype
        rows, center = total.to(rstd.dtype) * mean.view(statistics), torch.zeros_like(rstd)
        scale = torch.ones_like(rstd)
    else:
        grad_dtype = grad_dtype or total.dtype
        rows, center, scale = total, mean, rstd
    wide = torch.promote_types(rows.dtype, torch.float32)
    grad, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad_normed.to(wide),
        rows.to(wide),
        (total.shape[-1],),
        center.reshape(statistics),
        scale.reshape(statistics),
        weight.to(wide),
        None,
        (True, False, False),
    )
    if total.dtype == torch.int8:
        grad = grad * rstd.view(statistics)
    if grad_total is not None:
        grad = grad + grad_total.to(wide)
    return grad.to(grad_dtype)


def moved_norm_forward(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    branch_at: Tensor | None = None,
    normed_at: Tensor | None = None,
    probe: Tensor | None = None,
    ended: tuple[Tensor, Tensor, Tensor | None] | None = None,
    normed_dtype: torch.dtype | None = None,
    keep: bool = False,
) -> tuple[Tensor | None, ...]:
    """The public contract is that of :func:`epic_fast.ops.residual_norm.moved_norm_forward`."""
    if ended is not None and probe is not None:
        return _with_rows_that_end(stream, branch, weight, bias, eps, normed_at, probe, ended, normed_dtype)
    if branch is not None and branch_at is not None:
        branch = branch.index_select(0, branch_at)
    operation = residual_norm_forward_kept if keep else residual_norm_forward
    total, normed, *saved, _ = operation(stream, branch, weight, bias, eps, normed_dtype=normed_dtype)  # pyright: ignore
    if normed_at is not None:
        normed = torch.empty_like(normed).index_copy_(0, normed_at, normed)
    probed = None
    if probe is not None:
        wide = torch.promote_types(total.dtype, torch.float32)
        # Autocast would undo the explicit widening.
        with torch.autocast(total.device.type, enabled=False):
            probed = total.to(wide) @ probe.to(wide).T
    return total, normed, *(saved if keep else (total, *saved)), probed


def _with_rows_that_end(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    normed_at: Tensor | None,
    probe: Tensor,
    ended: tuple[Tensor, Tensor, Tensor | None],
    normed_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    hidden, through, offset = ended
    rows = len(stream) - len(hidden)

    def longer(each: Tensor | None, at: slice | Tensor = slice(rows)) -> Tensor | None:
        """With the rows that end, unwritten."""
        if each is None:
            return None
        result = each.new_empty(len(stream), *each.shape[1:])
        result[at] = each
        return result

    total, normed, _, mean, rstd, probed = moved_norm_forward(
        stream[:rows], branch, weight, bias, eps, probe=probe, normed_dtype=normed_dtype
    )
    total, mean, rstd, probed = (longer(each) for each in (total, mean, rstd, probed))
    # In the norm's order they may be anywhere.
    normed = longer(normed, slice(rows) if normed_at is None else normed_at[:rows])
    assert probed is not None
    wide = probed.dtype
    last = stream[rows:].to(wide) if offset is None else stream[rows:].to(wide) + offset.to(wide)
    with torch.autocast(stream.device.type, enabled=False):
        probed[rows:] = last @ probe.to(wide).T + hidden.to(wide) @ through.to(wide).T
    total = stream if branch is None else total
    return total, normed, total, mean, rstd, probed


def moved_norm_backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    normed_at: Tensor | None = None,
    moved_at: Tensor | None = None,
    moved_dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The public contract is that of :func:`epic_fast.ops.residual_norm.moved_norm_backward`."""
    if normed_at is not None:
        grad_normed = grad_normed.index_select(0, normed_at)
    grad = residual_norm_backward(grad_normed, grad_total, total, weight, mean, rstd, grad_dtype=grad_dtype)
    if moved_at is None:
        return grad, None
    return grad, torch.empty_like(grad, dtype=moved_dtype or grad.dtype).index_copy_(
        0, moved_at, grad.to(moved_dtype or grad.dtype)
    )
