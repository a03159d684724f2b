"""Backbones: what is taken and refused, how they are loaded, checked, frozen and given back."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import epic_fast
from epic_fast import EpicConfig
from epic_fast.backbones import DualEncoder, load_backbone
from epic_fast.backbones.fingerprint import describe_difference, tensor_digest
from epic_fast.backbones.source import split_pair
from epic_fast.engine import TowerState
from epic_fast.errors import ConfigError
from epic_fast.testing import tiny_bert, tiny_clip, tiny_vit
from epic_fast.testing.probes import lively, make_batch

CONFIG = EpicConfig(prompt_length=2)


def bits(model: nn.Module) -> dict[str, Any]:
    return {name: each.clone() for name, each in model.state_dict().items()}


def unevenly(model: nn.Module) -> nn.Module:
    """Every third parameter frozen, every second module in training."""
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    return model


def marks(model: nn.Module) -> tuple[dict[str, bool], dict[str, bool]]:
    grads = {name: each.requires_grad for name, each in model.named_parameters()}
    return grads, {name: each.training for name, each in model.named_modules()}


# -- given and given back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "pair"])
def test_unwrap_gives_back_the_same_objects_bits_flags_and_modes(kind: str) -> None:
    models = [unevenly(tiny_clip())] if kind == "clip" else [unevenly(tiny_vit()), unevenly(tiny_bert())]
    backbone: Any = models[0] if kind == "clip" else tuple(models)
    before, marked = [bits(each) for each in models], [marks(each) for each in models]
    for _ in range(2):  # and once more with the same objects
        model = epic_fast.wrap(backbone, CONFIG, num_labels=3).train()
        assert not any(each.requires_grad or each.grad is not None for each in model.backbone.parameters())
        assert not any(each.training for each in model.backbone.modules())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(**make_batch([6, 4]), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        back = model.unwrap()
        assert back is backbone if kind == "clip" else all(x is y for x, y in zip(back, backbone, strict=True))
        assert [marks(each) for each in models] == marked
        for each, state in zip(models, before, strict=True):
            after = each.state_dict()
            assert after.keys() == state.keys()
            assert all(torch.equal(after[name], state[name]) for name in state)
        assert not any(each._forward_hooks or each._forward_pre_hooks for m in models for each in m.modules())


def test_a_dual_encoder_can_be_wrapped_again_after_unwrap_or_a_failure() -> None:
    """It is frozen by each wrap, not only when it is made."""
    clip = unevenly(tiny_clip())
    marked = marks(clip)
    encoder = load_backbone(clip)
    with pytest.raises(ConfigError, match="layer_pairs names text layer 14"):
        epic_fast.wrap(encoder, EpicConfig(layer_pairs=[(14, 1)]))
    assert marks(clip) == marked
    for _ in range(2):
        model = epic_fast.wrap(encoder, CONFIG)
        assert not any(each.requires_grad for each in clip.parameters())
        assert not any(each.training for each in clip.modules())
        model.unwrap()
        assert marks(clip) == marked


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("kind", ["clip", "pair"])
def test_two_wraps_of_one_backbone_free_it_together(kind: str, first: int) -> None:
    models = [unevenly(tiny_clip())] if kind == "clip" else [unevenly(tiny_vit()), unevenly(tiny_bert())]
    backbone: Any = models[0] if kind == "clip" else tuple(models)
    marked = [marks(each) for each in models]
    held = [epic_fast.wrap(backbone, CONFIG) for _ in range(2)]
    held[first].unwrap()
    assert not any(each.requires_grad for model in models for each in model.parameters())
    assert not any(each.training for model in models for each in model.modules())
    held[1 - first].unwrap()
    assert [marks(each) for each in models] == marked


def test_a_wrap_that_was_dropped_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = unevenly(tiny_clip())
    dropped = epic_fast.wrap(clip, CONFIG)
    del dropped
    gc.collect()
    clip.requires_grad_(True)
    model = epic_fast.wrap(clip, CONFIG)
    model.unwrap()
    assert all(each.requires_grad for each in clip.parameters())


def test_a_copy_is_freed_by_itself() -> None:
    clip = unevenly(tiny_clip())
    marked = marks(clip)
    model = epic_fast.wrap(clip, CONFIG)
    copied = copy.deepcopy(model).unwrap()
    assert copied is not clip
    assert marks(copied) == marked
    assert not any(each.requires_grad for each in clip.parameters())


def test_a_failed_wrap_releases_the_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = unevenly(tiny_clip())
    marked = marks(clip)
    for arguments in ({"num_labels": 0}, {"config": EpicConfig(text_head_input="cls")}):
        with pytest.raises(ConfigError):
            epic_fast.wrap(clip, **{"config": CONFIG, **arguments})
        assert marks(clip) == marked
    monkeypatch.setattr(DualEncoder, "self_check", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        epic_fast.wrap(clip, CONFIG)
    assert marks(clip) == marked


# -- the self-check ------------------------------------------------------------------------------------------------


FAULTS = [
    (fault, modality, kind)
    for fault in ("a layer dropped", "a layer twice", "not a number")
    for modality in ("text", "vision")
    for kind in ("clip", "pair")
]


# Padding behind the end of the text never reaches what CLIP's text tower pools.
@pytest.mark.parametrize(("fault", "modality", "kind"), [*FAULTS, ("no mask", "text", "pair")])
def test_the_self_check_finds_a_driver_that_runs_a_tower_wrongly(
    fault: str, modality: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_backbone(lively(tiny_clip() if kind == "clip" else (tiny_vit(), tiny_bert())))
    encoder.self_check()
    tower: Any = getattr(encoder, modality)
    run = tower.run
    if fault == "a layer dropped":
        monkeypatch.setattr(
            tower, "run", lambda state, stop: run(state, stop - 1).after(run(state, stop - 1).hidden, stop)
        )
    elif fault == "a layer twice":
        monkeypatch.setattr(
            tower, "run", lambda state, stop: run(run(state, stop).after(run(state, stop).hidden, stop - 1), stop)
        )
    elif fault == "no mask":
        monkeypatch.setattr(tower, "native_mask", lambda state: None)
    else:
        monkeypatch.setattr(tower, "pool", lambda state: torch.full((2, tower.hidden_size), float("nan")))
    with pytest.raises(ConfigError, match=rf"self-check: the {modality} tower .* differs from the model's own output"):
        epic_fast.wrap(encoder, CONFIG)
    epic_fast.wrap(encoder, CONFIG, self_check=False)


def test_the_self_check_finds_a_text_tower_that_is_a_decoder() -> None:
    from transformers import BertModel

    config = tiny_bert().config
    config.is_decoder = True
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match="self-check: the text tower"):
        epic_fast.wrap((tiny_vit(), lively(BertModel(config))), CONFIG)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_self_check_passes_in_other_types(dtype: torch.dtype) -> None:
    for backbone in (lively(tiny_clip()).to(dtype), (lively(tiny_vit()).to(dtype), lively(tiny_bert()).to(dtype))):
        assert epic_fast.wrap(backbone, CONFIG).backbone.dtype == dtype


# -- what is refused -----------------------------------------------------------------------------------------------


class Foreign(nn.Module):
    """As the CLIP of another library."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Linear(2, 2)
        self.transformer = nn.Linear(2, 2)


