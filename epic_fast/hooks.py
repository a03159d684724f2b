"""Whether a module does what its class says, so that what it computes may be computed without calling it."""

from __future__ import annotations

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody hung a hook on the module itself, forward or backward, or gave it a ``forward`` of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of ``kind`` itself, not of a class below it, and nothing of it is hooked."""
    return type(module) is kind and not is_hooked(module)
