"""Adapters on disk: ``config.json`` and ``model.safetensors``, trainable tensors only, no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

import epic_fast
from epic_fast.backbones import DualEncoder, load_backbone
from epic_fast.backbones.fingerprint import describe_difference
from epic_fast.backbones.source import found_again, relative
from epic_fast.engine import EngineConfig
from epic_fast.errors import AdapterError, ConfigError
from epic_fast.files import atomic_files, to_json
from epic_fast.models.base import PromptedModel
from epic_fast.models.wrapping import METHODS, wrap

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = 1


def save(model: PromptedModel, folder: Path) -> None:
    """What :meth:`PromptedModel.save_pretrained` does."""
    check_place(folder)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    description = {
        "library": "epic_fast",
        "format": FORMAT,
        "version": epic_fast.__version__,
        "method": model.config.method,
        "config": model.config.to_dict(),
        "num_labels": model.num_labels,
        "problem_type": model.problem_type,
        "labels": model.labels,
        "threshold": model.threshold,
        "backbone": {
            "source": model.backbone.source,
            "seen_from_here": None if model.backbone.source is None else relative(model.backbone.source, folder),
            "family": model.backbone.family,
            "dtype": str(model.backbone.dtype).removeprefix("torch."),
            "tensors": model.backbone.fingerprint(),
        },
    }
    try:
        # Together: new weights beside an old description, or the other way round, would be no adapter at all.
        with atomic_files(folder / WEIGHTS, folder / CONFIG) as (weights, config):
            safetensors.torch.save_file(state, weights, metadata={"format": "pt"})
            config.write_text(to_json(description), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"the adapter could not be written to {folder}: {error}. What was saved there before is untouched; free "
            "some space, or choose another folder"
        ) from error


def check_place(folder: Path) -> None:
    """Refuse a place where an adapter would take something else's files.

    Raises:
        AdapterError: a file, or a folder whose ``config.json`` is no adapter's: that of a backbone.
    """
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"cannot save into {folder}: it is a file; wanted a folder, or a name that is free")
    config = folder / CONFIG
    if not config.exists():
        return
    try:
        kind = json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        # Another process has just moved it away.
        return
    except (OSError, ValueError):
        kind = None
    if not isinstance(kind, dict) or kind.get("library") != "epic_fast":
        raise AdapterError(
            f"cannot save into {folder}: its {CONFIG} is no adapter's, so that another model lies there; wanted an "
            "empty folder, one with an adapter, or a name that is free"
        )


def from_pretrained(
    folder: str | Path,
    backbone: Any = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    image_processor: Any = None,
    tokenizer: Any = None,
    verify: bool = True,
    engine: EngineConfig | None = None,
) -> Any:
    """The model of a saved adapter, on the backbone that it was trained on.

    Args:
        folder: where ``save_pretrained`` wrote, or the run folder of ``epic-fast train``.
        backbone: as for :func:`epic_fast.wrap`; default, the name or folder that the adapter remembers.
        device: where to put the model.
        dtype: type to run the backbone in, after it was verified in the type that it was trained in.
        image_processor, tokenizer: as for :func:`epic_fast.wrap`.
        verify: compare the backbone's fingerprint with the adapter's.
        engine: as for :func:`epic_fast.wrap`; it is no part of the adapter.

    Raises:
        AdapterError: no adapter there, a damaged file, or another backbone (naming the tensors that differ).
    """
    folder = Path(folder)
    description = read_description(folder)
    recorded = description["backbone"]
    given = backbone
    if backbone is None:
        backbone = recorded["source"]
        if backbone is None:
            raise AdapterError(
                f"{folder} does not say where its backbone ({recorded['family']}) came from, for it was wrapped as an "
                "object: pass it, from_pretrained(folder, backbone=model)"
            )
        if recorded.get("seen_from_here"):
            backbone = found_again(backbone, recorded["seen_from_here"], folder)
    options = {"image_processor": image_processor, "tokenizer": tokenizer, "dtype": getattr(torch, recorded["dtype"])}
    try:
        encoder = load_backbone(backbone, **options)
    except ConfigError as error:
        if given is not None:
            raise
        raise AdapterError(
            f"{folder} remembers its backbone as {backbone!r}: {error}\nIf it has moved, or that is a folder relative "
            "to another place, say where it is now: --backbone on the command line, backbone= in Python"
        ) from error
    try:
        if verify:
            difference = describe_difference(recorded["tensors"], encoder.fingerprint())
            if difference is not None:
                kinds = ""
                if str(encoder.dtype) != f"torch.{recorded['dtype']}":
                    kinds = f" (it was trained in {recorded['dtype']}, this one is in {str(encoder.dtype)[6:]})"
                raise AdapterError(
                    f"the adapter in {folder} was trained on another backbone than the one given{kinds}: {difference}. "
                    f"Wanted {recorded['source'] or recorded['family']}; give that one: --backbone on the command "
                    "line, backbone= in Python"
                )
        model = _rebuild(encoder, description, folder, engine)
        load_weights(model, folder / WEIGHTS)
    except Exception:
        encoder.release()
        raise
    model.threshold = description["threshold"]
    model.eval()
    return model.to(device=device, dtype=None) if dtype is None else _cast(model, device, dtype)


def read_description(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of an adapter.

    Raises:
        AdapterError: there is none, or it is not ours.
    """
    path = folder / CONFIG
    if not path.is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise AdapterError(
            f"{folder} {what}, so it is no adapter; wanted a folder with {CONFIG} and {WEIGHTS}, as save_pretrained() "
            "and 'epic-fast train --output' write it"
        )
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{path} is damaged: {error}") from error
    if not isinstance(description, dict) or description.get("library") != "epic_fast":
        raise AdapterError(
            f"{path} was not written by epic_fast; is {folder} a backbone, or another library's adapter?"
        )
    _check_entries(description, ("format", "version", "method"), path)
    if description["format"] != FORMAT or description["method"] not in METHODS:
        raise AdapterError(
            f"{path} holds method {description['method']!r} in format {description['format']}, written by epic_fast "
            f"{description['version']}; this version {epic_fast.__version__} reads format {FORMAT} and the methods "
            f"{', '.join(METHODS)}"
        )
    _check_entries(description, ("config", "num_labels", "problem_type", "labels", "threshold", "backbone"), path)
    _check_entries(description["config"], (), path)
    _check_entries(description["backbone"], ("source", "family", "dtype", "tensors"), path)
    if not isinstance(getattr(torch, str(description["backbone"]["dtype"]), None), torch.dtype):
        raise AdapterError(f"{path} is damaged: its backbone has the type {description['backbone']['dtype']!r}")
    return description


