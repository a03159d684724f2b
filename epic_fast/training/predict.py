"""A model's scores for a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epic_fast.engine.graphs import graphed, prepared
from epic_fast.errors import ConfigError, DataError
from epic_fast.training.batches import Batch, collator_for, length_of, loader, ordered_batches
from epic_fast.training.config import PRECISIONS
from epic_fast.training.masks import mask_counts
from epic_fast.training.progress import ProgressLike, Reporter, make_reporter


@dataclass
class Predictions:
    """``logits``: ``(N, K)`` (of masks ``(N, 2, H, W)``) float32 on the CPU, in the data set's order; ``labels``: as
    the collator gives them, or None where the data has none."""

    logits: Tensor
    labels: Tensor | None


@dataclass
class Inference:
    """What one process computed of its share of a data set; the loss is a sum over samples.

    Of masks that are only counted, ``logits`` are :func:`~epic_fast.training.masks.mask_counts` and ``labels`` the
    objects' pixels.
    """

    indices: list[int]
    logits: list[Tensor]
    labels: list[Tensor]
    loss_sum: float


def predict(
    model: Any,
    dataset: Any,
    *,
    collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    batch_size: int = 64,
    progress: ProgressLike = None,
    num_workers: int = 0,
    precision: str = "auto",
) -> Predictions:
    """Run ``model`` over ``dataset`` in order, without gradients, on the device where the model is.

    Args:
        model: as :func:`epic_fast.wrap` gives it.
        dataset: anything with ``len`` and ``[i]``.
        collator: list of samples to ``dict`` for ``model(**batch)``; None takes the backbone's own processors.
        batch_size: samples at a time; the last batch may be smaller.
        progress: None (a bar on a terminal), True, False.
        num_workers: processes that load data.
        precision: as in :class:`TrainingConfig`.

    Raises:
        DataError: the data set is empty or a sample cannot be read.
        ConfigError: a batch size below 1 or an unknown precision.
    """
    _check_batch_size("predict", batch_size)
    device = device_of(model)
    kind = resolve_precision(precision, device)
    result = infer(
        model,
        _in_order(model, dataset, collator, batch_size, num_workers),
        device=device,
        autocast=lambda: passes(kind, device),
        reporter=make_reporter(progress),
        description="predicting",
        with_loss=False,
    )
    return Predictions(torch.cat(result.logits), torch.cat(result.labels) if result.labels else None)


def count_masks(
    model: Any,
    dataset: Any,
    *,
    collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    batch_size: int = 64,
    progress: ProgressLike = None,
    num_workers: int = 0,
    precision: str = "auto",
) -> Tensor:
    """Pixels that predicted and true mask share, and those of either, ``(N, 2)``, in order; no mask is kept.

    Masks are compared at the model's ``mask_size``; arguments as for :func:`predict`.

    Raises:
        DataError: the data set is empty, has no masks, or a sample cannot be read.
        ConfigError: a model of another task, a batch size below 1 or an unknown precision.
    """
    _check_makes_masks(model, "count_masks")
    _check_batch_size("count_masks", batch_size)
    device = device_of(model)
    kind = resolve_precision(precision, device)
    found = infer(
        model,
        _in_order(model, dataset, collator, batch_size, num_workers),
        device=device,
        autocast=lambda: passes(kind, device),
        reporter=make_reporter(progress),
        description="predicting",
        with_loss=False,
        count_masks=True,
    )
    if not found.labels:
        raise DataError("count_masks: these samples have no masks to compare with; predict_masks needs none")
    return torch.cat(found.logits)


def _check_batch_size(name: str, batch_size: Any) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"{name}: batch_size is {batch_size!r}; wanted a whole number of at least 1")


def _check_makes_masks(model: Any, name: str) -> None:
    problem = getattr(model, "problem_type", None)
    if problem != "segmentation":
        raise ConfigError(f"{name}: this model's problem_type is {problem!r}; wanted 'segmentation'")


def predict_masks(
    model: Any, dataset: Any, *, collator: Any = None, batch_size: int = 64, precision: str = "auto"
) -> Iterator[np.ndarray]:
    """The mask of each sample in order, booleans of the size of its own picture.

    Args:
        model: of segmentation.
        dataset: of :class:`epic_fast.data.Example`, or anything with ``len``, ``[i]`` and ``.image`` of a sample.
        collator, batch_size, precision: as for :func:`predict`.

    Raises:
        DataError: the data set is empty or a sample cannot be read.
        ConfigError: a model of another task, a batch size below 1 or an unknown precision.
    """
    _check_makes_masks(model, "predict_masks")
    _check_batch_size("predict_masks", batch_size)
    kind = resolve_precision(precision, device_of(model))
    count = length_of(dataset, "given")
    return _masks(model, dataset, collator or collator_for(model, dataset), batch_size, count, kind)


def _masks(model: Any, dataset: Any, collator: Any, batch_size: int, count: int, kind: str) -> Iterator[np.ndarray]:
    device = device_of(model)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, count, batch_size):
            examples = [dataset[index] for index in range(start, min(start + batch_size, count))]
            batch = {name: each for name, each in collator(examples).items() if name != "labels"}
            batch = {name: each.to(device) for name, each in prepared(model, batch).items()}
            with torch.no_grad(), passes(kind, device):
                logits = model(**batch).logits.float()
            for example, each in zip(examples, logits, strict=True):
                size = (example.image.height, example.image.width)
                margin = (each[1] - each[0])[None, None]
                margin = torch.nn.functional.interpolate(margin, size, mode="bilinear", align_corners=True)
                yield (margin[0, 0] > 0).cpu().numpy()
    finally:
        model.train(was_training)


def predict_routing(
    model: Any,
    dataset: Any,
    *,
    collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    batch_size: int = 64,
    progress: ProgressLike = None,
    num_workers: int = 0,
    precision: str = "auto",
) -> dict[int, Tensor]:
    """Which experts each sample takes, in order and without noise.

    Args:
        model: of the method MoPE.
        dataset, collator, batch_size, progress, num_workers, precision: as for :func:`predict`.

    Returns:
        Routed layer of the main tower to scores ``(N, E)``, float32 on the CPU, that sum to 1 over the experts; empty
        where nothing is routed.

    Raises:
        DataError: the data set is empty or a sample cannot be read.
        ConfigError: a batch size below 1, an unknown precision, or a model without routing.
    """
    from accelerate.utils import send_to_device

    if not hasattr(model, "routing"):
        raise ConfigError(f"predict_routing: a {type(model).__name__} has no routing; wanted a model of MoPE")
    _check_batch_size("predict_routing", batch_size)
    device = device_of(model)
    kind = resolve_precision(precision, device)
    batches = _in_order(model, dataset, collator, batch_size, num_workers)
    reporter = make_reporter(progress)
    found: dict[int, list[Tensor]] = {}
    was_training = model.training
    model.eval()
    reporter.start("routing", len(batches))
    try:
        for _, batch in batches:
            inputs: dict[str, Any] = send_to_device(prepared(model, batch), device)  # pyright: ignore[reportAssignmentType]
            with passes(kind, device):
                for layer, scores in model.routing(**inputs).items():
                    found.setdefault(layer, []).append(scores.float().cpu())
            reporter.advance()
    finally:
        reporter.stop()
        model.train(was_training)
    return {layer: torch.cat(scores) for layer, scores in found.items()}


def _in_order(
    model: Any,
    dataset: Any,
    collator: Callable[[list[Any]], Mapping[str, Any]] | None,
    batch_size: int,
    num_workers: int,
) -> Any:
    """The data set's batches, first to last."""
    plan = ordered_batches(length_of(dataset, "given"), batch_size)
    return loader(dataset, collator or collator_for(model, dataset), plan, seed=0, num_workers=num_workers)


