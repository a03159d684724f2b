"""Rendered scenes of coloured shapes, with expressions that mean exactly one of them: data of referring segmentation.

A scene has three to five shapes on a pale ground, none touching another.  An expression names the target by its
attributes ("the small red circle"), by its place among its like ("the leftmost star") or by its relation to another
shape ("the circle left of the blue square").  Some pairs of colour and shape are held out: no scene of training or
validation has them, and the targets of half of the test scenes do.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from epic_fast.errors import ConfigError
from epic_fast.files import atomic_folder, atomic_write_text

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (42, 157, 60),
    "blue": (38, 80, 214),
    "yellow": (246, 205, 30),
    "purple": (140, 50, 180),
    "orange": (245, 130, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
# Every colour and every shape is known from other pairs.
HELD_OUT = (
    ("red", "square"),
    ("green", "star"),
    ("blue", "triangle"),
    ("yellow", "circle"),
    ("purple", "cross"),
    ("orange", "circle"),
)
# Half the side of a shape's box, in parts of the picture's side.
RADII = {"small": (0.085, 0.105), "large": (0.15, 0.185)}
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
EXTREMES = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "lowest": (1, 1)}
# Centres that differ by less, in parts of the side, are neither left nor right of each other to the eye.
CLEAR = 0.06
KINDS = ("attributes", "extreme", "relation")
SPLITS = ("train", "validation", "test")
_OVERSAMPLED = 4


@dataclass(frozen=True)
class Thing:
    """A shape of a scene; centre and radius (half the side of its box) are parts of the picture's side."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def place(self) -> tuple[float, float]:
        return (self.x, self.y)


@dataclass(frozen=True)
class Phrase:
    """What an expression says of a shape; None: nothing."""

    shape: str | None
    colour: str | None = None
    size: str | None = None

    def fits(self, thing: Thing) -> bool:
        wanted = ((self.shape, thing.shape), (self.colour, thing.colour), (self.size, thing.size))
        return all(said is None or said == own for said, own in wanted)

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.colour, self.shape or "shape") if word)


@dataclass(frozen=True)
class Scene:
    """Shapes, the expression and the place of what it means among them."""

    things: tuple[Thing, ...]
    text: str
    target: int
    kind: str


def sample_scene(random: np.random.Generator, *, held_out: bool | None = False) -> Scene:
    """A scene with an expression that means exactly one shape, and clearly so.

    Args:
        random: from which all is drawn.
        held_out: whether the target is of a pair in :data:`HELD_OUT`.  With False no shape of the scene is; with True
            any other may be.
    """
    while True:
        things = _things(random, any_pair=bool(held_out))
        targets = [place for place, each in enumerate(things) if (_pair(each) in HELD_OUT) == bool(held_out)]
        if not targets:
            continue
        kind = KINDS[random.choice(len(KINDS), p=(0.4, 0.2, 0.4))]
        target = targets[random.integers(len(targets))]
        said = list(_expressions(things, target, kind))
        if said:
            return Scene(things, said[random.integers(len(said))], target, kind)


def render(things: Sequence[Thing], side: int, ground: tuple[int, int, int]) -> Image.Image:
    """The picture, ``side`` x ``side``, anti-aliased."""
    large = Image.new("RGB", (side * _OVERSAMPLED, side * _OVERSAMPLED), ground)
    draw = ImageDraw.Draw(large)
    for thing in things:
        _draw(draw, thing, large.width, COLOURS[thing.colour])
    return large.resize((side, side), Image.Resampling.BOX)


def render_mask(thing: Thing, side: int) -> Image.Image:
    """0 and 255: the pixels that the shape covers by half or more."""
    large = Image.new("L", (side * _OVERSAMPLED, side * _OVERSAMPLED), 0)
    _draw(ImageDraw.Draw(large), thing, large.width, 255)
    return large.resize((side, side), Image.Resampling.BOX).point([0] * 128 + [255] * 128)


@dataclass(frozen=True)
class Drawn:
    """A scene of a split with its picture and the target's mask; ``held_out``: whether the target's pair is."""

    scene: Scene
    held_out: bool
    picture: Image.Image
    mask: Image.Image


def draw_scene(seed: int, split: str, number: int, side: int = 160) -> Drawn:
    """Scene ``number`` of a split, which depends on these alone; of the test scenes the odd ones are held out."""
    held_out = split == "test" and number % 2 == 1
    random = np.random.default_rng([seed, SPLITS.index(split), number])
    scene = sample_scene(random, held_out=held_out)
    red, green, blue = (int(each) for each in random.integers(225, 256, size=3))
    picture = render(scene.things, side, (red, green, blue))
    return Drawn(scene, held_out, picture, render_mask(scene.things[scene.target], side))


