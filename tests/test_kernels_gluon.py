"""Hopper's own attention kernels against float64 on a Hopper GPU; anywhere, what they refuse and how they compile."""

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
    gluon_backward,
    gluon_forward,
    launchers,
)
from epic_fast.kernels.prompt_attention.reference import prompt_attention as reference  # pyright: ignore
from epic_fast.testing.cases import AttentionCase, with_batch
from epic_fast.testing.numerics import assert_bits_equal, check_operation, poisoned_empty

NAMES = ("query", "key", "value", "prompt_query", "prompt_key", "prompt_value")
ALL = (True,) * 6
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")


class _Attention(torch.autograd.Function):
    """The two launchers, as autograd would call them."""

    @staticmethod
    def forward(ctx: Any, options: dict[str, Any], *inputs: Any) -> Any:
        lengths, scale = options["lengths"], options["scale"]
        ctx.options = {
            "prefix": options["prompt_mask"] == "prefix",
            "causal": options["causal"],
            "scale": inputs[0].shape[-1] ** -0.5 if scale is None else scale,
        }
        assert not gluon_forward.limits(*inputs, scale=ctx.options["scale"])
        output, prompt_output, lse = gluon_forward.prompt_attention_forward(*inputs, lengths, **ctx.options)
        ctx.saved = (*inputs, lengths, output, prompt_output, lse)
        ctx.set_materialize_grads(False)
        return output, prompt_output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        found = gluon_backward.prompt_attention_backward(
            *grads, *ctx.saved, **ctx.options, needs=ctx.needs_input_grad[1:]
        )
        return None, *found


def attention(**given: Any) -> tuple[Tensor, Tensor | None]:
    inputs = [given.pop(name) for name in NAMES]
    return _Attention.apply(given, *inputs)  # pyright: ignore[reportReturnType]


def has_backward(case: AttentionCase) -> bool:
    varied = case.causal or case.prompt_mask == "prefix" or case.lengths is not None
    return case.head_dim == 64 and case.prompts + case.tokens <= (288 if varied else gluon_backward.MOST_KEYS)


def check(case: AttentionCase, dtype: torch.dtype, needs: tuple[str, ...] = NAMES, **settings: Any) -> None:
    with poisoned_empty():
        check_operation(
            attention,
            reference,
            case.make(dtype, "cuda"),
            case.options("cuda"),
            reduction=case.reductions,
            output_names=case.outputs,
            needs=needs if has_backward(case) else (),
            **settings,
        )


def flags(case: AttentionCase) -> dict[str, Any]:
    return {"prefix": case.prompt_mask == "prefix", "causal": case.causal, "scale": case.head_dim**-0.5}


def run(
    case: AttentionCase, inputs: dict[str, Tensor | None], needs: tuple[bool, ...] = ALL, grads: Any = None
) -> tuple[Any, ...]:
    """Outputs, statistic and gradients; the gradients that come in are ones, of which each sample has the same."""
    lengths = case.options("cuda")["lengths"]
    output, prompt_output, lse = gluon_forward.prompt_attention_forward(*inputs.values(), lengths, **flags(case))
    if not has_backward(case):
        return output, prompt_output, lse
    ones = (torch.ones_like(output), None if prompt_output is None else torch.ones_like(prompt_output))
    found = gluon_backward.prompt_attention_backward(
        *ones, *inputs.values(), lengths, output, prompt_output, lse, **flags(case), needs=needs, grads=grads
    )
    return output, prompt_output, lse, *found


ROWS = (1, 63, 64, 65, 93, 128, 129, 256, 257, 273, 288, 289, 336, 416, 593, 600)


def variants(rows: int, head_dim: int = 64) -> dict[str, AttentionCase]:
    prompts = min(16, rows // 2)
    case = AttentionCase(4, 3, rows - prompts, prompts, head_dim, layout="packed")
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
        "prefix tuning, causal": replace(case, prefix_tuning=True, causal=True, shared=True, layout="heads"),
    }


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        *((each, torch.bfloat16) for each in variants(3)),
        ("plain", torch.float16),
        ("masks, lengths, shared", torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", ROWS)
def test_forward_and_backward(rows: int, variant: str, dtype: torch.dtype) -> None:
    check(variants(rows)[variant], dtype)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("variant", ["plain", "causal", "masks, lengths, shared"])
@pytest.mark.parametrize("rows", [1, 65, 128, 129, 273, 593])
def test_wide_heads(rows: int, variant: str) -> None:
    check(variants(rows, 128)[variant], torch.bfloat16)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    "needs",
    [("query",), ("key",), ("value", "prompt_value"), ("prompt_query",), NAMES[3:], NAMES[:3], ("prompt_key", "query")],
    ids=" ".join,
)
def test_some_gradients(needs: tuple[str, ...]) -> None:
    check(variants(273)["masks, lengths, shared"], torch.bfloat16, needs)
    check(variants(150)["plain"], torch.bfloat16, needs)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["output", "prompt_output"])
