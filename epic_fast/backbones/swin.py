"""Swin: a tower in stages, whose blocks attend inside windows; each window can hold the sample's prompts."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from epic_fast.backbones.towers import TOWERS, Tower, VisionTower
from epic_fast.engine import EngineConfig, TowerState
from epic_fast.engine.packed import FrozenTower
from epic_fast.engine.patches import FrozenEmbedding, FrozenMerge
from epic_fast.engine.routes import PromptRoute
from epic_fast.engine.window_blocks import FrozenWindowBlock, WindowStream, before_routes, differs
from epic_fast.engine.windows import (
    Windows,
    call_swin_block,
    call_swin_block_with_prompts,
    halved,
    merge_prompts,
)
from epic_fast.errors import ConfigError

logger = logging.getLogger("epic_fast")


@dataclass(frozen=True)
class Stage:
    """Layers ``start`` to ``stop - 1`` of a tower, whose tokens and prompts have one width."""

    start: int
    stop: int
    width: int


def stages_of(tower: Tower) -> list[Stage]:
    """The stages of a tower; a tower that knows of none is one."""
    if isinstance(tower, SwinTower):
        return tower.stages
    return [Stage(0, tower.num_layers, tower.hidden_size)]


class SwinTower(VisionTower):
    """``SwinModel``: layers are its blocks, a stage's last one together with the merging of patches behind it.

    Pooled by the mean over the grid, which is what its pooler does.
    """

    def __init__(self, model: nn.Module, projection: nn.Linear | None = None):
        super().__init__(model, projection)
        self.frozen = FrozenTower(self.layers, self.modality, make=FrozenWindowBlock, compare=differs)
        self._embedding = FrozenEmbedding(self.model.embeddings)
        self._merges: dict[int, FrozenMerge] = {}
        self.stages: list[Stage] = []
        for stage in self.model.encoder.layers:
            start = self.stages[-1].stop if self.stages else 0
            width = stage.blocks[0].layernorm_before.normalized_shape[0]
            self.stages.append(Stage(start, start + len(stage.blocks), width))

    def find_layers(self) -> Sequence[nn.Module]:
        return [block for stage in self.model.encoder.layers for block in stage.blocks]

    def start(self, pixel_values: Tensor) -> TowerState:
        return self._started(pixel_values, *self.model.embeddings(pixel_values.to(self.dtype)))

    def enter(self, pixel_values: Tensor, engine: EngineConfig | None) -> TowerState:
        if torch.is_grad_enabled() or not self.runs_fused(engine) or not self._embedding.usable():
            return self.start(pixel_values)
        return self._started(pixel_values, *self._embedding(pixel_values.to(self.dtype)))

    def _started(self, pixel_values: Tensor, hidden: Tensor, grid: tuple[int, int]) -> TowerState:
        smallest = grid
        for number in range(len(self.stages)):
            if number:
                smallest = halved(smallest)
            if min(smallest) < self.window:
                raise ConfigError(
                    f"pixel_values has shape {tuple(pixel_values.shape)}: in stage {number} of this Swin "
                    f"{smallest[0]} x {smallest[1]} tokens are left, fewer than a window of {self.window} x "
                    f"{self.window}; wanted larger pictures, such as the {self.image_size} pixels that it was made for"
                )
        return TowerState(hidden, grid=grid)

    @property
    def window(self) -> int:
        """Tokens along a side of a window."""
        return self.config.window_size

    def stage_at(self, layer: int) -> int:
        """The number of the stage whose tokens layer ``layer`` takes; after the last layer, the last one's."""
        return next((number for number, stage in enumerate(self.stages) if layer < stage.stop), len(self.stages) - 1)

    def grid(self, state: TowerState) -> tuple[int, int]:
        """(Rows, columns) that the tokens of ``state`` fill."""
        if state.grid is not None:
            return state.grid
        # A prefix that was kept: of the size that the model was made for, or square.
        tokens = state.hidden.shape[1]
        rows, columns = self.model.embeddings.patch_grid
        for _ in range(self.stage_at(state.layer)):
            rows, columns = halved((rows, columns))
        if rows * columns == tokens:
            return rows, columns
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ConfigError(
                f"{tokens} tokens of a Swin tower came without their grid; wanted those of pictures of "
                f"{self.image_size} pixels, or square ones (else leave the prefix cache out)"
            )
        return side, side

    # -- layers -----------------------------------------------------------------------------------------------

    def run(self, state: TowerState, stop: int) -> TowerState:
        if state.layer >= stop:
            return super().run(state, stop)
        for index in range(state.layer, stop):
            grid = self.grid(state)
            hidden = call_swin_block(
                self.layers[index], state.hidden, grid, window=self.window, shift=self.shift(index)
            )
            state = self.leave(index, state, hidden, grid)
        return state

    def advance(
        self, state: TowerState, stop: int, engine: EngineConfig | None, reads: str | None = None
    ) -> TowerState:
        blocks = self.window_blocks(engine) if state.layer < stop else None
        if blocks is None or (torch.is_grad_enabled() and state.hidden.requires_grad):
            return self.run(state, stop)
        way = SwinRun(self, blocks, state, state.hidden.new_zeros(len(state.hidden), 0, state.hidden.shape[2]))
        for index in range(state.layer, stop):
            way.step(index)
        return way.finish()[0]

    def routed_run(
        self,
        state: TowerState,
        prompts: Tensor,
        engine: EngineConfig | None,
        routes: Mapping[int, PromptRoute],
    ) -> SwinRun | None:
        """A way without a graph through the layers that makes prompts ``(B, P, C)`` where they lie, those of some
        layers by their routes; None where there are no prompts, or where the model's own blocks run."""
        blocks = self.window_blocks(engine)
        if blocks is None or not prompts.shape[1]:
            return None
        return SwinRun(self, blocks, state, prompts, routes)

    def run_prompted(
        self, state: TowerState, index: int, prompts: Tensor, prompt_mask: str, engine: EngineConfig | None = None
    ) -> tuple[TowerState, Tensor]:
        """As in any tower; prompts of a stage's last layer come out in the width of the next stage."""
        if prompt_mask != "full":
            raise ConfigError(
                f"prompt_mask={prompt_mask!r} with a Swin tower, whose prompts see every token of each window; wanted "
                "'full'"
            )
        state = self.advance(state, index, engine)
        merge = self.merge(index)
        if prompts.shape[1] == 0:
            width = prompts.shape[2] if merge is None else 2 * prompts.shape[2]
            return self.advance(state, index + 1, engine), prompts.new_zeros(len(prompts), 0, width)
        grid, shift = self.grid(state), self.shift(index)
        blocks = self.window_blocks(engine)
        if blocks is None:
            hidden, prompts = call_swin_block_with_prompts(
                self.layers[index], state.hidden, prompts, grid, window=self.window, shift=shift
            )
        else:
            assert engine is not None
            windows = Windows.of(grid, self.window, shift)
            hidden, prompts = blocks[index](state.hidden, prompts.to(state.hidden.dtype), windows, save=engine.save)
        return self.leave(index, state, hidden, grid), prompts if merge is None else merge_prompts(merge, prompts)

    def fused_blocks(self, state: TowerState, engine: EngineConfig | None) -> None:
        """None: rows of windows lie in no buffer ``(B, P + N, D)``; :meth:`window_blocks` has other blocks."""

    def window_blocks(self, engine: EngineConfig | None) -> list[FrozenWindowBlock] | None:
        """The fused blocks of all layers, read anew where one was changed; None where the model's own ones run."""
        if not self.runs_fused(engine):
            return None
        if engine is not None and engine.weights != "frozen":
            say_exact(self.modality)
        return self.frozen.blocks()

    def shift(self, index: int) -> int:
        """Every second block of a stage is built with a shift of half a window."""
        first = self.stages[self.stage_at(index)].start
        return 0 if (index - first) % 2 == 0 else self.window // 2

    def merge(self, index: int) -> Any:
        """The merging of patches behind a layer, if there is one."""
        number = self.stage_at(index)
        return self.model.encoder.layers[number].downsample if index + 1 == self.stages[number].stop else None

    def frozen_merge(self, index: int) -> FrozenMerge | None:
        """The same by its own weights, without a graph; None where only the module itself will do."""
        merge, found = self.merge(index), self._merges.get(index)
        if found is None or found.module is not merge:
            found = self._merges[index] = FrozenMerge(merge)
        return found if found.usable() else None

    def leave(self, index: int, state: TowerState, hidden: Tensor, grid: tuple[int, int]) -> TowerState:
        """The state behind layer ``index``, which gave ``hidden`` on ``grid``."""
        merge = self.merge(index)
        if merge is not None:
            hidden, grid = merge(hidden, grid), halved(grid)
        return replace(state.after(hidden, index + 1), grid=grid)

    # -- features ---------------------------------------------------------------------------------------------

    @property
    def feature_widths(self) -> dict[str, int]:
        # No row stands for the whole picture.
        widths = {"pooled": self.hidden_size, "mean": self.hidden_size}
        if self.projection is not None:
            widths["projected"] = self.projection.out_features
        return widths

    def normalise(self, hidden: Tensor) -> Tensor:
        return self.model.layernorm(hidden)

    def pool(self, state: TowerState) -> Tensor:
        if self.model.pooler is None:
            return self.mean(state)
        return self.model.pooler(self.normalise(state.hidden).transpose(1, 2)).flatten(1)

    def mean(self, state: TowerState) -> Tensor:
        return self.normalise(state.hidden).mean(dim=1)


