"""Which implementation runs: never a silent fallback, and one graph for torch.compile."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from epic_fast import ops
from epic_fast.errors import ConfigError, ImplementationError
from epic_fast.functional import (
    infused_attention,
    infused_swiglu,
    infusion_gate,
    mix_prompt_experts,
    prompt_attention,
    prompt_interaction,
    window_prompt_attention,
)
from epic_fast.ops import dispatch, library
from epic_fast.ops.dispatch import Operation


@pytest.fixture(autouse=True)
def nothing_logged_yet() -> Iterator[None]:
    dispatch._log_once.cache_clear()
    yield
    dispatch._log_once.cache_clear()


def attention_inputs(batch: int = 2, tokens: int = 4, prompts: int = 3) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    own = [torch.randn(batch, 2, tokens, 8, generator=random, requires_grad=True) for _ in range(3)]
    return own + [torch.randn(1, 2, prompts, 8, generator=random, requires_grad=True) for _ in range(3)]


def interaction_inputs(batch: int = 2, text: int = 3, vision: int = 4) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(batch, text, 5), (batch, vision, 6), (6, 5), (6,), (5, 6), (5,), (), ()]
    tensors = [torch.randn(shape, generator=random, requires_grad=True) for shape in shapes]
    return [*tensors, torch.tensor(0.5, requires_grad=True)]


def window_inputs(batch: int = 2, tokens: int = 4, prompts: int = 3) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    own = [torch.randn(4 * batch, 2, tokens, 8, generator=random, requires_grad=True) for _ in range(3)]
    return own + [torch.randn(batch, 2, prompts, 8, generator=random, requires_grad=True) for _ in range(3)]


def expert_inputs(batch: int = 2, experts: int = 4, length: int = 3) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = ((batch, experts), (experts, length, 5))
    return [torch.randn(shape, generator=random, requires_grad=True) for shape in shapes]


def infused_attention_inputs(batch: int = 2, tokens: int = 4, width: int = 8) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(batch, 4, tokens, width), *[(batch, 2, tokens, width)] * 2, *[(batch, 2, width)] * 3, (batch, 2)]
    return [torch.randn(shape, generator=random, requires_grad=True) for shape in shapes]


def infusion_gate_inputs(batch: int = 2, tokens: int = 4, width: int = 8) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(batch, 2, tokens, width), (batch, 2, width), (2,)]
    return [torch.randn(shape, generator=random, requires_grad=True) for shape in shapes]


def infused_swiglu_inputs(batch: int = 2, tokens: int = 4, width: int = 8) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(batch, tokens, width), (batch, tokens, width), (batch, width)]
    return [torch.randn(shape, generator=random, requires_grad=True) for shape in shapes]


CALLS = {
    "infused_attention": (infused_attention, infused_attention_inputs),
    "infusion_gate": (infusion_gate, infusion_gate_inputs),
    "infused_swiglu": (infused_swiglu, infused_swiglu_inputs),
    "prompt_attention": (prompt_attention, attention_inputs),
    "prompt_interaction": (prompt_interaction, interaction_inputs),
    "window_prompt_attention": (window_prompt_attention, window_inputs),
    "mix_prompt_experts": (mix_prompt_experts, expert_inputs),
}


class Fake:
    """An implementation that says it was called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return self.name


def operation(**fields: Any) -> Operation:
    return Operation("sum", reference=Fake("reference"), **fields)


@pytest.mark.parametrize("name", CALLS)
def test_auto_is_the_reference_on_a_cpu_and_says_so_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    function, inputs = CALLS[name]
    with caplog.at_level(logging.INFO, logger="epic_fast"):
        once, again = function(*inputs()), function(*inputs(), impl="reference")
        function(*inputs())
    assert all(map(torch.equal, once, again))
    (record,) = caplog.records
    assert record.name == "epic_fast"
    assert name in record.getMessage()
    assert "cpu" in record.getMessage()


@pytest.mark.parametrize("name", CALLS)
def test_a_compiled_call_says_it_as_well(name: str, caplog: pytest.LogCaptureFixture) -> None:
    function, inputs = CALLS[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    with caplog.at_level(logging.INFO, logger="epic_fast"):
        for batch in (2, 3, 4):
            compiled(*inputs(batch))
    (record,) = caplog.records
    assert "a tensor is on cpu" in record.getMessage()


def test_reference_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="epic_fast"):
        prompt_attention(*attention_inputs(), impl="reference")
    assert not caplog.records


