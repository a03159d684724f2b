"""Our attention inside transformers' own models: the numbers of sdpa, padding included, one model at a time."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import epic_fast
from epic_fast import functional, hf
from epic_fast.errors import ConfigError, ImplementationError
from epic_fast.ops import dispatch
from epic_fast.testing import tiny_bert, tiny_clip, tiny_vit
from epic_fast.testing.probes import lively, make_batch

transformers = pytest.importorskip("transformers")

LENGTHS = [9, 3, 6]


@pytest.fixture(autouse=True)
def nothing_logged_yet() -> Iterator[None]:
    hf._log_once.cache_clear()
    yield
    hf._log_once.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every call of prompt_attention."""
    found: list[dict[str, Any]] = []
    original = functional.prompt_attention

    def recorded(*args: Any, **options: Any) -> Any:
        found.append(options)
        return original(*args, **options)

    monkeypatch.setattr(functional, "prompt_attention", recorded)
    return found


def tiny_siglip() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 39, "max_position_embeddings": 16, "projection_size": 32}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    return transformers.SiglipModel(config).eval()


MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...], tuple[str, ...]]] = {
    # how to build it; what it takes of a batch; what it gives that reads no row of padding
    "bert": (tiny_bert, ("input_ids", "attention_mask"), ("pooler_output",)),
    "clip": (tiny_clip, ("pixel_values", "input_ids", "attention_mask"), ("text_embeds", "image_embeds")),
    "siglip": (tiny_siglip, ("pixel_values", "input_ids", "attention_mask"), ("text_embeds", "image_embeds")),
    "vit": (tiny_vit, ("pixel_values",), ("last_hidden_state",)),
}


def build(name: str) -> Any:
    model = lively(MODELS[name][0](), scale=0.3)
    model.set_attn_implementation("sdpa")
    return model


def batch_for(name: str, lengths: list[int] = LENGTHS) -> dict[str, Tensor]:
    batch = make_batch(lengths, width=12)
    return {key: batch[key] for key in MODELS[name][1]}


