"""Residual sum and layer norm: the specification, the kernels (in the interpreter without a GPU) and the operations."""

# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import layer_norm

pytest.importorskip("triton")

from epic_fast.errors import ConfigError, ImplementationError
from epic_fast.kernels.common.eight_bit import SMALLEST_SCALE, quantise_rows
from epic_fast.kernels.residual_norm import reference, triton_backward, triton_forward
from epic_fast.kernels.residual_norm.tiles import MAX_WIDTH, ended_tile, norm_tile
from epic_fast.ops import library, residual_norm
from epic_fast.ops.residual_norm import (
    moved_norm_backward,
    moved_norm_forward,
    residual_norm_backward,
    residual_norm_forward,
    residual_norm_forward_kept,
)
from epic_fast.testing.numerics import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_bits_equal, budget, poisoned_empty

forward, backward = triton_forward.residual_norm_forward, triton_backward.residual_norm_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
EIGHT_BIT = ("fp8", "int8")


@pytest.fixture(autouse=True)
def nothing_is_left_unwritten() -> Iterator[None]:
    with poisoned_empty():
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=random)).to(DEVICE, dtype)


def parameters(width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (1 + draw(width, seed=8, scale=0.3)).to(dtype), draw(width, dtype=dtype, seed=9, scale=0.3)


def definition(stream: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    total = stream if branch is None else stream + branch
    mean = total.sum(-1, keepdim=True) / total.shape[-1]
    variance = ((total - mean) ** 2).sum(-1, keepdim=True) / total.shape[-1]
    rstd = (variance + eps) ** -0.5
    return total, (total - mean) * rstd * weight + bias, mean.flatten(), rstd.flatten()


def eager(
    stream: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As PyTorch's own layer would; autocast runs the norm in float32 and casts its result for the next product."""
    total = stream if branch is None else stream + branch
    return total, layer_norm(total, total.shape[-1:], weight.to(total.dtype), bias.to(total.dtype), eps).to(dtype)


@pytest.mark.parametrize("with_branch", [True, False])
@pytest.mark.parametrize("with_total", [True, False])
def test_the_specification_is_the_definition_and_its_derivative(with_branch: bool, with_total: bool) -> None:
    shape, eps = (2, 3, 7), 1e-5
    stream = draw(*shape, dtype=torch.float64).cpu().requires_grad_()
    branch = draw(*shape, dtype=torch.float64, seed=1).cpu().requires_grad_() if with_branch else None
    weight, bias = (each.cpu().double() for each in parameters(7))
    wanted = definition(stream, branch, weight, bias, eps)
    with torch.no_grad():
        *found, scale = reference.residual_norm_forward(stream, branch, weight, bias, eps)
    assert scale is None
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    grad_normed, grad_total = (draw(*shape, dtype=torch.float64, seed=seed).cpu() for seed in (2, 3))
    leaves = [each for each in (stream, branch) if each is not None]
    sent = (wanted[1] * grad_normed).sum() + ((wanted[0] * grad_total).sum() if with_total else 0)
    with torch.no_grad():
        grad = reference.residual_norm_backward(
            grad_normed, grad_total if with_total else None, found[0], weight, found[2], found[3]
        )
    for each in torch.autograd.grad(sent, leaves):
        torch.testing.assert_close(grad, each, rtol=1e-12, atol=1e-12)


@given(
    rows=some.integers(1, 5),
    width=some.integers(1, 300),
    stream_type=some.sampled_from([torch.float32, HALF]),
    branch_type=some.sampled_from([torch.float32, HALF, None]),
    weight_type=some.sampled_from([torch.float32, HALF]),
    eps=some.sampled_from([1e-5, 1e-12]),
    with_total=some.booleans(),
    offset=some.sampled_from([0.0, 30.0]),
)
def test_within_the_budget(
    rows: int,
    width: int,
    stream_type: torch.dtype,
    branch_type: torch.dtype | None,
    weight_type: torch.dtype,
    eps: float,
    with_total: bool,
    offset: float,
) -> None:
    # One and two columns have a variance that is rounding alone, which eps = 1e-12 blows up to anything.
    eps = eps if width > 2 else 1e-5
    if stream_type == HALF:
        branch_type = branch_type and HALF  # PyTorch's own sum would be float32, whose error says nothing of HALF's
    stream = draw(rows, width, dtype=stream_type) + offset
    branch = None if branch_type is None else draw(rows, width, dtype=branch_type, seed=1)
    weight, bias = parameters(width, weight_type)
    normed_type = stream_type if branch is None else branch_type
    wide = [None if each is None else each.double().requires_grad_() for each in (stream, branch)]
    narrow = [None if each is None else each.clone().requires_grad_() for each in (stream, branch)]
    want = definition(*wide, weight.double(), bias.double(), eps)
    theirs = eager(*narrow, weight, bias, eps, normed_type)
    *got, scale = forward(stream, branch, weight, bias, eps)
    assert scale is None
    assert got[2].dtype == got[3].dtype == torch.float32
    settings: dict[str, Any] = {"reduction": width, "operands": abs(offset) + 4}
    for index, name in ((0, "total"), (1, "normed")):
        if index == 0 and branch is None:
            assert got[0] is stream
            continue
        # What the rounded sum loses, the norm of a small variance multiplies, in PyTorch as here.
        operands = settings["operands"] * (want[3].max().item() if index else 1.0)
        budget(
            got[index],
            want[index],
            theirs[index],
            factor=OUTPUT_FACTOR,
            dtype=got[index].dtype,
            name=name,
            reduction=width,
            operands=operands,
        )

    grad_normed = draw(rows, width, dtype=normed_type, seed=2)
    grad_total = draw(rows, width, dtype=stream_type, seed=3) if with_total else None

    def gradient(results: Any, leaf: Tensor) -> Tensor:
        sent = (results[1] * grad_normed.to(results[1].dtype)).sum()
        if grad_total is not None:
            sent = sent + (results[0] * grad_total.to(results[0].dtype)).sum()
        return torch.autograd.grad(sent, leaf)[0]

    grad = backward(grad_normed, grad_total, *[got[0], weight, got[2], got[3]])
    budget(
        grad,
        gradient(want, wide[0]),
        gradient(theirs, narrow[0]),
        factor=GRADIENT_FACTOR,
        dtype=stream_type,
        name="gradient",
        reduction=width,
        operands=settings["operands"] * want[3].max().item(),
    )


def rms_definition(stream: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = stream if branch is None else stream + branch
    return total, total * ((total**2).sum(-1, keepdim=True) / total.shape[-1] + eps) ** -0.5 * weight


def rms_eager(stream: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As transformers has it."""
    total = stream if branch is None else stream + branch
    wide = total.float()
    return total, weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(total.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("width", [1, 21, 64, 300])
@pytest.mark.parametrize("with_branch", [True, False])
@pytest.mark.parametrize("with_total", [True, False])
def test_without_a_bias_it_is_an_rms_norm(dtype: torch.dtype, width: int, with_branch: bool, with_total: bool) -> None:
    # An offset that a layer norm would take out.
    stream, weight = draw(2, 3, width, dtype=dtype) + 2, parameters(width, dtype)[0]
    branch = draw(2, 3, width, dtype=dtype, seed=1) if with_branch else None
    grad_normed, grad_total = (draw(2, 3, width, dtype=dtype, seed=seed) for seed in (2, 3))
    wide = [None if each is None else each.double().requires_grad_() for each in (stream, branch)]
    narrow = [None if each is None else each.clone().requires_grad_() for each in (stream, branch)]
    want = rms_definition(*wide, weight.double(), 1e-5)
    theirs = rms_eager(*narrow, weight, 1e-5)

    def gradient(results: tuple[Tensor, Tensor], leaf: Tensor) -> Tensor:
        sent = (results[1] * grad_normed.to(results[1].dtype)).sum()
        if with_total:
            sent = sent + (results[0] * grad_total.to(results[0].dtype)).sum()
        return torch.autograd.grad(sent, leaf)[0]

    exact, plain = gradient(want, wide[0]), gradient(theirs, narrow[0])
    exact_rows = [None if each is None else each.detach() for each in wide]
    total, normed, mean, rstd, _ = reference.residual_norm_forward(*exact_rows, weight.double(), None, 1e-5)
    assert mean is None
    torch.testing.assert_close(normed, want[1].detach(), rtol=1e-12, atol=1e-12)
    above = grad_total.double() if with_total else None
    found = reference.residual_norm_backward(grad_normed.double(), above, total, weight.double(), None, rstd)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    total, normed, mean, rstd, scale = residual_norm_forward(stream, branch, weight, None, 1e-5, impl="triton")
    assert mean is None
    assert scale is None
    settings: dict[str, Any] = {"dtype": dtype, "reduction": width, "operands": 8}
    budget(normed, want[1], theirs[1], factor=OUTPUT_FACTOR, name="normed", **settings)
    grad = residual_norm_backward(
        grad_normed, grad_total if with_total else None, total, weight, None, rstd, impl="triton"
    )
    budget(grad, exact, plain, factor=GRADIENT_FACTOR, name="gradient", **settings)
    checks: Any = ("test_schema", "test_faketensor")
    options = (weight, None, 1e-5, None, None)
    if branch is None:
        torch.library.opcheck(residual_norm.NORM, (stream, *options), test_utils=checks)
    else:
        torch.library.opcheck(residual_norm.FORWARD, (stream, branch, *options), test_utils=checks)
    torch.library.opcheck(
        residual_norm.BACKWARD, (grad_normed, None, total, weight, None, rstd, None), test_utils=checks
    )


def test_rows_of_an_rms_norm_are_not_kept_in_eight_bits() -> None:
    with pytest.raises(ConfigError, match="bias=None is an RMS norm"):
        residual_norm_forward_kept(draw(2, 8), None, torch.ones(8), None, 1e-5)


@pytest.mark.parametrize("width", [16, 300, 768, 1024])
def test_float32_is_within_a_millionth_of_pytorch(width: int) -> None:
    stream, branch, (weight, bias) = draw(3, width), draw(3, width, seed=1), parameters(width)
    total, normed, *_ = forward(stream, branch, weight, bias, 1e-5)
    assert torch.equal(total, stream + branch)
    wanted = layer_norm(total, (width,), weight, bias, 1e-5)
    assert ((normed - wanted).abs() <= 1e-6 * wanted.abs().clamp_min(1)).all()


def test_what_is_normalised_is_the_rounded_sum() -> None:
    """Backward reads the sum as it was written, so mean and norm must be of that."""
    stream, branch, (weight, bias) = draw(4, 64, dtype=HALF, scale=30), draw(4, 64, dtype=HALF, seed=1), parameters(64)
    total, *found, _ = forward(stream, branch, weight, bias, 1e-5, normed_dtype=torch.float32)
    _, *wanted, _ = forward(total.float(), None, weight, bias, 1e-5, normed_dtype=torch.float32)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


def layouts(values: Tensor) -> dict[str, Tensor]:
    """The same (B, S, D) in memory of other shapes."""
    batch, rows, width = values.shape
    packed = torch.full((batch, 2 * rows + 1, width + 16), math.nan, device=values.device, dtype=values.dtype)
    first, last = packed.clone()[:, :rows, :width], packed.clone()[:, -rows:, 1 : width + 1]
    turned = torch.empty(rows, batch, width, device=values.device, dtype=values.dtype).transpose(0, 1)
    columns = torch.empty(batch, width, rows, device=values.device, dtype=values.dtype).transpose(1, 2)
    for each in (first, last, turned, columns):
        each.copy_(values)
    return {"first rows": first, "last rows, odd start": last, "turned": turned, "columns": columns}


@pytest.mark.parametrize("width", [48, 21])
def test_rows_may_lie_anywhere(width: int) -> None:
    stream, branch, (weight, bias) = draw(3, 4, width), draw(3, 4, width, seed=1), parameters(width)
    wanted = forward(stream, branch, weight, bias, 1e-5)
    grads = draw(3, 4, width, seed=2), draw(3, 4, width, seed=3)
    grad = backward(*grads, wanted[0], weight, *wanted[2:4])
    for name in layouts(stream):
        x, y = layouts(stream)[name], layouts(branch)[name]
        for pair in ((x, y), (stream, y), (x, branch)):
            assert_bits_equal(forward(*pair, weight, bias, 1e-5), wanted, name)
        found = [layouts(each)[name] for each in (*grads, wanted[0])]
        assert_bits_equal(backward(*found, weight, *wanted[2:4]), grad, name)
        assert_bits_equal(backward(grads[0], found[1], wanted[0], weight, *wanted[2:4]), grad, name)
    flat = forward(stream.view(12, width), branch.view(12, width), weight, bias, 1e-5)
    deep = forward(stream.view(3, 2, 2, width), branch.view(3, 2, 2, width), weight, bias, 1e-5)
    for found in (flat, deep):
        assert_bits_equal([each.reshape(-1) for each in found[:4]], [each.reshape(-1) for each in wanted[:4]])
    one = forward(stream[0, 0], branch[0, 0], weight, bias, 1e-5)
    assert_bits_equal((one[0], one[1], one[2]), (wanted[0][0, 0], wanted[1][0, 0], wanted[2][:1]))
    everywhere = branch[:1, :1].expand(3, 4, width)
    assert_bits_equal(
        forward(stream, everywhere, weight, bias, 1e-5), forward(stream, everywhere.contiguous(), weight, bias, 1e-5)
    )


@pytest.mark.parametrize("eight_bit", [None, *EIGHT_BIT])
@pytest.mark.parametrize("function", [forward, reference.residual_norm_forward], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_in_place(function: Callable[..., Any], dtype: torch.dtype, eight_bit: str | None) -> None:
    branch, (weight, bias) = draw(2, 3, 40, dtype=dtype, seed=1), parameters(40)
    buffer = draw(2, 7, 40, dtype=dtype)
    before, stream = buffer.clone(), buffer[:, 2:5]
    wanted = function(stream, branch, weight, bias, 1e-5, eight_bit=eight_bit)
    assert_bits_equal(buffer, before, "the stream out of place")
    assert wanted[0].data_ptr() != stream.data_ptr()
    found = function(stream, branch, weight, bias, 1e-5, in_place=True, eight_bit=eight_bit)
    assert found[0] is stream
    assert_bits_equal(found, wanted)
    assert_bits_equal(buffer[:, [0, 1, 5, 6]], before[:, [0, 1, 5, 6]], "the rows beside the stream")


def test_in_place_needs_memory_that_a_view_can_list() -> None:
    columns = draw(2, 40, 3).transpose(1, 2)
    with pytest.raises(ValueError, match=r"strides \(120, 1, 3\).*unit last stride"):
        forward(columns, draw(2, 3, 40), *parameters(40), 1e-5, in_place=True)


@pytest.mark.parametrize("eight_bit", [None, *EIGHT_BIT])
def test_a_row_depends_on_no_other(eight_bit: str | None) -> None:
    stream, branch, (weight, bias) = draw(7, 72), draw(7, 72, seed=1), parameters(72)
    grads = draw(7, 72, seed=2), draw(7, 72, seed=3)
    together = forward(stream, branch, weight, bias, 1e-5, eight_bit=eight_bit)
    assert_bits_equal(forward(stream, branch, weight, bias, 1e-5, eight_bit=eight_bit), together, "again")
    grad = backward(*grads, together[0], weight, *together[2:4])
    broken = stream.clone()
    broken[3] = math.nan
    spoiled = forward(broken, branch, weight, bias, 1e-5, eight_bit=eight_bit)
    for row in range(7):
        one = slice(row, row + 1)
        alone = forward(stream[one], branch[one], weight, bias, 1e-5, eight_bit=eight_bit)
        wanted = [None if each is None else each[one] for each in together]
        assert_bits_equal(alone, wanted, f"row {row}")
        assert_bits_equal(
            backward(grads[0][one], grads[1][one], alone[0], weight, *alone[2:4]), grad[one], f"gradient of row {row}"
        )
        if row != 3:
            assert_bits_equal(
                [None if each is None else each[one] for each in spoiled], wanted, f"row {row} beside NaN"
            )
    mean, scale = spoiled[2], spoiled[4]
    assert mean[3].isnan()
    assert (spoiled[1][3] if scale is None else scale[3]).isnan().all()


def assert_quantised(data: Tensor, scale: Tensor, values: Tensor, kind: str) -> None:
    """Bit for bit ``quantise_rows(values)``, but for what the interpreter and fused multiply-adds are known to do."""
    wanted, wanted_scale = quantise_rows(values, kind)
    if library.interpreting():
        assert_bits_equal(scale, wanted_scale, "scale")
    else:
        # Two compiled forms of the kernel may fuse other multiplications and additions: four roundings of 2^-24, of
        # terms that may be twice as large as their sum.
        torch.testing.assert_close(scale, wanted_scale, rtol=2 * 4 * 2 * 2**-24, atol=0)
    scaled = values / scale.reshape(*values.shape[:-1], 1)
    if kind == "fp8":
        same = data.view(torch.uint8) == wanted.view(torch.uint8)
        if library.interpreting():
            # Triton's interpreter (3.6 to 3.9) halves what fp8 rounds up to a power of two, and cuts subnormals off.
            small = (scaled.abs() < 2**-6) & ((data.float() - scaled).abs() <= 2**-9)
            same |= small | (scaled.frexp().exponent < wanted.float().frexp().exponent)
            assert same.all()
        else:
            # Fused multiply-adds decide a tie the other way; half a step is 2^-4 of the number, or 2^-10.
            assert (~same).float().mean() < 1e-3
            half = (scaled.abs() * 2**-4).clamp_min(2**-10)
            assert ((data.float() - scaled).abs() <= half * (1 + 2**-12)).all()
    else:
        far = (data.int() - wanted.int()).abs()
        # A GPU rounds value * inverse + offset once, which decides a tie between two integers the other way.
        assert far.max() <= (0 if library.interpreting() else 1)
        assert far.float().mean() < 1e-3
        assert ((data.float() - scaled).abs() <= 0.5001).all()


@pytest.mark.parametrize("kind", EIGHT_BIT)
@pytest.mark.parametrize("width", [5, 64, 300])
def test_eight_bits_are_those_of_the_specification(width: int, kind: str) -> None:
    stream, branch, (weight, bias) = draw(2, 4, width), draw(2, 4, width, seed=1), parameters(width)
    *plain, none = forward(stream, branch, weight, bias, 1e-5, normed_dtype=torch.float32)
    total, data, mean, rstd, scale = forward(stream, branch, weight, bias, 1e-5, eight_bit=kind)
    assert none is None
    assert_bits_equal((total, mean, rstd), (plain[0], plain[2], plain[3]))
    assert data.dtype == {"fp8": torch.float8_e4m3fn, "int8": torch.int8}[kind]
    assert scale.shape == (8,)
    assert_quantised(data, scale, plain[1], kind)


@pytest.mark.parametrize("kind", EIGHT_BIT)
@pytest.mark.parametrize("of", ["kernel", "specification"])
def test_rows_of_zeros_and_rows_that_are_not_finite(of: str, kind: str) -> None:
    function = forward if of == "kernel" else reference.residual_norm_forward
    stream = draw(5, 24)
    stream[1] = math.inf
    stream[2, 5] = math.nan
    stream[3] = 7.0
    _, data, _, _, scale = function(stream, None, *parameters(24), 1e-5, eight_bit=kind)
    assert (scale.isnan() == torch.tensor([False, True, True, False, False], device=DEVICE)).all()
    assert (data.float() * scale[:, None])[1:3].isnan().all()
    zeros = torch.zeros(24, device=DEVICE)
    _, data, _, _, scale = function(stream[:1], None, zeros, zeros, 1e-5, eight_bit=kind)
    assert scale.item() == SMALLEST_SCALE
    assert not data.float().any()
    _, data, _, _, scale = function(stream[:1], None, zeros, zeros + 1e-39, 1e-5, eight_bit=kind)
    assert (data.float() * scale[:, None] - 1e-39).abs().max() <= SMALLEST_SCALE


def test_the_gradient_of_an_unused_sum_is_zero() -> None:
    stream, (weight, bias) = draw(3, 50), parameters(50)
    total, _, mean, rstd, _ = forward(stream, None, weight, bias, 1e-5)
    grad = draw(3, 50, seed=2)
    found = backward(grad, None, total, weight, mean, rstd)
    assert torch.equal(found, backward(grad, torch.zeros_like(grad), total, weight, mean, rstd))


def test_no_rows() -> None:
    stream, (weight, bias) = draw(2, 0, 8), parameters(8)
    total, normed, mean, rstd, scale = forward(stream, stream, weight, bias, 1e-5, eight_bit="int8")
    assert total.shape == normed.shape == stream.shape
    assert mean.shape == rstd.shape == scale.shape == (0,)
    assert backward(stream, None, total, weight, mean, rstd).shape == stream.shape


def test_no_two_warps_hold_the_same_element() -> None:
    for width in (1, 16, 17, 511, 512, 768, 1000, 1024, 4096, 5000, MAX_WIDTH):
        tile = norm_tile(width)
        assert tile.block >= width
        assert tile.rows * tile.block >= 64 * tile.warps  # AMD's warps have 64 threads


def arguments(eight_bit: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    return draw(2, 3, 20, dtype=dtype), draw(2, 3, 20, dtype=HALF, seed=1), *parameters(20), 1e-5, None, eight_bit


@pytest.mark.parametrize("eight_bit", [None, *EIGHT_BIT])
def test_operators_are_what_they_say(eight_bit: str | None) -> None:
    stream, branch, *rest = arguments(eight_bit)
    # What dispatch traces is compared by value, which PyTorch cannot do in fp8.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    tests = tests[:3] if eight_bit == "fp8" else tests
    torch.library.opcheck(residual_norm.FORWARD, (stream, branch, *rest), test_utils=tests)
    torch.library.opcheck(residual_norm.FORWARD_IN_PLACE, (stream, branch, *rest), test_utils=tests)
    torch.library.opcheck(residual_norm.NORM, (stream, *rest), test_utils=tests)


@pytest.mark.parametrize("with_total", [True, False])
def test_the_operator_of_the_gradient_is_what_it_says(with_total: bool) -> None:
    stream, _, weight, bias, *_ = arguments()
    total, normed, mean, rstd, _ = forward(stream, None, weight, bias, 1e-5)
    grad_total = draw(2, 3, 20, seed=4) if with_total else None
    torch.library.opcheck(residual_norm.BACKWARD, (normed.half(), grad_total, total, weight, mean, rstd))


def both_ways(impl: str, in_place: bool, eight_bit: str | None) -> Callable[..., Any]:
    def run(stream: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Any:
        options: dict[str, Any] = {"eight_bit": eight_bit, "impl": impl}
        first = residual_norm_forward(stream, branch, weight, bias, 1e-5, in_place=in_place, **options)
        second = residual_norm_forward(first[0], None, weight, bias, 1e-5, normed_dtype=HALF, **options)
        back = residual_norm_backward(grad, first[0], first[0], weight, first[2], first[3], impl=impl)
        return first, second, back

    return run


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("eight_bit", [None, "int8"])
def test_compiled_whole_without_another_compilation(impl: str, in_place: bool, eight_bit: str | None) -> None:
    torch._dynamo.reset()
    plain = both_ways(impl, in_place, eight_bit)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(plain, backend=counter, fullgraph=True)
    for rows in (3, 5, 6):
        given = (draw(2, rows, 20), draw(2, rows, 20, dtype=HALF, seed=1), *parameters(20), draw(2, rows, 20, seed=2))
        mine, theirs = given[0].clone(), given[0].clone()
        assert_bits_equal(compiled(mine, *given[1:]), plain(theirs, *given[1:]))
        assert torch.equal(mine, theirs)
    assert counter.frame_count <= 2


def test_which_implementation_is_taken() -> None:
    given = (*(draw(2, 3, 20, seed=seed) for seed in range(2)), *parameters(20), 1e-5)
    assert_bits_equal(residual_norm_forward(*given, impl="triton"), forward(*given))
    if DEVICE == "cpu":
        assert_bits_equal(residual_norm_forward(*given), reference.residual_norm_forward(*given))
    wide = [each.double() for each in given[:4]]
    with pytest.raises(ImplementationError, match=r"float64; the kernel takes"):
        residual_norm_forward(*wide, 1e-5, impl="triton")
    assert residual_norm_forward(*wide, 1e-5)[1].dtype == torch.float64
    far = torch.zeros(1, MAX_WIDTH + 1, device=DEVICE)
    with pytest.raises(ImplementationError, match=f"rows are {MAX_WIDTH + 1} wide; the kernel takes 1 to {MAX_WIDTH}"):
        residual_norm_forward(far, None, far[0], far[0], 1e-5, impl="triton")


def test_what_does_not_fit_is_said() -> None:
    stream, weight, bias = draw(2, 3, 20), *parameters(20)
    with pytest.raises(ConfigError, match=r"weight has shape \(19,\).*wanted \(20,\)"):
        residual_norm_forward(stream, None, weight[1:], bias, 1e-5)
    with pytest.raises(ConfigError, match=r"branch has shape \(3, 20\); wanted \(2, 3, 20\)"):
        residual_norm_forward(stream, stream[0], weight, bias, 1e-5)
    with pytest.raises(ConfigError, match="eight_bit='fp4' is not one of None, 'fp8', 'int8'"):
        residual_norm_forward(stream, None, weight, bias, 1e-5, eight_bit="fp4")
    mean = torch.zeros(6, device=DEVICE)
    with pytest.raises(ConfigError, match=r"shapes \(2, 3, 20\) and \(3, 20\); wanted \(2, 3, 20\)"):
        residual_norm_backward(stream, stream[0], stream, weight, mean, mean)


# -- rows in two orders ----------------------------------------------------------------------------------------------


def order_of(rows: int, seed: int = 5) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("width", [20, 64, 300])
def test_moved_rows_are_those_that_a_gather_would_give(width: int, dtype: torch.dtype, keep: bool, impl: str) -> None:
    rows, more = 11, 14
    stream, branch = draw(rows, width, dtype=dtype), draw(more, width, dtype=dtype, seed=1)
    weight, bias = parameters(width)
    # Every second number of a longer tensor: an order need not be contiguous.
    branch_at, normed_at = (each.repeat_interleave(2)[::2] for each in (order_of(more)[:rows], order_of(rows, 6)))
    operation = residual_norm_forward_kept if keep else residual_norm_forward
    total, normed, *saved, _ = operation(stream, branch[branch_at], weight, bias, 1e-5, impl=impl)
    found = moved_norm_forward(
        stream, branch, weight, bias, 1e-5, branch_at=branch_at, normed_at=normed_at, keep=keep, impl=impl
    )
    assert_bits_equal((found[0], found[1][normed_at]), (total, normed))
    assert_bits_equal(found[2:5], saved if keep else (total, *saved))
    assert found[5] is None

    grad_normed, grad_total = draw(more, width, dtype=dtype, seed=2), draw(rows, width, dtype=dtype, seed=3)
    wanted = residual_norm_backward(
        grad_normed[branch_at], grad_total, found[2], weight, *found[3:5], grad_dtype=dtype, impl=impl
    )
    grad, moved = moved_norm_backward(
        *(grad_normed, grad_total, found[2], weight, *found[3:5]),
        normed_at=branch_at,
        moved_at=normed_at,
        moved_dtype=HALF,
        grad_dtype=dtype,
        impl=impl,
    )
    assert_bits_equal(grad, wanted)
    assert moved.dtype == HALF
    assert_bits_equal(moved[normed_at], wanted.to(HALF))
    grad, nothing = moved_norm_backward(
        grad_normed[:rows], None, found[2], weight, *found[3:5], grad_dtype=dtype, impl=impl
    )
    plain = residual_norm_backward(grad_normed[:rows], None, found[2], weight, *found[3:5], grad_dtype=dtype, impl=impl)
    assert nothing is None
    assert_bits_equal(grad, plain)


@pytest.mark.parametrize("with_branch", [True, False])
@pytest.mark.parametrize("probes", [1, 2, 5])
@pytest.mark.parametrize("width", [20, 300, 1024])
def test_products_with_a_probe_are_those_of_the_rounded_sum(width: int, probes: int, with_branch: bool) -> None:
    stream, (weight, bias) = draw(7, width, dtype=HALF) + 3, parameters(width)
    branch = draw(7, width, dtype=HALF, seed=1) if with_branch else None
    probe = draw(probes, width, seed=2)
    for offset in (bias, None):
        total, *_, found = moved_norm_forward(stream, branch, weight, offset, 1e-5, probe=probe, impl="triton")
        wanted = total.double() @ probe.double().T
        size = total.double().abs() @ probe.double().abs().T
        assert found.dtype == torch.float32
        assert found.shape == (7, probes)
        assert ((found - wanted).abs() <= 2 * width**0.5 * 2**-24 * size).all()
        *_, plain = moved_norm_forward(stream, branch, weight, offset, 1e-5, probe=probe, impl="reference")
        torch.testing.assert_close(plain, wanted.float(), rtol=1e-4, atol=1e-4)
        one = slice(3, 4)
        alone = moved_norm_forward(
            *(stream[one], None if branch is None else branch[one], weight, offset, 1e-5), probe=probe, impl="triton"
        )
        assert_bits_equal(alone[5], found[one], "a row alone")


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("with_branch", [True, False])
def test_the_operators_of_moved_rows_are_what_they_say(with_branch: bool, keep: bool) -> None:
    stream, (weight, bias) = draw(6, 20), parameters(20)
    branch = draw(6, 20, dtype=HALF, seed=1) if with_branch else None
    order, probe = order_of(6), draw(2, 20, seed=2)
    given = (stream, branch, weight, bias, 1e-5, order if with_branch else None, order, probe, *(None,) * 4, keep)
    torch.library.opcheck(residual_norm.MOVED, given)
    _, normed, rows, mean, rstd, _ = moved_norm_forward(
        stream, branch, weight, bias, 1e-5, normed_at=order, keep=keep, impl="triton"
    )
    torch.library.opcheck(
        residual_norm.MOVED_BACKWARD, (normed, stream, rows, weight, mean, rstd, order, order, HALF, torch.float32)
    )

    def both(stream: Tensor, branch: Tensor | None) -> Any:
        found = moved_norm_forward(
            stream, branch, weight, bias, 1e-5, normed_at=order, probe=probe, keep=keep, impl="triton"
        )
        return found, moved_norm_backward(
            *(found[1], None, found[2], weight, *found[3:5]), moved_at=order, grad_dtype=HALF, impl="triton"
        )

    torch._dynamo.reset()
    assert_bits_equal(
        [each for part in torch.compile(both, backend="aot_eager", fullgraph=True)(stream, branch) for each in part],
        [each for part in both(stream, branch) for each in part],
    )


def test_what_does_not_fit_moved_rows_is_said() -> None:
    stream, (weight, bias) = draw(6, 20), parameters(20)
    order = order_of(6)
    with pytest.raises(ConfigError, match=r"stream has shape \(1, 6, 20\); wanted rows \(R, D\)"):
        moved_norm_forward(stream[None], None, weight, bias, 1e-5)
    with pytest.raises(ConfigError, match=r"branch has shape \(4, 20\); wanted \(6, 20\) for rows of shape \(6, 20\)"):
        moved_norm_forward(stream, stream[:4], weight, bias, 1e-5)
    with pytest.raises(ConfigError, match=r"normed_at has shape \(5,\); wanted \(6,\)"):
        moved_norm_forward(stream, None, weight, bias, 1e-5, normed_at=order[:5])
    with pytest.raises(ConfigError, match=r"branch_at is torch.int32; wanted torch.int64"):
        moved_norm_forward(stream, stream, weight, bias, 1e-5, branch_at=order.int())
    with pytest.raises(ConfigError, match=r"probe has shape \(2, 19\); wanted \(2, 20\)"):
        moved_norm_forward(stream, None, weight, bias, 1e-5, probe=draw(2, 19))
    with pytest.raises(ConfigError, match="probe has 17 rows; wanted at most 16"):
        moved_norm_forward(stream, None, weight, bias, 1e-5, probe=draw(17, 20))
    with pytest.raises(ConfigError, match="normed_at is on meta; wanted"):
        moved_norm_forward(stream, None, weight, bias, 1e-5, normed_at=order.to("meta"))
    with torch.autocast(DEVICE, torch.bfloat16):
        found = moved_norm_forward(stream, None, weight, bias, 1e-5, probe=draw(2, 20), impl="reference")
    assert found[5].dtype == torch.float32
    with pytest.raises(ConfigError, match="bias=None is an RMS norm"):
        moved_norm_forward(stream, None, weight, None, 1e-5, keep=True)
    mean = torch.zeros(6, device=DEVICE)
    with pytest.raises(ConfigError, match=r"moved_at has shape \(5,\); wanted \(6,\)"):
        moved_norm_backward(stream, None, stream, weight, mean, mean, moved_at=order[:5])


# -- rows that end ---------------------------------------------------------------------------------------------------


def ending(
    rows: int, last: int, width: int, depth: int, probes: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """All that a call with ``last`` rows that end can take, and the weight of the product that is not done for them."""
    given = {"stream": draw(rows, width, dtype=dtype) + 1, "branch": draw(rows - last, width, dtype=HALF, seed=1)}
    given |= dict(zip(("weight", "bias"), parameters(width), strict=True))
    given |= {"probe": draw(probes, width, seed=2), "hidden": draw(last, depth, dtype=dtype, seed=3)}
    given["product"] = draw(width, depth, seed=4, scale=depth**-0.5)
    given["offset"] = draw(width, dtype=dtype, seed=6)
    wide = torch.promote_types(dtype, torch.float32)
    given["through"] = (given["probe"].to(wide) @ given["product"].to(wide)).contiguous()
    return given


def call_ending(given: dict[str, Tensor], impl: str = "triton", **changes: Any) -> tuple[Tensor | None, ...]:
    """``branch`` and ``offset`` may be changed to None."""
    given = {**given, **changes}
    ended = given["hidden"], given["through"], given["offset"]
    return moved_norm_forward(
        *(given["stream"], given["branch"], given["weight"], given.get("bias"), 1e-5),
        normed_at=given.get("normed_at"), probe=given["probe"], ended=ended, impl=impl,
    )  # fmt: skip


def products_of_ended(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """By the definition in float64, and the size of what is summed up in them."""
    last, probe, through = len(given["hidden"]), given["probe"].double(), given["through"].double()
    row, hidden = given["stream"][len(given["stream"]) - last :].double(), given["hidden"].double()
    offset = 0 if given["offset"] is None else given["offset"].double()
    sizes = (row.abs() + abs(offset)) @ probe.abs().T + hidden.abs() @ through.abs().T
    return (row + offset) @ probe.T + hidden @ through.T, sizes


@pytest.mark.parametrize("with_offset", [True, False])
@pytest.mark.parametrize("with_branch", [True, False])
@pytest.mark.parametrize("normed_at", [True, False])
@pytest.mark.parametrize(("rows", "last"), [(9, 4), (9, 0), (9, 9)])
def test_rows_that_end_are_told_apart_by_what_their_product_reads(
    rows: int, last: int, normed_at: bool, with_branch: bool, with_offset: bool
) -> None:
    """In float64: as if the product were done, and its rows stood behind the branch's."""
    drawn = ending(rows, last, 12, 20, 3, torch.float64)
    given = {name: each.double() for name, each in drawn.items()}
    given["through"] = given["probe"] @ given["product"]
    given |= {} if with_offset else {"offset": None}
    given |= {"normed_at": order_of(rows)} if normed_at else {}
    added = given["hidden"] @ given["product"].T + (given["offset"] if with_offset else 0)
    branch = torch.cat([given["branch"] if with_branch else torch.zeros_like(given["branch"]), added])
    whole = moved_norm_forward(
        *(given["stream"], branch, given["weight"], given["bias"], 1e-5),
        normed_at=given.get("normed_at"), probe=given["probe"],
    )  # fmt: skip
    found = call_ending(given, "reference", **({} if with_branch else {"branch": None}))
    before = rows - last
    places = given["normed_at"][:before] if normed_at else slice(before)
    torch.testing.assert_close(found[5], whole[5], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[5][before:], products_of_ended(given)[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1][places], whole[1][places], rtol=1e-12, atol=1e-12)
    for one, other in zip((found[0], *found[2:5]), (whole[0], *whole[2:5]), strict=True):
        torch.testing.assert_close(one[:before], other[:before], rtol=1e-12, atol=1e-12)


def check_ending(given: dict[str, Tensor], **changes: Any) -> tuple[Tensor | None, ...]:
    """The products of rows that end are near those of the definition; all else is as without them, or unwritten."""
    given = {**given, **changes}
    rows, last, width = len(given["stream"]), len(given["hidden"]), given["stream"].shape[1]
    before, depth, order = rows - last, given["hidden"].shape[1], given.get("normed_at")
    found = call_ending(given)
    wanted, sizes = products_of_ended(given)
    assert found[5].dtype == torch.float32
    assert found[5].shape == (rows, len(given["probe"]))
    # Two sums, and one of both; the offset is added to the row first.
    terms = 2 * (width**0.5 + depth**0.5 + 2)
    assert ((found[5][before:] - wanted).abs() <= terms * 2**-24 * sizes).all()
    plain = call_ending(given, "reference")
    assert ((plain[5][before:] - wanted).abs() <= terms * 2**-24 * sizes).all()

    # The order of the rows that stay, among themselves.
    alone = None if order is None else order[:before].argsort().argsort()
    kept = moved_norm_forward(
        *(given["stream"][:before], given["branch"], given["weight"], given["bias"], 1e-5),
        normed_at=alone, probe=given["probe"], impl="triton",
    )  # fmt: skip
    total, normed, saved, mean, rstd, probed = found
    places = slice(before) if order is None else order[:before]
    own = slice(before) if alone is None else alone
    assert_bits_equal(normed[places], kept[1][own], "normed")
    for one, other, name in zip((mean, rstd, probed), kept[3:], ("mean", "rstd", "probed"), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_bits_equal(one[:before], other, name)
    assert saved is total
    if given["branch"] is None:
        assert total is given["stream"]
    else:
        assert_bits_equal(total[:before], kept[0], "total")
        assert total[before:].isnan().all()
    left = slice(before, None) if order is None else order[before:]
    assert normed[left].isnan().all()
    for each in (mean, rstd):
        assert each is None or each[before:].isnan().all()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("probes", [1, 2, 5])
@pytest.mark.parametrize("depth", [20, 300, 4100])
def test_rows_that_end_have_products_alone(depth: int, probes: int, dtype: torch.dtype) -> None:
    for width in (20, 300):
        given = ending(9, 4, width, depth, probes, dtype)
        check_ending(given)
        check_ending(given, normed_at=order_of(9))
        check_ending(given, branch=None, offset=None, bias=None, normed_at=order_of(9))


def test_rows_that_end_are_many_tiles_of_either_kind() -> None:
    """More rows than a program takes, and a row of more columns and of more to read than a tile has."""
    for rows, last, width, depth in ((150, 70, 20, 20), (7, 5, 1100, 5000), (5, 3, 1, 1)):
        check_ending(ending(rows, last, width, depth, 2), normed_at=order_of(rows))
        check_ending(ending(rows, last, width, depth, 2, HALF), branch=None)


def test_a_thread_holds_few_columns_of_rows_that_end() -> None:
    """Few numbers to read of a wide row are no reason for many rows at once."""
    for width in (1, 20, 128, 512, 1000, 1024, 4096, MAX_WIDTH):
        norm = norm_tile(width)
        for depth in (0, 1, 16, 20, 1024, 4096, 5000, 65536):
            tile = ended_tile(depth, norm)
            assert tile.rows >= 1
            assert tile.warps == norm.warps
            assert tile.rows * max(tile.block, norm.block) <= 32 * 32 * tile.warps
    # As in a tower, where at least as many numbers are read as a row has.
    assert [ended_tile(4 * width, norm_tile(width)).rows for width in (128, 256, 512, 1024)] == [2, 1, 1, 1]


@pytest.mark.parametrize("last", [0, 7])
@pytest.mark.parametrize("with_branch", [True, False])
@pytest.mark.parametrize("with_offset", [True, False])
def test_no_row_or_every_row_may_end(last: int, with_branch: bool, with_offset: bool) -> None:
    given = ending(7, last, 20, 40, 2)
    changes = ({} if with_branch else {"branch": None}) | ({} if with_offset else {"offset": None})
    check_ending(given, **changes)
    check_ending(given, **changes, normed_at=order_of(7))


def test_of_rows_that_end_nothing_but_products_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison of another kind, to see bits that stay; the caller's tensors too are as they were."""
    given = ending(9, 4, 20, 40, 2) | {"normed_at": order_of(9)}
    before = {name: each.clone() for name, each in given.items()}
    filled = []
    monkeypatch.setattr(
        "epic_fast.testing.numerics._fill_with_poison", lambda tensor: filled.append(tensor.fill_(7.25))
    )
    total, normed, _, mean, rstd, probed = call_ending(given)
    assert {each.data_ptr() for each in (total, normed, mean, rstd, probed)} <= {each.data_ptr() for each in filled}
    for each in (total, mean, rstd):
        assert (each[5:] == 7.25).all()
        assert (each[:5] != 7.25).all()
    assert (normed[given["normed_at"][5:]] == 7.25).all()
    assert (normed[given["normed_at"][:5]] != 7.25).all()
    assert (probed != 7.25).all()
    for name, each in before.items():
        assert_bits_equal(given[name], each, name)


def test_what_rows_that_end_read_may_lie_anywhere() -> None:
    """The last rows of a matrix, as a block has them; a part of its columns; and memory that starts at an odd place."""
    for dtype, depth in ((torch.float32, 40), (HALF, 41), (HALF, 4100)):
        given = ending(9, 4, 20, depth, 3, dtype)
        wanted = call_ending(given)
        joined = torch.full((9, depth), math.nan, device=DEVICE, dtype=dtype)
        joined[5:] = given["hidden"]
        wide = torch.full((4, depth + 6), math.nan, device=DEVICE, dtype=dtype)
        wide[:, 3 : 3 + depth] = given["hidden"]
        odd = torch.full((4 * depth + 1,), math.nan, device=DEVICE, dtype=dtype)
        odd[1:] = given["hidden"].flatten()
        turned = given["hidden"].T.contiguous().T
        first = joined.flip(0)
        first[:4] = given["hidden"]
        for hidden in (joined[5:], first[:4], wide[:, 3 : 3 + depth], odd[1:].view(4, depth), turned):
            assert_bits_equal(call_ending(given, hidden=hidden), wanted)
        columns = torch.full((20, 2), math.nan, device=DEVICE, dtype=dtype)
        columns[:, 1] = given["offset"]
        rows = torch.full((9, 27), math.nan, device=DEVICE, dtype=dtype)
        rows[:, 1:21] = given["stream"]
        through = given["through"].T.contiguous().T
        assert_bits_equal(
            call_ending(given, stream=rows[:, 1:21], offset=columns[:, 1], through=through), wanted, "the others"
        )


@pytest.mark.parametrize("depth", [40, 4100])
def test_bits_of_a_row_that_ends_depend_on_no_other(depth: int) -> None:
    given = ending(14, 9, 72, depth, 2, HALF)
    wanted = call_ending(given)[5][5:]
    assert_bits_equal(call_ending(given)[5][5:], wanted, "again")
    for fewer in (1, 2, 8):
        some_rows = {"stream": given["stream"][: 5 + fewer], "hidden": given["hidden"][:fewer]}
        assert_bits_equal(call_ending(given, **some_rows)[5][5:], wanted[:fewer], f"{fewer} rows")
        alone = {"stream": given["stream"][14 - fewer :], "hidden": given["hidden"][9 - fewer :], "branch": None}
        assert_bits_equal(call_ending(given, **alone)[5], wanted[9 - fewer :], f"the last {fewer} alone")
    torn = given["hidden"].clone()
    torn[3] = math.nan
    found = call_ending(given, hidden=torn)[5]
    assert found[8].isnan().all()
    others = [0, 1, 2, 4, 5, 6, 7, 8]
    assert_bits_equal(found[5:][others], wanted[others], "beside NaN")


def test_probe_and_through_may_differ_from_each_other() -> None:
    """Nothing ties one to the other: each number of a row has its own two vectors."""
    given = ending(6, 3, 20, 30, 5)
    given["through"] = draw(5, 30, seed=11)
    check_ending(given)
    swapped = check_ending(given, through=given["through"].flip(0), probe=given["probe"].flip(0))
    assert_bits_equal(swapped[5].flip(1), call_ending(given)[5])


@pytest.mark.parametrize("with_branch", [True, False])
@pytest.mark.parametrize("with_offset", [True, False])
@pytest.mark.parametrize("last", [2, 0])
def test_the_operator_of_rows_that_end_is_what_it_says(last: int, with_offset: bool, with_branch: bool) -> None:
    given = ending(6, last, 20, 24, 2)
    branch = given["branch"] if with_branch else None
    arguments = (
        *(given["stream"], branch, given["weight"], given["bias"], 1e-5, None, order_of(6), given["probe"]),
        *(given["hidden"], given["through"], given["offset"] if with_offset else None, None, False),
    )
    # What dispatch traces is compared by value, and what is left unwritten has none.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(residual_norm.MOVED, arguments, test_utils=tests[:3] if last else tests)


def test_rows_that_end_under_autocast_are_not_rounded() -> None:
    given = ending(6, 3, 20, 40, 2)
    for impl in ("reference", "triton"):
        wanted = call_ending(given, impl)[5]
        with torch.autocast(DEVICE, torch.bfloat16):
            assert_bits_equal(call_ending(given, impl)[5], wanted, impl)


def test_what_does_not_fit_rows_that_end_is_said() -> None:
    given, order = ending(6, 2, 20, 24, 3), order_of(6)
    stream, branch, weight, bias, probe = (given[name] for name in ("stream", "branch", "weight", "bias", "probe"))
    hidden, through, offset = (given[name] for name in ("hidden", "through", "offset"))

    def call(
        hidden: Tensor, through: Tensor, offset: Tensor | None, branch: Tensor | None = branch, **options: Any
    ) -> Any:
        options = {"probe": probe, **options}
        return moved_norm_forward(stream, branch, weight, bias, 1e-5, ended=(hidden, through, offset), **options)

    together = "^moved_norm_forward: ended goes with a probe, without branch_at and without keep$"
    for options in ({"probe": None}, {"branch_at": order}, {"keep": True}):
        with pytest.raises(ConfigError, match=together):
            call(hidden, through, offset, **options)
    for wrong, shape in ((hidden[0], r"\(24,\)"), (hidden[None], r"\(1, 2, 24\)"), (draw(7, 24), r"\(7, 24\)")):
        with pytest.raises(
            ConfigError,
            match=rf"ended's hidden rows have shape {shape}; wanted \(S, K\), at most 6 rows, as the stream has",
        ):
            call(wrong, through, offset)
    for wrong, shape in ((through[:2], r"\(2, 24\)"), (through[:, 1:], r"\(3, 23\)"), (through[0], r"\(24,\)")):
        with pytest.raises(
            ConfigError, match=rf"through has shape {shape}; wanted \(3, 24\) for rows of shape \(6, 20\)"
        ):
            call(hidden, wrong, offset)
    for wrong, shape in ((offset[1:], r"\(19,\)"), (offset[None], r"\(1, 20\)")):
        with pytest.raises(ConfigError, match=rf"offset has shape {shape}; wanted \(20,\)"):
            call(hidden, through, wrong)
    for number, name in enumerate(("hidden", "through", "offset")):
        far = [each.to("meta") if index == number else each for index, each in enumerate((hidden, through, offset))]
        with pytest.raises(ConfigError, match=f"{name} is on meta; wanted {stream.device}, as the rows are"):
            call(*far)
    with pytest.raises(ConfigError, match=r"through is torch.float16; wanted torch.float32"):
        call(hidden, through.half(), offset)
    with pytest.raises(ConfigError, match=r"through is torch.float64; wanted torch.float32"):
        call(hidden, through.double(), offset)
    wide = {name: each.double() for name, each in given.items()}
    with pytest.raises(ConfigError, match=r"through is torch.float32; wanted torch.float64"):
        call_ending(wide, "auto", through=through)
    with pytest.raises(ConfigError, match=r"branch has shape \(6, 20\); wanted \(4, 20\)"):
        call(hidden, through, offset, branch=stream)
    with pytest.raises(ConfigError, match=r"normed_at has shape \(4,\); wanted \(6,\)"):
        call(hidden, through, offset, normed_at=order[:4])


@pytest.mark.parametrize(("found", "able"), [((8, 0), False), ((8, 9), True), ((9, 0), True), (None, True)])
def test_fp8_needs_a_card_that_has_it(monkeypatch: pytest.MonkeyPatch, found: Any, able: bool) -> None:
    monkeypatch.setattr(library, "capability", lambda index: found)
    said = residual_norm.no_fp8("fp8", draw(1))
    assert (said == "") == able
    assert able or "8.0; fp8 needs 8.9; take int8" in said
    assert residual_norm.no_fp8("int8", draw(1)) == ""


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width"), [(2120, 1024), (5440, 768), (300, 4096), (77, 5000)])
@pytest.mark.parametrize("stream_type", [torch.bfloat16, torch.float32])
def test_shapes_of_a_tower(rows: int, width: int, stream_type: torch.dtype) -> None:
    stream, branch = draw(rows, width, dtype=stream_type), draw(rows, width, dtype=torch.bfloat16, seed=1)
    weight, bias = parameters(width, torch.bfloat16)
    want = definition(*(each.double() for each in (stream, branch, weight, bias)), 1e-5)
    theirs = eager(stream, branch, weight, bias, 1e-5, torch.bfloat16)
    got = forward(stream, branch, weight, bias, 1e-5)
    for index in range(2):
        budget(
            got[index],
            want[index],
            theirs[index],
            factor=OUTPUT_FACTOR,
            dtype=got[index].dtype,
            reduction=width,
            name=("total", "normed")[index],
        )
    assert_bits_equal(forward(stream, branch, weight, bias, 1e-5), got)
    plain = forward(stream, branch, weight, bias, 1e-5, normed_dtype=torch.float32)[1]
    for kind in EIGHT_BIT:
        _, data, _, _, scale = forward(stream, branch, weight, bias, 1e-5, eight_bit=kind)
        assert_quantised(data, scale, plain, kind)


# -- rows kept in 8 bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("with_branch", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_rows_kept_in_eight_bits(impl: str, dtype: torch.dtype, with_branch: bool, in_place: bool) -> None:
    width, rows = 200, (2, 7)
    stream = draw(*rows, width).to(dtype)
    stream[0, 0, 3] = 40.0  # as the few columns of a vision tower that are far larger than the others
    branch = draw(*rows, width, seed=1).to(dtype) if with_branch else None
    weight, bias = parameters(width)
    total, normed, mean, rstd, _ = residual_norm_forward(stream, branch, weight, bias, 1e-5, impl=impl)
    given = stream.clone()
    found, same, data, step, inverse, scale = residual_norm_forward_kept(
        given, branch, weight, bias, 1e-5, in_place=in_place, impl=impl
    )
    assert_bits_equal((found, same, inverse), (total, normed, rstd))
    assert scale is None
    assert (found.data_ptr() == given.data_ptr()) == (in_place or not with_branch)
    column = (*rows, 1)
    exact = (total.float() - mean.view(column)) * rstd.view(column)
    assert data.dtype == torch.int8
    assert bool(((data * step.view(column) - exact).abs() <= 0.501 * step.view(column)).all())
    grads = draw(*rows, width, seed=2).to(dtype), draw(*rows, width, seed=3).to(dtype)
    for grad_total in (None, grads[1]):
        wanted = residual_norm_backward(grads[0], grad_total, total, weight, mean, rstd, impl=impl)
        got = residual_norm_backward(grads[0], grad_total, data, weight, step, rstd, impl=impl)
        assert got.dtype == dtype
        # Half of what bfloat16 rounds by.
        assert float((got.float() - wanted.float()).norm() / wanted.float().norm()) <= 2.0**-10
        wide = residual_norm_backward(
            grads[0], grad_total, data, weight, step, rstd, grad_dtype=torch.float32, impl=impl
        )
        assert wide.dtype == torch.float32


def test_kept_rows_of_kernel_and_reference_agree_and_show_what_is_not_finite() -> None:
    stream, (weight, bias) = draw(6, 40), parameters(40)
    stream[2, 5], stream[3, 0] = float("nan"), float("inf")
    found, wanted = (
        residual_norm_forward_kept(stream, None, weight, bias, 1e-5, impl=impl) for impl in ("triton", "reference")
    )
    finite = [0, 1, 4, 5]
    assert int((found[2][finite].int() - wanted[2][finite].int()).abs().max()) <= 1
    assert torch.allclose(found[3][finite], wanted[3][finite], rtol=1e-5)
    for data, step, rstd in (found[2:5], wanted[2:5]):
        assert bool(step[[2, 3]].isnan().all())
        grad = residual_norm_backward(stream.new_ones(6, 40), None, data, weight, step, rstd)
        assert bool(grad[[2, 3]].isnan().any(dim=1).all())
        assert bool(grad[finite].isfinite().all())


@pytest.mark.parametrize("with_branch", [False, True])
def test_the_operators_that_keep_are_what_they_say(with_branch: bool) -> None:
    stream, branch, weight, bias = draw(2, 3, 20), draw(2, 3, 20, dtype=HALF, seed=1), *parameters(20)
    rest = (weight, bias, 1e-5, HALF, None)
    torch.library.opcheck(residual_norm.KEPT, (stream, branch if with_branch else None, *rest))
    if with_branch:
        torch.library.opcheck(residual_norm.KEPT_IN_PLACE, (stream, branch, *rest))
    _, _, data, step, rstd, _ = residual_norm_forward_kept(stream, None, weight, bias, 1e-5, impl="triton")
    torch.library.opcheck(residual_norm.BACKWARD, (stream.half(), None, data, weight, step, rstd, torch.float32))
