"""MoPE: its equations, what it trains, and that samples do not notice each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import epic_fast
from epic_fast import MopeConfig
from epic_fast.backbones import load_backbone, stages_of
from epic_fast.errors import AdapterError, ConfigError
from epic_fast.testing import tiny_bert, tiny_clip, tiny_swin, tiny_vit
from epic_fast.testing.probes import lively, make_batch, perturb

BACKBONES: dict[str, Callable[[], Any]] = {
    "swin+bert": lambda: lively((tiny_swin(depths=(2, 3)), tiny_bert())),
    "vit+bert": lambda: lively((tiny_vit(), tiny_bert())),
    "clip": lambda: lively(tiny_clip()),
}
SMALL: dict[str, Any] = {"num_experts": 3, "prompt_length": 2, "complement_prompt_length": 2, "router_noise_std": 0.0}


def make(backbone: Any = "swin+bert", *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    backbone = BACKBONES[backbone]() if isinstance(backbone, str) else backbone
    torch.manual_seed(0)
    model = epic_fast.wrap(backbone, MopeConfig(**{**SMALL, **options}), num_labels=4).eval()
    return perturb(model).to(dtype)


def rows(batch: dict[str, Tensor], index: Any) -> dict[str, Tensor]:
    return {name: tensor[index] for name, tensor in batch.items()}


# -- the frozen towers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("modality", ["text_to_vision", "vision_to_text"])
@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_without_prompts_the_frozen_towers_and_a_head(name: str, modality: str, attention: str) -> None:
    backbone = BACKBONES[name]()
    for model in backbone if isinstance(backbone, tuple) else (backbone,):
        model.set_attn_implementation(attention)
    vision, text = backbone if isinstance(backbone, tuple) else (backbone.vision_model, backbone.text_model)
    batch = make_batch([9, 4, 7])
    of_vision = vision(batch["pixel_values"])
    of_text = text(batch["input_ids"], batch["attention_mask"])
    pooled = [
        each.last_hidden_state[:, 0] if each.pooler_output is None else each.pooler_output
        for each in (of_vision, of_text)
    ]
    if modality == "vision_to_text":
        pooled.reverse()
    model = make(
        backbone,
        modality=modality,
        prompt_length=0,
        complement_prompt_length=0,
        head_input="pooled",
        head_reads_complement=True,
        complement_feature="pooled",
    )
    head = model.head.classifier[-1]
    assert torch.equal(model(**batch).logits, nn.functional.linear(torch.cat(pooled, dim=1), head.weight, head.bias))
    assert {each for each, _ in model.trainable_parameters()} == {"head.classifier.1.weight", "head.classifier.1.bias"}
    # The mean over all rows is the same thing for a Swin, and that of the valid rows for a text.
    model = make(backbone, modality=modality, prompt_length=0)
    head = model.head.classifier[-1]
    if modality == "vision_to_text":
        weight = batch["attention_mask"][:, :, None].float()
        wanted = (of_text.last_hidden_state * weight).sum(dim=1) / weight.sum(dim=1)
    elif name == "swin+bert":
        wanted = of_vision.pooler_output
    else:
        hidden = of_vision.last_hidden_state
        wanted = (vision.post_layernorm(hidden) if name == "clip" else hidden).mean(dim=1)
    found = model(**batch).logits
    torch.testing.assert_close(found, nn.functional.linear(wanted, head.weight, head.bias), rtol=1e-6, atol=2e-6)


# -- the equations --------------------------------------------------------------------------------------------


def by_hand(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """As the module's docstring has it, a sample at a time; layers on [prompts ; tokens] are the towers' own."""
    config = model.config
    towers = model.backbone.vision, model.backbone.text
    main, complement = towers if config.modality == "text_to_vision" else towers[::-1]

    def start(tower: Any) -> Any:
        if tower.modality == "vision":
            return tower.start(batch["pixel_values"])
        return tower.start(batch["input_ids"], batch["attention_mask"])

    count = len(batch["input_ids"])
    state = start(complement)
    for layer in range(complement.num_layers):
        own = model.complement_prompts[layer].expand(count, -1, -1)
        state, _ = complement.run_prompted(state, layer, own, "full")
    other = complement.features(state, model.complement_feature)
    mapper, router = model.mapper, model.router
    hidden = nn.functional.gelu((mapper.trunk(other)) * mapper.scale + mapper.shift)
    stages = stages_of(main)
    mapped = [nn.functional.gelu(each(hidden)).unflatten(1, (config.mapped_prompts, -1)) for each in mapper.projections]

    state = start(main)
    prompts = model.input_prompts.expand(count, -1, -1)
    block, every = 0, []
    size = config.router_complement_size
    for number, stage in enumerate(stages):
        for layer in range(stage.start, stage.stop):
            if layer > stage.start:
                pooled = []
                for sample in range(count):
                    tokens = state.hidden[sample]
                    tokens = tokens if state.valid is None else tokens[state.valid[sample]]
                    pooled.append(torch.cat([prompts[sample], tokens]).mean(dim=0))
                projected = nn.functional.linear(
                    other, router.other.weight[block * size :][:size], router.other.bias[block * size :][:size]
                )
                query = projected
                if config.router == "multimodal":
                    query = torch.cat([router.own[block](torch.stack(pooled)), projected], dim=1)
                scores = (query @ router.embeddings[block] / config.temperature).softmax(dim=1)
                experts = model.experts[block]
                dynamic = sum(
                    scores[:, expert, None, None] * experts.experts[expert] for expert in range(config.num_experts)
                )
                prompts = torch.cat([experts.static.expand(count, -1, -1), dynamic, mapped[number]], dim=1)
                every.append(scores)
                block += 1
            state, prompts = main.run_prompted(state, layer, prompts, "full")
    features = []
    for sample in range(count):
        tokens = state.hidden[sample]
        tokens = tokens if state.valid is None else tokens[state.valid[sample]]
        features.append(main.normalise(torch.cat([prompts[sample], tokens])).mean(dim=0))
    return model.head(torch.stack(features)), every


@pytest.mark.parametrize("router", ["multimodal", "complement"])
@pytest.mark.parametrize("modality", ["text_to_vision", "vision_to_text"])
@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_the_equations(name: str, modality: str, router: str) -> None:
    model = make(name, modality=modality, router=router, mapped_prompts=2, temperature=2.0).double()
    batch = make_batch([9, 4, 7], dtype=torch.float64)
    wanted, scores = by_hand(model, batch)
    torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-9, atol=1e-9)
    found = model.routing(**batch)
    assert list(found) == list(model.routed)
    for one, other in zip(found.values(), scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        assert float(one.std(dim=0).min()) > 1e-4


def test_vision_to_text_takes_a_swins_prompts_layer_by_layer() -> None:
    model = make("swin+bert", modality="vision_to_text")
    assert [each.shape[1] for each in model.complement_prompts] == [16, 16, 32, 32, 32]
    assert model.complement_feature == "pooled"


# -- samples among themselves ---------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", ["plain", "fused"])
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("modality", ["text_to_vision", "vision_to_text"])
@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_a_sample_does_not_notice_its_batch(name: str, modality: str, top_k: int | None, blocks: str) -> None:
    """The pairing of the released code, which gives windows the prompts of other samples, fails here."""
    model = make(name, modality=modality, top_k=top_k, temperature=2.0).double()
    model.engine = epic_fast.EngineConfig(blocks=blocks)
    batch = make_batch([9, 4, 7, 5], dtype=torch.float64)
    logits = model(**batch).logits
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(**rows(batch, order)).logits, logits[order], rtol=1e-9, atol=1e-9)
    for sample in range(4):
        alone = model(**rows(batch, slice(sample, sample + 1))).logits
        torch.testing.assert_close(alone, logits[sample : sample + 1], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_window_major_prompts_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: with the released code's pairing a sample's logits depend on its neighbours."""
    from epic_fast.engine import windows

    right = windows.functional.window_prompt_attention

    def authors(query: Tensor, key: Tensor, value: Tensor, *prompts: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        count = len(query) // len(prompts[0])
        mask = options.pop("window_mask", None)
        if mask is not None:
            mask = mask.repeat(len(prompts[0]), 1, 1)
        spread = [each.repeat(count, 1, 1, 1) for each in prompts]
        each, of_prompts = right(query, key, value, *spread, **options)
        if mask is not None:
            parts = [
                right(
                    *(whole[at : at + 1] for whole in (query, key, value, *spread)),
                    window_mask=mask[at : at + 1],
                    **options,
                )
                for at in range(len(query))
            ]
            each, of_prompts = (torch.cat(part) for part in zip(*parts, strict=True))
        return each, of_prompts.unflatten(0, (len(prompts[0]), count)).mean(dim=1)

    model = make(temperature=2.0).double()
    batch = make_batch([9, 4, 7], dtype=torch.float64)
    with monkeypatch.context() as patched:
        patched.setattr(windows.functional, "window_prompt_attention", authors)
        wrong = model(**batch).logits
        alone = model(**rows(batch, slice(0, 1))).logits
    torch.testing.assert_close(alone, model(**rows(batch, slice(0, 1))).logits, rtol=1e-9, atol=1e-9)
    assert float((wrong[:1] - alone).abs().max()) > 1e-3


@torch.no_grad()
def test_pictures_of_other_sizes() -> None:
    model = make("swin+bert")
    batch = make_batch([9, 4])
    for size in ((40, 36), (33, 47), (64, 64)):
        pictures = torch.randn(2, 3, *size)
        logits = model(**{**batch, "pixel_values": pictures}).logits
        alone = model(**{**rows(batch, slice(1)), "pixel_values": pictures[:1]}).logits
        torch.testing.assert_close(alone, logits[:1], rtol=1e-4, atol=1e-4)


# -- what is trained ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "static_and_experts"), [(4, 360_960), (16, 1_227_264)])
@pytest.mark.parametrize(("labels", "head"), [(101, 103_525), (23, 23_575), (3, 3_075)])
def test_counts_of_swin_b_and_bert_base(experts: int, static_and_experts: int, labels: int, head: int) -> None:
    """The released code's counts, less what it allocates for the first block of each stage and never uses."""
    from transformers import BertConfig, BertModel, SwinConfig, SwinModel

    with torch.device("meta"):
        swin = SwinModel(SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]))
        bert = BertModel(BertConfig())
    model = epic_fast.wrap((swin, bert), MopeConfig(num_experts=experts), num_labels=labels, self_check=False)
    sizes: dict[str, int] = {}
    for name, parameter in model.trainable_parameters():
        part = name.split(".")[0]
        sizes[part] = sizes.get(part, 0) + parameter.numel()
    unused_slots = (experts + 1) * 6 * (128 + 256 + 512 + 1024)
    unused_projections = 2 * (128 + 256 + 512 + 1024) + 4 * 8 * 768 + 4 * (2 + 8)
    assert sizes == {
        "experts": static_and_experts - unused_slots,
        "router": 171_760 - unused_projections,
        "mapper": 296_064 + 739_200,
        "input_prompts": 1_664,
        "complement_prompts": 36_864,
        "head": head,
    }
    assert unused_slots == {4: 57_600, 16: 195_840}[experts]
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(sizes.values())
    assert 0.007 < trainable / total < 0.013
    assert float(model._init_range()) == pytest.approx((6 / (3 * 16 + 128)) ** 0.5)


