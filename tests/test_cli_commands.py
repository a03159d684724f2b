"""The commands from end to end, on tiny towers and tiny pictures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from epic_fast.cli import main
from epic_fast.testing import make_folder, tiny_clip

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("prompt_length=2", "num_layer_pairs=2", "batch_size=8", "tensorboard=false")


def epic_fast(*arguments: object) -> int:
    """Run a command in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``clip``, ``data``, ``multi`` and the trained ``run``."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_clip(folder / "clip")
    make_folder(folder / "data")
    make_folder(folder / "multi", multi_label=True)
    assert train(folder, folder / "run", "head_learning_rate=0.05", epochs=3) == 0
    return folder


def train(here: Path, run: Path, *more: object, epochs: int = 1, data: str = "data") -> int:
    where = ("--data", here / data, "--backbone", here / "clip", "--method", "epic", "--output", run)
    return epic_fast("train", *where, "--epochs", epochs, *SMALL, *more)


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command with ``--json``; the one JSON object that is all of its stdout."""

    def run(*arguments: object) -> Any:
        capsys.readouterr()
        assert epic_fast(*arguments, "--json") == 0
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    return run


def test_help_needs_no_heavy_library() -> None:
    """`epic-fast --help` is quick because nothing heavy is imported for it."""
    program = """
import sys
from epic_fast.cli import main
try:
    main(["train", "--help"])
except SystemExit as ended:
    assert not ended.code
heavy = {"torch", "numpy", "transformers", "accelerate", "matplotlib", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True)


def test_python_dash_m() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "epic_fast", "--help"], check=True, cwd=ROOT, capture_output=True, text=True
    )
    for command in ("demo", "train", "eval", "predict", "data", "plot", "native", "doctor"):
        assert command in found.stdout


@pytest.mark.parametrize(
    "command",
    [
        "",
        "demo",
        "train",
        "eval",
        "predict",
        "data",
        "data check",
        "plot",
        "plot curves",
        "plot confusion",
        "plot sheet",
        "plot routing",
        "native",
    ],
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert epic_fast(*command.split(), "--help") == 0
    assert "Usage" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import epic_fast as package

    assert epic_fast("--version") == 0
    assert package.__version__ in capsys.readouterr().out


def test_train_writes_a_run_folder(here: Path) -> None:
    run = here / "run"
    wanted = {"config.json", "model.safetensors", "training.yaml", "log.jsonl", "metrics.json", "checkpoint"}
    assert wanted <= {each.name for each in run.iterdir()}
    settings = yaml.safe_load((run / "training.yaml").read_text())
    assert settings["model"]["prompt_length"] == 2
    assert settings["training"]["epochs"] == 3
    assert settings["training"]["learning_rate"] == 0.001, "defaults are written down too"
    assert settings["data"]["path"] == str(here / "data")
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["validation"]) == set(metrics["test"]) == {"accuracy", "f1_macro"}
    assert metrics["samples"] == {"train": 24, "validation": 9, "test": 9}
    assert 0 < metrics["trainable_parameters"] < metrics["total_parameters"]


def test_train_says_what_it_found(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(here / "data", tmp_path / "data")
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    lines[0] = json.dumps({**first, "text": "red " * 40})
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (folder / json.loads(lines[1])["file_name"]).write_bytes(b"no picture")
    assert epic_fast("data", "check", folder) == 3
    assert train(here, tmp_path / "run", "--data", folder, "--skip-bad") == 0
    out = capsys.readouterr().out
    assert "skipped: 1 rows" in out
    assert "1.png" in out, "the row that was left out is named"
    assert "texts: 4.3% of train are cut at 16 tokens (the longest has 42)" in out
    assert "parameters are trained" in out
    assert "validation" in out
    assert "test" in out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["skipped_rows"] == 1


@pytest.mark.parametrize(("left", "scored"), [("validation", "validation"), ("test", "test"), (None, "train")])
def test_train_shows_the_splits_that_there_are(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], left: str | None, scored: str
) -> None:
    folder = shutil.copytree(here / "data", tmp_path / "data")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    kept = [json.dumps(row) + "\n" for row in rows if row["split"] in ("train", left)]
    (folder / "metadata.jsonl").write_text("".join(kept))
    capsys.readouterr()
    assert train(here, tmp_path / "run", "--data", folder) == 0
    out = capsys.readouterr().out
    assert f"--split {scored})" in out
    for shown in ("best epoch 1 of 1", "accuracy"):
        assert (shown in out) == (left is not None)


