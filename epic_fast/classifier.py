"""A saved adapter as a classifier of pictures with texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from epic_fast.data import Collator, Example, load_image
from epic_fast.engine.graphs import graphed, prepared
from epic_fast.errors import ConfigError
from epic_fast.models import PromptedModel, from_pretrained


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one pair.

    Attributes:
        label: the most probable label; for multi-label tasks the list of labels above the threshold, the
            likeliest first; for regression the number (a list of numbers where there are several outputs).
        probability: of that label; None for multi-label tasks and regression.
        top: the ``top_k`` most probable labels with their probabilities, best first; empty for regression.
    """

    label: Any
    probability: float | None
    top: list[tuple[str, float]]


class Classifier:
    """Pictures and texts in, labels out.

    Args:
        model: a prompted model whose backbone has an image processor and a tokenizer.
    """

    def __init__(self, model: PromptedModel):
        if model.problem_type == "segmentation":
            raise ConfigError(
                "this adapter makes masks, not labels; wanted epic_fast.training.predict_masks(model, data)"
            )
        self.model = model.eval()
        self.collator = Collator.for_model(model)

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: Any = None, **options: Any) -> Classifier:
        """The classifier saved in ``folder``; arguments as for :func:`epic_fast.from_pretrained`.

        The model goes to the GPU where there is one, unless ``device`` says otherwise.
        """
        options.setdefault("device", "cuda" if torch.cuda.is_available() else None)
        return cls(from_pretrained(folder, backbone, **options))

    @torch.inference_mode()
    def predict(
        self, images: Sequence[Any], texts: Sequence[str], *, top_k: int = 3, batch_size: int = 64
    ) -> list[Prediction]:
        """Classify pairs.

        Args:
            images: paths, bytes or PIL pictures.
            texts: as many texts.
            top_k: how many labels to name with their probabilities.
            batch_size: pairs at a time.

        Raises:
            ConfigError: arguments that are no lists, of different lengths, or out of range.
            DataError: a picture that cannot be read.
        """
        if any(isinstance(each, (str, bytes, Path)) or not hasattr(each, "__len__") for each in (images, texts)):
            raise ConfigError("predict() takes lists: predict(images=[picture], texts=[text])")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise ConfigError(f"text {index} is {text!r}, of type {type(text).__name__}; wanted a string")
        for name, value, least in (("top_k", top_k, 0), ("batch_size", batch_size, 1)):
            if value < least:
                raise ConfigError(f"{name}={value}; wanted at least {least}")
        if len(images) != len(texts):
            raise ConfigError(f"{len(images)} images and {len(texts)} texts were given; wanted one text an image")
        forward = graphed(self.model)
        predictions: list[Prediction] = []
        for start in range(0, len(images), batch_size):
            examples = [
                Example(image=load_image(image), text=text, label=None, name=str(start + offset))
                for offset, (image, text) in enumerate(
                    zip(images[start : start + batch_size], texts[start : start + batch_size], strict=True)
                )
            ]
            batch = prepared(self.model, self.collator(examples))
            batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
            logits = forward(**batch).logits.float().cpu()
            predictions.extend(self.describe(row, top_k) for row in logits)
        return predictions

    def describe(self, logits: torch.Tensor, top_k: int = 3) -> Prediction:
        """What :func:`describe` says of logits ``(K,)``."""
        return describe(self.model, logits, top_k)


def label_name(model: Any, index: int) -> str:
    """The name of a class, or its number where the adapter has no names."""
    return model.labels[index] if model.labels else str(index)


def describe(model: Any, logits: torch.Tensor, top_k: int = 3) -> Prediction:
    """Logits ``(K,)`` of one pair in words: names where the adapter has them, class numbers otherwise.

    The chosen labels of a multi-label task come in the order of their probabilities, the likeliest first.
    """
    if model.problem_type == "regression":
        values = logits.tolist()
        return Prediction(values[0] if len(values) == 1 else values, None, [])
    single = model.problem_type == "single_label_classification"
    probabilities = logits.softmax(dim=-1) if single else logits.sigmoid()
    order = probabilities.argsort(descending=True, stable=True)
    names = [label_name(model, index) for index in order.tolist()]
    ranked = list(zip(names, probabilities[order].tolist(), strict=True))
    if single:
        return Prediction(ranked[0][0], ranked[0][1], ranked[:top_k])
    threshold = 0.5 if model.threshold is None else model.threshold
    return Prediction([name for name, value in ranked if value > threshold], None, ranked[:top_k])
