"""mix_prompt_experts against the sum written out, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from epic_fast.errors import ConfigError
from epic_fast.functional import mix_prompt_experts

WIDE = torch.float64


def make(
    batch: int = 3, experts: int = 4, length: int = 2, width: int = 5, *, dtype: torch.dtype = WIDE, seed: int = 0
) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = ((batch, experts), (experts, length, width))
    logits, values = (torch.randn(shape, generator=random, dtype=WIDE).to(dtype).requires_grad_() for shape in shapes)
    return logits, values


def by_hand(logits: Tensor, experts: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    """With Python's own numbers."""
    scores = []
    for row in logits.tolist():
        ranked = sorted(range(len(row)), key=lambda at: (-row[at], at))
        kept = ranked[: len(row) if top_k is None else top_k]
        powers = {at: math.exp((row[at] - row[ranked[0]]) / temperature) for at in kept}
        scores.append([powers.get(at, 0.0) / sum(powers.values()) for at in range(len(row))])
    found = torch.tensor(scores, dtype=WIDE)
    return torch.einsum("be,elc->blc", found, experts), found


@given(
    batch=st.integers(1, 4),
    experts=st.integers(1, 5),
    length=st.integers(0, 3),
    width=st.integers(1, 4),
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(1, 5) | st.none(),
    seed=st.integers(0, 3),
)
def test_every_sample_by_hand(
    batch: int, experts: int, length: int, width: int, temperature: float, top_k: int | None, seed: int
) -> None:
    top_k = None if top_k is None else min(top_k, experts)
    with torch.no_grad():
        logits, values = make(batch, experts, length, width, seed=seed)
        found = mix_prompt_experts(logits, values, temperature=temperature, top_k=top_k)
        for one, other in zip(found, by_hand(logits, values, temperature, top_k), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_default_temperature_is_a_tenth() -> None:
    logits, experts = make()
    assert torch.equal(mix_prompt_experts(logits, experts)[1], mix_prompt_experts(logits, experts, temperature=0.1)[1])
    torch.testing.assert_close(mix_prompt_experts(logits, experts)[1], (10 * logits).softmax(dim=-1))


@pytest.mark.parametrize("top_k", [None, 1, 2, 4])
def test_gradcheck(top_k: int | None) -> None:
    assert torch.autograd.gradcheck(lambda *given: mix_prompt_experts(*given, temperature=0.7, top_k=top_k), make())


def test_top_k_of_all_is_the_dense_mixture_bit_for_bit() -> None:
    inputs = make()
    dense, all_of_them = mix_prompt_experts(*inputs), mix_prompt_experts(*inputs, top_k=4)
    assert all(map(torch.equal, dense, all_of_them))


def test_of_equal_logits_the_first_are_taken() -> None:
    _, experts = make()
    for row in ([0.0, 0.0, 0.0, 0.0], [-1.0, 2.0, 2.0, 2.0], [3.0, 1.0, 3.0, 3.0]):
        logits = torch.tensor([row], dtype=WIDE)
        _, scores = mix_prompt_experts(logits, experts, top_k=2)
        best = [at for at in range(4) if row[at] == max(row)][:2]
        assert scores[0].nonzero().flatten().tolist() == best
        assert torch.equal(scores[0, best], torch.full((2,), 0.5, dtype=WIDE))


@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("level", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("experts", [2, 4])
def test_equal_logits_are_finite_with_their_gradients(experts: int, level: float, top_k: int | None) -> None:
    logits = torch.full((2, experts), level, requires_grad=True)
    values = make(experts=experts, dtype=torch.float32)[1]
    prompts, scores = mix_prompt_experts(logits, values, top_k=top_k)
    got = torch.autograd.grad((prompts.square().sum(), scores.square().sum()), (logits, values))
    assert all(each.isfinite().all() for each in (prompts, scores, *got))


def test_one_expert_is_given_to_everybody() -> None:
    logits, experts = make(experts=1)
    prompts, scores = mix_prompt_experts(logits, experts, top_k=1)
    assert torch.equal(scores, torch.ones_like(scores))
    assert torch.equal(prompts, experts.expand(3, -1, -1))
    got = torch.autograd.grad(prompts.sum(), (logits, experts))
    assert torch.equal(got[0], torch.zeros_like(logits))
    assert torch.equal(got[1], torch.full_like(experts, 3.0))


def test_experts_that_nobody_takes_stay_in_the_graph() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0, -9.0], [4.0, 6.0, 0.0, -9.0]], requires_grad=True)
    experts = make(dtype=torch.float32)[1]
    prompts, scores = mix_prompt_experts(logits, experts, temperature=1.0, top_k=2)
    assert torch.equal(scores[:, 2:], torch.zeros(2, 2))
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(2))
    for_logits, for_experts = torch.autograd.grad(prompts.square().sum(), (logits, experts))
    assert torch.equal(for_experts[2:], torch.zeros_like(for_experts[2:]))
    assert for_experts[:2].abs().amin() > 0
    assert torch.equal(for_logits[:, 2:], torch.zeros(2, 2))
    assert for_logits[:, :2].abs().amin() > 0


