"""Modules that own the trainable tensors."""

from epic_fast.nn.heads import FeatureNorm, Head
from epic_fast.nn.interaction_hub import InteractionHub

__all__ = ["FeatureNorm", "Head", "InteractionHub"]
