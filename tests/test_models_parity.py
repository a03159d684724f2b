"""Without prompts EPIC is the backbone and a head, bit for bit; with them it is the equations, written out again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import epic_fast
from epic_fast import EpicConfig
from epic_fast.testing import tiny_bert, tiny_clip, tiny_vit
from epic_fast.testing.probes import END, lively, make_batch, perturb

CLIPS = {
    "3x4": {"text_layers": 3, "vision_layers": 4, "text_width": 32, "vision_width": 48, "seed": 0},
    "5x2": {"text_layers": 5, "vision_layers": 2, "text_width": 48, "vision_width": 16, "heads": 2, "seed": 1},
    "2x7": {"text_layers": 2, "vision_layers": 7, "text_width": 24, "vision_width": 64, "seed": 2},
}


def rows(batch: dict[str, Tensor], index: Any) -> dict[str, Tensor]:
    return {name: tensor[index] for name, tensor in batch.items()}


def linear_head(model: Any, *features: Tensor) -> Tensor:
    layer = model.head.classifier[-1]
    return nn.functional.linear(torch.cat(features, dim=-1), layer.weight, layer.bias)


def vision_text_model(vision_pooler: bool = True, attention: str = "sdpa") -> Any:
    from transformers import VisionTextDualEncoderModel, ViTModel

    vit, bert = tiny_vit(), tiny_bert()
    if vision_pooler:
        torch.manual_seed(5)
        vit = ViTModel(vit.config, add_pooling_layer=True).eval()
    vit.set_attn_implementation(attention)
    bert.set_attn_implementation(attention)
    torch.manual_seed(6)
    return lively(VisionTextDualEncoderModel(vision_model=vit, text_model=bert).eval())


# -- parity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no-mask"])
@pytest.mark.parametrize("lengths", [[9, 9, 9], [9, 4, 7]], ids=["even", "padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("old_eos", [False, True], ids=["eos", "old-eos"])
@pytest.mark.parametrize("shape", CLIPS)
def test_without_prompts_clip_and_a_head(
    shape: str, old_eos: bool, attention: str, lengths: list[int], masked: bool
) -> None:
    clip = lively(tiny_clip(old_eos=old_eos, **CLIPS[shape]))
    clip.set_attn_implementation(attention)
    batch = make_batch(lengths)
    if not masked:
        del batch["attention_mask"]
    for kind in ("pooled", "projected"):
        config = EpicConfig(prompt_length=0, text_head_input=kind, vision_head_input=kind)
        model = epic_fast.wrap(clip, config, num_labels=5).eval()
        with torch.no_grad():
            logits = model(**batch).logits
            if kind == "pooled":
                whole = [clip.text_model(batch["input_ids"], batch.get("attention_mask")).pooler_output]
                whole.append(clip.vision_model(batch["pixel_values"]).pooler_output)
            else:
                text_arguments = {name: value for name, value in batch.items() if name != "pixel_values"}
                whole = [
                    clip.get_text_features(**text_arguments).pooler_output,
                    clip.get_image_features(batch["pixel_values"]).pooler_output,
                ]
            wanted = linear_head(model, *whole)
        assert torch.equal(logits, wanted)
        model.unwrap()


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no-mask"])
@pytest.mark.parametrize("lengths", [[9, 9, 9], [9, 4, 7]], ids=["even", "padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("form", ["two models", "dual encoder", "dual encoder, projected"])
def test_without_prompts_the_pair_and_a_head(form: str, attention: str, lengths: list[int], masked: bool) -> None:
    batch = make_batch(lengths)
    batch["token_type_ids"] = torch.ones_like(batch["input_ids"])
    if not masked:
        del batch["attention_mask"]
    kind = "projected" if form.endswith("projected") else "pooled"
    dual = vision_text_model(attention=attention)
    backbone: Any = dual
    vit, bert = dual.vision_model, dual.text_model
    if form == "two models":
        vit = lively(tiny_vit(layers=5, width=16))
        vit.set_attn_implementation(attention)
        backbone = (vit, bert)
    config = EpicConfig(prompt_length=0, text_head_input=kind, vision_head_input=kind)
    model = epic_fast.wrap(backbone, config, num_labels=4).eval()
    text_arguments = {name: value for name, value in batch.items() if name != "pixel_values"}
    with torch.no_grad():
        logits = model(**batch).logits
        text, vision = bert(**text_arguments).pooler_output, vit(batch["pixel_values"])
        vision = vision.last_hidden_state[:, 0] if vision.pooler_output is None else vision.pooler_output
        if kind == "projected":
            text, vision = dual.get_text_features(**text_arguments), dual.get_image_features(batch["pixel_values"])
            text, vision = text.pooler_output, vision.pooler_output
        wanted = linear_head(model, text, vision)
    assert torch.equal(logits, wanted)


def test_a_text_tower_without_pooler_is_pooled_at_its_first_token() -> None:
    from transformers import BertModel

    vit = tiny_vit()
    torch.manual_seed(0)
    bert = BertModel(tiny_bert().config, add_pooling_layer=False).eval()
    model = epic_fast.wrap((vit, bert), EpicConfig(prompt_length=0), num_labels=4).eval()
    batch = make_batch([8, 5])
    with torch.no_grad():
        text = bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state[:, 0]
        wanted = linear_head(model, text, vit(batch["pixel_values"]).last_hidden_state[:, 0])
        assert torch.equal(model(**batch).logits, wanted)


def test_end_of_text_tokens_used_as_padding_are_pooled_at_the_first() -> None:
    """CLIP's own tokenizer pads with the end token."""
    clip = lively(tiny_clip())
    model = epic_fast.wrap(clip, EpicConfig(prompt_length=0), num_labels=3).eval()
    batch = make_batch([9, 4])
    batch["input_ids"][1, 4:] = END
    with torch.no_grad():
        text = clip.text_model(batch["input_ids"], batch["attention_mask"]).pooler_output
        wanted = linear_head(model, text, clip.vision_model(batch["pixel_values"]).pooler_output)
        assert torch.equal(model(**batch).logits, wanted)
        prompted = perturb(epic_fast.wrap(lively(tiny_clip()), EpicConfig(prompt_length=2), num_labels=3)).eval()
        logits = prompted(**batch).logits
        del batch["attention_mask"]
        assert torch.allclose(prompted(**batch).logits, logits, atol=1e-5)


