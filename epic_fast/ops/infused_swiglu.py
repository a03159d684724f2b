"""SwiGLU times an infused vector as PyTorch sees it: two operators, their autograd, and the dispatch above them.

Backward saves those of the inputs that the wanted gradients need, and computes the activation again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from epic_fast.kernels.infused_swiglu import reference  # pyright: ignore[reportMissingImports]
from epic_fast.ops import library
from epic_fast.ops.dispatch import Operation

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _launchers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from epic_fast.kernels.infused_swiglu import triton_kernels  # pyright: ignore[reportMissingImports]

    return triton_kernels.infused_swiglu_forward, triton_kernels.infused_swiglu_backward


def _forward(gate: Tensor, up: Tensor, multiplier: Tensor) -> Tensor:
    return _launchers()[0](gate, up, multiplier)


def _forward_fake(gate: Tensor, up: Tensor, multiplier: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    multiplier: Tensor | None,
    multiplier_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _launchers()[1](grad, gate, up, multiplier, multiplier_dtype=multiplier_dtype, needs=tuple(needs))
    return tuple(gate.new_empty(0) if each is None else each for each in gradients)  # pyright: ignore


def _backward_fake(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    multiplier: Tensor | None,
    multiplier_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, width = gate.shape
    of_gate, of_up = (gate.new_empty(gate.shape) if needed else gate.new_empty(0) for needed in needs[:2])
    return of_gate, of_up, gate.new_empty(batch, width, dtype=multiplier_dtype) if needs[2] else gate.new_empty(0)


FORWARD = library.register(
    "infused_swiglu_forward(Tensor gate_projection, Tensor up_projection, Tensor multiplier) -> Tensor",
    _forward,
    _forward_fake,
)
BACKWARD = library.register(
    "infused_swiglu_backward(Tensor grad, Tensor gate_projection, Tensor? up_projection, Tensor? multiplier, "
    "ScalarType multiplier_dtype, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _InfusedSwiglu(torch.autograd.Function):
    """Entered only where some input needs a gradient."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, multiplier: Tensor, keeps_up: bool, keeps_multiplier: bool, direct: bool
    ) -> Tensor:
        ctx.save_for_backward(gate, up if keeps_up else None, multiplier if keeps_multiplier else None)
        ctx.multiplier_dtype = multiplier.dtype
        return (_forward if direct else FORWARD)(gate, up, multiplier)

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
        kept = _launchers()[1](*tensors, multiplier_dtype=ctx.multiplier_dtype, needs=needs)
    else:
        gradients = BACKWARD(*tensors, ctx.multiplier_dtype, list(needs))
        kept = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
    return (*kept, None, None, None)


_gradients_once = once_differentiable(_gradients)
_apply_directly = library.applied_directly(_InfusedSwiglu)


def _triton(gate_projection: Tensor, up_projection: Tensor, multiplier: Tensor) -> Tensor:
    tensors = (gate_projection, up_projection, multiplier)
    direct = library.direct(*tensors)
    of_gate, of_up, of_multiplier = (each.requires_grad for each in tensors)
    if torch.is_grad_enabled() and (of_gate or of_up or of_multiplier):
        apply = _apply_directly if direct else _InfusedSwiglu.apply
        return apply(*tensors, of_gate or of_multiplier, of_gate or of_up, direct)  # pyright: ignore
    return (_forward if direct else FORWARD)(*tensors)


def _limits(gate_projection: Tensor, up_projection: Tensor, multiplier: Tensor) -> Sequence[str]:
    old = library.too_old(gate_projection.get_device()) if gate_projection.is_cuda else ""
    reasons = [old] if old else []
    named = (("gate_projection", gate_projection), ("up_projection", up_projection), ("multiplier", multiplier))
    for name, each in named:
        if each.dtype not in KERNEL_TYPES:
            reasons.append(f"{name} is {each.dtype}; the kernel takes float32, bfloat16 and float16")
    return reasons


infused_swiglu = Operation("infused_swiglu", reference=reference.infused_swiglu, triton=_triton, limits=_limits)
