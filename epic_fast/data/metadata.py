"""Metadata files of a data folder: where they are, and what their lines say."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from epic_fast.data.dataset import Mask
from epic_fast.errors import DataError

TEXT_FIELD_HINT = ": --text-field (in train data.text_field=), text_field= in Python"
LABEL_FIELD_HINT = ": --label-field (in train data.label_field=), label_field= in Python"
PICTURE_FIELDS = ("file_name", "image", "img")
LABEL_FIELDS = ("label", "labels")
MASK_FIELD = "mask"
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
}
EXPECTED_TREE = """\
FOLDER/                        or  FOLDER/
  metadata.jsonl                     train/metadata.jsonl, train/0001.jpg ...
  labels.txt (optional)              validation/metadata.jsonl, ...  (also val, valid, dev)
  0001.jpg                           test/metadata.jsonl, ...
  ...                                labels.txt (optional)
one JSON object a line (or metadata.csv with these columns), pictures relative to the metadata file:
  {"file_name": "0001.jpg", "text": "a red bird", "label": "bird", "split": "train"}
"split" only in the first form; "labels": ["bird", "red"] for several labels, "label": 3.5 for regression,
"mask": "masks/0001.png" in the place of a label for referring segmentation: not 0 where the object of the text is"""

Complain = Callable[[DataError], None]


def refuse(error: DataError) -> None:
    """The complaint handler of everyday reading: the first error ends it."""
    raise error


@dataclass(frozen=True)
class MetadataFile:
    """A metadata file; ``split`` is None where a field of each row says it."""

    path: Path
    split: str | None
    shown: str


@dataclass(frozen=True)
class Entry:
    """A row as written, its picture and text checked; ``label`` is whatever the file holds, None without one."""

    where: str
    split: str
    name: str
    path: Path
    text: str
    label: Any


@dataclass(frozen=True)
class Fields:
    """Which columns to read; ``label`` None takes ``label``, ``labels`` or ``mask``, whichever there is first."""

    text: str = "text"
    label: str | None = None
    split: str = "split"


def find_metadata(folder: Path) -> list[MetadataFile]:
    """The metadata files of a data folder: one at the top, or one in each split's sub-folder.

    Raises:
        DataError: none (showing the tree that was expected), or several that contradict each other.
    """
    if not folder.exists():
        raise DataError(f"the data folder {str(folder)!r} does not exist. Wanted:\n{EXPECTED_TREE}")
    if not folder.is_dir():
        raise DataError(
            f"the data folder {str(folder)!r} is a file; wanted a folder (a .zip goes through "
            f"epic_fast.data.resolve_data, as --data on the command line does):\n{EXPECTED_TREE}"
        )
    top = _metadata_in(folder, "")
    split_folders = [child for child in sorted(folder.iterdir()) if child.is_dir() and child.name in SPLIT_NAMES]
    below: dict[str, MetadataFile] = {}
    bare = []
    for child in split_folders:
        path = _metadata_in(child, f"{child.name}/")
        split = SPLIT_NAMES[child.name]
        if path is None:
            bare.append(child.name)
        elif split in below:
            raise DataError(
                f"{str(folder)!r} has two folders for the split {split!r}: {below[split].shown} and "
                f"{child.name}/{path.name}; merge them or remove one"
            )
        else:
            below[split] = MetadataFile(path, split, f"{child.name}/{path.name}")
    if top is not None and below:
        raise DataError(
            f"{str(folder)!r} has {top.name} and also {', '.join(file.shown for file in below.values())}; wanted "
            "either one at the top (with a split field) or one in each split's folder: remove the others"
        )
    if top is not None:
        return [MetadataFile(top, None, top.name)]
    if not below:
        raise DataError(
            f"the folder {str(folder)!r} has no metadata: it holds {_contents(folder)}. Wanted:\n{EXPECTED_TREE}"
        )
    if bare:
        raise DataError(
            f"{str(folder)!r} has metadata in {', '.join(file.shown for file in below.values())}, but none in "
            f"{', '.join(name + '/' for name in bare)}; add {bare[0]}/metadata.jsonl, or rename the folder if it is no "
            "split"
        )
    return [below[split] for split in ("train", "validation", "test") if split in below]


def _metadata_in(folder: Path, shown: str) -> Path | None:
    found = [folder / name for name in METADATA_NAMES if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(f"there are both {shown}{found[0].name} and {shown}{found[1].name}; remove one of them")
    return found[0] if found else None


def _contents(folder: Path) -> str:
    names = sorted(child.name + ("/" if child.is_dir() else "") for child in folder.iterdir())
    if not names:
        return "nothing"
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def read_entries(
    file: MetadataFile, fields: Fields, complain: Complain = refuse, *, labelled: bool = True
) -> Iterator[Entry]:
    """The rows of one metadata file, in order; a row with an error goes to ``complain`` and is left out.

    ``labelled=False`` looks at no label.
    """
    records = list(_csv_records(file, complain) if file.path.suffix == ".csv" else _json_records(file, complain))
    label_field = _label_field(records, fields.label, file, complain) if labelled else None
    if file.path.suffix == ".csv" and label_field and label_field != MASK_FIELD:
        parse_csv_labels([record for _, record in records], label_field)
    has_split = file.split is None and any(fields.split in record for _, record in records)
    if records and file.split is None and not has_split and fields.split != Fields.split:
        present = {name for _, record in records for name in record}
        complain(DataError(f"{file.shown}: no row has the split field {fields.split!r}; there are {_listed(present)}"))
    for where, record in records:
        try:
            name = _picture(where, record)
            text = _text(where, record, fields.text)
            yield Entry(
                where=where,
                split=_split(where, record, file.split, fields.split, has_split),
                name=name,
                path=file.path.parent / name,
                text=text,
                label=_label(where, record, label_field, file.path.parent),
            )
        except DataError as error:
            complain(error)


def _json_records(file: MetadataFile, complain: Complain) -> Iterator[tuple[str, dict[str, Any]]]:
    # Split at line feeds only: str.splitlines would also break at U+2028 and the like inside of a text.
    with file.path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file.shown}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                record = json.loads(text)
            except UnicodeDecodeError as error:
                complain(
                    DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8")
                )
                continue
            except (json.JSONDecodeError, RecursionError) as error:
                complain(DataError(f"{where}: broken JSON ({error}); wanted one whole JSON object a line"))
                continue
            if not isinstance(record, dict):
                complain(DataError(f'{where}: {shorten(record)}; wanted an object such as {{"file_name": "0001.jpg"}}'))
                continue
            yield where, record


def _csv_records(file: MetadataFile, complain: Complain) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        content = file.path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        complain(DataError(f"{file.shown}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"))
        return
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        for record in reader:
            where = f"{file.shown}, line {reader.line_num}"
            if None in record or None in record.values():
                columns = len(reader.fieldnames or ())
                complain(
                    DataError(
                        f"{where}: not the {columns} columns of the header ({', '.join(reader.fieldnames or ())}); "
                        'a text that holds a comma or a line break needs "quotes"'
                    )
                )
                continue
            yield where, record
    except csv.Error as error:
        complain(DataError(f"{file.shown}, line {reader.line_num}: broken CSV ({error})"))


def parse_csv_labels(records: list[dict[str, Any]], field: str) -> None:
    """Give the label column of a CSV file, where all is text, the type that all of its cells share."""
    cells = [record[field].strip() for record in records if record.get(field)]
    if cells and all(re.fullmatch(r"[+-]?(0|[1-9]\d*)", cell) for cell in cells):
        parse: Callable[[str], Any] = int
    elif cells and all(re.fullmatch(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?", cell) for cell in cells):
        parse = float
    elif cells and all(_is_json_list(cell) for cell in cells):
        parse = json.loads
    else:
        parse = str
    for record in records:
        record[field] = parse(record[field].strip()) if record.get(field) else None


def _is_json_list(cell: str) -> bool:
    try:
        return cell.startswith("[") and isinstance(json.loads(cell), list)
    except json.JSONDecodeError:
        return False


def _label_field(
    records: list[tuple[str, dict[str, Any]]], wanted: str | None, file: MetadataFile, complain: Complain
) -> str | None:
    present = {name for _, record in records for name in record}
    if wanted is not None:
        if records and wanted not in present:
            complain(
                DataError(f"{file.shown}: no row has the label field {wanted!r}; the fields are {_listed(present)}")
            )
        return wanted
    found = [name for name in LABEL_FIELDS if name in present]
    if len(found) > 1:
        complain(DataError(f"{file.shown}: rows have both 'label' and 'labels'; choose one{LABEL_FIELD_HINT}"))
    if not found and MASK_FIELD in present:
        return MASK_FIELD
    return found[0] if found else None


def _label(where: str, record: dict[str, Any], field: str | None, folder: Path) -> Any:
    """The label as written; of a mask the file."""
    value = record.get(field) if field else None
    if field != MASK_FIELD or value is None or value == "":
        return None if field == MASK_FIELD else value
    name = _inside(where, field, value, "mask")
    return Mask(name, folder / name, where)


def _picture(where: str, record: dict[str, Any]) -> str:
    field = next((field for field in PICTURE_FIELDS if field in record), None)
    if field is None:
        raise DataError(
            f"{where}: no picture; wanted one of the fields {', '.join(PICTURE_FIELDS)}, the row has {_listed(record)}"
        )
    return _inside(where, field, record[field], "picture")


def _inside(where: str, field: str, name: Any, what: str) -> str:
    """The path of a file below the metadata file's folder, as written."""
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{where}: {field} is {shorten(name)}; wanted the {what}'s path as a string")
    # Judged by the name alone: a link that the folder's owner has put inside may lead elsewhere.
    normal = PurePosixPath(os.path.normpath(name.replace("\\", "/")))
    if "\0" in name or normal.is_absolute() or normal.parts[:1] == ("..",) or re.match(r"[A-Za-z]:[\\/]", name):
        raise DataError(
            f"{where}: the {what} {shorten(name)} lies outside of the folder; wanted a path below the metadata file's "
            f"folder, without '..' (put the {what}s, or a link to their folder, there)"
        )
    return name


