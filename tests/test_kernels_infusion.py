"""The Triton kernels of MiT's operations against float64: interpreted on the CPU, compiled on a GPU."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("triton")

from epic_fast.errors import ImplementationError
from epic_fast.functional import infused_attention, infused_swiglu, infusion_gate
from epic_fast.kernels.common import plan  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.infused_attention import triton_backward, triton_forward  # pyright: ignore
from epic_fast.kernels.infused_attention.tiles import BackwardTiles, Tile  # pyright: ignore
from epic_fast.kernels.infused_swiglu import triton_kernels as swiglu_kernels  # pyright: ignore
from epic_fast.kernels.infusion_gate import triton_kernels as gate_kernels  # pyright: ignore
from epic_fast.testing.cases import (
    GATE_MEASURED,
    GATE_PRODUCTION,
    INFUSED_MEASURED,
    INFUSED_PRODUCTION,
    SWIGLU_MEASURED,
    SWIGLU_PRODUCTION,
    GateCase,
    InfusedAttentionCase,
    InfusionCase,
    SwigluCase,
    gate_cases,
    infused_attention_cases,
    swiglu_cases,
)
from epic_fast.testing.numerics import assert_bits_equal, check_operation, poisoned_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The interpreter multiplies bfloat16 wrongly, and cuts in place of rounding to it.
DTYPES = ALL_DTYPES if DEVICE == "cuda" else ALL_DTYPES[:2]
FUNCTIONS: dict[type, Callable[..., Tensor]] = {
    InfusedAttentionCase: infused_attention,
    GateCase: infusion_gate,
    SwigluCase: infused_swiglu,
}


def by_kernel(case: InfusionCase) -> Callable[..., Tensor]:
    return lambda **arguments: FUNCTIONS[type(case)](**arguments, impl="triton")


def by_reference(case: InfusionCase) -> Callable[..., Tensor]:
    return lambda **arguments: FUNCTIONS[type(case)](**arguments, impl="reference")


def check(case: InfusionCase, dtype: torch.dtype, candidate: Callable[..., Any] | None = None, **settings: Any) -> None:
    with poisoned_empty():
        check_operation(
            candidate or by_kernel(case),
            by_reference(case),
            case.make(dtype, DEVICE),
            case.options(DEVICE),
            reduction=case.reductions,
            output_names=case.outputs,
            **settings,
        )


def run(case: InfusionCase, inputs: dict[str, Any], needs: tuple[bool, ...] | None = None, **options: Any) -> list[Any]:
    """Output and gradients, None where there is none."""
    wanted = needs or (True,) * len(inputs)
    leaves = {
        name: each.detach().requires_grad_(need) for (name, each), need in zip(inputs.items(), wanted, strict=True)
    }
    output = by_kernel(case)(**leaves, **{**case.options(DEVICE), **options})
    columns = torch.arange(1, output.shape[-1] + 1, device=DEVICE)
    if any(wanted):
        output.backward((torch.ones_like(output) * columns.sin()).to(output.dtype))
    return [output.detach(), *(each.grad for each in leaves.values())]


@settings(max_examples=12)
@given(case=infused_attention_cases())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_attention_is_within_the_budget(dtype: torch.dtype, case: InfusedAttentionCase) -> None:
    check(case, dtype)


@settings(max_examples=10)
@given(case=gate_cases())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_gate_is_within_the_budget(dtype: torch.dtype, case: GateCase) -> None:
    check(case, dtype)


@settings(max_examples=10)
@given(case=swiglu_cases())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_swiglu_is_within_the_budget(dtype: torch.dtype, case: SwigluCase) -> None:
    check(case, dtype)


@pytest.mark.parametrize(
    "case",
    [
        InfusedAttentionCase(1, 1, 1, 1, 1),
        InfusedAttentionCase(1, 2, 1, 70, 16, lengths=(65,)),
        InfusedAttentionCase(2, 2, 2, 40, 256, causal=False),
        InfusedAttentionCase(1, 3, 1, 33, 100, layout="packed", scale=0.0),
        InfusedAttentionCase(2, 4, 2, 70, 16, last=True, lengths=(70, 0)),
        InfusedAttentionCase(2, 2, 1, 5, 16, lengths=(0, 0)),
        GateCase(1, 1, 1, 1),
        GateCase(2, 70, 3, 16),
        GateCase(1, 2, 600, 16, lengths=(513,)),
        GateCase(1, 2, 40, 256),
        SwigluCase(1, 1, 1),
        SwigluCase(2, 129, 1030),
    ],
    ids=str,
)
def test_corners(case: InfusionCase) -> None:
    check(case, torch.float32)


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("keys", [16, 32, 64])
def test_every_tile_gives_the_same(rows: int, keys: int) -> None:
    case = InfusedAttentionCase(2, 4, 2, 50, 16, lengths=(50, 37))
    inputs, lengths = tuple(case.make(device=DEVICE).values()), case.options(DEVICE)["lengths"]
    flags = {"replace": False, "causal": True, "scale": 0.25}

    def once(tile: Tile | None, tiles: BackwardTiles | None) -> tuple[Any, ...]:
        output, lse = triton_forward.infused_attention_forward(*inputs, lengths, **flags, tile=tile)
        found = triton_backward.infused_attention_backward(
            output, *inputs, lengths, lse, **flags, needs=(True,) * 7, tiles=tiles
        )
        return output, *found

    tile = Tile(rows, keys, 4, 1)
    with poisoned_empty():
        for one, other in zip(once(tile, BackwardTiles(tile, tile)), once(None, None), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zero", ["value", "value_shift", "both"])
def test_a_gate_of_zeros_has_finite_gradients(zero: str) -> None:
    case = GateCase(2, 2, 3, 16)
    inputs: dict[str, Any] = case.make(device=DEVICE)
    for name in ("value", "value_shift"):
        if zero in (name, "both"):
            inputs[name] = torch.zeros_like(inputs[name])
    gate, *found = run(case, inputs)
    torch.testing.assert_close(gate, inputs["head_bias"].sigmoid().expand(2, -1))
    leaves = {name: each.detach().requires_grad_() for name, each in inputs.items()}
    want = torch.autograd.grad(infusion_gate(**leaves, impl="reference").sum(), list(leaves.values()))
    ours = {name: each.detach().requires_grad_() for name, each in inputs.items()}
    got = torch.autograd.grad(infusion_gate(**ours, impl="triton").sum(), list(ours.values()))
    for one, other, third in zip(got, want, found, strict=True):
        assert one.isfinite().all()
        assert third.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


STABLE = (
    InfusedAttentionCase(3, 4, 2, 40, 16, lengths=(40, 11, 23)),
    InfusedAttentionCase(3, 2, 2, 20, 16, lengths=(20, 11, 3)),
    GateCase(3, 2, 40, 16, lengths=(40, 11, 23)),
    SwigluCase(3, 70, 40),
)


@pytest.mark.parametrize("case", STABLE, ids=str)
def test_nan_stays_in_its_sample_and_bits_do_not_depend_on_the_batch(case: InfusionCase) -> None:
    inputs: dict[str, Any] = case.make(device=DEVICE)
    whole = run(case, inputs)
    assert_bits_equal(run(case, inputs), whole)
    torn = {
        name: each if name == "head_bias" else torch.cat([each[:1], each[1:] * math.nan])
        for name, each in inputs.items()
    }
    shared = "head_bias" in inputs
    for one, other in zip(run(case, torn)[: -1 if shared else None], whole[: -1 if shared else None], strict=True):
        assert_bits_equal(one[:1], other[:1])
    lengths = case.options(DEVICE).get("lengths")
    alone = {name: each if name == "head_bias" else each[2:] for name, each in inputs.items()}
    options = {} if lengths is None else {"lengths": lengths[2:]}
    found = run(dataclasses.replace(case, batch=1), alone, **options)
    for one, other in zip(found[: -1 if shared else None], whole[: -1 if shared else None], strict=True):
        assert_bits_equal(one, other[2:])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("case", STABLE[:3], ids=str)
def test_padding_reaches_nobody(case: InfusedAttentionCase | GateCase, bad: float) -> None:
    inputs: dict[str, Any] = case.make(device=DEVICE)
    torn = {name: each.clone() for name, each in inputs.items()}
    for name in {"query", "key", "value"} & set(inputs):
        for sample, length in enumerate(case.lengths or ()):
            torn[name][sample, :, length:] = bad
    for one, other in zip(run(case, torn), run(case, inputs), strict=True):
        assert_bits_equal(one, other)


class Recorder:
    """Counts the launches of a kernel, and lets them through."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches += 1
        return self.kernel[grid]


