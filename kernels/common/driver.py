"""Launches straight through CUDA's driver, everything but addresses written down beforehand.

Triton's launcher takes the arguments of a kernel as Python objects and turns each into a C value, at every launch.  Of
a planned launch only the addresses change.  So the values stand in memory that the driver reads; addresses are written
there in one stroke for all launches of a plan, and a launch is one call of ``cuLaunchKernel``.

What a compiled kernel expects is asked of the driver itself (``cuFuncGetParamInfo``): where that is not what Triton's
signature says, or a kernel wants more than a plain launch (clusters, scratch memory, descriptors), Triton launches.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from typing import Any

_NUMBERS: dict[str, Any] = {
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
}
_WARP = 32
# The driver's answer beyond the last parameter.
_INVALID_VALUE = 1
# Triton adds two pointers for scratch memory, which these kernels do not use.
_SCRATCH_POINTERS = 2


class Places:
    """Memory for the addresses of a plan's tensors, in the order of its places; one call at a time may use it."""

    def __init__(self, count: int) -> None:
        self.memory = (ctypes.c_uint64 * count)()
        self.lock = threading.Lock()


class Launch:
    """A kernel, its grid and its arguments; a call launches it on a stream."""

    def __init__(self, before: tuple[Any, ...], parameters: Any, kept: list[Any]) -> None:
        self._before, self._parameters = before, parameters
        # Memory that the parameters point to.
        self._kept = kept
        functions = _driver()
        assert functions is not None
        self._launch = functions[0]

    def __call__(self, stream: Any) -> None:
        status = self._launch(*self._before, stream, self._parameters, None)
        if status:
            raise RuntimeError(f"the CUDA driver did not launch a kernel: error {status}")


def prepared(
    compiled: Any, programs: int, places: Sequence[int], numbers: Sequence[Any], memory: Places
) -> Launch | None:
    """The launch of a compiled kernel; None where Triton has to do it.

    Args:
        compiled: Triton's ``CompiledKernel``, loaded on the current device.
        programs: size of the grid; at least 1.
        places: for each pointer, which come first among the arguments, where its address stands in ``memory``.
        numbers: the other arguments, constexprs included.
        memory: of the plan.
    """
    functions = _driver()
    metadata, types = compiled.metadata, list(compiled.src.signature.values())
    if functions is None or programs < 1 or len(types) != len(places) + len(numbers):
        return None
    plain = ("num_ctas", 1), ("launch_cooperative_grid", False), ("launch_pdl", False)
    unused = ("global_scratch_size", 0), ("profile_scratch_size", 0)
    if any((getattr(metadata, name, usual) or usual) != usual for name, usual in (*plain, *unused)):
        return None
    pointers: list[Any] = []
    sizes: list[int] = []
    kept: list[Any] = []
    start = ctypes.addressof(memory.memory)
    for index, kind in enumerate(types):
        if kind == "constexpr":
            continue
        if isinstance(kind, str) and kind.startswith("*") and index < len(places):
            pointers.append(start + places[index] * ctypes.sizeof(ctypes.c_uint64))
            sizes.append(ctypes.sizeof(ctypes.c_uint64))
        elif kind in _NUMBERS and index >= len(places):
            value = _NUMBERS[kind](numbers[index - len(places)])
            kept.append(value)
            pointers.append(ctypes.addressof(value))
            sizes.append(ctypes.sizeof(value))
        else:
            return None
    nothing = ctypes.c_uint64(0)
    kept += [nothing, memory]
    pointers += [ctypes.addressof(nothing)] * _SCRATCH_POINTERS
    sizes += [ctypes.sizeof(nothing)] * _SCRATCH_POINTERS
    if _sizes(functions[1], compiled.function) != sizes:
        return None
    one = ctypes.c_uint(1)
    before = (
        ctypes.c_void_p(compiled.function),
        ctypes.c_uint(programs),
        one,
        one,
        ctypes.c_uint(_WARP * metadata.num_warps),
        one,
        one,
        ctypes.c_uint(metadata.shared),
    )
    return Launch(before, (ctypes.c_void_p * len(pointers))(*pointers), kept)


def _sizes(info: Any, function: int) -> list[int]:
    """Bytes of each parameter of a loaded kernel, as the driver knows them; empty if it does not say."""
    found: list[int] = []
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    while True:
        status = info(
            ctypes.c_void_p(function), ctypes.c_size_t(len(found)), ctypes.byref(offset), ctypes.byref(size)
        )  # fmt: skip
        if status:
            return found if status == _INVALID_VALUE else []
        found.append(size.value)


@functools.cache
def _driver() -> tuple[Any, Any] | None:
    """``cuLaunchKernel`` and ``cuFuncGetParamInfo`` (CUDA 12.4); None without them."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        return library.cuLaunchKernel, library.cuFuncGetParamInfo
    except (OSError, AttributeError):
        return None
