"""Image-text backbones: one adapter per family, loading by name, folder or object, and their fingerprints."""

from epic_fast.backbones.absent import NoVisionTower
from epic_fast.backbones.dual_encoder import DualEncoder
from epic_fast.backbones.llama import LANGUAGE_MODELS, LlamaTower
from epic_fast.backbones.loading import load_backbone
from epic_fast.backbones.swin import Stage, SwinTower, stages_of
from epic_fast.backbones.towers import Tower

__all__ = [
    "LANGUAGE_MODELS",
    "DualEncoder",
    "LlamaTower",
    "NoVisionTower",
    "Stage",
    "SwinTower",
    "Tower",
    "load_backbone",
    "stages_of",
]
