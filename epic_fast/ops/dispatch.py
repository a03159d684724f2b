"""Choosing the implementation of an operation: ``impl="auto" | "triton" | "reference"``.

``"triton"`` that cannot run raises with every reason; ``"auto"`` takes the reference then and logs once why.
A kernel enters by giving its operation a ``triton`` function (``epic_fast/ops/<op>.py``); nothing else changes.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from epic_fast.errors import ConfigError, ImplementationError

logger = logging.getLogger("epic_fast")

IMPLEMENTATIONS = ("auto", "triton", "reference")

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Operation:
    """An operation and its implementations, all with the same signature.

    ``reference`` runs everywhere.  ``triton`` is None while no kernel is written; ``limits`` names the reasons
    (none: an empty list) why the kernel cannot take these very arguments.
    """

    name: str
    reference: Callable[..., Any]
    triton: Callable[..., Any] | None = None
    limits: Callable[..., list[str]] = field(default=lambda *args, **kwargs: [])

    def __call__(self, *args: Any, impl: str = "auto", **kwargs: Any) -> Any:
        return self.choose(impl, *args, **kwargs)(*args, **kwargs)

    def choose(self, impl: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """The implementation that ``impl`` asks for, given the arguments of the call."""
        if impl not in IMPLEMENTATIONS:
            raise ConfigError(f"{self.name}: impl={impl!r} is not one of {', '.join(map(repr, IMPLEMENTATIONS))}")
        if impl == "reference":
            return self.reference
        reasons = self.reasons_against_triton(*args, **kwargs)
        if not reasons:
            assert self.triton is not None
            return self.triton
        if impl == "triton":
            raise ImplementationError(
                f"{self.name}: impl='triton' cannot run here:\n"
                + "\n".join(f"  - {reason}" for reason in reasons)
                + "\nUse impl='auto' or impl='reference' to take the PyTorch path."
            )
        if not torch.compiler.is_compiling():
            _log_once(self.name, tuple(reasons))
        return self.reference

    def reasons_against_triton(self, *args: Any, **kwargs: Any) -> list[str]:
        """Every reason why the Triton kernel cannot take this call; empty if it can."""
        reasons = []
        if self.triton is None:
            reasons.append("this version has no Triton kernel for this operation")
        if not _TRITON_INSTALLED:
            reasons.append("the package triton is not installed")
        for device in sorted({str(each.device) for each in (*args, *kwargs.values()) if isinstance(each, Tensor)}):
            if not device.startswith("cuda"):
                reasons.append(f"a tensor is on {device}; the kernel needs a GPU")
        if self.triton is not None:
            reasons.extend(self.limits(*args, **kwargs))
        return reasons


@functools.cache
def _log_once(name: str, reasons: tuple[str, ...]) -> None:
    logger.info("%s: using the PyTorch reference: %s", name, "; ".join(reasons))


def available_implementations() -> dict[str, list[str]]:
    """For every operation, the implementations that this installation has (``epic-fast doctor`` prints them)."""
    from epic_fast.ops.prompt_attention import prompt_attention
    from epic_fast.ops.prompt_interaction import prompt_interaction

    operations = (prompt_attention, prompt_interaction)
    return {
        operation.name: ["reference"] + (["triton"] if operation.triton is not None and _TRITON_INSTALLED else [])
        for operation in operations
    }
