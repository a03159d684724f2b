"""A run that dies comes back as if it had not: same log, same weights, bit for bit.

Run as a script it is the run that dies: ``FOLDER EVENT:NUMBER...`` trains into ``FOLDER/EVENT-NUMBER`` and kills
itself (SIGKILL) at the given step, file rename or file write.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import epic_fast
from epic_fast.errors import ConfigError, EpicFastError
from epic_fast.testing import tiny_clip
from epic_fast.testing.pairs import RandomPairs
from epic_fast.training import TrainingConfig, fit
from epic_fast.training.checkpoint import load_checkpoint, save_checkpoint
from epic_fast.training.config import FREE_ON_RESUME
from epic_fast.training.log import cut_back

EVENTS = ("step:2", "step:4", "step:5", "step:7", "step:12", "fsync:9", "rename:9", "rename:12", "rename:13")


def build(seed: int = 0, **options):
    config = {"prompt_length": 2, "num_layer_pairs": 2, "head_dropout": 0.3, "feature_norm": "standardize"} | options
    backbone = tiny_clip()
    torch.manual_seed(seed)
    return epic_fast.wrap(backbone, epic_fast.EpicConfig(**config), num_labels=3, self_check=False)


def settings(**changes) -> TrainingConfig:
    values = {"epochs": 3, "batch_size": 8, "checkpoint_every_steps": 3, "log_every_steps": 2, "tensorboard": False}
    return TrainingConfig(**{**values, "learning_rate": 1e-2, "head_learning_rate": 1e-2, "device": "cpu", **changes})


def train(folder: Path, *, resume: str = "auto", model=None, length: int = 26, callbacks=(), **changes):
    """3 epochs of 4 steps, dropout and augmentation on; checkpoints after steps 3, 4, 6, 8, 9, 12."""
    model = build() if model is None else model
    data = RandomPairs(length, augment=True), RandomPairs(10, seed=1)
    result = fit(
        model, *data, config=settings(**changes), output_dir=folder, resume=resume, progress=False, callbacks=callbacks
    )
    return model, result


class Die:
    """A callback that kills the process after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step(self, row) -> None:
        if row["step"] == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(owner, name: str, number: int) -> None:
    """Kill the process in place of the call of that number."""
    original, calls = getattr(owner, name), [0]

    def counting(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counting)


def main(folder: str, *events: str) -> None:
    for module in ("accelerate", "torchmetrics.functional.classification", "epic_fast.models"):
        importlib.import_module(module)  # once, in place of once a child
    build()
    for event in events:
        kind, number = event.split(":")
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            if kind == "rename":
                die_at_call(Path, "replace", int(number))
            if kind == "fsync":
                die_at_call(os, "fsync", int(number))
            train(Path(folder) / f"{kind}-{number}", callbacks=[Die(int(number))] if kind == "step" else [])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(event, os.WTERMSIG(status) if os.WIFSIGNALED(status) else "lived")


if __name__ == "__main__":
    main(*sys.argv[1:])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    model, result = train(folder, resume="never")
    return folder, model.state_dict(), result


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(epic_fast.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, __file__, str(folder), *EVENTS], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [f"{event} {int(signal.SIGKILL)}" for event in EVENTS], done.stderr
    return folder


