"""A call is recognised as one that was made before only where everything found out then still holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from epic_fast import functional
from epic_fast.errors import ConfigError
from epic_fast.functional import prompt_attention, prompt_interaction
from epic_fast.ops import library, repeats
from epic_fast.ops import prompt_attention as attention_operation
from epic_fast.ops import prompt_interaction as interaction_operation
from epic_fast.ops.repeats import Repeats
from epic_fast.testing.cases import AttentionCase, InteractionCase
from epic_fast.testing.numerics import assert_bits_equal

if not library.TRITON_INSTALLED:
    pytest.skip("triton is not installed", allow_module_level=True)

from epic_fast.kernels.common import plan  # pyright: ignore[reportMissingImports]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ATTENTION = AttentionCase(2, 2, 9, 3, 16)
INTERACTION = InteractionCase(2, 4, 4, 16, 32)


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    for operation in (attention_operation, interaction_operation):
        assert operation.repeats is not None
        operation.repeats._known.clear()


def make(case: Any, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = True) -> dict[str, Any]:
    found = case.make(dtype, DEVICE, seed=seed)
    return {name: None if each is None else each.requires_grad_(grad) for name, each in found.items()}


def known(function: Callable[..., Any], inputs: dict[str, Any], impl: str = "triton") -> Any:
    operation = attention_operation if function is prompt_attention else interaction_operation
    more = (None,) if function is prompt_attention else ()
    return operation.known(impl, *inputs.values(), *more)


def gradients(function: Callable[..., Any], inputs: dict[str, Any], **options: Any) -> list[Tensor]:
    outputs = function(**inputs, **options)
    leaves = [each for each in inputs.values() if each is not None and each.requires_grad]
    found = torch.autograd.grad(sum((each * each).sum() for each in outputs), leaves)
    return [*(each.detach() for each in outputs), *found]


CALLS = pytest.mark.parametrize(
    ("function", "case"), [(prompt_attention, ATTENTION), (prompt_interaction, INTERACTION)]
)


@CALLS
def test_the_second_call_is_recognised_and_gives_what_the_operators_give(
    function: Callable[..., Any], case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients(function, make(case), impl="triton")
    inputs = make(case, seed=1)
    assert known(function, inputs) is not None
    assert known(function, inputs, impl="auto") is None
    with monkeypatch.context() as patches:
        patches.setattr(library, "unwatched", lambda: False)
        assert known(function, inputs) is None
        wanted = gradients(function, inputs, impl="triton")
    # No check is made a second time.
    monkeypatch.setattr(functional, "_plainly_attention", None)
    monkeypatch.setattr(functional, "_plainly_interaction", None)
    seen: list[Any] = []
    run = plan.run

    def watched(launcher: Any, tensors: Any, options: Any, alike: Any = None) -> Any:
        seen.append(alike)
        return run(launcher, tensors, options, alike)

    monkeypatch.setattr(plan, "run", watched)
    for _ in range(2):
        for one, other in zip(gradients(function, inputs, impl="triton"), wanted, strict=True):
            assert_bits_equal(one, other)
    # Forward and backward passes both.
    assert len(seen) == 4
    assert None not in seen


def turned(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in another order in memory, where the last stride stays 1."""
    found = {}
    for name, each in inputs.items():
        other = each.detach()
        if each.dim() > 2:
            other = other.transpose(0, 1).contiguous().transpose(0, 1)
        found[name] = other.requires_grad_()
    return found


@CALLS
@pytest.mark.parametrize("hooks_first", [False, True])
def test_hooks_on_saved_tensors_may_make_others_of_them(
    function: Callable[..., Any], case: Any, hooks_first: bool
) -> None:
    """As ``save_on_cpu`` does, whose tensors come back contiguous."""
    inputs = turned(make(case))
    wanted = gradients(function, inputs, impl="reference")
    for hooked in (hooks_first, not hooks_first, hooks_first, not hooks_first):
        if hooked:
            with torch.autograd.graph.saved_tensors_hooks(
                lambda each: each, lambda each: each.clone(memory_format=torch.contiguous_format)
            ):
                found = gradients(function, inputs, impl="triton")
        else:
            found = gradients(function, inputs, impl="triton")
        torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)


