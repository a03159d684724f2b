"""Metrics by problem type, by torchmetrics, and the decision threshold of multi-label models."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from epic_fast.errors import ConfigError
from epic_fast.training.masks import MASK_METRICS, mask_counts, mask_metrics

# The names by problem type; the first one chooses the best epoch unless the configuration names another.
METRICS = {
    "single_label_classification": ("accuracy", "f1_macro"),
    "multi_label_classification": ("f1_micro", "f1_macro"),
    "regression": ("mae", "mse", "pearson"),
    "segmentation": MASK_METRICS,
}
LOWER_IS_BETTER = ("loss", "mae", "mse")


def compute_metrics(
    logits: Tensor, labels: Tensor, problem_type: str, *, num_labels: int, threshold: float | None = 0.5
) -> dict[str, float]:
    """The metrics of predictions.

    Args:
        logits: ``(N, K)`` scores before softmax or sigmoid; for regression the values, ``(N, K)`` or ``(N,)``; for
            segmentation ``(N, 2, H, W)``.
        labels: class ids ``(N,)``; 0/1 ``(N, K)`` for multi-label; values ``(N,)`` or ``(N, K)`` for regression; masks
            ``(N, H, W)`` for segmentation.
        problem_type: one of Hugging Face's three, or ``"segmentation"``.
        num_labels: K.
        threshold: multi-label: a class is said where its probability is above this; None is 0.5.

    Returns:
        Single-label: ``accuracy`` (share of samples that are right) and ``f1_macro`` (mean over the classes that
        occur among labels or predictions).  Multi-label: ``f1_micro``, ``f1_macro`` (mean over all K classes; one
        that is neither there nor said counts 0) and the ``threshold``.  Regression: ``mae``, ``mse`` and
        ``pearson`` (mean over the columns; NaN where a column does not vary).  Segmentation: see :func:`mask_metrics`.

    Raises:
        ConfigError: shapes that do not fit, an unknown problem type, no sample.
    """
    if problem_type not in METRICS:
        raise ConfigError(f"problem_type is {problem_type!r}; wanted one of {', '.join(METRICS)}")
    logits, labels = logits.detach().float().cpu(), labels.detach().cpu()
    if len(logits) == 0 or len(logits) != len(labels):
        raise ConfigError(
            f"metrics of {len(logits)} predictions and {len(labels)} labels; wanted as many of one as of the other, "
            "and at least one"
        )
    if problem_type == "segmentation":
        return mask_metrics(mask_counts(logits, labels))
    if problem_type == "regression":
        return _regression(logits, labels.float())
    if logits.ndim != 2 or logits.shape[1] != num_labels:
        raise ConfigError(f"logits have shape {tuple(logits.shape)}; wanted (N, {num_labels}), one column a class")
    if problem_type == "single_label_classification":
        return _single_label(logits, labels, num_labels)
    if labels.shape != logits.shape:
        raise ConfigError(f"labels have shape {tuple(labels.shape)}; wanted {tuple(logits.shape)}, 0 or 1 a class")
    return _multi_label(logits, labels, num_labels, 0.5 if threshold is None else threshold)


def tune_threshold(logits: Tensor, labels: Tensor) -> float:
    """The probability above which to say a class so that micro-F1 is highest, one for all classes.

    Every cut between two neighbouring probabilities is tried; among equally good ones that nearest to 0.5 wins.

    Args:
        logits: ``(N, K)`` before the sigmoid.
        labels: 0/1 ``(N, K)``.

    Returns:
        A number in [0, 1]; 0.5 where no label is 1 or there is no sample.
    """
    if logits.shape != labels.shape:
        raise ConfigError(
            f"tune_threshold: logits have shape {tuple(logits.shape)}, labels {tuple(labels.shape)}; wanted the same"
        )
    probabilities = logits.detach().float().cpu().sigmoid().flatten()
    positive = (labels.detach().cpu() > 0.5).flatten()
    if not bool(positive.any()):
        return 0.5
    probabilities, order = probabilities.sort(descending=True)
    hits = positive[order].double().cumsum(0)
    said = torch.arange(1, len(hits) + 1, dtype=torch.float64)
    f1 = 2 * hits / (said + hits[-1])
    lower = torch.cat([probabilities[1:], probabilities.new_zeros(1)])
    f1[probabilities <= lower] = -1.0  # between equal probabilities nothing can be cut
    best = (f1 == f1.max()).nonzero().flatten()
    # A cut anywhere in [lower, probability) says the same; take its middle, or 0.5 where that lies inside.
    upper, lower = probabilities[best], lower[best]
    middle = (upper + lower) / 2
    middle = torch.where(middle < upper, middle, lower)
    middle = torch.where((lower <= 0.5) & (upper > 0.5), torch.full_like(middle, 0.5), middle)
    return float(middle[(middle - 0.5).abs().argmin()])


def choose_metric(name: str | None, problem_type: str) -> str:
    """The metric that says which epoch is the best."""
    if problem_type not in METRICS:
        raise ConfigError(f"the model's problem_type is {problem_type!r}; wanted one of {', '.join(METRICS)}")
    known = (*METRICS[problem_type], "loss")
    if name is None:
        return known[0]
    if name not in known:
        raise ConfigError(
            f"TrainingConfig.metric is {name!r}; for {problem_type} wanted one of {', '.join(known)}, or None"
        )
    return name


def is_better(name: str, value: float, best: float | None) -> bool:
    """Whether ``value`` beats ``best``; a tie does not, and a NaN beats only nothing at all."""
    if best is None:
        return True
    if math.isnan(value):
        return False
    if math.isnan(best):
        return True
    return value < best if name in LOWER_IS_BETTER else value > best


def _single_label(logits: Tensor, labels: Tensor, num_labels: int) -> dict[str, float]:
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

    predicted = logits.argmax(dim=1)
    return {
        "accuracy": float(multiclass_accuracy(predicted, labels, num_classes=num_labels, average="micro")),
        "f1_macro": float(multiclass_f1_score(predicted, labels, num_classes=num_labels, average="macro")),
    }


def _multi_label(logits: Tensor, labels: Tensor, num_labels: int, threshold: float) -> dict[str, float]:
    from torchmetrics.functional.classification import multilabel_f1_score

    said = (logits.sigmoid() > threshold).long()
    truth = (labels > 0.5).long()
    return {
        "f1_micro": float(multilabel_f1_score(said, truth, num_labels=num_labels, average="micro")),
        "f1_macro": float(multilabel_f1_score(said, truth, num_labels=num_labels, average="macro")),
        "threshold": float(threshold),
    }


def _regression(values: Tensor, labels: Tensor) -> dict[str, float]:
    from torchmetrics.functional.regression import mean_absolute_error, mean_squared_error, pearson_corrcoef

    values, labels = values.reshape(len(values), -1), labels.reshape(len(labels), -1)
    if values.shape != labels.shape:
        raise ConfigError(f"{values.shape[1]} values and {labels.shape[1]} labels a sample; wanted as many")
    if len(values) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a column without variance gives NaN, which is what we say it gives
            pearson = float(pearson_corrcoef(values.squeeze(1), labels.squeeze(1)).mean())
    else:
        pearson = math.nan
    return {
        "mae": float(mean_absolute_error(values, labels)),
        "mse": float(mean_squared_error(values, labels)),
        "pearson": pearson,
    }