def run(name: str, model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What it gives, without rows of padding."""
    with torch.no_grad():
        output = model(**batch)
    found = {key: output[key] for key in MODELS[name][2]}
    if name == "bert":
        valid = batch["attention_mask"].bool()
        found["tokens"] = output.last_hidden_state[valid]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_padded_batches_give_what_sdpa_gives(name: str, calls: list[dict[str, Any]]) -> None:
    model, batch = build(name), batch_for(name)
    wanted = run(name, model, batch)
    with hf.enable(model):
        found = run(name, model, batch)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    if name in ("bert", "clip"):
        lengths = [each["lengths"].tolist() for each in calls if each["lengths"] is not None]
        assert lengths == [LENGTHS] * 3  # one for each layer of the text
        assert {each["causal"] for each in calls if each["lengths"] is not None} == {name == "clip"}
    else:
        assert calls  # the vision tower
        assert all(each["lengths"] is None for each in calls)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bert", "clip", "vit"])  # siglip's text reads its padding: that stays sdpa's
def test_on_a_gpu_the_kernels_give_what_sdpa_gives(
    name: str, dtype: torch.dtype, calls: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    model = build(name).to("cuda", dtype)
    batch = {
        key: each.cuda().to(dtype) if each.is_floating_point() else each.cuda() for key, each in batch_for(name).items()
    }
    wanted = run(name, model, batch)
    dispatch._log_once.cache_clear()
    with hf.enable(model), caplog.at_level(logging.INFO, logger="epic_fast"):
        found = run(name, model, batch)
    assert calls
    assert not caplog.records  # neither sdpa nor the reference was taken instead
    close = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, wanted, rtol=close, atol=close)


@pytest.mark.parametrize("name", ["bert", "siglip", "clip"])
def test_the_padding_matters_here(name: str) -> None:
    """Were the mask lost, as it is for an attention without a mask function, these batches would show it."""
    model, batch = build(name), batch_for(name)
    wanted = run(name, model, batch)
    whole = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    found = run(name, model, whole)
    key = MODELS[name][2][0]
    # CLIP's text is causal and pools before the padding begins.
    assert torch.allclose(found[key], wanted[key], atol=1e-3) == (name == "clip")


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_sdpa(name: str) -> None:
    gradients = []
    for enabled in (False, True):
        model, batch = build(name), batch_for(name)
        if enabled:
            hf.enable(model)
        output = model(**batch)
        sum(output[key].square().sum() for key in MODELS[name][2]).backward()
        gradients.append({key: each.grad for key, each in model.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", ["left", "hole", "nothing"])
def test_other_padding_goes_to_sdpa_and_says_so_once(
    shape: str, caplog: pytest.LogCaptureFixture, calls: list[dict[str, Any]]
) -> None:
    model, batch = build("bert"), batch_for("bert")
    mask = batch["attention_mask"]
    batch["attention_mask"] = {
        "left": mask.flip(1),
        "hole": mask * (torch.arange(mask.shape[1]) != 1),
        "nothing": mask * torch.tensor([[1], [0], [1]]),
    }[shape]
    wanted = run("bert", model, batch)
    with caplog.at_level(logging.INFO, logger="epic_fast"), hf.enable(model):
        found = run("bert", model, batch)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert not calls
    (record,) = caplog.records
    assert "using sdpa" in record.getMessage()
    assert "padding on the right" in record.getMessage()
    with hf.enable(model, strict=True), pytest.raises(ImplementationError, match=r"padding on the right.*strict=True"):
        run("bert", model, batch)


def test_dropout_goes_to_sdpa(calls: list[dict[str, Any]]) -> None:
    model, batch = build("bert").train(), batch_for("bert")
    results = []
    for handle in (None, hf.enable(model)):
        torch.manual_seed(3)
        results.append(run("bert", model, batch))
        if handle:
            handle.restore()
    torch.testing.assert_close(*results)
    assert not calls
    with hf.enable(model, strict=True), pytest.raises(ImplementationError, match=r"attention dropout \(0.1\)"):
        run("bert", model, batch)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"key": torch.zeros(2, 1, 5, 8), "value": torch.zeros(2, 1, 5, 8)}, "fewer heads"),
        ({"key": torch.zeros(2, 2, 7, 8), "value": torch.zeros(2, 2, 7, 8)}, "different shapes"),
        ({"attention_mask": torch.zeros(2, 1, 5, 5)}, "a mask"),
        ({"dropout": 0.5}, "dropout"),
        ({"output_attentions": True}, "output_attentions"),
        ({"position_bias": torch.zeros(1, 2, 5, 5)}, "position_bias"),
        ({"softcap": 30.0}, "softcap"),
    ],
)
def test_every_reason_not_to_run(change: dict[str, Any], reason: str) -> None:
    call: dict[str, Any] = dict.fromkeys(("query", "key", "value"), torch.zeros(2, 2, 5, 8))
    module = torch.nn.Module()
    arguments = {**call, "attention_mask": None, **change}
    with pytest.raises(ImplementationError, match=reason):
        hf._attention(True, module, **arguments)
    output, weights = hf._attention(True, module, **call, attention_mask=None)
    assert output.shape == (2, 5, 2, 8)
    assert weights is None


@pytest.mark.parametrize("causal", [False, True])
def test_lengths_that_meet_dropout_become_a_mask_again(causal: bool) -> None:
    """Our mask function does not know what the attention will meet."""
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, 5, 8, generator=random) for _ in range(3))
    mask = hf._as_mask(torch.tensor([5, 2]), hf._CAUSAL if causal else hf._EVERYBODY)
    module = torch.nn.Module()
    exact, _ = hf._attention(True, module, query, key, value, mask, scaling=0.5)
    dense, _ = hf._attention(False, module, query, key, value, mask, scaling=0.5, dropout=1e-12)
    torch.testing.assert_close(exact[0], dense[0])
    torch.testing.assert_close(exact[1, :2], dense[1, :2])
    assert not exact[1, 2:].any()


def test_models_that_may_read_padding_keep_the_dense_mask(caplog: pytest.LogCaptureFixture) -> None:
    siglip = build("siglip")
    with caplog.at_level(logging.INFO, logger="epic_fast"), hf.enable(siglip):
        run("siglip", siglip, batch_for("siglip"))
    assert "model does not read" in caplog.text
    config = tiny_bert().config
    for make in (transformers.BertForQuestionAnswering, transformers.BertForMaskedLM):
        model = make(config).eval()
        batch = batch_for("bert")
        with torch.no_grad():
            wanted = model(**batch)[0]
            with hf.enable(model):
                found = model(**batch)[0]
        everywhere = torch.allclose(found, wanted, atol=1e-6)
        valid = batch["attention_mask"].bool()
        if make is transformers.BertForQuestionAnswering:
            assert everywhere
        else:
            assert not everywhere
            torch.testing.assert_close(found[valid], wanted[valid], rtol=1e-5, atol=1e-5)


def test_right_padding_on_the_users_word_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build("bert"), batch_for("bert")
    wanted = run("bert", model, batch)
    read: list[Tensor] = []
    monkeypatch.setattr(Tensor, "tolist", lambda each: read.append(each))
    monkeypatch.setattr(Tensor, "__bool__", lambda each: read.append(each))
    with hf.enable(model, padding="right", strict=True), torch.no_grad():
        output = model(**batch)
    monkeypatch.undo()
    assert not read
    torch.testing.assert_close(output.pooler_output, wanted["pooler_output"], rtol=1e-5, atol=1e-5)


def test_whole_batches_need_no_lengths(calls: list[dict[str, Any]]) -> None:
    model, batch = build("bert"), batch_for("bert", [12, 12, 12])
    wanted = run("bert", model, batch)
    with hf.enable(model, strict=True):
        torch.testing.assert_close(run("bert", model, batch), wanted, rtol=1e-5, atol=1e-5)
    assert [each["lengths"] for each in calls] == [None] * 3


def implementations(model: Any) -> set[str]:
    return {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}


def test_one_model_and_back_again() -> None:
    """Two models that were built from one configuration object share it; only one of them changes."""
    first = tiny_bert()
    second = transformers.BertModel(first.config).eval()
    assert first.config is second.config
    configs = [module.config for module in first.modules() if hasattr(module, "config")]
    before = copy.deepcopy(first.config.to_dict())
    handle = hf.enable(first)
    assert implementations(first) == {"epic_fast"}
    assert implementations(second) == {"sdpa"}
    handle.restore()
    handle.restore()
    assert all(
        module.config is config
        for module, config in zip((m for m in first.modules() if hasattr(m, "config")), configs, strict=True)
    )
    assert implementations(first) == {"sdpa"}
    assert first.config.to_dict() == before
    with pytest.raises(ZeroDivisionError), hf.enable(first):
        assert 1 / (implementations(first) != {"epic_fast"})
    assert implementations(first) == {"sdpa"}


def test_one_tower() -> None:
    model = build("clip")
    with hf.enable(model.vision_model):
        assert implementations(model.vision_model) == {"epic_fast"}
        assert implementations(model.text_model) == {"sdpa"}


def test_by_transformers_own_means(calls: list[dict[str, Any]]) -> None:
    assert hf.register() == hf.register() == "epic_fast"
    model, batch = build("bert"), batch_for("bert")
    wanted = run("bert", model, batch)
    model.set_attn_implementation("epic_fast")
    torch.testing.assert_close(run("bert", model, batch), wanted, rtol=1e-5, atol=1e-5)
    assert calls
    clip = build("clip")
    clip.set_attn_implementation({"text_config": "sdpa", "vision_config": "epic_fast"})
    assert implementations(clip.vision_model) == {"epic_fast"}
    assert implementations(clip.text_model) == {"sdpa"}
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ours = {key for key in ALL_ATTENTION_FUNCTIONS if key.startswith("epic_fast")}
    assert len(ours) == 4
    assert ours == {key for key in ALL_MASK_ATTENTION_FUNCTIONS if key.startswith("epic_fast")}


def test_what_is_saved_names_no_attention_of_ours(tmp_path: Any) -> None:
    model = build("bert")
    with hf.enable(model):
        model.save_pretrained(tmp_path)
    assert "epic_fast" not in (tmp_path / "config.json").read_text()


def test_checkpointing(calls: list[dict[str, Any]]) -> None:
    """The mask that holds lengths passes through a recomputation like any other."""
    gradients = []
    for checkpointed in (False, True):
        model, batch = build("clip"), batch_for("clip")
        hf.enable(model)
        if checkpointed:
            model.gradient_checkpointing_enable()
            model.train()
        model(**batch).text_embeds.square().sum().backward()
        gradients.append(model.text_model.get_input_embeddings().weight.grad)
    assert len(calls) > 14
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("padding", ["checked", "right"])
def test_compiles_into_one_graph(padding: Any, calls: list[dict[str, Any]]) -> None:
    """Values of a mask are not there to be looked at: lengths on the user's word, else sdpa."""
    model, batch = build("bert"), batch_for("bert")
    wanted = run("bert", model, batch)
    torch._dynamo.reset()
    with hf.enable(model, padding=padding), torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        output = compiled(**batch)
    assert bool(calls) == (padding == "right")
    torch.testing.assert_close(output.pooler_output, wanted["pooler_output"], rtol=1e-5, atol=1e-5)


def test_what_is_no_such_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"wanted a transformers PreTrainedModel, found Linear"):
        hf.enable(torch.nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="padding='left'"):
        hf.enable(tiny_vit(), padding="left")  # pyright: ignore[reportArgumentType]


def test_a_model_with_an_attention_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers only warns there, and the model would go on as before."""
    model = tiny_vit()
    before = implementations(model)
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(ConfigError, match="ViTModel does not take its attention"):
        hf.enable(model)
    assert implementations(model) == before != {"epic_fast"}


def test_importing_it_imports_no_transformers() -> None:
    code = "import sys, epic_fast; epic_fast.hf; print('transformers' in sys.modules, 'triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "False"
    assert epic_fast.hf is hf
