"""Attention in windows that share their sample's prompts, as PyTorch sees it: two operators, their autograd, dispatch.

``epic_fast::window_prompt_attention_forward`` and ``..._backward`` return a fixed number of tensors, empty ones where
there is nothing to return.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from epic_fast.kernels.window_prompt_attention import reference, tiles  # pyright: ignore[reportMissingImports]
from epic_fast.ops import library
from epic_fast.ops.dispatch import Operation

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 128
# Query, key and value of tokens and of prompts, and the bias: what may need a gradient.
INPUTS = 7

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor prompt_query, Tensor prompt_key, Tensor prompt_value, "
    "Tensor? relative_position_bias, Tensor? window_mask"
)


@functools.cache
def _launchers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from epic_fast.kernels.window_prompt_attention import (  # pyright: ignore[reportMissingImports]
        triton_backward,
        triton_forward,
    )

    return triton_forward.window_prompt_attention_forward, triton_backward.window_prompt_attention_backward


def _no_tensor(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, scale, save_lse = arguments
    output, prompt_output, lse = _launchers()[0](*inputs, scale=scale, save_lse=save_lse)
    return output, prompt_output, _no_tensor(output) if lse is None else lse


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, _, _, prompt_query, *_, save_lse = arguments
    rows, heads, tokens, _ = query.shape
    count = prompt_query.shape[2] + tokens
    lse = query.new_empty(rows, heads, count, dtype=torch.float32) if save_lse else _no_tensor(query)
    return library.empty_rows(query), library.empty_rows(prompt_query), lse


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, scale, needs = arguments
    gradients = _launchers()[1](*tensors, scale=scale, needs=tuple(needs))
    return tuple(_no_tensor(tensors[2]) if each is None else each for each in gradients)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    _, _, *inputs, _, _, _, needs = arguments
    query, bias = inputs[0], inputs[6]
    found = [
        library.empty_rows(each) if needed else _no_tensor(query)
        for each, needed in zip(inputs[:6], needs[:6], strict=True)
    ]
    return (*found, _no_tensor(query) if bias is None or not needs[6] else bias.new_empty(bias.shape))


FORWARD = library.register(
    f"window_prompt_attention_forward({_INPUTS}, float scale, bool save_lse) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
BACKWARD = library.register(
    f"window_prompt_attention_backward(Tensor? grad_output, Tensor? grad_prompt_output, {_INPUTS}, Tensor lse, "
    f"float scale, bool[] needs) -> ({', '.join(['Tensor'] * INPUTS)})",
    _backward,
    _backward_fake,
)


class _WindowPromptAttention(torch.autograd.Function):
    """Entered only where some input needs a gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *inputs, scale, direct = arguments
        ctx.set_materialize_grads(False)
        if direct:
            output, prompt_output, lse = _launchers()[0](*inputs, scale=scale, save_lse=True)
        else:
            output, prompt_output, lse = FORWARD(*inputs, scale, True)
        ctx.save_for_backward(*inputs, lse)
        ctx.scale = scale
        return output, prompt_output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_prompt_output: Tensor | None) -> tuple[Tensor | None, ...]:
        # What once_differentiable does where nobody asks for a second derivative costs as much as a launch.
        if torch.is_grad_enabled():
            return _gradients_once(ctx, grad_output, grad_prompt_output)
        return _gradients(ctx, grad_output, grad_prompt_output)


