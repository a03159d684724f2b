"""The specification of a routed layer's prompts and their norm, in plain PyTorch, good in float64."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from epic_fast.kernels.mix_prompt_experts.reference import mix_prompt_experts  # pyright: ignore[reportMissingImports]


def route_prompts(
    out: Tensor,
    normed: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    token_dots: Tensor | None,
    prompt_dots: Tensor | None,
    count: int,
    router_bias: Tensor | None,
    projected: Tensor | None,
    embeddings: Tensor | None,
    static: Tensor | None,
    experts: Tensor | None,
    mapped: Tensor | None,
    *,
    temperature: float,
    top_k: int | None = None,
) -> Tensor | None:
    """The contract is that of :func:`epic_fast.ops.route_prompts.route_prompts`.

    Everything but the two roundings, of ``out`` and of ``normed``, in float32 (float64 where one of the inputs is).
    """
    batch, _, width = out.shape
    optional = (token_dots, prompt_dots, router_bias, projected, embeddings, static, experts, mapped)
    given = (out, normed, norm_weight, norm_bias, *(each for each in optional if each is not None))
    wide = functools.reduce(torch.promote_types, (each.dtype for each in given), torch.float32)
    parts = [] if static is None else [static.to(wide).expand(batch, -1, -1)]
    scores = None
    # Autocast would undo the explicit widening.
    with torch.autocast(out.device.type, enabled=False):
        if projected is not None and embeddings is not None:
            query = [projected.to(wide)]
            dots = [each.to(wide).sum(dim=1) for each in (token_dots, prompt_dots) if each is not None]
            if dots:
                own = functools.reduce(torch.add, dots) / count
                query.insert(0, own if router_bias is None else own + router_bias.to(wide))
            logits = torch.cat(query, dim=1) @ embeddings.to(wide)
            # Without experts there are scores all the same.
            mixed = logits.new_zeros(logits.shape[1], 0, width) if experts is None else experts.to(wide)
            dynamic, scores = mix_prompt_experts(logits, mixed, temperature=temperature, top_k=top_k)
            parts.append(dynamic)
        elif experts is not None:
            parts.append(experts.to(wide).mean(dim=0).expand(batch, -1, -1))
        if mapped is not None:
            parts.append(mapped.to(wide))
        out.copy_(torch.cat(parts, dim=1))
        weight, bias = norm_weight.to(wide), norm_bias.to(wide)
        normed.copy_(torch.nn.functional.layer_norm(out.to(wide), (width,), weight, bias, eps))
    return scores


def probe_through(probes: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The contract is that of :func:`epic_fast.ops.route_prompts.probe_through`."""
    wide = functools.reduce(torch.promote_types, (each.dtype for each in (*probes, *weights)), torch.float32)
    with torch.autocast(probes[0].device.type, enabled=False):
        return torch.stack([one.to(wide) @ other.to(wide) for one, other in zip(probes, weights, strict=True)])