def _check_entries(values: Any, names: tuple[str, ...], path: Path) -> None:
    missing = [name for name in names if name not in values] if isinstance(values, dict) else ["an object"]
    if missing:
        raise AdapterError(f"{path} is damaged: it lacks {', '.join(missing)}. Copy it again, or save the model anew")


def _rebuild(
    encoder: DualEncoder, description: dict[str, Any], folder: Path, engine: EngineConfig | None
) -> PromptedModel:
    config_class, _ = METHODS[description["method"]]
    try:
        return wrap(
            encoder,
            config_class.from_dict(description["config"]),
            description["num_labels"],
            description["problem_type"],
            labels=description["labels"],
            self_check=False,
            engine=engine,
        )
    except ConfigError as error:
        raise AdapterError(f"{folder / CONFIG} describes a model that cannot be built: {error}") from error


def load_weights(model: PromptedModel, path: Path) -> None:
    """Trainable tensors from a safetensors file into the model.

    Raises:
        AdapterError: a missing or damaged file, or tensors that do not fit, by name.
    """
    if not path.is_file():
        raise AdapterError(f"{path} does not exist; wanted the adapter's tensors beside its {CONFIG}")
    try:
        state = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} is damaged ({path.stat().st_size} bytes): {error}. Copy it again, or resume the run that wrote it"
        ) from error
    if "pos_weight_values" in state:
        model.set_pos_weight(state["pos_weight_values"])
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != found:
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        shown = ", ".join(
            f"{name} ({found.get(name, 'missing')}, wanted {expected.get(name, 'none')})" for name in differing[:5]
        )
        raise AdapterError(f"{path} does not fit the model that its {CONFIG} describes: {shown}")
    model.load_state_dict(state)


def _cast(model: PromptedModel, device: torch.device | str | None, dtype: torch.dtype) -> PromptedModel:
    """The backbone in another type; the trainable tensors stay as they are."""
    model.to(device)
    model.backbone.to(dtype)
    return model
