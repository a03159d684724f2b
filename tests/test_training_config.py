"""TrainingConfig: defaults, checks, files."""

from __future__ import annotations

import json

import pytest

from epic_fast.errors import ConfigError
from epic_fast.training import TrainingConfig


def test_defaults_are_the_documented_ones():
    config = TrainingConfig()
    assert (config.learning_rate, config.head_learning_rate, config.gate_learning_rate) == (1e-3, 5e-4, 1e-2)
    assert (config.weight_decay, config.warmup_ratio, config.max_grad_norm) == (1e-2, 0.05, 1.0)
    assert (config.epochs, config.batch_size, config.precision, config.seed) == (10, 64, "auto", 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", 2.5),
        ("epochs", True),
        ("batch_size", 0),
        ("batch_size", "64"),
        ("eval_batch_size", -1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("head_learning_rate", -1e-3),
        ("gate_learning_rate", float("inf")),
        ("weight_decay", -0.1),
        ("warmup_ratio", 1.5),
        ("max_grad_norm", 0),
        ("precision", "int8"),
        ("seed", -1),
        ("seed", None),
        ("num_workers", -1),
        ("metric", 3),
        ("checkpoint_every_steps", 0),
        ("log_every_steps", 0),
        ("load_best", 1),
        ("device", "tpu"),
        ("learning_rate", "fast"),
        ("learning_rate", True),
    ],
)
def test_values_that_cannot_be_used_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"TrainingConfig\.{name} is .*; wanted "):
        TrainingConfig(**{name: value})


def test_optional_values_may_be_none():
    config = TrainingConfig(eval_batch_size=None, max_grad_norm=None, metric=None, checkpoint_every_steps=None)
    assert config.max_grad_norm is None


def test_unknown_key_names_the_nearest_known_one():
    with pytest.raises(ConfigError, match="no field 'learning_rat'; did you mean 'learning_rate'"):
        TrainingConfig.from_dict({"learning_rat": 1e-3})


def test_round_trip_through_files(tmp_path):
    config = TrainingConfig(epochs=3, learning_rate=2e-3, metric="f1_macro")
    (tmp_path / "a.json").write_text(json.dumps(config.to_dict()))
    assert TrainingConfig.from_file(tmp_path / "a.json") == config
    (tmp_path / "a.yaml").write_text("epochs: 3\nlearning_rate: 2e-3  # text in YAML 1.1\nmetric: f1_macro\n")
    assert TrainingConfig.from_file(tmp_path / "a.yaml") == config
    (tmp_path / "empty.yaml").write_text("")
    assert TrainingConfig.from_file(tmp_path / "empty.yaml") == TrainingConfig()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.yaml", "a: [", "not valid YAML"),
        ("a.yaml", "- 1", "wanted a mapping"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        TrainingConfig.from_file(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot be read"):
        TrainingConfig.from_file(tmp_path / "not_there.yaml")
