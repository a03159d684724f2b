"""The operators and what stands above them, with the Triton kernels run by Triton's interpreter on the CPU.

How exact the kernels are is tested beside them; here it is whether a call reaches them whole: through autograd,
autocast, ``torch.compile`` and every kind of input.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from epic_fast.errors import ConfigError, ImplementationError
from epic_fast.functional import prompt_attention, prompt_interaction
from epic_fast.ops import frozen_linear, library
from epic_fast.ops import merge_patches as merge_operation
from epic_fast.ops import prompt_attention as attention_operation
from epic_fast.ops import prompt_interaction as interaction_operation
from epic_fast.ops import route_prompts as route_operation
from epic_fast.ops.residual_norm import moved_norm_forward
from epic_fast.ops.route_prompts import probe_through as probe_through_weights
from epic_fast.testing.cases import (
    AttentionCase,
    GateCase,
    InfusedAttentionCase,
    InteractionCase,
    MergeCase,
    MixCase,
    RouteCase,
    SwigluCase,
    WindowCase,
)
from epic_fast.testing.numerics import assert_bits_equal, check_operation

if not library.TRITON_INSTALLED:
    pytest.skip("triton is not installed", allow_module_level=True)

attention_module = sys.modules["epic_fast.ops.prompt_attention"]
interaction_module = sys.modules["epic_fast.ops.prompt_interaction"]

ATTENTION = ("query", "key", "value", "prompt_query", "prompt_key", "prompt_value")
INTERACTION = interaction_module.NAMES


@pytest.fixture(autouse=True)
def interpreted() -> None:
    if not library.interpreting():
        pytest.skip("Triton's interpreter is off: a GPU is there, and tests/test_ops_gpu.py")


def by_kernel(function: Callable[..., Any], compiled: bool = False) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        return function(**arguments, impl="triton")

    if not compiled:
        return call
    torch._dynamo.reset()
    return torch.compile(call, backend="aot_eager", fullgraph=True)


def by_reference(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **arguments: function(**arguments, impl="reference")


def make(case: AttentionCase | InteractionCase, **how: Any) -> dict[str, Tensor | None]:
    return {name: None if each is None else each.requires_grad_() for name, each in case.make(**how).items()}


ATTENTION_CASES = {
    "full": AttentionCase(2, 2, 5, 3, 16),
    "causal, lengths, packed": AttentionCase(3, 2, 18, 2, 16, causal=True, lengths=(18, 0, 7), layout="packed"),
    "prefix, shared, odd width": AttentionCase(2, 1, 6, 4, 24, prompt_mask="prefix", shared=True, layout="tokens"),
    "prefix tuning": AttentionCase(2, 2, 5, 3, 16, prefix_tuning=True, shared=True, scale=0.3),
    "no prompts": AttentionCase(2, 2, 5, 0, 8, causal=True),
}
INTERACTION_CASES = {
    "scalar gates": InteractionCase(2, 3, 4, 16, 24),
    "channel gates": InteractionCase(3, 2, 2, 20, 16, channel_gates=True),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ATTENTION_CASES)
def test_attention_is_within_its_error_budget(name: str, compiled: bool) -> None:
    case = ATTENTION_CASES[name]
    check_operation(
        by_kernel(prompt_attention, compiled),
        by_reference(prompt_attention),
        case.make(torch.float32),
        case.options(),
        reduction=case.reductions,
        output_names=case.outputs,
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", INTERACTION_CASES)
def test_interaction_is_within_its_error_budget(name: str, compiled: bool) -> None:
    case = INTERACTION_CASES[name]
    check_operation(
        by_kernel(prompt_interaction, compiled),
        by_reference(prompt_interaction),
        case.make(torch.float32),
        case.options(),
        reduction=case.reductions,
        output_names=case.outputs,
    )


def test_half_precision() -> None:
    case = ATTENTION_CASES["full"]
    check_operation(
        by_kernel(prompt_attention),
        by_reference(prompt_attention),
        case.make(torch.float16),
        case.options(),
        reduction=case.reductions,
        output_names=case.outputs,
    )


def attention_arguments(case: AttentionCase, *options: Any) -> list[Any]:
    return [*case.make().values(), case.options()["lengths"], *options]


OPERATORS: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {}


def operator(function: Callable[[], Any]) -> Callable[[], Any]:
    OPERATORS[function.__name__] = function
    return function


@operator
def prompt_attention_forward() -> Any:
    return tuple(attention_arguments(AttentionCase(2, 2, 4, 3, 16, lengths=(4, 2)), False, True, 0.25, True)), {}


@operator
def prompt_attention_forward_without_statistics() -> Any:
    case = AttentionCase(2, 2, 4, 3, 16, prefix_tuning=True, layout="tokens")
    return tuple(attention_arguments(case, False, False, 0.25, False)), {}


@operator
def prompt_attention_forward_out() -> Any:
    arguments = attention_arguments(AttentionCase(2, 2, 4, 3, 16), True, False, 0.25)
    return tuple(arguments), {"output": torch.zeros(2, 2, 4, 16), "prompt_output": torch.zeros(2, 2, 3, 16)}


def backward_arguments(case: AttentionCase, needs: list[bool], use: tuple[bool, bool] = (True, True)) -> Any:
    inputs = attention_arguments(case)
    output, prompt_output, lse = attention_module.FORWARD(*inputs, False, False, 0.25, True)
    grads = [torch.randn_like(each) if used else None for each, used in zip((output, prompt_output), use, strict=True)]
    return (*grads, *inputs, output, prompt_output, lse, False, False, 0.25, needs), {}


@operator
def prompt_attention_backward() -> Any:
    return backward_arguments(AttentionCase(2, 2, 4, 3, 16, shared=True, layout="tokens"), [True] * 6)


@operator
def prompt_attention_backward_of_some() -> Any:
    needs = [True, False, False, False, True, False]
    return backward_arguments(AttentionCase(2, 2, 4, 3, 16, lengths=(1, 4)), needs, use=(True, False))


@operator
def prompt_interaction_forward() -> Any:
    return (*InteractionCase(2, 3, 4, 16, 20).make().values(), 1e-6), {}


@operator
def prompt_interaction_forward_out() -> Any:
    arguments = (*InteractionCase(2, 3, 4, 16, 20).make().values(), 1e-6)
    return arguments, {"next_text": torch.zeros(2, 3, 16), "next_vision": torch.zeros(2, 4, 20)}


@operator
def prompt_interaction_backward() -> Any:
    inputs = InteractionCase(2, 3, 4, 16, 20, channel_gates=True).make()
    grads = torch.randn(2, 3, 16), torch.randn(2, 4, 20)
    return (*grads, *inputs.values(), 1e-6, [True] * 9), {}


@operator
def prompt_interaction_backward_of_some() -> Any:
    inputs = InteractionCase(2, 3, 4, 16, 20).make()
    return (torch.randn(2, 3, 16), None, *inputs.values(), 1e-6, [index % 3 == 0 for index in range(9)]), {}


def window_arguments(**more: Any) -> list[Any]:
    case = WindowCase(2, 2, 2, 5, 3, 16, mask=True, **more)
    options = case.options()
    return [*case.make().values(), options["relative_position_bias"], options["window_mask"]]


@operator
def window_prompt_attention_forward() -> Any:
    return (*window_arguments(layout="packed"), 0.25, True), {}


@operator
def window_prompt_attention_forward_without_statistics() -> Any:
    return (*window_arguments()[:6], None, None, 0.25, False), {}


@operator
def window_prompt_attention_backward() -> Any:
    inputs = window_arguments()
    output, prompt_output, lse = torch.ops.epic_fast.window_prompt_attention_forward(*inputs, 0.25, True)
    return (torch.randn_like(output), torch.randn_like(prompt_output), *inputs, lse, 0.25, [True] * 7), {}


@operator
def window_prompt_attention_backward_of_some() -> Any:
    inputs = window_arguments()
    output, _, lse = torch.ops.epic_fast.window_prompt_attention_forward(*inputs, 0.25, True)
    needs = [False, True, False, True, False, False, False]
    return (torch.randn_like(output), None, *inputs, lse, 0.25, needs), {}


@operator
def mix_prompt_experts_forward() -> Any:
    return (*MixCase(3, 4, 2, 16).make().values(), 0.1, 2), {}


@operator
def mix_prompt_experts_forward_out() -> Any:
    return (*MixCase(3, 4, 2, 16).make().values(), 0.1, None), {"prompts": torch.zeros(3, 2, 16)}


@operator
def mix_prompt_experts_backward() -> Any:
    grads = torch.randn(3, 2, 16), torch.randn(3, 4)
    return (*grads, *MixCase(3, 4, 2, 16).make().values(), 0.1, None, [True, True]), {}


@operator
def mix_prompt_experts_backward_of_some() -> Any:
    return (torch.randn(3, 2, 16), None, *MixCase(3, 4, 2, 16).make().values(), 0.1, 3, [False, True]), {}


def route_arguments(case: RouteCase) -> list[Any]:
    targets = (each.zero_() for each in case.targets(torch.float32))
    return [*targets, *case.make().values(), case.temperature, case.top_k]


@operator
def route_prompts() -> Any:
    return tuple(route_arguments(RouteCase(3, 4, 2, 16, 5, 3, top_k=2))), {}


@operator
def route_prompts_without_router() -> Any:
    return tuple(route_arguments(RouteCase(3, 4, 2, 16, other=0))), {}


def merge_arguments(case: MergeCase, normed_dtype: torch.dtype | None) -> tuple[Any, ...]:
    stream, branch, batch, grid, *norm = case.make().values()
    return (stream, branch, batch, *grid, *norm, normed_dtype)


@operator
def merge_patches() -> Any:
    return merge_arguments(MergeCase(2, 3, 4, 2, 12), None), {}


@operator
def merge_patches_without_branch() -> Any:
    return merge_arguments(MergeCase(2, 4, 4, 0, 12, branch=False), torch.float16), {}


@operator
def probe_through() -> Any:
    return ([torch.randn(3, 20) for _ in range(9)], [torch.randn(20, 30).half() for _ in range(9)]), {}


@operator
def moved_norm_forward_without_ended_rows() -> Any:
    rows = torch.randn(6, 20), torch.randn(6, 20).half(), torch.randn(20), torch.randn(20), 1e-5
    return (*rows, None, torch.randperm(6), torch.randn(3, 20), *(None,) * 4, False), {}


@operator
def moved_norm_forward_without_a_row_that_ends() -> Any:
    rows = torch.randn(6, 20), torch.randn(6, 20).half(), torch.randn(20), torch.randn(20), 1e-5
    ended = torch.randn(0, 24).half(), torch.randn(3, 24), torch.randn(20)
    return (*rows, None, torch.randperm(6), torch.randn(3, 20), *ended, None, False), {}


INFUSED = InfusedAttentionCase(2, 4, 2, 5, 16, lengths=(5, 3), wide_vectors=True)


def infused_arguments(case: InfusedAttentionCase) -> list[Any]:
    return [*case.make().values(), case.options()["lengths"]]


@operator
def infused_attention_forward() -> Any:
    return (*infused_arguments(INFUSED), False, True, 0.25, True), {}


@operator
def infused_attention_forward_without_statistics() -> Any:
    case = InfusedAttentionCase(2, 2, 2, 5, 16, last=True, layout="heads")
    return (*infused_arguments(case), True, True, 0.25, False), {}


def infused_backward_arguments(needs: list[bool]) -> Any:
    inputs = infused_arguments(INFUSED)
    output, lse = torch.ops.epic_fast.infused_attention_forward(*inputs, False, True, 0.25, True)
    return (torch.randn_like(output), *inputs, lse, False, True, 0.25, needs), {}


@operator
def infused_attention_backward() -> Any:
    return infused_backward_arguments([True] * 7)


@operator
def infused_attention_backward_of_some() -> Any:
    return infused_backward_arguments([False, True, False, True, False, True, False])


GATE = GateCase(2, 3, 5, 16, lengths=(5, 3), wide_vectors=True)


@operator
def infusion_gate_forward() -> Any:
    return (*GATE.make().values(), GATE.options()["lengths"], True), {}


@operator
def infusion_gate_forward_without_statistics() -> Any:
    return (*GATE.make().values(), None, False), {}


@operator
def infusion_gate_backward() -> Any:
    inputs, lengths = GATE.make().values(), GATE.options()["lengths"]
    gate, *statistics = torch.ops.epic_fast.infusion_gate_forward(*inputs, lengths, True)
    return (torch.randn_like(gate), *inputs, lengths, *statistics, [True] * 3), {}


@operator
def infusion_gate_backward_of_some() -> Any:
    value, *others = GATE.make().values()
    gate, *statistics = torch.ops.epic_fast.infusion_gate_forward(value, *others, None, True)
    return (torch.randn_like(gate), None, *others, None, *statistics, [False, True, False]), {}


@operator
def infused_swiglu_forward() -> Any:
    return tuple(SwigluCase(2, 5, 16, packed=True).make(torch.float16).values()), {}


@operator
def infused_swiglu_backward() -> Any:
    inputs = SwigluCase(2, 5, 16, packed=True, wide_vectors=True).make(torch.float16)
    return (torch.randn(2, 5, 16).half(), *inputs.values(), torch.float32, [True] * 3), {}


@operator
def infused_swiglu_backward_of_some() -> Any:
    gate, up, _ = SwigluCase(2, 5, 16).make().values()
    return (torch.randn(2, 5, 16), gate, up, None, torch.float32, [False, False, True]), {}


@operator
def linear_forward() -> Any:
    return (torch.randn(5, 16).half(), torch.randn(24, 16).half(), torch.randn(24).half(), "gelu", "eight_bit"), {}


@operator
def linear_forward_without_more() -> Any:
    return (torch.randn(5, 16).half(), torch.randn(24, 16).half(), None, None, "none"), {}


@operator
def linear_backward() -> Any:
    grad, weight, kept = torch.randn(5, 24).half(), torch.randn(24, 16).half(), torch.randn(5, 16).half()
    return (grad, weight, kept, "full", "gelu"), {}


@operator
def linear_8bit() -> Any:
    data, weight = (torch.randint(-127, 128, (rows, 16), dtype=torch.int8) for rows in (5, 24))
    scales = torch.rand(5), torch.rand(24)
    bias = torch.randn(24).half()
    return (data, scales[0], weight, scales[1], bias, None, torch.float16, "gelu", "full"), {}


@operator
def quantise_rows() -> Any:
    return (torch.randn(5, 16).half(), "int8"), {}


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
@pytest.mark.parametrize("with_branch", [True, False])
@pytest.mark.parametrize("ends", [True, False])
def test_rows_that_end_are_compiled_whole(ends: bool, with_branch: bool, impl: str) -> None:
    """With every row's products, and the rest of those rows that do not end: what stays unwritten has no value."""

    def step(stream: Tensor, branch: Tensor | None, order: Tensor, hidden: Tensor, others: list[Tensor]) -> Any:
        weight, bias, probe, through, offset = others
        total, normed, rows, mean, rstd, probed = moved_norm_forward(
            *(stream, branch, weight, bias, 1e-5),
            normed_at=order,
            probe=probe,
            ended=(hidden, through, offset) if ends else None,
            impl=impl,
        )
        left = len(stream) - (len(hidden) if ends else 0)
        return *(each[:left] for each in (total, rows, mean, rstd)), normed[order[:left]], probed

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    torch.manual_seed(0)
    others = [torch.randn(size) for size in ((20,), (20,), (3, 20), (3, 24), (20,))]
    for rows, last in ((7, 3), (9, 4), (12, 5)):
        stream, hidden, order = torch.randn(rows, 20), torch.randn(last, 24).half(), torch.randperm(rows)
        branch = torch.randn(rows - last if ends else rows, 20).half() if with_branch else None
        given = stream, branch, order, hidden, others
        assert_bits_equal(compiled(*given), step(*given))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