ATTENTION, GROUPED = InfusedAttentionCase(2, 2, 2, 20, 16), InfusedAttentionCase(2, 4, 2, 20, 16)
GATE, SWIGLU, LONG_SWIGLU = GateCase(2, 2, 5, 16), SwigluCase(2, 5, 16), SwigluCase(1, 70, 16)
COSTS: dict[str, tuple[InfusionCase, str, tuple[int, ...], int, int]] = {
    # case, needs, launches, allocations, tensors saved
    "attention, all": (ATTENTION, "1111111", (1, 1, 1, 0), 10, 8),
    "attention, vectors": (ATTENTION, "0001111", (1, 1, 0, 0), 6, 8),
    "attention, rows": (ATTENTION, "1110000", (1, 1, 1, 0), 6, 8),
    "attention, value": (ATTENTION, "0010000", (1, 0, 1, 0), 3, 8),
    "attention, key": (ATTENTION, "0100000", (1, 1, 1, 0), 4, 8),
    "attention, nothing": (ATTENTION, "0000000", (1, 0, 0, 0), 1, 0),
    "groups, all": (GROUPED, "1111111", (1, 1, 1, 1), 11, 8),
    "groups, vectors": (GROUPED, "0001111", (1, 1, 0, 1), 7, 8),
    "groups, rows": (GROUPED, "1110000", (1, 1, 1, 0), 6, 8),
    "gate, all": (GATE, "111", (1, 1, 1), 7, 5),
    "gate, frozen value": (GATE, "011", (1, 1, 1), 6, 4),
    "gate, shift": (GATE, "010", (1, 1, 0), 4, 4),
    "gate, nothing": (GATE, "000", (1, 0, 0), 1, 0),
    "swiglu, all": (SWIGLU, "111", (1, 1, 0), 4, 3),
    "swiglu, multiplier": (SWIGLU, "001", (1, 1, 0), 2, 2),
    "swiglu, up": (SWIGLU, "010", (1, 1, 0), 2, 2),
    "swiglu, nothing": (SWIGLU, "000", (1, 0, 0), 1, 0),
    "long swiglu, multiplier": (LONG_SWIGLU, "001", (1, 1, 1), 3, 2),
}
KERNELS: dict[type, tuple[tuple[Any, str], ...]] = {
    InfusedAttentionCase: (
        (triton_forward, "_forward_kernel"),
        (triton_backward, "_row_kernel"),
        (triton_backward, "_key_kernel"),
        (triton_backward, "_vector_kernel"),
    ),
    GateCase: tuple((gate_kernels, name) for name in ("_forward_kernel", "_backward_kernel", "_bias_kernel")),
    SwigluCase: tuple((swiglu_kernels, name) for name in ("_forward_kernel", "_backward_kernel", "_sum_kernel")),
}