# -- the equations once more ------------------------------------------------------------------------------------


def naive_logits(model: Any, backbone: Any, batch: dict[str, Tensor], pairs: list[tuple[int, int]]) -> Tensor:
    """methods.md 1.2 as a plain loop over transformers' own layers; every mask additive and written out."""
    config = model.config
    vision_model, text_model = backbone if isinstance(backbone, tuple) else (backbone.vision_model, backbone.text_model)
    clip = hasattr(text_model, "final_layer_norm")
    text_layers = text_model.encoder.layers if clip else text_model.encoder.layer
    vision_layers = vision_model.encoder.layers if clip else vision_model.layers
    u_v = vision_model.embeddings(batch["pixel_values"])
    u_v = vision_model.pre_layrnorm(u_v) if clip else u_v
    u_t = text_model.embeddings(input_ids=batch["input_ids"])
    size, n_t, n_v, n_p = len(u_t), u_t.shape[1], u_v.shape[1], config.prompt_length
    valid = batch["attention_mask"].bool()

    def layer(module: nn.Module, hidden: Tensor, visible: Tensor) -> Tensor:
        mask = torch.zeros(size, 1, *visible.shape[1:], dtype=hidden.dtype)
        mask[~visible[:, None]] = torch.finfo(hidden.dtype).min
        output = module(hidden, mask)
        return output[0] if isinstance(output, tuple) else output

    def visibility(prompts: int, modality: str) -> Tensor:
        tokens = n_t if modality == "text" else n_v
        seen = torch.zeros(size, prompts + tokens, prompts + tokens, dtype=torch.bool)
        for sample in range(size):
            for row in range(prompts + tokens):
                for column in range(prompts + tokens):
                    if column < prompts:
                        seen[sample, row, column] = True
                        continue
                    key = column - prompts
                    there = bool(valid[sample, key]) if modality == "text" else True
                    if row < prompts:
                        seen[sample, row, column] = there and config.prompt_mask == "full"
                    else:
                        past = key <= row - prompts if (modality == "text" and clip) else True
                        seen[sample, row, column] = there and past
        return seen

    w_tv = [model.hub.text_to_vision[i] for i in range(len(model.hub.text_to_vision))]
    w_vt = [model.hub.vision_to_text[i] for i in range(len(model.hub.vision_to_text))]
    p_t = model.text_prompt.expand(size, -1, -1)
    if config.vision_prompt_init == "projected":
        p_v = w_tv[0](p_t)
    else:
        p_v = model.vision_prompt.expand(size, -1, -1)
    bare_t, bare_v = visibility(0, "text"), visibility(0, "vision")
    full_t, full_v = visibility(n_p, "text"), visibility(n_p, "vision")
    for index in range(pairs[0][0]):
        u_t = layer(text_layers[index], u_t, bare_t)
    for index in range(pairs[0][1]):
        u_v = layer(vision_layers[index], u_v, bare_v)
    ends = [*pairs[1:], (len(text_layers), len(vision_layers))]
    for step, ((l_t, l_v), (next_t, next_v)) in enumerate(zip(pairs, ends, strict=True)):
        both_t = layer(text_layers[l_t], torch.cat([p_t, u_t], dim=1), full_t)
        both_v = layer(vision_layers[l_v], torch.cat([p_v, u_v], dim=1), full_v)
        hat_t, u_t, hat_v, u_v = both_t[:, :n_p], both_t[:, n_p:], both_v[:, :n_p], both_v[:, n_p:]
        if config.interaction and step < len(pairs) - 1:
            projection = 0 if config.shared_projections else step
            z_v, z_t = w_vt[projection](hat_v), w_tv[projection](hat_t)
            similarity = torch.zeros(size, n_p, n_p, dtype=u_t.dtype)
            for i in range(n_p):
                for j in range(n_p):
                    dot = (hat_t[:, i] * z_v[:, j]).sum(-1)
                    similarity[:, i, j] = dot / (hat_t[:, i].norm(dim=-1) * z_v[:, j].norm(dim=-1))
            similarity = similarity / model.hub.log_temperature.exp()
            p_t = hat_t + model.hub.text_gate[step] * (similarity.softmax(dim=2) @ z_v)
            p_v = hat_v + model.hub.vision_gate[step] * (similarity.softmax(dim=1).transpose(1, 2) @ z_t)
        else:
            p_t, p_v = hat_t, hat_v
        for index in range(l_t + 1, next_t):
            u_t = layer(text_layers[index], u_t, bare_t)
        for index in range(l_v + 1, next_v):
            u_v = layer(vision_layers[index], u_v, bare_v)
    if clip:
        at = (batch["input_ids"] == END).int().argmax(dim=1)
        text = text_model.final_layer_norm(u_t)[torch.arange(size), at]
        vision = vision_model.post_layernorm(u_v)[:, 0]
    else:
        text, vision = text_model.pooler(u_t), vision_model.layernorm(u_v)[:, 0]
    if config.head_reads_prompts:
        return linear_head(model, text, vision, p_t.mean(dim=1), p_v.mean(dim=1))
    return linear_head(model, text, vision)


