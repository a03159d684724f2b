"""The one-kernel backward of short heads against float64: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

pytest.importorskip("triton")

from epic_fast.kernels.prompt_attention.reference import prompt_attention as reference  # pyright: ignore
from epic_fast.kernels.prompt_attention.triton_forward import prompt_attention_forward  # pyright: ignore
from epic_fast.kernels.prompt_attention.triton_short_backward import (  # pyright: ignore
    MOST_ROWS,
    Variant,
    limits,
    short_backward,
)
from epic_fast.testing.cases import AttentionCase, attention_cases
from epic_fast.testing.numerics import assert_bits_equal, check_operation, poisoned_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
NAMES = ("query", "key", "value", "prompt_query", "prompt_key", "prompt_value")
ALL = (True,) * 6

# Every form, in tiles so small that all of them turn more than once.
FORMS = {
    "rows": Variant(rows=16, keys=32, by_keys=False, turned=False, warps=4),
    "rows, turned": Variant(rows=32, keys=16, by_keys=False, turned=True, warps=4, skip=True),
    "keys": Variant(rows=32, keys=16, by_keys=True, turned=False, warps=4, skip=True),
    "keys, turned": Variant(rows=16, keys=32, by_keys=True, turned=True, warps=4),
    "head after head": Variant(rows=32, keys=32, by_keys=False, turned=True, warps=4, programs=1, stages=2),
    "ahead": Variant(rows=32, keys=32, by_keys=False, turned=True, warps=4, skip=True, prefetch=1),
}


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, variant: Any, options: dict[str, Any], *inputs: Any) -> Any:
        lengths, scale = options["lengths"], options["scale"]
        ctx.options = {
            "prefix": options["prompt_mask"] == "prefix",
            "causal": options["causal"],
            "scale": inputs[0].shape[-1] ** -0.5 if scale is None else scale,
        }
        output, prompt_output, lse = prompt_attention_forward(*inputs, lengths, **ctx.options)
        ctx.variant = variant
        ctx.saved = (*inputs, lengths, output, prompt_output, lse)
        ctx.set_materialize_grads(False)
        return output, prompt_output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        found = short_backward(*grads, *ctx.saved, **ctx.options, needs=ctx.needs_input_grad[2:], variant=ctx.variant)
        return None, None, *found


def kernels(variant: Variant | None = None) -> Callable[..., Any]:
    def attention(**given: Any) -> tuple[Tensor, Tensor | None]:
        inputs = [given.pop(name) for name in NAMES]
        return _Attention.apply(variant, given, *inputs)

    return attention


def check(case: AttentionCase, dtype: torch.dtype, variant: Variant | None = None, **settings: Any) -> None:
    with poisoned_empty():
        check_operation(
            kernels(variant),
            reference,
            case.make(dtype, DEVICE),
            case.options(DEVICE),
            reduction=case.reductions,
            output_names=case.outputs,
            **settings,
        )


def flags(case: AttentionCase) -> dict[str, Any]:
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    return {"prefix": case.prompt_mask == "prefix", "causal": case.causal, "scale": scale}


def backward(
    case: AttentionCase, inputs: dict[str, Tensor | None], needs: tuple[bool, ...] = ALL, **more: Any
) -> tuple[Tensor | None, ...]:
    lengths = case.options(DEVICE)["lengths"]
    saved = prompt_attention_forward(*inputs.values(), lengths, **flags(case))
    random = torch.Generator(DEVICE).manual_seed(3)
    grads = [
        None if each is None else torch.randn(each.shape, generator=random, device=DEVICE).to(each.dtype)
        for each in saved[:2]
    ]
    with poisoned_empty():
        return short_backward(*grads, *inputs.values(), lengths, *saved, **flags(case), needs=needs, **more)


@settings(max_examples=8)
@given(case=attention_cases(max_batch=2, max_tokens=60, max_prompts=40, head_dims=(16, 24, 32, 64)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_call_is_within_the_budget(dtype: torch.dtype, case: AttentionCase) -> None:
    check(case, dtype)


@pytest.mark.parametrize("lengths", [None, (11, 43)], ids=["whole", "lengths"])
@pytest.mark.parametrize(("causal", "prompt_mask"), [(False, "full"), (True, "full"), (True, "prefix")])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_under_every_mask(
    form: str, causal: bool, prompt_mask: str, lengths: tuple[int, ...] | None
) -> None:
    case = AttentionCase(2, 2, 43, 6, 16, prompt_mask, causal, lengths, prefix_tuning=not causal, layout="tokens")
    check(case, torch.float16, FORMS[form])


@pytest.mark.parametrize("lengths", [None, (77, 9)], ids=["whole", "lengths"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_text_tower(dtype: torch.dtype, lengths: tuple[int, ...] | None) -> None:
    check(AttentionCase(2, 1, 77, 16, 64, causal=True, lengths=lengths, layout="packed"), dtype)


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(1, 1, 1, 0, 16),
        AttentionCase(1, 1, 1, 1, 16),
        AttentionCase(2, 1, 5, 0, 16, causal=True, lengths=(0, 5)),
        AttentionCase(1, 1, 2, 40, 16, "prefix"),
        AttentionCase(1, 1, 9, 3, 16, scale=-0.3, causal=True),
        AttentionCase(1, 1, 9, 3, 16, scale=0.0),
        AttentionCase(1, 1, 96, 32, 16, causal=True),
        AttentionCase(1, 1, 120, 8, 16, prefix_tuning=True),
        AttentionCase(3, 2, 9, 4, 48, shared=True, lengths=(9, 0, 4)),
    ],
    ids=str,
)
def test_corners(case: AttentionCase) -> None:
    check(case, torch.float32)


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["output", "prompt_output"])
@pytest.mark.parametrize("case", [AttentionCase(2, 1, 37, 21, 16), AttentionCase(2, 1, 30, 5, 16, "prefix", True)])
def test_an_output_that_nobody_used(case: AttentionCase, used: tuple[bool, bool]) -> None:
    check(case, torch.float32, used=used)


def test_no_gradient_comes_in() -> None:
    case = AttentionCase(2, 1, 5, 3, 16)
    inputs = case.make(torch.float32, DEVICE)
    saved = prompt_attention_forward(*inputs.values(), None, **flags(case))
    with poisoned_empty():
        found = short_backward(None, None, *inputs.values(), None, *saved, **flags(case), needs=ALL)
    assert all(each is not None and not each.any() for each in found)


@pytest.mark.parametrize("sizes", [(0, 2, 5, 3), (2, 0, 5, 3), (2, 2, 0, 0)])
def test_nothing_to_do(sizes: tuple[int, int, int, int]) -> None:
    case = AttentionCase(*sizes, head_dim=16)
    inputs = case.make(torch.float32, DEVICE)
    for found, source in zip(backward(case, inputs), inputs.values(), strict=True):
        assert source is not None
        assert found is not None
        assert found.shape == source.shape


@pytest.mark.parametrize("needed", range(6))
def test_only_what_is_needed_is_written(needed: int) -> None:
    case = AttentionCase(2, 1, 20, 5, 16, causal=True)
    inputs = case.make(torch.float32, DEVICE)
    want = backward(case, inputs)
    found = backward(case, inputs, tuple(index == needed for index in range(6)))
    assert [index for index, each in enumerate(found) if each is not None] == [needed]
    assert_bits_equal(found[needed], want[needed])


def test_nan_past_the_length_reaches_nobody() -> None:
    case = AttentionCase(3, 1, 37, 5, 16, causal=True, lengths=(0, 20, 37))
    clean = case.make(torch.float32, DEVICE)
    lengths = torch.tensor(case.lengths, device=DEVICE)
    random = torch.Generator(DEVICE).manual_seed(3)
    grads = [torch.randn(3, 1, rows, 16, generator=random, device=DEVICE) for rows in (37, 5)]
    past = (torch.arange(37, device=DEVICE) >= lengths[:, None])[:, None, :, None]
    results = []
    for fill in (0.0, math.nan):
        inputs = {name: each if "prompt" in name else torch.where(past, fill, each) for name, each in clean.items()}  # pyright: ignore
        saved = prompt_attention_forward(*inputs.values(), lengths, **flags(case))
        grad = torch.where(past, fill, grads[0])
        for variant in (None, FORMS["keys"]):
            found = short_backward(
                grad, grads[1], *inputs.values(), lengths, *saved, **flags(case), needs=ALL, variant=variant
            )
            results.append(found)
    assert_bits_equal(results[0], results[2])
    assert_bits_equal(results[1], results[3])
    for each in results[2][:3]:
        assert each is not None
        assert not each.masked_select(past).any()
        assert each.isfinite().all()


def test_tokens_that_lie_behind_their_prompts_give_the_same_bits() -> None:
    case = AttentionCase(2, 2, 40, 7, 16, causal=True, lengths=(40, 13), layout="packed")
    inputs = case.make(torch.float32, DEVICE)
    lengths = case.options(DEVICE)["lengths"]
    buffer = torch.randn(2, 47, 2, 16, generator=torch.Generator(DEVICE).manual_seed(3), device=DEVICE)
    outputs = torch.empty_like(buffer)
    grad, prompt_grad = buffer[:, 7:].transpose(1, 2), buffer[:, :7].transpose(1, 2)
    output, prompt_output = outputs[:, 7:].transpose(1, 2), outputs[:, :7].transpose(1, 2)
    *_, lse = prompt_attention_forward(
        *inputs.values(), lengths, **flags(case), output=output, prompt_output=prompt_output
    )
    call = (*inputs.values(), lengths, output, prompt_output, lse)
    packed = torch.full((2, 48, 3, 2, 16), 7.0, device=DEVICE)
    parts = packed.permute(2, 0, 3, 1, 4)
    given = (*(each[:, :, 7:47] for each in parts), *(each[:, :, :7] for each in parts))
    want = short_backward(grad.contiguous(), prompt_grad, *call, **flags(case), needs=ALL)
    found = short_backward(grad, prompt_grad, *call, **flags(case), needs=ALL, grads=given)
    assert all(got is view for got, view in zip(found, given, strict=True))
    assert_bits_equal(found, want)
    assert (packed[:, 47] == 7).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_sample_does_not_depend_on_its_batch(form: str) -> None:
    case = AttentionCase(3, 2, 30, 4, 16, causal=True)
    inputs = case.make(torch.float16, DEVICE)
    saved = prompt_attention_forward(*inputs.values(), None, **flags(case))
    grads = [torch.randn_like(each) for each in saved[:2]]
    given = [*grads, *inputs.values(), None, *saved]
    whole = short_backward(*given, **flags(case), needs=ALL, variant=FORMS[form])
    last = [each if each is None else each[2:] for each in given]
    alone = short_backward(*last, **flags(case), needs=ALL, variant=FORMS[form])
    assert_bits_equal(tuple(each[2:] for each in whole if each is not None), alone)


def test_what_it_does_not_take() -> None:
    case = AttentionCase(1, 1, 100, 28, 64)
    inputs = case.make(torch.float16)
    query, prompt_key = inputs["query"], inputs["prompt_key"]
    assert query is not None
    assert prompt_key is not None
    assert not limits(query, prompt_key, ALL)
    assert "head_dim 65" in limits(query.new_empty(1, 1, 100, 65), prompt_key, ALL)
    assert "float32" in limits(query.float(), prompt_key, ALL)
    assert "101 tokens" in limits(query.new_empty(1, 1, 101, 64), prompt_key, ALL)
    assert "not wanted" in limits(query, prompt_key, (False, True, True, True, True, True))
    assert "not wanted" in limits(query, prompt_key, (True, False, False, True, False, False))
    long = AttentionCase(1, 1, MOST_ROWS, 1, 16).make(torch.float32, DEVICE)
    with pytest.raises(ValueError, match="1 prompts and 128 tokens; short_backward takes at most 128"):
        backward(AttentionCase(1, 1, MOST_ROWS, 1, 16), long)
