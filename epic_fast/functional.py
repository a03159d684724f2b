"""The public operations: what they compute, which shapes they take, which errors they raise.

Tensors are laid out as in :func:`torch.nn.functional.scaled_dot_product_attention`:
``(batch, heads, tokens, head_dim)``, any strides with a unit last stride.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from epic_fast import ops
from epic_fast.errors import ConfigError

Implementation = Literal["auto", "triton", "reference"]

__all__ = ["prompt_attention", "prompt_interaction"]


def prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor | None,
    prompt_key: Tensor,
    prompt_value: Tensor,
    *,
    prompt_mask: Literal["full", "prefix"] = "full",
    causal: bool = False,
    lengths: Tensor | None = None,
    scale: float | None = None,
    impl: Implementation = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention over ``[prompts ; tokens]`` without building that concatenation.

    A token row sees every prompt and the valid tokens (those up to itself if ``causal``).  A prompt row sees
    every prompt and, with ``prompt_mask="full"``, every valid token; with ``"prefix"``, no token.

    Args:
        query, key, value: tokens, ``(B, H, N, D)``.
        prompt_query: ``(B or 1, H, P, D)``, or None for prefix tuning (prompts are keys and values only).
        prompt_key, prompt_value: ``(B or 1, H, P, D)``.  Batch 1 is shared by the batch and its gradient is the
            sum over it.  ``P = 0`` is plain attention.
        prompt_mask: what prompt rows see of the tokens, ``"full"`` or ``"prefix"``.
        causal: token rows see only tokens up to themselves.
        lengths: ``(B,)`` integers, the valid tokens of each sample, 0 to N.  Rows at or past a length give
            output 0 and gradient 0, never NaN.
        scale: factor on the scores, default ``D ** -0.5``.
        impl: ``"auto"``, ``"triton"`` (raises if it cannot run) or ``"reference"``.

    Returns:
        ``output`` ``(B, H, N, D)`` and ``prompt_output`` ``(B, H, P, D)``; the latter is None in prefix tuning.

    Raises:
        ConfigError: shapes, types or devices that do not fit together, naming what was wanted and found.
    """
    _check_prompt_attention(query, key, value, prompt_query, prompt_key, prompt_value, prompt_mask, lengths)
    return ops.prompt_attention(
        query,
        key,
        value,
        prompt_query,
        prompt_key,
        prompt_value,
        prompt_mask=prompt_mask,
        causal=causal,
        lengths=lengths,
        scale=scale,
        impl=impl,
    )


