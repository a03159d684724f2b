"""The settings of a training run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from epic_fast.errors import ConfigError, check_names

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
DEVICES = ("auto", "cpu")

# These change neither the curve nor the weights of a run, so a resumed run may have others.
FREE_ON_RESUME = ("num_workers", "checkpoint_every_steps", "tensorboard", "load_best", "device")


@dataclass
class TrainingConfig:
    """How to train.

    Args:
        epochs: passes over the training data.
        batch_size: samples in an optimizer step, over all processes together; the last batch of an epoch may be
            smaller.
        eval_batch_size: samples at a time in validation; None takes ``batch_size``.
        learning_rate: peak rate of the prompts and the projections.
        head_learning_rate: peak rate of the head.
        gate_learning_rate: peak rate of the gates and of the log temperature.
        weight_decay: of the matrices in the projections and the head; prompts, gates and biases never decay.
        warmup_ratio: share of all steps in which the rates rise linearly; then they fall as a half cosine.
        max_grad_norm: clip the gradient to this L2 norm; None leaves it alone.
        precision: of the forward and backward pass: "bf16", "fp16" (a GPU is needed), "fp32", or "auto": bf16 on
            a GPU that has it, else fp32.  The trained parameters are float32 in every case.
        seed: of the order of the samples, the dropout and whatever the data set draws.
        num_workers: processes that load data; 0 loads in the training process.  It does not change the result.
        bucket_by_length: put samples with texts of similar length into a batch, so that less padding is computed.  It
            changes which samples share a batch, and with it the result; every epoch still has every sample once.
        metric: the validation metric that says which epoch is the best; None takes "accuracy", "f1_micro",
            "mae" or "oiou" by problem type; "loss" is always there.
        checkpoint_every_steps: write the state to resume from every so many steps too; None: after each epoch.
        log_every_steps: a line in the log every so many steps.
        load_best: leave the model with the weights of the best epoch; False: with those of the last.
        tensorboard: write TensorBoard files too.
        device: "auto" trains on the GPU if there is one, "cpu" never does.

    Raises:
        ConfigError: for a value that cannot be used.
    """

    epochs: int = 10
    batch_size: int = 64
    eval_batch_size: int | None = None
    learning_rate: float = 1e-3
    head_learning_rate: float = 5e-4
    gate_learning_rate: float = 1e-2
    weight_decay: float = 1e-2
    warmup_ratio: float = 0.05
    max_grad_norm: float | None = 1.0
    precision: str = "auto"
    seed: int = 0
    num_workers: int = 0
    bucket_by_length: bool = False
    metric: str | None = None
    checkpoint_every_steps: int | None = None
    log_every_steps: int = 10
    load_best: bool = True
    tensorboard: bool = True
    device: str = "auto"

    def __post_init__(self) -> None:
        self._whole("epochs", 1)
        self._whole("batch_size", 1)
        self._whole("eval_batch_size", 1, optional=True)
        self._number("learning_rate", above=0.0)
        self._number("head_learning_rate", above=0.0)
        self._number("gate_learning_rate", above=0.0)
        self._number("weight_decay", least=0.0)
        self._number("warmup_ratio", least=0.0, most=1.0)
        self._number("max_grad_norm", above=0.0, optional=True)
        self._whole("seed", 0)
        self._whole("num_workers", 0)
        self._whole("checkpoint_every_steps", 1, optional=True)
        self._whole("log_every_steps", 1)
        self._one_of("precision", PRECISIONS)
        self._one_of("device", DEVICES)
        for name in ("bucket_by_length", "load_best", "tensorboard"):
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "true or false")
        if self.metric is not None and not isinstance(self.metric, str):
            self._refuse("metric", "the name of a metric, or None")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON or YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """The inverse of :meth:`to_dict`; missing keys take their defaults, an unknown key is an error."""
        check_names(cls.__name__, values, [field.name for field in fields(cls)])
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> TrainingConfig:
        """Read a ``.json``, ``.yaml`` or ``.yml`` file."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read as a training configuration: {error}") from error
        try:
            if path.suffix == ".json":
                values = json.loads(text)
            else:
                import yaml

                values = yaml.safe_load(text)
        except ValueError as error:
            raise ConfigError(f"{path}: is not valid JSON: {error}") from error
        except Exception as error:
            raise ConfigError(f"{path}: is not valid YAML: {error}") from error
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: wanted a mapping of settings, found {type(values).__name__}")
        return cls.from_dict(values)

    def _refuse(self, name: str, wanted: str) -> None:
        raise ConfigError(f"TrainingConfig.{name} is {getattr(self, name)!r}; wanted {wanted}")

    def _whole(self, name: str, least: int, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self._refuse(name, f"a whole number of at least {least}" + (", or None" if optional else ""))

    def _number(
        self,
        name: str,
        *,
        above: float | None = None,
        least: float | None = None,
        most: float | None = None,
        optional: bool = False,
    ) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        number = _as_float(value)
        good = math.isfinite(number) and (above is None or number > above) and (least is None or number >= least)
        if not good or (most is not None and number > most):
            bounds = [f"above {above:g}"] if above is not None else []
            bounds += [f"at least {least:g}"] if least is not None else []
            bounds += [f"at most {most:g}"] if most is not None else []
            self._refuse(name, f"a number {' and '.join(bounds)}" + (", or None" if optional else ""))
        setattr(self, name, number)

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            self._refuse(name, "one of " + ", ".join(repr(each) for each in allowed))


def _as_float(value: Any) -> float:
    """``value`` as a number, NaN where it is none; text counts, because YAML 1.1 reads 1e-3 as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan
