"""One tower each: where embeddings, layers, final norm and pooling of a transformers model are.

A tower never copies mathematics: it calls the model's own modules in the model's own order, so that prompts can
be put in between.  :meth:`DualEncoder.self_check` proves that without prompts nothing changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from epic_fast.engine import EngineConfig, TowerState, call_layer, call_layer_with_prompts, prompted_visibility
from epic_fast.engine.fused import FrozenBlock, Geometry, run_blocks
from epic_fast.engine.packed import FrozenTower, PackedRun, say_plain
from epic_fast.engine.products import eight_bit_kind
from epic_fast.engine.rows import MOST_ROWS, RowSelection
from epic_fast.engine.state import measure
from epic_fast.errors import ConfigError

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager")


class Tower(ABC):
    """A stack of transformer layers with an entrance and a pooling rule.

    Args:
        model: the transformers model of this tower.
        projection: the map into the space shared by both towers, where the backbone has one.
    """

    modality: str
    causal = False

    def __init__(self, model: nn.Module, projection: nn.Linear | None = None):
        self.model: Any = model
        self.config: Any = model.config
        self.projection = projection
        self.layers: Sequence[nn.Module] = self.find_layers()
        self.frozen = FrozenTower(self.layers, self.modality)
        implementation = self.config._attn_implementation
        if implementation not in ATTENTION_IMPLEMENTATIONS:
            raise ConfigError(
                f"the {self.modality} tower runs attn_implementation={implementation!r}, which takes no mask over "
                f"prompts; wanted one of {', '.join(ATTENTION_IMPLEMENTATIONS)}: call "
                "backbone.set_attn_implementation('sdpa') first"
            )

    @abstractmethod
    def find_layers(self) -> Sequence[nn.Module]:
        """The model's transformer layers, in order."""

    @abstractmethod
    def normalise(self, hidden: Tensor) -> Tensor:
        """The model's final norm (the identity where it has none)."""

    @property
    def hidden_size(self) -> int:
        """Width D of the tokens."""
        return self.config.hidden_size

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def run(self, state: TowerState, stop: int) -> TowerState:
        """The layers from where the state is up to ``stop - 1``, without prompts, called as the model calls them."""
        if state.layer > stop:
            raise ConfigError(
                f"these {self.modality} tokens have been through {state.layer} layers, but are wanted at layer {stop}: "
                "the prefix was made for another configuration; call model.extract() again"
            )
        if state.layer == stop:
            return state
        state = self.with_native_mask(state)
        hidden = state.hidden
        for layer in self.layers[state.layer : stop]:
            hidden = call_layer(layer, hidden, state.native_mask, **self.layer_arguments())
        return state.after(hidden, stop)

    def run_prompted(
        self, state: TowerState, index: int, prompts: Tensor, prompt_mask: str, engine: EngineConfig | None = None
    ) -> tuple[TowerState, Tensor]:
        """The tokens alone up to layer ``index``, then that layer on ``[prompts ; tokens]``.

        Prompts ``(B, P, D)`` go in and come out.  ``engine`` is for towers that have fused forms of single layers; the
        others are run by :meth:`begin`.
        """
        state = self.run(state, index)
        if prompts.shape[1] == 0:
            return self.run(state, index + 1), prompts
        mask = self.prompted_mask(state, prompts.shape[1], prompt_mask)
        hidden, prompts = call_layer_with_prompts(self.layers[index], state.hidden, prompts, mask)
        return state.after(hidden, index + 1), prompts

    def run_all(self, state: TowerState) -> TowerState:
        """What is left of the layers, without prompts."""
        return self.run(state, self.num_layers)

    # -- the engine -------------------------------------------------------------------------------------------

    def advance(
        self, state: TowerState, stop: int, engine: EngineConfig | None, reads: str | None = None
    ) -> TowerState:
        """:meth:`run` as the engine has it.

        Args:
            reads: the features (:meth:`features`) that are read of the result, if these are the last layers; None: all
                rows of it are.
        """
        blocks = self.fused_blocks(state, engine) if state.layer < stop else None
        if blocks is None:
            return self.run(state, stop)
        assert engine is not None
        rows = self.rows_read(state, reads, engine) if stop == self.num_layers else None
        geometry = Geometry(0, state.lengths, "full", self.causal, rows)
        hidden = run_blocks(blocks[state.layer : stop], state.hidden, geometry, save=engine.save)
        state = state.after(hidden, stop)
        return state if rows is None else state.one_row(hidden)

    def begin(
        self,
        state: TowerState,
        prompts: Tensor,
        prompt_mask: str,
        engine: EngineConfig | None = None,
        *,
        first: int,
        reads: str | None = None,
        reads_prompts: bool = False,
    ) -> PackedRun | PlainRun:
        """A way through the layers in which prompts ``(B, P, D)``, P at least 1, join the tokens at some of them.

        Args:
            first: the first such layer.
            reads: the features that are read of the last layer; None: all rows.
            reads_prompts: whether the prompts are read after the last layer.
        """
        state = self.advance(state, first, engine)
        blocks = self.fused_blocks(state, engine)
        if blocks is None:
            return PlainRun(self, state, prompts, prompt_mask, engine)
        assert engine is not None
        rows = self.rows_read(state, reads, engine, prompts.shape[1] if reads_prompts else 0)
        return PackedRun(
            blocks, state, prompts, prompt_mask=prompt_mask, causal=self.causal, save=engine.save, rows=rows
        )

    def runs_fused(self, engine: EngineConfig | None) -> bool:
        """Whether the engine is to take the place of the layers, if it can."""
        if engine is None or engine.blocks == "plain":
            return False
        fused = engine.blocks == "fused" or engine.weights != "frozen"
        return fused or next(self.model.parameters()).device.type != "cpu"

    def fused_blocks(self, state: TowerState, engine: EngineConfig | None) -> list[FrozenBlock] | None:
        """The blocks that run these tokens; None where the model's own layers do."""
        if not self.runs_fused(engine):
            return None
        if state.valid is not None and state.lengths is None:
            if state.irregular:
                say_plain(self.modality, "padding is on the left or in the middle of a text; wanted it on the right")
            else:
                say_plain(self.modality, "it is not known where texts end")
            return None
        assert engine is not None
        return self.frozen.blocks(eight_bit_kind(engine.weights, state.hidden.device), engine.exact_layers)

    def rows_read(
        self, state: TowerState, reads: str | None, engine: EngineConfig | None, prompts: int = 0
    ) -> RowSelection | None:
        """The rows that features ``reads``, and ``prompts`` prompts, are made of; None: all, or not worth it."""
        if reads is None or engine is None or not engine.pooled_rows or prompts + 1 > MOST_ROWS:
            return None
        if "mean" in self.split_kinds(reads):
            return None
        return RowSelection(state.pool_index, prompts > 0)

    # -- masks ------------------------------------------------------------------------------------------------

    def prompted_mask(self, state: TowerState, prompts: int, prompt_mask: str) -> Tensor | None:
        """The mask of a layer with prompts in the form that the tower's attention wants."""
        if state.valid is None and not self.causal and prompt_mask == "full":
            return None
        valid = state.valid
        if valid is None:
            valid = torch.ones(state.hidden.shape[:2], dtype=torch.bool, device=state.hidden.device)
        visible = prompted_visibility(valid, prompts, causal=self.causal, prompt_mask=prompt_mask)
        if self.config._attn_implementation == "sdpa":
            return visible
        # The eager attention adds its mask to the scores: a boolean would silently be wrong there.
        dtype = state.hidden.dtype
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
            ~visible, torch.finfo(dtype).min
        )

    def with_native_mask(self, state: TowerState) -> TowerState:
        """The state with the mask that the model's own layers get for it."""
        if state.has_native_mask:
            return state
        return replace(state, native_mask=self.native_mask(state), has_native_mask=True)

    def native_mask(self, state: TowerState) -> Any:
        """The model's own attention mask for these tokens."""
        return None

    def layer_arguments(self) -> dict[str, Any]:
        """Keyword arguments that the model itself hands to every layer."""
        return {}

    # -- features ---------------------------------------------------------------------------------------------

    @property
    def feature_widths(self) -> dict[str, int]:
        """The features that this tower can give to a head, with their widths."""
        widths = {"pooled": self.hidden_size, "mean": self.hidden_size}
        if not self.causal:
            # In a causal tower the first row has read nothing of the text.
            widths["cls"] = self.hidden_size
        if self.projection is not None:
            widths["projected"] = self.projection.out_features
        return widths

    def feature_width(self, kinds: str) -> int:
        """Width of the features ``kinds``, names joined by ``+``, such as ``"cls+mean"``."""
        return sum(self.feature_widths[kind] for kind in self.split_kinds(kinds))

    def split_kinds(self, kinds: str) -> list[str]:
        """``"cls+mean"`` to ``["cls", "mean"]``; raises on a feature that this tower does not have."""
        names = kinds.split("+")
        unknown = [name for name in names if name not in self.feature_widths]
        if unknown:
            raise ConfigError(
                f"EpicConfig.{self.modality}_head_input={kinds!r} asks for {unknown[0]!r}; this {self.modality} tower "
                f"has {', '.join(self.feature_widths)} (join several with '+')"
            )
        return names

    def features(self, state: TowerState, kinds: str) -> Tensor:
        """Features of the last layer's tokens, ``(B, feature_width(kinds))``.

        ``pooled`` is the model's own pooling, ``projected`` that after the backbone's projection, ``cls`` the first
        row after the final norm, ``mean`` the mean of the valid content rows after the final norm.
        """
        parts = []
        for kind in self.split_kinds(kinds):
            if kind == "pooled":
                parts.append(self.pool(state))
            elif kind == "projected":
                assert self.projection is not None
                parts.append(self.projection(self.pool(state)))
            elif kind == "cls":
                parts.append(self.normalise(state.hidden[:, 0]))
            else:
                parts.append(self.mean(state))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @abstractmethod
    def pool(self, state: TowerState) -> Tensor:
        """The model's own pooled output, ``(B, D)``."""

    @abstractmethod
    def mean(self, state: TowerState) -> Tensor:
        """Mean over content rows after the final norm, ``(B, D)``."""


