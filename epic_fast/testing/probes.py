"""Inputs for the tiny towers, and ways to make towers and trainable tensors less special than fresh ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

END = 38
"""The end token, the highest id, of :func:`epic_fast.testing.tiny_tokenizer`."""


def make_batch(
    lengths: Sequence[int], *, width: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random pictures, and texts of these lengths (start and end included) padded on the right to ``width``."""
    random = torch.Generator().manual_seed(seed)
    width = max(lengths) if width is None else width
    input_ids = torch.randint(3, END, (len(lengths), width), generator=random)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    input_ids[:, 0] = 2
    input_ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = END
    return {
        "pixel_values": torch.randn(len(lengths), 3, 32, 32, generator=random).to(dtype),
        "input_ids": torch.where(mask, input_ids, 0),
        "attention_mask": mask.long(),
    }


@torch.no_grad()
def lively(backbone: Any, scale: float = 0.1, seed: int = 9) -> Any:
    """The same towers with weights large enough for attention to prefer some rows to others."""
    random = torch.Generator().manual_seed(seed)
    for model in backbone if isinstance(backbone, tuple) else (backbone,):
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=random)
    return backbone


@torch.no_grad()
def perturb(model: Any, scale: float = 0.3, seed: int = 3) -> Any:
    """The same model with its trainable tensors away from where they start: no gate and no bias at zero."""
    random = torch.Generator().manual_seed(seed)
    for _, parameter in model.trainable_parameters():
        parameter += scale * torch.randn(parameter.shape, generator=random).to(parameter.dtype)
    return model
