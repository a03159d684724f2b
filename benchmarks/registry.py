"""What is compared: operations, the shapes they run at, and who computes them."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from epic_fast import functional
from epic_fast.kernels.prompt_attention.reference import visibility  # pyright: ignore[reportMissingImports]
from epic_fast.testing.cases import (
    ATTENTION_MEASURED,
    ATTENTION_SMOKE,
    GATE_MEASURED,
    GATE_SMOKE,
    INFUSED_MEASURED,
    INFUSED_SMOKE,
    INTERACTION_MEASURED,
    INTERACTION_SMOKE,
    MIX_MEASURED,
    MIX_SMOKE,
    SWIGLU_MEASURED,
    SWIGLU_SMOKE,
    WINDOW_MEASURED,
    WINDOW_SMOKE,
    AttentionCase,
    Case,
    InfusedAttentionCase,
    WindowCase,
)
from epic_fast.testing.numerics import make_cotangents

OURS, EAGER = "ours", "eager"
MODES = ("forward", "backward", "forward+backward")


class CannotRun(Exception):
    """A provider that cannot compute this case, with the reason."""


@dataclass
class Call:
    """A provider at a case, with its tensors: ready to be timed.

    Attributes:
        compute: the forward pass; a tuple of tensors (None where an output does not exist).
        leaves: the tensors that need a gradient.
        outputs: from ``compute``'s result to the operation's own outputs, for checking.
        settings: a context in which ``compute`` has to run; entering it is not timed.
    """

    compute: Callable[[], tuple[Tensor | None, ...]]
    leaves: list[Tensor]
    outputs: Callable[[tuple[Tensor | None, ...]], tuple[Tensor | None, ...]] = field(default=lambda result: result)
    settings: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext

    @functools.cached_property
    def cotangents(self) -> list[Tensor]:
        with torch.no_grad():
            made = make_cotangents(self.compute())
        return [each for each in made if each is not None]

    def forward(self) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            return self.compute()

    def forward_backward(self) -> tuple[Tensor, ...]:
        outputs = [each for each in self.compute() if each is not None]
        return torch.autograd.grad(outputs, self.leaves, self.cotangents)

    def backward(self) -> Callable[[], tuple[Tensor, ...]]:
        """The backward pass alone, over one graph that stays."""
        outputs = [each for each in self.compute() if each is not None]
        return lambda: torch.autograd.grad(outputs, self.leaves, self.cotangents, retain_graph=True)


@dataclass(frozen=True)
class Provider:
    """Someone who computes an operation.

    Attributes:
        name: on the command line and in the rows.
        label: in tables and figures.
        prepare: from ``(case, inputs, options)`` to a :class:`Call`; raises :class:`CannotRun`.
        in_place: rows of prompts and tokens already lie in one tensor: what the rival gets for nothing.
        compiled: goes through ``torch.compile``; its backward pass is not timed alone, since a graph that is kept
            for that is compiled to use more memory.
        group: what tables call it together with its kin, of which they show the fastest.
    """

    name: str
    label: str
    prepare: Callable[[Any, dict[str, Tensor | None], dict[str, Any]], Call]
    in_place: bool = False
    compiled: bool = False
    group: str = ""

    @property
    def modes(self) -> tuple[str, ...]:
        return tuple(mode for mode in MODES if not (self.compiled and mode == "backward"))


@dataclass(frozen=True)
class Operation:
    """An operation to measure.

    Attributes:
        name: on the command line.
        function: the public one, called as ``function(**inputs, **options, impl=...)``.
        cases: the shapes; ``smoke`` are tiny ones that run anywhere.
        providers: who computes it.
    """

    name: str
    function: Callable[..., Any]
    cases: tuple[Case, ...]
    smoke: tuple[Case, ...]
    providers: tuple[Provider, ...]

    def reference(self, **arguments: Any) -> Any:
        return self.function(**arguments, impl="reference")


def leaves_of(inputs: dict[str, Tensor | None]) -> list[Tensor]:
    return [each.requires_grad_() for each in inputs.values() if each is not None]


def _tuple(result: Tensor | tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return (result,) if isinstance(result, Tensor) else result


def _ours(function: Callable[..., Any], impl: str) -> Callable[..., Call]:
    def prepare(case: Any, inputs: dict[str, Tensor | None], options: dict[str, Any]) -> Call:
        leaves = leaves_of(inputs)
        return Call(lambda: _tuple(function(**inputs, **options, impl=impl)), leaves)

    return prepare


def _compiled_reference(function: Callable[..., Any]) -> Callable[..., Call]:
    def prepare(case: Any, inputs: dict[str, Tensor | None], options: dict[str, Any]) -> Call:
        leaves = leaves_of(inputs)
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=False)
        return Call(lambda: _tuple(compiled(**inputs, **options, impl="reference")), leaves)

    return prepare


def _visible(case: AttentionCase, device: torch.device) -> Tensor | None:
    """The mask ``(batch or 1, 1, rows, keys)``; None if everybody sees everything."""
    lengths = case.options(device)["lengths"]
    mask = visibility(
        case.batch if lengths is not None else 1,
        case.prompts,
        case.tokens,
        prompt_rows=not case.prefix_tuning,
        prompt_mask=case.prompt_mask,
        causal=case.causal,
        lengths=lengths,
        device=device,
    )
    return None if bool(mask.all()) else mask[:, None]


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From queries, keys and values with the prompts in place, ``(B, H, P+N, D)``, to the output."""


