"""Decoders of the LLaMA family: a language model as text tower, into some of whose layers a modality is infused.

Llama, Mistral, Qwen2 (biases on query, key and value) and Qwen3 (norms on query and key): grouped-query attention,
RMSNorm, SwiGLU, rotary positions.  No prompt rows: :meth:`LlamaTower.run_infused` stands in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half

from epic_fast.backbones.towers import TOWERS, TextTower
from epic_fast.engine import EngineConfig, GatedInfusion, SourceInfusion, TowerState, call_layer
from epic_fast.engine.decoder import DecoderGeometry, FrozenDecoder, FrozenDecoderLayer
from epic_fast.engine.infused import Form, infused_swiglu
from epic_fast.engine.packed import relative_error, say_plain
from epic_fast.engine.rows import RowSelection
from epic_fast.errors import ConfigError

LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3")


class LlamaTower(TextTower):
    """``LlamaModel`` and its relatives, or the ``...ForCausalLM`` around one; pooled at the last valid token.

    Texts are padded on the right.
    """

    causal = True

    def __init__(self, model: nn.Module, projection: nn.Linear | None = None):
        super().__init__(base_of(model), projection)
        activation = getattr(self.config, "hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ConfigError(
                f"this language model's feed-forward has hidden_act={activation!r}; wanted 'silu', which the infusion "
                "knows (SwiGLU)"
            )
        self.frozen = FrozenDecoder(self.layers, self.modality, self._fused_error)  # pyright: ignore

    def find_layers(self) -> Sequence[nn.Module]:
        return list(self.model.layers)

    def start(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> TowerState:
        self.check_length(input_ids)
        valid, pool_index = self.valid_tokens(input_ids, attention_mask)
        return TowerState(self.model.embed_tokens(input_ids), 0, valid, pool_index)

    def valid_tokens(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        return valid, (valid * position).amax(dim=1)

    def normalise(self, hidden: Tensor) -> Tensor:
        return self.model.norm(hidden)

    def pool(self, state: TowerState) -> Tensor:
        state = state.settled()
        if state.pool_index is None:
            return self.normalise(state.hidden[:, 0])
        rows = torch.arange(len(state.hidden), device=state.hidden.device)
        return self.normalise(state.hidden[rows, state.pool_index])

    # -- shapes -----------------------------------------------------------------------------------------------

    @property
    def kv_heads(self) -> int:
        """Hk, key/value heads; ``num_attention_heads`` is a multiple of it."""
        return self.config.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """D, width of a head."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def mlp_width(self) -> int:
        """F, hidden units of a layer's feed-forward."""
        return self.config.intermediate_size

    # -- layers, as the model runs them ------------------------------------------------------------------------

    def run(self, state: TowerState, stop: int) -> TowerState:
        if state.layer >= stop:
            return super().run(state, stop)
        state = self.with_native_mask(state.settled())
        hidden, rotary = state.hidden, self._rotary(state.hidden)
        for index in range(state.layer, stop):
            mask = state.native_mask[self._window(index)]
            hidden = call_layer(self.layers[index], hidden, mask, position_embeddings=rotary)
        return state.after(hidden, stop)

    def native_mask(self, state: TowerState) -> Any:
        """Masks by the window of the layers that take them; None: no window."""
        valid = None if state.valid is None else state.valid.long()
        # The last argument, no cache, by its place: its name is another one from transformers 5.24 on.
        return {
            window: (create_causal_mask if window is None else create_sliding_window_causal_mask)(
                self.config, state.hidden, valid, None
            )
            for window in {self._window(index) for index in range(self.num_layers)}
        }

    def _window(self, index: int) -> int | None:
        """How many tokens a row of layer ``index`` sees, itself included; None: all up to itself."""
        attention = self.layers[index].self_attn
        return getattr(attention, "sliding_window", getattr(self.config, "sliding_window", None))

    def _rotary(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        position = torch.arange(hidden.shape[1], device=hidden.device)[None]
        return self.model.rotary_emb(hidden, position)

    def run_prompted(
        self, state: TowerState, index: int, prompts: Tensor, prompt_mask: str, engine: EngineConfig | None = None
    ) -> tuple[TowerState, Tensor]:
        if prompts.shape[1]:
            raise _no_prompts(self.config.model_type)
        return self.run(state, index + 1), prompts

    def begin(self, *arguments: Any, **options: Any) -> Any:
        raise _no_prompts(self.config.model_type)

    def fused_blocks(self, state: TowerState, engine: EngineConfig | None) -> None:
        """None: no prompt rows run here; :meth:`fused_layers` has the layers."""

    # -- fused layers ------------------------------------------------------------------------------------------

    def fused_layers(
        self, state: TowerState, stop: int, engine: EngineConfig | None
    ) -> list[FrozenDecoderLayer] | None:
        """All fused layers, to run these tokens up to ``stop``; None where the model's own do, saying why once."""
        if not self.runs_fused(engine):
            return None
        kind, tokens = state.hidden.device.type, state.hidden.shape[1]
        windows = [window for window in map(self._window, range(self.num_layers)) if window is not None]
        reason = None
        if state.valid is not None and state.lengths is None:
            reason = "it is not known where texts end, or padding is not on the right"
        elif any(tokens > window for window in windows):
            reason = f"texts are longer than its window of {min(windows)} tokens"
        elif torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != self.dtype:
            reason = f"autocast asks for {torch.get_autocast_dtype(kind)}, its weights are {self.dtype}"
        if reason is not None:
            say_plain(self.modality, reason)
            return None
        return self.frozen.layers(state.layer, stop)  # pyright: ignore[reportAttributeAccessIssue]

    def with_positions(self, state: TowerState) -> TowerState:
        """The state with the tables of its positions."""
        known, hidden = state.positions, state.hidden
        if known is not None and len(known[0]) == hidden.shape[1] and known[0].device == hidden.device:
            return state
        cos, sin = self._rotary(hidden)
        return replace(state, positions=(cos[0].contiguous(), sin[0].contiguous()))

    def geometry(self, state: TowerState) -> DecoderGeometry:
        """What the fused layers have to know of the tokens, positions included."""
        assert state.positions is not None
        return DecoderGeometry(state.lengths, *state.positions)

    def advance(
        self, state: TowerState, stop: int, engine: EngineConfig | None, reads: str | None = None, *, more: bool = False
    ) -> TowerState:
        """:meth:`Tower.advance`.

        Args:
            more: only this tower reads the result, so that the last sum may be left open.
        """
        fused = self.fused_layers(state, stop, engine) if state.layer < stop else None
        if fused is None:
            return self.run(state if more and state.layer == stop else state.settled(), stop)
        assert engine is not None
        rows = self.rows_read(state, reads, engine) if stop == self.num_layers else None
        state = self._walk(fused, state, stop, engine, rows)
        return state if more else state.settled()

    def _walk(
        self,
        fused: Sequence[FrozenDecoderLayer],
        state: TowerState,
        stop: int,
        engine: EngineConfig,
        rows: RowSelection | None = None,
        sources: Sequence[SourceInfusion] = (),
        form: Form = "residual",
    ) -> TowerState:
        """Fused layers up to ``stop - 1``, the last of them with an infusion where there are sources."""
        if state.layer >= stop:
            return self.run(state, stop)
        state = self.with_positions(state)
        hidden, branch, geometry = state.hidden, state.branch, self.geometry(state)
        for index in range(state.layer, stop - 1):
            hidden, branch = fused[index](hidden, branch, geometry, (), save=engine.save)
        last = replace(geometry, rows=rows)
        hidden, branch = fused[stop - 1](hidden, branch, last, sources, form=form, save=engine.save)
        state = state if rows is None else state.one_row(hidden)
        return state.after(hidden, stop, branch)

    @torch.no_grad()
    def _fused_error(self, layer: FrozenDecoderLayer) -> float:
        """How far the first fused layer is from its own on a few rows, relative: what names of modules do not tell."""
        weight = layer.weights().output
        rows = torch.arange(4 * self.hidden_size, device=weight.device).view(1, 4, -1).sin().to(weight.dtype)
        state = self.with_positions(TowerState(rows))
        with torch.autocast(weight.device.type, enabled=False):
            wanted = self.run(state, 1).hidden.double() - rows
            hidden, branch = layer(rows, None, self.geometry(state), ())
            found = (hidden + branch).double() - rows
        return relative_error(found, wanted)

    # -- layers with an infusion -------------------------------------------------------------------------------

    def run_infused(
        self,
        state: TowerState,
        index: int,
        sources: Sequence[SourceInfusion],
        engine: EngineConfig | None = None,
        *,
        form: Form = "residual",
        gate_reads_padding: bool = False,
        reads: str | None = None,
        more: bool = False,
    ) -> TowerState:
        """The tokens alone up to layer ``index``, then that layer with an infusion.

        Without an engine, or on a CPU but with ``blocks="fused"``, attention is the model's own, and an infusion that
        changes nothing changes no bit in float32.

        Args:
            sources: what goes into the layer, of each source; at least one.
            form: of :func:`epic_fast.functional.infused_attention`.
            gate_reads_padding: the gates' cosines run over padding too, as in the released code.
            reads: the features that are read of the last layer; None: all rows.
            more: only this tower reads the result, so that the last sum may be left open.
        """
        fused = None if gate_reads_padding else self.fused_layers(state, index + 1, engine)
        if fused is not None:
            assert engine is not None
            rows = self.rows_read(state, reads, engine) if index + 1 == self.num_layers else None
            state = self._walk(fused, state, index + 1, engine, rows, sources, form)
            return state if more else state.settled()
        state = self.advance(state, index, engine)
        lengths = self._lengths(state)
        window = self._window(index)
        narrow = window is not None and state.hidden.shape[1] > window
        if narrow and self.runs_fused(engine):
            say_plain(self.modality, f"texts are longer than its window of {window} tokens")
        rows = None
        if index + 1 == self.num_layers and not narrow:
            rows = self.rows_read(state, reads, engine)
        by_operation = rows is not None or (self.runs_fused(engine) and not narrow and not gate_reads_padding)

        layer: Any = self.layers[index]
        attention, hidden = layer.self_attn, state.hidden
        normed = layer.input_layernorm(hidden)
        cos, sin = self._rotary(hidden)
        key = _rotate(self._heads(attention, "k", normed), cos, sin)
        value = self._heads(attention, "v", normed)
        if rows is not None:
            hidden, normed = rows.take(hidden, 0), rows.take(normed, 0)
            cos, sin = (each[0, state.pool_index][:, None] for each in (cos, sin))
        query = _rotate(self._heads(attention, "q", normed), cos, sin)
        gated = GatedInfusion.of(sources, value, None if gate_reads_padding else lengths)
        if by_operation:
            mixed = gated.attention(query, key, value, form=form, lengths=lengths, scale=attention.scaling)
            mixed = mixed.transpose(1, 2)
        else:
            state = self.with_native_mask(state)
            own = _OwnAttention(attention, self.config._attn_implementation, state.native_mask[window])
            mixed = gated.around(own, query, key, value, form)
        hidden = hidden + attention.o_proj(mixed.flatten(2))
        normed = layer.post_attention_layernorm(hidden)
        units = infused_swiglu(layer.mlp.gate_proj(normed), layer.mlp.up_proj(normed), sources)
        hidden = hidden + layer.mlp.down_proj(units)
        state = state.after(hidden, index + 1)
        return state if rows is None else state.one_row(hidden)

    def _heads(self, attention: Any, name: str, normed: Tensor) -> Tensor:
        """Rows ``(B, N, width)`` to queries, keys or values ``(B, heads, N, D)``, before their rotation."""
        rows = getattr(attention, f"{name}_proj")(normed).unflatten(-1, (-1, self.head_dim))
        norm = getattr(attention, f"{name}_norm", None)
        return (rows if norm is None else norm(rows)).transpose(1, 2)

    @staticmethod
    def _lengths(state: TowerState) -> Tensor | None:
        """Valid tokens of each sample ``(B,)``; None: all."""
        if state.lengths is not None or state.valid is None:
            return state.lengths
        return state.valid.sum(dim=1, dtype=torch.int32)

    @torch.no_grad()
    def infusion_error(self, state: TowerState) -> float:
        """How far the last layer with an infusion that changes nothing is from the layer itself, relative.

        Args:
            state: tokens in front of that layer.
        """
        index, batch = self.num_layers - 1, len(state.hidden)
        zeros = state.hidden.new_zeros(batch, self.kv_heads, self.head_dim)
        nothing = _Nothing(zeros, state.hidden.new_ones(batch, self.mlp_width), zeros[0, :, 0])
        wanted = self.run(state, index + 1).hidden
        found = self.run_infused(state, index, [nothing]).hidden
        return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6))


