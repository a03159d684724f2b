"""Options that several commands share."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from epic_fast.cli import failures


def _remember_debug(wanted: bool) -> bool:
    if wanted:
        failures.show_traceback(True)
        logging.getLogger("epic_fast").setLevel(logging.DEBUG)
    return wanted


Debug = Annotated[
    bool, typer.Option("--debug", callback=_remember_debug, help="Show the traceback of an error, and log more.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder of `epic-fast train`, or any saved adapter.")]
DataSource = Annotated[
    str, typer.Option("--data", metavar="FOLDER|ZIP|demo", help="A folder (or zip) with pictures and metadata.jsonl.")
]
Split = Annotated[str, typer.Option("--split", help="The split to take.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples at a time.")]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Skip and count rows whose picture cannot be read, instead of stopping.")
]
Backbone = Annotated[
    str | None,
    typer.Option("--backbone", metavar="NAME|FOLDER|demo", help="The backbone, where the adapter's own has moved."),
]
Device = Annotated[
    str | None, typer.Option("--device", help="Such as cpu or cuda:0; by default a GPU if there is one.")
]
TextField = Annotated[str | None, typer.Option("--text-field", help="The rows' field with the text.")]
LabelField = Annotated[str | None, typer.Option("--label-field", help="The rows' field with the label(s).")]
SplitField = Annotated[str | None, typer.Option("--split-field", help="The rows' field with the split.")]
