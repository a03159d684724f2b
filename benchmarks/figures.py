"""Figures of the measured rows, and of nothing else.

    python -m benchmarks.figures benchmarks/results/attention.jsonl --output docs/images/speed_attention.png \\
        --column graph_ms
    python -m benchmarks.figures benchmarks/results/interaction.jsonl --output docs/images/speed_interaction.png \\
        --column graph_ms
    python -m benchmarks.step --figure docs/images/speed_step.png

Bars are times or memory relative to ours, so that a bar twice as long took twice as long; the number at its end is the
measured one.  The dotted line is the floor of the card.  Where ours failed its error budget there are no bars.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.patches import Patch

from benchmarks.registry import OURS
from benchmarks.run import cases_of, number, passes, read
from epic_fast.plots.style import BLUE, INK, ORANGE, QUIET, SKY, figure_style, new_figure, save_figure

COLUMNS = {
    "p50_ms": ("time on the GPU", "ms"),
    "launched_ms": ("time a call, launched from Python", "ms"),
    "launched_one_thread_ms": ("time a call, launched from Python, backward in the calling thread", "ms"),
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


STEP_CASES = ("late-64", "deep-64")
STEP_COLOURS = {"exact": BLUE, "cached": SKY, "rounded": ORANGE}
STEP_MEANINGS = {
    "exact": "the engine, part by part",
    "cached": "with the prefix cache",
    "rounded": "with 8-bit weights",
}


def draw_step(rows: Sequence[dict[str, Any]], output: str | Path, cases: Sequence[str] = STEP_CASES) -> Path:
    """A panel for each case: bars of what there is without the engine, then the engine part by part.

    What a part saved stands behind its bar in a light shade; dotted is the time that the method's own operations take
    at the rate of a large bfloat16 product.

    Args:
        rows: of ``benchmarks.step``.
        output: the PNG.
        cases: their names; those without rows are left out.
    """
    from benchmarks.step import latest
    from benchmarks.step_providers import PROVIDERS

    chosen = [row for row in latest(rows) if row["case"] in cases]
    timed = [row for row in chosen if row["kind"] == "time"]
    shown = [name for name in cases if any(row["case"] == name for row in timed)]
    if not shown:
        raise SystemExit(f"no times of {', '.join(cases)} in these rows")
    names = [name for name in PROVIDERS if any(row["provider"] == name for row in timed)]
    # A gap between what there is and the engine.
    heights, height, group = {}, 0.0, ""
    for name in names:
        engine = PROVIDERS[name].group == "engine"
        height += 0.7 if group and engine and group != "engine" else 0.0
        heights[name], height, group = height, height + 1.0, PROVIDERS[name].group
    with figure_style():
        figure = new_figure(4.4 * len(shown) + 2.6, 0.30 * height + 1.5)
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for panel, case in zip(panels, shown, strict=True):
            here = {row["provider"]: row for row in chosen if row["case"] == case}
            _step_panel(panel, here, heights)
            first = next(row for row in here.values())
            panel.set_title(f"{first['layout']}, B={first['batch']}: one training step", fontsize=10, loc="left")
            panel.set_xlabel("ms", fontsize=9)
            labels = [PROVIDERS[name].label for name in names]
            panel.set_yticks(list(heights.values()), labels if case == shown[0] else [""] * len(names), fontsize=8)
        parts = [
            Patch(color=STEP_COLOURS[kind], label=STEP_MEANINGS[kind])
            for kind in STEP_COLOURS
            if any(_step_kind(PROVIDERS[name]) == kind for name in names)
        ]
        parts += [Patch(color=RIVAL, label="without the engine")]
        figure.legend(handles=parts, loc="outside upper right", ncols=len(parts), fontsize=8)
        run = timed[0]["run"]
        place = f"{run['gpu']}, {timed[0]['frozen_dtype']}, torch {run['torch']}" if run["gpu"] else "CPU"
        commits = " and ".join(dict.fromkeys((row["run"]["commit"] or "unknown")[:10] for row in timed))
        figure.supxlabel(
            f"{timed[0]['towers']}, {place}, commit {commits}; medians; memory that the step "
            "adds" + ("; dotted: the method's operations at the rate of a large product" if run["ceilings"] else ""),
            fontsize=7,
            color=QUIET,
        )
        return save_figure(figure, output)


def _step_kind(provider: Any) -> str | None:
    """The colour of an engine's bar, None of others."""
    if provider.group != "engine":
        return None
    if provider.engine is not None and provider.engine.weights != "frozen":
        return "rounded"
    return "cached" if provider.from_prefix else "exact"


def _step_panel(panel: Any, rows: dict[str, dict[str, Any]], heights: dict[str, float]) -> None:
    from benchmarks.step_providers import PROVIDERS

    times = {name: row["p50_ms"] for name, row in rows.items() if row["kind"] == "time"}
    longest = max(times.values())
    panel.set_xlim(0, 1.30 * longest)
    panel.set_ylim(max(heights.values()) + 0.6, -0.6)
    panel.tick_params(axis="y", length=0)
    panel.tick_params(axis="x", labelsize=8)
    panel.grid(visible=False, axis="y")
    before: float | None = None
    for name, height in heights.items():
        row, kind = rows.get(name), _step_kind(PROVIDERS[name])
        if row is None or row["kind"] != "time":
            why = "numerics fail" if row and row["kind"] == "failed" else "not run" if row is None else "cannot run"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            panel.text(0.03 * longest, height, why, va="center", fontsize=7, color=QUIET, bbox=box)
            continue
        value = row["p50_ms"]
        colour = RIVAL if kind is None else STEP_COLOURS[kind]
        panel.barh(height, value, height=0.72, color=colour)
        end = value
        if kind is not None and before is not None and before > value:
            panel.barh(height, before - value, left=value, height=0.72, color=colour, alpha=0.22, linewidth=0)
            end = before
        memory = "" if row["peak_mib"] is None else f", {row['peak_mib'] / 1024:.2f} GiB"
        panel.text(end + 0.012 * longest, height, f"{value:.1f}{memory}", va="center", ha="left", fontsize=7, color=INK)
        if kind == "exact":
            before = value
    first = next(row for row in rows.values() if row["method"] == "epic" and not row["from_prefix"])
    if first["run"]["ceilings"]:
        floor = first["flops"] / first["run"]["ceilings"]["bf16_tflop_s"] / 1e9
        panel.axvline(floor, color=INK, linewidth=0.8, linestyle=":")


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
