"""RefCOCO's published files to a data folder: pickles that are not run, COCO's segmentations, the converter."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from epic_fast.data import read_folder
from epic_fast.data.coco import coco_mask, unpack_counts
from epic_fast.data.plain_pickle import read_plain_pickle
from epic_fast.data.refcoco import convert_refcoco
from epic_fast.errors import ConfigError, DataError

# -- pickles ---------------------------------------------------------------------------------------------------------

VALUES = [
    {
        "sent_ids": [0, 1, 2],
        "file_name": "COCO_train2014_000000581857_16.jpg",
        "ann_id": 1719310,
        "box": (1.5, -2.25e-3, 7.0),
        "nothing": None,
        "yes": [True, False],
        "sentences": [{"tokens": ["the", "lady"], "raw": "THE LADY", "sent_id": 0, "sent": "the lady ünï ⟨⟩"}],
        "big": 2**70,
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "bytes": b"\x00\xff",
        "empty": [{}, [], ""],
    }
] * 2


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_come_back(tmp_path: Path, protocol: int) -> None:
    values = VALUES if protocol >= 3 else [{key: each for key, each in VALUES[0].items() if key != "bytes"}] * 2
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps(values, protocol))
    assert read_plain_pickle(path) == values


def test_pickles_of_python_2_are_read(tmp_path: Path) -> None:
    path = tmp_path / "old.p"
    path.write_bytes(b"(lp0\n(dp1\nS'ref_id'\np2\nI7\nsS'sent'\np3\nVred \\u2192 bird\np4\nsS'big'\nL12L\nsa.")
    assert read_plain_pickle(path) == [{"ref_id": 7, "sent": "red → bird", "big": 12}]
    path.write_bytes(b"\x80\x02]q\x00U\x03\xe9t\xe9q\x01a.")
    assert read_plain_pickle(path) == ["été"]


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    ran = tmp_path / "it_ran"
    content = pickle.dumps([{"ref_id": 1, "sentences": Malicious(ran)}], protocol)
    path = tmp_path / "refs(unc).p"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"asks for (STACK_)?GLOBAL.* nothing of it was run"):
        read_plain_pickle(path)
    assert not ran.exists()
    pickle.load(io.BytesIO(content))  # it would have
    assert ran.is_dir()


@pytest.mark.parametrize("value", [np.zeros(2), {1, 2}, Path("a"), complex(1, 2), print, bytearray(b"a")])
def test_other_objects_are_refused(tmp_path: Path, value: object) -> None:
    path = tmp_path / "refs.p"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps([value], protocol))
        with pytest.raises(DataError, match="which is no plain value"):
            read_plain_pickle(path)


# INST, OBJ, persistent ids and extension codes have ways of their own to name something.
@pytest.mark.parametrize(
    "content", [b"(S'true'\nios\nsystem\n.", b"(cos\nsystem\nS'true'\no.", b"P1\n.", b"\x80\x02\x82\x01."]
)
def test_the_old_ways_to_call_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "refs.p"
    path.write_bytes(content)
    with pytest.raises(DataError, match="which is no plain value"):
        read_plain_pickle(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        b"\x80\x02]q\x00",
        b"\x80\x02.",
        b"\x80\x02}q\x00]q\x01K\x01s.",
        b"h\x05.",
        b"u.",
        b"I1\na.",
        b"\x85.",
    ],
)
def test_broken_pickles_say_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "refs.p"
    path.write_bytes(content)
    with pytest.raises(DataError, match="is broken"):
        read_plain_pickle(path)


def test_a_pickle_cut_anywhere_is_an_error_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "refs.p"
    for protocol in (0, 2, 4):
        whole = pickle.dumps(VALUES[:1] if protocol >= 3 else [{"a": [1, "b", (2.5, None)]}], protocol)
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(DataError):
                read_plain_pickle(path)


# -- segmentations ---------------------------------------------------------------------------------------------------


def drawn(mask: np.ndarray) -> list[str]:
    return ["".join("#" if each else "." for each in row) for row in mask]


def test_polygons_by_hand() -> None:
    assert drawn(coco_mask([[1, 1, 4, 1, 4, 3, 1, 3]], 4, 5)) == [".....", ".###.", ".###.", "....."]
    assert drawn(coco_mask([[0, 0, 4, 0, 0, 4]], 4, 4)) == ["###.", "##..", "#...", "...."]
    two = [[0, 0, 2, 0, 2, 2, 0, 2], [1, 1, 3, 1, 3, 3, 1, 3]]  # the union, not the difference
    assert drawn(coco_mask(two, 3, 4)) == ["##..", "###.", ".##."]
    outside = [[-5, -5, 2, -5, 2, 1, -5, 1]]
    assert drawn(coco_mask(outside, 2, 3)) == ["##.", "..."]
    assert not coco_mask([], 2, 2).any()


def test_a_polygon_is_where_its_pixels_centres_are() -> None:
    random = np.random.default_rng(0)
    corners = random.uniform(-3, 15, size=(7, 2))

    def inside(x: float, y: float) -> bool:
        found = False
        for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, 1, axis=0), strict=True):
            if (y0 > y) != (y1 > y) and x < (x1 - x0) * (y - y0) / (y1 - y0) + x0:
                found = not found
        return found

    wanted = np.array([[inside(x + 0.5, y + 0.5) for x in range(11)] for y in range(12)])
    assert 10 < wanted.sum() < 120
    np.testing.assert_array_equal(coco_mask([corners.flatten().tolist()], 12, 11), wanted)


def test_run_lengths_go_down_the_columns() -> None:
    assert drawn(coco_mask({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3)) == [".#.", "#.."]
    assert coco_mask({"size": [2, 2], "counts": [0, 4]}, 2, 2).all()


def pack(counts: list[int]) -> str:
    """COCO's packing, from its description: differences from the third number on, 5 bits a character, low bits first,
    bit 6 says that more follow, the sign is that of the last part."""
    text = ""
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        while True:
            part, value = value & 31, value >> 5
            done = value == (-1 if part & 16 else 0)
            text += chr(48 + part + (0 if done else 32))
            if done:
                break
    return text


def test_packed_run_lengths() -> None:
    assert unpack_counts("06") == [0, 6]
    random = np.random.default_rng(0)
    for _ in range(20):
        counts = [int(each) for each in random.integers(0, 3000, size=int(random.integers(1, 12)))]
        assert unpack_counts(pack(counts)) == counts
    mask = random.random((6, 9)) < 0.4
    counts, value = [0], False
    for each in mask.T.flatten():
        if each != value:
            counts, value = [*counts, 0], each
        counts[-1] += 1
    np.testing.assert_array_equal(coco_mask({"size": [6, 9], "counts": pack(counts)}, 6, 9), mask)


@pytest.mark.parametrize(
    ("segmentation", "said"),
    [
        ({"size": [2, 2], "counts": [1, 2]}, "3 pixels in all, wanted 2 x 2"),
        ({"size": [2, 3], "counts": [6]}, r"size \[2, 3\], but its picture has \[2, 2\]"),
        ({"size": [2, 2], "counts": [5, -1]}, "whole numbers"),
        ({"size": [2, 2], "counts": "0\x01"}, "character"),
        ({"size": [2, 2], "counts": "P"}, "end within a number"),
        ([[1, 2, 3, 4]], "three corners"),
        ([[1, 2, 3, 4, 5]], "three corners"),
        ([[0, 0, 1, 0, float("nan"), 1]], "three corners"),
        ("polygon", "wanted a list of polygons"),
        (None, "wanted a list of polygons"),
    ],
)
def test_segmentations_that_do_not_fit(segmentation: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        coco_mask(segmentation, 2, 2, "refs, ref 3")


# -- the converter ---------------------------------------------------------------------------------------------------


def published(place: Path, *, refs: list | None = None, protocol: int = 2) -> Path:
    """RefCOCO's layout: refs(unc).p, instances.json, and the pictures where the archives put them."""
    source, pictures = place / "refcoco", place / "images" / "mscoco" / "images" / "train2014"
    source.mkdir(parents=True)
    pictures.mkdir(parents=True)
    images, annotations = [], []
    for number, (width, height) in enumerate(((12, 8), (6, 6), (10, 5), (9, 9))):
        name = f"COCO_train2014_{number:012d}.jpg"
        Image.new("RGB", (width, height), (40 * number, 90, 10)).save(pictures / name)
        images.append({"id": 100 + number, "file_name": name, "width": width, "height": height})
        polygon = [[1.0, 1.0, 4.0, 1.0, 4.0, 3.0, 1.0, 3.0]]
        runs = {"size": [height, width], "counts": [1, 3, height * width - 4]}
        packed = {"size": [height, width], "counts": pack([1, 3, height * width - 4])}
        segmentation = (polygon, runs, packed, polygon)[number]
        annotations.append({"id": 7 + number, "image_id": 100 + number, "segmentation": segmentation, "category_id": 1})
    if refs is None:
        refs = [
            {
                "ref_id": 50 + number,
                "ann_id": 7 + number,
                "image_id": 100 + number,
                "file_name": f"COCO_train2014_{number:012d}_{7 + number}.jpg",
                "split": split,
                "category_id": 1,
                "sent_ids": [2 * number, 2 * number + 1],
                "sentences": [
                    {
                        "tokens": ["thing"],
                        "raw": "Thing",
                        "sent_id": 2 * number + each,
                        "sent": f"thing {number} {each}",
                    }
                    for each in range(2)
                ],
            }
            for number, split in enumerate(("train", "val", "testA", "testB"))
        ]
    (source / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol))
    (source / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": []}))
    return source


@pytest.mark.parametrize("copy", [False, True])
def test_the_converted_folder_is_a_data_folder(tmp_path: Path, copy: bool) -> None:
    found = convert_refcoco(published(tmp_path), tmp_path / "folder", copy=copy)
    assert found.rows == {"train": 2, "validation": 2, "test": 4}
    assert found.parts == {"train": 2, "val": 2, "testA": 2, "testB": 2}
    assert found.masks == 4
    assert (tmp_path / "folder" / "pictures").is_symlink() is not copy
    data = read_folder(tmp_path / "folder")
    assert data.problem_type == "segmentation"
    example = data.split("train")[1]
    assert example.text == "thing 0 1"
    assert drawn(example.label)[:4] == ["." * 12, ".###........", ".###........", "." * 12]
    assert drawn(data.split("validation")[0].label)[:4] == ["......", "#.....", "#.....", "#....."]
    assert drawn(data.split("test")[0].label) == ["..........", "#.........", "#.........", "#.........", ".........."]
    row = json.loads((tmp_path / "folder" / "metadata.jsonl").read_text().splitlines()[4])
    assert (row["part"], row["ref_id"], row["sent_id"]) == ("testA", 52, 4)


def test_one_of_the_test_parts(tmp_path: Path) -> None:
    found = convert_refcoco(published(tmp_path), tmp_path / "folder", test="testB")
    assert found.parts == {"train": 2, "val": 2, "testB": 2}
    assert found.masks == 3


def test_a_malicious_refs_file_writes_nothing(tmp_path: Path) -> None:
    source = published(
        tmp_path, refs=[{"ref_id": 1, "ann_id": 7, "split": "train", "sentences": Malicious(tmp_path / "ran")}]
    )
    with pytest.raises(DataError, match="nothing of it was run"):
        convert_refcoco(source, tmp_path / "folder")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "folder").exists()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    source = published(tmp_path)
    (source / "refs(google).p").write_bytes((source / "refs(unc).p").read_bytes())
    with pytest.raises(DataError, match=r"choose one by --split-by, such as --split-by google"):
        convert_refcoco(source, tmp_path / "folder")
    with pytest.raises(DataError, match=r"has no refs\(umd\).p"):
        convert_refcoco(source, tmp_path / "folder", split_by="umd")
    with pytest.raises(DataError, match="wanted COCO's train2014, by --pictures"):
        convert_refcoco(source, tmp_path / "folder", split_by="unc", pictures=tmp_path / "none")
    (tmp_path / "images" / "mscoco" / "images" / "train2014" / "COCO_train2014_000000000001.jpg").unlink()
    with pytest.raises(
        DataError, match=r"refs\(unc\).p, ref 1: the picture 'COCO_train2014_000000000001.jpg' is not in"
    ):
        convert_refcoco(source, tmp_path / "folder", split_by="unc")
    found = convert_refcoco(source, tmp_path / "folder", split_by="unc", skip_bad=True)
    assert len(found.skipped) == 1
    assert found.rows == {"train": 2, "test": 4}
    with pytest.raises(ConfigError, match="is not empty"):
        convert_refcoco(source, tmp_path / "folder", split_by="unc")
    (source / "instances.json").write_text("[]")
    with pytest.raises(DataError, match=r"no instances.json of COCO"):
        convert_refcoco(source, tmp_path / "other", split_by="unc")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ann_id": 99}, "no annotation 99"),
        ({"split": "dev"}, "the split 'dev'"),
        ({"sentences": [{"raw": "a"}]}, "wanted a dict with 'sent'"),
        ({"sentences": [{"sent": "a", "sent_id": [0]}]}, "wanted a dict with 'sent' and 'sent_id'"),
        ({"sentences": []}, "has no expression that can be used"),
        ({"ref_id": "../../a"}, "wanted a dict with ref_id"),
    ],
)
def test_references_that_cannot_be_used(tmp_path: Path, change: dict, said: str) -> None:
    ref = {"ref_id": 1, "ann_id": 7, "split": "train", "sentences": [{"sent": "a", "sent_id": 0}], **change}
    with pytest.raises(DataError, match=said):
        convert_refcoco(published(tmp_path, refs=[ref]), tmp_path / "folder")


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ({"height": -8}, "no picture 100 with its size"),
        ({"height": 10**7, "width": 10**7}, "instances.json says otherwise"),
        ({"id": 99}, "no picture 100"),
    ],
)
def test_pictures_that_are_not_as_said(tmp_path: Path, image: dict, said: str) -> None:
    source = published(tmp_path)
    values = json.loads((source / "instances.json").read_text())
    values["images"][0].update(image)
    (source / "instances.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=said):
        convert_refcoco(source, tmp_path / "folder")


def test_annotations_that_are_not_as_said(tmp_path: Path) -> None:
    source = published(tmp_path)
    values = json.loads((source / "instances.json").read_text())
    whole = values["annotations"][0]
    for change, said in (
        ({"image_id": [100]}, "no picture"),
        ({"segmentation": [[0, 0, 10**400, 0, 1, 1]]}, "polygon"),
    ):
        values["annotations"][0] = {**whole, **change}
        (source / "instances.json").write_text(json.dumps(values))
        with pytest.raises(DataError, match=said):
            convert_refcoco(source, tmp_path / "folder")


def test_a_picture_that_cannot_be_read_can_be_skipped(tmp_path: Path) -> None:
    source = published(tmp_path)
    (tmp_path / "images/mscoco/images/train2014/COCO_train2014_000000000001.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"ref 1: the picture .* cannot be read"):
        convert_refcoco(source, tmp_path / "folder")
    assert len(convert_refcoco(source, tmp_path / "folder", skip_bad=True).skipped) == 1


def test_a_number_given_twice_does_not_replace_a_mask(tmp_path: Path) -> None:
    ref = {"ref_id": 1, "ann_id": 7, "split": "train", "sentences": [{"sent": "a", "sent_id": 0}]}
    source = published(tmp_path, refs=[ref, {**ref, "ann_id": 8}])
    with pytest.raises(DataError, match="ref 1: ref_id 1 stands for another reference already"):
        convert_refcoco(source, tmp_path / "folder")


def test_a_mask_is_turned_as_its_picture_is(tmp_path: Path) -> None:
    source = published(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = tmp_path / "images/mscoco/images/train2014/COCO_train2014_000000000000.jpg"
    Image.new("RGB", (12, 8)).save(picture, exif=exif)
    convert_refcoco(source, tmp_path / "folder")
    example = read_folder(tmp_path / "folder").split("train")[0]
    assert example.image.size == (8, 12)
    assert drawn(example.label)[:4] == ["........", ".....##.", ".....##.", ".....##."]


def test_halves_of_characters_are_replaced(tmp_path: Path) -> None:
    ref = {"ref_id": 1, "ann_id": 7, "split": "train", "sentences": [{"sent": "a\ud83d", "sent_id": 0}]}
    convert_refcoco(published(tmp_path, refs=[ref]), tmp_path / "folder")
    assert read_folder(tmp_path / "folder").split("train").texts() == ["a\ufffd"]


def test_a_value_that_grows_without_end_is_said_in_brief(tmp_path: Path) -> None:
    value: list = []
    for _ in range(60):
        value = [value, value]
    with pytest.raises(DataError, match="wanted a dict with ref_id"):
        convert_refcoco(published(tmp_path, refs=[value]), tmp_path / "folder")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from epic_fast.cli import main

    def run(*arguments: object) -> int:
        with pytest.raises(SystemExit) as ended:
            main(["data", "convert", *map(str, arguments)])
        return int(ended.value.code or 0)

    source = published(tmp_path)
    assert run("refcoco", source, tmp_path / "folder", "--test", "testA", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["parts"] == {"train": 2, "val": 2, "testA": 2}
    assert run("refcoco", source, tmp_path / "folder") == 2  # not empty
    assert run("coco", source, tmp_path / "other") == 2
    (source / "refs(unc).p").write_bytes(pickle.dumps([Malicious(tmp_path / "ran")]))
    assert run("refcoco", source, tmp_path / "other") == 3
    assert "nothing of it was run" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
