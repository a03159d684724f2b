"""The Triton kernels of prompt attention against float64: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

pytest.importorskip("triton")

from epic_fast.functional import prompt_attention
from epic_fast.kernels.common import plan  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.prompt_attention import (  # pyright: ignore[reportMissingImports]
    tiles,
    triton_backward,
    triton_forward,
    triton_rows,
)
from epic_fast.kernels.prompt_attention.reference import prompt_attention as reference  # pyright: ignore
from epic_fast.kernels.prompt_attention.tiles import BackwardTiles, Tile  # pyright: ignore[reportMissingImports]
from epic_fast.kernels.prompt_attention.triton_backward import prompt_attention_backward  # pyright: ignore
from epic_fast.kernels.prompt_attention.triton_forward import prompt_attention_forward  # pyright: ignore
from epic_fast.testing.cases import ATTENTION_MEASURED, ATTENTION_PRODUCTION, AttentionCase, attention_cases, with_batch
from epic_fast.testing.numerics import assert_bits_equal, check_operation, poisoned_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
NAMES = ("query", "key", "value", "prompt_query", "prompt_key", "prompt_value")
ALL = (True,) * 6

# Tiles so small that every loop turns more than once at a size that the interpreter can do.
SMALL = Tile(rows=16, keys=32, tail=16, warps=4, stages=1)
SMALL_BACKWARD = BackwardTiles(query=SMALL, key=Tile(rows=16, keys=16, warps=4, stages=1))


class _Attention(torch.autograd.Function):
    """The two launchers, as autograd would call them."""

    @staticmethod
    def forward(ctx: Any, forward_tiles: Any, backward_tiles: Any, options: dict[str, Any], *inputs: Any) -> Any:
        lengths, scale = options["lengths"], options["scale"]
        ctx.options = {
            "prefix": options["prompt_mask"] == "prefix",
            "causal": options["causal"],
            "scale": inputs[0].shape[-1] ** -0.5 if scale is None else scale,
        }
        output, prompt_output, lse = prompt_attention_forward(*inputs, lengths, **ctx.options, tiles=forward_tiles)
        ctx.tiles = backward_tiles
        ctx.saved = (*inputs, lengths, output, prompt_output, lse)
        ctx.set_materialize_grads(False)
        return output, prompt_output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        found = prompt_attention_backward(
            *grads, *ctx.saved, **ctx.options, needs=ctx.needs_input_grad[3:], tiles=ctx.tiles
        )
        return None, None, None, *found


def kernels(forward_tiles: Tile | None = None, backward_tiles: BackwardTiles | None = None) -> Callable[..., Any]:
    def attention(**given: Any) -> tuple[Tensor, Tensor | None]:
        inputs = [given.pop(name) for name in NAMES]
        return _Attention.apply(forward_tiles, backward_tiles, given, *inputs)

    return attention


def in_one_graph(**given: Any) -> tuple[Tensor, Tensor | None]:
    """The operation itself, compiled: whichever kernels this device is given, in a graph without a break."""
    torch._dynamo.reset()

    def attention(**arguments: Any) -> tuple[Tensor, Tensor | None]:
        return prompt_attention(**arguments, impl="triton")

    return torch.compile(attention, backend="aot_eager", fullgraph=True)(**given)


def check(
    case: AttentionCase, dtype: torch.dtype, candidate: Callable[..., Any] | None = None, **settings: Any
) -> None:
    with poisoned_empty():
        check_operation(
            candidate or kernels(),
            reference,
            case.make(dtype, DEVICE),
            case.options(DEVICE),
            reduction=case.reductions,
            output_names=case.outputs,
            **settings,
        )


def forward(case: AttentionCase, inputs: dict[str, Tensor | None], **more: Any) -> tuple[Any, ...]:
    options = case.options(DEVICE)
    return prompt_attention_forward(*inputs.values(), options["lengths"], **flags(case), **more)


def flags(case: AttentionCase) -> dict[str, Any]:
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    return {"prefix": case.prompt_mask == "prefix", "causal": case.causal, "scale": scale}


def backward(
    case: AttentionCase, inputs: dict[str, Tensor | None], needs: tuple[bool, ...] = ALL, **more: Any
) -> tuple[Tensor | None, ...]:
    output, prompt_output, lse = forward(case, inputs)
    random = torch.Generator(DEVICE).manual_seed(3)
    grads = [
        None if each is None else torch.randn(each.shape, generator=random, device=DEVICE).to(each.dtype)
        for each in (output, prompt_output)
    ]
    return prompt_attention_backward(
        *grads,
        *inputs.values(),
        case.options(DEVICE)["lengths"],
        output,
        prompt_output,
        lse,
        **flags(case),
        needs=needs,
        **more,
    )


@settings(max_examples=6)
@given(case=attention_cases(max_batch=2, max_tokens=40, max_prompts=20, head_dims=(16, 32, 48)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_call_is_within_the_budget(dtype: torch.dtype, case: AttentionCase) -> None:
    check(case, dtype)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU compiles the production shapes")
@settings(max_examples=4)
@given(case=attention_cases(max_batch=2, max_tokens=12, max_prompts=6, head_dims=(16, 24, 48)))
def test_any_call_in_one_graph_is_within_the_budget(case: AttentionCase) -> None:
    check(case, torch.float32, in_one_graph)


@pytest.mark.parametrize("lengths", [None, (11, 37)], ids=["whole", "lengths"])
@pytest.mark.parametrize("prefix_tuning", [False, True], ids=["rows", "prefix tuning"])
@pytest.mark.parametrize("prompt_mask", ["full", "prefix"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_masks_over_several_tiles(
    causal: bool, prompt_mask: str, prefix_tuning: bool, lengths: tuple[int, ...] | None
) -> None:
    case = AttentionCase(
        2, 1, 37, 21, 16, prompt_mask, causal, lengths, prefix_tuning=prefix_tuning, shared=causal, layout="tokens"
    )
    check(case, torch.float32, kernels(SMALL, SMALL_BACKWARD))


@pytest.mark.parametrize(("prompts", "prefix_tuning"), [(30, False), (30, True), (31, False), (14, True), (15, True)])
def test_the_diagonal_at_the_border_of_a_tile(prompts: int, prefix_tuning: bool) -> None:
    """Key tiles are 32 columns wide: the last that a row tile sees whole ends where its first row's sight does."""
    case = AttentionCase(2, 1, 37, prompts, 16, causal=True, prefix_tuning=prefix_tuning)
    check(case, torch.float32, kernels(SMALL, SMALL_BACKWARD))


