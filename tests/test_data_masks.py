"""Folders with masks: what is read, collated, checked and refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from epic_fast.data import Collator, check_folder, load_mask, read_folder
from epic_fast.errors import ConfigError, DataError
from epic_fast.testing import tiny_clip


def folder_of(place: Path, rows: list[dict], size: tuple[int, int] = (6, 4)) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        row.setdefault("file_name", f"{number}.png")
        row.setdefault("text", "the red one")
        if row.get("mask") is None and "mask" not in row:
            row["mask"] = f"m{number}.png"
            mask = np.zeros(size[::-1], np.uint8)
            mask[1, : number + 1] = 255
            Image.fromarray(mask).save(place / row["mask"])
        Image.new("RGB", size, "red").save(place / row["file_name"])
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_a_mask_makes_it_segmentation(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [{"split": "train"}, {"split": "train"}, {"split": "test"}])
    data = read_folder(folder)
    assert (data.problem_type, data.labels, data.num_labels) == ("segmentation", [], 2)
    example = data.splits["train"][1]
    assert example.label.dtype == bool
    assert example.label.shape == (4, 6)
    assert example.label.sum() == 2
    assert data.splits["train"].has_labels
    assert data.describe()["problem_type"] == "segmentation"


def test_a_label_beside_a_mask_is_the_label(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [{"label": "a"}, {"label": "b"}])
    assert read_folder(folder).problem_type == "single_label_classification"
    assert read_folder(folder, label_field="mask").problem_type == "segmentation"


def test_masks_in_csv(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [{}])
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text,mask\n0.png,a thing,m0.png\n")
    assert read_folder(folder).splits["train"][0].label.sum() == 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "RGB"])
def test_what_is_not_zero_is_the_object(tmp_path: Path, mode: str) -> None:
    mask = np.array([[0, 1, 1], [0, 0, 1]], np.uint8)
    if mode == "I;16":
        image = Image.fromarray(mask.astype(np.uint16) * 300)
    elif mode == "RGB":
        image = Image.fromarray(np.stack([mask * 0, mask * 200, mask * 0], axis=2))
    elif mode == "P":
        image = Image.fromarray(mask)
        image.putpalette([9, 9, 9, 0, 0, 0])  # colours say nothing
    else:
        image = Image.fromarray(mask == 1) if mode == "1" else Image.fromarray(mask)
    image.save(tmp_path / "mask.png")
    assert Image.open(tmp_path / "mask.png").mode == mode
    np.testing.assert_array_equal(load_mask(tmp_path / "mask.png"), mask == 1)


def test_masks_that_are_none(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "mask.jpg")
    with pytest.raises(DataError, match="is a JPEG, which need not keep exact values"):
        load_mask(tmp_path / "mask.jpg")
    Image.new("RGB", (4, 4)).save(tmp_path / "mask.webp")
    with pytest.raises(DataError, match="is a WEBP, which need not keep exact values"):
        load_mask(tmp_path / "mask.webp")
    Image.new("RGBA", (4, 4)).save(tmp_path / "mask.png")
    with pytest.raises(DataError, match="of mode RGBA; wanted a PNG of one channel"):
        load_mask(tmp_path / "mask.png")
    with pytest.raises(DataError, match="does not exist"):
        load_mask(tmp_path / "none.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(DataError, match="cannot be read"):
        load_mask(tmp_path / "broken.png")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"mask": "none.png"}, r"line 2: the mask 'none.png' does not exist; put the file there, or leave"),
        ({"mask": "../m.png"}, r"line 2: the mask '../m.png' lies outside of the folder"),
        ({"mask": 3}, "line 2: mask is 3; wanted the mask's path as a string"),
        ({"mask": None}, r"line 2 \(train\): no label"),
    ],
)
def test_rows_without_their_mask(tmp_path: Path, row: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_folder(folder_of(tmp_path, [{}, row]))


def test_labels_of_other_problems_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [{}, {}])
    with pytest.raises(DataError, match=r"label mask 'm0\.png'; wanted a finite number, the problem being regression"):
        read_folder(folder, problem_type="regression")
    with pytest.raises(DataError, match="the problem being single_label_classification"):
        read_folder(folder, problem_type="single_label_classification", labels=["a"])
    folder_of(tmp_path / "labels", [{"label": "a"}])
    with pytest.raises(DataError, match=r"segmentation wants the field 'mask'.*--label-field.*label_field="):
        read_folder(tmp_path / "labels", problem_type="segmentation", label_field="label")


def test_a_mask_of_another_size(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [{}, {}])
    Image.new("L", (5, 4)).save(folder / "m1.png")
    data = read_folder(folder)
    with pytest.raises(DataError, match=r"line 2: the mask is 5 x 4 pixels, its picture '1.png' 6 x 4"):
        data.splits["train"][1]
    report = check_folder(folder)
    assert not report.ok
    assert len(report.broken) == 1
    kept = read_folder(folder, skip_bad=True)
    assert len(kept.splits["train"]) == 1
    assert kept.skipped[0].startswith("metadata.jsonl, line 2: the mask is 5 x 4")
    (folder / "m0.png").unlink()
    assert check_folder(folder).missing == ["metadata.jsonl, line 1: m0.png"]


def collator(**more) -> Collator:
    backbone = _backbone()
    return Collator(backbone.image_processor, backbone.tokenizer, max_text_length=16, **more)


def _backbone():
    from epic_fast.backbones import load_backbone

    return load_backbone(_backbone.folder)


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory) -> None:
    _backbone.folder = tmp_path_factory.mktemp("clip")
    tiny_clip(_backbone.folder)


def test_masks_in_a_batch(tmp_path: Path) -> None:
    data = read_folder(folder_of(tmp_path, [{}, {}, {}]))
    rows = data.splits["train"]
    collate = collator(mask_size=(4, 6))
    batch = collate(list(rows))
    assert batch["labels"].dtype == torch.bool
    np.testing.assert_array_equal(batch["labels"][2].numpy(), rows[2].label)
    torch.testing.assert_close(collate.labels(rows.rows), batch["labels"])  # of rows, without a picture
    larger = collator(mask_size=(8, 12))(list(rows))["labels"]
    torch.testing.assert_close(larger, batch["labels"].repeat_interleave(2, 1).repeat_interleave(2, 2))
    with pytest.raises(ConfigError, match="Collator needs mask_size"):
        collator()(list(rows))


def test_the_whole_picture_is_shown_where_there_is_a_mask(tmp_path: Path) -> None:
    """A processor that cuts the middle out would show other pixels than the mask's."""
    wide = np.zeros((20, 80, 3), np.uint8)
    wide[:, :20] = 255
    mask = np.zeros((20, 80), np.uint8)
    mask[:, :20] = 1
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "white", "mask": "m.png"}\n')
    Image.fromarray(wide).save(tmp_path / "0.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    batch = collator(mask_size=(32, 32))(list(read_folder(tmp_path).splits["train"]))
    white = batch["pixel_values"][0].mean(0) > 0.5
    assert white.shape == (32, 32)
    assert (white != batch["labels"][0]).float().mean() < 0.05
