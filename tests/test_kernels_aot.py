"""Every kernel compiles for every card without one, spills nothing at the production shapes, and fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from epic_fast.testing.aot import TARGETS, Build, build_production_elsewhere

TOYS = """
import json, sys
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from epic_fast.testing.aot import TARGETS, compile_kernel, recorded_launches


@triton.jit(do_not_specialize=["count"])
def scale_kernel(x, y, count, factor, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offset, tl.load(x + offset, offset < count) * factor, offset < count)


@triton.jit
def greedy_kernel(x, y, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    held = tl.load(x + offset)
    for step in range(8):
        other = tl.load(x + offset + step * BLOCK)
        total += tl.exp(held) * other
        held = held * other + total
    tl.store(y + offset, total + held)


@triton.jit
def wide_kernel(a, b, c, steps, M: tl.constexpr, K: tl.constexpr):
    rows, inner = tl.arange(0, M), tl.arange(0, K)
    total = tl.zeros((M, M), tl.float32)
    for step in range(steps):
        left = tl.load(a + rows[:, None] * K + inner[None, :] + step * K)
        right = tl.load(b + inner[:, None] * M + rows[None, :] + step * K)
        total += tl.dot(left, right)
    tl.store(c + rows[:, None] * M + rows[None, :], total)


def launch(device):
    x = torch.empty(64, 64, device=device, dtype=torch.bfloat16)
    assert x.is_cuda and x.device == torch.device("cuda", 0) and torch.zeros(3, device=x.device).is_cuda
    y = x.new_empty(64, 64)
    scale_kernel[(4,)](x, y, 16, 0.5, BLOCK=64, num_warps=2)
    scale_kernel[(4,)](x[:, 1:], y, 17, 0.5, BLOCK=64, num_warps=2)


def launch_kept():
    x = torch.empty(64, 64, device="cuda", dtype=torch.bfloat16)
    kept = scale_kernel[(4,)](x, x, 16, 0.5, BLOCK=64, num_warps=2)
    kept.run(4, 1, 1, 0, None, None, None, None, None, x, x[1:], 17, 0.5, 64)
    try:
        kept.run(4, 1, 1, 0, None, None, None, None, None, x[:, 1:], x, 17, 0.5, 64)
    except AssertionError as error:
        assert "launched again for arguments that it was not compiled for" in str(error)
    else:
        raise SystemExit("a kernel for aligned pointers was launched with another, and nobody saw it")


if __name__ == "__main__":
    target = TARGETS[sys.argv[1]]
    with recorded_launches(target) as builds:
        launch("meta")
        launch("cuda")
        pair = [torch.empty(1 << 20, device="cuda") for _ in range(2)]
        greedy_kernel[(1,)](*pair, BLOCK=target.warp_size << 8, num_warps=1)
        tensors = [torch.empty(1 << 20, device="cuda", dtype=torch.float16) for _ in range(3)]
        wide_kernel[(1,)](*tensors, 1 << 10, M=128, K=256, num_warps=8, num_stages=4)
        launch_kept()
    builds.append(compile_kernel("toys:scale_kernel", {"x": "*fp32", "y": "*fp32", "count": "i32", "factor": "fp32"},
                                 {"BLOCK": 128}, target, aligned=("x",), warps=1))
    print(json.dumps([asdict(build) for build in builds]))
"""


@pytest.fixture(scope="module", params=["cuda:80", "cuda:90", "hip:gfx942"])
def toys(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Build]:
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toys.py").write_text(TOYS)
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join([str(folder), str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, folder / "toys.py", request.param],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return [Build(**row) for row in rows]


def test_what_is_launched_is_what_is_compiled(toys: list[Build]) -> None:
    aligned, shifted, *again = toys[:4]
    assert (aligned.kernel, aligned.warps, aligned.constants) == ("scale_kernel", 2, {"BLOCK": 64})
    assert aligned.signature == {"x": "*bf16:16", "y": "*bf16:16", "count": "i32", "factor": "fp32"}
    assert shifted.signature == {"x": "*bf16", "y": "*bf16:16", "count": "i32", "factor": "fp32"}
    assert [each.signature for each in again] == [aligned.signature, shifted.signature]
    assert all(each.registers > 0 and not each.problems for each in toys[:4])


def test_a_spill_and_too_much_shared_memory_are_problems(toys: list[Build]) -> None:
    greedy, wide = toys[4:6]
    assert greedy.spill_bytes > 0
    assert greedy.stack_bytes > 0
    assert "bytes spilled" in greedy.problems[0]
    assert wide.shared > TARGETS[wide.target].shared
    assert any("bytes of shared memory; a block has" in each for each in wide.problems)


def test_a_kernel_that_is_kept_and_launched_again_is_seen(toys: list[Build]) -> None:
    once, again = toys[6:8]
    assert once.signature == again.signature == {"x": "*bf16:16", "y": "*bf16:16", "count": "i32", "factor": "fp32"}


def test_a_kernel_named_by_hand(toys: list[Build]) -> None:
    build = toys[8]
    assert (build.kernel, build.warps, build.constants) == ("scale_kernel", 1, {"BLOCK": 128})
    assert build.signature == {"x": "*fp32:16", "y": "*fp32", "count": "i32", "factor": "fp32"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operation", ["norm", "activation", "linear", "rotary"])
def test_production_shapes_neither_spill_nor_overflow(operation: str, target: str) -> None:
    builds = build_production_elsewhere(operation, target)
    assert builds
    problems = [problem for build in builds for problem in build.problems]
    assert not problems, "\n".join(problems)
