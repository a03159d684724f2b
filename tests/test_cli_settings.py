"""Settings of a run: what wins, what is refused, and what is said then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from epic_fast.cli.settings import RunSettings, known_keys, parse_value, resolve_settings
from epic_fast.errors import ConfigError

GIVEN = {"data.path": "d", "backbone": "b", "output": "o"}


def resolve(*overrides: str, config: Path | None = None, **options: Any) -> RunSettings:
    base = options.pop("base", None)
    return resolve_settings(config_file=config, options={**GIVEN, **options}, overrides=overrides, base=base)


def write(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values))
    return path


def test_defaults_are_the_dataclasses_own() -> None:
    from epic_fast.models import EpicConfig
    from epic_fast.training import TrainingConfig

    found = resolve()
    assert found.method == "epic"
    assert found.model == EpicConfig().to_dict()
    assert found.training == TrainingConfig().to_dict()
    assert (found.output, found.backbone, found.data.path, found.data.text_field) == ("o", "b", "d", "text")


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_the_later_wins_file_then_option_then_key_value(tmp_path: Path, suffix: str) -> None:
    values = {"training": {"epochs": 2, "seed": 2, "batch_size": 2, "log_every_steps": 2}}
    base = {
        "backbone": "base",
        "training": {"epochs": 1, "seed": 1, "batch_size": 1, "log_every_steps": 1, "num_workers": 1},
    }
    options = {"training.epochs": 3, "training.seed": 3, "training.batch_size": None}
    found = resolve("epochs=4", config=write(tmp_path / f"c{suffix}", values), base=base, **options).training
    assert found["epochs"] == 4, "key=value comes last"
    assert found["seed"] == 3, "an option beats the file"
    assert found["batch_size"] == 2, "an option that was not given changes nothing"
    assert found["log_every_steps"] == 2, "the file beats what is resumed"
    assert found["num_workers"] == 1, "what is resumed beats the defaults"


def test_a_config_file_may_hold_everything(tmp_path: Path) -> None:
    values = {
        "data": {"path": "pictures", "text_field": "caption"},
        "backbone": "clip",
        "method": "epic",
        "output": "runs/a",
        "model": {"prompt_length": 3, "layer_pairs": [[0, 1], [1, 3]]},
        "training": None,
    }
    found = resolve_settings(config_file=write(tmp_path / "c.yaml", values), options={})
    assert (found.data.path, found.data.text_field, found.backbone, found.output) == (
        "pictures",
        "caption",
        "clip",
        "runs/a",
    )
    assert [list(pair) for pair in found.model["layer_pairs"]] == [[0, 1], [1, 3]]
    short = resolve_settings(config_file=write(tmp_path / "c.yaml", {**values, "data": "elsewhere"}), options={})
    assert short.data.path == "elsewhere"


def test_bare_and_qualified_keys() -> None:
    found = resolve(
        "prompt_length=4", "training.learning_rate=1e-3", "text_field=caption", "layer_pairs=[[0, 0]]", "data=x"
    )
    assert found.model["prompt_length"] == 4
    assert found.training["learning_rate"] == 0.001
    assert (found.data.text_field, found.data.path) == ("caption", "x")
    assert [list(pair) for pair in found.model["layer_pairs"]] == [[0, 0]]


def test_an_ambiguous_key_must_name_its_section(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {**known_keys("epic"), "training": ["epochs", "prompt_length"]}
    monkeypatch.setattr("epic_fast.cli.settings.known_keys", lambda method: keys)
    with pytest.raises(ConfigError, match=r"ambiguous.*model.prompt_length, training.prompt_length"):
        resolve("prompt_length=4")


@pytest.mark.parametrize(
    ("key", "nearest", "listed"),
    [
        ("promt_length", "model.prompt_length", "Section model has prompt_length, layer_pairs"),
        ("model.promt_length", "model.prompt_length", "Section model"),
        ("training.epoch", "training.epochs", "Section training has epochs"),
        ("optimizer.epochs", "training.epochs", "Section training"),
        ("lr", "training.learning_rate", "Section training"),
        ("txt_field", "data.text_field", "Section data"),
        ("ouput", "output", "Top-level keys: data, backbone, method, output"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str, listed: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(f"{key}=4")
    assert f"unknown key {key!r}; did you mean {nearest!r}?" in str(error.value)
    assert listed in str(error.value)


def test_an_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", {"training": {"bach_size": 2}})
    with pytest.raises(
        ConfigError, match=r"c\.yaml: unknown key 'training.bach_size'; did you mean 'training.batch_size'"
    ):
        resolve(config=path)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("epochs", "no key=value"),
        ("=3", "no key=value"),
        ("epochs=ten", "TrainingConfig.epochs is 'ten'"),
        ("epochs=0", "whole number of at least 1"),
        ("prompt_length=9999", "EpicConfig.prompt_length=9999"),
        ("prompt_length=[1", "no YAML"),
        ("prompt_length=1.5", "EpicConfig.prompt_length"),
        ("method=nope", "the method 'nope' is unknown"),
        ("text_field=", "data.text_field"),
    ],
)
def test_bad_values_are_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(override)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not exist"),
        ("a: [", "neither YAML nor JSON"),
        ("- 1", "wanted a mapping"),
        ("training: 3", "keys and values"),
    ],
)
def test_bad_config_files_are_refused(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        resolve(config=path)


@pytest.mark.parametrize(
    ("left_out", "said"), [("data.path", "no data"), ("backbone", "no backbone"), ("output", "no output")]
)
def test_what_must_be_given(left_out: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(**{left_out: None})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("5E4", 5e4),
        ("-.5e-2", -0.005),
        ("3", 3),
        ("null", None),
        ("", None),
        ("true", True),
        ("a.b", "a.b"),
    ],
)
def test_values_are_read_as_people_write_them(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_the_saved_settings_are_a_config_file_with_the_same_meaning(tmp_path: Path) -> None:
    settings = resolve("layer_pairs=[[0, 1]]", "learning_rate=1e-5", "pos_weight=auto", "skip_bad=true")
    (tmp_path / "training.yaml").write_text(settings.to_yaml())
    again = resolve_settings(config_file=tmp_path / "training.yaml", options={})
    assert again.to_yaml() == settings.to_yaml()
    assert again.training == settings.training