def prompt_interaction(
    text_prompt: Tensor,
    vision_prompt: Tensor,
    text_to_vision_weight: Tensor,
    text_to_vision_bias: Tensor,
    vision_to_text_weight: Tensor,
    vision_to_text_bias: Tensor,
    text_gate: Tensor,
    vision_gate: Tensor,
    temperature: Tensor,
    *,
    eps: float = 1e-8,
    impl: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Exchange between two prompt sets by similarity; each keeps its own context (a gated residual).

    ``S = cos(p_t, W_vt p_v) / τ``; text prompts take ``softmax_j(S) W_vt p_v``, vision prompts
    ``softmax_i(S)ᵀ W_tv p_t``, each times its gate.  A reconstruction of EPIC's interaction (arXiv 2507.07415)
    from its abstract and summaries; the derivation stands in ``kernels/prompt_interaction/README.md``.

    Args:
        text_prompt: ``(B, P_t, D_t)``.
        vision_prompt: ``(B, P_v, D_v)``.
        text_to_vision_weight, text_to_vision_bias: ``(D_v, D_t)``, ``(D_v,)``, laid out as in ``nn.Linear``.
        vision_to_text_weight, vision_to_text_bias: ``(D_t, D_v)``, ``(D_t,)``.
        text_gate, vision_gate: a scalar ``()`` or one value a channel, ``(D_t,)`` and ``(D_v,)``.
        temperature: ``()``, greater than zero.
        eps: norms below it count as it.
        impl: ``"auto"``, ``"triton"`` (raises if it cannot run) or ``"reference"``.

    Returns:
        The next text and vision prompts, in the shapes and types of the given ones.

    Raises:
        ConfigError: shapes or devices that do not fit together, naming what was wanted and found.
    """
    _check_prompt_interaction(
        text_prompt,
        vision_prompt,
        text_to_vision_weight,
        text_to_vision_bias,
        vision_to_text_weight,
        vision_to_text_bias,
        text_gate,
        vision_gate,
        temperature,
    )
    return ops.prompt_interaction(
        text_prompt,
        vision_prompt,
        text_to_vision_weight,
        text_to_vision_bias,
        vision_to_text_weight,
        vision_to_text_bias,
        text_gate,
        vision_gate,
        temperature,
        eps=eps,
        impl=impl,
    )


def _require(condition: bool, operation: str, message: str) -> None:
    if not condition:
        raise ConfigError(f"{operation}: {message}")


def _shape(tensor: Tensor) -> str:
    return "(" + ", ".join(map(str, tensor.shape)) + ")"


def _check_prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor | None,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_mask: str,
    lengths: Tensor | None,
) -> None:
    name = "prompt_attention"
    _require(query.dim() == 4, name, f"query has shape {_shape(query)}; wanted (batch, heads, tokens, head_dim)")
    batch, heads, _, head_dim = query.shape
    for label, tensor in (("key", key), ("value", value)):
        _require(
            tensor.shape == query.shape,
            name,
            f"{label} has shape {_shape(tensor)}; wanted query's {_shape(query)}",
        )
    _require(
        prompt_key.dim() == 4
        and prompt_key.shape[0] in (1, batch)
        and prompt_key.shape[1] == heads
        and prompt_key.shape[3] == head_dim,
        name,
        f"prompt_key has shape {_shape(prompt_key)}; wanted ({batch} or 1, {heads}, prompts, {head_dim})",
    )
    prompts = [("prompt_value", prompt_value)] + ([] if prompt_query is None else [("prompt_query", prompt_query)])
    for label, tensor in prompts:
        _require(
            tensor.dim() == 4 and tensor.shape[0] in (1, batch) and tensor.shape[1:] == prompt_key.shape[1:],
            name,
            f"{label} has shape {_shape(tensor)}; wanted ({batch} or 1, {heads}, {prompt_key.shape[2]}, {head_dim}), "
            "as prompt_key",
        )
    for label, tensor in [
        ("query", query),
        ("key", key),
        ("value", value),
        ("prompt_key", prompt_key),
        *prompts,
    ]:
        _require(tensor.is_floating_point(), name, f"{label} has type {tensor.dtype}; wanted a floating-point type")
        _require(
            tensor.dtype == query.dtype,
            name,
            f"{label} has type {tensor.dtype}; wanted query's {query.dtype}",
        )
        _require(
            tensor.device == query.device,
            name,
            f"{label} is on {tensor.device}; wanted {query.device}, as query",
        )
        _require(
            tensor.numel() == 0 or tensor.shape[-1] == 1 or tensor.stride(-1) == 1,
            name,
            f"{label} has last stride {tensor.stride(-1)}; wanted 1 (call .contiguous())",
        )
    _require(prompt_mask in ("full", "prefix"), name, f"prompt_mask={prompt_mask!r}; wanted 'full' or 'prefix'")
    if lengths is None:
        return
    _require(lengths.shape == (batch,), name, f"lengths has shape {_shape(lengths)}; wanted ({batch},)")
    _require(
        not lengths.is_floating_point() and lengths.dtype != torch.bool,
        name,
        f"lengths has type {lengths.dtype}; wanted an integer type",
    )
    if lengths.device.type == "cpu" and lengths.numel() and not torch.compiler.is_compiling():
        low, high = int(lengths.min()), int(lengths.max())
        _require(
            low >= 0 and high <= query.shape[2],
            name,
            f"lengths run from {low} to {high}; wanted 0 to the {query.shape[2]} tokens of query",
        )


def _check_prompt_interaction(
    text_prompt: Tensor,
    vision_prompt: Tensor,
    text_to_vision_weight: Tensor,
    text_to_vision_bias: Tensor,
    vision_to_text_weight: Tensor,
    vision_to_text_bias: Tensor,
    text_gate: Tensor,
    vision_gate: Tensor,
    temperature: Tensor,
) -> None:
    name = "prompt_interaction"
    for label, tensor in (("text_prompt", text_prompt), ("vision_prompt", vision_prompt)):
        _require(tensor.dim() == 3, name, f"{label} has shape {_shape(tensor)}; wanted (batch, prompts, width)")
    _require(
        text_prompt.shape[0] == vision_prompt.shape[0],
        name,
        f"text_prompt has batch {text_prompt.shape[0]}, vision_prompt {vision_prompt.shape[0]}; wanted the same",
    )
    text_width, vision_width = text_prompt.shape[2], vision_prompt.shape[2]
    wanted = (
        ("text_to_vision_weight", text_to_vision_weight, [(vision_width, text_width)]),
        ("text_to_vision_bias", text_to_vision_bias, [(vision_width,)]),
        ("vision_to_text_weight", vision_to_text_weight, [(text_width, vision_width)]),
        ("vision_to_text_bias", vision_to_text_bias, [(text_width,)]),
        ("text_gate", text_gate, [(), (text_width,)]),
        ("vision_gate", vision_gate, [(), (vision_width,)]),
        ("temperature", temperature, [()]),
    )
    for label, tensor, shapes in wanted:
        _require(
            tuple(tensor.shape) in shapes,
            name,
            f"{label} has shape {_shape(tensor)}; wanted {' or '.join(map(str, shapes))} for prompts of width "
            f"{text_width} (text) and {vision_width} (vision)",
        )
        _require(
            tensor.device == text_prompt.device,
            name,
            f"{label} is on {tensor.device}; wanted {text_prompt.device}, as text_prompt",
        )
    _require(
        vision_prompt.device == text_prompt.device,
        name,
        f"vision_prompt is on {vision_prompt.device}; wanted {text_prompt.device}, as text_prompt",
    )
