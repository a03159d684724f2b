"""The activations: the specification, the kernels (in the interpreter without a GPU) and the operations."""

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
from torch.nn.functional import gelu

pytest.importorskip("triton")

from epic_fast.errors import ConfigError, ImplementationError
from epic_fast.kernels.activation import reference, triton_kernels
from epic_fast.kernels.activation.reference import ACTIVATIONS, KEEPS, decode_derivative, encode_derivative
from epic_fast.kernels.activation.tiles import MAX_QUANTISED_WIDTH, activation_tile
from epic_fast.kernels.common.eight_bit import SMALLEST_SCALE, quantise_rows
from epic_fast.ops import activation, library
from epic_fast.ops.activation import activation_backward, activation_backward_8bit, activation_forward
from epic_fast.testing.numerics import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_bits_equal, budget, poisoned_empty

forward, backward = triton_kernels.activation_forward, triton_kernels.activation_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
EIGHT_BIT = ("fp8", "int8")
# Half a step of the derivative's codes, and what float32 adds.
HALF_STEP = 0.5 / reference.DERIVATIVE_STEPS + 1e-6

DEFINITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "gelu": lambda x: x * torch.special.ndtr(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}
EAGER: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
}


@pytest.fixture(autouse=True)
def nothing_is_left_unwritten() -> Iterator[None]:
    with poisoned_empty():
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 2.0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=random)).to(DEVICE, dtype)


