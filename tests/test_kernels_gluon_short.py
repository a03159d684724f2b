"""Hopper's backward for short heads against float64 on a Hopper GPU; anywhere, what it refuses and how it compiles."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from epic_fast.kernels.prompt_attention import (  # pyright: ignore[reportMissingImports]
    gluon_forward,
    gluon_short_backward,
)
from epic_fast.kernels.prompt_attention.reference import prompt_attention as reference  # pyright: ignore
from epic_fast.testing.cases import AttentionCase, with_batch
from epic_fast.testing.numerics import assert_bits_equal, check_operation, poisoned_empty

NAMES = ("query", "key", "value", "prompt_query", "prompt_key", "prompt_value")
ALL = (True,) * 6
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")


class _Attention(torch.autograd.Function):
    """Forward and short backward, as autograd would call them."""

    @staticmethod
    def forward(ctx: Any, options: dict[str, Any], *inputs: Any) -> Any:
        lengths, scale = options["lengths"], options["scale"]
        ctx.options = {
            "prefix": options["prompt_mask"] == "prefix",
            "causal": options["causal"],
            "scale": inputs[0].shape[-1] ** -0.5 if scale is None else scale,
        }
        output, prompt_output, lse = gluon_forward.prompt_attention_forward(*inputs, lengths, **ctx.options)
        ctx.saved = (*inputs, lengths, output, prompt_output, lse)
        ctx.set_materialize_grads(False)
        return output, prompt_output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        assert not gluon_short_backward.limits(*grads, *ctx.saved[:6], scale=ctx.options["scale"])
        found = gluon_short_backward.short_backward_gluon(
            *grads, *ctx.saved, **ctx.options, needs=ctx.needs_input_grad[1:]
        )
        return None, *found


def attention(**given: Any) -> tuple[Tensor, Tensor | None]:
    inputs = [given.pop(name) for name in NAMES]
    return _Attention.apply(given, *inputs)  # pyright: ignore[reportReturnType]


def check(case: AttentionCase, dtype: torch.dtype, needs: tuple[str, ...] = NAMES, **settings: Any) -> None:
    with poisoned_empty():
        check_operation(
            attention,
            reference,
            case.make(dtype, "cuda"),
            case.options("cuda"),
            reduction=case.reductions,
            output_names=case.outputs,
            needs=needs,
            **settings,
        )


def variants(rows: int) -> dict[str, AttentionCase]:
    prompts = min(16, rows // 2)
    case = AttentionCase(4, 3, rows - prompts, prompts, 64, layout="packed")
    tokens = case.tokens
    lengths = (tokens, 0, tokens // 2, 1)
    return {
        "plain": case,
        "no prompts": replace(case, tokens=rows, prompts=0, layout="heads"),
        "causal": replace(case, causal=True, layout="tokens"),
        "masks, lengths, shared": replace(
            case, prompt_mask="prefix", causal=True, lengths=lengths, shared=True, layout="tokens"
        ),
        "prefix tuning": replace(case, prefix_tuning=True, lengths=lengths, layout="heads"),
    }


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("variant", variants(3))
@pytest.mark.parametrize("rows", [1, 64, 65, 93, 96, 97, 128])
def test_backward(rows: int, variant: str) -> None:
    check(variants(rows)[variant], torch.bfloat16)


@pytest.mark.gpu
@on_hopper
def test_float16() -> None:
    check(variants(93)["causal"], torch.float16)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("needs", [("query", "prompt_key"), ("key",), NAMES[3:], NAMES[:3]], ids=" ".join)
def test_some_gradients(needs: tuple[str, ...]) -> None:
    check(variants(93)["masks, lengths, shared"], torch.bfloat16, needs)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["output", "prompt_output"])
def test_an_output_that_nobody_used(used: tuple[bool, bool]) -> None:
    check(variants(93)["plain"], torch.bfloat16, used=used)


def run(case: AttentionCase, inputs: dict[str, Tensor | None]) -> tuple[Any, ...]:
    """Gradients; those that come in are ones, of which each sample has the same."""
    options = {"prefix": case.prompt_mask == "prefix", "causal": case.causal, "scale": case.head_dim**-0.5}
    lengths = case.options("cuda")["lengths"]
    output, prompt_output, lse = gluon_forward.prompt_attention_forward(*inputs.values(), lengths, **options)
    ones = (torch.ones_like(output), None if prompt_output is None else torch.ones_like(prompt_output))
    return gluon_short_backward.short_backward_gluon(
        *ones, *inputs.values(), lengths, output, prompt_output, lse, **options, needs=ALL
    )


@pytest.mark.gpu
@on_hopper
def test_nan_past_the_length_reaches_nobody() -> None:
    case = variants(93)["masks, lengths, shared"]
    inputs = case.make(torch.bfloat16, "cuda")
    lengths = case.options("cuda")["lengths"]
    past = (torch.arange(case.tokens, device="cuda") >= lengths[:, None])[:, None, :, None]
    clean, dirty = (
        {
            name: each if each is None or "prompt" in name else torch.where(past, fill, each)
            for name, each in inputs.items()
        }
        for fill in (0.0, math.nan)
    )
    results = run(case, dirty)
    assert_bits_equal(results, run(case, clean))
    assert not any(each.masked_select(past).any() for each in results[:3])


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_bits(causal: bool) -> None:
    """Two runs agree, the first of which Triton launches, and so do a sample alone and in its batch."""
    case = replace(variants(93)["plain"], batch=7, causal=causal, layout="tokens")
    inputs = case.make(torch.bfloat16, "cuda")
    first = run(case, inputs)
    assert_bits_equal(run(case, inputs), first)
    own = {name: None if each is None else each[5:6] for name, each in inputs.items()}
    for one, other in zip(run(with_batch(case, 1), own), first, strict=True):
        assert_bits_equal(one[0], other[5])


def refused(tokens: int, head_dim: int = 64, scale: float = 0.1, **other: Tensor) -> str:
    inputs = {**AttentionCase(2, 2, tokens, 4, head_dim).make(torch.bfloat16), **other}
    grads = (inputs["query"], inputs["prompt_query"])
    return "; ".join(gluon_short_backward.limits(*grads, *inputs.values(), scale=scale))


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "wgmma needs a Hopper GPU" in refused(20)
    monkeypatch.setattr(gluon_forward, "is_hopper", lambda device: True)
    assert refused(20) == refused(124) == ""
    assert "there are 129 prompts and tokens; wanted 128 at most" in refused(125)
    assert "head_dim is 128; wanted 64" in refused(20, head_dim=128)
    assert "scale is -1.0; wanted a positive one" in refused(20, scale=-1.0)
    shifted = torch.empty(2, 2, 20, 65, dtype=torch.bfloat16)[..., 1:]
    assert "does not start at a multiple of 16 bytes" in refused(20, key=shifted)


def test_tiles_hold_every_number_of_rows() -> None:
    for count in range(1, gluon_short_backward.MOST_ROWS + 1):
        full, tail = gluon_short_backward._tiles(count)
        assert 64 * full + tail - (tail or 64) < count <= 64 * full + tail


COMPILE = """
import torch

