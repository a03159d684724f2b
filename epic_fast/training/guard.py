"""Finding where a number stopped being finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def first_non_finite(model: nn.Module, batch: Mapping[str, Any], logits: Tensor | None, loss: Tensor) -> str | None:
    """The first tensor, in the order in which a step makes them, that holds a NaN or an infinity: the batch, the
    trainable parameters, the logits, the loss, the gradients.  None where all are finite."""
    for name, value in batch.items():
        if isinstance(value, Tensor) and _bad(value):
            return f"{_what(value)} in the batch's {name!r}"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and _bad(parameter):
            return f"{_what(parameter)} in parameter {name!r}"
    if logits is not None and _bad(logits):
        return f"{_what(logits)} in the logits"
    if _bad(loss):
        return f"{_what(loss)} as the loss, from finite logits"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and _bad(parameter.grad):
            return f"{_what(parameter.grad)} in the gradient of parameter {name!r}"
    return None


def _bad(value: Tensor) -> bool:
    return value.is_floating_point() and not bool(torch.isfinite(value).all())


def _what(value: Tensor) -> str:
    return "NaN" if bool(torch.isnan(value).any()) else "an infinity"