FORWARD_TILES = {
    "split": SMALL,
    "one loop": dataclasses.replace(SMALL, tail=0, split=False),
    "row tail": dataclasses.replace(SMALL, rows=32, row_tail=16),
    "single": Tile(rows=32, keys=64, warps=4, stages=1, single=True),
}
BACKWARD_TILES = {
    "two kernels": SMALL_BACKWARD,
    "no split": BackwardTiles(query=dataclasses.replace(SMALL, tail=0, split=False), key=Tile(32, 16, 4, 1)),
    "one pass": BackwardTiles(query=SMALL, key=SMALL, one_pass=Tile(64, 16, 4, 1)),
}


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize(
    ("forward_tiles", "backward_tiles"),
    [*((each, "two kernels") for each in FORWARD_TILES), *(("split", each) for each in BACKWARD_TILES)],
)
def test_every_form_of_the_kernels(forward_tiles: str, backward_tiles: str, causal: bool) -> None:
    case = AttentionCase(2, 1, 43, 6, 16, "prefix", causal, (43, 30))
    check(case, torch.float16, kernels(FORWARD_TILES[forward_tiles], BACKWARD_TILES[backward_tiles]))


ALONE_AND_IN_A_GRAPH = pytest.mark.parametrize("candidate", [None, in_one_graph], ids=["launched", "in one graph"])


