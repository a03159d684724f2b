"""Tensors (..., D) as rows for kernels that go row by row: outer and inner strides, and what Triton compiles for."""

# pyright: basic

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

_HERE = contextlib.nullcontext()


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


def facts_of(tensors: Sequence[Tensor | None], integers: Sequence[int], constants: Hashable) -> Hashable:
    """What :func:`epic_fast.kernels.common.launch.launch` keeps a compiled kernel under; None where Triton is to look.

    Args:
        tensors: the pointers, or None.
        integers: those that are no constexpr, none of them specialised but by its width.
        constants: every constexpr and option.
    """
    addresses, types = 0, []
    for tensor in tensors:
        if tensor is None:
            types.append(None)
        else:
            addresses |= tensor.data_ptr()
            types.append(tensor.dtype)
    if addresses % 16 or max(integers) >= 2**31:
        return None
    return tuple(types), constants


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)