def make_scenes(
    folder: str | os.PathLike[str],
    *,
    train: int = 4000,
    validation: int = 400,
    test: int = 800,
    side: int = 160,
    seed: int = 0,
) -> Path:
    """Write scenes as a data folder: pictures, masks, and ``metadata.jsonl`` with ``file_name``, ``mask``, ``text``,
    ``split``, and besides ``kind`` (of expression), ``combination`` (``"seen"`` or ``"held out"``) and ``objects``
    (the shapes, the target first).

    Scene i of a split depends on (seed, split, i) alone.  Half of the test targets are of held-out pairs.

    Args:
        folder: where to; must be empty or not there.
        train, validation, test: scenes of each split.
        side: pixels of a picture's side.

    Raises:
        ConfigError: the folder holds something, or a number below what is needed.
    """
    folder = Path(folder)
    counts = dict(zip(SPLITS, (train, validation, test), strict=True))
    if min(counts.values()) < 0 or train < 1 or side < 16:
        raise ConfigError(f"make_scenes: {counts}, side={side}; wanted at least one scene to train on and 16 pixels")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"make_scenes: {str(folder)!r} is not empty; wanted a new folder")
    with atomic_folder(folder) as place:
        lines = []
        for split, count in counts.items():
            for name in ("pictures", "masks"):
                (place / name).mkdir(exist_ok=True)
            for number in range(count):
                drawn = draw_scene(seed, split, number, side)
                scene = drawn.scene
                name = f"{split}_{number:05d}.png"
                picture, mask = f"pictures/{name}", f"masks/{name}"
                drawn.picture.save(place / picture)
                drawn.mask.save(place / mask)
                target = scene.things[scene.target]
                others = [each for at, each in enumerate(scene.things) if at != scene.target]
                row = {
                    "file_name": picture,
                    "mask": mask,
                    "text": scene.text,
                    "split": split,
                    "kind": scene.kind,
                    "combination": "held out" if drawn.held_out else "seen",
                    "objects": [{**asdict(each), **_rounded(each)} for each in (target, *others)],
                }
                lines.append(json.dumps(row))
        atomic_write_text(place / "metadata.jsonl", "\n".join(lines) + "\n")
    return folder


def _rounded(thing: Thing) -> dict[str, float]:
    return {"x": round(thing.x, 4), "y": round(thing.y, 4), "radius": round(thing.radius, 4)}


def _pair(thing: Thing) -> tuple[str, str]:
    return (thing.colour, thing.shape)


# -- what is in a scene ----------------------------------------------------------------------------------------------


def _things(random: np.random.Generator, *, any_pair: bool) -> tuple[Thing, ...]:
    """Three to five shapes that keep apart; now and then one is like another, so that a word alone does not do."""
    while True:
        found: list[Thing] = []
        for _ in range(int(random.integers(3, 6))):
            thing = _thing(random, found, any_pair)
            if thing is None:
                break
            found.append(thing)
        else:
            return tuple(found)


def _thing(random: np.random.Generator, others: Sequence[Thing], any_pair: bool) -> Thing | None:
    """One more shape, None where there is no room for it."""
    while True:
        colour, shape = str(random.choice(list(COLOURS))), str(random.choice(SHAPES))
        if others and random.random() < 0.5:
            like = others[int(random.integers(len(others)))]
            colour, shape = (like.colour, shape) if random.random() < 0.5 else (colour, like.shape)
        if any_pair or (colour, shape) not in HELD_OUT:
            break
    size = str(random.choice(list(RADII)))
    radius = float(random.uniform(*RADII[size]))
    for _ in range(40):
        x, y = (float(each) for each in random.uniform(radius + 0.02, 0.98 - radius, size=2))
        apart = (max(abs(x - each.x), abs(y - each.y)) - radius - each.radius for each in others)
        if all(gap > 0.025 for gap in apart):
            return Thing(colour, shape, size, round(x, 4), round(y, 4), round(radius, 4))
    return None


# -- what is said of it ----------------------------------------------------------------------------------------------


def _phrases(thing: Thing) -> Iterator[Phrase]:
    for shape in (thing.shape, None):
        for colour in (None, thing.colour):
            for size in (None, thing.size):
                if shape or colour:
                    yield Phrase(shape, colour, size)


def _expressions(things: Sequence[Thing], target: int, kind: str) -> Iterator[str]:
    """Every expression of this kind that means the target and, clearly, nothing else."""
    for phrase in _phrases(things[target]):
        alike = [place for place, each in enumerate(things) if phrase.fits(each)]
        if kind == "attributes":
            if len(alike) == 1:
                yield f"the {phrase}"
        elif len(alike) > 1 or kind == "relation":
            yield from _by_place(things, target, phrase, alike, kind)


def _by_place(things: Sequence[Thing], target: int, phrase: Phrase, alike: Sequence[int], kind: str) -> Iterator[str]:
    own = things[target].place
    if kind == "extreme":
        for word, (axis, sign) in EXTREMES.items():
            rivals = [sign * things[each].place[axis] for each in alike if each != target]
            if max(rivals) < sign * own[axis] - CLEAR:
                yield f"the {word} {phrase}"
        return
    if len(alike) == 1:
        return  # the relation would say nothing
    for anchor in range(len(things)):
        if anchor == target:
            continue
        names = [each for each in _phrases(things[anchor]) if sum(map(each.fits, things)) == 1]
        for word, (axis, sign) in RELATIONS.items():
            centre = things[anchor].place[axis]
            if sign * (own[axis] - centre) <= CLEAR:
                continue
            # A rival must be clearly on the other side; the anchor itself is no rival.
            rivals = [sign * (things[each].place[axis] - centre) for each in alike if each not in (target, anchor)]
            if all(each < -CLEAR for each in rivals):
                yield from (f"the {phrase} {word} the {name}" for name in names)


# -- how it looks ----------------------------------------------------------------------------------------------------


def _draw(draw: ImageDraw.ImageDraw, thing: Thing, side: int, colour: tuple[int, int, int] | int) -> None:
    x, y, radius = thing.x * side, thing.y * side, thing.radius * side
    if thing.shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        return
    outline = _outline(thing.shape)
    draw.polygon([(x + radius * across, y + radius * down) for across, down in outline], fill=colour)


def _outline(shape: str) -> list[tuple[float, float]]:
    """The corners in a box from -1 to 1."""
    if shape == "square":
        return [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    if shape == "triangle":
        return [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)]
    if shape == "star":
        angles = [math.pi * (each / 5 - 0.5) for each in range(10)]
        lengths = [1.0, 0.45] * 5
        return [
            (length * math.cos(angle), length * math.sin(angle)) for length, angle in zip(lengths, angles, strict=True)
        ]
    arm = 0.36
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-down, across) for across, down in quarter]
    return corners
