"""The models and the data that commands are pointed at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epic_fast.cli.runs import saved_settings
from epic_fast.errors import ConfigError, DataError


@dataclass(frozen=True)
class Fields:
    """Which fields of the rows to read; None takes what the run was trained with, or the usual name."""

    text: str | None = None
    label: str | None = None
    split: str | None = None


def load_model(run: Path, backbone: str | None = None, device: str | None = None) -> Any:
    """The model saved in ``run``, in ``eval()``, on a GPU if there is one and no other device is named.

    Raises:
        AdapterError: no adapter there, a damaged one, or another backbone than its own.
        ConfigError: a device that this machine does not have.
    """
    import torch

    from epic_fast.cli.console import quiet_transformers
    from epic_fast.models import from_pretrained

    quiet_transformers()
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"the device {chosen!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return from_pretrained(run, backbone=backbone, device=chosen)


def load_split(model: Any, run: Path, data: str, split: str, fields: Fields, *, skip_bad: bool) -> Any:
    """A labelled split whose class ids are the model's.

    Raises:
        DataError: no such data, no such split, no labels in it, or a label that the model does not know.
    """
    from epic_fast.data import read_folder, resolve_data

    known = run_fields(run)
    folder = read_folder(
        resolve_data(data),
        text_field=fields.text or known.text or "text",
        label_field=fields.label or known.label,
        split_field=fields.split or known.split or "split",
        skip_bad=skip_bad,
        problem_type=model.problem_type,
        labels=model.labels,
    )
    dataset = folder.split(split)
    if not dataset.has_labels:
        raise DataError(f"the split {split!r} of {data} has no labels to compare with; `epic-fast predict` needs none")
    return dataset


def run_fields(run: Path) -> Fields:
    """The fields that the run was trained with, where its ``training.yaml`` says so."""
    data = (saved_settings(run) or {}).get("data")
    if not isinstance(data, dict):
        return Fields()
    return Fields(data.get("text_field"), data.get("label_field"), data.get("split_field"))


def local_path_made_absolute(spec: str) -> str:
    """A folder or file that exists as an absolute path, so that it is found from elsewhere; all else as it is."""
    if spec.startswith(("vision=", "text=")):
        parts = (part.partition("=") for part in spec.split(","))
        return ",".join(f"{side}{equals}{local_path_made_absolute(path)}" for side, equals, path in parts)
    path = Path(spec).expanduser()
    return str(path.resolve()) if spec != "demo" and path.exists() else spec
