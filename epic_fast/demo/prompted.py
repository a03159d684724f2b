"""EPIC, MoPE and MiT on the demo's cached pairs, trained by the library's own loop."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from epic_fast.backbones import DualEncoder
from epic_fast.demo.frozen import FrozenPairs
from epic_fast.demo.pairs import CacheCollator
from epic_fast.demo.recipes import Recipe
from epic_fast.demo.rivals import Result
from epic_fast.demo.tasks import Task
from epic_fast.engine import EngineConfig
from epic_fast.models import wrap
from epic_fast.training import fit, predict


def train_prompted(
    recipe: Recipe,
    backbone: DualEncoder,
    frozen: FrozenPairs,
    task: Task,
    *,
    seed: int,
    output: Path | None = None,
    progress: Any = False,
    engine: EngineConfig | None = None,
) -> tuple[Result, dict[str, Any]]:
    """Train on cached prefixes, keep the epoch that is best on validation, and answer the test pairs.

    Args:
        backbone: the demo's towers; free again afterwards.
        output: run folder, or None.
        engine: how the frozen towers are executed; None runs their own modules.

    Returns:
        the table's row, and the run's ``history`` and ``diagnostics``.
    """
    torch.manual_seed(seed)
    labels = task.labels
    model = wrap(backbone, recipe.config, num_labels=len(labels), labels=labels, self_check=False, engine=engine)
    try:
        collator = CacheCollator(frozen.cache)
        started = time.perf_counter()
        outcome = fit(
            model,
            task.train,
            task.validation,
            config=replace(recipe.training, seed=seed),
            collator=collator,
            output_dir=output,
            progress=progress,
        )
        seconds = time.perf_counter() - started
        predictions = predict(model, task.test, collator=collator).logits.argmax(dim=1)
        trainable, total = model.get_nb_trainable_parameters()
        validation = outcome.best_metrics["accuracy"]
        chosen = {"epoch": float(outcome.best_epoch)}
        result = Result(recipe.name, predictions, trainable, total, seconds, validation, chosen)
        return result, {"history": outcome.history, "diagnostics": model.diagnostics()}
    finally:
        model.unwrap()