def test_a_table_has_the_columns_of_all_rows(capsys: pytest.CaptureFixture[str]) -> None:
    from epic_fast.cli.console import show_table

    show_table([{"split": "validation"}, {"split": "test", "accuracy": 0.5}])
    head, *rows = [line for line in capsys.readouterr().out.splitlines() if any(each.isalnum() for each in line)]
    assert "accuracy" in head
    assert "0.5000" in rows[1]


def test_eval_prints_one_json_object_that_agrees_with_training(here: Path, answer: Callable[..., Any]) -> None:
    metrics = json.loads((here / "run" / "metrics.json").read_text())
    found = answer("eval", here / "run", "--data", here / "data", "--split", "test")
    assert {name: found[name] for name in ("accuracy", "f1_macro")} == metrics["test"]
    assert (found["split"], found["samples"]) == ("test", 9)
    validation = answer("eval", here / "run", "--data", here / "data", "--split", "validation", "--batch-size", 2)
    assert validation["accuracy"] == metrics["validation"]["accuracy"]


def test_eval_as_a_table(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert epic_fast("eval", here / "run", "--data", here / "data") == 0
    out = capsys.readouterr().out
    assert "accuracy" in out
    assert "f1_macro" in out


def test_eval_matches_classes_by_name_not_by_order(here: Path, tmp_path: Path, answer: Callable[..., Any]) -> None:
    """A folder that holds the test split alone, with two of the three classes, gets the model's class ids."""
    whole = answer("predict", here / "run", here / "data" / "metadata.jsonl", tmp_path / "said.jsonl")
    assert whole["rows"] == 42
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    rows = [row for row in said if row["split"] == "test" and row["label"] != "blue"]
    expected = sum(row["label"] == row["predicted"] for row in rows) / len(rows)
    folder = shutil.copytree(here / "data", tmp_path / "two")
    kept = ("file_name", "text", "label", "split")
    text = "".join(json.dumps({name: row[name] for name in kept}) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text)
    assert answer("eval", here / "run", "--data", folder)["accuracy"] == pytest.approx(expected)


def test_predict_keeps_rows_and_ranks_classes(here: Path, tmp_path: Path) -> None:
    rows = [
        {"file_name": f"000{index}.png", "text": "" if index == 2 else "a red square", "id": {"deep": index}}
        for index in range(5)
    ]
    source = here / "data" / "rows.jsonl"
    source.write_text("\n\n".join(json.dumps(row) for row in rows))
    assert epic_fast("predict", here / "run", source, tmp_path / "out.jsonl", "--top-k", 2, "--batch-size", 2) == 0
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in rows[0]} for row in out] == rows
    for row in out:
        first, second = row["top_k"]
        assert row["predicted"] == first["label"]
        assert 1 >= first["probability"] >= second["probability"] >= 0
        assert first["probability"] + second["probability"] <= 1.001

    from epic_fast.data import load_image
    from epic_fast.models import from_pretrained

    model = from_pretrained(here / "run")
    from epic_fast.data import Collator, Example

    examples = [Example(load_image(here / "data" / row["file_name"]), row["text"], None, "") for row in rows]
    with torch.no_grad():
        logits = model(**Collator.for_model(model)(examples)).logits
    assert [row["predicted"] for row in out] == [model.labels[index] for index in logits.argmax(1)]
    assert [row["top_k"][0]["probability"] for row in out] == pytest.approx(
        logits.softmax(1).max(1).values.tolist(), abs=1e-5
    )


