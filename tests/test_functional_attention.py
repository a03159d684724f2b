"""prompt_attention against definitions written out here: rows of sight, PyTorch's own attention, float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from epic_fast.errors import ConfigError
from epic_fast.functional import prompt_attention

WIDE = torch.float64


def make(
    batch: int = 2,
    heads: int = 2,
    tokens: int = 4,
    prompts: int = 3,
    width: int = 3,
    *,
    shared: bool = False,
    prefix_tuning: bool = False,
    dtype: torch.dtype = WIDE,
    seed: int = 0,
) -> list[Tensor | None]:
    """Query, key, value, then those of the prompts, all wanting a gradient."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=WIDE).to(dtype).requires_grad_()

    prompt_batch = 1 if shared else batch
    own = [draw(batch, heads, tokens, width) for _ in range(3)]
    given_prompts: list[Tensor | None] = [draw(prompt_batch, heads, prompts, width) for _ in range(3)]
    if prefix_tuning:
        given_prompts[0] = None
    return [*own, *given_prompts]


def sight(
    batch: int, tokens: int, prompts: int, *, prompt_rows: bool, prompt_mask: str, causal: bool, lengths: list[int]
) -> Tensor:
    """Who sees whom, row by row, straight from the contract's sentences."""
    first = prompts if prompt_rows else 0
    visible = torch.zeros(batch, first + tokens, prompts + tokens, dtype=torch.bool)
    for sample in range(batch):
        for row in range(first + tokens):
            visible[sample, row, :prompts] = True
            for token in range(lengths[sample]):
                if row < first:
                    visible[sample, row, prompts + token] = prompt_mask == "full"
                else:
                    visible[sample, row, prompts + token] = not causal or token <= row - first
    return visible


def expected(inputs: list[Any], *, lengths: list[int] | None = None, scale: float | None = None, **how: Any) -> Tensor:
    """PyTorch's attention on the explicit concatenation; rows at or past a length, and blind rows, are 0."""
    query, key, value, prompt_query, prompt_key, prompt_value = inputs
    batch, _, tokens, _ = query.shape
    prompts = prompt_key.shape[2]
    counts = [tokens] * batch if lengths is None else lengths

    def join(prompt: Tensor | None, own: Tensor) -> Tensor:
        return own if prompt is None else torch.cat([prompt.expand(batch, -1, -1, -1), own], dim=2)

    visible = sight(
        batch,
        tokens,
        prompts,
        prompt_rows=prompt_query is not None,
        prompt_mask=how.get("prompt_mask", "full"),
        causal=how.get("causal", False),
        lengths=counts,
    )
    visible = visible[:, None]
    blind = ~visible.any(-1, keepdim=True)
    result = scaled_dot_product_attention(
        join(prompt_query, query),
        join(prompt_key, key),
        join(prompt_value, value),
        attn_mask=visible | blind,
        scale=scale,
    ).masked_fill(blind, 0.0)
    first = 0 if prompt_query is None else prompts
    alive = torch.ones(batch, first + tokens, dtype=torch.bool)
    for sample, count in enumerate(counts):
        alive[sample, first + count :] = False
    return result.masked_fill(~alive[:, None, :, None], 0.0)


def joined(result: tuple[Tensor, Tensor | None]) -> Tensor:
    output, prompt_output = result
    return output if prompt_output is None else torch.cat([prompt_output, output], dim=2)


def gradients(result: Tensor, inputs: list[Any], seed: int = 9) -> list[Tensor]:
    wanted = [each for each in inputs if each is not None]
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE).to(result.dtype)
    return list(torch.autograd.grad(result, wanted, upstream, allow_unused=True, materialize_grads=True))


CASES = {
    "plain": {},
    "causal": {"causal": True},
    "prefix": {"prompt_mask": "prefix"},
    "causal-prefix": {"causal": True, "prompt_mask": "prefix"},
    "scale": {"scale": 0.3},
    "lengths": {"lengths": [4, 2]},
    "lengths-none-and-all": {"lengths": [0, 4]},
    "lengths-causal": {"lengths": [3, 1], "causal": True},
    "lengths-prefix": {"lengths": [0, 3], "prompt_mask": "prefix"},
}
SHAPES = {
    "own": {},
    "shared": {"shared": True},
    "prefix-tuning": {"prefix_tuning": True},
    "shared-prefix-tuning": {"shared": True, "prefix_tuning": True},
    "no-prompts": {"prompts": 0},
    "no-prompts-no-rows": {"prompts": 0, "prefix_tuning": True},
    "one-prompt-width-one": {"prompts": 1, "width": 1},
}


