"""How a frozen tower is executed: as its own, unmodified layers, or by what is possible because they never change.

``EngineConfig`` switches the parts.  ``blocks`` reads layers and says which can be fused, ``fused`` computes them with
a backward pass that knows no weight gradients (``products``, ``rows``), ``packed`` leads prompts and tokens through
them in one buffer, ``decoder`` is all of that for language models, ``prefix`` and ``store`` keep what lies below the
first prompts, ``graphs`` captures whole calls.  ``plain`` is the other way: the backbone's modules.  docs/engine.md
tells it from outside.
"""

from epic_fast.engine.config import EngineConfig
from epic_fast.engine.graphs import CapturedCall, graphed
from epic_fast.engine.infused import GatedInfusion, SourceInfusion, joint_mlp_multiplier
from epic_fast.engine.plain import call_layer, call_layer_with_prompts, prompted_visibility
from epic_fast.engine.prefix import Prefix, PrefixCache, TowerCache
from epic_fast.engine.state import TowerState
from epic_fast.engine.store import DamagedRecords, DiskStore, MemoryStore, PrefixStore, SampleKey

__all__ = [
    "CapturedCall",
    "DamagedRecords",
    "DiskStore",
    "EngineConfig",
    "GatedInfusion",
    "MemoryStore",
    "Prefix",
    "PrefixCache",
    "PrefixStore",
    "SampleKey",
    "SourceInfusion",
    "TowerCache",
    "TowerState",
    "call_layer",
    "call_layer_with_prompts",
    "graphed",
    "joint_mlp_multiplier",
    "prompted_visibility",
]