def same_bits(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def without_times(history):
    return [{key: row[key] for key in row if key not in ("seconds", "samples_per_second")} for row in history]


@pytest.mark.parametrize("event", EVENTS)
def test_killed_run_resumes_bit_for_bit(event, killed_runs, whole_run):
    whole, weights, result = whole_run
    folder = killed_runs / event.replace(":", "-")
    assert not (folder / "metrics.json").exists()
    model, resumed = train(folder, resume="auto")
    assert (folder / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    assert same_bits(model.state_dict(), weights)
    assert same_bits(load_file(folder / "model.safetensors"), load_file(whole / "model.safetensors"))
    assert without_times(resumed.history) == without_times(result.history)
    assert (resumed.best_epoch, resumed.best_metrics) == (result.best_epoch, result.best_metrics)
    tensors, values = load_checkpoint(folder / "checkpoint") or ({}, {})
    expected, position = load_checkpoint(whole / "checkpoint") or ({}, {})
    assert same_bits(tensors, expected)
    assert values["schedule"] == position["schedule"]
    assert not list(folder.glob(".checkpoint*"))


def test_some_kills_leave_a_checkpoint_in_mid_epoch(killed_runs):
    position = [load_checkpoint(killed_runs / event.replace(":", "-") / "checkpoint") for event in EVENTS[:5]]
    steps = [None if each is None else each[1]["position"]["step"] for each in position]
    assert steps in ([None, 3, 4, 6, 9], [12] * 5)  # the latter where the test above ran before


def test_last_weights_of_a_resumed_run(tmp_path):
    whole, _ = train(tmp_path / "whole", resume="never", load_best=False, learning_rate=0.3)
    model = build()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", model=model, callbacks=[Interrupt(7)], load_best=False, learning_rate=0.3)
    model = build(seed=5)  # whatever it starts from, the checkpoint decides
    train(tmp_path / "cut", model=model, load_best=False, learning_rate=0.3)
    assert same_bits(model.state_dict(), whole.state_dict())


class Interrupt:
    def __init__(self, step: int):
        self.step = step

    def on_step(self, row) -> None:
        if row["step"] == self.step:
            raise KeyboardInterrupt


def test_tensorboard_shows_no_step_twice(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, callbacks=[Interrupt(12)], tensorboard=True)
    train(tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [each.step for each in events.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12]
    assert [each.step for each in events.Scalars("validation/accuracy")] == [4, 8, 12]


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    model, result = train(tmp_path, resume="auto")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    again, repeated = train(tmp_path, resume="auto", model=build(seed=3))
    assert same_bits(model.state_dict(), again.state_dict())
    assert repeated.history == result.history
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


class Count:
    steps = 0

    def on_step(self, row) -> None:
        self.steps += 1


def test_checkpoint_set_aside_by_a_killed_exchange_is_found(tmp_path, whole_run):
    """Between the two renames of the exchange only the old checkpoint's other name is there."""
    shutil.copytree(whole_run[0], tmp_path / "run")
    (tmp_path / "run" / "checkpoint").rename(tmp_path / "run" / ".checkpoint.previous")
    (tmp_path / "run" / ".checkpoint.abc.tmp").mkdir()
    count = Count()
    train(tmp_path / "run", resume="auto", callbacks=[count])
    assert count.steps == 0
    assert not list((tmp_path / "run").glob(".checkpoint*"))


def test_never_starts_afresh_in_a_used_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, callbacks=[Interrupt(7)])
    train(tmp_path, resume="never", epochs=1)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 4]
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["position"]["step"] == 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "training.seed was 0, now 1"),
        ({"epochs": 4}, "training.epochs was 3, now 4"),
        ({"length": 27}, "data.train was 26, now 27"),
        ({"model": {"prompt_length": 3}}, "model.config.prompt_length was 2, now 3"),
        ({"precision": "bf16"}, "training.precision was 'fp32', now 'bf16'"),
    ],
)
def test_another_run_is_refused(tmp_path, whole_run, changes, named):
    shutil.copytree(whole_run[0] / "checkpoint", tmp_path / "checkpoint")
    if "model" in changes:
        changes = {"model": build(**changes["model"])}
    before = (tmp_path / "checkpoint" / "state.json").read_bytes()
    with pytest.raises(ConfigError, match=named):
        train(tmp_path, resume="auto", **changes)
    assert (tmp_path / "checkpoint" / "state.json").read_bytes() == before


def test_another_backbone_is_refused(tmp_path, whole_run):
    shutil.copytree(whole_run[0] / "checkpoint", tmp_path / "checkpoint")
    config = epic_fast.EpicConfig(prompt_length=2, num_layer_pairs=2, head_dropout=0.3, feature_norm="standardize")
    other = epic_fast.wrap(tiny_clip(seed=1), config, num_labels=3, self_check=False)
    with pytest.raises(ConfigError, match=r"model\.backbone"):
        train(tmp_path, resume="auto", model=other)


