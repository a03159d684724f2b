"""The operations on prompts compile for every card without one, spill nothing at the production shapes, and fit."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from epic_fast.testing.aot import TARGETS, Build, build_production_elsewhere

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def problems_of(builds: list[Build]) -> str:
    assert builds
    return "\n".join(problem for build in builds for problem in build.problems)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "operation", ["attention", "interaction", "windows", "experts", "routing", "merging", "infused", "gate", "swiglu"]
)
def test_production_shapes_neither_spill_nor_overflow(operation: str, target: str) -> None:
    assert not problems_of(build_production_elsewhere(operation, target))


@pytest.mark.parametrize(("operation", "target"), [("attention", "cuda:90"), ("interaction", "cuda:80")])
def test_float32_on_tensor_cores_neither_spills_nor_overflows(operation: str, target: str) -> None:
    builds = build_production_elsewhere(operation, target, ("tf32",))
    assert {build.constants["PRECISION"] for build in builds} <= {"bf16x6", "tf32x3"}
    assert not problems_of(builds)


@pytest.mark.parametrize("operation", ["attention-wide", "windows-wide", "infused-wide"])
@pytest.mark.parametrize("target", ["cuda:80", "hip:gfx942"])
def test_wide_heads_fit_into_small_cards(target: str, operation: str) -> None:
    builds = build_production_elsewhere(operation, target, ("bf16", "fp32"))
    assert builds
    assert not [problem for build in builds if not build.fits for problem in build.problems]