def slope(kind: str, x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(DEFINITIONS[kind](leaf).sum(), leaf)[0]


def test_gelu_in_float32_keeps_its_digits_in_the_tail() -> None:
    x = torch.linspace(-9, 9, 40001, device=DEVICE)
    wanted = DEFINITIONS["gelu"](x.double())
    found = forward(x[None], "gelu", keep="none")[0][0].double()
    assert (found - wanted).abs().max() < 8e-7
    # Where 1 + erf(x) has few digits, and from -5.6 on none.
    near = x >= -6
    assert ((found - wanted).abs() <= 4e-6 * wanted.abs())[near].all()
    assert forward(torch.full((1, 1), math.nan, device=DEVICE), "gelu", keep="none")[0].isnan().all()
    ends = torch.tensor([[math.inf, -math.inf]], device=DEVICE)
    torch.testing.assert_close(forward(ends, "gelu", keep="none")[0], DEFINITIONS["gelu"](ends), equal_nan=True)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_specification_is_the_definition_and_its_derivative(kind: str) -> None:
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    torch.testing.assert_close(reference.activation(x, kind), DEFINITIONS[kind](x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reference.derivative(x, kind), slope(kind, x), rtol=1e-12, atol=1e-12)
    assert (reference.derivative(x.float(), kind) - slope(kind, x)).abs().max() < 3e-6


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_eight_bits_hold_every_derivative(kind: str) -> None:
    wanted = slope(kind, torch.linspace(-12, 12, 100001, dtype=torch.float64))
    assert (decode_derivative(encode_derivative(wanted), torch.float64) - wanted).abs().max() <= HALF_STEP
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(decode_derivative(encode_derivative(ends)), ends)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@given(
    rows=some.integers(1, 5),
    width=some.integers(1, 300),
    dtype=some.sampled_from([torch.float32, HALF]),
    scale=some.sampled_from([0.1, 2.0, 20.0]),
)
def test_within_the_budget(kind: str, rows: int, width: int, dtype: torch.dtype, scale: float) -> None:
    pre, grad = draw(rows, width, dtype=dtype, scale=scale), draw(rows, width, dtype=dtype, seed=1)
    want, leaf = DEFINITIONS[kind](pre.double()), pre.clone().requires_grad_()
    theirs = EAGER[kind](leaf)
    settings: dict[str, Any] = {"dtype": dtype, "reduction": 1}
    output, kept, scales = forward(pre, kind, keep="full")
    assert kept is pre
    assert scales is None
    budget(output, want, theirs, factor=OUTPUT_FACTOR, name="output", **settings)
    wanted = grad.double() * slope(kind, pre.double())
    theirs = torch.autograd.grad(theirs, leaf, grad)[0]
    found = backward(grad, kept, kind, "full")
    budget(found, wanted, theirs, factor=GRADIENT_FACTOR, name="gradient", operands=4.0, **settings)

    again, codes, _ = forward(pre, kind, keep="eight_bit")
    assert codes.dtype == torch.uint8
    assert_bits_equal(again, output)
    coded = backward(grad, codes, kind, "eight_bit")
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps * wanted.abs()
    assert ((coded.double() - wanted).abs() <= HALF_STEP * grad.double().abs() + rounding).all()
    assert_bits_equal(coded, reference.activation_backward(grad, codes, kind, "eight_bit"))
    nothing = forward(pre, kind, keep="none")
    assert_bits_equal(nothing, (output, None, None))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_where_the_activation_saturates(kind: str) -> None:
    pre = torch.tensor([[-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4]], device=DEVICE)
    output, codes, _ = forward(pre, kind, keep="eight_bit")
    torch.testing.assert_close(output, pre.clamp_min(0), rtol=0, atol=1e-6)
    ends = torch.tensor([[0.0, 0, 0, 0.5, 1, 1, 1]], device=DEVICE)
    assert torch.equal(backward(torch.ones_like(pre), codes, kind, "eight_bit"), ends)
    torch.testing.assert_close(backward(torch.ones_like(pre), pre, kind, "full"), ends, rtol=0, atol=1e-6)
    for eight_bit in (None, *EIGHT_BIT):
        found, _, scale = forward(
            pre.new_tensor([[math.nan, 1.0, 2.0], [1, 2, 3]]), kind, keep="none", eight_bit=eight_bit
        )
        values = found.float() * (1 if scale is None else scale[:, None])
        assert values[0, 0].isnan()
        assert values[1].isfinite().all()
        assert scale is None or (scale[0].isnan() and values[0].isnan().all())
        found, _, scale = forward(pre.new_tensor([[math.inf, 1.0, 2.0]]), kind, keep="none", eight_bit=eight_bit)
        assert not (found.float() * (1 if scale is None else scale[:, None]))[0, 0].isfinite()


@pytest.mark.parametrize("eight_bit", EIGHT_BIT)
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("width", [3, 72, 300])
def test_eight_bits_are_those_of_the_specification(width: int, keep: str, eight_bit: str) -> None:
    pre = draw(4, width)
    pre[2] = 0
    values, kept, _ = forward(pre, "gelu", keep=keep)
    data, found, scale = forward(pre, "gelu", keep=keep, eight_bit=eight_bit)
    assert_bits_equal(found, kept)
    assert scale.shape == (4,)
    assert scale[2] == SMALLEST_SCALE
    wanted, wanted_scale = quantise_rows(values, eight_bit)
    assert_bits_equal(scale, wanted_scale)
    scaled = values / scale[:, None]
    if eight_bit == "fp8":
        same = data.view(torch.uint8) == wanted.view(torch.uint8)
        if library.interpreting():
            # Triton's interpreter (3.6 to 3.9) halves what fp8 rounds up to a power of two, and cuts subnormals off.
            small = (scaled.abs() < 2**-6) & ((data.float() - scaled).abs() <= 2**-9)
            same |= small | (scaled.frexp().exponent < wanted.float().frexp().exponent)
        assert same.all()
    else:
        # A GPU rounds value * inverse + offset once, which decides a tie between two integers the other way.
        assert (data.int() - wanted.int()).abs().max() <= (0 if library.interpreting() else 1)
        assert ((data.float() - scaled).abs() <= 0.5001).all()


@pytest.mark.parametrize("width", [48, 21])
@pytest.mark.parametrize("keep", ["full", "eight_bit"])
def test_rows_may_lie_anywhere_and_depend_on_no_other(width: int, keep: str) -> None:
    pre, grad = draw(2, 5, width), draw(2, 5, width, seed=1)
    output, kept, _ = forward(pre, "quick_gelu", keep=keep)
    found = backward(grad, kept, "quick_gelu", keep)

    def layouts(values: Tensor) -> list[Tensor]:
        wide = values.new_zeros(2, 9, width + 16)
        views = [wide.clone()[:, :5, :width], wide.clone()[:, 4:, 1 : width + 1], values.new_zeros(2, width, 5).mT]
        for each in views:
            each.copy_(values)
        return views

    for x, g, k in zip(layouts(pre), layouts(grad), layouts(kept), strict=True):
        assert_bits_equal(forward(x, "quick_gelu", keep=keep)[0], output)
        assert_bits_equal(backward(g, k, "quick_gelu", keep), found)
        assert_bits_equal(backward(grad, k, "quick_gelu", keep), found)
    for eight_bit in (None, *EIGHT_BIT):
        together = forward(pre[0], "quick_gelu", keep=keep, eight_bit=eight_bit)
        for row in range(5):
            one = slice(row, row + 1)
            alone = forward(pre[0, one], "quick_gelu", keep=keep, eight_bit=eight_bit)
            assert_bits_equal(alone, [None if each is None else each[one] for each in together])


def test_several_blocks_of_columns() -> None:
    width = 2 * activation_tile(5000, False).block + 7
    pre, grad = draw(2, width), draw(2, width, seed=1)
    output, codes, _ = forward(pre, "gelu", keep="eight_bit")
    torch.testing.assert_close(output, gelu(pre), rtol=1e-5, atol=1e-6)
    assert_bits_equal(codes, encode_derivative(reference.derivative(pre, "gelu")))
    assert_bits_equal(
        backward(grad, codes, "gelu", "eight_bit"), reference.activation_backward(grad, codes, "gelu", "eight_bit")
    )
    whole = forward(pre, "gelu", keep="none", eight_bit="int8")
    wanted = quantise_rows(output, "int8")
    assert_bits_equal(whole[2], wanted[1])


def test_no_rows() -> None:
    pre = draw(0, 8)
    output, kept, scale = forward(pre, "gelu", keep="eight_bit", eight_bit="fp8")
    assert output.shape == kept.shape == (0, 8)
    assert scale.shape == (0,)
    assert backward(pre, kept, "gelu", "eight_bit").shape == (0, 8)


# -- operations


@pytest.mark.parametrize("eight_bit", [None, *EIGHT_BIT])
@pytest.mark.parametrize("coded", [False, True])
def test_operators_are_what_they_say(coded: bool, eight_bit: str | None) -> None:
    # What dispatch traces is compared by value, which PyTorch cannot do in fp8.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    tests = tests[:3] if eight_bit == "fp8" else tests
    pre = draw(3, 20)
    torch.library.opcheck(activation.FORWARD, (pre, "gelu", coded, eight_bit), test_utils=tests)
    kept = encode_derivative(reference.derivative(pre, "gelu")) if coded else pre
    torch.library.opcheck(activation.BACKWARD, (pre, kept, "gelu", "eight_bit" if coded else "full"))
    if eight_bit is not None:
        given = (pre, kept, "gelu", "eight_bit" if coded else "full", eight_bit)
        torch.library.opcheck(activation.BACKWARD_8BIT, given, test_utils=tests)


@pytest.mark.parametrize("eight_bit", EIGHT_BIT)
@pytest.mark.parametrize("keep", ["full", "eight_bit"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("width", [20, 64])
def test_a_gradient_in_8_bits(kind: str, keep: str, eight_bit: str, width: int) -> None:
    pre, grad = draw(7, width, seed=2), draw(7, width, seed=3)
    grad[3] *= 1e-3
    grad[4] = 0
    _, kept, _ = forward(pre, kind, keep=keep)
    wanted = backward(grad, kept, kind, keep).double()
    data, scale = activation_backward_8bit(grad, kept, kind, keep, eight_bit, impl="triton")
    assert data.shape == grad.shape
    assert scale.shape == (7,)
    largest = wanted.abs().amax(-1)
    torch.testing.assert_close(
        scale[:4].double() * {"fp8": 448, "int8": 127}[eight_bit], largest[:4], rtol=1e-5, atol=0
    )
    error = (data.double() * scale.double()[:, None] - wanted).abs()
    # Half a step of the largest; Triton's interpreter halves what fp8 rounds up to a power of two.
    if eight_bit == "int8" or DEVICE == "cuda":
        assert (error.amax(-1) <= largest * {"fp8": 1 / 28, "int8": 0.51 / 127}[eight_bit] + 1e-30).all()
    else:
        assert ((error <= wanted.abs() / 16 + largest[:, None] * 2.0**-14).double().mean() > 0.9).all()
    assert not data[4].double().any()
    if eight_bit == "int8":
        theirs = reference.activation_backward_8bit(grad, kept, kind, keep, eight_bit)
        torch.testing.assert_close(scale, theirs[1], rtol=1e-5, atol=0)
        assert (data.int() - theirs[0].int()).abs().max() <= 1
    grad[2, 1] = float("nan")
    _, scale = activation_backward_8bit(grad, kept, kind, keep, eight_bit, impl="triton")
    assert scale.isnan().tolist() == [False, False, True, False, False, False, False]


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
@pytest.mark.parametrize("keep", ["full", "eight_bit"])
@pytest.mark.parametrize("eight_bit", [None, "int8"])
def test_compiled_whole_without_another_compilation(impl: str, keep: str, eight_bit: str | None) -> None:
    torch._dynamo.reset()

    def plain(pre: Tensor, grad: Tensor) -> Any:
        output, kept, scale = activation_forward(pre, "quick_gelu", keep=keep, eight_bit=eight_bit, impl=impl)
        return output, kept, scale, activation_backward(grad, kept, "quick_gelu", keep, impl=impl)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(plain, backend=counter, fullgraph=True)
    for rows in (3, 5, 6):
        given = draw(rows, 20), draw(rows, 20, seed=1)
        assert_bits_equal(compiled(*given), plain(*given))
    assert counter.frame_count <= 2


def test_which_implementation_is_taken() -> None:
    pre = draw(3, 20)
    assert_bits_equal(
        activation_forward(pre, "gelu", keep="eight_bit", impl="triton"), forward(pre, "gelu", keep="eight_bit")
    )
    if DEVICE == "cpu":
        wanted = reference.activation_forward(pre, "gelu", keep="eight_bit")
        assert_bits_equal(activation_forward(pre, "gelu", keep="eight_bit"), wanted)
    with pytest.raises(ImplementationError, match="float64; the kernel takes"):
        activation_forward(pre.double(), "gelu", keep="none", impl="triton")
    assert activation_forward(pre.double(), "gelu", keep="none")[0].dtype == torch.float64
    wide = torch.zeros(1, MAX_QUANTISED_WIDTH + 1, device=DEVICE)
    with pytest.raises(ImplementationError, match=f"quantises rows of up to {MAX_QUANTISED_WIDTH}"):
        activation_forward(wide, "gelu", keep="none", eight_bit="int8", impl="triton")


def test_what_does_not_exist_is_said() -> None:
    pre = draw(3, 20)
    with pytest.raises(ConfigError, match="kind='relu' is not one of 'quick_gelu', 'gelu', 'gelu_tanh'"):
        activation_forward(pre, "relu", keep="none")
    with pytest.raises(ConfigError, match="keep='some' is not one of 'none', 'full', 'eight_bit'"):
        activation_forward(pre, "gelu", keep="some")
    with pytest.raises(ConfigError, match="eight_bit='fp4' is not one of None, 'fp8', 'int8'"):
        activation_forward(pre, "gelu", keep="none", eight_bit="fp4")
    with pytest.raises(ConfigError, match="activation_backward_8bit: eight_bit='fp4' is not one of 'fp8', 'int8'"):
        activation_backward_8bit(pre, pre, "gelu", "full", "fp4")
    with pytest.raises(ConfigError, match=r"_8bit: kept is torch.float32; keep='eight_bit' wants uint8"):
        activation_backward_8bit(pre, pre, "gelu", "eight_bit", "fp8")
    with pytest.raises(ConfigError, match="keep='none' is not one of 'full', 'eight_bit'"):
        activation_backward(pre, pre, "gelu", "none")
    with pytest.raises(ConfigError, match=r"kept has shape \(2, 20\); wanted \(3, 20\)"):
        activation_backward(pre, pre[1:], "gelu", "full")
    with pytest.raises(ConfigError, match=r"kept is torch.float32; keep='eight_bit' wants uint8"):
        activation_backward(pre, pre, "gelu", "eight_bit")
    with pytest.raises(ConfigError, match=r"kept is torch.uint8; keep='full' wants the type of the pre-activation"):
        activation_backward(pre, pre.to(torch.uint8), "gelu", "full")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(2120, 4096), (680, 3072), (77, 5000)])
def test_shapes_of_a_tower(rows: int, width: int, kind: str) -> None:
    pre, grad = draw(rows, width, dtype=torch.bfloat16), draw(rows, width, dtype=torch.bfloat16, seed=1)
    leaf = pre.clone().requires_grad_()
    theirs = EAGER[kind](leaf)
    output, codes, _ = forward(pre, kind, keep="eight_bit")
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "reduction": 1}
    budget(output, DEFINITIONS[kind](pre.double()), theirs, factor=OUTPUT_FACTOR, name="output", **settings)
    wanted = slope(kind, pre.double())
    assert (decode_derivative(codes).double() - wanted).abs().max() <= HALF_STEP
    theirs = torch.autograd.grad(theirs, leaf, grad)[0]
    found = backward(grad, pre, kind, "full")
    budget(found, grad.double() * wanted, theirs, factor=GRADIENT_FACTOR, name="gradient", operands=4.0, **settings)
    assert_bits_equal(forward(pre, kind, keep="eight_bit"), (output, codes, None))
    for eight_bit in EIGHT_BIT:
        data, _, scale = forward(pre, kind, keep="none", eight_bit=eight_bit)
        largest = DEFINITIONS[kind](pre.double()).abs().amax(-1)
        torch.testing.assert_close(scale.double() * {"fp8": 448, "int8": 127}[eight_bit], largest, rtol=1e-5, atol=0)
        error = (data.double() * scale.double()[:, None] - DEFINITIONS[kind](pre.double())).abs().amax(-1)
        assert (error <= largest * {"fp8": (1 + 2**-12) / 28, "int8": 0.51 / 127}[eight_bit]).all()
