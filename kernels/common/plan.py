"""What a launcher does for a call, written down once and done again for every call of the same signature.

A launcher looks at shapes and strides, chooses kernels and tiles, allocates, and puts sixty arguments into a row.  All
of it follows from the *signature* of the call, so it is done for the first call of a signature only.  There the
launcher runs on the real tensors and does what it does through a :class:`Tape`, which writes it down: allocations, the
few torch operations around kernels, launches.  The :class:`Plan` that remains holds places in place of tensors; a later
call fills them in.

Plans stand above the compiled kernels (:mod:`epic_fast.kernels.common.launch`): a new signature makes a new plan, and
a new kernel only where Triton would compile one.
"""

# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import ctypes
import dataclasses
import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from operator import itemgetter, or_
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from epic_fast.kernels.common import driver
from epic_fast.kernels.common.descriptors import Described, Encoded, behind_encoding
from epic_fast.kernels.common.launch import VECTOR_BYTES, is_watched, kept, launch

# Signatures beyond these push out the oldest: a loader whose batches differ in length must not fill the memory.
MOST_PLANS = 512
# Where a plan may hand addresses to compiled kernels (switched off where tensors have no memory).
DIRECT = True
_MISALIGNED = VECTOR_BYTES - 1
_HERE = nullcontext()
_guards = torch._C._dynamo.guards

_plans: dict[Hashable, Plan] = {}
# Autograd calls from threads of its own.
_lock = threading.Lock()
_thread = threading.local()
# Of plans: whoever keeps one elsewhere keeps it for this generation only.
generation = 0


def run(
    launcher: Callable[..., tuple[Tensor | None, ...]],
    tensors: tuple[Tensor | None, ...],
    options: tuple[Hashable, ...],
    alike: Hashable = None,
) -> tuple[Tensor | None, ...]:
    """``launcher(tape, *tensors, *options)``, or what the last such call is known to have done.

    Args:
        launcher: what it does to tensors, it does through the tape; everything else that it looks at is part of the
            signature: device, shapes, strides, types and alignment of the tensors, which of them are None, the options.
            Where one tensor lies beside another is not: a launcher to which that matters needs it as an option.
        tensors: all tensors of the call; the first is not None, and all are on its device.
        options: everything else, hashable.
        alike: what the caller knows of the tensors: those of all calls with an equal one differ in nothing but their
            addresses (device, shapes, strides, types and which are None are the same).  Saves a look at each tensor.

    Returns:
        What the launcher returns: a tuple of tensors, made through the tape or given, and None.
    """
    present = [each for each in tensors if each is not None]
    addresses = [each.data_ptr() for each in present]
    # Which of the tensors is not aligned decides about the kernels.
    odd = tuple([each & _MISALIGNED for each in addresses]) if functools.reduce(or_, addresses) & _MISALIGNED else 0
    signature: Hashable
    if alike is not None:
        signature = (launcher, options, odd, alike)
    else:
        signature = (
            launcher,
            options,
            odd,
            present[0].device,
            tuple([each.shape for each in present]),
            tuple([each.stride() for each in present]),
            tuple([each.dtype for each in present]),
            None if len(present) == len(tensors) else tuple([each is None for each in tensors]),
        )
    plan = _plans.get(signature)
    noted = getattr(_thread, "noted", None)
    if plan is not None:
        results = plan(present, addresses)
        if noted is not None:
            noted.append((plan, results))
        return results
    given = _told_apart(tensors)
    tape = Tape([each for each in given if each is not None])
    with on_device(present[0].device):
        results = launcher(tape, *given, *options)
    plan = tape.plan(results)
    if plan is not None:
        plan.prepare()
        with _lock:
            while len(_plans) >= MOST_PLANS:
                del _plans[next(iter(_plans))]
            _plans[signature] = plan
        if noted is not None:
            noted.append((plan, results))
    return results


@contextmanager
def noting() -> Iterator[list[tuple[Plan, tuple[Tensor | None, ...]]]]:
    """The plans that this thread's calls of :func:`run` take or make meanwhile, each with its results."""
    _thread.noted = noted = []
    try:
        yield noted
    finally:
        _thread.noted = None


