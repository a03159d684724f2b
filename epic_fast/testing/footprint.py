"""What a step takes of a GPU's memory and how many kernels it launches, counted without a GPU.

Tensors on the ``meta`` device have shapes and no memory, so that a step of the real towers at the real batch takes a
second.  :func:`as_if_on_gpu` makes operations take their kernels, whose operators say what they return;
:class:`Footprint` sees every operator, adds up the bytes of what lives and knows what lived at the peak.  What a
library takes inside of an operator (workspaces, a convolution's other layout) is not seen.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from epic_fast.engine import packed
from epic_fast.ops import frozen_linear, library
from epic_fast.ops.dispatch import Operation

# Operators that launch nothing: views, and memory without contents.
_FREE = frozenset({
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "view", "_unsafe_view", "t", "transpose",
    "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "unbind", "split", "split_with_sizes", "detach",
    "alias", "as_strided", "diagonal", "unfold", "lift_fresh", "_reshape_alias", "view_as_real",
})  # fmt: skip


@contextmanager
def as_if_on_gpu() -> Iterator[None]:
    """Inside, operations on the ``meta`` device take the kernels that they would take on a GPU."""

    def choose(operation: Operation, impl: str, *args: Any) -> Callable[..., Any]:
        return operation.triton if operation.triton is not None and impl != "reference" else operation.reference

    def takes_kernel(name: str, impl: str, worth: bool, *tensors: Any, kind: str | None = None) -> bool:
        return impl == "triton" or (impl == "auto" and worth)

    def always(value: Any) -> Callable[..., Any]:
        # A mock would remember its arguments, and with them their memory.
        return lambda *args, **kwargs: value

    with (
        mock.patch.object(Operation, "choose", choose),
        mock.patch.object(frozen_linear, "_takes_kernel", takes_kernel),
        mock.patch.object(packed, "differs", always(0.0)),
        mock.patch.object(library, "direct", always(False)),
        # There is no autocast for this device.
        mock.patch.object(torch, "is_autocast_enabled", always(False)),
        mock.patch.object(torch, "autocast", always(nullcontext())),
        mock.patch.object(torch, "get_autocast_dtype", always(torch.bfloat16)),
    ):
        yield


@dataclass(frozen=True)
class Piece:
    """Memory that lived at the peak: its bytes, the operator that made it and the line that called that."""

    bytes: int
    operator: str
    origin: str


class Footprint(TorchDispatchMode):
    """Counts what operators launch and what memory their results take while they live.

    Attributes:
        live, peak: bytes, without what lived before.
        launches: operators that launch something, by (name, line of the package that called it).
        written: bytes of what these return, by the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.launches: Counter[tuple[str, str]] = Counter()
        self.written: Counter[tuple[str, str]] = Counter()
        self._known: dict[int, Any] = {}
        # (storage, piece or None where it is gone), in order; the peak was after so many of them.
        self._events: list[tuple[int, Piece | None]] = []
        self._events_at_peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        before = {id(each.untyped_storage()) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        result = func(*args, **(kwargs or {}))
        origin = _origin()
        if name not in _FREE:
            self.launches[name, origin] += 1
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                if name not in _FREE:
                    self.written[name, origin] += each.numel() * each.element_size()
                storage = each.untyped_storage()
                if id(storage) not in self._known and id(storage) not in before:
                    self._born(storage, Piece(storage.nbytes(), name, origin))
        return result

    def _born(self, storage: Any, piece: Piece) -> None:
        key = id(storage)

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= piece.bytes
            self._events.append((key, None))

        self._known[key] = weakref.ref(storage, gone)
        self.live += piece.bytes
        self._events.append((key, piece))
        if self.live > self.peak:
            self.peak, self._events_at_peak = self.live, len(self._events)

    def at_peak(self) -> list[Piece]:
        """What lived at the peak, oldest first."""
        living: dict[int, Piece] = {}
        for key, piece in self._events[: self._events_at_peak]:
            if piece is None:
                living.pop(key, None)
            else:
                living[key] = piece
        return list(living.values())


def _origin() -> str:
    """The innermost line of the package's own code that is at work."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "epic_fast" in path and "/testing/" not in path and "/ops/" not in path and "/kernels/" not in path:
            return f"{path.rsplit('epic_fast/', 1)[1]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"