def test_products_through_weights_are_compiled_whole(impl: str) -> None:
    def step(probes: list[Tensor], weights: list[Tensor]) -> Tensor:
        return probe_through_weights(probes, weights, impl=impl) * 2

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    torch.manual_seed(0)
    for width, depth in ((20, 24), (21, 30), (40, 70)):
        given = [torch.randn(2, width) for _ in range(9)], [torch.randn(width, depth) for _ in range(9)]
        assert_bits_equal(compiled(*given), step(*given))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    arguments, options = OPERATORS[name]()
    assert frozen_linear.FORWARD  # operators are registered where they are imported
    assert route_operation.FORWARD
    assert merge_operation.FORWARD
    packet = name.split("_without")[0].split("_of_")[0]
    torch.library.opcheck(getattr(torch.ops.epic_fast, packet).default, arguments, options)


@pytest.mark.parametrize("name", OPERATORS)
def test_fakes_have_the_strides_of_what_is_launched(name: str) -> None:
    """opcheck compares shapes and strides as well; this one says which output is wrong, also where it is empty."""
    arguments, options = OPERATORS[name]()
    packet = getattr(torch.ops.epic_fast, name.split("_without")[0].split("_of_")[0]).default
    found = packet(*arguments, **options)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        faked = [mode.from_tensor(each) if isinstance(each, Tensor) else each for each in arguments]
        wanted = packet(*faked, **{key: mode.from_tensor(each) for key, each in options.items()})
    found, wanted = ((each,) if isinstance(each, Tensor) else each for each in (found, wanted))
    for index, (one, other) in enumerate(zip(found or (), wanted or (), strict=True)):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype), index