def call(inputs: list[Any], how: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor | None]:
    how = {**how, **more}
    if how.get("lengths") is not None and not isinstance(how["lengths"], Tensor):
        how["lengths"] = torch.tensor(how["lengths"])
    return prompt_attention(*inputs, **how)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_equals_sdpa_on_the_concatenation(case: str, shape: str) -> None:
    inputs, how = make(**SHAPES[shape]), CASES[case]
    found, wanted = joined(call(inputs, how)), expected(inputs, **how)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(found, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case: str, shape: str) -> None:
    inputs = make(heads=1, **{"width": 2, "prompts": 2, **SHAPES[shape]})
    wanted = [each for each in inputs if each is not None]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(tensors)
        again = [None if each is None else next(remaining) for each in inputs]
        return tuple(each for each in call(again, CASES[case]) if each is not None)

    assert torch.autograd.gradcheck(function, wanted, fast_mode=False)


@pytest.mark.parametrize("causal", [False, True])
def test_a_single_token(causal: bool) -> None:
    inputs = make(tokens=1)
    torch.testing.assert_close(joined(call(inputs, {"causal": causal})), expected(inputs, causal=causal))


def test_no_tokens_at_all() -> None:
    inputs = make(tokens=0)
    output, prompt_output = call(inputs, {})
    assert output.shape == (2, 2, 0, 3)
    torch.testing.assert_close(prompt_output, expected(inputs))