@CALLS
def test_calls_that_never_ask_push_nobody_out(function: Callable[..., Any], case: Any) -> None:
    inputs = make(case, grad=False)
    outputs = function(**inputs, impl="triton")
    known_as = known(function, inputs)
    for _ in range(6):
        function(**inputs, impl="triton", out=tuple(torch.empty_like(each) for each in outputs))
        if function is prompt_attention:
            function(**inputs, impl="triton", lengths=torch.tensor([9, 4]))
    assert known(function, inputs) is known_as
    operation = attention_operation if function is prompt_attention else interaction_operation
    assert operation.repeats is not None
    assert {len(kin) for kin in operation.repeats._known.values()} == {1}


@CALLS
def test_without_gradients_as_well(function: Callable[..., Any], case: Any) -> None:
    inputs = make(case, grad=False)
    wanted = function(**inputs, impl="triton")
    assert known(function, inputs) is not None
    for one, other in zip(function(**inputs, impl="triton"), wanted, strict=True):
        assert_bits_equal(one, other)
        assert not one.requires_grad
    # A gradient that is wanted now makes another call.
    assert known(function, make(case)) is None


def _first(change: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def changed(inputs: dict[str, Any]) -> dict[str, Any]:
        name = next(iter(inputs))
        return {**inputs, name: change(inputs[name])}

    return changed


class Mine(Tensor):
    pass


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "shape": _first(lambda each: each[..., :1, :]),
    "strides": _first(lambda each: each.mT.contiguous().mT),
    "type": _first(lambda each: each.half()),
    "wants a gradient": _first(lambda each: each.detach().clone().requires_grad_()),
    "subclass": _first(lambda each: each.as_subclass(Mine)),
    "negative view": _first(lambda each: torch.complex(each, each).conj().imag),
    "zero tensor": _first(lambda each: torch._efficientzerotensor(each.shape, device=each.device)),
    "device": _first(lambda each: each.to("meta")),
    "type of the last": lambda inputs: {**inputs, list(inputs)[-1]: list(inputs.values())[-1].half()},
}


@CALLS
@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_is_not_recognised(function: Callable[..., Any], case: Any, name: str) -> None:
    inputs = make(case, grad=False)
    function(**inputs, impl="triton")
    assert known(function, inputs) is not None
    assert known(function, CHANGES[name](inputs)) is None
    assert known(function, inputs) is not None


def test_what_is_none_is_told_apart() -> None:
    inputs = make(ATTENTION, grad=False)
    lengths = torch.tensor([9, 4], device=DEVICE)
    prompt_attention(**inputs, impl="triton")
    prefix_tuning = {**inputs, "prompt_query": None}
    assert known(prompt_attention, prefix_tuning) is None
    assert attention_operation.known("triton", *inputs.values(), lengths) is None
    assert attention_operation.known("triton", *prefix_tuning.values(), lengths) is None
    # As many tensors, the same ones: None in another place.
    shuffled = list(prefix_tuning.values())
    prompt_attention(**prefix_tuning, impl="triton")
    assert attention_operation.known("triton", *shuffled, None) is not None
    assert attention_operation.known("triton", *shuffled[:3], *shuffled[4:], None, None) is None


def test_the_state_of_the_dispatcher_counts() -> None:
    inputs = make(INTERACTION, grad=False)
    prompt_interaction(**inputs, impl="triton")
    assert known(prompt_interaction, inputs) is not None
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert known(prompt_interaction, inputs) is None
    with torch.inference_mode():
        assert known(prompt_interaction, inputs) is None
    with torch.autograd.profiler.profile():
        assert known(prompt_interaction, inputs) is None
    from torch.utils._python_dispatch import TorchDispatchMode

    with TorchDispatchMode():
        assert known(prompt_interaction, inputs) is None
    seen = []

    def watch(each: Tensor) -> Tensor:
        seen.append(known(prompt_interaction, {**inputs, "temperature": each}))
        return each

    torch.func.vmap(watch)(torch.ones(2, device=DEVICE))
    assert seen == [None]
    assert known(prompt_interaction, inputs) is not None


def test_nothing_is_kept_under_autocast() -> None:
    inputs = make(INTERACTION, grad=False)
    with torch.autocast(DEVICE, dtype=torch.float16):
        narrow = prompt_interaction(**inputs, impl="triton")
        assert known(prompt_interaction, inputs) is None
    wide = prompt_interaction(**inputs, impl="triton")
    assert not torch.equal(narrow[0], wide[0])


