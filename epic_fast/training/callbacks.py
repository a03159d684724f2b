"""What a caller may hang into the loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Callback:
    """Told of every step and every epoch, on the main process only.  Override what you need.

    ``on_step`` gets ``{"step", "epoch", "loss", "grad_norm", "learning_rates"}`` (the loss of that
    very batch, the rates that the step was made with),
    ``on_epoch`` the row that :attr:`FitResult.history` gets.  The rows are the callback's own to keep.
    """

    def on_step(self, row: dict[str, Any]) -> None:
        """After an optimizer step."""

    def on_epoch(self, row: dict[str, Any]) -> None:
        """After an epoch's validation, before its checkpoint."""


def notify(callbacks: Iterable[Any], event: str, row: dict[str, Any]) -> None:
    """Call ``event`` on each callback that has it, each with a copy of ``row``."""
    for callback in callbacks:
        method = getattr(callback, event, None)
        if method is not None:
            method(dict(row))
