"""Rotary positions of packed heads: the specification, the kernels (without a GPU interpreted), the operators."""

# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from epic_fast.errors import ConfigError, ImplementationError
from epic_fast.kernels.rotary import reference
from epic_fast.ops import library
from epic_fast.ops.rotary import JOIN, ROTATE, join_rotated_back, rotate_heads
from epic_fast.testing.numerics import assert_bits_equal, poisoned_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def tables(tokens: int, depth: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Other angles in the second half than in the first: nothing may rely on their being alike."""
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * torch.linspace(1.0, 0.1, depth, dtype=torch.float64)
    return angle.cos().to(DEVICE, dtype), angle.sin().to(DEVICE, dtype)


def definition(rows: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> Tensor:
    heads = []
    half = rows.shape[3] // 2
    for head in range(rows.shape[2]):
        one, two = rows[:, :, head, :half], rows[:, :, head, half:]
        if head < rotated:
            first = one * cos[:, :half] - two * sin[:, :half]
            one, two = first, two * cos[:, half:] + one * sin[:, half:]
        heads.append(torch.cat([one, two], dim=-1))
    return torch.stack(heads, dim=2)


@pytest.mark.parametrize("queries", [0, 4])
def test_the_specification_is_the_definition_and_its_derivative(queries: int) -> None:
    keys, tokens, depth = 2, 3, 6
    rows = draw(2, tokens, queries + 2 * keys, depth, dtype=torch.float64).requires_grad_()
    cos, sin = tables(tokens, depth, torch.float64)
    wanted = definition(rows, cos, sin, queries + keys)
    torch.testing.assert_close(reference.rotate_heads(rows.detach().clone(), cos, sin, queries + keys), wanted)
    sent = draw(*wanted.shape, dtype=torch.float64, seed=1)
    (grad,) = torch.autograd.grad(wanted, rows, sent)
    query, key, value = sent.transpose(1, 2).split([queries, keys, keys], dim=1)
    torch.testing.assert_close(reference.join_rotated_back(query if queries else None, key, value, cos, sin), grad)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    ("batch", "tokens", "queries", "keys", "depth"),
    [(2, 3, 4, 2, 16), (1, 1, 0, 1, 2), (2, 5, 3, 1, 24), (1, 2, 40, 8, 64), (2, 3, 0, 2, 16), (1, 2, 17, 17, 128)],
)
def test_a_kernel_rounds_the_specification_once(
    batch: int, tokens: int, queries: int, keys: int, depth: int, dtype: torch.dtype
) -> None:
    heads = queries + 2 * keys
    rows, (cos, sin) = draw(batch, tokens, heads, depth, dtype=dtype), tables(tokens, depth, dtype)
    wanted = reference.rotate_heads(rows.double(), cos.double(), sin.double(), queries + keys)
    with poisoned_empty():
        given = rows.clone()
        found = rotate_heads(given, cos, sin, queries + keys, impl="triton")
        assert found is given
        assert_bits_equal(rotate_heads(rows.clone(), cos, sin, queries + keys, impl="triton"), found)
        sent = [draw(batch, many, tokens, depth, dtype=dtype, seed=many) for many in (queries, keys, keys)]
        # As attention hands them over, and with strides that are no multiples of anything.
        sent[1] = sent[1].transpose(1, 2).contiguous().transpose(1, 2)
        sent[2] = torch.nn.functional.pad(sent[2], (0, 1))[..., :-1]
        query = sent[0] if queries else None
        back = join_rotated_back(query, *sent[1:], cos, sin, impl="triton")
    wide = [each.double() for each in sent]
    wanted_back = reference.join_rotated_back(wide[0] if queries else None, *wide[1:], cos.double(), sin.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), wanted, rtol=eps, atol=8 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(back.double(), wanted_back, rtol=eps, atol=8 * torch.finfo(torch.float32).eps)
    assert torch.equal(found[:, :, queries + keys :], rows[:, :, queries + keys :])
    assert torch.equal(back[:, :, queries + keys :], sent[2].transpose(1, 2))


def test_what_is_empty_stays_so() -> None:
    cos, sin = tables(0, 4)
    assert rotate_heads(torch.zeros(2, 0, 3, 4, device=DEVICE), cos, sin, 2, impl="triton").shape == (2, 0, 3, 4)
    empty = torch.zeros(2, 1, 0, 4, device=DEVICE)
    assert join_rotated_back(None, empty, empty, cos, sin, impl="triton").shape == (2, 0, 2, 4)


def test_errors_say_what_was_wanted() -> None:
    rows, (cos, sin) = torch.zeros(1, 2, 3, 4), tables(2, 4)
    for given, message in (
        ((rows.transpose(1, 2), cos, sin, 1), r"strides .*; wanted contiguous ones"),
        ((torch.zeros(1, 2, 3, 5), cos, sin, 1), "even head_dim"),
        ((rows, cos[:1], sin[:1], 1), r"shapes \(1, 4\) and \(1, 4\); wanted \(2, 4\)"),
        ((rows, cos, sin, 4), r"rotated=4; wanted 0 to 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            rotate_heads(*given)
    key = torch.zeros(1, 3, 2, 4)
    with pytest.raises(ConfigError, match="the last two alike"):
        join_rotated_back(None, key, key[:, :2], cos, sin)
    with pytest.raises(ImplementationError, match="float64; the kernel takes"):
        rotate_heads(rows.double(), cos, sin, 1, impl="triton")


def test_the_operators_are_registered_right() -> None:
    if not library.interpreting() and DEVICE == "cpu":
        pytest.skip("Triton's interpreter is off")
    rows, (cos, sin) = draw(2, 3, 5, 8), tables(3, 8)
    checks: Any = ("test_schema", "test_faketensor")
    torch.library.opcheck(ROTATE, (rows, cos, sin, 3), test_utils=checks)
    heads = draw(2, 2, 3, 8)
    for query in (draw(2, 4, 3, 8), None):
        torch.library.opcheck(JOIN, (heads, query, heads, cos, sin), test_utils=checks)
