"""Swin's merging of patches up to its product: the specification, the kernel (in the interpreter without a GPU) and the
operation."""

# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as some
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import layer_norm
from transformers.models.swin.modeling_swin import SwinPatchMerging

pytest.importorskip("triton")

from epic_fast.engine.windows import merge_prompts
from epic_fast.errors import ConfigError, ImplementationError
from epic_fast.kernels.common import plan
from epic_fast.kernels.merge_patches import reference, triton_forward
from epic_fast.kernels.residual_norm.tiles import MAX_WIDTH
from epic_fast.ops import merge_patches as operation
from epic_fast.ops.merge_patches import merge_patches
from epic_fast.testing.aot import build_production_elsewhere
from epic_fast.testing.cases import MERGE_PRODUCTION, MergeCase
from epic_fast.testing.numerics import OUTPUT_FACTOR, assert_bits_equal, budget, poisoned_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter does not round to bfloat16 as a GPU does.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
HALVES = [torch.float16, torch.bfloat16]
SMALL = MergeCase(3, 5, 4, 2, 12)
# Even and odd sides, one group, one token, and grids that are all border.
GRIDS = [(4, 6), (5, 4), (4, 5), (3, 7), (2, 2), (1, 1), (1, 6), (7, 1)]


@pytest.fixture(autouse=True)
def nothing_is_left_unwritten() -> Iterator[None]:
    with poisoned_empty():
        yield


def double(given: dict[str, Any]) -> dict[str, Any]:
    return {name: each.double() if isinstance(each, Tensor) else each for name, each in given.items()}


def sources(case: MergeCase) -> list[list[int | None]]:
    """Of each row of the result the four rows of the stream, None where a side is odd; counted one by one."""
    groups = []
    for sample in range(case.batch):
        for top in range(0, case.rows, 2):
            for left in range(0, case.columns, 2):
                group = []
                for y, x in ((top, left), (top + 1, left), (top, left + 1), (top + 1, left + 1)):
                    exists = y < case.rows and x < case.columns
                    group.append((sample * case.rows + y) * case.columns + x if exists else None)
                groups.append(group)
    tokens = case.batch * case.rows * case.columns
    return groups + [[tokens + number] * 4 for number in range(case.batch * case.prompts)]


def definition(case: MergeCase, given: dict[str, Any]) -> Tensor:
    """Row by row, in the type of the arguments."""
    stream, branch = given["stream"], given["branch"]
    total = stream if branch is None else stream + branch
    zeros, rows = torch.zeros_like(stream[:1].flatten()), []
    for group in sources(case):
        row = torch.cat([zeros if each is None else total[each] for each in group])
        centered = row - row.sum() / len(row)
        variance = (centered * centered).sum() / len(row)
        rows.append(centered * (variance + given["eps"]) ** -0.5 * given["weight"] + given["bias"])
    return torch.stack(rows)


def eager(given: dict[str, Any], case: MergeCase) -> Tensor:
    """As PyTorch does it: a sum, a gather and a norm in the type of the stream."""
    total = given["stream"] if given["branch"] is None else given["stream"] + given["branch"]
    at = torch.tensor([[len(total) if each is None else each for each in group] for group in sources(case)])
    rows = torch.cat([total, torch.zeros_like(total[:1])])[at.to(total.device)].flatten(1)
    return layer_norm(rows, rows.shape[1:], given["weight"].to(rows.dtype), given["bias"].to(rows.dtype), given["eps"])


