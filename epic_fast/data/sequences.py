"""Texts with sequences of acoustic and facial features, shaped as CMU-MOSI and CMU-MOSEI: folders of npz files."""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from epic_fast.data.dataset import Example
from epic_fast.data.labels import REGRESSION
from epic_fast.data.metadata import METADATA_NAMES, SPLIT_NAMES, whole_characters
from epic_fast.errors import DataError

logger = logging.getLogger("epic_fast")

LENGTHS = "_lengths"
SENTIMENT_RANGE = (-3.0, 3.0)
FLOAT32_END = 3.4e38
EXPECTED_FILES = """\
FOLDER/
  train.npz, validation.npz (or val, valid, dev), test.npz
each with, for N utterances, arrays saved by numpy.savez (no pickled objects):
  text              (N,) strings, numpy's dtype U
  acoustic          (N, T, 74) numbers, and so on for each modality, padded to T frames (names are free)
  acoustic_lengths  (N,) whole numbers, the valid frames, the first ones (without it, all T)
  label             (N,) numbers, such as sentiment from -3 to 3
  id                (N,) strings (optional)"""


@dataclass(eq=False)
class SequenceDataset(Dataset[Example]):
    """Utterances of a split, in memory.

    Attributes:
        sequences: by name, ``(N, T, width)`` float32.
        lengths: by name, ``(N,)``.
        values: ``(N,)`` labels; None without.
    """

    rows_text: list[str]
    sequences: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray]
    values: np.ndarray | None
    ids: list[str]
    labels: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def problem_type(self) -> str | None:
        return None if self.values is None else REGRESSION

    @property
    def has_labels(self) -> bool:
        return self.values is not None

    @property
    def widths(self) -> dict[str, int]:
        """Width of a frame of each sequence."""
        return {name: each.shape[2] for name, each in self.sequences.items()}

    def __len__(self) -> int:
        return len(self.rows_text)

    def __getitem__(self, index: int) -> Example:
        found = {name: each[index, : self.lengths[name][index]] for name, each in self.sequences.items()}
        label = None if self.values is None else float(self.values[index])
        return Example(None, self.rows_text[index], label, self.ids[index], found)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def texts(self) -> list[str]:
        """The texts, in order."""
        return list(self.rows_text)

    def names(self) -> list[str]:
        """The utterances' ids, in order."""
        return list(self.ids)

    def label_ids(self) -> list[float]:
        """The labels, in order.

        Raises:
            DataError: there are none.
        """
        if self.values is None:
            raise DataError("these utterances have no labels; they are needed to train and to evaluate, not to predict")
        return self.values.tolist()


def sequence_files(folder: Path) -> dict[str, Path]:
    """The npz file of each split in a folder; empty where there is none, or where metadata name pictures.

    Raises:
        DataError: two files for one split.
    """
    places = (folder, *(folder / name for name in SPLIT_NAMES))
    if any((place / name).is_file() for place in places for name in METADATA_NAMES):
        return {}
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.npz")):
        split = SPLIT_NAMES.get(path.stem)
        if split is None:
            continue
        if split in found:
            raise DataError(
                f"{str(folder)!r} has {found[split].name} and {path.name} for the split {split!r}; keep one"
            )
        found[split] = path
    return {split: found[split] for split in ("train", "validation", "test") if split in found}


def read_sequences(path: str | os.PathLike[str]) -> SequenceDataset:
    """One npz file of utterances.

    Values that are no numbers (public COVAREP features hold infinities) become 0, with a line in the log.

    Raises:
        DataError: no such file, pickled objects, missing arrays, or shapes that do not fit, each by name.
    """
    path = Path(path)
    arrays = _load(path)
    where = path.name
    texts = arrays.pop("text", None)
    if texts is None or texts.ndim != 1 or texts.dtype.kind != "U":
        said = "no array 'text'" if texts is None else f"text has shape {texts.shape} and type {texts.dtype}"
        raise DataError(f"{where}: {said}; wanted (N,) strings. Wanted:\n{EXPECTED_FILES}")
    count = len(texts)
    if not count:
        raise DataError(f"{where}: no utterances")
    ids = arrays.pop("id", None)
    if ids is not None and ids.shape != (count,):
        raise DataError(f"{where}: id has shape {ids.shape}; wanted ({count},), one a text")
    names = [f"{path.stem}[{place}]" for place in range(count)] if ids is None else [str(each) for each in ids]
    values = arrays.pop("label", None)
    if values is not None:
        values = _labels(values, count, where)
    given = {name: arrays.pop(name) for name in list(arrays) if name.endswith(LENGTHS)}
    sequences = {name: _sequence(name, each, count, where) for name, each in arrays.items() if each.ndim == 3}
    left = [name for name, each in arrays.items() if each.ndim != 3]
    if left:
        logger.warning("%s: %s left alone, not (N, T, width)", where, ", ".join(left))
    lengths = {}
    for name, each in sequences.items():
        lengths[name] = _lengths(name, given.pop(name + LENGTHS, None), each, where)
    if given:
        raise DataError(f"{where}: {', '.join(given)} without the sequence; there are {', '.join(sequences) or 'none'}")
    return SequenceDataset([whole_characters(str(text)) for text in texts], sequences, lengths, values, names)


