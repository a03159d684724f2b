"""Prompt tuning on frozen image-text backbones, with fused kernels.

The public names are loaded when they are first used, so ``import epic_fast`` needs nothing but PyTorch:
people who only want the operations import :mod:`epic_fast.functional` and never touch transformers.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a bare source tree the folder `kernels` lies beside the package, not in it (CONTRIBUTING.md).
_HERE = Path(__file__).resolve().parent
if not (_HERE / "kernels").is_dir() and (_HERE.parent / "kernels").is_dir():
    __path__.append(str(_HERE.parent))

if TYPE_CHECKING:
    from epic_fast import functional, hf
    from epic_fast.backbones import load_backbone
    from epic_fast.classifier import Classifier, Prediction
    from epic_fast.engine import EngineConfig
    from epic_fast.models import (
        EpicConfig,
        EpicModel,
        MitConfig,
        MitModel,
        MopeConfig,
        MopeModel,
        from_pretrained,
        wrap,
    )
    from epic_fast.training import TrainingConfig, fit

_WHERE = {
    "functional": "epic_fast.functional",
    "hf": "epic_fast.hf",
    "load_backbone": "epic_fast.backbones",
    "Classifier": "epic_fast.classifier",
    "Prediction": "epic_fast.classifier",
    "EngineConfig": "epic_fast.engine",
    "EpicConfig": "epic_fast.models",
    "EpicModel": "epic_fast.models",
    "MitConfig": "epic_fast.models",
    "MitModel": "epic_fast.models",
    "MopeConfig": "epic_fast.models",
    "MopeModel": "epic_fast.models",
    "from_pretrained": "epic_fast.models",
    "wrap": "epic_fast.models",
    "TrainingConfig": "epic_fast.training",
    "fit": "epic_fast.training",
}

__all__ = [
    "Classifier",
    "EngineConfig",
    "EpicConfig",
    "EpicModel",
    "MitConfig",
    "MitModel",
    "MopeConfig",
    "MopeModel",
    "Prediction",
    "TrainingConfig",
    "__version__",
    "fit",
    "from_pretrained",
    "functional",
    "hf",
    "load_backbone",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'epic_fast' has no attribute {name!r}")
    module = importlib.import_module(_WHERE[name])
    value = module if name in ("functional", "hf") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
