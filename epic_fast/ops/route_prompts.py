"""The prompts of a routed layer and their layer norm, from the products of the layer's rows with its router.

A raw operation of inference: it writes into tensors of its caller and has no backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from epic_fast.errors import ConfigError
from epic_fast.kernels.route_prompts import reference  # pyright: ignore[reportMissingImports]
from epic_fast.ops import library
from epic_fast.ops.dispatch import Operation, check_without_backward
from epic_fast.ops.residual_norm import MOST_PROBES

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_EXPERTS = 64
MAX_WIDTH = 8192


def route_prompts(
    out: Tensor,
    normed: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    token_dots: Tensor | None,
    prompt_dots: Tensor | None,
    count: int,
    router_bias: Tensor | None,
    projected: Tensor | None,
    embeddings: Tensor | None,
    static: Tensor | None,
    experts: Tensor | None,
    mapped: Tensor | None,
    *,
    temperature: float,
    top_k: int | None = None,
    impl: str = "auto",
) -> Tensor | None:
    """``[static; mixture of experts; mapped]`` into ``out``, and the layer norm of these rows into ``normed``.

    The mixture is that of :func:`epic_fast.functional.mix_prompt_experts`, with the logits ``query @ embeddings``; a
    query is ``[(Σ token_dots + Σ prompt_dots) / count + router_bias; projected]``.  Sum and projection change places:
    the mean row's projection is the mean of the rows' projections.

    Args:
        out: ``(B, P, C)``, contiguous, written: static, mixed and mapped rows in this order.
        normed: ``(B, P, C)``, contiguous, written: the norm of the rows as ``out`` has them.
        norm_weight, norm_bias: ``(C,)``.
        eps: added to the variance.
        token_dots: ``(B, T, J)``, products of each token with the router's J rows; None: there are none.
        prompt_dots: ``(B, O, J)``, those of the prompts before; None: there are none.
        count: rows that the mean is over, which may be more than ``T + O``: some may have been summed before.
        router_bias: ``(J,)``, or None.
        projected: ``(B, D)``, the other part of the query; None together with ``embeddings``: no router, and experts
            are mixed evenly.
        embeddings: ``(J + D, E)``; without products J is 0.
        static: ``(L, C)``, the same for all samples, or None.
        experts: ``(E, L', C)``, or None.
        mapped: ``(B, m, C)``, or None.
        temperature, top_k: as in the mixture.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    ``out`` and ``normed`` overlap no other tensor of the call.

    Returns:
        The scores ``(B, E)`` in float32 (float64 where an input is), or None without a router.

    Raises:
        ConfigError: shapes or options that do not fit, or a gradient that would be lost.
    """
    router = (token_dots, prompt_dots, router_bias, projected, embeddings)
    rows = (static, experts, mapped)
    _check(out, normed, norm_weight, norm_bias, count, router, rows, temperature, top_k)
    return _ROUTE(
        out, normed, norm_weight, norm_bias, eps,
        token_dots, prompt_dots, count, router_bias, projected, embeddings, static, experts, mapped,
        temperature=temperature, top_k=top_k, impl=impl,
    )  # fmt: skip


def probe_through(probes: Sequence[Tensor], weights: Sequence[Tensor], *, impl: str = "auto") -> Tensor:
    """``probe @ weight`` of several: products with ``probe`` of rows that ``weight`` makes, by what it makes them of.

    For a row ``z = weight @ h`` it is ``probe @ z = (probe @ weight) @ h``: a few numbers of z without z.

    Args:
        probes: each ``(J, C)``, J at most 16; of one shape and type.
        weights: as many, each ``(C, K)``, as ``nn.Linear`` has it: C results of K numbers; of one shape and type.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        ``(len(probes), J, K)`` in float32 (float64 where an input is).

    Raises:
        ConfigError: shapes or types that do not fit, or a gradient that would be lost.
    """
    name = "probe_through"
    if not probes or len(probes) != len(weights):
        raise ConfigError(f"{name}: {len(probes)} probes and {len(weights)} weights; wanted as many, at least one")
    for label, tensors in (("probes", probes), ("weights", weights)):
        first = tensors[0]
        for number, each in enumerate(tensors):
            if each.dim() != 2 or not each.is_floating_point():
                raise ConfigError(
                    f"{name}: {label}[{number}] is {_shape(each)} {each.dtype}; wanted a floating-point matrix"
                )
            if (each.shape, each.dtype, each.device) != (first.shape, first.dtype, first.device):
                raise ConfigError(
                    f"{name}: {label}[{number}] is {_shape(each)} {each.dtype} on {each.device}; wanted "
                    f"{_shape(first)} {first.dtype} on {first.device}, as {label}[0] is"
                )
            if torch.is_grad_enabled() and each.requires_grad:
                raise ConfigError(
                    f"{name}: {label}[{number}] requires a gradient, and this has no backward; wanted no gradient "
                    "(torch.no_grad())"
                )
    probe, weight = probes[0], weights[0]
    if probe.shape[1] != weight.shape[0] or probe.device != weight.device or len(probe) > MOST_PROBES:
        raise ConfigError(
            f"{name}: probes are {_shape(probe)} on {probe.device}; wanted at most {MOST_PROBES} rows of "
            f"{weight.shape[0]} on {weight.device}, for weights of shape {_shape(weight)}"
        )
    # One by one: where each lies is looked at.
    return _THROUGH(*probes, *weights, impl=impl)


def _wrong(found: str, wanted: str) -> ConfigError:
    return ConfigError(f"route_prompts: {found}; wanted {wanted}")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check(
    out: Tensor,
    normed: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    count: int,
    router: tuple[Tensor | None, ...],
    rows: tuple[Tensor | None, ...],
    temperature: float,
    top_k: int | None,
) -> None:
    token_dots, prompt_dots, router_bias, projected, embeddings = router
    static, experts, mapped = rows
    named: list[tuple[str, Tensor | None]] = [
        ("out", out),
        ("normed", normed),
        ("norm_weight", norm_weight),
        ("norm_bias", norm_bias),
        ("token_dots", token_dots),
        ("prompt_dots", prompt_dots),
        ("router_bias", router_bias),
        ("projected", projected),
        ("embeddings", embeddings),
        ("static", static),
        ("experts", experts),
        ("mapped", mapped),
    ]
    if out.dim() != 3 or not out.shape[2]:
        raise _wrong(f"out has shape {_shape(out)}", "(batch, prompts, width), at least one column")
    batch, _, width = out.shape
    check_without_backward("route_prompts", named)
    if normed.shape != out.shape:
        raise _wrong(f"normed has shape {_shape(normed)}", f"{_shape(out)}, as out has")
    for label, tensor in named[:2]:
        if tensor is not None and not tensor.is_contiguous():
            raise _wrong(f"{label} has strides {tensor.stride()} for shape {_shape(tensor)}", "a contiguous tensor")
    for label, tensor in named[2:4]:
        if tensor is not None and (tensor.dim() != 1 or tensor.shape[0] != width):
            raise _wrong(f"{label} has shape {_shape(tensor)}", f"({width},)")
    if static is not None and (static.dim() != 2 or static.shape[1] != width):
        raise _wrong(f"static has shape {_shape(static)}", f"(prompts, {width})")
    if experts is not None and (experts.dim() != 3 or not experts.shape[0] or experts.shape[2] != width):
        raise _wrong(f"experts has shape {_shape(experts)}", f"(experts, prompts, {width}), at least one expert")
    if mapped is not None and (mapped.dim() != 3 or mapped.shape[0] != batch or mapped.shape[2] != width):
        raise _wrong(f"mapped has shape {_shape(mapped)}", f"({batch}, prompts, {width})")
    lengths = [0 if each is None else each.shape[-2] for each in rows]
    if sum(lengths) != out.shape[1] or not sum(lengths):
        raise _wrong(
            f"out has shape {_shape(out)}",
            f"({batch}, {sum(lengths)}, {width}), at least one row: {lengths[0]} static, {lengths[1]} mixed and "
            f"{lengths[2]} mapped",
        )
    _check_router(batch, count, router, experts)
    if not 0 < temperature < float("inf"):
        raise _wrong(f"temperature={temperature!r}", "a finite number greater than 0")
    if top_k is not None:
        routed = None if embeddings is None else embeddings.shape[1]
        if routed is None:
            raise _wrong(f"top_k={top_k!r} without a router", "None")
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 0 < top_k <= routed:
            raise _wrong(f"top_k={top_k!r}", f"an integer of 1 to {routed} experts, or None for all")


def _check_router(batch: int, count: int, router: tuple[Tensor | None, ...], experts: Tensor | None) -> None:
    token_dots, prompt_dots, router_bias, projected, embeddings = router
    if projected is None or embeddings is None:
        labels = ("token_dots", "prompt_dots", "router_bias", "projected", "embeddings")
        given = [label for label, each in zip(labels, router, strict=True) if each is not None]
        if given:
            raise _wrong(
                f"{', '.join(given)} without the rest of a router", "projected and embeddings as well, or none"
            )
        return
    own = None
    for label, tensor in (("token_dots", token_dots), ("prompt_dots", prompt_dots)):
        if tensor is None:
            continue
        own = tensor.shape[-1] if own is None else own
        if tensor.dim() != 3 or tensor.shape[0] != batch or tensor.shape[2] != own:
            raise _wrong(f"{label} has shape {_shape(tensor)}", f"({batch}, rows, {own})")
    if router_bias is not None and own is None:
        raise _wrong("router_bias without token_dots or prompt_dots", "None, or the products that it is added to")
    if router_bias is not None and (router_bias.dim() != 1 or router_bias.shape[0] != own):
        raise _wrong(f"router_bias has shape {_shape(router_bias)}", f"({own},)")
    if own is not None and count < 1:
        raise _wrong(f"count={count!r}", "at least one row that the mean is over")
    if projected.dim() != 2 or projected.shape[0] != batch:
        raise _wrong(f"projected has shape {_shape(projected)}", f"({batch}, numbers of the query)")
    size = (own or 0) + projected.shape[1]
    if embeddings.dim() != 2 or embeddings.shape[0] != size or not embeddings.shape[1]:
        raise _wrong(f"embeddings has shape {_shape(embeddings)}", f"({size}, experts), at least one expert")
    if experts is not None and experts.shape[0] != embeddings.shape[1]:
        raise _wrong(
            f"embeddings has shape {_shape(embeddings)}", f"({size}, {experts.shape[0]}), as there are experts"
        )


@functools.cache
def _launcher() -> Callable[..., Any]:
    from epic_fast.kernels.route_prompts import triton_forward  # pyright: ignore[reportMissingImports]

    return triton_forward.route_prompts


@functools.cache
def _through_launcher() -> Callable[..., Any]:
    from epic_fast.kernels.route_prompts import triton_through  # pyright: ignore[reportMissingImports]

    return triton_through.probe_through


def _forward(out: Tensor, *others: Any) -> Tensor:
    *given, temperature, top_k = others
    scores = _launcher()(out, *given, temperature=temperature, top_k=top_k)
    return out.new_empty(0, dtype=torch.float32) if scores is None else scores


def _forward_fake(out: Tensor, *others: Any) -> Tensor:
    embeddings = others[9]
    shape = (0,) if embeddings is None else (out.shape[0], embeddings.shape[1])
    return out.new_empty(shape, dtype=torch.float32)


FORWARD = library.register(
    "route_prompts(Tensor(a!) out, Tensor(b!) normed, Tensor norm_weight, Tensor norm_bias, float eps, "
    "Tensor? token_dots, Tensor? prompt_dots, SymInt count, Tensor? router_bias, Tensor? projected, "
    "Tensor? embeddings, Tensor? static, Tensor? experts, Tensor? mapped, float temperature, int? top_k) -> Tensor",
    _forward,
    _forward_fake,
)


def _triton(*args: Any, temperature: float, top_k: int | None) -> Tensor | None:
    # All but eps and count.
    if library.direct(*args[:4], *args[5:7], *args[8:]):
        return _launcher()(*args, temperature=temperature, top_k=top_k)
    scores = FORWARD(*args, temperature, top_k)
    return None if args[10] is None else scores


def _op_through(probes: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return _through_launcher()(probes, weights)


THROUGH = library.register(
    "probe_through(Tensor[] probes, Tensor[] weights) -> Tensor",
    _op_through,
    lambda probes, weights: probes[0].new_empty(
        len(probes), probes[0].shape[0], weights[0].shape[1], dtype=torch.float32
    ),
)


def _halves(tensors: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Probes and weights."""
    count = len(tensors) // 2
    return list(tensors[:count]), list(tensors[count:])


def _triton_through(*tensors: Tensor) -> Tensor:
    return (_through_launcher() if library.direct(*tensors) else THROUGH)(*_halves(tensors))


def _reference_through(*tensors: Tensor) -> Tensor:
    return reference.probe_through(*_halves(tensors))


def _through_limits(*tensors: Tensor) -> Sequence[str]:
    old = library.too_old(tensors[0].get_device()) if tensors[0].is_cuda else ""
    reasons = [old] if old else []
    reasons += [
        f"a tensor is {each.dtype}; the kernel takes float32, bfloat16 and float16"
        for each in (tensors[0], tensors[-1])
        if each.dtype not in KERNEL_TYPES
    ]
    return reasons


def _limits(out: Tensor, *others: Any) -> Sequence[str]:
    old = library.too_old(out.get_device()) if out.is_cuda else ""
    reasons = [old] if old else []
    for each in (out, *others):
        if isinstance(each, Tensor) and each.dtype not in KERNEL_TYPES:
            reasons.append(f"a tensor is {each.dtype}; the kernel takes float32, bfloat16 and float16")
    embeddings, experts = others[9], others[11]
    count = embeddings.shape[1] if embeddings is not None else 0 if experts is None else experts.shape[0]
    if count > MOST_EXPERTS:
        reasons.append(f"there are {count} experts; the kernel takes up to {MOST_EXPERTS}")
    if out.shape[2] > MAX_WIDTH:
        reasons.append(f"rows are {out.shape[2]} wide; the kernel takes up to {MAX_WIDTH}")
    return reasons


_ROUTE = Operation("route_prompts", reference=reference.route_prompts, triton=_triton, limits=_limits)
_THROUGH = Operation("probe_through", reference=_reference_through, triton=_triton_through, limits=_through_limits)
