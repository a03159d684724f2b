"""A launch through CUDA's driver hands over what the kernel was compiled for, or Triton launches."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from epic_fast.kernels.common import driver, plan  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.prompt_attention.triton_forward import (  # pyright: ignore[reportMissingImports]
    prompt_attention_forward,
)

KINDS = {"a": "*bf16", "b": "*fp32", "c": "constexpr", "n": "i32", "far": "i64", "eps": "fp32", "WIDE": "constexpr"}
SIZES = [8, 8, 4, 8, 4, 8, 8]
PLAIN = {
    "num_warps": 4,
    "num_ctas": 1,
    "shared": 4096,
    "launch_cooperative_grid": False,
    "launch_pdl": False,
    "global_scratch_size": 0,
    "profile_scratch_size": 0,
}


class Driver:
    """As much of CUDA's driver as a launch needs: it reads the parameters where they are said to stand."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.launched: list[Any] = []
        self.status = 0
        self.entered: list[int] = []
        self.lost = False

    def cuDeviceGet(self, handle: Any, index: Any) -> int:
        handle._obj.value = 40 + index.value
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, handle: Any) -> int:
        context._obj.value = 100 + handle.value
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.entered.append(context.value)
        self.lost = False
        return 0

    def cuFuncGetParamInfo(self, function: Any, index: Any, offset: Any, size: Any) -> int:
        if index.value >= len(self.sizes):
            return 1
        size._obj.value = self.sizes[index.value]
        return 0

    def cuLaunchKernel(self, function: Any, *given: Any) -> int:
        if self.lost:
            return 201
        *grid, shared, stream, parameters, extra = given
        assert extra is None
        values = [
            ctypes.string_at(address, size) for address, size in zip(list(parameters), self.sizes, strict=True)
        ]  # fmt: skip
        self.launched.append((function.value, [each.value for each in grid], shared.value, stream.value, values))
        return self.status


def compiled(kinds: dict[str, str] = KINDS, **metadata: Any) -> Any:
    return SimpleNamespace(
        function=77, metadata=SimpleNamespace(**{**PLAIN, **metadata}), src=SimpleNamespace(signature=kinds)
    )


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver(SIZES)
    monkeypatch.setattr(driver, "_driver", lambda: found)
    return found


def prepare(kernel: Any, memory: Any, programs: int = 6) -> Any:
    return driver.prepared(kernel, 3, programs, (2, 1, 0), (40, 2**40, 0.1, 64), memory)


def test_the_driver_reads_what_triton_would_have_passed(cuda: Driver) -> None:
    memory = driver.Places(3)
    launch = prepare(compiled(), memory)
    for addresses in ([0, 4096, 2**45 + 16], [0, 16, 32]):
        memory.memory[:3] = addresses
        launch(ctypes.c_void_p(5))
        function, grid, shared, stream, values = cuda.launched.pop()
        assert (function, grid, shared, stream) == (77, [6, 1, 1, 128, 1, 1], 4096, 5)
        wanted: list[Any] = [
            ctypes.c_uint64(addresses[2]),
            ctypes.c_uint64(addresses[1]),
            ctypes.c_int32(40),
            ctypes.c_int64(2**40),
            ctypes.c_float(0.1),
            ctypes.c_uint64(0),
            ctypes.c_uint64(0),
        ]
        assert values == [bytes(each) for each in wanted]


def test_a_launch_that_fails_says_so(cuda: Driver) -> None:
    launch = prepare(compiled(), driver.Places(3))
    cuda.status = 700
    with pytest.raises(RuntimeError, match="error 700"):
        launch(ctypes.c_void_p(0))


def test_a_thread_that_has_not_met_the_card_is_made_to(cuda: Driver) -> None:
    launch = prepare(compiled(), driver.Places(3))
    cuda.lost = True
    launch(ctypes.c_void_p(0))
    launch(ctypes.c_void_p(0))
    assert cuda.entered == [143]
    assert len(cuda.launched) == 2


@pytest.mark.parametrize(
    "kernel",
    [
        compiled(num_ctas=2),
        compiled(launch_cooperative_grid=True),
        compiled(launch_pdl=True),
        compiled(global_scratch_size=16),
        compiled(profile_scratch_size=16),
        compiled({**KINDS, "eps": "fp16"}),
        compiled({**KINDS, "a": "tensordesc<bf16[16, 32]>"}),
        compiled({**KINDS, "a": "i64"}),
        compiled({**KINDS, "n": "*i32"}),
        compiled({**KINDS, "more": "i32"}),
        compiled({**KINDS, "n": "i64"}),
    ],
)
def test_what_is_no_plain_launch_is_left_to_triton(cuda: Driver, kernel: Any) -> None:
    assert prepare(kernel, driver.Places(3)) is None


def test_what_the_driver_knows_otherwise_is_left_to_triton(
    cuda: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    for sizes in (SIZES[:-1], [*SIZES, 8], [8, 8, 8, 8, 4, 8, 8], []):
        cuda.sizes = sizes
        assert prepare(compiled(), driver.Places(3)) is None
    cuda.sizes = SIZES
    assert prepare(compiled(), driver.Places(3)) is not None
    assert prepare(compiled(), driver.Places(3), programs=0) is None
    monkeypatch.setattr(driver, "_driver", lambda: None)
    assert prepare(compiled(), driver.Places(3)) is None


@pytest.mark.gpu
def test_threads_that_run_the_same_plan_do_not_mix_their_tensors() -> None:
    def draw(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator("cuda").manual_seed(seed)
        return [torch.randn(2, 3, 40, 64, device="cuda", generator=generator).bfloat16() for _ in range(6)]

    def call(tensors: list[torch.Tensor]) -> torch.Tensor:
        return prompt_attention_forward(*tensors, None, prefix=False, causal=False, scale=0.2)[0]

    inputs = [draw(seed) for seed in range(4)]
    wanted = [call(each) for each in inputs]
    assert all(each._ready is not None for each in plan._plans.values())
    wrong: list[int] = []

    def repeat(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(200):
                if not torch.equal(call(inputs[number]), wanted[number]):
                    wrong.append(number)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong


@pytest.mark.gpu
def test_a_thread_that_does_nothing_else_on_the_card() -> None:
    draw = [torch.randn(2, 3, 20, 48, device="cuda") for _ in range(6)]

    def call() -> torch.Tensor:
        return prompt_attention_forward(*draw, None, prefix=False, causal=False, scale=0.2)[0]

    wanted, found = [call() for _ in range(3)], []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    assert torch.equal(found[0], wanted[0])


@pytest.mark.gpu
def test_portable_kernels_are_launched_by_the_driver() -> None:
    draw = [torch.randn(2, 3, 20, 48, device="cuda") for _ in range(6)]
    for _ in range(2):
        prompt_attention_forward(*draw, None, prefix=False, causal=False, scale=0.2)
    (found,) = plan._plans.values()
    assert [direct is not None for direct, _, _ in found._ready] == [True]
