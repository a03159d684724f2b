"""The ``torch.library`` namespace ``epic_fast``, and what the machine can run.

An operator is a schema, an implementation for CUDA tensors (and for CPU tensors, by Triton's interpreter) and a
fake; autograd stands above it, in an ``autograd.Function``.  With ``torch.library.register_autograd`` or
``custom_op`` in the place of either, a call with its backward pass was measured to cost more
(``benchmarks/results/boundary.jsonl``); ``torch.compile(fullgraph=True)`` takes an operator whole.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from epic_fast.errors import ImplementationError

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
OLDEST_CAPABILITY = (8, 0)

# pyright knows little of what is underneath.
_C: Any = torch._C

_LIBRARY = torch.library.Library("epic_fast", "FRAGMENT")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers ``epic_fast::<schema>`` and returns the operator.

    Schemas are registered when ``epic_fast.ops`` is imported, kernels (and triton) only when they first run.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CUDA")
    _LIBRARY.impl(name, functools.partial(_interpreted, name, implementation), "CPU")
    torch.library.register_fake(f"epic_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.epic_fast, name).default


def empty_rows(like: Tensor, batch: int | None = None) -> Tensor:
    """An empty ``(batch, heads, rows, head_dim)`` whose memory runs over (batch, rows, heads, head_dim)."""
    own_batch, heads, rows, width = like.shape
    return like.new_empty(own_batch if batch is None else batch, rows, heads, width).transpose(1, 2)


_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))


def direct(*tensors: Tensor | None) -> bool:
    """Whether a call may reach its launcher without an operator, which saves PyTorch's way through the dispatcher.

    Nobody else is there to see the operator (:func:`unwatched`), and the tensors are what their memory says: no
    subclasses, no lazy signs or zeros.
    """
    return unwatched() and plain(*tensors)


def unwatched() -> bool:
    """No graph is traced or compiled, no profiler and no dispatch mode is on, no ``torch.func`` transform runs."""
    if torch.compiler.is_compiling():
        return False
    return (
        not _C._len_torch_dispatch_stack()
        and not _C._are_functorch_transforms_active()
        and not _C._autograd._profiler_enabled()
        and _C._get_tracing_state() is None
    )


def plain(*tensors: Tensor | None) -> bool:
    """Tensors themselves, no subclasses, and none whose memory holds other numbers than it."""
    given = [each for each in tensors if each is not None]
    return (
        _PLAIN_TYPES.issuperset(map(type, given))
        and not any(map(Tensor.is_neg, given))
        and not any(map(Tensor._is_zerotensor, given))  # pyright: ignore[reportArgumentType]
    )


def applied_directly(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its look for ``torch.func``: for calls of which :func:`direct` knows there is none."""
    above: Any = super(torch.autograd.Function, function)
    return above.apply


def _interpreted(name: str, implementation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not interpreting():
        raise ImplementationError(
            f"epic_fast::{name}: the tensors are on the CPU, where the kernel runs only under Triton's interpreter "
            "(set TRITON_INTERPRET=1 before Python starts)"
        )
    return implementation(*args, **kwargs)


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    """Whether Triton kernels run by Triton's interpreter (``TRITON_INTERPRET=1``), on any device."""
    if not TRITON_INSTALLED:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def capability(index: int) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU; None for AMD's, which have another numbering."""
    return None if torch.version.hip else torch.cuda.get_device_capability(index)


@torch.compiler.assume_constant_result
def too_old(index: int) -> str:
    """Why this GPU cannot run the kernels; empty if it can.  Asked once, never while a graph is traced or captured."""
    found = capability(index)
    if found is None or found >= OLDEST_CAPABILITY:
        return ""
    return "the GPU has compute capability {}.{}; the kernel needs {}.{}".format(*found, *OLDEST_CAPABILITY)
