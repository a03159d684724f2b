"""Generated utterances, a text with a voice and a face, whose sentiment no modality tells alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from epic_fast.data.sequences import LENGTHS, SENTIMENT_RANGE, write_sequences
from epic_fast.errors import ConfigError
from epic_fast.files import atomic_folder


@dataclass(frozen=True)
class _Recipe:
    """How generated utterances come about; see :func:`make_sentiment`."""

    acoustic: int = 74
    facial: int = 35
    frames: tuple[int, int] = (12, 40)
    noise: float = 0.15


POSITIVE = "wonderful brilliant moving delightful superb charming lovely excellent".split()
NEGATIVE = "dreadful boring clumsy awful tedious dull painful terrible".split()
NEUTRAL = "long recent foreign short animated quiet early local".split()
NOUNS = "film story ending cast music plot scene script".split()
OPENINGS = ("the {noun} was {word}", "I found the {noun} {word}", "what a {word} {noun}", "it is a {word} {noun}")


def make_sentiment(
    folder: str | os.PathLike[str], *, train: int = 2000, validation: int = 300, test: int = 600, seed: int = 0
) -> Path:
    """Write generated utterances as a folder of npz files, whose label no modality tells alone.

    A text says t of -1, 0 or 1 by its adjective.  A voice has a, a face f, both uniform in [-1, 1]: each shows as a
    fixed direction of its features in a stretch of 60 % of the frames, over noise that drifts from frame to frame and
    differs in level from speaker to speaker.  The sentiment is t (1 + f / 2) + 5/4 (a + f) and a little noise, cut to
    [-3, 3]: whoever lacks one of the three lacks a quarter of its variance or more, and a frown turns a kind word down.

    Utterance i of a split depends on (seed, split, i) alone, and the two directions on the seed.

    Args:
        folder: where to; must be empty or not there.

    Raises:
        ConfigError: the folder holds something.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"make_sentiment: {str(folder)!r} is not empty; wanted a new folder")
    recipe = _Recipe()
    ways = np.random.default_rng([seed, 9])
    directions = {name: _unit(ways.standard_normal(getattr(recipe, name))) * 4.0 for name in ("acoustic", "facial")}
    with atomic_folder(folder) as place:
        for number, (split, count) in enumerate((("train", train), ("validation", validation), ("test", test))):
            if count:
                made = [
                    _utterance(np.random.default_rng([seed, number, each]), recipe, directions) for each in range(count)
                ]
                write_sequences(place / f"{split}.npz", _arrays(made, recipe))
    return folder


def _utterance(random: np.random.Generator, recipe: _Recipe, directions: Mapping[str, np.ndarray]) -> dict[str, Any]:
    said = int(random.integers(-1, 2))
    word = str(random.choice((NEUTRAL, POSITIVE, NEGATIVE)[said]))
    text = str(random.choice(OPENINGS)).format(noun=str(random.choice(NOUNS)), word=word)
    voice, face = (float(each) for each in random.uniform(-1, 1, size=2))
    label = said * (1 + face / 2) + 1.25 * (voice + face) + recipe.noise * random.standard_normal()
    found: dict[str, Any] = {"text": text, "label": float(np.clip(label, *SENTIMENT_RANGE))}
    for name, latent in (("acoustic", voice), ("facial", face)):
        frames = int(random.integers(recipe.frames[0], recipe.frames[1] + 1))
        width = getattr(recipe, name)
        noise = random.standard_normal((frames, width))
        for frame in range(1, frames):  # neighbouring frames are alike
            noise[frame] = 0.6 * noise[frame - 1] + 0.8 * noise[frame]
        shown = int(np.ceil(0.6 * frames))
        first = int(random.integers(0, frames - shown + 1))
        noise[first : first + shown] += latent * directions[name]
        found[name] = (noise + 0.3 * random.standard_normal(width)).astype(np.float32)
    return found


def _arrays(made: list[dict[str, Any]], recipe: _Recipe) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {
        "text": np.array([each["text"] for each in made], dtype=str),
        "label": np.array([each["label"] for each in made], dtype=np.float32),
    }
    for name in ("acoustic", "facial"):
        lengths = np.array([len(each[name]) for each in made])
        padded = np.zeros((len(made), lengths.max(), getattr(recipe, name)), np.float32)
        for place, each in enumerate(made):
            padded[place, : lengths[place]] = each[name]
        arrays |= {name: padded, name + LENGTHS: lengths}
    return arrays


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)