NAIVE: dict[str, tuple[dict[str, Any], list[tuple[int, int]]]] = {
    "default": ({}, [(0, 2), (1, 3), (2, 4), (3, 5)]),
    "three of four": ({"num_layer_pairs": 3}, [(1, 3), (2, 4), (3, 5)]),
    "a projection a step": ({"shared_projections": False}, [(0, 2), (1, 3), (2, 4), (3, 5)]),
    "channel gates": ({"gate": "channel"}, [(0, 2), (1, 3), (2, 4), (3, 5)]),
    "gaussian vision prompt": ({"vision_prompt_init": "gaussian"}, [(0, 2), (1, 3), (2, 4), (3, 5)]),
    "prefix": ({"prompt_mask": "prefix"}, [(0, 2), (1, 3), (2, 4), (3, 5)]),
    "gaps": ({"layer_pairs": [(0, 1), (2, 4)]}, [(0, 1), (2, 4)]),
    "deep pairs": ({"layer_pairs": [(0, 1), (1, 3), (2, 5)]}, [(0, 1), (1, 3), (2, 5)]),
    "no interaction": ({"interaction": False}, [(0, 2), (1, 3), (2, 4), (3, 5)]),
    "prompts into the head": ({"head_reads_prompts": True}, [(0, 2), (1, 3), (2, 4), (3, 5)]),
    "one pair": ({"num_layer_pairs": 1}, [(3, 5)]),
    "all at once": (
        {
            "layer_pairs": [(0, 0), (1, 2), (3, 3)],
            "shared_projections": False,
            "gate": "channel",
            "vision_prompt_init": "gaussian",
            "prompt_mask": "prefix",
        },
        [(0, 0), (1, 2), (3, 3)],
    ),
}


