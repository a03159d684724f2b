"""Calls as CUDA graphs: static buffers for what goes in, one graph a shape, and eager where it cannot be.

A forward pass of small batches is a few hundred kernels that the host issues more slowly than the device runs them.  A
CUDA graph holds them all and is launched at once.  What it may not hold is a decision of the host: the shapes, the
memory of the weights and the modes of the modules are those of the capture.  So a :class:`GraphCache` keeps one graph
for each shape, text is filled up to a few lengths (:func:`to_bucket`, exact), and graphs whose :class:`Watch` sees
other memory or another mode are thrown away.

Everything but the recording itself is plain PyTorch behind :class:`Backend`, so that it is tested on a CPU.

Random draws: PyTorch registers the device's default generator with each graph; a replay takes seed and offset from the
generator and moves the offset on by as much as the eager calls would have, so the draws are those of the eager run,
and a generator's saved state resumes the same sequence.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from epic_fast.engine.prefix import Prefix
from epic_fast.hooks import HOOKS, all_hooked

logger = logging.getLogger("epic_fast")

# Lengths of text are rounded up to multiples of this; 77 tokens make five lengths.
BUCKET = 16
# The most graphs of one cache; the one that was unused for longest makes room.
CAPACITY = 32


class Recorded(Protocol):
    """What a backend made of a call."""

    result: Any

    def replay(self) -> None:
        """Run it again on the memory that it was recorded with; ``result`` then holds its new values."""
        ...


class Backend(Protocol):
    """Records and replays calls on one device."""

    def rehearse(self, work: Callable[[], Any]) -> None:
        """Run ``work`` eagerly as a recording would, so that whatever is lazy is done."""
        ...

    def record(self, work: Callable[[], Any]) -> Recorded:
        """Record ``work``; none of it has been computed before the first replay."""
        ...

    def recover(self) -> None:
        """Put the device's state right after a recording that failed."""
        ...

    def turn(self) -> AbstractContextManager[None]:
        """From copying the inputs to having copied the results: after what another stream did with the same memory."""
        ...

    def position(self) -> Any:
        """Where the device's random generator is."""
        ...

    def restore(self, position: Any) -> None:
        """Put the generator back to a :meth:`position`."""
        ...


