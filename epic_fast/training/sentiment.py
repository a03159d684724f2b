"""Metrics of sentiment regression on the scale from -3 to 3 (CMU-MOSI, CMU-MOSEI)."""

from __future__ import annotations

from torch import Tensor

from epic_fast.errors import ConfigError

SENTIMENT_METRICS = ("acc7", "acc2_has0", "f1_has0", "acc2_non0", "f1_non0")


def sentiment_metrics(values: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracies of predicted sentiments; error and correlation are those of any regression.

    Two conventions of two classes are in use, and their numbers cannot be compared:

    * ``has0``: negative (< 0) against non-negative (>= 0), over all samples;
    * ``non0``: negative against positive, over the samples whose label is not 0; a prediction of exactly 0 counts as
      negative.

    Args:
        values, labels: ``(N,)``.

    Returns:
        ``acc7``: both rounded to the nearest of -3 ... 3 (halves to the even one), the predictions limited to these
        first; ``acc2_has0``, ``f1_has0``, ``acc2_non0``, ``f1_non0``, F1 as the mean over the two classes weighted by
        how often they are the truth.  NaN for ``non0`` where every label is 0.

    Raises:
        ConfigError: shapes that do not fit, or no sample.
    """
    values, labels = values.detach().float().flatten().cpu(), labels.detach().float().flatten().cpu()
    if len(values) != len(labels) or len(values) == 0:
        raise ConfigError(
            f"sentiment_metrics: {len(values)} predictions and {len(labels)} labels; wanted as many, and at least one"
        )
    seven = (values.clamp(-3, 3).round() == labels.clamp(-3, 3).round()).double().mean()
    kept = labels != 0
    accuracy, f1 = _two_classes(values >= 0, labels >= 0)
    accuracy_non0, f1_non0 = _two_classes(values[kept] > 0, labels[kept] > 0)
    found = (float(seven), accuracy, f1, accuracy_non0, f1_non0)
    return dict(zip(SENTIMENT_METRICS, found, strict=True))


def _two_classes(said: Tensor, truth: Tensor) -> tuple[float, float]:
    """Accuracy, and F1 weighted by the classes' shares of the truth."""
    from torchmetrics.functional.classification import multiclass_f1_score

    if len(truth) == 0:
        return float("nan"), float("nan")
    f1 = multiclass_f1_score(said.long(), truth.long(), num_classes=2, average="weighted")
    return float((said == truth).double().mean()), float(f1)
