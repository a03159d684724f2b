"""Residual sum and layer norm or RMS norm of a frozen layer, forward and backward.

Raw operations, tensors in and tensors out: whoever calls them owns the graph.  The weights are frozen, so that there
is no gradient but one, for both terms of the sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from epic_fast.errors import ConfigError
from epic_fast.kernels.common.eight_bit import EIGHT_BIT_TYPES  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.residual_norm import reference  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.residual_norm.tiles import MAX_WIDTH  # pyright: ignore[reportMissingImports]
from epic_fast.ops import library
from epic_fast.ops.dispatch import Operation

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_FP8 = (8, 9)


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
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """``stream + branch`` and its layer norm.

    Args:
        stream: ``(..., D)`` with unit last stride; rows may lie anywhere, as those of a slice ``[:, :P]`` do.
        branch: ``(..., D)``, of the same or another type; None: the norm alone.
        weight, bias: ``(D,)``; no bias: an RMS norm, without a mean, ``x / sqrt(mean(x²) + eps) * weight``.
        eps: added to the variance.
        normed_dtype: of the norm; that of ``branch`` if None, or of ``stream`` without a branch.
        in_place: the sum is written into the memory of ``stream``.
        eight_bit: ``"fp8"`` (e4m3) or ``"int8"``: the norm comes in 8 bits, each row with a scale of its own.

    Returns:
        ``(total, normed, mean, rstd, scale)``: the sum in the type of ``stream`` (``stream`` itself where there is no
        branch, or in place); its norm; mean (None of an RMS norm) and reciprocal standard deviation ``(rows,)`` in
        float32, of the rounded sum; and the scale ``(rows,)`` in float32, ``norm ≈ normed * scale``, or None.  A row
        that is not finite has the scale NaN.

    Raises:
        ConfigError: shapes that do not fit, or an ``eight_bit`` that does not exist.
    """
    if weight.shape != stream.shape[-1:] or (bias is not None and bias.shape != weight.shape):
        raise ConfigError(
            f"residual_norm_forward: weight has shape {tuple(weight.shape)} and bias "
            f"{None if bias is None else tuple(bias.shape)}; wanted "
            f"({stream.shape[-1]},) for a stream of shape {tuple(stream.shape)}"
        )
    if branch is not None and branch.shape != stream.shape:
        raise ConfigError(
            f"residual_norm_forward: branch has shape {tuple(branch.shape)}; wanted {tuple(stream.shape)}, as the "
            "stream has"
        )
    operation = _FORWARD.get(eight_bit)
    if operation is None:
        raise ConfigError(f"residual_norm_forward: eight_bit={eight_bit!r} is not one of None, 'fp8', 'int8'")
    return operation(
        stream, branch, weight, bias, eps, normed_dtype=normed_dtype, in_place=in_place, eight_bit=eight_bit, impl=impl
    )  # fmt: skip


def residual_norm_forward_kept(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    normed_dtype: torch.dtype | None = None,
    in_place: bool = False,
    eight_bit: str | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """:func:`residual_norm_forward` that keeps the normalised rows in 8 bits for backward: the sum need not live.

    A layer norm's gradient reads the normalised row only through its projection on it,
    ``x̂ · mean(g x̂)``, so that rounding it shows less in the gradient than bfloat16 does.

    Returns:
        ``(total, normed, data, step, rstd, scale)``: ``(total - mean) * rstd ≈ data * step``, data ``(..., D)`` int8
        and step ``(rows,)`` float32; the others as :func:`residual_norm_forward` has them.  Give data, step and rstd to
        :func:`residual_norm_backward` as ``total``, ``mean`` and ``rstd``.
    """
    if bias is None:
        raise ConfigError(
            "residual_norm_forward_kept: bias=None is an RMS norm, whose rows are not kept in 8 bits; wanted a "
            "bias, or residual_norm_forward"
        )
    operation = _KEPT.get(eight_bit)
    if operation is None:
        raise ConfigError(f"residual_norm_forward_kept: eight_bit={eight_bit!r} is not one of None, 'fp8', 'int8'")
    return operation(
        stream, branch, weight, bias, eps, normed_dtype=normed_dtype, in_place=in_place, eight_bit=eight_bit, impl=impl
    )  # fmt: skip


def residual_norm_backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    grad_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """The gradient of the stream, which is also that of the branch, ``(..., D)`` in the type of ``total``.

    Args:
        grad_normed: ``(..., D)``, of the norm.
        grad_total: ``(..., D)``, of the sum where something else read it too; None: nothing did.
        total, mean, rstd: what :func:`residual_norm_forward` gave (no mean: an RMS norm); or data, step and rstd
            of :func:`residual_norm_forward_kept`.
        weight: ``(D,)``.
        grad_dtype: of the result, where it is not that of ``total`` (of ``grad_normed`` for rows in 8 bits).
    """
    if grad_normed.shape != total.shape or (grad_total is not None and grad_total.shape != total.shape):
        raise ConfigError(
            f"residual_norm_backward: the gradients have shapes {tuple(grad_normed.shape)} and "
            f"{None if grad_total is None else tuple(grad_total.shape)}; wanted {tuple(total.shape)}, as the total has"
        )
    return _BACKWARD(grad_normed, grad_total, total, weight, mean, rstd, grad_dtype=grad_dtype, impl=impl)


@functools.cache
def _launchers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from epic_fast.kernels.residual_norm import triton_backward, triton_forward  # pyright: ignore[reportMissingImports]

    return triton_forward.residual_norm_forward, triton_backward.residual_norm_backward


def _no_none(like: Tensor, found: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if each is None else each for each in found)


def _op_forward(
    stream: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    normed_dtype: torch.dtype | None,
    eight_bit: str | None,
) -> tuple[Tensor, ...]:
    found = _launchers()[0](stream, branch, weight, bias, eps, normed_dtype=normed_dtype, eight_bit=eight_bit)
    return _no_none(stream, found)


def _op_forward_in_place(
    stream: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    normed_dtype: torch.dtype | None,
    eight_bit: str | None,
) -> tuple[Tensor, ...]:
    _, *found = _launchers()[0](
        stream, branch, weight, bias, eps, normed_dtype=normed_dtype, in_place=True, eight_bit=eight_bit
    )  # fmt: skip
    return _no_none(stream, found)


def _op_norm(
    stream: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    normed_dtype: torch.dtype | None,
    eight_bit: str | None,
) -> tuple[Tensor, ...]:
    _, *found = _launchers()[0](stream, None, weight, bias, eps, normed_dtype=normed_dtype, eight_bit=eight_bit)
    return _no_none(stream, found)


def _op_backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    grad_dtype: torch.dtype | None = None,
) -> Tensor:
    return _launchers()[1](grad_normed, grad_total, total, weight, mean, rstd, grad_dtype=grad_dtype)


def _op_kept(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    normed_dtype: torch.dtype | None,
    eight_bit: str | None,
) -> tuple[Tensor, ...]:
    total, *found, scale = _launchers()[0](
        stream, branch, weight, bias, eps, normed_dtype=normed_dtype, eight_bit=eight_bit, keep=True
    )  # fmt: skip
    total = stream.new_empty(0) if branch is None else total
    return total, *found, stream.new_empty(0) if scale is None else scale


def _op_kept_in_place(
    stream: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    normed_dtype: torch.dtype | None,
    eight_bit: str | None,
) -> tuple[Tensor, ...]:
    _, *found, scale = _launchers()[0](
        stream, branch, weight, bias, eps, normed_dtype=normed_dtype, eight_bit=eight_bit, in_place=True, keep=True
    )  # fmt: skip
    return (*found, stream.new_empty(0) if scale is None else scale)


def _fake_kept(stream: Tensor, dtype: torch.dtype, eight_bit: str | None) -> tuple[Tensor, ...]:
    normed, *statistics = _fake_norm(stream, stream, dtype, eight_bit)
    return normed, stream.new_empty(stream.shape, dtype=torch.int8), *statistics


def _fake_norm(stream: Tensor, bias: Tensor | None, dtype: torch.dtype, eight_bit: str | None) -> tuple[Tensor, ...]:
    rows = math.prod(stream.shape[:-1])
    return (
        stream.new_empty(stream.shape, dtype=dtype if eight_bit is None else EIGHT_BIT_TYPES[eight_bit]),
        stream.new_empty(0) if bias is None else stream.new_empty(rows, dtype=torch.float32),
        stream.new_empty(rows, dtype=torch.float32),
        stream.new_empty(0) if eight_bit is None else stream.new_empty(rows, dtype=torch.float32),
    )


_OPTIONS = "Tensor weight, Tensor? bias, float eps, ScalarType? normed_dtype, str? eight_bit"
FORWARD = library.register(
    f"residual_norm_forward(Tensor stream, Tensor branch, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _op_forward,
    lambda stream, branch, weight, bias, eps, normed_dtype, eight_bit: (
        stream.new_empty(stream.shape),
        *_fake_norm(stream, bias, normed_dtype or branch.dtype, eight_bit),
    ),
)
FORWARD_IN_PLACE = library.register(
    f"residual_norm_forward_(Tensor(a!) stream, Tensor branch, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _op_forward_in_place,
    lambda stream, branch, weight, bias, eps, normed_dtype, eight_bit: _fake_norm(
        stream, bias, normed_dtype or branch.dtype, eight_bit
    ),
)
NORM = library.register(
    f"norm_forward(Tensor stream, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _op_norm,
    lambda stream, weight, bias, eps, normed_dtype, eight_bit: _fake_norm(
        stream, bias, normed_dtype or stream.dtype, eight_bit
    ),
)
KEPT = library.register(
    f"residual_norm_kept(Tensor stream, Tensor? branch, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _op_kept,
    lambda stream, branch, weight, bias, eps, normed_dtype, eight_bit: (
        stream.new_empty(0 if branch is None else stream.shape),
        *_fake_kept(stream, normed_dtype or (stream if branch is None else branch).dtype, eight_bit),
    ),
)
KEPT_IN_PLACE = library.register(
    f"residual_norm_kept_(Tensor(a!) stream, Tensor branch, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _op_kept_in_place,
    lambda stream, branch, weight, bias, eps, normed_dtype, eight_bit: _fake_kept(
        stream, normed_dtype or branch.dtype, eight_bit
    ),
)
BACKWARD = library.register(
    "residual_norm_backward(Tensor grad_normed, Tensor? grad_total, Tensor total, Tensor weight, Tensor? mean, "
    "Tensor rstd, ScalarType? grad_dtype=None) -> Tensor",
    _op_backward,
    lambda grad_normed, grad_total, total, weight, mean, rstd, grad_dtype=None: grad_normed.new_empty(
        total.shape, dtype=grad_dtype or (grad_normed if total.dtype == torch.int8 else total).dtype
    ),
)


def _triton_forward(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    normed_dtype: torch.dtype | None,
    in_place: bool,
    eight_bit: str | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    if library.direct(stream, branch, weight, bias):
        return _launchers()[0](
            stream, branch, weight, bias, eps, normed_dtype=normed_dtype, in_place=in_place, eight_bit=eight_bit
        )  # fmt: skip
    total = stream
    if branch is None:
        normed, mean, rstd, scale = NORM(stream, weight, bias, eps, normed_dtype, eight_bit)
    elif in_place:
        normed, mean, rstd, scale = FORWARD_IN_PLACE(stream, branch, weight, bias, eps, normed_dtype, eight_bit)
    else:
        total, normed, mean, rstd, scale = FORWARD(stream, branch, weight, bias, eps, normed_dtype, eight_bit)
    return total, normed, None if bias is None else mean, rstd, None if eight_bit is None else scale


def _triton_kept(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    normed_dtype: torch.dtype | None,
    in_place: bool,
    eight_bit: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    if library.direct(stream, branch, weight, bias):
        return _launchers()[0](
            stream, branch, weight, bias, eps,
            normed_dtype=normed_dtype, in_place=in_place, eight_bit=eight_bit, keep=True,
        )  # fmt: skip
    options = (weight, bias, eps, normed_dtype, eight_bit)
    if in_place and branch is not None:
        normed, data, step, rstd, scale = KEPT_IN_PLACE(stream, branch, *options)
        total = stream
    else:
        total, normed, data, step, rstd, scale = KEPT(stream, branch, *options)
        total = stream if branch is None else total
    return total, normed, data, step, rstd, None if eight_bit is None else scale


def _triton_backward(*tensors: Tensor | None, grad_dtype: torch.dtype | None) -> Tensor:
    if library.direct(*tensors):
        return _launchers()[1](*tensors, grad_dtype=grad_dtype)
    return BACKWARD(*tensors, grad_dtype)


def _limits(eight_bit: str | None, stream: Tensor, *others: Any) -> Sequence[str]:
    reasons = []
    if stream.is_cuda:
        reasons = [each for each in (library.too_old(stream.get_device()), no_fp8(eight_bit, stream)) if each]
    for each in (stream, *others):
        if isinstance(each, Tensor) and each.dtype not in (*KERNEL_TYPES, torch.int8):
            reasons.append(f"a tensor is {each.dtype}; the kernel takes float32, bfloat16 and float16")
    if not 0 < stream.shape[-1] <= MAX_WIDTH:
        reasons.append(f"rows are {stream.shape[-1]} wide; the kernel takes 1 to {MAX_WIDTH}")
    return reasons


def no_fp8(eight_bit: str | None, tensor: Tensor) -> str:
    """Why the tensor's GPU cannot write fp8; empty if it can, or need not."""
    return _no_fp8(tensor.get_device()) if eight_bit == "fp8" else ""


@torch.compiler.assume_constant_result
def _no_fp8(index: int) -> str:
    found = library.capability(index)
    if found is None or found >= OLDEST_FP8:
        return ""
    return "the GPU has compute capability {}.{}; fp8 needs {}.{}; take int8".format(*found, *OLDEST_FP8)


_FORWARD = {
    eight_bit: Operation(
        "residual_norm_forward",
        reference=reference.residual_norm_forward,
        triton=_triton_forward,
        limits=functools.partial(_limits, eight_bit),
    )
    for eight_bit in (None, *EIGHT_BIT_TYPES)
}
_KEPT = {
    eight_bit: Operation(
        "residual_norm_forward_kept",
        reference=reference.residual_norm_forward_kept,
        triton=_triton_kept,
        limits=functools.partial(_limits, eight_bit),
    )
    for eight_bit in (None, *EIGHT_BIT_TYPES)
}
_BACKWARD = Operation(
    "residual_norm_backward",
    reference=reference.residual_norm_backward,
    triton=_triton_backward,
    limits=functools.partial(_limits, None),
)