class CudaBackend:
    """CUDA graphs that share one memory pool and one stream for recording.

    Sharing is safe because inputs lie outside of the pool and results are copied out of it before another graph runs.
    """

    def __init__(self, device: torch.device):
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.stream = torch.cuda.Stream(self.device)
        self.pool = torch.cuda.graph_pool_handle()
        self.done: torch.cuda.Event | None = None

    def rehearse(self, work: Callable[[], Any]) -> None:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        # On the recording's own stream, so that the libraries' workspaces for it are ordinary memory.
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream), _one_thread():
            work()
        current.wait_stream(self.stream)

    def record(self, work: Callable[[], Any]) -> Recorded:
        graph = torch.cuda.CUDAGraph()
        # The outer stream is the one to come back to: a recording that fails does not leave its own stream.
        # "thread_local": a loader's thread that pins memory meanwhile must not spoil the recording.
        with (
            torch.cuda.device(self.device),
            torch.cuda.stream(torch.cuda.current_stream(self.device)),
            _one_thread(),
            no_garbage(),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            result = work()
        return _CudaRecorded(graph, result)

    def recover(self) -> None:
        # A recording that was cut off leaves the generator expecting its end: go on from a copy of its state.
        generator = torch.cuda.default_generators[self.device.index]
        generator.graphsafe_set_state(generator.clone_state())
        self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def turn(self) -> Iterator[None]:
        stream = torch.cuda.current_stream(self.device)
        if self.done is None:
            self.done = torch.cuda.Event()
        else:
            stream.wait_event(self.done)
        try:
            yield
        finally:
            self.done.record(stream)

    def position(self) -> Any:
        return torch.cuda.default_generators[self.device.index].get_offset()

    def restore(self, position: Any) -> None:
        torch.cuda.default_generators[self.device.index].set_offset(position)


@dataclasses.dataclass
class _Collector:
    """How many recordings Python's garbage collector waits for, and whether it was enabled before them."""

    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    recordings: int = 0
    enabled: bool = True


_collector = _Collector()


@contextmanager
def no_garbage() -> Iterator[None]:
    """Garbage is collected now, and not while a graph is recorded, here or in another thread: among it there may be an
    older graph, and to destroy that spoils the recording."""
    with _collector.lock:
        if not _collector.recordings:
            gc.collect()
            _collector.enabled = gc.isenabled()
            gc.disable()
        _collector.recordings += 1
    try:
        yield
    finally:
        with _collector.lock:
            _collector.recordings -= 1
            if _collector.enabled and not _collector.recordings:
                gc.enable()


def _one_thread() -> AbstractContextManager[Any]:
    """A backward pass stays in the thread that records."""
    return torch.autograd.set_multithreading_enabled(False)


@dataclasses.dataclass
class _CudaRecorded:
    graph: torch.cuda.CUDAGraph
    result: Any

    def replay(self) -> None:
        self.graph.replay()


def backend_for(device: torch.device) -> Backend | None:
    """The backend of a device; None where nothing can be recorded."""
    return CudaBackend(device) if device.type == "cuda" else None


# -- trees ----------------------------------------------------------------------------------------------------


def flatten(tree: Any) -> tuple[list[Tensor], Any]:
    """The tensors of nested mappings, lists, tuples and dataclasses, and a hashable description of everything else.

    Raises:
        TypeError: a leaf that is neither a tensor nor hashable.
    """
    leaves: list[Tensor] = []

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            leaves.append(value)
            return None
        kind = type(value)
        if isinstance(value, Mapping):
            return "named", kind, tuple((key, describe(each)) for key, each in value.items())
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.fields(value)
            return "named", kind, tuple((field.name, describe(getattr(value, field.name))) for field in fields)
        if isinstance(value, (list, tuple)):
            return "listed", kind, tuple(describe(each) for each in value)
        hash(value)
        return "constant", kind, value

    return leaves, describe(tree)


def unflatten(structure: Any, leaves: list[Tensor]) -> Any:
    """The inverse of :func:`flatten`, with these tensors in their places."""
    remaining = iter(leaves)

    def build(node: Any) -> Any:
        if node is None:
            return next(remaining)
        sort, kind, content = node
        if sort == "constant":
            return content
        if sort == "listed":
            return kind(build(each) for each in content)
        values = {name: build(each) for name, each in content}
        return values if kind is dict else kind(**values)

    return build(structure)


# -- buckets --------------------------------------------------------------------------------------------------


def to_bucket(inputs: Mapping[str, Any], most: int | None = None, multiple: int = BUCKET) -> dict[str, Any]:
    """Inputs whose text is filled up with padding to the next ``multiple`` tokens, so that few shapes occur.  Exact.

    Texts without an ``attention_mask`` stay as they are: nothing would say where they end.

    Args:
        inputs: as for a model's ``forward``; tensors ``(B, N)``, or a :class:`Prefix`.
        most: the most tokens that the tower takes.
    """
    inputs = dict(inputs)
    ids, prefix = inputs.get("input_ids"), inputs.get("prefix")
    if ids is not None and inputs.get("attention_mask") is not None:
        extra = _missing(ids.shape[1], most, multiple)
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            if extra and inputs.get(name) is not None:
                inputs[name] = nn.functional.pad(inputs[name], (0, extra))
    if isinstance(prefix, Prefix):
        text, valid = prefix.text, prefix.text.valid
        extra = _missing(text.hidden.shape[1], most, multiple)
        if extra and valid is not None and not text.has_native_mask:
            hidden = nn.functional.pad(text.hidden, (0, 0, 0, extra))
            text = dataclasses.replace(text, hidden=hidden, valid=nn.functional.pad(valid, (0, extra)))
            inputs["prefix"] = dataclasses.replace(prefix, text=text)
    return inputs


def _missing(length: int, most: int | None, multiple: int) -> int:
    wanted = -(-length // multiple) * multiple
    return max(0, (wanted if most is None else min(wanted, most)) - length)


def prepared(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as the model's engine wants it (``model.prepare``), in few lengths where its calls become graphs.

    Best called on the host, before the batch goes to the device.
    """
    prepare = getattr(model, "prepare", None)
    if prepare is None:
        return dict(batch)
    return prepare(batch, multiple=BUCKET if _wants_graphs(model) else 1)


def ready(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Inputs of which all is known that the host would ask the device for, in a bucket; and why they are not, if so."""
    inputs = prepared(model, inputs)
    prefix = inputs.get("prefix")
    if isinstance(prefix, Prefix):
        inputs["prefix"] = dataclasses.replace(prefix, text=prefix.text.measured())
    # What `prepare` could not measure the forward pass would, in the middle of a capture.
    unknown = hasattr(model, "prepare") and getattr(model, "engine", None) is not None and "text_lengths" not in inputs
    if unknown and inputs.get("attention_mask") is not None:
        return inputs, "a text is padded on the left or in the middle; wanted padding on the right"
    return to_bucket(inputs, longest_text(model)), None


def longest_text(model: nn.Module) -> int | None:
    """The most tokens that a model's text tower takes, where it has one."""
    return getattr(getattr(getattr(model, "backbone", None), "text", None), "max_length", None)


# -- what a graph depends on ----------------------------------------------------------------------------------


class Watch:
    """What a graph of a module's call has baked in: where its tensors lie and which modules are in training.

    Of frozen tensors also their version, because what is made of them once (merged or 8-bit weights) may lie elsewhere.
    """

    def __init__(self, module: nn.Module):
        self.module = weakref.ref(module)
        self.parts = [part for part in module.modules() if part is not module]
        self.tensors = [each for part in (module, *self.parts) for each in (part._parameters, part._buffers) if each]

    def state(self) -> Any:
        """Equal as long as graphs stay valid; the values of trained tensors may change in place."""
        module = self.module()
        assert module is not None
        memory = [
            each.data_ptr() if each.requires_grad else (each.data_ptr(), each._version)
            for group in self.tensors
            for each in group.values()
            if each is not None
        ]
        # `forward` in the instance is how accelerate lets a model autocast itself.
        forward = module.__dict__.get("forward")
        return memory, module.training, [each.training for each in self.parts], id(forward)


def made_of_weights(module: nn.Module) -> list[Any]:
    """What a model's towers made of their weights, to be held by the graphs that read it."""
    backbone = getattr(module, "backbone", None)
    towers = [getattr(getattr(backbone, name, None), "frozen", None) for name in ("text", "vision")]
    return [tower.made() for tower in towers if tower is not None]


def hooked(module: nn.Module) -> str | None:
    """The first hook in a module, in words: a graph would run it once, when it is captured, and never again."""
    if all_hooked():
        return "there are hooks on all modules, which a graph does not call"
    for name, part in module.named_modules():
        for kind in HOOKS:
            if getattr(part, kind):
                return f"{type(part).__name__} {name!r} has hooks, which a graph does not call"
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return f"parameter {name!r} has hooks, which a graph does not call"
    return None


@functools.cache
def say_once(name: str, reason: str) -> None:
    """Log why something runs without graphs."""
    logger.warning("%s runs without a CUDA graph: %s", name, reason)


# -- the graphs of one function -------------------------------------------------------------------------------


class GraphCache:
    """The graphs of one function, one for each shape of its inputs.

    Args:
        name: of the function, for the log.
        work: from inputs (in static buffers) to a tree of tensors.
        backend: records it.
        device: where the buffers are.
        rehearse: is run once before each recording and must leave no trace; None: ``work``, whose random draws are
            given back.
        take: from the static result to what the caller gets; None clones every tensor.
        depends: what all graphs depend on; they are thrown away when it is no longer equal.
        holds: what a graph made now reads besides, kept for as long as it.
        capacity: the most graphs kept.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Any], Any],
        backend: Backend,
        device: torch.device,
        *,
        rehearse: Callable[[Any], Any] | None = None,
        take: Callable[[Any], Any] | None = None,
        depends: Callable[[], Any] = lambda: None,
        holds: Callable[[], Any] = lambda: None,
        capacity: int = CAPACITY,
    ):
        self.name = name
        self.work = work
        self.backend = backend
        self.device = device
        self.rehearse = rehearse or work
        self.take = take or _cloned
        self.depends = depends
        self.holds = holds
        self.capacity = capacity
        self.captures = 0
        self.refused: str | None = None
        self._state: Any = None
        self._graphs: OrderedDict[Any, tuple[Recorded, list[Tensor], Any]] = OrderedDict()
        self._eager: set[Any] = set()
        # Shared by all graphs whose inputs have the same shape in the same place; gone with the last of them.
        self._buffers: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Throw all graphs away."""
        self._graphs.clear()
        self._eager.clear()

    def __call__(self, inputs: Any, *, setting: Any = None, reason: str | None = None) -> Any:
        """``take(work(inputs))``, from a graph where there can be one.

        Args:
            inputs: a tree of tensors; what is not on the device is copied there.
            setting: hashable; what else a graph depends on.
            reason: why these inputs are for no graph.
        """
        if reason is not None:
            say_once(self.name, reason)
        if reason is not None or self.refused is not None:
            return self.take(self.work(self._moved(inputs)))
        try:
            leaves, structure = flatten(inputs)
        except TypeError as error:
            self._refuse(f"its inputs cannot be compared with those of another call: {error}")
            return self(inputs)
        key = setting, structure, tuple((each.shape, each.dtype) for each in leaves)
        with self._lock:
            state = self.depends()
            if state != self._state:
                self.clear()
                self._state = state
            if key not in self._graphs and key not in self._eager:
                self._capture(key, leaves, structure)
            if key not in self._graphs:
                return self.take(self.work(self._moved(inputs)))
            self._graphs.move_to_end(key)
            recorded, buffers, _ = self._graphs[key]
            with self.backend.turn():
                _fill(buffers, leaves)
                recorded.replay()
                return self.take(recorded.result)

    def _capture(self, key: Any, leaves: list[Tensor], structure: Any) -> None:
        """Put a graph under ``key``, or say why there is none.  What the rehearsal raises is the caller's to know."""
        while len(self._graphs) >= self.capacity:
            self._graphs.popitem(last=False)
        buffers = [self._buffer(index, each) for index, each in enumerate(leaves)]
        static = unflatten(structure, buffers)
        position = self.backend.position()
        with self.backend.turn():
            _fill(buffers, leaves)
            try:
                self.backend.rehearse(lambda: self.rehearse(static))
            except torch.cuda.OutOfMemoryError as error:
                self._give_up_shape(key, buffers, error)
                return
            finally:
                self.backend.restore(position)
        state = self.depends()
        if state != self._state:
            # The first call of all may move weights; no graph from before knows where they are now.
            self.clear()
            self._state = state
        try:
            recorded = self.backend.record(lambda: self.work(static))
        except torch.cuda.OutOfMemoryError as error:
            self._give_up_shape(key, buffers, error)
        except Exception as error:
            self.backend.recover()
            self.backend.restore(position)
            self._refuse(f"its capture failed: {_first_words(error)}")
        else:
            self._graphs[key] = recorded, buffers, self.holds()
            self.captures += 1

    def _give_up_shape(self, key: Any, buffers: list[Tensor], error: Exception) -> None:
        """Without memory for one more graph: this shape runs eagerly, with the memory that all graphs had."""
        self.clear()
        self._eager.add(key)
        shapes = ", ".join(str(tuple(each.shape)) for each in buffers)
        say_once(self.name, f"no memory for a graph of the shapes {shapes}: {_first_words(error)}")

    def _refuse(self, reason: str) -> None:
        self.clear()
        self.refused = reason
        say_once(self.name, reason)

    def _buffer(self, index: int, like: Tensor) -> Tensor:
        key = index, like.shape, like.dtype
        found = self._buffers.get(key)
        if found is None:
            with torch.inference_mode(False):
                found = torch.empty(like.shape, dtype=like.dtype, device=self.device)
            self._buffers[key] = found
        return found

    def _moved(self, inputs: Any) -> Any:
        try:
            leaves, structure = flatten(inputs)
        except TypeError:
            return inputs
        return unflatten(structure, [each.to(self.device) for each in leaves])


@torch.no_grad()
def _fill(buffers: list[Tensor], leaves: list[Tensor]) -> None:
    with torch.inference_mode(False):
        for buffer, leaf in zip(buffers, leaves, strict=True):
            buffer.copy_(leaf, non_blocking=True)


def _cloned(result: Any) -> Any:
    leaves, structure = flatten(result)
    return unflatten(structure, [each.clone() for each in leaves])


def _first_words(error: BaseException) -> str:
    """The cause of a failure in a line; what ended the capture hides what broke it."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


# -- forward passes -------------------------------------------------------------------------------------------


class CapturedCall:
    """A module's forward passes without gradients, as graphs.  Called like the module.

    A graph runs under the autocast that its caller is in.  With gradients switched on, off a GPU and for modules with
    hooks (looked for when a graph is made) the module itself is called.

    Args:
        module: its outputs may be trees of tensors; it is kept by a weak reference.
        capacity: the most graphs kept.
    """

    def __init__(self, module: nn.Module, *, capacity: int = CAPACITY):
        self._module = weakref.ref(module)
        self._name = type(module).__name__
        self._capacity = capacity
        self._watch: Watch | None = None
        self._device: torch.device | None = None
        self.cache: GraphCache | None = None

    @property
    def module(self) -> nn.Module:
        """The module.

        Raises:
            ReferenceError: it is gone.
        """
        module = self._module()
        if module is None:
            raise ReferenceError(f"the {self._name} of this captured call no longer exists; keep a reference to it")
        return module

    def __call__(self, **inputs: Any) -> Any:
        module = self.module
        if torch.is_grad_enabled():
            return module(**inputs)
        parameter = next(module.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        if device != self._device:
            self._device, self.cache = device, self._make_cache(device)
        if self.cache is None:
            return module(**inputs)
        kind = device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        inputs, reason = ready(module, inputs)
        return self.cache(inputs, setting=autocast, reason=reason)

    def _make_cache(self, device: torch.device) -> GraphCache | None:
        backend = backend_for(device)
        reason = f"graphs need a CUDA device; it is on {device}" if backend is None else hooked(self.module)
        if backend is None or reason is not None:
            say_once(self._name, str(reason))
            return None
        self._watch = Watch(self.module)
        return GraphCache(
            f"{self._name} (inference)",
            self._work,
            backend,
            device,
            depends=self._watch.state,
            holds=lambda: made_of_weights(self.module),
            capacity=self._capacity,
        )

    def _work(self, inputs: Mapping[str, Any]) -> Any:
        # Copies of weights that autocast has made outside of a graph would be frozen in it, and the other way round.
        with torch.inference_mode(False), torch.no_grad(), own_autocast_cache():
            return self.module(**inputs)


@contextmanager
def own_autocast_cache() -> Iterator[None]:
    """Autocast's copies of weights made inside do not outlive the block, and none from outside is used in it."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


_CALLS: weakref.WeakKeyDictionary[nn.Module, CapturedCall] = weakref.WeakKeyDictionary()


def graphed(model: nn.Module) -> Callable[..., Any]:
    """How to call a model without gradients: as graphs where its engine says so (they live as long as it), else itself.

    Args:
        model: with an attribute ``engine``, an :class:`EngineConfig` or None.
    """
    if not _wants_graphs(model):
        return model
    call = _CALLS.get(model)
    if call is None:
        call = _CALLS[model] = CapturedCall(model)
    return call


def forget(model: nn.Module) -> None:
    """Give the memory of a model's :func:`graphed` calls back."""
    _CALLS.pop(model, None)


def _wants_graphs(model: nn.Module) -> bool:
    return getattr(getattr(model, "engine", None), "graphs", False)
