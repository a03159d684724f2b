"""Which samples the experts of a MoPE run take, in numbers and as contact sheets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epic_fast.errors import ConfigError


@dataclass(frozen=True)
class Shares:
    """How samples are shared out among ``E`` experts, in one layer or on average over layers.

    Attributes:
        load: mean score of each expert over the samples; they sum to 1.
        first: how many samples take each expert most.
        entropy: mean over the samples, from 0 (each takes one expert) to 1 (all alike).
        top: of each expert the samples that take it most, with their scores, the highest first.
    """

    load: list[float]
    first: list[int]
    entropy: float
    top: list[list[tuple[int, float]]]


@dataclass(frozen=True)
class Found:
    """The routing of a split.

    Attributes:
        layer: the routed layer that is shown.
        layers: every routed layer's shares.
        mean: those of the scores' mean over layers; its entropy is the mean of theirs.  Expert 0 of one layer has
            nothing to do with expert 0 of another: this shows whether the same samples take both.
    """

    layer: int
    layers: dict[int, Shares]
    mean: Shares

    def table(self) -> list[dict[str, Any]]:
        """A row a layer: its entropy and the load of each expert."""
        rows = [(str(layer), shares) for layer, shares in self.layers.items()] + [("mean", self.mean)]
        return [
            {"layer": name, "entropy": shares.entropy, **{f"load {n}": each for n, each in enumerate(shares.load)}}
            for name, shares in rows
        ]

    def to_json(self, dataset: Any) -> dict[str, Any]:
        """The numbers; the top samples, of the shown layer and of the mean, by file name and text."""

        def numbers(shares: Shares) -> dict[str, Any]:
            return {"load": shares.load, "first": shares.first, "entropy": shares.entropy}

        def top(shares: Shares) -> list[list[dict[str, Any]]]:
            names, texts = dataset.names(), dataset.texts()
            return [
                [{"file_name": names[index], "text": texts[index], "score": score} for index, score in each]
                for each in shares.top
            ]

        return {
            "layer": self.layer,
            "layers": {layer: numbers(shares) for layer, shares in self.layers.items()},
            "mean": numbers(self.mean),
            "top": {"layer": top(self.layers[self.layer]), "mean": top(self.mean)},
        }


def check_routed(model: Any, run: Path, layer: int | None) -> None:
    """Refuse a run without a routing to look at.

    Raises:
        ConfigError: another method, one expert, no routed layer, or ``layer`` is not among them.
    """
    if model.config.method != "mope":
        raise ConfigError(f"{run} is a run of {model.config.method}, which routes nothing; wanted one of MoPE")
    if model.router is None:
        reason = (
            f"num_experts={model.config.num_experts}"
            if model.routed and model.config.dynamic_prompts
            else "no layer has dynamic prompts"
        )
        raise ConfigError(f"{run} routes nothing ({reason}); wanted a run of MoPE with num_experts of at least 2")
    if layer is not None and layer not in model.routed:
        known = ", ".join(map(str, model.routed))
        raise ConfigError(f"--layer {layer} is not routed in {run}; wanted one of {known}")


def summarise(scores: dict[int, Any], count: int, layer: int | None = None) -> Found:
    """The numbers of a split.

    Args:
        scores: routed layer to ``(N, E)``.
        count: how many top samples of each expert.
        layer: the layer to show; None takes that of the lowest entropy.
    """
    import torch

    layers = {number: _shares(each, count) for number, each in scores.items()}
    entropy = sum(shares.entropy for shares in layers.values()) / len(layers)
    mean = _shares(torch.stack(list(scores.values())).mean(dim=0), count, entropy)
    lowest = min(layers, key=lambda number: layers[number].entropy)
    return Found(lowest if layer is None else layer, layers, mean)


def _shares(scores: Any, count: int, entropy: float | None = None) -> Shares:
    from epic_fast.nn import routing_entropy

    top = scores.sort(dim=0, descending=True, stable=True)
    return Shares(
        load=scores.mean(dim=0).tolist(),
        first=scores.argmax(dim=1).bincount(minlength=scores.shape[1]).tolist(),
        entropy=float(routing_entropy(scores).mean()) if entropy is None else entropy,
        top=[
            list(zip(indices, values, strict=True))
            for indices, values in zip(top.indices[:count].T.tolist(), top.values[:count].T.tolist(), strict=True)
        ],
    )


def draw_sheet(model: Any, dataset: Any, shares: Shares, png: Path, title: str) -> Path:
    """A row of pictures for each expert: those that take it most, with label, score and text."""
    from epic_fast.cli.scoring import true_label
    from epic_fast.plots import SheetItem, contact_sheet

    items, headings = [], []
    for expert, each in enumerate(shares.top):
        headings.append(
            f"expert {expert}: load {shares.load[expert]:.0%}, the first choice of {shares.first[expert]} of "
            f"{len(dataset)}"
        )
        for index, score in each:
            example = dataset[index]
            items.append(SheetItem(example.image, example.text, None, true_label(model, example.label), score))
    title = f"{title}: who takes each expert most (label, score)"
    return contact_sheet(items, png, columns=len(shares.top[0]), title=title, headings=headings)
