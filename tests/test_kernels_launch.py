"""A compiled kernel is taken again only for a call that Triton would compile the same kernel for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from epic_fast.kernels.common import launch as launch_module  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.common import plan  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.prompt_attention import reference, triton_rows  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.prompt_attention.triton_backward import (  # pyright: ignore[reportMissingImports]
    prompt_attention_backward,
)
from epic_fast.kernels.prompt_attention.triton_forward import (  # pyright: ignore[reportMissingImports]
    prompt_attention_forward,
)


def rows(*shape: int, dtype: torch.dtype = torch.float16, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def facts(*tensors: Tensor | None, others: tuple[Tensor | None, ...] = (), constants: Any = ()) -> Any:
    return triton_rows.facts_of(triton_rows.layout_of(tensors, 2), others, constants)


def test_the_layout_of_tensors():
    whole = rows(2, 5, 3, 16).transpose(1, 2)  # (2, 3, 5, 16), in memory (2, 5, 3, 16)
    shared = rows(1, 3, 4, 16)
    found = triton_rows.layout_of((whole, None, shared), 2)
    assert found.align == 8
    assert not found.wide
    assert found.strides == [240 // 8, 16 // 8, 48 // 8, 0, 0, 0, 0, 64 // 8, 16 // 8]
    assert found.types == (torch.float16, None, torch.float16)
    odd = rows(2, 3, 5, 17)[..., :16]
    assert triton_rows.layout_of((odd,), 2).align == 1
    assert triton_rows.layout_of((odd,), 2).strides == [255, 85, 17]
    late = rows(1024)[4:].as_strided((2, 3, 5, 16), (240, 80, 16, 1))
    assert triton_rows.layout_of((late,), 2).align == 1
    far = torch.empty_strided((1, 1, 2, 16), (0, 0, 2**30, 1), dtype=torch.float16, device="meta")
    assert triton_rows.layout_of((far,), 2).wide


def test_what_triton_compiles_for_makes_other_facts():
    base, same = rows(2, 3, 5, 16), rows(4, 3, 7, 16)
    lengths = torch.zeros(2, dtype=torch.int64)
    known = facts(base, others=(lengths,), constants=(64, True))
    assert known is not None
    assert facts(same, others=(lengths,), constants=(64, True)) == known
    others = [
        facts(base.to(torch.bfloat16), others=(lengths,), constants=(64, True)),
        facts(None, others=(lengths,), constants=(64, True)),
        facts(base, others=(lengths.to(torch.int32),), constants=(64, True)),
        facts(base, others=(None,), constants=(64, True)),
        facts(base, others=(lengths,), constants=(32, True)),
        facts(base, others=(lengths,), constants=(64, False)),
    ]
    assert known not in others
    assert len(set(others)) == len(others)


def test_what_is_rare_is_left_to_triton():
    base = rows(2, 3, 5, 16)
    assert facts(rows(2, 3, 5, 17)[..., :16]) is None
    assert facts(base, others=(torch.zeros(9, dtype=torch.int64)[1:],)) is None
    batches_apart = torch.empty_strided((2, 1, 2, 16), (2**35, 16, 16, 1), dtype=torch.float16, device="meta")
    assert facts(batches_apart) is None


class Launcher:
    """Doubles its first tensor; says how often it was asked itself, and not its plan."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, tape: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        self.asked += 1
        first = plan.unit_last_stride(tape, arguments[0])
        result = tape.empty(first.shape, first.dtype)
        shared = tape.scratch((1, 3), torch.float32)
        tape.apply(_double, first, result)
        assert shared.shape == (1, 3)
        return result, None, tape.derive(torch.zeros_like, arguments[0])


def _double(source: Tensor, target: Tensor) -> None:
    torch.mul(source, 2, out=target)


def late(tensor: Tensor, by: int = 1) -> Tensor:
    """The same values, that many elements further in their memory."""
    return torch.cat([tensor.new_zeros(by), tensor.flatten()])[by:].view_as(tensor)


def test_a_call_of_the_same_signature_is_planned_once() -> None:
    launcher = Launcher()
    for _ in range(3):
        one, other = torch.randn(3, 4), torch.randn(5)
        doubled, nothing, zeros = plan.run(launcher, (one, None, other), (True, 0.5))
        assert torch.equal(doubled, one * 2)
        assert nothing is None
        assert torch.equal(zeros, torch.zeros(3, 4))
    assert launcher.asked == 1


