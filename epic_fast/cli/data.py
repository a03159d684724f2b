"""``epic-fast data``: what a data folder holds and what is wrong with it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from epic_fast.cli.options import Debug, Json, LabelField, SplitField, TextField

data_app = typer.Typer(help="Look at data folders.", no_args_is_help=True)


@data_app.callback()
def _group() -> None:
    """Look at data folders."""


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
    say("fine" if report.ok else "not fine: mend the rows above, or leave unreadable pictures out by --skip-bad")
