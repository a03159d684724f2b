"""The decoder and the losses of referring segmentation, against PyTorch's own layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from epic_fast.errors import ConfigError
from epic_fast.nn import FilmDecoder, segmentation_loss
from epic_fast.nn.segmentation import resize_bilinear


def parameters(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def test_its_size_is_the_published_one() -> None:
    decoder = FilmDecoder(1024, 4096, patch_size=14)
    assert parameters(decoder) == 1_620_642
    assert round(parameters(decoder) / 1e6, 2) == 1.62


class Written(nn.Module):
    """The decoder in PyTorch's own layers, which it shares nothing with but weights."""

    def __init__(self, decoder: FilmDecoder, heads: int, mlp_size: int):
        super().__init__()
        self.decoder, width = decoder, decoder.width
        self.blocks = nn.ModuleList()
        for layer in decoder.layers:
            block = nn.TransformerEncoderLayer(
                width, heads, mlp_size, dropout=0.0, layer_norm_eps=1e-6, batch_first=True, dtype=torch.float64
            )
            attention = block.self_attn
            pairs = [
                (attention.in_proj_weight, layer.qkv.weight),
                (attention.in_proj_bias, layer.qkv.bias),
                (attention.out_proj.weight, layer.output.weight),
                (attention.out_proj.bias, layer.output.bias),
                (block.linear1.weight, layer.mlp[0].weight),
                (block.linear1.bias, layer.mlp[0].bias),
                (block.linear2.weight, layer.mlp[2].weight),
                (block.linear2.bias, layer.mlp[2].bias),
                (block.norm1.weight, layer.first_norm.weight),
                (block.norm1.bias, layer.first_norm.bias),
                (block.norm2.weight, layer.second_norm.weight),
                (block.norm2.bias, layer.second_norm.bias),
            ]
            for mine, its in pairs:
                mine.data.copy_(its.data)
            self.blocks.append(block)

    def forward(self, hidden, feature, grid, size):
        decoder, tokens = self.decoder, 0
        for level, (states, block) in enumerate(zip(hidden, self.blocks, strict=True)):
            tokens = tokens + decoder.reductions[level](states)
            if level == 0:
                tokens = tokens * decoder.film_multiply(feature)[:, None] + decoder.film_add(feature)[:, None]
            tokens = block(tokens)
        patches = tokens[:, decoder.prefix_tokens :].transpose(1, 2).reshape(len(feature), -1, *grid)
        chain = (decoder.convolution, nn.ReLU(), decoder.enlarge, nn.ReLU(), decoder.classify)
        logits = nn.Sequential(*chain)(patches)
        return nn.functional.interpolate(logits, size, mode="bilinear", align_corners=True)


@pytest.mark.parametrize(
    ("grid", "patch", "size", "cls"), [((3, 3), 16, (20, 31), 1), ((2, 5), 8, (9, 40), 1), ((4, 3), 14, (36, 27), 0)]
)
def test_it_is_what_the_equations_say(grid, patch, size, cls) -> None:
    torch.manual_seed(0)
    decoder = FilmDecoder(10, 12, patch_size=patch, width=8, heads=2, mlp_size=24, prefix_tokens=cls).double()
    for name, each in decoder.named_parameters():  # norms that do something, biases that are not zero
        each.data.add_(0.3 * torch.randn_like(each) if "norm" in name or name.endswith("bias") else 0)
    written = Written(decoder, 2, 24).double()
    hidden = [torch.randn(2, cls + grid[0] * grid[1], 10, dtype=torch.float64) for _ in range(3)]
    feature = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    found = decoder(hidden, feature, grid=grid, size=size)
    wanted = written(hidden, feature, grid, size)
    assert found.shape == (2, 2, *size)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(wanted)
    inputs = [feature, *decoder.parameters()]
    mine = torch.autograd.grad((found * weight).sum(), inputs)
    its = dict(
        zip(map(id, inputs), torch.autograd.grad((wanted * weight).sum(), inputs, allow_unused=True), strict=True)
    )
    for each, gradient in zip(inputs, mine, strict=True):
        if its[id(each)] is not None:  # the transformer's weights are copies there
            torch.testing.assert_close(gradient, its[id(each)], rtol=1e-8, atol=1e-10)


def test_without_a_size_the_picture_is_its_own() -> None:
    decoder = FilmDecoder(6, 5, levels=1, patch_size=16, width=8, heads=2, mlp_size=8)
    assert decoder([torch.randn(2, 1 + 4 * 4, 6)], torch.randn(2, 5)).shape == (2, 2, 64, 64)


def test_the_first_level_alone_meets_the_text() -> None:
    torch.manual_seed(0)
    decoder = FilmDecoder(6, 5, levels=2, width=8, heads=2, mlp_size=8)
    hidden = [torch.randn(1, 10, 6) for _ in range(2)]
    one, other = (decoder(hidden, torch.randn(1, 5)) for _ in range(2))
    assert not torch.allclose(one, other)
    with torch.no_grad():
        decoder.film_multiply.weight.zero_(), decoder.film_add.weight.zero_()
    one, other = (decoder(hidden, torch.randn(1, 5)) for _ in range(2))
    torch.testing.assert_close(one, other)


