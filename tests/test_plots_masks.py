"""The sheet of masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from epic_fast.errors import DataError
from epic_fast.plots import MaskItem, mask_sheet


def item(truth: str | None = "half", predicted: str = "half", text: str = "the red one") -> MaskItem:
    masks = {
        "half": np.arange(20 * 30).reshape(20, 30) < 300,
        "empty": np.zeros((20, 30), bool),
        "all": np.ones((20, 30), bool),
        "turned": np.ones((30, 20), bool),
    }
    return MaskItem(Image.new("RGB", (30, 20), "red"), text, None if truth is None else masks[truth], masks[predicted])


def test_overlap() -> None:
    assert item().iou == 1.0
    assert item(predicted="all").iou == 0.5
    assert item("empty", "empty").iou == 1.0
    assert item("empty", "half").iou == 0.0
    assert item(None).iou is None


def test_it_shows_picture_truth_and_prediction(tmp_path: Path) -> None:
    items = [item(), item(None, "all"), item("empty", "empty"), item(text="a very long expression " * 20)]
    path = mask_sheet(items, tmp_path / "sheet.png", title="masks")
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    red = (picture[..., 0] > 200) & (picture[..., 1:].max(axis=2) < 60)
    assert red.mean() > 0.05
    # Where the truth is not, the picture fades to pink.
    pink = (picture[..., 0] > 240) & (abs(picture[..., 1] - 191) < 6) & (abs(picture[..., 2] - 191) < 6)
    assert pink.mean() > 0.02
    assert mask_sheet(items * 5, tmp_path / "more.png", columns=2).is_file()


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no items"):
        mask_sheet([], tmp_path / "sheet.png")
    with pytest.raises(DataError, match="the predicted mask of 'the red one' has shape"):
        mask_sheet([item(predicted="turned")], tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()
