"""Figures: that they are drawn, show what they are given, and refuse what they cannot show."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from epic_fast.errors import DataError
from epic_fast.plots import SheetItem, confusion_matrix, contact_sheet, training_curves
from epic_fast.plots.confusion import count_confusions
from epic_fast.plots.sheet import _columns

GREEN, VERMILLION = (0, 158, 115), (213, 94, 0)


def pixels(png: Path) -> np.ndarray:
    """(H, W, 3) of a PNG; fails unless it has ink and nothing but white at its very edge (nothing is cut off)."""
    picture = np.asarray(Image.open(png).convert("RGB")).astype(int)
    assert (picture < 250).any(axis=-1).mean() > 0.005, "the picture is blank"
    border = np.concatenate([picture[:3].reshape(-1, 3), picture[-3:].reshape(-1, 3)])
    border = np.concatenate([border, picture[:, :3].reshape(-1, 3), picture[:, -3:].reshape(-1, 3)])
    assert (border == 255).all(), "something reaches over the picture's edge"
    return picture


def share_of(picture: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((np.abs(picture - np.array(colour)).max(axis=-1) <= 3).mean())


def write_log(path: Path, epochs: int = 3, **last: object) -> Path:
    rows: list[dict[str, object]] = []
    for epoch in range(1, epochs + 1):
        for step in range(epoch * 20 - 10, epoch * 20 + 1, 10):
            rates = {"prompts": 1e-3, "head": 5e-4}
            rows.append({"type": "step", "step": step, "epoch": epoch, "loss": 1 / step, "learning_rates": rates})
        row = {"type": "epoch", "step": epoch * 20, "epoch": epoch, "train_loss": 1 / epoch, "best": epoch < 3}
        rows.append({**row, "validation": {"accuracy": epoch / 4, "loss": 1.0}, "gates": {"text_gate": 0.1}, **last})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_training_curves(tmp_path: Path) -> None:
    png = training_curves(write_log(tmp_path / "log.jsonl"), tmp_path / "curves.png")
    picture = pixels(png)
    assert share_of(picture, (0, 114, 178)) > 0, "no blue line"
    assert [each.name for each in tmp_path.iterdir() if each.suffix == ".tmp"] == []


def test_training_curves_without_validation_gates_or_finite_losses(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", validation={}, gates={}, train_loss=None)
    narrow = pixels(training_curves(log, tmp_path / "two.png"))
    wide = pixels(training_curves(write_log(tmp_path / "log.jsonl"), tmp_path / "three.png"))
    assert narrow.shape[1] < wide.shape[1], "a panel without content should not be there"


def test_training_curves_of_a_killed_run(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", epochs=1)
    with log.open("a") as lines:
        lines.write('{"type": "step", "st')
    pixels(training_curves(log, tmp_path / "curves.png"))


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "does not exist"), ("", "no step and no epoch"), ("no json\n{}\n", "line 1"), ('{"a": 1}\n', "'step'")],
)
def test_training_curves_refuse_what_is_no_log(tmp_path: Path, text: str | None, said: str) -> None:
    log = tmp_path / "log.jsonl"
    if text is not None:
        log.write_text(text)
    with pytest.raises(DataError, match=said):
        training_curves(log, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_confusions_are_counted_true_by_predicted() -> None:
    counts = count_confusions(torch.tensor([0, 0, 1, 2]), [0, 1, 1, 0], 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("classes", [2, 12, 30, 60])
def test_confusion_matrix(tmp_path: Path, classes: int) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, classes, 2000)
    right = random.random(2000) < 0.8
    predicted = np.where(right, labels, random.integers(0, classes, 2000))
    names = [f"class {'x' * (index % 30)}" for index in range(classes)]
    picture = pixels(confusion_matrix(labels, predicted, names, tmp_path / "matrix.png", title="test"))
    assert max(picture.shape) < 2500, "too large to look at"


def test_confusion_matrix_is_dark_on_the_diagonal_of_a_good_model(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(4), 10)
    names = list("abcd")
    good = pixels(confusion_matrix(labels, labels, names, tmp_path / "good.png"))
    bad = pixels(confusion_matrix(labels, np.tile(np.arange(4), 10), names, tmp_path / "bad.png"))
    dark = (8, 48, 107)  # the colour of 100 %
    assert share_of(good, dark) > 0.05 > 0.02 > share_of(bad, dark)


@pytest.mark.parametrize(
    ("labels", "predicted", "said"),
    [([], [], "no samples"), ([0, 1], [0], "2 labels and 1"), ([0, 3], [0, 0], "3 names no"), ([0.5], [0], "index")],
)
def test_confusion_matrix_refuses(tmp_path: Path, labels: list[int], predicted: list[int], said: str) -> None:
    with pytest.raises(DataError, match=said):
        confusion_matrix(np.array(labels), predicted, ["a", "b", "c"], tmp_path / "matrix.png")


def items(right: list[bool | None]) -> list[SheetItem]:
    picture = Image.new("RGBA", (300, 90), (120, 120, 120, 255))
    text = "costs $\\frac$, which is no formula, and so on\n" * 5
    return [SheetItem(picture, text, "a label" * 9, "another" * 9, 0.5, correct=each) for each in right]


def test_contact_sheet_marks_right_and_wrong(tmp_path: Path) -> None:
    right = pixels(contact_sheet(items([True] * 3), tmp_path / "right.png", title="$3 of $4"))
    wrong = pixels(contact_sheet(items([False] * 3), tmp_path / "wrong.png"))
    unknown = pixels(contact_sheet(items([None] * 3), tmp_path / "unknown.png"))
    assert share_of(right, GREEN) > 0.01
    assert share_of(right, VERMILLION) == 0
    assert share_of(wrong, VERMILLION) > 0.01
    assert share_of(wrong, GREEN) == 0
    assert share_of(unknown, VERMILLION) > 0.01, "labels that differ are wrong unless the caller says otherwise"


def test_an_item_without_a_true_label_is_neither_right_nor_wrong() -> None:
    picture = Image.new("RGB", (4, 4))
    assert SheetItem(picture, "", None, "cat").right is None
    assert SheetItem(picture, "", "cat", "cat").right is True
    assert SheetItem(picture, "", "cat", "dog").right is False
    assert SheetItem(picture, "", "cat", "dog", correct=True).right is True


def test_contact_sheet_of_one_and_of_none(tmp_path: Path) -> None:
    pixels(contact_sheet(items([True]), tmp_path / "one.png"))
    with pytest.raises(DataError, match="no items"):
        contact_sheet([], tmp_path / "none.png")


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (3, 3), (7, 4), (9, 3), (10, 5), (24, 6)])
def test_few_places_stay_empty(count: int, columns: int) -> None:
    assert _columns(count) == columns


def test_plots_need_no_display_and_leave_pyplot_alone(tmp_path: Path) -> None:
    """The caller's settings are as before, and pyplot, which would choose a backend, is not imported."""
    program = """
import sys, matplotlib
matplotlib.rcParams["font.size"] = 3
matplotlib.rcParams["text.usetex"] = False
from epic_fast.plots import confusion_matrix
confusion_matrix([0, 1], [0, 0], ["a", "b"], sys.argv[1])
assert matplotlib.rcParams["font.size"] == 3
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "matrix.png")], check=True, cwd=Path(__file__).parent.parent
    )
    pixels(tmp_path / "matrix.png")
