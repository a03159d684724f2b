"""What EpicConfig and wrap refuse, in which words, and how many parameters they make."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import epic_fast
from epic_fast import EpicConfig
from epic_fast.errors import ConfigError
from epic_fast.testing import tiny_clip
from epic_fast.testing.probes import make_batch

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt_length": 257}, "EpicConfig.prompt_length=257; wanted at least 0 and at most 256"),
        ({"prompt_length": -1}, "EpicConfig.prompt_length=-1; wanted at least 0 and at most 256"),
        ({"prompt_length": True}, "EpicConfig.prompt_length=True is a bool; wanted int"),
        ({"prompt_length": 8.0}, "EpicConfig.prompt_length=8.0 is a float; wanted int"),
        ({"prompt_length": "8"}, "EpicConfig.prompt_length='8' is a str; wanted int"),
        ({"prompt_length": None}, "EpicConfig.prompt_length=None is a NoneType; wanted int"),
        ({"num_layer_pairs": 0}, "EpicConfig.num_layer_pairs=0; wanted at least 1"),
        ({"interaction": 1}, "EpicConfig.interaction=1 is a int; wanted bool"),
        ({"temperature": NAN}, "EpicConfig.temperature=nan; wanted a finite number"),
        ({"temperature": INF}, "EpicConfig.temperature=inf; wanted a finite number"),
        ({"temperature": 0}, "EpicConfig.temperature=0.0; wanted more than 0.0"),
        ({"temperature": -0.1}, "EpicConfig.temperature=-0.1; wanted more than 0.0"),
        ({"gate_init": NAN}, "EpicConfig.gate_init=nan; wanted a finite number"),
        ({"gate_init": -INF}, "EpicConfig.gate_init=-inf; wanted a finite number"),
        ({"prompt_init_std": -0.1}, "EpicConfig.prompt_init_std=-0.1; wanted at least 0.0"),
        ({"head_dropout": 1.0}, "EpicConfig.head_dropout=1.0; wanted at least 0.0 and at most 0.99"),
        ({"label_smoothing": -0.5}, "EpicConfig.label_smoothing=-0.5; wanted at least 0.0 and at most 0.99"),
        ({"learn_gates": False}, "EpicConfig.gate_init=0 with learn_gates=False keeps the interaction shut"),
        ({"head_hidden_size": 0}, "EpicConfig.head_hidden_size=0; wanted at least 1"),
        ({"prompt_mask": "causal"}, "EpicConfig.prompt_mask='causal'; wanted one of 'full', 'prefix'"),
        ({"prompt_mask": ["full"]}, "EpicConfig.prompt_mask=['full']; wanted one of 'full', 'prefix'"),
        ({"vision_prompt_init": "x"}, "EpicConfig.vision_prompt_init='x'; wanted one of 'projected', 'gaussian'"),
        ({"gate": None}, "EpicConfig.gate=None; wanted one of 'scalar', 'channel'"),
        ({"activation": "gelu"}, "EpicConfig.activation='gelu'; wanted one of 'none', 'gelu_layernorm'"),
        ({"feature_norm": "batch"}, "EpicConfig.feature_norm='batch'; wanted one of 'none', 'layer', 'standardize'"),
        ({"head": "deep"}, "EpicConfig.head='deep'; wanted one of 'linear', 'mlp'"),
        ({"layer_pairs": []}, "EpicConfig.layer_pairs is empty; wanted at least one"),
        ({"layer_pairs": [(1, 2, 3)]}, "EpicConfig.layer_pairs has the entry (1, 2, 3); wanted pairs"),
        ({"layer_pairs": [(1, 2.0)]}, "EpicConfig.layer_pairs has the entry (1, 2.0); wanted pairs"),
        ({"layer_pairs": [(True, 2)]}, "EpicConfig.layer_pairs has the entry (True, 2); wanted pairs"),
        ({"layer_pairs": (1, 2)}, "EpicConfig.layer_pairs has the entry 1; wanted pairs"),
        ({"layer_pairs": 5}, "EpicConfig.layer_pairs=5; wanted a list of (text layer, vision layer)"),
        ({"layer_pairs": "last"}, "EpicConfig.layer_pairs='last'; wanted a list of (text layer, vision layer)"),
    ],
)
def test_bad_values_say_what_was_given_and_wanted(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EpicConfig(**fields)
    assert said in str(caught.value)


def test_integers_are_taken_for_numbers() -> None:
    config = EpicConfig(temperature=1, gate_init=0)
    assert (config.temperature, type(config.temperature), type(config.gate_init)) == (1.0, float, float)


def test_layer_pairs_out_of_range_in_the_words_of_the_design() -> None:
    with pytest.raises(ConfigError) as caught:
        EpicConfig(layer_pairs=[(3, 3), (14, 20)]).resolve_layer_pairs(12, 24)
    assert str(caught.value) == "EpicConfig.layer_pairs names text layer 14, but this text tower has 12 (0..11)"
    for pair, said in (
        ((2, 4), "names vision layer 4, but this vision tower has 4 (0..3)"),
        ((-1, 2), "names text layer -1, but this text tower has 3 (0..2)"),
    ):
        clip = tiny_clip()
        with pytest.raises(ConfigError) as caught:
            epic_fast.wrap(clip, EpicConfig(layer_pairs=[pair]))
        assert said in str(caught.value)
        assert all(each.requires_grad for each in clip.parameters())


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([(1, 2), (1, 3)], "text layer 1 after 1; wanted pairs that rise in both towers"),
        ([(0, 2), (1, 2)], "vision layer 2 after 2; wanted pairs that rise in both towers"),
        ([(0, 3), (1, 2)], "vision layer 2 after 3"),
        ([(2, 0), (1, 2)], "text layer 1 after 2"),
    ],
)
def test_layer_pairs_must_rise(pairs: list[tuple[int, int]], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EpicConfig(layer_pairs=pairs).resolve_layer_pairs(3, 4)
    assert said in str(caught.value)


def test_the_default_pairs_are_the_last_six_one_to_one() -> None:
    wanted = [(6 + step, 18 + step) for step in range(6)]
    assert EpicConfig().resolve_layer_pairs(12, 24) == wanted
    assert EpicConfig(num_layer_pairs=2).resolve_layer_pairs(12, 24) == wanted[-2:]
    assert EpicConfig().resolve_layer_pairs(3, 8) == [(0, 5), (1, 6), (2, 7)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_labels": 1}, "num_labels=1; wanted an integer of at least 2 for single_label_classification"),
        ({"num_labels": 0, "problem_type": "regression"}, "num_labels=0; wanted an integer of at least 1"),
        ({"num_labels": 2.0}, "num_labels=2.0; wanted an integer"),
        ({"num_labels": True, "problem_type": "regression"}, "num_labels=True; wanted an integer"),
        ({"problem_type": "classification"}, "problem_type='classification'; wanted one of 'single_label"),
        ({"labels": ["a", "b", "c"]}, "3 label names were given for num_labels=2; wanted one a label"),
        ({"labels": "ab"}, "labels='ab'; wanted a list of 2 names"),
        ({"labels": ["a", "a"]}, "label names are given twice: 'a'"),
        ({"pos_weight": [1.0, 2.0]}, "belongs to 'multi_label_classification'"),
        ({"pos_weight": "balanced", "problem_type": "multi_label_classification"}, "pos_weight='balanced'; wanted 2"),
        ({"pos_weight": [1.0], "problem_type": "multi_label_classification"}, "pos_weight has shape (1,); wanted (2,)"),
        ({"config": {"prompt_length": 3}}, "config is a dict; wanted one of EpicConfig"),
        (
            {"config": EpicConfig(label_smoothing=0.1), "problem_type": "multi_label_classification"},
            "label_smoothing=0.1 with problem_type='multi_label_classification'",
        ),
        ({"config": EpicConfig(text_head_input="cls")}, "asks for 'cls'; this text tower has pooled, mean, projected"),
        ({"config": EpicConfig(vision_head_input="pooled+eos")}, "EpicConfig.vision_head_input='pooled+eos' asks for"),
    ],
)
def test_a_task_that_does_not_fit(arguments: dict[str, Any], said: str) -> None:
    clip = tiny_clip().train()
    with pytest.raises(ConfigError) as caught:
        epic_fast.wrap(clip, **{"num_labels": 2, **arguments})
    assert said in str(caught.value)
    assert all(each.requires_grad for each in clip.parameters())
    assert all(module.training for module in clip.modules())


def test_the_parameter_budget_of_clip_vit_l_14() -> None:
    """methods.md 1.2: 1,574,656 + 6,144 + the head, and one gate a modality and step, and the temperature."""
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = CLIPConfig(text_config=text, vision_config={**vision, "patch_size": 14}, projection_dim=768)
    with torch.device("meta"):
        clip = CLIPModel(config)
        for outputs, head in ((101, 181_093), (23, 41_239), (3, 5_379)):
            model = epic_fast.wrap(clip, EpicConfig(), num_labels=outputs, self_check=False)
            trainable, total = model.get_nb_trainable_parameters()
            gates = sum(each.numel() for each in model.parameter_groups()["gates"])
            assert gates == 2 * 5 + 1
            assert trainable - gates == 1_574_656 + 6_144 + head
            assert total - trainable == sum(each.numel() for each in clip.parameters()) == 427_616_513
            assert sum(each.numel() for each in model.parameter_groups()["prompts"]) == 6_144
            assert sum(each.numel() for each in model.parameter_groups()["projections"]) == 1_574_656
            model.unwrap()


def test_summary_says_where_the_prompts_are(capsys: pytest.CaptureFixture[str]) -> None:
    model = epic_fast.wrap(tiny_clip(), EpicConfig(prompt_length=2, layer_pairs=[(1, 1), (2, 3)]), num_labels=3)
    summary = model.summary().splitlines()
    assert "text tower: 3 layers, width 32" in summary
    assert "  layer  0  extraction, no graph" in summary
    assert "  layer  1  interaction 0: 2 prompts, then the hub" in summary
    assert "  layer  2  extraction" in summary
    assert "  layer  3  interaction 1: 2 prompts" in summary
    assert "  text_prompt  (2, 32)" in summary
    model.print_trainable_parameters()
    trainable, total = model.get_nb_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable parameters: {trainable:,} of {total:,} (")
    assert set(model.diagnostics()) == {"temperature", "text_gate/0", "vision_gate/0"}


def test_a_model_asks_for_its_statistics_once() -> None:
    model = epic_fast.wrap(tiny_clip(), EpicConfig(prompt_length=2, feature_norm="standardize"), num_labels=3)
    assert model.needs_feature_statistics
    batch = make_batch([8, 5, 6])
    rows = [{name: each[part] for name, each in batch.items()} for part in (slice(0, 2), slice(2, 3))]
    model.fit_feature_statistics([{**row, "labels": torch.zeros(1)} for row in rows])
    assert not model.needs_feature_statistics
    normed = model.head.norm(model.features(model.extract(**batch)))
    assert normed.mean(0).abs().max() < 1e-3
    by_prefix = epic_fast.wrap(tiny_clip(), model.config, num_labels=3)
    by_prefix.load_state_dict({**model.state_dict(), "head.norm.fitted": torch.tensor(False)})
    assert by_prefix.needs_feature_statistics
    by_prefix.fit_feature_statistics([{"prefix": model.extract(**batch)}])
    assert torch.allclose(by_prefix.head.norm.mean, model.head.norm.mean, atol=1e-5)


def test_training_without_the_statistics_it_needs_says_so():
    config = EpicConfig(num_layer_pairs=2, feature_norm="standardize")
    model = epic_fast.wrap(tiny_clip(), config, num_labels=3).train()
    batch = make_batch([5, 7])
    with pytest.raises(ConfigError, match=r"fit_feature_statistics\(batches\) before the first step"):
        model(**batch, labels=torch.tensor([0, 1]))
    model.fit_feature_statistics([batch])
    assert model(**batch, labels=torch.tensor([0, 1])).loss.isfinite()