@ALONE_AND_IN_A_GRAPH
@pytest.mark.parametrize("head_dim", [16, 24, 48, 72, 80, 96, 256])
def test_head_dims(head_dim: int, candidate: Any) -> None:
    check(AttentionCase(1, 2, 9, 3, head_dim, causal=True, layout="packed"), torch.float32, candidate)


@ALONE_AND_IN_A_GRAPH
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(1, 1, 1, 0, 16),
        AttentionCase(1, 1, 1, 1, 16),
        AttentionCase(2, 1, 5, 0, 16, causal=True, lengths=(0, 5)),
        AttentionCase(1, 1, 2, 40, 16, "prefix"),
        AttentionCase(1, 1, 9, 3, 16, scale=-0.3, causal=True),
        AttentionCase(1, 1, 9, 3, 16, scale=0.0),
        AttentionCase(2, 1, 9, 3, 16, scale=1.5, lengths=(9, 4)),
    ],
    ids=str,
)
def test_corners(case: AttentionCase, candidate: Any) -> None:
    check(case, torch.float32, candidate)


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["output", "prompt_output"])
@pytest.mark.parametrize("case", [AttentionCase(2, 1, 37, 21, 16), AttentionCase(2, 1, 30, 5, 16, "prefix", True)])
def test_an_output_that_nobody_used(case: AttentionCase, used: tuple[bool, bool]) -> None:
    check(case, torch.float32, used=used)
    check(case, torch.float32, kernels(SMALL, SMALL_BACKWARD), used=used)


def test_no_gradient_comes_in() -> None:
    case = AttentionCase(2, 1, 5, 3, 16)
    inputs = case.make(torch.float32, DEVICE)
    output, prompt_output, lse = forward(case, inputs)
    with poisoned_empty():
        found = prompt_attention_backward(
            None, None, *inputs.values(), None, output, prompt_output, lse, **flags(case), needs=ALL
        )
    assert all(each is not None and not each.any() for each in found)


@pytest.mark.parametrize("sizes", [(0, 2, 5, 3), (2, 0, 5, 3), (2, 2, 0, 0)])
def test_nothing_to_do(sizes: tuple[int, int, int, int]) -> None:
    case = AttentionCase(*sizes, head_dim=16)
    inputs = case.make(torch.float32, DEVICE)
    output, prompt_output, lse = forward(case, inputs)
    batch, heads, tokens, prompts = sizes
    assert output.shape == (batch, heads, tokens, 16)
    assert prompt_output.shape == (batch, heads, prompts, 16)
    assert lse.shape == (batch, heads, prompts + tokens)
    for found, source in zip(backward(case, inputs), inputs.values(), strict=True):
        assert source is not None
        assert found is not None
        assert found.shape == source.shape


def test_lse_is_the_log_sum_exp_in_base_2() -> None:
    case = AttentionCase(2, 2, 20, 3, 16, causal=True, lengths=(20, 7))
    inputs = case.make(torch.float32, DEVICE)
    _, _, lse = forward(case, inputs, tiles=SMALL)
    query = torch.cat([inputs["prompt_query"], inputs["query"]], 2).double()  # pyright: ignore
    key = torch.cat([inputs["prompt_key"], inputs["key"]], 2).double()  # pyright: ignore
    scores = query @ key.mT / 4
    for sample, length in enumerate((20, 7)):
        for row in range(23):
            limit = 3 + length if row < 3 else 3 + row - 2
            if row >= 3 + length:
                assert lse[sample, :, row].eq(math.inf).all()
            else:
                want = scores[sample, :, row, :limit].logsumexp(-1) * math.log2(math.e)
                torch.testing.assert_close(lse[sample, :, row].double(), want, atol=1e-5, rtol=1e-5)
    assert forward(case, inputs, save_lse=False)[2] is None


