"""The specification of attention in windows that share their sample's prompts, in plain PyTorch.

It does copy the prompts into every window and pads bias and mask, and works in any floating-point type including
float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


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
) -> tuple[Tensor, Tensor]:
    """The public contract is that of :func:`epic_fast.functional.window_prompt_attention`.

    Scores are biased and go through the softmax in float32 (float64 for float64 inputs), where the mean over windows
    is taken too.
    """
    batch, _, prompts, head_dim = prompt_key.shape
    windows = query.shape[0] // max(batch, 1)
    factor = head_dim**-0.5 if scale is None else scale

    def joined(prompt: Tensor, tokens: Tensor) -> Tensor:
        # Windows are batch-major: window w of sample b is row b * windows + w, and so must its prompts be.
        return torch.cat([prompt.repeat_interleave(windows, dim=0), tokens], dim=2)

    scores = (joined(prompt_query, query) @ joined(prompt_key, key).transpose(-1, -2)) * factor
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(wide)
    if relative_position_bias is not None:
        scores = scores + pad(relative_position_bias.to(wide), (prompts, 0, prompts, 0))
    values = joined(prompt_value, value)
    sees_any = None
    if window_mask is not None:
        visible = pad(window_mask, (prompts, 0, prompts, 0), value=True).repeat(batch, 1, 1)[:, None]
        # A row that sees nothing gets a finite softmax here and is zeroed below: no NaN, not even in backward.
        sees_any = visible.any(dim=-1, keepdim=True)
        scores = scores.masked_fill(~visible & sees_any, float("-inf"))
    result = scores.softmax(dim=-1).to(values.dtype) @ values
    if sees_any is not None:
        result = torch.where(sees_any, result, 0.0)
    of_prompts = result[:, :, :prompts].unflatten(0, (batch, windows))
    return result[:, :, prompts:], of_prompts.to(wide).mean(dim=1).to(result.dtype)