def infer(
    model: Any,
    batches: Any,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    reporter: Reporter,
    description: str,
    with_loss: bool,
    count_masks: bool = False,
) -> Inference:
    """The model in ``eval()`` over loaded batches; its mode is as before at the end.

    ``count_masks`` keeps of each mask what metrics need, two numbers in the place of its pixels.
    """
    from accelerate.utils import send_to_device

    found = Inference([], [], [], 0.0)
    was_training = model.training
    model.eval()
    forward = graphed(model)
    reporter.start(description, len(batches))
    try:
        with torch.no_grad():
            for which, batch in batches:
                which: Batch
                labels = batch.pop("labels", None)
                inputs: dict[str, Any] = send_to_device(prepared(model, batch), device)  # pyright: ignore[reportAssignmentType]
                if with_loss and labels is not None:
                    inputs["labels"] = labels.to(device)
                with autocast():
                    out = forward(**inputs)
                found.indices.extend(which.indices)
                if count_masks and labels is not None:
                    found.logits.append(mask_counts(out.logits, labels.to(device)).cpu())
                    found.labels.append(labels.flatten(1).sum(dim=1).cpu())
                else:
                    found.logits.append(out.logits.float().cpu())
                    if labels is not None:
                        found.labels.append(labels.cpu())
                if with_loss and out.loss is not None:
                    found.loss_sum += float(out.loss) * which.count
                reporter.advance()
    finally:
        reporter.stop()
        model.train(was_training)
    return found


def device_of(model: Any) -> torch.device:
    """Where the model's parameters are."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "bf16", "fp16" or "fp32": what ``precision`` means on ``device``."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; wanted one of {', '.join(PRECISIONS)}")
    if precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if bf16 else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision is 'fp16' on the CPU; wanted 'fp32' or 'bf16' there: fp16 needs a GPU")
    return precision


def passes(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The autocast of a resolved precision."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)
