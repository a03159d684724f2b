"""How a mixture of prompt experts routed while it was trained, out of the run's log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from epic_fast.errors import DataError
from epic_fast.plots.curves import ENTROPY, LOAD, read_log
from epic_fast.plots.style import INK, QUIET, SERIES, figure_style, new_figure, save_figure

_LIGHT = SERIES[3:]  # of the palette those on which dark letters are read better
_THINNEST_NAMED = 0.045  # of the panel's height: a thinner band has no room for its number
_MOST_COLUMNS = 4


@dataclass(frozen=True)
class RoutingHistory:
    """The running numbers of each routed layer at the end of each epoch, and as they stood before the first.

    Attributes:
        epochs: ``n`` numbers, 0 first: there every expert has the same load and the entropy is 1.
        load: layer to ``n`` times ``E`` shares, those of an epoch summing to 1.
        entropy: layer to ``n`` numbers: 1 where samples take all experts alike, 0 where each takes one.
    """

    epochs: list[int]
    load: dict[int, list[list[float]]]
    entropy: dict[int, list[float]]


def routing_history(log_jsonl: str | Path) -> RoutingHistory:
    """What the epochs of a run's log say of its routing.

    Args:
        log_jsonl: the run's ``log.jsonl``.

    Raises:
        DataError: no such log, a damaged one, no epoch in it yet, or one without routing.
    """
    _, rows = read_log(log_jsonl)
    if not rows:
        raise DataError(f"the log {log_jsonl} holds no epoch yet; train for at least one epoch")
    found = [row.get("gates") for row in rows]
    layers = sorted(int(name.removeprefix(ENTROPY)) for name in found[0] or () if name.startswith(ENTROPY))
    if not layers:
        raise DataError(
            f"the log {log_jsonl} says nothing of a routing; wanted that of a run of MoPE with several experts"
        )
    experts = sum(name.startswith(f"{LOAD}{layers[0]}/") for name in found[0] or ())
    history = RoutingHistory(
        [0], {layer: [[1 / experts] * experts] for layer in layers}, {each: [1.0] for each in layers}
    )
    for row, values in zip(rows, found, strict=True):
        history.epochs.append(int(row["epoch"]))
        for layer in layers:
            history.entropy[layer].append(_value(values, f"{ENTROPY}{layer}", log_jsonl, row))
            load = [_value(values, f"{LOAD}{layer}/{expert}", log_jsonl, row) for expert in range(experts)]
            history.load[layer].append(load)
    return history


def _value(values: Any, name: str, log_jsonl: str | Path, row: dict[str, Any]) -> float:
    value = values.get(name) if isinstance(values, Mapping) else None
    if not isinstance(value, (int, float)):
        raise DataError(f"the log {log_jsonl} has no {name} at epoch {row.get('epoch')}; is it of one run?")
    return float(value)


def expert_load(history: RoutingHistory, png: str | Path, *, title: str | None = None) -> Path:
    """Draw the share of each expert over the epochs, a panel for each routed layer, the shares on top of each other.

    Args:
        history: of :func:`routing_history`.
        png: the file to write.
        title: what stands above.

    Returns:
        The path of the picture.
    """
    layers = list(history.load)
    columns = min(_MOST_COLUMNS, len(layers))
    rows = math.ceil(len(layers) / columns)
    with figure_style():
        figure = new_figure(2.7 * columns + 0.7, 2.5 * rows + (0.6 if title else 0.3))
        if title:
            figure.suptitle(title, fontsize=12, fontweight="bold")
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for place, panel in enumerate(panels.flat):
            if place >= len(layers):
                panel.set_axis_off()
                continue
            _draw_load(panel, history.epochs, np.array(history.load[layers[place]]).T)
            panel.set_title(f"layer {layers[place]}", loc="left")
            if place % columns == 0:
                panel.set_ylabel("load of each expert")
            if place + columns >= len(layers):
                panel.set_xlabel("epoch")
                panel.tick_params(labelbottom=True)
        return save_figure(figure, png)


def _draw_load(panel: Any, epochs: Sequence[int], load: np.ndarray) -> None:
    colours = [SERIES[expert % len(SERIES)] for expert in range(len(load))]
    panel.stackplot(epochs, load, colors=colours, edgecolor="white", linewidth=0.8)
    panel.grid(visible=False)
    panel.set(xlim=(epochs[0], epochs[-1]), ylim=(0, 1), yticks=(0, 0.5, 1))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    bottom = np.cumsum(load[:, -1]) - load[:, -1]
    for expert, (start, share) in enumerate(zip(bottom, load[:, -1], strict=True)):
        if share >= _THINNEST_NAMED:
            panel.annotate(
                f"{expert}",
                (epochs[-1], start + share / 2),
                xytext=(-4, 0),
                textcoords="offset points",
                ha="right",
                va="center_baseline",
                fontsize=8 if share > 2 * _THINNEST_NAMED else 6,
                fontweight="bold",
                color=INK if colours[expert] in _LIGHT else "white",
            )


def entropy_curves(history: RoutingHistory, png: str | Path, *, title: str | None = None) -> Path:
    """Draw the entropy of the routing over the epochs, a line for each routed layer, the deeper the darker.

    Args:
        history: of :func:`routing_history`.
        png: the file to write.
        title: what stands above.

    Returns:
        The path of the picture.
    """
    import matplotlib

    layers = list(history.entropy)
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.15, 1.0, len(layers)))
    height = max(3.6, 0.19 * len(layers) + 1.2)
    with figure_style():
        figure = new_figure(6.4, height)
        axes = figure.add_subplot()
        for shade, layer in zip(shades, layers, strict=True):
            axes.plot(history.epochs, history.entropy[layer], color=shade, linewidth=1.8, marker="o", markersize=3)
        lowest = min(min(values) for values in history.entropy.values())
        room = 0.08 * max(1 - lowest, 1e-3)
        axes.set(xlim=(0, history.epochs[-1]), ylim=(max(0.0, lowest - room), 1 + room))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_xlabel("epoch")
        axes.set_ylabel("entropy (1: all experts alike)")
        axes.set_title(title or "routing entropy", loc="left")
        low, high = axes.get_ylim()
        line = (high - low) * 0.17 / (height - 1.0)
        last = [history.entropy[layer][-1] for layer in layers]
        for shade, layer, end, place in zip(shades, layers, last, spread(last, line, low, high), strict=True):
            # The last epoch is at the right edge, so both ends of the leader are given in shares of the width.
            beside = axes.get_yaxis_transform()
            axes.plot([1, 1.06], [end, place], color=shade, linewidth=0.9, transform=beside, clip_on=False)
            axes.text(1.07, place, f"layer {layer}", va="center_baseline", fontsize=8.5, transform=beside)
        axes.tick_params(colors=QUIET, labelcolor=INK)
        return save_figure(figure, png)


def spread(places: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Places for labels near ``places`` (n) and in their order, between ``low`` and ``high``.

    Args:
        places: what the labels name.
        apart: the least distance of two labels; less where there is no room for it.
        low, high: where the lowest and the highest label may be.
    """
    apart = min(apart, (high - low) / max(1, len(places) - 1))
    order = sorted(range(len(places)), key=lambda index: places[index])
    clusters: list[tuple[float, list[int]]] = []
    for index in order:
        members, centre = [index], min(max(places[index], low), high)
        # Labels that would crowd stand around the mean of what they name.
        while clusters and clusters[-1][0] + apart * (len(clusters[-1][1]) + len(members)) / 2 > centre:
            members = [*clusters.pop()[1], *members]
            half = apart * (len(members) - 1) / 2
            centre = min(max(sum(places[each] for each in members) / len(members), low + half), high - half)
        clusters.append((centre, members))
    found = [0.0] * len(places)
    for centre, members in clusters:
        for number, index in enumerate(members):
            found[index] = centre + apart * (number - (len(members) - 1) / 2)
    return found
