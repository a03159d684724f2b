"""``epic-fast eval``: a run's scores on a split."""

from __future__ import annotations

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


def evaluate(
    run: Run,
    data: DataSource,
    split: Split = "test",
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
    """Score a run on a split: accuracy and macro-F1; micro- and macro-F1 (multi-label); errors (regression), with
    sentiment's accuracies where there are sequences; overall and mean IoU (masks)."""
    from epic_fast.cli.console import json_answer, show_table
    from epic_fast.cli.scoring import score
    from epic_fast.cli.sources import Fields, load_model, load_split

    with json_answer(json) as answer:
        model = load_model(run, backbone, device)
        fields = Fields(text_field, label_field, split_field)
        dataset = load_split(model, run, data, split, fields, skip_bad=skip_bad)
        metrics, _ = score(model, dataset, batch_size=batch_size)
        about = {"split": split, "samples": len(dataset), "skipped": len(dataset.skipped)}
        answer({**metrics, **about})
        if not json:
            show_table([{**about, **metrics}], title=str(run))
