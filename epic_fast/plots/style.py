"""What all figures share: colours, type, and how they are written."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from epic_fast.files import atomic_file

# Okabe and Ito's palette, which colour-blind readers tell apart.
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
INK, QUIET = "#222222", "#6B6B6B"

# Tried in this order for letters that matplotlib's own font lacks; those not installed are left out.
_MORE_FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans", "Noto Sans Arabic", "Arial Unicode MS")


@contextmanager
def figure_style() -> Iterator[None]:
    """The settings under which a figure is built; the caller's own are back afterwards."""
    installed = set(font_manager.get_font_names())
    settings: dict[Any, Any] = {
        "font.family": ["DejaVu Sans", *(name for name in _MORE_FONTS if name in installed)],
        "font.size": 10,
        "axes.edgecolor": QUIET,
        "axes.labelcolor": INK,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#E3E3E3",
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "legend.frameon": True,
        "legend.framealpha": 0.85,
        "legend.edgecolor": "none",
        "text.color": INK,
        "text.parse_math": False,
        "xtick.color": INK,
        "ytick.color": INK,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
    }
    # The style opens with matplotlib's defaults, so a user's matplotlibrc cannot make a figure unreadable.
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcParams.update({key: matplotlib.rcParamsDefault[key] for key in settings})
        matplotlib.rcParams.update(settings)
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def new_figure(width: float, height: float, *, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure of ``width`` x ``height`` inches with an Agg canvas, laid out by itself or (None) by hand."""
    figure = Figure(figsize=(width, height))
    if layout:
        figure.set_layout_engine(layout, w_pad=0.1, h_pad=0.1, wspace=0.02, hspace=0.02)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, png: str | Path, *, dpi: int = 144) -> Path:
    """Write the figure as a PNG, whole or not at all; the path it has."""
    png = Path(png)
    with atomic_file(png) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
    return png


def one_line(text: object) -> str:
    """The text with every run of white space and control characters as one space."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())


def shorten(text: object, length: int) -> str:
    """The text in one line of at most ``length`` characters, with an ellipsis where it was cut."""
    line = one_line(text)
    return line if len(line) <= length else line[: max(length - 1, 0)].rstrip() + "…"


def wrap_lines(text: object, width: int, lines: int) -> list[str]:
    """The text in at most ``lines`` lines of at most ``width`` characters, with an ellipsis where it was cut."""
    return textwrap.wrap(one_line(text), width, max_lines=lines, placeholder="…") or [""]