def rounded_once(given: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in float64 but with the sum as the stream's type holds it: that rounding belongs to the
    specification and is no error of anybody's."""
    if given["branch"] is None:
        return double(given)
    total = (given["stream"].float() + given["branch"].float()).to(given["stream"].dtype)
    return double({**given, "stream": total, "branch": None})


def check(case: MergeCase, dtype: torch.dtype, given: dict[str, Any] | None = None, impl: str = "triton") -> Tensor:
    given = case.make(dtype, DEVICE) if given is None else given
    got = merge_patches(**given, impl=impl)
    exact = rounded_once(given)
    want = merge_patches(**exact, impl="reference")
    # A small variance multiplies what a mean is wrong by.
    rstd = want.new_tensor(1.0)
    if want.numel():
        plain = {**exact, "weight": torch.ones_like(exact["weight"]), "bias": torch.zeros_like(exact["bias"])}
        normed = merge_patches(**plain, impl="reference")
        rstd = normed.abs().amax() / exact["stream"].abs().amax()
    operands = 4.0 * max(1.0, rstd.item())
    kind = given["stream"].dtype
    settings = {"reduction": 4 * case.width, "operands": operands, "name": str(case)}
    budget(got, want, eager(given, case), factor=OUTPUT_FACTOR, dtype=kind, **settings)
    return got


# -- the specification ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("prompts", [0, 1, 3])
@pytest.mark.parametrize("branch", [True, False])
def test_the_specification_is_the_definition(grid: tuple[int, int], prompts: int, branch: bool) -> None:
    case = MergeCase(2, *grid, prompts, 7, branch=branch)
    given = double(case.make())
    torch.testing.assert_close(reference.merge_patches(**given), definition(case, given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("prompts", [0, 3])
def test_the_specification_is_what_transformers_does(grid: tuple[int, int], prompts: int) -> None:
    """After the reduction, whose weight is random, and before it: what its norm is given and gives."""
    case = MergeCase(2, *grid, prompts, 6, branch=False)
    given = double(case.make())
    module = SwinPatchMerging(case.width).double()
    seen: list[Tensor] = []
    module.norm.register_forward_hook(lambda norm, inputs, output: seen.append(output))
    with torch.no_grad():
        module.norm.weight.copy_(given["weight"])
        module.norm.bias.copy_(given["bias"])
        module.reduction.weight.normal_()
        tokens, rest = given["stream"].split([2 * grid[0] * grid[1], 2 * prompts])
        merged = module(tokens.view(2, -1, case.width), grid)
        wanted = [merged.flatten(0, 1), merge_prompts(module, rest.view(2, prompts, case.width)).flatten(0, 1)]
        found = reference.merge_patches(**{**given, "eps": module.norm.eps})
        torch.testing.assert_close(found, torch.cat([each.flatten(0, 1) for each in seen]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(module.reduction(found), torch.cat(wanted), rtol=1e-12, atol=1e-12)


def test_the_norm_of_a_prompt_is_that_of_its_own_columns() -> None:
    given = double(replace(SMALL, branch=False).make())
    prompts = given["stream"][SMALL.batch * SMALL.rows * SMALL.columns :]
    plain = layer_norm(prompts, (SMALL.width,), eps=given["eps"])
    found = reference.merge_patches(**given)[SMALL.merged :]
    torch.testing.assert_close(found, plain.repeat(1, 4) * given["weight"] + given["bias"], rtol=1e-12, atol=1e-12)


# -- the kernel -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("prompts", [0, 3])
@pytest.mark.parametrize("branch", [True, False])
def test_grids(grid: tuple[int, int], prompts: int, branch: bool, dtype: torch.dtype) -> None:
    check(MergeCase(3, *grid, prompts, 12, branch=branch), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 3, 5, 16, 24, 96, 100, 128, 130, 256, 257, 512])
def test_widths(width: int, dtype: torch.dtype) -> None:
    check(MergeCase(2, 3, 4, 3, width), dtype)


@pytest.mark.parametrize("width", [1024, 2047, 2048, 2049, MAX_WIDTH // 4])
def test_wide_rows(width: int) -> None:
    check(MergeCase(2, 3, 2, 1, width), torch.float32)


@drawn(
    batch=some.integers(0, 4),
    rows=some.integers(0, 6),
    columns=some.integers(0, 6),
    prompts=some.integers(0, 5),
    width=some.integers(1, 70),
    branch=some.booleans(),
    dtype=some.sampled_from(DTYPES),
)
def test_any_sizes(
    batch: int, rows: int, columns: int, prompts: int, width: int, branch: bool, dtype: torch.dtype
) -> None:
    case = MergeCase(batch, rows, columns, prompts, width, branch=branch)
    if not case.count:
        found = merge_patches(**case.make(dtype, DEVICE), impl="triton")
        assert (tuple(found.shape), found.dtype) == ((0, 4 * width), dtype)
        return
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_far_from_zero(dtype: torch.dtype) -> None:
    """A variance that is a difference of squares would lose all of it."""
    case = replace(SMALL, branch=False)
    given = case.make(dtype, DEVICE)
    given["stream"] = (given["stream"].float() * 0.3 + 300).to(dtype)
    check(replace(case, rows=4, batch=3), dtype, {**given, "grid": (4, 4), "stream": given["stream"][: 3 * 18]})


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("triton", each) for each in DTYPES[1:]] + [("reference", each) for each in HALVES],
)
def test_what_is_normalised_is_the_rounded_sum(dtype: torch.dtype, impl: str) -> None:
    given = SMALL.make(dtype, DEVICE)
    given["stream"] *= 30
    total = (given["stream"].float() + given["branch"].float()).to(dtype)
    summed = {**given, "stream": total, "branch": None}
    found, wanted = (merge_patches(**each, normed_dtype=torch.float32, impl=impl) for each in (given, summed))
    assert_bits_equal(found, wanted)
    exact = {**given, "stream": given["stream"].float(), "branch": given["branch"].float()}
    assert not torch.allclose(found, merge_patches(**exact, impl=impl), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stream", DTYPES, ids=str)
@pytest.mark.parametrize("branch", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [*DTYPES, None], ids=str)
def test_types_may_differ(stream: torch.dtype, branch: torch.dtype, normed: torch.dtype | None) -> None:
    given = SMALL.make(device=DEVICE)
    given |= {"stream": given["stream"].to(stream), "branch": given["branch"].to(branch)}
    given["weight"] = given["weight"].to(branch)
    found, wanted = (merge_patches(**given, normed_dtype=normed, impl=impl) for impl in ("triton", "reference"))
    assert found.dtype == wanted.dtype == (normed or stream)
    step = torch.finfo(found.dtype).eps if found.dtype != torch.float32 else 2e-6
    torch.testing.assert_close(found, wanted, rtol=step, atol=step)


def layouts(values: Tensor) -> dict[str, Tensor]:
    """The same (R, C) in memory of other shapes."""
    rows, width = values.shape
    wide = torch.full((rows, width + 16), math.nan, device=values.device, dtype=values.dtype)
    packed = torch.full((3 * rows, width), math.nan, device=values.device, dtype=values.dtype)
    columns = torch.empty(width, rows, device=values.device, dtype=values.dtype).T
    found = {"wide": wide[:, :width], "odd start": wide.clone()[:, 1 : width + 1], "every third": packed[::3]}
    found |= {"far apart": torch.empty(rows, 1 << 16, device=values.device, dtype=values.dtype)[:, 5 : 5 + width]}
    found |= {"columns": columns}
    for each in found.values():
        each.copy_(values)
    return found


@pytest.mark.parametrize("width", [1, 16, 21])
def test_rows_may_lie_anywhere(width: int) -> None:
    given = replace(SMALL, width=width).make(device=DEVICE)
    wanted = merge_patches(**given, impl="triton")
    streams, branches = layouts(given["stream"]), layouts(given["branch"])
    for name, stream in streams.items():
        for pair in ((stream, branches[name]), (stream, given["branch"]), (given["stream"], branches[name])):
            found = merge_patches(**{**given, "stream": pair[0], "branch": pair[1]}, impl="triton")
            assert_bits_equal(found, wanted, name)
            assert found.is_contiguous()
    same = given["branch"][:1].expand(SMALL.count, -1)
    found, whole = (merge_patches(**{**given, "branch": each}, impl="triton") for each in (same, same.contiguous()))
    assert_bits_equal(found, whole)
    weights = torch.stack([given["weight"], given["bias"]], dim=1)
    apart = {**given, "weight": weights[:, 0], "bias": weights[:, 1]}
    assert_bits_equal(merge_patches(**apart, impl="triton"), wanted)


def test_offsets_beyond_two_to_the_31() -> None:
    given = SMALL.make(torch.float16, DEVICE)
    wanted = merge_patches(**given, impl="triton")
    step = 2**31 // (SMALL.count - 1) // 16 * 16 + 16
    try:
        memory = torch.empty((SMALL.count - 1) * step + SMALL.width, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("4 GiB of addresses are not to be had")
    # Of them only the pages of the rows are touched.
    far = memory.as_strided(given["stream"].shape, (step, 1))
    far.copy_(given["stream"])
    assert_bits_equal(merge_patches(**{**given, "stream": far}, impl="triton"), wanted)


def test_nothing_is_written_to_what_is_given() -> None:
    given = SMALL.make(device=DEVICE)
    before = {name: each.clone() for name, each in given.items() if isinstance(each, Tensor)}
    for impl in ("triton", "reference"):
        merge_patches(**given, impl=impl)
    assert_bits_equal([given[name] for name in before], list(before.values()))


def parts(case: MergeCase, given: dict[str, Any], samples: slice) -> dict[str, Any]:
    """The call for some of the samples."""
    tokens = case.batch * case.rows * case.columns
    found = dict(given)
    for name in ("stream", "branch"):
        grids = given[name][:tokens].view(case.batch, -1, case.width)[samples]
        prompts = given[name][tokens:].view(case.batch, -1, case.width)[samples]
        found[name] = torch.cat([grids.flatten(0, 1), prompts.flatten(0, 1)])
        found["batch"] = len(grids)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [3, 40, 128])
def test_bits_do_not_depend_on_the_batch_nor_on_the_run(width: int, dtype: torch.dtype) -> None:
    case = MergeCase(5, 5, 4, 3, width)
    given = case.make(dtype, DEVICE)
    whole = merge_patches(**given, impl="triton")
    assert_bits_equal(merge_patches(**given, impl="triton"), whole)
    groups, prompts = whole.split([case.merged, case.batch * case.prompts])
    groups, prompts = (each.view(case.batch, -1, 4 * width) for each in (groups, prompts))
    for samples in (slice(0, 1), slice(4, 5), slice(1, 4)):
        found = merge_patches(**parts(case, given, samples), impl="triton")
        assert_bits_equal(found, torch.cat([groups[samples].flatten(0, 1), prompts[samples].flatten(0, 1)]))


@pytest.mark.parametrize("name", ["stream", "branch"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_group(name: str, poison: float) -> None:
    case = replace(SMALL, rows=5, columns=5)
    given = case.make(device=DEVICE)
    whole = merge_patches(**given, impl="triton")
    groups = sources(case)
    for row in (0, 4, 12, 24, 25, case.count - 1):
        torn = {**given, name: given[name].clone()}
        torn[name][row, 1] = poison
        own = next(index for index, group in enumerate(groups) if row in group)
        others = [index for index in range(len(groups)) if index != own]
        for impl in ("triton", "reference"):
            found = merge_patches(**torn, impl=impl)
            assert found[own].isnan().any()
            assert found[others].isfinite().all()
            if impl == "triton":
                assert_bits_equal(found[others], whole[others])
                assert found[own].isnan().all()


@pytest.mark.parametrize("branch", [True, False])
def test_bfloat16_but_for_its_rounding(branch: bool) -> None:
    """What the interpreter can show of it: sums that bfloat16 holds exactly, and a result in float32."""
    given = replace(SMALL, branch=branch).make(device=DEVICE)
    given["stream"] = (given["stream"] * 8).round()
    given["branch"] = (given["branch"] * 8).round() if branch else None
    narrow = {
        name: each.bfloat16() if name in ("stream", "branch") and branch else each for name, each in given.items()
    }
    narrow["stream"] = narrow["stream"].bfloat16()
    wanted = merge_patches(**given, impl="triton")
    assert_bits_equal(merge_patches(**narrow, normed_dtype=torch.float32, impl="triton"), wanted)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("grid", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_prompts_alone(grid: tuple[int, int]) -> None:
    """Nothing is divided by a number of groups that is zero."""
    case = MergeCase(3, *grid, 2, 12)
    assert check(case, torch.float32).shape == (6, 48)


def test_constant_rows_have_the_bias() -> None:
    given = {**SMALL.make(device=DEVICE), "branch": None, "grid": (4, 4)}
    given["stream"] = torch.full((3 * 18, SMALL.width), 7.0, device=DEVICE)
    found = merge_patches(**given, impl="triton")
    torch.testing.assert_close(found, given["bias"].expand_as(found), rtol=0, atol=1e-6)


class Recorder:
    """Remembers what a kernel is compiled for and launched with, and lets it through."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> Any:
            self.launches.append((grid, arguments[-4:], options))
            return self.kernel[grid](*arguments, **options)

        return launch


def test_one_launch_one_allocation_and_one_kernel_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(triton_forward.forward_kernel)
    monkeypatch.setattr(triton_forward, "forward_kernel", recorder)
    plan.forget()
    cases = [MergeCase(2, 4, 4, 2, 16), MergeCase(5, 3, 7, 0, 16), MergeCase(1, 1, 1, 9, 16), MergeCase(0, 4, 4, 0, 16)]
    for number, case in enumerate(cases, start=1):
        with poisoned_empty() as poison:
            merge_patches(**case.make(device=DEVICE), impl="triton")
        assert poison.allocations == 1
        assert len(recorder.launches) == min(number, 3)
    assert len({(constants, tuple(options.items())) for _, constants, options in recorder.launches}) == 1


@pytest.mark.slow
def test_no_batch_nor_grid_compiles_a_kernel_again() -> None:
    """One group alone, where all counts are 1, is launched with the kernel of a whole batch."""
    builds = build_production_elsewhere("merging", "cuda:90")
    found = [build for build in builds if "Swin-B, C=128 (bf16)" in build.launches]
    assert len(found) == 2  # rows in bfloat16 and in float32
    for build in found:
        assert {"one group, C=128 (bf16)", "odd grid, C=128 (bf16)"} <= set(build.launches)
        assert set(build.constants) == {"C", "UNIT", "ROWS", "BLOCK"}
        assert all(kind.endswith(":16") == kind.startswith("*") for kind in build.signature.values())


def test_tiles_hold_whole_rows() -> None:
    for width in (1, 4, 5, 96, 100, 128, 512, 1000, 2048, 3000, MAX_WIDTH // 4):
        tile = triton_forward.merge_tile(width)
        assert tile.block >= max(16, 4 * width)
        assert 512 <= tile.rows * tile.block <= MAX_WIDTH
        # At most 32 elements a thread.
        assert tile.rows * tile.block <= 1024 * tile.warps


# -- the operation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [SMALL, replace(SMALL, branch=False, prompts=0)], ids=["whole", "no branch"])
@pytest.mark.parametrize("normed_dtype", [None, torch.float16])
def test_the_operator_is_what_it_says(case: MergeCase, normed_dtype: torch.dtype | None) -> None:
    stream, branch, batch, grid, *norm = case.make(device=DEVICE).values()
    torch.library.opcheck(operation.FORWARD, (stream, branch, batch, *grid, *norm, normed_dtype))


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
@pytest.mark.parametrize("branch", [True, False])
def test_compiled_whole_without_another_compilation(impl: str, branch: bool) -> None:
    def step(given: dict[str, Any]) -> Tensor:
        return merge_patches(**given, impl=impl) * 2

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for sizes in ((3, 4, 6, 2), (5, 7, 8, 3), (6, 10, 9, 4), (4, 5, 11, 7)):
        given = MergeCase(*sizes, 12, branch=branch).make(device=DEVICE)
        assert_bits_equal(compiled(given), step(given))
    assert counter.frame_count <= 2


def test_autocast_changes_nothing() -> None:
    given = SMALL.make(device=DEVICE)
    for impl in ("triton", "reference"):
        wanted = merge_patches(**given, impl=impl)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert_bits_equal(merge_patches(**given, impl=impl), wanted)


def test_which_implementation_is_taken() -> None:
    given = SMALL.make(device=DEVICE)
    if DEVICE == "cpu":
        assert_bits_equal(merge_patches(**given), merge_patches(**given, impl="reference"))
    for name in ("stream", "branch", "weight", "bias"):
        with pytest.raises(ImplementationError, match=f"{name} is torch.float64; the kernel takes float32, bfloat16"):
            merge_patches(**{**given, name: given[name].double()}, impl="triton")
    assert merge_patches(**double(given)).dtype == torch.float64
    with pytest.raises(ImplementationError, match=r"normed_dtype is torch.float64; the kernel writes"):
        merge_patches(**given, normed_dtype=torch.float64, impl="triton")
    assert merge_patches(**given, normed_dtype=torch.float64).dtype == torch.float64
    wide = MergeCase(1, 1, 1, 1, MAX_WIDTH // 4 + 1).make(device=DEVICE)
    with pytest.raises(ImplementationError, match="four rows are 16388 wide; the kernel takes up to 16384"):
        merge_patches(**wide, impl="triton")
    assert merge_patches(**wide).isfinite().all()
    long, weight = torch.empty(2**31, 1, device="meta"), torch.empty(4, device="meta")
    assert operation._limits(long, None, 1, (2**16, 2**15), weight, weight, 1e-5, None) == [
        "stream has 2147483648 rows; the kernel takes fewer than 2**31"
    ]
    with pytest.raises(ConfigError, match="impl='fast' is not one of"):
        merge_patches(**given, impl="fast")


@pytest.mark.parametrize("name", ["stream", "branch", "weight", "bias"])
def test_a_gradient_is_not_lost_in_silence(name: str) -> None:
    given = SMALL.make(device=DEVICE)
    given[name].requires_grad_()
    for impl in ("triton", "reference"):
        with pytest.raises(ConfigError, match=f"{name} requires a gradient, and this has no backward; wanted no grad"):
            merge_patches(**given, impl=impl)
        with torch.no_grad():
            assert merge_patches(**given, impl=impl).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": (2, 33, 12)}, r"stream has shape \(2, 33, 12\); wanted rows \(R, C\), at least one column"),
        ({"stream": (66, 0)}, r"stream has shape \(66, 0\); wanted rows \(R, C\), at least one column"),
        ({"branch": (65, 12)}, r"branch has shape \(65, 12\); wanted \(66, 12\), as stream has"),
        ({"weight": (12,)}, r"weight has shape \(12,\); wanted \(48,\), four times stream's columns"),
        ({"bias": (1, 48)}, r"bias has shape \(1, 48\); wanted \(48,\), four times stream's columns"),
        ({"stream": torch.zeros(66, 12).int()}, "stream has type torch.int32; wanted a floating-point type"),
        ({"weight": torch.zeros(48).long()}, "weight has type torch.int64; wanted a floating-point type"),
        ({"bias": torch.zeros(48, device="meta")}, "bias is on meta; wanted .*, as stream"),
        ({"batch": -1}, "batch=-1; wanted an integer, 0 or more samples"),
        ({"batch": 3.0}, r"batch=3\.0; wanted an integer, 0 or more samples"),
        ({"grid": (5, -4)}, r"grid=\(5, -4\); wanted \(rows, columns\), two integers, neither below 0"),
        ({"grid": (5, 4, 1)}, r"grid=\(5, 4, 1\); wanted \(rows, columns\), two integers"),
        ({"grid": (6, 4)}, r"stream has 66 rows; wanted 3 \* 6 \* 4 tokens, and behind them as many prompts"),
        ({"batch": 4}, r"stream has 66 rows; wanted 4 \* 5 \* 4 tokens, and .* for each of 4 samples"),
        (
            {"batch": 2, "stream": (43, 12), "branch": None},
            r"stream has 43 rows; wanted 2 \* 5 \* 4 tokens, and behind",
        ),
        ({"batch": 0}, r"stream has 66 rows; wanted 0 \* 5 \* 4 tokens"),
        ({"normed_dtype": torch.int8}, "normed_dtype=torch.int8; wanted a floating-point type, or None"),
    ],
)
def test_what_does_not_fit_is_said(changes: dict[str, Any], message: str) -> None:
    given = SMALL.make(device=DEVICE)
    for name, each in changes.items():
        if isinstance(each, tuple) and name != "grid":
            each = torch.zeros(each, device=DEVICE)
        given[name] = each.to(DEVICE) if isinstance(each, Tensor) and not each.is_meta else each
    for impl in ("auto", "reference"):
        with pytest.raises(ConfigError, match=f"^merge_patches: {message}"):
            merge_patches(**given, impl=impl)


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("case", MERGE_PRODUCTION, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_production_shapes_are_within_the_budget(dtype: torch.dtype, case: MergeCase) -> None:
    check(replace(case, batch=min(case.batch, 8)), dtype)


@pytest.mark.gpu
def test_a_cuda_graph_replays_it() -> None:
    given = MERGE_PRODUCTION[2].make(torch.bfloat16, "cuda")
    wanted = merge_patches(**given, impl="triton")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        merge_patches(**given, impl="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = merge_patches(**given, impl="triton")
    found.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_bits_equal(found, wanted)
