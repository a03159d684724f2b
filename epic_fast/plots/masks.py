"""A sheet of masks: picture, expression, true and predicted mask side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from epic_fast.errors import DataError
from epic_fast.plots.style import BLUE, INK, QUIET, VERMILLION, figure_style, new_figure, save_figure, wrap_lines

_PIXELS = 320
_SIDE, _GAP, _TEXT, _HEAD = 1.35, 0.06, 0.40, 0.30  # inches
_LETTERS = 58


@dataclass(frozen=True)
class MaskItem:
    """One row of a sheet.

    Attributes:
        image: a PIL picture.
        text: the expression.
        truth: booleans ``(H, W)`` of the picture's size, or None if it is unknown.
        predicted: the same.
    """

    image: Any
    text: str
    truth: Any
    predicted: Any

    @property
    def iou(self) -> float | None:
        """Intersection over union; 1 where both are empty, None without a truth."""
        if self.truth is None:
            return None
        either = int(np.logical_or(self.truth, self.predicted).sum())
        return float(np.logical_and(self.truth, self.predicted).sum()) / either if either else 1.0


def mask_sheet(
    items: Sequence[MaskItem], png: str | Path, *, columns: int | None = None, title: str | None = None
) -> Path:
    """Draw for each item its picture, the true mask and the predicted one, below its expression.

    The picture fades outside of a mask, whose outline is blue where it is the truth and orange-red where it is the
    prediction (two colours of Okabe and Ito); each panel says which it is, the prediction also how well it overlaps.

    Args:
        items: what to show, in this order, row by row.
        png: the file to write.
        columns: items a row; by default 1 to 3.
        title: what stands above the sheet.

    Returns:
        The path of the picture.

    Raises:
        DataError: there is nothing to show, or a mask of another size than its picture.
    """
    if not items:
        raise DataError("mask_sheet was given no items; give at least one picture")
    for item in items:
        for name, mask in (("true", item.truth), ("predicted", item.predicted)):
            if mask is not None and np.shape(mask) != (item.image.height, item.image.width):
                raise DataError(
                    f"mask_sheet: the {name} mask of {item.text!r} has shape {np.shape(mask)}, its picture is "
                    f"{item.image.height} high and {item.image.width} wide; wanted the same"
                )
    columns = columns or min(3, math.ceil(len(items) / 4))
    rows = math.ceil(len(items) / columns)
    cell = (3 * _SIDE + 4 * _GAP, _TEXT + _SIDE + 2 * _GAP)
    head = _HEAD + (0.34 if title else 0.0)
    width, height = columns * cell[0], rows * cell[1] + head
    with figure_style():
        figure = new_figure(width, height, layout=None)
        if title:
            figure.text(0.5, 1 - 0.08 / height, title, ha="center", va="top", fontsize=12, fontweight="bold")
        for column in range(columns):
            for place, (name, colour) in enumerate((("picture", INK), ("truth", BLUE), ("prediction", VERMILLION))):
                left = column * cell[0] + _GAP + place * (_SIDE + _GAP) + _SIDE / 2
                line = 1 - (head - 0.14) / height
                figure.text(left / width, line, name, ha="center", va="center", fontsize=9.5, color=colour)
        for number, item in enumerate(items):
            row, column = divmod(number, columns)
            top, left = head + row * cell[1], column * cell[0] + _GAP
            said = wrap_lines(item.text, _LETTERS, 2)
            figure.text(left / width, 1 - (top + 0.03) / height, "\n".join(said), ha="left", va="top", fontsize=8.5)
            panels = ((None, INK), (item.truth, BLUE), (item.predicted, VERMILLION))
            for place, (mask, colour) in enumerate(panels):
                corner = (left + place * (_SIDE + _GAP), top + _TEXT + _SIDE)
                axes = figure.add_axes((corner[0] / width, 1 - corner[1] / height, _SIDE / width, _SIDE / height))
                axes.set_axis_off()
                _draw(axes, item, mask if place else None, colour, place)
                if place == 2 and item.iou is not None:
                    # Above the panel, whose corners may be what is to be seen.
                    right, bottom = corner[0] + _SIDE, corner[1] - _SIDE - 0.03
                    said = f"IoU {item.iou:.2f}"
                    figure.text(right / width, 1 - bottom / height, said, ha="right", va="bottom", fontsize=7.5)
        return save_figure(figure, png)


def _draw(axes: Any, item: MaskItem, mask: Any, colour: str, place: int) -> None:
    picture = item.image.convert("RGB")
    picture.thumbnail((_PIXELS, _PIXELS))
    pixels = np.asarray(picture, dtype=np.float64) / 255
    if mask is not None:
        mask = np.asarray(mask, dtype=bool)
        rows = np.linspace(0, mask.shape[0] - 1, pixels.shape[0]).round().astype(int)
        columns = np.linspace(0, mask.shape[1] - 1, pixels.shape[1]).round().astype(int)
        small = mask[np.ix_(rows, columns)]
        pixels = np.where(small[:, :, None], pixels, 0.25 * pixels + 0.75)
        if small.any() and not small.all():
            axes.contour(small.astype(float), levels=[0.5], colors=[colour], linewidths=1.2)
    elif place:
        axes.text(0.5, 0.5, "unknown", ha="center", va="center", color=QUIET, fontsize=9, transform=axes.transAxes)
        pixels = np.ones_like(pixels)
    axes.imshow(pixels, aspect="equal", zorder=0)
