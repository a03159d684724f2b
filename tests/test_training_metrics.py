"""Metrics against numbers worked out by hand and against scikit-learn; threshold; pos_weight."""

from __future__ import annotations

import math

import pytest
import torch

from epic_fast.errors import ConfigError, DataError
from epic_fast.testing.pairs import RandomPairs
from epic_fast.training import compute_metrics, tune_threshold
from epic_fast.training.metrics import choose_metric, is_better
from epic_fast.training.pos_weight import balanced_pos_weight, multi_hot_labels

SINGLE, MULTI = "single_label_classification", "multi_label_classification"


def one_hot_logits(predicted, classes):
    return torch.nn.functional.one_hot(torch.tensor(predicted), classes).float()


def test_single_label_by_hand():
    labels, predicted = [0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1]
    found = compute_metrics(one_hot_logits(predicted, 2), torch.tensor(labels), SINGLE, num_labels=2)
    assert found["accuracy"] == pytest.approx(7 / 8)  # the mean over classes would be 3/4
    assert found["f1_macro"] == pytest.approx((12 / 13 + 2 / 3) / 2)


def test_single_label_agrees_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 7, generator=generator)
    labels = torch.randint(6, (200,), generator=generator)  # class 6 never occurs
    logits[:, 5] = -9.0  # class 5 is never said
    found = compute_metrics(logits, labels, SINGLE, num_labels=7)
    predicted = logits.argmax(1)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert found["f1_macro"] == pytest.approx(metrics.f1_score(labels, predicted, average="macro", zero_division=0))


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_multi_label_agrees_with_scikit_learn(threshold):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(100, 5, generator=generator)
    labels = (torch.rand(100, 5, generator=generator) < 0.3).float()
    labels[:, 4], logits[:, 4] = 0, -20.0  # neither there nor said
    found = compute_metrics(logits, labels, MULTI, num_labels=5, threshold=threshold)
    said = (logits.sigmoid() > threshold).int()
    for average in ("micro", "macro"):
        expected = metrics.f1_score(labels.int(), said, average=average, zero_division=0)
        assert found[f"f1_{average}"] == pytest.approx(expected)
    assert found["threshold"] == threshold