def test_predict_skips_bad_rows_only_when_told(here: Path, tmp_path: Path, answer: Callable[..., Any]) -> None:
    source = here / "data" / "some.jsonl"
    names = ("0000.png", "nowhere.png", "0001.png")
    source.write_text("".join(json.dumps({"file_name": name, "text": "a", "n": name}) + "\n" for name in names))
    target = tmp_path / "out.jsonl"
    assert epic_fast("predict", here / "run", source, target) == 3
    assert not target.exists()
    assert answer("predict", here / "run", source, target, "--skip-bad")["skipped"] == 1
    assert [json.loads(line)["n"] for line in target.read_text().splitlines()] == ["0000.png", "0001.png"]


def test_multi_label_with_its_threshold(here: Path, tmp_path: Path, answer: Callable[..., Any]) -> None:
    run = tmp_path / "run"
    assert train(here, run, "pos_weight=auto", data="multi") == 0
    saved = json.loads((run / "config.json").read_text())["threshold"]
    found = answer("eval", run, "--data", here / "multi")
    assert set(found) >= {"f1_micro", "f1_macro", "threshold"}
    assert found["threshold"] == pytest.approx(saved)
    assert answer("predict", run, here / "multi" / "metadata.jsonl", tmp_path / "out.jsonl")["rows"] == 42
    for line in (tmp_path / "out.jsonl").read_text().splitlines():
        row = json.loads(line)
        above = [each["label"] for each in row["top_k"] if each["probability"] > saved]
        assert row["predicted"] == above
    assert epic_fast("plot", "sheet", run, "--data", here / "multi", "--count", 3) == 0
    assert epic_fast("plot", "confusion", run, "--data", here / "multi") == 2


def test_regression(here: Path, tmp_path: Path, answer: Callable[..., Any]) -> None:
    folder = shutil.copytree(here / "data", tmp_path / "data")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [{**row, "label": 0.5 + len(row["text"]) / 10} for row in rows]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    assert train(here, run, "--data", folder) == 0
    assert set(answer("eval", run, "--data", folder)) >= {"mae", "mse", "pearson"}
    assert epic_fast("predict", run, folder / "metadata.jsonl", tmp_path / "out.jsonl") == 0
    assert isinstance(json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["predicted"], float)
    assert epic_fast("plot", "sheet", run, "--data", folder, "--count", 3) == 0