@pytest.mark.parametrize("family", ["clip", "clip eager", "pair"])
@pytest.mark.parametrize("name", NAIVE)
def test_the_forward_pass_is_the_equations(name: str, family: str) -> None:
    fields, pairs = NAIVE[name]
    if family == "pair":
        backbone: Any = (tiny_vit(layers=6), tiny_bert(layers=4))
    else:
        backbone = tiny_clip(text_layers=4, vision_layers=6)
        if family == "clip eager":
            backbone.set_attn_implementation("eager")
    config = EpicConfig(prompt_length=3, **fields)
    model = perturb(epic_fast.wrap(lively(backbone), config, num_labels=4)).double().eval()
    assert model.layer_pairs == pairs
    batch = make_batch([7, 4], dtype=torch.float64)
    with torch.no_grad():
        logits, wanted = model(**batch).logits, naive_logits(model, backbone, batch, pairs)
    assert torch.allclose(logits, wanted, rtol=1e-9, atol=1e-11), (logits - wanted).abs().max()


def test_gelu_layernorm_is_applied_to_what_the_hub_adds() -> None:
    model = perturb(
        epic_fast.wrap(tiny_clip(), EpicConfig(prompt_length=3, activation="gelu_layernorm", gate="channel"))
    ).double()
    hub = model.hub
    text, vision = torch.randn(2, 3, 32, dtype=torch.float64), torch.randn(2, 3, 48, dtype=torch.float64)
    next_text, next_vision = hub(text, vision, 1)
    from_vision, from_text = hub.vision_to_text[0](vision), hub.text_to_vision[0](text)
    cosine = nn.functional.cosine_similarity(text[:, :, None], from_vision[:, None], dim=-1)
    similarity = cosine / hub.log_temperature.exp()

    def activated(mix: Tensor) -> Tensor:
        return nn.functional.layer_norm(nn.functional.gelu(mix), mix.shape[-1:])

    wanted_text = text + hub.text_gate[1] * activated(similarity.softmax(dim=2) @ from_vision)
    wanted_vision = vision + hub.vision_gate[1] * activated(similarity.softmax(dim=1).transpose(1, 2) @ from_text)
    assert torch.allclose(next_text, wanted_text, rtol=1e-9, atol=1e-10)
    assert torch.allclose(next_vision, wanted_vision, rtol=1e-9, atol=1e-10)


# -- a sample by itself -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["clip", "clip eager", "pair", "pair, means", "clip, prefix, means"])
def prompted(request: pytest.FixtureRequest) -> Any:
    fields: dict[str, Any] = {}
    if "means" in request.param:
        fields.update(text_head_input="mean+pooled", vision_head_input="mean+cls")
    if "prefix" in request.param:
        fields.update(prompt_mask="prefix")
    backbone: Any = (tiny_vit(), tiny_bert()) if "pair" in request.param else tiny_clip()
    if "eager" in request.param:
        backbone.set_attn_implementation("eager")
    model = perturb(epic_fast.wrap(lively(backbone), EpicConfig(prompt_length=4, **fields), num_labels=5)).eval()
    assert all(bool((gate != 0).all()) for gate in model.parameter_groups()["gates"])
    return model