@pytest.mark.parametrize("name", COSTS)
def test_what_is_launched_allocated_and_saved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs no gradient costs no kernel, no memory, no saved tensor; the gradients that are left are the same."""
    case, pattern, launches, allocations, saved = COSTS[name]
    needs = tuple(each == "1" for each in pattern)
    inputs: dict[str, Any] = case.make(device=DEVICE)
    full = run(case, inputs)
    recorders = [Recorder(getattr(module, kernel)) for module, kernel in KERNELS[type(case)]]
    for (module, kernel), recorder in zip(KERNELS[type(case)], recorders, strict=True):
        monkeypatch.setattr(module, kernel, recorder)
    plan.forget()
    kept: list[Tensor] = []
    with (
        poisoned_empty() as poison,
        torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each),
    ):
        found = run(case, inputs, needs)
    assert tuple(each.launches for each in recorders) == launches
    assert poison.allocations == allocations
    assert len(kept) == saved
    for needed, got, want in zip((True, *needs), found, full, strict=True):
        assert (got is not None) == needed
        if got is not None:
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("case", [ATTENTION, GROUPED, GATE, SWIGLU], ids=str)
def test_gradients_that_autograd_makes_of_a_scalar(case: InfusionCase) -> None:
    """Expanded, with strides of zero; and a gate, multipliers and shift expanded as well."""
    inputs: dict[str, Any] = case.make(device=DEVICE)
    for name in {"gate", "value_shift"} & set(inputs):
        inputs[name] = torch.full((1,) * inputs[name].dim(), 0.5, device=DEVICE).expand_as(inputs[name])
    results = []
    for call in (by_kernel(case), by_reference(case)):
        leaves = {name: each.detach().requires_grad_() for name, each in inputs.items()}
        results.append(torch.autograd.grad(call(**leaves, **case.options(DEVICE)).sum(), list(leaves.values())))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "case",
    [
        InfusedAttentionCase(0, 2, 2, 3, 16),
        InfusedAttentionCase(2, 2, 2, 0, 16),
        InfusedAttentionCase(2, 2, 2, 0, 16, last=True),
        GateCase(0, 2, 3, 16),
        GateCase(2, 2, 0, 16),
        SwigluCase(0, 3, 16),
        SwigluCase(2, 0, 16),
        SwigluCase(2, 3, 0),
    ],
    ids=str,
)
def test_nothing_at_all(case: InfusionCase) -> None:
    inputs: dict[str, Any] = case.make(device=DEVICE)
    with poisoned_empty():
        output, *found = run(case, inputs)
    torch.testing.assert_close(output, by_reference(case)(**inputs, **case.options(DEVICE)))
    assert all(each.isfinite().all() for each in found)


@pytest.mark.parametrize("case", [ATTENTION, GROUPED, GATE, SWIGLU], ids=str)
def test_a_compiled_call_is_whole(case: InfusionCase) -> None:
    torch._dynamo.reset()
    check(case, torch.float32, torch.compile(by_kernel(case), backend="aot_eager", fullgraph=True))


@pytest.mark.parametrize("kind", [InfusedAttentionCase, GateCase, SwigluCase])
def test_one_graph_serves_every_size(kind: type) -> None:
    """The first size, then one more graph in which batch and tokens are symbols."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda **given: FUNCTIONS[kind](**given, impl="triton"), backend=counter, fullgraph=True)
    for batch, tokens in ((2, 4), (3, 9), (5, 7), (2, 70)):
        if kind is SwigluCase:
            case: Any = SwigluCase(batch, tokens, 16)
        elif kind is GateCase:
            case = GateCase(batch, 2, tokens, 16, lengths=(3,) * batch)
        else:
            case = InfusedAttentionCase(batch, 2, 2, tokens, 16, lengths=(3,) * batch)
        inputs = {name: each.requires_grad_() for name, each in case.make(device=DEVICE).items()}
        compiled(**inputs, **case.options(DEVICE)).sum().backward()
    assert counter.frame_count <= 2