class SwinRun:
    """A Swin's way through its fused blocks where no graph is made.

    Args:
        tower: the Swin.
        blocks: of all its layers.
        state: the tokens.
        prompts: ``(B, P, C)``; P may be 0.
        routes: of the layers above the first that make prompts of their own.
    """

    def __init__(
        self,
        tower: SwinTower,
        blocks: Sequence[FrozenWindowBlock],
        state: TowerState,
        prompts: Tensor,
        routes: Mapping[int, PromptRoute] | None = None,
    ):
        self._tower = tower
        self._blocks = blocks
        self._state = state
        self._grid = tower.grid(state)
        self._prompts = prompts
        self._routes = routes or {}
        inner = {index: route for index, route in self._routes.items() if tower.merge(index - 1) is None}
        self._through = before_routes(blocks, inner, state.hidden)
        self._stream: WindowStream | None = None

    def step(self, index: int) -> Tensor | None:
        """Layer ``index`` on tokens and prompts, with a route on its prompts in place of those that are there; the
        routing scores ``(B, E)``, None without a router."""
        tower = self._tower
        if self._stream is None:
            self._stream = WindowStream.of(self._state.hidden, self._prompts)
            # The stream has them; here they would stay for a whole stage.
            self._state = replace(self._state, hidden=self._state.hidden.new_empty(0))
        scores = self._stream.step(
            self._blocks[index],
            Windows.of(self._grid, tower.window, tower.shift(index)),
            self._routes.get(index),
            self._through.get(index),
        )
        merge = tower.merge(index)
        if merge is None:
            self._state = replace(self._state, layer=index + 1)
            return scores
        frozen = tower.frozen_merge(index)
        if frozen is not None:
            self._stream = self._stream.merged(frozen, self._grid)
            self._grid = halved(self._grid)
            self._state = replace(self._state, layer=index + 1, grid=self._grid)
            return scores
        hidden, prompts = self._stream.parted()
        self._stream = None
        self._state = tower.leave(index, self._state, hidden, self._grid)
        self._grid = tower.grid(self._state)
        self._prompts = merge_prompts(merge, prompts) if prompts.shape[1] else prompts.repeat(1, 1, 2)
        return scores

    def finish(self) -> tuple[TowerState, Tensor]:
        """Tokens and prompts."""
        if self._stream is None:
            return self._state, self._prompts
        hidden, prompts = self._stream.parted()
        return replace(self._state.after(hidden, self._state.layer), grid=self._grid), prompts


@functools.cache
def say_exact(name: str) -> None:
    """Log, once, that there are no windows in 8 bits."""
    logger.info("engine: the blocks of the %s tower multiply with their own weights: windows have no 8 bits", name)


TOWERS["swin"] = SwinTower