CHANGES: dict[str, Callable[[], tuple[tuple[Tensor | None, ...], tuple[Any, ...]]]] = {
    "shape": lambda: ((torch.randn(3, 8), None, torch.randn(5)), (True, 0.5)),
    "shape of another": lambda: ((torch.randn(3, 4), None, torch.randn(6)), (True, 0.5)),
    "strides": lambda: ((torch.randn(4, 3).T, None, torch.randn(5)), (True, 0.5)),
    "last stride": lambda: ((torch.randn(3, 8)[:, ::2], None, torch.randn(5)), (True, 0.5)),
    "type": lambda: ((torch.randn(3, 4).double(), None, torch.randn(5)), (True, 0.5)),
    "type of another": lambda: ((torch.randn(3, 4), None, torch.randn(5).half()), (True, 0.5)),
    "alignment": lambda: ((late(torch.randn(3, 4)), None, torch.randn(5)), (True, 0.5)),
    "alignment of another": lambda: ((torch.randn(3, 4), None, late(torch.randn(5))), (True, 0.5)),
    "None in its place": lambda: ((torch.randn(3, 4), torch.randn(5), None), (True, 0.5)),
    "nothing is None": lambda: ((torch.randn(3, 4), torch.randn(5), torch.randn(5)), (True, 0.5)),
    "flag": lambda: ((torch.randn(3, 4), None, torch.randn(5)), (False, 0.5)),
    "number": lambda: ((torch.randn(3, 4), None, torch.randn(5)), (True, 0.25)),
    "needs": lambda: ((torch.randn(3, 4), None, torch.randn(5)), (True, 0.5, (True, False))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_launcher_may_look_at_makes_another_plan(name: str) -> None:
    launcher = Launcher()
    plan.run(launcher, (torch.randn(3, 4), None, torch.randn(5)), (True, 0.5))
    tensors, options = CHANGES[name]()
    assert tensors[0] is not None
    for _ in range(2):
        doubled, _, _ = plan.run(launcher, tensors, options)
        assert torch.equal(doubled, tensors[0] * 2)
        assert launcher.asked == 2
    # Which of two tensors is not aligned is told apart as well.
    if "alignment" in name:
        both = late(torch.randn(3, 4), 2), None, late(torch.randn(5))
        plan.run(launcher, both, options)
        assert launcher.asked == 3


def test_another_launcher_and_another_device_make_another_plan() -> None:
    one, other = Launcher(), Launcher()
    for launcher in (one, other, one, other):
        plan.run(launcher, (torch.zeros(2, 2),), ())
    assert (one.asked, other.asked) == (1, 1)
    plan.run(one, (torch.zeros(2, 2, device="meta"),), ())
    assert one.asked == 2


def test_one_tensor_in_two_places_is_no_promise() -> None:
    """The first call has a tensor twice, the second one two of the same kind."""

    def launcher(tape: Any, one: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        result = tape.empty(one.shape, one.dtype)
        tape.apply(_subtract, one, other, result)
        return (result,)

    same = torch.ones(4)
    assert plan.run(launcher, (same, same), ())[0].sum() == 0
    assert plan.run(launcher, (torch.full((4,), 3.0), same), ())[0].sum() == 8


def _subtract(one: Tensor, other: Tensor, target: Tensor) -> None:
    torch.sub(one, other, out=target)


def test_what_the_tape_does_not_know_is_not_planned() -> None:
    asked = []

    def launcher(tape: Any, one: Tensor) -> tuple[Tensor, ...]:
        asked.append(one)
        return (one + 1,)

    for each in (1.0, 2.0):
        assert plan.run(launcher, (torch.tensor(each),), ())[0] == each + 1
    assert len(asked) == 2


def test_given_results_are_returned_themselves() -> None:
    def launcher(tape: Any, one: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        tape.apply(_double, one, target)
        return (target,)

    for _ in range(2):
        one, target = torch.randn(3), torch.empty(3)
        assert plan.run(launcher, (one, target), ())[0] is target
        assert torch.equal(target, one * 2)


def test_plans_are_not_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MOST_PLANS", 4)
    launcher = Launcher()
    for size in range(1, 20):
        plan.run(launcher, (torch.zeros(size, 2),), ())
        assert len(plan._plans) <= 4
    plan.run(launcher, (torch.zeros(19, 2),), ())
    assert launcher.asked == 19


def test_a_setting_for_float32_makes_another_plan() -> None:
    tensors = [torch.randn(1, 1, 4, 16) for _ in range(6)]
    before = torch.backends.cuda.matmul.fp32_precision
    found = []
    try:
        for setting in ("ieee", "tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = setting
            prompt_attention_forward(*tensors, None, prefix=False, causal=False, scale=0.2)
            found.append(len(plan._plans))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert found == [1, 2, 2]


def test_another_scale_is_another_plan_and_another_result() -> None:
    tensors = [torch.randn(1, 1, 4, 16) for _ in range(6)]
    for scale in (0.2, 0.4, 0.2, -0.2):
        for _ in range(2):
            found = prompt_attention_forward(*tensors, None, prefix=False, causal=False, scale=scale)
            wanted = reference.prompt_attention(*tensors, scale=scale)
            torch.testing.assert_close(found[:2], wanted)


@pytest.mark.gpu
def test_calls_that_differ_get_their_own_kernel():
    """One after the other, each differing from the one before in what a kernel is compiled for."""
    launch_module._compiled.clear()
    generator = torch.Generator(device="cuda").manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)

    def check(tensors: list[Any], lengths: Tensor | None, **flags: Any) -> None:
        found = prompt_attention_forward(
            *tensors, lengths, prefix=False, causal=flags.get("causal", False), scale=0.2, save_lse=True
        )
        wide = [None if each is None else each.double() for each in tensors]
        wanted = reference.prompt_attention(*wide, lengths=lengths, scale=0.2, **flags)
        for each, want in zip(found, wanted, strict=False):
            if want is not None:
                assert (each.double() - want).abs().max() < 0.03

    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        own = [draw(2, 3, 33, 64, dtype=dtype) for _ in range(3)]
        prompts = [draw(1, 3, 5, 64, dtype=dtype) for _ in range(3)]
        shifted = [torch.empty(2, 3, 33, 67, dtype=dtype, device="cuda")[..., 3:].copy_(each) for each in own]
        for lengths in (None, torch.tensor([33, 7], device="cuda"), torch.tensor([2, 33], device="cuda").int(), None):
            check([*own, *prompts], lengths)
            check([*own, *prompts], lengths, causal=True)
            check([*shifted, *prompts], lengths)
            check([*own, None, *prompts[1:]], lengths)
            if lengths is not None:
                check([*own, *prompts], torch.cat([lengths[:1], lengths])[1:])
    assert launch_module._compiled


@pytest.mark.gpu
def test_a_hook_on_launches_sees_them():
    from triton import knobs

    tensors = [torch.randn(1, 1, 20, 64, device="cuda", dtype=torch.bfloat16) for _ in range(6)]

    def call() -> None:
        prompt_attention_forward(*tensors, None, prefix=False, causal=False, scale=math.sqrt(1 / 64))

    call()
    call()
    seen: list[Any] = []
    hooks = knobs.runtime.launch_enter_hook
    hooks.add(seen.append)
    try:
        call()
    finally:
        hooks.remove(seen.append)
    assert len(seen) == 1
    ready = [each._ready for each in plan._plans.values()]
    assert len(ready) == 1
    assert ready[0] is not None


@pytest.mark.gpu
def test_a_plan_does_on_a_gpu_what_its_launcher_did() -> None:
    """The third call of a signature hands addresses to compiled kernels: the bits stay, and so does what is written."""
    for dtype in (torch.bfloat16, torch.float32):
        draw = [torch.randn(2, 3, size, 64, device="cuda").to(dtype) for size in (40, 40, 40, 5, 5, 5)]
        lengths = torch.tensor([40, 7], device="cuda")
        flags = {"prefix": False, "causal": True, "scale": 0.2}
        runs = []
        for _ in range(3):
            outputs = prompt_attention_forward(*draw, lengths, **flags)
            grads = [torch.ones(each.shape, device="cuda", dtype=dtype).mT.contiguous().mT for each in outputs[:2]]
            needs = (True,) * 6
            runs.append([*outputs, *prompt_attention_backward(*grads, *draw, lengths, *outputs, **flags, needs=needs)])
        assert all(each._ready is not None for each in plan._plans.values())
        for run in runs[1:]:
            assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))


@pytest.mark.gpu
def test_a_plan_in_a_captured_graph() -> None:
    tensors = [torch.randn(2, 3, 20, 64, device="cuda", dtype=torch.bfloat16) for _ in range(6)]

    def call() -> Any:
        return prompt_attention_forward(*tensors, None, prefix=False, causal=False, scale=0.2)

    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for each in tensors:
        each.normal_()
    graph.replay()
    for one, other in zip(captured, call(), strict=True):
        assert torch.equal(one, other)
