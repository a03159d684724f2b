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
    Json,
    LabelField,
    Run,
    SkipBad,
    Split,
    SplitField,
    TextField,
)
from epic_fast.errors import ConfigError

plot_app = typer.Typer(
    help="Draw a run's training curves, confusion matrix, contact sheet or routing.", no_args_is_help=True
)

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
    """Pictures of a split with their text, the predicted and the true label (or mask)."""
    from epic_fast.cli.console import say
    from epic_fast.cli.scoring import score
    from epic_fast.cli.sources import Fields, load_model, load_split
    from epic_fast.plots import contact_sheet

    model = load_model(run, backbone, device)
    fields = Fields(text_field, label_field, split_field)
    dataset = load_split(model, run, data, split, fields, skip_bad=skip_bad)
    chosen = _choose(dataset, count, seed)
    if getattr(model.config, "sequences", None):
        raise ConfigError(f"a sheet shows pictures, and {data} has none")
    if model.problem_type == "segmentation":
        target = output or run / "mask_sheet.png"
        say(str(_mask_sheet(model, chosen, target, batch_size, f"{split}: {len(chosen)} of {len(dataset)} pictures")))
        return
    _, found = score(model, chosen, batch_size=batch_size)
    items = [_item(model, chosen[index], found.logits[index]) for index in range(len(chosen))]
    title = f"{split}: {len(items)} of {len(dataset)} pictures"
    say(str(contact_sheet(items, output or run / "contact_sheet.png", title=title)))


@plot_app.command()
def routing(
    run: Run,
    data: DataSource,
    split: Split = "test",
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Where the pictures go; by default the run folder.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option("--layer", help="The routed layer to show; by default that of the lowest entropy.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, max=12, help="How many pictures of each expert.")] = 6,
    batch_size: BatchSize = 64,
    text_field: TextField = None,
    label_field: LabelField = None,
    split_field: SplitField = None,
    backbone: Backbone = None,
    device: Device = None,
    skip_bad: SkipBad = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Which samples each expert of MoPE takes; load of the experts and entropy of the routing over training."""
    from epic_fast.cli.console import json_answer, say, show_table
    from epic_fast.cli.routing import check_routed, draw_sheet, summarise
    from epic_fast.cli.sources import Fields, load_model, load_split
    from epic_fast.plots import entropy_curves, expert_load, routing_history
    from epic_fast.training import predict_routing

    with json_answer(json) as answer:
        model = load_model(run, backbone, device)
        check_routed(model, run, layer)
        history = routing_history(run / "log.jsonl")
        dataset = load_split(model, run, data, split, Fields(text_field, label_field, split_field), skip_bad=skip_bad)
        found = summarise(predict_routing(model, dataset, batch_size=batch_size), count, layer)
        folder = output or run
        pictures = [
            draw_sheet(model, dataset, shown, folder / f"routing_{name}.png", f"{split}, {title}")
            for name, title, shown in (
                (f"layer_{found.layer}", f"layer {found.layer}", found.layers[found.layer]),
                ("mean", "mean over the routed layers", found.mean),
            )
        ]
        pictures.append(expert_load(history, folder / "routing_load.png", title="Running load of the experts"))
        pictures.append(entropy_curves(history, folder / "routing_entropy.png", title="Entropy of the routing"))
        about = {"split": split, "samples": len(dataset), "experts": model.config.num_experts}
        answer({**about, **found.to_json(dataset), "training": vars(history), "pictures": list(map(str, pictures))})
        if not json:
            show_table(found.table(), title=f"{run}, {split}: {len(dataset)} samples")
            for picture in pictures:
                say(str(picture))


def _choose(dataset: Any, count: int, seed: int) -> Any:
    """That many samples, drawn by the seed, in the data's order."""
    import numpy as np
    from torch.utils.data import Subset

    count = min(count, len(dataset))
    indices = np.random.default_rng(seed).choice(len(dataset), size=count, replace=False)
    return Subset(dataset, sorted(int(index) for index in indices))


def _mask_sheet(model: Any, chosen: Any, target: Path, batch_size: int, title: str) -> Path:
    from epic_fast.data import Collator
    from epic_fast.plots import MaskItem, mask_sheet
    from epic_fast.training import predict_masks

    masks = predict_masks(model, chosen, collator=Collator.for_model(model), batch_size=batch_size)
    examples = (chosen[index] for index in range(len(chosen)))
    items = [MaskItem(each.image, each.text, each.label, mask) for each, mask in zip(examples, masks, strict=True)]
    return mask_sheet(items, target, title=title)


def _item(model: Any, example: Any, logits: Any) -> Any:
    from epic_fast.cli.scoring import true_label, verdict
    from epic_fast.plots import SheetItem

    said, true = verdict(model, logits, 1), true_label(model, example.label)
    if model.problem_type == "regression":
        return SheetItem(example.image, example.text, None, f"{said['predicted']:.3g} (true {true})")
    if model.problem_type == "multi_label_classification":
        shown = ", ".join(sorted(said["predicted"])) or "none"
        return SheetItem(example.image, example.text, true, shown)
    best = said["top_k"][0]
    return SheetItem(example.image, example.text, true, best["label"], best["probability"])
