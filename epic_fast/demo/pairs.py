"""Training data out of the prefix cache: the demo's pictures beside their own titles, or beside others'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from epic_fast.demo.frozen import FrozenPairs
from epic_fast.engine import PrefixCache


@dataclass
class Pairs(Dataset[int]):
    """Which picture stands beside which title, and its label: ``(n,)`` each, rows of :class:`FrozenPairs`."""

    pictures: Tensor
    titles: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        return int(self.pictures[index]), int(self.titles[index]), int(self.labels[index])

    def label_ids(self) -> list[int]:
        return self.labels.tolist()


class CacheCollator:
    """Pairs to the batch of a prompted model, out of the cache."""

    def __init__(self, cache: PrefixCache):
        self.cache = cache

    def __call__(self, items: list[tuple[int, int, int]]) -> dict[str, Any]:
        pictures, titles, labels = (torch.tensor(column) for column in zip(*items, strict=True))
        return {"prefix": self.cache.batch(pictures, titles), "labels": labels}


def own_titles(frozen: FrozenPairs, split: str) -> Pairs:
    """Every picture of a split with its own title and its class."""
    rows = frozen.rows[split].cpu()
    return Pairs(rows, rows, frozen.labels[frozen.rows[split]].cpu())


class MatchPairs(Pairs):
    """Does this title describe this picture?  Half of the pairs are a picture's own, half another's of the split.

    Args:
        frozen: the demo's pairs.
        split: whose pictures and titles.
        same_class: share of the other titles that come from a picture of the same class, which is harder.
        seed: of the draw.
        fresh: draw anew for each epoch (training); otherwise the pairs are fixed.
    """

    def __init__(self, frozen: FrozenPairs, split: str, *, same_class: float = 0.0, seed: int = 0, fresh: bool = False):
        self.rows = frozen.rows[split].cpu()
        self.classes = frozen.labels.cpu()
        self.same_class = same_class
        self.seed = seed
        self.fresh = fresh
        known = {title: index for index, title in enumerate(dict.fromkeys(map(_normalised, frozen.titles)))}
        self.title_ids = torch.tensor([known[_normalised(title)] for title in frozen.titles])
        super().__init__(*self.draw(0))

    def set_epoch(self, epoch: int) -> None:
        """Draw the other titles of an epoch."""
        if self.fresh:
            self.pictures, self.titles, self.labels = self.draw(epoch)

    def draw(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures, titles and labels (1 own, 0 another's), ``(2 n,)`` each."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        rows = self.rows
        different = self.title_ids[rows][:, None] != self.title_ids[rows][None, :]
        same = self.classes[rows][:, None] == self.classes[rows][None, :]
        hard = torch.rand(len(rows), generator=generator) < self.same_class
        allowed = different & (same | ~hard[:, None])
        # A picture without another title in its class takes one of any class.
        allowed = torch.where(allowed.any(dim=1, keepdim=True), allowed, different)
        other = rows[torch.multinomial(allowed.double(), 1, generator=generator)[:, 0]]
        labels = torch.cat([torch.ones(len(rows), dtype=torch.long), torch.zeros(len(rows), dtype=torch.long)])
        return torch.cat([rows, rows]), torch.cat([rows, other]), labels


def _normalised(title: str) -> str:
    return " ".join("".join(sign if sign.isalnum() else " " for sign in title.lower()).split())
