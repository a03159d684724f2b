"""What the commands say and return when something is wrong, and that nothing is lost then."""

from __future__ import annotations

import errno
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

from epic_fast.cli import main
from epic_fast.cli.failures import is_disk_full
from epic_fast.testing import make_folder, tiny_clip

SMALL = ("prompt_length=2", "num_layer_pairs=2", "batch_size=8", "tensorboard=false", "epochs=1")
Said = Callable[..., tuple[int, str]]


def epic_fast(*arguments: object) -> int:
    """Run a command in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``clip``, ``data`` and the trained ``run``."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_clip(folder / "clip")
    make_folder(folder / "data")
    assert epic_fast(*training(folder, folder / "run")) == 0
    return folder


def training(here: Path, run: Path) -> list[object]:
    return ["train", "--data", here / "data", "--backbone", here / "clip", "--output", run, *SMALL]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Run a command that fails: its exit code and the one message on stderr, in one line."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = epic_fast(*arguments)
        error = " ".join(capsys.readouterr().err.split())
        assert "Traceback" not in error
        return code, error

    return run


@pytest.fixture
def data(here: Path, tmp_path: Path) -> Path:
    """A copy of the data to spoil."""
    return shutil.copytree(here / "data", tmp_path / "data")


def change(data: Path, row: int, **values: object) -> None:
    lines = (data / "metadata.jsonl").read_text().splitlines()
    lines[row] = json.dumps({**json.loads(lines[row]), **values})
    (data / "metadata.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "trian"),
        (["train", "--epoch", "3"], "--epoch"),
        (["eval"], "RUN"),
        (["eval", "run"], "--data"),
        (["predict", "run", "in.jsonl"], "OUTPUT"),
        (["train", "--resume", "always"], "wanted auto or never"),
        (["demo", "--task", "win"], "classify or match"),
    ],
)
def test_bad_usage_is_2(said: Said, arguments: list[str], message: str) -> None:
    code, error = said(*arguments)
    assert code == 2
    assert message in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["promt_length=3"], "did you mean 'model.prompt_length'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--backbone", "./nowhere"], "nowhere"),
        (["--method", "nope"], "wanted one of epic, mope, mit"),
        (["layer_pairs=[[14, 3]]"], "names text layer 14, but this text tower has 3 (0..2)"),
        (["prompt_length=100000"], "prompt_length=100000"),
        (["precision=fp16", "device=cpu"], "fp16"),
        (["pos_weight=auto"], "multi_label_classification"),
        (["--resume", "auto", "--overwrite"], "exclude each other"),
    ],
)
def test_bad_configuration_is_2_and_writes_nothing(
    here: Path, tmp_path: Path, said: Said, more: list[str], message: str
) -> None:
    code, error = said(*training(here, tmp_path / "run"), *more)
    assert (code, message in error) == (2, True), error
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_what_is_missing_is_2(said: Said) -> None:
    code, error = said("train", "--output", "o", "--backbone", "b")
    assert code == 2
    assert "--data FOLDER" in error


def test_errors_name_the_options_of_the_command_line(here: Path, data: Path, tmp_path: Path, said: Said) -> None:
    code, error = said(*training(here, here / "run"), "--resume", "auto", "seed=3")
    assert (code, "--overwrite" in error) == (2, True), error
    tiny_clip(tmp_path / "other", seed=1)
    code, error = said("eval", here / "run", "--data", data, "--backbone", tmp_path / "other")
    assert (code, "--backbone on the command line" in error) == (2, True), error
    code, error = said("eval", here / "run", "--data", data, "--text-field", "words")
    assert (code, "--text-field (in train data.text_field=)" in error) == (3, True), error
    clip = shutil.copytree(here / "clip", tmp_path / "clip")
    assert epic_fast(*training(here, tmp_path / "run"), "--backbone", clip) == 0
    shutil.rmtree(clip)
    code, error = said("eval", tmp_path / "run", "--data", data)
    assert (code, "say where it is now: --backbone" in error) == (2, True), error


def test_skip_bad_is_advised_for_pictures_only(here: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(data, 40, label="purple")
    assert epic_fast("data", "check", data) == 3
    assert "--skip-bad" not in capsys.readouterr().out
    (data / "0004.png").write_bytes(b"no picture")
    assert epic_fast("data", "check", data) == 3
    assert "picture cannot be read out by --skip-bad" in " ".join(capsys.readouterr().out.split())


def test_resuming_what_is_not_there_is_2(here: Path, tmp_path: Path, said: Said) -> None:
    code, error = said("train", "--output", tmp_path / "typo", "--resume", "auto")
    assert (code, f"{tmp_path / 'typo'} does not exist" in error) == (2, True), error
    code, error = said("train", "--output", tmp_path, "--resume", "auto")
    assert (code, f"{tmp_path} holds no run" in error) == (2, True), error


def test_resuming_by_another_method_is_2(here: Path, said: Said) -> None:
    code, error = said("train", "--output", here / "run", "--resume", "auto", "--method", "mope")
    assert (code, "the run to resume has the method 'epic', not 'mope'" in error) == (2, True), error


def test_resuming_on_a_backbone_that_has_moved(here: Path, tmp_path: Path, said: Said) -> None:
    clip = shutil.copytree(here / "clip", tmp_path / "clip")
    assert epic_fast(*training(here, tmp_path / "run"), "--backbone", clip) == 0
    clip.rename(tmp_path / "moved")
    resumed = ("train", "--output", tmp_path / "run", "--resume", "auto")
    code, error = said(*resumed)
    assert code == 2
    assert "If it has moved, say where it is now: --resume auto --backbone FOLDER" in error
    code, error = said(*resumed, "--backbone", tmp_path / "nowhere")
    assert (code, "has moved" in error) == (2, False), error
    assert epic_fast(*resumed, "--backbone", tmp_path / "moved") == 0


@pytest.mark.parametrize("broken", ["picture", "stopped", "bug"])
def test_scores_that_fail_leave_the_adapter_and_say_so(
    here: Path, data: Path, tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    if broken == "picture":
        (data / "0040.png").write_bytes(b"no picture")  # of the test split
    else:
        error = KeyboardInterrupt() if broken == "stopped" else RuntimeError("a bug")
        monkeypatch.setattr("epic_fast.cli.scoring.score", lambda *_, **__: (_ for _ in ()).throw(error))
    code, message = said(*training(here, tmp_path / "run"), "--data", data)
    assert code == {"picture": 3, "stopped": 130, "bug": 4}[broken]
    split = "test" if broken == "picture" else "validation"
    command = f"epic-fast eval {tmp_path / 'run'} --data {data} --split {split}"
    assert f"{tmp_path / 'run'} holds the trained adapter; score it with: {command}" in message
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_run_is_not_written_over_unasked(here: Path, tmp_path: Path, said: Said) -> None:
    before = {each.name: each.read_bytes() for each in (here / "run").iterdir() if each.is_file()}
    code, error = said(*training(here, here / "run"), "seed=1")
    assert code == 2
    assert "--resume auto" in error
    assert "--overwrite" in error
    assert {name: (here / "run" / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("how", [[], ["--overwrite"], ["--resume", "auto"]])
def test_other_files_are_never_written_over(here: Path, tmp_path: Path, said: Said, how: list[str]) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    code, error = said(*training(here, tmp_path / "home"), *how)
    assert code == 2
    assert "choose another folder" in error
    code, error = said(*training(here, tmp_path / "home" / "letter.txt"), *how)
    assert code == 2
    assert "is a file" in error
    assert [each.name for each in (tmp_path / "home").iterdir()] == ["letter.txt"]


def test_the_demo_writes_over_demos_only(
    here: Path, tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("epic_fast.demo.run_demo", lambda **options: asked.append(options["output"]) or {})
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    for output, message in (
        (tmp_path / "home", "no earlier demo wrote it"),
        (tmp_path / "home" / "letter.txt", "is a file"),
        (here / "run", "holds a run of `epic-fast train`"),
    ):
        code, error = said("demo", "--output", output)
        assert (code, message in error) == (2, True), error
    assert not asked
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "training.yaml").write_text("# Written by epic_fast.training.fit\ntraining: {}\n")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "table.json").write_text("{}")
    for name in ("new", "stopped", "done"):
        assert said("demo", "--output", tmp_path / name)[0] == 0
    assert asked == [tmp_path / "new", tmp_path / "stopped", tmp_path / "done"]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["train", "demo"])
def test_an_output_that_cannot_be_written_is_2(here: Path, tmp_path: Path, said: Said, command: str) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    arguments = training(here, tmp_path)[: -len(SMALL) - 2] if command == "train" else ["demo"]
    for output in ("/proc/nowhere/run", tmp_path / "letter.txt" / "run", tmp_path / "new" / ("x" * 300)):
        code, error = said(*arguments, "--output", output)
        assert (code, "cannot be written" in error) == (2, True), error
    assert [each.name for each in tmp_path.iterdir()] == ["letter.txt"], "what was tried out is gone"


@pytest.mark.parametrize("how", ["--overwrite", "--resume=auto"])
def test_a_run_survives_a_failed_second_one(here: Path, tmp_path: Path, said: Said, how: str) -> None:
    run = shutil.copytree(here / "run", tmp_path / "run")
    before = {each.name: each.read_bytes() for each in run.rglob("*") if each.is_file()}
    code, _ = said(*training(here, run), how, "layer_pairs=[[14, 3]]")
    assert code == 2
    code, error = said(*training(here, run), "--resume=auto", "learning_rate=3")
    assert code == 2
    assert "training.learning_rate was 0.001, now 3.0" in error
    assert {each.name: each.read_bytes() for each in run.rglob("*") if each.is_file()} == before


@pytest.mark.parametrize("stopped", [False, True])
def test_a_replaced_run_survives_until_the_new_one_has_something(
    here: Path, data: Path, tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """The new run ends in its first validation: the old one is back, its plots too."""
    run = shutil.copytree(here / "run", tmp_path / "run")
    (run / "confusion_matrix.png").write_bytes(b"plot")
    before = {each.relative_to(run): each.read_bytes() for each in run.rglob("*") if each.is_file()}
    (data / "0030.png").write_bytes(b"no picture")  # of the validation split
    if stopped:
        monkeypatch.setattr("epic_fast.training.loop._Run._validate", interrupt)
    code, error = said(*training(here, run), "--data", data, "--overwrite", "seed=5")
    assert code == (130 if stopped else 3), error
    assert f"{run} holds the run that it held before" in error
    assert {each.relative_to(run): each.read_bytes() for each in run.rglob("*") if each.is_file()} == before


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_a_new_run_that_was_killed_leaves_the_old_one_aside(here: Path, tmp_path: Path) -> None:
    from epic_fast.cli.runs import set_aside, settle

    run = shutil.copytree(here / "run", tmp_path / "run")
    before = {each.relative_to(run): each.read_bytes() for each in run.rglob("*") if each.is_file()}
    for _ in range(2):  # the second time finds what the first, killed one left
        set_aside(run)
        assert [each.name for each in run.iterdir()] == [".replaced"]
        (run / "training.yaml").write_text("of the new run")
    assert settle(run)
    assert {each.relative_to(run): each.read_bytes() for each in run.rglob("*") if each.is_file()} == before
    set_aside(run)
    (run / "checkpoint").mkdir()
    assert not settle(run)
    assert [each.name for each in run.iterdir()] == ["checkpoint"]


def content(run: Path) -> dict[Path, bytes]:
    return {each.relative_to(run): each.read_bytes() for each in run.rglob("*") if each.is_file()}


@pytest.mark.parametrize("moved", [1, 3, 100])
@pytest.mark.parametrize("what", ["aside", "back"])
def test_a_move_that_was_cut_short_is_undone(
    what: str, moved: int, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from epic_fast.cli import runs

    run = shutil.copytree(here / "run", tmp_path / "run")
    before = content(run)
    if what == "back":
        runs.set_aside(run)
        (run / "training.yaml").write_text("of the new run")
    real, left = Path.replace, [moved]

    def replace(path: Path, target: Path) -> Path:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(path, target)

    with monkeypatch.context() as killed:
        killed.setattr(Path, "replace", replace)
        try:
            (runs.set_aside if what == "aside" else runs.settle)(run)
        except KeyboardInterrupt:
            assert moved < 100
    if what == "aside":
        runs.set_aside(run)
        assert [each.name for each in run.iterdir()] == [".replaced"]
        assert runs.settle(run)
    else:
        runs.check_output(run, resume=True, overwrite=False)
    assert content(run) == before


def test_an_overwrite_that_cannot_begin_brings_the_run_back(
    here: Path, tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(here / "run", tmp_path / "run")
    before = content(run)

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patches:
        patches.setattr("epic_fast.files.atomic_write_text", full)
        code, error = said(*training(here, run), "--overwrite", "seed=5")
    assert code != 0
    assert "space" in error
    assert content(run) == before

    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patches:
        patches.setattr("epic_fast.training.fit", broken)
        code, error = said(*training(here, run), "--overwrite", "seed=5")
    assert code != 0
    assert f"{run} holds the run that it held before" in error
    assert content(run) == before


def test_overwrite_where_there_is_nothing(here: Path, tmp_path: Path, said: Said) -> None:
    assert epic_fast(*training(here, tmp_path / "new" / "run"), "--overwrite") == 0
    assert (tmp_path / "new" / "run" / "model.safetensors").is_file()
    empty = tmp_path / "empty"
    empty.mkdir()
    code, error = said(*training(here, empty), "--overwrite", "learning_rate=1e20", "head_learning_rate=1e20")
    assert code != 0
    assert "held before" not in error


def test_an_adapter_that_is_aside_is_told_of(here: Path, tmp_path: Path, said: Said) -> None:
    from epic_fast.cli.runs import set_aside

    run = shutil.copytree(here / "run", tmp_path / "run")
    set_aside(run)
    code, error = said("eval", run, "--data", here / "data")
    assert code == 2
    assert f"The run before it is in {run / '.replaced'}" in error


def test_what_is_no_adapter_is_2(here: Path, tmp_path: Path, said: Said) -> None:
    code, error = said("eval", here / "data", "--data", here / "data")
    assert code == 2
    assert "no adapter" in error
    code, error = said("eval", here / "clip", "--data", here / "data")
    assert code == 2
    run = shutil.copytree(here / "run", tmp_path / "run")
    weights = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    code, error = said("eval", run, "--data", here / "data")
    assert code == 2
    assert "model.safetensors is damaged" in error


def test_another_backbone_is_2(here: Path, tmp_path: Path, said: Said) -> None:
    tiny_clip(tmp_path / "other", seed=1)
    code, error = said("eval", here / "run", "--data", here / "data", "--backbone", tmp_path / "other")
    assert code == 2
    assert "another backbone" in error


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_2(here: Path, said: Said, device: str) -> None:
    code, error = said("eval", here / "run", "--data", here / "data", "--device", device)
    assert code == 2
    assert f"device '{device}'" in error


def test_predict_refuses_its_own_input_and_folders(here: Path, said: Said) -> None:
    source = here / "data" / "metadata.jsonl"
    before = source.read_bytes()
    assert said("predict", here / "run", source, source)[0] == 2
    assert said("predict", here / "run", source, here / "data")[0] == 2
    assert source.read_bytes() == before


def test_missing_data_is_3(here: Path, tmp_path: Path, said: Said) -> None:
    code, error = said(*training(here, tmp_path / "run"), "--data", tmp_path / "nowhere")
    assert (code, "nowhere" in error) == (3, True)
    assert said(*training(here, tmp_path / "run"), "--data", here / "clip")[0] == 3
    assert said("eval", here / "run", "--data", tmp_path / "nowhere")[0] == 3
    assert said("data", "check", tmp_path / "nowhere")[0] == 3
    assert said("predict", here / "run", tmp_path / "nowhere.jsonl", tmp_path / "out.jsonl")[0] == 3
    assert said("plot", "curves", here / "data")[0] == 3
    assert not (tmp_path / "run").exists()


def test_a_missing_picture_is_3_and_named(here: Path, data: Path, tmp_path: Path, said: Said) -> None:
    (data / "0004.png").unlink()
    code, error = said(*training(here, tmp_path / "run"), "--data", data)
    assert code == 3
    assert "line 5" in error
    assert "0004.png" in error
    assert "--skip-bad" in error


def test_a_broken_picture_is_3_and_named(here: Path, data: Path, tmp_path: Path, said: Said) -> None:
    (data / "0004.png").write_bytes((data / "0004.png").read_bytes()[:99])
    code, error = said(*training(here, tmp_path / "run"), "--data", data)
    assert code == 3
    assert "line 5" in error
    assert "--skip-bad" in error


def test_an_unknown_label_is_3(here: Path, data: Path, tmp_path: Path, said: Said) -> None:
    change(data, 40, label="purple")
    code, error = said(*training(here, tmp_path / "run"), "--data", data)
    assert (code, "purple" in error) == (3, True)
    code, error = said("eval", here / "run", "--data", data)
    assert (code, "purple" in error) == (3, True)


def test_one_class_is_3_and_named(here: Path, data: Path, tmp_path: Path, said: Said) -> None:
    for row in range(42):
        change(data, row, label="purple")
    code, error = said(*training(here, tmp_path / "run"), "--data", data)
    assert (code, "one class only ('purple')" in error) == (3, True), error
    assert said("data", "check", data)[0] == 3


def test_a_split_that_is_not_there_is_3(here: Path, data: Path, tmp_path: Path, said: Said) -> None:
    code, error = said("eval", here / "run", "--data", here / "data", "--split", "dev2")
    assert code == 3
    assert "train, validation, test" in error
    for row in range(24):
        change(data, row, split="test")
    (data / "labels.txt").write_text("blue\ngreen\nred\n")
    code, error = said(*training(here, tmp_path / "run"), "--data", data)
    assert (code, "no training split" in error) == (3, True), error


def test_eval_without_labels_is_3(here: Path, data: Path, said: Said) -> None:
    for row in range(33, 42):
        change(data, row, label=None)
    code, error = said("eval", here / "run", "--data", data)
    assert code == 3
    assert "no labels" in error


def test_a_failing_json_command_prints_nothing_on_stdout(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert epic_fast("eval", here / "run", "--data", here / "nowhere", "--json") == 3
    assert capsys.readouterr().out == ""


def test_debug_shows_the_traceback(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["eval", here / "run", "--data", "nowhere", "--debug"], ["--debug", "eval", "r", "--data", "d"]):
        epic_fast(*arguments)
        assert "Traceback" in capsys.readouterr().err
    epic_fast("eval", "r", "--data", "d")
    assert "Traceback" not in capsys.readouterr().err, "--debug is for one command only"


def test_a_full_disk_is_4_and_says_what_survived(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    """The second checkpoint finds no space: the first survives, and the run goes on from it later."""
    from epic_fast.training import checkpoint

    run, count = tmp_path / "run", []
    real = checkpoint.atomic_folder

    def atomic_folder(path: Path) -> Any:
        count.append(path)
        if len(count) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "atomic_folder", atomic_folder)
        code, error = said(*training(here, run), "epochs=3")
    assert code == 4
    assert "the disk is full" in error
    assert f"resume with: epic-fast train --output {run} --resume auto" in error
    position = json.loads((run / "checkpoint" / "state.json").read_text())["position"]
    assert position["epoch"] == 1
    assert epic_fast("train", "--output", run, "--resume", "auto") == 0


def test_a_full_disk_is_recognised_behind_other_errors() -> None:
    assert is_disk_full(OSError(errno.ENOSPC, "x"))
    assert is_disk_full(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    wrapped = ValueError("the adapter could not be written")
    wrapped.__cause__ = OSError(errno.ENOSPC, "x")
    assert is_disk_full(wrapped)
    assert not is_disk_full(OSError(errno.EACCES, "x"))
    assert not is_disk_full(ValueError("no space in the name"))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeError("CUDA error: out of memory"), 4, "smaller batch_size"),
        (RuntimeError("a bug"), 4, "unexpected RuntimeError: a bug"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 4, "PermissionError"),
        (OSError(errno.ENOSPC, "No space left on device"), 4, "the disk is full"),
        (ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.figure"), 2, "epic_fast[plots]"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_other_failures(
    monkeypatch: pytest.MonkeyPatch, said: Said, error: BaseException, code: int, message: str
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("epic_fast.data.check_folder", fails)
    monkeypatch.setattr("epic_fast.data.resolve_data", lambda spec: spec)
    found = said("data", "check", "x")
    assert (found[0], message in found[1]) == (code, True), found[1]


def test_doctor_floors_are_those_of_the_project() -> None:
    from epic_fast.cli.doctor import PACKAGES

    project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
    extras = {each: project["optional-dependencies"][each] for each in ("hf", "train", "plots", "demo", "mit")}
    wanted = set()
    for extra, requirements in {None: project["dependencies"], **extras}.items():
        for each in requirements:
            if not each.startswith("epic_fast["):
                name, floor = re.split(r"[=>]=", each.split(";")[0])
                wanted.add((name, floor, extra))
    assert set(PACKAGES) == wanted


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from epic_fast.cli import doctor

    assert epic_fast("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["usable"] is True
    names = {finding["name"] for finding in found["findings"]}
    assert names >= {"python", "torch", "transformers", "device", "operations", "kernels folder", "cache", "self test"}
    assert epic_fast("doctor") == 0
    capsys.readouterr()

    old = tuple((name, "99" if name == "accelerate" else floor, extra) for name, floor, extra in doctor.PACKAGES)
    monkeypatch.setattr(doctor, "PACKAGES", (*old, ("no-such-package", "1", "plots")))
    monkeypatch.setattr(doctor, "_self_test", lambda: (_ for _ in ()).throw(RuntimeError("broken")))
    assert epic_fast("doctor", "--json") == 4
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)["findings"]}
    assert found["accelerate"]["status"] == "fail"
    assert found["accelerate"]["mend"] == "pip install 'accelerate>=99'"
    assert found["no-such-package"] == {
        "name": "no-such-package",
        "status": "note",
        "found": "missing (extra plots)",
        "mend": "pip install 'epic_fast[plots]'",
    }
    broken = [each for each in found.values() if "broken" in each["found"]]
    assert [each["status"] for each in broken] == ["fail"]
