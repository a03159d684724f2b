"""What the layers below the first interaction layer compute: a fixed function of a sample, worth keeping."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from epic_fast.engine.state import TowerState
from epic_fast.errors import ConfigError


@dataclass(frozen=True)
class Prefix:
    """Both towers right below their first interaction layer."""

    text: TowerState
    vision: TowerState

    def to(self, device: torch.device | str) -> Prefix:
        return Prefix(self.text.to(device), self.vision.to(device))


class PrefixCache:
    """Prefixes of a fixed list of samples in memory, texts and pictures addressed apart.

    Exact: a batch taken from here gives what :meth:`PromptedModel.extract` would give for it, text cut to the
    longest of the batch.  Only right while the pictures are not augmented.
    """

    def __init__(self, prefixes: Iterable[Prefix]):
        prefixes = list(prefixes)
        if not prefixes:
            raise ConfigError("PrefixCache: no prefixes were given; wanted those of at least one batch")
        self.vision = _stack([prefix.vision for prefix in prefixes])
        self.text = _stack([prefix.text for prefix in prefixes])

    def __len__(self) -> int:
        return len(self.vision.hidden)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(state.hidden.numel() * state.hidden.element_size() for state in (self.vision, self.text))

    def to(self, device: torch.device | str) -> PrefixCache:
        """The same cache on another device."""
        moved = object.__new__(PrefixCache)
        moved.vision, moved.text = self.vision.to(device), self.text.to(device)
        return moved

    def batch(self, pictures: Tensor, texts: Tensor | None = None) -> Prefix:
        """The prefix of pictures ``(b,)`` beside texts ``(b,)`` (integers; texts default to the pictures')."""
        pictures = pictures.to(self.vision.hidden.device)
        texts = pictures if texts is None else texts.to(self.text.hidden.device)
        return Prefix(text=self.text.rows(texts), vision=self.vision.rows(pictures))


def _stack(states: list[TowerState]) -> TowerState:
    longest = max(state.hidden.shape[1] for state in states)
    hidden = torch.cat([_pad(state.hidden, longest) for state in states])
    valid = None
    if states[0].valid is not None:
        valid = torch.cat([_pad(state.valid, longest) for state in states if state.valid is not None])
    pool_index = None
    if states[0].pool_index is not None:
        pool_index = torch.cat([state.pool_index for state in states if state.pool_index is not None])
    return TowerState(hidden, valid, pool_index)


def _pad(tensor: Tensor, length: int) -> Tensor:
    if tensor.shape[1] == length:
        return tensor
    padding = tensor.new_zeros(tensor.shape[0], length - tensor.shape[1], *tensor.shape[2:])
    return torch.cat([tensor, padding], dim=1)