@pytest.mark.parametrize("modality", ["text_to_vision", "vision_to_text"])
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_experts": 1},
        {"top_k": 2},
        {"route_first_block": True},
        {"mapped_prompts": 0, "head_input": "pooled+prompts"},
        {"static_prompts": False},
        {"dynamic_prompts": False, "importance_weight": 0.0},
        {"first_layer": 1, "complement_first_layer": 2, "router": "complement"},
        {"complement_prompt_length": 0, "head_reads_complement": True},
        {"num_experts": 1, "mapped_prompts": 0},
    ],
    ids=lambda each: ",".join(each) or "default",
)
def test_every_trainable_tensor_gets_a_gradient_and_no_other(name: str, modality: str, options: dict[str, Any]) -> None:
    model = make(name, modality=modality, importance_threshold=0.0, temperature=2.0, **{**options}).train()
    batch = make_batch([9, 4, 7])
    model(**batch, labels=torch.tensor([0, 1, 2])).loss.backward()
    for each, parameter in model.trainable_parameters():
        assert parameter.grad is not None, each
        assert parameter.grad.isfinite().all(), each
        assert parameter.grad.abs().max() > 0, each
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    groups = model.parameter_groups()
    grouped = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for _, parameter in model.trainable_parameters())
    summary = model.summary()
    assert f"{model.config.rows} prompts" in summary


