"""The public operations: what they compute, which shapes they take, which errors they raise.

Tensors are laid out as in :func:`torch.nn.functional.scaled_dot_product_attention`:
``(batch, heads, tokens, head_dim)``, any strides with a unit last stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from epic_fast import ops
from epic_fast.errors import ConfigError

Implementation = Literal["auto", "triton", "reference"]
PROMPT_MASKS = ("full", "prefix")

INFUSION_FORMS = ("residual", "replace")

__all__ = [
    "infused_attention",
    "infused_swiglu",
    "infusion_gate",
    "mix_prompt_experts",
    "prompt_attention",
    "prompt_interaction",
    "window_prompt_attention",
]


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
    out: tuple[Tensor, Tensor | None] | None = None,
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
            output 0 and gradient 0, never NaN.  Best given on the device of the rest: from the CPU they are copied
            at each call, which waits for a GPU.
        scale: factor on the scores, default ``D ** -0.5``.
        out: tensors to write ``output`` and ``prompt_output`` into, such as two views of one buffer; they are what
            is returned.  They overlap no input.  Without gradients only, as PyTorch's own ``out=``.
        impl: ``"auto"``, ``"triton"`` (raises if it cannot run) or ``"reference"``.

    Returns:
        ``output`` ``(B, H, N, D)`` and ``prompt_output`` ``(B, H, P, D)``; the latter is None in prefix tuning.
        Under ``torch.autocast`` they have its type, as those of PyTorch's own attention.

    Raises:
        ConfigError: shapes, types, devices, strides or lengths that do not fit together, naming what was wanted
            and found.  Lengths on a GPU are not read (that would wait for it), so their range is not checked there.
    """
    tensors = (query, key, value, prompt_query, prompt_key, prompt_value)
    known = None
    # Lengths on the CPU are looked at in each call.
    if (
        out is None
        and prompt_mask in PROMPT_MASKS
        and (lengths is None or (isinstance(lengths, Tensor) and lengths.is_cuda))
    ):
        known = ops.prompt_attention.known(impl, *tensors, lengths)
    if known is not None:
        return ops.prompt_attention(
            *tensors, known=known, prompt_mask=prompt_mask, causal=causal, lengths=lengths, scale=scale
        )
    if not _plainly_attention(*tensors) or prompt_mask not in PROMPT_MASKS:
        _check_prompt_attention(*tensors, prompt_mask)
    if lengths is not None:
        _check_lengths(lengths, query)
        lengths = lengths.to(query.device)
    if out is not None:
        _check_out("prompt_attention", out, ("output", "prompt_output"), (query, prompt_query), query, tensors)
    return ops.prompt_attention(
        *tensors, impl=impl, prompt_mask=prompt_mask, causal=causal, lengths=lengths, scale=scale, out=out
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
    out: tuple[Tensor, Tensor] | None = None,
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
        temperature: ``()``, greater than zero (not checked: that would wait for a GPU).
        eps: norms below it count as it; at least 0.  The slope at a zero vector is therefore ``1 / eps``, which float16
            cannot hold at the default.
        out: tensors to write the next text and vision prompts into, such as slots of the towers' buffers; they are
            what is returned.  They overlap no input.  Without gradients only, as PyTorch's own ``out=``.
        impl: ``"auto"``, ``"triton"`` (raises if it cannot run) or ``"reference"``.

    Returns:
        The next text and vision prompts, in the shapes and types of the given ones.

    Raises:
        ConfigError: shapes, types or devices that do not fit together, naming what was wanted and found.
    """
    tensors = (
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
    if not 0 <= eps < float("inf"):
        raise _wrong("prompt_interaction", f"eps={eps!r}", "a finite number, at least 0")
    known = ops.prompt_interaction.known(impl, *tensors) if out is None else None
    if known is not None:
        return ops.prompt_interaction(*tensors, known=known, eps=eps)
    if not _plainly_interaction(*tensors):
        _check_prompt_interaction(*tensors)
    if out is not None:
        _check_out("prompt_interaction", out, ("next_text", "next_vision"), tensors[:2], text_prompt, tensors)
    return ops.prompt_interaction(*tensors, eps=eps, out=out, impl=impl)


def window_prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    *,
    relative_position_bias: Tensor | None = None,
    window_mask: Tensor | None = None,
    scale: float | None = None,
    impl: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention inside windows, each of which also holds the prompts of its sample.

    A token row sees the sample's prompts and the tokens of its window (those that ``window_mask`` lets it see); a
    prompt row sees the prompts and all tokens of the window.  Prompts come once a sample, and what they get is the
    mean over its windows.  The window attention of a Swin block (arXiv 2103.14030) with the prompts of MoPE (arXiv
    2403.10568), every window with the prompts of its own sample; the derivation stands in
    ``kernels/window_prompt_attention/README.md``.

    Args:
        query, key, value: windows of tokens, ``(B * nW, H, M, D)``, batch-major: window w of sample b is row
            ``b * nW + w``.
        prompt_query, prompt_key, prompt_value: ``(B, H, P, D)``.  ``P = 0`` is plain window attention.
        relative_position_bias: ``(H, M, M)``, added to the scores between tokens; those with a prompt have none.
        window_mask: ``(nW, M, M)`` boolean, True = attend, between tokens; prompts are seen by and see everybody.
            A row that sees nothing gives output 0 and gradient 0, never NaN.
        scale: factor on the scores before the bias, default ``D ** -0.5``.
        impl: ``"auto"``, ``"triton"`` (raises if it cannot run) or ``"reference"``.

    Returns:
        ``output`` ``(B * nW, H, M, D)``, and ``prompt_output`` ``(B, H, P, D)``, the mean over windows.  Under
        ``torch.autocast`` they have its type.

    Raises:
        ConfigError: shapes, types, devices or strides that do not fit together, naming what was wanted and found.
    """
    tensors = (query, key, value, prompt_query, prompt_key, prompt_value)
    _check_window_prompt_attention(*tensors, relative_position_bias, window_mask)
    return ops.window_prompt_attention(*tensors, relative_position_bias, window_mask, scale=scale, impl=impl)


def mix_prompt_experts(
    router_logits: Tensor,
    experts: Tensor,
    *,
    temperature: float = 0.1,
    top_k: int | None = None,
    out: Tensor | None = None,
    impl: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Prompts as a mixture of experts, weighted for each sample by the softmax of its routing logits.

    ``scores = softmax(router_logits / temperature)``, ``prompts = Σ_j scores_j experts_j``: the dynamic prompts of
    MoPE (arXiv 2403.10568); the derivation stands in ``kernels/mix_prompt_experts/README.md``.

    Args:
        router_logits: ``(B, E)``.
        experts: ``(E, L, C)``, prompts of L rows.
        temperature: divides the logits; greater than zero.
        top_k: None mixes all experts; else the ``top_k`` with the largest logits of a sample (of equal ones the first),
            their scores adding up to one and the others' being exactly 0 with gradient 0 (the sparse gate of arXiv
            1701.06538).  1 leaves the logits without gradient.
        out: a tensor to write the prompts into, such as a slot of a tower's buffer; it is what is returned.  It
            overlaps no input.  Without gradients only, as PyTorch's own ``out=``.
        impl: ``"auto"``, ``"triton"`` (raises if it cannot run) or ``"reference"``.

    Returns:
        ``prompts`` ``(B, L, C)`` in the type of ``experts`` and ``scores`` ``(B, E)`` in that of ``router_logits``.

    Raises:
        ConfigError: shapes, types, devices or options that do not fit together, naming what was wanted and found.
    """
    _check_mix_prompt_experts(router_logits, experts, temperature, top_k)
    if out is not None:
        given = (router_logits, experts)
        _check_out("mix_prompt_experts", (out,), ("prompts",), (experts,), router_logits, given)
    return ops.mix_prompt_experts(router_logits, experts, temperature=temperature, top_k=top_k, out=out, impl=impl)


def infusion_gate(
    value: Tensor,
    value_shift: Tensor,
    head_bias: Tensor,
    *,
    lengths: Tensor | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """How much of a modality each head of each sample takes: ``σ(L + cos(V, a))``.

    The cosine is between all valid rows of a head's values, as one vector, and the modality's vector ``a``, repeated
    once a row; it is ``⟨Σ_n V_n, a⟩ / (√n ‖V‖ ‖a‖)``.  The gate of MiT (arXiv 2403.05060) with padding left out of the
    cosine, so that it does not depend on the batch; the derivation stands in ``kernels/infusion_gate/README.md``.

    Args:
        value: ``(B, Hk, N, D)``.
        value_shift: ``(B, Hk, D)``, the vector that is to be added to every value.
        head_bias: ``(Hk,)``, the learned bias of each head.
        lengths: ``(B,)`` integers, the valid tokens of each sample, 0 to N.  What stands at or past a length has no
            influence, NaN included, and gets gradient 0.  Best given on the device of the rest: from the CPU they are
            copied at each call, which waits for a GPU.
        impl: ``"auto"``, ``"triton"`` (raises if it cannot run) or ``"reference"``.

    Returns:
        The gate ``(B, Hk)``, between 0 and 1, in the type of ``head_bias``.  Types may differ: everything is computed
        in float32, autocast or not.  Norms below 1e-8 count as 1e-8: a value or shift of zeros has cosine 0 and a
        finite gradient, whose slope of up to ``√n · 1e8`` float16 cannot hold.

    Raises:
        ConfigError: shapes, types, devices, strides or lengths that do not fit together, naming what was wanted and
            found.  Lengths on a GPU are not read, so their range is not checked there.
    """
    _check_infusion_gate(value, value_shift, head_bias)
    if lengths is not None:
        _check_lengths(lengths, value, "infusion_gate", "value")
        lengths = lengths.to(value.device)
    return ops.infusion_gate(value, value_shift, head_bias, lengths=lengths, impl=impl)


def infused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_multiplier: Tensor,
    value_multiplier: Tensor,
    value_shift: Tensor,
    gate: Tensor,
    *,
    form: Literal["residual", "replace"] = "residual",
    causal: bool = True,
    lengths: Tensor | None = None,
    scale: float | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """Attention over keys and values into which another modality is infused.

    ``K' = K + γ (K ⊙ m_k)`` and ``V' = V + γ (V ⊙ m_v + a_v)`` in the residual form, ``K' = γ (K ⊙ m_k)`` and ``V' =
    γ (V ⊙ m_v + a_v)`` in the replacing one, then ``softmax(Q K'ᵀ · scale) V'``: MiT's attention (arXiv 2403.05060,
    its released code and the equation of its text).  MiT also adds a vector to every key.  It is no argument, because
    it adds one number to all scores of a query, which the softmax takes out again: output and gradients are the same
    without it, and its own gradient is zero.  The derivation stands in ``kernels/infused_attention/README.md``.

    Args:
        query: ``(B, H, N, D)``, or ``(B, H, 1, D)`` for the last valid token of each sample alone: such a row sees
            every valid token, ``causal`` or not.
        key, value: ``(B, Hk, N, D)``, keys after their rotation; H is a multiple of Hk, and query head h reads key
            head ``h // (H / Hk)``.
        key_multiplier, value_multiplier, value_shift: ``(B, Hk, D)``, the vectors ``m_k``, ``m_v`` and ``a_v`` of each
            sample.
        gate: ``(B, Hk)``, the gate γ, as :func:`infusion_gate` gives it.
        form: ``"residual"`` or ``"replace"``.
        causal: token rows see only tokens up to themselves.
        lengths: ``(B,)`` integers, the valid tokens of each sample, 0 to N.  Rows at or past a length give output 0 and
            gradient 0, never NaN.  Best given on the device of the rest: from the CPU they are copied at each call,
            which waits for a GPU.
        scale: factor on the scores, default ``D ** -0.5``.
        impl: ``"auto"``, ``"triton"`` (raises if it cannot run) or ``"reference"``.

    Several modalities add up, and only their sums matter: give ``Σ_i γ_i m_i`` and ``Σ_i γ_i a_i`` with a gate of ones
    (such as ``gate.new_ones(1, 1).expand(B, Hk)``, which costs no memory).

    Returns:
        ``output``, as ``query``.  Multipliers, shift and gate may have other types than query, key and value, such as
        float32 beside bfloat16: the arithmetic is in float32.  Under ``torch.autocast`` query, key and value take its
        type.

    Raises:
        ConfigError: shapes, types, devices, strides, lengths or options that do not fit together, naming what was
            wanted and found.  Lengths on a GPU are not read, so their range is not checked there.
    """
    tensors = (query, key, value, key_multiplier, value_multiplier, value_shift, gate)
    _check_infused_attention(*tensors, form)
    if lengths is not None:
        _check_lengths(lengths, key, "infused_attention", "key")
        lengths = lengths.to(query.device)
    return ops.infused_attention(*tensors, form=form, causal=causal, lengths=lengths, scale=scale, impl=impl)


def infused_swiglu(
    gate_projection: Tensor, up_projection: Tensor, multiplier: Tensor, *, impl: Implementation = "auto"
) -> Tensor:
    """The hidden layer of a SwiGLU feed-forward, times a vector of each sample: ``silu(g) ⊙ u ⊙ m``.

    MiT's infusion into the feed-forward (arXiv 2403.05060); the derivation stands in
    ``kernels/infused_swiglu/README.md``.

    Args:
        gate_projection, up_projection: ``(B, N, F)``, any strides with a unit last stride.
        multiplier: ``(B, F)``, one factor a channel for all tokens of a sample.
        impl: ``"auto"``, ``"triton"`` (raises if it cannot run) or ``"reference"``.

    Returns:
        ``hidden`` ``(B, N, F)`` in the type of ``gate_projection``.  The multiplier may have another type: the
        arithmetic is in float32, rounded once, autocast or not.

    Raises:
        ConfigError: shapes, types, devices or strides that do not fit together, naming what was wanted and found.
    """
    _check_infused_swiglu(gate_projection, up_projection, multiplier)
    return ops.infused_swiglu(gate_projection, up_projection, multiplier, impl=impl)


def _wrong(operation: str, found: str, wanted: str) -> ConfigError:
    return ConfigError(f"{operation}: {found}; wanted {wanted}")


def _shape(tensor: Tensor) -> str:
    # Not str(tuple(...)), which torch.compile cannot trace.
    return "(" + ", ".join(map(str, tensor.shape)) + ("," if tensor.dim() == 1 else "") + ")"


def _are_tensors(*given: Any) -> bool:
    return all(isinstance(each, Tensor) for each in given)


def _check_tensors(operation: str, named: Sequence[tuple[str, Any]]) -> None:
    for label, each in named:
        if not isinstance(each, Tensor):
            raise _wrong(operation, f"{label} is a {type(each).__name__}", "a tensor")


# The messages below are built only where something is wrong: a formatted size in a traced path would pin that
# size, and a new batch size would recompile.  What nearly every call looks like is recognised by the two functions
# `_plainly_...` in a few microseconds; only what they turn down goes through the checks that find words for it.

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
A_FLOAT = "a floating-point type of 16, 32 or 64 bits"
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _plainly_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor | None,
    prompt_key: Tensor,
    prompt_value: Tensor,
) -> bool:
    """All of one type on one device, shapes alike, last strides 1; nothing else is looked at."""
    if not _are_tensors(query, key, value, prompt_key, prompt_value):
        return False
    shape, prompt_shape, dtype, device = query.shape, prompt_key.shape, query.dtype, query.device
    if len(shape) != 4 or len(prompt_shape) != 4 or dtype not in FLOATS or query.stride(3) != 1:
        return False
    batch, heads, _, head_dim = shape
    if prompt_shape[0] not in (1, batch) or prompt_shape[1] != heads or prompt_shape[3] != head_dim or not head_dim:
        return False
    for tensor in (key, value):
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device or tensor.stride(3) != 1:
            return False
    for tensor in (prompt_key, prompt_value) if prompt_query is None else (prompt_key, prompt_value, prompt_query):
        if tensor.shape != prompt_shape or tensor.dtype != dtype or tensor.device != device or tensor.stride(3) != 1:
            return False
    return True


def _plainly_interaction(
    text_prompt: Tensor,
    vision_prompt: Tensor,
    text_to_vision_weight: Tensor,
    text_to_vision_bias: Tensor,
    vision_to_text_weight: Tensor,
    vision_to_text_bias: Tensor,
    text_gate: Tensor,
    vision_gate: Tensor,
    temperature: Tensor,
) -> bool:
    """Prompts and projections of one type, all on one device, shapes that fit; nothing else is looked at."""
    weights = text_to_vision_weight, text_to_vision_bias, vision_to_text_weight, vision_to_text_bias
    if not _are_tensors(text_prompt, vision_prompt, *weights, text_gate, vision_gate, temperature):
        return False
    text_shape, vision_shape, dtype, device = (
        text_prompt.shape,
        vision_prompt.shape,
        text_prompt.dtype,
        text_prompt.device,
    )
    if len(text_shape) != 3 or len(vision_shape) != 3:
        return False
    text, vision = text_shape[2], vision_shape[2]
    return (
        text_shape[0] == vision_shape[0]
        and text_to_vision_weight.shape == (vision, text)
        and text_to_vision_bias.shape == (vision,)
        and vision_to_text_weight.shape == (text, vision)
        and vision_to_text_bias.shape == (text,)
        and text_gate.shape in ((), (text,))
        and vision_gate.shape in ((), (vision,))
        and temperature.dim() == 0
        and dtype in FLOATS
        and vision_prompt.dtype == dtype
        and text_to_vision_weight.dtype == text_to_vision_bias.dtype == dtype
        and vision_to_text_weight.dtype == vision_to_text_bias.dtype == dtype
        and text_gate.dtype in FLOATS
        and vision_gate.dtype in FLOATS
        and temperature.dtype in FLOATS
        and vision_prompt.device == text_to_vision_weight.device == text_to_vision_bias.device == device
        and vision_to_text_weight.device == vision_to_text_bias.device == device
        and text_gate.device == vision_gate.device == temperature.device == device
    )


def _check_prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor | None,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_mask: str,
) -> None:
    name = "prompt_attention"
    named = [("query", query), ("key", key), ("value", value)]
    prompts = [("prompt_key", prompt_key), ("prompt_value", prompt_value)]
    if prompt_query is not None:
        prompts.append(("prompt_query", prompt_query))
    _check_tensors(name, [*named, *prompts])
    if query.dim() != 4 or not query.shape[3]:
        raise _wrong(name, f"query has shape {_shape(query)}", "(batch, heads, tokens, head_dim), head_dim at least 1")
    batch, heads, _, head_dim = query.shape
    for label, tensor in named[1:]:
        if tensor.shape != query.shape:
            raise _wrong(name, f"{label} has shape {_shape(tensor)}", f"query's {_shape(query)}")
    for label, tensor in prompts:
        if (
            tensor.dim() != 4
            or tensor.shape[0] not in (1, batch)
            or tensor.shape[1] != heads
            or tensor.shape[3] != head_dim
        ):
            raise _wrong(name, f"{label} has shape {_shape(tensor)}", f"({batch} or 1, {heads}, prompts, {head_dim})")
        if tensor.shape[2] != prompt_key.shape[2]:
            raise _wrong(name, f"{label} has {tensor.shape[2]} prompts", f"{prompt_key.shape[2]}, as prompt_key")
    for label, tensor in [*named, *prompts]:
        if tensor.dtype not in FLOATS:
            raise _wrong(name, f"{label} has type {tensor.dtype}", A_FLOAT)
        if tensor.dtype != query.dtype and not _converted_by_autocast(tensor, query):
            raise _wrong(name, f"{label} has type {tensor.dtype}", f"query's {query.dtype}")
        if tensor.device != query.device:
            raise _wrong(name, f"{label} is on {tensor.device}", f"{query.device}, as query")
        if tensor.shape[-1] != 1 and tensor.stride(-1) != 1 and tensor.numel():
            raise _wrong(name, f"{label} has last stride {tensor.stride(-1)}", "1 (call .contiguous())")
    if prompt_mask not in PROMPT_MASKS:
        raise _wrong(name, f"prompt_mask={prompt_mask!r}", "'full' or 'prefix'")


def _converted_by_autocast(*tensors: Tensor) -> bool:
    """Whether types may differ: autocast makes them one, but leaves float64 alone."""
    return torch.is_autocast_enabled(tensors[0].device.type) and not any(
        tensor.dtype == torch.float64 for tensor in tensors
    )


def _check_lengths(lengths: Tensor, rows: Tensor, name: str = "prompt_attention", label: str = "query") -> None:
    batch, tokens = rows.shape[0], rows.shape[2]
    _check_tensors(name, [("lengths", lengths)])
    if lengths.dim() != 1 or lengths.shape[0] != batch:
        raise _wrong(name, f"lengths has shape {_shape(lengths)}", f"({batch},)")
    if lengths.dtype not in INTEGERS:
        raise _wrong(name, f"lengths has type {lengths.dtype}", "an integer type: int64, int32, int16, int8 or uint8")
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and batch:
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > tokens:
            raise _wrong(name, f"lengths run from {low} to {high}", f"0 to the {tokens} tokens of {label}")


def _check_out(
    name: str,
    out: tuple[Tensor | None, ...],
    labels: tuple[str, ...],
    like: tuple[Tensor | None, ...],
    batch_like: Tensor,
    tensors: tuple[Tensor | None, ...],
) -> None:
    """``out`` has one tensor for each of ``like`` (None for None), of its shape with the batch of ``batch_like``."""
    if len(out) != len(like):
        raise _wrong(name, f"out has {len(out)} entries", f"{len(like)}: {', '.join(labels)}")
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (*tensors, *out)):
        raise _wrong(name, "out= with a tensor that requires a gradient", "no gradient (torch.no_grad()), or no out=")
    device = batch_like.device
    for label, target, model in zip(labels, out, like, strict=True):
        if (target is None) != (model is None):
            found, wanted = ("None", "a tensor") if target is None else ("a tensor", "None, as there are no such rows")
            raise _wrong(name, f"out's {label} is {found}", wanted)
        if target is None or model is None:
            continue
        if target.dim() != model.dim() or target.shape[0] != batch_like.shape[0] or target.shape[1:] != model.shape[1:]:
            wanted = f"({batch_like.shape[0]}, " + _shape(model)[1:].split(", ", 1)[1]
            raise _wrong(name, f"out's {label} has shape {_shape(target)}", wanted)
        if target.device != device:
            raise _wrong(name, f"out's {label} is on {target.device}", f"{device}")
        dtype = model.dtype
        if name == "prompt_attention" and torch.is_autocast_enabled(device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
        if target.dtype != dtype:
            raise _wrong(name, f"out's {label} has type {target.dtype}", f"{dtype}")
        if target.shape[-1] != 1 and target.stride(-1) != 1 and target.numel():
            raise _wrong(name, f"out's {label} has last stride {target.stride(-1)}", "1")
        if any(size > 1 and not stride for size, stride in zip(target.shape, target.stride(), strict=True)):
            raise _wrong(
                name, f"out's {label} has strides {target.stride()} for shape {_shape(target)}", "memory of its own"
            )
        if not torch.compiler.is_compiling() and any(_starts_alike(target, each) for each in tensors):
            raise _wrong(name, f"out's {label} is the memory of an input", "memory that no input has")


def _starts_alike(target: Tensor, tensor: Tensor | None) -> bool:
    """Whether both are there and begin at one place in memory."""
    if type(target) is not Tensor or type(tensor) not in (Tensor, torch.nn.Parameter) or not target.numel():
        return False
    assert tensor is not None
    return target.data_ptr() == tensor.data_ptr() != 0


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
    prompts = [("text_prompt", text_prompt), ("vision_prompt", vision_prompt)]
    projections = [
        ("text_to_vision_weight", text_to_vision_weight),
        ("text_to_vision_bias", text_to_vision_bias),
        ("vision_to_text_weight", vision_to_text_weight),
        ("vision_to_text_bias", vision_to_text_bias),
        ("text_gate", text_gate),
        ("vision_gate", vision_gate),
        ("temperature", temperature),
    ]
    _check_tensors(name, [*prompts, *projections])
    for label, tensor in prompts:
        if tensor.dim() != 3:
            raise _wrong(name, f"{label} has shape {_shape(tensor)}", "(batch, prompts, width)")
        if tensor.dtype not in FLOATS:
            raise _wrong(name, f"{label} has type {tensor.dtype}", A_FLOAT)
    if vision_prompt.shape[0] != text_prompt.shape[0]:
        raise _wrong(name, f"vision_prompt has batch {vision_prompt.shape[0]}", f"text_prompt's {text_prompt.shape[0]}")
    text, vision = text_prompt.shape[2], vision_prompt.shape[2]
    layouts = (
        ("text_to_vision_weight", text_to_vision_weight, (vision, text), False),
        ("text_to_vision_bias", text_to_vision_bias, (vision,), False),
        ("vision_to_text_weight", vision_to_text_weight, (text, vision), False),
        ("vision_to_text_bias", vision_to_text_bias, (text,), False),
        ("text_gate", text_gate, (text,), True),
        ("vision_gate", vision_gate, (vision,), True),
        ("temperature", temperature, (), True),
    )
    for label, tensor, shape, scalar_too in layouts:
        if tensor.shape != shape and not (scalar_too and tensor.dim() == 0):
            raise _wrong(
                name,
                f"{label} has shape {_shape(tensor)}",
                f"{shape}{' or ()' if scalar_too and shape else ''} for prompts of width {text} (text) and {vision} "
                "(vision)",
            )
    for label, tensor in (("vision_prompt", vision_prompt), *(layout[:2] for layout in layouts)):
        if tensor.dtype not in FLOATS:
            raise _wrong(name, f"{label} has type {tensor.dtype}", A_FLOAT)
        if tensor.device != text_prompt.device:
            raise _wrong(name, f"{label} is on {tensor.device}", f"{text_prompt.device}, as text_prompt")
    if torch.is_autocast_enabled(text_prompt.device.type):
        return
    for label, tensor, prompt_label, prompt in (
        ("text_to_vision_weight", text_to_vision_weight, "text_prompt", text_prompt),
        ("text_to_vision_bias", text_to_vision_bias, "text_prompt", text_prompt),
        ("vision_to_text_weight", vision_to_text_weight, "vision_prompt", vision_prompt),
        ("vision_to_text_bias", vision_to_text_bias, "vision_prompt", vision_prompt),
    ):
        if tensor.dtype != prompt.dtype:
            raise _wrong(
                name,
                f"{label} has type {tensor.dtype}",
                f"{prompt_label}'s {prompt.dtype} (outside torch.autocast nothing is converted)",
            )


def _check_window_prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    relative_position_bias: Tensor | None,
    window_mask: Tensor | None,
) -> None:
    name = "window_prompt_attention"
    named = [
        ("query", query),
        ("key", key),
        ("value", value),
        ("prompt_query", prompt_query),
        ("prompt_key", prompt_key),
        ("prompt_value", prompt_value),
    ]
    _check_tensors(name, named)
    if query.dim() != 4 or not query.shape[3]:
        wanted = "(batch * windows, heads, window tokens, head_dim), head_dim at least 1"
        raise _wrong(name, f"query has shape {_shape(query)}", wanted)
    rows, heads, tokens, head_dim = query.shape
    for label, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape:
            raise _wrong(name, f"{label} has shape {_shape(tensor)}", f"query's {_shape(query)}")
    if prompt_key.dim() != 4 or prompt_key.shape[1] != heads or prompt_key.shape[3] != head_dim:
        raise _wrong(name, f"prompt_key has shape {_shape(prompt_key)}", f"(batch, {heads}, prompts, {head_dim})")
    for label, tensor in (("prompt_query", prompt_query), ("prompt_value", prompt_value)):
        if tensor.shape != prompt_key.shape:
            raise _wrong(name, f"{label} has shape {_shape(tensor)}", f"prompt_key's {_shape(prompt_key)}")
    batch = prompt_key.shape[0]
    if rows % batch if batch else rows:
        raise _wrong(name, f"{rows} windows and prompts of {batch} samples", "as many windows for every sample")
    for label, tensor in named:
        if tensor.dtype not in FLOATS:
            raise _wrong(name, f"{label} has type {tensor.dtype}", A_FLOAT)
        if tensor.dtype != query.dtype and not _converted_by_autocast(tensor, query):
            raise _wrong(name, f"{label} has type {tensor.dtype}", f"query's {query.dtype}")
        if tensor.shape[-1] != 1 and tensor.stride(-1) != 1 and tensor.numel():
            raise _wrong(name, f"{label} has last stride {tensor.stride(-1)}", "1 (call .contiguous())")
    if relative_position_bias is not None:
        _check_tensors(name, [("relative_position_bias", relative_position_bias)])
        if relative_position_bias.shape != (heads, tokens, tokens):
            found = f"relative_position_bias has shape {_shape(relative_position_bias)}"
            raise _wrong(name, found, f"({heads}, {tokens}, {tokens}): (heads, window tokens, window tokens)")
        if relative_position_bias.dtype not in FLOATS:
            raise _wrong(name, f"relative_position_bias has type {relative_position_bias.dtype}", A_FLOAT)
        named.append(("relative_position_bias", relative_position_bias))
    if window_mask is not None:
        _check_tensors(name, [("window_mask", window_mask)])
        if window_mask.shape[1:] != (tokens, tokens) or window_mask.shape[0] * batch != rows:
            windows = rows // batch if batch else "windows"
            found = f"window_mask has shape {_shape(window_mask)}"
            raise _wrong(name, found, f"({windows}, {tokens}, {tokens}): (windows of a sample, tokens, tokens)")
        if window_mask.dtype != torch.bool:
            raise _wrong(name, f"window_mask has type {window_mask.dtype}", "torch.bool, True = attend (mask == 0)")
        named.append(("window_mask", window_mask))
    for label, tensor in named:
        if tensor.device != query.device:
            raise _wrong(name, f"{label} is on {tensor.device}", f"{query.device}, as query")


def _check_mix_prompt_experts(router_logits: Tensor, experts: Tensor, temperature: float, top_k: int | None) -> None:
    name = "mix_prompt_experts"
    _check_tensors(name, [("router_logits", router_logits), ("experts", experts)])
    if experts.dim() != 3 or not experts.shape[0]:
        raise _wrong(name, f"experts has shape {_shape(experts)}", "(experts, prompts, width), at least one expert")
    if router_logits.dim() != 2 or router_logits.shape[1] != experts.shape[0]:
        raise _wrong(name, f"router_logits has shape {_shape(router_logits)}", f"(batch, {experts.shape[0]} experts)")
    for label, tensor in (("router_logits", router_logits), ("experts", experts)):
        if tensor.dtype not in FLOATS:
            raise _wrong(name, f"{label} has type {tensor.dtype}", A_FLOAT)
    if experts.device != router_logits.device:
        raise _wrong(name, f"experts is on {experts.device}", f"{router_logits.device}, as router_logits")
    if not 0 < temperature < float("inf"):
        raise _wrong(name, f"temperature={temperature!r}", "a finite number greater than 0")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise _wrong(name, f"top_k={top_k!r}", f"an integer of 1 to {experts.shape[0]} experts, or None for all")
    if top_k is not None and top_k > experts.shape[0]:
        raise _wrong(name, f"top_k={top_k}", f"1 to the {experts.shape[0]} experts there are, or None for all")


def _check_alike(name: str, tensors: list[tuple[str, Tensor]], of_one_type: int) -> None:
    """Floating-point tensors on one device with unit last strides, the first ``of_one_type`` of one type."""
    first_label, first = tensors[0]
    for index, (label, tensor) in enumerate(tensors):
        if tensor.dtype not in FLOATS:
            raise _wrong(name, f"{label} has type {tensor.dtype}", A_FLOAT)
        if index < of_one_type and tensor.dtype != first.dtype and not _converted_by_autocast(tensor, first):
            raise _wrong(name, f"{label} has type {tensor.dtype}", f"{first_label}'s {first.dtype}")
        if tensor.device != first.device:
            raise _wrong(name, f"{label} is on {tensor.device}", f"{first.device}, as {first_label}")
        if index < of_one_type and tensor.shape[-1] != 1 and tensor.stride(-1) != 1 and tensor.numel():
            raise _wrong(name, f"{label} has last stride {tensor.stride(-1)}", "1 (call .contiguous())")


def _check_infusion_gate(value: Tensor, value_shift: Tensor, head_bias: Tensor) -> None:
    name = "infusion_gate"
    _check_tensors(name, [("value", value), ("value_shift", value_shift), ("head_bias", head_bias)])
    if value.dim() != 4:
        raise _wrong(name, f"value has shape {_shape(value)}", "(batch, key heads, tokens, head_dim)")
    batch, heads, _, head_dim = value.shape
    if value_shift.shape != (batch, heads, head_dim):
        raise _wrong(name, f"value_shift has shape {_shape(value_shift)}", f"({batch}, {heads}, {head_dim})")
    if head_bias.shape != (heads,):
        raise _wrong(name, f"head_bias has shape {_shape(head_bias)}", f"({heads},)")
    _check_alike(name, [("value", value), ("value_shift", value_shift), ("head_bias", head_bias)], 1)


def _check_infused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_multiplier: Tensor,
    value_multiplier: Tensor,
    value_shift: Tensor,
    gate: Tensor,
    form: str,
) -> None:
    name = "infused_attention"
    vectors = [
        ("key_multiplier", key_multiplier),
        ("value_multiplier", value_multiplier),
        ("value_shift", value_shift),
    ]
    _check_tensors(name, [("query", query), ("key", key), ("value", value), *vectors, ("gate", gate)])
    if key.dim() != 4 or not key.shape[1] or not key.shape[3]:
        wanted = "(batch, key heads, tokens, head_dim), at least one head, head_dim at least 1"
        raise _wrong(name, f"key has shape {_shape(key)}", wanted)
    batch, heads, tokens, head_dim = key.shape
    if value.shape != key.shape:
        raise _wrong(name, f"value has shape {_shape(value)}", f"key's {_shape(key)}")
    if (
        query.dim() != 4
        or query.shape[0] != batch
        or query.shape[1] % heads
        or query.shape[2] not in (1, tokens)
        or query.shape[3] != head_dim
    ):
        wanted = f"({batch}, a multiple of {heads} heads, {tokens} or 1, {head_dim}), as key has shape {_shape(key)}"
        raise _wrong(name, f"query has shape {_shape(query)}", wanted)
    for label, tensor in vectors:
        if tensor.shape != (batch, heads, head_dim):
            raise _wrong(name, f"{label} has shape {_shape(tensor)}", f"({batch}, {heads}, {head_dim})")
    if gate.shape != (batch, heads):
        raise _wrong(name, f"gate has shape {_shape(gate)}", f"({batch}, {heads})")
    _check_alike(name, [("query", query), ("key", key), ("value", value), *vectors, ("gate", gate)], 3)
    if form not in INFUSION_FORMS:
        raise _wrong(name, f"form={form!r}", "'residual' or 'replace'")


def _check_infused_swiglu(gate_projection: Tensor, up_projection: Tensor, multiplier: Tensor) -> None:
    name = "infused_swiglu"
    rows = [("gate_projection", gate_projection), ("up_projection", up_projection)]
    _check_tensors(name, [*rows, ("multiplier", multiplier)])
    if gate_projection.dim() != 3:
        raise _wrong(name, f"gate_projection has shape {_shape(gate_projection)}", "(batch, tokens, width)")
    batch, _, width = gate_projection.shape
    if up_projection.shape != gate_projection.shape:
        found = f"up_projection has shape {_shape(up_projection)}"
        raise _wrong(name, found, f"gate_projection's {_shape(gate_projection)}")
    if multiplier.shape != (batch, width):
        raise _wrong(name, f"multiplier has shape {_shape(multiplier)}", f"({batch}, {width})")
    _check_alike(name, [*rows, ("multiplier", multiplier)], 2)