def forget() -> None:
    """Drop all plans, as after a change of what a signature does not name (tests put other kernels in place)."""
    global generation
    with _lock:
        _plans.clear()
        generation += 1


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def precision(*dtypes: torch.dtype) -> str:
    """The ``input_precision`` of products: on tensor cores where torch's own matrix products may use TF32.

    Operands that are cut to TF32 would make errors three times as large as PyTorch's, which rounds them, takes IEEE
    arithmetic for small products and in attention always splits.  So operands are split here too, and float32 keeps
    its 24 bits.

    A global setting, so it belongs into the options of :func:`run`.
    """
    if torch.float32 in dtypes and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return _split()
    return "ieee"


@functools.cache
def _split() -> str:
    """Three bfloat16 pieces a number and the six largest of their products; before Triton 3.6, and in its interpreter
    (which multiplies in float32 whatever the name), two TF32 pieces and three products, which AMD's cards lack."""
    from triton.backends.amd.compiler import HIPOptions
    from triton.backends.nvidia.compiler import CUDAOptions

    known = "bf16x6" in (HIPOptions if torch.version.hip else CUDAOptions).allowed_dot_input_precisions
    if known and not knobs.runtime.interpret:
        return "bf16x6"
    return "ieee" if torch.version.hip else "tf32x3"


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Where to launch: this GPU, which costs nothing if it is the current one already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


def unit_last_stride(tape: Tape, tensor: Tensor | None) -> Tensor | None:
    """The tensor itself or a copy: autograd may hand over any strides, those of an expanded scalar among them."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tape.derive(Tensor.contiguous, tensor)


class Tape:
    """Does what a launcher asks for and writes it down."""

    def __init__(self, given: list[Tensor]) -> None:
        self._device = given[0].device
        # Held until the plan is made, so that no identity is given twice.
        self._tensors = list(given)
        self._places: dict[int, tuple[str, int]] = {id(each): ("given", index) for index, each in enumerate(given)}
        self._counts = {"given": len(given), "made": 0, "scratch": 0, "derived": 0}
        self._made: list[_Memory] = []
        self._scratch: list[_Memory] = []
        self._steps: list[tuple[Any, ...]] = []
        self._plannable = True

    def empty(self, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None) -> Tensor:
        """Memory for a result."""
        return self._allocate("made", self._made, shape, dtype, stride)

    def scratch(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Contiguous memory that only the launches of this call look at."""
        return self._allocate("scratch", self._scratch, shape, dtype, None)

    def derive(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """``function(*tensors)``, a new tensor; none of them scratch."""
        found = function(*tensors)
        self._steps.append(("derive", function, self._look_up(tensors)))
        self._remember(found, "derived")
        return found

    def apply(self, function: Callable[..., Any], *tensors: Tensor) -> None:
        """``function(*tensors)``, which writes into one of them; none of them scratch."""
        function(*tensors)
        self._steps.append(("apply", function, self._look_up(tensors)))

    def launch(
        self, kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any], facts: Hashable
    ) -> None:
        """As :func:`epic_fast.kernels.common.launch.launch`; pointers and descriptors stand before numbers."""
        launch(kernel, programs, arguments, options, facts)
        pointers = max(index for index, each in enumerate(arguments) if isinstance(each, (Tensor, Described))) + 1
        given = arguments[:pointers]
        places = self._look_up([each.tensor if isinstance(each, Described) else each for each in given])
        forms = tuple(_Form.of(each) if isinstance(each, Described) else None for each in given)
        self._steps.append(("launch", kernel, programs, places, forms, arguments[pointers:], options, facts))

    def plan(self, results: tuple[Tensor | None, ...]) -> Plan | None:
        """What was done; None if it was done with tensors of which the tape knows nothing."""
        results_at = self._look_up(results)
        if not self._plannable:
            return None
        first, starts = 1, {}
        for kind, count in self._counts.items():
            starts[kind] = first
            first += count

        def numbered(places: Sequence[tuple[str, int] | None]) -> tuple[int, ...]:
            return tuple(0 if each is None else starts[each[0]] + each[1] for each in places)

        steps: list[Any] = []
        for kind, *fields in self._steps:
            if kind == "launch":
                kernel, programs, places, *others = fields
                steps.append(_Launch(kernel, programs, numbered(places), *others))
            else:
                function, places = fields
                steps.append(_Torch(function, numbered(places), kind == "derive"))
        return Plan(self._device, self._counts["given"], self._made, self._scratch, steps, numbered(results_at))

    def _allocate(
        self, kind: str, memories: list[_Memory], shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None
    ) -> Tensor:
        memory = (tuple(shape), contiguous_stride(shape) if stride is None else tuple(stride), dtype)
        memories.append(memory)
        return self._remember(_empty(memory, self._device), kind)

    def _remember(self, tensor: Tensor, kind: str) -> Tensor:
        self._tensors.append(tensor)
        # Of what is derived, a tensor that was there already keeps its place.
        self._places.setdefault(id(tensor), (kind, self._counts[kind]))
        self._counts[kind] += 1
        return tensor

    def _look_up(self, tensors: Sequence[Any]) -> list[tuple[str, int] | None]:
        places = [None if each is None else self._places.get(id(each)) for each in tensors]
        if any(place is None and each is not None for place, each in zip(places, tensors, strict=True)):
            self._plannable = False
        return places