@torch.no_grad()
def test_permuting_a_batch_permutes_the_outputs(prompted: Any) -> None:
    batch = make_batch([9, 3, 6, 12, 9])
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(prompted(**rows(batch, order)).logits, prompted(**batch).logits[order], atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_a_text_further_changes_nothing(prompted: Any) -> None:
    batch = make_batch([9, 3, 6, 8])
    longer = dict(batch)
    longer["input_ids"] = nn.functional.pad(batch["input_ids"], (0, 5))
    longer["attention_mask"] = nn.functional.pad(batch["attention_mask"], (0, 5))
    wanted = prompted(**batch).logits
    assert torch.allclose(prompted(**longer).logits, wanted, atol=1e-5, rtol=0)
    longer["input_ids"][:, -3:] = 17  # what stands there does not matter either
    assert torch.allclose(prompted(**longer).logits, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_sample_alone_is_the_sample_in_a_batch(prompted: Any) -> None:
    lengths = [9, 3, 6, 12]
    batch = make_batch(lengths)
    logits = prompted(**batch).logits
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    for index, length in enumerate(lengths):
        alone = rows(batch, slice(index, index + 1))
        alone = {name: each if name == "pixel_values" else each[:, :length] for name, each in alone.items()}
        assert torch.allclose(prompted(**alone).logits[0], logits[index], atol=1e-5, rtol=0)


# -- who sees whom --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prompt_mask", ["full", "prefix"])
@torch.no_grad()
def test_clip_text_rows_stay_causal_and_prompt_rows_see_what_the_mask_says(prompt_mask: str, attention: str) -> None:
    clip = lively(tiny_clip())
    clip.set_attn_implementation(attention)
    tower = perturb(epic_fast.wrap(clip, EpicConfig(prompt_length=3), num_labels=2)).backbone.text
    batch = make_batch([8, 5])
    prompts = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))

    def run(batch: dict[str, Tensor], prompts: Tensor = prompts) -> tuple[Tensor, Tensor]:
        state = tower.start(batch["input_ids"], batch["attention_mask"])
        state, after = tower.run_prompted(state, 0, prompts, prompt_mask)
        return state.hidden, after

    hidden, after = run(batch)
    changed = {name: each.clone() for name, each in batch.items()}
    changed["input_ids"][0, 5] = 3 + (batch["input_ids"][0, 5] - 2) % 30
    later_hidden, later_after = run(changed)
    assert torch.equal(hidden[0, :5], later_hidden[0, :5])
    assert not torch.allclose(hidden[0, 5:], later_hidden[0, 5:], atol=1e-3)
    assert torch.equal(hidden[1], later_hidden[1])
    assert torch.equal(after[1], later_after[1])
    assert torch.equal(after[0], later_after[0]) == (prompt_mask == "prefix")
    # Every token row reads every prompt, the last prompt from the first token on.
    moved = prompts.clone()
    moved[0, 2] *= -1.0
    moved_hidden, moved_after = run(batch, moved)
    assert bool(((moved_hidden[0] - hidden[0]).abs().amax(dim=1) > 1e-6).all())
    assert bool(((moved_after[0] - after[0]).abs().amax(dim=1) > 1e-6).all())
    # Prompt rows never read padding.
    padded = {name: each.clone() for name, each in batch.items()}
    padded["input_ids"][1, 5:] = 20
    padded_hidden, padded_after = run(padded)
    assert torch.equal(padded_after, after)
    assert torch.equal(padded_hidden[1, :5], hidden[1, :5])


@pytest.mark.parametrize("prompt_mask", ["full", "prefix"])
@torch.no_grad()
def test_vision_prompt_rows_see_what_the_mask_says(prompt_mask: str) -> None:
    tower = epic_fast.wrap(lively(tiny_clip()), EpicConfig(prompt_length=3), num_labels=2).backbone.vision
    pictures = make_batch([5, 5])["pixel_values"]
    prompts = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(1))
    _, after = tower.run_prompted(tower.start(pictures), 0, prompts, prompt_mask)
    pictures[0, :, -8:, -8:] *= -1.0
    _, changed = tower.run_prompted(tower.start(pictures), 0, prompts, prompt_mask)
    assert torch.equal(after[1], changed[1])
    assert torch.equal(after[0], changed[0]) == (prompt_mask == "prefix")
