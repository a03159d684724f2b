"""One training loop, used by :func:`fit`, the command line and the demo."""

from epic_fast.training.callbacks import Callback
from epic_fast.training.config import TrainingConfig
from epic_fast.training.loop import FitResult, fit
from epic_fast.training.metrics import compute_metrics, tune_threshold
from epic_fast.training.predict import Predictions, predict

__all__ = [
    "Callback",
    "FitResult",
    "Predictions",
    "TrainingConfig",
    "compute_metrics",
    "fit",
    "predict",
    "tune_threshold",
]
