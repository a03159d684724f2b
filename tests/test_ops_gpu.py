"""The operators on a GPU: values in every type, one compiled graph, CUDA graphs, autocast, and what is launched."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention

from epic_fast.errors import ConfigError, ImplementationError
from epic_fast.functional import prompt_attention, prompt_interaction
from epic_fast.ops import dispatch, library
from epic_fast.testing.cases import AttentionCase, InteractionCase
from epic_fast.testing.numerics import assert_bits_equal, check_operation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

attention_module = sys.modules["epic_fast.ops.prompt_attention"]

ATTENTION = ("query", "key", "value", "prompt_query", "prompt_key", "prompt_value")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
ATTENTION_CASES = {
    "vision": AttentionCase(2, 4, 257, 16, 64, layout="tokens"),
    "text": AttentionCase(3, 2, 77, 16, 64, causal=True, lengths=(77, 0, 30), layout="packed"),
    "prefix, shared": AttentionCase(3, 2, 50, 5, 80, prompt_mask="prefix", shared=True),
    "prefix tuning": AttentionCase(2, 2, 50, 4, 32, prefix_tuning=True, shared=True, scale=0.3),
    "no prompts": AttentionCase(2, 2, 33, 0, 96, causal=True),
}
INTERACTION_CASES = {
    "scalar gates": InteractionCase(4, 8, 8, 768, 1024),
    "channel gates": InteractionCase(3, 5, 9, 100, 64, channel_gates=True),
}
OPERATIONS = {
    "attention": (prompt_attention, AttentionCase(2, 2, 20, 3, 64)),
    "interaction": (prompt_interaction, InteractionCase(2, 3, 4, 64, 96)),
}


def by_kernel(function: Callable[..., Any], backend: str | None = None) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        return function(**arguments, impl="triton")

    if backend is None:
        return call
    torch._dynamo.reset()
    return torch.compile(call, backend=backend, fullgraph=True)


def by_reference(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **arguments: function(**arguments, impl="reference")


def make(case: AttentionCase | InteractionCase, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    inputs = case.make(dtype, "cuda")
    return {name: None if each is None else each.requires_grad_() for name, each in inputs.items()}


@pytest.mark.parametrize("backend", [None, "inductor"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", ATTENTION_CASES)
def test_attention_is_within_its_error_budget(name: str, dtype: torch.dtype, backend: str | None) -> None:
    case = ATTENTION_CASES[name]
    check_operation(
        by_kernel(prompt_attention, backend),
        by_reference(prompt_attention),
        case.make(dtype, "cuda"),
        case.options("cuda"),
        reduction=case.reductions,
        output_names=case.outputs,
    )


@pytest.mark.parametrize("backend", [None, "inductor"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", INTERACTION_CASES)
def test_interaction_is_within_its_error_budget(name: str, dtype: torch.dtype, backend: str | None) -> None:
    case = INTERACTION_CASES[name]
    check_operation(
        by_kernel(prompt_interaction, backend),
        by_reference(prompt_interaction),
        case.make(dtype, "cuda"),
        case.options("cuda"),
        reduction=case.reductions,
        output_names=case.outputs,
    )


@pytest.mark.parametrize("kind", OPERATIONS)
def test_auto_takes_the_kernel_and_says_nothing(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    function, case = OPERATIONS[kind]
    dispatch._log_once.cache_clear()
    inputs = make(case)
    with caplog.at_level("INFO", logger="epic_fast"):
        found = function(**inputs)
    assert not caplog.records
    assert "_Prompt" in type(found[0].grad_fn).__name__
    assert_bits_equal(found, by_kernel(function)(**inputs))


def test_auto_takes_the_reference_where_the_kernel_cannot_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._log_once.cache_clear()
    inputs = AttentionCase(1, 1, 3, 2, 300).make(torch.float64, "cuda")
    with caplog.at_level("INFO", logger="epic_fast"):
        prompt_attention(**inputs)
        prompt_attention(**inputs)
    (record,) = caplog.records
    assert "float64" in record.getMessage()
    assert "head_dim is 300" in record.getMessage()
    with pytest.raises(ImplementationError, match="head_dim is 300"):
        prompt_attention(**inputs, impl="triton")


def operators() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    case = AttentionCase(2, 2, 20, 3, 64, lengths=(20, 7), shared=True, layout="tokens")
    inputs = [*case.make(torch.bfloat16, "cuda").values(), case.options("cuda")["lengths"]]
    flags = False, True, 0.125
    output, prompt_output, lse = attention_module.FORWARD(*inputs, *flags, True)
    grads = torch.randn_like(output), torch.randn_like(prompt_output)
    saved = (*inputs, output, prompt_output, lse, *flags)
    some = [True, False, False, True, True, False]
    hub = tuple(InteractionCase(2, 3, 4, 64, 96, channel_gates=True).make(torch.bfloat16, "cuda").values())
    mixed = {"dtype": torch.bfloat16, "device": "cuda"}
    hub_grads = torch.randn(2, 3, 64, **mixed), torch.randn(2, 4, 96, **mixed)
    return {
        "prompt_attention_forward": ((*inputs, *flags, True), {}),
        "prompt_attention_forward_out": (
            (*inputs, *flags),
            {"output": torch.zeros_like(output), "prompt_output": torch.zeros_like(prompt_output)},
        ),
        "prompt_attention_backward": ((*grads, *saved, [True] * 6), {}),
        "prompt_attention_backward.some": ((grads[0], None, *saved, some), {}),
        "prompt_interaction_forward": ((*hub, 1e-6), {}),
        "prompt_interaction_forward_out": (
            (*hub, 1e-6),
            {"next_text": torch.zeros(2, 3, 64, **mixed), "next_vision": torch.zeros(2, 4, 96, **mixed)},
        ),
        "prompt_interaction_backward": ((*hub_grads, *hub, 1e-6, [True] * 9), {}),
        "prompt_interaction_backward.some": ((None, hub_grads[1], *hub, 1e-6, [True, False, True] * 3), {}),
    }


@pytest.mark.parametrize(
    "name",
    [
        *("prompt_attention_forward", "prompt_attention_forward_out", "prompt_attention_backward"),
        *("prompt_attention_backward.some", "prompt_interaction_forward", "prompt_interaction_forward_out"),
        *("prompt_interaction_backward", "prompt_interaction_backward.some"),
    ],
)
def test_opcheck(name: str) -> None:
    arguments, options = operators()[name]
    torch.library.opcheck(getattr(torch.ops.epic_fast, name.split(".")[0]).default, arguments, options)


@pytest.mark.parametrize("kind", OPERATIONS)
def test_one_graph_serves_twenty_sizes(kind: str) -> None:
    """The first size, then one more graph in which batch, lengths and prompts are symbols."""
    function, _ = OPERATIONS[kind]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda **inputs: function(**inputs, impl="triton"), backend=counter, fullgraph=True)
    sizes = torch.randint(2, 60, (24, 3), generator=torch.Generator().manual_seed(0)).unique(dim=0).tolist()[:20]
    assert len(sizes) == 20
    for size in sizes:
        train(compiled, kind, *size)
    assert counter.frame_count <= 2


def train(call: Callable[..., Any], kind: str, batch: int, tokens: int, prompts: int) -> None:
    if kind == "attention":
        inputs = make(AttentionCase(batch, 2, tokens, prompts, 64))
        options = {"lengths": torch.randint(0, tokens + 1, (batch,), device="cuda")}
    else:
        inputs, options = make(InteractionCase(batch, tokens, prompts, 64, 96)), {}
    torch.autograd.backward([each.float().sum() for each in call(**inputs, **options)])


def forget_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: what other tests have compiled is not there."""
    from triton.runtime.jit import JITFunction

    from epic_fast.kernels.common import launch, plan  # pyright: ignore[reportMissingImports]

    plan.forget()
    monkeypatch.setattr(launch, "_compiled", {})
    for name, module in sys.modules.copy().items():
        if name.startswith("epic_fast.kernels."):
            for each in vars(module).values():
                if isinstance(each, JITFunction):
                    each.device_caches.clear()


