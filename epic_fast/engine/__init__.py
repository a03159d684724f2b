"""How a frozen tower is executed.  So far: its own, unmodified layers."""

from epic_fast.engine.config import EngineConfig
from epic_fast.engine.plain import call_layer, call_layer_with_prompts, prompted_visibility
from epic_fast.engine.prefix import Prefix, PrefixCache, TowerCache
from epic_fast.engine.state import TowerState

__all__ = [
    "EngineConfig",
    "Prefix",
    "PrefixCache",
    "TowerCache",
    "TowerState",
    "call_layer",
    "call_layer_with_prompts",
    "prompted_visibility",
]
