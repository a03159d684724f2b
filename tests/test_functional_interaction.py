"""prompt_interaction against the formula, one sample, one prompt and one channel at a time, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear

from epic_fast.errors import ConfigError
from epic_fast.functional import prompt_interaction

WIDE = torch.float64
NAMES = (
    "text_prompt",
    "vision_prompt",
    "text_to_vision_weight",
    "text_to_vision_bias",
    "vision_to_text_weight",
    "vision_to_text_bias",
    "text_gate",
    "vision_gate",
    "temperature",
)


def make(
    batch: int = 2,
    text_prompts: int = 3,
    vision_prompts: int = 4,
    text_width: int = 5,
    vision_width: int = 6,
    *,
    channel_gates: bool = False,
    temperature: float = 0.7,
    dtype: torch.dtype = WIDE,
    seed: int = 0,
) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {
        "text_prompt": (batch, text_prompts, text_width),
        "vision_prompt": (batch, vision_prompts, vision_width),
        "text_to_vision_weight": (vision_width, text_width),
        "text_to_vision_bias": (vision_width,),
        "vision_to_text_weight": (text_width, vision_width),
        "vision_to_text_bias": (text_width,),
        "text_gate": (text_width,) if channel_gates else (),
        "vision_gate": (vision_width,) if channel_gates else (),
    }
    inputs = {name: torch.randn(shape, generator=random, dtype=WIDE).to(dtype) for name, shape in shapes.items()}
    inputs["temperature"] = torch.tensor(temperature, dtype=dtype)
    return {name: each.requires_grad_() for name, each in inputs.items()}


def by_hand(inputs: dict[str, Tensor], eps: float = 1e-8) -> tuple[Tensor, Tensor]:
    """The formula of kernels/prompt_interaction/README.md with Python's own numbers."""
    given = {name: each.detach().to(WIDE).tolist() for name, each in inputs.items()}

    def project(weight: list[list[float]], bias: list[float], rows: list[list[float]]) -> list[list[float]]:
        return [
            [sum(w * x for w, x in zip(line, row, strict=True)) + b for line, b in zip(weight, bias, strict=True)]
            for row in rows
        ]

    def norm(row: list[float]) -> float:
        return max(math.sqrt(sum(x * x for x in row)), eps)

    def softmax(row: list[float]) -> list[float]:
        powers = [math.exp(x - max(row)) for x in row]
        return [x / sum(powers) for x in powers]

    def add(
        row: list[float], gate: float | list[float], weights: list[float], others: list[list[float]]
    ) -> list[float]:
        gates = gate if isinstance(gate, list) else [gate] * len(row)
        mixed = [sum(w * other[c] for w, other in zip(weights, others, strict=True)) for c in range(len(row))]
        return [x + g * m for x, g, m in zip(row, gates, mixed, strict=True)]

    next_text, next_vision = [], []
    for text, vision in zip(given["text_prompt"], given["vision_prompt"], strict=True):
        z_v = project(given["vision_to_text_weight"], given["vision_to_text_bias"], vision)
        z_t = project(given["text_to_vision_weight"], given["text_to_vision_bias"], text)
        similarity = [
            [sum(a * b for a, b in zip(p, z, strict=True)) / (norm(p) * norm(z) * given["temperature"]) for z in z_v]
            for p in text
        ]
        columns = [list(column) for column in zip(*similarity, strict=True)]
        next_text.append(
            [add(row, given["text_gate"], softmax(line), z_v) for row, line in zip(text, similarity, strict=True)]
        )
        next_vision.append(
            [add(row, given["vision_gate"], softmax(column), z_t) for row, column in zip(vision, columns, strict=True)]
        )
    return torch.tensor(next_text, dtype=WIDE), torch.tensor(next_vision, dtype=WIDE)


def changed(inputs: dict[str, Tensor], **replacements: Tensor) -> dict[str, Tensor]:
    return {name: replacements.get(name, each).detach().clone().requires_grad_() for name, each in inputs.items()}


