"""The activation of a frozen MLP by itself, forward and backward, for where it cannot live in a product's epilogue.

Raw operations, tensors in and tensors out: whoever calls them owns the graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from epic_fast.errors import ConfigError
from epic_fast.kernels.activation import reference  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.activation.reference import ACTIVATIONS, KEEPS  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.activation.tiles import MAX_QUANTISED_WIDTH  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.common.eight_bit import EIGHT_BIT_TYPES  # pyright: ignore[reportMissingImports]
from epic_fast.ops import library
from epic_fast.ops.dispatch import Operation
from epic_fast.ops.residual_norm import KERNEL_TYPES, no_fp8


def activation_forward(
    pre: Tensor, kind: str, *, keep: str, eight_bit: str | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``act(pre)``, and what its backward pass will want.

    Args:
        pre: ``(..., F)`` with unit last stride.
        kind: ``"quick_gelu"`` (x sigmoid(1.702 x)), ``"gelu"`` (by erf) or ``"gelu_tanh"``.
        keep: ``"none"``; ``"full"``: the pre-activation itself; ``"eight_bit"``: its derivative as uint8, within 1/404.
        eight_bit: ``"fp8"`` (e4m3) or ``"int8"``: the output comes in 8 bits, each row with a scale of its own.

    Returns:
        ``(output, kept, scale)``: the output in the type of ``pre`` (or in 8 bits); what ``keep`` says, or None; the
        scale ``(rows,)`` in float32, ``act(pre) ≈ output * scale``, or None.  A row that is not finite has the scale
        NaN; a derivative that is not finite has a code that says nothing of it.

    Raises:
        ConfigError: a ``kind``, ``keep`` or ``eight_bit`` that does not exist.
    """
    _check("activation_forward", kind, keep, KEEPS)
    operation = _FORWARD.get(eight_bit)
    if operation is None:
        raise ConfigError(f"activation_forward: eight_bit={eight_bit!r} is not one of None, 'fp8', 'int8'")
    return operation(pre, kind, keep=keep, eight_bit=eight_bit, impl=impl)


def activation_backward(grad: Tensor, kept: Tensor, kind: str, keep: str, *, impl: str = "auto") -> Tensor:
    """``grad * act'(pre)``, ``(..., F)`` in the type of ``grad``; ``kept`` is what the forward pass kept.

    Raises:
        ConfigError: a ``kind`` that does not exist, nothing kept, or shapes that differ.
    """
    _check("activation_backward", kind, keep, KEEPS[1:])
    _check_kept("activation_backward", grad, kept, keep)
    return _BACKWARD(grad, kept, kind, keep, impl=impl)