@pytest.mark.parametrize("name", CALLS)
def test_triton_that_cannot_run_raises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "interpreting", lambda: False)
    function, inputs = CALLS[name]
    with pytest.raises(ImplementationError) as caught:
        function(*inputs(), impl="triton")
    message = str(caught.value)
    assert message.startswith(f"{name}: impl='triton' cannot run here:\n  - ")
    assert "a tensor is on cpu" in message
    assert "impl='reference'" in message


def test_every_reason_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    monkeypatch.setattr(library, "interpreting", lambda: False)
    limited = operation(triton=Fake("triton"), limits=lambda *args: ["head_dim 7 is odd", "it is Monday"])
    with pytest.raises(ImplementationError) as caught:
        limited(torch.zeros(1), torch.zeros(1, device="meta"), impl="triton")
    for reason in ("triton is not installed", "on cpu", "on meta", "head_dim 7 is odd", "it is Monday"):
        assert f"{reason}" in str(caught.value)
    with pytest.raises(ImplementationError, match="no Triton kernel for this operation"):
        operation()(impl="triton")


def test_triton_runs_where_nothing_speaks_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", True)
    able = operation(triton=Fake("triton"))
    assert able(3.0, impl="auto") == able(3.0, impl="triton") == "triton"
    assert able(3.0, impl="reference") == "reference"
    unable = operation(triton=Fake("triton"), limits=lambda *args: ["too wide"])
    assert unable(3.0) == "reference"
    with pytest.raises(ImplementationError, match="too wide"):
        unable(3.0, impl="triton")


def test_the_interpreter_runs_what_is_asked_for_by_name_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the interpreter is thousands of times slower than the reference: "auto" never takes it."""
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", True)
    able, tensor = operation(triton=Fake("triton")), torch.zeros(1)
    monkeypatch.setattr(library, "interpreting", lambda: True)
    assert able(tensor, impl="triton") == "triton"
    assert able(tensor, impl="auto") == "reference"
    assert able.reasons_against_triton(tensor, interpreter=False) == ["a tensor is on cpu; the kernel needs a GPU"]
    with pytest.raises(ImplementationError, match="on meta"):
        able(tensor.to("meta"), impl="triton")
    monkeypatch.setattr(library, "interpreting", lambda: False)
    with pytest.raises(ImplementationError, match="TRITON_INTERPRET=1"):
        able(tensor, impl="triton")


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("impl", ["cuda", "", "Triton"])
def test_an_unknown_implementation_is_refused(name: str, impl: str) -> None:
    function, inputs = CALLS[name]
    with pytest.raises(ConfigError, match="'auto', 'triton', 'reference'") as caught:
        function(*inputs(), impl=impl)
    assert repr(impl) in str(caught.value)


def test_available_implementations_names_every_operation() -> None:
    found = ops.available_implementations()
    assert set(found) == {name for name in ops.__all__ if isinstance(getattr(ops, name), Operation)}
    assert all("reference" in each for each in found.values())


@pytest.mark.parametrize("name", CALLS)
def test_compiles_into_one_graph_that_serves_every_size(name: str) -> None:
    function, inputs = CALLS[name]
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for sizes in ((2, 4, 3), (3, 7, 5), (4, 9, 2), (6, 12, 8)):
        tensors = inputs(*sizes)
        for one, other in zip(compiled(*tensors), function(*tensors), strict=True):
            torch.testing.assert_close(one, other)
    # The first size, then one more graph in which the sizes are symbols.
    assert counter.frame_count <= 2


def test_compiles_with_lengths() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(prompt_attention, backend=counter, fullgraph=True)
    for batch, tokens in ((2, 4), (3, 7), (4, 9)):
        inputs, lengths = attention_inputs(batch, tokens), torch.arange(batch)
        for one, other in zip(
            compiled(*inputs, lengths=lengths, causal=True),
            prompt_attention(*inputs, lengths=lengths, causal=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other)
    assert counter.frame_count <= 2