def test_importing_the_operations_imports_no_triton() -> None:
    code = (
        "import sys, torch, epic_fast.functional as f; torch.ops.epic_fast.prompt_attention_backward.default; "
        "x = torch.randn(1, 1, 2, 4); f.prompt_attention(x, x, x, x, x, x); "
        "print([name for name in sys.modules if name.startswith('epic_fast.kernels') and 'triton' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Recorder:
    """Launchers that compute nothing and remember what they were asked for."""

    def __init__(self) -> None:
        self.forwards: list[dict[str, Any]] = []
        self.needs: list[tuple[bool, ...]] = []
        self.grads: list[tuple[bool, ...]] = []

    def attention_forward(self, *tensors: Any, save_lse: bool, output: Any = None, **options: Any) -> Any:
        self.forwards.append({"save_lse": save_lse, "lengths": tensors[6], **options})
        found = attention_module._forward_fake(*tensors, False, False, 1.0, save_lse)
        return tuple(each.zero_() for each in found)

    def attention_backward(self, *tensors: Any, needs: tuple[bool, ...], **options: Any) -> Any:
        self.needs.append(needs)
        self.grads.append(tuple(each is not None for each in tensors[:2]))
        inputs = tensors[2:8]
        return tuple(
            torch.zeros_like(each) if needed and each is not None else None
            for each, needed in zip(inputs, needs, strict=True)
        )

    def interaction_forward(self, *tensors: Any, **options: Any) -> Any:
        self.forwards.append(options)
        return torch.zeros(tensors[0].shape), torch.zeros(tensors[1].shape)

    def interaction_backward(self, *tensors: Any, needs: tuple[bool, ...], **options: Any) -> Any:
        self.needs.append(needs)
        self.grads.append(tuple(each is not None for each in tensors[:2]))
        return tuple(
            torch.zeros(each.shape) if needed else None for each, needed in zip(tensors[2:], needs, strict=True)
        )


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(attention_module, "_launchers", lambda: (made.attention_forward, made.attention_backward))
    monkeypatch.setattr(interaction_module, "_launchers", lambda: (made.interaction_forward, made.interaction_backward))
    return made


OPERATIONS = {
    "attention": (prompt_attention, AttentionCase(2, 2, 4, 3, 16), ATTENTION),
    "interaction": (prompt_interaction, InteractionCase(2, 3, 4, 16, 20), INTERACTION),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", OPERATIONS)
def test_backward_is_asked_for_what_needs_a_gradient(kind: str, compiled: bool, recorder: Recorder) -> None:
    function, case, names = OPERATIONS[kind]
    patterns = [{name} for name in names] if not compiled else [{names[0], names[-1]}]
    for pattern in [*patterns, set(names)]:
        recorder.needs.clear()
        inputs = {
            name: each if each is None else each.requires_grad_(name in pattern) for name, each in case.make().items()
        }
        result = by_kernel(function, compiled)(**inputs)
        torch.autograd.backward([each.sum() for each in result])
        assert recorder.needs == [tuple(name in pattern for name in names)]
        assert {name for name, each in inputs.items() if each is not None and each.grad is not None} == pattern


@pytest.mark.parametrize("kind", OPERATIONS)
def test_an_output_that_nobody_uses_has_no_gradient(kind: str, recorder: Recorder) -> None:
    function, case, _ = OPERATIONS[kind]
    for used in (0, 1):
        recorder.grads.clear()
        by_kernel(function)(**make(case))[used].sum().backward()
        assert recorder.grads == [(used == 0, used == 1)]


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "by the operator"])
@pytest.mark.parametrize("kind", OPERATIONS)
def test_without_a_gradient_there_is_no_graph_and_no_statistics(
    kind: str, direct: bool, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, case, _ = OPERATIONS[kind]
    if not direct:
        monkeypatch.setattr(library, "unwatched", lambda: False)
    results = [by_kernel(function)(**case.make())]
    for without in (torch.no_grad, torch.inference_mode):
        inputs = make(case)
        with without():
            results.append(by_kernel(function)(**inputs))
    assert all(each.grad_fn is None and not each.requires_grad for result in results for each in result)
    assert len(recorder.forwards) == 3
    assert not any(each.get("save_lse", False) for each in recorder.forwards)
    by_kernel(function)(**make(case))
    assert recorder.forwards[-1].get("save_lse", True)


def test_lengths_and_masks_are_not_differentiated(recorder: Recorder) -> None:
    output, _ = by_kernel(prompt_attention)(**make(AttentionCase(2, 2, 4, 3, 16)), lengths=torch.tensor([1, 2]))
    output.sum().backward()
    output, _ = by_kernel(prompt_attention)(**make(AttentionCase(2, 2, 4, 3, 16)))
    (twice,) = torch.autograd.grad(output.sum(), [make(AttentionCase(2, 2, 4, 3, 16))["query"]], allow_unused=True)
    assert twice is None


def test_second_derivatives_are_refused() -> None:
    inputs = make(AttentionCase(1, 1, 2, 1, 16))
    output, _ = by_kernel(prompt_attention)(**inputs)
    (grad,) = torch.autograd.grad(output.square().sum(), [inputs["query"]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@contextmanager
def launches_and_allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[str], list[tuple[int, ...]]]]:
    """The names of the attention's backward kernels as they are launched, and the shapes allocated for them."""
    from epic_fast.kernels.prompt_attention import triton_backward  # pyright: ignore[reportMissingImports]

    launched: list[str] = []
    allocated: list[tuple[int, ...]] = []

    class Launching:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    with monkeypatch.context() as patch:
        for name in ("_query_kernel", "_key_kernel", "_one_pass_kernel"):
            patch.setattr(triton_backward, name, Launching(name, getattr(triton_backward, name)))
        for owner, name in (
            (torch.Tensor, "new_empty"),
            *((torch, name) for name in ("empty", "empty_like", "empty_strided", "zeros")),
        ):
            original = getattr(owner, name)

            def allocating(*args: Any, original: Any = original, **kwargs: Any) -> Tensor:
                found = original(*args, **kwargs)
                if sys._getframe(1).f_globals.get("__name__", "").startswith("epic_fast.") and found.numel():
                    allocated.append(tuple(found.shape))
                return found

            patch.setattr(owner, name, allocating)
        yield launched, allocated


@pytest.mark.parametrize(
    ("needed", "kernels", "shapes"),
    [
        # As a frozen tower's first prompted layer: only the prompts' own projections are trained.
        ({"query"}, {"_query_kernel"}, [(2, 2, 5, 16)]),
        ({"query", "prompt_query"}, {"_query_kernel"}, [(2, 2, 3, 16), (2, 2, 5, 16)]),
        ({"prompt_key", "prompt_value"}, {"_key_kernel"}, [(2, 2, 3, 16)] * 2),
        ({"value"}, {"_key_kernel"}, [(2, 2, 5, 16)]),
    ],
)
def test_frozen_inputs_cost_no_kernel_and_no_memory(
    needed: set[str], kernels: set[str], shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {name: each.requires_grad_(name in needed) for name, each in AttentionCase(2, 2, 5, 3, 16).make().items()}
    output, prompt_output = by_kernel(prompt_attention)(**inputs)
    with launches_and_allocations(monkeypatch) as (launched, allocated):
        torch.autograd.backward([output.sum(), prompt_output.sum()])
    assert set(launched) == kernels
    # What else there is are sums over head_dim.
    assert sorted(shape for shape in allocated if shape[-1:] == (16,)) == shapes
    assert {name for name, each in inputs.items() if each.grad is not None} == needed


def test_checkpointing_gives_the_same_bits() -> None:
    case = AttentionCase(2, 1, 3, 2, 16)
    one, other = make(case), make(case)
    plain = by_kernel(prompt_attention)(**one)
    again = checkpoint(lambda: by_kernel(prompt_attention)(**other), use_reentrant=False)
    for result in (plain, again):
        torch.autograd.backward([each.sum() for each in result])
    assert_bits_equal([each.grad for each in one.values()], [each.grad for each in other.values()])


@pytest.mark.parametrize("kind", OPERATIONS)
def test_one_graph_serves_twenty_sizes(kind: str, recorder: Recorder) -> None:
    """The first size, then one more graph in which batch, lengths and prompts are symbols; training it as well."""
    function, _, _ = OPERATIONS[kind]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda **inputs: function(**inputs, impl="triton"), backend=counter, fullgraph=True)
    sizes = torch.randint(2, 30, (20, 3), generator=torch.Generator().manual_seed(0)).unique(dim=0).tolist()
    assert len(sizes) == 20
    for batch, tokens, prompts in sizes:
        if kind == "attention":
            case = AttentionCase(batch, 2, tokens, prompts, 16)
            result = compiled(**make(case), lengths=torch.ones(batch, dtype=torch.int64))
            assert result[0].shape == (batch, 2, tokens, 16)
        else:
            case = InteractionCase(batch, tokens, prompts, 16, 20)
            result = compiled(**make(case))
            assert result[0].shape == (batch, tokens, 16)
        torch.autograd.backward([each.sum() for each in result])
    assert counter.frame_count <= 2
    assert len(recorder.needs) == len(recorder.forwards) == 20


@pytest.mark.parametrize("kind", OPERATIONS)
def test_compiled_out_writes_into_views_of_one_buffer(kind: str) -> None:
    function, case, _ = OPERATIONS[kind]
    inputs, options = case.make(), case.options()
    wanted = by_kernel(function)(**inputs, **options)

    def call(buffer: Tensor) -> Tensor:
        if kind == "attention":
            rows = buffer.view(2, 7, 2, 16).transpose(1, 2)
            out = rows[:, :, 3:], rows[:, :, :3]
        else:
            out = buffer[: 2 * 3 * 16].view(2, 3, 16), buffer[2 * 3 * 16 :].view(2, 4, 20)
        found = function(**inputs, **options, out=out, impl="triton")
        assert found[0] is out[0]
        return buffer + 0

    size = 2 * 7 * 2 * 16 if kind == "attention" else 2 * 3 * 16 + 2 * 4 * 20
    torch._dynamo.reset()
    for run in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        buffer = torch.full((size,), torch.nan)
        result = run(buffer)
        assert torch.equal(result, buffer)
        if kind == "attention":
            joined = torch.cat([wanted[1], wanted[0]], dim=2).transpose(1, 2).flatten()
        else:
            joined = torch.cat([each.flatten() for each in wanted])
        assert torch.equal(buffer, joined)


def test_out_by_reference_and_without_prompt_rows() -> None:
    case = AttentionCase(2, 2, 4, 3, 16, prefix_tuning=True)
    inputs, target = case.make(), torch.empty(2, 2, 4, 16)
    wanted, _ = prompt_attention(**inputs, impl="reference")
    for impl in ("reference", "triton", "auto"):
        target.fill_(torch.nan)
        found, nothing = prompt_attention(**inputs, out=(target, None), impl=impl)
        assert found is target
        assert nothing is None
        torch.testing.assert_close(target, wanted)
    interaction = InteractionCase(2, 3, 4, 16, 20).make()
    outs = torch.empty(2, 3, 16), torch.empty(2, 4, 20)
    assert prompt_interaction(**interaction, out=outs, impl="reference")[1] is outs[1]
    assert_bits_equal(outs, prompt_interaction(**interaction, impl="reference"))


TEXT, VISION = torch.empty(2, 3, 16), torch.empty(2, 4, 20)
OUTPUT, PROMPT_OUTPUT = torch.empty(2, 2, 4, 16), torch.empty(2, 2, 3, 16)


@pytest.mark.parametrize(
    ("kind", "out", "words"),
    [
        ("attention", (OUTPUT,), ["out has 1 entries", "2: output, prompt_output"]),
        ("attention", (OUTPUT, None), ["out's prompt_output is None", "a tensor"]),
        ("attention", (OUTPUT[:, :, :2], PROMPT_OUTPUT), ["out's output", "(2, 2, 2, 16)", "(2, 2, 4, 16)"]),
        ("attention", (OUTPUT, PROMPT_OUTPUT[:1]), ["out's prompt_output", "(1, 2, 3, 16)", "(2, 2, 3, 16)"]),
        ("attention", (OUTPUT, PROMPT_OUTPUT.half()), ["out's prompt_output", "torch.float16", "torch.float32"]),
        ("attention", (OUTPUT.to("meta"), PROMPT_OUTPUT), ["out's output", "meta", "cpu"]),
        ("attention", (OUTPUT.mT.contiguous().mT, PROMPT_OUTPUT), ["out's output", "last stride 4", "wanted 1"]),
        ("attention", (OUTPUT.clone().requires_grad_(), PROMPT_OUTPUT), ["requires a gradient", "torch.no_grad()"]),
        ("attention", (OUTPUT[:1].expand(2, -1, -1, -1), PROMPT_OUTPUT), ["out's output", "(0, 64, 16, 1)", "its own"]),
        ("interaction", (TEXT, VISION[:, :3]), ["out's next_vision", "(2, 3, 20)", "(2, 4, 20)"]),
        ("interaction", (TEXT, VISION.double()), ["out's next_vision", "torch.float64", "torch.float32"]),
    ],
)
def test_a_wrong_out_is_refused(kind: str, out: Any, words: list[str]) -> None:
    function, case, _ = OPERATIONS[kind]
    with pytest.raises(ConfigError) as caught:
        function(**case.make(), out=out, impl="triton")
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("kind", OPERATIONS)
def test_an_input_is_no_out(kind: str, impl: str) -> None:
    function, case, names = OPERATIONS[kind]
    inputs = case.make()
    for name in (names[0], names[1], names[3]) if kind == "attention" else names[:2]:
        out = [torch.empty_like(each) for each in function(**inputs, impl=impl)]
        place = next(index for index, each in enumerate(out) if each.shape == inputs[name].shape)
        out[place] = inputs[name]
        before = inputs[name].clone()
        with pytest.raises(ConfigError, match="memory of an input"):
            function(**inputs, out=tuple(out), impl=impl)
        assert torch.equal(inputs[name], before)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_attention_under_autocast_has_the_types_of_pytorchs_own(impl: str, compiled: bool) -> None:
    def call(inputs: dict[str, Any]) -> Any:
        with torch.autocast("cpu", dtype=torch.float16):
            return prompt_attention(**inputs, impl=impl)

    inputs = make(AttentionCase(2, 2, 4, 3, 16))
    inputs["prompt_key"] = inputs["prompt_key"].detach().bfloat16().requires_grad_()
    torch._dynamo.reset()
    with torch.autocast("cpu", dtype=torch.float16):
        native = scaled_dot_product_attention(inputs["query"], inputs["key"], inputs["value"])
    output, prompt_output = (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)(inputs)
    assert output.dtype == prompt_output.dtype == native.dtype == torch.float16
    narrow = {name: each.detach().half() for name, each in inputs.items()}
    wanted = prompt_attention(**narrow, impl="reference")
    torch.testing.assert_close((output, prompt_output), wanted, rtol=2e-3, atol=2e-3)
    with torch.autocast("cpu", dtype=torch.float16):
        torch.autograd.backward([output.sum(), prompt_output.sum()])
    assert all(each.grad.dtype == each.dtype for each in inputs.values())


def test_autocast_leaves_float64_alone_as_pytorch_does() -> None:
    inputs = make(AttentionCase(2, 2, 4, 3, 16), dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = prompt_attention(**inputs)
        assert output.dtype == scaled_dot_product_attention(*[inputs[name] for name in ATTENTION[:3]]).dtype
        assert output.dtype == torch.float64
        inputs["value"] = inputs["value"].float()
        with pytest.raises(ConfigError, match=r"value has type torch.float32; wanted query's torch.float64"):
            prompt_attention(**inputs)
    with pytest.raises(ConfigError, match="value has type"):
        prompt_attention(**inputs)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_interaction_under_autocast_narrows_the_projections_alone(compiled: bool) -> None:
    case = InteractionCase(2, 3, 4, 16, 20)
    one, other = make(case), make(case)

    def call(inputs: dict[str, Any], impl: str) -> Any:
        with torch.autocast("cpu", dtype=torch.float16):
            return prompt_interaction(**inputs, impl=impl)

    torch._dynamo.reset()
    found = (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)(one, "triton")
    wanted = call(other, "reference")
    plain = prompt_interaction(**case.make(), impl="reference")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0], plain[0], rtol=1e-5, atol=1e-5)
    for result in (found, wanted):
        with torch.autocast("cpu", dtype=torch.float16):
            torch.autograd.backward([each.square().sum() for each in result])
    for name in one:
        assert one[name].grad.dtype == torch.float32
        torch.testing.assert_close(one[name].grad, other[name].grad, rtol=2e-2, atol=2e-2)


