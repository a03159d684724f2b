"""The similarity-based prompt interaction as PyTorch sees it: three operators, their autograd, and the dispatch.

``epic_fast::prompt_interaction_forward_out`` writes into tensors that the caller owns (the slots of the towers'
buffers).  Backward saves the inputs and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from epic_fast.kernels.prompt_interaction import reference  # pyright: ignore[reportMissingImports]
from epic_fast.ops import library, native
from epic_fast.ops.dispatch import Operation
from epic_fast.ops.repeats import Known, Repeats, with_gradients

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = (
    "text_prompt",
    "vision_prompt",
    "text_to_vision_weight",
    "text_to_vision_bias",
    "vision_to_text_weight",
    "vision_to_text_bias",
    "text_gate",
    "vision_gate",
    "temperature",
)
INPUTS = len(NAMES)
MOST_PROMPTS = 64
# Offsets inside a weight are of 32 bits.
LARGEST_WEIGHT = 2**31

_INPUTS = ", ".join(f"Tensor {name}" for name in NAMES)


@functools.cache
def _launchers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from epic_fast.kernels.prompt_interaction import (  # pyright: ignore[reportMissingImports]
        triton_backward,
        triton_forward,
    )

    return triton_forward.prompt_interaction_forward, triton_backward.prompt_interaction_backward


def _forward(*arguments: Any, alike: Known | None = None) -> tuple[Tensor, Tensor]:
    *inputs, eps = arguments
    text, vision = inputs[:2]
    if _nothing_to_mix(text, vision):
        return text.clone(memory_format=torch.contiguous_format), vision.clone(memory_format=torch.contiguous_format)
    return _launchers()[0](*inputs, eps=eps, alike=alike)


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    text, vision = arguments[:2]
    return text.new_empty(text.shape), vision.new_empty(vision.shape)


def _forward_out(*arguments: Any, next_text: Tensor, next_vision: Tensor) -> None:
    *inputs, eps = arguments
    text, vision = inputs[:2]
    if _nothing_to_mix(text, vision):
        next_text.copy_(text)
        next_vision.copy_(vision)
        return
    _launchers()[0](*inputs, eps=eps, next_text=next_text, next_vision=next_vision)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    grad_text, grad_vision, *inputs, eps, needs = arguments
    text, vision = inputs[:2]
    if _nothing_to_mix(text, vision):
        found = [each.zero_() for each in _gradients_fake(inputs, needs)]
        for index, grad in enumerate((grad_text, grad_vision)):
            if needs[index] and grad is not None:
                found[index].copy_(grad)
        return tuple(found)
    gradients = _launchers()[1](grad_text, grad_vision, *inputs, eps=eps, needs=tuple(needs))
    return tuple(text.new_empty(0) if each is None else each for each in gradients)


def _gradients_fake(inputs: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(each.new_empty(each.shape if needed else 0) for each, needed in zip(inputs, needs, strict=True))


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    _, _, *inputs, _, needs = arguments
    return _gradients_fake(inputs, needs)


def _nothing_to_mix(text: Tensor, vision: Tensor) -> bool:
    """No sample, or one side without prompts: each side keeps what it has."""
    return 0 in (text.shape[0], text.shape[1], vision.shape[1])


FORWARD = library.register(
    f"prompt_interaction_forward({_INPUTS}, float eps) -> (Tensor, Tensor)", _forward, _forward_fake
)
FORWARD_OUT = library.register(
    f"prompt_interaction_forward_out({_INPUTS}, float eps, *, Tensor(a!) next_text, Tensor(b!) next_vision) -> ()",
    _forward_out,
    lambda *args, **kwargs: None,
)
BACKWARD = library.register(
    f"prompt_interaction_backward(Tensor? grad_next_text, Tensor? grad_next_vision, {_INPUTS}, float eps, "
    f"bool[] needs) -> ({', '.join(['Tensor'] * INPUTS)})",
    _backward,
    _backward_fake,
)


class _PromptInteraction(torch.autograd.Function):
    """Entered only where some input needs a gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *inputs, eps, known, direct = arguments
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.eps, ctx.known = eps, known
        return _forward(*inputs, eps, alike=known) if direct else FORWARD(*inputs, eps)

    @staticmethod
    def backward(ctx: Any, grad_next_text: Tensor | None, grad_next_vision: Tensor | None) -> tuple[Tensor | None, ...]:
        # What once_differentiable does where nobody asks for a second derivative costs as much as a launch.
        if torch.is_grad_enabled():
            return _gradients_once(ctx, grad_next_text, grad_next_vision)
        return _gradients(ctx, grad_next_text, grad_next_vision)


