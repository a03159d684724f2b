"""How a layer's prompts are made of what comes into it, for whoever makes them where they lie."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from epic_fast.ops.residual_norm import MOST_PROBES
from epic_fast.ops.route_prompts import route_prompts

__all__ = ["MOST_PROBES", "PromptRoute"]


@dataclass(frozen=True)
class PromptRoute:
    """The prompts of one layer, static before dynamic before mapped, without a graph.

    Attributes:
        static: ``(L, C)``, or None.
        experts: ``(E, L, C)`` that are mixed, or None.
        mapped: ``(B, m, C)``, or None.
        probe, probe_bias: the router's projection of the mean row, ``(J, C)`` and ``(J,)``; None where it has none.
        projected: ``(B, D)``, the other modality's part of the router's query; None: experts are mixed evenly.
        embeddings: ``(J + D, E)``, of the router.
        temperature, top_k: of the mixture.
    """

    static: Tensor | None
    experts: Tensor | None
    mapped: Tensor | None
    probe: Tensor | None = None
    probe_bias: Tensor | None = None
    projected: Tensor | None = None
    embeddings: Tensor | None = None
    temperature: float = 1.0
    top_k: int | None = None

    def write(
        self,
        out: Tensor,
        normed: Tensor,
        norm: tuple[Tensor, Tensor, float],
        probed: Tensor | None,
        prompts_probed: Tensor | None,
    ) -> Tensor | None:
        """Write the prompts and their norm; the routing scores ``(B, E)``, None without a router.

        Args:
            out, normed: ``(B, P, C)``, contiguous.
            norm: weight, bias and eps.
            probed, prompts_probed: ``(B, N, J)`` and ``(B, O, J)``, what the rows that come in, tokens and prompts,
                were multiplied to with ``probe``.
        """
        parts = [each for each in (probed, prompts_probed) if each is not None]
        return route_prompts(
            out,
            normed,
            *norm,
            token_dots=probed,
            prompt_dots=prompts_probed,
            count=max(1, sum(each.shape[1] for each in parts)),
            router_bias=self.probe_bias,
            projected=self.projected,
            embeddings=self.embeddings,
            static=self.static,
            experts=self.experts,
            mapped=self.mapped,
            temperature=self.temperature,
            top_k=self.top_k,
        )
