"""The Triton kernels of the mixture of experts against float64: interpreted on the CPU, compiled on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings

pytest.importorskip("triton")

from epic_fast.errors import ConfigError, ImplementationError
from epic_fast.functional import mix_prompt_experts
from epic_fast.kernels.common import plan  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.mix_prompt_experts import triton_backward, triton_forward  # pyright: ignore
from epic_fast.kernels.mix_prompt_experts.reference import mix_prompt_experts as reference  # pyright: ignore
from epic_fast.testing.cases import MIX_MEASURED, MIX_PRODUCTION, MixCase, mix_cases
from epic_fast.testing.numerics import assert_bits_equal, check_operation, poisoned_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 wrongly, but here all products are of float32.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def by_kernel(**arguments: Any) -> Any:
    return mix_prompt_experts(**arguments, impl="triton")


def check(case: MixCase, dtype: torch.dtype, candidate: Callable[..., Any] = by_kernel, **settings: Any) -> None:
    with poisoned_empty():
        check_operation(
            candidate,
            reference,
            case.make(dtype, DEVICE),
            case.options(DEVICE),
            reduction=case.reductions,
            output_names=case.outputs,
            **settings,
        )


def gradients(
    inputs: tuple[torch.Tensor, ...], used: tuple[bool, bool] = (True, True), **options: Any
) -> tuple[torch.Tensor, ...]:
    leaves = [each.detach().requires_grad_() for each in inputs]
    outputs = mix_prompt_experts(*leaves, impl="triton", **options)
    random = torch.Generator(DEVICE).manual_seed(4)
    sent = [torch.randn(each.shape, generator=random, device=DEVICE).to(each.dtype) for each in outputs]
    kept = [index for index in range(2) if used[index]]
    found = torch.autograd.grad([outputs[index] for index in kept], leaves, [sent[index] for index in kept])
    return (*(each.detach() for each in outputs), *found)


@settings(max_examples=8)
@given(case=mix_cases())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_call_is_within_the_budget(dtype: torch.dtype, case: MixCase) -> None:
    check(case, dtype)


@pytest.mark.parametrize(
    "case",
    [
        MixCase(1, 1, 1, 1),
        MixCase(35, 3, 2, 100, temperature=0.7),
        MixCase(2, 17, 3, 40, top_k=5),
        MixCase(3, 64, 1, 16, top_k=64),
        MixCase(3, 4, 1, 16, top_k=1),
    ],
    ids=str,
)
def test_corners(case: MixCase) -> None:
    check(case, torch.float32)


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["prompts", "scores"])
def test_an_output_that_nobody_used(used: tuple[bool, bool]) -> None:
    check(MixCase(5, 4, 2, 48, top_k=3), torch.float32, used=used)


def test_equal_logits_take_the_first_experts() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0, 3.0], [0.0, -1.0, 5.0, 5.0, 5.0]])
    experts = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(0))
    wanted = torch.tensor([[0, 0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0, 0], [0, 0, 0.5, 0.5, 0]])
    given = logits.to(DEVICE), experts.to(DEVICE)
    prompts, scores, d_logits, d_experts = gradients(given, top_k=2)
    assert torch.equal(scores.cpu(), wanted)
    torch.testing.assert_close(prompts, reference(*given, top_k=2)[0])
    assert not d_logits.masked_select(scores == 0).any()
    assert not d_experts[4].any()
    assert torch.equal(gradients(given)[1][1].cpu(), torch.full((5,), 0.2))


def test_one_expert_is_that_expert_and_gives_the_router_nothing() -> None:
    case = MixCase(3, 1, 2, 16)
    given = tuple(case.make(device=DEVICE).values())
    prompts, scores, d_logits, _ = gradients(given, used=(True, False))  # pyright: ignore[reportArgumentType]
    assert torch.equal(scores, torch.ones_like(scores))
    assert torch.equal(prompts, given[1].expand(3, 2, 16))  # pyright: ignore[reportOptionalMemberAccess]
    assert not d_logits.any()


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("size", [1e4, 1e30, torch.finfo(torch.float32).max])
def test_huge_logits_are_finite_with_finite_gradients(size: float, top_k: int | None) -> None:
    logits = torch.tensor([[size, -size, 0.0], [size, size, -size], [0.0, 0.0, size]], device=DEVICE)
    experts = torch.randn(3, 2, 16, device=DEVICE)
    for each in gradients((logits, experts), top_k=top_k):
        assert each.isfinite().all()


def test_all_experts_among_the_best_is_the_dense_mixture() -> None:
    given = tuple(MixCase(4, 5, 2, 16).make(device=DEVICE).values())
    assert_bits_equal(gradients(given, top_k=5), gradients(given))  # pyright: ignore[reportArgumentType]


def test_nan_stays_in_its_sample_and_bits_do_not_depend_on_the_batch() -> None:
    logits, experts = MixCase(21, 4, 2, 40).make(device=DEVICE).values()
    assert logits is not None
    assert experts is not None
    whole, again = gradients((logits, experts), top_k=3), gradients((logits, experts), top_k=3)
    assert_bits_equal(whole, again)
    torn = logits.clone()
    torn[1:] = math.nan
    for index, (one, other) in enumerate(zip(whole, gradients((torn, experts), top_k=3), strict=True)):
        if index < 3:
            assert_bits_equal(one[:1], other[:1])
    alone = mix_prompt_experts(logits[20:], experts, top_k=3, impl="triton")
    assert_bits_equal(alone, tuple(each[20:] for each in whole[:2]))


def test_prompts_are_written_into_a_slot() -> None:
    logits, experts = MixCase(3, 4, 2, 32).make(device=DEVICE).values()
    want = mix_prompt_experts(logits, experts, impl="triton")  # pyright: ignore[reportArgumentType]
    for impl in ("triton", "reference"):
        for width in (32, 35):
            buffer = torch.full((3, 7, width), 7.0, device=DEVICE)
            slot = buffer[:, 2:4, :32]
            found = mix_prompt_experts(logits, experts, out=slot, impl=impl)  # pyright: ignore[reportArgumentType]
            assert found[0] is slot
            torch.testing.assert_close(found, want)
            assert (buffer[:, :2] == 7).all()
            assert (buffer[:, 4:] == 7).all()
            assert (buffer[..., 32:] == 7).all()
    with pytest.raises(ConfigError, match=r"out's prompts has shape \(3, 1, 32\); wanted \(3, 2, 32\)"):
        mix_prompt_experts(logits, experts, out=buffer[:, :1, :32])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="out= with a tensor that requires a gradient"):
        mix_prompt_experts(logits.requires_grad_(), experts, out=slot)  # pyright: ignore


@pytest.mark.parametrize("sizes", [(0, 3, 2, 16), (2, 3, 0, 16), (2, 3, 2, 0)])
def test_nothing_to_mix(sizes: tuple[int, int, int, int]) -> None:
    case = MixCase(*sizes)
    with poisoned_empty():
        prompts, scores, d_logits, d_experts = gradients(tuple(case.make(device=DEVICE).values()))  # pyright: ignore
    assert prompts.shape == (sizes[0], *sizes[2:])
    torch.testing.assert_close(scores, reference(**case.make(device=DEVICE))[1])  # pyright: ignore
    assert d_logits.isfinite().all()
    assert not d_experts.any()


class Recorder:
    """Counts the launches of a kernel, and lets them through."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.parametrize(
    ("needs", "used", "launches", "allocations"),
    [
        ((True, True), (True, True), (1, 1, 1), 5),
        ((True, False), (True, True), (1, 1, 1), 4),
        ((False, True), (True, True), (1, 1, 0), 3),
        ((False, True), (False, True), (1, 0, 0), 3),
        ((True, True), (False, True), (1, 0, 1), 4),
        ((False, False), (False, False), (1, 0, 0), 2),
    ],
)
def test_what_is_launched_and_allocated(
    needs: tuple[bool, bool],
    used: tuple[bool, bool],
    launches: tuple[int, int, int],
    allocations: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = [(triton_forward, "_forward_kernel"), (triton_backward, "_expert_kernel")]
    kernels.append((triton_backward, "_logit_kernel"))
    recorders = [Recorder(getattr(module, name)) for module, name in kernels]
    for (module, name), recorder in zip(kernels, recorders, strict=True):
        monkeypatch.setattr(module, name, recorder)
    plan.forget()
    case = MixCase(2, 3, 2, 16)
    inputs = [
        each.requires_grad_(need)
        for each, need in zip(case.make(device=DEVICE).values(), needs, strict=True)  # pyright: ignore
    ]
    with poisoned_empty() as poison:
        outputs = mix_prompt_experts(*inputs, impl="triton")
        if any(used):
            torch.autograd.backward([each.sum() for each, use in zip(outputs, used, strict=True) if use])
    assert tuple(each.launches for each in recorders) == launches
    assert poison.allocations == allocations
    assert tuple(each.grad is not None for each in inputs) == needs


def test_types_may_differ_and_compiled_calls_are_whole() -> None:
    logits, experts = MixCase(3, 4, 2, 16).make(device=DEVICE).values()
    torch._dynamo.reset()
    compiled = torch.compile(by_kernel, backend="aot_eager", fullgraph=True)
    for call in (by_kernel, compiled):
        given = {
            "router_logits": logits.detach().requires_grad_(),  # pyright: ignore[reportOptionalMemberAccess]
            "experts": experts.detach().half().requires_grad_(),  # pyright: ignore[reportOptionalMemberAccess]
        }
        prompts, scores = call(**given, top_k=3)
        assert (prompts.dtype, scores.dtype) == (torch.float16, torch.float32)
        (prompts.float().sum() + scores.square().sum()).backward()
        assert given["router_logits"].grad.dtype == torch.float32  # pyright: ignore[reportOptionalMemberAccess]
        assert given["experts"].grad.dtype == torch.float16  # pyright: ignore[reportOptionalMemberAccess]


def test_what_the_kernel_cannot_take_is_said() -> None:
    logits, experts = torch.zeros(2, 65, device=DEVICE), torch.zeros(65, 1, 4, device=DEVICE, dtype=torch.float64)
    with pytest.raises(ImplementationError) as caught:
        mix_prompt_experts(logits, experts, impl="triton")
    for reason in ("experts is torch.float64", "there are 65 experts; the kernel takes up to 64"):
        assert reason in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*MIX_MEASURED, *MIX_PRODUCTION], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_production_shapes_are_within_the_budget(dtype: torch.dtype, case: MixCase) -> None:
    check(case, dtype)


@pytest.mark.gpu
def test_a_cuda_graph_replays_a_training_step() -> None:
    given = [
        each.requires_grad_() for each in MIX_MEASURED[2].make(torch.bfloat16, "cuda").values() if each is not None
    ]

    def step() -> list[torch.Tensor]:
        outputs = mix_prompt_experts(*given, impl="triton")
        return [*outputs, *torch.autograd.grad(outputs, given, [torch.ones_like(each) for each in outputs])]

    want = [each.detach().clone() for each in step()]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for each in found:
        each.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_bits_equal([each.detach() for each in found], want)
