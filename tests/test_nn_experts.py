"""Prompt experts, router, mapper and importance loss by themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from epic_fast.nn import ExpertRouter, PromptExperts, PromptMapper, importance_loss

WIDE = torch.float64


def scores_of(batch: int, experts: int, *, layers: int = 2, scale: float = 3.0, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(batch, experts, generator=random, dtype=WIDE)).softmax(dim=1) for _ in range(layers)]


# -- prompts --------------------------------------------------------------------------------------------------


def test_prompts_are_static_then_mixed_then_mapped() -> None:
    torch.manual_seed(0)
    prompts = PromptExperts(5, length=2, num_experts=3, init_range=0.2)
    assert prompts.static is not None
    assert prompts.experts is not None
    assert prompts.static.shape == (2, 5)
    assert prompts.experts.shape == (3, 2, 5)
    assert max(float(each.detach().abs().max()) for each in prompts.parameters()) <= 0.2
    logits, mapped = torch.randn(4, 3), torch.randn(4, 1, 5)
    found, scores = prompts(4, logits, mapped, temperature=0.5)
    assert found.shape == (4, 5, 5)
    assert torch.equal(found[:, :2], prompts.static.expand(4, -1, -1))
    assert scores is not None
    torch.testing.assert_close(scores, (logits / 0.5).softmax(dim=1))
    torch.testing.assert_close(found[:, 2:4], torch.einsum("be,elc->blc", scores, prompts.experts))
    assert torch.equal(found[:, 4:], mapped)


def test_kinds_of_prompts_can_be_left_out() -> None:
    only_static = PromptExperts(5, length=2, num_experts=3, dynamic=False)
    assert [name for name, _ in only_static.named_parameters()] == ["static"]
    assert only_static(2)[0].shape == (2, 2, 5)
    only_experts = PromptExperts(5, length=2, num_experts=1, static=False)
    assert [name for name, _ in only_experts.named_parameters()] == ["experts"]
    found, scores = only_experts(2)
    assert scores is None
    assert only_experts.experts is not None
    assert torch.equal(found, only_experts.experts.expand(2, -1, -1))


# -- router ---------------------------------------------------------------------------------------------------


def router(**options: object) -> ExpertRouter:
    torch.manual_seed(0)
    return ExpertRouter([6, 4], 5, **{"num_experts": 3, **options})  # pyright: ignore[reportArgumentType]


def test_the_query_is_both_projections_and_embeddings_are_frozen() -> None:
    route = router()
    assert "embeddings" not in dict(route.named_parameters())
    assert "embeddings" in route.state_dict()
    other, pooled = torch.randn(2, 5), torch.randn(2, 4)
    projected = route.project(other)
    assert projected.shape == (2, 2, 8)
    assert route.own is not None
    query = torch.cat([route.own[1](pooled), route.other(other)[:, 8:]], dim=1)
    torch.testing.assert_close(route.eval()(1, pooled, projected), query @ route.embeddings[1])


def test_the_first_versions_router_reads_the_other_modality_alone() -> None:
    route = router(size=0)
    other = torch.randn(2, 5)
    assert {name for name, _ in route.named_parameters()} == {"other.weight", "other.bias"}
    projected = route.project(other)
    found = route.eval()(0, torch.full((2, 6), math.nan), projected)
    torch.testing.assert_close(found, route.other(other)[:, :8] @ route.embeddings[0])


@pytest.mark.parametrize("experts", [1, 3, 10, 16])
def test_routing_embeddings_are_orthogonal(experts: int) -> None:
    for embeddings in router(num_experts=experts).embeddings.to(WIDE):
        assert embeddings.shape == (10, experts)
        square = embeddings.T @ embeddings if experts <= 10 else embeddings @ embeddings.T
        torch.testing.assert_close(square, torch.eye(len(square), dtype=WIDE), rtol=0, atol=1e-6)


def test_noise_is_drawn_in_training_only_and_after_the_temperature() -> None:
    route = router(noise_std=0.25, temperature=0.1)
    other, pooled = torch.randn(400, 5), torch.randn(400, 6)
    projected = route.project(other)
    quiet = route.eval()(0, pooled, projected)
    assert torch.equal(quiet, route(0, pooled, projected))
    noise = (route.train()(0, pooled, projected) - quiet) / 0.1
    assert abs(float(noise.detach().std()) - 0.25) < 0.02
    assert torch.equal(router().train()(0, pooled, projected), quiet)


def test_running_load_and_entropy() -> None:
    route = router()
    torch.testing.assert_close(route.load, torch.full((2, 3), 1 / 3))
    even, one = torch.full((4, 3), 1 / 3), torch.eye(3)[[0, 0, 0, 0]]
    for _ in range(200):
        route.watch([even, one])
    torch.testing.assert_close(route.load, torch.stack([even[0], one[0]]), rtol=0, atol=1e-3)
    torch.testing.assert_close(route.entropy, torch.tensor([1.0, 0.0]), rtol=0, atol=1e-3)
    before = route.load.clone()
    route.watch([even * math.nan, one])
    assert torch.equal(route.load[0], before[0])
    assert route.load.isfinite().all()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_routing_and_mapping_are_not_done_in_low_precision(low: torch.dtype) -> None:
    route, mapper = router(), PromptMapper(5, [6], hidden_size=4)
    other, pooled = torch.randn(2, 5).to(low), torch.randn(2, 6).to(low)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, (mapped,) = route.eval()(0, pooled, route.project(other)), mapper(other)
    assert (logits.dtype, mapped.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(logits, route(0, pooled.float(), route.project(other.float())))
    torch.testing.assert_close(mapped, mapper(other.float())[0])


# -- mapper ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [False, True])
def test_mapped_prompts(affine: bool) -> None:
    torch.manual_seed(0)
    mapper = PromptMapper(5, [6, 4], hidden_size=3, rows=2, affine=affine, dropout=0.5).eval()
    for parameter in mapper.parameters():
        nn.init.normal_(parameter)
    other = torch.randn(4, 5)
    hidden = mapper.trunk(other)
    if affine:
        hidden = hidden * mapper.scale + mapper.shift
    found = mapper(other)
    assert [each.shape for each in found] == [(4, 2, 6), (4, 2, 4)]
    for each, projection in zip(found, mapper.projections, strict=True):
        wanted = nn.functional.gelu(projection(nn.functional.gelu(hidden)))
        torch.testing.assert_close(each.flatten(1), wanted)
    dropped = mapper.train()(other)[0]
    assert 0 < float((dropped == 0).float().mean()) < 1


# -- importance -----------------------------------------------------------------------------------------------


def test_importance_by_hand() -> None:
    scores = scores_of(4, 3)
    wanted = []
    for layer in scores:
        sums = [sum(row[expert] for row in layer.tolist()) for expert in range(3)]
        mean = sum(sums) / 3
        deviation = math.sqrt(sum((each - mean) ** 2 for each in sums) / 2)
        wanted.append((deviation / mean) ** 2)
    assert min(wanted) > 0
    found = importance_loss(scores, threshold=0.0)
    assert math.isclose(float(found), sum(wanted) / 2, rel_tol=1e-12)
    between = sum(wanted) / 2
    found = importance_loss(scores, threshold=between)
    assert math.isclose(float(found), max(wanted) / 2, rel_tol=1e-12)
    assert float(importance_loss(scores, threshold=1.001 * max(wanted))) == 0.0
    # What is just at the threshold counts as none: 2 and 1 of 3 are uneven by 2 / 9.
    even = [torch.tensor([[2.0, 1.0], [2.0, 1.0]], dtype=WIDE)]
    exactly = float(importance_loss(even, threshold=0.0))
    assert exactly > 0
    assert float(importance_loss(even, threshold=exactly)) == 0.0


def test_importance_has_a_gradient_above_the_threshold_only() -> None:
    logits = torch.randn(4, 3, dtype=WIDE, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def loss(given: Tensor, threshold: float = 0.0) -> Tensor:
        return importance_loss([(3 * given).softmax(dim=1)], threshold=threshold)

    assert torch.autograd.gradcheck(loss, (logits,))
    (got,) = torch.autograd.grad(loss(logits, 100.0), logits)
    assert torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("experts", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_importance_is_finite_with_its_gradient(batch: int, experts: int, scale: float) -> None:
    """One sample, one expert, all logits equal, one expert for all."""
    logits = torch.randn(batch, experts).mul_(scale).requires_grad_()
    for threshold in (0.0, 0.1):
        loss = importance_loss([logits.softmax(dim=1)] * 2, threshold=threshold)
        (got,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert got.isfinite().all()
    if experts == 1:
        assert float(loss.detach()) == 0.0


def test_importance_asks_the_host_nothing() -> None:
    """Tensors on the meta device have no values: whatever waited for one would raise."""
    scores = [torch.rand(4, 3, device="meta", requires_grad=True) for _ in range(2)]
    importance_loss(scores).backward()
    assert scores[0].grad is not None
    route = router().to("meta")
    route.watch(scores)
