"""EPIC on the demo's cached pairs, trained by the library's own loop."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from epic_fast.demo.frozen import FrozenPairs
from epic_fast.demo.pairs import CacheCollator
from epic_fast.demo.rivals import Result, accuracy
from epic_fast.demo.tasks import Task
from epic_fast.models import EpicConfig, EpicModel, wrap
from epic_fast.training import TrainingConfig, fit, predict


def train_epic(
    name: str,
    backbone: Any,
    frozen: FrozenPairs,
    config: EpicConfig,
    training: TrainingConfig,
    task: Task,
    *,
    seed: int,
    output: Path | None = None,
    progress: Any = None,
) -> tuple[Result, EpicModel, dict[str, Any]]:
    """Train on cached prefixes, keep the epoch that is best on validation, and answer the test pairs.

    Args:
        backbone: the demo's towers (:class:`DualEncoder`); give them back by ``model.unwrap()`` before the next.
        output: run folder, or None.

    Returns:
        the table's row, the model with its best weights, and the run's history.
    """
    torch.manual_seed(seed)
    model = wrap(backbone, config, num_labels=len(task.labels), labels=task.labels, self_check=False)
    collator = CacheCollator(frozen.cache)
    started = time.perf_counter()
    outcome = fit(
        model,
        task.train,
        task.validation,
        config=replace(training, seed=seed),
        collator=collator,
        output_dir=output,
        progress=progress,
    )
    seconds = time.perf_counter() - started
    predictions = predict(model, task.test, collator=collator).logits.argmax(dim=1)
    trainable, total = model.get_nb_trainable_parameters()
    checked = predict(model, task.validation, collator=collator)
    assert checked.labels is not None
    score = accuracy(checked.logits.argmax(dim=1), checked.labels)
    result = Result(name, predictions, trainable, total, seconds, score, {"epoch": float(outcome.best_epoch)})
    return result, model, {"history": outcome.history, "diagnostics": model.diagnostics()}