@pytest.mark.parametrize(
    "options",
    [{"num_experts": 1}, {"num_experts": 2, "top_k": 2}, {"top_k": 1}, {"temperature": 1e-3}, {}],
    ids=lambda each: ",".join(each) or "default",
)
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_edges_are_finite(options: dict[str, Any], equal: bool, batch_size: int) -> None:
    model = make(importance_threshold=0.0, **options).train()
    if equal and model.router is not None:
        model.router.embeddings.zero_()
    batch = rows(make_batch([9, 4, 7]), slice(batch_size))
    loss = model(**batch, labels=torch.arange(batch_size)).loss
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for _, parameter in model.trainable_parameters())


def test_experts_that_nobody_takes_have_gradient_zero() -> None:
    model = make(top_k=1, importance_weight=0.0).train()
    with torch.no_grad():
        model.router.embeddings.zero_()  # a tie everywhere: all take the first
    model(**make_batch([9, 4]), labels=torch.tensor([0, 1])).loss.backward()
    for experts in model.experts:
        assert torch.equal(experts.experts.grad[1:], torch.zeros_like(experts.experts.grad[1:]))
        assert experts.experts.grad[0].abs().max() > 0


# -- loss, noise, dropout -------------------------------------------------------------------------------------


def test_the_importance_loss_counts_in_training_only() -> None:
    batch, labels = make_batch([9, 4, 7]), torch.tensor([0, 1, 2])
    options = {"prompt_dropout": 0.0, "importance_threshold": 0.0}
    model, plain = make(**options, importance_weight=0.5), make(**options, importance_weight=0.0)
    assert torch.equal(model(**batch, labels=labels).loss, plain(**batch, labels=labels).loss)
    found = model.train()(**batch, labels=labels).loss - plain.train()(**batch, labels=labels).loss
    importance = torch.stack([scores.sum(dim=0) for scores in model.eval().routing(**batch).values()])
    wanted = 0.5 * (importance.std(dim=1) / importance.mean(dim=1)).square().mean()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


