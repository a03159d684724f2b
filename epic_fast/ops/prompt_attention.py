"""Prompt-concatenated attention as PyTorch sees it: three operators, their autograd, and the dispatch above them.

``epic_fast::prompt_attention_forward`` and ``..._backward`` return a fixed number of tensors, empty ones where there
is nothing to return.  ``epic_fast::prompt_attention_forward_out`` writes into tensors that the caller owns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from epic_fast.kernels.prompt_attention import reference  # pyright: ignore[reportMissingImports]
from epic_fast.ops import library, native
from epic_fast.ops.dispatch import Operation
from epic_fast.ops.repeats import Known, Repeats, with_gradients

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTH_TYPES = (torch.int64, torch.int32)
LARGEST_HEAD = 256

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? prompt_query, Tensor prompt_key, Tensor prompt_value, "
    "Tensor? lengths"
)
_FLAGS = "bool prefix, bool causal, float scale"


@functools.cache
def _launchers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from epic_fast.kernels.prompt_attention import launchers  # pyright: ignore[reportMissingImports]

    return launchers.prompt_attention_forward, launchers.prompt_attention_backward


def _no_tensor(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor | None,
    prompt_key: Tensor,
    prompt_value: Tensor,
    lengths: Tensor | None,
    prefix: bool,
    causal: bool,
    scale: float,
    save_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    output, prompt_output, lse = _launchers()[0](
        query,
        key,
        value,
        prompt_query,
        prompt_key,
        prompt_value,
        lengths,
        prefix=prefix,
        causal=causal,
        scale=scale,
        save_lse=save_lse,
    )
    return (
        output,
        _no_tensor(query) if prompt_output is None else prompt_output,
        _no_tensor(query) if lse is None else lse,
    )


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor | None,
    prompt_key: Tensor,
    prompt_value: Tensor,
    lengths: Tensor | None,
    prefix: bool,
    causal: bool,
    scale: float,
    save_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, _ = query.shape
    prompts = 0 if prompt_query is None else prompt_query.shape[2]
    lse = query.new_empty(batch, heads, prompts + tokens, dtype=torch.float32) if save_lse else _no_tensor(query)
    return (
        library.empty_rows(query),
        _no_tensor(query) if prompt_query is None else library.empty_rows(prompt_query, batch=batch),
        lse,
    )


def _forward_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor | None,
    prompt_key: Tensor,
    prompt_value: Tensor,
    lengths: Tensor | None,
    prefix: bool,
    causal: bool,
    scale: float,
    *,
    output: Tensor,
    prompt_output: Tensor | None,
) -> None:
    _launchers()[0](
        query,
        key,
        value,
        prompt_query,
        prompt_key,
        prompt_value,
        lengths,
        prefix=prefix,
        causal=causal,
        scale=scale,
        output=output,
        prompt_output=prompt_output,
        save_lse=False,
    )


def _backward(
    grad_output: Tensor | None,
    grad_prompt_output: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor | None,
    prompt_key: Tensor,
    prompt_value: Tensor,
    lengths: Tensor | None,
    output: Tensor,
    prompt_output: Tensor | None,
    lse: Tensor,
    prefix: bool,
    causal: bool,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    gradients = _launchers()[1](
        grad_output,
        grad_prompt_output,
        query,
        key,
        value,
        prompt_query,
        prompt_key,
        prompt_value,
        lengths,
        output,
        prompt_output,
        lse,
        prefix=prefix,
        causal=causal,
        scale=scale,
        needs=tuple(needs),
    )
    return tuple(_no_tensor(query) if each is None else each for each in gradients)


def _backward_fake(
    grad_output: Tensor | None,
    grad_prompt_output: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor | None,
    prompt_key: Tensor,
    prompt_value: Tensor,
    lengths: Tensor | None,
    output: Tensor,
    prompt_output: Tensor | None,
    lse: Tensor,
    prefix: bool,
    causal: bool,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    inputs = (query, key, value, prompt_query, prompt_key, prompt_value)
    return tuple(
        library.empty_rows(each) if needed and each is not None else _no_tensor(query)
        for each, needed in zip(inputs, needs, strict=True)
    )


FORWARD = library.register(
    f"prompt_attention_forward({_INPUTS}, {_FLAGS}, bool save_lse) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
FORWARD_OUT = library.register(
    f"prompt_attention_forward_out({_INPUTS}, {_FLAGS}, *, Tensor(a!) output, Tensor(b!)? prompt_output) -> ()",
    _forward_out,
    lambda *args, **kwargs: None,
)
BACKWARD = library.register(
    f"prompt_attention_backward(Tensor? grad_output, Tensor? grad_prompt_output, {_INPUTS}, Tensor output, "
    f"Tensor? prompt_output, Tensor lse, {_FLAGS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _PromptAttention(torch.autograd.Function):
    """Entered only where some input needs a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt_query: Tensor | None,
        prompt_key: Tensor,
        prompt_value: Tensor,
        lengths: Tensor | None,
        prefix: bool,
        causal: bool,
        scale: float,
        known: Known | None,
        direct: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        inputs = query, key, value, prompt_query, prompt_key, prompt_value, lengths
        if direct:
            output, found, lse = _launchers()[0](
                *inputs, prefix=prefix, causal=causal, scale=scale, save_lse=True, alike=known
            )
        else:
            output, found, lse = FORWARD(*inputs, prefix, causal, scale, True)
        prompt_output = None if prompt_query is None else found
        ctx.save_for_backward(*inputs, output, prompt_output, lse)
        ctx.flags = prefix, causal, scale
        ctx.known = known
        return output, prompt_output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_prompt_output: Tensor | None) -> tuple[Tensor | None, ...]:
        # What once_differentiable does where nobody asks for a second derivative costs as much as a launch.
        if torch.is_grad_enabled():
            return _gradients_once(ctx, grad_output, grad_prompt_output)
        return _gradients(ctx, grad_output, grad_prompt_output)