def _gradients(ctx: Any, grad_next_text: Tensor | None, grad_next_vision: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_next_text is None and grad_next_vision is None:
        return (None,) * (INPUTS + 3)
    needs = ctx.needs_input_grad[:INPUTS]
    inputs = ctx.saved_tensors
    tensors = (grad_next_text, grad_next_vision, *inputs)
    alike = with_gradients(ctx.known, inputs, grad_next_text, grad_next_vision)
    if (alike is not None or library.direct(*tensors)) and not _nothing_to_mix(inputs[0], inputs[1]):
        return (*_launchers()[1](*tensors, eps=ctx.eps, needs=needs, alike=alike), None, None, None)
    gradients = BACKWARD(*tensors, ctx.eps, list(needs))
    found = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
    return (*found, None, None, None)


_gradients_once = once_differentiable(_gradients)
_apply_directly = library.applied_directly(_PromptInteraction)


def _triton(
    text_prompt: Tensor,
    vision_prompt: Tensor,
    *parameters: Tensor,
    eps: float = 1e-8,
    out: tuple[Tensor, Tensor] | None = None,
    known: Known | None = None,
) -> tuple[Tensor, Tensor]:
    inputs = (text_prompt, vision_prompt, *parameters)
    if known is None and torch.is_autocast_enabled("cuda" if text_prompt.is_cuda else "cpu"):
        inputs = _autocast(*inputs)
    if out is not None:
        FORWARD_OUT(*inputs, eps, next_text=out[0], next_vision=out[1])
        return out
    direct = known is not None or library.direct(*inputs)
    if torch.is_grad_enabled():
        for each in inputs:
            if each.requires_grad:
                if known is not None:
                    found = native.applied(_PromptInteraction, known, inputs, (eps,), gradients=INPUTS)
                    if found is not None:
                        return found  # pyright: ignore[reportReturnType]
                apply = _apply_directly if direct else _PromptInteraction.apply
                return apply(*inputs, eps, known, direct)  # pyright: ignore[reportReturnType]
    return _forward(*inputs, eps, alike=known) if direct else FORWARD(*inputs, eps)


def _autocast(text_prompt: Tensor, vision_prompt: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """As ``nn.Linear`` under autocast: the projections in its type; the prompts keep theirs, and so do the results."""
    dtype = torch.get_autocast_dtype(text_prompt.device.type)
    return (
        text_prompt,
        vision_prompt,
        *(each if each.dtype == torch.float64 else each.to(dtype) for each in parameters[:4]),
        *parameters[4:],
    )


def _reference(*args: Tensor, out: tuple[Tensor, Tensor] | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
    result = reference.prompt_interaction(*args, **kwargs)
    if out is None:
        return result
    out[0].copy_(result[0])
    out[1].copy_(result[1])
    return out


def _limits(text_prompt: Tensor, vision_prompt: Tensor, *parameters: Tensor) -> Sequence[str]:
    tensors = (text_prompt, vision_prompt, *parameters)
    old = library.too_old(text_prompt.get_device()) if text_prompt.is_cuda else ""
    reasons = [old] if old else []
    for index, each in enumerate(tensors):
        if each.dtype not in KERNEL_TYPES:
            reasons.append(f"{NAMES[index]} is {each.dtype}; the kernel takes float32, bfloat16 and float16")
    for index in range(2):
        _, prompts, width = tensors[index].shape
        if prompts > MOST_PROMPTS:
            reasons.append(f"{NAMES[index]} has {prompts} prompts; the kernel takes up to {MOST_PROMPTS}")
        if width == 0:
            reasons.append(f"{NAMES[index]} has width 0")
    elements = text_prompt.shape[2] * vision_prompt.shape[2]
    if elements >= LARGEST_WEIGHT:
        reasons.append(f"a projection's weight has {elements} elements; the kernel takes fewer than 2**31")
    return reasons


prompt_interaction = Operation(
    "prompt_interaction", reference=_reference, triton=_triton, limits=_limits, repeats=Repeats()
)