def _gradients(ctx: Any, grad_output: Tensor | None, grad_prompt_output: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None and grad_prompt_output is None:
        return (None,) * (INPUTS + 3)
    needs = ctx.needs_input_grad[:INPUTS]
    tensors = (grad_output, grad_prompt_output, *ctx.saved_tensors)
    if library.direct(*tensors):
        kept = _launchers()[1](*tensors, scale=ctx.scale, needs=needs)
    else:
        gradients = BACKWARD(*tensors, ctx.scale, list(needs))
        kept = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
    return (*kept, None, None, None)


_gradients_once = once_differentiable(_gradients)
_apply_directly = library.applied_directly(_WindowPromptAttention)


def _triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    relative_position_bias: Tensor | None = None,
    window_mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    inputs = (
        query,
        key,
        value,
        prompt_query,
        prompt_key,
        prompt_value,
        relative_position_bias,
        window_mask,
    )
    scale = query.shape[3] ** -0.5 if scale is None else scale
    direct = library.direct(*inputs)
    if torch.is_grad_enabled():
        for each in inputs:
            if each is not None and each.requires_grad:
                apply = _apply_directly if direct else _WindowPromptAttention.apply
                return apply(*inputs, scale, direct)  # pyright: ignore[reportReturnType]
    forward = _forward if direct else FORWARD
    output, prompt_output, _ = forward(*inputs, scale, False)
    return output, prompt_output


def _reference(*args: Tensor | None, scale: float | None = None) -> tuple[Tensor, Tensor]:
    *tensors, bias, mask = args
    return reference.window_prompt_attention(*tensors, relative_position_bias=bias, window_mask=mask, scale=scale)


def _limits(query: Tensor, *others: Tensor | None) -> Sequence[str]:
    head_dim, tokens = query.shape[3], query.shape[2]
    *_, prompt_value, bias, _ = others
    assert prompt_value is not None
    old = library.too_old(query.get_device()) if query.is_cuda else ""
    reasons = [old] if old else []
    if query.dtype not in KERNEL_TYPES:
        reasons.append(f"the tensors are {query.dtype}; the kernel takes float32, bfloat16 and float16")
    if not 0 < head_dim <= LARGEST_HEAD:
        reasons.append(f"head_dim is {head_dim}; the kernel takes 1 to {LARGEST_HEAD}")
    if bias is not None:
        if bias.dtype not in KERNEL_TYPES:
            reasons.append(f"relative_position_bias is {bias.dtype}; the kernel takes float32, bfloat16 and float16")
        if bias.requires_grad and torch.is_grad_enabled():
            rows = tokens + prompt_value.shape[2]
            if rows > tiles.WHOLE_ROWS or head_dim > tiles.WHOLE_WIDTH:
                reasons.append(
                    f"relative_position_bias needs a gradient in windows of {rows} rows, prompts included, of head_dim "
                    f"{head_dim}; the kernel has it for up to {tiles.WHOLE_ROWS} rows of {tiles.WHOLE_WIDTH}"
                )
    return reasons


def _autocast(*args: Tensor | None) -> list[Tensor | None]:
    """As PyTorch's own attention under autocast: everything in its type, except float64, which is left alone; the bias
    joins the scores in its own, and the mask is none."""
    *tensors, bias, mask = args
    assert tensors[0] is not None
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    cast = [each if each is None or each.dtype == torch.float64 else each.to(dtype) for each in tensors]
    return [*cast, bias, mask]


# -- raw, for whoever owns the graph -----------------------------------------------------------------------------


def window_attention_forward(
    qkv: Tensor,
    prompt_qkv: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    *,
    save_lse: bool,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`epic_fast.functional.window_prompt_attention` of packed projections, without a graph.

    Args:
        qkv: of the windows, ``(B * nW, M, 3, H, head_dim)``.
        prompt_qkv: of the prompts, ``(B, P, 3, H, head_dim)``.
        bias, mask: ``(H, M, M)`` and ``(nW, M, M)``, or None.
        save_lse: whether a backward pass follows.
        out: contiguous memory for the two results.

    Returns:
        ``(B * nW, M, H * head_dim)``, ``(B, P, H * head_dim)``, and what backward wants beside the projections (None
        where no kernel ran).
    """
    inputs = (*_apart(qkv), *_apart(prompt_qkv), bias, mask)
    lse = None
    if _takes_kernel(inputs):
        if library.direct(*inputs):
            memory = (None, None)
            if out is not None:
                heads = qkv.shape[3]
                memory = tuple([each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in out])
            *outputs, lse = _launchers()[0](
                *inputs, scale=scale, save_lse=save_lse, output=memory[0], prompt_output=memory[1]
            )
            if out is not None:
                return *out, lse
        else:
            *outputs, lse = FORWARD(*inputs, scale, save_lse)
    else:
        outputs = _reference(*inputs, scale=scale)
    found = [each.transpose(1, 2).flatten(2) for each in outputs]
    if out is not None:
        for target, each in zip(out, found, strict=True):
            target.copy_(each)
        found = out
    return *found, lse if save_lse else None  # pyright: ignore[reportReturnType]


def window_attention_backward(
    grad_output: Tensor,
    grad_prompt_output: Tensor,
    qkv: Tensor,
    prompt_qkv: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    lse: Tensor | None,
    *,
    tokens: bool = True,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """The gradients ``(B * nW, M, 3 * H * head_dim)`` and ``(B, P, 3 * H * head_dim)`` of both packed projections.

    Args:
        grad_output, grad_prompt_output: in the shapes of the outputs of :func:`window_attention_forward`.
        lse: what that gave.
        tokens: whether the windows' own gradient is wanted.
        out: contiguous memory for both gradients.
    """
    heads = qkv.shape[3]
    grads = [each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (grad_output, grad_prompt_output)]
    inputs = (*_apart(qkv), *_apart(prompt_qkv), bias, mask)
    needs = (tokens,) * 3 + (True,) * 3 + (False,)
    found: Sequence[Tensor]
    tensors = (*grads, *inputs)
    if lse is not None and library.direct(*tensors):
        if out is not None:
            packed = tuple([each.unflatten(-1, qkv.shape[2:]) for each in out])
        else:
            packed = torch.empty_like(qkv) if tokens else None, torch.empty_like(prompt_qkv)
        slots = (*((None,) * 3 if packed[0] is None else _apart(packed[0])), *_apart(packed[1]))
        _launchers()[1](*tensors, lse, scale=scale, needs=needs, grads=slots)
        return None if packed[0] is None else packed[0].flatten(2), packed[1].flatten(2)
    if lse is not None:
        found = BACKWARD(*tensors, lse, scale, list(needs))[:6]
    else:
        with torch.enable_grad():
            leaves = [
                each.detach().requires_grad_(needed)
                for each, needed in zip((*_apart(qkv), *_apart(prompt_qkv)), needs[:6], strict=True)
            ]
            outputs = _reference(*leaves, bias, mask, scale=scale)
        wanted = [each for each in leaves if each.requires_grad]
        kept = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True, materialize_grads=True))
        found = [next(kept) if each.requires_grad else each for each in leaves]
    if out is not None:
        for target, each in zip(out, (found[:3], found[3:]), strict=True):
            target.copy_(_packed(each))
        return out
    return _packed(found[:3]) if tokens else None, _packed(found[3:])


def _packed(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([each.transpose(1, 2) for each in parts], dim=2).flatten(2)


def _apart(packed: Tensor) -> tuple[Tensor, ...]:
    return packed.permute(2, 0, 3, 1, 4).unbind()


def _takes_kernel(inputs: Sequence[Tensor | None]) -> bool:
    return window_prompt_attention.choose("auto", *inputs) is not window_prompt_attention.reference


window_prompt_attention = Operation(
    "window_prompt_attention", reference=_reference, triton=_triton, limits=_limits, autocast=_autocast
)
