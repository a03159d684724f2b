"""What every method's model has: frozen backbone, task, loss, state that holds the trainable tensors only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from epic_fast.backbones import DualEncoder
from epic_fast.engine import EngineConfig, Prefix, TowerState
from epic_fast.errors import ConfigError
from epic_fast.models.configuration import MethodConfig

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
SEGMENTATION = "segmentation"
# Of cross-entropy: a label of this value adds nothing.
IGNORED = -100


@dataclass
class PromptedModelOutput(ModelOutput):
    """Output of a prompted model.

    Attributes:
        loss: ``()``, None without labels.
        logits: ``(B, K)``, of masks ``(B, 2, H, W)``; float32, or float64 where the head is.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class PromptedModel(nn.Module, ABC):
    """A frozen dual encoder with trainable prompts and a head.

    Args:
        backbone: the towers; frozen, and in ``eval()`` for good.
        config: the method's configuration.
        num_labels: K, outputs of the head.
        problem_type: ``"single_label_classification"``, ``"multi_label_classification"``, ``"regression"``, or
            what else is among the method's ``problem_types`` (MiT: ``"segmentation"``).
        labels: K names, or None.
        pos_weight: of the multi-label loss: ``(K,)``, None, or ``"auto"``, which :func:`epic_fast.fit` resolves to
            negatives / positives of the training set.
        engine: how the frozen towers are executed; None runs the backbone's own modules.
    """

    # Trainer asks for this when it resumes from a file that holds the trainable tensors only.
    _keys_to_ignore_on_save: list[str] = []  # noqa: RUF012
    problem_types: tuple[str, ...] = PROBLEM_TYPES

    def __init__(
        self,
        backbone: DualEncoder,
        config: MethodConfig,
        *,
        num_labels: int,
        problem_type: str = "single_label_classification",
        labels: Sequence[str] | None = None,
        pos_weight: Tensor | Sequence[float] | str | None = None,
        engine: EngineConfig | None = None,
    ):
        super().__init__()
        _check_task(num_labels, problem_type, labels, self.problem_types)
        self.label_smoothing: float = getattr(config, "label_smoothing", 0.0)
        if self.label_smoothing and problem_type != "single_label_classification":
            raise ConfigError(
                f"label_smoothing={self.label_smoothing} with problem_type={problem_type!r}; only the loss of "
                "single_label_classification has it, wanted 0"
            )
        self.backbone = backbone
        self.config = config
        self.engine = engine
        self.num_labels = num_labels
        self.problem_type = problem_type
        self.labels = None if labels is None else [str(label) for label in labels]
        self.threshold: float | None = None
        self.register_buffer("pos_weight_values", None)
        self._pos_weight_auto = False
        self._statistics_checked = False
        self._set_pos_weight_argument(pos_weight)
        self.register_state_dict_post_hook(_drop_backbone)
        self.register_load_state_dict_post_hook(_forgive_backbone)

    @property
    def engine(self) -> EngineConfig | None:
        """How the frozen towers are executed; None runs the backbone's own modules.  May be set at any time."""
        return self._engine

    @engine.setter
    def engine(self, engine: EngineConfig | None) -> None:
        if not (engine is None or isinstance(engine, EngineConfig)):
            raise ConfigError(f"engine={engine!r} is a {type(engine).__name__}; wanted an EngineConfig, or None")
        self._engine = engine

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Of a whole model that was saved when this was no property.
        state = dict(state)
        state.setdefault("_engine", state.pop("engine", None))
        super().__setstate__(state)

    # -- what a method says -----------------------------------------------------------------------------------

    @abstractmethod
    def first_layers(self) -> tuple[int, int]:
        """The first (text, vision) layers that see a prompt; those below run without a graph."""

    @abstractmethod
    def features(self, prefix: Prefix) -> Tensor:
        """From the towers below the first prompts to the head's input, ``(B, F)``."""

    def features_and_penalty(self, prefix: Prefix) -> tuple[Tensor, Tensor | None]:
        """:meth:`features`, and what the loss has besides in training, ``()``; None: nothing."""
        return self.features(prefix), None

    def logits_and_penalty(self, prefix: Prefix) -> tuple[Tensor, Tensor | None]:
        """The head's answer, and the penalty of :meth:`features_and_penalty`."""
        features, penalty = self.features_and_penalty(prefix)
        return self.head(features), penalty

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All trainable tensors by kind: ``prompts``, ``projections``, ``gates``, ``head``."""

    def diagnostics(self) -> dict[str, float]:
        """Numbers worth a look during training, such as the gates."""
        return {}

    def describe_layer(self, modality: str, layer: int) -> str:
        """What happens at a layer, in a few words, for :meth:`summary`."""
        return ""

    head: nn.Module

    @property
    def text_template(self) -> str | None:
        """What texts are put into before they are tokenized, at ``{text}``; None: they stay as they are."""
        return None

    # -- forward ----------------------------------------------------------------------------------------------

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        prefix: Prefix | None = None,
        text_lengths: Tensor | None = None,
    ) -> PromptedModelOutput:
        """Logits of pictures and texts, and the loss where there are labels.

        Args:
            pixel_values: ``(B, 3, H, W)`` from the backbone's image processor.
            input_ids, attention_mask, token_type_ids: ``(B, N)`` from its tokenizer.
            labels: ``(B,)`` class indices; ``(B, K)`` zeros and ones; or ``(B,)`` / ``(B, K)`` numbers, by
                ``problem_type``.
            prefix: what :meth:`extract` gave for these inputs, in their place.
            text_lengths: ``(B,)`` from :meth:`prepare`, with which nothing waits for the device.
        """
        if prefix is None:
            prefix = self.extract(pixel_values, input_ids, attention_mask, token_type_ids, text_lengths)
        elif not torch.compiler.is_compiling():
            self.backbone.ensure_eval()
        if labels is not None and self.training and not (self._statistics_checked or torch.compiler.is_compiling()):
            self._check_statistics()
        logits, penalty = self.logits_and_penalty(self._measured(prefix))
        loss = None if labels is None else self.loss(logits, labels)
        if loss is not None and penalty is not None and self.training:
            loss = loss + penalty
        return PromptedModelOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def extract(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        text_lengths: Tensor | None = None,
    ) -> Prefix:
        """Embeddings and layers below the first prompts: frozen, no graph, a fixed function of the inputs."""
        if pixel_values is None or input_ids is None:
            missing = "pixel_values" if pixel_values is None else "input_ids"
            raise ConfigError(f"{missing} was not given; wanted pictures and texts together, or prefix=")
        if len(pixel_values) != len(input_ids):
            raise ConfigError(f"{len(pixel_values)} pictures and {len(input_ids)} texts were given; wanted pairs")
        if not torch.compiler.is_compiling():
            self.backbone.ensure_eval()
        vision = self.backbone.vision
        return Prefix(
            text=self.extract_text(input_ids, attention_mask, token_type_ids, text_lengths),
            vision=vision.advance(vision.enter(pixel_values, self.engine), self.first_layers()[1], self.engine),
        )

    @torch.no_grad()
    def extract_text(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        text_lengths: Tensor | None = None,
    ) -> TowerState:
        """The text half of :meth:`extract`."""
        text = self.backbone.text
        if text_lengths is None and self._trims:
            texts = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
            texts: dict[str, Any] = text.trim(texts)
            text_lengths = texts.pop("text_lengths", None)
            tokens = text.start(**texts)
        else:
            tokens = text.start(input_ids, attention_mask, token_type_ids)
        if text_lengths is not None:
            tokens = replace(tokens, lengths=text_lengths)
        elif text.runs_fused(self.engine):
            tokens = tokens.measured()
        return text.advance(tokens, self.first_layers()[0], self.text_engine)

    @property
    def text_engine(self) -> EngineConfig | None:
        """How the text tower's layers are executed."""
        return self.engine

    @property
    def _trims(self) -> bool:
        return self.engine is not None and self.engine.trim_text

    def _measured(self, prefix: Prefix) -> Prefix:
        """A prefix of which it is known where its texts end, if the engine is to run it."""
        if not self.backbone.text.runs_fused(self.engine):
            return prefix
        return replace(prefix, text=prefix.text.measured())

    def prepare(self, batch: Mapping[str, Any], *, multiple: int = 1) -> dict[str, Any]:
        """A batch as the engine wants it: texts cut to the longest of them, and ``text_lengths``.

        Best called on the host: :meth:`forward` then neither cuts nor waits for the device, and can be captured.
        Without an engine, and where padding is not on the right, a batch is given back as it is.

        Args:
            batch: keyword arguments of :meth:`forward`.
            multiple: the tokens left are a multiple of this where the batch has so many: fewer shapes to capture.
        """
        batch = dict(batch)
        if self.engine is None or "text_lengths" in batch:
            return batch
        if self._trims:
            return self.backbone.text.trim(batch, multiple=multiple)
        whole = self.backbone.text.trim(batch)
        return {**batch, "text_lengths": whole["text_lengths"]} if "text_lengths" in whole else batch

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The task's loss, ``()``: cross-entropy, BCE with logits, or squared error.

        Raises:
            ConfigError: labels whose shape or type is not the task's, or ``pos_weight="auto"`` unresolved.
        """
        self._check_labels(logits, labels)
        if self.problem_type == "single_label_classification":
            return self._cross_entropy(logits, labels)
        if self.problem_type == "multi_label_classification":
            if self._pos_weight_auto:
                raise ConfigError(
                    "pos_weight='auto' is not resolved yet: epic_fast.fit() does it from the training labels; in a "
                    "loop of your own call model.set_pos_weight(negatives / positives) first"
                )
            weight = self.pos_weight_values
            return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), pos_weight=weight)
        return nn.functional.mse_loss(logits, labels.to(logits.dtype).reshape(logits.shape))

    def _check_labels(self, logits: Tensor, labels: Tensor) -> None:
        batch, outputs = logits.shape
        if self.problem_type == "single_label_classification":
            wanted = labels.dim() == 1 and labels.shape[0] == batch
        elif labels.dim() == 1:
            wanted = self.problem_type == "regression" and outputs == 1 and labels.shape[0] == batch
        else:
            wanted = labels.shape == logits.shape
        if not wanted:
            single = f"({batch},)"
            shapes = {
                "single_label_classification": single,
                "multi_label_classification": f"({batch}, {outputs})",
                "regression": f"({batch}, {outputs})" + (f" or {single}" if outputs == 1 else ""),
            }
            raise ConfigError(
                f"labels have shape {tuple(labels.shape)}; wanted {shapes[self.problem_type]} for {self.problem_type}"
            )
        if self.problem_type == "single_label_classification" and labels.is_floating_point():
            raise ConfigError(
                f"labels are of type {labels.dtype}; wanted integers, class indices, for {self.problem_type}"
            )

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        def compute() -> Tensor:
            return nn.functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

        if torch.compiler.is_compiling():
            return compute()
        try:
            return compute()
        except IndexError as error:
            # Labels on the CPU; on a GPU nobody looks at them in time.
            beyond = ((labels < 0) & (labels != IGNORED)) | (labels >= self.num_labels)
            raise ConfigError(
                f"labels hold {labels[beyond].tolist()[:5]}; wanted classes 0 to {self.num_labels - 1}, or {IGNORED} "
                "for what does not count"
            ) from error

    # -- task -------------------------------------------------------------------------------------------------

    @property
    def pos_weight(self) -> Tensor | str | None:
        """Weight of the positives of each label: ``(K,)``, None, or ``"auto"`` while unresolved."""
        return "auto" if self._pos_weight_auto else self.pos_weight_values

    def set_pos_weight(self, weight: Tensor | Sequence[float]) -> None:
        """Fix the weight of the positives, ``(K,)``."""
        values = torch.as_tensor(weight, dtype=torch.float32)
        if values.shape != (self.num_labels,):
            raise ConfigError(f"pos_weight has shape {tuple(values.shape)}; wanted ({self.num_labels},), one a label")
        self.pos_weight_values = values.to(self.device)
        self._pos_weight_auto = False

    def _set_pos_weight_argument(self, weight: Tensor | Sequence[float] | str | None) -> None:
        if weight is None:
            return
        if self.problem_type != "multi_label_classification":
            raise ConfigError(
                f"pos_weight was given with problem_type={self.problem_type!r}; it belongs to "
                "'multi_label_classification'"
            )
        if isinstance(weight, str):
            if weight != "auto":
                raise ConfigError(f"pos_weight={weight!r}; wanted {self.num_labels} numbers, None or 'auto'")
            self._pos_weight_auto = True
        else:
            self.set_pos_weight(weight)

    @property
    def needs_feature_statistics(self) -> bool:
        """Whether the head waits for :meth:`fit_feature_statistics`."""
        return bool(getattr(getattr(self.head, "norm", None), "needs_statistics", False))

    def _check_statistics(self) -> None:
        # Asked once: the answer lies on the model's device, and training never takes it back.
        if self.needs_feature_statistics:
            raise ConfigError(
                "this configuration starts from statistics of the training set (feature_norm='standardize' or "
                "projection_init='least_squares'): epic_fast.fit() measures them; in a loop of your own call "
                "model.fit_feature_statistics(batches) before the first step"
            )
        self._statistics_checked = True

    @torch.no_grad()
    def fit_feature_statistics(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Standardise the head's input: one pass over the training set (batches as for :meth:`forward`)."""
        features = (self.features(prefix).float() for prefix in self.prefixes(batches))
        self.head.norm.fit(features)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]

    def prefixes(self, batches: Iterable[Mapping[str, Any]]) -> Iterator[Prefix]:
        """The prefix of each batch (as for :meth:`forward`, labels unread), on the model's device."""
        for batch in batches:
            inputs = {name: _to(value, self.device) for name, value in batch.items() if name != "labels"}
            yield self._measured(inputs["prefix"]) if "prefix" in inputs else self.extract(**inputs)

    # -- frozen and trainable ----------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> PromptedModel:
        """Switch dropout of the head; the backbone stays in ``eval()``."""
        super().train(mode)
        return self

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and tensors that training changes; none of the backbone's."""
        return [(name, each) for name, each in self.named_parameters() if not name.startswith("backbone.")]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters."""
        trainable = sum(parameter.numel() for _, parameter in self.trainable_parameters())
        return trainable, sum(parameter.numel() for parameter in self.parameters())

    def print_trainable_parameters(self) -> None:
        """Say how much of the model is trained."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.3f} %)")

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def summary(self) -> str:
        """Where the prompts are: one line a layer, and the trainable tensors with their shapes."""
        lines = [f"{type(self).__name__} on {self.backbone.family}"]
        for tower in (self.backbone.text, self.backbone.vision):
            lines.append(f"{tower.modality} tower: {tower.num_layers} layers, width {tower.hidden_size}")
            lines.extend(
                f"  layer {index:2d}  {self.describe_layer(tower.modality, index)}" for index in range(tower.num_layers)
            )
        lines.append("trainable:")
        lines.extend(f"  {name}  {tuple(each.shape)}" for name, each in self.trainable_parameters())
        trainable, total = self.get_nb_trainable_parameters()
        lines.append(f"  {trainable:,} of {total:,} parameters ({100 * trainable / total:.3f} %)")
        return "\n".join(lines)

    # -- saving -----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, **unused: Any) -> None:
        """Write ``config.json`` and ``model.safetensors`` (the trainable tensors) into ``folder``.

        Each file replaces its predecessor only once it is whole on the disk.
        """
        from epic_fast.models.saving import save

        save(self, Path(folder))

    def unwrap(self) -> Any:
        """The backbone as it was given to :func:`epic_fast.wrap`, bit for bit."""
        return self.backbone.release()


