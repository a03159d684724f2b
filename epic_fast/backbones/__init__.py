"""Image-text backbones: one adapter per family, loading by name, folder or object, and their fingerprints."""

from epic_fast.backbones.dual_encoder import DualEncoder
from epic_fast.backbones.loading import load_backbone
from epic_fast.backbones.swin import Stage, SwinTower, stages_of
from epic_fast.backbones.towers import Tower

__all__ = ["DualEncoder", "Stage", "SwinTower", "Tower", "load_backbone", "stages_of"]
