"""How a frozen tower is executed.  So far: its own, unmodified layers."""

from epic_fast.engine.config import EngineConfig
from epic_fast.engine.graphs import CapturedCall, graphed
from epic_fast.engine.plain import call_layer, call_layer_with_prompts, prompted_visibility
from epic_fast.engine.prefix import Prefix, PrefixCache, TowerCache
from epic_fast.engine.state import TowerState
from epic_fast.engine.store import DamagedRecords, DiskStore, MemoryStore, PrefixStore, SampleKey

__all__ = [
    "CapturedCall",
    "DamagedRecords",
    "DiskStore",
    "EngineConfig",
    "MemoryStore",
    "Prefix",
    "PrefixCache",
    "PrefixStore",
    "SampleKey",
    "TowerCache",
    "TowerState",
    "call_layer",
    "call_layer_with_prompts",
    "graphed",
    "prompted_visibility",
]
