"""The Triton kernels of the prompt interaction: in the interpreter without a GPU, in bfloat16 on one."""

# pyright: basic, reportArgumentType=false, reportMissingImports=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportOptionalIterable=false, reportOptionalOperand=false

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

pytest.importorskip("triton")

from epic_fast.functional import prompt_interaction
from epic_fast.kernels.common import launch as launch_module
from epic_fast.kernels.common import plan
from epic_fast.kernels.prompt_interaction import reference, triton_backward, triton_forward
from epic_fast.kernels.prompt_interaction.tiles import GradientTile, MixTile, ProductTile
from epic_fast.testing.cases import INTERACTION_MEASURED, InteractionCase, interaction_cases
from epic_fast.testing.numerics import assert_bits_equal, budget, check_operation, poisoned_empty

forward, backward = triton_forward.prompt_interaction_forward, triton_backward.prompt_interaction_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = tuple(InteractionCase(1, 1, 1, 16, 16).make())
ALL = (True,) * len(NAMES)


@pytest.fixture(autouse=True)
def nothing_is_left_unwritten() -> Iterator[None]:
    with poisoned_empty():
        yield


class Fused(torch.autograd.Function):
    """The launchers under autograd; what autograd asks for is what they are asked for."""

    @staticmethod
    def forward(ctx: Any, keep: bool, eps: float, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        next_text, next_vision, projections = forward(*inputs, eps=eps, save_projections=True)
        ctx.save_for_backward(*inputs)
        ctx.eps, ctx.projections = eps, projections if keep else None
        return next_text, next_vision

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        needs = ctx.needs_input_grad[2:]
        found = backward(*grads, *ctx.saved_tensors, eps=ctx.eps, needs=needs, projections=ctx.projections)
        return (None, None, *found)


def fused(*, keep: bool = False, eps: float = 1e-8, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    return Fused.apply(keep, eps, *inputs.values())  # pyright: ignore[reportReturnType]


def in_one_graph(**given: Tensor) -> tuple[Tensor, Tensor]:
    """The operation itself, compiled: in a graph without a break."""
    torch._dynamo.reset()

    def interaction(**arguments: Any) -> Any:
        return prompt_interaction(**arguments, impl="triton")

    return torch.compile(interaction, backend="aot_eager", fullgraph=True)(**given)


def check(
    case: InteractionCase,
    dtype: torch.dtype,
    options: dict[str, Any] | None = None,
    candidate: Any = fused,
    **changed: Tensor,
) -> None:
    inputs = {**case.make(dtype, DEVICE), **changed}
    options = options or {}

    def specification(**tensors: Any) -> tuple[Tensor, Tensor]:
        return reference.prompt_interaction(**{key: each for key, each in tensors.items() if key != "keep"})

    check_operation(
        candidate, specification, inputs, options, reduction=case.reductions, output_names=InteractionCase.outputs
    )


def gradients(inputs: dict[str, Tensor], needs: tuple[bool, ...] = ALL, **options: Any) -> tuple[Tensor | None, ...]:
    return backward(*cotangents(inputs), *inputs.values(), eps=1e-8, needs=needs, **options)


def cotangents(inputs: dict[str, Tensor]) -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    prompts = inputs["text_prompt"], inputs["vision_prompt"]
    return [torch.randn(each.shape, generator=random).to(each.device, each.dtype) for each in prompts]


SMALL = InteractionCase(2, 3, 4, 20, 24)
CHANNELS = InteractionCase(3, 5, 2, 24, 17, channel_gates=True, temperature=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        CHANNELS,
        InteractionCase(1, 1, 1, 16, 16),
        InteractionCase(2, 8, 8, 272, 80),
        InteractionCase(9, 8, 8, 32, 70, channel_gates=True),
        InteractionCase(1, 17, 40, 48, 33),
        InteractionCase(1, 64, 33, 16, 24, channel_gates=True),
        # More rows, and more samples, than a sum takes at a time.
        InteractionCase(130, 1, 1, 16, 16),
        InteractionCase(130, 1, 2, 16, 16, channel_gates=True),
    ],
    ids=lambda case: f"{case.batch}-{case.text_prompts}-{case.vision_prompts}-{case.text_width}-{case.vision_width}",
)
@pytest.mark.parametrize("keep", [False, True], ids=["again", "kept"])
def test_within_the_budget(case: InteractionCase, dtype: torch.dtype, keep: bool) -> None:
    check(case, dtype, {"keep": keep})


@settings(max_examples=5)
@given(case=interaction_cases(max_prompts=5, widths=(16, 24)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_call_is_within_the_budget(dtype: torch.dtype, case: InteractionCase) -> None:
    check(case, dtype)


@pytest.mark.parametrize("case", [CHANNELS, InteractionCase(1, 17, 2, 16, 16)], ids=["channels", "many prompts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_in_one_graph_within_the_budget(case: InteractionCase, dtype: torch.dtype) -> None:
    check(case, dtype, candidate=in_one_graph)


def patterns() -> list[tuple[bool, ...]]:
    """Each input alone, all but each, and some of each size."""
    alone = [tuple(index == one for index in range(9)) for one in range(9)]
    others = [tuple(not each for each in pattern) for pattern in alone]
    some = [pattern for number, pattern in enumerate(itertools.product((False, True), repeat=9)) if number % 29 == 7]
    return list(dict.fromkeys([*alone, *others, *some]))


@pytest.mark.parametrize("case", [SMALL, CHANNELS], ids=["scalar", "channels"])
def test_every_pattern_of_needs_gives_the_same_bits(case: InteractionCase) -> None:
    inputs = case.make(device=DEVICE)
    everything = gradients(inputs)
    for needs in patterns():
        found = gradients(inputs, needs)
        wanted = tuple(each if need else None for each, need in zip(everything, needs, strict=True))
        assert_bits_equal(found, wanted, name=str([name for name, need in zip(NAMES, needs, strict=True) if need]))


def test_nothing_needed_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "launch", None)
    assert gradients(SMALL.make(device=DEVICE), (False,) * 9) == (None,) * 9


class Recorder:
    """The launches of one kernel: how many programs, and the value of every parameter."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, dict[str, Any]]] = []


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    kernels = {
        "project_kernel": triton_forward.project_kernel,
        "mix_kernel": triton_forward.mix_kernel,
        "mix_backward_kernel": triton_backward.mix_backward_kernel,
        "gradients_kernel": triton_backward.gradients_kernel,
    }
    recorders = {name: Recorder() for name in kernels}

    def record(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, int], facts: Any) -> None:
        (name,) = (name for name, each in kernels.items() if each is kernel)
        recorders[name].launches.append((programs, dict(zip(kernel.arg_names, arguments, strict=True))))
        launch_module.launch(kernel, programs, arguments, options, facts)

    monkeypatch.setattr(plan, "launch", record)
    return recorders


def test_launches_of_a_pass(launched: dict[str, Recorder]) -> None:
    inputs = SMALL.make(device=DEVICE)
    *_, projections = forward(*inputs.values(), eps=1e-8, save_projections=True)
    assert [len(each.launches) for each in launched.values()] == [1, 1, 0, 0]
    gradients(inputs)
    assert [len(each.launches) for each in launched.values()] == [2, 1, 1, 1]
    gradients(inputs, projections=projections)
    assert [len(each.launches) for each in launched.values()] == [2, 1, 2, 2]


@pytest.mark.parametrize(
    ("needed", "programs", "allocated"),
    [
        # Programs of the products and sums; tensors beyond the two projections.
        (("temperature",), 1, 2),
        (("text_gate",), 1, 2),
        (("text_prompt",), 1, 2),
        (("vision_prompt",), 1, 2),
        (("text_to_vision_bias",), 1, 2),
        (("text_to_vision_weight",), 1, 2),
        (("text_prompt", "vision_prompt"), 2, 4),
    ],
)
def test_frozen_inputs_cost_nothing(
    needed: tuple[str, ...], programs: int, allocated: int, launched: dict[str, Recorder]
) -> None:
    inputs = SMALL.make(device=DEVICE)
    *_, projections = forward(*inputs.values(), eps=1e-8, save_projections=True)
    for recorder in launched.values():
        recorder.launches.clear()
    with poisoned_empty() as poison:
        gradients(inputs, tuple(name in needed for name in NAMES), projections=projections)
    ((grid, flags),) = launched["gradients_kernel"].launches
    assert (grid, poison.allocations) == (programs, allocated)
    assert sum(value is True for name, value in flags.items() if name.startswith("NEED_")) == len(needed)
    assert not launched["project_kernel"].launches


def test_a_gate_alone_needs_one_side_only(launched: dict[str, Recorder]) -> None:
    inputs = SMALL.make(device=DEVICE)
    gradients(inputs, tuple(name == "vision_gate" for name in NAMES))
    ((grid, flags),) = launched["mix_backward_kernel"].launches
    assert flags["TEXT_PARTS"] == 0
    assert grid == SMALL.batch * flags["VISION_PARTS"]


@pytest.mark.parametrize("which", [0, 1])
def test_an_output_that_nobody_used_has_no_gradient(which: int) -> None:
    inputs = SMALL.make(device=DEVICE)
    grads: list[Tensor | None] = list(cotangents(inputs))
    zeros = [each.clone() for each in cotangents(inputs)]
    zeros[which].zero_()
    grads[which] = None
    assert_bits_equal(
        backward(*grads, *inputs.values(), eps=1e-8, needs=ALL),
        backward(*zeros, *inputs.values(), eps=1e-8, needs=ALL),
    )


@pytest.mark.parametrize("zero", ["text_prompt", "vision_prompt", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zero_vectors(zero: str, dtype: torch.dtype) -> None:
    """A row of zeros, or (all biases zero too) projected rows of zeros: finite, and no slope through the norm."""
    inputs = SMALL.make(dtype, DEVICE)
    changed = {name: inputs[name].clone() for name in NAMES[:2]}
    if zero == "everything":
        changed = {name: torch.zeros_like(inputs[name]) for name in NAMES[:8]}
    else:
        changed[zero][0, 1] = 0.0
    options = {"eps": 1e-2 if dtype == torch.float16 else 1e-8}
    if zero == "everything":
        got = fused(**{**inputs, **changed}, **options)
        assert all(torch.count_nonzero(each) == 0 for each in got)
        found = backward(*cotangents(inputs), *{**inputs, **changed}.values(), eps=options["eps"], needs=ALL)
        assert all(each.isfinite().all() for each in found if each is not None)
    else:
        check(SMALL, dtype, options, **changed)


def test_norms_below_eps_count_as_it() -> None:
    """Some norms lie below this eps, which stops their slope, and some above."""
    eps = 4.5
    inputs = SMALL.make(device=DEVICE)
    projected, _ = triton_forward.project_prompts(*list(inputs.values())[:6])
    for norms in (inputs["text_prompt"].norm(dim=-1), projected.norm(dim=-1)):
        assert (norms < eps).any()
        assert (norms > eps).any()
    check(SMALL, torch.float32, {"eps": eps})


@pytest.mark.parametrize("temperature", [1e-6, 1e-2, 1e4])
def test_temperatures_far_apart(temperature: float) -> None:
    inputs = {**SMALL.make(device=DEVICE), "temperature": torch.tensor(temperature, device=DEVICE)}
    wide = {name: each.double() for name, each in inputs.items()}
    found, wanted = forward(*inputs.values(), eps=1e-8), reference.prompt_interaction(**wide)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-4)
    assert all(each.isfinite().all() for each in gradients(inputs) if each is not None)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["text_prompt", "vision_prompt"])
def test_nan_stays_in_its_sample(where: str, broken: float) -> None:
    inputs = InteractionCase(3, 3, 4, 20, 24).make(device=DEVICE)
    before = forward(*inputs.values(), eps=1e-8)
    grads_before = gradients(inputs)
    inputs[where] = inputs[where].clone()
    inputs[where][1, 2, 5] = broken
    after, grads_after = forward(*inputs.values(), eps=1e-8), gradients(inputs)
    others = torch.tensor([0, 2], device=DEVICE)
    for one, other in zip((*before, *grads_before[:2]), (*after, *grads_after[:2]), strict=True):
        assert one is not None
        assert other is not None
        assert_bits_equal(one[others], other[others])
        assert not other[1].isfinite().all()


def test_a_sample_does_not_see_its_neighbours() -> None:
    """Bits on a GPU.  The interpreter's products round by the place of a row, so that it needs exact projections."""
    inputs = InteractionCase(11, 7, 5, 20, 24).make(device=DEVICE)
    inputs.update({name: (inputs[name] * 8).round() / 8 for name in NAMES[:6]})
    grads = cotangents(inputs)
    together = (*forward(*inputs.values(), eps=1e-8), *gradients(inputs)[:2])
    for sample in (0, 4, 10):
        alone = {**inputs, **{name: inputs[name][sample : sample + 1] for name in NAMES[:2]}}
        own = [each[sample : sample + 1] for each in grads]
        result = (*forward(*alone.values(), eps=1e-8), *backward(*own, *alone.values(), eps=1e-8, needs=ALL)[:2])
        for index, (one, other) in enumerate(zip(together, result, strict=True)):
            assert one is not None
            assert other is not None
            if index < 2 or DEVICE == "cuda":
                assert_bits_equal(one[sample : sample + 1], other)
            else:
                torch.testing.assert_close(one[sample : sample + 1], other, rtol=1e-5, atol=1e-6)


def test_two_runs_give_the_same_bits() -> None:
    inputs = CHANNELS.make(device=DEVICE)
    once, again = ((*forward(*inputs.values(), eps=1e-8), *gradients(inputs)) for _ in range(2))
    assert_bits_equal(once, again)


def spread(tensor: Tensor) -> Tensor:
    """The same values as a slice of a tower's buffer, whose rows lie further apart."""
    batch, prompts, width = tensor.shape
    buffer = torch.full((batch, prompts + 3, width + 5), float("nan"), dtype=tensor.dtype, device=tensor.device)
    view = buffer[:, 1 : 1 + prompts, 2 : 2 + width]
    view.copy_(tensor)
    return view


def test_results_go_into_slots_of_a_buffer_and_nowhere_else() -> None:
    inputs = SMALL.make(device=DEVICE)
    wanted = forward(*inputs.values(), eps=1e-8)
    slots = [spread(torch.zeros_like(each)) for each in wanted]
    buffers = [slot._base for slot in slots]
    found = forward(*inputs.values(), eps=1e-8, next_text=slots[0], next_vision=slots[1])
    for slot, result, want, buffer in zip(slots, found, wanted, buffers, strict=True):
        assert result is slot
        assert_bits_equal(slot.contiguous(), want)
        assert buffer is not None
        assert int(buffer.isnan().sum()) == buffer.numel() - want.numel()


@pytest.mark.parametrize("layout", ["slices", "prompts first", "last stride"])
def test_any_strides(layout: str) -> None:
    inputs = SMALL.make(device=DEVICE)
    change = {
        "slices": spread,
        "prompts first": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
        "last stride": lambda tensor: tensor.mT.contiguous().mT,
    }[layout]
    laid_out = {**inputs, **{name: change(inputs[name]) for name in NAMES[:2]}}
    grads = cotangents(inputs)
    assert_bits_equal(forward(*laid_out.values(), eps=1e-8), forward(*inputs.values(), eps=1e-8))
    assert_bits_equal(
        backward(*map(change, grads), *laid_out.values(), eps=1e-8, needs=ALL),
        backward(*grads, *inputs.values(), eps=1e-8, needs=ALL),
    )


def test_weights_and_gates_that_are_views() -> None:
    inputs = CHANNELS.make(device=DEVICE)
    turned = {name: each.mT.contiguous().mT if each.dim() == 2 else each for name, each in inputs.items()}
    turned["text_gate"] = inputs["text_gate"][:1].expand_as(inputs["text_gate"])
    straight = {**inputs, "text_gate": turned["text_gate"].contiguous()}
    assert_bits_equal(forward(*turned.values(), eps=1e-8), forward(*straight.values(), eps=1e-8))
    assert_bits_equal(gradients(turned), gradients(straight))


def test_an_expanded_gradient() -> None:
    inputs = SMALL.make(device=DEVICE)
    ones = [torch.ones((), device=DEVICE).expand(inputs[name].shape) for name in NAMES[:2]]
    full = [each.contiguous() for each in ones]
    assert_bits_equal(
        backward(*ones, *inputs.values(), eps=1e-8, needs=ALL), backward(*full, *inputs.values(), eps=1e-8, needs=ALL)
    )


def test_weights_narrower_than_the_prompts() -> None:
    """As under autocast: the projections in the weights' type, everything else in the prompts'."""
    inputs = SMALL.make(device=DEVICE)
    inputs.update({name: inputs[name].half() for name in NAMES[2:6]})

    def specification(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(DEVICE, dtype=torch.float16):
            return reference.prompt_interaction(*tensors)

    for found, wanted in zip(forward(*inputs.values(), eps=1e-8), specification(*inputs.values()), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=5e-3, atol=5e-3)
    leaves = [each.clone().requires_grad_() for each in inputs.values()]
    wanted = torch.autograd.grad(specification(*leaves), leaves, cotangents(inputs))
    for name, found, want in zip(NAMES, gradients(inputs), wanted, strict=True):
        assert found is not None
        assert found.dtype == inputs[name].dtype
        torch.testing.assert_close(found, want, rtol=2e-2, atol=2e-2, msg=lambda text, name=name: f"{name}: {text}")


def test_float16_gradients_that_float16_could_not_carry_all_the_way() -> None:
    """Long prompts and small gradients: the factors between them are below what float16 holds, the results are not."""
    inputs = InteractionCase(1, 3, 4, 64, 48, temperature=0.02).make(torch.float16, DEVICE)
    inputs.update({name: inputs[name] * 16 for name in NAMES[:2]})
    grads = [each * 1e-4 for each in cotangents(inputs)]

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [each.to(dtype).requires_grad_() for each in inputs.values()]
        return torch.autograd.grad(reference.prompt_interaction(*leaves), leaves, [each.to(dtype) for each in grads])

    found = backward(*grads, *inputs.values(), eps=1e-8, needs=ALL)
    for name, got, exact, eager in zip(NAMES, found, run(torch.float64), run(torch.float16), strict=True):
        assert got is not None
        budget(got, exact, eager, factor=3.0, dtype=torch.float16, reduction=64, name=name)


def test_towers_of_different_types(launched: dict[str, Recorder]) -> None:
    """A launch for each tower: the two sides of one launch choose between pointers, which must be of one type."""
    inputs = SMALL.make(device=DEVICE)
    for name in ("vision_prompt", "vision_to_text_weight", "vision_to_text_bias", "vision_gate"):
        inputs[name] = inputs[name].half()
    wide = [each.double().requires_grad_() for each in inputs.values()]
    wanted = reference.prompt_interaction(*wide)
    grads = torch.autograd.grad(wanted, wide, [each.double() for each in cotangents(inputs)])
    found = (*forward(*inputs.values(), eps=1e-8), *gradients(inputs))
    kinds = (inputs["text_prompt"].dtype, inputs["vision_prompt"].dtype, *(each.dtype for each in inputs.values()))
    for one, other, dtype in zip(found, (*wanted, *grads), kinds, strict=True):
        assert one is not None
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=2e-2, atol=2e-2)
    assert [len(each.launches) for each in launched.values()] == [4, 1, 1, 2]


def test_an_empty_batch() -> None:
    inputs = InteractionCase(0, 3, 4, 20, 24).make(device=DEVICE)
    assert [each.shape for each in forward(*inputs.values(), eps=1e-8)] == [(0, 3, 20), (0, 4, 24)]
    found = gradients(inputs)
    assert [each.shape for each in found if each is not None] == [each.shape for each in inputs.values()]
    assert all(torch.count_nonzero(each) == 0 for each in found if each is not None)


def test_too_many_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="65 prompts; the kernels take up to 64"):
        forward(*InteractionCase(1, 65, 4, 16, 16).make(device=DEVICE).values(), eps=1e-8)


@pytest.mark.parametrize("channels", [False, True], ids=["scalar", "channels"])
def test_tiles_do_not_change_what_is_computed(channels: bool) -> None:
    """Columns that no program takes, or two take, would show."""
    inputs = InteractionCase(2, 3, 4, 80, 50, channel_gates=channels).make(device=DEVICE)
    wanted = (*forward(*inputs.values(), eps=1e-8), *gradients(inputs))
    small = MixTile(similarity=16, columns=16, text_parts=3, vision_parts=2, warps=4, stages=2)
    product = ProductTile(rows=16, columns=32, depth=16, warps=4, stages=2)
    sums = GradientTile(
        16, 32, 16, 4, 2, weight_rows=32, weight_columns=16, weight_depth=16, sum_rows=16, sum_columns=16
    )
    found = (
        *forward(*inputs.values(), eps=1e-8, project_tile=product, tile=small),
        *gradients(inputs, project_tile=product, mix_tile=small, tile=sums),
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def facts(
    tensors: list[Tensor],
    scalars: tuple[Tensor, ...] = (),
    integers: tuple[int, ...] = (1,),
    constants: Any = (8, True),
) -> Any:
    return launch_module.facts_of(tensors, scalars, integers, constants)


def test_what_triton_compiles_for_makes_other_facts() -> None:
    one, gate = torch.zeros(4, 16, dtype=torch.float16), torch.zeros(())
    known = facts([one, one], (gate,))
    assert known is not None
    assert facts([torch.ones(9, 48, dtype=torch.float16)] * 2, (torch.zeros(8)[1],), (7, 2**31 - 1)) == known
    others = [
        facts([one, one.float()], (gate,)),
        facts([one.bfloat16(), one], (gate,)),
        facts([one, one], (gate.half(),)),
        facts([one, one], (gate,), constants=(16, True)),
        facts([one, one], (gate,), constants=(8, False)),
    ]
    assert known not in others
    assert len(set(others)) == len(others)


def test_what_is_rare_is_left_to_triton() -> None:
    one = torch.zeros(64, dtype=torch.float16)
    assert facts([one, one[1:]]) is None
    assert facts([one], integers=(4, 2**31)) is None


def launched_facts(monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Tensor], needs: tuple[bool, ...] = ALL) -> list:
    found = []

    def note(kernel: Any, programs: int, arguments: Any, options: dict[str, int], facts: Any) -> None:
        found.append((kernel.fn, facts))

    with monkeypatch.context() as patch:
        plan.forget()
        patch.setattr(plan, "launch", note)
        *_, projections = forward(*inputs.values(), eps=1e-8, save_projections=True)
        gradients(inputs, needs, projections=projections)
    return found


def test_what_changes_a_kernel_changes_the_facts_of_its_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """And sizes that change nothing do not: those of the batch and the number of prompts within a block."""
    case = InteractionCase(2, 3, 4, 32, 48)
    inputs = case.make(torch.float16)
    known = launched_facts(monkeypatch, inputs)
    assert len(known) == 4
    assert all(facts is not None for _, facts in known)
    assert launched_facts(monkeypatch, InteractionCase(5, 8, 7, 32, 48).make(torch.float16)) == known
    changes = {
        "type": launched_facts(monkeypatch, case.make(torch.float32)),
        "width": launched_facts(monkeypatch, InteractionCase(2, 3, 4, 64, 48).make(torch.float16)),
        "strides": launched_facts(monkeypatch, {**inputs, "text_prompt": padded(inputs["text_prompt"], 8)}),
    }
    for name, changed in changes.items():
        assert all(one != other for one, other in zip(known, changed, strict=True)), name
    blocks = launched_facts(monkeypatch, InteractionCase(2, 3, 17, 32, 48).make(torch.float16))
    gates = launched_facts(monkeypatch, InteractionCase(2, 3, 4, 32, 48, channel_gates=True).make(torch.float16))
    frozen = launched_facts(monkeypatch, inputs, tuple(name != "text_gate" for name in NAMES))
    assert [one == other for one, other in zip(known, blocks, strict=True)] == [True, False, False, True]
    assert [one == other for one, other in zip(known, gates, strict=True)] == [True, False, False, False]
    assert [one == other for one, other in zip(known, frozen, strict=True)] == [True, True, False, False]
    late = torch.zeros(inputs["vision_prompt"].numel() + 1, dtype=torch.float16)[1:].view_as(inputs["vision_prompt"])
    unaligned = launched_facts(monkeypatch, {**inputs, "vision_prompt": late})
    assert [facts is None for _, facts in unaligned] == [True, True, False, True]


def padded(tensor: Tensor, more: int) -> Tensor:
    """The same values in rows that lie ``more`` elements further apart."""
    *sizes, width = tensor.shape
    return tensor.new_zeros(*sizes, width + more)[..., :width].copy_(tensor)


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "case",
    [
        *INTERACTION_MEASURED,
        InteractionCase(3, 8, 8, 768, 1024, channel_gates=True),
        InteractionCase(5, 1, 3, 100, 4096),
        InteractionCase(4, 33, 20, 768, 512, channel_gates=True),
        InteractionCase(2, 64, 64, 768, 1024),
    ],
    ids=str,
)
def test_on_a_gpu_within_the_budget(case: InteractionCase, dtype: torch.dtype) -> None:
    check(case, dtype)
    check(case, dtype, candidate=in_one_graph)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [InteractionCase(64, 8, 8), InteractionCase(64, 16, 20, channel_gates=True)], ids=str)
def test_on_a_gpu_bits_repeat_and_do_not_depend_on_the_batch(case: InteractionCase, dtype: torch.dtype) -> None:
    inputs = case.make(dtype, DEVICE)
    grads = cotangents(inputs)
    runs = [
        (*forward(*inputs.values(), eps=1e-8), *backward(*grads, *inputs.values(), eps=1e-8, needs=ALL))
        for _ in range(3)
    ]
    assert_bits_equal(runs[0], runs[1])
    assert_bits_equal(runs[0], runs[2])
    for batch in (1, 3, 17):
        part = {**inputs, **{name: inputs[name][-batch:] for name in NAMES[:2]}}
        own = [each[-batch:] for each in grads]
        result = (*forward(*part.values(), eps=1e-8), *backward(*own, *part.values(), eps=1e-8, needs=ALL)[:2])
        for one, other in zip(runs[0][:4], result, strict=True):
            assert one is not None
            assert_bits_equal(one[-batch:], other)


@gpu
def test_on_a_gpu_new_sizes_compile_nothing() -> None:
    kernels = (
        triton_forward.project_kernel,
        triton_forward.mix_kernel,
        triton_backward.mix_backward_kernel,
        triton_backward.gradients_kernel,
    )

    def compiled() -> int:
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    def run(batch: int, text: int, vision: int) -> None:
        inputs = InteractionCase(batch, text, vision, 96, 160).make(torch.bfloat16, DEVICE)
        forward(*inputs.values(), eps=1e-8)
        gradients(inputs)

    run(2, 3, 4)
    before = compiled()
    for number in range(20):
        run(1 + number, 1 + number % 16, 1 + (number * 5) % 16)
    assert compiled() == before


@gpu
@pytest.mark.parametrize(("batch", "apart"), [(3, 2**30), (2, 2**31)], ids=["their sum", "each stride"])
def test_on_a_gpu_samples_more_than_32_bits_apart(batch: int, apart: int) -> None:
    inputs = InteractionCase(batch, 8, 8, 96, 160).make(torch.bfloat16, DEVICE)
    grads = cotangents(inputs)
    wanted = (*forward(*inputs.values(), eps=1e-8), *gradients(inputs))
    memory = torch.empty((batch - 1) * apart + 2**20, dtype=torch.bfloat16, device=DEVICE)

    def distant(tensor: Tensor, place: int) -> Tensor:
        _, prompts, width = tensor.shape
        view = memory[place * 2**16 :].as_strided((batch, prompts, width), (apart, width, 1))
        return view.copy_(tensor)

    far = {**inputs, **{name: distant(inputs[name], place) for place, name in enumerate(NAMES[:2])}}
    slots = [distant(torch.zeros_like(inputs[name]), 2 + place) for place, name in enumerate(NAMES[:2])]
    far_grads = [distant(each, 4 + place) for place, each in enumerate(grads)]
    found = forward(*far.values(), eps=1e-8, next_text=slots[0], next_vision=slots[1])
    found = (*found, *backward(*far_grads, *far.values(), eps=1e-8, needs=ALL))
    assert_bits_equal([each.contiguous() for each in found if each is not None], list(wanted))


@gpu
def test_on_a_gpu_within_a_graph() -> None:
    inputs = InteractionCase(64, 8, 8).make(torch.bfloat16, DEVICE)

    def run() -> tuple[Tensor | None, ...]:
        return (*forward(*inputs.values(), eps=1e-8), *gradients(inputs))

    wanted = run()
    grads = cotangents(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = (
            *forward(*inputs.values(), eps=1e-8),
            *backward(*grads, *inputs.values(), eps=1e-8, needs=ALL),
        )
    for each in found:
        assert each is not None
        each.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert_bits_equal(found, wanted)


@gpu
@pytest.mark.parametrize(("needs", "kernels"), [(ALL, 3), (tuple(name == "temperature" for name in NAMES), 3)])
def test_on_a_gpu_the_profiler_sees_no_other_kernel(needs: tuple[bool, ...], kernels: int) -> None:
    inputs = InteractionCase(8, 8, 8).make(torch.bfloat16, DEVICE)
    grads = cotangents(inputs)
    backward(*grads, *inputs.values(), eps=1e-8, needs=needs)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        backward(*grads, *inputs.values(), eps=1e-8, needs=needs)
        torch.cuda.synchronize()
    # Poisoned allocations fill their tensors: those are no kernels of ours.
    launched = [event.name for event in profile.events() if event.name.endswith("_kernel") and "at::" not in event.name]
    assert len(launched) == kernels, launched


def calls_that_differ(
    dtypes: tuple[torch.dtype, ...],
) -> Iterator[tuple[InteractionCase, torch.dtype, dict[str, Tensor]]]:
    """Each differs from the one before in what a kernel is compiled for, or in what none is."""
    case = InteractionCase(3, 8, 8, 96, 160)
    for dtype in dtypes:
        yield case, dtype, {}
    dtype = dtypes[0]
    yield InteractionCase(5, 2, 7, 96, 160), dtype, {}
    yield InteractionCase(3, 8, 8, 160, 96), dtype, {}
    yield InteractionCase(2, 20, 3, 96, 160), dtype, {}
    yield InteractionCase(3, 8, 8, 96, 160, channel_gates=True), dtype, {}
    inputs = case.make(dtype, DEVICE)
    yield case, dtype, {"vision_prompt": spread(inputs["vision_prompt"])}
    yield case, dtype, {"vision_prompt": padded(inputs["vision_prompt"], 16)}
    yield case, dtype, {"text_prompt": padded(inputs["text_prompt"], 8)}
    weight = inputs["text_to_vision_weight"]
    late = torch.zeros(weight.numel() + 1, dtype=dtype, device=DEVICE)[1:].view_as(weight).copy_(weight)
    yield case, dtype, {"text_to_vision_weight": late}
    scalars = torch.stack([inputs[name].float() for name in NAMES[6:]])
    yield case, dtype, dict(zip(NAMES[6:], scalars.unbind(), strict=True))
    yield case, dtype, {"temperature": inputs["temperature"].to(dtype)}


@gpu
def test_on_a_gpu_calls_that_differ_get_their_own_kernel() -> None:
    """One after the other, twice: the second round takes the kernels that the first one left."""
    launch_module._compiled.clear()
    kept = []
    for _ in range(2):
        for case, dtype, changed in calls_that_differ((torch.bfloat16, torch.float16, torch.float32)):
            check(case, dtype, {"keep": True}, **changed)
        kept.append(len(launch_module._compiled))
    assert kept[0] == kept[1] > 16


@gpu
def test_on_a_gpu_slots_that_are_not_aligned_get_their_own_kernel() -> None:
    inputs = InteractionCase(3, 8, 8, 96, 160).make(torch.bfloat16, DEVICE)
    wanted = forward(*inputs.values(), eps=1e-8)
    for change in (spread, lambda each: padded(each, 16), lambda each: padded(each, 8), spread):
        slots = [change(torch.zeros_like(each)) for each in wanted]
        forward(*inputs.values(), eps=1e-8, next_text=slots[0], next_vision=slots[1])
        assert_bits_equal([each.contiguous() for each in slots], wanted)
