"""In the place of a vision tower, where a backbone is a language model alone."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from epic_fast.backbones.towers import VisionTower
from epic_fast.engine import EngineConfig, TowerState
from epic_fast.engine.packed import FrozenTower
from epic_fast.errors import ConfigError


class NoVisionTower(VisionTower):
    """A tower without layers, tokens and features."""

    def __init__(self) -> None:
        self.model = None
        self.config = SimpleNamespace(model_type="none", hidden_size=0)
        self.projection = None
        self.layers: Sequence[nn.Module] = []
        self.frozen = FrozenTower([], self.modality)

    def find_layers(self) -> Sequence[nn.Module]:
        return []

    @property
    def feature_widths(self) -> dict[str, int]:
        return {}

    @property
    def dtype(self) -> torch.dtype:
        raise ConfigError("this backbone has no vision tower; wanted 'vision=PATH,text=PATH'")

    def runs_fused(self, engine: EngineConfig | None) -> bool:
        return False

    def start(self, pixel_values: Tensor) -> TowerState:
        raise ConfigError(
            "pixel_values was given, but this backbone has no vision tower; wanted 'vision=PATH,text=PATH'"
        )

    def normalise(self, hidden: Tensor) -> Tensor:
        return hidden

    def pool(self, state: TowerState) -> Tensor:
        raise ConfigError("this backbone has no vision tower; wanted 'vision=PATH,text=PATH'")
