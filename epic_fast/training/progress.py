"""How a run says how far it is: a bar on a terminal, one plain line an epoch elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("epic_fast")

ProgressLike = bool | Callable[[str], Any] | None


class Reporter:
    """Says nothing."""

    def start(self, description: str, total: int, done: int = 0) -> None:
        """A stretch of ``total`` batches begins, ``done`` of them over."""

    def advance(self, note: str = "") -> None:
        """One batch is over."""

    def stop(self) -> None:
        """The stretch is over."""

    def line(self, text: str) -> None:
        """Something to read, such as an epoch's result."""


class LineReporter(Reporter):
    """Hands the lines to a function and shows no bar."""

    def __init__(self, write: Callable[[str], Any]):
        self._write = write

    def line(self, text: str) -> None:
        self._write(text)


class BarReporter(Reporter):
    """A bar on stderr while a stretch runs, the lines above it."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._bar: Any = None
        self._task: Any = None

    def start(self, description: str, total: int, done: int = 0) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.stop()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task(description, total=total, completed=done, note="")
        self._bar.start()

    def advance(self, note: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._task, advance=1, note=note)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)


def make_reporter(progress: ProgressLike | Reporter) -> Reporter:
    """What ``progress=`` means.

    None: a bar where stderr is a terminal, otherwise lines to the logger ``epic_fast`` (level INFO).  True: a bar.
    False: nothing.  A function: it gets the lines.
    """
    if isinstance(progress, Reporter):
        return progress
    if progress is None:
        return BarReporter() if sys.stderr is not None and sys.stderr.isatty() else LineReporter(logger.info)
    if progress is True:
        return BarReporter()
    if progress is False:
        return Reporter()
    return LineReporter(progress)
