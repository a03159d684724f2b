"""One training loop, used by :func:`fit`, the command line and the demo."""

from epic_fast.training.callbacks import Callback
from epic_fast.training.config import TrainingConfig
from epic_fast.training.loop import FitResult, fit
from epic_fast.training.masks import mask_counts, mask_metrics
from epic_fast.training.metrics import compute_metrics, tune_threshold
from epic_fast.training.predict import Predictions, count_masks, predict, predict_masks, predict_routing
from epic_fast.training.prefixes import fill_prefix_cache
from epic_fast.training.sentiment import sentiment_metrics

__all__ = [
    "Callback",
    "FitResult",
    "Predictions",
    "TrainingConfig",
    "compute_metrics",
    "count_masks",
    "fill_prefix_cache",
    "fit",
    "mask_counts",
    "mask_metrics",
    "predict",
    "predict_masks",
    "predict_routing",
    "sentiment_metrics",
    "tune_threshold",
]
