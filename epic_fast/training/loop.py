"""The loop."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from epic_fast.engine.graphs import Backend, backend_for, forget, prepared, say_once
from epic_fast.errors import ConfigError, DataError, EpicFastError
from epic_fast.files import atomic_write_json, atomic_write_text
from epic_fast.models.saving import check_place
from epic_fast.training.batches import (
    Repeated,
    collator_for,
    length_of,
    loader,
    ordered_batches,
    text_lengths,
    training_batches,
)
from epic_fast.training.callbacks import notify
from epic_fast.training.checkpoint import check_identity, identity, load_checkpoint, save_checkpoint, tidy
from epic_fast.training.config import TrainingConfig
from epic_fast.training.graphs import NO_LABELS, CapturedStep, why_not_captured
from epic_fast.training.guard import first_non_finite
from epic_fast.training.launch import launched
from epic_fast.training.log import RunLog, finite
from epic_fast.training.masks import mask_metrics
from epic_fast.training.metrics import choose_metric, compute_metrics, is_better, tune_threshold
from epic_fast.training.optim import learning_rates, make_optimizer, make_schedule, moments, restore_moments
from epic_fast.training.pos_weight import resolve_pos_weight
from epic_fast.training.predict import infer
from epic_fast.training.prefixes import PrefixFeed
from epic_fast.training.progress import ProgressLike, Reporter, make_reporter
from epic_fast.training.seeding import derived_seed, randomness, restore_randomness, seed_everything

logger = logging.getLogger("epic_fast")

# fp16 halves its loss scale at each overflow; from 65536 so many in a row would leave nothing to scale.
MOST_SKIPPED_STEPS = 30
OWN_YAML = "# Written by epic_fast.training.fit\n"


@dataclass
class FitResult:
    """What a run came to.

    ``history`` has a row an epoch: ``epoch`` (from 1), ``step``, ``train_loss``, ``validation`` (empty without
    validation data), ``learning_rates``, ``gates`` (where the model has diagnostics), ``best`` (the best so far),
    ``seconds``, ``samples_per_second`` (of training alone).  ``best_metrics`` is the ``validation`` of
    ``best_epoch``; ``seconds`` is the time spent in epochs, over all resumptions.
    """

    best_metrics: dict[str, float]
    history: list[dict[str, Any]]
    seconds: float
    best_epoch: int
    run_dir: Path | None


def fit(
    model: Any,
    train: Any,
    validation: Any = None,
    *,
    config: TrainingConfig | None = None,
    collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    output_dir: str | Path | None = None,
    resume: str = "never",
    progress: ProgressLike = None,
    callbacks: Sequence[Any] = (),
    description: Mapping[str, Any] | None = None,
) -> FitResult:
    """Train ``model`` in place; it ends in ``eval()``, on the device that trained it.

    Args:
        model: as :func:`epic_fast.wrap` gives it.  With ``engine.prefix_cache`` each sample goes through the layers
            below the first prompts once, in the first epoch or before it (:func:`fill_prefix_cache`).
        train: anything with ``len`` and ``[i]``; ``train.set_epoch(epoch)`` is called before each epoch (from 0)
            where it exists.
        validation: the same, or None: then the last epoch counts as the best.
        config: None takes the defaults.
        collator: list of samples to ``dict`` for ``model(**batch)``; None stacks samples that are dicts and gives
            all others to the backbone's own processors.
        output_dir: the run folder; None writes nothing.  It gets the adapter of the best epoch, ``log.jsonl``,
            ``tensorboard/``, ``checkpoint/``, ``training.yaml`` and ``metrics.json``.  What an earlier run wrote there
            is replaced unless it is resumed.
        resume: "auto" goes on from ``output_dir/checkpoint`` if there is one; "never" starts afresh.
        progress: None (a bar on a terminal, otherwise lines to the logger ``epic_fast``), True, False, or a function
            that gets a line an epoch.
        callbacks: see :class:`Callback`; anything with ``on_step`` or ``on_epoch``.
        description: more keys for ``training.yaml``, such as where backbone and data came from.

    Under ``accelerate launch`` or ``torchrun`` with several processes each computes its share of every batch of
    ``batch_size``; the result is that of one process up to rounding (and, with dropout, up to its draws).  All must
    see the run folder.

    Raises:
        ConfigError: settings that do not fit the model, or a checkpoint of another run.
        AdapterError: an ``output_dir`` that holds another model.
        DataError: an empty data set, or samples without labels.
        EpicFastError: the loss or a gradient is not finite (with the step and the tensor), or a file could not be
            written; the last checkpoint is whole in both cases.
    """
    config = config or TrainingConfig()
    if resume not in ("never", "auto"):
        raise ConfigError(f"fit: resume is {resume!r}; wanted 'never' or 'auto'")
    if resume == "auto" and output_dir is None:
        raise ConfigError("fit: resume is 'auto' without an output_dir; wanted the folder of the run to resume")
    if config.checkpoint_every_steps is not None and output_dir is None:
        logger.warning("checkpoint_every_steps is set, but without an output_dir no checkpoint is written")
    if output_dir is not None:
        check_place(Path(output_dir))
    with launched(config) as (accelerator, precision):
        run = _Run(model, train, validation, config, accelerator, precision, collator, output_dir)
        run.reporter = make_reporter(progress) if accelerator.is_main_process else Reporter()
        run.callbacks = tuple(callbacks) if accelerator.is_main_process else ()
        try:
            run.prepare(resume, description)
            return run.train()
        finally:
            run.close()


@dataclass
class _Position:
    """Where a run is; all of it is saved in a checkpoint."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    samples: int = 0
    window_sum: float = 0.0
    window_batches: int = 0
    epoch_seconds: float = 0.0
    train_seconds: float = 0.0
    seconds: float = 0.0
    skipped: int = 0
    best_epoch: int = 0
    best_value: float | None = None
    best_threshold: float | None = None
    last_threshold: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


