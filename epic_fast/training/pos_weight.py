"""The weight of positives in a multi-label loss, out of the training labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from epic_fast.errors import ConfigError, DataError
from epic_fast.training.seeding import host_randomness_kept


def resolve_pos_weight(model: Any, train: Any) -> None:
    """Where ``model.pos_weight`` is "auto", set it to :func:`balanced_pos_weight` of the training labels."""
    if not isinstance(getattr(model, "pos_weight", None), str):
        return
    if model.problem_type != "multi_label_classification":
        raise ConfigError(
            f"pos_weight is 'auto' for problem_type {model.problem_type!r}; it is for multi_label_classification only"
        )
    model.set_pos_weight(balanced_pos_weight(multi_hot_labels(train, model.num_labels)))


def balanced_pos_weight(labels: Tensor) -> Tensor:
    """Negatives by positives of each class, within [1/100, 100]; 1 for a class without positives.

    Args:
        labels: 0/1 ``(N, K)``.

    Returns:
        float32 ``(K,)``.
    """
    positives = (labels > 0.5).double().sum(0)
    weight = (len(labels) - positives) / positives.clamp(min=1.0)
    return torch.where(positives > 0, weight.clamp(0.01, 100.0), torch.ones_like(weight)).float()


def multi_hot_labels(dataset: Any, num_labels: int) -> Tensor:
    """``(N, K)`` of 0 and 1 from ``dataset.label_ids()``, which may hold 0/1 rows or lists of class ids, or from the
    samples themselves where the data set has no such method (dicts with ``labels``, or objects with ``label``)."""
    if hasattr(dataset, "label_ids"):
        rows = dataset.label_ids()
    else:
        with host_randomness_kept():
            rows = [_label_of(dataset[index]) for index in range(len(dataset))]
    rows = [torch.as_tensor(row) for row in rows]
    if all(_may_be_multi_hot(row, num_labels) for row in rows) and not all(_is_rising(row) for row in rows):
        return torch.stack(rows).float()
    labels = torch.zeros(len(rows), num_labels)
    for index, row in enumerate(rows):
        ids = row.long()
        if row.ndim != 1 or bool(((ids < 0) | (ids >= num_labels)).any()):
            raise DataError(
                f"pos_weight='auto': the labels of training sample {index} are {row.tolist()}; wanted {num_labels} "
                f"values 0 or 1, or a list of class ids below {num_labels}"
            )
        labels[index, ids] = 1.0
    return labels


def _may_be_multi_hot(row: Tensor, num_labels: int) -> bool:
    return row.shape == (num_labels,) and bool(((row == 0) | (row == 1)).all())


def _is_rising(row: Tensor) -> bool:
    """Whether whole numbers rise, as class ids do: of 0/1 rows only (0,) and (0, 1) look like that."""
    return not row.is_floating_point() and bool((row[1:] > row[:-1]).all())


def _label_of(sample: Any) -> Any:
    label = sample.get("labels") if isinstance(sample, dict) else getattr(sample, "label", None)
    if label is None:
        raise DataError(
            "pos_weight='auto' needs the training labels: give the data set a label_ids() method or its samples "
            "'labels', or give pos_weight as numbers"
        )
    return label
