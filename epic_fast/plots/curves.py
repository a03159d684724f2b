"""The training curves of a run, out of its log."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from epic_fast.errors import DataError
from epic_fast.plots.style import BLUE, INK, QUIET, SERIES, SKY, VERMILLION, figure_style, new_figure, save_figure

_NOT_A_SCORE = ("loss", "threshold")
# How MoPE's numbers begin among a model's diagnostics: too many for a panel here, and with figures of their own.
ENTROPY, LOAD = "routing_entropy/", "expert_load/"


def training_curves(log_jsonl: str | Path, png: str | Path, *, title: str | None = None) -> Path:
    """Draw the loss, the validation metrics and the gates (or the learning rates) of a run over its epochs.

    Args:
        log_jsonl: the run's ``log.jsonl``: one line each logged step and each epoch.
        png: the file to write.
        title: what stands above.

    Returns:
        The path of the picture.

    Raises:
        DataError: no such log, a damaged line, or nothing logged yet.
    """
    steps, epochs = read_log(log_jsonl)
    if not steps and not epochs:
        raise DataError(f"the log {log_jsonl} holds no step and no epoch yet; train for at least one epoch")
    a_pass = _steps_an_epoch(steps, epochs)
    metrics = _series(epochs, "validation", a_pass)
    losses = metrics.pop("loss", None)
    metrics = {name: points for name, points in metrics.items() if name not in _NOT_A_SCORE}
    gates = _series(epochs, "gates", a_pass)
    gates = {name: points for name, points in gates.items() if not name.startswith((ENTROPY, LOAD))}
    last = gates or _series(steps or epochs, "learning_rates", a_pass)
    panels = 1 + bool(metrics) + bool(last)
    with figure_style():
        figure = new_figure(4.4 * panels, 3.4 + (0.3 if title else 0))
        if title:
            figure.suptitle(title, fontsize=12, fontweight="bold")
        all_axes = iter(figure.subplots(1, panels, squeeze=False)[0])
        _draw_loss(next(all_axes), steps, epochs, losses, a_pass)
        if metrics:
            best = next((row["step"] / a_pass for row in reversed(epochs) if row.get("best")), None)
            _draw_metrics(next(all_axes), metrics, best)
        if last:
            _draw_series(next(all_axes), last, "gates" if gates else "learning rates")
        return save_figure(figure, png)


def read_log(path: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The step rows and the epoch rows of a run's log; a half-written last line is left out.

    Raises:
        DataError: no such file, or a line that is no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"the log {path} does not exist; wanted the log.jsonl that training writes into its run folder")
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise DataError(f"{path}, line {number}: not JSON ({error}); the log is damaged") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DataError(f"{path}, line {number}: no object with a whole number 'step'; is this a run's log?")
        rows.append(row)
    return [row for row in rows if row.get("type") == "step"], [row for row in rows if row.get("type") == "epoch"]


def _steps_an_epoch(steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> float:
    if epochs:
        return max(1.0, epochs[0]["step"] / max(1, epochs[0].get("epoch", 1)))
    return max(1.0, max(row["step"] for row in steps) / max(1, max(row.get("epoch", 1) for row in steps)))


def _series(rows: list[dict[str, Any]], key: str, a_pass: float) -> dict[str, list[tuple[float, float]]]:
    """Points (epoch, value) by name, out of the mapping ``key`` of each row."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        values = row.get(key)
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if isinstance(value, (int, float)):
                found.setdefault(name, []).append((row["step"] / a_pass, float(value)))
    return found


def _draw_loss(
    axes: Any,
    steps: list[dict[str, Any]],
    epochs: list[dict[str, Any]],
    validation: list[tuple[float, float]] | None,
    a_pass: float,
) -> None:
    logged = [(row["step"] / a_pass, row["loss"]) for row in steps if isinstance(row.get("loss"), (int, float))]
    whole = [(row["step"] / a_pass, row["train_loss"]) for row in epochs if row.get("train_loss") is not None]
    if len(logged) > 1:
        axes.plot(*zip(*logged, strict=True), color=SKY, linewidth=1, alpha=0.8, label="training, as logged")
    if whole:
        axes.plot(
            *zip(*whole, strict=True), color=BLUE, linewidth=1.8, marker="o", markersize=4, label="training, epoch"
        )
    if validation:
        points = zip(*validation, strict=True)
        axes.plot(*points, color=VERMILLION, linewidth=1.8, marker="s", markersize=4, label="validation")
    _finish(axes, "loss")
    values = [value for points in (logged, whole, validation or []) for _, value in points]
    axes.set_ylim(min([0.0, *values]), max([1e-9, *values]) * 1.08)
    axes.legend(fontsize=9)


def _draw_metrics(axes: Any, metrics: dict[str, list[tuple[float, float]]], best: float | None) -> None:
    markers = "oDs^v"
    for index, (name, points) in enumerate(metrics.items()):
        style = {"color": SERIES[index % len(SERIES)], "marker": markers[index % len(markers)]}
        axes.plot(*zip(*points, strict=True), linewidth=1.8, markersize=4, label=name.replace("_", " "), **style)
    if best is not None:
        values = [value for points in metrics.values() for epoch, value in points if math.isclose(epoch, best)]
        axes.axvline(best, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
        shown = ", ".join(f"{value:.3f}" for value in values[:2])
        axes.plot([], [], color=QUIET, linewidth=1, linestyle=(0, (4, 3)), label=f"best epoch ({shown})")
    _finish(axes, "validation")
    axes.legend(fontsize=9)


def _draw_series(axes: Any, series: dict[str, list[tuple[float, float]]], title: str) -> None:
    dashes = ("-", "--", "-.", ":")
    for index, (name, points) in enumerate(series.items()):
        style = {"color": SERIES[index % len(SERIES)], "linestyle": dashes[index % len(dashes)]}
        axes.plot(*zip(*points, strict=True), linewidth=1.8, label=name.replace("_", " "), **style)
    _finish(axes, title)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    axes.legend(fontsize=9, ncols=1 + (len(series) > 6))


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel("epoch", color=INK)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
