"""From a picture's hidden states and a text's feature to a mask: decoder and losses of referring segmentation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from epic_fast.errors import ConfigError
from epic_fast.functional import prompt_attention
from epic_fast.nn.heads import FeatureNorm

SEGMENTATION_LOSSES = ("cross_entropy", "bce", "dice_cross_entropy", "focal")
SegmentationLoss = Literal["cross_entropy", "bce", "dice_cross_entropy", "focal"]


class FilmDecoder(nn.Module):
    """The decoder of MiT's referring segmentation, after CLIPSeg: methods of arXiv 2403.05060, released code.

    Levels come from the deepest to the shallowest.  At level i the hidden states are reduced to ``width`` and added to
    what came before; at the first, the text's feature scales and shifts every token (FiLM); then a post-norm
    transformer layer.  Last, the patches alone become a picture again: a 3x3 convolution and two transposed ones.

    Everything runs as matrix products and attention, whose backward passes are deterministic on a GPU too.

    Args:
        vision_size: width of the picture's hidden states.
        language_size: width of the text's feature.
        levels: how many hidden states are read.
        patch_size: pixels of a patch's side; the two transposed convolutions each enlarge ``patch_size // 4`` times.
        width, heads: of the transformer layers.
        mlp_size: of their hidden layer.
        prefix_tokens: tokens in front of the patches, such as CLS; dropped before the convolutions.
        norm: of the text's feature, ``kind`` of :class:`~epic_fast.nn.FeatureNorm`.

    Raises:
        ConfigError: a width that the heads do not divide, or no level.
    """

    def __init__(
        self,
        vision_size: int,
        language_size: int,
        *,
        levels: int = 3,
        patch_size: int = 14,
        width: int = 64,
        heads: int = 4,
        mlp_size: int = 2048,
        prefix_tokens: int = 1,
        norm: str = "none",
    ):
        super().__init__()
        if levels < 1:
            raise ConfigError(f"FilmDecoder: levels={levels}; wanted at least one hidden state to read")
        if heads < 1 or width % heads or width % 2:
            raise ConfigError(
                f"FilmDecoder: width={width} with heads={heads}; wanted an even width that the heads divide, such as "
                "64 with 4"
            )
        self.width = width
        self.prefix_tokens = prefix_tokens
        self.scale = max(patch_size // 4, 1)
        self.norm = FeatureNorm(language_size, norm)
        self.reductions = nn.ModuleList(nn.Linear(vision_size, width) for _ in range(levels))
        self.film_multiply = nn.Linear(language_size, width)
        self.film_add = nn.Linear(language_size, width)
        self.layers = nn.ModuleList(_PostNormLayer(width, heads, mlp_size) for _ in range(levels))
        self.convolution = nn.Conv2d(width, width, 3, padding=1)
        self.enlarge = nn.ConvTranspose2d(width, width // 2, self.scale, stride=self.scale)
        self.classify = nn.ConvTranspose2d(width // 2, 2, self.scale, stride=self.scale)

    def forward(
        self,
        hidden: Sequence[Tensor],
        feature: Tensor,
        *,
        grid: tuple[int, int] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Logits of background and object.

        Args:
            hidden: one ``(B, prefix_tokens + rows * columns, vision_size)`` a level, the deepest first.
            feature: ``(B, language_size)``.
            grid: (rows, columns) of patches; None: a square.
            size: (height, width) of the logits, by bilinear interpolation with aligned corners; None leaves them at
                ``patch_size // 4`` twice enlarged.

        Returns:
            ``(B, 2, height, width)``, at least float32.

        Raises:
            ConfigError: another number of hidden states, or tokens that make no such grid.
        """
        if len(hidden) != len(self.reductions):
            raise ConfigError(
                f"FilmDecoder: {len(hidden)} hidden states were given; wanted {len(self.reductions)}, the deepest first"
            )
        rows, columns = self._grid(hidden[0].shape[1], grid)
        text = self.norm(feature.to(torch.promote_types(feature.dtype, torch.float32)))
        text = text.to(_input_type(self.film_add, text))
        tokens = None
        for level, (states, reduce, layer) in enumerate(zip(hidden, self.reductions, self.layers, strict=True)):
            reduced = reduce(states.to(_input_type(reduce, states)))
            tokens = reduced if tokens is None else tokens + reduced
            if level == 0:
                tokens = self.film_multiply(text)[:, None] * tokens + self.film_add(text)[:, None]
            tokens = layer(tokens)
        assert tokens is not None
        patches = tokens[:, self.prefix_tokens :].unflatten(1, (rows, columns))
        picture = torch.relu(_convolve(patches, self.convolution))
        picture = torch.relu(_enlarge(picture, self.enlarge))
        logits = _enlarge(picture, self.classify).permute(0, 3, 1, 2)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if size is None else resize_bilinear(logits, size)

    def _grid(self, tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
        patches = tokens - self.prefix_tokens
        if grid is None:
            side = math.isqrt(max(patches, 0))
            grid = (side, side)
        if grid[0] * grid[1] != patches or patches < 1:
            raise ConfigError(
                f"FilmDecoder: {tokens} tokens, {self.prefix_tokens} of them no patches, make no grid of "
                f"{grid[0]} x {grid[1]}; pass grid=(rows, columns)"
            )
        return grid


class _PostNormLayer(nn.Module):
    """Self-attention and a ReLU MLP, each followed by sum and layer norm."""

    def __init__(self, width: int, heads: int, mlp_size: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.first_norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_size), nn.ReLU(), nn.Linear(mlp_size, width))
        self.second_norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        qkv = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        none = key.new_zeros(1, self.heads, 0, key.shape[-1])
        mixed, _ = prompt_attention(query, key, value, None, none, none)
        tokens = self.first_norm(tokens + self.output(mixed.transpose(1, 2).flatten(2)))
        return self.second_norm(tokens + self.mlp(tokens))


