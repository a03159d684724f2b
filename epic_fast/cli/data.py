"""``epic-fast data``: what a data folder holds and what is wrong with it, its prefix cache, other data made one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from epic_fast.cli.options import Debug, Json, LabelField, SkipBad, SplitField, TextField
from epic_fast.errors import ConfigError

data_app = typer.Typer(help="Look at data folders, and prepare them.", no_args_is_help=True)

CACHED_SPLITS = ("train", "validation")


@data_app.callback()
def _group() -> None:
    """Look at data folders, and prepare them."""


@data_app.command()
def check(
    folder: Annotated[str, typer.Argument(metavar="FOLDER|ZIP|demo", help="Pictures and metadata.jsonl.")],
    text_field: TextField = None,
    label_field: LabelField = None,
    split_field: SplitField = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Read every row, decode every picture and report all that is wrong or odd; exit code 3 if training would fail."""
    from epic_fast.cli.console import json_answer
    from epic_fast.data import check_folder, resolve_data

    with json_answer(json) as answer:
        report = check_folder(
            resolve_data(folder),
            text_field=text_field or "text",
            label_field=label_field,
            split_field=split_field or "split",
        )
        answer(report.to_dict())
        if not json:
            _show(report)
    if not report.ok:
        raise typer.Exit(3)


@data_app.command()
def cache(
    folder: Annotated[str, typer.Argument(metavar="FOLDER|ZIP|demo", help="Pictures and metadata.jsonl.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value]...", help="The settings of the training, such as num_layer_pairs=4."),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option("--backbone", metavar="NAME|FOLDER|demo", help='The frozen towers; also "vision=PATH,text=PATH".'),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="The config file of the training.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", metavar="FOLDER", help="The cache; by default engine.prefix_cache of the settings."),
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option("--split", help="A split to take; by default train and validation.")
    ] = None,
    skip_bad: SkipBad = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compute what the layers below the first prompts make of every sample, for training to start from.

    Fills FOLDER, or finishes it, and checks what it holds already. `epic-fast train ... engine.prefix_cache=FOLDER`
    with the same backbone and settings then never runs those layers.
    """
    from epic_fast.cli.console import json_answer, quiet_transformers, say
    from epic_fast.cli.failures import Interrupted
    from epic_fast.cli.settings import resolve_settings
    from epic_fast.cli.sources import cache_path_made_absolute, make_model, read_training_folder
    from epic_fast.training import TrainingConfig, fill_prefix_cache

    with json_answer(json) as answer:
        options = {
            "data.path": folder,
            "backbone": backbone,
            "data.skip_bad": skip_bad or None,
            "output": "-",
            "engine.prefix_cache": output,
        }
        settings = resolve_settings(config_file=config, options=options, overrides=overrides or ())
        place = settings.engine["prefix_cache"] if isinstance(settings.engine, dict) else None
        if place in (None, "memory"):
            raise ConfigError("no folder was given for the cache; add --output FOLDER, or engine.prefix_cache=FOLDER")
        assert isinstance(settings.engine, dict)
        settings.engine["prefix_cache"] = cache_path_made_absolute(place)
        quiet_transformers()
        data = read_training_folder(settings.data)
        names = split or [name for name in CACHED_SPLITS if name in data.splits]
        datasets = {name: data.split(name) for name in names}
        model = make_model(settings, data)
        try:
            found = fill_prefix_cache(model, datasets, config=TrainingConfig(**settings.training))
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; {place} holds what was done, run the same command to finish it") from None
        answer({"cache": settings.engine["prefix_cache"], **found})
        if not json:
            size = f"{found['bytes'] / 2**20:,.1f} MiB"
            say(f"{place}: {found['samples']:,} samples, {found['computed']:,} of them computed now, {size}")


@data_app.command()
def convert(
    kind: Annotated[str, typer.Argument(metavar="refcoco", help="What SRC is; refcoco is also RefCOCO+ and RefCOCOg.")],
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The published files: refs(...).p and instances.json.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The data folder to write.")],
    pictures: Annotated[
        Path | None, typer.Option("--pictures", metavar="FOLDER", help="COCO's train2014, where it is not beside SRC.")
    ] = None,
    split_by: Annotated[
        str | None, typer.Option("--split-by", help="Which refs(...).p, such as unc, umd or google.")
    ] = None,
    test: Annotated[str | None, typer.Option("--test", metavar="testA|testB", help="Keep one of the two.")] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the pictures; by default DST gets a link to them.")
    ] = False,
    skip_bad: SkipBad = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn a published data set into a data folder. Its pickles are read, never executed."""
    from epic_fast.cli.console import json_answer, say
    from epic_fast.data import convert_refcoco

    if kind != "refcoco":
        raise ConfigError(f"there is no converter {kind!r}; wanted refcoco")
    with json_answer(json) as answer:
        found = convert_refcoco(
            source, target, pictures=pictures, split_by=split_by, test=test, copy=copy, skip_bad=skip_bad
        )
        answer({**vars(found), "folder": str(found.folder)})
        if not json:
            parts = ", ".join(f"{count:,} {part}" for part, count in found.parts.items())
            left_out = (
                f"; {len(found.skipped)} references skipped, the first: {found.skipped[0]}" if found.skipped else ""
            )
            say(f"{target}: {parts} expressions, {found.masks:,} masks{left_out}")


@data_app.command()
def make(
    kind: Annotated[str, typer.Argument(metavar="scenes|sentiment", help="What to make.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The data folder to write.")],
    train: Annotated[int | None, typer.Option("--train", min=1, help="Samples to train on.")] = None,
    validation: Annotated[int | None, typer.Option("--validation", min=0, help="Samples to validate on.")] = None,
    test: Annotated[int | None, typer.Option("--test", min=0, help="Samples to test on.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of everything that is drawn.")] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make data: rendered scenes with expressions and masks, or utterances with a voice and a face."""
    from epic_fast.cli.console import json_answer, say
    from epic_fast.data import make_scenes, make_sentiment, read_folder

    makers: dict[str, Any] = {"scenes": make_scenes, "sentiment": make_sentiment}
    if kind not in makers:
        raise ConfigError(f"nothing is known of {kind!r}; wanted one of {', '.join(makers)}")
    counts = {"train": train, "validation": validation, "test": test}
    with json_answer(json) as answer:
        makers[kind](target, seed=seed, **{name: count for name, count in counts.items() if count is not None})
        rows = {name: len(dataset) for name, dataset in read_folder(target).splits.items()}
        answer({"folder": str(target), "rows": rows, "seed": seed})
        if not json:
            say(f"{target}: " + ", ".join(f"{count:,} {name}" for name, count in rows.items()))


def _show(report: Any) -> None:
    from epic_fast.cli.console import say, show_table

    say(str(report))
    classes = [
        {"class": name, **{split: report.classes[split].get(name, 0) for split in report.classes}}
        for name in report.labels
    ]
    if classes:
        show_table(classes)
    for what, rows in (("picture", report.repeated_pictures), ("picture and text", report.repeated_pairs)):
        said = ", ".join(f"{split} {count}" for split, count in rows.items() if count)
        if said:
            say(f"rows that repeat a {what} of their split: {said}")
    hint = ", or leave rows whose picture cannot be read out by --skip-bad" if report.missing or report.broken else ""
    say("fine" if report.ok else f"not fine: mend what is named above{hint}")
