"""The last layer computes only what is read: attention of a few rows over all keys, by batched products alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epic_fast.ops.packed_attention import visible_keys

MOST_ROWS = 32


@dataclass(frozen=True)
class RowSelection:
    """The rows of ``[prompts ; tokens]`` that are read after the last layer.

    Attributes:
        index: ``(B,)`` the token row of each sample; None: the first token of every sample.
        prompts: whether the prompts' rows are read too; they come first.
    """

    index: Tensor | None = None
    prompts: bool = False

    def take(self, hidden: Tensor, prompts: int) -> Tensor:
        """The selected rows of ``(B, P + N, D)`` in a new tensor ``(B, R, D)``."""
        if self.index is None:
            first = 0 if self.prompts else prompts
            return hidden[:, first : prompts + 1].clone(memory_format=torch.contiguous_format)
        batch = torch.arange(len(hidden), device=hidden.device)
        row = hidden[batch, self.index + prompts][:, None]
        return torch.cat([hidden[:, :prompts], row], dim=1) if self.prompts and prompts else row

    def add(self, hidden: Tensor, values: Tensor, prompts: int) -> Tensor:
        """Adds ``(B, R, D)`` in place to the selected rows of ``(B, P + N, D)``, or of ``(B, P, D)`` those in it."""
        read = prompts if self.prompts else 0
        if read:
            hidden[:, :prompts] += values[:, :prompts]
        if hidden.shape[1] > prompts:
            if self.index is None:
                hidden[:, prompts] += values[:, read]
            else:
                # One row a sample: no two threads meet, so the sum is the same every time.
                batch = torch.arange(len(hidden), device=hidden.device)
                place = (batch, self.index + prompts)
                hidden.index_put_(place, hidden[place] + values[:, read])
        return hidden

    def visible(
        self, rows: int, prompts: int, lengths: Tensor | None, prefix: bool, causal: bool, device: torch.device
    ) -> Tensor | None:
        """Which keys the selected rows see: boolean ``(B or 1, R, S)``; None where all see all."""
        if lengths is None and not causal and not (prefix and self.prompts and prompts):
            return None
        limit = visible_keys(rows, prompts, lengths, prefix, causal, device)
        batch = 1 if self.index is None else len(self.index)
        limit = self.take(limit.expand(max(batch, len(limit)), -1)[:, :, None], prompts)
        return torch.arange(rows, device=device) < limit


def row_attention_forward(
    query: Tensor, key_value: Tensor, heads: int, scale: float, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of R rows a sample over S keys.

    The heads' queries are laid out block-diagonally, so that each product takes keys and values where they lie.

    Args:
        query: ``(B, R, H * head_dim)``.
        key_value: ``(B, S, 2, H * head_dim)``.
        visible: boolean ``(B or 1, R, S)``, or None.

    Returns:
        The output ``(B, R, H * head_dim)`` and the probabilities ``(B, S, R * H)`` in float32 (float64 for float64).
    """
    key, value = key_value.unbind(dim=2)
    scores = _product(key, _spread(query, heads)) * scale
    if visible is not None:
        hidden = ~visible.transpose(1, 2).repeat_interleave(heads, dim=2)
        scores = scores.masked_fill(hidden, float("-inf"))
    probabilities = scores.softmax(dim=1)
    mixed = torch.bmm(probabilities.to(value.dtype).transpose(1, 2), value)
    return _gather(mixed, heads), probabilities


def row_attention_backward(
    grad: Tensor, query: Tensor, key_value: Tensor, probabilities: Tensor, heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``query`` and of ``key_value`` in new tensors."""
    key, value = key_value.unbind(dim=2)
    result = torch.empty_like(key_value)
    spread = _spread(grad, heads)
    grad_probabilities = _product(value, spread)
    delta = (probabilities * grad_probabilities).sum(dim=1, keepdim=True)
    grad_scores = (probabilities * (grad_probabilities - delta) * scale).to(query.dtype)
    torch.bmm(probabilities.to(grad.dtype), spread.transpose(1, 2), out=result[:, :, 1])
    torch.bmm(grad_scores, _spread(query, heads).transpose(1, 2), out=result[:, :, 0])
    return _gather(torch.bmm(grad_scores.transpose(1, 2), key), heads), result


def _spread(rows: Tensor, heads: int) -> Tensor:
    """``(B, R, H * d)`` to ``(B, H * d, R * H)``: head h of row r stands in column (r, h), zeros elsewhere."""
    batch, count, inner = rows.shape
    parts = rows.view(batch, count, heads, inner // heads)
    spread = rows.new_zeros(batch, count, heads, heads, inner // heads)
    spread.diagonal(dim1=2, dim2=3).copy_(parts.transpose(2, 3))
    return spread.view(batch, count * heads, inner).transpose(1, 2)


def _gather(mixed: Tensor, heads: int) -> Tensor:
    """``(B, R * H, H * d)`` to ``(B, R, H * d)``: each head's own part of what was mixed with its weights."""
    batch, columns, inner = mixed.shape
    parts = mixed.view(batch, columns // heads, heads, heads, inner // heads)
    return parts.diagonal(dim1=2, dim2=3).transpose(2, 3).reshape(batch, columns // heads, inner)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of two batches in at least float32."""
    wide = torch.promote_types(left.dtype, torch.float32)
    if left.dtype == wide:
        return torch.bmm(left, right)
    if left.device.type == "cpu":
        return torch.bmm(left.to(wide), right.to(wide))
    return torch.bmm(left, right, out_dtype=wide)