def test_an_output_that_nobody_used(used: tuple[bool, bool]) -> None:
    check(variants(273)["plain"], torch.bfloat16, used=used)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", [93, 273, 593])
def test_nan_past_the_length_reaches_nobody(rows: int) -> None:
    case = variants(rows)["masks, lengths, shared"]
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
    assert not results[0].masked_select(past).any()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("rows", [93, 273, 593])
def test_bits(rows: int, causal: bool) -> None:
    """Two runs agree, the first of which Triton launches, and so do a sample alone and in its batch."""
    case = replace(variants(rows)["plain"], batch=7, causal=causal, layout="tokens")
    inputs = case.make(torch.bfloat16, "cuda")
    first = run(case, inputs)
    assert_bits_equal(run(case, inputs), first)
    own = {name: None if each is None else each[5:6] for name, each in inputs.items()}
    for one, other in zip(run(with_batch(case, 1), own), first, strict=True):
        assert_bits_equal(one[0], other[5])


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", [273, 593])
def test_results_are_written_into_views(rows: int) -> None:
    case = variants(rows)["plain"]
    inputs = case.make(torch.bfloat16, "cuda")
    want = run(case, inputs)
    buffer = torch.full((4, rows + 1, 3, 64), 7.0, device="cuda", dtype=torch.bfloat16)
    prompts, tokens = (buffer[:, part].transpose(1, 2) for part in (slice(0, 16), slice(16, rows)))
    gluon_forward.prompt_attention_forward(
        *inputs.values(), None, **flags(case), output=tokens, prompt_output=prompts, save_lse=False
    )
    assert_bits_equal((tokens, prompts), want[:2])
    assert (buffer[:, rows] == 7).all()
    if has_backward(case):
        packed = torch.full((4, rows + 1, 3, 3, 64), 7.0, device="cuda", dtype=torch.bfloat16)
        parts = packed.permute(2, 0, 3, 1, 4)
        grads = (*(each[:, :, 16:rows] for each in parts), *(each[:, :, :16] for each in parts))
        assert_bits_equal(run(case, inputs, grads=grads)[3:], want[3:])
        assert_bits_equal(grads, want[3:])
        assert (packed[:, rows] == 7).all()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rows", [93, 273, 593])
def test_samples_more_than_32_bits_apart(rows: int) -> None:
    case = replace(variants(rows)["plain"], batch=2, heads=1, layout="heads")
    inputs = case.make(torch.bfloat16, "cuda")
    want = run(case, inputs)
    memory = torch.empty(2**31 + 2**20, dtype=torch.bfloat16, device="cuda")

    def distant(place: int) -> Tensor:
        return memory[place * 2**17 :].as_strided((2, 1, case.tokens, 64), (2**31, 64, 64, 1))

    far_key, far_output, far_gradient = (distant(place) for place in range(3))
    assert inputs["key"] is not None
    inputs["key"] = far_key.copy_(inputs["key"])
    assert not gluon_forward.limits(*inputs.values(), scale=1.0, output=far_output)
    assert_bits_equal(run(case, inputs, grads=(None, None, far_gradient, None, None, None)), want)
    gluon_forward.prompt_attention_forward(*inputs.values(), None, **flags(case), output=far_output)
    assert_bits_equal(far_output, want[0])
    if has_backward(case):
        assert_bits_equal(far_gradient, want[5])


@pytest.fixture
def a_hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_forward, "is_hopper", lambda device: True)


