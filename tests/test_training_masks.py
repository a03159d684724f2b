"""Metrics of masks, by hand."""

from __future__ import annotations

import pytest
import torch

from epic_fast.errors import ConfigError
from epic_fast.training.masks import MASK_METRICS, mask_counts, mask_metrics


def masks(*rows: str) -> torch.Tensor:
    """One mask of one row of pixels a string."""
    return torch.tensor([[[letter == "#" for letter in row]] for row in rows])


def test_by_hand() -> None:
    predicted = masks("####......", "##........", "#.........", "##########")
    truth = masks("###.......", "##........", ".......##.", "#####.....")
    counts = mask_counts(predicted, truth)
    assert counts.tolist() == [[3, 4], [2, 2], [0, 3], [5, 10]]
    found = mask_metrics(counts)
    assert found["oiou"] == pytest.approx(10 / 19)
    assert found["miou"] == pytest.approx((0.75 + 1 + 0 + 0.5) / 4)
    at = [found[f"precision@{t}"] for t in (0.5, 0.6, 0.7, 0.8, 0.9)]
    assert at == [0.75, 0.5, 0.5, 0.25, 0.25]
    assert tuple(found) == MASK_METRICS


def test_large_objects_weigh_more_in_the_overall_one_only() -> None:
    found = mask_metrics(torch.tensor([[100, 100], [0, 10]]))
    assert found["oiou"] == pytest.approx(100 / 110)
    assert found["miou"] == 0.5


def test_empty_masks_and_empty_predictions() -> None:
    truth = masks("###", "...", "...")
    counts = mask_counts(masks("...", "#..", "..."), truth)
    assert counts.tolist() == [[0, 3], [0, 1], [0, 0]]
    found = mask_metrics(counts)
    assert found["oiou"] == 0.0
    assert found["miou"] == pytest.approx(1 / 3)
    assert found["precision@0.9"] == pytest.approx(1 / 3)
    assert mask_metrics(torch.tensor([[0, 0]])) == dict.fromkeys(MASK_METRICS, 1.0)


def test_a_threshold_that_is_just_reached_counts() -> None:
    assert mask_metrics(torch.tensor([[3, 5]]))["precision@0.6"] == 1.0
    assert mask_metrics(torch.tensor([[9, 10]]))["precision@0.9"] == 1.0
    assert mask_metrics(torch.tensor([[899, 1000]]))["precision@0.9"] == 0.0


def test_of_logits() -> None:
    truth = torch.tensor([[[True, True], [False, False]]])
    logits = torch.tensor([[[[0.0, 1.0], [2.0, -3.0]], [[0.5, 1.0], [1.0, -2.0]]]])
    assert mask_counts(logits, truth).tolist() == [[1, 3]]  # a tie is the background's


def test_many_samples_do_not_lose_pixels() -> None:
    counts = torch.full((5000, 2), 480 * 480)
    counts[0, 0] -= 1
    assert 0 < 1 - mask_metrics(counts)["oiou"] < 1e-8


def test_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"predictions \(1, 2, 2\) and masks \(1, 2, 3\)"):
        mask_counts(torch.zeros(1, 2, 2), torch.zeros(1, 2, 3))
    with pytest.raises(ConfigError, match="at least one sample"):
        mask_metrics(torch.zeros(0, 2))
