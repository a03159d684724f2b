"""Plain execution: the backbone's own layers, with prompt rows put in front of the tokens and taken out again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def call_layer(layer: nn.Module, hidden: Tensor, mask: Any, **kwargs: Any) -> Tensor:
    """One unmodified transformer layer on ``hidden`` ``(B, N, D)``; some releases return a tuple."""
    output = layer(hidden, mask, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def call_layer_with_prompts(
    layer: nn.Module, hidden: Tensor, prompts: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """The same layer on ``[prompts ; tokens]``.

    Args:
        layer: the layer; its weights are used as they are.
        hidden: ``(B, N, D)`` tokens.
        prompts: ``(B, P, D)``.
        mask: what the layer's attention takes for ``P + N`` rows, or None.

    Returns:
        tokens ``(B, N, D)`` and prompts ``(B, P, D)`` after the layer.
    """
    length = prompts.shape[1]
    output = call_layer(layer, torch.cat([prompts.to(hidden.dtype), hidden], dim=1), mask, **kwargs)
    return output[:, length:], output[:, :length]


def prompted_visibility(valid: Tensor, prompts: int, *, causal: bool, prompt_mask: str) -> Tensor:
    """Who sees whom once prompts stand in front: boolean ``(B, 1, P + N, P + N)``, True = attend.

    Token rows see every prompt and the valid tokens (those up to themselves if ``causal``).  Prompt rows see
    every prompt and, with ``prompt_mask="full"``, every valid token; with ``"prefix"``, none.

    Args:
        valid: ``(B, N)`` boolean, True for tokens that are not padding.
        prompts: P.
    """
    batch, tokens = valid.shape
    token_to_token = valid[:, None, :].expand(batch, tokens, tokens)
    if causal:
        token_to_token = token_to_token & valid.new_ones(tokens, tokens).tril()
    prompt_to_token = valid if prompt_mask == "full" else torch.zeros_like(valid)
    token_columns = torch.cat([prompt_to_token[:, None, :].expand(batch, prompts, tokens), token_to_token], dim=1)
    prompt_columns = valid.new_ones(batch, prompts + tokens, prompts)
    return torch.cat([prompt_columns, token_columns], dim=2)[:, None]
