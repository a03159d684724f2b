"""Residual sum and layer norm or RMS norm of a frozen layer, forward and backward.

Raw operations, tensors in and tensors out: whoever calls them owns the graph.  The weights are frozen, so that there
is no gradient but one, for both terms of the sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from epic_fast.errors import ConfigError
from epic_fast.kernels.common.eight_bit import EIGHT_BIT_TYPES  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.residual_norm import reference  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.residual_norm.tiles import MAX_WIDTH  # pyright: ignore[reportMissingImports]
from epic_fast.ops import library
from epic_fast.ops.dispatch import Operation

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_FP8 = (8, 9)
# Vectors that rows are multiplied by in passing: each is compiled for itself.
MOST_PROBES = 16


def residual_norm_forward(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    normed_dtype: torch.dtype | None = None,
    in_place: bool = False,
    eight_bit: str | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """``stream + branch`` and its layer norm.

    Args:
        stream: ``(..., D)`` with unit last stride; rows may lie anywhere, as those of a slice ``[:, :P]`` do.
        branch: ``(..., D)``, of the same or another type; None: the norm alone.
        weight, bias: ``(D,)``; no bias: an RMS norm, without a mean, ``x / sqrt(mean(x²) + eps) * weight``.
        eps: added to the variance.
        normed_dtype: of the norm; that of ``branch`` if None, or of ``stream`` without a branch.
        in_place: the sum is written into the memory of ``stream``.
        eight_bit: ``"fp8"`` (e4m3) or ``"int8"``: the norm comes in 8 bits, each row with a scale of its own.

    Returns:
        ``(total, normed, mean, rstd, scale)``: the sum in the type of ``stream`` (``stream`` itself where there is no
        branch, or in place); its norm; mean (None of an RMS norm) and reciprocal standard deviation ``(rows,)`` in
        float32, of the rounded sum; and the scale ``(rows,)`` in float32, ``norm ≈ normed * scale``, or None.  A row
        that is not finite has the scale NaN.

    Raises:
        ConfigError: shapes that do not fit, or an ``eight_bit`` that does not exist.
    """
    if weight.shape != stream.shape[-1:] or (bias is not None and bias.shape != weight.shape):
        raise ConfigError(
            f"residual_norm_forward: weight has shape {tuple(weight.shape)} and bias "
            f"{None if bias is None else tuple(bias.shape)}; wanted "
            f"({stream.shape[-1]},) for a stream of shape {tuple(stream.shape)}"
        )
    if branch is not None and branch.shape != stream.shape:
        raise ConfigError(
            f"residual_norm_forward: branch has shape {tuple(branch.shape)}; wanted {tuple(stream.shape)}, as the "
            "stream has"
        )
    operation = _FORWARD.get(eight_bit)
    if operation is None:
        raise ConfigError(f"residual_norm_forward: eight_bit={eight_bit!r} is not one of None, 'fp8', 'int8'")
    return operation(
        stream, branch, weight, bias, eps, normed_dtype=normed_dtype, in_place=in_place, eight_bit=eight_bit, impl=impl
    )  # fmt: skip


def residual_norm_forward_kept(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    normed_dtype: torch.dtype | None = None,
    in_place: bool = False,
    eight_bit: str | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """:func:`residual_norm_forward` that keeps the normalised rows in 8 bits for backward: the sum need not live.

    A layer norm's gradient reads the normalised row only through its projection on it,
    ``x̂ · mean(g x̂)``, so that rounding it shows less in the gradient than bfloat16 does.

    Returns:
        ``(total, normed, data, step, rstd, scale)``: ``(total - mean) * rstd ≈ data * step``, data ``(..., D)`` int8
        and step ``(rows,)`` float32; the others as :func:`residual_norm_forward` has them.  Give data, step and rstd to
        :func:`residual_norm_backward` as ``total``, ``mean`` and ``rstd``.
    """
    if bias is None:
        raise ConfigError(
            "residual_norm_forward_kept: bias=None is an RMS norm, whose rows are not kept in 8 bits; wanted a "
            "bias, or residual_norm_forward"
        )
    operation = _KEPT.get(eight_bit)
    if operation is None:
        raise ConfigError(f"residual_norm_forward_kept: eight_bit={eight_bit!r} is not one of None, 'fp8', 'int8'")
    return operation(
        stream, branch, weight, bias, eps, normed_dtype=normed_dtype, in_place=in_place, eight_bit=eight_bit, impl=impl
    )  # fmt: skip


def residual_norm_backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    grad_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """The gradient of the stream, which is also that of the branch, ``(..., D)`` in the type of ``total``.

    Args:
        grad_normed: ``(..., D)``, of the norm.
        grad_total: ``(..., D)``, of the sum where something else read it too; None: nothing did.
        total, mean, rstd: what :func:`residual_norm_forward` gave (no mean: an RMS norm); or data, step and rstd
            of :func:`residual_norm_forward_kept`.
        weight: ``(D,)``.
        grad_dtype: of the result, where it is not that of ``total`` (of ``grad_normed`` for rows in 8 bits).
    """
    if grad_normed.shape != total.shape or (grad_total is not None and grad_total.shape != total.shape):
        raise ConfigError(
            f"residual_norm_backward: the gradients have shapes {tuple(grad_normed.shape)} and "
            f"{None if grad_total is None else tuple(grad_total.shape)}; wanted {tuple(total.shape)}, as the total has"
        )
    return _BACKWARD(grad_normed, grad_total, total, weight, mean, rstd, grad_dtype=grad_dtype, impl=impl)


def moved_norm_forward(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    branch_at: Tensor | None = None,
    normed_at: Tensor | None = None,
    probe: Tensor | None = None,
    ended: tuple[Tensor, Tensor, Tensor | None] | None = None,
    normed_dtype: torch.dtype | None = None,
    keep: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """:func:`residual_norm_forward` of rows whose branch, or whose norm, lies in another order: nothing is gathered.

    Args:
        stream: ``(R, D)``.
        branch: ``(S, D)``, or None.
        weight, bias, eps, normed_dtype: as there.
        branch_at: ``(R,)`` int64, rows of ``branch``: the sum of row r is ``stream[r] + branch[branch_at[r]]``.
            Without it S is R.
        normed_at: ``(R,)`` int64, each of 0 to R - 1 once: the norm of row r is row ``normed_at[r]`` of ``normed``.
        probe: ``(J, D)``, J at most 16: each row of the sum is multiplied by each of its rows.
        ended: ``(hidden, through, offset)``, ``(S, K)``, ``(J, K)`` in float32 (float64 where the rows are) and
            ``(D,)`` or None: the last S rows of the stream are neither summed nor normed.  Of each only the products
            ``(row + offset) · probe + hidden · through`` are made: those with a sum whose second term is a product of
            ``hidden``, when ``through`` is ``probe`` times that product's weight
            (:func:`epic_fast.ops.route_prompts.probe_through`).  ``branch`` then has S rows less; wants a probe, no
            ``branch_at`` and no ``keep``.
        keep: what backward reads is the normalised rows in 8 bits, not the sum.

    Returns:
        ``(total, normed, rows, mean, rstd, probed)``: the sum, its norm, what :func:`moved_norm_backward` takes as
        ``total``, ``mean`` and ``rstd``, and the products ``(R, J)`` in float32, None without a probe.  Of rows that
        end all but the products is left unwritten, for the caller to fill.

    Raises:
        ConfigError: shapes that do not fit.  What an index holds is not looked at.
    """
    name = "moved_norm_forward"
    _check_matrix(name, "stream", stream)
    width = stream.shape[1]
    rows = len(stream) if branch is None or branch_at is None else len(branch)
    if ended is not None:
        rows -= _check_ended(name, stream, probe, ended, branch_at is not None or keep)
    wanted = {"weight": (width,), "bias": (width,), "branch": (rows, width)}
    wanted |= {"branch_at": (len(stream),), "normed_at": (len(stream),)}
    if probe is not None:
        wanted["probe"] = (len(probe), width)
    given = {"weight": weight, "bias": bias, "branch": branch, "branch_at": branch_at, "normed_at": normed_at}
    _check_shapes(name, {**given, "probe": probe}, wanted, stream)
    if probe is not None and len(probe) > MOST_PROBES:
        raise ConfigError(f"{name}: probe has {len(probe)} rows; wanted at most {MOST_PROBES}")
    if keep and bias is None:
        raise ConfigError(f"{name}: bias=None is an RMS norm, whose rows are not kept in 8 bits; wanted a bias")
    return _MOVED(
        stream, branch, weight, bias, eps,
        branch_at=branch_at, normed_at=normed_at, probe=probe, ended=ended, normed_dtype=normed_dtype, keep=keep,
        impl=impl,
    )  # fmt: skip


def moved_norm_backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    normed_at: Tensor | None = None,
    moved_at: Tensor | None = None,
    moved_dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """:func:`residual_norm_backward` of rows ``(R, D)`` in two orders.

    Args:
        grad_normed: ``(S, D)``; without ``normed_at`` S is R.
        grad_total, total, weight, mean, rstd, grad_dtype: as there.
        normed_at: ``(R,)`` int64: the gradient of row r's norm is row ``normed_at[r]`` of ``grad_normed``.
        moved_at: ``(R,)`` int64, each of 0 to R - 1 once: the gradient is wanted a second time, row r at
            ``moved_at[r]``, in ``moved_dtype`` (that of the first if None).

    Returns:
        The gradient ``(R, D)``, and the same in the other order or None.
    """
    name = "moved_norm_backward"
    _check_matrix(name, "total", total)
    shape = tuple(total.shape)
    rows = len(total) if normed_at is None else len(grad_normed)
    wanted = {"grad_normed": (rows, shape[1]), "grad_total": shape, "normed_at": shape[:1], "moved_at": shape[:1]}
    given = {"grad_normed": grad_normed, "grad_total": grad_total, "normed_at": normed_at, "moved_at": moved_at}
    _check_shapes(name, given, wanted, total)
    return _MOVED_BACKWARD(
        grad_normed, grad_total, total, weight, mean, rstd,
        normed_at=normed_at, moved_at=moved_at, moved_dtype=moved_dtype, grad_dtype=grad_dtype, impl=impl,
    )  # fmt: skip


def _check_matrix(operation: str, name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2:
        raise ConfigError(f"{operation}: {name} has shape {tuple(tensor.shape)}; wanted rows (R, D)")


def _check_ended(
    operation: str, stream: Tensor, probe: Tensor | None, ended: tuple[Tensor, Tensor, Tensor | None], other: bool
) -> int:
    """How many rows end."""
    hidden, through, offset = ended
    if probe is None or other:
        raise ConfigError(f"{operation}: ended goes with a probe, without branch_at and without keep")
    if hidden.dim() != 2 or len(hidden) > len(stream):
        raise ConfigError(
            f"{operation}: ended's hidden rows have shape {tuple(hidden.shape)}; wanted (S, K), at most "
            f"{len(stream)} rows, as the stream has"
        )
    wanted: dict[str, tuple[int, ...]] = {"hidden": tuple(hidden.shape)}
    wanted |= {"through": (len(probe), hidden.shape[1]), "offset": (stream.shape[1],)}
    _check_shapes(operation, {"hidden": hidden, "through": through, "offset": offset}, wanted, stream)
    wide = torch.promote_types(stream.dtype, torch.float32)
    if through.dtype != wide:
        raise ConfigError(f"{operation}: through is {through.dtype}; wanted {wide}")
    return len(hidden)


def _check_shapes(
    operation: str, given: dict[str, Tensor | None], wanted: dict[str, tuple[int, ...]], rows: Tensor
) -> None:
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != wanted[name]:
            raise ConfigError(
                f"{operation}: {name} has shape {tuple(tensor.shape)}; wanted {wanted[name]} for rows of shape "
                f"{tuple(rows.shape)}"
            )
        if name.endswith("_at") and tensor.dtype != torch.int64:
            raise ConfigError(f"{operation}: {name} is {tensor.dtype}; wanted torch.int64")
        if tensor.device != rows.device:
            raise ConfigError(f"{operation}: {name} is on {tensor.device}; wanted {rows.device}, as the rows are")


@functools.cache
def _launchers() -> tuple[Callable[..., Any], ...]:
    from epic_fast.kernels.residual_norm import triton_backward, triton_forward  # pyright: ignore[reportMissingImports]

    return (
        triton_forward.residual_norm_forward,
        triton_backward.residual_norm_backward,
        triton_forward.moved_norm_forward,
        triton_backward.moved_norm_backward,
    )


def _no_none(like: Tensor, found: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if each is None else each for each in found)


def _op_forward(
    stream: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    normed_dtype: torch.dtype | None,
    eight_bit: str | None,
) -> tuple[Tensor, ...]:
    found = _launchers()[0](stream, branch, weight, bias, eps, normed_dtype=normed_dtype, eight_bit=eight_bit)
    return _no_none(stream, found)


def _op_forward_in_place(
    stream: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    normed_dtype: torch.dtype | None,
    eight_bit: str | None,
) -> tuple[Tensor, ...]:
    _, *found = _launchers()[0](
        stream, branch, weight, bias, eps, normed_dtype=normed_dtype, in_place=True, eight_bit=eight_bit
    )  # fmt: skip
    return _no_none(stream, found)


def _op_norm(
    stream: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    normed_dtype: torch.dtype | None,
    eight_bit: str | None,
) -> tuple[Tensor, ...]:
    _, *found = _launchers()[0](stream, None, weight, bias, eps, normed_dtype=normed_dtype, eight_bit=eight_bit)
    return _no_none(stream, found)


def _op_backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    grad_dtype: torch.dtype | None = None,
) -> Tensor:
    return _launchers()[1](grad_normed, grad_total, total, weight, mean, rstd, grad_dtype=grad_dtype)


def _op_kept(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    normed_dtype: torch.dtype | None,
    eight_bit: str | None,
) -> tuple[Tensor, ...]:
    total, *found, scale = _launchers()[0](
        stream, branch, weight, bias, eps, normed_dtype=normed_dtype, eight_bit=eight_bit, keep=True
    )  # fmt: skip
    total = stream.new_empty(0) if branch is None else total
    return total, *found, stream.new_empty(0) if scale is None else scale


def _op_kept_in_place(
    stream: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    normed_dtype: torch.dtype | None,
    eight_bit: str | None,
) -> tuple[Tensor, ...]:
    _, *found, scale = _launchers()[0](
        stream, branch, weight, bias, eps, normed_dtype=normed_dtype, eight_bit=eight_bit, in_place=True, keep=True
    )  # fmt: skip
    return (*found, stream.new_empty(0) if scale is None else scale)


def _fake_kept(stream: Tensor, dtype: torch.dtype, eight_bit: str | None) -> tuple[Tensor, ...]:
    normed, *statistics = _fake_norm(stream, stream, dtype, eight_bit)
    return normed, stream.new_empty(stream.shape, dtype=torch.int8), *statistics


def _fake_norm(stream: Tensor, bias: Tensor | None, dtype: torch.dtype, eight_bit: str | None) -> tuple[Tensor, ...]:
    rows = math.prod(stream.shape[:-1])
    return (
        stream.new_empty(stream.shape, dtype=dtype if eight_bit is None else EIGHT_BIT_TYPES[eight_bit]),
        stream.new_empty(0) if bias is None else stream.new_empty(rows, dtype=torch.float32),
        stream.new_empty(rows, dtype=torch.float32),
        stream.new_empty(0) if eight_bit is None else stream.new_empty(rows, dtype=torch.float32),
    )


_OPTIONS = "Tensor weight, Tensor? bias, float eps, ScalarType? normed_dtype, str? eight_bit"
FORWARD = library.register(
    f"residual_norm_forward(Tensor stream, Tensor branch, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _op_forward,
    lambda stream, branch, weight, bias, eps, normed_dtype, eight_bit: (
        stream.new_empty(stream.shape),
        *_fake_norm(stream, bias, normed_dtype or branch.dtype, eight_bit),
    ),
)
FORWARD_IN_PLACE = library.register(
    f"residual_norm_forward_(Tensor(a!) stream, Tensor branch, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _op_forward_in_place,
    lambda stream, branch, weight, bias, eps, normed_dtype, eight_bit: _fake_norm(
        stream, bias, normed_dtype or branch.dtype, eight_bit
    ),
)
NORM = library.register(
    f"norm_forward(Tensor stream, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _op_norm,
    lambda stream, weight, bias, eps, normed_dtype, eight_bit: _fake_norm(
        stream, bias, normed_dtype or stream.dtype, eight_bit
    ),
)
KEPT = library.register(
    f"residual_norm_kept(Tensor stream, Tensor? branch, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _op_kept,
    lambda stream, branch, weight, bias, eps, normed_dtype, eight_bit: (
        stream.new_empty(0 if branch is None else stream.shape),
        *_fake_kept(stream, normed_dtype or (stream if branch is None else branch).dtype, eight_bit),
    ),
)
KEPT_IN_PLACE = library.register(
    f"residual_norm_kept_(Tensor(a!) stream, Tensor branch, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _op_kept_in_place,
    lambda stream, branch, weight, bias, eps, normed_dtype, eight_bit: _fake_kept(
        stream, normed_dtype or branch.dtype, eight_bit
    ),
)
BACKWARD = library.register(
    "residual_norm_backward(Tensor grad_normed, Tensor? grad_total, Tensor total, Tensor weight, Tensor? mean, "
    "Tensor rstd, ScalarType? grad_dtype=None) -> Tensor",
    _op_backward,
    lambda grad_normed, grad_total, total, weight, mean, rstd, grad_dtype=None: grad_normed.new_empty(
        total.shape, dtype=grad_dtype or (grad_normed if total.dtype == torch.int8 else total).dtype
    ),
)


def _op_moved(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    branch_at: Tensor | None,
    normed_at: Tensor | None,
    probe: Tensor | None,
    hidden: Tensor | None,
    through: Tensor | None,
    offset: Tensor | None,
    normed_dtype: torch.dtype | None,
    keep: bool,
) -> tuple[Tensor, ...]:
    ended = None if hidden is None or through is None else (hidden, through, offset)
    total, normed, kept, *others = _launchers()[2](
        stream, branch, weight, bias, eps,
        branch_at=branch_at, normed_at=normed_at, probe=probe, ended=ended, normed_dtype=normed_dtype, keep=keep,
    )  # fmt: skip
    return _no_none(stream, (None if branch is None else total, normed, kept if keep else None, *others))


def _fake_moved(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    branch_at: Tensor | None,
    normed_at: Tensor | None,
    probe: Tensor | None,
    hidden: Tensor | None,
    through: Tensor | None,
    offset: Tensor | None,
    normed_dtype: torch.dtype | None,
    keep: bool,
) -> tuple[Tensor, ...]:
    rows = stream.shape[0]
    return (
        stream.new_empty(0 if branch is None else stream.shape),
        stream.new_empty(stream.shape, dtype=normed_dtype or (stream if branch is None else branch).dtype),
        stream.new_empty(stream.shape, dtype=torch.int8) if keep else stream.new_empty(0),
        stream.new_empty(0) if bias is None else stream.new_empty(rows, dtype=torch.float32),
        stream.new_empty(rows, dtype=torch.float32),
        stream.new_empty(0) if probe is None else stream.new_empty(rows, probe.shape[0], dtype=torch.float32),
    )


MOVED = library.register(
    "moved_norm_forward(Tensor stream, Tensor? branch, Tensor weight, Tensor? bias, float eps, Tensor? branch_at, "
    "Tensor? normed_at, Tensor? probe, Tensor? hidden, Tensor? through, Tensor? offset, ScalarType? normed_dtype, "
    "bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _op_moved,
    _fake_moved,
)


def _op_moved_backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    normed_at: Tensor | None,
    moved_at: Tensor | None,
    moved_dtype: torch.dtype | None,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    found = _launchers()[3](
        grad_normed, grad_total, total, weight, mean, rstd,
        normed_at=normed_at, moved_at=moved_at, moved_dtype=moved_dtype, grad_dtype=grad_dtype,
    )  # fmt: skip
    return _no_none(total, found)


def _fake_moved_backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    normed_at: Tensor | None,
    moved_at: Tensor | None,
    moved_dtype: torch.dtype | None,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    dtype = grad_dtype or (grad_normed if total.dtype == torch.int8 else total).dtype
    moved = total.new_empty(0) if moved_at is None else total.new_empty(total.shape, dtype=moved_dtype or dtype)
    return total.new_empty(total.shape, dtype=dtype), moved


MOVED_BACKWARD = library.register(
    "moved_norm_backward(Tensor grad_normed, Tensor? grad_total, Tensor total, Tensor weight, Tensor? mean, "
    "Tensor rstd, Tensor? normed_at, Tensor? moved_at, ScalarType? moved_dtype, ScalarType? grad_dtype) "
    "-> (Tensor, Tensor)",
    _op_moved_backward,
    _fake_moved_backward,
)


def _triton_moved(
    stream: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    ended = (None, None, None) if options["ended"] is None else options["ended"]
    at = options["branch_at"], options["normed_at"], options["probe"], *ended
    if library.direct(stream, branch, weight, bias, *at):
        return _launchers()[2](stream, branch, weight, bias, eps, **options)
    total, normed, kept, mean, rstd, probed = MOVED(
        stream, branch, weight, bias, eps, *at, options["normed_dtype"], options["keep"]
    )
    total = stream if branch is None else total
    return (
        total,
        normed,
        kept if options["keep"] else total,
        None if bias is None else mean,
        rstd,
        None if options["probe"] is None else probed,
    )


def _triton_moved_backward(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor | None]:
    at = options["normed_at"], options["moved_at"]
    if library.direct(*tensors, *at):
        return _launchers()[3](*tensors, **options)
    grad, moved = MOVED_BACKWARD(*tensors, *at, options["moved_dtype"], options["grad_dtype"])
    return grad, None if options["moved_at"] is None else moved


def _triton_forward(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    normed_dtype: torch.dtype | None,
    in_place: bool,
    eight_bit: str | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    if library.direct(stream, branch, weight, bias):
        return _launchers()[0](
            stream, branch, weight, bias, eps, normed_dtype=normed_dtype, in_place=in_place, eight_bit=eight_bit
        )  # fmt: skip
    total = stream
    if branch is None:
        normed, mean, rstd, scale = NORM(stream, weight, bias, eps, normed_dtype, eight_bit)
    elif in_place:
        normed, mean, rstd, scale = FORWARD_IN_PLACE(stream, branch, weight, bias, eps, normed_dtype, eight_bit)
    else:
        total, normed, mean, rstd, scale = FORWARD(stream, branch, weight, bias, eps, normed_dtype, eight_bit)
    return total, normed, None if bias is None else mean, rstd, None if eight_bit is None else scale


def _triton_kept(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    normed_dtype: torch.dtype | None,
    in_place: bool,
    eight_bit: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    if library.direct(stream, branch, weight, bias):
        return _launchers()[0](
            stream, branch, weight, bias, eps,
            normed_dtype=normed_dtype, in_place=in_place, eight_bit=eight_bit, keep=True,
        )  # fmt: skip
    options = (weight, bias, eps, normed_dtype, eight_bit)
    if in_place and branch is not None:
        normed, data, step, rstd, scale = KEPT_IN_PLACE(stream, branch, *options)
        total = stream
    else:
        total, normed, data, step, rstd, scale = KEPT(stream, branch, *options)
        total = stream if branch is None else total
    return total, normed, data, step, rstd, None if eight_bit is None else scale


def _triton_backward(*tensors: Tensor | None, grad_dtype: torch.dtype | None) -> Tensor:
    if library.direct(*tensors):
        return _launchers()[1](*tensors, grad_dtype=grad_dtype)
    return BACKWARD(*tensors, grad_dtype)


def _limits(eight_bit: str | None, stream: Tensor, *others: Any) -> Sequence[str]:
    reasons = []
    if stream.is_cuda:
        reasons = [each for each in (library.too_old(stream.get_device()), no_fp8(eight_bit, stream)) if each]
    for each in (stream, *others):
        if isinstance(each, Tensor) and each.dtype not in (*KERNEL_TYPES, torch.int8):
            reasons.append(f"a tensor is {each.dtype}; the kernel takes float32, bfloat16 and float16")
    if not 0 < stream.shape[-1] <= MAX_WIDTH:
        reasons.append(f"rows are {stream.shape[-1]} wide; the kernel takes 1 to {MAX_WIDTH}")
    return reasons


def no_fp8(eight_bit: str | None, tensor: Tensor) -> str:
    """Why the tensor's GPU cannot write fp8; empty if it can, or need not."""
    return _no_fp8(tensor.get_device()) if eight_bit == "fp8" else ""


