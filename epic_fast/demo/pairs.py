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


class OwnTitles(Pairs):
    """Every picture of a split with its own title and its class.

    Args:
        frozen: the demo's pairs.
        split: whose.
        seed: of the views.
        fresh: show an augmented view drawn anew for each epoch (training), where there are any.
    """

    def __init__(self, frozen: FrozenPairs, split: str, *, seed: int = 0, fresh: bool = False):
        self.rows = frozen.rows[split].cpu()
        self.views = frozen.views.cpu()
        self.seed = seed
        self.fresh = fresh
        super().__init__(self.rows, self.rows, frozen.labels.cpu()[self.rows])

    def set_epoch(self, epoch: int) -> None:
        """Draw the views of an epoch."""
        if self.fresh:
            self.pictures = draw_views(self.views, self.rows, epoch_generator(self.seed, epoch))


class MatchPairs(Pairs):
    """Does this title describe this picture?  Half of the pairs are a picture's own, half another's of the split.

    Args:
        frozen: the demo's pairs.
        split: whose pictures and titles.
        same_class: share of the other titles that come from a picture of the same class, which is harder.
        repeats: how many other titles (and times its own) each picture gets.
        seed: of the draw.
        fresh: draw titles and augmented views anew for each epoch (training); otherwise the pairs are fixed.
    """

    def __init__(
        self,
        frozen: FrozenPairs,
        split: str,
        *,
        same_class: float = 0.0,
        repeats: int = 1,
        seed: int = 0,
        fresh: bool = False,
    ):
        self.rows = frozen.rows[split].cpu()
        self.views = frozen.views.cpu()
        self.same_class = same_class
        self.repeats = repeats
        self.seed = seed
        self.fresh = fresh
        known = {title: index for index, title in enumerate(dict.fromkeys(map(_normalised, frozen.titles)))}
        titles = torch.tensor([known[_normalised(frozen.titles[row])] for row in self.rows.tolist()])
        classes = frozen.labels.cpu()[self.rows]
        self._different = titles[:, None] != titles[None, :]
        self._same = classes[:, None] == classes[None, :]
        super().__init__(*self.draw(0))

    def set_epoch(self, epoch: int) -> None:
        """Draw the pairs of an epoch."""
        if self.fresh:
            self.pictures, self.titles, self.labels = self.draw(epoch)

    def draw(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures, titles and labels (1 own, 0 another's), ``(2 · repeats · n,)`` each."""
        generator = epoch_generator(self.seed, epoch)
        rows = self.rows
        others = []
        for _ in range(self.repeats):
            hard = torch.rand(len(rows), generator=generator) < self.same_class
            allowed = self._different & (self._same | ~hard[:, None])
            # A picture without another title in its class takes one of any class.
            allowed = torch.where(allowed.any(dim=1, keepdim=True), allowed, self._different)
            others.append(rows[torch.multinomial(allowed.double(), 1, generator=generator)[:, 0]])
        pictures = rows.repeat(2 * self.repeats)
        if self.fresh:
            pictures = draw_views(self.views, pictures, generator)
        titles = torch.cat([rows.repeat(self.repeats), *others])
        labels = torch.arange(2).flip(0).repeat_interleave(self.repeats * len(rows))
        return pictures, titles, labels


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Randomness that follows from (seed, epoch) alone, so a resumed run draws the same."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def draw_views(views: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
    """For each picture one of its views ``(n, 1 + V)``, itself among them."""
    choice = torch.randint(views.shape[1], (len(rows),), generator=generator)
    return views[rows, choice]


def _normalised(title: str) -> str:
    return " ".join("".join(sign if sign.isalnum() else " " for sign in title.lower()).split())
