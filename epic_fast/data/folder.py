"""Folders of pictures and texts in the imagefolder convention."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from epic_fast.data.dataset import Mask, PairDataset, Row, check_sizes, read_mask, read_picture
from epic_fast.data.labels import (
    REGRESSION,
    SEGMENTATION,
    SINGLE,
    LabelEncoder,
    check_problem_type,
    class_names,
    infer_problem_type,
)
from epic_fast.data.metadata import (
    LABEL_FIELD_HINT,
    Complain,
    Entry,
    Fields,
    MetadataFile,
    find_metadata,
    read_entries,
    read_label_names,
    refuse,
    whole_characters,
)
from epic_fast.data.sequences import digest, read_sequences, sequence_files
from epic_fast.errors import DataError

logger = logging.getLogger("epic_fast")

SKIP_HINT = "put the file there, or leave such rows out: --skip-bad on the command line, skip_bad=True in Python"


@dataclass
class DataFolder:
    """A data folder, read; pictures are decoded when an item is asked for.

    Attributes:
        splits: ``train``, ``validation``, ``test``, those that there are.
        labels: the class names in the order of their ids; empty for regression, segmentation and without labels.
        problem_type: one of transformers' three, ``"segmentation"``, or None without labels.
        skipped: what ``skip_bad`` left out, a line each.
        warnings: what is odd, a line each; all of it was logged.
        metadata: the metadata files with their sha256, for the record of a run.
        sequences: names and widths of the sequences that go with the texts, of a folder of npz files; its splits are
            :class:`~epic_fast.data.SequenceDataset`.
    """

    path: Path
    splits: dict[str, Any]
    labels: list[str]
    problem_type: str | None
    skipped: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    sequences: dict[str, int] = field(default_factory=dict)

    @property
    def num_labels(self) -> int:
        """Width of the logits: 1 for regression, 2 (background and object) for segmentation, 0 without labels."""
        if self.problem_type == SEGMENTATION:
            return 2
        return 1 if self.problem_type == REGRESSION else len(self.labels)

    def split(self, name: str) -> Any:
        """The split of this name.

        Raises:
            DataError: there is none, naming those that there are.
        """
        if name not in self.splits:
            raise DataError(f"{str(self.path)!r} has no split {name!r}; it has {', '.join(self.splits)}")
        return self.splits[name]

    def describe(self) -> dict[str, Any]:
        """What was read, in JSON's types: for the record of a run."""
        return {
            "metadata": dict(self.metadata),
            "rows": {name: len(dataset) for name, dataset in self.splits.items()},
            "problem_type": self.problem_type,
            "labels": list(self.labels),
            "skipped": len(self.skipped),
        }


def read_folder(
    path: str | os.PathLike[str],
    *,
    text_field: str = "text",
    label_field: str | None = None,
    split_field: str = "split",
    skip_bad: bool = False,
    problem_type: str | None = None,
    labels: Sequence[str] | None = None,
) -> DataFolder:
    """Read a folder of pictures and texts: ``metadata.jsonl`` (or ``.csv``) and the pictures that it names.

    Either one metadata file at the top with a split field (without one, all rows are training rows), or one in
    each of ``train/``, ``validation/`` (``val``, ``valid``, ``dev``) and ``test/``.  A row names its picture
    (``file_name``, ``image`` or ``img``, relative to the metadata file), its text and its label.

    Labels that are names or whole numbers make single-label classification, lists of names multi-label, numbers
    with a decimal point regression.  Rows with a ``mask`` (a PNG that is not 0 where the object of the text is) and
    no label are referring segmentation.  Class ids follow ``labels``, else ``labels.txt`` at the top, else the sorted
    names of the training split.  A validation or test split may have no labels at all: it can be predicted then.

    A folder of npz files in their place (``train.npz``, ``validation.npz``, ``test.npz``) holds texts with sequences of
    features, without pictures; see :func:`~epic_fast.data.read_sequences`.

    Args:
        text_field, split_field: the fields that hold text and split.
        label_field: the field that holds the label; None takes ``label``, ``labels`` or ``mask``.
        skip_bad: leave out rows whose picture is missing or cannot be decoded (every picture is decoded once for
            this) and list them in ``skipped``; otherwise a missing picture is an error here and a damaged one when
            its item is read.
        problem_type: one of transformers' three names or ``"segmentation"``, in place of the inferred one.
        labels: class names in the order of their ids, such as ``model.labels`` to evaluate a trained model.

    Raises:
        DataError: no metadata, a broken line, a missing picture, a text that is no string, an unknown label;
            each naming file and line.
        ConfigError: an unknown ``problem_type``.
    """
    check_problem_type(problem_type)
    folder = Path(path)
    if folder.is_dir() and (found := sequence_files(folder)):
        return _sequence_folder(folder, found, problem_type)
    files = find_metadata(folder)
    fields = Fields(text=text_field, label=label_field, split=split_field)
    entries = [entry for file in files for entry in read_entries(file, fields)]
    return build_folder(folder, files, entries, skip_bad=skip_bad, problem_type=problem_type, labels=labels)


