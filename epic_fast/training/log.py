"""The log of a run: JSON lines and TensorBoard.

``log.jsonl`` holds no timings, so equal runs give equal bytes::

    {"type": "step", "step": 10, "epoch": 1, "loss": 0.98, "grad_norm": 0.7, "learning_rates": {"prompts": 0.001}}
    {"type": "epoch", "step": 24, "epoch": 1, "train_loss": 0.95, "validation": {"accuracy": 0.5},
     "learning_rates": {"prompts": 0.001}, "gates": {"text_gate": 0.01}, "best": true}

A step's loss is the mean over the batches since the line before.  A number that is not finite is ``null``.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

from epic_fast.errors import EpicFastError
from epic_fast.files import atomic_write_text

logger = logging.getLogger("epic_fast")


class RunLog:
    """Writes a run's log into ``folder``.

    Args:
        folder: the run folder.
        resume_step: None starts afresh; otherwise what stands there is cut back to this step and continued.
        tensorboard: write ``tensorboard/`` too.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None, tensorboard: bool = True):
        self.path = folder / "log.jsonl"
        events = folder / "tensorboard"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if resume_step is None:
                shutil.rmtree(events, ignore_errors=True)
                atomic_write_text(self.path, "")
            else:
                cut_back(self.path, resume_step)
            self._lines = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise EpicFastError(
                f"{self.path}: the log cannot be written: {error}. Mend it, or give another folder."
            ) from error
        self._board = _board(events, resume_step) if tensorboard else None

    def step(self, row: dict[str, Any]) -> None:
        """A line of type "step"."""
        self._write({"type": "step", **row})
        scalars = {"train/loss": row["loss"], "train/grad_norm": row["grad_norm"]}
        scalars |= {f"learning_rate/{name}": rate for name, rate in row["learning_rates"].items()}
        self._scalars(scalars, row["step"])

    def epoch(self, row: dict[str, Any], *, samples_per_second: float) -> None:
        """A line of type "epoch"."""
        self._write({"type": "epoch", **row})
        scalars = {f"validation/{name}": value for name, value in row["validation"].items()}
        scalars |= {f"gates/{name}": value for name, value in row.get("gates", {}).items()}
        scalars |= {"train/epoch_loss": row["train_loss"], "speed/samples_per_second": samples_per_second}
        self._scalars(scalars, row["step"])

    def sync(self) -> None:
        """Bring the lines to the disk, so that no checkpoint is ahead of its log."""
        try:
            os.fsync(self._lines.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Close the files."""
        self._lines.close()
        if self._board is not None:
            self._board.close()

    def _write(self, row: dict[str, Any]) -> None:
        try:
            self._lines.write(json.dumps(finite(row), ensure_ascii=False) + "\n")
            self._lines.flush()
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> EpicFastError:
        return EpicFastError(
            f"{self.path}: the log could not be written: {error}. The last checkpoint is whole: make room, then "
            "resume with resume='auto'."
        )

    def _scalars(self, scalars: dict[str, float], step: int) -> None:
        if self._board is None:
            return
        try:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:
            logger.warning("TensorBoard files cannot be written any more (%s); training goes on without them", error)
            self._board = None


def cut_back(path: Path, step: int) -> None:
    """Drop the lines after ``step``, and a last one that a killed process left half written."""
    kept = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines(keepends=True):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not line.endswith("\n") or row["step"] > step:
            break
        kept.append(line)
    atomic_write_text(path, "".join(kept))


def finite(value: Any) -> Any:
    """``value`` with None in place of NaN and the infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _board(folder: Path, resume_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("tensorboard is not installed, so only log.jsonl is written; install it to have both")
        return None
    try:
        return SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)
    except OSError as error:
        logger.warning("TensorBoard files cannot be written (%s); training goes on without them", error)
        return None
