"""``epic-fast demo``: EPIC and its rivals on real pictures, with nothing to download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from epic_fast.cli.options import Debug, Json
from epic_fast.errors import ConfigError


def demo(
    task: Annotated[
        str,
        typer.Option(
            "--task",
            metavar="classify|match",
            help="12 classes of drawings; or: does this title describe this picture?",
        ),
    ] = "classify",
    output: Annotated[Path, typer.Option("--output", metavar="RUN", help="The run folder to write.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A fraction of the training, to see that it works.")] = False,
    full: Annotated[
        bool,
        typer.Option("--full", help="The whole of --task match without a GPU too: hours on two cores."),
    ] = False,
    mope: Annotated[
        bool, typer.Option("--mope", help="Train MoPE too, routed and with one expert: takes longer.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train EPIC on the project's own towers and drawings, and print it beside every honest rival."""
    from epic_fast.cli.console import json_answer, quiet_transformers
    from epic_fast.cli.runs import check_demo_output

    if task not in ("classify", "match"):
        raise ConfigError(f"--task {task!r}; wanted classify or match")
    if quick and full:
        raise ConfigError("--quick and --full; wanted one of them, or neither")
    check_demo_output(output)
    from epic_fast.demo import run_demo

    quiet_transformers()
    with json_answer(json) as answer:
        found = run_demo(task=task, output=output, seed=seed, quick=quick, full=full, mope=mope, json_output=json)
        answer(found)
