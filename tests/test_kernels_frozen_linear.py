"""Products with frozen weights: the specification, the kernels (in the interpreter without a GPU), the operations."""

# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

pytest.importorskip("triton")

from epic_fast.errors import ConfigError, ImplementationError
from epic_fast.kernels.activation.reference import (
    ACTIVATIONS,
    DERIVATIVE_STEPS,
    KEEPS,
    decode_derivative,
    derivative,
)
from epic_fast.kernels.common import cards, plan
from epic_fast.kernels.common.eight_bit import EIGHT_BIT_TYPES
from epic_fast.kernels.frozen_linear import reference, tiles, triton_product, triton_quantise
from epic_fast.kernels.frozen_linear.tiles import ProductTile
from epic_fast.ops import frozen_linear as ops
from epic_fast.testing.numerics import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_bits_equal, budget, poisoned_empty

product = triton_product.product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
HALF_STEP = 0.5 / DERIVATIVE_STEPS

# Small ones, so that a small matrix has several tiles, cut off below and on the right.
POINTERS = ProductTile(32, 32, 16, 4, 2, group=2)
DESCRIPTORS = {
    "descriptors": ProductTile(32, 64, 16, 4, 2, group=2, descriptors=True),
    "two parts": ProductTile(32, 64, 16, 4, 2, group=2, descriptors=True, parts=2),
    "four parts": ProductTile(32, 64, 16, 4, 2, group=2, descriptors=True, parts=4),
    "persistent": ProductTile(32, 64, 16, 4, 2, group=3, descriptors=True, parts=2, persistent=True),
}
HAS_DESCRIPTORS = DEVICE == "cpu" or cards.has_descriptors(torch.device("cuda"))
TILES = {"pointers": POINTERS, **(DESCRIPTORS if HAS_DESCRIPTORS else {})}


@pytest.fixture(autouse=True)
def nothing_is_left_unwritten() -> Iterator[None]:
    with poisoned_empty():
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=random)).to(DEVICE, dtype)


