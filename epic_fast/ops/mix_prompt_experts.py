"""The mixture of prompt experts as PyTorch sees it: three operators, their autograd, and the dispatch above them.

``epic_fast::mix_prompt_experts_forward_out`` writes the prompts into a tensor that the caller owns.  Backward saves
the inputs and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from epic_fast.kernels.mix_prompt_experts import reference  # pyright: ignore[reportMissingImports]
from epic_fast.ops import library
from epic_fast.ops.dispatch import Operation

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_EXPERTS = 64
# Offsets inside the experts are of 32 bits.
LARGEST_EXPERTS = 2**31

_INPUTS = "Tensor router_logits, Tensor experts"
_OPTIONS = "float temperature, int? top_k"


@functools.cache
def _launchers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from epic_fast.kernels.mix_prompt_experts import (  # pyright: ignore[reportMissingImports]
        triton_backward,
        triton_forward,
    )

    return triton_forward.mix_prompt_experts_forward, triton_backward.mix_prompt_experts_backward


def _forward(logits: Tensor, experts: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    return _launchers()[0](logits, experts, temperature=temperature, top_k=top_k)


def _forward_fake(logits: Tensor, experts: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    return experts.new_empty(logits.shape[0], *experts.shape[1:]), logits.new_empty(logits.shape)


def _forward_out(logits: Tensor, experts: Tensor, temperature: float, top_k: int | None, *, prompts: Tensor) -> Tensor:
    return _launchers()[0](logits, experts, temperature=temperature, top_k=top_k, prompts=prompts)[1]


def _forward_out_fake(logits: Tensor, *others: Any, prompts: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


def _backward(
    grad_prompts: Tensor | None,
    grad_scores: Tensor | None,
    logits: Tensor,
    experts: Tensor,
    temperature: float,
    top_k: int | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    gradients = _launchers()[1](
        grad_prompts, grad_scores, logits, experts, temperature=temperature, top_k=top_k, needs=tuple(needs)
    )
    return tuple(logits.new_empty(0) if each is None else each for each in gradients)  # pyright: ignore


def _backward_fake(
    grad_prompts: Tensor | None,
    grad_scores: Tensor | None,
    logits: Tensor,
    experts: Tensor,
    temperature: float,
    top_k: int | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    pairs = zip((logits, experts), needs, strict=True)
    return tuple(each.new_empty(each.shape) if needed else logits.new_empty(0) for each, needed in pairs)  # pyright: ignore


FORWARD = library.register(
    f"mix_prompt_experts_forward({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)", _forward, _forward_fake
)
FORWARD_OUT = library.register(
    f"mix_prompt_experts_forward_out({_INPUTS}, {_OPTIONS}, *, Tensor(a!) prompts) -> Tensor",
    _forward_out,
    _forward_out_fake,
)
BACKWARD = library.register(
    f"mix_prompt_experts_backward(Tensor? grad_prompts, Tensor? grad_scores, {_INPUTS}, {_OPTIONS}, bool[] needs) "
    "-> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _MixPromptExperts(torch.autograd.Function):
    """Entered only where some input needs a gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, experts: Tensor, temperature: float, top_k: int | None, direct: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, experts)
        ctx.options = temperature, top_k
        return (_forward if direct else FORWARD)(logits, experts, temperature, top_k)

    @staticmethod
    def backward(ctx: Any, grad_prompts: Tensor | None, grad_scores: Tensor | None) -> tuple[Tensor | None, ...]:
        # What once_differentiable does where nobody asks for a second derivative costs as much as a launch.
        if torch.is_grad_enabled():
            return _gradients_once(ctx, grad_prompts, grad_scores)
        return _gradients(ctx, grad_prompts, grad_scores)


def _gradients(ctx: Any, grad_prompts: Tensor | None, grad_scores: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_prompts is None and grad_scores is None:
        return (None,) * 5
    needs = ctx.needs_input_grad[:2]
    tensors = (grad_prompts, grad_scores, *ctx.saved_tensors)
    temperature, top_k = ctx.options
    if library.direct(*tensors):
        kept = _launchers()[1](*tensors, temperature=temperature, top_k=top_k, needs=needs)
    else:
        gradients = BACKWARD(*tensors, temperature, top_k, list(needs))
        kept = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
    return (*kept, None, None, None)


_gradients_once = once_differentiable(_gradients)
_apply_directly = library.applied_directly(_MixPromptExperts)


def _triton(
    router_logits: Tensor,
    experts: Tensor,
    *,
    temperature: float = 0.1,
    top_k: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if out is not None:
        return out, FORWARD_OUT(router_logits, experts, temperature, top_k, prompts=out)
    direct = library.direct(router_logits, experts)
    if torch.is_grad_enabled() and (router_logits.requires_grad or experts.requires_grad):
        apply = _apply_directly if direct else _MixPromptExperts.apply
        return apply(router_logits, experts, temperature, top_k, direct)  # pyright: ignore[reportReturnType]
    return (_forward if direct else FORWARD)(router_logits, experts, temperature, top_k)


def _reference(
    router_logits: Tensor, experts: Tensor, *, out: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    prompts, scores = reference.mix_prompt_experts(router_logits, experts, **options)
    return (prompts if out is None else out.copy_(prompts)), scores


def _limits(router_logits: Tensor, experts: Tensor) -> Sequence[str]:
    old = library.too_old(experts.get_device()) if experts.is_cuda else ""
    reasons = [old] if old else []
    for name, each in (("router_logits", router_logits), ("experts", experts)):
        if each.dtype not in KERNEL_TYPES:
            reasons.append(f"{name} is {each.dtype}; the kernel takes float32, bfloat16 and float16")
    if experts.shape[0] > MOST_EXPERTS:
        reasons.append(f"there are {experts.shape[0]} experts; the kernel takes up to {MOST_EXPERTS}")
    if experts.numel() >= LARGEST_EXPERTS:
        reasons.append(f"experts has {experts.numel()} elements; the kernel takes fewer than 2**31")
    return reasons


mix_prompt_experts = Operation("mix_prompt_experts", reference=_reference, triton=_triton, limits=_limits)
