"""Random picture-text pairs as tensors, with labels that can be learned."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset


class RandomPairs(Dataset):
    """``length`` samples for the tiny towers, as dicts of tensors; the label follows from the picture's brightness.

    Args:
        length: samples.
        problem_type: one of Hugging Face's three; it decides what ``labels`` are.
        num_labels: classes.
        augment: add noise that is drawn anew at each look, from PyTorch's global generator.
        seed: of the samples.
    """

    def __init__(
        self,
        length: int,
        problem_type: str = "single_label_classification",
        num_labels: int = 3,
        *,
        augment: bool = False,
        seed: int = 0,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.problem_type = problem_type
        self.num_labels = num_labels
        self.augment = augment
        self.classes = torch.randint(num_labels, (length,), generator=generator)
        noise = torch.randn(length, 3, 32, 32, generator=generator)
        self.pictures = noise + self.classes.view(-1, 1, 1, 1) - (num_labels - 1) / 2
        self.texts = torch.randint(3, 38, (length, 6), generator=generator)
        self.texts[:, 0] = 2
        self.texts[:, -1] = 38  # the end token of `tiny_tokenizer`

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = self.pictures[index]
        if self.augment:
            picture = picture + 0.1 * torch.randn_like(picture)
        return {
            "pixel_values": picture,
            "input_ids": self.texts[index],
            "attention_mask": torch.ones(6, dtype=torch.long),
            "labels": self._label(index),
        }

    def label_ids(self) -> list[Any]:
        """The labels of all samples."""
        return [self._label(index).tolist() for index in range(len(self))]

    def _label(self, index: int) -> torch.Tensor:
        label = self.classes[index]
        if self.problem_type == "regression":
            return label.float()
        if self.problem_type == "multi_label_classification":
            return (torch.arange(self.num_labels) <= label).float()
        return label
