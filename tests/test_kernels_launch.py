"""A compiled kernel is taken again only for a call that Triton would compile the same kernel for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from epic_fast.kernels.common import launch as launch_module  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.prompt_attention import reference, triton_rows  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.prompt_attention.triton_forward import (  # pyright: ignore[reportMissingImports]
    prompt_attention_forward,
)


def rows(*shape: int, dtype: torch.dtype = torch.float16, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def facts(*tensors: Tensor | None, others: tuple[Tensor | None, ...] = (), constants: Any = ()) -> Any:
    return triton_rows.facts_of(triton_rows.layout_of(tensors, 2), others, constants)


def test_the_layout_of_tensors():
    whole = rows(2, 5, 3, 16).transpose(1, 2)  # (2, 3, 5, 16), in memory (2, 5, 3, 16)
    shared = rows(1, 3, 4, 16)
    found = triton_rows.layout_of((whole, None, shared), 2)
    assert found.align == 8
    assert not found.wide
    assert found.strides == [240 // 8, 16 // 8, 48 // 8, 0, 0, 0, 0, 64 // 8, 16 // 8]
    assert found.types == (torch.float16, None, torch.float16)
    odd = rows(2, 3, 5, 17)[..., :16]
    assert triton_rows.layout_of((odd,), 2).align == 1
    assert triton_rows.layout_of((odd,), 2).strides == [255, 85, 17]
    late = rows(1024)[4:].as_strided((2, 3, 5, 16), (240, 80, 16, 1))
    assert triton_rows.layout_of((late,), 2).align == 1
    far = torch.empty_strided((1, 1, 2, 16), (0, 0, 2**30, 1), dtype=torch.float16, device="meta")
    assert triton_rows.layout_of((far,), 2).wide


def test_what_triton_compiles_for_makes_other_facts():
    base, same = rows(2, 3, 5, 16), rows(4, 3, 7, 16)
    lengths = torch.zeros(2, dtype=torch.int64)
    known = facts(base, others=(lengths,), constants=(64, True))
    assert known is not None
    assert facts(same, others=(lengths,), constants=(64, True)) == known
    others = [
        facts(base.to(torch.bfloat16), others=(lengths,), constants=(64, True)),
        facts(None, others=(lengths,), constants=(64, True)),
        facts(base, others=(lengths.to(torch.int32),), constants=(64, True)),
        facts(base, others=(None,), constants=(64, True)),
        facts(base, others=(lengths,), constants=(32, True)),
        facts(base, others=(lengths,), constants=(64, False)),
    ]
    assert known not in others
    assert len(set(others)) == len(others)


def test_what_is_rare_is_left_to_triton():
    base = rows(2, 3, 5, 16)
    assert facts(rows(2, 3, 5, 17)[..., :16]) is None
    assert facts(base, others=(torch.zeros(9, dtype=torch.int64)[1:],)) is None
    batches_apart = torch.empty_strided((2, 1, 2, 16), (2**35, 16, 16, 1), dtype=torch.float16, device="meta")
    assert facts(batches_apart) is None


@pytest.mark.gpu
def test_calls_that_differ_get_their_own_kernel():
    """One after the other, each differing from the one before in what a kernel is compiled for."""
    launch_module._compiled.clear()
    generator = torch.Generator(device="cuda").manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)

    def check(tensors: list[Any], lengths: Tensor | None, **flags: Any) -> None:
        found = prompt_attention_forward(
            *tensors, lengths, prefix=False, causal=flags.get("causal", False), scale=0.2, save_lse=True
        )
        wide = [None if each is None else each.double() for each in tensors]
        wanted = reference.prompt_attention(*wide, lengths=lengths, scale=0.2, **flags)
        for each, want in zip(found, wanted, strict=False):
            if want is not None:
                assert (each.double() - want).abs().max() < 0.03

    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        own = [draw(2, 3, 33, 64, dtype=dtype) for _ in range(3)]
        prompts = [draw(1, 3, 5, 64, dtype=dtype) for _ in range(3)]
        shifted = [torch.empty(2, 3, 33, 67, dtype=dtype, device="cuda")[..., 3:].copy_(each) for each in own]
        for lengths in (None, torch.tensor([33, 7], device="cuda"), torch.tensor([2, 33], device="cuda").int(), None):
            check([*own, *prompts], lengths)
            check([*own, *prompts], lengths, causal=True)
            check([*shifted, *prompts], lengths)
            check([*own, None, *prompts[1:]], lengths)
            if lengths is not None:
                check([*own, *prompts], torch.cat([lengths[:1], lengths])[1:])
    assert launch_module._compiled


@pytest.mark.gpu
def test_a_hook_on_launches_sees_them():
    from triton import knobs

    tensors = [torch.randn(1, 1, 20, 64, device="cuda", dtype=torch.bfloat16) for _ in range(6)]

    def call() -> None:
        prompt_attention_forward(*tensors, None, prefix=False, causal=False, scale=math.sqrt(1 / 64))

    call()
    call()
    seen: list[Any] = []
    hooks = knobs.runtime.launch_enter_hook
    hooks.add(seen.append)
    try:
        call()
    finally:
        hooks.remove(seen.append)
    assert len(seen) == 1
