"""MiT in plain PyTorch as it is published: every key and value infused, attention over these copies.

An infused layer takes the place of ``epic_fast.backbones.LlamaTower.run_infused``; everything else of the model is the
library's own without its kernels, and all other layers are transformers' own.  Written after the released code, as a
careful user would write it: the cosine in float32 over the valid tokens, the gate shared by keys and values, both
infused in the transforms' float32 and rounded once, SDPA with transformers' own mask, no graph below the first infused
layer.  Nobody here has the released code's shift of the keys, which changes nothing (a seventh of the transforms).

Beside it the usual way to show a language model a picture: its patches as tokens in front of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, scaled_dot_product_attention, silu
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from epic_fast.backbones import LlamaTower
from epic_fast.engine import SourceInfusion, TowerState


def run_infused_naively(
    self: LlamaTower,
    state: TowerState,
    index: int,
    sources: Sequence[SourceInfusion],
    engine: Any = None,
    *,
    form: str = "residual",
    **options: Any,
) -> TowerState:
    """The tokens alone up to layer ``index``, then that layer infused by one source in residual form; all rows."""
    (source,) = sources
    assert form == "residual"
    state = self.with_native_mask(self.run(state, index))
    layer: Any = self.layers[index]
    attention, hidden = layer.self_attn, state.hidden
    normed = layer.input_layernorm(hidden)
    query, key, value = (
        projection(normed).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *self._rotary(hidden))
    gate = naive_gate(value, source, state.valid)[:, :, None, None]
    key = (key + gate * (key * source.key_multiplier[:, :, None])).to(query.dtype)
    update = value * source.value_multiplier[:, :, None] + source.value_shift[:, :, None]
    value = (value + gate * update).to(query.dtype)
    mask = state.native_mask[None]
    mixed = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=attention.scaling, enable_gqa=True
    )
    hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    normed = layer.post_attention_layernorm(hidden)
    units = silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed) * source.mlp_multiplier[:, None]
    return state.after(hidden + layer.mlp.down_proj(units.to(hidden.dtype)), index + 1)


def naive_gate(value: Tensor, source: SourceInfusion, valid: Tensor | None) -> Tensor:
    """``(B, Hk)``: σ of a head's scalar and the cosine between its values and the shift, once for every token."""
    tokens, shifts = value.float(), source.value_shift[:, :, None].expand(value.shape)
    if valid is not None:
        tokens, shifts = (each * valid[:, None, :, None] for each in (tokens, shifts))
    return torch.sigmoid(source.head_bias + cosine_similarity(tokens.flatten(2), shifts.flatten(2), dim=-1))


@contextmanager
def infused_naively() -> Iterator[None]:
    """Models infuse naively."""
    with mock.patch.object(LlamaTower, "run_infused", run_infused_naively):
        yield


class FrozenText(nn.Module):
    """The language model as transformers runs it, to the last valid token behind its final norm."""

    def __init__(self, language: Any):
        super().__init__()
        self.language = language

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **others: Tensor) -> tuple[None, Tensor]:
        hidden = self.language(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return None, last_valid(hidden, attention_mask)


class VisualTokens(nn.Module):
    """Patches through a trainable projector, as tokens in front of the text of the frozen language model.

    Args:
        width: of a patch.
        labels: classes.
    """

    def __init__(self, language: Any, width: int, labels: int):
        super().__init__()
        self.language = language
        size = language.config.hidden_size
        device = next(language.parameters()).device
        self.projector = nn.Linear(width, size, device=device)
        self.head = nn.Linear(size, labels, device=device)

    def forward(
        self, patches: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **others: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        words = self.language.embed_tokens(input_ids)
        tokens = torch.cat([self.projector(patches.to(self.projector.weight.dtype)).to(words.dtype), words], dim=1)
        mask = torch.cat([attention_mask.new_ones(patches.shape[:2]), attention_mask], dim=1)
        hidden = self.language(inputs_embeds=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        logits = self.head(last_valid(hidden, mask).to(self.head.weight.dtype))
        return None if labels is None else cross_entropy(logits, labels), logits


def last_valid(hidden: Tensor, mask: Tensor) -> Tensor:
    """``(B, N, D)`` to ``(B, D)``; padding is on the right."""
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1]
