"""Figures of the measured rows, and of nothing else.

    python -m benchmarks.figures benchmarks/results/attention.jsonl --output docs/images/speed_attention.png
    python -m benchmarks.figures benchmarks/results/interaction.jsonl --output docs/images/speed_interaction.png \\
        --column graph_ms

Bars are times or memory relative to ours, so that a bar twice as long took twice as long; the number at its end is the
measured one.  The dotted line is the floor of the card.  Where ours failed its error budget there are no bars.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.registry import OURS
from benchmarks.run import cases_of, number, passes, read
from epic_fast.plots.style import BLUE, INK, QUIET, figure_style, new_figure, save_figure

COLUMNS = {
    "p50_ms": ("time on the GPU", "ms"),
    "launched_ms": ("time a call, launched from Python", "ms"),
    "graph_ms": ("time a call, in a CUDA graph", "ms"),
    "peak_mib": ("memory added", "MiB"),
}
MODES = ("forward", "forward+backward")
FLOORED = ("p50_ms", "graph_ms")
RIVAL, RIVAL_IN_PLACE, LIMIT = "#B9C3CC", "#DDE3E8", 6.0


def draw(rows: Sequence[dict[str, Any]], output: str | Path, column: str = "p50_ms", dtype: str | None = None) -> Path:
    """A row of panels for each case (forward, forward+backward), a bar for each group of providers.

    Args:
        rows: of one operation, from ``benchmarks.run``.
        output: the PNG.
        column: one of :data:`COLUMNS`.
        dtype: which type; the first one measured if not given.
    """
    timed = [row for row in rows if row["kind"] == "time" and row.get(column) is not None]
    dtypes = list(dict.fromkeys(row["dtype"] for row in timed))
    if not dtypes or (dtype is not None and dtype not in dtypes):
        raise SystemExit(
            f"no {column} of {dtype or 'any type'} in these rows; there is {', '.join(dtypes) or 'nothing'}"
        )
    kind = dtype or dtypes[0]
    timed = [row for row in timed if row["dtype"] == kind]
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in timed)]
    groups = list(dict.fromkeys(row["group"] for row in timed))
    cases = [case for case, _ in cases_of(timed)]
    title, unit = COLUMNS[column]
    with figure_style():
        figure = new_figure(5.6 * len(modes) + 1.2, (0.24 * len(groups) + 0.45) * len(cases) + 1.3)
        panels = figure.subplots(len(cases), len(modes), squeeze=False, sharex=True)
        for line, case in zip(panels, cases, strict=True):
            for panel, mode in zip(line, modes, strict=True):
                here = [row for row in timed if (row["case"], row["mode"]) == (case, mode)]
                _panel(panel, here, groups, column, unit, allowed=passes(rows, case, kind))
                first = mode == modes[0]
                panel.set_yticks(range(len(groups)), groups if first else [""] * len(groups), fontsize=8)
                if first:
                    panel.get_yticklabels()[groups.index(_group_of_ours(timed))].set_fontweight("bold")
                panel.set_title(f"{case}: {mode}", fontsize=9, loc="left")
        for panel in panels[-1]:
            panel.set_xlabel(f"{title}, relative to epic_fast", fontsize=9)
        run = timed[0]["run"]
        where = f"{run['gpu']}, {kind}, torch {run['torch']}, triton {run['triton']}" if run["gpu"] else f"CPU, {kind}"
        dotted = "; dotted: floor of the card" if timed[0].get("floor_ms") and column in FLOORED else ""
        figure.supxlabel(
            f"{where}, commit {(run['commit'] or 'unknown')[:10]}; medians{dotted}", fontsize=7, color=QUIET
        )
        return save_figure(figure, output)


def _group_of_ours(rows: Sequence[dict[str, Any]]) -> str:
    return next((row["group"] for row in rows if row["provider"] == OURS), rows[0]["group"])


def _panel(
    panel: Any, rows: Sequence[dict[str, Any]], groups: Sequence[str], column: str, unit: str, *, allowed: bool
) -> None:
    ours = next((row[column] for row in rows if row["provider"] == OURS), None)
    panel.set_xlim(0, LIMIT * 1.12)
    panel.set_ylim(len(groups) - 0.4, -0.6)
    panel.tick_params(axis="y", length=0)
    panel.tick_params(axis="x", labelsize=8)
    panel.grid(visible=False, axis="y")
    if not ours or not allowed:
        why = "numerics fail" if ours else "epic_fast was not measured"
        panel.text(0.5, 0.5, why, transform=panel.transAxes, ha="center", va="center", color=QUIET)
        return
    for height, group in enumerate(groups):
        kin = [row for row in rows if row["group"] == group]
        if not kin:
            panel.text(1.06, height, "no time", va="center", fontsize=7, color=QUIET)
            continue
        best = min(kin, key=lambda row: row[column])
        factor = best[column] / ours
        colour = BLUE if best["provider"] == OURS else RIVAL_IN_PLACE if best["in_place"] else RIVAL
        panel.barh(height, min(factor, LIMIT), height=0.72, color=colour)
        said = f"{number(best[column])} {unit}" + ("" if best["provider"] == OURS else f" ({factor:.2f}×)")
        inside = factor > 0.62 * LIMIT
        panel.text(
            min(factor, LIMIT) + (-0.06 if inside else 0.06),
            height,
            f"{said}{' →' if factor > LIMIT else ''}",
            va="center",
            ha="right" if inside else "left",
            fontsize=7,
            color=INK,
        )
    panel.axvline(1, color=BLUE, linewidth=0.8)
    floor = rows[0].get("floor_ms")
    if floor is not None and column in FLOORED:
        panel.axvline(floor / ours, color=INK, linewidth=0.8, linestyle=":")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="rows of benchmarks.run, of one operation")
    parser.add_argument("--column", default="p50_ms", choices=COLUMNS)
    parser.add_argument("--dtype", help="as in the rows, bfloat16 for example")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    print(draw(read(*given.files), given.output, given.column, given.dtype))
    return 0


if __name__ == "__main__":
    sys.exit(main())