@pytest.mark.parametrize("case", CASES)
def test_prefix_tuning_is_the_token_rows_of_the_same_prompts(case: str) -> None:
    inputs = make()
    output, prompt_output = call(inputs, CASES[case])
    assert prompt_output is not None
    alone, nothing = call([*inputs[:3], None, *inputs[4:]], CASES[case])
    assert nothing is None
    torch.testing.assert_close(alone, output, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_shared_prompts_get_the_sum_of_the_gradients(case: str) -> None:
    inputs: list[Any] = make(shared=True)
    spread = [*inputs[:3], *(each.detach().expand(2, -1, -1, -1).clone().requires_grad_() for each in inputs[3:])]
    shared, own = joined(call(inputs, CASES[case])), joined(call(spread, CASES[case]))
    torch.testing.assert_close(shared, own, rtol=0, atol=0)
    for one, other in zip(gradients(shared, inputs)[3:], gradients(own, spread)[3:], strict=True):
        torch.testing.assert_close(one, other.sum(0, keepdim=True), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("case", [name for name in CASES if "lengths" in name])
def test_what_stands_past_a_length_reaches_nobody(case: str, poison: float) -> None:
    inputs: list[Any] = make()
    lengths = CASES[case]["lengths"]
    poisoned: list[Any] = [each.detach().clone() for each in inputs]
    for sample, count in enumerate(lengths):
        for each in poisoned[:3]:
            each[sample, :, count:] = poison
    poisoned = [each.requires_grad_() for each in poisoned]

    clean, dirty = joined(call(inputs, CASES[case])), joined(call(poisoned, CASES[case]))
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    # The upstream gradient is not zero in the padded rows: they must stop it themselves.
    for one, other in zip(gradients(dirty, poisoned), gradients(clean, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("case", [name for name in CASES if "lengths" in name])
def test_rows_past_a_length_are_exactly_zero(case: str) -> None:
    inputs = make()
    output, _ = result = call(inputs, CASES[case])
    received = gradients(joined(result), inputs)[:3]
    for sample, count in enumerate(CASES[case]["lengths"]):
        assert torch.count_nonzero(output[sample, :, count:]) == 0
        for each in received:
            assert torch.count_nonzero(each[sample, :, count:]) == 0


def test_a_row_that_sees_nothing_gives_zero() -> None:
    inputs = make(prompts=0)
    result = joined(call(inputs, {"lengths": [0, 0]}))
    assert torch.count_nonzero(result) == 0
    assert all(torch.count_nonzero(each) == 0 for each in gradients(result, inputs))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_lengths_in_any_integer_type(dtype: torch.dtype) -> None:
    inputs = make()
    torch.testing.assert_close(
        joined(call(inputs, {"lengths": torch.tensor([1, 3], dtype=dtype)})), expected(inputs, lengths=[1, 3])
    )


def test_padding_further_changes_nothing() -> None:
    inputs: list[Any] = make(tokens=6)
    short = [*(each[:, :, :4] for each in inputs[:3]), *inputs[3:]]
    how = {"lengths": [4, 2]}
    long_output, long_prompts = call(inputs, how)
    output, prompts = call(short, how)
    torch.testing.assert_close(long_output[:, :, :4], output, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(long_prompts, prompts, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("prompt_mask", ["full", "prefix"])
def test_permuting_tokens_permutes_their_rows(prompt_mask: str) -> None:
    inputs: list[Any] = make(tokens=5)
    order = torch.tensor([3, 0, 4, 1, 2])
    output, prompt_output = call(inputs, {"prompt_mask": prompt_mask})
    moved, same = call([*(each[:, :, order] for each in inputs[:3]), *inputs[3:]], {"prompt_mask": prompt_mask})
    torch.testing.assert_close(moved, output[:, :, order], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(same, prompt_output, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_permuting_prompts_permutes_their_rows_only(case: str) -> None:
    inputs: list[Any] = make()
    order = torch.tensor([2, 0, 1])
    output, prompt_output = call(inputs, CASES[case])
    same, moved = call([*inputs[:3], *(each[:, :, order] for each in inputs[3:])], CASES[case])
    assert prompt_output is not None
    torch.testing.assert_close(same, output, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(moved, prompt_output[:, :, order], rtol=1e-13, atol=1e-13)


def test_a_later_token_does_not_reach_an_earlier_causal_row() -> None:
    inputs: list[Any] = make()
    output, _ = call(inputs, {"causal": True})
    changed = [each.detach().clone() for each in inputs]
    for each in changed[:3]:
        each[:, :, 3] += 1.0
    other, _ = call(changed, {"causal": True})
    torch.testing.assert_close(other[:, :, :3], output[:, :, :3], rtol=0, atol=0)
    assert not torch.equal(other[:, :, 3], output[:, :, 3])


def test_strided_inputs_give_the_same() -> None:
    """Heads split off a projection, (B, N, H, D) seen as (B, H, N, D), is what every tower hands over."""
    inputs: list[Any] = make(dtype=torch.float32)
    strided = [each.detach().transpose(1, 2).contiguous().transpose(1, 2) for each in inputs]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(joined(call(strided, {})), joined(call(inputs, {})))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 2),
    tokens=st.integers(1, 6),
    prompts=st.integers(0, 4),
    width=st.integers(1, 4),
    shared=st.booleans(),
    prefix_tuning=st.booleans(),
    causal=st.booleans(),
    prompt_mask=st.sampled_from(["full", "prefix"]),
    data=st.data(),
)
def test_any_shape_equals_sdpa(
    batch: int,
    heads: int,
    tokens: int,
    prompts: int,
    width: int,
    shared: bool,
    prefix_tuning: bool,
    causal: bool,
    prompt_mask: str,
    data: st.DataObject,
) -> None:
    lengths = data.draw(st.none() | st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    inputs = make(batch, heads, tokens, prompts, width, shared=shared, prefix_tuning=prefix_tuning)
    how = {"causal": causal, "prompt_mask": prompt_mask, "lengths": lengths}
    found, wanted = joined(call(inputs, how)), expected(inputs, **how)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    for one, other in zip(gradients(found, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_close_to_float64(dtype: torch.dtype) -> None:
    """At most twice (gradients: thrice) the error of PyTorch's own attention in the same type, plus one rounding."""
    inputs = make(2, 2, 17, 5, 16, dtype=dtype)
    exact_inputs: list[Any] = [each.detach().to(WIDE).requires_grad_() for each in inputs if each is not None]
    how = {"lengths": [17, 9]}
    found, same_type, exact = joined(call(inputs, how)), expected(inputs, **how), expected(exact_inputs, **how)
    assert found.dtype == dtype

    def error(value: Tensor, truth: Tensor) -> float:
        return (value.to(WIDE) - truth).abs().max().item()

    rounding = torch.finfo(dtype).eps
    assert error(found, exact) <= 2 * error(same_type, exact) + rounding * exact.abs().max().item()
    for one, other, truth in zip(
        gradients(found, inputs), gradients(same_type, inputs), gradients(exact, exact_inputs), strict=True
    ):
        assert error(one, truth) <= 3 * error(other, truth) + rounding * truth.abs().max().item()


def test_two_runs_give_the_same_bits() -> None:
    first, second = (make(3, 2, 9, 4, 8, shared=True, dtype=torch.float32) for _ in range(2))
    how = {"lengths": [9, 4, 0]}
    one, other = joined(call(first, how)), joined(call(second, how))
    assert torch.equal(one, other)
    assert all(map(torch.equal, gradients(one, first), gradients(other, second)))


def test_frozen_inputs_get_no_gradient() -> None:
    inputs: list[Any] = [each.detach() for each in make() if each is not None]
    output, _ = call(inputs, {})
    assert output.grad_fn is None
    inputs[4].requires_grad_()
    joined(call(inputs, {})).sum().backward()
    assert [each.grad is not None for each in inputs] == [False] * 4 + [True, False]


def _broken(position: int, replacement: Any) -> Any:
    def breaking(inputs: list[Any]) -> list[Any]:
        inputs[position] = replacement(inputs[position])
        return inputs

    return breaking


QUERY, KEY, VALUE, PROMPT_QUERY, PROMPT_KEY, PROMPT_VALUE = range(6)
BAD = {
    "query-3d": (_broken(QUERY, lambda t: t[0]), {}, ["query", "(2, 4, 3)", "(batch, heads, tokens, head_dim)"]),
    "key-shorter": (_broken(KEY, lambda t: t[:, :, :3]), {}, ["key", "(2, 2, 3, 3)", "(2, 2, 4, 3)"]),
    "value-heads": (_broken(VALUE, lambda t: t[:, :1]), {}, ["value", "(2, 1, 4, 3)", "(2, 2, 4, 3)"]),
    "prompt-key-3d": (_broken(PROMPT_KEY, lambda t: t[0]), {}, ["prompt_key", "(2, 3, 3)", "(2 or 1, 2, prompts, 3)"]),
    "prompt-key-width": (
        _broken(PROMPT_KEY, lambda t: t[..., :2].contiguous()),
        {},
        ["prompt_key", "(2, 2, 3, 2)", "(2 or 1, 2, prompts, 3)"],
    ),
    "prompt-batch": (
        _broken(PROMPT_KEY, lambda t: t[:1].expand(3, -1, -1, -1)),
        {},
        ["prompt_key", "(3, 2, 3, 3)", "(2 or 1, 2, prompts, 3)"],
    ),
    "prompt-value-shorter": (
        _broken(PROMPT_VALUE, lambda t: t[:, :, :2]),
        {},
        ["prompt_value has 2 prompts", "wanted 3, as prompt_key"],
    ),
    "prompt-query-longer": (
        _broken(PROMPT_QUERY, lambda t: torch.cat([t, t], 2)),
        {},
        ["prompt_query has 6 prompts", "wanted 3, as prompt_key"],
    ),
    "no-tensor": (_broken(PROMPT_KEY, lambda t: None), {}, ["prompt_key is a NoneType", "a tensor"]),
    "no-width": (_broken(QUERY, lambda t: t[..., :0]), {}, ["query", "(2, 2, 4, 0)", "head_dim at least 1"]),
    "eight-bits": (
        _broken(KEY, lambda t: t.to(torch.float8_e4m3fn)),
        {},
        ["key", "torch.float8_e4m3fn", "16, 32 or 64 bits"],
    ),
    "integers": (_broken(QUERY, lambda t: t.long()), {}, ["query", "torch.int64", "floating-point"]),
    "other-type": (_broken(VALUE, lambda t: t.float()), {}, ["value", "torch.float32", "torch.float64"]),
    "prompt-other-type": (
        _broken(PROMPT_VALUE, lambda t: t.half()),
        {},
        ["prompt_value", "torch.float16", "torch.float64"],
    ),
    "device": (_broken(PROMPT_KEY, lambda t: t.to("meta")), {}, ["prompt_key", "meta", "cpu"]),
    "stride": (
        _broken(KEY, lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
        {},
        ["key", "last stride 4", "1", ".contiguous()"],
    ),
    "mask": (lambda inputs: inputs, {"prompt_mask": "causal"}, ["prompt_mask='causal'", "'full' or 'prefix'"]),
    "lengths-shape": (lambda inputs: inputs, {"lengths": [1, 2, 3]}, ["lengths", "(3,)", "(2,)"]),
    "lengths-unsigned": (
        lambda inputs: inputs,
        {"lengths": torch.tensor([1, 2], dtype=torch.uint16)},
        ["lengths", "torch.uint16", "int64, int32, int16, int8 or uint8"],
    ),
    "lengths-float": (
        lambda inputs: inputs,
        {"lengths": torch.tensor([1.0, 2.0])},
        ["lengths", "torch.float32", "integer"],
    ),
    "lengths-bool": (
        lambda inputs: inputs,
        {"lengths": torch.tensor([True, True])},
        ["lengths", "torch.bool", "integer"],
    ),
    "lengths-negative": (lambda inputs: inputs, {"lengths": [-1, 2]}, ["from -1 to 2", "0 to the 4 tokens"]),
    "lengths-long": (lambda inputs: inputs, {"lengths": [0, 5]}, ["from 0 to 5", "0 to the 4 tokens"]),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_what_was_given_and_wanted(name: str) -> None:
    breaking, how, words = BAD[name]
    with pytest.raises(ConfigError) as caught:
        call(breaking([each.detach() for each in make() if each is not None]), how)
    message = str(caught.value)
    assert message.startswith("prompt_attention: ")
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


def test_every_combination_of_sight_is_finite() -> None:
    for causal, prompt_mask, first, second in itertools.product([0, 1], ["full", "prefix"], range(5), range(5)):
        inputs = make()
        result = joined(call(inputs, {"causal": bool(causal), "prompt_mask": prompt_mask, "lengths": [first, second]}))
        assert result.isfinite().all()
        assert all(each.isfinite().all() for each in gradients(result, inputs))