def test_every_limit_of_the_kernels_is_named() -> None:
    wide = torch.zeros(1, 1, 2, 300, dtype=torch.float64)
    with pytest.raises(ImplementationError) as caught:
        prompt_attention(*[wide] * 6, impl="triton")
    for words in ("torch.float64; the kernel takes float32, bfloat16 and float16", "head_dim is 300", "1 to 256"):
        assert words in str(caught.value)
    many = InteractionCase(1, 70, 3, 16, 8).make(torch.float64)
    with pytest.raises(ImplementationError) as caught:
        prompt_interaction(**many, impl="triton")
    for words in ("text_prompt has 70 prompts", "up to 64", "temperature is torch.float64"):
        assert words in str(caught.value)
    # "auto" takes the reference.
    assert prompt_attention(*[wide] * 6)[0].shape == wide.shape
    assert prompt_interaction(**many)[0].shape == (1, 70, 16)

    empty, some = torch.zeros(1, 2, 0), torch.zeros(1, 2, 3)
    assert interaction_operation.limits(some, empty, *[some] * 7) == ["vision_prompt has width 0"]

    wide = torch.empty(1, 2, 2**16, device="meta"), torch.empty(1, 2, 2**15, device="meta")
    (reason,) = interaction_operation.limits(*wide, *[some] * 7)
    assert reason == "a projection's weight has 2147483648 elements; the kernel takes fewer than 2**31"
    assert not interaction_operation.limits(wide[0], wide[1][..., 1:], *[some] * 7)

    from epic_fast.kernels.prompt_interaction import triton_forward  # pyright: ignore[reportMissingImports]

    assert interaction_module.MOST_PROMPTS == triton_forward.MAX_PROMPTS


