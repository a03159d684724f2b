"""Products with frozen weights as PyTorch sees them: raw operations, tensors in, tensors out, without autograd.

A product that nothing but a bias follows is PyTorch's own (cuBLAS).  One with an activation behind it, or with an
activation's derivative, goes to a kernel that does both, because the pass over the result that it saves costs more than
the kernel may be slower.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from epic_fast.errors import ConfigError, ImplementationError
from epic_fast.kernels.activation.reference import ACTIVATIONS, KEEPS  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.common import eight_bit  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.frozen_linear import reference  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.frozen_linear.reference import EightBitWeight  # pyright: ignore[reportMissingImports]
from epic_fast.ops import library
from epic_fast.ops.dispatch import IMPLEMENTATIONS

__all__ = [
    "EightBitWeight",
    "linear_backward",
    "linear_backward_8bit",
    "linear_forward",
    "linear_forward_8bit",
    "quantise_rows",
    "quantise_weight",
]

logger = logging.getLogger("epic_fast")

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# torch._scaled_mm with a scale a row takes widths that are multiples of this.
_SCALED_WIDTH = 16


@functools.cache
def _product() -> Any:
    from epic_fast.kernels.frozen_linear import triton_product  # pyright: ignore[reportMissingImports]

    return triton_product.product


@functools.cache
def _quantise() -> Any:
    from epic_fast.kernels.frozen_linear import triton_quantise  # pyright: ignore[reportMissingImports]

    return triton_quantise.quantise_rows


def _forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep: str
) -> tuple[Tensor, Tensor]:
    output, kept = _product()(input, weight, bias=bias, activation=activation, keep=keep)
    return output, input.new_empty(0) if kept is None else kept


def _forward_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep: str
) -> tuple[Tensor, Tensor]:
    output = input.new_empty(input.shape[0], weight.shape[0])
    return output, _kept_fake(output, keep)


def _kept_fake(output: Tensor, keep: str) -> Tensor:
    if keep == "none":
        return output.new_empty(0)
    return output.new_empty(output.shape, dtype=torch.uint8 if keep == "eight_bit" else output.dtype)


def _backward(grad: Tensor, weight: Tensor, kept: Tensor | None, keep: str, activation: str | None) -> Tensor:
    return _product()(grad, weight, depth_last=False, kept=kept, keep=keep, activation=activation)[0]


def _backward_fake(grad: Tensor, weight: Tensor, kept: Tensor | None, keep: str, activation: str | None) -> Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[1])


def _eight_bit(
    input: Tensor,
    input_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kept: Tensor | None,
    out_dtype: torch.dtype,
    activation: str | None,
    keep: str,
) -> tuple[Tensor, Tensor]:
    output, made = _product()(
        input,
        weight,
        bias=bias,
        kept=kept,
        activation=activation,
        keep=keep,
        scales=(input_scale, weight_scale),
        out_dtype=out_dtype,
    )
    return output, output.new_empty(0) if made is None else made


def _eight_bit_fake(
    input: Tensor,
    input_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kept: Tensor | None,
    out_dtype: torch.dtype,
    activation: str | None,
    keep: str,
) -> tuple[Tensor, Tensor]:
    output = input.new_empty(input.shape[0], weight.shape[0], dtype=out_dtype)
    return output, _kept_fake(output, "none" if kept is not None else keep)


def _quantise_rows(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return _quantise()(values, kind)


def _quantise_rows_fake(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    data = values.new_empty(values.shape, dtype=eight_bit.EIGHT_BIT_TYPES[kind])
    return data, values.new_empty(values.numel() // max(values.shape[-1], 1), dtype=torch.float32)


FORWARD = library.register(
    "linear_forward(Tensor input, Tensor weight, Tensor? bias, str? activation, str keep) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
BACKWARD = library.register(
    "linear_backward(Tensor grad, Tensor weight, Tensor? kept, str keep, str? activation) -> Tensor",
    _backward,
    _backward_fake,
)
EIGHT_BIT = library.register(
    "linear_8bit(Tensor input, Tensor input_scale, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? kept, "
    "ScalarType out_dtype, str? activation, str keep) -> (Tensor, Tensor)",
    _eight_bit,
    _eight_bit_fake,
)
QUANTISE_ROWS = library.register(
    "quantise_rows(Tensor values, str kind) -> (Tensor, Tensor)", _quantise_rows, _quantise_rows_fake
)


def linear_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None = None,
    keep: str = "none",
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """``act(input @ weight.T + bias)`` with a frozen weight, and what backward needs of the pre-activation.

    Args:
        input: ``(M, K)``.
        weight: ``(N, K)``, as ``nn.Linear`` has it, in the type of ``input``.
        bias: ``(N,)`` or None.
        activation: None, ``"quick_gelu"``, ``"gelu"`` or ``"gelu_tanh"``.
        keep: ``"none"``, ``"full"`` (the pre-activation) or ``"eight_bit"`` (the activation's derivative as uint8,
            ``kernels/activation``).
        impl: ``"auto"``, ``"triton"`` (raises if it cannot run) or ``"reference"``.

    Returns:
        The output ``(M, N)``, and what was kept: ``(M, N)`` in the output's type or uint8; None with ``keep="none"``.

    Raises:
        ConfigError: shapes, types or names that do not fit.
        ImplementationError: ``impl="triton"`` cannot run here.
    """
    name = "linear_forward"
    _check_product(name, "input", input, "weight", weight, 1)
    _check_bias(name, bias, weight.shape[0])
    _check_activation(name, activation, keep)
    if _takes_kernel(name, impl, activation is not None, input, weight, bias):
        output, kept = FORWARD(input, weight, bias, activation, keep)
        return output, None if keep == "none" else kept
    if activation is None:
        return linear(input, weight, bias), None
    return reference.linear_forward(input, weight, bias, activation=activation, keep=keep)


def linear_backward(
    grad: Tensor,
    weight: Tensor,
    *,
    kept: Tensor | None = None,
    keep: str = "none",
    activation: str | None = None,
    impl: str = "auto",
) -> Tensor:
    """``grad @ weight``: the gradient of the input of a frozen linear layer, there being none of its weight.

    Args:
        grad: ``(M, N)``.
        weight: ``(N, K)``, in the type of ``grad``.
        kept: ``(M, K)``: what the layer below kept of its pre-activation; the result is then multiplied by ``act'`` of
            it, and so is the gradient of that pre-activation.
        keep, activation: what ``kept`` is: as :func:`linear_forward` was given them.
        impl: as in :func:`linear_forward`.

    Returns:
        ``(M, K)``.

    Raises:
        ConfigError: shapes, types or names that do not fit.
        ImplementationError: ``impl="triton"`` cannot run here.
    """
    name = "linear_backward"
    _check_product(name, "grad", grad, "weight", weight, 0)
    _check_kept(name, kept, keep, activation, (grad.shape[0], weight.shape[1]))
    if _takes_kernel(name, impl, kept is not None, grad, weight, kept):
        return BACKWARD(grad, weight, kept, keep, activation)
    return reference.linear_backward(grad, weight, kept=kept, keep=keep, activation=activation)


def quantise_rows(values: Tensor, kind: str, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Rows in eight bits: ``values ~= data * scale[:, None]``, a row's largest magnitude the largest of the type.

    Args:
        values: ``(M, K)``.
        kind: ``"fp8"`` (e4m3) or ``"int8"``.
        impl: as in :func:`linear_forward`.

    Returns:
        data ``(M, K)`` and scale ``(M,)`` float32.

    Raises:
        ConfigError: no matrix of floating point, or a kind that is not known.
        ImplementationError: ``impl="triton"`` cannot run here.
    """
    name = "quantise_rows"
    _check_kind(name, kind)
    if values.dim() != 2 or not values.is_floating_point():
        raise _wrong(name, f"values is {_of(values)}", "a matrix of floating point")
    if values.numel() and _takes_kernel(name, impl, True, values):
        return QUANTISE_ROWS(values, kind)
    return eight_bit.quantise_rows(values, kind)


