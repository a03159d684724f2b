"""Tensor descriptors (TMA) of the host as arguments of a launch, encoded once for each address.

A descriptor is 128 bytes that the driver encodes from an address, a shape, strides and a block.  Triton encodes all of
them for every launch.  A plan knows shapes and strides; addresses come again from step to step, so it keeps what was
encoded for them and hands it to Triton's launcher behind the place where that would encode.
"""

# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Addresses beyond these (a kilobyte each with its Python object) are encoded anew.
MOST_ADDRESSES = 256


@dataclass(frozen=True)
class Described:
    """In the arguments of a launch: this tensor by a descriptor, ``make(tensor)``."""

    tensor: Tensor
    make: Callable[[Tensor], Any]


class Encoded(dict[int, tuple[Any, ...]]):
    """What Triton's launcher takes in place of a descriptor, by the address of its tensor.

    Args:
        make: a descriptor of a tensor.
        shape, stride, dtype: of the tensors.
        metadata: what the compiled kernel says of this argument.
    """

    def __init__(
        self,
        make: Callable[[Tensor], Any],
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        dtype: torch.dtype,
        metadata: Any,
    ) -> None:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        self._descriptor = make(torch.empty_strided(shape, stride, dtype=dtype, device="meta"))
        # Triton 3.9 hands over the launch as well, which it does not look at.
        rest = len(inspect.signature(make_tensordesc_arg).parameters) - 2
        self._encode: Callable[[Any], Any] = lambda given: make_tensordesc_arg(given, metadata, *[None] * rest)

    def __missing__(self, address: int) -> tuple[Any, ...]:
        descriptor = copy.copy(self._descriptor)
        descriptor.base = _Place(address)
        found = tuple(self._encode(descriptor))
        if len(self) >= MOST_ADDRESSES:
            self.clear()
        self[address] = found
        return found


@dataclass(frozen=True)
class _Place:
    address: int

    def data_ptr(self) -> int:
        return self.address


def behind_encoding(run: Any) -> Any:
    """The launcher of a compiled kernel without the step that encodes descriptors; None if this release of Triton has
    none such, and then every launch goes through it."""
    launch = getattr(run, "launch", None)
    names = getattr(getattr(launch, "__code__", None), "co_freevars", ())
    if "launcher" not in names:
        return None
    bare = copy.copy(run)
    bare.launch = launch.__closure__[names.index("launcher")].cell_contents
    return bare
