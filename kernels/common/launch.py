"""Launching a kernel again without asking Triton once more what its arguments are.

``kernel[grid](...)`` looks at every argument of every call: its type, its alignment, whether it is 1; and for every
tensor it asks the driver whether the GPU can reach it.  With sixty arguments that takes longer than a small kernel.
A launcher that already knows all of it from a handful of facts keeps the compiled kernel under those facts and hands
the arguments straight to it, tensors as addresses.
"""

# pyright: basic

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

from epic_fast.kernels.common.descriptors import Described  # pyright: ignore[reportMissingImports]

# What Triton specialises pointers for: those that are multiples of as many bytes.
VECTOR_BYTES = 16
# From here on an integer is passed in 64 bits.
INT32_EXTENT = 2**31

_compiled: dict[Hashable, Any] = {}


def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any], facts: Hashable) -> None:
    """Run ``programs`` programs of a kernel on the current device and stream.

    Args:
        kernel: a ``triton.jit`` function.
        arguments: all of its parameters in order, constexprs included; the first is a tensor, described or not.
        options: ``num_warps`` and the like.
        facts: everything that Triton would specialise the kernel for: the types of the pointers and which of them are
            None, whether each is a multiple of 16 bytes, whether an integer needs 64 bits, every constexpr, every
            option.  None: ask Triton, which is slower and always right.
    """
    first = arguments[0]
    if isinstance(first, Described):
        first = first.tensor
        arguments = tuple([each.make(each.tensor) if isinstance(each, Described) else each for each in arguments])
    if facts is None or not first.is_cuda or is_watched():
        kernel[(programs,)](*arguments, **options)
        return
    device = torch.cuda.current_device()
    key = (kernel.fn, device, facts)
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = kernel[(programs,)](*arguments, **options)
        if isinstance(compiled, CompiledKernel):
            _compiled[key] = compiled
        return
    stream = triton.runtime.driver.active.get_current_stream(device)  # pyright: ignore[reportAttributeAccessIssue]
    compiled.run(
        programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *addresses(arguments)
    )  # fmt: skip


def facts_of(
    tensors: Iterable[Tensor | None], scalars: Iterable[Tensor], integers: Sequence[int], constants: Hashable
) -> Hashable:
    """What :func:`launch` keeps a compiled kernel under; None where Triton is to look for itself, which is where an
    address is odd or an integer large.

    Args:
        tensors: the pointers whose alignment a kernel is compiled for.
        scalars: those whose alignment it is not.
        integers: all that are no constexpr; none of them is specialised but by its width.
        constants: every constexpr and option.
    """
    addresses = 0
    types: list[torch.dtype | None] = []
    for tensor in tensors:
        if tensor is None:
            types.append(None)
        else:
            addresses |= tensor.data_ptr()
            types.append(tensor.dtype)
    if addresses % VECTOR_BYTES or max(integers) >= INT32_EXTENT or min(integers) < -INT32_EXTENT:
        return None
    for tensor in scalars:
        types.append(tensor.dtype)
    return tuple(types), constants


def addresses(arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments with the address of each tensor in its place."""
    return [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]


def kept(kernel: Any, device: int, facts: Hashable) -> Any:
    """The compiled kernel that :func:`launch` would take on this device; None if there is none yet."""
    return None if facts is None else _compiled.get((kernel.fn, device, facts))


def is_watched() -> bool:
    """Whether a profiler has hung itself on Triton's launches; it sees those that go through Triton."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
