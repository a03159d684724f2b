"""The confusion matrix of a single-label classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from epic_fast.errors import DataError
from epic_fast.plots.style import INK, QUIET, figure_style, new_figure, save_figure, shorten

_MOST_WITH_NUMBERS = 40


def confusion_matrix(
    labels: Sequence[int] | Any,
    predicted: Sequence[int] | Any,
    names: Sequence[str],
    png: str | Path,
    *,
    title: str | None = None,
) -> Path:
    """Draw which class was taken for which: colour = share of the true class's row, number = count.

    Args:
        labels: (N,) the true class of each sample, as an index into ``names``; a tensor, an array or a list.
        predicted: (N,) the predicted class of each, likewise.
        names: (K,) the classes' names.  Up to 40 classes the counts are written in the cells.
        png: the file to write.
        title: what stands above; the accuracy is added to it.

    Returns:
        The path of the picture.

    Raises:
        DataError: nothing to draw, lengths that differ, or an index outside ``names``.
    """
    counts = count_confusions(labels, predicted, len(names))
    return _draw(counts, names, png, title)


def count_confusions(labels: Any, predicted: Any, classes: int) -> np.ndarray:
    """(K, K) int64: how often the class of the row was taken for the class of the column."""
    true, guess = np.asarray(labels).reshape(-1), np.asarray(predicted).reshape(-1)
    if len(true) != len(guess):
        raise DataError(f"confusion_matrix was given {len(true)} labels and {len(guess)} predictions; give one each")
    if len(true) == 0:
        raise DataError("confusion_matrix was given no samples; give at least one label and its prediction")
    for what, values in (("label", true), ("prediction", guess)):
        if not np.issubdtype(values.dtype, np.integer):
            raise DataError(f"confusion_matrix: a {what} must be a class index, but they are {values.dtype}")
        if values.min() < 0 or values.max() >= classes:
            bad = int(values.min() if values.min() < 0 else values.max())
            raise DataError(
                f"confusion_matrix: the {what} {bad} names no class; there are {classes} (0..{classes - 1})"
            )
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (true, guess), 1)
    return counts


def _draw(counts: np.ndarray, names: Sequence[str], png: str | Path, title: str | None) -> Path:
    classes = len(names)
    rows = counts.sum(axis=1)
    share = counts / np.maximum(rows, 1)[:, None]
    with_numbers = classes <= _MOST_WITH_NUMBERS
    cell = float(np.clip(0.56 - 0.007 * classes, 0.34, 0.5)) if with_numbers else 13.5 / classes
    letters = float(np.clip(11 - 0.09 * classes, 8, 10)) if with_numbers else min(8.0, 72 * cell * 0.75)
    short = [shorten(name, 22) for name in names]
    longest = max(len(name) for name in short)
    body = max(cell * classes, 2.6)
    beside = (longest + 6) * letters * 0.55 / 72 + 0.5
    below = longest * letters * 0.55 / 72 * 0.71 + 0.6
    with figure_style():
        figure = new_figure(body + beside + 1.1, body + below + 0.45)
        axes = figure.add_subplot()
        axes.grid(visible=False)
        picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="equal")
        ticks = range(classes)
        slanted = {"rotation": 45 if with_numbers else 90, "ha": "right", "va": "center", "rotation_mode": "anchor"}
        axes.set_xticks(ticks, short, **slanted, fontsize=letters)
        axes.set_yticks(ticks, [f"{name} ({total})" for name, total in zip(short, rows, strict=True)], fontsize=letters)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
        if with_numbers:
            axes.grid(visible=True, which="minor", color="#D9DEE4", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true (samples)")
        correct, total = int(np.trace(counts)), int(counts.sum())
        heading = f"{title}: " if title else ""
        axes.set_title(f"{heading}{correct} of {total} right ({correct / total:.1%})", loc="left", pad=8)
        if with_numbers:
            for row, column in zip(*np.nonzero(counts), strict=True):
                dark = share[row, column] > 0.55
                axes.text(
                    column,
                    row,
                    f"{counts[row, column]}",
                    ha="center",
                    va="center",
                    fontsize=letters if counts[row, column] < 1000 else letters * 0.75,
                    fontweight="bold" if row == column else "normal",
                    color="white" if dark else INK,
                )
        bar = figure.colorbar(picture, ax=axes, shrink=0.6, aspect=24, pad=0.02, format=_percent)
        bar.set_label("share of the true class")
        bar.outline.set_edgecolor(QUIET)  # pyright: ignore[reportCallIssue]
        return save_figure(figure, png)


def _percent(value: float, _: int | None = None) -> str:
    return f"{value:.0%}"
