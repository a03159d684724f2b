"""The specification of the similarity-based prompt interaction, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


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
) -> tuple[Tensor, Tensor]:
    """The public contract is that of :func:`epic_fast.functional.prompt_interaction`.

    Projections run in the type of the inputs; norms, similarity, softmaxes, mixes and the gated residuals in
    float32 (float64 for float64 inputs).  A norm below ``eps`` counts as ``eps``.
    """
    vision_in_text = linear(vision_prompt, vision_to_text_weight, vision_to_text_bias)
    text_in_vision = linear(text_prompt, text_to_vision_weight, text_to_vision_bias)

    wide = torch.promote_types(text_prompt.dtype, torch.float32)
    # Autocast would undo the explicit widening: the similarity is the place where low precision hurts.
    with torch.autocast(text_prompt.device.type, enabled=False):
        text, vision = text_prompt.to(wide), vision_prompt.to(wide)
        from_vision, from_text = vision_in_text.to(wide), text_in_vision.to(wide)
        text_direction = text / text.norm(dim=-1, keepdim=True).clamp_min(eps)
        vision_direction = from_vision / from_vision.norm(dim=-1, keepdim=True).clamp_min(eps)
        similarity = (text_direction @ vision_direction.transpose(-1, -2)) / temperature.to(wide)
        next_text = text + text_gate.to(wide) * (similarity.softmax(dim=2) @ from_vision)
        next_vision = vision + vision_gate.to(wide) * (similarity.softmax(dim=1).transpose(-1, -2) @ from_text)
    return next_text.to(text_prompt.dtype), next_vision.to(vision_prompt.dtype)
