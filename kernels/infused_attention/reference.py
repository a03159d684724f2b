"""The specification of attention over infused keys and values, in plain PyTorch.

It does infuse them one by one, and works in any floating-point type including float64.  The vector that the method
also adds to every key is left out: it changes no weight of the softmax (README.md beside this file).
"""

from __future__ import annotations

import torch
from torch import Tensor


def infused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_multiplier: Tensor,
    value_multiplier: Tensor,
    value_shift: Tensor,
    gate: Tensor,
    *,
    form: str = "residual",
    causal: bool = True,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The public contract is that of :func:`epic_fast.functional.infused_attention`.

    The infused keys and values are rounded to the type of ``key`` and ``value``; the softmax runs in float32 (float64
    for float64 inputs).  Rows at or past a length are replaced by zeros first, so that whatever stands there, NaN
    included, cannot reach a valid row.
    """
    batch, heads, rows, head_dim = query.shape
    tokens = key.shape[2]
    group = heads // max(key.shape[1], 1)
    position = torch.arange(tokens, device=query.device)
    # A single query is the last valid token's: it sees all that is valid.
    visible = position[None, :] < (position[:rows, None] + 1 if causal and rows != 1 else tokens)
    visible = visible.expand(batch, rows, tokens)
    if lengths is not None:
        lengths = lengths.to(query.device)
        valid = (position < lengths[:, None])[:, None, :, None]
        key, value = (torch.where(valid, each, 0.0) for each in (key, value))
        valid_rows = valid[:, :, :rows]
        query = torch.where(valid_rows, query, 0.0)
        visible = visible & valid[:, :, :, 0]

    key = _infuse(key, key_multiplier, None, gate, form).to(key.dtype)
    value = _infuse(value, value_multiplier, value_shift, gate, form).to(value.dtype)
    keys, values = (each.repeat_interleave(group, dim=1) for each in (key, value))

    scores = (query @ keys.transpose(-1, -2)) * (head_dim**-0.5 if scale is None else scale)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    sees_any = visible.any(dim=-1, keepdim=True)
    # A row that sees nothing gets a finite softmax here and is zeroed below: no NaN, not even in backward.
    weights = scores.masked_fill((~visible & sees_any)[:, None], float("-inf")).softmax(dim=-1).to(values.dtype)
    output = torch.where(sees_any[:, None], weights @ values, 0.0)
    return output if lengths is None else torch.where(valid_rows, output, 0.0)


def _infuse(rows: Tensor, multiplier: Tensor, shift: Tensor | None, gate: Tensor, form: str) -> Tensor:
    """``(B, Hk, N, D)``, in the widest of the types."""
    update = rows * multiplier[:, :, None]
    if shift is not None:
        update = update + shift[:, :, None]
    update = gate[:, :, None, None] * update
    return rows + update if form == "residual" else update