def layer(rows: int, width: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    weight = draw(hidden, width, dtype=dtype, seed=1, scale=width**-0.5)
    return draw(rows, width, dtype=dtype), weight, draw(hidden, dtype=dtype, seed=2)


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [each.double() for each in tensors]


def within(got: Tensor, want: Tensor, eager: Tensor, depth: int, factor: float = OUTPUT_FACTOR) -> None:
    budget(got, want, eager, factor=factor, dtype=eager.dtype, reduction=depth)


def check_forward(run: Any, dtype: torch.dtype, shape: tuple[int, int, int], kind: str | None, keep: str) -> None:
    given = layer(*shape, dtype)
    got, kept = run(*given, activation=kind, keep=keep)
    want, want_kept = reference.linear_forward(*doubles(*given), activation=kind, keep=keep)
    eager, eager_kept = reference.linear_forward(*given, activation=kind, keep=keep)
    within(got, want, eager, shape[1])
    assert (kept is None) == (keep == "none")
    if keep == "full":
        within(kept, want_kept, eager_kept, shape[1])
    elif keep == "eight_bit":
        assert kept.dtype == torch.uint8
        pre = torch.nn.functional.linear(*doubles(*given))
        error = (decode_derivative(kept, torch.float64) - derivative(pre, kind)).abs().max().item()
        assert error <= HALF_STEP + 1e-5


def check_backward(run: Any, dtype: torch.dtype, shape: tuple[int, int, int], kind: str, keep: str) -> None:
    rows, width, hidden = shape
    grad, weight = draw(rows, width, dtype=dtype), draw(width, hidden, dtype=dtype, seed=1, scale=width**-0.5)
    pre = draw(rows, hidden, dtype=dtype, seed=3, scale=2.0)
    kept = reference.finish(pre, kind, keep)[1]
    options = {"keep": keep, "activation": kind}
    got = run(grad, weight, kept=kept, **options)
    promoted = kept if keep == "eight_bit" else kept.double()
    want = reference.linear_backward(*doubles(grad, weight), kept=promoted, **options)
    within(got, want, reference.linear_backward(grad, weight, kept=kept, **options), width, GRADIENT_FACTOR)


def test_the_specification_is_the_gradient_of_an_mlp() -> None:
    input, up, bias = layer(5, 6, 8, torch.float64)
    down = draw(6, 8, dtype=torch.float64, seed=4)
    grad = draw(5, 6, dtype=torch.float64, seed=5)
    for kind in ACTIVATIONS:
        leaf = input.clone().requires_grad_()
        hidden = leaf @ up.t() + bias
        gates = {
            "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
            "gelu": lambda x: x * torch.special.ndtr(x),
            "gelu_tanh": lambda x: x / (1 + torch.exp(-((8 / torch.pi) ** 0.5) * (x + 0.044715 * x**3))),
        }
        (gates[kind](hidden) @ down.t()).backward(grad)
        output, kept = reference.linear_forward(input, up, bias, activation=kind, keep="full")
        torch.testing.assert_close(output, gates[kind](hidden).detach())
        grad_pre = reference.linear_backward(grad, down, kept=kept, keep="full", activation=kind)
        torch.testing.assert_close(reference.linear_backward(grad_pre, up), leaf.grad)


# Every activation where operands come by pointers and where they come by descriptors; how tiles are gone through is
# nothing that an activation knows of.
EPILOGUES = [
    *((tile, kind, torch.float32) for tile in TILES if tile in ("pointers", "two parts") for kind in ACTIVATIONS),
    *((tile, "quick_gelu", torch.float32) for tile in TILES if tile not in ("pointers", "two parts")),
    *((tile, "quick_gelu", HALF) for tile in TILES if tile in ("pointers", "two parts")),
]


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("tile", "kind", "dtype"), EPILOGUES, ids=str)
def test_forward(tile: str, kind: str, dtype: torch.dtype, keep: str) -> None:
    def run(input: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Any:
        return product(input, weight, bias=bias, tile=TILES[tile], **options)

    check_forward(run, dtype, (70, 40, 112), kind, keep)


@pytest.mark.parametrize("keep", ["full", "eight_bit"])
@pytest.mark.parametrize(("tile", "kind", "dtype"), EPILOGUES, ids=str)
def test_backward(tile: str, kind: str, dtype: torch.dtype, keep: str) -> None:
    def run(grad: Tensor, weight: Tensor, **options: Any) -> Tensor:
        return product(grad, weight, depth_last=False, tile=TILES[tile], **options)[0]

    check_backward(run, dtype, (70, 40, 112), kind, keep)


@settings(max_examples=12)
@given(some.integers(0, 40), some.integers(1, 40), some.integers(1, 40), some.booleans())
def test_any_shape_by_pointers(rows: int, width: int, hidden: int, biased: bool) -> None:
    input, weight, bias = layer(rows, width, hidden, torch.float32)
    got, kept = product(input, weight, bias=bias if biased else None, tile=POINTERS)
    assert kept is None
    want = input @ weight.t() + (bias if biased else 0)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    back, _ = product(input, weight.t().contiguous(), depth_last=False, tile=POINTERS)
    torch.testing.assert_close(back, input @ weight.t(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tile", TILES)
def test_rows_do_not_know_of_each_other(tile: str) -> None:
    """Nor does a row of infinities or NaN reach another."""
    input, weight, bias = layer(70, 40, 112, torch.float32)
    if DEVICE == "cpu":
        # The interpreter multiplies by a BLAS that knows a row's neighbours; sums of integers are exact in any order.
        input, weight = (4 * input).round(), (16 * weight).round()
    options = {"bias": bias, "activation": "gelu", "keep": "eight_bit", "tile": TILES[tile]}
    whole = product(input, weight, **options)
    assert_bits_equal(product(input, weight, **options), whole)
    for first, stop in ((0, 33), (31, 70), (69, 70)):
        part = product(input[first:stop].clone(), weight, **options)
        # A row's place in its tile may change, its bits not.
        assert_bits_equal(part, tuple(each[first:stop] for each in whole))
    input[3], input[40] = float("nan"), float("inf")
    dirty = product(input, weight, **options)
    clean = [row for row in range(70) if row not in (3, 40)]
    assert_bits_equal(tuple(each[clean] for each in dirty), tuple(each[clean] for each in whole))
    assert bool(dirty[0][3].isnan().all())


@pytest.mark.parametrize("tile", TILES)
def test_matrices_may_be_views_of_wider_ones(tile: str) -> None:
    input, weight, bias = layer(70, 40, 112, torch.float32)
    wide = torch.full((70, 64), float("nan"), device=DEVICE)
    wide[:, 8:48] = input
    want = product(input, weight, bias=bias, activation="quick_gelu", keep="full", tile=TILES[tile])
    got = product(wide[:, 8:48], weight, bias=bias, activation="quick_gelu", keep="full", tile=TILES[tile])
    assert_bits_equal(got, want)


def test_what_descriptors_cannot_reach_goes_by_pointers() -> None:
    aligned, odd = draw(8, 16, dtype=HALF), draw(8, 17, dtype=HALF)
    assert triton_product.describable(aligned, None)
    assert not triton_product.describable(aligned, odd)
    assert not triton_product.describable(draw(8, 16, dtype=HALF)[:, 1:])
    weight = draw(24, 17, dtype=HALF, seed=1)
    got, _ = product(odd, weight)
    within(got, odd.double() @ weight.double().t(), odd @ weight.t(), 17)


@pytest.mark.parametrize("shared", [65_536, 99_000, 166_912, 232_448])
@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_sums_have_the_same_steps_whatever_the_number_of_rows(itemsize: int, hopper: bool, shared: int) -> None:
    found = {
        tiles.product_tile(itemsize, hopper, hopper, shared, rows, columns, depth, 132)
        for rows in (1, 265, 2120, 5440, 16960)
        for columns in (768, 1024, 3072, 4096)
        for depth in (128, 1024)
    }
    assert found <= set(tiles.product_tiles(itemsize, hopper, hopper, shared))
    assert len({(each.depth, each.descriptors) for each in found}) == 1


def test_the_last_round_chooses_the_tile() -> None:
    """On a card of 132: wide tiles where there are many, small ones where wide ones leave a round nearly empty; of 16
    bits only where sums are deep besides."""
    small, wide = tiles.product_tiles(1, True, True, 232_448)
    assert (small.columns, wide.columns) == (128, 256)

    def chosen(rows: int, columns: int, depth: int = 1024, itemsize: int = 1, keeps: bool = False) -> ProductTile:
        return tiles.product_tile(itemsize, True, True, 232_448, rows, columns, depth, 132, keeps)

    assert chosen(16960, 4096) is chosen(16960, 4096, 128) is wide
    # 272 wide tiles are three rounds, 544 small ones four rounds of half the time and a tenth.
    assert chosen(2120, 4096) is small
    assert chosen(1, 4096) is small
    # 132 wide tiles are one round.
    assert chosen(128 * 33, 1024) is wide
    assert chosen(128 * 34, 1024) is small
    # ViT-L/14 at a batch of 64; Swin-B's four stages; BERT-base.
    small, wide, short = tiles.product_tiles(2, True, True, 232_448)
    assert (short.stages, small.stages) == (2, 3)
    assert chosen(16960, 4096, 1024, 2) is wide
    for rows, columns, depth in ((200_704, 512, 128), (50_176, 1024, 256), (13_376, 2048, 512), (1, 2048, 512)):
        assert chosen(rows, columns, depth, 2) is short
        # What keeps the derivative has no registers for three at once.
        assert chosen(rows, columns, depth, 2, keeps=True) is small
    assert chosen(3968, 4096, 1024, 2) is small
    assert chosen(5440, 3072, 768, 2) is small
    # 2112 small tiles are sixteen rounds, 1980 fifteen.
    assert chosen(128 * 132, 2048, 1024, 2) is wide
    assert chosen(128 * 132, 1920, 1024, 2) is small


@pytest.mark.gpu
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("shape", [(2120, 1024, 4096), (333, 72, 208)], ids=str)
@pytest.mark.parametrize("operands", [torch.bfloat16, torch.float16, "fp8", "int8"], ids=str)
def test_every_tile_of_a_table_gives_the_same_bits(operands: Any, shape: tuple[int, int, int], keep: str) -> None:
    """So that the number of rows, which chooses the tile, changes no row."""
    rows, width, hidden = shape
    eight_bit = operands in EIGHT_BIT_TYPES
    device = torch.device("cuda")
    card = (cards.has_descriptors(device), cards.is_hopper(device), cards.shared_memory(device))
    table = tiles.product_tiles(1 if eight_bit else 2, *card)
    if len(table) == 1:
        pytest.skip("one tile is all that this card has")
    if eight_bit and width % 16:
        pytest.skip("descriptors do not reach such rows of eight bits")
    input, weight, bias = layer(rows, width, hidden, torch.bfloat16 if eight_bit else operands)
    options: dict[str, Any] = {"bias": bias}
    if eight_bit:
        options["out_dtype"] = torch.bfloat16
        (input, scale), (weight, weight_scale) = (reference.quantise_rows(each, operands) for each in (input, weight))
        options["scales"] = (scale, weight_scale)
    for kind in ("quick_gelu", "gelu") if operands == torch.bfloat16 else ("quick_gelu",):
        first, *others = (product(input, weight, activation=kind, keep=keep, tile=tile, **options) for tile in table)
        for other in others:
            assert_bits_equal(other, first)
        if keep == "none":
            continue
        if eight_bit:
            backward = [product(input, weight, kept=first[1], activation=kind, keep=keep, tile=tile, **options)
                        for tile in table]  # fmt: skip
        else:
            flat = weight.t().contiguous()
            backward = [product(input, flat, depth_last=False, kept=first[1], activation=kind, keep=keep, tile=tile)
                        for tile in table]  # fmt: skip
        for other in backward[1:]:
            assert_bits_equal(other[0], backward[0][0])


@pytest.mark.gpu
@pytest.mark.parametrize("keep", KEEPS)
def test_a_row_has_the_same_bits_in_any_number_of_rows(keep: str) -> None:
    input, weight, bias = layer(16960, 1024, 4096, torch.bfloat16)
    options = {"activation": "quick_gelu", "keep": keep}
    output, kept = ops.linear_forward(input, weight, bias, **options)
    grad, down = draw(16960, 1024, dtype=HALF, seed=5), draw(1024, 4096, dtype=HALF, seed=6, scale=1 / 32)
    back = None if kept is None else ops.linear_backward(grad, down, kept=kept, **options)
    for rows in (1, 265, 2120, 8480):
        fewer, fewer_kept = ops.linear_forward(input[:rows], weight, bias, **options)
        assert_bits_equal(fewer, output[:rows])
        if kept is not None:
            assert_bits_equal(fewer_kept, kept[:rows])
            part = ops.linear_backward(grad[:rows], down, kept=kept[:rows], **options)
            assert_bits_equal(part, back[:rows])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_DESCRIPTORS, reason="needs tensor descriptors")
def test_plans_and_graphs_of_products() -> None:
    """A product again, from its plan, on other memory, and captured: the bits of the first."""
    input, weight, bias = layer(2120, 1024, 4096, torch.bfloat16)
    options = {"bias": bias, "activation": "quick_gelu", "keep": "eight_bit"}
    first = product(input, weight, **options)
    for _ in range(3):
        assert_bits_equal(product(input.clone(), weight, **options), first)
    plans = [each for each in plan._plans.values() if each._ready is not None]
    assert plans
    still = input.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = product(still, weight, **options)
    for seed in (7, 8):
        still.copy_(draw(2120, 1024, dtype=torch.bfloat16, seed=seed))
        graph.replay()
        assert_bits_equal(captured, product(still, weight, **options))


@pytest.mark.parametrize("kind", EIGHT_BIT_TYPES)
@pytest.mark.parametrize("width", [1, 40, 1024])
def test_quantised_rows(kind: str, width: int) -> None:
    values = draw(9, width, seed=6, scale=3.0)
    values[4] = 0
    data, scale = triton_quantise.quantise_rows(values, kind)
    want, want_scale = reference.quantise_rows(values, kind)
    assert data.dtype == EIGHT_BIT_TYPES[kind]
    assert_bits_equal(scale, want_scale)
    assert not bool(data[4].float().any())
    # Triton's interpreter halves what fp8 rounds up to a power of two.
    if kind == "int8" or DEVICE == "cuda":
        assert_bits_equal(data, want)
        half_step = 0.5 if kind == "int8" else 16.0  # at the largest value: e4m3 has steps of 32 there
        error = (data.double() * scale.double()[:, None] - values.double()).abs()
        assert bool((error <= half_step * scale.double()[:, None] * (1 + 1e-6)).all())


@pytest.mark.parametrize("kind", EIGHT_BIT_TYPES)
def test_quantised_weights(kind: str) -> None:
    weight = draw(24, 40, seed=1)
    found = ops.quantise_weight(weight, kind)
    assert found.kind == kind
    assert found.data.shape == (24, 40)
    assert found.transposed.shape == (40, 24)
    assert found.nbytes == 2 * 24 * 40 + 4 * (24 + 40)
    half_step = 0.5 if kind == "int8" else 16.0  # at the largest value: e4m3 has steps of 32 there
    for data, scale, wanted in (
        (found.data, found.scale, weight),
        (found.transposed, found.transposed_scale, weight.t()),
    ):
        error = (data.double() * scale.double()[:, None] - wanted.double()).abs()
        assert bool((error <= half_step * scale.double()[:, None] * (1 + 1e-6)).all())
    assert ops.quantise_weight(weight, kind, backward=False).transposed is None


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("kind", EIGHT_BIT_TYPES)
@pytest.mark.parametrize("tile", TILES)
def test_eight_bit_products(tile: str, kind: str, keep: str) -> None:
    """The kernel against what the eight bits stand for, in float64."""
    if kind == "fp8" and DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no products of e4m3")
    # A card multiplies 32 bytes at a time.
    tile_here = TILES[tile] if DEVICE == "cpu" else ProductTile(**{**vars(TILES[tile]), "depth": 32})
    input, weight, bias = layer(40, 64, 112, torch.float32)
    data, scale = reference.quantise_rows(input, kind)
    right, right_scale = reference.quantise_rows(weight, kind)
    options = {"activation": "quick_gelu", "keep": keep}
    got, kept = product(
        data, right, bias=bias, scales=(scale, right_scale), out_dtype=torch.float32, tile=tile_here, **options
    )
    pre = (data.double() * scale.double()[:, None]) @ (right.double() * right_scale.double()[:, None]).t()
    want, want_kept = reference.finish(pre + bias.double(), "quick_gelu", keep)
    # Hopper sums products of e4m3 in fewer bits than float32 has.
    tolerance = 2e-3 if kind == "fp8" and DEVICE == "cuda" else 1e-5
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
    if keep == "full":
        torch.testing.assert_close(kept.double(), want_kept, atol=tolerance, rtol=tolerance)
    elif keep == "eight_bit":
        assert bool(((kept.int() - want_kept.int()).abs() <= 1).all())


@pytest.mark.parametrize("kind", EIGHT_BIT_TYPES)
def test_eight_bit_operations(kind: str) -> None:
    """Forward and backward of an MLP with weights in eight bits, as near to float64 as eight bits allow."""
    input, up, bias = layer(24, 64, 128, torch.float32)
    down = draw(64, 128, seed=4, scale=128**-0.5)
    grad = draw(24, 64, seed=5)
    up8, down8 = ops.quantise_weight(up, kind), ops.quantise_weight(down, kind)
    data, scale = ops.quantise_rows(input, kind, impl="reference")
    options = {"activation": "quick_gelu", "keep": "eight_bit"}
    for impl in ("reference", "triton"):
        if impl == "triton" and DEVICE == "cpu" and kind == "fp8":
            continue  # Triton's interpreter halves what fp8 rounds up to a power of two
        hidden, kept = ops.linear_forward_8bit(data, scale, up8, bias, out_dtype=torch.float32, impl=impl, **options)
        want, _ = reference.linear_forward(*doubles(input, up, bias), **options)
        limit = 0.06 if kind == "fp8" else 0.02
        assert ((hidden - want).norm() / want.norm()).item() < limit
        got = ops.linear_backward_8bit(grad, down8, kept=kept, impl=impl, **options)
        want_grad = reference.linear_backward(*doubles(grad, down), kept=kept, **options)
        assert ((got - want_grad).norm() / want_grad.norm()).item() < limit
        plain = ops.linear_backward_8bit(grad, down8, impl=impl)
        assert ((plain - grad.double() @ down.double()).norm() / plain.norm()).item() < limit


def test_without_an_activation_pytorch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(ops, "_product", forbidden)
    # Nor is it said that the kernel could not run, since nobody wanted it.
    monkeypatch.setattr(ops, "_say_once", forbidden)
    input, weight, bias = layer(9, 16, 24, HALF)
    output, kept = ops.linear_forward(input, weight, bias)
    assert kept is None
    assert_bits_equal(output, torch.nn.functional.linear(input, weight, bias))
    assert_bits_equal(ops.linear_backward(output, weight), output @ weight)


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
def test_operations(impl: str) -> None:
    def forward(*given: Tensor, **options: Any) -> Any:
        return ops.linear_forward(*given, impl=impl, **options)

    def backward(*given: Tensor, **options: Any) -> Any:
        return ops.linear_backward(*given, impl=impl, **options)

    check_forward(forward, torch.float32, (20, 16, 24), "quick_gelu", "eight_bit")
    check_forward(forward, torch.float32, (20, 16, 24), None, "none")
    check_backward(backward, torch.float32, (20, 16, 24), "gelu", "full")


@pytest.mark.parametrize(
    ("name", "fake", "arguments"),
    [
        ("FORWARD", ops._forward_fake, lambda x, w, b: (x, w, b, "gelu", "eight_bit")),
        ("FORWARD", ops._forward_fake, lambda x, w, b: (x, w, None, "gelu", "none")),
        ("BACKWARD", ops._backward_fake, lambda x, w, b: (x, w.t().contiguous(), None, "none", None)),
        ("QUANTISE_ROWS", ops._quantise_rows_fake, lambda x, w, b: (x, "int8")),
    ],
)
def test_fakes_tell_shapes_and_types(name: str, fake: Any, arguments: Any) -> None:
    given = arguments(*layer(20, 16, 24, torch.float32))
    real, told = getattr(ops, name)(*given), fake(*given)
    real, told = ([each] if isinstance(each, Tensor) else each for each in (real, told))
    assert [(each.shape, each.dtype) for each in real] == [(each.shape, each.dtype) for each in told]


BAD = {
    "input has shape": (lambda x, w, b: ops.linear_forward(x[:, :5], w, b), r"input is \(9, 5\).*wanted \(rows, 16\)"),
    "type": (lambda x, w, b: ops.linear_forward(x.half(), w, b), "input is torch.float16; wanted weight's torch.fl"),
    "bias": (lambda x, w, b: ops.linear_forward(x, w, b[:3]), r"bias is \(3,\).*wanted \(24,\)"),
    "activation": (lambda x, w, b: ops.linear_forward(x, w, b, activation="relu"), "activation='relu'; wanted None or"),
    "keep": (lambda x, w, b: ops.linear_forward(x, w, b, activation="gelu", keep="half"), "keep='half'; wanted one of"),
    "keep of nothing": (lambda x, w, b: ops.linear_forward(x, w, b, keep="full"), "without an activation"),
    "grad": (lambda x, w, b: ops.linear_backward(x, w), r"grad is \(9, 16\).*wanted \(rows, 24\)"),
    "kept": (
        lambda x, w, b: ops.linear_backward(x @ w.t(), w, kept=x, keep="eight_bit", activation="gelu"),
        r"kept is \(9, 16\) torch.float32; wanted \(9, 16\) of uint8",
    ),
    "nothing kept": (lambda x, w, b: ops.linear_backward(x @ w.t(), w, keep="full"), "nothing in kept"),
    "kind": (lambda x, w, b: ops.quantise_weight(w, "int4"), "kind='int4'; wanted one of"),
    "scale": (
        lambda x, w, b: ops.linear_forward_8bit(
            x.to(torch.int8), x[0], ops.quantise_weight(w, "int8"), b, out_dtype=x.dtype
        ),
        r"input_scale is \(16,\).*wanted \(9,\) torch.float32",
    ),
    "transposed": (
        lambda x, w, b: ops.linear_backward_8bit(x @ w.t(), ops.quantise_weight(w, "int8", backward=False)),
        "no transposed form",
    ),
    "impl": (lambda x, w, b: ops.linear_forward(x, w, b, impl="cuda"), "impl='cuda' is not one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        call(*layer(9, 16, 24, torch.float32))


def test_what_the_kernel_cannot_take_is_refused_by_name() -> None:
    given = layer(9, 16, 24, torch.float64)
    with pytest.raises(ImplementationError, match=r"torch.float64; the kernel takes float32"):
        ops.linear_forward(*given, activation="gelu", impl="triton")
    output, _ = ops.linear_forward(*given, activation="gelu")
    assert output.dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(16960, 1024, 4096), (265, 768, 3072)], ids=str)
def test_production_shapes(shape: tuple[int, int, int], kind: str, keep: str) -> None:
    check_forward(ops.linear_forward, torch.bfloat16, shape, kind, keep)
    if keep != "none":
        check_backward(ops.linear_backward, torch.bfloat16, shape, kind, keep)