class Plan:
    """What a call does, with numbered places for its tensors.

    Place 0 is None; then come the tensors of the call, what is made for its caller, scratch, and what torch operations
    derive.  On a GPU the places hold addresses as well, and scratch is one allocation with addresses alone.
    """

    def __init__(
        self,
        device: torch.device,
        given: int,
        made: list[_Memory],
        scratch: list[_Memory],
        steps: list[Any],
        results: tuple[int, ...],
    ) -> None:
        self._device, self._index = device, device.index
        self._made, self._scratch, self._steps = made, scratch, steps
        self._results = _picker(results)
        self._offsets, self._bytes = [], 0
        for shape, _, dtype in scratch:
            self._offsets.append(self._bytes)
            size = dtype.itemsize
            for count in shape:
                size *= count
            self._bytes += -(-size // _APART) * _APART
        self._ready: list[tuple[Any, ...]] | None = None
        # The same in C++, where that is built and all steps are plain launches.
        self.native: Any = None
        self._given, self._results_at = given, results
        derived = sum(isinstance(step, _Torch) and step.derives for step in steps)
        self._places = driver.Places(1 + given + len(made) + len(scratch) + derived)

    def __call__(self, given: list[Tensor], addresses: list[int]) -> tuple[Tensor | None, ...]:
        """Do it for these tensors."""
        ready = self._ready
        if ready is None or torch._C._cuda_getDevice() != self._index or is_watched():
            return self._slowly(given)
        if self.native is not None:
            found = self.native.run(given)
            if isinstance(found, int):
                raise RuntimeError(f"the CUDA driver did not launch a kernel: error {found}")
            return found
        allocate = _guards._empty_strided_cuda
        tensors: list[Any] = [None, *given]
        places: list[Any] = [0, *addresses]
        for size, stride, dtype in self._made:
            tensor = allocate(size, stride, dtype)
            tensors.append(tensor)
            places.append(tensor.data_ptr())
        if self._offsets:
            memory = allocate((self._bytes,), (1,), torch.uint8)
            start = memory.data_ptr()
            for offset in self._offsets:
                tensors.append(None)
                places.append(start + offset)
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        # Threads that run the same plan share the memory for its addresses.
        with self._places.lock:
            written, handle = 0, ctypes.c_void_p(stream)
            for direct, through_triton, derive in ready:
                if direct is not None:
                    if written < len(places):
                        written = len(places)
                        self._places.memory[:written] = places
                    direct(handle)
                elif through_triton is not None:
                    run, programs, function, metadata, pick, numbers = through_triton
                    run(programs, 1, 1, stream, function, metadata, None, None, None, *pick(places), *numbers)
                elif derive(tensors):
                    places.append(tensors[-1].data_ptr())
        return self._results(tensors)

    def _slowly(self, given: list[Tensor]) -> tuple[Tensor | None, ...]:
        """With tensors in all places, and each launch as if it were alone: where a profiler is to see it, in Triton's
        interpreter, and as long as a kernel is not compiled."""
        with on_device(self._device):
            device = given[0].device
            tensors: list[Any] = [None, *given]
            for memory in (*self._made, *self._scratch):
                tensors.append(_empty(memory, device))
            for step in self._steps:
                step(tensors)
        if self._ready is None:
            self.prepare()
        return self._results(tensors)

    @property
    def is_ready(self) -> bool:
        """Whether it runs by addresses, so that what can be compiled of it is."""
        return self._ready is not None

    def prepare(self) -> None:
        """Take the compiled kernels, if all of them are there."""
        if not DIRECT or self._device.type != "cuda":
            return
        ready = []
        for step in self._steps:
            entry = step.ready(self._index, self._places)
            if entry is None:
                return
            ready.append(entry)
        self._ready = ready
        module = driver.native() if driver.native is not None else None
        if module is None or not all(direct is not None for direct, _, _ in ready):
            return
        fields = [dataclasses.astuple(direct.fields) for direct, _, _ in ready]
        self.native = module.Plan(
            str(self._device),
            self._given,
            self._made,
            self._bytes,
            self._offsets,
            fields,
            list(self._results_at),
            driver.launch_address(),
            torch._C._cuda_getCurrentRawStream,
            driver.enter,
        )


_Memory = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
# Pieces of scratch start as far apart as memory that CUDA allocates is aligned.
_APART = 256


class _Launch:
    def __init__(
        self,
        kernel: Any,
        programs: int,
        places: tuple[int, ...],
        forms: tuple[_Form | None, ...],
        numbers: tuple[Any, ...],
        options: dict[str, Any],
        facts: Hashable,
    ) -> None:
        self.kernel, self.programs, self.numbers, self.options, self.facts = kernel, programs, numbers, options, facts
        self.places, self.pick = places, _picker(places)
        self.forms = forms if any(forms) else None

    def __call__(self, tensors: list[Any]) -> None:
        given = self.pick(tensors)
        if self.forms is not None:
            given = [
                each if form is None else Described(each, form.make)
                for each, form in zip(given, self.forms, strict=True)
            ]
        launch(self.kernel, self.programs, (*given, *self.numbers), self.options, self.facts)

    def ready(self, device: int, memory: driver.Places) -> tuple[Any, ...] | None:
        compiled = kept(self.kernel, device, self.facts)
        if compiled is None:
            return None
        run, pick = compiled.run, self.pick
        if self.forms is None:
            direct = driver.prepared(compiled, device, self.programs, self.places, self.numbers, memory)
            if direct is not None:
                return direct, None, None
        if self.forms is not None:
            run = behind_encoding(run)
            about = iter(compiled.metadata.tensordesc_meta or ())
            encoded = [
                None if form is None else Encoded(form.make, form.shape, form.stride, form.dtype, next(about, None))
                for form in self.forms
            ]
            if run is None:
                return None
            pick = _encoding_picker(pick, encoded)
        return None, (run, self.programs, compiled.function, compiled.packed_metadata, pick, self.numbers), None


@dataclass(frozen=True)
class _Form:
    """Of a tensor that goes by a descriptor: everything but its address."""

    make: Callable[[Tensor], Any]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, described: Described) -> _Form:
        tensor = described.tensor
        return cls(described.make, tuple(tensor.shape), tensor.stride(), tensor.dtype)


