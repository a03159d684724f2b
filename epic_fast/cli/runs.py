"""Run folders: whether one may be written to, what a run was given, what of it survives a failure."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from epic_fast.errors import ConfigError
from epic_fast.files import recover_folder

SETTINGS = "training.yaml"
# Of a run that another one is to replace; the latter only while files are moved.
ASIDE, MOVING = ".replaced", ".replaced.moving"
_PLOTS = ("training_curves.png", "confusion_matrix.png", "contact_sheet.png", "mask_sheet.png", "routing_*.png")
_FILES = ("config.json", "model.safetensors", SETTINGS, "log.jsonl", "metrics.json", *_PLOTS)
_FOLDERS = ("checkpoint", "tensorboard")


def is_main_process() -> bool:
    """Whether this process is the one that writes and speaks (of several under ``accelerate launch``)."""
    return os.environ.get("RANK", "0") == "0"


def check_output(run: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder in which something would be lost.

    Raises:
        ConfigError: a file, a folder with content that is neither to be resumed nor overwritten, or one that cannot
            be written to.
    """
    if resume and overwrite:
        raise ConfigError("--resume auto and --overwrite exclude each other; give one")
    if not _holds_something(run):
        return
    bring_back(run)
    if not is_run(run):
        if resume or overwrite:
            raise ConfigError(f"the output {run} holds files, but no run; choose another folder")
        raise ConfigError(f"the output {run} is not empty; choose another folder")
    if not (resume or overwrite):
        raise ConfigError(
            f"the output {run} holds a run already; go on with it by --resume auto, replace it by --overwrite, or "
            "choose another folder"
        )


def check_demo_output(run: Path) -> None:
    """Refuse a folder in which something other than an earlier demo would be lost.

    Raises:
        ConfigError: a file, a folder with other content, or one that cannot be written to.
    """
    if not _holds_something(run):
        return
    if saved_settings(run):
        raise ConfigError(f"the output {run} holds a run of `epic-fast train`; choose another folder for the demo")
    if not (is_run(run) or (run / "table.json").exists()):
        raise ConfigError(f"the output {run} is not empty, and no earlier demo wrote it; choose another folder")


def _holds_something(run: Path) -> bool:
    """Whether the output is a folder with something in it; one that is not there is only tried out."""
    made = []
    try:
        if run.exists() and not run.is_dir():
            raise ConfigError(f"the output {run} is a file; wanted a folder, or a name that is free")
        for folder in (*reversed(run.parents), run):
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
        filled = any(run.iterdir())
        with tempfile.TemporaryFile(dir=run):
            pass
    except OSError as error:
        raise ConfigError(
            f"the output {run} cannot be written: {error.strerror or error}; wanted a folder that may be written to, "
            "or a name that is free in one"
        ) from error
    finally:
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()
    return filled


def is_run(run: Path) -> bool:
    """Whether a training run has written here."""
    return any((run / name).exists() for name in (SETTINGS, "log.jsonl", "checkpoint", ASIDE, MOVING))


def clear(run: Path) -> None:
    """Remove what a run has written, and nothing else."""
    for each in _written(run):
        if each.is_dir():
            shutil.rmtree(each, ignore_errors=True)
        else:
            each.unlink(missing_ok=True)


def _written(run: Path) -> list[Path]:
    return [path for name in (*_FILES, *_FOLDERS) for path in run.glob(name)]


def set_aside(run: Path) -> None:
    """Move what a run has written into a hidden folder of it, until :func:`settle` knows what becomes of it."""
    run.mkdir(parents=True, exist_ok=True)
    bring_back(run)
    recover_folder(run / "checkpoint")
    aside, moving = run / ASIDE, run / MOVING
    if aside.exists() and not _stands(run):
        clear(run)  # of a new run that was killed; the one before it is still aside
        return
    found = _written(run)
    if not found:
        return
    shutil.rmtree(aside, ignore_errors=True)
    moving.mkdir()
    for each in found:
        each.replace(moving / each.name)
    moving.replace(aside)


def settle(run: Path) -> bool:
    """Remove what was set aside once the new run has a checkpoint or an adapter; else bring it back.

    Returns:
        whether it was brought back.
    """
    aside = run / ASIDE
    if not aside.is_dir():
        return False
    if _stands(run):
        shutil.rmtree(aside, ignore_errors=True)
        return False
    clear(run)
    aside.replace(run / MOVING)
    bring_back(run)
    return True


def bring_back(run: Path) -> None:
    """Finish a move that was cut short, backwards."""
    moving = run / MOVING
    if moving.is_dir():
        for each in moving.iterdir():
            each.replace(run / each.name)
        moving.rmdir()


def _stands(run: Path) -> bool:
    return (run / "checkpoint").is_dir() or (run / "model.safetensors").is_file()


def saved_settings(run: Path) -> dict[str, Any] | None:
    """What the run was given, nested as a config file; None where no command wrote it down.

    Raises:
        ConfigError: the file is damaged.
    """
    from epic_fast.cli.settings import read_config_file

    path = run / SETTINGS
    values = read_config_file(path) if path.is_file() else None
    return values if values and "backbone" in values else None


def how_to_resume(run: Path) -> str:
    """What is left of a run that ended early, and the command that goes on with it."""
    command = f"epic-fast train --output {shlex.quote(str(run))} --resume auto"
    if (run / "checkpoint").is_dir():
        kept = "the last checkpoint and the best adapter" if (run / "model.safetensors").is_file() else "a checkpoint"
        return f"{run} holds {kept}, whole; resume with: {command}"
    if (run / SETTINGS).is_file():
        return f"no checkpoint was written yet; start again with: {command}"
    return "nothing was written yet"
