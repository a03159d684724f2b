"""The report on a data folder: everything that is wrong in one pass."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from epic_fast.data import check_folder
from epic_fast.errors import ConfigError, DataError
from epic_fast.testing import make_folder


def test_sound_folder(tmp_path):
    report = check_folder(make_folder(tmp_path))
    assert report.ok
    assert report.counts == {"train": 24, "validation": 9, "test": 9}
    assert report.labels == ["blue", "green", "red"]
    assert report.classes["train"] == {"blue": 8, "green": 8, "red": 8}
    assert report.words == {"0": 0, "1": 0, "2-3": 0, "4-7": 42}
    assert report.repeated_pictures == {"train": 0, "validation": 0, "test": 0}
    assert report.shared_texts["train+test"] > 0
    json.dumps(report.to_dict())


def test_multi_label_classes_are_counted_each(tmp_path):
    report = check_folder(make_folder(tmp_path, multi_label=True))
    assert sum(report.classes["train"][name] for name in ("red", "green", "blue")) == 24
    assert 0 < report.classes["train"]["large"] < 24


def test_everything_wrong_at_once(tmp_path):
    folder = make_folder(tmp_path)
    (folder / "0003.png").unlink()
    (folder / "0005.png").write_text("no picture")
    shutil.copy(folder / "0001.png", folder / "0002.png")
    shutil.copy(folder / "0001.png", folder / "0040.png")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["text"] = f"text {row['file_name']}"
    rows[6]["text"] = rows[40]["text"] = ""
    rows[1]["text"] = rows[2]["text"] = "Same  text"
    rows[41]["text"] = "same text"
    rows[7]["text"] = 5
    rows[35]["label"] = "gren"
    rows[36]["file_name"] = "../0036.png"
    lines = [json.dumps(row) for row in rows]
    lines[8] = "{broken"
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    report = check_folder(folder)
    assert not report.ok
    assert report.counts == {"train": 22, "validation": 9, "test": 7}
    assert report.missing == ["metadata.jsonl, line 4: 0003.png"]
    assert len(report.broken) == 1
    assert report.broken[0].startswith("metadata.jsonl, line 6: ")
    assert len(report.errors) == 4
    for line, said in ((8, "text is 5"), (9, "broken JSON"), (36, "unknown label 'gren'"), (37, "outside")):
        assert any(f"line {line}" in error and said in error for error in report.errors), (line, report.errors)
    assert report.shared_texts == {"train+validation": 0, "train+test": 1, "validation+test": 0}
    assert report.shared_pictures == {"train+validation": 0, "train+test": 1, "validation+test": 0}
    assert report.repeated_pictures == {"train": 1, "validation": 0, "test": 0}
    assert report.repeated_pairs == {"train": 1, "validation": 0, "test": 0}
    assert report.words["0"] == 2
    assert any("2 texts are empty" in warning for warning in report.warnings)
    shown = str(report)
    for part in ("train 22", "missing: 1", "broken: 1", "errors: 4", "train+test 1", "warning: 2 texts are empty"):
        assert part in shown


def test_labels_that_cannot_be_made_sense_of(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "0.png")
    row = {"file_name": "0.png", "text": "t"}
    for labels, said in (((1.5, "cat"), "several forms"), ((None, "cat"), "no label")):
        lines = [json.dumps({**row, "label": label}) for label in labels]
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
        report = check_folder(tmp_path)
        assert any(said in error for error in report.errors)
        assert report.counts == {"train": 2}


def test_regression_and_no_rows(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "t", "label": 0.5}')
    report = check_folder(tmp_path)
    assert (report.ok, report.problem_type, report.classes) == (True, "regression", {"train": {}})
    (tmp_path / "metadata.jsonl").write_text("")
    report = check_folder(tmp_path)
    assert (report.ok, report.counts) == (False, {})
    assert "no rows" in str(report)


def test_one_class_is_an_error(tmp_path):
    folder = make_folder(tmp_path)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps({**row, "label": "red"}) + "\n" for row in rows))
    report = check_folder(folder)
    assert not report.ok
    assert len(report.errors) == 1
    assert "one class only ('red')" in report.errors[0]
    assert not any("one class" in line for line in report.warnings)


def test_no_metadata_is_an_error(tmp_path):
    with pytest.raises(DataError, match="has no metadata"):
        check_folder(tmp_path)
    with pytest.raises(ConfigError, match="problem_type"):
        check_folder(make_folder(tmp_path), problem_type="x")
