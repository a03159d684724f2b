"""No time without its numbers: logits and gradients of a provider against the plain path in float32.

The plain path runs in float32 (IEEE, no TF32) on the same weights and the same batch, in parts of 16 samples.  A
relative error is ``|found - wanted| / |wanted|`` in the Euclidean norm, of the logits and of the gradients of each kind
of tensor put together (prompts, projections, gates, head; LoRA's adapters; a backbone's weights).  It may be at most

    factor * (the same error of the method's plain eager path in the provider's type) + floor + slack

with factor 2 for logits and 3 for gradients, floor 0.02 in half precision and 1e-4 in float32, and slack 0 for whatever
is exact: 0.02 for gradients through a derivative kept in 8 bits; 0.1 and 0.3 with 8-bit weights, whose products round
to 3 bits of mantissa.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.step_cases import Setting, StepCase
from benchmarks.step_providers import (
    PROVIDERS,
    Result,
    Step,
    StepProvider,
    build_epic,
    build_other,
    reference_model,
    release,
    step_call,
)

FACTORS = {"logits": 2.0}
GRADIENTS_FACTOR = 3.0
PART = 16


def kind_of(name: str) -> str:
    """The kind of a trainable tensor, by its name."""
    if "lora_" in name:
        return "adapters"
    if name.startswith("head."):
        return "head"
    if name in ("text_prompt", "vision_prompt", "input_prompts") or name.startswith(
        ("experts.", "complement_prompts.")
    ):
        return "prompts"
    if name.endswith(("_gate", "log_temperature", ".head_bias")):
        return "gates"
    mapping = ("hub.", "router.", "mapper.", "infusions.", "projector.")
    return "projections" if name.startswith(mapping) else "backbone"


@dataclass(frozen=True)
class Wanted:
    """What is right at a case: float32's logits and gradients, and how far plain eager in the case's type is off."""

    logits: Tensor
    gradients: dict[str, Tensor]
    plain: dict[str, float]


def errors(wanted: Wanted, logits: Tensor, gradients: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors by kind; what is not finite is infinitely wrong."""
    found = {"logits": _relative([(logits, wanted.logits)])}
    if set(gradients) != set(wanted.gradients):
        odd = sorted(set(gradients) ^ set(wanted.gradients))
        raise ValueError(f"gradients of other tensors than the plain path's: {', '.join(odd[:5])}")
    for kind in dict.fromkeys(map(kind_of, wanted.gradients)):
        names = [name for name in wanted.gradients if kind_of(name) == kind]
        found[kind] = _relative([(gradients[name], wanted.gradients[name]) for name in names])
    return found


def _relative(pairs: list[tuple[Tensor, Tensor]]) -> float:
    off = sum(float((found.float() - want).double().square().sum()) for found, want in pairs) ** 0.5
    size = sum(float(want.double().square().sum()) for _, want in pairs) ** 0.5
    return off / size if size and off == off else float("inf")


def wanted_of(setting: Setting, case: StepCase, method: str) -> Wanted:
    """The reference of a method at a case."""
    gradients = case.mode == "step" and method != "frozen"

    def plain() -> Any:
        return build_epic(setting, case) if method == "epic" else build_other(setting, method)

    with PROVIDERS["eager"].settings():
        return held_against(
            lambda: reference_model(setting, case, method), plain, setting.batch(case), gradients=gradients, part=PART
        )


def held_against(
    exact: Callable[[], Any], plain: Callable[[], Any], inputs: dict[str, Tensor], *, gradients: bool, part: int
) -> Wanted:
    """What is right, and how far a plain model is off.

    Args:
        exact, plain: make the same model in float32 and in the case's type, one after the other.
        inputs: of a step, all with a sample a row; what is no integer is given to ``exact`` in float32.
        gradients: whether those of the trainable tensors are wanted; without them labels are left out.
        part: samples that ``exact`` takes at once.  The loss has to be a mean over samples, or this the whole batch.
    """
    first = next(iter(inputs.values()))
    batch, device = len(first), first.device
    with ieee():
        model = exact()
        parts, summed = [], {}
        for start in range(0, batch, part):
            few = {name: value[start : start + part] for name, value in inputs.items()}
            few = {name: value.float() if value.is_floating_point() else value for name, value in few.items()}
            share = min(part, batch - start) / batch
            step = step_call(model, _for_mode(few, gradients), gradients=gradients)
            logits, found = step.call()
            parts.append(logits)
            for name, each in zip(step.names, found, strict=True):
                summed[name] = share * each + summed.get(name, 0.0)
        right = Wanted(torch.cat(parts), summed, {})
        del model, step, found, logits
        step = step_call(plain(), _for_mode(inputs, gradients), gradients=gradients)
        logits, found = step.call()
        off = errors(right, logits, dict(zip(step.names, found, strict=True)))
        release(step, device)
    return Wanted(right.logits, right.gradients, off)


def _for_mode(inputs: dict[str, Tensor], labels: bool) -> dict[str, Tensor]:
    return inputs if labels else {name: value for name, value in inputs.items() if name != "labels"}


def gate(provider: StepProvider, step: Step, wanted: Wanted, dtype: torch.dtype) -> dict[str, Any]:
    """For a row: whether the step's result is within its budget, and every error beside what it may be."""
    result: Result = step.call()
    found = errors(wanted, result[0], dict(zip(step.names, result[1], strict=True)))
    floor = 1e-4 if dtype == torch.float32 else 0.02
    entries = {}
    for kind, error in found.items():
        factor = FACTORS.get(kind, GRADIENTS_FACTOR)
        budget = factor * wanted.plain[kind] + floor + provider.slack[0 if kind == "logits" else 1]
        entries[kind] = {"error": error, "budget": budget, "plain_error": wanted.plain[kind]}
    problems = [
        f"{kind}: relative error {each['error']:.3g}, at most {each['budget']:.3g} allowed"
        for kind, each in entries.items()
        if not each["error"] <= each["budget"]
    ]
    return {"passes": not problems, "problems": problems, "errors": entries}


@contextmanager
def ieee() -> Iterator[None]:
    """float32 as IEEE has it, convolutions too."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
