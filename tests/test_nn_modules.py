"""The hub and the head by themselves: which tensors they make, of which type, and their statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from epic_fast.errors import ConfigError
from epic_fast.nn import Head, InteractionHub


def test_the_hub_makes_no_tensor_that_nothing_reads() -> None:
    def names(**arguments: Any) -> set[str]:
        return {name for name, _ in InteractionHub(4, 6, **arguments).named_parameters()}

    outward = {"text_to_vision.0.weight", "text_to_vision.0.bias"}
    inward = {"vision_to_text.0.weight", "vision_to_text.0.bias"}
    rest = {"text_gate", "vision_gate", "log_temperature"}
    assert names(steps=0) == outward
    assert names(steps=0, starts_vision=False) == set()
    assert names(steps=2) == names(steps=2, starts_vision=False) == outward | inward | rest
    assert names(steps=2, learn_gates=False, learn_temperature=False) == outward | inward
    assert len(names(steps=3, shared=False)) == 3 * 4 + 3
    hub = InteractionHub(4, 6, steps=3, gate="channel", gate_init=0.5, temperature=0.2)
    assert hub.text_gate.shape == (3, 4)
    assert hub.vision_gate.shape == (3, 6)
    assert math.isclose(float(hub.log_temperature.detach().exp()), 0.2, rel_tol=1e-6)
    assert hub.diagnostics()["vision_gate/2"] == 0.5


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("read", [(0, 1, 2), (1,)])
def test_gradients_of_what_steps_share_add_up_in_float32(shared: bool, read: tuple[int, ...]) -> None:
    hub = InteractionHub(4, 6, steps=3, shared=shared, gate_init=0.5)
    # So large a number swallows the small ones in bfloat16: 256 + 1 = 256.
    factors = {0: 256.0, 1: 1.0, 2: 1.0}
    made: dict[Any, Any] = {}
    total = torch.zeros(())
    for step in read:
        given = hub.parameters_of(step, torch.bfloat16, made)
        assert [each.dtype for each in given[:4]] == [torch.bfloat16] * 4
        assert given[4:6] == (hub.text_gate[step], hub.vision_gate[step])
        total = total + factors[step] * sum(each.float().sum() for each in given)
    total.backward()
    projections = [each for module in (hub.text_to_vision, hub.vision_to_text) for each in module]
    for copy, layer in enumerate(projections):
        steps = read if shared else [step for step in read if step == copy % 3]
        for tensor in (layer.weight, layer.bias):
            if not steps:
                assert tensor.grad is None
                continue
            assert tensor.grad.dtype == torch.float32
            assert (tensor.grad == sum(factors[step] for step in steps)).all()
    for gate in (hub.text_gate, hub.vision_gate):
        assert gate.grad.tolist() == [factors[step] if step in read else 0.0 for step in range(3)]
    assert torch.isclose(hub.log_temperature.grad, sum(factors[step] for step in read) * hub.log_temperature.exp())


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_heads_give_float32_or_float64_of_features_of_any_type(kind: str, dtype: torch.dtype) -> None:
    head = Head(5, 3, kind=kind, norm="layer").to(dtype)
    for features in (torch.randn(2, 5), torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5).bfloat16()):
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        assert head(features).dtype == wanted
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(head(features), head(features))


def test_standardisation_is_by_the_whole_training_set() -> None:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(50, 4, generator=random) * torch.tensor([1.0, 5.0, 0.1, 0.0]) + torch.tensor([0, 3, -2, 1e4])
    features[:, 3] = 10_000 / 3
    norm = Head(4, 2, norm="standardize").norm
    assert norm.needs_statistics
    norm.fit(features.split(7))
    assert not norm.needs_statistics
    wanted = (features[:, :3] - features[:, :3].mean(0)) / features[:, :3].std(0, correction=0)
    assert torch.allclose(norm(features)[:, :3], wanted, atol=1e-4)
    # A large feature that never varies must not be blown up out of rounding errors.
    assert norm(features)[:, 3].abs().max() < 1e-2
    for batches, count in (([], 0), ([features[:1]], 1)):
        with pytest.raises(ConfigError, match=f"at least two samples; {count} were given"):
            Head(4, 2, norm="standardize").norm.fit(batches)


def test_heads_normalise_before_the_classifier() -> None:
    features = 5.0 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) + 3.0
    for norm in ("layer", "standardize"):
        head = Head(6, 3, norm=norm).eval()
        if norm == "standardize":
            head.norm.fit([features])
        output = head.classifier[-1]
        by_hand = (features - features.mean(-1, keepdim=True)) / features.std(-1, correction=0, keepdim=True)
        if norm == "standardize":
            by_hand = (features - features.mean(0)) / features.std(0, correction=0)
        assert torch.allclose(head(features), output(by_hand), atol=1e-4)