def _sequence_folder(folder: Path, files: Mapping[str, Path], problem_type: str | None) -> DataFolder:
    """A folder of npz files, whose sequences have the same names and widths in every split."""
    splits = {split: read_sequences(path) for split, path in files.items()}
    first, widths = next((name, each.widths) for name, each in splits.items())
    for split, each in splits.items():
        if each.widths != widths:
            raise DataError(f"{str(folder)!r}: the sequences of {split} are {each.widths}, those of {first} {widths}")
    if problem_type not in (None, REGRESSION):
        raise DataError(
            f"{str(folder)!r} holds sequences with numbers as labels; problem_type={problem_type!r} was given"
        )
    labelled = any(each.has_labels for each in splits.values())
    if "train" in splits and labelled and not splits["train"].has_labels:
        raise DataError(f"{str(folder)!r}: train.npz has no array 'label'; every training row needs one")
    return DataFolder(
        path=folder,
        splits=dict(splits),
        labels=[],
        problem_type=REGRESSION if labelled else None,
        metadata={path.name: digest(path) for path in files.values()},
        sequences=widths,
    )


def read_rows(path: str | os.PathLike[str], *, text_field: str = "text", skip_bad: bool = False) -> Any:
    """Rows to predict: a ``.jsonl`` (or ``.csv``) file of pictures, relative to it, and texts.

    An ``.npz`` file is one of :func:`~epic_fast.data.read_sequences`.  Labels are not looked at.  With
    ``skip_bad``, ``dataset.skipped`` lists the rows left out.

    Raises:
        DataError: as :func:`read_folder`.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return read_sequences(path)
    if not path.is_file():
        raise DataError(
            f"the file {str(path)!r} {'is a folder' if path.is_dir() else 'does not exist'}; wanted a file with one "
            'JSON object a line: {"file_name": "0001.jpg", "text": "a red bird"}'
        )
    entries = list(read_entries(MetadataFile(path, "rows", path.name), Fields(text=text_field), labelled=False))
    if not entries:
        raise DataError(f"the file {str(path)!r} has no rows")
    kept, skipped = check_pictures([_row(entry, None) for entry in entries], skip_bad=skip_bad)
    _warn_of_empty_texts(kept, [])
    return PairDataset(kept, skipped=skipped)


def build_folder(
    folder: Path,
    files: Sequence[MetadataFile],
    entries: Sequence[Entry],
    *,
    skip_bad: bool,
    problem_type: str | None,
    labels: Sequence[str] | None,
    complain: Complain = refuse,
    pictures: bool = True,
) -> DataFolder:
    """Rows as written to splits with class ids; ``pictures=False`` does not look for the pictures."""
    if not entries:
        complain(DataError(f"{', '.join(file.shown for file in files)} in {str(folder)!r}: no rows"))
    encoder = make_encoder(folder, entries, problem_type, labels, complain)
    _check_labelled(entries, complain)
    rows: dict[str, list[Row]] = {}
    for split in ("train", "validation", "test"):
        for entry in entries:
            if entry.split == split:
                try:
                    rows.setdefault(split, []).append(_row(entry, encoder.encode(entry) if encoder else None))
                except DataError as error:
                    complain(error)
    skipped: dict[str, list[str]] = {}
    if pictures:
        for split in rows:
            rows[split], skipped[split] = check_pictures(rows[split], skip_bad=skip_bad, complain=complain)
            if not rows[split]:
                complain(
                    DataError(f"{str(folder)!r}: no picture of the split {split!r} can be read: {skipped[split][0]}")
                )
    warnings = _warn(folder, files, rows, encoder)
    names = encoder.names if encoder else []
    kind = encoder.problem_type if encoder else None
    return DataFolder(
        path=folder,
        splits={split: PairDataset(rows[split], names, kind, skipped.get(split, [])) for split in rows},
        labels=names,
        problem_type=kind,
        skipped=[line for lines in skipped.values() for line in lines],
        warnings=warnings,
        metadata={file.shown: hashlib.sha256(file.path.read_bytes()).hexdigest() for file in files},
    )


def make_encoder(
    folder: Path,
    entries: Sequence[Entry],
    problem_type: str | None,
    labels: Sequence[str] | None,
    complain: Complain = refuse,
) -> LabelEncoder | None:
    """The encoder that fits the labels of the training split; None where no row has a label."""
    if all(entry.label is None for entry in entries):
        return None
    train = [entry for entry in entries if entry.split == "train" and entry.label is not None]
    try:
        problem_type = problem_type or infer_problem_type(train or entries) or SINGLE
        if problem_type in (REGRESSION, SEGMENTATION):
            return LabelEncoder(problem_type)
        listed = read_label_names(folder)
        if labels:
            return LabelEncoder(problem_type, labels, "the labels given", listed=listed)
        if listed is not None:
            return LabelEncoder(problem_type, listed, "labels.txt", listed=listed)
        if not train:
            complain(
                DataError(
                    f"{str(folder)!r} has no training split to take the class names from; add labels.txt (one name a "
                    "line, in the order of the ids); `epic-fast eval` takes those of the run, in Python give "
                    "labels=model.labels"
                )
            )
        return LabelEncoder(problem_type, class_names(train or entries, problem_type, complain), "the training split")
    except DataError as error:
        complain(error)
        return None


def check_pictures(rows: Sequence[Row], *, skip_bad: bool, complain: Complain = refuse) -> tuple[list[Row], list[str]]:
    """The rows whose picture is there, and a line for each of the others.

    With ``skip_bad`` every picture is decoded once, on several threads.

    Raises:
        DataError: a picture is missing and ``skip_bad`` is False.
    """
    if skip_bad:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            errors = list(pool.map(_picture_error, rows))
        kept = [row for row, error in zip(rows, errors, strict=True) if error is None]
        skipped = [error for error in errors if error is not None]
        if skipped:
            logger.warning("%d of %d rows are left out, the first: %s", len(skipped), len(rows), skipped[0])
        return kept, skipped
    missing = [row for row in rows if not row.path.is_file()]
    if missing:
        others = f" ({len(missing) - 1} other pictures are missing too)" if len(missing) > 1 else ""
        complain(DataError(f"{missing[0].where}: the picture {missing[0].name!r} does not exist{others}; {SKIP_HINT}"))
    masks = [row.label for row in rows if isinstance(row.label, Mask) and not row.label.path.is_file()]
    if masks:
        others = f" ({len(masks) - 1} other masks are missing too)" if len(masks) > 1 else ""
        complain(DataError(f"{masks[0].where}: the mask {masks[0].name!r} does not exist{others}; {SKIP_HINT}"))
    return list(rows), []


def _picture_error(row: Row) -> str | None:
    try:
        picture = read_picture(row)
        if isinstance(row.label, Mask):
            check_sizes(read_mask(row.label), picture, row)
    except DataError as error:
        said = str(error.__cause__ or error)
        return said if said.startswith(row.where) else f"{row.where}: {said}"
    return None


def _row(entry: Entry, label: Any) -> Row:
    return Row(entry.name, entry.path, whole_characters(entry.text), label, entry.where)


def _check_labelled(entries: Sequence[Entry], complain: Complain) -> None:
    """A training split has labels in all of its rows, another split in all of them or in none."""
    for split in ("train", "validation", "test"):
        bare = [entry for entry in entries if entry.split == split and entry.label is None]
        count = sum(entry.split == split for entry in entries)
        if bare and (split == "train" or len(bare) < count):
            rule = "every training row needs one" if split == "train" else "the other rows of this split have one"
            others = f" ({len(bare)} rows of {count})" if len(bare) > 1 else ""
            complain(
                DataError(
                    f"{bare[0].where} ({split}): no label{others}; {rule}. Wanted a field 'label' or 'labels', or "
                    f"the name of another{LABEL_FIELD_HINT}"
                )
            )


def _warn(
    folder: Path, files: Sequence[MetadataFile], rows: dict[str, list[Row]], encoder: LabelEncoder | None
) -> list[str]:
    found: list[str] = []
    everything = [row for split in rows.values() for row in split]
    _warn_of_empty_texts(everything, found)
    seen: dict[Path, str] = {}
    shared: dict[Path, list[str]] = {}
    for split, members in rows.items():
        for row in members:
            if seen.setdefault(row.path, split) != split:
                shared.setdefault(row.path, [seen[row.path]]).append(split)
    if shared:
        path, splits = next(iter(shared.items()))
        _say(
            found,
            f"{_count(len(shared), 'picture stands', 'pictures stand')} in more than one split, such as "
            f"{path.name!r} ({', '.join(dict.fromkeys(splits))}): scores on such a split flatter",
        )
    if set(rows) == {"train"} and files[0].split is None:
        _say(found, f"{str(folder)!r} has training rows only: no validation, no test")
    if encoder is not None and (lacking := too_few_classes(encoder.problem_type, encoder.names)):
        _say(found, lacking)
    return found


def too_few_classes(problem_type: str | None, labels: Sequence[str]) -> str | None:
    """What to say where there are no two classes to tell apart, else None."""
    if problem_type != SINGLE or len(labels) > 1:
        return None
    named = ", ".join(map(repr, labels)) or "none"
    return f"there is one class only ({named}): nothing can be learned; wanted rows of at least two classes"


def _warn_of_empty_texts(rows: Iterable[Row], found: list[str]) -> None:
    empty = [row for row in rows if not row.text.strip()]
    if empty:
        _say(found, f"{_count(len(empty), 'text is', 'texts are')} empty, the first at {empty[0].where}")


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _say(found: list[str], line: str) -> None:
    found.append(line)
    logger.warning("%s", line)
