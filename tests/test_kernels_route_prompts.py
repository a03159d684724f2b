"""The prompts of a routed layer and their norm: the specification, the kernel (in the interpreter without a GPU) and
the operation."""

# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportMissingImports=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import layer_norm

pytest.importorskip("triton")

from epic_fast.engine.state import TowerState
from epic_fast.errors import ConfigError, ImplementationError
from epic_fast.kernels.common import plan
from epic_fast.kernels.route_prompts import reference, triton_forward, triton_through
from epic_fast.models.mope import mean_row
from epic_fast.nn import ExpertRouter, PromptExperts
from epic_fast.ops import route_prompts as operation
from epic_fast.ops.route_prompts import probe_through, route_prompts
from epic_fast.testing.cases import ROUTE_PRODUCTION, RouteCase
from epic_fast.testing.numerics import OUTPUT_FACTOR, assert_bits_equal, budget, poisoned_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = RouteCase(5, 4, 2, 40, 7, 3)
# Of the three kinds of rows, those that there are.
KINDS = [each for each in itertools.product([True, False], [True, False], [0, 1, 2]) if any(each)]


@pytest.fixture(autouse=True)
def nothing_is_left_unwritten() -> Iterator[None]:
    with poisoned_empty():
        yield


def call(
    given: dict[str, Any], case: RouteCase, dtype: torch.dtype, impl: str = "triton"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(out, normed, scores)``."""
    batch = next((len(each) for each in (given["projected"], given["mapped"]) if each is not None), case.batch)
    out, normed = replace(case, batch=batch).targets(dtype, DEVICE)
    return out, normed, route_prompts(out, normed, **given, **case.options(), impl=impl)


def double(given: dict[str, Any]) -> dict[str, Any]:
    return {name: each.double() if isinstance(each, Tensor) else each for name, each in given.items()}


def check(case: RouteCase, dtype: torch.dtype, given: dict[str, Any] | None = None) -> None:
    given = case.make(dtype, DEVICE) if given is None else given
    got, theirs = (call(given, case, dtype, impl) for impl in ("triton", "reference"))
    want = call(double(given), case, torch.float64, "reference")
    # The softmax multiplies the error of a logit, a sum over the query and over the rows, by 1 / temperature.
    reduction = max(1, case.tokens + case.old_prompts) + case.own + case.other
    rstd = want[0].var(dim=-1, correction=0).add(given["eps"]).rsqrt().max().item()
    operands = {"out": 4.0, "normed": 4.0 * max(rstd, 1.0), "scores": 1.0}
    for name, one, exact, plain in zip(case.outputs, got, want, theirs, strict=True):
        assert (one is None) == (exact is None)
        if one is None:
            continue
        settings = {"reduction": max(reduction, case.width), "operands": operands[name]}
        kind = torch.float32 if name == "scores" else dtype
        budget(one, exact, plain, factor=OUTPUT_FACTOR, dtype=kind, name=f"{name} of {case}", **settings)


def definition(given: dict[str, Any], temperature: float, top_k: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """With every kind of row and a whole router, sample by sample."""
    outs, scores = [], []
    for sample in range(len(given["projected"])):
        rows = torch.cat([given["token_dots"][sample], given["prompt_dots"][sample]])
        own = sum(rows[index] for index in range(len(rows))) / given["count"] + given["router_bias"]
        logits = (torch.cat([own, given["projected"][sample]])[:, None] * given["embeddings"]).sum(0)
        best = sorted(range(len(logits)), key=lambda each: (-logits[each].item(), each))[:top_k]
        weights = [math.exp(logits[each] / temperature) if each in best else 0.0 for each in range(len(logits))]
        found = torch.tensor([each / sum(weights) for each in weights], dtype=torch.float64)
        mixed = sum(weight * each for weight, each in zip(found, given["experts"], strict=True))
        outs.append(torch.cat([given["static"], mixed, given["mapped"][sample]]))
        scores.append(found)
    out = torch.stack(outs)
    centered = out - out.mean(-1, keepdim=True)
    rstd = (centered.square().mean(-1, keepdim=True) + given["eps"]) ** -0.5
    return out, centered * rstd * given["norm_weight"] + given["norm_bias"], torch.stack(scores)


@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_the_specification_is_the_definition(top_k: int | None) -> None:
    case = replace(SMALL, top_k=top_k, temperature=0.3)
    given = double(case.make())
    found = (*case.targets(torch.float64),)
    found = (*found, reference.route_prompts(*found, **given, **case.options()))
    for one, other in zip(found, definition(given, case.temperature, top_k), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [0, 2])
@pytest.mark.parametrize(("static", "dynamic", "mapped"), KINDS)
@pytest.mark.parametrize("routes", [True, False])
def test_the_specification_is_what_the_modules_do(
    size: int, static: bool, dynamic: bool, mapped: int, routes: bool
) -> None:
    batch, tokens, old, width, experts = 3, 9, 4, 12, 5
    torch.manual_seed(0)
    router = ExpertRouter([width, width], 6, num_experts=experts, size=size, other_size=3).double().eval()
    prompts = PromptExperts(width, length=2, num_experts=experts, static=static, dynamic=dynamic).double()
    hidden, before, other = (torch.randn(batch, rows, width).double() for rows in (tokens, old, 1))
    rows = torch.randn(batch, mapped, width).double() if mapped else None
    weight, bias = torch.randn(2, width).double()
    with torch.no_grad():
        projected = router.project(other[:, 0, :6])
        logits = router(1, mean_row(TowerState(hidden), before), projected) if routes else None
        wanted, scores = prompts(batch, logits, rows, temperature=0.2, top_k=2 if routes else None)
        projection = None if router.own is None else router.own[1]
        token_dots, prompt_dots = (
            None if projection is None or not routes else each @ projection.weight.T for each in (hidden, before)
        )
        out, normed = torch.full((2, *wanted.shape), math.nan).double()
        found = reference.route_prompts(
            out, normed, weight, bias, 1e-5, token_dots, prompt_dots, tokens + old,
            None if projection is None or not routes else projection.bias,
            projected[:, 1] if routes else None, router.embeddings[1] if routes else None,
            prompts.static, prompts.experts, rows, temperature=0.2, top_k=2 if routes else None,
        )  # fmt: skip
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(normed, layer_norm(wanted, (width,), weight, bias, 1e-5), rtol=1e-12, atol=1e-12)
    assert (found is None) == (not routes)
    if scores is not None:
        torch.testing.assert_close(found, scores, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("static", "dynamic", "mapped"), KINDS)
def test_every_combination_of_rows(static: bool, dynamic: bool, mapped: int, dtype: torch.dtype) -> None:
    for own, other in ((2, 8), (0, 8), (0, 0)):
        check(replace(SMALL, static=static, dynamic=dynamic, mapped=mapped, own=own, other=other), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 96, 100, 128])
@pytest.mark.parametrize(("experts", "top_k"), [(1, None), (3, None), (3, 2), (4, 1), (16, None), (16, 5), (64, 9)])
def test_experts_and_widths(experts: int, top_k: int | None, width: int, dtype: torch.dtype) -> None:
    check(RouteCase(3, experts, 2, width, 5, 2, top_k=top_k, temperature=0.4), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 49, 197, 1024, 1500, 2500])
@pytest.mark.parametrize("old_prompts", [0, 13])
def test_numbers_of_rows(tokens: int, old_prompts: int, dtype: torch.dtype) -> None:
    check(RouteCase(3, 4, 1, 16, tokens, old_prompts), dtype)


@pytest.mark.parametrize(("own", "other"), [(1, 1), (3, 5), (11, 19), (9, 8), (2, 33)])
def test_sizes_of_a_query(own: int, other: int) -> None:
    check(RouteCase(5, 5, 1, 16, 300, 2, own=own, other=other), torch.float32)
    check(RouteCase(2, 5, 1, 16, 1100, 2, own=own, other=other), torch.float32)


@pytest.mark.parametrize("width", [2048, 4096, 8192])
def test_wide_rows(width: int) -> None:
    check(RouteCase(5, 4, 1, width, 3, 1), torch.float32)


def test_the_mean_is_over_so_many_rows_as_are_said() -> None:
    """Tokens that were summed before count as the rows that they are."""
    case = replace(SMALL, tokens=12)
    given = case.make(device=DEVICE)
    wanted = call(given, case, torch.float32)
    summed = {**given, "token_dots": given["token_dots"].unflatten(1, (3, 4)).sum(dim=2)}
    torch.testing.assert_close(call(summed, case, torch.float32), wanted)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(call({**summed, "count": 6}, case, torch.float32), wanted)


@pytest.mark.parametrize("left_out", ["token_dots", "prompt_dots", "router_bias"])
def test_parts_of_a_query_may_be_left_out(left_out: str) -> None:
    given = {**SMALL.make(device=DEVICE), left_out: None}
    check(SMALL, torch.float32, given)
    whole = call(SMALL.make(device=DEVICE), SMALL, torch.float32)
    assert not torch.allclose(call(given, SMALL, torch.float32)[2], whole[2])


def test_types_may_differ() -> None:
    given = SMALL.make(torch.float32, DEVICE)
    given["experts"], given["mapped"] = given["experts"].bfloat16(), given["mapped"].half()
    given["norm_bias"] = given["norm_bias"].half()
    check(SMALL, torch.float16, given)
    out, normed = SMALL.targets(torch.float16, DEVICE)
    normed = normed.float()
    route_prompts(out, normed, **given, **SMALL.options(), impl="triton")
    want = layer_norm(out.float(), (SMALL.width,), given["norm_weight"], given["norm_bias"].float(), 1e-5)
    # The norm is of the rows as they were stored.
    torch.testing.assert_close(normed, want, rtol=2e-6, atol=2e-6)


def test_equal_logits_take_the_first_experts() -> None:
    case = RouteCase(3, 5, 2, 16, own=0, other=1, top_k=2)
    given = case.make(device=DEVICE)
    given["projected"] = torch.tensor([[1.0], [0.0], [-1.0]], device=DEVICE)
    given["embeddings"] = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]], device=DEVICE)
    wanted = torch.tensor([[0, 0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0, 0], [0, 0, 0, 0, 1.0]], device=DEVICE)
    for impl in ("triton", "reference"):
        scores = call(given, case, torch.float32, impl)[2]
        torch.testing.assert_close(scores, wanted, rtol=0, atol=5e-5)
        assert torch.equal(
            scores == 0, torch.tensor([[1, 0, 0, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]]).to(DEVICE) > 0
        )


def test_all_experts_among_the_best_is_the_dense_mixture() -> None:
    given = SMALL.make(device=DEVICE)
    assert_bits_equal(call(given, replace(SMALL, top_k=4), torch.float32), call(given, SMALL, torch.float32))


@pytest.mark.parametrize("size", [1e30, torch.finfo(torch.float32).max])
def test_huge_logits_have_finite_scores(size: float) -> None:
    case = RouteCase(3, 4, 1, 16, own=0, other=1)
    given = case.make(device=DEVICE)
    given["projected"] = torch.tensor([[size], [-size], [0.0]], device=DEVICE)
    given["embeddings"] = torch.tensor([[1.0, 0.5, 0.25, 0.0]], device=DEVICE)
    out, normed, scores = call(given, case, torch.float32)
    wanted = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0], [0.25] * 4], device=DEVICE)
    assert torch.equal(scores, wanted)
    assert out.isfinite().all()
    assert normed.isfinite().all()


SAMPLES = ("token_dots", "prompt_dots", "projected", "mapped")


@pytest.mark.parametrize("tokens", [49, 1500])
@pytest.mark.parametrize("top_k", [None, 2])
def test_bits_do_not_depend_on_the_batch_nor_on_the_run(top_k: int | None, tokens: int) -> None:
    case = RouteCase(7, 4, 2, 100, tokens, 13, top_k=top_k)
    given = case.make(torch.float16, DEVICE)
    whole = call(given, case, torch.float16)
    assert_bits_equal(call(given, case, torch.float16), whole)
    for sample in (0, 5, 6):
        alone = {name: each[sample : sample + 1] if name in SAMPLES else each for name, each in given.items()}
        found = call(alone, case, torch.float16)
        assert_bits_equal(found, tuple(each[sample : sample + 1] for each in whole))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("top_k", [None, 2])
def test_nan_stays_in_its_sample(name: str, top_k: int | None) -> None:
    case = replace(SMALL, batch=6, top_k=top_k)
    given = case.make(device=DEVICE)
    whole = call(given, case, torch.float32)
    torn = {**given, name: given[name].clone()}
    torn[name][1].flatten()[-1] = math.nan
    found, theirs = (call(torn, case, torch.float32, impl) for impl in ("triton", "reference"))
    others = [0, 2, 3, 4, 5]
    for one, wanted, plain in zip(found, whole, theirs, strict=True):
        assert_bits_equal(one[others], wanted[others])
        assert torch.equal(one[1].isnan(), plain[1].isnan())
    rows = slice(4, 5) if name == "mapped" else slice(2, 4)
    assert found[1][1, rows].isnan().all()
    assert found[1][1, :2].isfinite().all()


def test_tensors_may_be_slices() -> None:
    case = RouteCase(5, 3, 2, 40, 7, 3, mapped=2)
    given = case.make(device=DEVICE)
    wanted = call(given, case, torch.float32)
    joined = torch.cat([given["prompt_dots"], given["token_dots"]], dim=1)
    layers = torch.full((5, 3, 8), math.nan, device=DEVICE)
    layers[:, 1] = given["projected"]
    stacked = torch.full((3, 10, 3), math.nan, device=DEVICE)
    stacked[1] = given["embeddings"]
    turned = given["mapped"].transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.full((5, 3, 49), math.nan, device=DEVICE)
    wide[:, 1:, 3:43] = given["mapped"]
    sliced = {"prompt_dots": joined[:, :3], "token_dots": joined[:, 3:], "projected": layers[:, 1]}
    columns = given["experts"].transpose(1, 2).contiguous().transpose(1, 2)
    for mapped in (turned, wide[:, 1:, 3:43], given["mapped"].transpose(1, 2).contiguous().transpose(1, 2)):
        found = call(
            {**given, **sliced, "embeddings": stacked[1], "experts": columns, "mapped": mapped}, case, torch.float32
        )
        assert_bits_equal(found, wanted)
    # The same prompts for all samples.
    shared = given["mapped"][:1].expand(5, -1, -1)
    found = call({**given, "mapped": shared}, case, torch.float32)
    assert_bits_equal(found, call({**given, "mapped": shared.contiguous()}, case, torch.float32))


def test_no_samples() -> None:
    case = replace(SMALL, batch=0)
    out, normed, scores = call(case.make(device=DEVICE), case, torch.float32)
    assert out.shape == normed.shape == (0, 5, 40)
    assert scores.shape == (0, 4)


class Recorder:
    """Counts the launches of a kernel, and lets them through."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.parametrize(("tokens", "launches"), [(7, (1, 0)), (1024, (1, 0)), (1025, (1, 1))])
@pytest.mark.parametrize("routes", [True, False])
def test_what_is_launched_and_allocated(
    tokens: int, launches: tuple[int, int], routes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorders = [Recorder(getattr(triton_forward, name)) for name in ("_forward_kernel", "_part_kernel")]
    for name, recorder in zip(("_forward_kernel", "_part_kernel"), recorders, strict=True):
        monkeypatch.setattr(triton_forward, name, recorder)
    plan.forget()
    case = replace(SMALL, batch=2, tokens=tokens, other=8 if routes else 0)
    given = case.make(device=DEVICE)
    for _ in range(2):
        with poisoned_empty() as poison:
            call(given, case, torch.float32)
        assert poison.allocations == (launches[1] + 1 if routes else 0)
    wanted = [2 * each for each in launches] if routes else [2, 0]
    assert [each.launches for each in recorders] == wanted


@pytest.mark.parametrize(
    "case",
    [SMALL, replace(SMALL, top_k=2), replace(SMALL, own=0), replace(SMALL, other=0), replace(SMALL, tokens=1100)],
    ids=["whole", "top 2", "the other alone", "no router", "many tokens"],
)
def test_the_operator_is_what_it_says(case: RouteCase) -> None:
    targets = [each.zero_() for each in case.targets(torch.float16, DEVICE)]
    given = case.make(torch.float16, DEVICE)
    torch.library.opcheck(operation.FORWARD, (*targets, *given.values(), case.temperature, case.top_k))


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
@pytest.mark.parametrize("routes", [True, False])
def test_compiled_whole_without_another_compilation(impl: str, routes: bool) -> None:
    case = replace(SMALL, other=8 if routes else 0)

    def step(out: Tensor, normed: Tensor, given: dict[str, Any]) -> Any:
        scores = route_prompts(out, normed, **given, **case.options(), impl=impl)
        return out + 1, normed * 2, scores

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for batch, tokens in ((3, 7), (5, 9), (6, 11)):
        sized = replace(case, batch=batch, tokens=tokens)
        given = sized.make(device=DEVICE)
        mine, theirs = sized.targets(torch.float32, DEVICE), sized.targets(torch.float32, DEVICE)
        assert_bits_equal(compiled(*mine, given), step(*theirs, given))
        assert_bits_equal(mine, theirs)
    assert counter.frame_count <= 2


def test_which_implementation_is_taken() -> None:
    given = SMALL.make(device=DEVICE)
    if DEVICE == "cpu":
        found, wanted = (call(given, SMALL, torch.float32, impl) for impl in ("auto", "reference"))
        assert_bits_equal(found, wanted)
    with pytest.raises(ImplementationError, match=r"float64; the kernel takes"):
        call(double(given), SMALL, torch.float64)
    assert call(double(given), SMALL, torch.float64, "auto")[2].dtype == torch.float64
    for case in (RouteCase(2, 65, 1, 8, 2, 2), RouteCase(2, 65, 1, 8, other=0)):
        with pytest.raises(ImplementationError, match="there are 65 experts; the kernel takes up to 64"):
            call(case.make(device=DEVICE), case, torch.float32)
        assert call(case.make(device=DEVICE), case, torch.float32, "auto")[0].isfinite().all()
    wide = RouteCase(1, 1, 1, 8193, 1, 1)
    with pytest.raises(ImplementationError, match="rows are 8193 wide; the kernel takes up to 8192"):
        call(wide.make(device=DEVICE), wide, torch.float32)


def test_a_gradient_is_not_lost_in_silence() -> None:
    given = SMALL.make(device=DEVICE)
    given["experts"].requires_grad_()
    with pytest.raises(ConfigError, match="experts requires a gradient, and this has no backward; wanted no gradient"):
        call(given, SMALL, torch.float32)
    with torch.no_grad():
        assert call(given, SMALL, torch.float32)[0].isfinite().all()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"norm_weight": (39,)}, {}, r"norm_weight has shape \(39,\); wanted \(40,\)"),
        ({"norm_bias": (1, 40)}, {}, r"norm_bias has shape \(1, 40\); wanted \(40,\)"),
        ({"static": (2, 41)}, {}, r"static has shape \(2, 41\); wanted \(prompts, 40\)"),
        ({"static": (3, 40)}, {}, r"out has shape \(5, 5, 40\); wanted \(5, 6, 40\), .*3 static, 2 mixed and 1 mapped"),
        ({"experts": (4, 40)}, {}, r"experts has shape \(4, 40\); wanted \(experts, prompts, 40\)"),
        ({"experts": (3, 2, 40)}, {}, r"embeddings has shape \(10, 4\); wanted \(10, 3\), as there are experts"),
        ({"mapped": (4, 1, 40)}, {}, r"mapped has shape \(4, 1, 40\); wanted \(5, prompts, 40\)"),
        ({"token_dots": (4, 7, 2)}, {}, r"token_dots has shape \(4, 7, 2\); wanted \(5, rows, 2\)"),
        ({"prompt_dots": (5, 3, 3)}, {}, r"prompt_dots has shape \(5, 3, 3\); wanted \(5, rows, 2\)"),
        ({"router_bias": (3,)}, {}, r"router_bias has shape \(3,\); wanted \(2,\)"),
        ({"token_dots": None, "prompt_dots": None}, {}, "router_bias without token_dots or prompt_dots"),
        ({"projected": (4, 8)}, {}, r"projected has shape \(4, 8\); wanted \(5, numbers of the query\)"),
        ({"projected": (5, 7)}, {}, r"embeddings has shape \(10, 4\); wanted \(9, experts\)"),
        ({"projected": None}, {}, "token_dots, prompt_dots, router_bias, embeddings without the rest of a router"),
        ({"count": 0}, {}, "count=0; wanted at least one row"),
        ({}, {"temperature": 0.0}, r"temperature=0.0; wanted a finite number greater than 0"),
        ({}, {"top_k": 5}, "top_k=5; wanted an integer of 1 to 4 experts, or None for all"),
    ],
)
def test_what_does_not_fit_is_said(changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    given = SMALL.make(device=DEVICE)
    for name, each in changes.items():
        given[name] = torch.zeros(each, device=DEVICE) if isinstance(each, tuple) else each
    with pytest.raises(ConfigError, match=f"^route_prompts: {message}"):
        route_prompts(*SMALL.targets(torch.float32, DEVICE), **given, **{**SMALL.options(), **options})


def test_what_does_not_fit_of_the_targets_is_said() -> None:
    given, options = SMALL.make(device=DEVICE), SMALL.options()
    out, normed = SMALL.targets(torch.float32, DEVICE)
    for targets, message in (
        ((out[0], normed), r"out has shape \(5, 40\); wanted \(batch, prompts, width\)"),
        ((out, normed[:, :4]), r"normed has shape \(5, 4, 40\); wanted \(5, 5, 40\), as out has"),
        ((out.mT.contiguous().mT, normed), r"out has strides .*; wanted a contiguous tensor"),
        ((out.int(), normed), r"out has type torch.int32; wanted a floating-point type"),
    ):
        with pytest.raises(ConfigError, match=message):
            route_prompts(*targets, **given, **options)
    bare = {**given, **dict.fromkeys(("token_dots", "prompt_dots", "router_bias", "projected", "embeddings"))}
    with pytest.raises(ConfigError, match="top_k=2 without a router; wanted None"):
        route_prompts(out, normed, **bare, temperature=0.1, top_k=2)
    rowless = {**bare, "static": None, "experts": None, "mapped": None}
    with pytest.raises(ConfigError, match="at least one row: 0 static, 0 mixed and 0 mapped"):
        route_prompts(out[:, :0], normed[:, :0], **rowless, temperature=0.1)


def test_tiles_hold_whole_rows() -> None:
    for width in (1, 16, 100, 512, 1024, 2048, 4096, 5000, operation.MAX_WIDTH):
        tile = triton_forward.route_tile(width)
        assert tile.block >= width
        assert tile.warps == max(1, tile.block // 512)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ROUTE_PRODUCTION, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_production_shapes_are_within_the_budget(dtype: torch.dtype, case: RouteCase) -> None:
    check(case, dtype)


@pytest.mark.gpu
def test_a_cuda_graph_replays_it() -> None:
    case = ROUTE_PRODUCTION[0]
    given, options = case.make(torch.bfloat16, "cuda"), case.options()
    wanted = call(given, case, torch.bfloat16)
    out, normed = case.targets(torch.bfloat16, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        route_prompts(out, normed, **given, **options, impl="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = route_prompts(out, normed, **given, **options, impl="triton")
    for each in (out, normed, scores):
        each.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_bits_equal((out, normed, scores), wanted)


# -- a router's rows through the product before them -----------------------------------------------------------------


def matrices(
    count: int, rows: int, width: int, depth: int, *types: torch.dtype, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Probes and weights, in one type or in two."""
    random = torch.Generator().manual_seed(seed)
    sizes = (rows, width), (width, depth)
    probes, weights = (
        [torch.randn(size, generator=random).to(DEVICE, dtype) for _ in range(count)]
        for size, dtype in zip(sizes, (types[0], types[-1]), strict=True)
    )
    return probes, weights


def check_through(probes: list[Tensor], weights: list[Tensor]) -> Tensor:
    got, theirs = (probe_through(probes, weights, impl=impl) for impl in ("triton", "reference"))
    want = torch.stack([one.double() @ other.double() for one, other in zip(probes, weights, strict=True)])
    width = weights[0].shape[0]
    operands = max([1.0, *(each.abs().max().item() for each in (*probes, *weights) if each.numel())]) ** 2
    settings: dict[str, Any] = {"factor": OUTPUT_FACTOR, "dtype": torch.float32, "reduction": width}
    budget(got, want, theirs, name="through", operands=operands, **settings)
    # Of each number: the sum's own terms.
    sizes = torch.stack([one.double().abs() @ other.double().abs() for one, other in zip(probes, weights, strict=True)])
    for each in (got, theirs):
        assert each.shape == want.shape
        assert each.dtype == torch.float32
        assert ((each - want).abs() <= 2 * width**0.5 * 2**-24 * sizes).all()
    return got


@pytest.mark.parametrize("count", [1, 9])
def test_the_specification_of_products_through_weights_is_the_definition(count: int) -> None:
    probes, weights = matrices(count, 3, 7, 5, torch.float64)
    found = reference.probe_through(probes, weights)
    assert found.dtype == torch.float64
    for number, (probe, weight) in enumerate(zip(probes, weights, strict=True)):
        for row in range(3):
            wanted = sum(probe[row, inner] * weight[inner] for inner in range(7))
            torch.testing.assert_close(found[number, row], wanted, rtol=1e-12, atol=1e-12)
        # What it is for: products with rows that the weight makes.
        rows = torch.randn(4, 5, dtype=torch.float64, device=DEVICE)
        torch.testing.assert_close(rows @ found[number].T, rows @ weight.T @ probe.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("types", [(torch.float32,), (torch.float16,), (torch.float32, torch.float16)], ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "depth"), [(2, 48, 96), (1, 1, 1), (3, 130, 67), (16, 300, 129), (5, 128, 64)]
)
@pytest.mark.parametrize("count", [1, 8, 9, 17])
def test_products_through_weights(
    count: int, rows: int, width: int, depth: int, types: tuple[torch.dtype, ...]
) -> None:
    if count > 1 and rows == 16:
        count = 2
    check_through(*matrices(count, rows, width, depth, *types))


def test_products_through_weights_in_bfloat16() -> None:
    """The interpreter is wrong in other places of this type; a number is read, and made wider, as it is."""
    check_through(*matrices(3, 2, 40, 30, torch.bfloat16))
    check_through(*matrices(3, 2, 40, 30, torch.float32, torch.bfloat16))


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("count", [8, 9, 17])
def test_each_product_through_a_weight_is_that_of_its_own_pair(count: int, impl: str) -> None:
    """Of constants that no other pair has, in whatever order they are given."""
    probes = [torch.full((2, 4), float(number + 1), device=DEVICE) for number in range(count)]
    for each in probes:
        each[1] *= -1
    weights = [torch.full((4, 3), float(2**number), device=DEVICE) for number in range(count)]
    for order in (list(range(count)), list(reversed(range(count))), [*range(1, count), 0]):
        found = probe_through([probes[each] for each in order], [weights[each] for each in order], impl=impl)
        for place, number in enumerate(order):
            wanted = 4.0 * (number + 1) * 2**number
            assert (found[place, 0] == wanted).all(), place
            assert (found[place, 1] == -wanted).all(), place


def test_bits_through_a_weight_depend_on_no_other() -> None:
    probes, weights = matrices(11, 3, 140, 70, torch.float16)
    wanted = probe_through(probes, weights, impl="triton")
    for number in (0, 7, 8, 10):
        alone = probe_through([probes[number]], [weights[number]], impl="triton")
        assert_bits_equal(alone[0], wanted[number], f"pair {number}")
        few = slice(number, number + 2)
        assert_bits_equal(probe_through(probes[few], weights[few], impl="triton"), wanted[few])
    weights[8] = torch.full_like(weights[8], math.nan)
    found = probe_through(probes, weights, impl="triton")
    assert found[8].isnan().all()
    others = [number for number in range(11) if number != 8]
    assert_bits_equal(found[others], wanted[others])


def test_weights_and_probes_may_lie_anywhere() -> None:
    probes, weights = matrices(9, 3, 40, 70, torch.float32)
    wanted = probe_through(probes, weights, impl="triton")
    turned = [each.T.contiguous().T for each in weights]
    wide = [torch.cat([torch.full((40, 3), math.nan, device=DEVICE), each], dim=1)[:, 3:] for each in weights]
    rows = [torch.cat([each, torch.full((3, 5), math.nan, device=DEVICE)], dim=1)[:, :40] for each in probes]
    # What lies behind them is not read.
    first = [torch.cat([each, torch.full((1, 70), math.nan, device=DEVICE)])[:40] for each in weights]
    odd = []
    for each in weights:
        memory = torch.full((each.numel() + 1,), math.nan, device=DEVICE)
        memory[1:] = each.flatten()
        odd.append(memory[1:].view(40, 70))
    # Some as they are and some not: each has a place of its own among the eight of a launch.
    mixed = [one if number % 3 else other for number, (one, other) in enumerate(zip(weights, turned, strict=True))]
    for others in (turned, wide, first, odd, mixed):
        assert_bits_equal(probe_through(probes, others, impl="triton"), wanted)
    assert_bits_equal(probe_through(rows, weights, impl="triton"), wanted)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_no_rows_or_columns_go_through_a_weight(impl: str) -> None:
    for rows, width, depth in ((0, 5, 4), (2, 5, 0), (0, 0, 0)):
        found = probe_through(*matrices(9, rows, width, depth, torch.float32), impl=impl)
        assert found.shape == (9, rows, depth)
        assert found.dtype == torch.float32
    # A sum of nothing is zero, not what was there.
    assert not probe_through(*matrices(9, 2, 0, 4, torch.float32), impl=impl).any()


@pytest.mark.parametrize(("count", "launches"), [(1, 1), (8, 1), (9, 2), (16, 2), (17, 3)])
def test_eight_matrices_go_through_their_weights_in_a_launch(
    count: int, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(triton_through._through_kernel)
    monkeypatch.setattr(triton_through, "_through_kernel", recorder)
    plan.forget()
    for _ in range(2):
        with poisoned_empty() as poison:
            probe_through(*matrices(count, 2, 20, 24, torch.float32), impl="triton")
        assert poison.allocations == 1
    assert recorder.launches == 2 * launches


@pytest.mark.parametrize("count", [1, 9])
def test_the_operator_of_products_through_weights_is_what_it_says(count: int) -> None:
    for types in ((torch.float32,), (torch.float32, torch.float16)):
        torch.library.opcheck(operation.THROUGH, matrices(count, 3, 20, 24, *types))


def test_which_implementation_goes_through_weights() -> None:
    probes, weights = matrices(2, 3, 20, 24, torch.float32)
    wide = [each.double() for each in weights]
    with pytest.raises(ImplementationError, match=r"probe_through: .*\n.*float64; the kernel takes float32"):
        probe_through(probes, wide, impl="triton")
    with pytest.raises(ImplementationError, match=r"float64; the kernel takes float32"):
        probe_through([each.double() for each in probes], weights, impl="triton")
    assert probe_through(probes, wide).dtype == torch.float64
    if DEVICE == "cpu":
        assert_bits_equal(probe_through(probes, weights), reference.probe_through(probes, weights))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_bits_equal(probe_through(probes, weights, impl="reference"), reference.probe_through(probes, weights))
        found = probe_through(probes, weights, impl="triton")
    assert_bits_equal(found, probe_through(probes, weights, impl="triton"))
    assert probe_through([each.half() for each in probes], weights, impl="reference").dtype == torch.float32


@pytest.mark.skipif(DEVICE != "cpu", reason="is about tensors on a CPU")
def test_tensors_on_a_cpu_go_through_weights_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come in lists: each is looked at."""
    monkeypatch.setattr(operation, "_through_launcher", lambda: pytest.fail("the kernel was asked"))
    probes, weights = [torch.randn(2, 20) for _ in range(3)], [torch.randn(20, 12) for _ in range(3)]
    assert_bits_equal(probe_through(probes, weights), probe_through(probes, weights, impl="reference"))
    monkeypatch.setattr(operation.library, "interpreting", lambda: False)
    with pytest.raises(ImplementationError, match="a tensor is on cpu; the kernel needs a GPU"):
        probe_through(probes, weights, impl="triton")


@pytest.mark.parametrize("which", ["probes[1]", "weights[0]"])
def test_a_gradient_through_weights_is_not_lost_in_silence(which: str) -> None:
    probes, weights = matrices(2, 3, 20, 24, torch.float32)
    (probes if which == "probes[1]" else weights)[int(which[-2])].requires_grad_()
    for impl in ("auto", "triton", "reference"):
        with pytest.raises(ConfigError) as raised:
            probe_through(probes, weights, impl=impl)
        assert str(raised.value) == (
            f"probe_through: {which} requires a gradient, and this has no backward; wanted no gradient "
            "(torch.no_grad())"
        )
        with torch.no_grad():
            assert not probe_through(probes, weights, impl=impl).requires_grad


def test_what_does_not_fit_products_through_weights_is_said() -> None:
    (one, other), (first, second) = matrices(2, 3, 20, 24, torch.float32)

    def refused(probes: list[Tensor], weights: list[Tensor], message: str) -> None:
        for impl in ("auto", "triton", "reference"):
            with pytest.raises(ConfigError) as raised:
                probe_through(probes, weights, impl=impl)
            assert str(raised.value) == f"probe_through: {message}"

    refused([], [], "0 probes and 0 weights; wanted as many, at least one")
    refused([one, other], [first], "2 probes and 1 weights; wanted as many, at least one")
    whole = "wanted a floating-point matrix"
    refused([one[0], other], [first, second], f"probes[0] is (20,) torch.float32; {whole}")
    refused([one, other], [first, second[None]], f"weights[1] is (1, 20, 24) torch.float32; {whole}")
    refused([one, other], [first.int(), second], f"weights[0] is (20, 24) torch.int32; {whole}")
    place = str(one.device)
    alike = f"wanted (3, 20) torch.float32 on {place}, as probes[0] is"
    refused([one, other[:2]], [first, second], f"probes[1] is (2, 20) torch.float32 on {place}; {alike}")
    refused([one, other.half()], [first, second], f"probes[1] is (3, 20) torch.float16 on {place}; {alike}")
    refused([one, other.to("meta")], [first, second], f"probes[1] is (3, 20) torch.float32 on meta; {alike}")
    alike = f"wanted (20, 24) torch.float32 on {place}, as weights[0] is"
    refused([one, other], [first, second[:, 1:]], f"weights[1] is (20, 23) torch.float32 on {place}; {alike}")
    rows = "wanted at most 16 rows of"
    refused(
        [one[:, 1:]] * 2, [first, second],
        f"probes are (3, 19) on {place}; {rows} 20 on {place}, for weights of shape (20, 24)",
    )  # fmt: skip
    refused(
        [one.to("meta")] * 2, [first, second],
        f"probes are (3, 20) on meta; {rows} 20 on {place}, for weights of shape (20, 24)",
    )  # fmt: skip
    refused(
        [one[:1].expand(17, 20)], [first],
        f"probes are (17, 20) on {place}; {rows} 20 on {place}, for weights of shape (20, 24)",
    )  # fmt: skip
    assert probe_through([one[:1].expand(16, 20)], [first], impl="triton").shape == (1, 16, 24)


@pytest.mark.gpu
@pytest.mark.parametrize("types", [(torch.bfloat16,), (torch.float32, torch.bfloat16), (torch.float32,)], ids=str)
@pytest.mark.parametrize(("count", "width"), [(1, 128), (5, 256), (17, 512), (23, 1024)])
def test_gpu_products_through_the_weights_of_a_tower(count: int, width: int, types: tuple[torch.dtype, ...]) -> None:
    probes, weights = matrices(count, 2, width, 4 * width, *types)
    found = check_through(probes, weights)
    assert_bits_equal(probe_through(probes, weights, impl="triton"), found)