@pytest.mark.parametrize(("causal", "lengths_dtype"), [(False, torch.int32), (True, torch.int64)])
def test_nan_past_the_length_reaches_nobody(causal: bool, lengths_dtype: torch.dtype) -> None:
    case = AttentionCase(3, 1, 37, 5, 16, causal=causal, lengths=(0, 20, 37))
    clean = case.make(torch.float32, DEVICE)
    lengths = torch.tensor(case.lengths, dtype=lengths_dtype, device=DEVICE)
    random = torch.Generator(DEVICE).manual_seed(3)
    grads = [torch.randn(3, 1, rows, 16, generator=random, device=DEVICE) for rows in (37, 5)]
    past = (torch.arange(37, device=DEVICE) >= lengths[:, None])[:, None, :, None]
    results = []
    for fill in (0.0, math.nan):
        inputs = {name: each if "prompt" in name else torch.where(past, fill, each) for name, each in clean.items()}  # pyright: ignore
        output, prompt_output, lse = prompt_attention_forward(*inputs.values(), lengths, **flags(case), tiles=SMALL)
        for backward_tiles in (SMALL_BACKWARD, BACKWARD_TILES["one pass"]):
            found = prompt_attention_backward(
                torch.where(past, fill, grads[0]),
                grads[1],
                *inputs.values(),
                lengths,
                output,
                prompt_output,
                lse,
                **flags(case),
                needs=ALL,
                tiles=backward_tiles,
            )
            results.append((output, prompt_output, lse, *found))
    assert_bits_equal(results[0], results[2])
    assert_bits_equal(results[1], results[3])
    output, _, _, *gradients = results[2]
    for each in (output, *gradients[:3]):
        assert not each.masked_select(past).any()
        assert each.isfinite().all()


def test_a_length_beyond_the_tokens_is_all_of_them() -> None:
    case = AttentionCase(2, 1, 9, 3, 16)
    inputs = case.make(torch.float32, DEVICE)
    beyond = torch.tensor([9, 1000], device=DEVICE)
    got = prompt_attention_forward(*inputs.values(), beyond, **flags(case))
    assert_bits_equal(got, forward(case, inputs))


def test_infinity_stays_in_its_sample() -> None:
    case = AttentionCase(2, 1, 20, 3, 16)
    inputs = case.make(torch.float32, DEVICE)
    clean = forward(case, inputs)
    assert inputs["key"] is not None
    inputs["key"][0, 0, 4] = math.inf
    for before, after in zip(clean, forward(case, inputs), strict=True):
        assert_bits_equal(before[1], after[1])
    assert not forward(case, inputs)[0][0].isfinite().all()


def test_results_are_written_into_views() -> None:
    case = AttentionCase(2, 2, 9, 3, 16, layout="packed")
    inputs = case.make(torch.float32, DEVICE)
    want, want_gradients = forward(case, inputs), backward(case, inputs)

    buffer = torch.full((2, 13, 2, 16), 7.0, device=DEVICE)
    prompts, tokens = (buffer[:, part].transpose(1, 2) for part in (slice(0, 3), slice(3, 12)))
    output, prompt_output, _ = forward(case, inputs, output=tokens, prompt_output=prompts)
    assert output is tokens
    assert prompt_output is prompts
    assert_bits_equal((tokens, prompts), want[:2])
    assert (buffer[:, 12] == 7).all()

    packed = torch.full((2, 13, 3, 2, 16), 7.0, device=DEVICE)
    parts = packed.permute(2, 0, 3, 1, 4)
    grads = (*(each[:, :, 3:12] for each in parts), *(each[:, :, :3] for each in parts))
    found = backward(case, inputs, grads=grads)
    assert all(got is given for got, given in zip(found, grads, strict=True))
    assert_bits_equal(found, want_gradients)
    assert (packed[:, 12] == 7).all()


def test_the_gradient_of_a_shared_prompt_is_written_into_a_view() -> None:
    case = AttentionCase(3, 2, 9, 4, 16, shared=True)
    inputs = case.make(torch.float32, DEVICE)
    want = backward(case, inputs)
    buffer = torch.full((1, 2, 4, 17), 7.0, device=DEVICE)
    backward(case, inputs, grads=(None, None, None, None, buffer[..., :16], None))
    assert_bits_equal(buffer[..., :16], want[4])
    assert (buffer[..., 16] == 7).all()


