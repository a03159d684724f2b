"""The specification of prompt-concatenated attention, in plain PyTorch.

It does build the concatenation, and works in any floating-point type including float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visibility(
    batch: int,
    prompts: int,
    tokens: int,
    *,
    prompt_rows: bool,
    prompt_mask: str,
    causal: bool,
    lengths: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Who sees whom: boolean ``(batch, rows, prompts + tokens)``, True = attend.

    Rows are the prompts (if ``prompt_rows``) followed by the tokens.
    """
    position = torch.arange(tokens, device=device)
    valid = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    if lengths is not None:
        valid = position[None, :] < lengths.to(device)[:, None]
    token_to_token = valid[:, None, :].expand(batch, tokens, tokens)
    if causal:
        token_to_token = token_to_token & (position[None, :] <= position[:, None])
    token_rows = torch.cat([token_to_token.new_ones(batch, tokens, prompts), token_to_token], dim=2)
    if not prompt_rows:
        return token_rows
    prompt_to_token = valid if prompt_mask == "full" else torch.zeros_like(valid)
    prompt_row = torch.cat([valid.new_ones(batch, prompts), prompt_to_token], dim=1)
    return torch.cat([prompt_row[:, None, :].expand(batch, prompts, prompts + tokens), token_rows], dim=1)


def prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor | None,
    prompt_key: Tensor,
    prompt_value: Tensor,
    *,
    prompt_mask: str = "full",
    causal: bool = False,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The public contract is that of :func:`epic_fast.functional.prompt_attention`.

    The softmax runs in float32 (float64 for float64 inputs).  Keys and values at or past a length are
    replaced by zeros first, so that whatever stands there, NaN included, cannot reach a valid row.
    """
    batch, _, tokens, head_dim = query.shape
    prompts = prompt_key.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    valid = None
    if lengths is not None:
        valid = (torch.arange(tokens, device=query.device)[None, :] < lengths.to(query.device)[:, None])[
            :, None, :, None
        ]
        query, key, value = (torch.where(valid, each, 0.0) for each in (query, key, value))

    keys = torch.cat([prompt_key.expand(batch, -1, -1, -1), key], dim=2)
    values = torch.cat([prompt_value.expand(batch, -1, -1, -1), value], dim=2)
    queries = query
    if prompt_query is not None:
        queries = torch.cat([prompt_query.expand(batch, -1, -1, -1), query], dim=2)

    visible = visibility(
        batch,
        prompts,
        tokens,
        prompt_rows=prompt_query is not None,
        prompt_mask=prompt_mask,
        causal=causal,
        lengths=lengths,
        device=query.device,
    )[:, None]
    scores = (queries @ keys.transpose(-1, -2)) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # A row that sees nothing gets a finite softmax here and is zeroed below: no NaN, not even in backward.
    sees_any = visible.any(dim=-1, keepdim=True)
    weights = scores.masked_fill(~visible & sees_any, float("-inf")).softmax(dim=-1).to(values.dtype)
    result = torch.where(sees_any, weights @ values, 0.0)

    first_token = 0 if prompt_query is None else prompts
    output = result[:, :, first_token:]
    if valid is not None:
        output = torch.where(valid, output, 0.0)
    return output, None if prompt_query is None else result[:, :, :prompts]
