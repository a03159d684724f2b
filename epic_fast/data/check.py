"""Everything that is wrong or odd about a data folder, in one pass and without stopping at the first."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from epic_fast.data.dataset import Mask, PairDataset, Row, check_sizes, read_mask
from epic_fast.data.folder import DataFolder, build_folder, too_few_classes
from epic_fast.data.images import load_image
from epic_fast.data.labels import REGRESSION, SEGMENTATION, check_problem_type
from epic_fast.data.metadata import Fields, find_metadata, read_entries
from epic_fast.data.sequences import sequence_files
from epic_fast.errors import DataError


@dataclass
class FolderReport:
    """What :func:`check_folder` found.

    Attributes:
        counts: rows of each split.
        classes: rows of each class in each split, ``{split: {class: rows}}``, every class in every split.
        missing: pictures and masks that are not there, ``"where: name"``.
        broken: pictures and masks that cannot be decoded or do not fit together, ``"where: reason"``.
        errors: whatever else :func:`read_folder` would refuse, a line each; these rows count nowhere.  Also that there
            is one class only, which it warns of and training refuses.
        warnings: what it would warn of.
        words: texts by number of words, ``{"0": n, "1": n, "2-3": n, "4-7": n, ...}``.
        shared_texts: different texts that stand in two splits, ``{"train+test": n}``; compared without regard to case
            and white space, empty ones left out.
        shared_pictures: different pictures, byte by byte, that stand in two splits.
        repeated_pictures: rows beyond the first that show the same picture in one split.
        repeated_pairs: rows beyond the first that have the same picture and text in one split.
    """

    path: str
    problem_type: str | None
    labels: list[str]
    counts: dict[str, int]
    classes: dict[str, dict[str, int]]
    missing: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    words: dict[str, int] = field(default_factory=dict)
    shared_texts: dict[str, int] = field(default_factory=dict)
    shared_pictures: dict[str, int] = field(default_factory=dict)
    repeated_pictures: dict[str, int] = field(default_factory=dict)
    repeated_pairs: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether :func:`read_folder` takes the folder, training its classes, and every picture can be decoded."""
        return not (self.missing or self.broken or self.errors)

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON's types, with ``ok``."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        rows = ", ".join(f"{split} {count}" for split, count in self.counts.items()) or "no rows"
        lines = [
            f"{self.path}: {rows}; {self.problem_type or 'no labels'}"
            + (f", {len(self.labels)} classes" if self.labels else "")
        ]
        for what, found in (("missing", self.missing), ("broken", self.broken), ("errors", self.errors)):
            lines.append(f"{what}: {len(found)}")
            lines.extend(f"  {line}" for line in found[:5])
        lines.append("words in a text: " + ", ".join(f"{words}: {count}" for words, count in self.words.items()))
        for what, shared in (("texts", self.shared_texts), ("pictures", self.shared_pictures)):
            said = ", ".join(f"{splits} {count}" for splits, count in shared.items() if count)
            lines.append(f"{what} in two splits: {said or 'none'}")
        lines.extend(f"warning: {line}" for line in self.warnings)
        return "\n".join(lines)


