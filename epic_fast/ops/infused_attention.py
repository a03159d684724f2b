"""Attention over infused keys and values as PyTorch sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from epic_fast.kernels.infused_attention import reference  # pyright: ignore[reportMissingImports]
from epic_fast.ops.dispatch import Operation


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """Query, key and value in autocast's type, as in PyTorch's own attention; float64 and vectors are left alone."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    rows = [each if each.dtype == torch.float64 else each.to(dtype) for each in tensors[:3]]
    return [*rows, *tensors[3:]]


infused_attention = Operation("infused_attention", reference=reference.infused_attention, autocast=_autocast)