def test_train_json_and_a_config_file(here: Path, tmp_path: Path, answer: Callable[..., Any]) -> None:
    config = {
        "data": {"path": str(here / "data"), "label_field": "label"},
        "backbone": str(here / "clip"),
        "output": str(tmp_path / "run"),
        "model": {"prompt_length": 1, "num_layer_pairs": 1},
        "training": {"epochs": 1, "batch_size": 12, "tensorboard": False},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    found = answer("train", "--config", tmp_path / "c.yaml", "prompt_length=3")
    assert found == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert load_file(tmp_path / "run" / "model.safetensors")["text_prompt"].shape == (3, 32)
    again = answer("eval", tmp_path / "run", "--data", here / "data")
    assert again["accuracy"] == found["test"]["accuracy"]


def test_the_scores_are_those_of_the_saved_adapter(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the model ends with its last weights and the first epoch was the best."""
    from epic_fast.cli import scoring
    from epic_fast.training import loop

    scored: list[dict[str, torch.Tensor]] = []
    score = scoring.score

    def spy(model: Any, *arguments: Any, **options: Any) -> Any:
        scored.append({name: each.clone() for name, each in model.state_dict().items()})
        return score(model, *arguments, **options)

    monkeypatch.setattr(scoring, "score", spy)
    monkeypatch.setattr(loop, "is_better", lambda name, value, best: best is None)
    assert train(here, tmp_path / "run", "load_best=false", epochs=2) == 0
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert len(scored) == 2, "validation and test"
    for state in scored:
        assert all(torch.equal(state[name], saved[name]) for name in saved)


def test_stopped_by_ctrl_c_and_resumed_to_the_same_bits(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from epic_fast.training import loop

    run, checkpoints = tmp_path / "a run", []
    save = loop._Run._save_checkpoint

    def save_and_stop(self: Any) -> None:
        save(self)
        checkpoints.append(self.at.epoch)
        if len(checkpoints) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop._Run, "_save_checkpoint", save_and_stop)
        assert train(here, run, "head_learning_rate=0.05", epochs=3) == 130
    error = capsys.readouterr().err
    command = f"epic-fast train --output '{run}' --resume auto"
    assert f"resume with: {command}" in error
    assert "Traceback" not in error
    assert not (run / "metrics.json").exists()
    assert epic_fast("train", "--output", run, "--resume", "auto") == 0
    resumed, whole = (load_file(each / "model.safetensors") for each in (run, here / "run"))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert (run / "log.jsonl").read_bytes() == (here / "run" / "log.jsonl").read_bytes()
    assert (
        json.loads((run / "metrics.json").read_text())["test"]
        == json.loads((here / "run" / "metrics.json").read_text())["test"]
    )


@pytest.mark.slow
def test_a_real_interrupt(here: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["--data", here / "data", "--backbone", here / "clip", "--output", run, "--epochs", "10000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "epic_fast", "train", *arguments, *SMALL],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, and what they start, ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        give_up = time.monotonic() + 120
        while not (run / "checkpoint").is_dir() and process.poll() is None and time.monotonic() < give_up:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, out + error
    assert "resume with: epic-fast train --output" in error
    assert "Traceback" not in error


def test_resuming_a_finished_run_changes_nothing(here: Path, tmp_path: Path) -> None:
    run = shutil.copytree(here / "run", tmp_path / "run")
    before = {name: (run / name).read_bytes() for name in ("model.safetensors", "log.jsonl", "metrics.json")}
    assert epic_fast("train", "--output", run, "--resume", "auto") == 0
    after = {name: (run / name).read_bytes() for name in before}
    assert after == before


def test_overwrite_replaces_a_run_and_nothing_else(here: Path, tmp_path: Path) -> None:
    run = shutil.copytree(here / "run", tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    for name in ("confusion_matrix", "contact_sheet", "training_curves"):
        (run / f"{name}.png").write_bytes(b"of the old run")
    assert train(here, run, "prompt_length=1", "--overwrite") == 0
    assert not [*run.glob("*.png"), *run.glob(".*")]
    assert load_file(run / "model.safetensors")["text_prompt"].shape == (1, 32)
    assert (run / "notes.txt").read_text() == "mine"


def test_plots_of_a_run(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(here / "run", tmp_path / "run")
    assert epic_fast("plot", "curves", run) == 0
    assert epic_fast("plot", "confusion", run, "--data", here / "data") == 0
    assert epic_fast("plot", "sheet", run, "--data", here / "data", "--count", 4, "--output", tmp_path / "s.png") == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [str(run / "training_curves.png"), str(run / "confusion_matrix.png"), str(tmp_path / "s.png")]
    for png in out:
        assert len(set(Image.open(png).convert("L").tobytes())) > 20, "blank"


def test_data_check(here: Path, answer: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    found = answer("data", "check", here / "data")
    assert found["ok"] is True
    assert found["counts"] == {"train": 24, "validation": 9, "test": 9}
    assert epic_fast("data", "check", here / "data") == 0
    assert "fine" in capsys.readouterr().out


def test_demo_is_handed_its_options(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any], tmp_path: Path
) -> None:
    import types

    seen: dict[str, Any] = {}

    def run_demo(**options: Any) -> dict[str, Any]:
        seen.update(options)
        print("progress")
        return {"accuracy": 0.5, "mcc": float("nan")}

    demo = types.ModuleType("epic_fast.demo")
    demo.run_demo = run_demo  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "epic_fast.demo", demo)
    found = answer("demo", "--task", "match", "--output", tmp_path / "d", "--seed", 3, "--quick")
    assert found == {"accuracy": 0.5, "mcc": None}
    given = {"task": "match", "output": tmp_path / "d", "seed": 3, "quick": True, "full": False, "mope": False}
    assert seen == {**given, "json_output": True}
