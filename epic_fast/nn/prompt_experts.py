"""Conditional prompts: static, mixed from experts by a router, and mapped from the other modality (MoPE)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from epic_fast import functional
from epic_fast.hooks import untouched

MEMORY = 0.05
"""How much of the running load and entropy the last batch is."""


class PromptExperts(nn.Module):
    """The prompt tensors of one layer: a static prompt, and experts of which each sample gets a mixture.

    Args:
        width: C, of the layer's tokens.
        length: L, rows of the static prompt and of each expert.
        num_experts: E; with one expert the mixture is that expert.
        static, dynamic: whether there are a static prompt, and experts.
        init_range: tensors start uniform in ``[-init_range, init_range]``.
    """

    def __init__(
        self,
        width: int,
        *,
        length: int,
        num_experts: int,
        static: bool = True,
        dynamic: bool = True,
        init_range: float = 0.1,
    ):
        super().__init__()
        self.num_experts = num_experts
        self.static = nn.Parameter(uniform(init_range, length, width)) if static else None
        self.experts = nn.Parameter(uniform(init_range, num_experts, length, width)) if dynamic else None

    def forward(
        self,
        batch: int,
        router_logits: Tensor | None = None,
        mapped: Tensor | None = None,
        *,
        temperature: float = 0.1,
        top_k: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The prompts of a batch, static before dynamic before mapped.

        Args:
            batch: B.
            router_logits: ``(B, E)``; None mixes evenly: with one expert, that one.
            mapped: ``(B, m, C)``, prompts from elsewhere; None: no such rows.
            temperature, top_k: of :func:`epic_fast.functional.mix_prompt_experts`.

        Returns:
            ``(B, P, C)``, and the routing scores ``(B, E)`` where there are logits.
        """
        parts, scores = [], None
        if self.static is not None:
            parts.append(self.static.expand(batch, -1, -1))
        if self.experts is not None:
            if router_logits is None:
                parts.append(self.experts.mean(dim=0).expand(batch, -1, -1))
            else:
                dynamic, scores = functional.mix_prompt_experts(
                    router_logits, self.experts, temperature=temperature, top_k=top_k
                )
                parts.append(dynamic)
        if mapped is not None:
            parts.append(mapped)
        return torch.cat(parts, dim=1), scores


class ExpertRouter(nn.Module):
    """Routing logits of all routed layers of a tower.

    A layer's query is the projection of its mean row beside a projection of the other modality's feature; its logits
    are the products with routing embeddings that start orthogonal and are never trained.  With more experts than the
    query has numbers the embeddings cannot be orthogonal to each other; the query's coordinates then are.

    Args:
        widths: of the tokens of each routed layer.
        other_width: of the other modality's feature.
        num_experts: E.
        size: numbers of a query that come from the tower itself; 0 routes by the other modality alone.
        other_size: numbers that come from the other modality.
        noise_std: standard deviation of the noise on ``logits / temperature`` in training.
        temperature: of the softmax that the logits are for.
    """

    embeddings: Tensor
    load: Tensor
    entropy: Tensor

    def __init__(
        self,
        widths: Sequence[int],
        other_width: int,
        *,
        num_experts: int,
        size: int = 2,
        other_size: int = 8,
        noise_std: float = 0.0,
        temperature: float = 0.1,
    ):
        super().__init__()
        self.noise_std = noise_std
        self.temperature = temperature
        self.own = nn.ModuleList(nn.Linear(width, size) for width in widths) if size else None
        # One product for all layers, before the first of them.
        self.other = nn.Linear(other_width, len(widths) * other_size)
        embeddings = [nn.init.orthogonal_(torch.empty(size + other_size, num_experts)) for _ in widths]
        self.register_buffer("embeddings", torch.stack(embeddings))
        self.register_buffer("load", torch.full((len(widths), num_experts), 1 / num_experts))
        self.register_buffer("entropy", torch.ones(len(widths)))

    def project(self, other: Tensor) -> Tensor:
        """The other modality's part of every layer's query: ``(B, D)`` to ``(B, layers, other_size)``."""
        with torch.autocast(other.device.type, enabled=False):
            return self.other(other.to(self.other.weight.dtype)).unflatten(1, (len(self.embeddings), -1))

    def forward(self, layer: int, pooled: Tensor, projected: Tensor) -> Tensor:
        """Logits ``(B, E)`` of the routed layer number ``layer``; noisy in training.

        Args:
            pooled: ``(B, C)``, the mean row that comes into the layer.
            projected: what :meth:`project` gave.
        """
        query = projected[:, layer]
        with torch.autocast(query.device.type, enabled=False):
            if self.own is not None:
                query = torch.cat([self.own[layer](pooled.to(query.dtype)), query], dim=1)
            logits = query @ self.embeddings[layer].to(query.dtype)
            if self.training and self.noise_std:
                # After the division by the temperature, so times it here.
                logits = logits + self.temperature * self.noise_std * torch.randn_like(logits)
        return logits

    @torch.no_grad()
    def watch(self, scores: Sequence[Tensor]) -> None:
        """Take a batch's scores ``(B, E)`` of every routed layer into the running ``load`` and ``entropy``.

        ``load`` ``(layers, E)`` is the mean score of each expert, ``entropy`` ``(layers,)`` that of a sample's scores:
        1 where it takes all experts alike, 0 where it takes one.
        """
        found = torch.stack([each.detach() for each in scores]).to(self.load.dtype)
        entropy = routing_entropy(found).mean(dim=1)
        for running, value in ((self.load, found.mean(dim=1)), (self.entropy, entropy)):
            running.copy_(torch.where(value.isfinite(), running + MEMORY * (value - running), running))


