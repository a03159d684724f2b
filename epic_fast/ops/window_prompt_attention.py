"""Attention in windows that share their sample's prompts, as PyTorch sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from epic_fast.kernels.window_prompt_attention import reference  # pyright: ignore[reportMissingImports]
from epic_fast.ops.dispatch import Operation


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """As PyTorch's own attention under autocast: everything in its type, except float64, which is left alone."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [each if each.dtype == torch.float64 else each.to(dtype) for each in tensors]


window_prompt_attention = Operation(
    "window_prompt_attention", reference=reference.window_prompt_attention, autocast=_autocast
)
