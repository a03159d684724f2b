"""Batches in which what the frozen layers below the first prompts made of a sample stands in the sample's place.

Each sample goes through those layers once: in the first epoch that meets it, or never, where a folder already holds
its prefix.  From then on neither its picture is decoded nor its text tokenised.
"""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from epic_fast.data import Collator, PairDataset
from epic_fast.engine import DamagedRecords, DiskStore, MemoryStore, Prefix, PrefixStore, SampleKey
from epic_fast.engine.products import eight_bit_kind
from epic_fast.errors import ConfigError
from epic_fast.training.batches import Batch, SeededBatches, collator_for, length_of, loader, ordered_batches
from epic_fast.training.config import TrainingConfig
from epic_fast.training.launch import launched
from epic_fast.training.progress import ProgressLike, make_reporter
from epic_fast.training.seeding import host_randomness, seed_host

logger = logging.getLogger("epic_fast")

MODEL_INPUTS = ("pixel_values", "input_ids", "attention_mask", "token_type_ids")
TEXT_INPUTS = MODEL_INPUTS[1:]
BATCHES_AHEAD = 4
KEPT_AS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


class PrefixFeed:
    """Serves the batches of data sets with ``prefix`` in place of pictures and texts.

    ``computed`` counts the samples that went through the layers.

    Args:
        model: as :func:`epic_fast.wrap` gives it, with ``engine.prefix_cache`` set, on the device that runs it.
        datasets: all that will be asked for, so that the room they need is known before the first is kept.
        collator: list of samples to ``dict`` for ``model(**batch)``.
        precision: ``"bf16"``, ``"fp16"`` or ``"fp32"``: what the model computes in and the prefixes are kept in.
        autocast: the context in which the model computes.
        seed, num_workers: of the loading of what is not held yet.

    Raises:
        ConfigError: data that is drawn anew at every look (augmentation), or a folder that belongs to other prefixes.
    """

    def __init__(
        self,
        model: Any,
        datasets: Sequence[Any],
        collator: Callable[[list[Any]], Mapping[str, Any]],
        *,
        precision: str,
        autocast: Callable[[], AbstractContextManager[Any]],
        seed: int = 0,
        num_workers: int = 0,
    ):
        self.model = model
        self.collator = collator
        self.autocast = autocast
        self.seed = seed
        self.num_workers = num_workers
        self.device = model.device
        self.pin = self.device.type == "cuda"
        for dataset in datasets:
            _refuse_augmentation(dataset, collator)
        place, kept_as = model.engine.prefix_cache, KEPT_AS[precision]
        self.store: PrefixStore = (
            MemoryStore(kept_as, pin=self.pin)
            if place == "memory"
            else DiskStore(place, cache_key(model, collator, precision), kept_as)
        )
        self._sources = [_source_of(dataset, collator) for dataset in datasets]
        self.computed = 0
        self._room_checked = False

    def batches(self, dataset: Any, batches: Sequence[Batch]) -> PrefixLoader:
        """These batches of one of the data sets, as :func:`loader` gives them but for the prefixes."""
        source = next((each for each in self._sources if each.dataset is dataset), None)
        if source is None:
            raise ConfigError("a data set was asked for that the prefix cache was not told of")
        return PrefixLoader(self, source, list(batches))

    def close(self) -> None:
        """Put on the disk what is not there yet."""
        self.store.close()

    def keep(self, source: _Source, indices: Sequence[int], loaded: dict[str, Any], *, anew: bool = False) -> None:
        """Run loaded samples through the layers and keep what comes out."""
        from accelerate.utils import send_to_device

        strangers = [name for name in loaded if name not in (*MODEL_INPUTS, "labels")]
        if strangers:
            raise ConfigError(
                f"the batches hold {', '.join(strangers)}, which a prefix cache cannot stand for; wanted "
                f"{', '.join(MODEL_INPUTS)} and labels, or engine.prefix_cache=None"
            )
        keys = source.learn(indices, loaded)
        if not anew and all(self.store.holds(key) for key in keys):
            return
        inputs = {name: value for name, value in loaded.items() if name != "labels"}
        moved: Any = send_to_device(inputs, self.device)
        with self.autocast():
            prefix = self.model.extract(**moved)
        if not self._room_checked:
            self._check_room(prefix)
        self.store.put(keys, prefix, replace=anew)
        self.computed += len(keys)

    def _check_room(self, prefix: Prefix) -> None:
        widest = prefix.text.hidden.shape[1]
        pictures: set[bytes | tuple[int, int]] = set()
        tokens = 0
        for number, source in enumerate(self._sources):
            source.look()
            missing = source.missing(self.store, range(len(source.keys)))
            pictures.update(
                key.vision if (key := source.keys[index]) is not None else (number, index) for index in missing
            )
            tokens += source.text_tokens(missing, widest)
        self.store.check_room(self.store.bytes_for(prefix, len(pictures), tokens))
        self._room_checked = True