@CALLS
def test_what_does_not_fit_is_still_refused(function: Callable[..., Any], case: Any) -> None:
    inputs = make(case, grad=False)
    for _ in range(2):
        function(**inputs, impl="triton")
    name = list(inputs)[1]
    with pytest.raises(ConfigError, match=name):
        function(**{**inputs, name: inputs[name].double()}, impl="triton")
    if function is prompt_attention:
        with pytest.raises(ConfigError, match="prompt_mask"):
            function(**inputs, prompt_mask="ful", impl="triton")
        for _ in range(2):
            function(**inputs, lengths=torch.tensor([9, 4]), impl="triton")
        with pytest.raises(ConfigError, match="lengths"):
            function(**inputs, lengths=torch.tensor([9, 10]), impl="triton")


@CALLS
@pytest.mark.parametrize("kind", ["expanded", "transposed", "one of them", "negative view"])
def test_any_gradient_may_come_in(function: Callable[..., Any], case: Any, kind: str) -> None:
    def run(inputs: dict[str, Any]) -> list[Tensor]:
        outputs = function(**inputs, impl="triton")
        grads: list[Tensor] = []
        for index, each in enumerate(outputs):
            values = torch.linspace(0.1, 0.9, each.numel(), device=DEVICE).view(each.shape)
            if kind == "expanded":
                values = torch.full((), 0.5, device=DEVICE).expand(each.shape)
            elif kind == "transposed":
                values = values.mT.contiguous().mT
            elif kind == "negative view":
                values = torch.complex(values, values).conj().imag
            if kind != "one of them" or index == 0:
                grads.append(values)
        return list(torch.autograd.grad(outputs[: len(grads)], list(inputs.values()), grads, allow_unused=True))

    first = run(make(case))
    assert known(function, make(case)) is not None
    for each in (run(make(case)), run(make(case))):
        for one, other in zip(each, first, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_bits_equal(one, other)
    # Ordinary gradients after odd ones have a signature of their own.
    plain = gradients(function, make(case), impl="triton")
    wanted = gradients(function, make(case), impl="reference")
    torch.testing.assert_close(plain, wanted, rtol=2e-4, atol=2e-4)


@CALLS
def test_a_gradient_of_other_strides_has_no_old_plan(function: Callable[..., Any], case: Any) -> None:
    def run(grads: list[Tensor]) -> list[Tensor]:
        inputs = make(case)
        return list(torch.autograd.grad(function(**inputs, impl="triton"), list(inputs.values()), grads))

    outputs = function(**make(case, grad=False), impl="triton")
    plain = [torch.linspace(0.1, 0.9, each.numel(), device=DEVICE).view(each.shape) for each in outputs]
    # The same numbers in another order in memory.
    moved = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in plain]
    wanted = run(plain)
    for grads in (plain, plain, moved, plain, moved):
        for one, other in zip(run(grads), wanted, strict=True):
            assert_bits_equal(one, other)


def test_a_changed_input_is_noticed_in_the_backward_pass() -> None:
    inputs = make(INTERACTION)
    prompt_interaction(**inputs, impl="triton")
    outputs = prompt_interaction(**inputs, impl="triton")
    with torch.no_grad():
        inputs["text_prompt"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs[0].sum().backward()


def test_where_pytorch_has_no_such_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        pass

    monkeypatch.setattr(repeats, "_C", Nothing())
    inputs = make(INTERACTION)
    found = [gradients(prompt_interaction, inputs, impl="triton") for _ in range(2)]
    assert known(prompt_interaction, inputs) is None
    for one, other in zip(*found, strict=True):
        assert_bits_equal(one, other)


def test_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "MOST_SHAPES", 4)
    known_calls = Repeats()
    for size in range(1, 12):
        known_calls.keep("triton", (torch.zeros(size),))
        assert len(known_calls._known) <= 4
        assert known_calls.find("triton", (torch.ones(size),)) is not None
    for kind in (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.int8):
        known_calls.keep("triton", (torch.zeros(11, dtype=kind),))
    assert len(known_calls._known["triton", 1, torch.Size([11])]) == repeats.MOST_ALIKE
    assert known_calls.find("triton", (torch.zeros(11, dtype=torch.int8),)) is not None
    assert known_calls.find("triton", (torch.zeros(11),)) is None


def test_compiled_code_asks_nobody() -> None:
    inputs = make(INTERACTION)
    prompt_interaction(**inputs, impl="triton")
    asked = []

    def find(*given: Any) -> None:
        asked.append(given)

    assert interaction_operation.repeats is not None
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(interaction_operation.repeats, "find", find, raising=False)
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda **given: prompt_interaction(**given, impl="triton"), backend="eager", fullgraph=True
        )
        compiled(**inputs)
    assert not asked