def inputs_of(tokens: int = 20, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    case = AttentionCase(2, 2, tokens, 4, head_dim)
    return {name: each for name, each in case.make(dtype).items() if each is not None}


@pytest.mark.usefixtures("a_hopper_gpu")
def test_what_they_refuse() -> None:
    def forward(inputs: dict[str, Tensor], scale: float = 0.1) -> str:
        return "; ".join(gluon_forward.limits(*inputs.values(), scale=scale))

    def backward(inputs: dict[str, Tensor]) -> str:
        outputs = (inputs["query"], inputs["prompt_query"])
        return "; ".join(gluon_backward.limits(*outputs, *inputs.values(), *outputs, scale=0.1))

    assert forward(inputs_of()) == backward(inputs_of()) == forward(inputs_of(head_dim=128)) == ""
    assert forward(inputs_of(tokens=600)) == ""
    assert "head_dim is 80; wanted 64 or 128" in forward(inputs_of(head_dim=80))
    assert "head_dim is 128; wanted 64" in backward(inputs_of(head_dim=128))
    assert "the dtype is torch.float32" in forward(inputs_of(dtype=torch.float32))
    assert "scale is -1.0; wanted a positive one" in forward(inputs_of(), scale=-1.0)
    assert "scale is nan" in forward(inputs_of(), scale=math.nan)
    assert backward(inputs_of(tokens=604)) == ""
    assert "there are 609 prompts and tokens; wanted 608 at most" in backward(inputs_of(tokens=605))
    shifted = {**inputs_of(), "key": torch.empty(2, 2, 20, 65, dtype=torch.bfloat16)[..., 1:]}
    assert "does not start at a multiple of 16 bytes" in forward(shifted)
    assert "does not start at a multiple of 16 bytes" in backward(shifted)
    far = torch.empty(1, dtype=torch.bfloat16, device="meta").as_strided((2, 2, 20, 64), (64, 64, 2**27, 1))
    layout = gluon_forward.layout_of((far,), 2)
    assert gluon_forward.layout_limits(layout) == ["one head of a tensor spans 2**31 elements or more"]


def test_they_refuse_other_devices() -> None:
    assert "wgmma needs a Hopper GPU" in gluon_forward.limits(*inputs_of().values(), scale=0.1)[0]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_hold_every_number_of_keys(head_dim: int, causal: bool) -> None:
    for keys in range(1, 700):
        tile = gluon_forward.forward_tile(head_dim, keys, causal, lengths=False)
        if tile.full:
            assert tile.held - (tile.tail or tile.keys) < keys <= tile.held
        if keys <= gluon_backward.MOST_KEYS:
            tiles = gluon_backward.backward_tiles(keys, keys, causal)
            resident = [each for each in (tiles.query, tiles.key) if isinstance(each, gluon_backward.HopperTile)]
            assert len(resident) == 1 + (keys <= 288)
            for each in resident:
                assert each.other == 64
                assert each.held - (each.tail or 64) < keys <= each.held


def test_which_backwards_they_take() -> None:
    takes = launchers._resident_backward
    for count in (129, 288, 289, 416, 577, 608):
        assert takes(count, count, False)
        assert takes(count, count, True) == (count <= 288)
    for rows, keys in ((128, 128), (417, 417), (576, 576), (609, 609), (288, 290), (416, 577)):
        assert not takes(rows, keys, False)
    # In prefix tuning there are as many keys and fewer rows.
    assert takes(577, 593, False)


COMPILE = """
import re, subprocess, tempfile
from unittest import mock

import torch
from triton import knobs

from epic_fast.kernels.prompt_attention.gluon_forward import prompt_attention_forward
from epic_fast.testing import aot
from epic_fast.testing.cases import AttentionCase


def machine_code(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def overwritten_queries(lines):
    # wgmma takes queries from registers, as it does weights; only the keys that queries meet are not transposed.
    labels = {line.strip()[:-1]: place for place, line in enumerate(lines) if re.match(r"\\s*\\.L_x_\\d+:", line)}
    loops = 0
    for end, line in enumerate(lines):
        jump = re.search(r"BRA.*`\\((\\.L_x_\\d+)\\)", line)
        start = labels.get(jump[1], end) if jump else end
        product = r"HGMMA\\S* R\\d+, R(\\d+), gdesc\\[\\w+\\](?!\\.tnspB)"
        products = [re.search(product, each) for each in lines[start:end]]
        queries = {int(each[1]) + part for each in products if each for part in range(4)}
        loops += bool(queries)
        for each in lines[start:end]:
            operation = re.search(r"\\*/\\s+(?:@!?U?P\\w+\\s+)?([A-Z0-9_.]+)\\s+(?:U?P\\w+, )*R(\\d+)\\b", each)
            if operation and not operation[1].startswith(("ST", "LDGSTS")) and int(operation[2]) in queries:
                yield each.strip()
    assert loops == 1, f"{loops} loops multiply queries"


describe = aot.describe
for case in (
    AttentionCase(2, 2, 577, 16),
    AttentionCase(2, 2, 577, 16, prompt_mask="prefix", lengths=(577, 3)),
    AttentionCase(2, 2, 512, 32, causal=True),
    AttentionCase(2, 2, 257, 16, 128),
):
    target = aot.TARGETS["cuda:90"]
    with mock.patch.object(aot, "describe", lambda compiled, *_: compiled), aot.recorded_launches(target) as builds:
        options = case.options("meta")
        prompt_attention_forward(
            *case.make(torch.bfloat16, "meta").values(), options["lengths"], prefix=case.prompt_mask == "prefix",
            causal=case.causal, scale=0.1,
        )
    (compiled,) = builds
    build = describe(compiled, target)
    build.launches = [str(case)]
    assert not build.problems, build.problems
    overwritten = list(overwritten_queries(machine_code(compiled)))
    assert not overwritten, f"{case}: queries do not survive the loop over keys:\\n" + "\\n".join(overwritten)
    print(case.tokens, case.causal, build.registers, build.shared)
"""


def test_queries_stay_in_their_registers() -> None:
    """One form of the loop over keys was compiled so that each tile's weights took the place of the queries."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
