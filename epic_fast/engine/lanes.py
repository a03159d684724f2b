"""A lane beside the caller's stream, for small work that waits for nobody and that nobody waits for yet.

A few launches of a few programs leave a GPU empty; before thousands of rows they are time.  In a lane they run while
the rows' kernels do.  That pays where the device and not the host is what is waited for, so a lane is open while a
graph is recorded (``graphs.CudaBackend``), and nowhere else.

Whoever gives work to a lane keeps three rules, by which memory is never written while another stream reads it: the work
begins with a :meth:`Lane.fork` and ends with a :meth:`Lane.join`; what the caller's stream made and the lane reads is
held until the join; what the lane made and the caller's stream reads is held until the lane has no more work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

_open: ContextVar[Lane | None] = ContextVar("lane", default=None)


class Lane:
    """Work beside a stream.

    Args:
        stream: that the lane's kernels go to; None: to the caller's own, in the order of the calls.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None):
        self._stream = stream

    def beside(self) -> AbstractContextManager[object]:
        """What is launched inside goes into the lane."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def fork(self) -> None:
        """The lane's next kernels wait for all that the caller's stream was given so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def join(self) -> None:
        """The caller's next kernels wait for all that the lane was given so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


@contextmanager
def opened(lane: Lane) -> Iterator[None]:
    """Work inside may use this lane (:func:`current`)."""
    token = _open.set(lane)
    try:
        yield
    finally:
        _open.reset(token)


def current() -> Lane | None:
    """The lane that is open, if there is one."""
    return _open.get()


def beside(lane: Lane | None) -> AbstractContextManager[object]:
    """:meth:`Lane.beside`; without a lane nothing changes."""
    return nullcontext() if lane is None else lane.beside()