def quantise_weight(weight: Tensor, kind: str, *, backward: bool = True) -> EightBitWeight:
    """A frozen weight in eight bits, with a scale for each channel of the product's result.

    Args:
        weight: ``(N, K)``.
        kind: ``"fp8"`` (e4m3: Hopper, Ada and newer) or ``"int8"``.
        backward: also the transposed form, with scales of its own, that :func:`linear_backward_8bit` needs.

    Raises:
        ConfigError: no matrix of floating point, or a kind that is not known.
    """
    _check_kind("quantise_weight", kind)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise _wrong("quantise_weight", f"weight is {_of(weight)}", "a matrix of floating point")
    return reference.quantise_weight(weight.detach(), kind, backward=backward)


def linear_forward_8bit(
    input: Tensor,
    input_scale: Tensor,
    weight: EightBitWeight,
    bias: Tensor | None,
    *,
    out_dtype: torch.dtype,
    activation: str | None = None,
    keep: str = "none",
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """:func:`linear_forward` of an input and a weight in eight bits.

    Args:
        input: ``(M, K)`` in the weight's eight-bit type.
        input_scale: ``(M,)`` float32: the input stands for ``input * input_scale[:, None]``.
        weight: from :func:`quantise_weight`, ``(N, K)``.
        bias: ``(N,)`` or None.
        out_dtype: of the output.
        activation, keep, impl: as in :func:`linear_forward`.

    Returns:
        As :func:`linear_forward`.

    Raises:
        ConfigError: shapes, types or names that do not fit.
        ImplementationError: ``impl="triton"`` cannot run here.
    """
    name = "linear_forward_8bit"
    _check_product(name, "input", input, "weight", weight.data, 1)
    if input_scale.shape != input.shape[:1] or input_scale.dtype != torch.float32:
        raise _wrong(name, f"input_scale is {_of(input_scale)}", f"({input.shape[0]},) torch.float32")
    _check_bias(name, bias, weight.data.shape[0])
    _check_activation(name, activation, keep)
    tensors = (input, input_scale, weight.data, weight.scale, bias)
    if impl == "auto" and activation is None and _scaled_product_takes(input, weight.data, out_dtype):
        return _scaled_product(*tensors, out_dtype), None
    if _takes_kernel(name, impl, True, *tensors, kind=weight.kind):
        output, kept = EIGHT_BIT(*tensors, None, out_dtype, activation, keep)
        return output, None if keep == "none" else kept
    return reference.linear_forward_8bit(
        input, input_scale, weight, bias, out_dtype=out_dtype, activation=activation, keep=keep
    )


def linear_backward_8bit(
    grad: Tensor,
    weight: EightBitWeight,
    *,
    kept: Tensor | None = None,
    keep: str = "none",
    activation: str | None = None,
    impl: str = "auto",
) -> Tensor:
    """:func:`linear_backward` with a weight in eight bits; the gradient is quantised row by row.

    Args:
        grad: ``(M, N)``.
        weight: from :func:`quantise_weight` with ``backward=True``, ``(N, K)``.
        kept, keep, activation, impl: as in :func:`linear_backward`.

    Returns:
        ``(M, K)`` in the type of ``grad``.

    Raises:
        ConfigError: shapes, types or names that do not fit, or a weight without its transposed form.
        ImplementationError: ``impl="triton"`` cannot run here.
    """
    name = "linear_backward_8bit"
    data, scale = weight.transposed, weight.transposed_scale
    if data is None or scale is None:
        raise _wrong(name, "the weight has no transposed form", "one made by quantise_weight(..., backward=True)")
    if grad.dim() != 2 or grad.shape[1] != data.shape[1] or not grad.is_floating_point():
        raise _wrong(name, f"grad is {_of(grad)}", f"(rows, {data.shape[1]}) of floating point")
    _check_kept(name, kept, keep, activation, (grad.shape[0], data.shape[0]))
    if impl != "reference":
        grad8, grad_scale = quantise_rows(grad, weight.kind, impl=impl)
        if impl == "auto" and kept is None and _scaled_product_takes(grad8, data, grad.dtype):
            return _scaled_product(grad8, grad_scale, data, scale, None, grad.dtype)
        if _takes_kernel(name, impl, True, grad8, data, kept, kind=weight.kind):
            return EIGHT_BIT(grad8, grad_scale, data, scale, None, kept, grad.dtype, activation, keep)[0]
    return reference.linear_backward_8bit(grad, weight, kept=kept, keep=keep, activation=activation)


def _scaled_product_takes(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether ``torch._scaled_mm`` does this product with a scale a row: fp8 on Hopper and newer, bfloat16 out."""
    if left.dtype != torch.float8_e4m3fn or not left.is_cuda or out_dtype != torch.bfloat16 or not left.numel():
        return False
    capability = library.capability(left.get_device())
    return (
        capability is not None and capability >= (9, 0) and right.shape[0] % _SCALED_WIDTH == 0 == right.shape[1] % 16
    )


def _scaled_product(
    left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """``torch._scaled_mm``: row-major left, column-major right, scales (M, 1) and (1, N)."""
    return torch._scaled_mm(
        left.contiguous(),
        right.t(),
        left_scale[:, None],
        right_scale[None, :],
        bias=None if bias is None else bias.to(out_dtype),
        out_dtype=out_dtype,
        use_fast_accum=True,
    )


def _takes_kernel(name: str, impl: str, worth: bool, *tensors: Tensor | None, kind: str | None = None) -> bool:
    """Whether the kernel takes a call; raises where ``impl="triton"`` wants it and it cannot.

    ``worth``: what follows the product is more than PyTorch's own product does by itself.
    """
    if impl not in IMPLEMENTATIONS:
        raise ConfigError(f"{name}: impl={impl!r} is not one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    if impl == "reference" or (impl == "auto" and not worth):
        return False
    given = [each for each in tensors if each is not None]
    reasons = _limits(given, kind)
    if impl == "auto" and not reasons:
        if not given[0].is_cuda:
            reasons = ["the tensors are on the CPU"]
        elif given[0].dtype == torch.float32 and name in ("linear_forward", "linear_backward"):
            reasons = ["products of float32 are PyTorch's own, the activation a pass of its own"]
    if not reasons:
        return True
    if impl == "triton":
        raise ImplementationError(
            f"{name}: impl='triton' cannot run here:\n"
            + "\n".join(f"  - {reason}" for reason in reasons)
            + "\nUse impl='auto' or impl='reference' to take the PyTorch path."
        )
    _say_once(name, tuple(reasons))
    return False


def _limits(tensors: list[Tensor], kind: str | None) -> list[str]:
    first = tensors[0]
    if not library.TRITON_INSTALLED:
        return ["the package triton is not installed"]
    reasons = []
    if not first.is_cuda and not library.interpreting():
        reasons.append(
            f"a tensor is on {first.device}; the kernel needs a GPU (or, to be tested, Triton's interpreter: "
            "TRITON_INTERPRET=1 before Python starts)"
        )
    if first.is_cuda and library.too_old(first.get_device()):
        reasons.append(library.too_old(first.get_device()))
    if kind is None and first.dtype not in KERNEL_TYPES:
        reasons.append(f"the type is {first.dtype}; the kernel takes float32, bfloat16 and float16")
    if kind == "fp8" and first.is_cuda:
        capability = library.capability(first.get_device())
        if capability is None or capability < (8, 9):
            reasons.append("the GPU has no products of e4m3 (an NVIDIA GPU of capability 8.9 or newer has); use int8")
    return reasons


@torch.compiler.assume_constant_result
def _say_once(name: str, reasons: tuple[str, ...]) -> bool:
    _log_once(name, reasons)
    return True


@functools.cache
def _log_once(name: str, reasons: tuple[str, ...]) -> None:
    logger.info("%s: using PyTorch's own operations: %s", name, "; ".join(reasons))


def _check_product(name: str, left_name: str, left: Tensor, right_name: str, right: Tensor, dimension: int) -> None:
    if right.dim() != 2:
        raise _wrong(name, f"{right_name} is {_of(right)}", "a matrix (out, in)")
    if left.dim() != 2 or left.shape[1] != right.shape[dimension]:
        raise _wrong(name, f"{left_name} is {_of(left)}", f"(rows, {right.shape[dimension]}), as {right_name} has it")
    if left.dtype != right.dtype:
        raise _wrong(name, f"{left_name} is {left.dtype}", f"{right_name}'s {right.dtype}; convert one of them")
    if left.device != right.device:
        raise _wrong(name, f"{left_name} is on {left.device}", f"{right.device}, where {right_name} is")


def _check_bias(name: str, bias: Tensor | None, columns: int) -> None:
    if bias is not None and bias.shape != (columns,):
        raise _wrong(name, f"bias is {_of(bias)}", f"({columns},), one value a row of the weight")


def _check_activation(name: str, activation: str | None, keep: str) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise _wrong(name, f"activation={activation!r}", f"None or one of {', '.join(map(repr, ACTIVATIONS))}")
    if keep not in KEEPS:
        raise _wrong(name, f"keep={keep!r}", f"one of {', '.join(map(repr, KEEPS))}")
    if activation is None and keep != "none":
        raise _wrong(name, f"keep={keep!r} without an activation", "keep='none'")


def _check_kept(name: str, kept: Tensor | None, keep: str, activation: str | None, shape: tuple[int, int]) -> None:
    if kept is None:
        if keep != "none":
            raise _wrong(name, f"keep={keep!r} and nothing in kept", "the tensor that linear_forward kept")
        return
    _check_activation(name, activation, keep)
    if keep == "none" or activation is None:
        raise _wrong(name, f"kept with keep={keep!r}, activation={activation!r}", "what linear_forward was given")
    if tuple(kept.shape) != shape or (kept.dtype == torch.uint8) != (keep == "eight_bit"):
        wanted = "uint8" if keep == "eight_bit" else "floating point"
        raise _wrong(name, f"kept is {_of(kept)}", f"{shape} of {wanted}")


def _check_kind(name: str, kind: str) -> None:
    if kind not in eight_bit.EIGHT_BIT_TYPES:
        raise _wrong(name, f"kind={kind!r}", f"one of {', '.join(map(repr, eight_bit.EIGHT_BIT_TYPES))}")


def _of(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _wrong(name: str, given: str, wanted: str) -> ConfigError:
    return ConfigError(f"{name}: {given}; wanted {wanted}")
