"""Scores of a model on a labelled split."""

from __future__ import annotations

from typing import Any


def score(model: Any, dataset: Any, *, batch_size: int) -> tuple[dict[str, float], Any]:
    """The metrics of the model's problem type, and the predictions they come from (of masks the counts of pixels).

    Regression with sequences also has the metrics of sentiment.

    Multi-label scores are taken at the threshold that was tuned on validation and saved with the adapter.
    """
    from epic_fast.data import Collator
    from epic_fast.training import compute_metrics, count_masks, mask_metrics, predict, sentiment_metrics

    if model.problem_type == "segmentation":
        counts = count_masks(model, dataset, collator=Collator.for_model(model), batch_size=batch_size)
        return mask_metrics(counts), counts
    predictions = predict(model, dataset, collator=Collator.for_model(model), batch_size=batch_size)
    metrics = compute_metrics(
        predictions.logits,
        predictions.labels,  # pyright: ignore[reportArgumentType]
        model.problem_type,
        num_labels=model.num_labels,
        threshold=model.threshold if model.threshold is not None else 0.5,
    )
    if getattr(model.config, "sequences", None) and model.problem_type == "regression" and model.num_labels == 1:
        metrics |= sentiment_metrics(predictions.logits, predictions.labels)  # pyright: ignore[reportArgumentType]
    return metrics, predictions


def verdict(model: Any, logits: Any, top_k: int) -> dict[str, Any]:
    """What the model says of one sample.

    Args:
        logits: (K,) float32.
        top_k: how many classes to list.

    Returns:
        ``predicted`` (a name; a list of names for multi-label; a number, or K of them, for regression) and, but for
        regression, ``top_k``: ``{"label", "probability"}`` each, the likeliest first.
    """
    from epic_fast.classifier import describe

    said = describe(model, logits, top_k)
    if model.problem_type == "regression":
        return {"predicted": said.label}
    top = [{"label": label, "probability": round(probability, 6)} for label, probability in said.top]
    return {"predicted": said.label, "top_k": top}


def true_label(model: Any, label: Any) -> str:
    """A sample's label as a reader wants it: a class's name; for multi-label those of all, sorted; or the number."""
    from epic_fast.classifier import label_name

    if model.problem_type == "regression":
        return f"{label:.3g}"
    if model.problem_type == "multi_label_classification":
        return ", ".join(sorted(label_name(model, index) for index in label)) or "none"
    return label_name(model, label)
