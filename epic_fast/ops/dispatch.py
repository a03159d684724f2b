"""Choosing the implementation of an operation: ``impl="auto" | "triton" | "reference"``.

``"triton"`` that cannot run raises with every reason; ``"auto"`` takes the reference then and logs once why.
A kernel enters by giving its operation a ``triton`` function (``epic_fast/ops/<op>.py``); nothing else changes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from epic_fast.errors import ConfigError, ImplementationError
from epic_fast.ops import library
from epic_fast.ops.repeats import Known, Repeats

logger = logging.getLogger("epic_fast")

IMPLEMENTATIONS = ("auto", "triton", "reference")

_TRITON_INSTALLED = library.TRITON_INSTALLED


@dataclass(frozen=True)
class Operation:
    """An operation and its implementations, all with the same signature: tensors by position, options by name.

    ``reference`` runs everywhere.  ``triton`` is None while no kernel is written; ``limits`` names the reasons
    (none: an empty sequence) why the kernel cannot take these very tensors.  ``autocast`` gives the tensors in the
    types of ``torch.autocast``, before an implementation is chosen: outside the ``autograd.Function``, so that
    gradients come back in the types of the arguments.

    With ``repeats``, calls that come again are recognised (:meth:`known`); options named in ``tensors`` are tensors
    too.
    """

    name: str
    reference: Callable[..., Any]
    triton: Callable[..., Any] | None = None
    limits: Callable[..., Sequence[str]] = field(default=lambda *args: ())
    autocast: Callable[..., Sequence[Any]] | None = None
    tensors: tuple[str, ...] = ()
    repeats: Repeats | None = field(default=None, compare=False)

    def __call__(self, *args: Any, impl: str = "auto", known: Known | None = None, **kwargs: Any) -> Any:
        if known is not None:
            assert self.triton is not None
            return self.triton(*args, known=known, **kwargs)
        if self.autocast is not None and _autocasts(args[0]):
            args = tuple(self.autocast(*args))
        chosen = self.choose(impl, *args)
        if self.repeats is not None and chosen is self.triton and not torch.compiler.is_compiling():
            tensors = (*args, *map(kwargs.get, self.tensors))
            if kwargs.get("out") is None and not _autocasts(args[0]) and library.direct(*tensors):
                self.repeats.keep(impl, tensors)
        return chosen(*args, **kwargs)

    def known(self, impl: str, *tensors: Tensor | None) -> Known | None:
        """What a call with these tensors is known as, if one like it went straight to the kernel before: then it
        needs no check, and is to be made with ``known``.  Options of the call are not looked at."""
        if self.repeats is None or torch.compiler.is_compiling():
            return None
        return self.repeats.find(impl, tensors)

    def choose(self, impl: str, *args: Any) -> Callable[..., Any]:
        """The implementation that ``impl`` asks for, given the positional arguments of the call."""
        if impl == "reference":
            return self.reference
        if impl not in IMPLEMENTATIONS:
            raise ConfigError(f"{self.name}: impl={impl!r} is not one of {', '.join(map(repr, IMPLEMENTATIONS))}")
        # On the CPU the kernel is there to be tested: the interpreter runs it where it is asked for by name.
        reasons = self.reasons_against_triton(*args, interpreter=impl == "triton")
        if not reasons:
            assert self.triton is not None
            return self.triton
        if impl == "triton":
            raise ImplementationError(
                f"{self.name}: impl='triton' cannot run here:\n"
                + "\n".join(f"  - {reason}" for reason in reasons)
                + "\nUse impl='auto' or impl='reference' to take the PyTorch path."
            )
        _say_once(self.name, tuple(reasons))
        return self.reference

    def reasons_against_triton(self, *args: Any, interpreter: bool = True) -> Sequence[str]:
        """Every reason why the Triton kernel cannot take this call; empty if it can.

        With ``interpreter``, tensors on the CPU are no reason where Triton's interpreter is switched on.
        """
        off_gpu = [each for each in args if isinstance(each, Tensor) and not each.is_cuda]
        if not off_gpu and self.triton is not None and _TRITON_INSTALLED:
            return self.limits(*args)
        reasons = []
        if self.triton is None:
            reasons.append("this version has no Triton kernel for this operation")
        if not _TRITON_INSTALLED:
            reasons.append("the package triton is not installed")
        for device in sorted({str(each.device) for each in off_gpu}):
            if device != "cpu" or not interpreter:
                reasons.append(f"a tensor is on {device}; the kernel needs a GPU")
            elif not library.interpreting():
                reasons.append(
                    f"a tensor is on {device}; the kernel needs a GPU (or, to be tested, Triton's interpreter: "
                    "TRITON_INTERPRET=1 before Python starts)"
                )
        return [*reasons, *self.limits(*args)]


def check_without_backward(name: str, given: Sequence[tuple[str, Tensor | None]]) -> None:
    """That the tensors of an operation without a backward are of floating point, on one device and want no gradient.

    Raises:
        ConfigError: one is not, by its label; the first, which is not None, says which device.
    """
    first, like = given[0]
    assert like is not None
    needs = torch.is_grad_enabled()
    for label, tensor in given:
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ConfigError(f"{name}: {label} has type {tensor.dtype}; wanted a floating-point type")
        if tensor.device != like.device:
            raise ConfigError(f"{name}: {label} is on {tensor.device}; wanted {like.device}, as {first}")
        if needs and tensor.requires_grad:
            raise ConfigError(
                f"{name}: {label} requires a gradient, and this has no backward; wanted no gradient (torch.no_grad())"
            )


def _autocasts(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled("cuda" if tensor.is_cuda else tensor.device.type)


@torch.compiler.assume_constant_result
def _say_once(name: str, reasons: tuple[str, ...]) -> bool:
    """Under torch.compile this runs while the graph is traced, and leaves nothing in the graph."""
    _log_once(name, reasons)
    return True


@functools.cache
def _log_once(name: str, reasons: tuple[str, ...]) -> None:
    logger.info("%s: using the PyTorch reference: %s", name, "; ".join(reasons))


def available_implementations() -> dict[str, list[str]]:
    """For every operation, the implementations that this installation has (``epic-fast doctor`` prints them)."""
    from epic_fast.ops.infused_attention import infused_attention
    from epic_fast.ops.infused_swiglu import infused_swiglu
    from epic_fast.ops.infusion_gate import infusion_gate
    from epic_fast.ops.mix_prompt_experts import mix_prompt_experts
    from epic_fast.ops.prompt_attention import prompt_attention
    from epic_fast.ops.prompt_interaction import prompt_interaction
    from epic_fast.ops.window_prompt_attention import window_prompt_attention

    operations = (
        prompt_attention,
        prompt_interaction,
        window_prompt_attention,
        mix_prompt_experts,
        infusion_gate,
        infused_attention,
        infused_swiglu,
    )
    return {
        operation.name: ["reference"] + (["triton"] if operation.triton is not None and _TRITON_INSTALLED else [])
        for operation in operations
    }
