"""The methods: a configuration and a model each; wrapping, saving and loading them."""

from epic_fast.models.base import PromptedModel, PromptedModelOutput
from epic_fast.models.epic import EpicConfig, EpicModel
from epic_fast.models.mit import MitConfig, MitModel
from epic_fast.models.mope import MopeConfig, MopeModel
from epic_fast.models.saving import from_pretrained
from epic_fast.models.wrapping import METHODS, wrap

__all__ = [
    "METHODS",
    "EpicConfig",
    "EpicModel",
    "MitConfig",
    "MitModel",
    "MopeConfig",
    "MopeModel",
    "PromptedModel",
    "PromptedModelOutput",
    "from_pretrained",
    "wrap",
]