SHORT = [(tokens, prompts) for tokens in (8, 20, 50) for prompts in (8, 20, 50)]


@pytest.mark.parametrize(
    ("kind", "seen", "tokens", "prompts"),
    [
        ("attention", SHORT, (2, 60), (2, 60)),
        # Heads that Hopper's kernels hold whole (257 to 288 rows), and longer ones.
        ("attention", [(257, 16), (305, 16), (577, 16)], (245, 600), (12, 40)),
        ("interaction", SHORT, (2, 60), (2, 60)),
    ],
    ids=["attention", "attention, long", "interaction"],
)
def test_triton_compiles_nothing_for_a_new_size(
    kind: str,
    seen: list[tuple[int, int]],
    tokens: tuple[int, int],
    prompts: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tiles come in few classes of rows; once a class has been seen, no size in it compiles again.

    The interaction's classes are pairs, of text and vision prompts: up to 16, up to 32, up to 64 each.
    """
    from triton import knobs

    compiled: list[Any] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda *args, **kwargs: compiled.append((args, kwargs)))
    call = by_kernel(OPERATIONS[kind][0])
    train(call, kind, 2, *seen[0])
    forget_kernels(monkeypatch)
    compiled.clear()
    for size in seen:
        train(call, kind, 2, *size)
    assert len(compiled) > 0
    compiled.clear()
    random = torch.Generator().manual_seed(0)
    drawn = [torch.randint(*bounds, (20,), generator=random).tolist() for bounds in ((1, 6), tokens, prompts)]
    sizes = [*zip(*drawn, strict=True), *(((1, 1, 1), (3, 59, 59), (2, 16, 17), (2, 33, 32)) if seen is SHORT else ())]
    for size in sizes:
        train(call, kind, *size)
    assert len(compiled) == 0


IN_GRAPHS = {**OPERATIONS, "attention, long": (prompt_attention, AttentionCase(2, 2, 257, 16, 64))}


@pytest.mark.filterwarnings("error:The AccumulateGrad node's stream")
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("kind", IN_GRAPHS)
def test_a_cuda_graph_captures_it(kind: str, training: bool) -> None:
    function, case = IN_GRAPHS[kind]
    inputs = make(case) if training else case.make(torch.bfloat16, "cuda")
    options = {}
    if isinstance(case, AttentionCase):
        options["lengths"] = torch.tensor([case.tokens, 11], device="cuda")
    leaves = [each for each in inputs.values() if training]

    def step() -> list[Tensor]:
        results = by_kernel(function)(**inputs, **options)
        if not training:
            return list(results)
        grads = torch.autograd.grad([each.float().square().sum() for each in results], leaves)
        # Results that kept their graph would keep its nodes, bound to the stream of the capture, for the next step.
        return [*(each.detach() for each in results), *grads]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        fresh = case.make(torch.bfloat16, "cuda", seed=seed)
        with torch.no_grad():
            for name, each in inputs.items():
                each.copy_(fresh[name])
        graph.replay()
        found = [each.clone() for each in captured]
        assert_bits_equal(found, step())


def requested(which: str = "current") -> int:
    """Bytes that were asked for: a block that the allocator had at hand may be up to a MiB larger than that."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]


def profiled(call: Callable[[], Any]) -> tuple[list[str], int]:
    """Names of the kernels that a call launches, and the most memory it adds while it runs."""
    gc.collect()  # what an earlier call left for the collector must not be given back while this one is watched
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = requested()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    peak = requested("peak") - before
    names = [each.name for each in profile.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    return names, peak


@pytest.mark.parametrize("way", ["operators", "directly", "inductor"])
@pytest.mark.parametrize("tokens", [77, 257, 1024])
def test_frozen_keys_and_values_cost_no_kernel_and_no_memory(
    tokens: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of the queries alone: one kernel, and no more memory than that gradient and the row sums.

    Where a profiler looks on, calls go through the operators; those that do not are made to go past them here as well.
    Heads are merged inside the call, as in a model.  A compiled backward may take the gradient of what its region
    returns in that tensor's own order of memory only: PyTorch 2.11 copies it where the operator's result, with its
    heads inside its rows, is itself returned (``torch._functorch.config.guess_tangent_strides_as_outputs``).
    """
    case = AttentionCase(8, 8, tokens, 16, 64, layout="tokens")
    found = {}

    def merged(**inputs: Any) -> list[Tensor]:
        return [each.transpose(1, 2).flatten(2) for each in prompt_attention(**inputs, impl="triton")]

    torch._dynamo.reset()
    if way == "directly":
        monkeypatch.setattr(library, "direct", lambda *tensors: True)
    for needed in (("query", "prompt_query"), ATTENTION):
        inputs = {name: each.requires_grad_(name in needed) for name, each in case.make(torch.bfloat16, "cuda").items()}
        call = torch.compile(merged, backend=way, fullgraph=True) if way == "inductor" else merged
        leaves = [inputs[name] for name in needed]
        for _ in range(3):
            results = call(**inputs)
            grads = [torch.ones_like(each) for each in results]
            run = lambda results=results, grads=grads, leaves=leaves: torch.autograd.grad(results, leaves, grads)  # noqa: E731
            names, peak = profiled(run)
        found[len(needed)] = names, peak
    names, peak = found[2]
    assert any("_query_kernel" in name for name in names), names
    assert not any("_key_kernel" in name or "_one_pass" in name or "_short" in name for name in names), names
    rows, row = case.prompts + case.tokens, case.batch * case.heads
    gradient, sums = row * rows * 64 * 2, row * rows * 4
    assert peak <= gradient + sums + 2**16, f"{peak} bytes for a gradient of {gradient}"
    names, all_peak = found[6]
    assert any("_key_kernel" in name or "_one_pass" in name or "_short" in name for name in names), names
    assert all_peak >= 3 * gradient


@pytest.mark.parametrize("kind", OPERATIONS)
def test_without_gradients_nothing_is_saved(kind: str) -> None:
    """What is still allocated after a call is its results, byte for byte; with gradients, and ``lse``."""
    function, case = OPERATIONS[kind]
    inputs, call = make(case), by_kernel(function)
    call(**inputs)

    def kept(gradients: bool) -> tuple[int, int]:
        gc.collect()
        before = requested()
        with torch.set_grad_enabled(gradients):
            results = call(**inputs)
        assert all((each.grad_fn is not None) == gradients for each in results)
        return requested() - before, sum(each.nbytes for each in results)

    held, owned = kept(False)
    assert held == owned
    held, owned = kept(True)
    assert (held > owned) == (kind == "attention")
    assert all(each.grad_fn is None for each in call(**{name: each.detach() for name, each in inputs.items()}))


@pytest.mark.parametrize("backend", [None, "inductor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_under_autocast_has_the_types_of_pytorchs_own(dtype: torch.dtype, backend: str | None) -> None:
    def call(inputs: dict[str, Any]) -> Any:
        with torch.autocast("cuda", dtype=dtype):
            return prompt_attention(**inputs, impl="triton")

    inputs = make(AttentionCase(2, 2, 20, 3, 64), torch.float32)
    torch._dynamo.reset()
    with torch.autocast("cuda", dtype=dtype):
        native = scaled_dot_product_attention(inputs["query"], inputs["key"], inputs["value"])
    result = (torch.compile(call, backend=backend, fullgraph=True) if backend else call)(inputs)
    assert {each.dtype for each in result} == {native.dtype} == {dtype}
    narrow = {name: each.detach().to(dtype) for name, each in inputs.items()}
    torch.testing.assert_close(result, prompt_attention(**narrow, impl="triton"), rtol=1e-2, atol=1e-2)
    torch.autograd.backward([each.float().sum() for each in result])
    assert {each.grad.dtype for each in inputs.values()} == {torch.float32}


def test_autocast_leaves_float64_alone() -> None:
    inputs = AttentionCase(1, 1, 4, 2, 16).make(torch.float64, "cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert prompt_attention(**inputs)[0].dtype == torch.float64
        inputs["value"] = inputs["value"].float()
        with pytest.raises(ConfigError, match="value has type"):
            prompt_attention(**inputs)


@pytest.mark.parametrize("backend", [None, "inductor"])
def test_interaction_under_autocast_narrows_the_projections_alone(backend: str | None) -> None:
    def call(inputs: dict[str, Any], impl: str) -> Any:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return prompt_interaction(**inputs, impl=impl)

    case = InteractionCase(4, 8, 8, 768, 1024)
    one, other = make(case, torch.float32), make(case, torch.float32)
    torch._dynamo.reset()
    found = (torch.compile(call, backend=backend, fullgraph=True) if backend else call)(one, "triton")
    wanted = call(other, "reference")
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    for result in (found, wanted):
        torch.autograd.backward([each.square().sum() for each in result])
    for name in one:
        assert one[name].grad.dtype == torch.float32
        scale = other[name].grad.abs().max().item()
        torch.testing.assert_close(one[name].grad, other[name].grad, rtol=5e-2, atol=5e-2 * scale)


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(0, 2, 4, 3, 64, shared=True),
        AttentionCase(2, 2, 0, 3, 64, shared=True),
        AttentionCase(2, 2, 0, 0, 64),
        AttentionCase(2, 0, 4, 3, 64),
        InteractionCase(0, 3, 4, 64, 96),
        InteractionCase(2, 0, 4, 64, 96),
        InteractionCase(2, 3, 0, 64, 96),
    ],
    ids=str,
)
def test_nothing_at_all_is_no_error(case: AttentionCase | InteractionCase) -> None:
    function = prompt_attention if isinstance(case, AttentionCase) else prompt_interaction
    results = {}
    for impl in ("triton", "reference"):
        inputs = make(case, torch.float32)
        result = [each for each in function(**inputs, impl=impl) if each is not None]
        torch.autograd.backward([each.square().sum() for each in result])
        grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in inputs.values()]
        results[impl] = result, grads
    torch.testing.assert_close(results["triton"], results["reference"])


def test_lengths_on_the_gpu_are_not_read_and_those_on_the_cpu_are_moved() -> None:
    inputs = make(AttentionCase(2, 2, 20, 3, 64))
    wrong, right = (
        by_kernel(prompt_attention)(**inputs, lengths=torch.tensor(lengths, device="cuda"))
        for lengths in ([99, -3], [20, 0])
    )
    assert_bits_equal(wrong, right)
    assert_bits_equal(by_kernel(prompt_attention)(**inputs, lengths=torch.tensor([20, 0])), right)
    with pytest.raises(ConfigError, match="lengths run from -3 to 99"):
        prompt_attention(**inputs, lengths=torch.tensor([99, -3]))
    hub = make(InteractionCase(2, 3, 4, 64, 96))
    lengths = torch.tensor([7, 7], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            lengths.sum().item()
        result = by_kernel(prompt_attention)(**inputs, lengths=lengths)
        torch.autograd.backward([each.float().sum() for each in result])
        torch.autograd.backward([each.float().sum() for each in by_kernel(prompt_interaction)(**hub)])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_devices_may_not_differ() -> None:
    inputs = AttentionCase(1, 1, 4, 2, 16).make(torch.float32, "cuda")
    inputs["prompt_value"] = inputs["prompt_value"].cpu()
    with pytest.raises(ConfigError, match=r"prompt_value is on cpu; wanted cuda:0"):
        prompt_attention(**inputs)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("tokens", [77, 257, 577])
def test_a_broken_sample_stays_alone(tokens: int, poison: float) -> None:
    case = AttentionCase(3, 2, tokens, 16, 64, lengths=(tokens, 30, tokens))
    results = []
    for broken in (False, True):
        inputs = case.make(torch.bfloat16, "cuda")
        if broken:
            for name, each in inputs.items():
                each[0] = poison
                if not name.startswith("prompt"):
                    each[1, :, 30:] = poison
        leaves = {name: each.requires_grad_() for name, each in inputs.items()}
        output, prompt_output = by_kernel(prompt_attention)(**leaves, **case.options("cuda"))
        torch.autograd.backward([output.float().sum(), prompt_output.float().sum()])
        grads = [each.grad[1:] for each in leaves.values()]
        results.append([output.detach()[1:], prompt_output.detach()[1:], *grads])
    assert_bits_equal(*results)
    assert all(each.isfinite().all() for each in results[1])


@pytest.mark.parametrize("kind", OPERATIONS)
@pytest.mark.parametrize("compiled", [None, "inductor"])
def test_out_writes_into_views_of_one_buffer(kind: str, compiled: str | None) -> None:
    function, case = OPERATIONS[kind]
    inputs = case.make(torch.bfloat16, "cuda")
    wanted = by_kernel(function)(**inputs)

    def call(buffer: Tensor) -> Tensor:
        if kind == "attention":
            rows = buffer.view(2, 23, 2, 64).transpose(1, 2)
            out = rows[:, :, 3:], rows[:, :, :3]
        else:
            out = buffer[: 2 * 3 * 64].view(2, 3, 64), buffer[2 * 3 * 64 :].view(2, 4, 96)
        function(**inputs, out=out, impl="triton")
        return buffer + 0

    size = 2 * 23 * 2 * 64 if kind == "attention" else 2 * 3 * 64 + 2 * 4 * 96
    buffer = torch.full((size,), torch.nan, dtype=torch.bfloat16, device="cuda")
    torch._dynamo.reset()
    result = (torch.compile(call, backend=compiled, fullgraph=True) if compiled else call)(buffer)
    assert torch.equal(result, buffer)
    if kind == "attention":
        joined = torch.cat([wanted[1], wanted[0]], dim=2).transpose(1, 2).flatten()
    else:
        joined = torch.cat([each.flatten() for each in wanted])
    assert torch.equal(buffer, joined)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_other_gpu() -> None:
    """Triton launches on the current GPU unless told otherwise."""
    for function, case in OPERATIONS.values():
        here = case.make(torch.bfloat16, "cuda:0")
        there = {name: each.to("cuda:1").requires_grad_() for name, each in here.items()}
        found = by_kernel(function)(**there)
        assert_bits_equal([each.detach().to("cuda:0") for each in found], list(by_kernel(function)(**here)))
        torch.autograd.backward([each.float().sum() for each in found])
