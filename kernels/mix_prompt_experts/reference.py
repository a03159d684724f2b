"""The specification of the mixture of prompt experts, in plain PyTorch, good in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def mix_prompt_experts(
    router_logits: Tensor, experts: Tensor, *, temperature: float = 0.1, top_k: int | None = None
) -> tuple[Tensor, Tensor]:
    """The public contract is that of :func:`epic_fast.functional.mix_prompt_experts`.

    Softmax and mixture run in float32 (float64 where one of the inputs is).
    """
    wide = torch.promote_types(torch.promote_types(router_logits.dtype, experts.dtype), torch.float32)
    # Autocast would undo the explicit widening.
    with torch.autocast(router_logits.device.type, enabled=False):
        logits = router_logits.to(wide) / temperature
        if top_k is not None and top_k < experts.shape[0]:
            # Stable: of equal logits the first ones are taken.
            order = logits.sort(dim=-1, descending=True, stable=True).indices
            left_out = torch.ones_like(logits, dtype=torch.bool).scatter(-1, order[:, :top_k], False)
            logits = logits.masked_fill(left_out, float("-inf"))
        scores = logits.softmax(dim=-1)
        prompts = (scores @ experts.to(wide).flatten(1)).unflatten(1, experts.shape[1:])
    return prompts.to(experts.dtype), scores.to(router_logits.dtype)
