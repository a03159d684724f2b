"""The engine's settings on the command line, and ``epic-fast data cache``."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import epic_fast
from epic_fast.cli import main
from epic_fast.cli.settings import engine_for, resolve_settings
from epic_fast.engine import EngineConfig
from epic_fast.errors import ConfigError
from epic_fast.models.base import PromptedModel
from epic_fast.testing import make_folder, tiny_clip

SMALL = ("prompt_length=2", "num_layer_pairs=2", "batch_size=8", "tensorboard=false")
OPTIONS = {"data.path": "data", "backbone": "towers", "output": "run"}


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    tiny_clip(folder / "clip")
    make_folder(folder / "data", train=12, validation=4, test=4)
    return folder


@pytest.fixture
def extracted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples that go through the layers below the prompts, a number a batch."""
    seen: list[int] = []
    extract = PromptedModel.extract

    def counting(self: Any, *args: Any, **inputs: Any) -> Any:
        seen.append(len(args[0] if args else inputs["pixel_values"]))
        return extract(self, *args, **inputs)

    monkeypatch.setattr(PromptedModel, "extract", counting)
    return seen


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def ask(*arguments: object) -> Any:
        capsys.readouterr()
        assert run(*arguments, "--json") == 0
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        return json.loads(out)

    return ask


def train_arguments(here: Path, output: Path, *more: object) -> tuple[object, ...]:
    where = ("--data", here / "data", "--backbone", here / "clip", "--output", output, "--epochs", 2)
    return ("train", *where, *SMALL, *more)


# -- settings ------------------------------------------------------------------------------------------------------


def test_the_engine_is_a_section_like_the_others(tmp_path: Path) -> None:
    plain = resolve_settings(options=OPTIONS)
    assert plain.engine is None
    assert yaml.safe_load(plain.to_yaml())["engine"] is None
    file = tmp_path / "c.yaml"
    file.write_text("engine: {blocks: fused, graphs: true}\n")
    settings = resolve_settings(
        config_file=file, options=OPTIONS, overrides=["engine.graphs=false", "prefix_cache=memory"]
    )
    assert settings.engine == EngineConfig(blocks="fused", prefix_cache="memory").to_dict()
    again = resolve_settings(options={}, base=yaml.safe_load(settings.to_yaml()))
    assert again.engine == settings.engine
    off = resolve_settings(options={}, overrides=["engine=false"], base=yaml.safe_load(settings.to_yaml()))
    assert off.engine is False
    on = resolve_settings(options={}, overrides=["engine.graphs=true"], base=yaml.safe_load(off.to_yaml()))
    assert on.engine == EngineConfig(graphs=True).to_dict()


def test_runs_from_before_the_engine_can_be_resumed() -> None:
    values = yaml.safe_load(resolve_settings(options=OPTIONS).to_yaml())
    del values["engine"]
    assert resolve_settings(options={}, base=values).engine is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engine.block=fused", r"did you mean 'engine\.blocks'\?"),
        ("engine.blocks=fast", r"section engine: EngineConfig\.blocks='fast'; wanted one of"),
        ("engine.graphs=maybe", r"EngineConfig\.graphs='maybe'; wanted true or false"),
        ("engine=fast", "engine='fast'; wanted false, or settings such as"),
        ("engine=true", "engine=True; wanted false, or settings such as"),
    ],
)
def test_wrong_engine_settings_are_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve_settings(options=OPTIONS, overrides=[override])


def test_all_exact_parts_on_a_gpu_and_none_on_a_cpu() -> None:
    assert engine_for(None, gpu=True) == EngineConfig()
    assert engine_for(None, gpu=False) is None
    assert engine_for(False, gpu=True) is None
    assert engine_for({"graphs": True}, gpu=False) == EngineConfig(graphs=True)


# -- commands ------------------------------------------------------------------------------------------------------