def _attention_rival(
    make: Callable[[AttentionCase, torch.device], Attend],
    *,
    cat: bool,
    settings: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Callable[..., Call]:
    """A rival that attends over one sequence: concatenated in the call, or found that way.

    Its output stays one tensor; a user who needs prompts and tokens apart pays more than is counted here.
    """

    def prepare(case: AttentionCase, inputs: dict[str, Tensor | None], options: dict[str, Any]) -> Call:
        tokens = [inputs["query"], inputs["key"], inputs["value"]]
        prompts = [inputs["prompt_query"], inputs["prompt_key"], inputs["prompt_value"]]
        device = next(each.device for each in tokens if each is not None)
        attend = make(case, device)

        def join(prompt: Tensor | None, token: Tensor | None) -> Tensor:
            assert token is not None
            return token if prompt is None else torch.cat([prompt.expand(case.batch, -1, -1, -1), token], dim=2)

        def apart(result: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            whole, first = result[0], 0 if case.prefix_tuning else case.prompts
            assert whole is not None
            return whole[:, :, first:], None if case.prefix_tuning else whole[:, :, :first]

        if cat:
            leaves = leaves_of(inputs)
            pairs = list(zip(prompts, tokens, strict=True))
            return Call(lambda: (attend(*[join(*pair) for pair in pairs]),), leaves, apart, settings)
        with torch.no_grad():
            whole = [join(*pair) for pair in zip(prompts, tokens, strict=True)]
        leaves = [each.requires_grad_() for each in whole]
        return Call(lambda: (attend(*whole),), leaves, apart, settings)

    return prepare


def _sdpa(backend: SDPBackend, *, cat: bool) -> Callable[..., Call]:
    def make(case: AttentionCase, device: torch.device) -> Attend:
        mask = _visible(case, device)
        if mask is not None and backend == SDPBackend.FLASH_ATTENTION:
            raise CannotRun("PyTorch's flash attention takes no mask")
        return lambda query, key, value: scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=case.scale
        )

    return _attention_rival(make, cat=cat, settings=lambda: sdpa_kernel(backend))


def _flex(case: AttentionCase, device: torch.device) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    visible, prompts, rows = _visible(case, device), case.prompts, case.prompts + case.tokens
    if case.lengths is not None or case.prefix_tuning or case.prompt_mask != "full":
        raise CannotRun("its mask is written for causal or no mask, prompts that see everything, no lengths")

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query < prompts) | (key <= query)

    block_mask = None
    if visible is not None:
        block_mask = create_block_mask(allowed, None, None, rows, rows, device=str(device))
    torch._dynamo.reset()
    # The CPU's version is not compiled: it has no backward pass.
    attend = torch.compile(flex_attention, dynamic=False, fullgraph=True) if device.type == "cuda" else flex_attention
    return lambda query, key, value: attend(query, key, value, block_mask=block_mask, scale=case.scale)