@torch.compiler.assume_constant_result
def _no_fp8(index: int) -> str:
    found = library.capability(index)
    if found is None or found >= OLDEST_FP8:
        return ""
    return "the GPU has compute capability {}.{}; fp8 needs {}.{}; take int8".format(*found, *OLDEST_FP8)


_FORWARD = {
    eight_bit: Operation(
        "residual_norm_forward",
        reference=reference.residual_norm_forward,
        triton=_triton_forward,
        limits=functools.partial(_limits, eight_bit),
    )
    for eight_bit in (None, *EIGHT_BIT_TYPES)
}
_KEPT = {
    eight_bit: Operation(
        "residual_norm_forward_kept",
        reference=reference.residual_norm_forward_kept,
        triton=_triton_kept,
        limits=functools.partial(_limits, eight_bit),
    )
    for eight_bit in (None, *EIGHT_BIT_TYPES)
}
_BACKWARD = Operation(
    "residual_norm_backward",
    reference=reference.residual_norm_backward,
    triton=_triton_backward,
    limits=functools.partial(_limits, None),
)
_MOVED = Operation(
    "moved_norm_forward",
    reference=reference.moved_norm_forward,
    triton=_triton_moved,
    limits=functools.partial(_limits, None),
)
_MOVED_BACKWARD = Operation(
    "moved_norm_backward",
    reference=reference.moved_norm_backward,
    triton=_triton_moved_backward,
    limits=functools.partial(_limits, None),
)