@pytest.mark.parametrize(
    "prompt", [(3, 2, 3, 16), (2, 3, 3, 16), (2, 2, 3, 24), (2, 3, 16)], ids=["batch", "heads", "width", "dimensions"]
)
def test_prompts_that_agree_with_each_other_alone_are_refused(prompt: tuple[int, ...]) -> None:
    """The check that is paid on every call compares them with each other first."""
    tokens, prompts = [torch.zeros(2, 2, 4, 16)] * 3, [torch.zeros(prompt)] * 3
    for impl in ("triton", "reference"):
        with pytest.raises(ConfigError, match=r"wanted \(2 or 1, 2, prompts, 16\)"):
            prompt_attention(*tokens, *prompts, impl=impl)


def test_an_old_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "capability", lambda index: (7, 5))
    assert "7.5; the kernel needs 8.0" in library.too_old(0)
    for found in ((8, 0), (12, 1), None):
        monkeypatch.setattr(library, "capability", lambda index, found=found: found)
        assert library.too_old(0) == ""
    monkeypatch.setattr(library, "too_old", lambda index: "it is old")

    class OnGpu(Tensor):
        is_cuda = True

    tensor = torch.zeros(1, 1, 2, 16).as_subclass(OnGpu)
    assert attention_operation.limits(*[tensor] * 6) == ["it is old"]
    assert interaction_operation.limits(torch.zeros(1, 2, 3).as_subclass(OnGpu), *[torch.zeros(1, 2, 3)] * 8) == [
        "it is old"
    ]