def _check_task(num_labels: int, problem_type: str, labels: Sequence[str] | None, known: Sequence[str]) -> None:
    if problem_type not in known:
        method = "; masks are what MiT makes (MitConfig, --method mit)" if problem_type == SEGMENTATION else ""
        raise ConfigError(f"problem_type={problem_type!r}; wanted one of {', '.join(map(repr, known))}{method}")
    if problem_type == SEGMENTATION and num_labels != 2:
        raise ConfigError(f"num_labels={num_labels!r}; wanted 2 for {problem_type}, background and object")
    least = 2 if problem_type == "single_label_classification" else 1
    if not isinstance(num_labels, int) or isinstance(num_labels, bool) or num_labels < least:
        raise ConfigError(f"num_labels={num_labels!r}; wanted an integer of at least {least} for {problem_type}")
    if isinstance(labels, str):
        raise ConfigError(f"labels={labels!r}; wanted a list of {num_labels} names")
    if labels is not None and len(labels) != num_labels:
        raise ConfigError(f"{len(labels)} label names were given for num_labels={num_labels}; wanted one a label")
    twice = sorted({repr(label) for label in labels or () if list(labels or ()).count(label) > 1})
    if twice:
        raise ConfigError(f"label names are given twice: {', '.join(twice)}; wanted names that tell the labels apart")


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if hasattr(value, "to") else value


def _drop_backbone(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}backbone.")]:
        del state[name]


def _forgive_backbone(module: Any, incompatible: Any) -> None:
    """Strict loading misses none of this backbone's tensors; a stranger named ``backbone`` is not forgiven."""
    own = {f"backbone.{name}" for name in module.backbone.state_dict()}

    def is_own(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[at:]) in own for at, part in enumerate(parts) if part == "backbone")

    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not is_own(name)]
