"""The state to resume from: one safetensors file and one JSON file in a folder, whole or not there."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from epic_fast.engine.store import describe_changes, flat
from epic_fast.errors import ConfigError, EpicFastError
from epic_fast.files import atomic_folder, recover_folder
from epic_fast.training.config import FREE_ON_RESUME, TrainingConfig

FORMAT = 1
TENSORS = "state.safetensors"
VALUES = "state.json"
ENTRIES = {"identity", "position", "schedule", "rates", "random", "scaler"}


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Put ``tensors`` and JSON-able ``values`` into ``folder``, in place of what was there.

    Raises:
        EpicFastError: it could not be written; what was there before is still there.
    """
    try:
        payload = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
        with atomic_folder(folder) as temporary:
            (temporary / TENSORS).write_bytes(payload)
            text = json.dumps({"format": FORMAT, **values}, indent=1, ensure_ascii=False)
            (temporary / VALUES).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        kept = "The checkpoint before it is kept" if folder.exists() else "There was none before it"
        raise EpicFastError(
            f"{folder}: the checkpoint could not be written: {error}. {kept}. Make room on the disk, then resume with "
            "resume='auto'."
        ) from error


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What :func:`save_checkpoint` wrote, or None where there is no checkpoint.

    Raises:
        EpicFastError: the folder is damaged or was written by a later version.
    """
    if not folder.exists():
        return None
    try:
        values = json.loads((folder / VALUES).read_text(encoding="utf-8"))
        tensors = safetensors.torch.load((folder / TENSORS).read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise EpicFastError(
            f"{folder}: is no whole checkpoint: {error}. Wanted {VALUES} and {TENSORS} as a run wrote them; remove the "
            "folder to start afresh."
        ) from error
    if not isinstance(values, dict) or (values.get("format") == FORMAT and not values.keys() >= ENTRIES):
        raise EpicFastError(
            f"{folder}: is no whole checkpoint: {VALUES} lacks some of {', '.join(sorted(ENTRIES))}; remove the folder "
            "to start afresh."
        )
    if values.get("format") != FORMAT:
        raise EpicFastError(
            f"{folder}: has format {values.get('format')!r}; this version reads {FORMAT}. Resume with the version that "
            "wrote it, or remove the folder to start afresh."
        )
    return tensors, values


def tidy(folder: Path) -> None:
    """Mend what a killed process may have left beside ``folder``: an exchange half done, a temporary folder."""
    recover_folder(folder)
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def identity(
    model: Any, config: TrainingConfig, data: dict[str, int | None], *, precision: str, processes: int
) -> dict[str, Any]:
    """What must be the same for a run to be the same run, as flat, JSON-able keys."""
    training = {key: value for key, value in config.to_dict().items() if key not in FREE_ON_RESUME}
    training["precision"] = precision
    given = getattr(model, "config", None)
    if is_dataclass(given) and not isinstance(given, type):
        given = asdict(given)
    parts = {
        "model": {
            "config": given,
            "num_labels": getattr(model, "num_labels", None),
            "problem_type": getattr(model, "problem_type", None),
            "labels": getattr(model, "labels", None),
            "backbone": _digest(model),
            "parameters": {name: list(each.shape) for name, each in model.named_parameters() if each.requires_grad},
        },
        "training": training,
        "data": data,
        "processes": processes,
    }
    return flat(json.loads(json.dumps(parts, default=repr)))


def check_identity(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to resume another run.

    Raises:
        ConfigError: naming the keys that differ.
    """
    shown = describe_changes(saved, now)
    if shown is not None:
        raise ConfigError(
            f"{folder}: belongs to another run: {shown}. Give the same settings to resume it, or train into "
            "another folder, or afresh into this one (--overwrite on the command line, resume='never' in Python)."
        )


def _digest(model: Any) -> str | None:
    """The backbone's fingerprint in one word."""
    fingerprint = getattr(getattr(model, "backbone", None), "fingerprint", None)
    if fingerprint is None:
        return None
    return hashlib.blake2b(json.dumps(fingerprint(), sort_keys=True).encode(), digest_size=8).hexdigest()
