"""The harness itself: what it must refuse, and what it must let through."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from epic_fast.functional import prompt_attention, prompt_interaction
from epic_fast.testing.cases import (
    ATTENTION_MEASURED,
    ATTENTION_PRODUCTION,
    ATTENTION_SMOKE,
    INTERACTION_SMOKE,
    AttentionCase,
    attention_cases,
    interaction_cases,
    with_batch,
)
from epic_fast.testing.numerics import (
    assert_bits_equal,
    bits_equal,
    budget,
    check_operation,
    measure,
    measure_operation,
    poisoned_empty,
    run_forward_backward,
)

HALF = torch.bfloat16


def product(left: Tensor, right: Tensor) -> Tensor:
    return left @ right


def operands(dtype: torch.dtype = HALF, size: int = 48) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, size, generator=random).to(dtype) for name in ("left", "right")}


def errors(dtype: torch.dtype = HALF) -> dict[str, Any]:
    inputs = operands(dtype)
    return {
        "want64": product(**{name: each.double() for name, each in inputs.items()}),
        "eager": product(**inputs),
        "factor": 2.0,
        "dtype": dtype,
        "reduction": 48,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_eager_result_and_the_exact_one_pass(dtype: torch.dtype) -> None:
    settings = errors(dtype)
    for got in (settings["eager"], settings["want64"].to(dtype)):
        measured = budget(got, **settings)
        assert measured.passes
        assert measured.max_error <= measured.max_budget
        assert measured.eager_max_error > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_element_that_is_off_is_named_with_its_values(dtype: torch.dtype) -> None:
    settings = errors(dtype)
    got = settings["eager"].clone()
    got[17, 5] += 16 * torch.finfo(dtype).eps * settings["want64"].abs().max()
    with pytest.raises(AssertionError) as caught:
        budget(got, name="product", **settings)
    message = str(caught.value)
    for part in ("product", "(17, 5)", f"got {got[17, 5].item():.9g}", "wanted", "budget", "2 x"):
        assert part in message


def test_a_small_error_everywhere_fails_by_its_root_mean_square() -> None:
    settings = errors()
    # Each element stays below the largest error that PyTorch makes somewhere; together they are a bias.
    drift = 1.9 * (settings["eager"].double() - settings["want64"]).abs().max()
    measured = measure((settings["want64"] + drift).to(HALF), **settings)
    assert measured.max_error <= measured.max_budget
    assert not measured.passes
    assert "root mean square" in measured.problem


def test_a_result_in_a_lower_precision_than_its_type_fails() -> None:
    settings = errors(torch.float32)
    with pytest.raises(AssertionError):
        budget(settings["want64"].to(HALF).float(), **settings)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_never_passes(value: float) -> None:
    settings = errors()
    got = settings["eager"].clone()
    got[3, 4] = value
    with pytest.raises(AssertionError, match=r"(?s)worst at \(3, 4\).*not finite: 1 of"):
        budget(got, **settings)
    for broken in ("want64", "eager"):
        spoilt = settings[broken].clone()
        spoilt[0, 0] = value
        with pytest.raises(ValueError, match="milder inputs"):
            budget(settings["eager"], **{**settings, broken: spoilt})


def test_shape_type_and_yardstick_are_checked() -> None:
    settings = errors()
    with pytest.raises(AssertionError, match=r"shape \(47, 48\); wanted \(48, 48\)"):
        budget(settings["eager"][1:], **settings)
    with pytest.raises(AssertionError, match=r"torch\.float32; wanted torch\.bfloat16"):
        budget(settings["eager"].float(), **settings)
    with pytest.raises(TypeError, match=r"wanted torch\.float64"):
        budget(settings["eager"], **{**settings, "want64": settings["want64"].float()})


def test_an_empty_tensor_passes() -> None:
    nothing = torch.zeros(3, 0)
    assert budget(nothing, nothing.double(), nothing, factor=2, dtype=torch.float32, reduction=1).passes


def test_outputs_and_gradients_are_all_checked() -> None:
    found = check_operation(product, product, operands(), reduction=48)
    assert [each.tensor for each in found] == ["output 0", "gradient of left", "gradient of right"]

    class Crooked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
            ctx.save_for_backward(left, right)
            return left @ right

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
            left, right = ctx.saved_tensors
            return gradients[0] @ right.T, 1.03 * (left.T @ gradients[0])

    def crooked(left: Tensor, right: Tensor) -> Tensor:
        return Crooked.apply(left, right)  # pyright: ignore[reportReturnType]

    with pytest.raises(AssertionError, match="gradient of right") as caught:
        check_operation(crooked, product, operands(), reduction=48)
    assert "gradient of left" not in str(caught.value)
    assert all(each.passes for each in measure_operation(crooked, product, operands(), reduction=48, needs=["left"]))


def test_a_missing_gradient_is_a_failure_and_zero_may_be_none() -> None:
    def detached(left: Tensor, right: Tensor) -> Tensor:
        return left @ right.detach()

    with pytest.raises(AssertionError, match="gradient of right: wanted a tensor"):
        check_operation(detached, product, operands(), reduction=48)

    def times_zero(left: Tensor, right: Tensor) -> Tensor:
        return left @ right.detach() + 0 * right

    check_operation(detached, times_zero, operands(), reduction=48)


def test_references_run_without_autocast() -> None:
    seen = []

    def spying(left: Tensor, right: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return left @ right

    with torch.autocast("cpu", dtype=HALF):
        results = run_forward_backward(spying, operands(torch.float32))
    assert seen == [False]
    assert results.outputs["output 0"].dtype == torch.float32  # pyright: ignore[reportOptionalMemberAccess]


@settings(max_examples=15)
@given(attention_cases(max_tokens=12, max_prompts=6, head_dims=(16,)))
def test_the_reference_of_attention_is_within_its_own_budget(case: AttentionCase) -> None:
    check_operation(
        lambda **given: prompt_attention(**given, impl="reference"),
        lambda **given: prompt_attention(**given, impl="reference"),
        case.make(HALF),
        case.options(),
        reduction=case.reductions,
        output_names=case.outputs,
    )


@settings(max_examples=10)
@given(interaction_cases(max_prompts=5, widths=(16, 24)))
def test_the_reference_of_the_interaction_is_within_its_own_budget(case: Any) -> None:
    found = check_operation(
        lambda **given: prompt_interaction(**given, impl="reference"),
        lambda **given: prompt_interaction(**given, impl="reference"),
        case.make(HALF),
        reduction=case.reductions,
        output_names=case.outputs,
    )
    assert len(found) == 2 + 9


def test_a_wrong_mask_and_a_wrong_scale_are_found() -> None:
    """The budget is tight enough: one key too many, or a scale that is one percent off, breaks it in every type."""
    case = AttentionCase(2, 2, 24, 5, 32, causal=True)

    def off(**given: Any) -> Any:
        return prompt_attention(**{**given, "scale": 1.01 * 32**-0.5})

    def open_mask(**given: Any) -> Any:
        return prompt_attention(**{**given, "causal": False})

    for dtype in (torch.float32, torch.float16, HALF):
        for wrong in (off, open_mask):
            with pytest.raises(AssertionError, match="output"):
                check_operation(
                    wrong,
                    prompt_attention,
                    case.make(dtype),
                    case.options(),
                    reduction=case.reductions,
                    output_names=case.outputs,
                )


def test_bits() -> None:
    one = torch.tensor([0.0, math.nan, 2.0])
    assert bits_equal((one, None), [one.clone(), None])
    assert not bits_equal(one, torch.tensor([-0.0, math.nan, 2.0]))
    assert not bits_equal(one, one.double())
    assert not bits_equal((one, None), (one, one))
    assert not bits_equal(one, one[:2])
    assert bits_equal(torch.arange(3), torch.arange(3))
    assert bits_equal(torch.ones(2, 3).T, torch.ones(3, 2))
    assert_bits_equal((one,), (one,))
    off = torch.zeros(2, 3)
    off[1, 2] = 1e-38
    with pytest.raises(AssertionError, match=r"outputs\[1\]: 1 of 6 elements differ in their bits, first at \(1, 2\)"):
        assert_bits_equal((one, torch.zeros(2, 3)), (one, off), name="outputs")
    with pytest.raises(AssertionError, match="None"):
        assert_bits_equal(one, None)


ALLOCATE = """
import torch
def allocate():
    like = torch.ones(2)
    return (torch.empty(2), torch.empty_like(like), torch.empty_strided((2,), (1,)), like.new_empty(2),
            like.new_empty_strided((2,), (1,)), torch.empty(2, dtype=torch.bfloat16))