class _Run:
    def __init__(
        self,
        model: Any,
        train: Any,
        validation: Any,
        config: TrainingConfig,
        accelerator: Any,
        precision: str,
        collator: Callable[[list[Any]], Mapping[str, Any]] | None,
        output_dir: str | Path | None,
    ):
        self.model = model
        self.config = config
        self.train_data, self.validation_data = train, validation
        self.train_length = length_of(train, "training")
        self.validation_length = None if validation is None else length_of(validation, "validation")
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.precision = precision
        # Without workers a batch is there when it is asked for, and may already lie on the GPU.
        self.pinned = accelerator.device.type == "cuda" and config.num_workers > 0
        self.metric = choose_metric(config.metric, model.problem_type)
        self.collator = collator or collator_for(model, train)
        self.text_lengths = text_lengths(train, self.collator) if config.bucket_by_length else None
        self.folder = None if output_dir is None else Path(output_dir)
        self.steps_in_epoch = math.ceil(self.train_length / config.batch_size)
        self.total_steps = self.steps_in_epoch * config.epochs
        self.at = _Position()
        self.best: dict[str, Tensor] = {}
        self.rates: dict[str, float] = {}
        self.log: RunLog | None = None
        self.reporter = Reporter()
        self.callbacks: tuple[Any, ...] = ()
        self._forward: Any = _MISSING
        self.prefixes: PrefixFeed | None = None
        self.captured: CapturedStep | None = None

    @property
    def checkpoint(self) -> Path:
        assert self.folder is not None
        return self.folder / "checkpoint"

    def prepare(self, resume: str, description: Mapping[str, Any] | None) -> None:
        """Everything before the first step."""
        model, config = self.model, self.config
        model.to(self.accelerator.device)
        resolve_pos_weight(model, self.train_data)
        self._open_prefixes()
        saved = self._find_checkpoint(resume)
        seed_everything(derived_seed(config.seed, "process", self.rank))
        backend = self._graphs()
        optimizer = make_optimizer(model, config, fused=backend is not None)
        self.optimizer: Any = optimizer
        self.parameters = [each for group in self.optimizer.param_groups for each in group["params"]]
        self.schedule = make_schedule(self.optimizer, total=self.total_steps, warmup_ratio=config.warmup_ratio)
        if saved is None and getattr(model, "needs_feature_statistics", False):
            self._fit_feature_statistics()
        model.train()
        # accelerate puts an autocasting `forward` onto the model itself; `close` takes it away again.
        self._forward = model.__dict__.get("forward", None)
        self.ddp = self.accelerator.prepare_model(model)
        self.optimizer = self.accelerator.prepare_optimizer(self.optimizer)
        if saved is not None:
            self._restore(*saved)
        if backend is not None:
            device, clip = self.accelerator.device, config.max_grad_norm
            self.captured = CapturedStep(self.ddp, model, optimizer, max_grad_norm=clip, device=device, backend=backend)
        if self.main and self.folder is not None:
            if saved is None:
                if self.checkpoint.exists() or (self.folder / "metrics.json").exists():
                    logger.warning("%s holds a run, which is replaced (resume='auto' goes on with it)", self.folder)
                shutil.rmtree(self.checkpoint, ignore_errors=True)
                (self.folder / "metrics.json").unlink(missing_ok=True)
            self.log = RunLog(
                self.folder, resume_step=None if saved is None else self.at.step, tensorboard=config.tensorboard
            )
            self._describe(description)

    def _graphs(self) -> Backend | None:
        """What captures whole steps, where the engine asks for that and it can be done."""
        if not getattr(getattr(self.model, "engine", None), "graphs", False):
            return None
        backend = backend_for(self.accelerator.device)
        reason = why_not_captured(self.model, self.accelerator, backend)
        if reason is not None:
            say_once("training", reason)
            return None
        return backend

    def train(self) -> FitResult:
        """The epochs that are left, then the best weights."""
        while self.at.epoch < self.config.epochs:
            self._train_epoch()
            self._finish_epoch()
        if self.config.load_best and self.best:
            self.model.load_state_dict(self.best, strict=True)
        threshold = self.at.best_threshold if self.config.load_best else self.at.last_threshold
        if threshold is not None:
            self.model.threshold = threshold
        self.model.eval()
        best = self.at.history[self.at.best_epoch - 1]
        result = FitResult(dict(best["validation"]), self.at.history, self.at.seconds, self.at.best_epoch, self.folder)
        if self.main and self.folder is not None:
            summary = {
                "best_epoch": result.best_epoch,
                "metric": self.metric if result.best_metrics else None,
                "validation": result.best_metrics,
                "train_loss": best["train_loss"],
                "epochs": self.config.epochs,
                "seconds": result.seconds,
            }
            self._write("metrics.json", lambda path: atomic_write_json(path, finite(summary)))
        self.accelerator.wait_for_everyone()
        return result

    def close(self) -> None:
        """Leave the model as it was, but trained."""
        self.reporter.stop()
        if self.prefixes is not None:
            self.prefixes.close()
        if self.log is not None:
            self.log.close()
        if self.captured is not None:
            self.captured.cache.clear()
        if self._forward is not _MISSING:
            forget(self.model)  # these graphs hold the forward that is taken away here
            for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
                self.model.__dict__.pop(name, None)
            if self._forward is not None:
                self.model.__dict__["forward"] = self._forward
        for parameter in self.model.parameters():
            parameter.grad = None

    def _find_checkpoint(self, resume: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if self.folder is None:
            return None
        if self.main:
            tidy(self.checkpoint)
        self.accelerator.wait_for_everyone()
        saved = load_checkpoint(self.checkpoint) if resume == "auto" else None
        self.identity = identity(
            self.model,
            self.config,
            {"train": self.train_length, "validation": self.validation_length},
            precision=self.precision,
            processes=self.ranks,
        )
        if saved is not None:
            check_identity(self.checkpoint, saved[1]["identity"], self.identity)
        self.accelerator.wait_for_everyone()
        return saved

    def _fit_feature_statistics(self) -> None:
        from accelerate.utils import send_to_device

        self._set_epoch(0)
        batches = ordered_batches(self.train_length, self.config.batch_size)

        def without_labels() -> Iterator[Any]:
            for _, batch in self._loader(self.train_data, batches):
                batch.pop("labels", None)
                yield send_to_device(batch, self.accelerator.device)

        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            self.model.fit_feature_statistics(Repeated(without_labels))

    def _train_epoch(self) -> None:
        from accelerate.utils import send_to_device

        at, config = self.at, self.config
        self._set_epoch(at.epoch)
        self.model.train()
        batches = training_batches(
            self.train_length,
            config.batch_size,
            seed=config.seed,
            epoch=at.epoch,
            rank=self.rank,
            ranks=self.ranks,
            text_lengths=self.text_lengths,
        )
        self.reporter.start(f"epoch {at.epoch + 1}/{config.epochs}", len(batches), at.batch)
        clock = time.perf_counter()
        for which, batch in self._loader(self.train_data, batches[at.batch :]):
            batch = prepared(self.model, batch)
            inputs: Any = send_to_device(batch, self.accelerator.device, non_blocking=self.pinned)
            loss, norm = self._step(inputs, which.count, which.total)
            at.batch, at.step = at.batch + 1, at.step + 1
            at.loss_sum, at.samples = at.loss_sum + loss * which.total, at.samples + which.total
            at.window_sum, at.window_batches = at.window_sum + loss, at.window_batches + 1
            elapsed, clock = time.perf_counter() - clock, time.perf_counter()
            at.epoch_seconds, at.train_seconds = at.epoch_seconds + elapsed, at.train_seconds + elapsed
            self._after_step(loss, norm)
        self.reporter.stop()

    def _step(self, inputs: dict[str, Any], count: int, total: int) -> tuple[float, float]:
        """One optimizer step: the loss over all processes and the gradient's norm before clipping."""
        if self.captured is not None:
            return self._captured_step(self.captured, inputs)
        out = self.ddp(**inputs)
        if out.loss is None:
            raise DataError(NO_LABELS)
        scaler = self.accelerator.scaler
        loss = out.loss
        if self.ranks > 1:  # the gradients are averaged over processes whose shares may differ in size
            loss = loss * (count * self.ranks / total)
        with backward_threads(self.accelerator.device, self.ranks):
            self.accelerator.backward(loss)
        self.accelerator.unscale_gradients()
        norm = torch.nn.utils.get_total_norm([each.grad for each in self.parameters if each.grad is not None])
        shown = self.accelerator.reduce(loss.detach().float(), "mean") if self.ranks > 1 else out.loss.detach().float()
        loss_value, norm_value = torch.stack([shown, norm.to(shown)]).tolist()
        overflow = scaler is not None and not math.isfinite(norm_value)
        self.at.skipped = self.at.skipped + 1 if overflow else 0
        if not math.isfinite(loss_value) or (overflow and self.at.skipped >= MOST_SKIPPED_STEPS):
            raise self._not_finite(inputs, out, loss_value)
        if scaler is None and not math.isfinite(norm_value):
            raise self._not_finite(inputs, out, loss_value)
        if self.config.max_grad_norm is not None and not overflow:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.max_grad_norm, norm)
        self.rates = learning_rates(self.optimizer)
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss_value, norm_value

    def _captured_step(self, step: CapturedStep, inputs: dict[str, Any]) -> tuple[float, float]:
        self.rates = learning_rates(self.optimizer)
        loss, norm = step(inputs)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            # The graph has no names for what it computed: the same pass once more, to say where it happened.
            step.rewind()
            out = self.ddp(**inputs)
            self.accelerator.backward(out.loss)
            raise self._not_finite(inputs, out, loss)
        self.schedule.step()
        return loss, norm

    def _not_finite(self, inputs: dict[str, Any], out: Any, loss: float) -> EpicFastError:
        at = self.at
        found = first_non_finite(self.model, inputs, getattr(out, "logits", None), out.loss)
        if found is None:
            found = "in another process's share of the batch, or in the sum of squares of the gradient"
        kept = "No checkpoint was written yet"
        if self.folder is not None and self.checkpoint.exists():
            kept = f"The last checkpoint is kept in {self.checkpoint}"
        return EpicFastError(
            f"step {at.step + 1} (epoch {at.epoch + 1}, batch {at.batch + 1}) is not finite, its loss is {loss}: first "
            f"{found}. The weights were not changed by this step. {kept}. Look at that batch, or try a smaller "
            "learning rate, a smaller max_grad_norm, or precision 'bf16' or 'fp32'."
        )

    def _after_step(self, loss: float, norm: float) -> None:
        at, config = self.at, self.config
        row: dict[str, Any] = {"step": at.step, "epoch": at.epoch + 1, "loss": loss, "grad_norm": norm}
        row["learning_rates"] = self.rates
        notify(self.callbacks, "on_step", row)
        if at.step % config.log_every_steps == 0 or at.step == self.total_steps:
            if self.log is not None:
                self.log.step({**row, "loss": at.window_sum / at.window_batches})
            at.window_sum, at.window_batches = 0.0, 0
        self.reporter.advance(f"loss {loss:.4f}")
        every = config.checkpoint_every_steps
        # After an epoch's last step comes its validation, and then a checkpoint of its own.
        if every is not None and at.step % every == 0 and at.batch < self.steps_in_epoch:
            self._save_checkpoint()

    def _finish_epoch(self) -> None:
        at = self.at
        clock = time.perf_counter()
        measured = self._validate()
        at.last_threshold = measured.get("threshold")
        value = measured.get(self.metric)
        best = value is None or is_better(self.metric, value, at.best_value)
        row: dict[str, Any] = {
            "step": at.step,
            "epoch": at.epoch + 1,
            "train_loss": at.loss_sum / at.samples,
            "validation": measured,
            "learning_rates": self.rates,
            "best": best,
        }
        diagnostics = getattr(self.model, "diagnostics", None)
        if diagnostics is not None:
            row["gates"] = {name: float(each) for name, each in diagnostics().items()}
        speed = at.samples / max(at.train_seconds, 1e-9)
        if best:
            at.best_epoch, at.best_value, at.best_threshold = at.epoch + 1, value, at.last_threshold
            self.best = {name: each.detach().cpu().clone() for name, each in self.model.state_dict().items()}
            self._save_adapter()
        at.epoch_seconds += time.perf_counter() - clock
        at.seconds += at.epoch_seconds
        at.history.append({**row, "seconds": at.epoch_seconds, "samples_per_second": speed})
        if self.log is not None:
            self.log.epoch(row, samples_per_second=speed)
        notify(self.callbacks, "on_epoch", at.history[-1])
        self.reporter.line(_sentence(at.history[-1], self.config.epochs))
        at.epoch, at.batch = at.epoch + 1, 0
        at.loss_sum, at.samples, at.epoch_seconds, at.train_seconds = 0.0, 0, 0.0, 0.0
        self._save_checkpoint()

    def _validate(self) -> dict[str, float]:
        """The validation metrics over all processes, each sample once; empty without validation data."""
        if self.validation_length is None:
            return {}
        from accelerate.utils import gather_object

        size = self.config.eval_batch_size or self.config.batch_size
        size = max(1, size // self.ranks)
        problem = self.model.problem_type
        found = infer(
            self.model,
            self._loader(
                self.validation_data, ordered_batches(self.validation_length, size, rank=self.rank, ranks=self.ranks)
            ),
            device=self.accelerator.device,
            autocast=self.accelerator.autocast,
            reporter=self.reporter,
            description="validation",
            with_loss=True,
            count_masks=problem == "segmentation",
        )
        shares = [found] if self.ranks == 1 else gather_object([found])
        logits = torch.cat([each for share in shares for each in share.logits])
        parts = [each for share in shares for each in share.labels]
        if not parts:
            raise DataError(
                "the validation samples carry no labels; wanted 'labels' in every batch, or validation=None"
            )
        labels = torch.cat(parts)
        order = torch.tensor([index for share in shares for index in share.indices]).argsort()
        logits, labels = logits[order], labels[order]
        threshold = tune_threshold(logits, labels) if problem == "multi_label_classification" else None
        if problem == "segmentation":
            measured = mask_metrics(logits)
        else:
            measured = compute_metrics(logits, labels, problem, num_labels=self.model.num_labels, threshold=threshold)
        measured["loss"] = sum(share.loss_sum for share in shares) / self.validation_length
        return measured

    def _open_prefixes(self) -> None:
        """The prefix cache, where the model's engine has one."""
        engine = getattr(self.model, "engine", None)
        if engine is not None and engine.prefix_cache is not None:
            self.prefixes = PrefixFeed(
                self.model,
                [each for each in (self.train_data, self.validation_data) if each is not None],
                self.collator,
                precision=self.precision,
                autocast=self.accelerator.autocast,
                seed=self.config.seed,
                num_workers=self.config.num_workers,
            )

    def _loader(self, dataset: Any, batches: Any) -> Any:
        if self.prefixes is not None:
            return self.prefixes.batches(dataset, batches)
        return loader(
            dataset,
            self.collator,
            batches,
            seed=self.config.seed,
            num_workers=self.config.num_workers,
            pin_memory=self.pinned,
        )

    def _set_epoch(self, epoch: int) -> None:
        set_epoch = getattr(self.train_data, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def _save_adapter(self) -> None:
        if self.folder is None or not self.main:
            return
        before = getattr(self.model, "threshold", None)
        if self.at.best_threshold is not None:
            self.model.threshold = self.at.best_threshold
        try:
            self._write("", self.model.save_pretrained)
        except EpicFastError:
            self.model.threshold = before
            raise

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        assert self.folder is not None
        path = self.folder / name
        try:
            write(path)
        except (OSError, SafetensorError) as error:
            raise EpicFastError(
                f"{path}: could not be written: {error}. What was there before is kept, and so is the last checkpoint: "
                "make room on the disk, then resume with resume='auto'."
            ) from error

    def _describe(self, description: Mapping[str, Any] | None) -> None:
        """``training.yaml``, unless the caller wrote one of its own and gave no description."""
        import yaml

        assert self.folder is not None
        path = self.folder / "training.yaml"
        if description is None and path.exists() and not path.read_text(encoding="utf-8").startswith(OWN_YAML):
            return
        method = getattr(self.model, "config", None)
        values = {
            **(description or {"data": {"train": self.train_length, "validation": self.validation_length}}),
            "method": asdict(method) if is_dataclass(method) and not isinstance(method, type) else None,
            "training": self.config.to_dict(),
        }
        plain = json.loads(json.dumps(finite(values), default=str))
        text = OWN_YAML + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        self._write("training.yaml", lambda place: atomic_write_text(place, text))

    def _save_checkpoint(self) -> None:
        if self.folder is None:
            return
        from accelerate.utils import gather_object

        mine = randomness(self.accelerator.device)
        everyone = [mine] if self.ranks == 1 else gather_object([mine])
        if self.main:
            tensors = {f"model/{name}": each for name, each in self.model.state_dict().items()}
            tensors |= {f"best/{name}": each for name, each in self.best.items()}
            tensors |= {f"optimizer/{name}": each for name, each in moments(self.model, self.optimizer).items()}
            for rank, (states, _) in enumerate(everyone):
                tensors |= {f"random/{rank}/{name}": each for name, each in states.items()}
            scaler = self.accelerator.scaler
            values = {
                "identity": self.identity,
                "position": asdict(self.at),
                "schedule": self.schedule.state_dict(),
                "rates": [group["lr"] for group in self.optimizer.param_groups],
                "random": [each for _, each in everyone],
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            if self.log is not None:
                self.log.sync()
            save_checkpoint(self.checkpoint, tensors, values)

    def _restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        def under(prefix: str) -> dict[str, Tensor]:
            return {name[len(prefix) :]: each for name, each in tensors.items() if name.startswith(prefix)}

        self.at = _Position(**values["position"])
        self.model.load_state_dict(under("model/"), strict=True)
        self.best = under("best/")
        restore_moments(self.model, self.optimizer, under("optimizer/"))
        self.schedule.load_state_dict(values["schedule"])
        for group, rate in zip(self.optimizer.param_groups, values["rates"], strict=True):
            group["lr"] = rate
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        restore_randomness(under(f"random/{self.rank}/"), values["random"][self.rank], self.accelerator.device)
        logger.info("resuming after step %d of %d (epoch %d)", self.at.step, self.total_steps, self.at.epoch + 1)


_MISSING = object()


def backward_threads(device: torch.device, ranks: int) -> AbstractContextManager[Any]:
    """On one GPU the backward pass runs in the thread that calls it: no hand-over to autograd's own, the same bits."""
    if device.type == "cuda" and ranks == 1:
        return torch.autograd.set_multithreading_enabled(False)
    return nullcontext()


def _sentence(row: dict[str, Any], epochs: int) -> str:
    parts = [f"epoch {row['epoch']}/{epochs}", f"train loss {row['train_loss']:.4f}"]
    parts += [f"{name} {value:.4f}" for name, value in row["validation"].items()]
    parts.append(f"{row['seconds']:.1f} s")
    return ", ".join(parts) + (" (best so far)" if row["best"] and row["validation"] else "")
