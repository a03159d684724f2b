"""Which samples make which batch, and their loading with randomness of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from epic_fast.errors import DataError
from epic_fast.training.seeding import derived_seed, host_randomness_kept, seed_host


@dataclass(frozen=True)
class Batch:
    """The samples of one batch.

    ``epoch`` and ``number`` (both from 0) say what its random draws belong to; ``indices`` are this process's
    share, ``count`` how many of them are meant, ``total`` how many samples the batch has over all processes.
    """

    epoch: int
    number: int
    indices: tuple[int, ...]
    count: int
    total: int


class Repeated:
    """An iterable that starts anew with every iteration."""

    def __init__(self, start: Callable[[], Iterator[Any]]):
        self.start = start

    def __iter__(self) -> Iterator[Any]:
        return self.start()


def training_batches(
    length: int, batch_size: int, *, seed: int, epoch: int, rank: int = 0, ranks: int = 1
) -> list[Batch]:
    """One epoch: a permutation that follows from (seed, epoch), cut into batches, each dealt out to the processes.

    A process without a sample in a last, small batch computes that batch's first sample and counts it 0 times.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
    order = torch.randperm(length, generator=generator).tolist()
    batches = []
    for number, start in enumerate(range(0, length, batch_size)):
        whole = order[start : start + batch_size]
        mine = whole[rank::ranks]
        batches.append(Batch(epoch, number, tuple(mine or whole[:1]), len(mine), len(whole)))
    return batches


def ordered_batches(length: int, batch_size: int, *, rank: int = 0, ranks: int = 1) -> list[Batch]:
    """Every sample once and in order, each process its share (a share may be empty)."""
    mine = range(rank, length, ranks)
    parts = [tuple(mine[start : start + batch_size]) for start in range(0, len(mine), batch_size)]
    return [Batch(-1, number, part, len(part), len(part)) for number, part in enumerate(parts)]


class SeededBatches(Dataset):
    """Loads a :class:`Batch`, so that what a sample draws depends on (seed, epoch, sample) and on nothing else:
    not on the number of workers, on the other samples of its batch, nor on where a resumed run began.

    A data set with PyTorch's ``__getitems__`` (a list of indices at once) is asked for the whole batch, which saves
    the seeding of each sample (some 30 microseconds); its draws then depend on (seed, epoch, batch, process).
    """

    def __init__(self, dataset: Any, collator: Callable[[list[Any]], Mapping[str, Any]], seed: int):
        self.dataset = dataset
        self.collator = collator
        self.seed = seed

    def __getitem__(self, batch: Batch) -> tuple[Batch, dict[str, Any]]:
        with host_randomness_kept():
            if hasattr(self.dataset, "__getitems__"):
                seed_host(derived_seed(self.seed, "samples", batch.epoch, batch.number, batch.indices[0]))
                items = self.dataset.__getitems__(list(batch.indices))
            else:
                items = [self._sample(batch.epoch, index) for index in batch.indices]
            seed_host(derived_seed(self.seed, "batch", batch.epoch, batch.number))
            return batch, dict(self.collator(items))

    def _sample(self, epoch: int, index: int) -> Any:
        seed_host(derived_seed(self.seed, "sample", epoch, index))
        return self.dataset[index]


def loader(
    dataset: Any,
    collator: Callable[[list[Any]], Mapping[str, Any]],
    batches: list[Batch],
    *,
    seed: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """The batches one by one, as ``(Batch, dict)``; takes nothing from the global generators."""
    return DataLoader(
        SeededBatches(dataset, collator, seed),
        sampler=batches,  # pyright: ignore[reportArgumentType]
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(derived_seed(seed, "workers")),
    )


def collator_for(model: Any, dataset: Any) -> Callable[[list[Any]], Mapping[str, Any]]:
    """PyTorch's own collation for samples that are dicts, the backbone's processors for everything else."""
    with host_randomness_kept():
        first = dataset[0]
    if isinstance(first, Mapping):
        return default_collate
    from epic_fast.data import Collator

    return Collator.for_model(model)


def length_of(dataset: Any, name: str) -> int:
    """The data set's length, which must be known and not 0."""
    try:
        length = len(dataset)
    except TypeError as error:
        raise DataError(
            f"the {name} data ({type(dataset).__name__}) has no length; wanted a data set with __len__ and "
            "__getitem__: put a stream into a list, or write it to a folder, first"
        ) from error
    if length == 0:
        raise DataError(f"the {name} data is empty: 0 samples; wanted at least 1. Check its split and its filters.")
    return length


def _as_it_is(value: Any) -> Any:
    return value
