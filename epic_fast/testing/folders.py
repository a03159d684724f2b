"""Small data folders in the imagefolder convention, drawn by a seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}


def make_folder(
    folder: str | Path,
    *,
    train: int = 24,
    validation: int = 9,
    test: int = 9,
    multi_label: bool = False,
    seed: int = 0,
) -> Path:
    """Pictures of one colour (the class) with a title that half of the time names it; ``metadata.jsonl``.

    ``multi_label`` writes a list column ``labels`` (the colour, and "large" for half of the rows) in place of the
    string column ``label``.
    """
    from PIL import Image

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    names = list(COLOURS)
    with (folder / "metadata.jsonl").open("w") as lines:
        row = 0
        for split, count in (("train", train), ("validation", validation), ("test", test)):
            for _ in range(count):
                name = names[row % len(names)]
                noise = random.integers(-25, 26, size=(40, 40, 3))
                pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{row:04d}.png")
                large = bool(random.integers(2))
                said = name if random.integers(2) else "not"
                text = f"a {'large' if large else 'small'} {said} square"
                entry: dict[str, object] = {"file_name": f"{row:04d}.png", "text": text, "split": split}
                if multi_label:
                    entry["labels"] = [name, "large"] if large else [name]
                else:
                    entry["label"] = name
                lines.write(json.dumps(entry) + "\n")
                row += 1
    return folder
