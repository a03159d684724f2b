"""How far a kernel may be from float64: at most a small factor times what PyTorch itself is in the same type.

The rule, for a tensor that was computed three times from the same inputs (made in the low precision *before* they
were promoted, so that quantising the inputs counts for nobody)::

    |candidate - float64|  <=  factor · |PyTorch in the same type - float64|  +  one rounding

for the maximum over the tensor and for the root mean square.  ``factor`` is 2 for outputs and 3 for gradients.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _device

from epic_fast.ops import native

OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


@dataclass(frozen=True)
class Measured:
    """The errors of one tensor against float64, and whether they are within the budget.

    Attributes:
        tensor: its name.
        dtype: the low precision.
        max_error, rms_error, mean_error: of the candidate.
        eager_max_error, eager_rms_error, eager_mean_error: of PyTorch in the same type.
        max_budget, rms_budget: what the candidate was granted.
        magnitude: the largest absolute value in float64.
        problem: why it fails, with the place and the values; empty if it passes.
    """

    tensor: str
    dtype: str
    max_error: float
    rms_error: float
    mean_error: float
    eager_max_error: float
    eager_rms_error: float
    eager_mean_error: float
    max_budget: float
    rms_budget: float
    magnitude: float
    problem: str = ""

    @property
    def passes(self) -> bool:
        return not self.problem

    def row(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


def rounding(dtype: torch.dtype, reduction: int, largest: float, operands: float) -> float:
    """The one rounding term: storing the result, and summing ``reduction`` terms in at least float32.

    Args:
        dtype: what the result is stored in.
        reduction: how many terms the longest sum behind an element has.
        largest: the size of the results (a maximum or a root mean square).
        operands: the size of what is summed; it counts where the sum cancels (a gradient that is exactly zero).
    """
    accumulator = torch.float32 if torch.finfo(dtype).bits < 32 else dtype
    storing = torch.finfo(dtype).eps / 2 * largest
    summing = torch.finfo(accumulator).eps * math.sqrt(max(reduction, 1)) * max(largest, operands)
    return storing + summing


def measure(
    got: Tensor,
    want64: Tensor,
    eager: Tensor,
    *,
    factor: float,
    dtype: torch.dtype,
    reduction: int,
    name: str = "tensor",
    operands: float | None = None,
) -> Measured:
    """Holds ``got`` against the budget and reports, without raising; :func:`budget` raises.

    Args:
        got: from the candidate.
        want64: from the reference in float64, on the promoted inputs.
        eager: from the reference in ``dtype``.
        factor: granted multiple of the error of ``eager``.
        dtype, reduction: see :func:`rounding`.
        name: of the tensor, for the message.
        operands: the size of the terms that were summed; the largest value of ``want64`` if not given.
    """
    if want64.dtype != torch.float64:
        raise TypeError(f"{name}: the yardstick is {want64.dtype}; wanted torch.float64")
    for label, tensor in (("the reference in the same type", eager), ("the candidate", got)):
        if tensor.shape != want64.shape:
            raise AssertionError(f"{name}: {label} has shape {tuple(tensor.shape)}; wanted {tuple(want64.shape)}")
        if tensor.dtype != dtype:
            raise AssertionError(f"{name}: {label} is {tensor.dtype}; wanted {dtype}")
    kind = str(dtype).removeprefix("torch.")
    if want64.numel() == 0:
        return Measured(name, kind, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    got, want64, eager = got.detach().to(want64.device), want64.detach(), eager.detach().to(want64.device)
    for label, tensor in (("float64", want64), (f"PyTorch in {kind}", eager)):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: {label} is not finite everywhere, so it measures nothing; take milder inputs")

    errors, eager_errors = (got.double() - want64).abs(), (eager.double() - want64).abs()
    errors = errors.nan_to_num(nan=math.inf, posinf=math.inf)
    largest, typical = want64.abs().max().item(), want64.square().mean().sqrt().item()
    operands = largest if operands is None else operands
    ratio = typical / largest if largest else 1.0
    eager_max, eager_rms = eager_errors.max().item(), eager_errors.square().mean().sqrt().item()
    max_error, rms_error = errors.max().item(), errors.square().mean().sqrt().item()
    max_budget = factor * eager_max + rounding(dtype, reduction, largest, operands)
    rms_budget = factor * eager_rms + rounding(dtype, reduction, typical, operands * ratio)

    problem = ""
    if not (max_error <= max_budget and rms_error <= rms_budget):
        flat = int(errors.argmax())
        index = tuple(int(each) for each in torch.unravel_index(torch.tensor(flat), want64.shape))
        problem = (
            f"{name} ({kind}, {tuple(want64.shape)}) is too far from float64:\n"
            f"  worst at {index}: got {got[index].item():.9g}, wanted {want64[index].item():.9g}, "
            f"PyTorch in {kind} {eager[index].item():.9g}\n"
            f"  largest error {max_error:.4g}, budget {max_budget:.4g} = {factor:g} x {eager_max:.4g} + rounding\n"
            f"  root mean square {rms_error:.4g}, budget {rms_budget:.4g} = {factor:g} x {eager_rms:.4g} + rounding\n"
            f"  not finite: {int((~got.isfinite()).sum())} of {got.numel()}"
        )
    return Measured(
        tensor=name,
        dtype=kind,
        max_error=max_error,
        rms_error=rms_error,
        mean_error=errors.mean().item(),
        eager_max_error=eager_max,
        eager_rms_error=eager_rms,
        eager_mean_error=eager_errors.mean().item(),
        max_budget=max_budget,
        rms_budget=rms_budget,
        magnitude=largest,
        problem=problem,
    )


def budget(got: Tensor, want64: Tensor, eager: Tensor, **settings: Any) -> Measured:
    """Raises ``AssertionError`` where ``got`` is farther from float64 than :func:`measure` grants."""
    measured = measure(got, want64, eager, **settings)
    if not measured.passes:
        raise AssertionError(measured.problem)
    return measured


Operation = Callable[..., Any]
"""Tensors in by name (the differentiable ones), options by keyword; a tensor or a tuple of tensors and None out."""


@dataclass(frozen=True)
class Results:
    """Outputs and gradients of one run, by name; None where there is none."""

    outputs: dict[str, Tensor | None]
    gradients: dict[str, Tensor | None]


def run_forward_backward(
    operation: Operation,
    inputs: Mapping[str, Tensor | None],
    options: Mapping[str, Any] | None = None,
    *,
    cotangents: Sequence[Tensor | None] | None = None,
    dtype: torch.dtype | None = None,
    needs: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Results:
    """Runs an operation forward and backward on fresh leaves, with autocast off.

    Args:
        operation: called as ``operation(**inputs, **options)``.
        inputs: the differentiable tensors by parameter name; memory layout is kept.
        options: everything else, passed on unchanged.
        cotangents: the gradient of each output, or None for an output that nobody used.  Default: see
            :func:`make_cotangents`.
        dtype: what inputs and cotangents are converted to first (float64 for the yardstick).
        needs: the inputs that need a gradient; all of them if not given.
        output_names: names for the report.
    """
    needs = list(inputs) if needs is None else needs
    leaves = {
        name: None if each is None else _leaf(each, dtype).requires_grad_(name in needs)
        for name, each in inputs.items()
    }
    devices = {each.device.type for each in leaves.values() if each is not None}
    with contextlib.ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        outputs = operation(**leaves, **(options or {}))
        outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
        names = [*output_names] if output_names else [f"output {index}" for index in range(len(outputs))]
        cotangents = make_cotangents(outputs) if cotangents is None else cotangents
        used = [
            (each, given.to(each.device, each.dtype))
            for each, given in zip(outputs, cotangents, strict=True)
            if each is not None and given is not None and each.requires_grad
        ]
        if used:
            torch.autograd.backward([each for each, _ in used], [given for _, given in used])
    return Results(
        outputs={name: None if each is None else each.detach() for name, each in zip(names, outputs, strict=True)},
        gradients={name: None if each is None else each.grad for name, each in leaves.items()},
    )


def make_cotangents(outputs: Sequence[Tensor | None], *, seed: int = 1) -> list[Tensor | None]:
    """A random gradient for each output, in its type and on its device."""
    randoms = {each.device: torch.Generator(each.device).manual_seed(seed) for each in outputs if each is not None}
    return [
        None
        if each is None
        else torch.randn(each.shape, generator=randoms[each.device], device=each.device).to(each.dtype)
        for each in outputs
    ]


def measure_operation(
    candidate: Operation,
    reference: Operation,
    inputs: Mapping[str, Tensor | None],
    options: Mapping[str, Any] | None = None,
    *,
    reduction: int | Mapping[str, int],
    output_names: Sequence[str] | None = None,
    used: Sequence[bool] | None = None,
    needs: Sequence[str] | None = None,
    seed: int = 1,
) -> list[Measured]:
    """Every output and gradient of an operation, forward and backward, against float64 and the reference's own error.

    Args:
        candidate: the operation in question, called as ``candidate(**inputs, **options)``.
        reference: its specification; run twice, in float64 and in the type of the inputs.
        inputs: differentiable tensors in the low precision, by parameter name.
        options: everything else.
        reduction: the longest sum behind an element (see :func:`rounding`), one number or by name: an input's name
            stands for its gradient.
        output_names: names for the report.
        used: which outputs get a gradient; all if not given.
        needs: inputs that need a gradient; all if not given.
        seed: of the gradients that are sent in.
    """
    common: dict[str, Any] = {"needs": needs, "output_names": output_names}
    eager_outputs = _call(reference, inputs, options)
    cotangents = make_cotangents(eager_outputs, seed=seed)
    if used is not None:
        cotangents = [each if wanted else None for each, wanted in zip(cotangents, used, strict=True)]
    eager = run_forward_backward(reference, inputs, options, cotangents=cotangents, **common)
    want = run_forward_backward(reference, inputs, options, cotangents=cotangents, dtype=torch.float64, **common)
    got = run_forward_backward(candidate, inputs, options, cotangents=cotangents, **common)

    sizes = [each.abs().max().item() for each in (*inputs.values(), *cotangents) if each is not None and each.numel()]
    operands = max([1.0, *sizes])
    found = []
    for kind, factor in (("outputs", OUTPUT_FACTOR), ("gradients", GRADIENT_FACTOR)):
        for name, expected in getattr(want, kind).items():
            label = name if kind == "outputs" else f"gradient of {name}"
            theirs, ours = getattr(eager, kind)[name], getattr(got, kind)[name]
            if expected is None:
                if ours is not None and bool(ours.any()):
                    raise AssertionError(f"{label}: wanted None; got a tensor {tuple(ours.shape)}")
                continue
            if ours is None and not bool(expected.any()):
                continue  # None is a gradient of zero
            if ours is None:
                raise AssertionError(f"{label}: wanted a tensor {tuple(expected.shape)}; got None")
            found.append(
                measure(
                    ours,
                    expected,
                    theirs,
                    factor=factor,
                    dtype=theirs.dtype,
                    reduction=reduction if isinstance(reduction, int) else reduction[name],
                    name=label,
                    operands=operands,
                )
            )
    return found


def check_operation(candidate: Operation, reference: Operation, *args: Any, **kwargs: Any) -> list[Measured]:
    """:func:`measure_operation`, raising ``AssertionError`` that lists every tensor beyond its budget."""
    found = measure_operation(candidate, reference, *args, **kwargs)
    problems = [each.problem for each in found if not each.passes]
    if problems:
        raise AssertionError("\n".join(problems))
    return found


def bits_equal(one: Any, other: Any) -> bool:
    """Whether two tensors, or nested tuples of them and None, are the same bits: NaN equals itself, -0.0 not 0.0."""
    if one is None or other is None:
        return one is other
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(_bits(one), _bits(other))
    return len(one) == len(other) and all(bits_equal(*pair) for pair in zip(one, other, strict=True))


def assert_bits_equal(one: Any, other: Any, name: str = "result") -> None:
    """Raises with the first difference where :func:`bits_equal` is false."""
    if bits_equal(one, other):
        return
    if isinstance(one, tuple | list) and isinstance(other, tuple | list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_bits_equal(*pair, name=f"{name}[{index}]")
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        raise AssertionError(f"{name}: {_describe(one)} and {_describe(other)} are not the same")
    if one.dtype != other.dtype:
        raise AssertionError(f"{name}: {one.dtype} and {other.dtype} are not the same type")
    differs = (_bits(one) != _bits(other)).reshape(*one.shape, -1).any(dim=-1)
    index = tuple(int(each) for each in differs.nonzero()[0])
    raise AssertionError(
        f"{name}: {int(differs.sum())} of {differs.numel()} elements differ in their bits, first at {index}: "
        f"{one[index].item():.9g} and {other[index].item():.9g}"
    )


@dataclass
class Poison:
    """What :func:`poisoned_empty` did: how many allocations it filled."""

    allocations: int = 0


# Where PyTorch keeps the allocation that its own compiled code calls, and launchers do.
_GUARDS: Any = torch._C._dynamo.guards  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def poisoned_empty(package: str = "epic_fast") -> Iterator[Poison]:
    """Fresh memory is NaN (integers: a large number) when code of ``package`` asks for it uninitialised.

    A kernel that leaves a part of its result unwritten, or reads scratch before writing it, then shows it at once.
    Only calls made by modules of ``package`` are touched, so PyTorch's own use of these functions goes on as it was.
    Memory that compiled plans would ask for themselves is asked for by Python meanwhile.
    """
    poison = Poison()
    # ``torch.device`` as a context keeps, from its first use on, the very functions that it is to divert.
    remember = getattr(_device, "_device_constructors", None)
    if remember is not None:
        remember()

    def poisoning(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(original)
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            tensor = original(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if (caller == package or caller.startswith(f"{package}.")) and not torch.compiler.is_compiling():
                with torch.no_grad():
                    _fill_with_poison(tensor)
                poison.allocations += 1
            return tensor

        return allocate

    places = itertools.chain(
        ((torch, name) for name in ("empty", "empty_like", "empty_strided", "empty_permuted")),
        ((torch.Tensor, name) for name in ("new_empty", "new_empty_strided")),
        ((_GUARDS, name) for name in ("_empty_strided_cuda",) if hasattr(_GUARDS, name)),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(native.left_out())
        for owner, name in places:
            own = name in vars(owner)
            original = getattr(owner, name)
            setattr(owner, name, poisoning(original))
            if own:
                stack.callback(setattr, owner, name, original)
            else:  # inherited: taking our attribute away restores it
                stack.callback(delattr, owner, name)
        yield poison


def _fill_with_poison(tensor: Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(math.nan)
    elif tensor.dtype == torch.bool:
        tensor.fill_(True)
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max // 3)


def _leaf(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A leaf of the same values and, for views, the same strides."""
    return tensor.detach().to(dtype or tensor.dtype)


def _call(
    operation: Operation, inputs: Mapping[str, Tensor | None], options: Mapping[str, Any] | None
) -> list[Tensor | None]:
    with torch.no_grad():
        outputs = operation(**inputs, **(options or {}))
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def _bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.dtype == torch.bool or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return tensor.contiguous().flatten().view(torch.uint8).reshape(tensor.numel(), tensor.element_size())


def _describe(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