def _xformers(case: AttentionCase, device: torch.device) -> Attend:
    try:
        attention = importlib.import_module("xformers.ops").memory_efficient_attention
    except (ImportError, OSError) as error:
        raise CannotRun(f"xformers does not load: {error}") from error
    if _visible(case, device) is not None:
        raise CannotRun("this mask would have to be a dense bias with aligned rows")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads_last = [each.transpose(1, 2) for each in (query, key, value)]
        return attention(*heads_last, scale=case.scale).transpose(1, 2)

    return attend


_BACKENDS = {
    "cudnn": ("cuDNN", SDPBackend.CUDNN_ATTENTION),
    "flash": ("flash", SDPBackend.FLASH_ATTENTION),
    "efficient": ("memory-efficient", SDPBackend.EFFICIENT_ATTENTION),
    "math": ("math", SDPBackend.MATH),
}


ATTENTION = Operation(
    "attention",
    functional.prompt_attention,
    ATTENTION_MEASURED,
    ATTENTION_SMOKE,
    (
        Provider(OURS, "epic_fast", _ours(functional.prompt_attention, "triton")),
        Provider(EAGER, "PyTorch, eager", _ours(functional.prompt_attention, "reference")),
        Provider("compiled", "PyTorch, compiled", _compiled_reference(functional.prompt_attention), compiled=True),
        *(
            Provider(
                f"cat+sdpa-{name}", f"cat + SDPA ({label})", _sdpa(backend, cat=True), group="cat + SDPA, best backend"
            )
            for name, (label, backend) in _BACKENDS.items()
        ),
        *(
            Provider(
                f"sdpa-{name}",
                f"SDPA ({label}), no cat",
                _sdpa(backend, cat=False),
                in_place=True,
                group="SDPA, no cat, best backend",
            )
            for name, (label, backend) in _BACKENDS.items()
        ),
        Provider("cat+flex", "cat + FlexAttention, compiled", _attention_rival(_flex, cat=True), compiled=True),
        Provider("xformers", "xformers, no cat", _attention_rival(_xformers, cat=False), in_place=True),
    ),
)

INTERACTION = Operation(
    "interaction",
    functional.prompt_interaction,
    INTERACTION_MEASURED,
    INTERACTION_SMOKE,
    (
        Provider(OURS, "epic_fast", _ours(functional.prompt_interaction, "triton")),
        Provider(EAGER, "PyTorch, eager", _ours(functional.prompt_interaction, "reference")),
        Provider("compiled", "PyTorch, compiled", _compiled_reference(functional.prompt_interaction), compiled=True),
    ),
)


