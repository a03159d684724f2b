"""A backend for the graphs of :mod:`epic_fast.engine.graphs` that needs no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from epic_fast.engine.graphs import flatten


class FakeBackend:
    """Remembers a call and replays it by calling it again on the same static buffers.

    Args:
        failure: what ``record`` raises, in place of recording.

    Attributes:
        events: ``"rehearse"``, ``"record"``, ``"replay"``, ``"recover"``, in the order in which they happened.
    """

    def __init__(self, failure: Exception | None = None):
        self.failure = failure
        self.events: list[str] = []

    def rehearse(self, work: Callable[[], Any]) -> None:
        self.events.append("rehearse")
        work()

    def record(self, work: Callable[[], Any]) -> FakeRecorded:
        self.events.append("record")
        if self.failure is not None:
            raise self.failure
        return FakeRecorded(work, self.events)

    def recover(self) -> None:
        self.events.append("recover")

    @contextmanager
    def turn(self) -> Iterator[None]:
        yield

    def position(self) -> Any:
        return torch.get_rng_state()

    def restore(self, position: Any) -> None:
        torch.set_rng_state(position)


@dataclass
class FakeRecorded:
    work: Callable[[], Any]
    events: list[str]
    result: Any = None

    def replay(self) -> None:
        self.events.append("replay")
        found = self.work()
        if self.result is None:
            self.result = found
            return
        # A graph writes its results where the last replay wrote them.
        with torch.inference_mode(False), torch.no_grad():
            for static, value in zip(flatten(self.result)[0], flatten(found)[0], strict=True):
                static.copy_(value)