def check_folder(
    path: str | os.PathLike[str],
    *,
    text_field: str = "text",
    label_field: str | None = None,
    split_field: str = "split",
    problem_type: str | None = None,
    labels: Sequence[str] | None = None,
) -> FolderReport:
    """Read a folder as :func:`read_folder` does, decode every picture, and report all that is found.

    Raises:
        DataError: there is no metadata to report on.
        ConfigError: an unknown ``problem_type``.
    """
    check_problem_type(problem_type)
    errors: list[str] = []
    folder = _read(Path(path), Fields(text_field, label_field, split_field), problem_type, labels, errors)
    rows = {split: list(dataset.rows) for split, dataset in folder.splits.items()}
    pictures = _look_at_pictures([row for members in rows.values() for row in members])
    lacking = too_few_classes(folder.problem_type, folder.labels)
    report = FolderReport(
        path=str(folder.path),
        problem_type=folder.problem_type,
        labels=folder.labels,
        counts={split: len(dataset) for split, dataset in folder.splits.items()},
        classes={split: _histogram(dataset) for split, dataset in folder.splits.items()},
        # Rows that are wrong may be those of the second class.
        errors=[lacking] if lacking and not errors else errors,
        warnings=[line for line in folder.warnings if line != lacking],
        words=_word_histogram(row.text for members in rows.values() for row in members),
    )
    for members in rows.values():
        for row in members:
            digest, error = pictures[row.path]
            if digest is None:
                report.missing.append(f"{row.where}: {row.name}")
            elif error is not None:
                report.broken.append(f"{row.where}: {error}")
            elif isinstance(row.label, Mask):
                _look_at_mask(row, row.label, report)
    texts = {split: {_plain(row.text) for row in members} - {""} for split, members in rows.items()}
    shown = {split: [pictures[row.path][0] or row.name for row in members] for split, members in rows.items()}
    pairs = {
        split: list(zip(shown[split], [row.text for row in members], strict=True)) for split, members in rows.items()
    }
    report.shared_texts = _shared(texts)
    report.shared_pictures = _shared({split: set(digests) for split, digests in shown.items()})
    report.repeated_pictures = {split: len(digests) - len(set(digests)) for split, digests in shown.items()}
    report.repeated_pairs = {split: len(found) - len(set(found)) for split, found in pairs.items()}
    return report


def _read(
    path: Path, fields: Fields, problem_type: str | None, labels: Sequence[str] | None, errors: list[str]
) -> DataFolder:
    def complain(error: DataError) -> None:
        errors.append(str(error))

    if path.is_dir() and sequence_files(path):
        raise DataError(
            f"{str(path)!r} holds npz files; `check` looks at folders with pictures. read_folder says what is wrong "
            "with them"
        )
    files = find_metadata(path)
    entries = [entry for file in files for entry in read_entries(file, fields, complain)]
    return build_folder(
        path,
        files,
        entries,
        skip_bad=False,
        problem_type=problem_type,
        labels=labels,
        complain=complain,
        pictures=False,
    )


def _look_at_pictures(rows: Sequence[Row]) -> dict[Path, tuple[str | None, str | None]]:
    """sha256 and decoding error of each picture; no sha256 where the file is missing."""
    paths = list({row.path for row in rows})
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(paths, pool.map(_look_at, paths), strict=True))


def _look_at(path: Path) -> tuple[str | None, str | None]:
    if not path.is_file():
        return None, None
    digest = ""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        load_image(path)
    except (DataError, OSError) as error:
        return digest, str(error)
    return digest, None


def _look_at_mask(row: Row, mask: Mask, report: FolderReport) -> None:
    """Put a mask that is missing, broken or of another size than its picture into the report."""
    if not mask.path.is_file():
        report.missing.append(f"{row.where}: {mask.name}")
        return
    try:
        check_sizes(read_mask(mask), load_image(row.path), row)
    except DataError as error:
        report.broken.append(str(error.__cause__ or error))


def _histogram(dataset: PairDataset) -> dict[str, int]:
    if dataset.problem_type in (REGRESSION, SEGMENTATION):
        return {}
    ids: Counter[Any] = Counter()
    for row in dataset.rows:
        ids.update(row.label if isinstance(row.label, list) else [row.label])
    return {name: ids[index] for index, name in enumerate(dataset.labels)}


def _word_histogram(texts: Iterable[str]) -> dict[str, int]:
    """Texts by number of words, in steps that double."""
    bins = Counter(len(text.split()).bit_length() for text in texts)
    powers = range(max(bins, default=-1) + 1)
    return {str(power) if power < 2 else f"{2 ** (power - 1)}-{2**power - 1}": bins[power] for power in powers}


def _shared(values: dict[str, set[Any]]) -> dict[str, int]:
    splits = list(values)
    return {
        f"{one}+{other}": len(values[one] & values[other])
        for index, one in enumerate(splits)
        for other in splits[index + 1 :]
    }


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
