"""What the frozen towers make of the demo's pictures and titles, computed once for every rival."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import safetensors.torch
import torch
from PIL import Image, ImageOps
from torch import Tensor

from epic_fast.backbones import DualEncoder, Tower
from epic_fast.backbones.demo import VISION_FOLDER
from epic_fast.data import Collator, PairDataset, read_folder, resolve_data
from epic_fast.engine import PrefixCache, TowerCache, TowerState

SPLITS = ("train", "validation", "test")
TEXT_FEATURES, VISION_FEATURES = "mean", "cls+mean"


@dataclass
class FrozenPairs:
    """The demo's pairs as the frozen towers see them; rows are those of train, validation and test in turn.

    Attributes:
        cache: both towers right below the first layers with prompts.
        text: ``(n, 384)`` mean of MiniLM's last layer.
        vision: ``(n, 512)`` class token and patch mean of the ViT's last layer, after its final norm.
        labels: ``(n,)`` class ids.
        rows: the rows of each split.
        views: ``(n, 1 + V)`` the rows of the cache and of ``vision`` that show each picture: itself first, then V
            augmented views of training pictures (repeated for the others, which have none).
        names: class names.
        titles, pictures: the title and the file of each row.
    """

    cache: PrefixCache
    text: Tensor
    vision: Tensor
    labels: Tensor
    rows: dict[str, Tensor]
    views: Tensor
    names: list[str]
    titles: list[str]
    pictures: list[Path]

    @property
    def device(self) -> torch.device:
        return self.text.device

    @torch.no_grad()
    def advanced(self, backbone: DualEncoder, first_layers: tuple[int, int], *, batch_size: int = 64) -> FrozenPairs:
        """The same pairs, the cache standing below higher (text, vision) layers."""

        def advance(cache: TowerCache, tower: Tower, layer: int) -> TowerCache:
            if cache.layer == layer:
                return cache
            states: list[TowerState] = [
                tower.run(cache.rows(rows), layer) for rows in torch.arange(len(cache)).split(batch_size)
            ]
            return TowerCache(states)

        text = advance(self.cache.text, backbone.text, first_layers[0])
        vision = advance(self.cache.vision, backbone.vision, first_layers[1])
        return replace(self, cache=PrefixCache.from_towers(text, vision))

    def aligned_vision(self) -> Tensor:
        """The pictures in the space of the titles, ``(n, 384)``, by the map that the tower was aligned with."""
        alignment = safetensors.torch.load_file(VISION_FOLDER / "alignment.safetensors")
        weight, bias = (alignment[f"visual_projection.{name}"].to(self.vision) for name in ("weight", "bias"))
        return torch.nn.functional.linear(self.vision, weight, bias)


@torch.no_grad()
def read_frozen_pairs(
    backbone: DualEncoder,
    first_layers: tuple[int, int],
    *,
    views: int = 0,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> FrozenPairs:
    """Read the demo's pairs and run them through the towers.

    Args:
        backbone: the demo's pair of towers.
        first_layers: (text, vision) layers below which the cache stands.
        views: augmented views of each training picture.
        device: where to run and to keep the result.
        tick: told (pairs done, pairs in all) after every batch.
    """
    folder = read_folder(resolve_data("demo"))
    backbone.to(device)
    collator = Collator(backbone.image_processor, backbone.tokenizer, max_text_length=backbone.max_text_length)
    parts: list[PairDataset] = [folder.splits[name] for name in SPLITS]
    pairs = sum(map(len, parts))
    total = pairs + views * len(parts[0])
    text_states, vision_states, text_features, vision_features, labels = [], [], [], [], []
    text_layer, vision_layer = first_layers
    done = 0
    for part in parts:
        for start in range(0, len(part), batch_size):
            examples = [part[index] for index in range(start, min(start + batch_size, len(part)))]
            batch = {name: tensor.to(device) for name, tensor in collator(examples).items()}
            labels.append(batch.pop("labels"))
            pixel_values = batch.pop("pixel_values")
            text = backbone.text.run(backbone.text.start(**batch), text_layer)
            vision = backbone.vision.run(backbone.vision.start(pixel_values), vision_layer)
            text_states.append(text)
            vision_states.append(vision)
            text = backbone.text.run_all(text)
            vision = backbone.vision.run_all(vision)
            text_features.append(backbone.text.features(text, TEXT_FEATURES))
            vision_features.append(backbone.vision.features(vision, VISION_FEATURES))
            done += len(examples)
            tick(done, total)
    shown = torch.arange(pairs)[:, None].repeat(1, 1 + views)
    random = Random(0)
    for view in range(views):
        shown[: len(parts[0]), 1 + view] = torch.arange(done, done + len(parts[0]))
        for start in range(0, len(parts[0]), batch_size):
            stop = min(start + batch_size, len(parts[0]))
            pictures = [augmented(parts[0][index].image, random) for index in range(start, stop)]
            pixel_values = backbone.image_processor(pictures, return_tensors="pt")["pixel_values"].to(device)
            vision = backbone.vision.run(backbone.vision.start(pixel_values), vision_layer)
            vision_states.append(vision)
            vision = backbone.vision.run_all(vision)
            vision_features.append(backbone.vision.features(vision, VISION_FEATURES))
            done += stop - start
            tick(done, total)
    rows, first = {}, 0
    for name, part in zip(SPLITS, parts, strict=True):
        rows[name] = torch.arange(first, first + len(part), device=device)
        first += len(part)
    return FrozenPairs(
        cache=PrefixCache.from_towers(TowerCache(text_states), TowerCache(vision_states)),
        text=torch.cat(text_features),
        vision=torch.cat(vision_features),
        labels=torch.cat(labels),
        rows=rows,
        views=shown.to(device),
        names=folder.labels,
        titles=[title for part in parts for title in part.texts()],
        pictures=[row.path for part in parts for row in part.rows],
    )


def augmented(picture: Image.Image, random: Random) -> Image.Image:
    """A picture flipped (half of the time), turned by up to 12 degrees on white and cropped to 75 to 100 %."""
    if random.random() < 0.5:
        picture = ImageOps.mirror(picture)
    picture = picture.rotate(random.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))
    width, height = picture.size
    kept_width, kept_height = (max(8, round(side * random.uniform(0.75, 1.0))) for side in (width, height))
    left, top = random.randint(0, width - kept_width), random.randint(0, height - kept_height)
    return picture.crop((left, top, left + kept_width, top + kept_height))