def test_settings_that_change_no_number_may_differ(tmp_path, whole_run):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, callbacks=[Interrupt(7)])
    model, result = train(
        tmp_path, checkpoint_every_steps=None, num_workers=1, tensorboard=True, load_best=False, device="auto"
    )
    assert set(FREE_ON_RESUME) == {"checkpoint_every_steps", "num_workers", "tensorboard", "load_best", "device"}
    assert without_times(result.history) == without_times(whole_run[2].history)
    assert (tmp_path / "log.jsonl").read_bytes() == (whole_run[0] / "log.jsonl").read_bytes()
    # The last weights, where the whole run ended with its best ones.
    last, _ = train(tmp_path / "last", resume="never", load_best=False)
    assert same_bits(model.state_dict(), last.state_dict())


@pytest.mark.parametrize("damage", ["truncated", "missing", "json", "entries"])
def test_damaged_checkpoint_says_so(tmp_path, whole_run, damage):
    shutil.copytree(whole_run[0] / "checkpoint", tmp_path / "checkpoint")
    tensors, values = tmp_path / "checkpoint" / "state.safetensors", tmp_path / "checkpoint" / "state.json"
    if damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "missing":
        tensors.unlink()
    else:
        values.write_text("{" if damage == "json" else '{"format": 1}')
    with pytest.raises(EpicFastError, match=r"no whole checkpoint.*remove the folder"):
        train(tmp_path, resume="auto")


def test_resume_arguments():
    with pytest.raises(ConfigError, match="'never' or 'auto'"):
        fit(build(), RandomPairs(4), resume="always", progress=False)
    with pytest.raises(ConfigError, match="without an output_dir"):
        fit(build(), RandomPairs(4), resume="auto", progress=False)


def test_a_run_that_is_replaced_is_said_to_be(tmp_path, whole_run, caplog):
    shutil.copytree(whole_run[0], tmp_path, dirs_exist_ok=True)
    train(tmp_path, resume="auto")
    assert "holds a run" not in caplog.text
    train(tmp_path, resume="never", epochs=1)
    assert "holds a run, which is replaced" in caplog.text


def test_checkpoint_holds_no_pickle(whole_run):
    assert sorted(path.name for path in (whole_run[0] / "checkpoint").iterdir()) == ["state.json", "state.safetensors"]
    assert b"backbone." not in (whole_run[0] / "checkpoint" / "state.safetensors").read_bytes()


def test_log_is_cut_back_to_the_step(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"step": 8, "lo')
    cut_back(path, 9)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n{"step": 6}\n'
    cut_back(path, 4)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'


def test_full_disk_leaves_the_previous_checkpoint(tmp_path, whole_run):
    """A limit on the size of files that the kernel enforces in a forked child: a write that really fails."""
    shutil.copytree(whole_run[0], tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    told = _in_a_child_without_room(
        lambda: save_checkpoint(folder, {"x": torch.zeros(4096)}, {}), limit=8192, report=tmp_path / "told"
    )
    assert "could not be written" in told
    assert "The checkpoint before it is kept" in told
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in folder.parent.iterdir() if path.name.startswith(".")) == []


@pytest.mark.slow
def test_full_disk_in_the_middle_of_a_run(tmp_path, whole_run):
    """The disk fills up at step 6 (mid epoch): the run says so; with room again it ends as the whole run did."""
    folder = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(epic_fast.__file__).parents[1])}
    script = (
        "import sys, resource; sys.path.insert(0, sys.argv[1]); import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path; import test_training_resume as t\n"
        "class Full:\n"
        "    def on_step(self, row):\n"
        "        if row['step'] == 5: resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))\n"
        "t.train(Path(sys.argv[2]), callbacks=[Full()])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "EpicFastError" in done.stderr
    assert "the checkpoint could not be written" in done.stderr
    _, values = load_checkpoint(folder / "checkpoint") or ({}, {})
    assert values["position"]["step"] == 4
    assert epic_fast.from_pretrained(folder, backbone=tiny_clip()).num_labels == 3
    model, _ = train(folder, resume="auto")
    assert (folder / "log.jsonl").read_bytes() == (whole_run[0] / "log.jsonl").read_bytes()
    assert same_bits(model.state_dict(), whole_run[1])


def _in_a_child_without_room(action, *, limit: int, report: Path) -> str:
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            action()
        except EpicFastError as error:
            report.write_text(str(error))
        os._exit(0)
    os.waitpid(child, 0)
    return report.read_text()
