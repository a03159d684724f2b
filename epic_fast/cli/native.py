"""``epic-fast native``: compile the way of planned calls to their kernels."""

from __future__ import annotations

from typing import Annotated

import typer

from epic_fast.cli.options import Debug, Json


def native(
    again: Annotated[bool, typer.Option("--again", help="Compile even if it is there.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compile, once for this PyTorch, what launches kernels: short calls then wait less for Python."""
    from epic_fast.cli.console import json_answer
    from epic_fast.ops import native

    with json_answer(json) as answer:
        target = native.build(again=again)
        answer({"file": str(target)})
        if not json:
            typer.echo(f"{target}\nIt is loaded whenever it is there; EPIC_FAST_NATIVE=0 leaves it out.")