from epic_fast.kernels.prompt_attention.gluon_short_backward import short_backward_gluon
from epic_fast.testing import aot
from epic_fast.testing.cases import AttentionCase

target = aot.TARGETS["cuda:90"]
for case, resident in (
    (AttentionCase(2, 2, 77, 16, causal=True, layout="tokens"), 3),
    (AttentionCase(2, 2, 77, 16, prompt_mask="prefix", causal=True, lengths=(77, 3)), 3),
    (AttentionCase(2, 2, 100, 28, causal=True), 2),
):
    inputs = case.make(torch.bfloat16, "meta")
    batch, heads, rows, _ = inputs["query"].shape
    lse = torch.empty(batch, heads, rows + case.prompts, device="meta")
    outputs = (inputs["query"], inputs["prompt_query"])
    with aot.recorded_launches(target) as builds:
        short_backward_gluon(
            *outputs, *inputs.values(), case.options("meta")["lengths"], *outputs, lse,
            prefix=case.prompt_mask == "prefix", causal=case.causal, scale=0.1, needs=(True,) * 6,
        )
    (build,) = builds
    build.launches = [str(case)]
    assert not build.problems, build.problems
    assert not build.spill_bytes, (case, build.spill_bytes)
    # A multiprocessor has 65536 registers, and 227 KiB of shared memory of which each program takes one for itself.
    assert build.registers <= 65536 // (128 * resident) // 8 * 8, (case, build.registers)
    assert resident * (build.shared + 1024) <= 227 * 1024, (case, build.shared)
"""


def test_as_many_programs_share_a_multiprocessor_as_the_table_counts_on() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
