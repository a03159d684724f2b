"""The models and the data that commands are pointed at."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epic_fast.cli.runs import ASIDE, saved_settings
from epic_fast.cli.settings import engine_for
from epic_fast.errors import AdapterError, ConfigError, DataError
from epic_fast.files import whole_path


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
    # What is scored once needs no cache.
    engine = engine_for((saved_settings(run) or {}).get("engine"), gpu=torch.device(chosen).type == "cuda")
    engine = engine and dataclasses.replace(engine, prefix_cache=None)
    try:
        return from_pretrained(run, backbone=backbone, device=chosen, engine=engine)
    except AdapterError as error:
        if not (run / ASIDE / "config.json").is_file():
            raise
        raise AdapterError(
            f"{error}\nThe run before it is in {run / ASIDE}: an --overwrite was cut short; its files can be moved back"
        ) from error


def read_training_folder(data: Any) -> Any:
    """The data folder of these :class:`DataSettings`, with a labelled training split.

    Raises:
        DataError: it has none, or one class only.
    """
    from epic_fast.data import read_folder, resolve_data
    from epic_fast.data.folder import too_few_classes

    folder = read_folder(
        resolve_data(data.path),
        text_field=data.text_field,
        label_field=data.label_field,
        split_field=data.split_field,
        skip_bad=data.skip_bad,
        problem_type=data.problem_type,
    )
    if "train" not in folder.splits:
        raise DataError(f"{data.path} has no training split; it has {', '.join(folder.splits)}")
    if folder.problem_type is None:
        raise DataError(f"the rows of {data.path} have no labels to learn; wanted a field label or labels")
    if lacking := too_few_classes(folder.problem_type, folder.labels):
        raise DataError(f"{data.path}: {lacking}")
    return folder


def make_model(settings: Any, folder: Any, *, remembered: bool = False) -> Any:
    """The model of these :class:`RunSettings` for the labels of a data folder, on the CPU.

    Args:
        remembered: whether the backbone is the one that a resumed run remembers, which may have moved.

    Raises:
        ConfigError: settings, backbone and data that do not fit.
        DataError: data without pictures for a backbone that looks at some.
    """
    import torch

    from epic_fast.backbones import load_backbone
    from epic_fast.cli.settings import method_config_class
    from epic_fast.data import SequenceDataset
    from epic_fast.models import wrap

    gpu = settings.training["device"] != "cpu" and torch.cuda.is_available()
    if folder.sequences and "sequences" in settings.model and settings.model["sequences"] is None:
        settings.model["sequences"] = dict(folder.sequences)  # what the data has; model.sequences={...} takes fewer
    elif folder.sequences and "sequences" not in settings.model:
        raise ConfigError(
            f"{folder.path} holds sequences ({', '.join(folder.sequences)}), which the method {settings.method!r} does "
            "not take; wanted --method mit"
        )
    try:
        backbone = load_backbone(settings.backbone)
    except ConfigError as error:
        if not remembered:
            raise
        raise ConfigError(f"{error}\nIf it has moved, say where it is now: --resume auto --backbone FOLDER") from error
    model = wrap(
        backbone,
        method_config_class(settings.method)(**settings.model),
        folder.num_labels,
        folder.problem_type,
        labels=folder.labels or None,
        pos_weight=settings.data.pos_weight,
        engine=engine_for(settings.engine, gpu=gpu),
    )
    utterances = any(isinstance(each, SequenceDataset) for each in folder.splits.values())
    if utterances and getattr(model, "uses_picture", True):
        raise DataError(
            f"{', '.join(folder.metadata)} in {folder.path} has no pictures, and this model looks at pictures; wanted "
            "data with pictures, or a model without: --method mit with model.picture=false, or with a language model "
            "alone, --backbone text=PATH"
        )
    return model


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


def data_path_made_absolute(place: str) -> str:
    """Data that are there by their whole path, so that they are found from elsewhere; all else as it is."""
    return place if place == "demo" else whole_path(place)


def cache_path_made_absolute(place: str | None) -> str | None:
    """Where a prefix cache lies, so that it is found from elsewhere; ``"memory"`` is no place on a disk."""
    return place if place in (None, "memory") else str(Path(place).expanduser().resolve())