class PrefixLoader:
    """The batches one by one, as ``(Batch, {"prefix", "labels"})``, on the model's device."""

    def __init__(self, feed: PrefixFeed, source: _Source, batches: list[Batch]):
        self.feed = feed
        self.source = source
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        host = self._on_host()
        for which, batch in _copied_ahead(host, self.feed.device) if self.feed.pin else host:
            yield which, {**batch, "prefix": self.feed.store.given_back(batch["prefix"])}

    def _on_host(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Batches that are held are read ahead by threads; the others are computed when their turn comes."""
        feed, source = self.feed, self.source
        feed.store.refresh()
        source.look()
        missing = [source.missing(feed.store, batch.indices) for batch in self._batches]
        wanted = [
            replace(batch, indices=tuple(lacks)) for batch, lacks in zip(self._batches, missing, strict=True) if lacks
        ]
        if wanted:
            count = len({index for batch in wanted for index in batch.indices})
            logger.info("prefix cache %s: %d of %d samples to be added", feed.store.where, count, len(source.keys))
        fresh: Iterator[Any] = iter(self._load(wanted) if wanted else ())
        with ThreadPoolExecutor(min(BATCHES_AHEAD, os.cpu_count() or 1)) as pool:
            ahead: deque[Future[Prefix] | None] = deque()
            try:
                for position, which in enumerate(self._batches):
                    while len(ahead) < BATCHES_AHEAD and position + len(ahead) < len(self._batches):
                        later = position + len(ahead)
                        ahead.append(None if missing[later] else pool.submit(self._read, self._batches[later]))
                    reading = ahead.popleft()
                    if reading is None:
                        part, loaded = next(fresh)
                        feed.keep(source, part.indices, dict(loaded))
                    yield which, self._whole(which, reading)
            finally:
                for reading in ahead:
                    if reading is not None:
                        reading.cancel()
        feed.store.commit()

    def _read(self, which: Batch) -> Prefix:
        return self.feed.store.batch(self.source.keys_of(which.indices), pin=self.feed.pin)

    def _whole(self, which: Batch, reading: Future[Prefix] | None) -> dict[str, Any]:
        try:
            prefix = self._read(which) if reading is None else reading.result()
        except DamagedRecords as error:
            indices = tuple(which.indices[position] for position in error.positions)
            logger.warning("%s; they are computed anew", error)
            _, loaded = self._dataset()[replace(which, indices=indices)]
            self.feed.keep(self.source, indices, loaded, anew=True)
            prefix = self._read(which)
        labels = self.source.labels(which.indices)
        if labels is None:
            return {"prefix": prefix}
        return {"prefix": prefix, "labels": labels.pin_memory() if self.feed.pin else labels}

    def _dataset(self) -> FixedBatches:
        return FixedBatches(self.source.dataset, self.feed.collator, self.feed.seed)

    def _load(self, batches: list[Batch]) -> Any:
        return loader(
            self.source.dataset,
            self.feed.collator,
            batches,
            seed=self.feed.seed,
            num_workers=self.feed.num_workers,
            load=FixedBatches,
        )


class FixedBatches(SeededBatches):
    """Loads batches as ever, and refuses samples that draw random numbers: what is kept would not be what they are."""

    def _drawn(self, seed: int, make: Callable[[], Any], what: str) -> Any:
        seed_host(seed)
        before = host_randomness()
        made = make()
        if host_randomness() != before:
            raise ConfigError(_augmented(f"{what} draws random numbers"))
        return made


def fill_prefix_cache(
    model: Any,
    datasets: Mapping[str, Any],
    *,
    config: TrainingConfig | None = None,
    collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    progress: ProgressLike = None,
) -> dict[str, Any]:
    """Put the prefixes of data sets into the cache of ``model.engine``, and check those that it holds.

    Args:
        model: as :func:`epic_fast.wrap` gives it, with ``engine.prefix_cache`` set to a folder.
        datasets: by name; anything with ``len`` and ``[i]``.
        config: batch size, precision, device and workers are those of the training that will use the cache.
        collator, progress: as for :func:`epic_fast.fit`.

    Returns:
        ``samples`` in all, ``computed`` now, and the ``bytes`` that the cache takes.

    Raises:
        ConfigError, DataError, EpicFastError: as for :func:`epic_fast.fit`.
    """
    config = config or TrainingConfig()
    place = None if model.engine is None else model.engine.prefix_cache
    if place in (None, "memory"):
        raise ConfigError(f"fill_prefix_cache: engine.prefix_cache is {place!r}; wanted a folder")
    sizes = {name: length_of(dataset, name) for name, dataset in datasets.items()}
    reporter = make_reporter(progress)
    with launched(config) as (accelerator, precision):
        model.to(accelerator.device)
        given = list(datasets.values())
        feed = PrefixFeed(
            model,
            given,
            collator or collator_for(model, given[0]),
            precision=precision,
            autocast=accelerator.autocast,
            seed=config.seed,
            num_workers=config.num_workers,
        )
        try:
            for name, dataset in datasets.items():
                batches = feed.batches(dataset, ordered_batches(sizes[name], config.batch_size))
                reporter.start(name, len(batches))
                for _ in batches:
                    reporter.advance()
                reporter.stop()
        finally:
            reporter.stop()
            feed.close()
    taken = sum(path.stat().st_size for path in Path(place).iterdir())
    return {"samples": sum(sizes.values()), "computed": feed.computed, "bytes": taken}


def cache_key(model: Any, collator: Any, precision: str) -> dict[str, Any]:
    """What prefixes are made of but for the samples, in JSON's types."""
    text, vision = model.first_layers()
    weights = eight_bit_kind(model.engine.weights, model.device)
    return {
        "first_layers": {"text": text, "vision": vision},
        "precision": precision,
        "weights": "frozen" if weights is None else f"{weights}, first layers exact: {model.engine.exact_layers}",
        "processors": collator.settings() if isinstance(collator, Collator) else "of the data set",
        "backbone": model.backbone.fingerprint(),
    }


# -- what a data set holds -----------------------------------------------------------------------------------------


class _Source(ABC):
    """The samples of a data set by what they are made of.

    Attributes:
        keys: of each sample, None while unknown.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.keys: list[SampleKey | None] = [None] * len(dataset)

    def keys_of(self, indices: Sequence[int]) -> list[SampleKey]:
        found = [self.keys[index] for index in indices]
        assert None not in found
        return found  # pyright: ignore[reportReturnType]

    def missing(self, store: PrefixStore, indices: Sequence[int]) -> list[int]:
        """Those that must be loaded."""
        return [index for index in indices if (key := self.keys[index]) is None or not store.holds(key)]

    @abstractmethod
    def look(self) -> None:
        """Find the keys that can be had without loading a sample."""

    @abstractmethod
    def learn(self, indices: Sequence[int], loaded: Mapping[str, Any]) -> list[SampleKey]:
        """The keys of samples that were loaded."""

    @abstractmethod
    def labels(self, indices: Sequence[int]) -> Tensor | None:
        """The labels of samples that are held."""

    @abstractmethod
    def text_tokens(self, indices: Sequence[int], widest: int) -> int:
        """Tokens of these texts in all; ``widest`` is the most seen so far."""


class _Pairs(_Source):
    """Files and texts read from a folder: known by their contents, without decoding."""

    def __init__(self, dataset: PairDataset, collator: Collator):
        super().__init__(dataset)
        self.collator = collator
        self._looked = False

    def look(self) -> None:
        if not self._looked:
            pictures, texts = self.dataset.picture_digests(), self.dataset.texts()
            self.keys = [SampleKey(_digest(text), picture) for text, picture in zip(texts, pictures, strict=True)]
            self._looked = True

    def learn(self, indices: Sequence[int], loaded: Mapping[str, Any]) -> list[SampleKey]:
        return self.keys_of(indices)

    def labels(self, indices: Sequence[int]) -> Tensor | None:
        return self.collator.labels([self.dataset.rows[index] for index in indices])

    def text_tokens(self, indices: Sequence[int], widest: int) -> int:
        texts = list({self.dataset.rows[index].text for index in indices})
        chunks = [texts[start : start + 256] for start in range(0, len(texts), 256)]
        return sum(int(self.collator.encode(chunk)["attention_mask"].sum()) for chunk in chunks)


class _Samples(_Source):
    """Anything else: known by the tensors that its samples become, once they have been loaded."""

    def __init__(self, dataset: Any):
        super().__init__(dataset)
        self._labels: dict[int, Tensor] = {}

    def look(self) -> None:
        """There are none."""

    def learn(self, indices: Sequence[int], loaded: Mapping[str, Any]) -> list[SampleKey]:
        keys = []
        lengths = loaded["attention_mask"].sum(dim=1).tolist() if "attention_mask" in loaded else None
        for row, index in enumerate(indices):
            stop = None if lengths is None else lengths[row]
            texts = [loaded[name][row, :stop] for name in TEXT_INPUTS if name in loaded]
            # A language model alone has no pictures.
            picture = _digest(loaded["pixel_values"][row]) if "pixel_values" in loaded else _digest("")
            keys.append(SampleKey(_digest(*texts), picture))
            self.keys[index] = keys[-1]
            if "labels" in loaded:
                self._labels[index] = torch.as_tensor(loaded["labels"][row])
        return keys

    def labels(self, indices: Sequence[int]) -> Tensor | None:
        found = [self._labels[index] for index in indices if index in self._labels]
        return torch.stack(found) if len(found) == len(indices) else None

    def text_tokens(self, indices: Sequence[int], widest: int) -> int:
        return len(indices) * widest


def _source_of(dataset: Any, collator: Any) -> _Source:
    return _Pairs(dataset, collator) if _from_files(dataset, collator) else _Samples(dataset)


def _from_files(dataset: Any, collator: Any) -> bool:
    """Whether file and text say all of a sample; a subclass may do more, so it is judged by what it gives."""
    return type(dataset) is PairDataset and type(collator) is Collator


def _digest(*parts: str | Tensor) -> bytes:
    digest = hashlib.blake2b(digest_size=16, person=b"text" if isinstance(parts[0], str) else b"tensor")
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode("utf-8", "surrogatepass"))
        else:
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _refuse_augmentation(dataset: Any, collator: Any) -> None:
    """Refuse data that says that it changes, or whose first sample is another at a second look."""
    if hasattr(dataset, "set_epoch"):
        raise ConfigError(_augmented(f"{type(dataset).__name__} has set_epoch(), so its samples change with the epoch"))
    if _from_files(dataset, collator):
        return
    batches = FixedBatches(dataset, collator, 0)
    first, again = (batches[Batch(epoch, 0, (0,), 1, 1)][1] for epoch in (0, 1))
    for name in MODEL_INPUTS:
        if name in first and not torch.equal(first[name], again[name]):
            raise ConfigError(_augmented(f"the {name} of sample 0 are others at a second look"))


def _augmented(what: str) -> str:
    return (
        f"the prefix cache keeps what a sample is, but random augmentation is on: {what}. Train without the cache "
        "(engine.prefix_cache=None), or on data that does not change"
    )


# -- to the GPU ----------------------------------------------------------------------------------------------------


def _copied_ahead(batches: Iterator[tuple[Batch, dict[str, Any]]], device: torch.device) -> Iterator[Any]:
    """Each batch is copied by a stream of its own while the model works on the one before."""
    stream = torch.cuda.Stream(device)

    def copy(which: Batch, batch: dict[str, Any]) -> tuple[Batch, dict[str, Any], Any]:
        with torch.cuda.stream(stream):
            moved = {name: each.to(device, non_blocking=True) for name, each in batch.items()}
            return which, moved, stream.record_event()

    def ready(which: Batch, batch: dict[str, Any], event: Any) -> tuple[Batch, dict[str, Any]]:
        current = torch.cuda.current_stream(device)
        current.wait_event(event)
        for tensor in _tensors(batch):
            tensor.record_stream(current)
        return which, batch

    ahead = None
    for which, batch in batches:
        copied = copy(which, batch)
        if ahead is not None:
            yield ready(*ahead)
        ahead = copied
    if ahead is not None:
        yield ready(*ahead)


def _tensors(batch: Mapping[str, Any]) -> Iterator[Tensor]:
    prefix = batch["prefix"]
    if batch.get("labels") is not None:
        yield batch["labels"]
    yield from prefix.text.tensors()
    yield from prefix.vision.tensors()
