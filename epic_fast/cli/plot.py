"""``epic-fast plot``: the figures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from epic_fast.cli.options import (
    Backbone,
    BatchSize,
    DataSource,
    Debug,
    Device,
    LabelField,
    Run,
    SkipBad,
    Split,
    SplitField,
    TextField,
)
from epic_fast.errors import ConfigError

plot_app = typer.Typer(help="Draw a run's training curves, confusion matrix or contact sheet.", no_args_is_help=True)

Png = Annotated[
    Path | None, typer.Option("--output", metavar="PNG", help="The picture to write; by default in the run folder.")
]


@plot_app.command()
def curves(run: Run, output: Png = None, debug: Debug = False) -> None:
    """Loss, validation metrics and gates over the epochs."""
    from epic_fast.cli.console import say
    from epic_fast.plots import training_curves

    say(str(training_curves(run / "log.jsonl", output or run / "training_curves.png")))


@plot_app.command()
def confusion(
    run: Run,
    data: DataSource,
    split: Split = "test",
    output: Png = None,
    batch_size: BatchSize = 64,
    text_field: TextField = None,
    label_field: LabelField = None,
    split_field: SplitField = None,
    backbone: Backbone = None,
    device: Device = None,
    skip_bad: SkipBad = False,
    debug: Debug = False,
) -> None:
    """Which class was taken for which (single-label runs)."""
    from epic_fast.classifier import label_name
    from epic_fast.cli.console import say
    from epic_fast.cli.scoring import score
    from epic_fast.cli.sources import Fields, load_model, load_split
    from epic_fast.plots import confusion_matrix

    model = load_model(run, backbone, device)
    if model.problem_type != "single_label_classification":
        raise ConfigError(f"a confusion matrix needs one label a sample, but {run} is {model.problem_type}")
    fields = Fields(text_field, label_field, split_field)
    dataset = load_split(model, run, data, split, fields, skip_bad=skip_bad)
    _, found = score(model, dataset, batch_size=batch_size)
    names = [label_name(model, index) for index in range(model.num_labels)]
    target = output or run / "confusion_matrix.png"
    say(str(confusion_matrix(found.labels, found.logits.argmax(1), names, target, title=split)))


@plot_app.command()
def sheet(
    run: Run,
    data: DataSource,
    split: Split = "test",
    output: Png = None,
    count: Annotated[int, typer.Option("--count", min=1, max=200, help="How many pictures.")] = 24,
    seed: Annotated[int, typer.Option("--seed", help="Which pictures: the seed of their choice.")] = 0,
    batch_size: BatchSize = 64,
    text_field: TextField = None,
    label_field: LabelField = None,
    split_field: SplitField = None,
    backbone: Backbone = None,
    device: Device = None,
    skip_bad: SkipBad = False,
    debug: Debug = False,
) -> None:
    """Pictures of a split with their text, the predicted and the true label."""
    from epic_fast.cli.console import say
    from epic_fast.cli.scoring import score
    from epic_fast.cli.sources import Fields, load_model, load_split
    from epic_fast.plots import contact_sheet

    model = load_model(run, backbone, device)
    fields = Fields(text_field, label_field, split_field)
    dataset = load_split(model, run, data, split, fields, skip_bad=skip_bad)
    chosen = _choose(dataset, count, seed)
    _, found = score(model, chosen, batch_size=batch_size)
    items = [_item(model, chosen[index], found.logits[index]) for index in range(len(chosen))]
    title = f"{split}: {len(items)} of {len(dataset)} pictures"
    say(str(contact_sheet(items, output or run / "contact_sheet.png", title=title)))


def _choose(dataset: Any, count: int, seed: int) -> Any:
    """That many samples, drawn by the seed, in the data's order."""
    import numpy as np
    from torch.utils.data import Subset

    count = min(count, len(dataset))
    indices = np.random.default_rng(seed).choice(len(dataset), size=count, replace=False)
    return Subset(dataset, sorted(int(index) for index in indices))


def _item(model: Any, example: Any, logits: Any) -> Any:
    from epic_fast.classifier import label_name
    from epic_fast.cli.scoring import verdict
    from epic_fast.plots import SheetItem

    said = verdict(model, logits, 1)
    if model.problem_type == "regression":
        true, predicted = f"{example.label:.3g}", f"{said['predicted']:.3g}"
        return SheetItem(example.image, example.text, None, f"{predicted} (true {true})")
    if model.problem_type == "multi_label_classification":
        true = sorted(label_name(model, index) for index in example.label)
        predicted = sorted(said["predicted"])
        shown = ", ".join(predicted) or "none"
        return SheetItem(example.image, example.text, ", ".join(true) or "none", shown, correct=true == predicted)
    best = said["top_k"][0]
    return SheetItem(example.image, example.text, label_name(model, example.label), best["label"], best["probability"])