def test_the_feature_can_be_standardised() -> None:
    torch.manual_seed(0)
    plain, made = (
        FilmDecoder(6, 5, levels=1, width=8, heads=2, mlp_size=8, norm=norm) for norm in ("none", "standardize")
    )
    features = 100 * torch.randn(50, 5) + 7
    assert made.norm.needs_statistics
    made.norm.fit([features])
    made.load_state_dict(
        {**plain.state_dict(), **{f"norm.{name}": each for name, each in made.norm.state_dict().items()}}
    )
    hidden = [torch.randn(50, 10, 6)]
    standard = (features - features.mean(0)) / features.std(0, unbiased=False)
    torch.testing.assert_close(made(hidden, features), plain(hidden, standard), rtol=1e-4, atol=1e-4)


def test_it_trains_under_autocast_and_answers_in_float32() -> None:
    decoder = FilmDecoder(6, 5, width=8, heads=2, mlp_size=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = decoder([torch.randn(2, 10, 6)] * 3, torch.randn(2, 5), size=(8, 8))
    assert logits.dtype == torch.float32
    segmentation_loss(logits, torch.zeros(2, 8, 8)).backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in decoder.parameters())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"heads": 6}, "width=64 with heads=6"), ({"levels": 0}, "levels=0"), ({"width": 9, "heads": 3}, "even width")],
)
def test_what_cannot_be_built_is_refused(arguments, said) -> None:
    with pytest.raises(ConfigError, match=said):
        FilmDecoder(6, 5, **arguments)


def test_tokens_that_make_no_grid_are_refused() -> None:
    decoder = FilmDecoder(6, 5, levels=1)
    with pytest.raises(ConfigError, match=r"8 tokens, 1 of them no patches, make no grid of 2 x 2"):
        decoder([torch.zeros(1, 8, 6)], torch.zeros(1, 5))
    with pytest.raises(ConfigError, match="2 hidden states were given; wanted 1"):
        decoder([torch.zeros(1, 5, 6)] * 2, torch.zeros(1, 5))


@pytest.mark.parametrize("size", [(7, 5), (3, 4), (1, 9), (6, 4)])
def test_resizing_is_pytorchs_own(size) -> None:
    pictures = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    wanted = nn.functional.interpolate(pictures, size, mode="bilinear", align_corners=True)
    torch.testing.assert_close(resize_bilinear(pictures, size), wanted)


def test_losses_by_pytorch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    masks = torch.rand(3, 4, 5) < 0.3
    weights = torch.tensor([0.9, 1.1], dtype=torch.float64)
    entropy = nn.functional.cross_entropy(logits, masks.long(), weight=weights)
    margin = logits[:, 1] - logits[:, 0]
    bce = nn.functional.binary_cross_entropy_with_logits(margin, masks.double())
    said = margin.sigmoid()
    dice = torch.stack(
        [1 - (2 * (p * m).sum() + 1) / (p.sum() + m.sum() + 1) for p, m in zip(said, masks, strict=True)]
    ).mean()
    log = logits.log_softmax(1).gather(1, masks.long()[:, None])[:, 0]
    each = -((1 - log.exp()) ** 2) * log
    of_pixel = weights[masks.long()]
    wanted = {
        "cross_entropy": entropy,
        "bce": bce,
        "dice_cross_entropy": entropy + dice,
        "focal": (of_pixel * each).sum() / of_pixel.sum(),
    }
    for kind, value in wanted.items():
        found = segmentation_loss(logits, masks, kind=kind)
        torch.testing.assert_close(found, value, msg=kind)
        mine, its = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, value))
        torch.testing.assert_close(mine, its, msg=kind)


def test_losses_by_hand() -> None:
    logits = torch.zeros(1, 2, 1, 2)
    masks = torch.tensor([[[0, 1]]])
    assert math.isclose(float(segmentation_loss(logits, masks)), math.log(2), rel_tol=1e-6)
    # p = 1/2 everywhere: Dice is (2 * 0.5 + 1) / (1 + 1 + 1).
    found = float(segmentation_loss(logits, masks, kind="dice_cross_entropy"))
    assert math.isclose(found, math.log(2) + 1 - 2 / 3, rel_tol=1e-6)
    assert math.isclose(float(segmentation_loss(logits, masks, kind="focal")), math.log(2) / 4, rel_tol=1e-6)
    extreme = torch.tensor([[[[-200.0, 200.0]], [[200.0, -200.0]]]])
    for kind in ("cross_entropy", "bce", "dice_cross_entropy", "focal"):
        assert math.isfinite(float(segmentation_loss(extreme, masks, kind=kind)))


@pytest.mark.parametrize("kind", ["cross_entropy", "bce", "dice_cross_entropy", "focal"])
def test_whatever_is_not_zero_is_the_object(kind: Any) -> None:
    logits = torch.randn(2, 2, 4, 5)
    masks = torch.rand(2, 4, 5) < 0.4
    wanted = segmentation_loss(logits, masks, kind=kind)
    for each in (masks.long(), masks.to(torch.uint8) * 255, masks * 0.5):
        assert torch.equal(segmentation_loss(logits, each, kind=kind), wanted)


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"masks \(1, 2, 3\)"):
        segmentation_loss(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 3))
    with pytest.raises(ConfigError, match="kind='iou'"):
        segmentation_loss(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2), kind="iou")