def _text(where: str, record: dict[str, Any], field: str) -> str:
    if field not in record:
        raise DataError(
            f"{where}: no text field {field!r}; the row has {_listed(record)}. Choose one{TEXT_FIELD_HINT} "
            '(an empty text is "")'
        )
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f'{where}: {field} is {shorten(text)}, no string; wanted a string (an empty text is "")')
    return text


def _split(where: str, record: dict[str, Any], given: str | None, field: str, has_split: bool) -> str:
    if given is not None:
        return given
    if not has_split:
        return "train"
    name = record.get(field)
    split = SPLIT_NAMES.get(name.strip().lower()) if isinstance(name, str) else None
    if split is None:
        said = f"{field} is {shorten(name)}" if field in record else f"no {field!r}, which other rows have"
        raise DataError(f"{where}: {said}; wanted train, validation (or val, valid, dev) or test")
    return split


def read_label_names(folder: Path) -> list[str] | None:
    """The class names of ``labels.txt``, one a line in the order of their ids; None without that file.

    Raises:
        DataError: a name that occurs twice, an empty file, or no UTF-8.
    """
    path = folder / "labels.txt"
    if not path.is_file():
        return None
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"labels.txt: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
        ) from None
    names = [line.strip() for line in lines if line.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"labels.txt: {_listed(twice)} occur more than once; wanted each class name on one line")
    if not names:
        raise DataError(
            "labels.txt is empty; wanted one class name a line, or no such file (then the training split's labels are "
            "taken, sorted)"
        )
    return names


def whole_characters(text: str) -> str:
    """A text without halves of surrogate pairs (a cut emoji), which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def is_number(value: Any) -> bool:
    """A finite int or float; not a bool."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


# A value may hold itself twice on each of many levels: to write all of it would take for ever.
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 4
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = 16
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 80


def shorten(value: Any) -> str:
    """A value for a message, at most 60 characters; of a mask its name."""
    text = f"mask {_BRIEF.repr(value.name)}" if isinstance(value, Mask) else _BRIEF.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in sorted(map(str, names))) or "nothing"
