"""The specification of rotary positions over packed heads, and of their gradient, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_heads(rows: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> Tensor:
    """The public contract is that of :func:`epic_fast.ops.rotary.rotate_heads`; in float32, rounded once."""
    turned = rows[:, :, :rotated]
    wide = torch.promote_types(rows.dtype, torch.float32)
    first, second = turned.to(wide).chunk(2, dim=-1)
    cos, sin = (each.to(wide)[:, None] for each in (cos, sin))
    turned.copy_(torch.cat([first, second], dim=-1) * cos + torch.cat([-second, first], dim=-1) * sin)
    return rows


def join_rotated_back(query: Tensor | None, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The public contract is that of :func:`epic_fast.ops.rotary.join_rotated_back`; in float32, rounded once."""
    wide = torch.promote_types(key.dtype, torch.float32)
    cos, sin = (each.to(wide) for each in (cos, sin))
    parts = []
    for each in (query, key):
        if each is not None:
            grad = each.to(wide)
            first, second = (grad * sin).chunk(2, dim=-1)
            parts.append((grad * cos + torch.cat([second, -first], dim=-1)).to(key.dtype))
    return torch.cat([*parts, value], dim=1).transpose(1, 2).contiguous()
