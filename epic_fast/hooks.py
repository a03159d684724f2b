"""Whether a module does what its class says, so that what it computes may be computed without calling it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody hung a hook on the module itself, or gave it a ``forward`` of its own."""
    # Each of HOOKS, written out: a forward pass asks this of every module of every layer.
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def all_hooked() -> bool:
    """Whether there are hooks on all modules at once (``torch.nn.modules.module.register_module_forward_hook``)."""
    return bool(_has_any_global_hook())


def untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of ``kind`` itself, not of a class below it, and nothing of it is hooked."""
    return type(module) is kind and not is_hooked(module) and not all_hooked()
