"""Attention on one packed buffer: PyTorch's own attention and the kernels against the specification in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from epic_fast import functional
from epic_fast.ops import library
from epic_fast.ops.packed_attention import packed_attention_backward, packed_attention_forward
from epic_fast.testing.numerics import assert_bits_equal

BATCH, TOKENS, HEADS, HEAD_DIM = 3, 7, 2, 8
LENGTHS = (7, 3, 1)

CASES = [
    {"prompts": prompts, "prompt_mask": mask, "causal": causal, "lengths": lengths}
    for prompts in (0, 1, 5)
    for mask in ("full", "prefix")
    for causal in (False, True)
    for lengths in (None, LENGTHS)
]


def ident(case: dict[str, Any]) -> str:
    return "-".join(str(value).replace(" ", "") for value in case.values())


def make(case: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict[str, Any]]:
    random = torch.Generator().manual_seed(case["prompts"])
    rows = case["prompts"] + TOKENS
    qkv = torch.randn(BATCH, rows, 3, HEADS, HEAD_DIM, generator=random, dtype=torch.float64).to(dtype)
    grad = torch.randn(BATCH, rows, HEADS, HEAD_DIM, generator=random, dtype=torch.float64).to(dtype)
    lengths = case["lengths"]
    return qkv, grad, {**case, "lengths": None if lengths is None else torch.tensor(lengths), "scale": 0.31}


def specified(qkv: Tensor, grad: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Output and gradient by the specification, in float64."""
    prompts = options["prompts"]
    options = {name: value for name, value in options.items() if name != "prompts"}
    qkv = qkv.double().requires_grad_()
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    output, prompt_output = functional.prompt_attention(
        *(each[:, :, prompts:] for each in (query, key, value)),
        *(each[:, :, :prompts] for each in (query, key, value)),
        **options,
        impl="reference",
    )
    assert prompt_output is not None
    output = torch.cat([prompt_output, output], dim=2).transpose(1, 2)
    (found,) = torch.autograd.grad(output, qkv, grad.double())
    return output.detach(), found


def check(case: dict[str, Any], impl: str) -> None:
    qkv, grad, options = make(case)
    wanted, wanted_grad = specified(qkv, grad, options)
    output, lse = packed_attention_forward(qkv, **options, impl=impl)
    assert lse is not None
    assert output.is_contiguous()
    torch.testing.assert_close(output.double(), wanted, rtol=1e-5, atol=1e-6)
    if case["lengths"] is not None:
        past = torch.arange(case["prompts"] + TOKENS) >= case["prompts"] + torch.tensor(LENGTHS)[:, None]
        assert torch.all(output[past] == 0)
        # What a gradient holds in rows that are padding is not read.
        grad = grad.masked_fill(past[:, :, None, None], 1e3)
    arguments = (grad, qkv, output, lse)
    found = packed_attention_backward(*arguments, **options, impl=impl)
    torch.testing.assert_close(found.double(), wanted_grad, rtol=1e-5, atol=1e-5)
    rows = packed_attention_backward(*arguments, **options, prompt_rows_only=True, impl=impl)
    torch.testing.assert_close(rows.double(), wanted_grad[:, : case["prompts"]], rtol=1e-5, atol=1e-5)
    unsaved, nothing = packed_attention_forward(qkv, **options, save_lse=False, impl=impl)
    assert nothing is None
    assert torch.equal(unsaved, output)


@pytest.mark.parametrize("case", CASES, ids=ident)
def test_the_reference_is_the_specification(case: dict[str, Any]) -> None:
    check(case, "reference")


@pytest.mark.parametrize("case", CASES, ids=ident)
def test_the_kernels_are_the_specification(case: dict[str, Any]) -> None:
    """Called directly, and by the operators where somebody watches."""
    if not library.interpreting():
        pytest.skip("Triton's interpreter is off")
    check(case, "triton")
    seen: list[str] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    qkv, grad, options = make(case)
    wanted = packed_attention_forward(qkv, **options, impl="triton")
    wanted_grad = packed_attention_backward(grad, qkv, *wanted, **options, impl="triton")
    with Watching():
        found = packed_attention_forward(qkv, **options, impl="triton")
        found_grad = packed_attention_backward(grad, qkv, *found, **options, impl="triton")
    assert any("packed_attention_forward" in name for name in seen)
    assert any("packed_attention_backward" in name for name in seen)
    assert_bits_equal((*found, found_grad), (*wanted, wanted_grad))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    qkv, grad, options = make(CASES[-1], dtype)
    wanted, wanted_grad = specified(qkv, grad, options)
    output, lse = packed_attention_forward(qkv, **options)
    assert lse is not None
    found = packed_attention_backward(grad, qkv, output, lse, **options)
    assert output.dtype == found.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    assert (output.double() - wanted).norm() <= tolerance * wanted.norm()
    assert (found.double() - wanted_grad).norm() <= tolerance * wanted_grad.norm()


def test_no_sample() -> None:
    qkv = torch.zeros(0, 4, 3, HEADS, HEAD_DIM)
    output, lse = packed_attention_forward(qkv, prompts=1)
    assert output.shape == (0, 4, HEADS, HEAD_DIM)
    assert lse is not None
    found = packed_attention_backward(output, qkv, output, lse, prompts=1, prompt_rows_only=True)
    assert found.shape == (0, 1, 3, HEADS, HEAD_DIM)


def test_the_operators_compile() -> None:
    """Schema and fake agree with what the kernels return."""
    if not library.interpreting():
        pytest.skip("Triton's interpreter is off")
    qkv, grad, options = make(CASES[-1])
    flags = (options["prompts"], options["lengths"], True, True, 0.31)
    operators = torch.ops.epic_fast
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.packed_attention_forward.default, (qkv, *flags, True), test_utils=tests)
    output, lse = operators.packed_attention_forward(qkv, *flags, True)
    for prompt_rows_only in (False, True):
        torch.library.opcheck(
            operators.packed_attention_backward.default,
            (grad, qkv, output, lse, *flags, prompt_rows_only),
            test_utils=tests,
        )
