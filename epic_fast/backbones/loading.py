"""Backbones by name, folder or object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from epic_fast.backbones.demo import load_demo_towers
from epic_fast.backbones.dual_encoder import DualEncoder
from epic_fast.backbones.source import split_pair
from epic_fast.errors import ConfigError


def load_backbone(
    backbone: Any,
    *,
    image_processor: Any = None,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.float32,
) -> DualEncoder:
    """A frozen :class:`DualEncoder` from whatever names one.

    Args:
        backbone: a model hub's name or a local folder (CLIP or vision-text dual encoder), ``"demo"`` (the pair of
            towers that comes with the project), ``"vision=PATH,text=PATH"`` (two names or folders), a transformers
            model, a pair ``(vision, text)`` of models, or a :class:`DualEncoder`.
        image_processor, tokenizer: take the place of those found beside the weights.
        dtype: type of the weights when they are loaded here; a model object keeps its own.

    Raises:
        ConfigError: nothing there, or a model that there is no adapter for.
    """
    if isinstance(backbone, DualEncoder):
        encoder = backbone
    elif isinstance(backbone, (str, Path)):
        encoder = _load_named(str(backbone), dtype)
    else:
        encoder = DualEncoder(backbone, source=_source_of(backbone))
    if image_processor is not None:
        encoder.image_processor = image_processor
    if tokenizer is not None:
        encoder.tokenizer = tokenizer
    return encoder


def _load_named(spec: str, dtype: torch.dtype) -> DualEncoder:
    from transformers import AutoConfig, AutoModel

    if spec == "demo":
        vision, text, image_processor, tokenizer = load_demo_towers(dtype)
        return DualEncoder((vision, text), source="demo", image_processor=image_processor, tokenizer=tokenizer)
    vision_source, text_source = split_pair(spec)
    if vision_source != text_source:
        models = tuple(
            getattr(model, f"{side}_model", model)  # one tower of a whole dual encoder, named for one side only
            for side, model in (
                ("vision", _load_model(AutoModel, vision_source, dtype)),
                ("text", _load_model(AutoModel, text_source, dtype)),
            )
        )
        return DualEncoder(models, source=spec)
    kind = _from_pretrained(AutoConfig, spec).model_type
    if kind not in ("clip", "vision-text-dual-encoder"):
        raise ConfigError(
            f"the backbone {spec!r} is of type {kind!r}; there are adapters for 'clip' and "
            "'vision-text-dual-encoder', and for two towers given as 'vision=PATH,text=PATH'"
        )
    return DualEncoder(_load_model(AutoModel, spec, dtype), source=spec)


def _load_model(loader: Any, source: str, dtype: torch.dtype) -> Any:
    """A model with the weights that were saved, and none that were made up for want of saved ones."""
    model, report = _from_pretrained(loader, source, dtype=dtype, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing and all(name.startswith("pooler.") for name in missing):
        model.pooler = None
        missing = []
    if missing:
        raise ConfigError(
            f"the backbone {source!r} lacks {len(missing)} tensors that a {type(model).__name__} needs: "
            f"{', '.join(missing[:5])}. A frozen tower with random weights is of no use; check the folder"
        )
    return model


def _from_pretrained(loader: Any, source: str, **arguments: Any) -> Any:
    folder = Path(source).expanduser()
    if source.startswith((".", "/", "~")) and not folder.is_dir():
        raise ConfigError(f"the backbone folder {source!r} does not exist; wanted a folder saved by save_pretrained()")
    try:
        return loader.from_pretrained(str(folder) if folder.is_dir() else source, **arguments)
    # RuntimeError: tensors of other shapes than config.json says.
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"the backbone {source!r} could not be loaded: {error}\nWanted the name of a model on the hub (this needs "
            "the network, or a filled cache), or a local folder with config.json and model.safetensors"
        ) from error


def _source_of(backbone: Any) -> str | None:
    """The name or folder that model objects were loaded from, if they were."""
    if isinstance(backbone, (tuple, list)):
        names = [getattr(model, "name_or_path", "") for model in backbone]
        return f"vision={names[0]},text={names[1]}" if len(names) == 2 and all(names) else None
    return getattr(backbone, "name_or_path", "") or None
