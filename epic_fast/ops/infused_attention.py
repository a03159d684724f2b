"""Attention over infused keys and values as PyTorch sees it: two operators, their autograd, and the dispatch above.

Backward saves the inputs and the softmax's statistic; the output, which frozen layers above do not keep either, is
computed again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from epic_fast.kernels.infused_attention import reference  # pyright: ignore[reportMissingImports]
from epic_fast.ops import library
from epic_fast.ops.dispatch import Operation

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTH_TYPES = (torch.int64, torch.int32)
LARGEST_HEAD = 256
NAMES = ("query", "key", "value", "key_multiplier", "value_multiplier", "value_shift", "gate")

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor key_multiplier, Tensor value_multiplier, Tensor value_shift, "
    "Tensor gate, Tensor? lengths"
)
_FLAGS = "bool replace, bool causal, float scale"


@functools.cache
def _launchers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from epic_fast.kernels.infused_attention import (  # pyright: ignore[reportMissingImports]
        triton_backward,
        triton_forward,
    )

    return triton_forward.infused_attention_forward, triton_backward.infused_attention_backward


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_multiplier: Tensor,
    value_multiplier: Tensor,
    value_shift: Tensor,
    gate: Tensor,
    lengths: Tensor | None,
    replace: bool,
    causal: bool,
    scale: float,
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    inputs = (query, key, value, key_multiplier, value_multiplier, value_shift, gate, lengths)
    output, lse = _launchers()[0](*inputs, replace=replace, causal=causal, scale=scale, save_lse=save_lse)
    return output, query.new_empty(0) if lse is None else lse


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_multiplier: Tensor,
    value_multiplier: Tensor,
    value_shift: Tensor,
    gate: Tensor,
    lengths: Tensor | None,
    replace: bool,
    causal: bool,
    scale: float,
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32) if save_lse else query.new_empty(0)
    return library.empty_rows(query), lse


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_multiplier: Tensor,
    value_multiplier: Tensor,
    value_shift: Tensor,
    gate: Tensor,
    lengths: Tensor | None,
    lse: Tensor,
    replace: bool,
    causal: bool,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    inputs = (query, key, value, key_multiplier, value_multiplier, value_shift, gate, lengths)
    flags: dict[str, Any] = {"replace": replace, "causal": causal, "scale": scale, "needs": tuple(needs)}
    gradients = _launchers()[1](grad, *inputs, lse, **flags)
    return tuple(query.new_empty(0) if each is None else each for each in gradients)


def _backward_fake(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_multiplier: Tensor,
    value_multiplier: Tensor,
    value_shift: Tensor,
    gate: Tensor,
    lengths: Tensor | None,
    lse: Tensor,
    replace: bool,
    causal: bool,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    found = []
    for index, each in enumerate((query, key, value, key_multiplier, value_multiplier, value_shift, gate)):
        if not needs[index]:
            found.append(query.new_empty(0))
        else:
            found.append(library.empty_rows(each) if index < 3 else each.new_empty(each.shape))
    return tuple(found)


FORWARD = library.register(
    f"infused_attention_forward({_INPUTS}, {_FLAGS}, bool save_lse) -> (Tensor, Tensor)", _forward, _forward_fake
)
BACKWARD = library.register(
    f"infused_attention_backward(Tensor grad, {_INPUTS}, Tensor lse, {_FLAGS}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _InfusedAttention(torch.autograd.Function):
    """Entered only where some input needs a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_multiplier: Tensor,
        value_multiplier: Tensor,
        value_shift: Tensor,
        gate: Tensor,
        lengths: Tensor | None,
        replace: bool,
        causal: bool,
        scale: float,
        direct: bool,
    ) -> Tensor:
        inputs = (query, key, value, key_multiplier, value_multiplier, value_shift, gate, lengths)
        output, lse = (_forward if direct else FORWARD)(*inputs, replace, causal, scale, True)
        ctx.save_for_backward(*inputs, lse)
        ctx.flags = replace, causal, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        # What once_differentiable does where nobody asks for a second derivative costs as much as a launch.
        if torch.is_grad_enabled():
            return _gradients_once(ctx, grad)
        return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:7]
    tensors = (grad, *ctx.saved_tensors)
    replace, causal, scale = ctx.flags
    if library.direct(*tensors):
        kept = _launchers()[1](*tensors, replace=replace, causal=causal, scale=scale, needs=needs)
    else:
        gradients = BACKWARD(*tensors, replace, causal, scale, list(needs))
        kept = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
    return (*kept, None, None, None, None, None)


_gradients_once = once_differentiable(_gradients)
_apply_directly = library.applied_directly(_InfusedAttention)


def _triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_multiplier: Tensor,
    value_multiplier: Tensor,
    value_shift: Tensor,
    gate: Tensor,
    *,
    form: str = "residual",
    causal: bool = True,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    if lengths is not None:
        lengths = lengths.to(torch.int32) if lengths.dtype not in LENGTH_TYPES else lengths
        lengths = lengths.contiguous()
    differentiable = (query, key, value, key_multiplier, value_multiplier, value_shift, gate)
    inputs = (*differentiable, lengths)
    flags = (form == "replace", causal, query.shape[3] ** -0.5 if scale is None else scale)
    direct = library.direct(*inputs)
    if torch.is_grad_enabled() and any(each.requires_grad for each in differentiable):
        apply = _apply_directly if direct else _InfusedAttention.apply
        return apply(*inputs, *flags, direct)  # pyright: ignore[reportReturnType]
    if direct:
        replace, causal, scale = flags
        return _launchers()[0](*inputs, replace=replace, causal=causal, scale=scale, save_lse=False)[0]
    return FORWARD(*inputs, *flags, False)[0]


def _limits(*tensors: Tensor) -> Sequence[str]:
    query = tensors[0]
    old = library.too_old(query.get_device()) if query.is_cuda else ""
    reasons = [old] if old else []
    for name, each in zip(NAMES, tensors, strict=True):
        if each.dtype not in KERNEL_TYPES:
            reasons.append(f"{name} is {each.dtype}; the kernel takes float32, bfloat16 and float16")
    if not 0 < query.shape[3] <= LARGEST_HEAD:
        reasons.append(f"head_dim is {query.shape[3]}; the kernel takes 1 to {LARGEST_HEAD}")
    return reasons


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """Query, key and value in autocast's type, as in PyTorch's own attention; float64 and vectors are left alone."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    rows = [each if each.dtype == torch.float64 else each.to(dtype) for each in tensors[:3]]
    return [*rows, *tensors[3:]]


infused_attention = Operation(
    "infused_attention", reference=reference.infused_attention, triton=_triton, limits=_limits, autocast=_autocast
)
