"""Pairs of a picture and a text, decoded one at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from epic_fast.data.images import load_image, load_mask
from epic_fast.errors import DataError


@dataclass(frozen=True)
class Mask:
    """The label of referring segmentation, not read yet: a picture that is not 0 where the object is.

    Attributes:
        where: the line that names it.
    """

    name: str
    path: Path
    where: str


Label = int | list[int] | float | Mask | np.ndarray


@dataclass(frozen=True)
class Example:
    """One pair, read.

    Attributes:
        image: upright RGB, of any size; None where the data has no pictures.
        text: as written.
        label: the class id, the list of class ids (multi-label), the number (regression), the mask as booleans
            ``(H, W)`` (segmentation), or None.
        name: the picture as the metadata names it.
        sequences: of further modalities, float32 ``(T, width)`` by name, each as long as it is.
    """

    image: Any
    text: str
    label: Label | None
    name: str
    sequences: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One pair, not read yet.

    Attributes:
        where: the line that says so, such as ``"train/metadata.jsonl, line 12"``.
    """

    name: str
    path: Path
    text: str
    label: Label | None
    where: str


@dataclass(eq=False)
class PairDataset(Dataset[Example]):
    """Rows of a split; ``dataset[i]`` decodes the picture of row i, nothing is held in memory.

    Attributes:
        rows: one :class:`Row` for each pair.
        labels: the class names in the order of their ids; empty for regression and without labels.
        problem_type: one of transformers' three, ``"segmentation"``, or None without labels.
        skipped: what ``skip_bad`` left out of this split, a line each.
    """

    rows: Sequence[Row]
    labels: list[str] = field(default_factory=list)
    problem_type: str | None = None
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        picture = read_picture(row)
        label = row.label
        if isinstance(label, Mask):
            label = read_mask(label)
            check_sizes(label, picture, row)
        return Example(picture, row.text, label, row.name)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def has_labels(self) -> bool:
        """Whether every row has a label (a split has labels in all of its rows or in none)."""
        return bool(self.rows) and all(row.label is not None for row in self.rows)

    def texts(self) -> list[str]:
        """The texts, in order; no picture is touched."""
        return [row.text for row in self.rows]

    def picture_digests(self) -> list[bytes]:
        """Digest (16 bytes) of the contents of each picture's file, in order; each file is read once, none decoded.

        Raises:
            DataError: a file that cannot be read, naming the row.
        """
        first = {row.path: row for row in reversed(self.rows)}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = dict(zip(first, pool.map(_file_digest, first.values()), strict=True))
        return [found[row.path] for row in self.rows]

    def names(self) -> list[str]:
        """The pictures as the metadata names them, in order."""
        return [row.name for row in self.rows]

    def label_ids(self) -> list[Label]:
        """The labels as in :attr:`Example.label`, in order; no picture is touched.

        Raises:
            DataError: a row without a label.
        """
        found = []
        for row in self.rows:
            if row.label is None:
                raise DataError(f"{row.where}: no label; labels are needed to train and to evaluate, not to predict")
            found.append(row.label)
        return found


def _file_digest(row: Row) -> bytes:
    try:
        return hashlib.blake2b(row.path.read_bytes(), digest_size=16, person=b"file").digest()
    except OSError as error:
        raise DataError(f"{row.where}: the picture {row.name!r} cannot be read: {error}") from error


def read_picture(row: Row) -> Image.Image:
    """The picture of a row as RGB.

    Raises:
        DataError: it cannot be read, naming the row.
    """
    try:
        return load_image(row.path)
    except DataError as error:
        raise DataError(
            f"{row.where}: {error}. To go on without such rows: --skip-bad on the command line, "
            "read_folder(..., skip_bad=True) in Python"
        ) from error


def read_mask(mask: Mask) -> np.ndarray:
    """A mask as booleans ``(H, W)``.

    Raises:
        DataError: it cannot be read, or is no mask, naming the row.
    """
    try:
        return load_mask(mask.path)
    except DataError as error:
        raise DataError(
            f"{mask.where}: {error}. To go on without such rows: --skip-bad on the command line, "
            "read_folder(..., skip_bad=True) in Python"
        ) from error


def check_sizes(mask: np.ndarray, picture: Image.Image, row: Row) -> None:
    """Raise a DataError unless the mask has the picture's size."""
    if mask.shape != (picture.height, picture.width):
        raise DataError(
            f"{row.where}: the mask is {mask.shape[1]} x {mask.shape[0]} pixels, its picture {row.name!r} "
            f"{picture.width} x {picture.height} (upright); wanted the same, a mask pixel for each of the picture's"
        )
