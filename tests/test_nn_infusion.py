"""The transforms of an infusion: how many, where they start, what they make; and the encoder of a sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from epic_fast.nn import Infusion, SequenceEncoder

LLAMA_2_7B: dict[str, Any] = {"kv_heads": 32, "head_dim": 128, "mlp_width": 11_008}
SMALL: dict[str, Any] = {"layers": 3, "kv_heads": 2, "head_dim": 4, "mlp_width": 10}


@pytest.mark.parametrize(
    ("layers", "published", "ours"), [(6, 126_386_688, 107_487_744), (8, 168_515_584, 143_316_992)]
)
def test_counts_of_llama_2_7b(layers: int, published: int, ours: int) -> None:
    """Those published have the shift of the keys, which has no effect: 15 % less without it."""
    with torch.device("meta"):
        whole = Infusion(768, layers=layers, key_shift=True, **LLAMA_2_7B)
        without = Infusion(768, layers=layers, **LLAMA_2_7B)
    assert whole.parameters_per_layer == 21_064_448
    assert without.parameters_per_layer == 17_914_624 == 21_064_448 - 4096 * 769
    for infusion, wanted in ((whole, published), (without, ours)):
        assert sum(each.numel() for each in infusion.transform.parameters()) == wanted
        assert infusion.head_bias.shape == (layers, 32)


@pytest.mark.parametrize("key_shift", [False, True])
@pytest.mark.parametrize("form", ["residual", "replace"])
def test_starts_from_the_frozen_model(form: Any, key_shift: bool) -> None:
    infusion = Infusion(6, form=form, key_shift=key_shift, head_bias_init=0.5, **SMALL)
    assert torch.equal(infusion.head_bias, torch.full((3, 2), 0.5))
    made = infusion(torch.randn(5, 6))
    assert len(made) == 3
    for layer in made:
        assert torch.equal(layer.mlp_multiplier, torch.ones(5, 10))
        assert torch.equal(layer.value_shift, torch.zeros(5, 2, 4))
        for each in (layer.key_multiplier, layer.value_multiplier):
            assert each.shape == (5, 2, 4)
            wanted = torch.zeros(()) if form == "residual" else 1 / layer.head_bias[0].sigmoid()
            torch.testing.assert_close(each, wanted.expand_as(each))


def test_the_value_shift_may_start_small() -> None:
    infusion = Infusion(400, value_shift_std=1e-3, **SMALL)
    weight = infusion.transform.weight.unflatten(0, (3, -1))
    assert torch.equal(weight[:, 16:24].abs().amax(dim=2) > 0, torch.ones(3, 8, dtype=torch.bool))
    assert 0.9e-3 < float(weight[:, 16:24].detach().std()) < 1.1e-3
    assert not weight[:, :16].any()
    assert not weight[:, 24:].any()


def test_the_released_start_is_that_of_a_linear() -> None:
    torch.manual_seed(0)
    infusion = Infusion(64, init="released", key_shift=True, **SMALL)
    torch.manual_seed(0)
    linear = nn.Linear(64, infusion.transform.out_features)
    assert torch.equal(infusion.transform.weight, linear.weight)
    assert torch.equal(infusion.transform.bias, linear.bias)
    assert float(linear.weight.detach().abs().max()) <= 64**-0.5


def test_one_product_is_a_linear_of_each_layer_and_kind() -> None:
    infusion = Infusion(6, init="released", key_shift=True, **SMALL).double()
    source = torch.randn(5, 6, dtype=torch.float64)
    made = infusion(source)
    weight, bias = infusion.transform.weight, infusion.transform.bias
    first = 0
    for layer in range(3):
        for name, width in infusion.parts.items():
            rows = slice(first, first := first + width)
            wanted = source @ weight[rows].T + bias[rows]
            if name != "key_shift":
                torch.testing.assert_close(getattr(made[layer], name).flatten(1), wanted, rtol=1e-12, atol=1e-12)
        assert torch.equal(made[layer].head_bias, infusion.head_bias[layer])
    assert first == len(weight)


def test_the_key_shift_gets_a_gradient_of_zero() -> None:
    infusion = Infusion(6, init="released", key_shift=True, **SMALL)
    sum(
        each.square().sum()
        for layer in infusion(torch.randn(5, 6))
        for each in (layer.key_multiplier, layer.value_multiplier, layer.value_shift, layer.mlp_multiplier)
    ).backward()
    grad = infusion.transform.weight.grad
    assert grad is not None
    per_layer = grad.unflatten(0, (3, -1))
    assert not per_layer[:, -8:].any()
    assert bool(per_layer[:, :-8].any(dim=2).all())


def test_transforms_run_in_float32_under_autocast() -> None:
    infusion = Infusion(6, init="released", **SMALL)
    source = torch.randn(5, 6)
    wanted = infusion(source)[1].value_shift
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = infusion(source.bfloat16().float())[1].value_shift
        exact = infusion(source)[1].value_shift
    assert found.dtype == torch.float32
    assert torch.equal(exact, wanted)


def test_a_sequence_is_the_mean_of_its_valid_frames() -> None:
    encoder = SequenceEncoder(4, 6).double()
    frames = torch.randn(4, 5, 4, dtype=torch.float64)
    lengths = torch.tensor([5, 1, 3, 0])
    found = encoder(frames, lengths)
    for sample, length in enumerate(lengths.tolist()):
        if length:
            torch.testing.assert_close(found[sample], encoder(frames[sample : sample + 1, :length])[0])
        else:
            assert torch.equal(found[sample], torch.zeros(6, dtype=torch.float64))
    by_hand = nn.functional.gelu(encoder.linear(encoder.norm(frames[2, :3]))).mean(dim=0)
    torch.testing.assert_close(found[2], by_hand)


def test_what_stands_behind_a_sequence_is_not_read() -> None:
    encoder = SequenceEncoder(4, 6)
    frames = torch.randn(2, 5, 4)
    lengths = torch.tensor([2, 4])
    wanted = encoder(frames, lengths)
    spoiled = frames.clone()
    spoiled[0, 2:] = float("nan")
    spoiled = torch.cat([spoiled, torch.full((2, 3, 4), float("inf"))], dim=1)
    found = encoder(spoiled, lengths)
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    assert all(bool(each.grad.isfinite().all()) for each in encoder.parameters() if each.grad is not None)


def test_a_sequence_without_frames_gives_zeros() -> None:
    encoder = SequenceEncoder(4, 6)
    for lengths in (None, torch.tensor([0, 0])):
        assert torch.equal(encoder(torch.zeros(2, 0, 4), lengths), torch.zeros(2, 6))


def test_lengths_beyond_the_end_are_the_end() -> None:
    encoder = SequenceEncoder(4, 6)
    frames = torch.randn(2, 5, 4)
    assert torch.equal(encoder(frames, torch.tensor([9, 3])), encoder(frames, torch.tensor([5, 3])))
