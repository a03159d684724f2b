"""The cases of ``benchmarks.run`` under pytest-benchmark: ours and the strongest rivals, synchronised, with memory.

pytest benchmarks --benchmark-only --benchmark-autosave
pytest benchmarks --benchmark-only --benchmark-compare
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import timing
from benchmarks.registry import OPERATIONS, OURS, CannotRun, Operation, Provider
from benchmarks.run import gate
from epic_fast.testing.cases import Case

pytestmark = pytest.mark.gpu
COMPARED = (OURS, "compiled", "cat+sdpa-cudnn", "sdpa-cudnn")
DTYPE = torch.bfloat16

RUNS = [
    pytest.param(operation, case, provider, id=f"{operation.name}-{case.name}-{provider.name}")
    for operation in OPERATIONS.values()
    for case in operation.cases
    for provider in operation.providers
    if provider.name in COMPARED
]


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize(("operation", "case", "provider"), RUNS)
def test_speed(operation: Operation, case: Case, provider: Provider, mode: str, benchmark: Any) -> None:
    device = torch.device("cuda")
    if provider.name == OURS:
        problems = [each.problem for each in gate(operation, case, DTYPE, device, "triton") if not each.passes]
        assert not problems, "\n".join(problems)
    try:
        call = provider.prepare(case, case.make(DTYPE, device), case.options(device))
    except CannotRun as reason:
        pytest.skip(str(reason))
    run: Callable[[], Any] = call.forward if mode == "forward" else call.forward_backward

    def synchronised() -> None:
        run()
        torch.cuda.synchronize()

    with call.settings():
        benchmark.extra_info["peak_mib"] = timing.measure_memory(run, device)
        benchmark.extra_info["gpu"] = torch.cuda.get_device_name()
        benchmark.group = f"{operation.name}, {case.name}, {mode}"
        benchmark.pedantic(synchronised, rounds=50, iterations=1, warmup_rounds=10)