def _gradients(ctx: Any, grad_output: Tensor | None, grad_prompt_output: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None and grad_prompt_output is None:
        return (None,) * 12
    needs = ctx.needs_input_grad[:6]
    saved = ctx.saved_tensors
    tensors = (grad_output, grad_prompt_output, *saved)
    prefix, causal, scale = ctx.flags
    alike = with_gradients(ctx.known, saved[:7], grad_output, grad_prompt_output, *saved[7:])
    if alike is not None or library.direct(*tensors):
        kept = _launchers()[1](*tensors, prefix=prefix, causal=causal, scale=scale, needs=needs, alike=alike)
    else:
        gradients = BACKWARD(*tensors, prefix, causal, scale, list(needs))
        kept = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
    return (*kept, None, None, None, None, None, None)


_gradients_once = once_differentiable(_gradients)
_apply_directly = library.applied_directly(_PromptAttention)


def _triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor | None,
    prompt_key: Tensor,
    prompt_value: Tensor,
    *,
    prompt_mask: str = "full",
    causal: bool = False,
    lengths: Tensor | None = None,
    scale: float | None = None,
    out: tuple[Tensor, Tensor | None] | None = None,
    known: Known | None = None,
) -> tuple[Tensor, Tensor | None]:
    if lengths is not None:
        if lengths.dtype not in LENGTH_TYPES:
            lengths = lengths.to(torch.int32)
        lengths = lengths.contiguous()
    inputs = (query, key, value, prompt_query, prompt_key, prompt_value, lengths)
    flags = (prompt_mask == "prefix", causal, query.shape[3] ** -0.5 if scale is None else scale)
    if out is not None:
        FORWARD_OUT(*inputs, *flags, output=out[0], prompt_output=out[1])
        return out
    direct = known is not None or library.direct(*inputs)
    if torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or prompt_key.requires_grad
        or prompt_value.requires_grad
        or (prompt_query is not None and prompt_query.requires_grad)
    ):
        if known is not None:
            found = native.applied(_PromptAttention, known, inputs, flags, gradients=6)
            if found is not None:
                return found  # pyright: ignore[reportReturnType]
        apply = _apply_directly if direct else _PromptAttention.apply
        return apply(*inputs, *flags, known, direct)  # pyright: ignore[reportReturnType]
    if direct:
        prefix, causal, scale = flags
        output, prompt_output, _ = _launchers()[0](
            *inputs, prefix=prefix, causal=causal, scale=scale, save_lse=False, alike=known
        )
    else:
        output, prompt_output, _ = FORWARD(*inputs, *flags, False)
    return output, None if prompt_query is None else prompt_output


def _reference(
    *args: Tensor | None, out: tuple[Tensor, Tensor | None] | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    result = reference.prompt_attention(*args, **kwargs)
    if out is None:
        return result
    for target, each in zip(out, result, strict=True):
        if target is not None and each is not None:
            target.copy_(each)
    return out


def _limits(query: Tensor, *others: Tensor | None) -> Sequence[str]:
    head_dim = query.shape[3]
    old = library.too_old(query.get_device()) if query.is_cuda else ""
    if query.dtype in KERNEL_TYPES and 0 < head_dim <= LARGEST_HEAD and not old:
        return ()
    reasons = [old] if old else []
    if query.dtype not in KERNEL_TYPES:
        reasons.append(f"the tensors are {query.dtype}; the kernel takes float32, bfloat16 and float16")
    if not 0 < head_dim <= LARGEST_HEAD:
        reasons.append(f"head_dim is {head_dim}; the kernel takes 1 to {LARGEST_HEAD}")
    return reasons


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """As PyTorch's own attention under autocast: everything in its type, except float64, which is left alone."""
    some = tensors[0]
    assert some is not None
    dtype = torch.get_autocast_dtype(some.device.type)
    return [each if each is None or each.dtype == torch.float64 else each.to(dtype) for each in tensors]


prompt_attention = Operation(
    "prompt_attention",
    reference=_reference,
    triton=_triton,
    limits=_limits,
    autocast=_autocast,
    tensors=("lengths",),
    repeats=Repeats(),
)
