"""Tensors (..., D) as rows for kernels that go row by row: outer and inner strides, and what Triton compiles for."""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from epic_fast.kernels.common import launch
from epic_fast.kernels.common.plan import Tape


def as_rows(tensor: Tensor) -> Tensor:
    """The tensor with unit last stride and two or three dimensions; a copy only where no view is one."""
    if tensor.dim() not in (2, 3):
        tensor = tensor.reshape(-1, tensor.shape[-1])
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def row_strides(tensors: Sequence[Tensor | None]) -> tuple[int, tuple[int, ...], int]:
    """How rows ``outer * inner_rows + inner`` of tensors of one shape lie in memory.

    Args:
        tensors: results of :func:`as_rows`; None for one that is not there.

    Returns:
        ``inner_rows``; each tensor's outer and inner stride in units; the unit in elements, 16 where all allow it and
        else 1: a kernel that is told the unit loads 16 bytes at a time without being compiled for a stride.
    """
    strides: list[int] = []
    together = inner_rows = 0
    for tensor in tensors:
        if tensor is None:
            strides += (0, 0)
            continue
        *outer, inner, _ = tensor.stride()
        inner_rows = tensor.shape[-2]
        step = outer[0] if outer else 0
        strides += (step, inner)
        together |= step | inner
    if together % 16:
        return inner_rows, tuple(strides), 1
    return inner_rows, tuple(each >> 4 for each in strides), 16


def rows_of(tape: Tape, tensor: Tensor) -> Tensor:
    """:func:`as_rows` on a tape."""
    if tensor.dim() in (2, 3) and tensor.stride(-1) == 1:
        return tensor
    return tape.derive(as_rows, tensor)


def contiguous(tape: Tape, tensor: Tensor) -> Tensor:
    """The tensor itself or a copy."""
    return tensor if tensor.is_contiguous() else tape.derive(Tensor.contiguous, tensor)


def facts_of(tensors: Sequence[Tensor | None], integers: Sequence[int], constants: Hashable) -> Hashable:
    """:func:`epic_fast.kernels.common.launch.facts_of` where every pointer is compiled for its alignment."""
    return launch.facts_of(tensors, (), integers, constants)
