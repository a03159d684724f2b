"""Metrics of referring segmentation: intersection over union, overall and of each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from epic_fast.errors import ConfigError

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
MASK_METRICS = ("oiou", "miou", *(f"precision@{threshold}" for threshold in THRESHOLDS))


def mask_counts(predicted: Tensor, truth: Tensor) -> Tensor:
    """Pixels in both masks and in either of them, ``(B, 2)`` int64.

    Args:
        predicted: ``(B, H, W)`` booleans, or logits ``(B, 2, H, W)``: a pixel is said where the object's is larger.
        truth: ``(B, H, W)``, not 0 where the object is.

    Raises:
        ConfigError: shapes that do not fit.
    """
    if predicted.dim() == 4 and predicted.shape[1] == 2:
        predicted = predicted[:, 1] > predicted[:, 0]
    if predicted.shape != truth.shape or truth.dim() != 3:
        raise ConfigError(
            f"mask_counts: predictions {tuple(predicted.shape)} and masks {tuple(truth.shape)}; wanted (B, H, W) or "
            "(B, 2, H, W), and (B, H, W)"
        )
    predicted, truth = predicted.bool(), truth.bool()
    return torch.stack([(predicted & truth).sum((1, 2)), (predicted | truth).sum((1, 2))], dim=1)


def mask_metrics(counts: Tensor) -> dict[str, float]:
    """The metrics of referring segmentation.

    Args:
        counts: ``(N, 2)`` of :func:`mask_counts`.

    Returns:
        ``oiou``, all intersections over all unions (large objects weigh more); ``miou``, the mean over the samples;
        ``precision@t`` for t of 0.5 to 0.9, the share of samples whose intersection over union is at least t.  Where
        both masks are empty nothing is missed and nothing said in error: 1.

    Raises:
        ConfigError: no sample, or counts of another shape.
    """
    if counts.dim() != 2 or counts.shape[1] != 2 or len(counts) == 0:
        raise ConfigError(f"mask_metrics: counts of shape {tuple(counts.shape)}; wanted (N, 2) of at least one sample")
    counts = counts.detach().double().cpu()
    both, either = counts.unbind(dim=1)
    each = torch.where(either > 0, both / either.clamp_min(1), torch.ones_like(both))
    union = float(either.sum())
    found = {"oiou": float(both.sum()) / union if union else 1.0, "miou": float(each.mean())}
    # 3 / 5 is at least 0.6, though neither is a number of the machine.
    return found | {f"precision@{t}": float((each >= t - 1e-9).double().mean()) for t in THRESHOLDS}
