"""A contact sheet: pictures with their text, the predicted and the true label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.patches import Rectangle

from epic_fast.errors import DataError
from epic_fast.plots.style import GREEN, INK, QUIET, VERMILLION, figure_style, new_figure, save_figure, wrap_lines

_PIXELS = 360
_LABEL_LETTERS = 24
_TEXT_LETTERS = 32
_LABEL_LINE, _TEXT_LINE = 0.092, 0.072  # heights, the picture's side being 1
_SIDE, _GAP, _HEADING = 2.0, 0.14, 0.34  # inches


@dataclass(frozen=True)
class SheetItem:
    """One picture of a contact sheet.

    Attributes:
        image: a PIL picture.
        text: the text of the pair; cut to two or three lines.
        label: the true label (or labels) as it shall read, or None if it is unknown.
        predicted: the predicted label as it shall read.
        probability: the model's probability of the predicted label, in [0, 1], or None.
        correct: whether the prediction counts as right; None compares ``label`` with ``predicted``.
    """

    image: Any
    text: str
    label: str | None
    predicted: str
    probability: float | None = None
    correct: bool | None = None

    @property
    def right(self) -> bool | None:
        """Whether the prediction is right; None if that cannot be said."""
        if self.correct is not None or self.label is None:
            return self.correct
        return self.label == self.predicted


def contact_sheet(
    items: Sequence[SheetItem],
    png: str | Path,
    *,
    columns: int | None = None,
    title: str | None = None,
    headings: Sequence[str] | None = None,
) -> Path:
    """Draw pictures in a grid, each with its text, the predicted and the true label.

    A right prediction has a green frame and a tick, a wrong one an orange-red frame and a cross (the two colours of
    Okabe and Ito that stay apart for colour-blind readers).

    Args:
        items: what to show, in this order, row by row.
        png: the file to write.
        columns: pictures a row; by default 3 to 6, so that few places stay empty.
        title: what stands above the sheet.
        headings: what stands above each row.

    Returns:
        The path of the picture.

    Raises:
        DataError: there is nothing to show, or not as many headings as rows.
    """
    if not items:
        raise DataError("contact_sheet was given no items; give at least one picture")
    columns = columns or _columns(len(items))
    rows = math.ceil(len(items) / columns)
    if headings is not None and len(headings) != rows:
        raise DataError(f"contact_sheet was given {len(headings)} headings for {rows} rows; give one a row, or none")
    captions = [_caption(item) for item in items]
    below = max(caption.height for caption in captions)
    head, cell = 0.42 if title else 0.06, _SIDE * (1 + below)
    above = _HEADING if headings is not None else 0.0
    width, height = columns * (_SIDE + _GAP) + _GAP, rows * (above + cell + _GAP) + head
    with figure_style():
        figure = new_figure(width, height, layout=None)
        if title:
            figure.text(0.5, 1 - 0.12 / height, title, ha="center", va="top", fontsize=12, fontweight="bold")
        for row, heading in enumerate(headings or ()):
            line = 1 - (head + row * (above + cell + _GAP) + 0.6 * above) / height
            figure.text(_GAP / width, line, heading, ha="left", va="center", fontsize=10.5, fontweight="bold")
        for place, (item, caption) in enumerate(zip(items, captions, strict=True)):
            row, column = divmod(place, columns)
            left, top = _GAP + column * (_SIDE + _GAP), head + above + row * (above + cell + _GAP)
            size = (_SIDE / width, cell / height)
            axes = figure.add_axes((left / width, 1 - top / height - size[1], *size))
            axes.set_axis_off()
            _draw(axes, item, caption)
            axes.set(xlim=(0, 1), ylim=(-below, 1), aspect="equal")
        return save_figure(figure, png)


@dataclass(frozen=True)
class _Caption:
    """The lines below a picture."""

    said: list[str]
    true: list[str]
    text: list[str]

    @property
    def height(self) -> float:
        """In units of the picture's side."""
        return 0.04 + _LABEL_LINE * (len(self.said) + len(self.true)) + _TEXT_LINE * len(self.text)


def _caption(item: SheetItem) -> _Caption:
    mark = {True: "✓ ", False: "✗ ", None: ""}[item.right]
    share = "" if item.probability is None else f" {item.probability:.0%}"
    said = wrap_lines(mark + item.predicted, _LABEL_LETTERS - len(share), 2)
    said[-1] += share
    true = wrap_lines(f"true: {item.label}", _LABEL_LETTERS + 2, 2) if item.right is False else []
    return _Caption(said, true, wrap_lines(item.text, _TEXT_LETTERS, 2 if true else 3))


def _columns(count: int) -> int:
    wanted = math.sqrt(1.5 * count)
    return min(range(min(count, 3), min(count, 6) + 1), key=lambda each: (-count % each, abs(each - wanted)))


def _draw(axes: Any, item: SheetItem, caption: _Caption) -> None:
    colour = {True: GREEN, False: VERMILLION, None: QUIET}[item.right]
    picture = item.image.convert("RGB")
    picture.thumbnail((_PIXELS, _PIXELS))
    longest = max(picture.size)
    width, height = 0.94 * picture.width / longest, 0.94 * picture.height / longest
    left, bottom = (1 - width) / 2, (1 - height) / 2
    axes.imshow(picture, extent=(left, left + width, bottom, bottom + height), interpolation="antialiased")
    axes.add_patch(Rectangle((0.015, 0.015), 0.97, 0.97, fill=False, edgecolor=colour, linewidth=2.5))
    place = -0.03
    for lines, look, step in (
        (caption.said, {"fontsize": 9.5, "fontweight": "bold", "color": colour}, _LABEL_LINE),
        (caption.true, {"fontsize": 9.5, "color": INK}, _LABEL_LINE),
        (caption.text, {"fontsize": 8.5, "color": QUIET}, _TEXT_LINE),
    ):
        for line in lines:
            axes.text(0.015, place, line, va="top", **look)
            place -= step
