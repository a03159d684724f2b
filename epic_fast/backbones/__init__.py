"""Image-text backbones: one adapter per family, loading by name, folder or object, and their fingerprints."""

from epic_fast.backbones.dual_encoder import DualEncoder
from epic_fast.backbones.loading import load_backbone
from epic_fast.backbones.towers import Tower

__all__ = ["DualEncoder", "Tower", "load_backbone"]