def integers():
    return torch.empty(2, dtype=torch.int32)
"""


def module_named(name: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": name}
    exec(ALLOCATE, namespace)
    return namespace


def test_fresh_memory_of_the_package_is_poisoned() -> None:
    ours, theirs = module_named("epic_fast.kernels.some"), module_named("torch.nn.some")
    originals = (torch.empty, torch.empty_like, torch.Tensor.new_empty)
    with poisoned_empty() as poison:
        assert all(bool(each.isnan().all()) for each in ours["allocate"]())
        assert poison.allocations == 6
        assert (ours["integers"]() > 2**28).all()
        theirs["allocate"]()
        assert poison.allocations == 7
        zeros = torch.zeros(3).masked_fill(torch.tensor([True, False, True]), 1.0)
    assert zeros.tolist() == [1, 0, 1]
    assert (torch.empty, torch.empty_like, torch.Tensor.new_empty) == originals
    assert "new_empty" not in vars(torch.Tensor)


def test_memory_is_itself_again_after_an_error() -> None:
    original = torch.empty
    with pytest.raises(KeyError), poisoned_empty():
        raise KeyError
    assert torch.empty is original


@pytest.mark.parametrize("case", [*ATTENTION_SMOKE, *INTERACTION_SMOKE, *ATTENTION_PRODUCTION[:1]], ids=repr)
def test_cases_make_what_the_operations_take(case: Any) -> None:
    function = prompt_attention if isinstance(case, AttentionCase) else prompt_interaction
    function(**case.make(torch.float32), **case.options())
    doubled = with_batch(case, 2 * case.batch)
    outputs = function(**doubled.make(torch.float32), **doubled.options())
    assert outputs[0].shape[0] == 2 * case.batch
    assert bits_equal(tuple(case.make(seed=3).values()), tuple(case.make(seed=3).values()))


def test_layouts_are_what_they_say() -> None:
    case = AttentionCase(2, 3, 5, 4, 16)
    heads, tokens, packed = (
        AttentionCase(2, 3, 5, 4, 16, layout=layout).make()["key"] for layout in ("heads", "tokens", "packed")
    )
    assert heads is not None
    assert tokens is not None
    assert packed is not None
    assert heads.shape == tokens.shape == packed.shape == (2, 3, 5, 16)
    assert heads.stride() == (240, 80, 16, 1)
    assert tokens.stride() == (240, 16, 48, 1)
    assert packed.stride() == (9 * 144, 16, 144, 1)
    given = AttentionCase(2, 3, 5, 4, 16, layout="packed").make()
    addresses = {each.untyped_storage().data_ptr() for each in given.values() if each is not None}
    assert len(addresses) == 1
    assert set(case.reductions.values()) == {16}


def test_floors_of_the_measured_cases() -> None:
    """Bytes moved once at 3 TB/s; measured.md's column "floor fwd" in ms (one case is bound by FLOPs)."""
    floors = [0.048, 0.052, 0.012, 0.048, 0.191]
    found = [case.bytes_moved(torch.bfloat16) / 3e12 * 1e3 for case in ATTENTION_MEASURED]
    assert found == pytest.approx(floors, abs=0.002)
    assert ATTENTION_MEASURED[0].flops() == 4 * 64 * 16 * 64 * 273**2
    assert ATTENTION_MEASURED[1].flops() / 800e12 * 1e3 == pytest.approx(0.058, abs=0.001)
    case = AttentionCase(1, 1, 3, 2, 16, causal=True)
    assert case.flops() == 4 * 16 * (2 * 5 + 3 + 4 + 5)
    assert case.flops("backward") == 2.5 * case.flops()


def test_poison_leaves_the_device_context_alone() -> None:
    """It keeps the functions that it diverts, from its first use on, whoever they belong to then."""
    torch.utils._device._device_constructors.cache_clear()
    with poisoned_empty():
        torch.utils._device._device_constructors()
    with torch.device("meta"):
        assert torch.empty(1).is_meta


def test_under_poison_no_plan_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled plans ask for memory where no poison reaches."""
    from epic_fast.ops import native

    monkeypatch.delenv("EPIC_FAST_NATIVE", raising=False)
    monkeypatch.setattr(native, "load", lambda: "built")
    native.find.cache_clear()
    assert native.find() == "built"
    with poisoned_empty():
        assert native.find() is None
    assert native.find() == "built"
    monkeypatch.undo()
    native.find.cache_clear()