class PlainRun:
    """As :class:`~epic_fast.engine.packed.PackedRun`, through the model's own layers."""

    def __init__(
        self, tower: Tower, state: TowerState, prompts: Tensor, prompt_mask: str, engine: EngineConfig | None = None
    ):
        self._tower = tower
        self._engine = engine
        self._state = state
        self._prompt_mask = prompt_mask
        self.prompts = prompts

    def step(self, index: int) -> None:
        """The tokens alone up to layer ``index``, then that layer on ``[prompts ; tokens]``."""
        self._state, self.prompts = self._tower.run_prompted(
            self._state, index, self.prompts, self._prompt_mask, self._engine
        )

    def finish(self) -> TowerState:
        """The tokens after the layers that are left."""
        return self._tower.run_all(self._state)


class VisionTower(Tower):
    """A tower over patches; no padding, no mask.  :meth:`mean` takes row 0 for a class token and leaves it out."""

    modality = "vision"

    @abstractmethod
    def start(self, pixel_values: Tensor) -> TowerState:
        """Pictures ``(B, 3, H, W)`` to the tokens before layer 0."""

    def enter(self, pixel_values: Tensor, engine: EngineConfig | None) -> TowerState:
        """The same as the engine does it."""
        return self.start(pixel_values)

    @property
    def image_size(self) -> int:
        size = self.config.image_size
        return size if isinstance(size, int) else size[0]

    def mean(self, state: TowerState) -> Tensor:
        return self.normalise(state.hidden[:, 1:]).mean(dim=1)


