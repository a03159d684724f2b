"""The specification of an infusion's gate, in plain PyTorch, good in float64."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8
"""Norms below it count as it, as in PyTorch's own cosine."""


def infusion_gate(value: Tensor, value_shift: Tensor, head_bias: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """The public contract is that of :func:`epic_fast.functional.infusion_gate`.

    It does build the shift once a token.  Everything runs in float32 (float64 where one of the inputs is); tokens at or
    past a length are replaced by zeros first.
    """
    wide = torch.float32
    for each in (value, value_shift, head_bias):
        wide = torch.promote_types(wide, each.dtype)
    # Autocast would undo the explicit widening.
    with torch.autocast(value.device.type, enabled=False):
        tokens = value.to(wide)
        shifts = value_shift.to(wide)[:, :, None].expand_as(tokens)
        if lengths is not None:
            position = torch.arange(value.shape[2], device=value.device)
            valid = (position < lengths.to(value.device)[:, None])[:, None, :, None]
            tokens, shifts = (torch.where(valid, each, 0.0) for each in (tokens, shifts))
        tokens, shifts = tokens.flatten(2), shifts.flatten(2)
        norms = [torch.linalg.vector_norm(each, dim=-1).clamp_min(EPS) for each in (tokens, shifts)]
        cosine = (tokens * shifts).sum(dim=-1) / (norms[0] * norms[1])
        gate = torch.sigmoid(head_bias.to(wide) + cosine)
    return gate.to(head_bias.dtype)