def test_what_the_kernels_cannot_take_is_said() -> None:
    for case, reasons in (
        (InfusedAttentionCase(1, 1, 1, 2, 300), ("key is torch.float64", "head_dim is 300; the kernel takes 1 to 256")),
        (GateCase(1, 1, 2, 300), ("value is torch.float64", "head_dim is 300; the kernel takes 1 to 256")),
        (SwigluCase(1, 2, 3), ("multiplier is torch.float64",)),
    ):
        with pytest.raises(ImplementationError) as caught:
            by_kernel(case)(**case.make(torch.float64, DEVICE))
        for reason in reasons:
            assert reason in str(caught.value)


def test_calls_without_gradients_save_no_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, flag, case in (("infused_attention", "save_lse", ATTENTION), ("infusion_gate", "save", GATE)):
        module = sys.modules[f"epic_fast.ops.{name}"]
        forward, backward = module._launchers()
        asked: list[bool] = []

        def spy(*tensors: Any, forward: Any = forward, flag: str = flag, asked: Any = asked, **options: Any) -> Any:
            asked.append(options[flag])
            return forward(*tensors, **options)

        monkeypatch.setattr(module, "_launchers", lambda spy=spy, backward=backward: (spy, backward))
        inputs: dict[str, Any] = case.make(device=DEVICE)
        run(case, inputs, (False,) * len(inputs))
        run(case, inputs)
        assert asked == [False, True]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        *(*INFUSED_MEASURED, *INFUSED_PRODUCTION),
        *(*GATE_MEASURED, *GATE_PRODUCTION),
        *(*SWIGLU_MEASURED, *SWIGLU_PRODUCTION),
    ],
    ids=lambda case: f"{type(case).__name__}, {case.name}",
)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_production_shapes_are_within_the_budget(dtype: torch.dtype, case: InfusionCase) -> None:
    check(case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["attention", "groups", "gate", "swiglu"])