class TextTower(Tower):
    """A tower over token ids with padding."""

    modality = "text"

    @abstractmethod
    def start(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> TowerState:
        """Token ids ``(B, N)`` to the tokens before layer 0."""

    @property
    def max_length(self) -> int:
        """The most tokens that this tower takes."""
        return self.config.max_position_embeddings

    def mean(self, state: TowerState) -> Tensor:
        hidden = self.normalise(state.hidden)
        if state.valid is None:
            return hidden.mean(dim=1)
        weight = state.valid.to(hidden.dtype)[:, :, None]
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1.0)

    def valid_tokens(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Which tokens are not padding ``(B, N)`` (None: all), and which are pooled ``(B,)`` (None: the first)."""
        return None if attention_mask is None else attention_mask.bool(), None

    def trim(self, inputs: dict[str, Any], *, multiple: int = 1) -> dict[str, Any]:
        """Texts cut to the longest of the batch, with ``text_lengths``; as they are where padding is not on the right.

        Waits for the device that the texts are on.

        Args:
            inputs: ``input_ids``, and ``attention_mask`` and ``token_type_ids`` where there are any.
            multiple: the length left is a multiple of this, or all there is.
        """
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None or ids.dim() != 2:
            return inputs
        valid, pool_index = self.valid_tokens(ids, mask)
        if valid is None:
            return inputs
        lengths, regular, longest = measure(valid, pool_index)
        if not regular:
            return inputs
        width = min(ids.shape[1], -(-longest // multiple) * multiple)
        cut = {
            name: inputs[name][:, :width]
            for name in ("input_ids", "attention_mask", "token_type_ids")
            if inputs.get(name) is not None
        }
        return {**inputs, **cut, "text_lengths": lengths}

    def check_length(self, input_ids: Tensor) -> None:
        if input_ids.dim() != 2:
            raise ConfigError(f"input_ids has shape {tuple(input_ids.shape)}; wanted (batch, tokens)")
        if input_ids.shape[1] > self.max_length:
            raise ConfigError(
                f"input_ids has {input_ids.shape[1]} tokens, but this text tower takes {self.max_length}: truncate in "
                f"the tokenizer (truncation=True, max_length={self.max_length})"
            )


class ClipVisionTower(VisionTower):
    """The picture tower of CLIP."""

    def find_layers(self) -> Sequence[nn.Module]:
        return list(self.model.encoder.layers)

    def start(self, pixel_values: Tensor) -> TowerState:
        hidden = self.model.embeddings(pixel_values.to(self.dtype))
        return TowerState(self.model.pre_layrnorm(hidden))

    def normalise(self, hidden: Tensor) -> Tensor:
        return self.model.post_layernorm(hidden)

    def pool(self, state: TowerState) -> Tensor:
        return self.normalise(state.hidden[:, 0])


class ClipTextTower(TextTower):
    """The text tower of CLIP: causal, pooled at the end-of-text row."""

    causal = True

    def find_layers(self) -> Sequence[nn.Module]:
        return list(self.model.encoder.layers)

    def start(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> TowerState:
        self.check_length(input_ids)
        valid, pool_index = self.valid_tokens(input_ids, attention_mask)
        state = TowerState(self.model.embeddings(input_ids=input_ids), 0, valid, pool_index)
        if attention_mask is None:
            # Without a mask the model lets later rows read the padding; the pooled row cannot see it either way.
            mask = self._causal_mask(state.hidden, None)
            return replace(state, native_mask=mask, has_native_mask=True)
        return state

    def valid_tokens(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        # Configurations with eos_token_id 2 predate its right value; the end of the text is then the highest id.
        end = input_ids if self.model.eos_token_id == 2 else (input_ids == self.model.eos_token_id)
        pool_index = end.to(torch.int).argmax(dim=-1)
        if attention_mask is not None:
            return attention_mask.bool(), pool_index
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        return position[None, :] <= pool_index[:, None], pool_index

    def native_mask(self, state: TowerState) -> Any:
        mask = None if state.valid is None else state.valid.long()
        return self._causal_mask(state.hidden, mask)

    def _causal_mask(self, hidden: Tensor, mask: Tensor | None) -> Any:
        # The last argument, no cache, by its place: its name is another one from transformers 5.24 on.
        return create_causal_mask(self.config, hidden, mask, None)

    def layer_arguments(self) -> dict[str, Any]:
        return {"is_causal": True}

    def normalise(self, hidden: Tensor) -> Tensor:
        return self.model.final_layer_norm(hidden)

    def pool(self, state: TowerState) -> Tensor:
        if state.pool_index is None:
            return self.normalise(state.hidden[:, 0])
        rows = torch.arange(len(state.hidden), device=state.hidden.device)
        return self.normalise(state.hidden[rows, state.pool_index])


class ViTTower(VisionTower):
    """``ViTModel``: pooled by its pooler where it has one, else by the class token."""

    def find_layers(self) -> Sequence[nn.Module]:
        return list(self.model.layers)

    def start(self, pixel_values: Tensor) -> TowerState:
        return TowerState(self.model.embeddings(pixel_values.to(self.dtype)))

    def normalise(self, hidden: Tensor) -> Tensor:
        return self.model.layernorm(hidden)

    def pool(self, state: TowerState) -> Tensor:
        if self.model.pooler is None:
            return self.normalise(state.hidden[:, 0])
        return self.model.pooler(self.normalise(state.hidden))


class BertTower(TextTower):
    """``BertModel``: pooled by its pooler where it has one, else by the first token."""

    def find_layers(self) -> Sequence[nn.Module]:
        return list(self.model.encoder.layer)

    def start(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> TowerState:
        self.check_length(input_ids)
        hidden = self.model.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        return TowerState(hidden, valid=None if attention_mask is None else attention_mask.bool())

    def native_mask(self, state: TowerState) -> Any:
        mask = None if state.valid is None else state.valid.long()
        return create_bidirectional_mask(config=self.config, inputs_embeds=state.hidden, attention_mask=mask)

    def normalise(self, hidden: Tensor) -> Tensor:
        return hidden

    def pool(self, state: TowerState) -> Tensor:
        if self.model.pooler is None:
            return state.hidden[:, 0]
        return self.model.pooler(state.hidden)


TOWERS: dict[str, type[Tower]] = {
    "clip_vision_model": ClipVisionTower,
    "clip_text_model": ClipTextTower,
    "vit": ViTTower,
    "bert": BertTower,
}


def make_tower(model: nn.Module, modality: str, projection: nn.Linear | None = None) -> Tower:
    """The adapter for a transformers model, chosen by its ``config.model_type``."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    known = {name: tower for name, tower in TOWERS.items() if tower.modality == modality}
    if kind not in known:
        raise ConfigError(
            f"the {modality} tower is a {type(model).__name__} (model type {kind!r}); there are adapters for "
            f"{', '.join(known)}. Convert the weights to one of those, or add a tower in epic_fast/backbones/towers.py"
        )
    return known[kind](model, projection)