def activation_backward_8bit(
    grad: Tensor, kept: Tensor, kind: str, keep: str, eight_bit: str, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """:func:`activation_backward` in 8 bits, each row with a scale of its own.

    Args:
        eight_bit: ``"fp8"`` (e4m3) or ``"int8"``.

    Returns:
        Data ``(..., F)``, and the scale ``(rows,)`` in float32.

    Raises:
        ConfigError: as there, and an ``eight_bit`` that does not exist.
    """
    name = "activation_backward_8bit"
    _check(name, kind, keep, KEEPS[1:])
    _check_kept(name, grad, kept, keep)
    operation = _BACKWARD_8BIT.get(eight_bit)
    if operation is None:
        raise ConfigError(f"{name}: eight_bit={eight_bit!r} is not one of 'fp8', 'int8'")
    return operation(grad, kept, kind, keep, eight_bit, impl=impl)


def _check_kept(name: str, grad: Tensor, kept: Tensor, keep: str) -> None:
    if kept.shape != grad.shape:
        raise ConfigError(
            f"{name}: kept has shape {tuple(kept.shape)}; wanted {tuple(grad.shape)}, as the gradient has"
        )
    if (kept.dtype == torch.uint8) != (keep == "eight_bit"):
        wanted = "uint8" if keep == "eight_bit" else "the type of the pre-activation"
        raise ConfigError(f"{name}: kept is {kept.dtype}; keep={keep!r} wants {wanted}")


def _check(name: str, kind: str, keep: str, keeps: Sequence[str]) -> None:
    for option, given, choices in (("kind", kind, ACTIVATIONS), ("keep", keep, keeps)):
        if given not in choices:
            raise ConfigError(f"{name}: {option}={given!r} is not one of {', '.join(map(repr, choices))}")


@functools.cache
def _launchers() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    from epic_fast.kernels.activation import triton_kernels  # pyright: ignore[reportMissingImports]

    return (
        triton_kernels.activation_forward,
        triton_kernels.activation_backward,
        triton_kernels.activation_backward_8bit,
    )


def _op_forward(pre: Tensor, kind: str, coded: bool, eight_bit: str | None) -> tuple[Tensor, ...]:
    found = _launchers()[0](pre, kind, keep="eight_bit" if coded else "none", eight_bit=eight_bit)
    return tuple(pre.new_empty(0) if each is None else each for each in found)


def _fake_forward(pre: Tensor, kind: str, coded: bool, eight_bit: str | None) -> tuple[Tensor, ...]:
    quantised = eight_bit is not None
    rows = math.prod(pre.shape[:-1])
    return (
        pre.new_empty(pre.shape, dtype=EIGHT_BIT_TYPES[eight_bit] if quantised else pre.dtype),
        pre.new_empty(pre.shape, dtype=torch.uint8) if coded else pre.new_empty(0),
        pre.new_empty(rows, dtype=torch.float32) if quantised else pre.new_empty(0),
    )


FORWARD = library.register(
    "activation_forward(Tensor pre, str kind, bool coded, str? eight_bit) -> (Tensor, Tensor, Tensor)",
    _op_forward,
    _fake_forward,
)
BACKWARD = library.register(
    "activation_backward(Tensor grad, Tensor kept, str kind, str keep) -> Tensor",
    lambda *arguments: _launchers()[1](*arguments),
    lambda grad, kept, kind, keep: grad.new_empty(grad.shape),
)

BACKWARD_8BIT = library.register(
    "activation_backward_8bit(Tensor grad, Tensor kept, str kind, str keep, str eight_bit) -> (Tensor, Tensor)",
    lambda *arguments: tuple(_launchers()[2](*arguments)),
    lambda grad, kept, kind, keep, eight_bit: (
        grad.new_empty(grad.shape, dtype=EIGHT_BIT_TYPES[eight_bit]),
        grad.new_empty(math.prod(grad.shape[:-1]), dtype=torch.float32),
    ),
)


def _triton_forward(
    pre: Tensor, kind: str, *, keep: str, eight_bit: str | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if library.direct(pre):
        return _launchers()[0](pre, kind, keep=keep, eight_bit=eight_bit)
    output, codes, scale = FORWARD(pre, kind, keep == "eight_bit", eight_bit)
    kept = pre if keep == "full" else codes if keep == "eight_bit" else None
    return output, kept, None if eight_bit is None else scale


def _triton_backward(grad: Tensor, kept: Tensor, kind: str, keep: str) -> Tensor:
    return (_launchers()[1] if library.direct(grad, kept) else BACKWARD)(grad, kept, kind, keep)


def _triton_backward_8bit(grad: Tensor, kept: Tensor, kind: str, keep: str, eight_bit: str) -> tuple[Tensor, Tensor]:
    return (_launchers()[2] if library.direct(grad, kept) else BACKWARD_8BIT)(grad, kept, kind, keep, eight_bit)


def _limits(eight_bit: str | None, tensor: Tensor, *others: Any) -> Sequence[str]:
    reasons = []
    if tensor.is_cuda:
        reasons = [each for each in (library.too_old(tensor.get_device()), no_fp8(eight_bit, tensor)) if each]
    for each in (tensor, *others):
        if isinstance(each, Tensor) and each.dtype not in (*KERNEL_TYPES, torch.uint8):
            reasons.append(f"a tensor is {each.dtype}; the kernel takes float32, bfloat16 and float16")
    if not tensor.shape[-1]:
        reasons.append("rows are 0 wide")
    if eight_bit is not None and tensor.shape[-1] > MAX_QUANTISED_WIDTH:
        reasons.append(f"rows are {tensor.shape[-1]} wide; the kernel quantises rows of up to {MAX_QUANTISED_WIDTH}")
    return reasons


_FORWARD = {
    eight_bit: Operation(
        "activation_forward",
        reference=reference.activation_forward,
        triton=_triton_forward,
        limits=functools.partial(_limits, eight_bit),
    )
    for eight_bit in (None, *EIGHT_BIT_TYPES)
}
_BACKWARD = Operation(
    "activation_backward",
    reference=reference.activation_backward,
    triton=_triton_backward,
    limits=functools.partial(_limits, None),
)
_BACKWARD_8BIT = {
    eight_bit: Operation(
        "activation_backward_8bit",
        reference=reference.activation_backward_8bit,
        triton=_triton_backward_8bit,
        limits=functools.partial(_limits, eight_bit),
    )
    for eight_bit in EIGHT_BIT_TYPES
}
