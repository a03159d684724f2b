"""Figures of a run, as PNG files: training curves, a confusion matrix, sheets of pictures, the routing of experts.

They are drawn with matplotlib's Agg canvas and never touch pyplot, so neither a display nor the caller's own
figures matter.  Colours are told apart by colour-blind readers, and none carries a meaning alone.
"""

from epic_fast.plots.confusion import confusion_matrix
from epic_fast.plots.curves import training_curves
from epic_fast.plots.masks import MaskItem, mask_sheet
from epic_fast.plots.routing import RoutingHistory, entropy_curves, expert_load, routing_history
from epic_fast.plots.sheet import SheetItem, contact_sheet

__all__ = [
    "MaskItem",
    "RoutingHistory",
    "SheetItem",
    "confusion_matrix",
    "contact_sheet",
    "entropy_curves",
    "expert_load",
    "mask_sheet",
    "routing_history",
    "training_curves",
]
