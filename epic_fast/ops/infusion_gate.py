"""The gate of an infusion as PyTorch sees it: two operators, their autograd, and the dispatch above them.

Backward saves two small statistics in place of a second pass over the values, and the values only where these need a
gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from epic_fast.kernels.infusion_gate import reference  # pyright: ignore[reportMissingImports]
from epic_fast.ops import library
from epic_fast.ops.dispatch import Operation

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTH_TYPES = (torch.int64, torch.int32)
LARGEST_HEAD = 256


@functools.cache
def _launchers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from epic_fast.kernels.infusion_gate import triton_kernels  # pyright: ignore[reportMissingImports]

    return triton_kernels.infusion_gate_forward, triton_kernels.infusion_gate_backward


def _forward(
    value: Tensor, shift: Tensor, bias: Tensor, lengths: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    found = _launchers()[0](value, shift, bias, lengths, save=save)
    return tuple(value.new_empty(0) if each is None else each for each in found)  # pyright: ignore


def _forward_fake(
    value: Tensor, shift: Tensor, bias: Tensor, lengths: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, _, head_dim = value.shape
    gate = bias.new_empty(batch, heads)
    if not save:
        return gate, value.new_empty(0), value.new_empty(0)
    wide = value.new_empty(batch, heads, head_dim, dtype=torch.float32)
    return gate, wide, value.new_empty(batch, heads, 2, dtype=torch.float32)


def _backward(
    grad: Tensor,
    value: Tensor | None,
    shift: Tensor,
    bias: Tensor,
    lengths: Tensor | None,
    sums: Tensor,
    norms: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _launchers()[1](grad, value, shift, bias, lengths, sums, norms, needs=tuple(needs))
    return tuple(shift.new_empty(0) if each is None else each for each in gradients)  # pyright: ignore


def _backward_fake(
    grad: Tensor,
    value: Tensor | None,
    shift: Tensor,
    bias: Tensor,
    lengths: Tensor | None,
    sums: Tensor,
    norms: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    of_value = shift.new_empty(0) if value is None or not needs[0] else library.empty_rows(value)
    of_shift = shift.new_empty(shift.shape if needs[1] else (0,))
    return of_value, of_shift, bias.new_empty(bias.shape) if needs[2] else shift.new_empty(0)


FORWARD = library.register(
    "infusion_gate_forward(Tensor value, Tensor value_shift, Tensor head_bias, Tensor? lengths, bool save) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
BACKWARD = library.register(
    "infusion_gate_backward(Tensor grad, Tensor? value, Tensor value_shift, Tensor head_bias, Tensor? lengths, "
    "Tensor sums, Tensor norms, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _InfusionGate(torch.autograd.Function):
    """Entered only where some input needs a gradient."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, shift: Tensor, bias: Tensor, lengths: Tensor | None, keeps: bool, direct: bool
    ) -> Tensor:
        gate, sums, norms = (_forward if direct else FORWARD)(value, shift, bias, lengths, True)
        ctx.save_for_backward(value if keeps else None, shift, bias, lengths if keeps else None, sums, norms)
        return gate

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        # What once_differentiable does where nobody asks for a second derivative costs as much as a launch.
        if torch.is_grad_enabled():
            return _gradients_once(ctx, grad)
        return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    tensors = (grad, *ctx.saved_tensors)
    if library.direct(*tensors):
        kept = _launchers()[1](*tensors, needs=needs)
    else:
        gradients = BACKWARD(*tensors, list(needs))
        kept = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
    return (*kept, None, None, None)


_gradients_once = once_differentiable(_gradients)
_apply_directly = library.applied_directly(_InfusionGate)


def _triton(value: Tensor, value_shift: Tensor, head_bias: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    if lengths is not None:
        lengths = lengths.to(torch.int32) if lengths.dtype not in LENGTH_TYPES else lengths
        lengths = lengths.contiguous()
    tensors = (value, value_shift, head_bias, lengths)
    direct = library.direct(*tensors)
    if torch.is_grad_enabled() and (value.requires_grad or value_shift.requires_grad or head_bias.requires_grad):
        apply = _apply_directly if direct else _InfusionGate.apply
        return apply(*tensors, value.requires_grad, direct)  # pyright: ignore[reportReturnType]
    return _launchers()[0](*tensors, save=False)[0] if direct else FORWARD(*tensors, False)[0]


def _limits(value: Tensor, value_shift: Tensor, head_bias: Tensor) -> Sequence[str]:
    old = library.too_old(value.get_device()) if value.is_cuda else ""
    reasons = [old] if old else []
    for name, each in (("value", value), ("value_shift", value_shift), ("head_bias", head_bias)):
        if each.dtype not in KERNEL_TYPES:
            reasons.append(f"{name} is {each.dtype}; the kernel takes float32, bfloat16 and float16")
    if not 0 < value.shape[3] <= LARGEST_HEAD:
        reasons.append(f"head_dim is {value.shape[3]}; the kernel takes 1 to {LARGEST_HEAD}")
    return reasons


infusion_gate = Operation("infusion_gate", reference=reference.infusion_gate, triton=_triton, limits=_limits)