def test_backbones_without_an_adapter_are_named() -> None:
    from transformers import CLIPVisionModel, SiglipConfig, SiglipModel

    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    siglip = SiglipModel(
        SiglipConfig(
            text_config={**tower, "vocab_size": 10}, vision_config={**tower, "image_size": 16, "patch_size": 8}
        )
    )
    for backbone, said in (
        (Foreign(), r"type .*Foreign was given; wanted a transformers CLIPModel"),
        (None, r"type builtins\.NoneType was given"),
        (3, r"type builtins\.int was given"),
        ((tiny_vit(),), r"a pair of towers has two models \(vision, text\); 1 were given"),
        ((tiny_bert(), tiny_vit()), r"the vision tower is a BertModel \(model type 'bert'\); there are adapters for"),
        ((tiny_vit(), Foreign()), r"the text tower is a Foreign"),
        (siglip, r"the vision tower is a SiglipVision\w+ \(model type 'siglip_vision_model'\)"),
        (tiny_vit(), r"type .*ViTModel was given"),
        (CLIPVisionModel(tiny_clip().config.vision_config), r"type .*CLIPVisionModel was given"),
    ):
        with pytest.raises(ConfigError, match=said):
            epic_fast.wrap(backbone, CONFIG)


def test_a_clip_tower_goes_with_a_bert_tower() -> None:
    clip, bert = lively(tiny_clip()), lively(tiny_bert())
    model = epic_fast.wrap((clip.vision_model, bert), CONFIG, num_labels=3)
    assert model.backbone.family == "clip_vision_model+bert"
    assert model(**make_batch([6, 4])).logits.shape == (2, 3)