def test_triton_compiles_nothing_for_a_new_size(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a class of lengths has been seen, no size in it compiles again."""
    from triton import knobs

    def train(batch: int, tokens: int) -> None:
        lengths = tuple(max(tokens - each, 0) for each in range(batch))
        if kind == "swiglu":
            case: Any = SwigluCase(batch, tokens, 64)
        elif kind == "gate":
            case = GateCase(batch, 4, tokens, 64, lengths=lengths)
        else:
            case = InfusedAttentionCase(batch, 4, 4 if kind == "attention" else 2, tokens, 64, lengths=lengths)
        run(case, case.make(torch.bfloat16, "cuda"))

    for tokens in (2, 16, 20, 50, 64, 65, 200):
        train(2, tokens)
    compiled: list[Any] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda *args, **kwargs: compiled.append(args))
    random = torch.Generator().manual_seed(0)
    sizes = [torch.randint(*bounds, (20,), generator=random).tolist() for bounds in ((1, 6), (2, 300))]
    for batch, tokens in zip(*sizes, strict=True):
        train(batch, tokens)
    assert not compiled


@pytest.mark.gpu
@pytest.mark.parametrize("case", [INFUSED_PRODUCTION[0], GATE_PRODUCTION[0], SWIGLU_PRODUCTION[1]], ids=str)
def test_inductor_takes_it_whole(case: InfusionCase) -> None:
    torch._dynamo.reset()
    check(case, torch.bfloat16, torch.compile(by_kernel(case), fullgraph=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [INFUSED_PRODUCTION[0], INFUSED_PRODUCTION[-1], GATE_PRODUCTION[0], SWIGLU_PRODUCTION[1]], ids=str
)
def test_a_cuda_graph_replays_a_training_step(case: InfusionCase) -> None:
    inputs: dict[str, Any] = {
        name: each.requires_grad_() for name, each in case.make(torch.bfloat16, "cuda").items() if each is not None
    }
    options = case.options("cuda")

    def step() -> list[Tensor]:
        output = by_kernel(case)(**inputs, **options)
        return [output, *torch.autograd.grad(output, list(inputs.values()), torch.ones_like(output))]

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


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [INFUSED_PRODUCTION[0], INFUSED_PRODUCTION[-1], GATE_PRODUCTION[0], SWIGLU_PRODUCTION[1]], ids=str
)
def test_a_planned_call_has_the_bits_of_the_first(case: InfusionCase) -> None:
    """The second call goes straight to CUDA's driver."""
    inputs: dict[str, Any] = case.make(torch.bfloat16, "cuda")
    plan.forget()
    first = run(case, inputs)
    with poisoned_empty():
        for _ in range(2):
            assert_bits_equal(run(case, inputs), first)