class Recorder:
    """Counts the launches of a kernel, and lets them through."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.programs = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.programs.append(grid[0])
        return self.kernel[grid]


NEEDS = {
    # needs: programs of (query kernel, key kernel, one pass), allocations
    "everything": ((1, 1, 1, 1, 1, 1), (8, 8, 0), 7),
    "prompts only": ((0, 0, 0, 1, 1, 1), (4, 4, 0), 3),
    "query": ((1, 0, 0, 0, 0, 0), (6, 0, 0), 1),
    "prompt_query": ((0, 0, 0, 1, 0, 0), (4, 0, 0), 1),
    "key": ((0, 1, 0, 0, 0, 0), (0, 6, 0), 1),
    "prompt_value": ((0, 0, 0, 0, 0, 1), (0, 4, 0), 1),
    "tokens": ((1, 1, 1, 0, 0, 0), (6, 6, 0), 3),
    "query, prompt_key": ((1, 0, 0, 0, 1, 0), (6, 4, 0), 2),
    "nothing": ((0, 0, 0, 0, 0, 0), (0, 0, 0), 0),
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_is_not_needed_is_neither_computed_nor_allocated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 heads, 21 prompts = 2 tiles, 37 tokens = 3 tiles, together 4 tiles.
    case = AttentionCase(1, 2, 37, 21, 16)
    inputs = case.make(torch.float32, DEVICE)
    full = backward(case, inputs, tiles=SMALL_BACKWARD)
    recorders = [Recorder(getattr(triton_backward, f"_{each}_kernel")) for each in ("query", "key", "one_pass")]
    for each, recorder in zip(("query", "key", "one_pass"), recorders, strict=True):
        monkeypatch.setattr(triton_backward, f"_{each}_kernel", recorder)
    plan.forget()
    pattern, programs, allocations = NEEDS[name]
    needs = tuple(map(bool, pattern))
    output, prompt_output, lse = forward(case, inputs)
    random = torch.Generator(DEVICE).manual_seed(3)
    grads = [torch.randn(each.shape, generator=random, device=DEVICE) for each in (output, prompt_output)]
    with poisoned_empty() as poison:
        found = prompt_attention_backward(
            *grads,
            *inputs.values(),
            None,
            output,
            prompt_output,
            lse,
            **flags(case),
            needs=needs,
            tiles=SMALL_BACKWARD,
        )
    assert tuple(sum(each.programs) for each in recorders) == programs
    assert poison.allocations == allocations
    for needed, got, want in zip(needs, found, full, strict=True):
        assert (got is not None) == needed
        if got is not None:
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_short_sequences_take_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(triton_backward._one_pass_kernel)
    monkeypatch.setattr(triton_backward, "_one_pass_kernel", recorder)
    case = AttentionCase(2, 3, 77, 16, 64, causal=True)
    backward(case, case.make(torch.float16, DEVICE))
    assert recorder.programs == [6]
    backward(case, case.make(torch.float16, DEVICE), (False, False, False, True, True, True))
    assert recorder.programs == [6]


def test_a_samples_bits_do_not_depend_on_its_batch() -> None:
    case = AttentionCase(3, 2, 37, 5, 16, causal=True, lengths=(37, 0, 20))
    inputs = case.make(torch.float32, DEVICE)
    together = [*forward(case, inputs), *backward_with_ones(case, inputs)]
    for sample in range(3):
        alone = dataclasses.replace(case, batch=1, lengths=case.lengths[sample : sample + 1])  # pyright: ignore
        own = {name: each[sample : sample + 1] for name, each in inputs.items()}  # pyright: ignore
        results = [*forward(alone, own), *backward_with_ones(alone, own)]
        for one, other in zip(results, together, strict=True):
            assert_bits_equal(one[0], other[sample])


def backward_with_ones(case: AttentionCase, inputs: dict[str, Tensor | None]) -> tuple[Any, ...]:
    output, prompt_output, lse = forward(case, inputs)
    ones = [torch.ones_like(each) for each in (output, prompt_output)]
    lengths = case.options(DEVICE)["lengths"]
    return prompt_attention_backward(
        *ones, *inputs.values(), lengths, output, prompt_output, lse, **flags(case), needs=ALL
    )


def test_offsets_of_64_bits_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = AttentionCase(2, 2, 20, 5, 24, layout="packed")
    inputs = case.make(torch.float32, DEVICE)
    before = (*forward(case, inputs), *backward(case, inputs))
    monkeypatch.setattr(triton_rows, "INT32_EXTENT", 1)
    assert triton_rows.layout_of((inputs["query"],), 4).wide
    assert_bits_equal((*forward(case, inputs), *backward(case, inputs)), before)


def check_rows_that_start_anywhere(dtype: torch.dtype) -> None:
    case = AttentionCase(2, 2, 20, 5, 16)
    inputs = case.make(dtype, DEVICE)
    shifted = {}
    for name, each in inputs.items():
        assert each is not None
        buffer = torch.full((*each.shape[:2], each.shape[2], 19), math.nan, dtype=each.dtype, device=DEVICE)
        shifted[name] = buffer[..., 1:17]
        shifted[name].copy_(each)
    assert triton_rows.layout_of(tuple(inputs.values()), 2).align == 8
    assert triton_rows.layout_of(tuple(shifted.values()), 2).align == 1
    assert_bits_equal(
        (*forward(case, inputs), *backward(case, inputs)), (*forward(case, shifted), *backward(case, shifted))
    )


def test_rows_that_start_anywhere_give_the_same_bits() -> None:
    check_rows_that_start_anywhere(torch.float16)


def test_a_gradient_of_any_strides() -> None:
    case = AttentionCase(2, 2, 9, 3, 16)
    inputs = case.make(torch.float32, DEVICE)
    output, prompt_output, lse = forward(case, inputs)
    results = []
    for one in (torch.ones(1, device=DEVICE), None):
        grads = [torch.ones_like(each) if one is None else one.expand(each.shape) for each in (output, prompt_output)]
        results.append(
            prompt_attention_backward(
                *grads, *inputs.values(), None, output, prompt_output, lse, **flags(case), needs=ALL
            )
        )
    assert_bits_equal(*results)


def test_tensor_cores_for_float32_only_where_torch_allows_tf32() -> None:
    split = "bf16x6" if DEVICE == "cuda" else "tf32x3"
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, want in (("tf32", split), ("ieee", "ieee"), ("none", "ieee")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert plan.precision(torch.float32) == want
            assert plan.precision(torch.float16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shared", [65_536, 101_376, 166_912, 232_448])
@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("split", [None, "hopper", "portable"])
def test_the_tables_answer_for_every_size(split: Any, width: int, shared: int, itemsize: int) -> None:
    classes = {tiles.size_class(count) for count in range(1, 9000)}
    for rows in classes:
        for keys in classes:
            for masked in (False, True):
                one = tiles.forward_tile(width, itemsize, rows, keys, masked, shared, split)
                both = tiles.backward_tiles(width, itemsize, rows, keys, masked, shared, split)
                for tile in (one, both.query, both.key, both.one_pass):
                    if tile is not None:
                        assert {tile.rows, tile.keys, tile.tail_keys} <= {16, 32, 64, 128}
                        assert tile.tail_keys <= tile.keys
                        assert tile.split or tile.tail_keys == tile.keys
                assert not one.single or keys <= one.keys
                assert both.one_pass is None or rows <= both.one_pass.rows


GPU_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [*ATTENTION_PRODUCTION, *(with_batch(each, 4) for each in ATTENTION_MEASURED)], ids=str
)
def test_production_shapes_on_the_gpu(case: AttentionCase, dtype: torch.dtype) -> None:
    for variant in (
        case,
        dataclasses.replace(case, layout="packed", prompt_mask="prefix"),
        dataclasses.replace(
            case, layout="tokens", shared=True, lengths=tuple(case.tokens - 3 * each for each in range(case.batch))
        ),
        dataclasses.replace(case, layout="tokens", prefix_tuning=True),
    ):
        check(variant, dtype)
        check(variant, dtype, in_one_graph)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 48, 72, 80, 96, 128, 160, 256])
def test_head_dims_on_the_gpu(head_dim: int, dtype: torch.dtype) -> None:
    for prompts, tokens, causal in ((16, 77, True), (8, 257, False), (0, 130, False), (256, 300, True)):
        case = AttentionCase(2, 2, tokens, prompts, head_dim, causal=causal, layout="tokens")
        check(case, dtype)
        check(case, dtype, in_one_graph)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [48, 72, 80, 96])
def test_masks_of_odd_head_dims_on_the_gpu(head_dim: int, dtype: torch.dtype) -> None:
    """Those that :func:`test_head_dims_on_the_gpu` leaves out; each is compiled for itself."""
    for case in (
        AttentionCase(3, 2, 77, 16, head_dim, "prefix", True, (77, 0, 30), layout="packed"),
        AttentionCase(3, 2, 197, 8, head_dim, "prefix", lengths=(197, 1, 64), shared=True, layout="tokens"),
        AttentionCase(2, 2, 50, 32, head_dim, prefix_tuning=True, shared=True, scale=-0.2),
    ):
        check(case, dtype, in_one_graph)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences_on_the_gpu(causal: bool, dtype: torch.dtype) -> None:
    case = AttentionCase(1, 1, 8192, 256, 64, causal=causal, lengths=(8000,))
    check(case, dtype)
    check(case, dtype, in_one_graph)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION_MEASURED[:4], ids=lambda case: case.name)
def test_bits_on_the_gpu(case: AttentionCase, dtype: torch.dtype) -> None:
    """Two runs agree, and so do a sample alone and in its batch."""
    case = with_batch(case, 8)
    inputs = case.make(dtype, DEVICE)
    first = (*forward(case, inputs), *backward_with_ones(case, inputs))
    assert_bits_equal((*forward(case, inputs), *backward_with_ones(case, inputs)), first)
    own = {name: each[5:6] for name, each in inputs.items()}  # pyright: ignore[reportOptionalSubscript]
    alone = with_batch(case, 1)
    for one, other in zip((*forward(alone, own), *backward_with_ones(alone, own)), first, strict=True):
        assert_bits_equal(one[0], other[5])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_that_start_anywhere_give_the_same_bits_on_the_gpu(dtype: torch.dtype) -> None:
    check_rows_that_start_anywhere(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("far", ["rows", "samples"])
def test_extents_past_32_bits_on_the_gpu(far: str) -> None:
    case = AttentionCase(2, 1, 65, 3, 64)
    inputs = case.make(torch.bfloat16, DEVICE)
    want = (*forward(case, inputs), *backward_with_ones(case, inputs))
    memory = torch.empty(2**31 + 2**24, dtype=torch.bfloat16, device=DEVICE)
    strides = (2**23, 64, 2**25, 1) if far == "rows" else (2**31, 64, 64, 1)
    distant = torch.as_strided(memory, (2, 1, 65, 64), strides)
    assert inputs["key"] is not None
    distant.copy_(inputs["key"])
    inputs["key"] = distant
    assert triton_rows.layout_of((distant,), distant.element_size()).wide == (far == "rows")
    assert_bits_equal((*forward(case, inputs), *backward_with_ones(case, inputs)), want)


@pytest.mark.gpu
def test_no_size_compiles_again() -> None:
    used = [triton_forward._forward_kernel, triton_backward._query_kernel, triton_backward._key_kernel]

    def compiled() -> int:
        return sum(len(caches[0]) for kernel in used for caches in kernel.device_caches.values())

    def call(batch: int, tokens: int, prompts: int) -> None:
        case = AttentionCase(batch, 2, tokens, prompts, 64, layout="tokens")
        backward(case, case.make(torch.bfloat16, DEVICE))

    call(2, 257, 16)
    before = compiled()
    for index in range(20):
        call(1 + index % 5, 200 + 7 * index, 1 + index)
    assert compiled() == before