def test_a_cache_made_ahead_serves_the_training(
    here: Path, tmp_path: Path, answer: Callable[..., Any], extracted: list[int]
) -> None:
    plain = answer(*train_arguments(here, tmp_path / "plain"))
    make = ("data", "cache", here / "data", *SMALL, "--backbone", here / "clip", "--output", tmp_path / "cache")
    extracted.clear()
    made = answer(*make)
    assert {name: made[name] for name in ("samples", "computed")} == {"samples": 16, "computed": 16}
    assert sum(extracted) == 16
    assert made["bytes"] == sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert made["cache"] == str(tmp_path / "cache")
    assert answer(*make)["computed"] == 0
    test = answer(*make, "--split", "test")
    assert {name: test[name] for name in ("samples", "computed")} == {"samples": 4, "computed": 4}
    extracted.clear()
    cached = answer(*train_arguments(here, tmp_path / "run", f"engine.prefix_cache={tmp_path / 'cache'}"))
    assert sum(extracted) == 8, "none in training; validation and test are scored at the end"
    for split in ("validation", "test"):
        assert cached[split] == pytest.approx(plain[split], rel=1e-5)
    assert cached["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-5)


def test_a_run_with_an_engine_is_resumed_scored_and_used(
    here: Path, tmp_path: Path, answer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "run"
    first = answer(*train_arguments(here, output, "engine.prefix_cache=cache", "engine.blocks=plain"))
    saved = yaml.safe_load((output / "training.yaml").read_text())
    assert saved["engine"] == EngineConfig(blocks="plain", prefix_cache=str(tmp_path / "cache")).to_dict()
    engines = []
    wrap = epic_fast.models.saving.wrap  # pyright: ignore[reportAttributeAccessIssue]

    def watched(*args: Any, **options: Any) -> Any:
        engines.append(options["engine"])
        return wrap(*args, **options)

    monkeypatch.setattr("epic_fast.models.saving.wrap", watched)
    again = answer("train", "--output", output, "--resume", "auto")
    assert again["train_loss"] == first["train_loss"]
    scores = answer("eval", output, "--data", here / "data")
    assert scores["accuracy"] == first["test"]["accuracy"]
    rows = tmp_path / "rows.jsonl"
    shutil.copy(here / "data" / "0000.png", tmp_path)
    rows.write_text(json.dumps({"file_name": "0000.png", "text": "a red square"}) + "\n")
    assert answer("predict", output, rows, tmp_path / "out.jsonl")["rows"] == 1
    assert engines == [EngineConfig(blocks="plain")] * 2


def test_an_adapter_takes_an_engine_and_does_not_remember_it(here: Path, tmp_path: Path) -> None:
    model = epic_fast.wrap(str(here / "clip"), num_labels=3, engine=EngineConfig(graphs=True))
    model.save_pretrained(tmp_path)
    assert epic_fast.from_pretrained(tmp_path).engine is None
    engine = EngineConfig(save="recompute")
    assert epic_fast.from_pretrained(tmp_path, engine=engine).engine == engine
    assert epic_fast.Classifier.from_pretrained(tmp_path, engine=engine).model.engine == engine


def test_what_cannot_be_cached_says_so(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*arguments: object, code: int) -> str:
        capsys.readouterr()
        assert run("data", "cache", here / "data", *SMALL, "--backbone", here / "clip", *arguments) == code
        return " ".join(capsys.readouterr().err.split())

    assert "no folder was given for the cache; add --output FOLDER" in said(code=2)
    assert "no folder was given" in said("engine.prefix_cache=memory", code=2)
    assert "has no split 'dev'; it has train, validation, test" in said(
        "--output", tmp_path / "cache", "--split", "dev", code=3
    )
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 1000))
    assert "the disk is too small for the prefix cache" in said("--output", tmp_path / "cache", code=4)
    monkeypatch.undo()
    assert said("--output", tmp_path / "cache", code=0) == ""
    assert "first_layers.text was 1, now 2" in said("--output", tmp_path / "cache", "num_layer_pairs=1", code=2)
    assert "is no prefix cache" in said("--output", here / "data", code=2)


def test_an_interrupted_command_says_how_to_go_on(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    extract = PromptedModel.extract
    calls = []

    def interrupted(self: Any, *args: Any, **inputs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return extract(self, *args, **inputs)

    monkeypatch.setattr(PromptedModel, "extract", interrupted)
    make = ("data", "cache", here / "data", *SMALL, "--backbone", here / "clip", "--output", tmp_path / "cache")
    assert run(*make) == 130
    assert "run the same command to finish it" in capsys.readouterr().err
    assert run(*make) == 0
    assert "16 samples, 8 of them computed now" in " ".join(capsys.readouterr().out.split())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
def test_the_cache_on_a_gpu_in_its_own_type(here: Path, tmp_path: Path, answer: Callable[..., Any]) -> None:
    plain = answer(*train_arguments(here, tmp_path / "plain", "precision=bf16", "engine=false"))
    for name, place in (("memory", "memory"), ("disk", tmp_path / "cache"), ("again", tmp_path / "cache")):
        found = answer(
            *train_arguments(here, tmp_path / name, "precision=bf16", "blocks=plain", f"engine.prefix_cache={place}")
        )
        assert found["train_loss"] == pytest.approx(plain["train_loss"], rel=2e-2)
