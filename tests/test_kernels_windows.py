"""The Triton kernels of window attention against float64: interpreted on the CPU, compiled where there is a GPU."""

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
from epic_fast.functional import window_prompt_attention
from epic_fast.kernels.common import plan  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.window_prompt_attention import triton_backward, triton_windows  # pyright: ignore
from epic_fast.kernels.window_prompt_attention.reference import window_prompt_attention as reference  # pyright: ignore
from epic_fast.kernels.window_prompt_attention.tiles import BackwardTiles, WindowTile  # pyright: ignore
from epic_fast.kernels.window_prompt_attention.triton_backward import (  # pyright: ignore[reportMissingImports]
    window_prompt_attention_backward,
)
from epic_fast.kernels.window_prompt_attention.triton_forward import (  # pyright: ignore[reportMissingImports]
    window_prompt_attention_forward,
)
from epic_fast.testing.cases import WINDOW_MEASURED, WINDOW_PRODUCTION, WindowCase, window_cases
from epic_fast.testing.numerics import assert_bits_equal, check_operation, poisoned_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
NAMES = ("query", "key", "value", "prompt_query", "prompt_key", "prompt_value")
ALL = (True,) * 6 + (False,)

# Tiles so small that every loop turns more than once at a size that the interpreter can do.
LOOP = WindowTile(rows=16, keys=32, warps=4, stages=1, windows=2)
WHOLE = WindowTile(rows=32, keys=32, warps=4, stages=1, windows=2)
HELD = dataclasses.replace(WHOLE, hold=True)
BACKWARDS = {
    "two kernels": BackwardTiles(LOOP, WindowTile(rows=32, keys=16, warps=4, stages=1, windows=3)),
    "whole": BackwardTiles(LOOP, LOOP, whole=WHOLE, bias=WHOLE),
    "held": BackwardTiles(LOOP, LOOP, whole=HELD, bias=HELD),
}
FORWARDS = {"loop": LOOP, "whole": WHOLE, "held": HELD}


class _Attention(torch.autograd.Function):
    """The two launchers, as autograd would call them."""

    @staticmethod
    def forward(ctx: Any, tile: Any, tiles: Any, mask: Any, scale: float, *inputs: Any) -> Any:
        output, prompt_output, lse = window_prompt_attention_forward(*inputs, mask, scale=scale, tile=tile)
        ctx.saved, ctx.scale, ctx.tiles = (*inputs, mask, lse), scale, tiles
        ctx.set_materialize_grads(False)
        return output, prompt_output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needs = ctx.needs_input_grad[4:]
        found = window_prompt_attention_backward(*grads, *ctx.saved, scale=ctx.scale, needs=needs, tiles=ctx.tiles)
        return None, None, None, None, *found


def kernels(tile: WindowTile | None = None, tiles: BackwardTiles | None = None) -> Callable[..., Any]:
    def attention(**given: Any) -> tuple[Tensor, Tensor]:
        inputs = [given[name] for name in NAMES]
        scale = inputs[0].shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
        return _Attention.apply(tile, tiles, given["window_mask"], scale, *inputs, given["relative_position_bias"])

    return attention


def check(case: WindowCase, dtype: torch.dtype, candidate: Callable[..., Any] | None = None, **settings: Any) -> None:
    with poisoned_empty():
        check_operation(
            candidate or kernels(),
            reference,
            case.make(dtype, DEVICE),
            case.options(DEVICE),
            reduction=case.reductions,
            output_names=case.outputs,
            **settings,
        )


def forward(case: WindowCase, inputs: dict[str, Any], **more: Any) -> tuple[Any, ...]:
    options = case.options(DEVICE)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    bias, mask = options["relative_position_bias"], options["window_mask"]
    return window_prompt_attention_forward(*inputs.values(), bias, mask, scale=scale, **more)


def backward(
    case: WindowCase, inputs: dict[str, Any], needs: tuple[bool, ...] = ALL, used: Any = (True, True), **more: Any
) -> tuple[Tensor | None, ...]:
    output, prompt_output, lse = forward(case, inputs)
    grads = [
        torch.ones_like(each) * torch.arange(1, each.shape[-1] + 1, device=DEVICE) / each.shape[-1] if use else None
        for each, use in zip((output, prompt_output), used, strict=True)
    ]
    options = case.options(DEVICE)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    bias, mask = options["relative_position_bias"], options["window_mask"]
    return window_prompt_attention_backward(*grads, *inputs.values(), bias, mask, lse, scale=scale, needs=needs, **more)


