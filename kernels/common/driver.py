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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_NUMBERS: dict[str, Any] = {
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
}
_WARP = 32
# The driver's answers beyond the last parameter, and in a thread that has not met the card yet.
_INVALID_VALUE, _INVALID_CONTEXT = 1, 201
# Triton adds two pointers for scratch memory, which these kernels do not use.
_SCRATCH_POINTERS = 2
# Asked for a module whose ``Plan`` runs a plan of launches in C++; set by whoever builds one.
native: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Fields:
    """A launch in numbers: of each parameter the place whose address it is, or -1 and its value as eight bytes."""

    function: int
    programs: int
    threads: int
    shared: int
    places: list[int]
    values: list[int]


class Places:
    """Memory for the addresses of a plan's tensors, in the order of its places; one call at a time may use it."""

    def __init__(self, count: int) -> None:
        self.memory = (ctypes.c_uint64 * count)()
        self.lock = threading.Lock()


class Launch:
    """A kernel, its grid and its arguments; a call launches it on a stream."""

    def __init__(
        self, device: int, before: tuple[Any, ...], parameters: Any, kept: list[Any], fields: Fields
    ) -> None:  # fmt: skip
        self._device, self._before, self._parameters = device, before, parameters
        self.fields = fields
        # Memory that the parameters point to.
        self._kept = kept
        library = _driver()
        assert library is not None
        self._launch = library.cuLaunchKernel

    def __call__(self, stream: Any) -> None:
        status = self._launch(*self._before, stream, self._parameters, None)
        if status == _INVALID_CONTEXT:
            enter(self._device)
            status = self._launch(*self._before, stream, self._parameters, None)
        if status:
            raise RuntimeError(f"the CUDA driver did not launch a kernel: error {status}")


def prepared(
    compiled: Any, device: int, programs: int, places: Sequence[int], numbers: Sequence[Any], memory: Places
) -> Launch | None:
    """The launch of a compiled kernel; None where Triton has to do it.

    Args:
        compiled: Triton's ``CompiledKernel``, loaded on the device.
        device: its index.
        programs: size of the grid; at least 1.
        places: for each pointer, which come first among the arguments, where its address stands in ``memory``.
        numbers: the other arguments, constexprs included.
        memory: of the plan.
    """
    library = _driver()
    metadata, types = compiled.metadata, list(compiled.src.signature.values())
    if library is None or programs < 1 or len(types) != len(places) + len(numbers):
        return None
    plain = ("num_ctas", 1), ("launch_cooperative_grid", False), ("launch_pdl", False)
    unused = ("global_scratch_size", 0), ("profile_scratch_size", 0)
    if any((getattr(metadata, name, usual) or usual) != usual for name, usual in (*plain, *unused)):
        return None
    pointers: list[Any] = []
    sizes: list[int] = []
    at: list[int] = []
    values: list[int] = []
    kept: list[Any] = []
    start = ctypes.addressof(memory.memory)
    for index, kind in enumerate(types):
        if kind == "constexpr":
            continue
        if isinstance(kind, str) and kind.startswith("*") and index < len(places):
            pointers.append(start + places[index] * ctypes.sizeof(ctypes.c_uint64))
            sizes.append(ctypes.sizeof(ctypes.c_uint64))
            at.append(places[index])
            values.append(0)
        elif kind in _NUMBERS and index >= len(places):
            value = _NUMBERS[kind](numbers[index - len(places)])
            kept.append(value)
            pointers.append(ctypes.addressof(value))
            sizes.append(ctypes.sizeof(value))
            at.append(-1)
            values.append(int.from_bytes(bytes(value), "little"))
        else:
            return None
    nothing = ctypes.c_uint64(0)
    kept += [nothing, memory]
    pointers += [ctypes.addressof(nothing)] * _SCRATCH_POINTERS
    sizes += [ctypes.sizeof(nothing)] * _SCRATCH_POINTERS
    if _sizes(library.cuFuncGetParamInfo, compiled.function) != sizes:
        return None
    threads = _WARP * metadata.num_warps
    unused_places, unused_values = [-1] * _SCRATCH_POINTERS, [0] * _SCRATCH_POINTERS
    fields = Fields(
        compiled.function, programs, threads, metadata.shared, at + unused_places, values + unused_values
    )  # fmt: skip
    one = ctypes.c_uint(1)
    before = (
        ctypes.c_void_p(compiled.function),
        ctypes.c_uint(programs),
        one,
        one,
        ctypes.c_uint(threads),
        one,
        one,
        ctypes.c_uint(metadata.shared),
    )
    return Launch(device, before, (ctypes.c_void_p * len(pointers))(*pointers), kept, fields)


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


def launch_address() -> int:
    """Of the driver's ``cuLaunchKernel``; a launch has been prepared, so it is there."""
    library = _driver()
    assert library is not None
    return ctypes.cast(library.cuLaunchKernel, ctypes.c_void_p).value or 0


def enter(device: int) -> None:
    """Make the card's context, which PyTorch has made, that of this thread."""
    library = _driver()
    assert library is not None
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    library.cuDeviceGet(ctypes.byref(handle), ctypes.c_int(device))
    library.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
    library.cuCtxSetCurrent(context)


@functools.cache
def _driver() -> Any:
    """CUDA's driver; None without it, or where it is older than CUDA 12.4 and tells nothing of parameters."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return library if hasattr(library, "cuFuncGetParamInfo") else None
