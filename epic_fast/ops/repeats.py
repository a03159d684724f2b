"""Calls that come again: recognised by one look at all their tensors.

A training step calls an operation with tensors like those of the step before, at other addresses.  What was found out
about them then (that they fit together, that the kernel takes them, which plan it has for them) holds again.  The
guards of ``torch.compile`` tell in two microseconds whether tensors are alike in everything but their memory: class,
type, device, sizes, strides, whether they need a gradient, lazy signs and zeros, and the state of the dispatcher,
autocast included.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from epic_fast.ops import library

# pyright knows little of what is underneath.
_C: Any = torch._C

# Kinds of calls beyond these push out all others; of those with the same first shape the oldest.
MOST_SHAPES, MOST_ALIKE = 128, 4


class Known:
    """Stands for all calls whose tensors are alike; equal to itself alone."""

    def __init__(self, guards: Any, absent: tuple[bool, ...]) -> None:
        self._guards, self._absent = guards, absent
        # What else is kept of these calls, by whoever makes them (``epic_fast/ops/native.py``).
        self.calls: dict[Hashable, Any] = {}

    def covers(self, given: list[Tensor], absent: tuple[bool, ...]) -> bool:
        return self._absent == absent and self._guards.check(*given)


class Repeats:
    """The kinds of calls of an operation that its kernel took, directly."""

    def __init__(self) -> None:
        self._known: dict[Hashable, list[Known]] = {}

    def find(self, impl: str, tensors: Sequence[Tensor | None]) -> Known | None:
        """What these tensors are known as; None if they are not, or where a call may not pass the operators by."""
        if not library.unwatched():
            return None
        given = [each for each in tensors if each is not None]
        kin = self._known.get((impl, len(given), given[0].shape))
        if kin is None:
            return None
        absent = _absent(given, tensors)
        for known in kin:
            if known.covers(given, absent):
                return known
        return None

    def keep(self, impl: str, tensors: Sequence[Tensor | None]) -> None:
        """Remember a call that the kernel takes, made without autocast and for which :func:`library.direct` holds."""
        given = [each for each in tensors if each is not None]
        absent = _absent(given, tensors)
        kin = self._known.get((impl, len(given), given[0].shape), ())
        if any(known.covers(given, absent) for known in kin):
            return
        guards = _guards_of(given)
        if guards is None:
            return
        if len(self._known) >= MOST_SHAPES:
            self._known.clear()
        kin = self._known.setdefault((impl, len(given), given[0].shape), [])
        kin[:] = [Known(guards, absent), *kin[: MOST_ALIKE - 1]]


def with_gradients(
    known: Known | None, inputs: Sequence[Tensor | None], *others: Tensor | None
) -> Hashable:  # fmt: skip
    """What the backward pass of a known call is known as; None if it is not, or may not pass the operators by.

    Args:
        known: the forward pass.
        inputs: of the forward pass, as they were saved: a hook on saved tensors may have made others of them.
        others: gradients of the outputs and whatever else was saved; their shapes follow from the inputs.
    """
    if known is None or not library.unwatched() or not library.plain(*others):
        return None
    given = [each for each in inputs if each is not None]
    if not known.covers(given, _absent(given, inputs)):
        return None
    return (known, *[None if each is None else (each.stride(), each.dtype) for each in others])


def _absent(given: list[Tensor], tensors: Sequence[Tensor | None]) -> tuple[bool, ...]:
    return () if len(given) == len(tensors) else tuple([each is None for each in tensors])


def _guards_of(given: list[Tensor]) -> Any:
    """None where this release of PyTorch has none such: then no call is ever recognised, which is slower and right."""
    try:
        guards = _C._dynamo.guards.TensorGuards(*given, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return guards if guards.check(*given) is True else None
    except (AttributeError, TypeError, RuntimeError):
        return None