def test_operators_on_the_cpu_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "interpreting", lambda: False)
    arguments, options = OPERATORS["prompt_interaction_forward"]()
    with pytest.raises(ImplementationError, match="TRITON_INTERPRET=1"):
        torch.ops.epic_fast.prompt_interaction_forward(*arguments, **options)


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(0, 2, 4, 3, 16),
        AttentionCase(0, 2, 4, 3, 16, shared=True),
        AttentionCase(2, 2, 0, 3, 16, shared=True),
        AttentionCase(2, 2, 0, 0, 16),
        AttentionCase(2, 0, 4, 3, 16),
        AttentionCase(2, 2, 0, 3, 16, prefix_tuning=True),
        InteractionCase(0, 3, 4, 16, 20),
        InteractionCase(2, 0, 4, 16, 20),
        InteractionCase(2, 3, 0, 16, 20),
    ],
    ids=str,
)
def test_nothing_at_all_is_no_error(case: AttentionCase | InteractionCase) -> None:
    function = prompt_attention if isinstance(case, AttentionCase) else prompt_interaction
    results = {}
    for impl in ("triton", "reference"):
        inputs = make(case)
        result = [each for each in function(**inputs, **case.options(), impl=impl) if each is not None]
        torch.autograd.backward([each.square().sum() for each in result])
        grads = [
            torch.zeros_like(each) if each.grad is None else each.grad for each in inputs.values() if each is not None
        ]
        results[impl] = result, grads
    torch.testing.assert_close(results["triton"], results["reference"])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.uint8])