def write_sequences(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Save arrays by name as one npz file, whole or not at all."""
    from epic_fast.files import atomic_file

    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]


def digest(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _load(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DataError(f"the file {str(path)!r} does not exist. Wanted:\n{EXPECTED_FILES}")
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise DataError(f"{path.name}: one array, no npz file. Wanted:\n{EXPECTED_FILES}")
        with file:
            _check_size(path, file.zip)
            arrays = {name: file[name] for name in file.files}
    except DataError:
        raise
    # Damaged bytes raise nearly anything (zlib.error, NotImplementedError, tokenize's errors of a header), and an array
    # that says to be larger than the memory a MemoryError.
    except Exception as error:
        pickled = "pickle" in str(error)
        mend = "save strings with dtype=str, and padded arrays of numbers" if pickled else "write it again"
        raise DataError(f"{path.name}: cannot be read ({error}); {mend}. Wanted:\n{EXPECTED_FILES}") from error
    strangers = [name for name, each in arrays.items() if not isinstance(each, np.ndarray)]
    if strangers:
        raise DataError(f"{path.name}: {', '.join(strangers)} in it is no array. Wanted:\n{EXPECTED_FILES}")
    return arrays


def _check_size(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise a DataError if the arrays, which a few compressed bytes can make any size, are larger than the memory."""
    wanted = sum(member.file_size for member in archive.infolist())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else wanted
    if wanted > memory:
        raise DataError(
            f"{path.name}: its arrays take {wanted / 2**30:,.1f} GiB, this machine has {memory / 2**30:,.1f}; wanted "
            "fewer utterances a file"
        )


def _labels(values: np.ndarray, count: int, where: str) -> np.ndarray:
    if values.dtype.kind not in "fiu" or values.shape not in ((count,), (count, 1)):
        raise DataError(
            f"{where}: label has shape {values.shape} and type {values.dtype}; wanted ({count},) finite numbers"
        )
    values = values.reshape(count)
    wrong = np.flatnonzero(~(np.abs(values) < FLOAT32_END))
    if len(wrong):
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        first = f"label[{wrong[0]}] is {values[wrong[0]]}"
        raise DataError(f"{where}: {first}, no finite number{more}; wanted ({count},) finite numbers")
    values = values.astype(np.float32)
    low, high = SENTIMENT_RANGE
    outside = int(((values < low) | (values > high)).sum())
    if outside:
        logger.warning(
            "%s: %d labels are not from %g to %g; Acc-7 and the like mean sentiment", where, outside, low, high
        )
    return values


def _sequence(name: str, values: np.ndarray, count: int, where: str) -> np.ndarray:
    if len(values) != count or not values.shape[2] or values.dtype.kind not in "fiu" or not name.isidentifier():
        raise DataError(
            f"{where}: {name} has shape {values.shape} and type {values.dtype}; wanted ({count}, T, width) numbers, "
            "one a text, and a name that is an identifier"
        )
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    wrong = ~np.isfinite(values)
    if wrong.any():
        logger.warning(
            "%s: %d values of %s are no numbers (inf or nan); they count as 0", where, int(wrong.sum()), name
        )
        values[wrong] = 0.0
    return values


def _lengths(name: str, given: np.ndarray | None, values: np.ndarray, where: str) -> np.ndarray:
    count, frames = values.shape[:2]
    if given is None:
        return np.full(count, frames, dtype=np.int64)
    if given.shape != (count,) or given.dtype.kind not in "iu" or given.min() < 0 or given.max() > frames:
        raise DataError(
            f"{where}: {name}{LENGTHS} has shape {given.shape} and type {given.dtype}; wanted ({count},) whole numbers "
            f"from 0 to {frames}, the frames of {name}"
        )
    return given.astype(np.int64)
