"""Scores of a model on a labelled split."""

from __future__ import annotations

from typing import Any


def score(model: Any, dataset: Any, *, batch_size: int) -> tuple[dict[str, float], Any]:
    """The metrics of the model's problem type, and the predictions they come from.

    Multi-label scores are taken at the threshold that was tuned on validation and saved with the adapter.
    """
    from epic_fast.data import Collator
    from epic_fast.training import compute_metrics, predict

    predictions = predict(model, dataset, collator=Collator.for_model(model), batch_size=batch_size)
    metrics = compute_metrics(
        predictions.logits,
        predictions.labels,  # pyright: ignore[reportArgumentType]
        model.problem_type,
        num_labels=model.num_labels,
        threshold=model.threshold if model.threshold is not None else 0.5,
    )
    return metrics, predictions


def label_name(model: Any, index: int) -> str:
    """The name of a class, or its number where the adapter has no names."""
    return model.labels[index] if model.labels else str(index)


def verdict(model: Any, logits: Any, top_k: int) -> dict[str, Any]:
    """What the model says of one sample.

    Args:
        logits: (K,) float32.
        top_k: how many classes to list.

    Returns:
        ``predicted`` (a name; a list of names for multi-label; a number, or K of them, for regression) and, but for
        regression, ``top_k``: ``{"label", "probability"}`` each, the likeliest first.
    """
    if model.problem_type == "regression":
        values = [float(value) for value in logits]
        return {"predicted": values[0] if len(values) == 1 else values}
    single = model.problem_type == "single_label_classification"
    probabilities = logits.softmax(-1) if single else logits.sigmoid()
    ranked = probabilities.argsort(descending=True, stable=True).tolist()
    top = [
        {"label": label_name(model, index), "probability": round(float(probabilities[index]), 6)}
        for index in ranked[:top_k]
    ]
    if single:
        return {"predicted": label_name(model, ranked[0]), "top_k": top}
    threshold = model.threshold if model.threshold is not None else 0.5
    said = [label_name(model, index) for index in ranked if float(probabilities[index]) > threshold]
    return {"predicted": said, "top_k": top}