def test_attention_that_takes_no_mask_is_refused() -> None:
    clip = tiny_clip()
    clip.text_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ConfigError, match=r"the text tower runs attn_implementation='flash_attention_2'.*set_attn_impl"
    ):
        epic_fast.wrap(clip, CONFIG)
    assert all(each.requires_grad for each in clip.parameters())


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nobody/no-such-model", r"the backbone 'nobody/no-such-model' could not be loaded"),
        ("no such model at all", r"the backbone 'no such model at all' could not be loaded"),
        ("", r"the backbone '' could not be loaded"),
        ("./nowhere", r"the backbone folder './nowhere' does not exist"),
        ("vision=/a", r"the backbone 'vision=/a' names vision; wanted 'vision=PATH,text=PATH'"),
        ("vision=/a,text=/b", r"the backbone folder '/a' does not exist"),
    ],
)
def test_names_that_lead_nowhere(spec: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        epic_fast.wrap(spec, CONFIG)


# -- loading -------------------------------------------------------------------------------------------------------


def test_folders_bring_their_processors(tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path / "clip")
    encoder = load_backbone(str(tmp_path / "clip"))
    assert encoder.source == str(tmp_path / "clip")
    assert encoder.family == "clip"
    assert encoder.max_text_length == 16
    assert len(encoder.tokenizer) == 39
    assert encoder.image_processor.crop_size["height"] == 32
    loaded = encoder.original.state_dict()
    assert all(torch.equal(each, loaded[name]) for name, each in clip.state_dict().items())
    assert load_backbone(tmp_path / "clip", dtype=torch.bfloat16).dtype == torch.bfloat16
    mine = object()
    assert load_backbone(tmp_path / "clip", tokenizer=mine, image_processor=mine).tokenizer is mine
    bare = load_backbone(tiny_clip())
    assert (bare.source, bare.tokenizer, bare.image_processor, bare.max_text_length) == (None, None, None, 16)


def test_a_pair_of_folders(tmp_path: Path) -> None:
    tiny_vit(tmp_path / "vit")
    tiny_bert(tmp_path / "bert")
    spec = f"vision={tmp_path / 'vit'},text={tmp_path / 'bert'}"
    encoder = load_backbone(spec)
    assert (encoder.source, encoder.family) == (spec, "vit+bert")
    assert encoder.vision_model.pooler is None  # none was saved, so none is made up
    assert encoder.text_model.pooler is not None
    assert encoder.tokenizer.cls_token_id is not None or len(encoder.tokenizer) == 39
    assert encoder.image_processor.size["height"] == 32
    assert split_pair(f"text=b,vision=a={tmp_path}") == (f"a={tmp_path}", "b")
    tiny_clip(tmp_path / "clip")
    mixed = load_backbone(f"vision={tmp_path / 'clip'},text={tmp_path / 'bert'}")
    assert mixed.family == "clip_vision_model+bert"


def test_a_folder_that_lacks_weights_or_is_one_tower_only(tmp_path: Path) -> None:
    import safetensors.torch

    tiny_vit(tmp_path / "vit")
    with pytest.raises(ConfigError, match=r"is of type 'vit'; there are adapters for 'clip'"):
        load_backbone(tmp_path / "vit")
    tiny_clip(tmp_path / "clip")
    path = tmp_path / "clip" / "model.safetensors"
    state = safetensors.torch.load_file(path)
    del state["text_model.encoder.layers.1.mlp.fc1.weight"]
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"lacks 1 tensors that a CLIPModel needs: text_model\.encoder\.layers\.1\.mlp"
    ):
        load_backbone(tmp_path / "clip")