class PromptMapper(nn.Module):
    """Prompts made of the other modality's feature: a trunk, and a projection into each width.

    Args:
        other_width: of the feature.
        widths: C of each set of prompts.
        hidden_size: of the trunk.
        rows: m, of each set.
        affine: a learned scale and shift behind the trunk: what is left of the batch norm of MoPE's released code,
            which always runs there on the statistics that it was made with.
        dropout: on the prompts, in training.
    """

    def __init__(
        self,
        other_width: int,
        widths: Sequence[int],
        *,
        hidden_size: int,
        rows: int = 1,
        affine: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.rows = rows
        self.trunk = nn.Linear(other_width, hidden_size)
        self.scale = nn.Parameter(torch.ones(hidden_size)) if affine else None
        self.shift = nn.Parameter(torch.zeros(hidden_size)) if affine else None
        self.projections = nn.ModuleList(nn.Linear(hidden_size, rows * width) for width in widths)
        self.dropout = nn.Dropout(dropout)

    def forward(self, other: Tensor) -> list[Tensor]:
        """Features ``(B, D)`` to prompts ``(B, m, C)``, a set for each of ``widths``."""
        with torch.autocast(other.device.type, enabled=False):
            hidden = self.trunk(other.to(self.trunk.weight.dtype))
            if self.scale is not None and self.shift is not None:
                hidden = torch.addcmul(self.shift, hidden, self.scale)
            hidden = nn.functional.gelu(hidden)
            layers: list[Any] = list(self.projections)
            if all(untouched(layer, nn.Linear) for layer in layers):
                # One product for all of them: alone each is a few rows of numbers and a launch.
                weight, bias = (torch.cat([getattr(each, name) for each in layers]) for name in ("weight", "bias"))
                joined = nn.functional.gelu(nn.functional.linear(hidden, weight, bias))
                mapped = joined.split([layer.out_features for layer in layers], dim=1)
            else:
                mapped = [nn.functional.gelu(layer(hidden)) for layer in layers]
            return [self.dropout(each).unflatten(1, (self.rows, -1)) for each in mapped]


def routing_entropy(scores: Tensor) -> Tensor:
    """Entropy of routing scores ``(..., E)`` over at least two experts, as a share of the highest there can be:
    ``(...)``, 1 where all experts are taken alike, 0 where one is."""
    return torch.special.entr(scores).sum(dim=-1) / math.log(scores.shape[-1])


def importance_loss(scores: Sequence[Tensor], *, threshold: float = 0.1) -> Tensor:
    """How unevenly experts are used, ``()``: the squared coefficient of variation of their importance.

    The importance of an expert is the sum of its scores over the batch (arXiv 1701.06538), its variance over experts
    the sample variance; a layer at or below ``threshold`` counts as 0, and so does a single expert.  Mean over layers;
    the host does not wait for the device.

    Args:
        scores: ``(B, E)`` of each routed layer, at least one.
        threshold: unevenness that is let be.
    """
    importance = torch.stack([each.sum(dim=0) for each in scores])
    importance = importance.to(torch.promote_types(importance.dtype, torch.float32))
    if importance.shape[1] == 1:
        return importance.sum() * 0.0
    uneven = importance.var(dim=1) / importance.mean(dim=1).square()
    return torch.where(uneven > threshold, uneven, 0.0).mean()


def uniform(bound: float, *shape: int) -> Tensor:
    """Random numbers in ``[-bound, bound]``."""
    return torch.empty(shape).uniform_(-bound, bound)
