"""Run folders: whether one may be written to, what a run was given, what of it survives a failure."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from epic_fast.errors import ConfigError

SETTINGS = "training.yaml"
_FILES = ("config.json", "model.safetensors", SETTINGS, "log.jsonl", "metrics.json")
_FOLDERS = ("checkpoint", "tensorboard")


def is_main_process() -> bool:
    """Whether this process is the one that writes and speaks (of several under ``accelerate launch``)."""
    return os.environ.get("RANK", "0") == "0"


def check_output(run: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder in which something would be lost.

    Raises:
        ConfigError: a file, or a folder with content that is neither to be resumed nor overwritten.
    """
    if resume and overwrite:
        raise ConfigError("--resume auto and --overwrite exclude each other; give one")
    if not run.exists():
        return
    if not run.is_dir():
        raise ConfigError(f"the output {run} is a file; wanted a folder, or a name that is free")
    if not any(run.iterdir()):
        return
    if not is_run(run):
        if resume or overwrite:
            raise ConfigError(f"the output {run} holds files, but no run; choose another folder")
        raise ConfigError(f"the output {run} is not empty; choose another folder")
    if not (resume or overwrite):
        raise ConfigError(
            f"the output {run} holds a run already; go on with it by --resume auto, replace it by --overwrite, or "
            "choose another folder"
        )


def is_run(run: Path) -> bool:
    """Whether a training run has written here."""
    return any((run / name).exists() for name in (SETTINGS, "log.jsonl", "checkpoint"))


def clear(run: Path) -> None:
    """Remove what a run has written, and nothing else."""
    for name in _FILES:
        (run / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        shutil.rmtree(run / name, ignore_errors=True)


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
