"""Tensor descriptors in plans: encoded once for an address, and handed to Triton behind the place where it encodes."""

# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton.backends.nvidia import driver as nvidia
from triton.tools.tensor_descriptor import TensorDescriptor

from epic_fast.kernels.common import descriptors, driver, plan
from epic_fast.kernels.common.descriptors import Described, Encoded, behind_encoding

ABOUT = {"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": [16, 32], "fp4_padded": False}
MAKE = functools.partial(TensorDescriptor.from_tensor, block_shape=[16, 32])


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the driver was asked to encode."""
    asked: list[tuple[Any, ...]] = []

    def encode(*given: Any) -> str:
        asked.append(given)
        return f"map of {given[0]}"

    utils = SimpleNamespace(fill_tma_descriptor=encode, fill_tma_descriptor_tiled=encode)
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(utils=utils))
    return asked


class Run:
    """As the launcher of a compiled kernel with one descriptor, one pointer and one number."""

    def __init__(self) -> None:
        self.launched: list[Any] = []
        signature = {0: "tensordesc<fp16[16, 32]>", 1: "*fp16", 2: "i32"}
        self.launch = nvidia.wrap_handle_tensordesc(self.bare, signature, [ABOUT])

    def bare(self, *given: Any) -> None:
        self.launched.append(given)


def test_an_address_is_encoded_once(encoded: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    known = Encoded(MAKE, (40, 64), (80, 1), torch.float16, ABOUT)
    assert known[4096] == ("map of 4096", 40, 64, 80, 1)
    assert known[4096] is known[4096]
    assert known[8192] == ("map of 8192", 40, 64, 80, 1)
    assert [each[0] for each in encoded] == [4096, 8192]
    monkeypatch.setattr(descriptors, "MOST_ADDRESSES", 2)
    assert known[64][0] == "map of 64"
    assert len(known) == 1


def test_what_is_handed_over_is_what_triton_would_encode(encoded: list[tuple[Any, ...]]) -> None:
    """Of the Triton that is installed: its own way, and the way behind its encoding."""
    tensor = torch.zeros(40, 80, dtype=torch.float16)[:, :64]
    run = Run()
    descriptor = MAKE(tensor)
    before = getattr(nvidia, "_BASE_ARGS_FORMAT_LEN", None)
    if before is None:  # newer releases hand over one tuple of arguments
        run.launch((descriptor, 5, 6))
        own = run.launched.pop()[-1]
    else:
        run.launch(*[None] * before, descriptor, 5, 6)
        own = run.launched.pop()[before:]
    known = Encoded(MAKE, tuple(tensor.shape), tensor.stride(), tensor.dtype, ABOUT)
    assert tuple(own) == (*known[tensor.data_ptr()], 5, 6)
    assert encoded[0] == encoded[1]
    bare = behind_encoding(run)
    assert bare is not run
    assert bare.launch == run.bare


def test_without_a_way_behind_it_triton_encodes() -> None:
    assert behind_encoding(SimpleNamespace(launch=print)) is None
    assert behind_encoding(SimpleNamespace()) is None


def launch_step(tensor: Tensor) -> tuple[plan._Launch, Any]:
    form = plan._Form.of(Described(tensor, MAKE))
    compiled = SimpleNamespace(
        run=Run(), function="function", packed_metadata="metadata", metadata=SimpleNamespace(tensordesc_meta=[ABOUT])
    )
    return plan._Launch("kernel", 3, (1, 2), (form, None), (6,), {}, "facts"), compiled


def test_a_plan_hands_over_what_was_encoded(encoded: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    step, compiled = launch_step(torch.zeros(40, 64, dtype=torch.float16))
    monkeypatch.setattr(plan, "kept", lambda *_: compiled)
    memory = driver.Places(3)
    direct, (run, programs, function, metadata, pick, numbers), derives = step.ready(0, memory)
    assert (direct, derives) == (None, None)
    assert run.launch == compiled.run.bare
    assert (programs, function, metadata, numbers) == (3, "function", "metadata", (6,))
    for places in ([None, 4096, 5], [None, 4096, 7]):
        assert pick(places) == ["map of 4096", 40, 64, 64, 1, places[2]]
    assert len(encoded) == 1
    compiled.run.launch = print
    assert step.ready(0, memory) is None


def test_a_plan_tells_triton_of_descriptors() -> None:
    """Where no compiled kernel is at hand, the launch is given descriptors of the tensors of the call."""
    seen: list[Any] = []

    class Kernel:
        fn = "kernel"

        def __getitem__(self, grid: Any) -> Any:
            return lambda *given, **options: seen.append((grid, given, options))

    def launcher(tape: plan.Tape, left: Tensor, right: Tensor) -> tuple[Tensor]:
        tape.launch(Kernel(), 2, (Described(left, MAKE), right, 7), {"num_warps": 4}, None)
        return (left,)

    for _ in range(2):
        left, right = torch.zeros(40, 64, dtype=torch.float16), torch.zeros(3)
        plan.run(launcher, (left, right), ())
        grid, (descriptor, other, number), options = seen.pop()
        assert (grid, number, options) == ((2,), 7, {"num_warps": 4})
        assert descriptor.base is left or descriptor.base.data_ptr() == left.data_ptr()
        assert descriptor.block_shape == [16, 32]
        assert other is right