@dataclass(frozen=True)
class _OwnAttention:
    """A layer's own attention function with its mask."""

    module: Any
    implementation: str
    mask: Any

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, eager_attention_forward)
        return attend(self.module, query, key, value, self.mask, dropout=0.0, scaling=self.module.scaling)[0]


class _Nothing:
    """An infusion that changes nothing."""

    def __init__(self, zeros: Tensor, ones: Tensor, head_bias: Tensor):
        self.key_multiplier = self.value_multiplier = self.value_shift = zeros
        self.mlp_multiplier, self.head_bias = ones, head_bias


def base_of(model: Any) -> Any:
    """The transformer of a causal language model, without the map to the vocabulary."""
    return model.model if hasattr(model, "lm_head") and hasattr(model, "model") else model


def _rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``(B, heads, N, D)`` rotated by their positions, as these models do it."""
    cos, sin = cos[:, None], sin[:, None]
    return (rows * cos) + (rotate_half(rows) * sin)


def _no_prompts(kind: str) -> ConfigError:
    return ConfigError(
        f"prompt rows were asked of a language model (model type {kind!r}); wanted the method MiT (MitConfig), which "
        "infuses the other modality, or another text tower, such as a BertModel"
    )


TOWERS.update(dict.fromkeys(LANGUAGE_MODELS, LlamaTower))
