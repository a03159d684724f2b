"""window_prompt_attention against windows that are written out one at a time, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from epic_fast.errors import ConfigError
from epic_fast.functional import prompt_attention, window_prompt_attention

WIDE = torch.float64
NAMES = ("query", "key", "value", "prompt_query", "prompt_key", "prompt_value")


def make(
    batch: int = 3,
    windows: int = 4,
    heads: int = 2,
    tokens: int = 5,
    prompts: int = 3,
    head_dim: int = 4,
    *,
    bias: bool = True,
    mask: bool = True,
    dtype: torch.dtype = WIDE,
    seed: int = 0,
) -> tuple[list[Tensor], dict[str, Any]]:
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=WIDE).to(dtype).requires_grad_()

    tensors = [draw(batch * windows, heads, tokens, head_dim) for _ in range(3)]
    tensors += [draw(batch, heads, prompts, head_dim) for _ in range(3)]
    options: dict[str, Any] = {}
    if bias:
        options["relative_position_bias"] = draw(heads, tokens, tokens)
    if mask:
        seen = torch.rand(windows, tokens, tokens, generator=random) < 0.6
        options["window_mask"] = seen | torch.eye(tokens, dtype=torch.bool)
    return tensors, options


def by_hand(
    tensors: list[Tensor],
    *,
    relative_position_bias: Tensor | None = None,
    window_mask: Tensor | None = None,
    scale: float | None = None,
    owner: Any = None,
) -> tuple[Tensor, Tensor]:
    """One window, one head and one row at a time.

    Args:
        owner: whose prompts window ``row`` gets; default, those of the sample that it belongs to.
    """
    query, key, value, prompt_query, prompt_key, prompt_value = tensors
    batch, heads, prompts, head_dim = prompt_key.shape
    windows = len(query) // batch
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    output, prompt_rows = torch.zeros_like(query), torch.zeros(batch, windows, heads, prompts, head_dim, dtype=WIDE)
    for row in range(len(query)):
        sample, window = divmod(row, windows)
        whose = sample if owner is None else owner(row)
        for head in range(heads):
            keys = [*prompt_key[whose, head], *key[row, head]]
            values = [*prompt_value[whose, head], *value[row, head]]
            for at, asks in enumerate([*prompt_query[whose, head], *query[row, head]]):
                weights, seen = [], []
                for other, (offers, gives) in enumerate(zip(keys, values, strict=True)):
                    score = (asks * offers).sum() * scale
                    if at >= prompts and other >= prompts:
                        if relative_position_bias is not None:
                            score = score + relative_position_bias[head, at - prompts, other - prompts]
                        if window_mask is not None and not window_mask[window, at - prompts, other - prompts]:
                            continue
                    weights.append(score.exp())
                    seen.append(gives)
                found = sum((w * v for w, v in zip(weights, seen, strict=True)), torch.zeros(head_dim, dtype=WIDE))
                found = found / sum(weights) if weights else found
                if at < prompts:
                    prompt_rows[sample, window, head, at] = found
                else:
                    output[row, head, at - prompts] = found
    return output, prompt_rows.mean(dim=1)


def gradients(result: tuple[Tensor, Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(9)
    upstream = [torch.randn(each.shape, generator=random, dtype=WIDE).to(each.dtype) for each in result]
    return torch.autograd.grad(result, inputs, upstream)


@given(
    batch=st.integers(1, 3),
    windows=st.integers(1, 3),
    heads=st.integers(1, 2),
    tokens=st.integers(1, 4),
    prompts=st.integers(0, 3),
    bias=st.booleans(),
    mask=st.booleans(),
    seed=st.integers(0, 3),
)
def test_every_window_by_hand(
    batch: int, windows: int, heads: int, tokens: int, prompts: int, bias: bool, mask: bool, seed: int
) -> None:
    with torch.no_grad():
        tensors, options = make(batch, windows, heads, tokens, prompts, 3, bias=bias, mask=mask, seed=seed)
        for found, wanted in zip(
            window_prompt_attention(*tensors, **options), by_hand(tensors, **options), strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def copied(tensors: list[Tensor], order: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The naive form: prompts copied into every window by ``order``, bias and mask padded, one plain attention.

    ``order(prompts, windows)`` gives ``(B * nW, H, P, D)``; the outputs of prompt rows are averaged as batch-major.
    """
    batch, _, prompts, head_dim = tensors[4].shape
    windows = len(tensors[0]) // batch
    query, key, value = (
        torch.cat([order(prompt, windows), own], dim=2) for prompt, own in zip(tensors[3:], tensors[:3], strict=True)
    )
    tokens = tensors[0].shape[2]
    added = torch.zeros(windows, 1, prompts + tokens, prompts + tokens, dtype=query.dtype)
    if "window_mask" in options:
        added[:, 0, prompts:, prompts:].masked_fill_(~options["window_mask"], float("-inf"))
    if "relative_position_bias" in options:
        added = added + torch.nn.functional.pad(options["relative_position_bias"], (prompts, 0, prompts, 0))
    added = added.repeat(batch, 1, 1, 1)
    weights = (query @ key.transpose(2, 3) / math.sqrt(head_dim) + added).softmax(dim=-1)
    result = weights @ value
    return result[:, :, prompts:], result[:, :, :prompts].unflatten(0, (batch, windows)).mean(dim=1)