def test_a_sample_does_not_notice_its_batch() -> None:
    logits, experts = make(dtype=torch.float32)
    prompts, scores = mix_prompt_experts(logits, experts, top_k=2)
    order = torch.tensor([2, 0, 1])
    for found, wanted in zip(mix_prompt_experts(logits[order], experts, top_k=2), (prompts, scores), strict=True):
        torch.testing.assert_close(found, wanted[order], rtol=1e-6, atol=1e-6)
    for found, wanted in zip(mix_prompt_experts(logits[1:2], experts, top_k=2), (prompts, scores), strict=True):
        torch.testing.assert_close(found, wanted[1:2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_types_are_kept_and_the_softmax_is_wide(dtype: torch.dtype, autocast: bool) -> None:
    logits, experts = make(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        prompts, scores = mix_prompt_experts(logits.float(), experts)
    assert (prompts.dtype, scores.dtype) == (dtype, torch.float32)
    wanted = by_hand(logits.detach().to(WIDE), experts.detach().to(WIDE), 0.1, None)
    torch.testing.assert_close(scores.to(WIDE), wanted[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(prompts.to(WIDE), wanted[0], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"experts": torch.zeros(4, 5)}, r"experts has shape \(4, 5\); wanted \(experts, prompts, width\)"),
    "no experts": ({"experts": torch.zeros(0, 2, 5)}, "wanted .* at least one expert"),
    "logits": ({"router_logits": torch.zeros(3, 5)}, r"router_logits has shape \(3, 5\); wanted \(batch, 4 experts\)"),
    "type": ({"router_logits": torch.zeros(3, 4).long()}, r"router_logits has type torch\.int64; wanted a floating"),
    "device": ({"experts": torch.zeros(4, 2, 5, device="meta")}, "experts is on meta; wanted cpu"),
    "temperature": ({"temperature": 0.0}, r"temperature=0\.0; wanted a finite number greater than 0"),
    "no number": ({"temperature": math.nan}, "temperature=nan; wanted a finite number"),
    "top_k 0": ({"top_k": 0}, "top_k=0; wanted an integer of 1 to 4 experts"),
    "top_k 5": ({"top_k": 5}, "top_k=5; wanted 1 to the 4 experts there are"),
    "top_k True": ({"top_k": True}, "top_k=True; wanted an integer"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_say_what_was_wanted(case: str) -> None:
    logits, experts = make(dtype=torch.float32)
    changes, message = BAD[case]
    with pytest.raises(ConfigError, match=f"^mix_prompt_experts: .*{message}"):
        mix_prompt_experts(**{"router_logits": logits, "experts": experts, **changes})
