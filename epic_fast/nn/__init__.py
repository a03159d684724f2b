"""Modules that own the trainable tensors."""

from epic_fast.nn.heads import FeatureNorm, Head
from epic_fast.nn.infusion import Infusion, LayerInfusion, SequenceEncoder
from epic_fast.nn.interaction_hub import InteractionHub
from epic_fast.nn.prompt_experts import (
    ExpertRouter,
    PromptExperts,
    PromptMapper,
    importance_loss,
    routing_entropy,
)
from epic_fast.nn.segmentation import SEGMENTATION_LOSSES, FilmDecoder, segmentation_loss

__all__ = [
    "SEGMENTATION_LOSSES",
    "ExpertRouter",
    "FeatureNorm",
    "FilmDecoder",
    "Head",
    "Infusion",
    "InteractionHub",
    "LayerInfusion",
    "PromptExperts",
    "PromptMapper",
    "SequenceEncoder",
    "importance_loss",
    "routing_entropy",
    "segmentation_loss",
]