@pytest.mark.parametrize("damage", ["truncated", "other shapes"])
def test_a_folder_with_damaged_weights(tmp_path: Path, damage: str) -> None:
    tiny_clip(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        text = config.read_text()
        config.write_text(text.replace('"projection_dim": 24', '"projection_dim": 8'))
        assert config.read_text() != text
    with pytest.raises(ConfigError, match=r"could not be loaded: .*\s*Wanted the name"):
        load_backbone(tmp_path)


# -- fingerprints --------------------------------------------------------------------------------------------------


def test_fingerprints_tell_bits_shapes_and_types_apart() -> None:
    one = torch.arange(6.0)
    digests = [
        one,
        one.view(2, 3),
        one.double(),
        one.int(),
        one.half(),
        one.view(torch.int32),
        one + 1e-6,
        -one,
        torch.zeros(0),
        one[0],
        one > 2,
    ]
    assert len({tensor_digest(each) for each in digests}) == len(digests)
    assert tensor_digest(one.view(2, 3).t().contiguous()) == tensor_digest(one.view(2, 3).t())
    same = {"a": "1", "b": "2"}
    assert describe_difference(same, dict(same)) is None
    words = describe_difference({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"})
    assert words == "1 of 3 tensors differ: b; 1 of 3 tensors are missing: c; 1 of 3 tensors are new: d"


# -- features ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "pair"])
@torch.no_grad()
def test_features_leave_out_padding_and_the_class_token(kind: str) -> None:
    backbone: Any = lively(tiny_clip() if kind == "clip" else (tiny_vit(), tiny_bert()))
    encoder = load_backbone(backbone)
    vision_model, text_model = (backbone.vision_model, backbone.text_model) if kind == "clip" else backbone
    batch = make_batch([7, 4])
    text = encoder.text.start(batch["input_ids"], batch["attention_mask"])
    text = encoder.text.run_all(text)
    hidden = text_model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    wanted = torch.stack([hidden[0].mean(0), hidden[1, :4].mean(0)])
    assert torch.allclose(encoder.text.features(text, "mean"), wanted, atol=1e-5)
    vision = encoder.vision.run_all(encoder.vision.start(batch["pixel_values"]))
    hidden = vision_model(batch["pixel_values"]).last_hidden_state
    hidden = vision_model.post_layernorm(hidden) if kind == "clip" else hidden
    found = encoder.vision.features(vision, "mean+cls")
    assert torch.allclose(found, torch.cat([hidden[:, 1:].mean(1), hidden[:, 0]], dim=1), atol=1e-5)
    assert encoder.vision.feature_width("mean+cls") == found.shape[1]


def test_prompts_of_length_zero_change_nothing() -> None:
    tower = load_backbone(lively(tiny_clip())).vision
    state = tower.start(make_batch([4, 4])["pixel_values"])
    found, prompts = tower.run_prompted(state, 1, torch.zeros(2, 0, 48), "full")
    assert isinstance(found, TowerState)
    assert prompts.shape == (2, 0, 48)
    assert found.layer == 2
    assert torch.equal(found.hidden, tower.run(state, 2).hidden)
