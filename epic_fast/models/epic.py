"""EPIC: temporal prompts in both frozen towers, exchanging information by similarity.

A reconstruction.  The papers (EPIC, arXiv 2507.07415, and its predecessor MITP, arXiv 2401.14856) were known to
the authors of this file by their abstracts and summaries only, and no code is public.  What those state: prompts
are injected at intermediate layers of both frozen encoders, the other layers carry none; the two modalities'
prompts meet in a light-weight hub by similarity, each keeping its own context; about one per cent of the
parameters is trained.  Everything else is a choice: a field of :class:`EpicConfig`, or fixed here (the cosine taken
in the text tower's space, a softmax both ways, the residual sum, prompts without positions, no hub after the last
pair).

One step s on the layer pair (text layer t, vision layer v)::

    acquire      [p̂_t ; u_t] = Layer_t([p_t ; u_t])        [p̂_v ; u_v] = Layer_v([p_v ; u_v])
    interact     S = cos(p̂_t, W_vt p̂_v) / τ
    generate     p_t ← p̂_t + α_t softmax_j(S) W_vt p̂_v      p_v ← p̂_v + α_v softmax_i(S)ᵀ W_tv p̂_t

Layers between two pairs run the tokens alone while the prompts wait; after the last pair the prompts are
dropped, so no hub follows it.  A linear head reads both pooled towers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from epic_fast.backbones import DualEncoder, stages_of
from epic_fast.backbones.towers import PlainRun
from epic_fast.engine import Prefix
from epic_fast.engine.packed import PackedRun, exchange
from epic_fast.errors import ConfigError
from epic_fast.models.base import PromptedModel
from epic_fast.models.configuration import MethodConfig, check_choice, check_range
from epic_fast.nn import Head, InteractionHub

MAX_PROMPT_LENGTH = 256


@dataclass
class EpicConfig(MethodConfig):
    """The choices of EPIC.  Each is an inference from the papers' summaries; the defaults are our reading.

    Attributes:
        prompt_length: P, prompt rows a tower; 0 is the frozen backbone with a head.
        layer_pairs: (text layer, vision layer) of each step, 0-based, rising in both; None takes the last
            ``num_layer_pairs`` layers of each tower, one to one.
        num_layer_pairs: S, used where ``layer_pairs`` is None (fewer where a tower has fewer layers).
        prompt_mask: what prompt rows see of the tokens: ``"full"`` (every valid one) or ``"prefix"`` (none).
        prompt_init_std: standard deviation of the initial text prompt.
        vision_prompt_init: ``"projected"``, W_tv applied to the text prompt, or ``"gaussian"``, one of its own.
        interaction: False takes the hub away (gates at zero for good): the control.
        shared_projections: one pair W_tv, W_vt for all steps; False makes one pair a step.
        gate: ``"scalar"`` or ``"channel"``.
        gate_init, learn_gates: where the gates α start and whether they are trained.  From 0 a step begins as
            plain propagation of the prompts.
        temperature, learn_temperature: τ of the similarity at the start, trained in log space.
        activation: ``"none"``, or ``"gelu_layernorm"`` on what the hub adds.
        text_head_input, vision_head_input: features that the head reads, joined by ``+``: ``pooled`` (the tower's
            own pooling), ``projected`` (after the backbone's projection), ``cls``, ``mean``.
        head_reads_prompts: the head also reads the mean prompt of each tower after the last pair.
        head_reads_similarity: the head also reads the cosines of every interaction, and those after the last pair.
        projection_init: ``"random"``, or ``"least_squares"``: before training, the regression of one tower's prompts
            on the other's over the training pairs.
        feature_norm: ``"none"``, ``"layer"``, or ``"standardize"`` (by the training set's mean and deviation).
        head: ``"linear"``, or ``"mlp"`` with ``head_hidden_size`` hidden units.
        head_dropout: share of the head's inputs dropped in training.
        label_smoothing: of the single-label loss.
    """

    method = "epic"

    prompt_length: int = 8
    layer_pairs: Sequence[tuple[int, int]] | None = None
    num_layer_pairs: int = 6
    prompt_mask: Literal["full", "prefix"] = "full"
    prompt_init_std: float = 0.02
    vision_prompt_init: Literal["projected", "gaussian"] = "projected"
    interaction: bool = True
    shared_projections: bool = True
    gate: Literal["scalar", "channel"] = "scalar"
    gate_init: float = 0.0
    learn_gates: bool = True
    temperature: float = 0.1
    learn_temperature: bool = True
    activation: Literal["none", "gelu_layernorm"] = "none"
    text_head_input: str = "pooled"
    vision_head_input: str = "pooled"
    head_reads_prompts: bool = False
    head_reads_similarity: bool = False
    projection_init: Literal["random", "least_squares"] = "random"
    feature_norm: Literal["none", "layer", "standardize"] = "none"
    head: Literal["linear", "mlp"] = "linear"
    head_hidden_size: int = 256
    head_dropout: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "prompt_length", 0, MAX_PROMPT_LENGTH)
        check_range(self, "num_layer_pairs", 1)
        check_range(self, "head_hidden_size", 1)
        check_range(self, "prompt_init_std", 0.0)
        check_range(self, "temperature", 0.0, exclusive=True)
        check_range(self, "head_dropout", 0.0, 0.99)
        check_range(self, "label_smoothing", 0.0, 0.99)
        for name in (
            "prompt_mask",
            "vision_prompt_init",
            "gate",
            "activation",
            "projection_init",
            "feature_norm",
            "head",
        ):
            check_choice(self, name)
        if self.interaction and self.gate_init == 0 and not self.learn_gates:
            raise ConfigError(
                "EpicConfig.gate_init=0 with learn_gates=False keeps the interaction shut for good; wanted a gate that "
                "is open or can open (another gate_init, or learn_gates=True), or interaction=False for the control"
            )
        if self.layer_pairs is not None:
            if not isinstance(self.layer_pairs, (list, tuple)):
                raise ConfigError(
                    f"EpicConfig.layer_pairs={self.layer_pairs!r}; wanted a list of (text layer, vision layer), or None"
                )
            self.layer_pairs = [self._as_pair(pair) for pair in self.layer_pairs]
            if not self.layer_pairs:
                raise ConfigError(
                    "EpicConfig.layer_pairs is empty; wanted at least one (text layer, vision layer), or None for the "
                    "default. prompt_length=0 is the backbone without prompts"
                )

    @staticmethod
    def _as_pair(pair: Any) -> tuple[int, int]:
        if (
            not isinstance(pair, (tuple, list))
            or len(pair) != 2
            or not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in pair)
        ):
            raise ConfigError(
                f"EpicConfig.layer_pairs has the entry {pair!r}; wanted pairs (text layer, vision layer) of integers"
            )
        return (pair[0], pair[1])

    def resolve_layer_pairs(self, text_layers: int, vision_layers: int) -> list[tuple[int, int]]:
        """The pairs for towers of these depths.

        Raises:
            ConfigError: a layer that a tower does not have, or pairs that do not rise in both towers.
        """
        if self.layer_pairs is None:
            steps = min(self.num_layer_pairs, text_layers, vision_layers)
            return [(text_layers - steps + step, vision_layers - steps + step) for step in range(steps)]
        pairs = [(text, vision) for text, vision in self.layer_pairs]
        for modality, side, depth in (("text", 0, text_layers), ("vision", 1, vision_layers)):
            for pair in pairs:
                if not 0 <= pair[side] < depth:
                    raise ConfigError(
                        f"EpicConfig.layer_pairs names {modality} layer {pair[side]}, but this {modality} tower has "
                        f"{depth} (0..{depth - 1})"
                    )
            for before, after in itertools.pairwise(pairs):
                if after[side] <= before[side]:
                    raise ConfigError(
                        f"EpicConfig.layer_pairs has {modality} layer {after[side]} after {before[side]}; wanted pairs "
                        "that rise in both towers: prompts travel upwards"
                    )
        return pairs


class EpicModel(PromptedModel):
    """A frozen dual encoder with EPIC's prompts, hub and head; made by :func:`epic_fast.wrap`."""

    config: EpicConfig
    projections_fitted: Tensor | None

    def __init__(self, backbone: DualEncoder, config: EpicConfig, **task: Any):
        super().__init__(backbone, config, **task)
        text, vision = backbone.text, backbone.vision
        self.layer_pairs = config.resolve_layer_pairs(text.num_layers, vision.num_layers)
        if config.prompt_length:
            self._check_widths()
            projected = config.vision_prompt_init == "projected"
            self.text_prompt = nn.Parameter(torch.empty(config.prompt_length, text.hidden_size))
            nn.init.normal_(self.text_prompt, std=config.prompt_init_std)
            if not projected:
                self.vision_prompt = nn.Parameter(torch.empty(config.prompt_length, vision.hidden_size))
                nn.init.normal_(self.vision_prompt, std=config.prompt_init_std)
            self.hub = InteractionHub(
                text.hidden_size,
                vision.hidden_size,
                steps=len(self.layer_pairs) - 1 if config.interaction else 0,
                shared=config.shared_projections,
                starts_vision=projected,
                gate=config.gate,
                gate_init=config.gate_init,
                learn_gates=config.learn_gates,
                temperature=config.temperature,
                learn_temperature=config.learn_temperature,
                activation=config.activation,
            )
        width = text.feature_width(config.text_head_input) + vision.feature_width(config.vision_head_input)
        if config.head_reads_prompts and config.prompt_length:
            width += text.hidden_size + vision.hidden_size
        if self.reads_similarity:
            width += len(self.layer_pairs) * config.prompt_length**2
        self.register_buffer("projections_fitted", torch.tensor(False) if self._fits_projections() else None)
        self.head = Head(
            width,
            self.num_labels,
            kind=config.head,
            hidden_size=config.head_hidden_size,
            dropout=config.head_dropout,
            norm=config.feature_norm,
        )

    def _check_widths(self) -> None:
        for side, tower in enumerate((self.backbone.text, self.backbone.vision)):
            *narrow, last = stages_of(tower)
            first = self.layer_pairs[0][side]
            for stage in narrow:
                if stage.start <= first < stage.stop:
                    raise ConfigError(
                        f"EpicConfig.layer_pairs names {tower.modality} layer {first} (None takes the last "
                        f"num_layer_pairs), whose tokens have width {stage.width}; wanted layers {last.start} to "
                        f"{last.stop - 1}, the last stage of this tower: EPIC's prompts keep their width"
                    )

    def first_layers(self) -> tuple[int, int]:
        return self.layer_pairs[0]

    def features(self, prefix: Prefix) -> Tensor:
        towers = text_tower, vision_tower = self.backbone.text, self.backbone.vision
        text, vision = prefix.text, prefix.vision
        reads = self.config.text_head_input, self.config.vision_head_input
        more: list[Tensor] = []
        if self.config.prompt_length:
            runs = text_run, vision_run = self._begin(prefix, reads)
            made: dict[Any, Any] = {}
            for step, layers in enumerate(self.layer_pairs):
                for run, layer in zip(runs, layers, strict=True):
                    run.step(layer)
                if self.reads_similarity:
                    more.append(self._similarity(text_run.prompts, vision_run.prompts, step))
                if step < self.hub.steps:
                    self._interact(text_run, vision_run, step, made)
            if self.config.head_reads_prompts:
                more += [run.prompts.mean(dim=1) for run in runs]
            text, vision = (run.finish() for run in runs)
        else:
            text, vision = (
                tower.advance(state, tower.num_layers, self.engine, read)
                for tower, state, read in zip(towers, (text, vision), reads, strict=True)
            )
        return torch.cat(
            [text_tower.features(text, reads[0]), vision_tower.features(vision, reads[1]), *more],
            dim=-1,
        )

    def _begin(self, prefix: Prefix, reads: tuple[str | None, str | None] = (None, None)) -> Any:
        """Both towers' ways through the layers; ``reads``: the features that are read of the last ones."""
        towers = self.backbone.text, self.backbone.vision
        states = prefix.text, prefix.vision
        prompts = self.initial_prompts(len(prefix.text.hidden))
        return [
            tower.begin(
                state,
                prompt,
                self.config.prompt_mask,
                self.engine,
                first=first,
                reads=read,
                reads_prompts=self.config.head_reads_prompts or self.reads_similarity,
            )
            for tower, state, prompt, first, read in zip(
                towers, states, prompts, self.first_layers(), reads, strict=True
            )
        ]

    def _similarity(self, text_prompt: Tensor, vision_prompt: Tensor, step: int) -> Tensor:
        if self.engine is not None:
            # The next prompts may take the place of these, which backward will want to see.
            text_prompt, vision_prompt = text_prompt.clone(), vision_prompt.clone()
        return self.hub.similarity(text_prompt, vision_prompt, step).flatten(1)

    def _interact(
        self, text: PackedRun | PlainRun, vision: PackedRun | PlainRun, step: int, made: dict[Any, Any]
    ) -> None:
        if (
            self.hub.activation == "none"
            and isinstance(text, PackedRun)
            and isinstance(vision, PackedRun)
            and exchange(text, vision, self.hub.parameters_of(step, text.prompts.dtype, made))
        ):
            return
        text.prompts, vision.prompts = self.hub(text.prompts, vision.prompts, step)

    def initial_prompts(self, batch: int) -> tuple[Tensor, Tensor]:
        """The prompts before the first pair, ``(B, P, D_t)`` and ``(B, P, D_v)``, the same for every sample."""
        if self.config.vision_prompt_init == "projected":
            vision_prompt = self.hub.initial_vision_prompt(self.text_prompt)
        else:
            vision_prompt = self.vision_prompt
        return self.text_prompt.expand(batch, -1, -1), vision_prompt.expand(batch, -1, -1)

    # -- the projections' start ---------------------------------------------------------------------------------

    @property
    def reads_similarity(self) -> bool:
        """Whether the head reads the hub's cosines; there are none without a hub."""
        return self.config.head_reads_similarity and bool(self.config.prompt_length) and self.hub.steps > 0

    def _fits_projections(self) -> bool:
        fits = self.config.projection_init == "least_squares" and bool(self.config.prompt_length)
        return fits and self.hub.steps > 0

    def _waits_for_projections(self) -> bool:
        return self.projections_fitted is not None and not bool(self.projections_fitted)

    @property
    def needs_feature_statistics(self) -> bool:
        return super().needs_feature_statistics or self._waits_for_projections()

    @torch.no_grad()
    def fit_feature_statistics(self, batches: Iterable[Mapping[str, Any]]) -> None:
        if self.projections_fitted is not None and self._waits_for_projections():
            if iter(batches) is batches:
                raise ConfigError(
                    "projection_init='least_squares' reads the batches twice; wanted a list or a DataLoader, not a "
                    "generator"
                )
            text, vision = [], []
            for prefix in self.prefixes(batches):
                for run, layer, means in zip(self._begin(prefix), self.first_layers(), (text, vision), strict=True):
                    run.step(layer)
                    means.append(run.prompts.mean(dim=1))
            self.hub.fit_least_squares(torch.cat(text), torch.cat(vision))
            self.projections_fitted.fill_(True)
        if super().needs_feature_statistics:
            super().fit_feature_statistics(batches)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups: dict[str, list[nn.Parameter]] = {"prompts": [], "projections": [], "gates": [], "head": []}
        for name, parameter in self.trainable_parameters():
            if name.startswith("head."):
                groups["head"].append(parameter)
            elif name in ("text_prompt", "vision_prompt"):
                groups["prompts"].append(parameter)
            elif name.endswith(("_gate", "log_temperature")):
                groups["gates"].append(parameter)
            else:
                groups["projections"].append(parameter)
        return {name: parameters for name, parameters in groups.items() if parameters}

    def diagnostics(self) -> dict[str, float]:
        return self.hub.diagnostics() if self.config.prompt_length else {}

    def describe_layer(self, modality: str, layer: int) -> str:
        side = 0 if modality == "text" else 1
        if not self.config.prompt_length:
            return "extraction"
        for step, pair in enumerate(self.layer_pairs):
            if pair[side] == layer:
                hub = ", then the hub" if step < self.hub.steps else ""
                return f"interaction {step}: {self.config.prompt_length} prompts{hub}"
        return "extraction, no graph" if layer < self.first_layers()[side] else "extraction"