class _Torch:
    def __init__(self, function: Callable[..., Any], places: tuple[int, ...], derives: bool) -> None:
        self.function, self.pick, self.derives = function, _picker(places), derives

    def __call__(self, tensors: list[Any]) -> bool:
        """Whether there is one tensor more."""
        found = self.function(*self.pick(tensors))
        if self.derives:
            tensors.append(found)
        return self.derives

    def ready(self, device: int, memory: driver.Places) -> tuple[Any, ...]:
        return None, None, self


def _picker(places: tuple[int, ...]) -> Callable[[list[Any]], tuple[Any, ...]]:
    if len(places) > 1:
        return itemgetter(*places)
    return lambda tensors: tuple([tensors[place] for place in places])


def _encoding_picker(
    pick: Callable[[list[Any]], tuple[Any, ...]], encoded: list[Encoded | None]
) -> Callable[[list[Any]], list[Any]]:
    def picked(places: list[Any]) -> list[Any]:
        arguments: list[Any] = []
        for address, known in zip(pick(places), encoded, strict=True):
            if known is None:
                arguments.append(address)
            else:
                arguments += known[address]
        return arguments

    return picked


def _empty(memory: _Memory, device: torch.device) -> Tensor:
    shape, stride, dtype = memory
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _told_apart(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The same tensors, one that is given twice as two: a tape knows tensors by their identity."""
    seen: set[int] = set()
    apart = []
    for tensor in tensors:
        if tensor is not None and id(tensor) in seen:
            tensor = tensor.detach()
        seen.add(id(tensor))
        apart.append(tensor)
    return apart
