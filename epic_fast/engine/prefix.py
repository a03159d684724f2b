"""What the layers below the first interaction layer compute: a fixed function of a sample, worth keeping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from epic_fast.engine.state import TowerState
from epic_fast.errors import ConfigError


@dataclass(frozen=True)
class Prefix:
    """Both towers right below their first interaction layer, and what else a sample has.

    Attributes:
        sequences: tensors of further modalities by name, as they were given; a cache keeps none.
    """

    text: TowerState
    vision: TowerState
    sequences: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Prefix:
        """On another device."""
        return Prefix(
            self.text.to(device, non_blocking=non_blocking),
            self.vision.to(device, non_blocking=non_blocking),
            {name: each.to(device, non_blocking=non_blocking) for name, each in self.sequences.items()},
        )


class PrefixCache:
    """Prefixes of a fixed list of samples in memory, texts and pictures addressed apart.

    Exact: a batch taken from here gives what :meth:`PromptedModel.extract` would give for it, texts padded to the
    longest of the batch.  Only right while the pictures are not augmented.

    Args:
        prefixes: of consecutive batches of the samples.
    """

    def __init__(self, prefixes: Iterable[Prefix]):
        prefixes = list(prefixes)
        if not prefixes:
            raise ConfigError("PrefixCache: no prefixes were given; wanted those of at least one batch")
        self.text = TowerCache([prefix.text for prefix in prefixes])
        self.vision = TowerCache([prefix.vision for prefix in prefixes])

    @classmethod
    def from_towers(cls, text: TowerCache, vision: TowerCache) -> PrefixCache:
        """A cache of two towers whose rows need not correspond, such as several views of a picture."""
        cache = cls.__new__(cls)
        cache.text, cache.vision = text, vision
        return cache

    def __len__(self) -> int:
        return len(self.text)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.vision.nbytes + self.text.nbytes

    def batch(self, pictures: Tensor, texts: Tensor | None = None) -> Prefix:
        """The prefix of pictures ``(b,)`` beside texts ``(b,)`` (integers; texts default to the pictures')."""
        return Prefix(text=self.text.rows(pictures if texts is None else texts), vision=self.vision.rows(pictures))


class TowerCache:
    """The states of one tower, end to end: padding is not kept.

    Args:
        states: of consecutive batches; padding, if any, on the right.
    """

    def __init__(self, states: list[TowerState]):
        tokens, lengths, pool = [], [], []
        for state in states:
            width = state.hidden.shape[1]
            valid = state.valid
            if valid is None:
                valid = torch.ones(state.hidden.shape[:2], dtype=torch.bool, device=state.hidden.device)
            length = valid.sum(dim=1)
            if not torch.equal(valid, torch.arange(width, device=valid.device) < length[:, None]):
                raise ConfigError("PrefixCache: a text is padded on the left or in the middle; wanted right padding")
            tokens.append(state.hidden[valid])
            lengths.append(length)
            pool.append(state.pool_index)
        self.tokens = torch.cat(tokens)
        self.lengths = torch.cat(lengths)
        self.first = self.lengths.cumsum(0) - self.lengths
        self.pool_index = None if pool[0] is None else torch.cat(pool)
        self.layer = states[0].layer
        # Rows of different lengths need a mask even where each batch by itself had none.
        self.masked = any(state.valid is not None for state in states) or len(self.lengths.unique()) > 1

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.tokens.numel() * self.tokens.element_size()

    def rows(self, index: Tensor) -> TowerState:
        """The states of samples ``(b,)``, padded with zeros to the longest of them."""
        index = index.to(self.tokens.device)
        lengths = self.lengths[index]
        position = torch.arange(int(lengths.max()), device=index.device)
        valid = position < lengths[:, None]
        hidden = self.tokens[(self.first[index][:, None] + position).clamp_max(len(self.tokens) - 1)]
        if not self.masked:
            return TowerState(hidden, self.layer)
        pool_index = None if self.pool_index is None else self.pool_index[index]
        return TowerState(hidden * valid[:, :, None], self.layer, valid, pool_index, lengths=lengths.to(torch.int32))