@settings(max_examples=6)
@given(case=window_cases(max_windows=3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_call_is_within_the_budget(dtype: torch.dtype, case: WindowCase) -> None:
    check(case, dtype, lambda **given: window_prompt_attention(**given, impl="triton"))


@pytest.mark.parametrize("more", [False, True], ids=["", "bias and mask"])
@pytest.mark.parametrize(("tile", "tiles"), [("loop", "two kernels"), ("whole", "whole"), ("held", "held")])
def test_every_form_of_the_kernels(tile: str, tiles: str, more: bool) -> None:
    """Several row tiles, key tiles and chunks, the last of each not full."""
    case = WindowCase(2, 5 if tile == "held" else 3, 1, 26 if tile == "loop" else 20, 7, 16, bias=more, mask=more)
    case = dataclasses.replace(case, bias_gradient=more and tiles != "two kernels")
    check(case, torch.float16, kernels(FORWARDS[tile], BACKWARDS[tiles]))


@pytest.mark.parametrize(
    "case",
    [
        WindowCase(1, 1, 1, 1, 0, 16),
        WindowCase(1, 1, 1, 1, 1, 16, bias=False),
        WindowCase(2, 3, 2, 5, 0, 20, mask=True, layout="heads"),
        WindowCase(1, 2, 1, 2, 40, 16, mask=True),
        WindowCase(2, 2, 1, 9, 3, 16, scale=-0.3),
        WindowCase(1, 2, 1, 9, 3, 16, scale=0.0),
        WindowCase(1, 9, 1, 5, 3, 72, layout="packed", scale=1.5, mask=True),
        WindowCase(1, 2, 1, 9, 3, 128),
        # The window of a Swin-B in one tile of 64 rows, and one row too many for it.
        WindowCase(1, 2, 1, 49, 13, 32, mask=True, bias_gradient=True),
        WindowCase(1, 1, 1, 49, 16, 32, mask=True),
    ],
    ids=str,
)
def test_corners(case: WindowCase) -> None:
    check(case, torch.float32)


@pytest.mark.parametrize("tiles", BACKWARDS)
@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["output", "prompt_output"])
def test_an_output_that_nobody_used(used: tuple[bool, bool], tiles: str) -> None:
    check(WindowCase(2, 3, 1, 9, 3, 16, mask=True), torch.float32, kernels(None, BACKWARDS[tiles]), used=used)


def test_no_gradient_comes_in() -> None:
    case = WindowCase(1, 2, 1, 5, 3, 16)
    with poisoned_empty():
        found = backward(case, case.make(torch.float32, DEVICE), used=(False, False))
    assert all(each is not None and not each.any() for each in found[:6])


@pytest.mark.parametrize("sizes", [(0, 2, 2, 5, 3), (2, 2, 0, 5, 3), (2, 2, 2, 0, 0)])
def test_nothing_to_do(sizes: tuple[int, ...]) -> None:
    case = WindowCase(*sizes, head_dim=16)  # pyright: ignore[reportArgumentType]
    inputs = case.make(torch.float32, DEVICE)
    for found, source in zip(backward(case, inputs), inputs.values(), strict=False):
        assert source is not None
        assert found is not None
        assert found.shape == source.shape


@pytest.mark.parametrize("tiles", BACKWARDS)
def test_a_row_that_sees_nothing_is_zero_with_gradient_zero(tiles: str) -> None:
    case = WindowCase(2, 2, 1, 9, 0, 16)
    inputs = case.make(torch.float32, DEVICE)
    mask = torch.ones(2, 9, 9, dtype=torch.bool, device=DEVICE)
    mask[1, 4] = False
    results = []
    for tile in FORWARDS.values():
        output, _, lse = window_prompt_attention_forward(*inputs.values(), None, mask, scale=0.25, tile=tile)
        assert not output[1::2, :, 4].any()
        assert lse[1::2, :, 4].eq(math.inf).all()
        results.append(output)
    found = window_prompt_attention_backward(
        *(torch.ones_like(output), None),
        *(*inputs.values(), None, mask, lse),
        scale=0.25,
        needs=ALL,
        tiles=BACKWARDS[tiles],
    )
    assert all(each is None or each.isfinite().all() for each in (*results, *found))
    assert found[0] is not None
    assert not found[0][1::2, :, 4].any()


def test_prompts_go_to_the_windows_of_their_own_sample() -> None:
    """Window w of sample b is row b * nW + w.  Prompts of sample 1 in the windows of sample 0, which is what counting
    w * B + b makes of it, reach its outputs; sample 0 must not notice them, forward or backward."""
    case = WindowCase(3, 3, 1, 9, 3, 16, mask=True)
    clean = case.make(torch.float32, DEVICE)
    torn = {name: each.clone() for name, each in clean.items() if each is not None}
    for name in NAMES:
        torn[name][len(torn[name]) // 3 :] = math.nan
    for tile, tiles in ((None, None), (LOOP, BACKWARDS["two kernels"]), (HELD, BACKWARDS["held"])):
        with poisoned_empty():
            once = forward(case, clean, tile=tile), backward(case, clean, tiles=tiles)
            again = forward(case, torn, tile=tile), backward(case, torn, tiles=tiles)
        for one, other in zip((*once[0], *once[1]), (*again[0], *again[1]), strict=True):
            if one is not None:
                own = len(one) // 3
                assert one[:own].isfinite().all()
                assert_bits_equal(one[:own], other[:own])
                assert other[own:].isnan().all()


def test_a_samples_bits_do_not_depend_on_its_batch() -> None:
    case = WindowCase(2, 9, 1, 9, 3, 16, mask=True, layout="packed")
    inputs = case.make(torch.float32, DEVICE)
    together = [*forward(case, inputs), *backward(case, inputs)]
    for sample in range(2):
        own = {
            name: each[len(each) // 2 * sample : len(each) // 2 * (sample + 1)]
            for name, each in inputs.items()
            if each is not None
        }
        alone = dataclasses.replace(case, batch=1)
        for one, other in zip([*forward(alone, own), *backward(alone, own)], together, strict=True):
            if one is not None:
                assert_bits_equal(one, other[len(one) * sample : len(one) * (sample + 1)])


def test_two_runs_give_the_same_bits() -> None:
    case = WindowCase(1, 9, 1, 12, 3, 16, mask=True)
    inputs = case.make(torch.float16, DEVICE)
    needs = (True,) * 7
    first = [*forward(case, inputs), *backward(case, inputs, needs)]
    for _ in range(2):
        assert_bits_equal([*forward(case, inputs), *backward(case, inputs, needs)], first)


def test_strides_and_addresses_of_every_kind() -> None:
    """Rows that do not start at multiples of 16 bytes, expanded masks, a bias that is a slice; the same values."""
    case = WindowCase(2, 2, 2, 9, 3, 24)
    inputs = {name: each.contiguous() for name, each in case.make(torch.float32, DEVICE).items() if each is not None}
    seen = (torch.rand(9, 9, device=DEVICE) < 0.6) | torch.eye(9, dtype=torch.bool, device=DEVICE)
    bias = torch.randn(2, 9, 9, device=DEVICE)

    def odd(tensor: Tensor) -> Tensor:
        wider = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan, device=DEVICE, dtype=tensor.dtype)
        wider[..., 1:-2] = tensor
        return wider[..., 1:-2]

    want = window_prompt_attention_forward(*inputs.values(), bias, seen.expand(2, 9, 9).contiguous(), scale=0.2)
    got = window_prompt_attention_forward(
        *map(odd, inputs.values()), odd(bias), seen.mT.contiguous().mT.expand(2, 9, 9), scale=0.2
    )
    assert_bits_equal(got, want)
    grads = torch.randn_like(want[0]), torch.randn_like(want[1])
    want = window_prompt_attention_backward(
        *grads, *inputs.values(), bias, seen.expand(2, 9, 9), want[2], scale=0.2, needs=(True,) * 7
    )
    got = window_prompt_attention_backward(
        *map(odd, grads), *map(odd, inputs.values()), odd(bias), seen.expand(2, 9, 9), got[2], scale=0.2,
        needs=(True,) * 7,
    )  # fmt: skip
    assert_bits_equal(got, want)


class Recorder:
    """Counts the launches of a kernel, and lets them through."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.programs = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.programs.append(grid[0])
        return self.kernel[grid]


NEEDS = {
    # needs: programs of (query kernel, key kernel, sums) and of (whole kernel, sums), allocations of both
    "everything": ((1, 1, 1, 1, 1, 1, 0), (3, 2, 2), (3, 1), (10, 9)),
    "prompts only": ((0, 0, 0, 1, 1, 1, 0), (3, 2, 2), (3, 1), (7, 6)),
    "query": ((1, 0, 0, 0, 0, 0, 0), (3, 0, 0), (3, 0), (1, 1)),
    "prompt_query": ((0, 0, 0, 1, 0, 0, 0), (3, 0, 1), (3, 1), (2, 2)),
    "value": ((0, 0, 1, 0, 0, 0, 0), (0, 2, 0), (3, 0), (1, 1)),
    "prompt_key": ((0, 0, 0, 0, 1, 0, 0), (3, 2, 1), (3, 1), (3, 2)),
    "tokens": ((1, 1, 1, 0, 0, 0, 0), (3, 2, 0), (3, 0), (4, 3)),
    "nothing": ((0, 0, 0, 0, 0, 0, 0), (0, 0, 0), (0, 0), (0, 0)),
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_is_not_needed_is_neither_computed_nor_allocated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # 5 windows of 13 rows: 3 chunks of 2, or 2 of 3, each of one row tile and one key tile.
    case = WindowCase(1, 5, 1, 10, 3, 16)
    inputs = case.make(torch.float32, DEVICE)
    full = backward(case, inputs)
    names = ("_query_kernel", "_key_kernel", "_whole_kernel")
    recorders = {each: Recorder(getattr(triton_backward, each)) for each in names}
    for each, recorder in recorders.items():
        monkeypatch.setattr(triton_backward, each, recorder)
    sums = recorders["_sum_kernel"] = Recorder(triton_windows._sum_kernel)
    monkeypatch.setattr(triton_windows, "_sum_kernel", sums)
    pattern, general, whole, allocations = NEEDS[name]
    needs = tuple(map(bool, pattern))
    for tiles, programs, allocated in (
        (BACKWARDS["two kernels"], (*general[:2], 0, general[2]), allocations[0]),
        (BACKWARDS["whole"], (0, 0, *whole), allocations[1]),
    ):
        output, prompt_output, lse = forward(case, inputs)
        plan.forget()
        for recorder in recorders.values():
            recorder.programs.clear()
        options = case.options(DEVICE)
        grads = [torch.ones_like(each) * torch.arange(1, 17, device=DEVICE) / 16 for each in (output, prompt_output)]
        with poisoned_empty() as poison:
            found = window_prompt_attention_backward(
                *(*grads, *inputs.values(), options["relative_position_bias"], None, lse),
                scale=0.25,
                needs=needs,
                tiles=tiles,
            )
        assert tuple(sum(each.programs) for each in recorders.values()) == programs
        assert poison.allocations == allocated
        for needed, got, want in zip(needs, found, full, strict=True):
            assert (got is not None) == needed
            if got is not None:
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_a_swin_window_takes_one_launch_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one more where a sample has more windows than a program takes."""
    recorder, sums = Recorder(triton_backward._whole_kernel), Recorder(triton_windows._sum_kernel)
    monkeypatch.setattr(triton_backward, "_whole_kernel", recorder)
    monkeypatch.setattr(triton_windows, "_sum_kernel", sums)
    for windows, chunks in ((4, 1), (9, 2)):
        case = WindowCase(1, windows, 2, 49, 13, 32)
        backward(case, case.make(torch.float16, DEVICE))
        assert recorder.programs.pop() == 2 * chunks
        assert sum(sums.programs) == (0 if chunks == 1 else 2 * 2)


def test_the_bias_has_a_gradient_in_whole_windows_only() -> None:
    case = WindowCase(1, 1, 1, 60, 5, 16, bias_gradient=True)
    inputs = {name: each if each is None else each.requires_grad_() for name, each in case.make(device=DEVICE).items()}
    with pytest.raises(ImplementationError, match="needs a gradient in windows of 65 rows, prompts included"):
        window_prompt_attention(**inputs, impl="triton")
    assert window_prompt_attention(**inputs)[0].requires_grad  # by the reference
    with torch.no_grad():
        window_prompt_attention(**inputs, impl="triton")
    with pytest.raises(ValueError, match="got 65 rows of head_dim 16; wanted at most 64 of 64"):
        backward(dataclasses.replace(case, bias_gradient=False), dict(list(inputs.items())[:6]), (True,) * 7)


def test_what_the_kernel_cannot_take_is_said() -> None:
    case = WindowCase(1, 1, 1, 3, 2, 136)
    inputs = case.make(torch.float64, DEVICE)
    with pytest.raises(ImplementationError) as caught:
        window_prompt_attention(
            **inputs, relative_position_bias=torch.zeros(1, 3, 3, dtype=torch.float64, device=DEVICE), impl="triton"
        )
    for reason in ("the tensors are torch.float64", "head_dim is 136", "relative_position_bias is torch.float64"):
        assert reason in str(caught.value)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_call_through_autograd_is_within_the_budget(compiled: bool) -> None:
    """Also in one graph without a break."""

    def call(**arguments: Any) -> Any:
        return window_prompt_attention(**arguments, impl="triton")

    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    check(WindowCase(2, 3, 1, 9, 3, 16, mask=True, bias_gradient=True), torch.float32, call)


def test_one_graph_serves_every_size() -> None:
    """The first size, then one more graph in which batch, windows, tokens and prompts are symbols."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda **given: window_prompt_attention(**given, impl="triton"), backend=counter, fullgraph=True
    )
    for sizes in ((2, 2, 1, 4, 3), (3, 3, 1, 9, 2), (2, 3, 1, 62, 6)):
        case = WindowCase(*sizes, head_dim=16, mask=True)
        inputs = {name: each.requires_grad_() for name, each in case.make(device=DEVICE).items() if each is not None}
        torch.autograd.backward([each.sum() for each in compiled(**inputs, **case.options(DEVICE))])
    assert counter.frame_count <= 2


def test_frozen_inputs_have_no_graph_and_no_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["epic_fast.ops.window_prompt_attention"]
    forward_launcher, backward_launcher = module._launchers()
    asked: list[Any] = []

    def spy(*tensors: Any, save_lse: bool, **options: Any) -> Any:
        asked.append(save_lse)
        return forward_launcher(*tensors, save_lse=save_lse, **options)

    def spy_back(*tensors: Any, needs: Any, **options: Any) -> Any:
        asked.append(needs)
        return backward_launcher(*tensors, needs=needs, **options)

    monkeypatch.setattr(module, "_launchers", lambda: (spy, spy_back))
    case = WindowCase(1, 2, 1, 5, 3, 16)
    arguments = {**case.make(device=DEVICE), **case.options(DEVICE), "impl": "triton"}
    assert window_prompt_attention(**arguments)[0].grad_fn is None
    arguments["prompt_value"].requires_grad_()
    window_prompt_attention(**arguments)[0].sum().backward()
    assert asked == [False, True, (False,) * 5 + (True, False)]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*WINDOW_MEASURED, *WINDOW_PRODUCTION], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_production_shapes_are_within_the_budget(dtype: torch.dtype, case: WindowCase) -> None:
    check(dataclasses.replace(case, batch=min(case.batch, 8)), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", BACKWARDS)
@pytest.mark.parametrize("tile", FORWARDS)
def test_every_form_of_the_kernels_on_a_gpu(tile: str, tiles: str) -> None:
    case = WindowCase(2, 5, 3, 20, 7, 32, mask=True, bias_gradient=tiles != "two kernels")
    check(case, torch.bfloat16, kernels(FORWARDS[tile], BACKWARDS[tiles]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Swin-B, stage 0, shifted", "Swin-B, stage 2"])
def test_a_cuda_graph_replays_a_training_step(name: str) -> None:
    (case,) = [each for each in WINDOW_MEASURED if each.name == name]
    case = dataclasses.replace(case, batch=4)
    inputs = {
        key: each if each is None else each.requires_grad_() for key, each in case.make(torch.bfloat16, "cuda").items()
    }
    options, leaves = case.options("cuda"), [each for each in inputs.values() if each is not None]

    def step() -> list[Tensor]:
        outputs = window_prompt_attention(**inputs, **options, impl="triton")
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(each) for each in outputs])]

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
