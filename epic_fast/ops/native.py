"""Planned calls in C++: what Python takes for the way to a kernel, where a call is as short as that way.

A plan (``kernels/common/plan.py``) and the ``autograd.Function`` around it are Python.  Built once with
:func:`build` (``epic-fast native``: half a minute and any C++ compiler, no CUDA toolkit), ``native.cpp`` does the same
for calls that came before: allocate, launch, save, and in backward allocate and launch.  It computes nothing itself,
and everything out of the ordinary (a new layout, an odd address, a profiler, saved-tensor hooks that change tensors, a
second derivative, a plan with descriptors) it hands back to the Python that it stands before.  One thing it cannot:
PyTorch's compiled autograd refuses its nodes.

Without it everything works, from Python.  ``EPIC_FAST_NATIVE=0`` leaves it out.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import logging
import os
import shlex
import stat
import subprocess
import sys
import sysconfig
import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from epic_fast.errors import ImplementationError
from epic_fast.files import atomic_file, cache_folder
from epic_fast.kernels.common import driver  # pyright: ignore[reportMissingImports]
from epic_fast.ops import library
from epic_fast.ops.repeats import Known

SOURCE = Path(__file__).with_name("native.cpp")
MODULE = "_epic_fast_native"
FLAGS = ("-std=c++20", "-O2", "-DNDEBUG", "-fPIC", "-shared", "-w")
# Options of a call, such as a scale, may be new at every step.
MOST_CALLS = 16
logger = logging.getLogger("epic_fast")
_wanted = True


def path() -> Path:
    """The file for this Python, this PyTorch and this source, in :func:`epic_fast.files.cache_folder`."""
    return cache_folder() / "native" / f"{name()}{sysconfig.get_config_var('EXT_SUFFIX')}"


def name() -> str:
    """Of the module: another one for another PyTorch, source or command, because Python knows modules by name."""
    said = hashlib.sha256(SOURCE.read_bytes() + " ".join((torch.__version__, *FLAGS)).encode()).hexdigest()[:16]
    return f"{MODULE}_{said}"


def build(*, again: bool = False) -> Path:
    """Compile it if it is not there, and use it from now on.

    Args:
        again: compile it even if it is there.

    Returns:
        The file.

    Raises:
        ImplementationError: no C++ compiler (``$CXX``, else ``c++``), no headers, or what the compiler said.
    """
    target = path()
    if again or not target.exists():
        with atomic_file(target) as made:
            _compile(made)
    find.cache_clear()
    _forget_plans()
    return target


def _compile(made: Path) -> None:
    from torch.utils.cpp_extension import include_paths

    compiler = os.environ.get("CXX", "c++")
    command = [*shlex.split(compiler), *FLAGS, "-x", "c++", str(SOURCE), "-o", str(made)]
    command += [f"-DTORCH_EXTENSION_NAME={name()}", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [f"-isystem{each}" for each in (*include_paths(), sysconfig.get_paths()["include"])]
    command += [f"-L{Path(torch.__file__).parent / 'lib'}"]
    command += [f"-l{each}" for each in ("c10", "torch_cpu", "torch", "torch_python")]
    try:
        said = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ImplementationError(
            f"the C++ compiler {compiler!r} did not start: {error}; install one (g++ 11 or clang 14, or newer), or "
            "name it in CXX"
        ) from error
    if said.returncode:
        raise ImplementationError(
            f"{compiler} could not compile {SOURCE}:\n{said.stderr.strip()[-2000:]}\n"
            "Wanted: a compiler that knows C++20, and Python's headers (python3-dev)."
        )


@functools.cache
def find() -> Any:
    """The built module; None where it is not built or not wanted."""
    if not _wanted or os.environ.get("EPIC_FAST_NATIVE") == "0" or not library.TRITON_INSTALLED:
        return None
    try:
        return load()
    except Exception as error:  # kernels run without it
        logger.warning("launches run from Python: what epic-fast native built does not load: %s", error)
        return None


@contextmanager
def left_out() -> Iterator[None]:
    """Everything runs from Python meanwhile, in all threads."""
    global _wanted
    before, _wanted = _wanted, False
    find.cache_clear()
    _forget_plans()
    try:
        yield
    finally:
        _wanted = before
        find.cache_clear()
        _forget_plans()


def _forget_plans() -> None:
    """Those that were made with it, or without it."""
    plan = sys.modules.get("epic_fast.kernels.common.plan")
    if plan is not None:
        plan.forget()


def load() -> Any:
    """The built module, whether wanted or not; None if there is no file.

    Raises:
        ImplementationError: somebody else could have written the file.
    """
    target = path()
    if not target.exists():
        return None
    for place in (target, target.parent):
        found = place.stat()
        if hasattr(os, "getuid") and (found.st_uid not in (os.getuid(), 0) or found.st_mode & stat.S_IWOTH):
            raise ImplementationError(
                f"{place} belongs to user {found.st_uid} or can be written by everybody, and holds code that would run "
                "as you; set EPIC_FAST_CACHE to a folder of your own"
            )
    return _load(target)


@functools.cache
def _load(target: Path) -> Any:
    module_name = target.name.partition(".")[0]
    loader = importlib.machinery.ExtensionFileLoader(module_name, str(target))
    spec = importlib.util.spec_from_file_location(module_name, target, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def applied(
    function: Any,
    known: Known,
    inputs: tuple[Tensor | None, ...],
    options: tuple[Hashable, ...],
    gradients: int,
) -> tuple[Tensor | None, ...] | None:
    """``function.apply(*inputs, *options, known, True)`` through the built module; None where that is not to be.

    Args:
        function: an ``autograd.Function``.  Its forward method gets inputs, options, ``known`` and True; it allocates
            and launches by one plan of the inputs, saves inputs and results of that plan, and whatever else it writes
            into ``ctx`` follows from ``known`` and ``options``.  Its backward method makes the gradients by one plan of
            those that arrive and of all that was saved, in this order.
        known: of inputs of which one needs a gradient.
        gradients: of how many inputs there are gradients; they come first, and in the order of the plan's results.
    """
    module = find()
    if module is None or _is_watched():
        return None
    precision = str(torch.backends.cuda.matmul.fp32_precision)
    key = function, options, precision, _plan_module().generation
    call = known.calls.get(key)
    if call is None:
        if len(known.calls) >= MOST_CALLS:
            known.calls.clear()
        call = known.calls[key] = _Call(module, _Kind(function, known, inputs, options), gradients, precision)
    return call(*inputs) if call.is_worth_it else None


def _is_ordinary(precision: str) -> bool:
    """Nobody watches operators or launches, and products in float32 are still made as plans say."""
    return (
        library.unwatched() and not _is_watched() and torch.backends.cuda.matmul.fp32_precision == precision
    )  # fmt: skip


def _is_watched() -> bool:
    return _launch_module().is_watched()


@functools.cache
def _launch_module() -> Any:
    from epic_fast.kernels.common import launch  # pyright: ignore[reportMissingImports]

    return launch


class _Call:
    """The compiled part of a kind of call; it keeps the kind alive, as do the nodes that it makes."""

    def __init__(self, module: Any, kind: _Kind, gradients: int, precision: str) -> None:
        self._kind = kind
        places = [index if index < gradients else -1 for index in kind.present]
        ordinary = functools.partial(_is_ordinary, precision)
        self._native = module.Call(kind.forward, kind.backward, ordinary, places)

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        found = self._native(*inputs)
        return found if all(self._kind.outputs) else tuple(_spread(found, self._kind.outputs))

    @property
    def is_worth_it(self) -> bool:
        """Not where a plan is made and cannot be compiled: each call would go through Python, on a longer way."""
        return not self._kind.is_in_vain


class _Kind:
    """What Python does where the compiled part does not; knows nothing of it, so that both can go."""

    def __init__(
        self, function: Any, known: Known, inputs: tuple[Tensor | None, ...], options: tuple[Hashable, ...]
    ) -> None:
        self._function, self._options = function, options
        self._known = weakref.ref(known)
        self._there = [each is not None for each in inputs]
        self.present = [index for index, there in enumerate(self._there) if there]
        self._facts: dict[str, Any] = {}
        self._saved: list[bool] = []
        self.outputs: list[bool] = []
        self.is_in_vain = False

    def forward(self, present: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Any, list[int], list[int]]:
        """Outputs, what is saved, and if a compiled plan makes them, it and where outputs are among its results, and
        what is saved among the inputs (from 0 up) and results (from -1 down)."""
        known = self._known()
        context = _Context()
        with _plan_module().noting() as noted:
            outputs = self._function.forward(context, *_spread(present, self._there), *self._options, known, True)
        facts = dict(context.__dict__)
        saved = facts.pop("saved")
        # That of the Known itself would keep it for ever.
        self._facts = {name: each for name, each in facts.items() if each is not known}
        self._saved, self.outputs = ([each is not None for each in some] for some in (saved, outputs))
        outputs, saved = ([each for each in some if each is not None] for some in (outputs, saved))
        if len(noted) != 1 or noted[0][0].native is None:
            self.is_in_vain = not noted or any(plan.is_ready for plan, _ in noted)
            return outputs, saved, None, [], []
        plan, results = noted[0]
        made = [_place(each, results) for each in (*outputs, *saved)]
        outputs_at, saved_at = made[: len(outputs)], made[len(outputs) :]
        given_at = [_place(each, present) for each in saved]
        if -1 in outputs_at or any(given == made == -1 for given, made in zip(given_at, saved_at, strict=True)):
            self.is_in_vain = True
            return outputs, saved, None, [], []
        places = [given if given >= 0 else -1 - made for given, made in zip(given_at, saved_at, strict=True)]
        return outputs, saved, plan.native, outputs_at, places

    def backward(
        self, grads: list[Tensor | None], saved: list[Tensor], needs: list[bool]
    ) -> tuple[list[Tensor | None], Any]:
        """A gradient for each input that is there, and the compiled plan that makes them, if there is one."""
        wanted = _spread(needs, self._there)
        saved_tensors = tuple(_spread(saved, self._saved))
        context = _Context(
            **self._facts,
            known=self._known(),
            needs_input_grad=tuple([bool(each) for each in wanted]),
            saved_tensors=saved_tensors,
        )
        with _plan_module().noting() as noted:
            found = self._function.backward(context, *_spread(grads, self.outputs))
        native = noted[0][0].native if len(noted) == 1 else None
        return [found[index] if need else None for index, need in zip(self.present, needs, strict=True)], native


class _Context(SimpleNamespace):
    """As much of an ``autograd.Function``'s context as ours use."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved = tensors

    def set_materialize_grads(self, value: bool) -> None:
        assert not value


def _spread(found: Iterable[Any], there: Sequence[bool]) -> list[Any]:
    """``found`` in the places that are True, None in the others."""
    rest = iter(found)
    return [next(rest) if each else None for each in there]


def _place(wanted: Tensor, among: Sequence[Tensor | None]) -> int:
    """Where this very tensor is; -1 if it is not there."""
    return next((index for index, each in enumerate(among) if each is wanted), -1)


@functools.cache
def _plan_module() -> Any:
    from epic_fast.kernels.common import plan  # pyright: ignore[reportMissingImports]

    return plan


driver.native = find
