"""The demo's table: what each method answered on the test pairs, in numbers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics.functional.classification import multiclass_f1_score

from epic_fast.demo.rivals import Result, accuracy
from epic_fast.demo.tasks import Task


def score(task: Task, result: Result, frozen_parameters: int) -> dict[str, Any]:
    """One row: accuracy (also on each group of test pairs), macro-F1, parameters, seconds.

    Args:
        frozen_parameters: of the towers, to which the rivals' own are added.
    """
    labels = task.test.labels
    predictions: Tensor = result.predictions.cpu()
    f1 = multiclass_f1_score(predictions, labels, num_classes=len(task.labels), average="macro")
    total = result.total or frozen_parameters + result.trainable
    return {
        "method": result.name,
        "accuracy": accuracy(predictions, labels),
        **{name: accuracy(predictions[mask], labels[mask]) for name, mask in task.groups.items()},
        "f1_macro": float(f1),
        "validation": result.validation,
        "trainable": result.trainable,
        "share": result.trainable / total,
        "seconds": result.seconds,
        "chosen": result.chosen,
    }


def cells(row: dict[str, Any], groups: list[str]) -> list[str]:
    """A row as the table prints it."""
    return [
        row["method"],
        f"{row['accuracy']:.3f}",
        *(f"{row[group]:.3f}" for group in groups),
        f"{row['f1_macro']:.3f}",
        f"{row['trainable']:,}",
        f"{100 * row['share']:.2f} %",
        f"{row['seconds']:.1f} s",
    ]


def headings(groups: list[str]) -> list[str]:
    """The names of the columns of :func:`cells`."""
    return ["method", "accuracy", *groups, "macro-F1", "trained", "of all", "time"]