def test_multi_label_by_hand():
    logits = torch.logit(torch.tensor([[0.9, 0.6], [0.4, 0.7]]))
    labels = torch.tensor([[1, 0], [1, 1]])
    found = compute_metrics(logits, labels, MULTI, num_labels=2, threshold=None)
    assert found["f1_micro"] == pytest.approx(2 * 2 / (3 + 3))
    assert found["f1_macro"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_regression_by_hand(shape):
    values, labels = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([1.0, 2.0, 3.0, 6.0])
    found = compute_metrics(values, labels.reshape(shape), "regression", num_labels=1)
    assert found["mae"] == pytest.approx(0.5)
    assert found["mse"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(8 / math.sqrt(5 * 14))


def test_regression_of_several_values():
    labels = torch.tensor([[1.0, 5.0], [2.0, 3.0], [3.0, 1.0]])
    found = compute_metrics(labels * torch.tensor([1.0, -1.0]), labels, "regression", num_labels=2)
    assert found["pearson"] == pytest.approx(0.0, abs=1e-6)
    assert found["mae"] == pytest.approx(3.0)


def test_pearson_without_variance_is_nan_and_quiet(recwarn):
    found = compute_metrics(torch.ones(3, 1), torch.tensor([1.0, 2.0, 3.0]), "regression", num_labels=1)
    assert math.isnan(found["pearson"])
    assert math.isnan(compute_metrics(torch.ones(1, 1), torch.ones(1), "regression", num_labels=1)["pearson"])
    assert not recwarn.list


def test_shapes_that_do_not_fit():
    with pytest.raises(ConfigError, match="2 predictions and 3 labels"):
        compute_metrics(torch.zeros(2, 3), torch.zeros(3).long(), SINGLE, num_labels=3)
    with pytest.raises(ConfigError, match=r"\(2, 3\); wanted \(N, 4\)"):
        compute_metrics(torch.zeros(2, 3), torch.zeros(2).long(), SINGLE, num_labels=4)
    with pytest.raises(ConfigError, match="0 or 1 a class"):
        compute_metrics(torch.zeros(2, 3), torch.zeros(2), MULTI, num_labels=3)
    with pytest.raises(ConfigError, match="problem_type is 'ranking'"):
        compute_metrics(torch.zeros(2, 3), torch.zeros(2), "ranking", num_labels=3)
    with pytest.raises(ConfigError, match="at least one"):
        compute_metrics(torch.zeros(0, 3), torch.zeros(0).long(), SINGLE, num_labels=3)


def micro_f1(probabilities, labels, threshold):
    said, truth = probabilities > threshold, labels > 0.5
    return float(2 * (said & truth).sum() / (said.sum() + truth.sum()))


@pytest.mark.parametrize("seed", range(5))
def test_threshold_is_the_best_of_all(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(40, 4, generator=generator) < 0.2).float()
    logits = torch.randn(40, 4, generator=generator) + 2 * labels - 3
    logits[:10] = logits[:10].round()  # ties
    probabilities = logits.sigmoid()
    best = max(micro_f1(probabilities, labels, cut) for cut in [0.0, *probabilities.flatten().tolist()])
    chosen = tune_threshold(logits, labels)
    assert micro_f1(probabilities, labels, chosen) == pytest.approx(best)
    assert best > micro_f1(probabilities, labels, 0.5)


def test_threshold_stays_at_half_where_that_is_as_good():
    assert tune_threshold(torch.tensor([[4.0, -4.0]]), torch.tensor([[1, 0]])) == 0.5
    assert tune_threshold(torch.zeros(3, 2), torch.zeros(3, 2)) == 0.5
    assert tune_threshold(torch.zeros(0, 2), torch.zeros(0, 2)) == 0.5


def test_threshold_between_neighbouring_floats():
    logits = torch.linspace(0.999, 1.001, 20001)
    tried = rounded_up = 0
    for first in range(200):
        pair = logits[[first, first + 1]].unsqueeze(1)
        low, high = pair.sigmoid().flatten()
        if torch.nextafter(low, high) != high or low == high:
            continue
        tried, rounded_up = tried + 1, rounded_up + int((low + high) / 2 == high)
        chosen = tune_threshold(pair, torch.tensor([[0], [1]]))
        assert (pair.sigmoid() > chosen).flatten().tolist() == [False, True]
    assert tried > rounded_up > 0  # where it is rounded up, the middle of the two cuts nothing


def test_threshold_refuses_other_shapes():
    with pytest.raises(ConfigError, match="wanted the same"):
        tune_threshold(torch.zeros(3, 2), torch.zeros(3))


def test_metric_that_chooses_the_best_epoch():
    assert choose_metric(None, SINGLE) == "accuracy"
    assert choose_metric(None, MULTI) == "f1_micro"
    assert choose_metric(None, "regression") == "mae"
    assert choose_metric("loss", SINGLE) == "loss"
    with pytest.raises(
        ConfigError, match="'f1_micro'; for single_label_classification wanted one of accuracy, f1_macro"
    ):
        choose_metric("f1_micro", SINGLE)


def test_better_or_not():
    assert is_better("accuracy", 0.1, None)
    assert is_better("accuracy", 0.2, 0.1)
    assert not is_better("accuracy", 0.1, 0.1)
    assert is_better("mae", 0.1, 0.2)
    assert not is_better("loss", 0.3, 0.2)
    assert is_better("pearson", 0.1, math.nan)
    assert not is_better("pearson", math.nan, 0.1)
    assert is_better("pearson", math.nan, None)


def test_pos_weight_is_negatives_by_positives():
    labels = torch.zeros(1000, 4)
    labels[:250, 0] = 1  # 750 / 250
    labels[:2, 1] = 1  # 998 / 2, cut to 100
    labels[:, 2] = 1  # 0 / 1000, cut to 1/100
    assert balanced_pos_weight(labels).tolist() == pytest.approx([3.0, 100.0, 0.01, 1.0])


class Labelled:
    def __init__(self, rows):
        self.rows = rows

    def label_ids(self):
        return self.rows


def test_labels_as_rows_as_ids_and_from_samples():
    expected = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert torch.equal(multi_hot_labels(Labelled([[1, 0, 1], [0, 0, 0], [0, 1, 0]]), 3), expected)
    assert torch.equal(multi_hot_labels(Labelled(expected), 3), expected)
    assert torch.equal(multi_hot_labels(Labelled([[0, 2], [], [1]]), 3), expected)
    assert multi_hot_labels(Labelled([[0, 1], [0, 1]]), 2).tolist() == [[1, 1], [1, 1]]
    assert multi_hot_labels(Labelled([[0, 1], [1, 0]]), 2).tolist() == [[0, 1], [1, 0]]
    assert multi_hot_labels(Labelled([[0.0, 1.0]]), 2).tolist() == [[0, 1]]
    assert multi_hot_labels(Labelled([[0], []]), 1).tolist() == [[1], [0]]
    data = RandomPairs(5, MULTI)
    samples = [data[index] for index in range(5)]
    assert torch.equal(multi_hot_labels(samples, 3), multi_hot_labels(data, 3))
    with pytest.raises(DataError, match=r"sample 1 are \[3\]"):
        multi_hot_labels(Labelled([[0], [3]]), 3)
    with pytest.raises(DataError, match="needs the training labels"):
        multi_hot_labels([{"pixel_values": 1}], 3)
