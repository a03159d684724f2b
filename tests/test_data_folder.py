"""Data folders: what is read, and every way in which one can be wrong."""

from __future__ import annotations

import json
import logging
import pickle
import re
from pathlib import Path

import pytest
from PIL import Image

from epic_fast.data import Example, read_folder, read_rows
from epic_fast.data import dataset as dataset_module
from epic_fast.errors import ConfigError, DataError
from epic_fast.testing import make_folder

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def write(folder: Path, rows: list, name: str = "metadata.jsonl", *, pictures: bool = True) -> Path:
    """A metadata file, and a small picture for each row that does not exist yet."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    for row in rows:
        if pictures and isinstance(row, dict):
            picture = path.parent / str(row.get("file_name", "x.png"))
            picture.parent.mkdir(parents=True, exist_ok=True)
            if not picture.exists():
                Image.new("RGB", (4, 4), "red").save(picture)
    return folder


def row(index: int, label: object = "cat", split: str = "train", text: object = "a cat", **more) -> dict:
    return {"file_name": f"{index}.png", "text": text, "label": label, "split": split, **more}


def refused(folder: Path, *patterns: str, **options) -> str:
    with pytest.raises(DataError) as caught:
        read_folder(folder, **options)
    for pattern in patterns:
        assert re.search(pattern, str(caught.value), re.DOTALL), f"{pattern!r} is not in: {caught.value}"
    return str(caught.value)


# -- what is read -------------------------------------------------------------------------------------------------


def test_split_field_single_label(tmp_path):
    data = read_folder(make_folder(tmp_path))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 24, "validation": 9, "test": 9}
    assert (data.problem_type, data.labels, data.num_labels) == (SINGLE, ["blue", "green", "red"], 3)
    assert data.skipped == []
    example = data.splits["train"][0]
    assert isinstance(example, Example)
    assert (example.image.mode, example.image.size, example.name) == ("RGB", (40, 40), "0000.png")
    assert example.label == 2
    assert data.splits["train"].label_ids()[:4] == [2, 1, 0, 2]
    assert data.splits["test"].labels == data.labels
    assert len(list(data.splits["test"])) == 9
    json.dumps(data.describe())


def test_multi_label(tmp_path):
    data = read_folder(make_folder(tmp_path, multi_label=True))
    assert (data.problem_type, data.labels) == (MULTI, ["blue", "green", "large", "red"])
    assert {tuple(ids) for ids in data.splits["train"].label_ids() if isinstance(ids, list)} <= {
        (3,),
        (1,),
        (0,),
        (2, 3),
        (1, 2),
        (0, 2),
    }


def test_multi_label_in_the_field_label_and_no_class_at_all(tmp_path):
    data = read_folder(write(tmp_path, [row(0, ["b", "a", "b"]), row(1, []), row(2, ["a"], "test")]))
    assert data.problem_type == MULTI
    assert data.splits["train"].label_ids() == [[0, 1], []]
    assert data.splits["train"].has_labels


def test_regression(tmp_path):
    data = read_folder(write(tmp_path, [row(0, 1.5), row(1, 2), row(2, -3, "test")]))
    assert (data.problem_type, data.labels, data.num_labels) == (REGRESSION, [], 1)
    assert data.splits["train"].label_ids() == [1.5, 2.0]
    assert data.splits["test"].label_ids() == [-3.0]


def test_whole_numbers_are_classes_in_their_order(tmp_path):
    data = read_folder(write(tmp_path, [row(0, 10), row(1, 9), row(2, 100)]))
    assert (data.problem_type, data.labels) == (SINGLE, ["9", "10", "100"])
    assert data.splits["train"].label_ids() == [1, 0, 2]


def test_true_and_false_are_classes(tmp_path):
    data = read_folder(write(tmp_path, [row(0, True), row(1, False)]))
    assert (data.problem_type, data.labels) == (SINGLE, ["false", "true"])


@pytest.mark.parametrize(
    ("labels", "problem_type", "ids"),
    [([3, 1], REGRESSION, [3.0, 1.0]), ([2.0, 1.0], SINGLE, [1, 0]), (["b", "a"], MULTI, [[1], [0]])],
)
def test_problem_type_can_be_given(tmp_path, labels, problem_type, ids):
    data = read_folder(write(tmp_path, [row(i, label) for i, label in enumerate(labels)]), problem_type=problem_type)
    assert data.problem_type == problem_type
    assert data.splits["train"].label_ids() == ids


def test_unknown_problem_type(tmp_path):
    with pytest.raises(ConfigError, match=r"'single' is unknown.*single_label_classification, multi"):
        read_folder(make_folder(tmp_path), problem_type="single")


@pytest.mark.parametrize("validation", ["validation", "val", "valid", "dev"])
def test_sub_folders(tmp_path, validation):
    for name, label in (("train", "dog"), (validation, "dog"), ("test", "cat")):
        write(tmp_path, [row(0, label), row(1, "cat")], f"{name}/metadata.jsonl")
    data = read_folder(tmp_path)
    assert list(data.splits) == ["train", "validation", "test"]
    assert data.labels == ["cat", "dog"]
    assert data.splits["validation"].label_ids() == [1, 0]
    assert data.warnings == []
    assert set(data.metadata) == {f"{name}/metadata.jsonl" for name in ("train", validation, "test")}


@pytest.mark.parametrize("split", ["val", "valid", "dev", "VALIDATION", " Validation "])
def test_split_field_spellings(tmp_path, split):
    assert len(read_folder(write(tmp_path, [row(0), row(1, split=split)])).splits["validation"]) == 1


def test_no_split_field_is_all_training(tmp_path):
    rows = [{"file_name": "0.png", "text": "", "label": "a"}, {"file_name": "1.png", "text": "b", "label": "b"}]
    data = read_folder(write(tmp_path, rows))
    assert list(data.splits) == ["train"]
    assert any("training rows only" in warning for warning in data.warnings)


@pytest.mark.parametrize("field", ["file_name", "image", "img"])
def test_picture_fields(tmp_path, field):
    Image.new("RGB", (3, 2)).save(tmp_path / "p.png")
    write(tmp_path, [{field: "p.png", "text": "t", "label": "x"}], pictures=False)
    assert read_folder(tmp_path).splits["train"][0].image.size == (3, 2)


def test_other_field_names(tmp_path):
    rows = [{"file_name": "0.png", "caption": "hi", "genre": "a", "fold": "test"}]
    rows.append({"file_name": "1.png", "caption": "ho", "genre": "a", "fold": "train"})
    data = read_folder(write(tmp_path, rows), text_field="caption", label_field="genre", split_field="fold")
    assert data.splits["train"].texts() == ["ho"]
    refused(tmp_path, r"line 1", r"no text field 'text'", r"'caption', 'file_name', 'fold', 'genre'")
    refused(tmp_path, r"no row has the label field 'gender'", text_field="caption", label_field="gender")
    refused(tmp_path, r"no row has the split field 'part'", text_field="caption", split_field="part")
    refused(tmp_path, r"no label", r"label_field", text_field="caption", split_field="fold")


def test_pictures_in_sub_folders_and_windows_line_ends(tmp_path):
    rows = [json.dumps({"file_name": "a b/c.png", "text": "t", "label": "x"}) + "\r", "", "   "]
    (tmp_path / "a b").mkdir()
    Image.new("RGB", (3, 2)).save(tmp_path / "a b" / "c.png")
    assert read_folder(write(tmp_path, rows)).splits["train"][0].name == "a b/c.png"


def test_byte_order_mark_and_odd_line_separators(tmp_path):
    write(tmp_path, [row(0, text="one\u2028line \x85 \x1c end")])
    path = tmp_path / "metadata.jsonl"
    line = json.dumps(row(0, text="one\u2028line \x85 \x1c end"), ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\n")
    assert read_folder(tmp_path).splits["train"].texts() == ["one\u2028line \x85 \x1c end"]


def test_half_an_emoji_is_replaced(tmp_path):
    write(tmp_path, ['{"file_name": "0.png", "text": "cut \\ud83d", "label": "x"}'])
    Image.new("RGB", (3, 2)).save(tmp_path / "0.png")
    assert read_folder(tmp_path).splits["train"].texts() == ["cut \ufffd"]


def test_csv(tmp_path):
    for index in range(3):
        Image.new("RGB", (3, 2)).save(tmp_path / f"{index}.png")
    (tmp_path / "metadata.csv").write_text(
        'file_name,text,label,split\n0.png,"two\nlines, a comma",10,train\n1.png,,9,train\n2.png,t,9,test\n'
    )
    data = read_folder(tmp_path)
    assert data.labels == ["9", "10"]
    assert data.splits["train"].texts() == ["two\nlines, a comma", ""]


@pytest.mark.parametrize(
    ("labels", "problem_type", "ids"),
    [
        (["1.5", "2", "-1e3"], REGRESSION, [1.5, 2.0, -1000.0]),
        (["07", "8", "9"], SINGLE, [0, 1, 2]),
        (["nan", "1", "2"], SINGLE, [2, 0, 1]),
        (['["a", "b"]', "[]", '["b"]'], MULTI, [[0, 1], [], [1]]),
    ],
)
def test_csv_labels(tmp_path, labels, problem_type, ids):
    lines = []
    for index, label in enumerate(labels):
        Image.new("RGB", (3, 2)).save(tmp_path / f"{index}.png")
        quoted = label.replace('"', '""')
        lines.append(f'{index}.png,t,"{quoted}"')
    (tmp_path / "metadata.csv").write_text("file_name,text,label\n" + "\n".join(lines))
    data = read_folder(tmp_path)
    assert data.problem_type == problem_type
    assert data.splits["train"].label_ids() == ids


def test_labels_txt_gives_the_order(tmp_path):
    write(tmp_path, [row(0, "cat"), row(1, "dog", "test")])
    (tmp_path / "labels.txt").write_text("dog\ncat\nbird\n\n  \n")
    data = read_folder(tmp_path)
    assert data.labels == ["dog", "cat", "bird"]
    assert data.splits["train"].label_ids() == [1]
    assert data.splits["test"].label_ids() == [0]


def test_numbers_are_lines_of_labels_txt(tmp_path):
    write(tmp_path, [row(0, 1), row(1, 0, "test")])
    (tmp_path / "labels.txt").write_text("dog\ncat\n")
    assert read_folder(tmp_path).splits["train"].label_ids() == [1]
    swapped = read_folder(tmp_path, labels=["cat", "dog"])
    assert (swapped.splits["train"].label_ids(), swapped.labels) == ([0], ["cat", "dog"])
    write(tmp_path, [row(0, 2)])
    refused(tmp_path, "unknown label '2'")
    write(tmp_path, [row(0, "1")])
    refused(tmp_path, "unknown label '1'")


def test_given_labels_and_a_folder_with_a_test_split_only(tmp_path):
    write(tmp_path, [row(0, "cat", "test"), row(1, "dog", "test")])
    refused(tmp_path, "no training split", "labels.txt", r"labels=model\.labels")
    data = read_folder(tmp_path, labels=["zebra", "dog", "cat"])
    assert data.splits["test"].label_ids() == [2, 1]


def test_test_split_without_labels_can_be_read_but_not_evaluated(tmp_path):
    rows = [row(0, "a"), row(1, "b"), {"file_name": "2.png", "text": "t", "split": "test"}]
    data = read_folder(write(tmp_path, rows))
    assert data.splits["test"][0].label is None
    assert not data.splits["test"].has_labels
    with pytest.raises(DataError, match=r"line 3.*no label"):
        data.splits["test"].label_ids()
    assert data.splits["train"].has_labels


def test_reading_is_lazy(tmp_path, monkeypatch):
    calls = []
    real = dataset_module.load_image
    monkeypatch.setattr(dataset_module, "load_image", lambda path: calls.append(path) or real(path))
    data = read_folder(make_folder(tmp_path))
    data.splits["train"].texts()
    data.splits["train"].label_ids()
    assert calls == []
    assert data.splits["train"][5].name == "0005.png"
    assert len(calls) == 1


def test_dataset_can_be_pickled(tmp_path):
    split = read_folder(make_folder(tmp_path)).splits["test"]
    again = pickle.loads(pickle.dumps(split))
    assert (again.texts(), again.label_ids(), again.labels) == (split.texts(), split.label_ids(), split.labels)
    assert again[0].name == split[0].name


def test_unknown_split_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no split 'validation'.*train, test"):
        read_folder(make_folder(tmp_path, validation=0)).split("validation")


# -- what is refused ----------------------------------------------------------------------------------------------


def test_folder_that_is_not_there_is_a_file_or_has_no_metadata(tmp_path):
    refused(tmp_path / "gone", r"gone.*does not exist", r"metadata\.jsonl", r"train/metadata")
    (tmp_path / "file.zip").write_text("x")
    refused(tmp_path / "file.zip", "is a file", "resolve_data")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no metadata", "it holds nothing", "file_name")
    (tmp_path / "empty" / "train").mkdir()
    (tmp_path / "empty" / "metadata.parquet").write_text("x")
    refused(tmp_path / "empty", r"it holds metadata\.parquet, train/")


def test_contradicting_metadata(tmp_path):
    write(tmp_path, [row(0)])
    write(tmp_path, [row(0)], "train/metadata.jsonl")
    refused(tmp_path, r"metadata\.jsonl and also train/metadata\.jsonl")
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "train" / "metadata.csv").write_text("file_name\n")
    refused(tmp_path, r"both train/metadata\.jsonl and train/metadata\.csv")
    (tmp_path / "train" / "metadata.csv").unlink()
    for name in ("val", "dev"):
        write(tmp_path, [row(0)], f"{name}/metadata.jsonl")
    refused(tmp_path, r"two folders for the split 'validation'.*dev/.*val/")


def test_split_folder_without_metadata_is_not_ignored(tmp_path):
    write(tmp_path, [row(0)], "train/metadata.jsonl")
    (tmp_path / "test").mkdir()
    refused(tmp_path, r"none in test/.*add test/metadata\.jsonl")


def test_no_rows(tmp_path):
    refused(write(tmp_path, [""]), r"metadata\.jsonl.*no rows")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"file_name": "0.png", "text": "cut', "broken JSON"),
        ('["0.png", "text"]', "wanted an object"),
        ('{"text": "t", "label": "x"}', "no picture.*file_name, image, img"),
        ('{"file_name": 3, "text": "t", "label": "x"}', "file_name is 3"),
        ('{"file_name": "", "text": "t", "label": "x"}', "file_name is ''"),
        ('{"file_name": "0.png", "text": null, "label": "x"}', "text is None.*wanted a string"),
        ('{"file_name": "0.png", "text": ["a", "b"], "label": "x"}', "text is .*wanted a string"),
        ('{"file_name": "0.png", "text": 5, "label": "x"}', "text is 5.*wanted a string"),
        ('{"file_name": "0.png", "text": "t", "label": "x", "split": "tset"}', "split is 'tset'.*wanted train"),
        ('{"file_name": "0.png", "text": "t", "label": "x", "split": 1}', "split is 1"),
        ('{"file_name": "0.png", "text": "t", "label": "x"}', "no 'split', which other rows have"),
        ('{"file_name": "0.png", "text": "t", "label": "", "split": "train"}', "label ''.*wanted a name"),
        ('{"file_name": "0.png", "text": "t", "label": {"a": 1}, "split": "train"}', "label .*wanted a name"),
        ("[" * 100_000, "broken JSON"),
    ],
)
def test_broken_line_is_named_by_number(tmp_path, line, said):
    write(tmp_path, [row(0), row(1), line])
    refused(tmp_path, rf"metadata\.jsonl, line 3.*{said}")


def test_not_utf8(tmp_path):
    write(tmp_path, [row(0)])
    with (tmp_path / "metadata.jsonl").open("ab") as lines:
        lines.write('{"file_name": "1.png", "text": "café"}\n'.encode("latin-1"))
    refused(tmp_path, "line 2: not UTF-8")
    (tmp_path / "metadata.jsonl").rename(tmp_path / "metadata.csv")
    refused(tmp_path, r"metadata\.csv: not UTF-8")


@pytest.mark.parametrize(
    ("line", "said"), [("1.png,a comma, too many,x", "not the 3 columns"), ("1.png,short", "not the 3 columns")]
)
def test_csv_with_wrong_columns(tmp_path, line, said):
    (tmp_path / "metadata.csv").write_text(f"file_name,text,label\n0.png,t,x\n{line}\n")
    refused(tmp_path, rf"metadata\.csv, line 3: {said}")


def test_csv_with_an_open_quote(tmp_path):
    (tmp_path / "metadata.csv").write_text('file_name,text,label\n0.png,"open,x\n')
    refused(tmp_path, r"metadata\.csv, line \d: broken CSV")


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "a/../../secret.png", "/etc/passwd", "..\\secret.png", "C:\\secret.png", "..", "a\0b.png"],
)
def test_path_outside_of_the_folder(tmp_path, name):
    Image.new("RGB", (3, 2)).save(tmp_path / "secret.png")
    folder = tmp_path / "data"
    write(folder, [{"file_name": name, "text": "t", "label": "x"}], pictures=False)
    refused(folder, "line 1", "outside of the folder")


def test_path_with_dots_inside_of_the_folder(tmp_path):
    write(tmp_path, [{"file_name": "a/../a/0.png", "text": "t", "label": "x"}])
    assert len(read_folder(tmp_path).splits["train"]) == 1


def test_linked_picture_folder_is_taken(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (3, 2)).save(tmp_path / "elsewhere" / "0.png")
    folder = tmp_path / "data"
    write(folder, [{"file_name": "images/0.png", "text": "t", "label": "x"}], pictures=False)
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    assert read_folder(folder).splits["train"][0].image.size == (3, 2)


def test_unknown_label_in_the_test_split(tmp_path):
    write(tmp_path, [row(0, "cat"), row(1, "dog"), row(2, "elk"), row(3, "DOGS", "test")])
    refused(tmp_path, r"line 4 \(test\)", "unknown label 'DOGS'", "nearest: 'dog'", "cat, dog, elk", "training split")
    (tmp_path / "labels.txt").write_text("elk\ndog\ncat")
    refused(tmp_path, r"from labels\.txt, are elk, dog, cat")


def test_unknown_label_among_several(tmp_path):
    write(tmp_path, [row(0, ["cat", "dog"]), row(1, ["cat", "cow"], "validation")])
    refused(tmp_path, r"line 2 \(validation\): unknown label 'cow'")


def test_labels_of_several_forms(tmp_path):
    refused(write(tmp_path, [row(0, "cat"), row(1, ["cat"])]), "several forms", "line 1", "line 2")
    refused(write(tmp_path, [row(0, "cat"), row(1, 1.5)]), "several forms", "line 1", "line 2")
    refused(write(tmp_path, [row(0, ["cat"]), row(1, 5, "test")]), "line 2.*wanted a list")
    refused(write(tmp_path, [row(0, 1.5), row(1, "cat", "test")]), "line 2.*'cat'.*finite number")
    refused(write(tmp_path, [row(0, "cat"), row(1, ["cat"], "test")]), r"line 2.*\['cat'\]")
    refused(write(tmp_path, [row(0, ["cat"]), row(1, [["dog"]])]), r"line 2.*wanted a name")
    refused(write(tmp_path, [row(0, 2.5)]), "2.5.*wanted a name", problem_type=SINGLE)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(tmp_path, number):
    write(tmp_path, [row(0, 1.5), f'{{"file_name": "0.png", "text": "t", "split": "train", "label": {number}}}'])
    refused(tmp_path, "line 2.*wanted a finite number")
    refused(tmp_path, "line", problem_type=SINGLE)


def test_label_and_labels(tmp_path):
    write(tmp_path, [row(0, "cat", labels=["cat"])])
    refused(tmp_path, "both 'label' and 'labels'", "label_field")
    assert read_folder(tmp_path, label_field="labels").problem_type == MULTI


def test_missing_labels(tmp_path):
    refused(write(tmp_path, [row(0), row(1, None)]), r"line 2 \(train\): no label", "every training row")
    rows = [row(0), row(1, "cat", "test"), row(2, None, "test"), row(3, None, "test")]
    refused(write(tmp_path, rows), r"line 3 \(test\): no label \(2 rows of 3\)", "other rows")


def test_labels_txt_that_is_wrong(tmp_path):
    write(tmp_path, [row(0)])
    for content, said in ((b"cat\ndog\ncat\n", "'cat' occur more than once"), (b"\n", "is empty"), (b"\xff", "UTF-8")):
        (tmp_path / "labels.txt").write_bytes(content)
        refused(tmp_path, rf"labels\.txt.*{said}")


# -- pictures -----------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """24 + 9 + 9 rows: picture 3 is missing, 5 is cut in half, 7 is no picture at all, 30 is missing."""
    folder = make_folder(tmp_path)
    (folder / "0003.png").unlink()
    (folder / "0030.png").unlink()
    whole = (folder / "0005.png").read_bytes()
    (folder / "0005.png").write_bytes(whole[: len(whole) // 2])
    (folder / "0007.png").write_text("no picture")
    return folder


def test_missing_picture_names_the_row(damaged):
    refused(damaged, r"metadata\.jsonl, line 4", r"'0003\.png' does not exist", "--skip-bad")
    (damaged / "0001.png").unlink()
    refused(damaged, r"line 2.*\(1 other pictures? (is|are) missing too\)")


def test_corrupt_picture_names_the_row_when_it_is_read(damaged):
    for name in ("0003.png", "0030.png"):
        Image.new("RGB", (4, 4)).save(damaged / name)
    split = read_folder(damaged).splits["train"]
    assert split[4].name == "0004.png"
    for index in (5, 7):
        with pytest.raises(DataError, match=rf"line {index + 1}: .*000{index}\.png.*cannot be read.*--skip-bad"):
            split[index]


def test_skip_bad_leaves_them_out_and_counts(damaged, caplog):
    with caplog.at_level(logging.WARNING, "epic_fast"):
        data = read_folder(damaged, skip_bad=True)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 21, "validation": 8, "test": 9}
    assert len(data.skipped) == 4
    assert len(data.splits["train"].skipped) == 3
    assert [re.findall(r"line \d+", line)[0] for line in data.skipped] == ["line 4", "line 6", "line 8", "line 31"]
    assert [record for record in caplog.records if "3 of 24 rows are left out" in record.getMessage()]
    assert all(example.image.size == (40, 40) for example in data.splits["train"])


def test_skip_bad_of_everything(tmp_path):
    write(tmp_path, [row(0), row(1, split="test")])
    (tmp_path / "1.png").write_text("no picture")
    refused(tmp_path, "no picture of the split 'test' can be read", "line 2", skip_bad=True)


# -- oddities -----------------------------------------------------------------------------------------------------


def test_empty_texts_are_allowed_and_said_once(tmp_path, caplog):
    write(tmp_path, [row(0, text=""), row(1, text=" \n"), row(2), row(3, text="", split="test")])
    with caplog.at_level(logging.WARNING, "epic_fast"):
        data = read_folder(tmp_path)
    said = [record.getMessage() for record in caplog.records if "empty" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("3 texts are empty")
    assert data.splits["train"].texts()[0] == ""


def test_picture_in_two_splits_is_a_warning(tmp_path, caplog):
    write(tmp_path, [row(0), row(0, text="again"), row(1, "dog"), row(1, "dog", "test")])
    with caplog.at_level(logging.WARNING, "epic_fast"):
        data = read_folder(tmp_path)
    said = [line for line in data.warnings if "more than one split" in line]
    assert len(said) == 1
    assert said[0].startswith("1 picture stands in more than one split, such as '1.png' (train, test)")
    assert said[0] in caplog.text


def test_one_class_is_a_warning(tmp_path):
    assert any("one class only ('cat')" in line for line in read_folder(write(tmp_path, [row(0)])).warnings)


# -- rows to predict ----------------------------------------------------------------------------------------------


def test_read_rows(tmp_path):
    write(tmp_path, [{"file_name": "a/0.png", "text": "t"}, row(1, label=["whatever"], labels=3)], "input.jsonl")
    rows = read_rows(tmp_path / "input.jsonl")
    assert [(example.name, example.label) for example in rows] == [("a/0.png", None), ("1.png", None)]
    assert rows.names() == ["a/0.png", "1.png"]
    assert (rows.labels, rows.problem_type, rows.has_labels) == ([], None, False)


def test_read_rows_refuses(tmp_path):
    for name, said in (("gone.jsonl", "does not exist"), (".", "is a folder")):
        with pytest.raises(DataError, match=said):
            read_rows(tmp_path / name)
    write(tmp_path, [""], "none.jsonl")
    with pytest.raises(DataError, match="has no rows"):
        read_rows(tmp_path / "none.jsonl")
    write(tmp_path, [row(0), row(1)], "two.jsonl")
    (tmp_path / "1.png").unlink()
    with pytest.raises(DataError, match=r"two\.jsonl, line 2.*does not exist"):
        read_rows(tmp_path / "two.jsonl")
    kept = read_rows(tmp_path / "two.jsonl", skip_bad=True)
    assert (len(kept), len(kept.skipped)) == (1, 1)
