"""What a call costs before a kernel starts: checks, dispatcher, autograd.  No GPU is needed; the kernels are left out.

The guards are in units of what PyTorch's own cheapest differentiable call costs on the same machine, so that a slow
machine is no failure.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from epic_fast.functional import prompt_attention, prompt_interaction
from epic_fast.testing.cases import AttentionCase, InteractionCase

pytest.importorskip("triton")

# Where there is a GPU, kernels take nothing else (and no interpreter stands in for them).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# In calls of `torch.add` with a gradient; two to three times what was found when the bounds were set.
LIMITS = {("attention", False): 12, ("attention", True): 100, ("interaction", False): 16, ("interaction", True): 120}


def attention_launchers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """In place of the kernels: memory of the right shape, made beforehand, and nothing else."""
    made: dict[str, Any] = {}

    def forward(query: Tensor, key: Any, value: Any, prompt_query: Tensor, *others: Any, **options: Any) -> Any:
        if not made:
            made.update(output=torch.zeros_like(query), prompt=torch.zeros_like(prompt_query))
            made["lse"] = query.new_zeros(query.shape[0], query.shape[1], query.shape[2] + prompt_query.shape[2])
        return made["output"].detach(), made["prompt"].detach(), made["lse"].detach()

    def backward(*tensors: Any, **options: Any) -> Any:
        return tuple(each.detach() for each in tensors[2:8])

    return forward, backward


def interaction_launchers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(text: Tensor, vision: Tensor, *others: Any, **options: Any) -> Any:
        return text.detach().clone(), vision.detach().clone()

    def backward(grad_text: Any, grad_vision: Any, *inputs: Tensor, **options: Any) -> Any:
        return tuple(each.detach() for each in inputs[:9])

    return forward, backward


def unit_cost() -> float:
    """Seconds of ``torch.add`` on two scalars of which one needs a gradient."""
    one, other = torch.zeros((), requires_grad=True), torch.zeros(())
    return seconds(lambda: torch.add(one, other), 2000)


def seconds(call: Callable[[], Any], calls: int) -> float:
    """A call's time: the best of 7 rounds, which other work on the machine disturbs least."""
    call()
    rounds = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter() - start) / calls)
    return min(rounds)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, launchers in (
        ("prompt_attention", attention_launchers()),
        ("prompt_interaction", interaction_launchers()),
    ):
        module = importlib.import_module(f"epic_fast.ops.{name}")
        monkeypatch.setattr(module, "_launchers", lambda chosen=launchers: chosen)


CALLS = {
    "attention": (prompt_attention, AttentionCase(1, 1, 2, 2, 16)),
    "interaction": (prompt_interaction, InteractionCase(1, 1, 1, 16, 16)),
}


def make_call(operation: str, *, gradients: bool) -> Callable[[], Any]:
    function, case = CALLS[operation]
    inputs: dict[str, Any] = {
        name: each.requires_grad_(gradients) for name, each in case.make(device=DEVICE).items() if each is not None
    }
    leaves = list(inputs.values())

    def call() -> Any:
        outputs = function(**inputs, impl="triton")
        return torch.autograd.grad(outputs, leaves, outputs) if gradients else outputs

    return call


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("operation", CALLS)
def test_dispatch_cost(operation: str, gradients: bool, benchmark: Any) -> None:
    call = make_call(operation, gradients=gradients)
    benchmark.group = f"dispatch, {operation}"
    benchmark.extra_info["unit_us"] = 1e6 * unit_cost()
    benchmark.pedantic(call, rounds=30, iterations=20, warmup_rounds=3)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("operation", CALLS)
def test_dispatch_stays_cheap(operation: str, gradients: bool) -> None:
    call = make_call(operation, gradients=gradients)
    ratio = statistics.median(seconds(call, 100) / unit_cost() for _ in range(3))
    limit = LIMITS[operation, gradients]
    assert ratio <= limit, f"{operation}: a call costs {ratio:.0f} times torch.add before any kernel; allowed {limit}"