def test_evaluation_is_deterministic_and_training_is_not() -> None:
    batch = make_batch([9, 4, 7])
    for options in ({"prompt_dropout": 0.5}, {"prompt_dropout": 0.0, "router_noise_std": 0.5}):
        model = make(**options)
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, model(**batch).logits)
            model.train()
            assert not torch.equal(model(**batch).logits, model(**batch).logits)


def test_diagnostics_follow_the_routing() -> None:
    model = make(top_k=1)
    assert model.diagnostics()["expert_load/1/0"] == pytest.approx(1 / 3)
    with torch.no_grad():
        model.router.embeddings.zero_()
    model.train()
    for _ in range(40):
        model(**make_batch([9, 4]), labels=torch.tensor([0, 1]))
    found = model.diagnostics()
    assert set(found) == {
        f"{kind}/{layer}{rest}"
        for layer in (1, 3, 4)
        for kind, ends in (("routing_entropy", [""]), ("expert_load", ["/0", "/1", "/2"]))
        for rest in ends
    }
    assert found["expert_load/4/0"] > 0.8
    assert found["routing_entropy/4"] < 0.2
    assert make(num_experts=1).diagnostics() == {}


# -- saving, prefixes, types ----------------------------------------------------------------------------------


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Any) -> None:
    backbone = BACKBONES["swin+bert"]()
    model = make(backbone, router="complement", top_k=2)
    batch = make_batch([9, 4, 7])
    wanted = model(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    again = epic_fast.from_pretrained(tmp_path / "adapter", backbone=backbone)
    assert again.config == model.config
    assert torch.equal(again(**batch).logits, wanted)
    assert all(one is other for one, other in zip(model.unwrap(), backbone, strict=True))
    with pytest.raises(AdapterError, match="trained on another backbone"):
        epic_fast.from_pretrained(tmp_path / "adapter", backbone=BACKBONES["vit+bert"]())


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({}, (0, 0)),
        ({"first_layer": 2, "complement_first_layer": 1}, (1, 2)),
        ({"complement_prompt_length": 0}, (3, 0)),
        ({"prompt_length": 0}, (0, 5)),
        ({"prompt_length": 0, "head_reads_complement": True, "complement_prompt_length": 0}, (3, 5)),
    ],
)
@torch.no_grad()
def test_a_prefix_gives_the_same(options: dict[str, Any], first: tuple[int, int]) -> None:
    model = make(**options)
    batch = make_batch([9, 4, 7])
    assert model.first_layers() == first
    prefix = model.extract(**batch)
    assert (prefix.text.layer, prefix.vision.layer) == first
    assert torch.equal(model(prefix=prefix).logits, model(**batch).logits)


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_low_precision_is_near(name: str) -> None:
    batch = make_batch([9, 4, 7])
    wanted = make(name, temperature=2.0)(**batch).logits
    model = make(name, temperature=2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float((model(**batch).logits - wanted).abs().max()) < 0.1 * float(wanted.abs().max())
    model.backbone.to(torch.bfloat16)
    found = model(**batch).logits
    assert found.dtype == torch.float32
    assert float((found - wanted).abs().max()) < 0.1 * float(wanted.abs().max())


@pytest.mark.parametrize("modality", ["text_to_vision", "vision_to_text"])
@pytest.mark.parametrize(
    "options",
    [{}, {"head_input": "pooled"}, {"head_input": "pooled+prompts", "first_layer": 1}, {"route_first_block": True}],
    ids=lambda each: ",".join(each) or "default",
)
@pytest.mark.parametrize("name", BACKBONES)
def test_the_engine_gives_the_same(name: str, options: dict[str, Any], modality: str) -> None:
    """Fused blocks run what has no windows; a Swin keeps its own layers."""
    backbone = BACKBONES[name]()
    batch = make_batch([9, 4, 7])
    models = []
    for engine in (None, epic_fast.EngineConfig(blocks="fused")):
        torch.manual_seed(0)
        config = MopeConfig(**{**SMALL, "temperature": 2.0, "modality": modality, **options})
        models.append(epic_fast.wrap(backbone, config, num_labels=4, engine=engine).eval())
    plain, fused = models
    prefix = fused.extract(**batch)
    state = prefix.vision if modality == "text_to_vision" else prefix.text
    packed = fused._packed(state, torch.zeros(3, fused.config.rows, state.hidden.shape[2]))
    assert (packed is None) == (fused.main.config.model_type == "swin")
    torch.testing.assert_close(fused(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-5)
    found, wanted = fused.routing(**batch), plain.routing(**batch)
    assert list(found) == list(wanted)
    for layer in wanted:
        torch.testing.assert_close(found[layer], wanted[layer], rtol=1e-4, atol=1e-5)
    for model in models:
        model(**batch, labels=torch.tensor([0, 1, 2])).loss.backward()
    for (each, one), (_, other) in zip(fused.trainable_parameters(), plain.trainable_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5, msg=each)


def test_it_learns() -> None:
    model = make(importance_threshold=0.0, prompt_dropout=0.0).train()
    batch, labels = make_batch([9, 4, 7, 5]), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.AdamW([each for _, each in model.trainable_parameters()], lr=2e-2)
    losses = []
    for _ in range(30):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


# -- configuration --------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_released_code() -> None:
    config = MopeConfig()
    assert (config.num_experts, config.prompt_length, config.complement_prompt_length, config.rows) == (4, 6, 4, 13)
    assert (config.router_main_size, config.router_complement_size, config.temperature) == (2, 8, 0.1)
    assert (config.router_noise_std, config.importance_weight, config.importance_threshold) == (1 / 256, 0.01, 0.1)
    assert (config.prompt_dropout, config.complement_prompt_init_range, config.mapped_prompts) == (0.1, 0.3, 1)
    assert MopeConfig.from_dict(config.to_dict()) == config
    assert MopeConfig(prompt_init_range=1).prompt_init_range == 1.0


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "modality": ({"modality": "audio"}, "modality='audio'; wanted one of 'text_to_vision', 'vision_to_text'"),
    "router": ({"router": "both"}, "router='both'; wanted one of"),
    "no experts": ({"num_experts": 0}, "num_experts=0; wanted at least 1"),
    "top_k": ({"top_k": 5}, "top_k=5; wanted at least 1 and at most 4"),
    "top_k type": ({"top_k": 1.5}, "top_k=1.5 is a float; wanted int, or None"),
    "temperature": ({"temperature": 0.0}, r"temperature=0\.0; wanted more than"),
    "noise": ({"router_noise_std": -0.1}, r"router_noise_std=-0\.1; wanted at least 0"),
    "init": ({"prompt_init_range": "wide"}, "prompt_init_range='wide' is a str; wanted float"),
    "rows": ({"prompt_length": 200}, "prompt_length=200 and .* make 401 prompt rows; wanted at most 256"),
    "nothing": (
        {"static_prompts": False, "dynamic_prompts": False, "mapped_prompts": 0},
        "prompt_length=6, but .* are all off; wanted one of them, or prompt_length=0",
    ),
    "first layer": ({"first_layer": 5}, r"first_layer=5, but this vision tower has 5 layers \(0\.\.4\)"),
    "complement": ({"complement_first_layer": 3}, r"complement_first_layer=3, but this text tower has 3 layers"),
    "feature": ({"complement_feature": "clss"}, r"complement_feature='clss' asks for 'clss'; .* pooled, mean, cls"),
    "head": ({"head_input": "rows+cls"}, r"head_input='rows\+cls' asks for 'cls'; .* rows, prompts, pooled, mean"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_say_what_was_wanted(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ConfigError, match=rf"^MopeConfig\.{message}"):
        epic_fast.wrap(load_backbone((tiny_swin(depths=(2, 3)), tiny_bert())), MopeConfig(**options), num_labels=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin+bert", "vit+bert"])
def test_compiles_into_one_graph_that_serves_every_batch(name: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model = make(name).train()
    model.prompt_dropout.p = model.mapper.dropout.p = 0.0
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for lengths in ([9, 4, 7], [9, 8], [9, 4, 5, 6]):
        batch, labels = make_batch(lengths), torch.zeros(len(lengths), dtype=torch.long)
        found, wanted = compiled(**batch, labels=labels), model(**batch, labels=labels)
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-5, atol=1e-5)
    # The first size, then one more graph in which the size is a symbol.
    assert counter.frame_count <= 2
