"""Metrics of sentiment, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from epic_fast.errors import ConfigError
from epic_fast.training.sentiment import SENTIMENT_METRICS, sentiment_metrics


def test_by_hand() -> None:
    labels = torch.tensor([-3.0, -1.2, 0.0, 0.0, 0.6, 2.4])
    values = torch.tensor([-7.0, -0.6, -0.1, 0.2, -0.4, 1.6])
    found = sentiment_metrics(values, labels)
    assert tuple(found) == SENTIMENT_METRICS
    # -7 is limited to -3; -0.6 rounds to -1 as -1.2 does; -0.1 and 0.2 to 0; 0.6 to 1, -0.4 not; 1.6 to 2 as 2.4 does.
    assert found["acc7"] == pytest.approx(5 / 6)
    # negative / non-negative: truth - - + + + +, said - - - + - +
    assert found["acc2_has0"] == pytest.approx(4 / 6)
    negative, positive = 2 * 2 / (2 * 2 + 2 + 0), 2 * 2 / (2 * 2 + 0 + 2)
    assert found["f1_has0"] == pytest.approx((2 * negative + 4 * positive) / 6)
    # without the two zeros: truth - - + +, said - - - +
    assert found["acc2_non0"] == pytest.approx(3 / 4)
    assert found["f1_non0"] == pytest.approx((2 * (4 / 5) + 2 * (2 / 3)) / 4)


def test_a_prediction_of_zero() -> None:
    found = sentiment_metrics(torch.zeros(2), torch.tensor([1.0, -1.0]))
    assert found["acc2_has0"] == 0.5  # non-negative, said of both
    assert found["acc2_non0"] == 0.5  # not positive, said of both
    found = sentiment_metrics(torch.zeros(1), torch.tensor([1.0]))
    assert (found["acc2_has0"], found["acc2_non0"]) == (1.0, 0.0)


def test_halves_go_to_the_even_class() -> None:
    found = sentiment_metrics(torch.tensor([0.5, 1.5, 2.5]), torch.tensor([0.0, 2.0, 2.0]))
    assert found["acc7"] == 1.0


def test_all_neutral() -> None:
    found = sentiment_metrics(torch.tensor([0.1, -0.2]), torch.zeros(2))
    assert found["acc2_has0"] == 0.5
    assert math.isnan(found["acc2_non0"])
    assert math.isnan(found["f1_non0"])


def test_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="2 predictions and 3 labels"):
        sentiment_metrics(torch.zeros(2), torch.zeros(3))
