"""What the commands print, and where: answers to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table


def set_up_logging() -> None:
    """Send the ``epic_fast`` logger to stderr: news on a terminal, warnings only where there is none."""
    logger = logging.getLogger("epic_fast")
    for handler in [each for each in logger.handlers if isinstance(each, RichHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(RichHandler(console=Console(stderr=True), show_time=False, show_path=False, markup=False))
    logger.setLevel(logging.INFO if on_terminal() else logging.WARNING)


def on_terminal() -> bool:
    """Whether somebody watches: stderr is a terminal."""
    return sys.stderr.isatty()


def quiet_transformers() -> None:
    """Keep transformers' own warnings and, where nobody watches, its progress bars off stderr."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not on_terminal():
        transformers_logging.disable_progress_bar()


def print_error(message: str, heading: str = "error") -> None:
    """One message in red on stderr."""
    console = Console(stderr=True, highlight=False)
    console.print(f"[bold red]{heading}:[/] [red]{escape(message)}[/]", soft_wrap=True)


def say(message: str) -> None:
    """One line about what goes on: stdout, or stderr inside :func:`json_answer`."""
    Console(highlight=False).print(escape(message), soft_wrap=True)


def show_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """The rows as a table, a column for each key of any; numbers to the right with four digits after the point."""
    table = Table(title=title, title_justify="left", title_style="bold")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        values = [row[name] for row in rows if name in row]
        numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(format_value(row.get(name))) for name in names))
    Console(highlight=False).print(table)


def format_value(value: Any) -> str:
    """A value as a reader wants it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else str(value)


@contextmanager
def json_answer(wanted: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that prints the answer as JSON, if ``wanted``; until then nothing else reaches stdout.

    Inside the block everything printed goes to stderr, libraries' prints included.
    """
    if not wanted:
        yield lambda answer: None
        return
    stdout = sys.stdout
    with redirect_stdout(sys.stderr):
        yield lambda answer: print(json.dumps(plain_json(answer), ensure_ascii=False), file=stdout, flush=True)


def plain_json(value: Any) -> Any:
    """The value with NaN and infinities, which JSON lacks, as null, and tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return value.tolist() if hasattr(value, "tolist") else str(value)
