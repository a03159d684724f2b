"""Which samples make which batch, and their loading with randomness of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from epic_fast.errors import ConfigError, DataError
from epic_fast.training.seeding import derived_seed, host_randomness_kept, seed_host

# Batches by length are made from the samples of so many batches at a time: enough for texts of one length to meet, few
# enough for the batches of one length to be different in each epoch.
POOL = 32


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
    length: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    ranks: int = 1,
    text_lengths: Sequence[int] | None = None,
) -> list[Batch]:
    """One epoch: a permutation that follows from (seed, epoch), cut into batches, each dealt out to the processes.

    With ``text_lengths`` (tokens of each sample) the samples of a batch have texts of similar length.  A process
    without a sample in a last, small batch computes that batch's first sample and counts it 0 times.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
    order = torch.randperm(length, generator=generator).tolist()
    parts = [order[start : start + batch_size] for start in range(0, length, batch_size)]
    if text_lengths is not None:
        parts = _by_length(parts, text_lengths, generator)
    batches = []
    for number, whole in enumerate(parts):
        mine = whole[rank::ranks]
        batches.append(Batch(epoch, number, tuple(mine or whole[:1]), len(mine), len(whole)))
    return batches


def _by_length(parts: list[list[int]], text_lengths: Sequence[int], generator: torch.Generator) -> list[list[int]]:
    """The same samples in batches of the same sizes: pools of batches sorted by length, then all batches shuffled.

    A last, smaller batch stays what it is, a random one and the last.
    """
    size = len(parts[0])
    full = [index for part in parts if len(part) == size for index in part]
    found = []
    for start in range(0, len(full), POOL * size):
        pool = sorted(full[start : start + POOL * size], key=lambda index: text_lengths[index])
        found += [pool[at : at + size] for at in range(0, len(pool), size)]
    shuffled = [found[at] for at in torch.randperm(len(found), generator=generator).tolist()]
    return shuffled + [part for part in parts if len(part) < size]


def text_lengths(dataset: Any, collator: Any) -> list[int]:
    """Tokens of each sample's text, padding not counted.

    From the data set's ``text_lengths()``; else from its ``texts()`` by the collator's tokenizer (see
    :class:`epic_fast.data.Collator`); else, where samples are dicts of tensors, by reading each once.

    Raises:
        ConfigError: there is none of these.
    """
    own = getattr(dataset, "text_lengths", None)
    if own is not None:
        found = [int(each) for each in own()]
    elif hasattr(dataset, "texts") and hasattr(collator, "encode"):
        texts, found = list(dataset.texts()), []
        for start in range(0, len(texts), 1024):
            found += collator.encode(texts[start : start + 1024])["attention_mask"].sum(dim=1).tolist()
    else:
        with host_randomness_kept():
            found = [_length_of_text(dataset[index]) for index in range(len(dataset))]
    if len(found) != len(dataset):
        raise ConfigError(
            f"bucket_by_length: {type(dataset).__name__} gave {len(found)} lengths of text for {len(dataset)} samples; "
            "wanted one a sample"
        )
    return found


def _length_of_text(sample: Any) -> int:
    if isinstance(sample, Mapping):
        if isinstance(sample.get("attention_mask"), torch.Tensor):
            return int(sample["attention_mask"].sum())
        if isinstance(sample.get("input_ids"), torch.Tensor):
            return sample["input_ids"].numel()
    raise ConfigError(
        f"bucket_by_length needs the length of each text, which a sample of type {type(sample).__name__} does not "
        "tell; wanted a data set with text_lengths() or with texts(), or samples that are dicts with 'attention_mask'. "
        "Or train with bucket_by_length=False"
    )


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
            items = self._samples(batch)
            seed = derived_seed(self.seed, "batch", batch.epoch, batch.number)
            return batch, self._drawn(seed, lambda: dict(self.collator(items)), "the collator")

    def _samples(self, batch: Batch) -> list[Any]:
        if hasattr(self.dataset, "__getitems__"):
            seed = derived_seed(self.seed, "samples", batch.epoch, batch.number, batch.indices[0])
            return self._drawn(seed, lambda: self.dataset.__getitems__(list(batch.indices)), "__getitems__()")
        return [
            self._drawn(
                derived_seed(self.seed, "sample", batch.epoch, index), partial(self._sample, index), f"sample {index}"
            )
            for index in batch.indices
        ]

    def _sample(self, index: int) -> Any:
        return self.dataset[index]

    def _drawn(self, seed: int, make: Callable[[], Any], what: str) -> Any:
        """What is made when the generators start from this seed; ``what`` names it."""
        seed_host(seed)
        return make()


def loader(
    dataset: Any,
    collator: Callable[[list[Any]], Mapping[str, Any]],
    batches: list[Batch],
    *,
    seed: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    load: type[SeededBatches] = SeededBatches,
) -> DataLoader:
    """The batches one by one, as ``(Batch, dict)``; takes nothing from the global generators."""
    return DataLoader(
        load(dataset, collator, seed),
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