def test_lengths_of_any_integer_type_and_stride(dtype: torch.dtype) -> None:
    inputs = AttentionCase(3, 1, 4, 2, 16).make()
    lengths = torch.tensor([[4, 9], [0, 9], [2, 9]], dtype=dtype)[:, 0]
    found = prompt_attention(**inputs, lengths=lengths, impl="triton")
    torch.testing.assert_close(found, prompt_attention(**inputs, lengths=lengths, impl="reference"))


def test_the_kernel_gets_lengths_as_it_was_compiled_for(recorder: Recorder) -> None:
    """int32 or int64 side by side; every other type would be one more variant of the kernel."""
    inputs = AttentionCase(2, 1, 4, 2, 16).make()
    for dtype in (torch.int32, torch.int64, torch.int16, torch.uint8):
        prompt_attention(**inputs, lengths=torch.tensor([4, 1], dtype=dtype), impl="triton")
    found = [each["lengths"].dtype for each in recorder.forwards]
    assert found == [torch.int32, torch.int64, torch.int32, torch.int32]


def test_lengths_beyond_the_tokens_read_no_foreign_memory() -> None:
    """Lengths on a GPU are not read before the launch: there a wrong one counts as the nearest right one."""
    inputs = list(AttentionCase(2, 1, 4, 2, 16).make().values())
    flags = False, False, 0.25, True
    wrong, right = (attention_module.FORWARD(*inputs, torch.tensor(lengths), *flags) for lengths in ([99, -3], [4, 0]))
    assert_bits_equal(wrong, right)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_broken_sample_stays_alone(poison: float) -> None:
    case = AttentionCase(3, 1, 5, 2, 16, lengths=(5, 3, 5))
    clean, broken = case.make(), case.make()
    for each in broken.values():
        each[0] = poison
    for name in ATTENTION[:3]:
        broken[name][1, :, 3:] = poison
    results = []
    for inputs in (clean, broken):
        leaves = {name: each.requires_grad_() for name, each in inputs.items()}
        output, prompt_output = by_kernel(prompt_attention)(**leaves, **case.options())
        torch.autograd.backward([output.sum(), prompt_output.sum()])
        grads = [each.grad[1:] for each in leaves.values()]
        results.append([output.detach()[1:], prompt_output.detach()[1:], *grads])
        last = output
    assert_bits_equal(*results)
    assert all(each.isfinite().all() for each in results[1])
    assert not last[0].isfinite().any()


def test_a_broken_sample_of_the_interaction_stays_alone() -> None:
    case = InteractionCase(3, 2, 2, 16, 16)
    clean, broken = case.make(), case.make()
    broken["text_prompt"][0] = torch.nan
    results = [by_kernel(prompt_interaction)(**inputs) for inputs in (clean, broken)]
    assert_bits_equal(*[[each[1:] for each in result] for result in results])
    assert results[1][1][0].isnan().all()


def test_gradients_of_any_strides_are_taken() -> None:
    """``sum().backward()`` hands down a gradient whose strides are all zero, a transposed view one of other order."""
    case = AttentionCase(2, 2, 4, 3, 16)
    results = []
    for use in (lambda each: each.sum(), lambda each: (each.mT.contiguous() * torch.ones(16, 1)).sum()):
        inputs = make(case)
        output, prompt_output = by_kernel(prompt_attention)(**inputs)
        torch.autograd.backward([use(output), use(prompt_output)])
        results.append([each.grad for each in inputs.values()])
    assert_bits_equal(*results)
