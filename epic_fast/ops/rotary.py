"""Rotary positions of packed heads, forward and backward.

Raw operations, tensors in and tensors out: whoever calls them owns the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from epic_fast.errors import ConfigError
from epic_fast.kernels.rotary import reference  # pyright: ignore[reportMissingImports]
from epic_fast.ops import library
from epic_fast.ops.dispatch import Operation

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 256


def rotate_heads(rows: Tensor, cos: Tensor, sin: Tensor, rotated: int, *, impl: str = "auto") -> Tensor:
    """The first heads of each row, rotated by their position in place.

    Args:
        rows: ``(B, N, T, D)``, contiguous, D even; T heads, such as those of queries, keys and values one after the
            other.
        cos, sin: ``(N, D)``, of each position.
        rotated: how many heads are.

    Returns:
        ``rows``.

    Raises:
        ConfigError: shapes that do not fit, or rows that are not contiguous.
    """
    if rows.dim() != 4 or rows.shape[3] % 2 or not rows.is_contiguous():
        raise ConfigError(
            f"rotate_heads: rows have shape {tuple(rows.shape)} and strides {rows.stride()}; wanted contiguous ones "
            "(batch, tokens, heads, head_dim) with an even head_dim"
        )
    _check_tables("rotate_heads", rows.shape[1], rows.shape[3], cos, sin)
    if not 0 <= rotated <= rows.shape[2]:
        raise ConfigError(f"rotate_heads: rotated={rotated}; wanted 0 to {rows.shape[2]}, the heads of a row")
    return _ROTATE(rows, cos, sin, rotated=rotated, impl=impl)


def join_rotated_back(
    query: Tensor | None, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, *, impl: str = "auto"
) -> Tensor:
    """The gradient of packed rows from those of their heads behind :func:`rotate_heads`.

    Args:
        query: ``(B, H, N, D)``; None: the rows have no queries.
        key, value: ``(B, Hk, N, D)``, values not rotated.  Any strides.
        cos, sin: ``(N, D)``.

    Returns:
        ``(B, N, H + 2 Hk, D)`` in the type of ``key``.

    Raises:
        ConfigError: shapes that do not fit.
    """
    of_query = key.shape if query is None else (key.shape[0], query.shape[1], *key.shape[2:])
    if (
        key.dim() != 4
        or key.shape[3] % 2
        or value.shape != key.shape
        or (query is not None and query.shape != of_query)
    ):
        raise ConfigError(
            f"join_rotated_back: query, key and value have shapes {None if query is None else tuple(query.shape)}, "
            f"{tuple(key.shape)} and {tuple(value.shape)}; wanted (batch, heads, tokens, head_dim), the last two alike "
            "and an even head_dim"
        )
    _check_tables("join_rotated_back", key.shape[2], key.shape[3], cos, sin)
    return _JOIN(key, query, value, cos, sin, impl=impl)


def _check_tables(name: str, tokens: int, depth: int, cos: Tensor, sin: Tensor) -> None:
    if cos.shape != (tokens, depth) or sin.shape != cos.shape:
        raise ConfigError(
            f"{name}: cos and sin have shapes {tuple(cos.shape)} and {tuple(sin.shape)}; wanted ({tokens}, {depth})"
        )


@functools.cache
def _launchers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from epic_fast.kernels.rotary import triton_kernels  # pyright: ignore[reportMissingImports]

    return triton_kernels.rotate_heads, triton_kernels.join_rotated_back


def _op_rotate(rows: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> None:
    _launchers()[0](rows, cos, sin, rotated)


def _op_join(key: Tensor, query: Tensor | None, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _launchers()[1](query, key, value, cos, sin)


def _join_fake(key: Tensor, query: Tensor | None, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, heads, tokens, depth = key.shape
    return key.new_empty(batch, tokens, 2 * heads + (0 if query is None else query.shape[1]), depth)


ROTATE = library.register(
    "rotate_heads_(Tensor(a!) rows, Tensor cos, Tensor sin, SymInt rotated) -> ()",
    _op_rotate,
    lambda rows, cos, sin, rotated: None,
)
JOIN = library.register(
    "join_rotated_back(Tensor key, Tensor? query, Tensor value, Tensor cos, Tensor sin) -> Tensor", _op_join, _join_fake
)


def _triton_rotate(rows: Tensor, cos: Tensor, sin: Tensor, *, rotated: int) -> Tensor:
    (_op_rotate if library.direct(rows, cos, sin) else ROTATE)(rows, cos, sin, rotated)
    return rows


def _triton_join(key: Tensor, query: Tensor | None, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    given = (key, query, value, cos, sin)
    return (_op_join if library.direct(*given) else JOIN)(*given)


def _limits(first: Tensor, *others: Tensor | None) -> Sequence[str]:
    old = library.too_old(first.get_device()) if first.is_cuda else ""
    reasons = [old] if old else []
    for each in (first, *others):
        if each is not None and each.dtype not in KERNEL_TYPES:
            reasons.append(f"a tensor is {each.dtype}; the kernel takes float32, bfloat16 and float16")
    if not 0 < first.shape[3] <= LARGEST_HEAD:
        reasons.append(f"head_dim is {first.shape[3]}; the kernel takes 2 to {LARGEST_HEAD}")
    return reasons


def _reference_join(key: Tensor, query: Tensor | None, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return reference.join_rotated_back(query, key, value, cos, sin)


def _reference_rotate(rows: Tensor, cos: Tensor, sin: Tensor, *, rotated: int) -> Tensor:
    return reference.rotate_heads(rows, cos, sin, rotated)


_ROTATE = Operation("rotate_heads", reference=_reference_rotate, triton=_triton_rotate, limits=_limits)
_JOIN = Operation("join_rotated_back", reference=_reference_join, triton=_triton_join, limits=_limits)