def dense_bias(bias: Tensor | None, mask: Tensor | None, prompts: int, dtype: torch.dtype) -> Tensor | None:
    """Bias ``(H, M, M)`` and mask ``(nW, M, M)`` in one tensor, padded for P prompts before the M tokens of a window.

    Returns:
        ``(nW, H, R, S)``, R = P + M, one window and one head where nothing depends on them; S is R, filled up so that
        rows start at multiples of 16 bytes and no backend has to copy it once ``[..., :R]`` is taken.
    """
    if bias is None and mask is None:
        return None
    given = bias if bias is not None else mask
    assert given is not None
    rows = prompts + given.shape[-1]
    windows, heads = 1 if mask is None else len(mask), 1 if bias is None else len(bias)
    dense = torch.zeros(windows, heads, rows, -(-rows // 8) * 8, device=given.device)
    if bias is not None:
        dense[..., :rows] += pad(bias.float(), (prompts, 0, prompts, 0))
    if mask is not None:
        dense[..., prompts:, prompts:rows].masked_fill_(~mask[:, None], float("-inf"))
    return dense.to(dtype)


def _dense_bias(case: WindowCase, options: dict[str, Any], dtype: torch.dtype) -> Tensor | None:
    """:func:`dense_bias` of a case: ``(H, R, R)``, or ``(nW * H, R, R)`` where there is a mask."""
    dense = dense_bias(options["relative_position_bias"], options["window_mask"], case.prompts, dtype)
    if dense is None:
        return None
    return dense.expand(-1, case.heads, -1, -1).flatten(0, 1)[..., : case.prompts + case.tokens]


def _window_sdpa(backend: SDPBackend, *, cat: bool) -> Callable[..., Call]:
    """SDPA over windows into which the prompts were copied: in the call, or found that way.

    Windows and heads are one dimension, so that one dense bias serves the whole batch.  With the copy it gives what the
    operation gives, tokens and the prompts' mean; without it one tensor, of which the mean is not counted.
    """

    def prepare(case: WindowCase, inputs: dict[str, Tensor | None], options: dict[str, Any]) -> Call:
        given = [each for each in inputs.values() if each is not None]
        bias = _dense_bias(case, options, given[0].dtype)
        if bias is not None and backend == SDPBackend.FLASH_ATTENTION:
            raise CannotRun("PyTorch's flash attention takes no bias")
        rows = case.prompts + case.tokens

        def join(prompt: Tensor, token: Tensor) -> Tensor:
            return torch.cat([prompt.repeat_interleave(case.windows, dim=0), token], dim=2)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            """A view ``(B, nW, H, R, D)`` of whatever memory the backend chose."""
            folded = (query, key, value)
            if case.mask:
                folded = [each.view(case.batch, -1, rows, case.head_dim) for each in folded]
            mask = None if bias is None else bias.expand(len(folded[0]), -1, -1, -1)
            found = scaled_dot_product_attention(*folded, attn_mask=mask, scale=case.scale)
            return found.unflatten(1 if case.mask else 0, (-1, case.heads) if case.mask else (-1, case.windows))

        def apart(whole: Tensor | None) -> tuple[Tensor, Tensor]:
            assert whole is not None
            return whole[:, :, :, case.prompts :], whole[:, :, :, : case.prompts].mean(dim=1)

        def flat(result: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            tokens, of_prompts = result if cat else apart(result[0])
            assert tokens is not None
            return tokens.flatten(0, 1), of_prompts

        def settings() -> AbstractContextManager[Any]:
            return sdpa_kernel(backend)

        if cat:
            leaves = leaves_of(inputs)
            pairs = list(zip(given[3:], given[:3], strict=True))
            return Call(lambda: apart(attend(*[join(*pair) for pair in pairs])), leaves, flat, settings)
        with torch.no_grad():
            joined = [join(prompt, token) for prompt, token in zip(given[3:], given[:3], strict=True)]
        leaves = [each.requires_grad_() for each in joined]
        return Call(lambda: (attend(*joined),), leaves, flat, settings)

    return prepare


WINDOWS = Operation(
    "windows",
    functional.window_prompt_attention,
    WINDOW_MEASURED,
    WINDOW_SMOKE,
    (
        Provider(OURS, "epic_fast", _ours(functional.window_prompt_attention, "triton")),
        Provider(EAGER, "PyTorch, eager", _ours(functional.window_prompt_attention, "reference")),
        Provider(
            "compiled", "PyTorch, compiled", _compiled_reference(functional.window_prompt_attention), compiled=True
        ),
        *(
            Provider(
                f"copy+sdpa-{name}",
                f"copy + SDPA ({label}), dense bias",
                _window_sdpa(backend, cat=True),
                group="copy + SDPA, dense bias, best backend",
            )
            for name, (label, backend) in _BACKENDS.items()
        ),
        *(
            Provider(
                f"sdpa-{name}",
                f"SDPA ({label}), dense bias, no copy",
                _window_sdpa(backend, cat=False),
                in_place=True,
                group="SDPA, dense bias, no copy, best backend",
            )
            for name, (label, backend) in _BACKENDS.items()
        ),
    ),
)

EXPERTS = Operation(
    "experts",
    functional.mix_prompt_experts,
    MIX_MEASURED,
    MIX_SMOKE,
    (
        Provider(OURS, "epic_fast", _ours(functional.mix_prompt_experts, "triton")),
        Provider(EAGER, "PyTorch, eager", _ours(functional.mix_prompt_experts, "reference")),
        Provider("compiled", "PyTorch, compiled", _compiled_reference(functional.mix_prompt_experts), compiled=True),
    ),
)


def _infusion_sdpa(*, folded: bool) -> Callable[..., Call]:
    """PyTorch's own choice among its attentions: over keys and values that were infused before, or over those as they
    are with a rescaled query and an affine map of the output.  What goes into it is rounded to the tokens' type."""

    def prepare(case: InfusedAttentionCase, inputs: dict[str, Tensor | None], options: dict[str, Any]) -> Call:
        leaves = leaves_of(inputs)
        query, key, value, of_key, of_value, shift, gate = leaves
        mask, residual, group = _infused_mask(case, options, key), case.form == "residual", case.heads // case.key_heads

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            causal = mask is None and case.causal and not case.last
            return scaled_dot_product_attention(
                queries, keys, values, mask, is_causal=causal, scale=case.scale, enable_gqa=group > 1
            )

        def naive() -> tuple[Tensor]:
            amount = gate[:, :, None, None]
            keys = amount * (key * of_key[:, :, None])
            values = amount * (value * of_value[:, :, None] + shift[:, :, None])
            if residual:
                keys, values = key + keys, value + values
            return (attend(query, keys.to(key.dtype), values.to(value.dtype)),)

        def fold() -> tuple[Tensor]:
            amount, base = gate[:, :, None, None], 1.0 if residual else 0.0
            factors = [base + amount * each[:, :, None] for each in (of_key, of_value)]
            factors.append(amount * shift[:, :, None])
            of_query, of_output, added = (each.repeat_interleave(group, dim=1) for each in factors)
            plain = attend((query * of_query).to(query.dtype), key, value)
            return ((plain * of_output + added).to(query.dtype),)

        return Call(fold if folded else naive, leaves, lambda result: (_valid_rows(case, options, result[0]),))

    return prepare


def _infused_mask(case: InfusedAttentionCase, options: dict[str, Any], key: Tensor) -> Tensor | None:
    """The mask ``(B, 1, rows, N)``, padded rows seeing the first token; None where there are no lengths."""
    if case.lengths is None:
        return None
    position = torch.arange(case.tokens, device=key.device)
    visible = (position < options["lengths"][:, None])[:, None, None, :].expand(-1, 1, case.rows, -1)
    if case.causal and not case.last:
        visible = visible & (position <= position[:, None])
    return visible | (position == 0)


def _valid_rows(case: InfusedAttentionCase, options: dict[str, Any], result: Tensor | None) -> Tensor:
    assert result is not None
    if case.lengths is None:
        return result
    position = torch.arange(case.rows, device=result.device)
    return torch.where((position < options["lengths"][:, None])[:, None, :, None], result, 0.0)


def _implementations(function: Callable[..., Any]) -> tuple[Provider, ...]:
    return (
        Provider(OURS, "epic_fast", _ours(function, "triton")),
        Provider(EAGER, "PyTorch, eager", _ours(function, "reference")),
        Provider("compiled", "PyTorch, compiled", _compiled_reference(function), compiled=True),
    )


INFUSED = Operation(
    "infused",
    functional.infused_attention,
    INFUSED_MEASURED,
    INFUSED_SMOKE,
    (
        *_implementations(functional.infused_attention),
        Provider("naive+sdpa", "infused keys and values + SDPA", _infusion_sdpa(folded=False)),
        Provider("folded+sdpa", "folded + SDPA", _infusion_sdpa(folded=True)),
    ),
)
GATE = Operation(
    "gate", functional.infusion_gate, GATE_MEASURED, GATE_SMOKE, _implementations(functional.infusion_gate)
)
SWIGLU = Operation(
    "swiglu", functional.infused_swiglu, SWIGLU_MEASURED, SWIGLU_SMOKE, _implementations(functional.infused_swiglu)
)

OPERATIONS = {each.name: each for each in (ATTENTION, INTERACTION, WINDOWS, EXPERTS, INFUSED, GATE, SWIGLU)}
