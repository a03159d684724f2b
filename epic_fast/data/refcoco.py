"""RefCOCO, RefCOCO+ and RefCOCOg as published, to a data folder."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from epic_fast.data.coco import coco_mask
from epic_fast.data.images import UPRIGHT, exif_orientation
from epic_fast.data.metadata import shorten, whole_characters
from epic_fast.data.plain_pickle import read_plain_pickle
from epic_fast.errors import ConfigError, DataError
from epic_fast.files import atomic_folder, atomic_write_text

SPLITS = {"train": "train", "val": "validation", "test": "test", "testA": "test", "testB": "test"}
LAYOUT = """\
SRC/                           one of refcoco, refcoco+, refcocog, as published
  refs(unc).p                  or refs(umd).p, refs(google).p
  instances.json
and the pictures of COCO train2014, as --pictures or in SRC/train2014, SRC/images, or where the published
archives put them beside SRC: ../images/mscoco/images/train2014"""
_PICTURES = ("train2014", "images", "../images/mscoco/images/train2014", "../images/train2014", "../train2014")


@dataclass
class Converted:
    """What a conversion wrote.

    Attributes:
        rows: expressions of each split.
        parts: expressions of each split as published (``testA`` and ``testB`` apart).
        masks: masks written, one a referred object.
        skipped: what was left out, a line each.
    """

    folder: Path
    rows: dict[str, int]
    parts: dict[str, int]
    masks: int
    skipped: list[str] = field(default_factory=list)


def convert_refcoco(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    pictures: str | os.PathLike[str] | None = None,
    split_by: str | None = None,
    test: str | None = None,
    copy: bool = False,
    skip_bad: bool = False,
) -> Converted:
    """Write RefCOCO's public files as a data folder, a row an expression.

    ``refs(*.p)`` is a pickle; it is read by :func:`epic_fast.data.plain_pickle.read_plain_pickle`, which executes
    nothing.  Rows keep ``ref_id``, ``sent_id`` and ``part``, the published split: ``testA`` and ``testB`` are both
    ``test`` here, unless ``test`` names one of them.

    Args:
        source: the folder with ``refs(...).p`` and ``instances.json``.
        folder: where to; must be empty or not there.
        pictures: COCO's ``train2014``; None looks where the published archives put it.
        split_by: such as ``"unc"``; needed where there are several ``refs(...).p``.
        test: ``"testA"`` or ``"testB"``: leave the other one out.
        copy: copy the pictures that are referred to; by default ``pictures`` in the new folder is a link.
        skip_bad: leave out expressions that cannot be used and list them.

    Raises:
        DataError: files that are missing, broken or of another layout; a pickle that asks for more than plain values.
        ConfigError: the folder holds something, or there is no such ``test``.
    """
    source, folder = Path(source), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"convert refcoco: {str(folder)!r} is not empty; wanted a new folder")
    if test not in (None, "testA", "testB"):
        raise ConfigError(f"convert refcoco: test={test!r}; wanted testA, testB, or nothing for both")
    refs_file = _refs_file(source, split_by)
    instances = _Instances(source / "instances.json")
    place_of_pictures = _pictures(source, pictures)
    found = Converted(folder, {}, {}, 0)
    with atomic_folder(folder) as place:
        (place / "masks").mkdir()
        if copy:
            (place / "pictures").mkdir()
        else:
            (place / "pictures").symlink_to(place_of_pictures.resolve(), target_is_directory=True)
        lines = []
        for number, ref in _refs(refs_file):
            where = f"{refs_file.name}, ref {number}"
            try:
                rows = _convert_ref(ref, where, instances, place_of_pictures, place, test, copy)
                lines += rows
                found.masks += bool(rows)
            except DataError as error:
                if not skip_bad:
                    raise DataError(f"{error}. To go on without such references: --skip-bad, skip_bad=True") from error
                found.skipped.append(str(error))
        if not lines:
            raise DataError(f"{str(refs_file)!r} has no expression that can be used")
        found.rows = dict(Counter(line["split"] for line in lines))
        found.parts = dict(Counter(line["part"] for line in lines))
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        atomic_write_text(place / "metadata.jsonl", text + "\n")
    return found


class _Instances:
    """``instances.json``: COCO's annotations and pictures by id."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise DataError(f"{str(path)!r} does not exist. Wanted:\n{LAYOUT}")
        try:
            values = json.loads(path.read_bytes())
            self.images = {each["id"]: each for each in values["images"]}
            self.annotations = {each["id"]: each for each in values["annotations"]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{str(path)!r} is no instances.json of COCO ({type(error).__name__}: {error}); wanted 'images' and "
                "'annotations', each a list of objects with an 'id'. Fetch it again"
            ) from error

    def of(self, ref: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The annotation and the picture of a reference."""
        annotation = self.annotations.get(ref["ann_id"])
        if annotation is None:
            raise DataError(f"{where}: instances.json has no annotation {ref['ann_id']!r}")
        number = annotation.get("image_id")
        image = self.images.get(number) if isinstance(number, (int, str)) else None
        sides = () if image is None else (image.get("height"), image.get("width"))
        if image is None or not all(type(side) is int and side > 0 for side in sides):
            raise DataError(f"{where}: instances.json has no picture {annotation.get('image_id')!r} with its size")
        if not isinstance(image.get("file_name"), str):
            raise DataError(f"{where}: the picture {image.get('id')!r} of instances.json has no 'file_name'")
        return annotation, image


def _refs_file(source: Path, split_by: str | None) -> Path:
    if not source.is_dir():
        raise DataError(f"the folder {str(source)!r} does not exist. Wanted:\n{LAYOUT}")
    found = sorted(source.glob("refs(*).p"))
    if split_by is not None:
        found = [each for each in found if each.name == f"refs({split_by}).p"]
    if not found:
        what = "refs(...).p" if split_by is None else f"refs({split_by}).p"
        raise DataError(f"{str(source)!r} has no {what}. Wanted:\n{LAYOUT}")
    if len(found) > 1:
        names = ", ".join(each.name for each in found)
        raise DataError(
            f"{str(source)!r} has {names}; choose one by --split-by, such as --split-by {found[0].name[5:-3]}"
        )
    return found[0]


def _pictures(source: Path, given: str | os.PathLike[str] | None) -> Path:
    places = [Path(given)] if given is not None else [source / each for each in _PICTURES]
    for place in places:
        if place.is_dir():
            return place
    said = f"{str(places[0])!r} does not exist" if given is not None else "no folder of pictures was found"
    raise DataError(f"{said}; wanted COCO's train2014, by --pictures FOLDER")


def _refs(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    refs = read_plain_pickle(path)
    if not isinstance(refs, list):
        raise DataError(f"{str(path)!r} holds {type(refs).__name__}; wanted a list of references. Wanted:\n{LAYOUT}")
    yield from enumerate(refs)


def _is_wanted(ref: dict[str, Any], test: str | None) -> bool:
    return test is None or SPLITS.get(ref["split"]) != "test" or ref["split"] == test


def _convert_ref(
    ref: Any, where: str, instances: _Instances, pictures: Path, place: Path, test: str | None, copy: bool
) -> list[dict[str, Any]]:
    """The rows of one reference; writes its mask."""
    wanted = {"ref_id": int, "ann_id": int, "split": str, "sentences": list}
    if not isinstance(ref, dict) or not all(isinstance(ref.get(name), kind) for name, kind in wanted.items()):
        raise DataError(f"{where}: {shorten(ref)}; wanted a dict with {', '.join(wanted)}")
    if ref["split"] not in SPLITS:
        raise DataError(f"{where}: the split {ref['split']!r}; wanted one of {', '.join(SPLITS)}")
    if not _is_wanted(ref, test):
        return []
    annotation, image = instances.of(ref, where)
    file = pictures / image["file_name"]
    name = Path(image["file_name"]).name
    if name != image["file_name"] or not file.is_file():
        raise DataError(f"{where}: the picture {image['file_name']!r} is not in {str(pictures)!r}")
    try:
        with Image.open(file) as opened:
            size, turn = opened.size, UPRIGHT.get(exif_orientation(opened))
    except Exception as error:
        raise DataError(f"{where}: the picture {name!r} cannot be read ({error}); fetch it again") from error
    if size != (image["width"], image["height"]):
        raise DataError(f"{where}: {name!r} has {size} pixels, instances.json says otherwise")
    mask = Image.fromarray(coco_mask(annotation.get("segmentation"), image["height"], image["width"], where))
    mask_name = f"masks/{ref['ref_id']}.png"
    if (place / mask_name).exists():
        raise DataError(f"{where}: ref_id {ref['ref_id']} stands for another reference already; fetch the file again")
    rows = []
    for sentence in ref["sentences"]:
        text, number = (sentence.get("sent"), sentence.get("sent_id")) if isinstance(sentence, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(number, (int, str, type(None))):
            raise DataError(f"{where}: the sentence {shorten(sentence)}; wanted a dict with 'sent' and 'sent_id'")
        row = {"file_name": f"pictures/{name}", "mask": mask_name, "text": whole_characters(text)}
        row["split"] = SPLITS[ref["split"]]
        rows.append({**row, "part": ref["split"], "ref_id": ref["ref_id"], "sent_id": number})
    if not rows:
        return []
    # Outlines are given on the pixels as stored; whoever reads the picture turns it upright.
    (mask if turn is None else mask.transpose(turn)).save(place / mask_name)
    if copy and not (place / "pictures" / name).exists():
        shutil.copyfile(file, place / "pictures" / name)
    return rows