def batch_major(prompt: Tensor, windows: int) -> Tensor:
    return torch.stack([sample for sample in prompt for _ in range(windows)])


def window_major(prompt: Tensor, windows: int) -> Tensor:
    """As the released code of MoPE expands them: sample 0, 1, ..., 0, 1, ... ."""
    return prompt.repeat(windows, 1, 1, 1)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_is_the_naive_copy_with_gradients(bias: bool, mask: bool) -> None:
    tensors, options = make(bias=bias, mask=mask)
    inputs = [*tensors, *(each for each in options.values() if each.requires_grad)]
    found, wanted = window_prompt_attention(*tensors, **options), copied(tensors, batch_major, **options)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(found, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_prompts_go_to_the_windows_of_their_own_sample() -> None:
    """The pairing of the released code gives every window but some the prompts of another sample."""
    tensors, options = make()
    found = window_prompt_attention(*tensors, **options)
    with torch.no_grad():
        authors = by_hand(tensors, **options, owner=lambda row: row % 3)
        for one, other in zip(authors, copied(tensors, window_major, **options), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        for one, other in zip(found, authors, strict=True):
            assert (one - other).abs().max() > 0.1
    # What sample 0 gets must not depend on what the others bring.
    rows = found[0][:4].sum() + found[1][:1].sum()
    for each in torch.autograd.grad(rows, tensors):
        own = len(each) // 3
        assert each[:own].abs().max() > 0
        assert torch.equal(each[own:], torch.zeros_like(each[own:]))


def test_a_sample_does_not_notice_its_batch() -> None:
    tensors, options = make(dtype=torch.float32)
    output, prompt_output = window_prompt_attention(*tensors, **options)
    order = torch.tensor([2, 0, 1])
    rows = (order[:, None] * 4 + torch.arange(4)).flatten()
    moved = [each[rows] for each in tensors[:3]] + [each[order] for each in tensors[3:]]
    again = window_prompt_attention(*moved, **options)
    torch.testing.assert_close(again[0], output[rows], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(again[1], prompt_output[order], rtol=1e-6, atol=1e-6)
    alone = window_prompt_attention(
        *(each[4:8] for each in tensors[:3]), *(each[1:2] for each in tensors[3:]), **options
    )
    torch.testing.assert_close(alone[0], output[4:8], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alone[1], prompt_output[1:2], rtol=1e-6, atol=1e-6)


def test_one_window_without_bias_is_prompt_attention() -> None:
    tensors, _ = make(windows=1, bias=False, mask=False)
    for found, wanted in zip(window_prompt_attention(*tensors), prompt_attention(*tensors), strict=True):
        assert wanted is not None
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


def test_gradcheck() -> None:
    tensors, options = make(2, 2, 1, 3, 2, 2)
    bias, mask = options["relative_position_bias"], options["window_mask"]

    def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return window_prompt_attention(*inputs[:6], relative_position_bias=inputs[6], window_mask=mask, scale=0.7)

    assert torch.autograd.gradcheck(call, (*tensors, bias))


def test_a_row_that_sees_nothing_is_zero_with_gradient_zero() -> None:
    tensors, options = make(prompts=0, mask=True)
    options["window_mask"][1, 2] = False
    found = window_prompt_attention(*tensors, **options)
    assert found[1].shape == (3, 2, 0, 4)
    assert torch.equal(found[0][1::4, :, 2], torch.zeros(3, 2, 4, dtype=WIDE))
    inputs = [*tensors[:3], options["relative_position_bias"]]
    got = torch.autograd.grad(found[0].square().sum(), inputs)
    assert all(each.isfinite().all() for each in got)
    assert torch.equal(got[0][1::4, :, 2], torch.zeros(3, 2, 4, dtype=WIDE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_near_and_keeps_its_type(dtype: torch.dtype) -> None:
    tensors, options = make(dtype=dtype)
    wanted = by_hand([each.detach().to(WIDE) for each in tensors], **options)
    for found, exact in zip(window_prompt_attention(*tensors, **options), wanted, strict=True):
        assert found.dtype == dtype
        assert (found - exact).abs().max() < 8 * torch.finfo(dtype).eps


def test_autocast_makes_types_one() -> None:
    tensors, options = make(dtype=torch.float32)
    mixed = [each.bfloat16() if number % 2 else each for number, each in enumerate(tensors)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = window_prompt_attention(*mixed, **options)
    assert {each.dtype for each in found} == {torch.bfloat16}
    with pytest.raises(ConfigError, match=r"key has type torch\.bfloat16; wanted query's torch\.float32"):
        window_prompt_attention(*mixed, **options)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "query is no 4-d": ({"query": torch.zeros(2, 3)}, r"query has shape \(2, 3\); wanted \(batch \* windows, heads"),
    "key": ({"key": torch.zeros(12, 2, 6, 4)}, r"key has shape \(12, 2, 6, 4\); wanted query's \(12, 2, 5, 4\)"),
    "heads": ({"prompt_key": torch.zeros(3, 1, 3, 4)}, r"prompt_key has shape .* wanted \(batch, 2, prompts, 4\)"),
    "prompts": ({"prompt_value": torch.zeros(3, 2, 2, 4)}, r"prompt_value has shape .* wanted prompt_key's"),
    "type": ({"value": torch.zeros(12, 2, 5, 4).half()}, r"value has type torch\.float16; wanted query's"),
    "stride": ({"value": torch.zeros(12, 2, 4, 5).transpose(2, 3)}, r"value has last stride 5; wanted 1"),
    "bias": ({"relative_position_bias": torch.zeros(2, 7, 7)}, r"relative_position_bias has shape .* \(2, 5, 5\)"),
    "integer bias": ({"relative_position_bias": torch.zeros(2, 5, 5).long()}, "wanted a floating-point type"),
    "mask": ({"window_mask": torch.ones(3, 5, 5).bool()}, r"window_mask has shape \(3, 5, 5\); wanted \(4, 5, 5\)"),
    "additive mask": (
        {"window_mask": torch.zeros(4, 5, 5)},
        r"window_mask has type torch\.float32; wanted torch\.bool",
    ),
    "device": ({"window_mask": torch.ones(4, 5, 5).bool().to("meta")}, "window_mask is on meta; wanted cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_say_what_was_wanted(case: str) -> None:
    tensors, options = make(dtype=torch.float32)
    given = dict(zip(NAMES, tensors, strict=True)) | options
    changes, message = BAD[case]
    with pytest.raises(ConfigError, match=f"^window_prompt_attention: .*{message}"):
        window_prompt_attention(**{**given, **changes})


def test_windows_must_come_out_even() -> None:
    tensors, _ = make(dtype=torch.float32)
    with pytest.raises(ConfigError, match="11 windows and prompts of 3 samples; wanted as many windows for every"):
        window_prompt_attention(*(each[:11] for each in tensors[:3]), *tensors[3:])