def gradients(result: tuple[Tensor, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(9)
    upstream = [torch.randn(each.shape, generator=random, dtype=WIDE).to(each.dtype) for each in result]
    return dict(zip(inputs, torch.autograd.grad(result, list(inputs.values()), upstream), strict=True))


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    text_prompts=st.integers(1, 5),
    vision_prompts=st.integers(1, 5),
    text_width=st.integers(1, 6),
    vision_width=st.integers(1, 6),
    channel_gates=st.booleans(),
    temperature=st.floats(0.05, 5.0),
    seed=st.integers(0, 999),
)
def test_equals_the_formula(channel_gates: bool, temperature: float, seed: int, **sizes: int) -> None:
    inputs = make(**sizes, channel_gates=channel_gates, temperature=temperature, seed=seed)
    for found, wanted in zip(prompt_interaction(**inputs), by_hand(inputs), strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("channel_gates", [False, True])
@pytest.mark.parametrize("sizes", [(2, 3, 4, 5, 6), (1, 1, 1, 2, 3), (3, 2, 2, 1, 1)])
def test_gradcheck(sizes: tuple[int, ...], channel_gates: bool) -> None:
    inputs = make(*sizes, channel_gates=channel_gates)
    assert torch.autograd.gradcheck(
        lambda *tensors: prompt_interaction(**dict(zip(inputs, tensors, strict=True))), list(inputs.values())
    )


@pytest.mark.parametrize("dtype", [WIDE, torch.float32, torch.bfloat16, torch.float16])
def test_gates_of_zero_are_exactly_the_identity(dtype: torch.dtype) -> None:
    inputs = make(dtype=dtype)
    inputs = changed(inputs, text_gate=torch.zeros((), dtype=dtype), vision_gate=torch.zeros((), dtype=dtype))
    text, vision = prompt_interaction(**inputs)
    assert torch.equal(text, inputs["text_prompt"])
    assert torch.equal(vision, inputs["vision_prompt"])
    found = gradients((text, vision), inputs)
    assert found["text_gate"] != 0, "a gate at zero must be able to open"
    assert torch.count_nonzero(found["vision_to_text_weight"]) == 0


def test_one_open_gate_moves_its_own_side_only() -> None:
    inputs = changed(make(), text_gate=torch.zeros((), dtype=WIDE))
    text, vision = prompt_interaction(**inputs)
    assert torch.equal(text, inputs["text_prompt"])
    assert not torch.equal(vision, inputs["vision_prompt"])


def test_a_tiny_temperature_picks_the_most_similar() -> None:
    inputs = changed(
        make(temperature=1e-6), text_gate=torch.ones((), dtype=WIDE), vision_gate=torch.ones((), dtype=WIDE)
    )
    text, vision = inputs["text_prompt"].detach(), inputs["vision_prompt"].detach()
    from_vision = vision @ inputs["vision_to_text_weight"].detach().T + inputs["vision_to_text_bias"].detach()
    from_text = text @ inputs["text_to_vision_weight"].detach().T + inputs["text_to_vision_bias"].detach()
    cosine = cosine_similarity(text[:, :, None], from_vision[:, None], dim=-1)
    next_text, next_vision = (each.detach() for each in prompt_interaction(**inputs))
    for sample in range(2):
        for row in range(3):
            picked = from_vision[sample, cosine[sample, row].argmax()]
            torch.testing.assert_close(next_text[sample, row] - text[sample, row], picked)
        for row in range(4):
            picked = from_text[sample, cosine[sample, :, row].argmax()]
            torch.testing.assert_close(next_vision[sample, row] - vision[sample, row], picked)


def test_a_huge_temperature_takes_the_mean() -> None:
    inputs = changed(make(temperature=1e9), text_gate=torch.ones((), dtype=WIDE))
    from_vision = inputs["vision_prompt"] @ inputs["vision_to_text_weight"].T + inputs["vision_to_text_bias"]
    next_text, _ = prompt_interaction(**inputs)
    mean = from_vision.mean(dim=1, keepdim=True).expand(-1, 3, -1)
    torch.testing.assert_close(next_text - inputs["text_prompt"], mean, rtol=1e-6, atol=1e-7)


def test_a_channel_gate_acts_on_its_channel() -> None:
    gate = torch.zeros(5, dtype=WIDE)
    gate[2] = 1.5
    inputs = make(channel_gates=True)
    next_text, _ = prompt_interaction(**changed(inputs, text_gate=gate))
    moved = (next_text - inputs["text_prompt"]).detach().abs().amax(dim=(0, 1)) > 0
    assert moved.tolist() == [False, False, True, False, False]


def test_a_constant_channel_gate_is_the_scalar_gate() -> None:
    inputs = make()
    spread = changed(
        inputs, text_gate=inputs["text_gate"].detach().expand(5), vision_gate=inputs["vision_gate"].detach().expand(6)
    )
    for one, other in zip(prompt_interaction(**inputs), prompt_interaction(**spread), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [WIDE, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero", ["text_prompt", "vision_prompt", "both", "everything"])
def test_zero_vectors_give_finite_values_and_gradients(zero: str, dtype: torch.dtype) -> None:
    inputs = make(dtype=dtype)
    names = {"both": NAMES[:2], "everything": NAMES[:8]}.get(zero, (zero,))
    inputs = changed(inputs, **{name: torch.zeros_like(inputs[name]) for name in names})
    # The slope at a zero vector is 1 / eps: 1e8 is beyond float16.
    result = prompt_interaction(**inputs, eps=1e-2 if dtype == torch.float16 else 1e-8)
    assert all(each.isfinite().all() for each in result)
    for name, each in gradients(result, inputs).items():
        assert each.isfinite().all(), f"{name}'s gradient is not finite"


def test_one_zero_row_leaves_the_others_alone() -> None:
    inputs = make()
    text = inputs["text_prompt"].detach().clone()
    text[0, 1] = 0.0
    once, twice = prompt_interaction(**inputs), prompt_interaction(**changed(inputs, text_prompt=text))
    torch.testing.assert_close(twice[0][0, [0, 2]], once[0][0, [0, 2]], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(twice[1][1], once[1][1], rtol=1e-13, atol=1e-13)


def test_eps_bounds_the_norms() -> None:
    inputs = make()
    small = changed(inputs, text_prompt=inputs["text_prompt"] * 1e-3)
    for eps in (1e-8, 0.5):
        for found, wanted in zip(prompt_interaction(**small, eps=eps), by_hand(small, eps=eps), strict=True):
            torch.testing.assert_close(found.detach(), wanted)


def test_permuting_the_batch_permutes_the_result() -> None:
    inputs, order = make(batch=4), torch.tensor([2, 0, 3, 1])
    moved = changed(inputs, text_prompt=inputs["text_prompt"][order], vision_prompt=inputs["vision_prompt"][order])
    for one, other in zip(prompt_interaction(**moved), prompt_interaction(**inputs), strict=True):
        torch.testing.assert_close(one, other[order], rtol=1e-13, atol=1e-13)


def test_a_sample_does_not_see_its_neighbours() -> None:
    inputs = make(batch=3)
    alone = changed(inputs, text_prompt=inputs["text_prompt"][1:2], vision_prompt=inputs["vision_prompt"][1:2])
    for one, other in zip(prompt_interaction(**alone), prompt_interaction(**inputs), strict=True):
        torch.testing.assert_close(one, other[1:2], rtol=1e-13, atol=1e-13)


def test_permuting_the_prompts_of_one_side() -> None:
    inputs, order = make(), torch.tensor([3, 1, 0, 2])
    text, vision = prompt_interaction(**inputs)
    same, moved = prompt_interaction(**changed(inputs, vision_prompt=inputs["vision_prompt"][:, order]))
    torch.testing.assert_close(same, text, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(moved, vision[:, order], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_close_to_float64(dtype: torch.dtype) -> None:
    """The projections run in the low type; what follows may add one rounding of the result, not more."""
    inputs = make(2, 8, 8, 32, 48, temperature=0.1, dtype=dtype)
    inputs = changed(
        inputs,
        text_to_vision_weight=inputs["text_to_vision_weight"] / 32**0.5,
        vision_to_text_weight=inputs["vision_to_text_weight"] / 48**0.5,
    )
    exact = {name: each.detach().to(WIDE).requires_grad_() for name, each in inputs.items()}
    result, truth = prompt_interaction(**inputs), prompt_interaction(**exact)
    rounding = torch.finfo(dtype).eps
    for found, wanted in zip(result, truth, strict=True):
        assert found.dtype == dtype
        # A similarity off by one rounding moves a softmax at temperature 0.1 by ten of them.
        assert (found.to(WIDE) - wanted).abs().max() <= 16 * rounding * wanted.abs().max()
    for name, found in gradients(result, inputs).items():
        wanted = gradients(prompt_interaction(**exact), exact)[name]
        assert found.dtype == dtype
        assert (found.to(WIDE) - wanted).abs().max() <= 64 * rounding * wanted.abs().max(), name


def test_under_autocast_only_the_projections_are_narrow() -> None:
    inputs = make(2, 8, 8, 32, 48, dtype=torch.float32, temperature=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = prompt_interaction(**inputs)

    narrow = {name: each.detach().bfloat16() for name, each in inputs.items()}
    from_vision = linear(
        narrow["vision_prompt"], narrow["vision_to_text_weight"], narrow["vision_to_text_bias"]
    ).float()
    from_text = linear(narrow["text_prompt"], narrow["text_to_vision_weight"], narrow["text_to_vision_bias"]).float()
    text, vision = inputs["text_prompt"], inputs["vision_prompt"]
    similarity = cosine_similarity(text[:, :, None], from_vision[:, None], dim=-1) / inputs["temperature"]
    expected = (
        text + inputs["text_gate"] * (similarity.softmax(dim=2) @ from_vision),
        vision + inputs["vision_gate"] * (similarity.softmax(dim=1).transpose(1, 2) @ from_text),
    )
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_frozen_inputs_get_no_gradient() -> None:
    inputs = {name: each.detach() for name, each in make().items()}
    assert all(each.grad_fn is None for each in prompt_interaction(**inputs))
    inputs["text_gate"].requires_grad_()
    sum(each.sum() for each in prompt_interaction(**inputs)).backward()
    assert [name for name, each in inputs.items() if each.grad is not None] == ["text_gate"]


def test_two_runs_give_the_same_bits() -> None:
    first, second = make(dtype=torch.float32), make(dtype=torch.float32)
    one, other = prompt_interaction(**first), prompt_interaction(**second)
    assert all(map(torch.equal, one, other))
    assert all(map(torch.equal, gradients(one, first).values(), gradients(other, second).values()))


BAD: dict[str, tuple[str, Any, list[str]]] = {
    "text-2d": ("text_prompt", lambda t: t[0], ["text_prompt", "(3, 5)", "(batch, prompts, width)"]),
    "vision-4d": ("vision_prompt", lambda t: t[None], ["vision_prompt", "(1, 2, 4, 6)", "(batch, prompts, width)"]),
    "batch": ("vision_prompt", lambda t: t[:1], ["vision_prompt has batch 1", "text_prompt's 2"]),
    "integers": ("vision_prompt", lambda t: t.long(), ["vision_prompt", "torch.int64", "floating-point"]),
    "weight-transposed": ("text_to_vision_weight", lambda t: t.T, ["text_to_vision_weight", "(5, 6)", "(6, 5)"]),
    "bias": ("text_to_vision_bias", lambda t: t[:5], ["text_to_vision_bias", "(5,)", "(6,)"]),
    "other-weight": ("vision_to_text_weight", lambda t: t.T, ["vision_to_text_weight", "(6, 5)", "(5, 6)"]),
    "other-bias": ("vision_to_text_bias", lambda t: t[None], ["vision_to_text_bias", "(1, 5)", "(5,)"]),
    "gate": ("text_gate", lambda t: t.expand(6), ["text_gate", "(6,)", "(5,) or ()"]),
    "vision-gate": ("vision_gate", lambda t: t.expand(1), ["vision_gate", "(1,)", "(6,) or ()"]),
    "temperature": ("temperature", lambda t: t.expand(1), ["temperature", "(1,)", "()"]),
    "temperature-number": ("temperature", lambda t: 0.5, ["temperature is a float", "a tensor"]),
    "gate-integer": ("text_gate", lambda t: t.long(), ["text_gate", "torch.int64", "floating-point"]),
    "device": ("vision_to_text_bias", lambda t: t.to("meta"), ["vision_to_text_bias", "meta", "cpu"]),
    "vision-device": ("vision_prompt", lambda t: t.to("meta"), ["vision_prompt", "meta", "cpu"]),
    "weight-type": (
        "vision_to_text_weight",
        lambda t: t.float(),
        ["vision_to_text_weight", "torch.float32", "vision_prompt's torch.float64", "autocast"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_what_was_given_and_wanted(case: str) -> None:
    name, breaking, words = BAD[case]
    inputs = {each: tensor.detach() for each, tensor in make().items()}
    inputs[name] = breaking(inputs[name])
    with pytest.raises(ConfigError) as caught:
        prompt_interaction(**inputs)
    message = str(caught.value)
    assert message.startswith("prompt_interaction: ")
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


@pytest.mark.parametrize("eps", [-1.0, float("nan"), float("inf")])
def test_eps_is_no_negative_number(eps: float) -> None:
    with pytest.raises(ConfigError, match="wanted a finite number, at least 0"):
        prompt_interaction(**make(), eps=eps)