def _input_type(layer: Any, given: Tensor) -> torch.dtype:
    """The layer's own type; under autocast what comes is taken as it is."""
    return given.dtype if torch.is_autocast_enabled(given.device.type) else layer.weight.dtype


def _convolve(picture: Tensor, layer: nn.Conv2d) -> Tensor:
    """A 3x3 convolution with padding 1 over ``(B, rows, columns, C)`` as one matrix product."""
    rows, columns = picture.shape[1:3]
    padded = nn.functional.pad(picture, (0, 0, 1, 1, 1, 1))
    taps = [padded[:, top : top + rows, left : left + columns] for top in range(3) for left in range(3)]
    weight = layer.weight.permute(0, 2, 3, 1).flatten(1)
    return nn.functional.linear(torch.cat(taps, dim=-1), weight, layer.bias)


def _enlarge(picture: Tensor, layer: nn.ConvTranspose2d) -> Tensor:
    """A transposed convolution whose stride is its kernel's side, over ``(B, rows, columns, C)``: each place becomes a
    square of its own."""
    side = layer.kernel_size[0]
    weight = layer.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (side, side, out) x in
    assert layer.bias is not None
    made = nn.functional.linear(picture, weight, layer.bias.repeat(side * side))
    batch, rows, columns, _ = made.shape
    made = made.reshape(batch, rows, columns, side, side, -1).permute(0, 1, 3, 2, 4, 5)
    return made.reshape(batch, rows * side, columns * side, -1)


def resize_bilinear(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """``(..., h, w)`` to ``(..., *size)``: bilinear, corners aligned, as two matrix products (so deterministic)."""
    height, width = pictures.shape[-2:]
    if (height, width) == tuple(size):
        return pictures
    with torch.autocast(pictures.device.type, enabled=False):
        rows = _interpolation(height, size[0], pictures)
        columns = _interpolation(width, size[1], pictures)
        return rows @ pictures @ columns.mT


def _interpolation(given: int, wanted: int, like: Tensor) -> Tensor:
    """The ``(wanted, given)`` matrix of linear interpolation between aligned corners."""
    place = torch.arange(wanted, device=like.device, dtype=like.dtype) * ((given - 1) / max(wanted - 1, 1))
    source = torch.arange(given, device=like.device, dtype=like.dtype)
    return (1 - (place[:, None] - source).abs()).clamp_min(0)


def segmentation_loss(
    logits: Tensor,
    masks: Tensor,
    *,
    kind: SegmentationLoss = "cross_entropy",
    class_weights: tuple[float, float] = (0.9, 1.1),
    focal_gamma: float = 2.0,
) -> Tensor:
    """The loss of masks, ``()``.

    Args:
        logits: ``(B, 2, H, W)``, background and object.
        masks: ``(B, H, W)``, not 0 where the object is.
        kind: ``"cross_entropy"`` of two classes; ``"bce"``, of the object's probability, unweighted;
            ``"dice_cross_entropy"``, the cross-entropy plus one minus Dice's coefficient of each sample;
            ``"focal"``, cross-entropy times ``(1 - p)^focal_gamma``, p the probability of the true class.
        class_weights: of background and object in the cross-entropy, in all of these but ``"bce"``; the mean is over
            the pixels' weights.

    Raises:
        ConfigError: an unknown kind, or shapes that do not fit.
    """
    if kind not in SEGMENTATION_LOSSES:
        raise ConfigError(f"segmentation_loss: kind={kind!r}; wanted one of {', '.join(SEGMENTATION_LOSSES)}")
    if logits.dim() != 4 or logits.shape[1] != 2 or masks.shape != (len(logits), *logits.shape[2:]):
        raise ConfigError(
            f"segmentation_loss: logits {tuple(logits.shape)} and masks {tuple(masks.shape)}; wanted (B, 2, H, W) and "
            "(B, H, W)"
        )
    wide = torch.promote_types(logits.dtype, torch.float32)
    margin = (logits[:, 1] - logits[:, 0]).to(wide)
    inside = masks.bool()
    truth = inside.to(wide)
    # Two classes' cross-entropy is a logistic loss of the difference of their logits.
    each = nn.functional.softplus(torch.where(inside, -margin, margin))
    if kind == "bce":
        return each.mean()
    weight = class_weights[0] + (class_weights[1] - class_weights[0]) * truth
    if kind == "focal":
        weight_of_loss = weight * (1 - torch.exp(-each)) ** focal_gamma
        return (weight_of_loss * each).sum() / weight.sum()
    loss = (weight * each).sum() / weight.sum()
    if kind == "dice_cross_entropy":
        said = torch.sigmoid(margin).flatten(1)
        truth = truth.flatten(1)
        dice = (2 * (said * truth).sum(1) + 1) / (said.sum(1) + truth.sum(1) + 1)
        loss = loss + (1 - dice).mean()
    return loss
