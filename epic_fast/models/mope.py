"""MoPE: conditional prompts from a mixture of experts, routed by both modalities (arXiv 2403.10568 and 2312.03734).

Written after the released code (github.com/songrise/MoPE, the path ``mope``), whose fields and defaults these are, with
three departures: prompts go into the windows of their own sample (there they are paired with other samples' windows as
soon as a picture has several), noise on the routing is drawn in training only, and frozen towers run without dropout.
The accuracies published for it are not claimed here.

The complementary modality (text, by default) gives one feature y; the main modality (the picture) carries prompts
through all its layers and is what is classified.  Layer b of the main tower, C wide, in stage i::

    q   = [W_x x̄ ; W_y y]                   x̄: mean of all rows that come in, prompts included
    r   = softmax(q R / τ + ε)              R frozen, orthogonal; ε ~ N(0, σ²) in training
    P_d = Σ_j r_j E_j                       dynamic prompt, mixed from k experts of l rows
    P_m = GELU(W_i GELU(s ⊙ W_h y + t))     mapped prompt, one row a stage
    [P ; x] ← Layer_b([P_s ; P_d ; P_m ; x])

The first layer of every stage is not routed: it takes the prompts that arrive, learned ones at the tower's entrance and
merged like patches between stages.  Layers of the complementary tower have static prompts of their own, taken out again
behind each.  The loss has ``importance_weight`` times the unevenness of the experts' use besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from epic_fast.backbones import DualEncoder, Tower, stages_of
from epic_fast.backbones.swin import SwinRun, SwinTower
from epic_fast.engine import Prefix, TowerState, lanes
from epic_fast.engine.packed import PackedRun
from epic_fast.engine.routes import MOST_PROBES, PromptRoute
from epic_fast.errors import ConfigError
from epic_fast.hooks import untouched
from epic_fast.models.base import PromptedModel
from epic_fast.models.configuration import MethodConfig, check_choice, check_range
from epic_fast.nn import ExpertRouter, Head, PromptExperts, PromptMapper, importance_loss
from epic_fast.nn.prompt_experts import uniform

MAX_PROMPT_ROWS = 256


@dataclass
class MopeConfig(MethodConfig):
    """The choices of MoPE.  Defaults are those of the released code where it has them.

    Attributes:
        modality: ``"text_to_vision"``, where pictures are classified with prompts that the text helps to choose, or
            ``"vision_to_text"``.
        num_experts: k, experts a routed layer; 1 is the unrouted form: a learned prompt in the experts' place.
        prompt_length: l, rows of the static prompt and of each expert; 0 is the frozen main tower with a head.
        static_prompts, dynamic_prompts: whether there are those kinds.
        mapped_prompts: rows of the mapped prompt, the code's 1 or none or several.
        complement_prompt_length: static prompt rows in each layer of the complementary tower; with 0 it runs without a
            graph.
        prompt_init_range: prompts start uniform in ± this; None is that of visual prompt tuning,
            ``sqrt(6 / (3 p² + C))`` for patches of p pixels and C channels at the entrance (p = 0 for a text).
        complement_prompt_init_range: the same for the complementary tower.
        prompt_dropout: on input, mapped and complementary prompts, in training.
        first_layer: of the main tower that has prompts; those below run without a graph.
        complement_first_layer: the same for the complementary tower.
        route_first_block: whether the first layer of a stage is routed as well.
        router: ``"multimodal"``, or ``"complement"``: by the complementary modality alone, as in the first version
            (arXiv 2312.03734).
        router_main_size, router_complement_size: numbers of a query from the main and the complementary modality.
        temperature: τ of the routing.
        router_noise_std: σ of the noise on the divided logits in training.
        top_k: experts a sample takes; None: all.  With 1 the router learns from the importance loss alone.
        mapper_size: width of the mapper's trunk; None is half that of y.
        mapper_affine: a learned scale and shift behind the trunk, what is left there of a batch norm.
        importance_weight: of the importance loss, which counts in training only; 0 leaves it out.
        importance_threshold: unevenness below which it is 0 (0.05 in the first version).
        complement_feature: what y is: ``"cls"``, ``"pooled"``, ...; ``"auto"`` is ``"cls"`` where the tower has it.
        head_input: what is classified, joined by ``+``: ``"rows"`` (the mean of all rows behind the final norm,
            prompts included), ``"prompts"`` (their mean), or features of the main tower: ``pooled``, ``mean``,
            ``cls``, ``projected``.
        head_reads_complement: the head also reads y.
        feature_norm: ``"none"``, ``"layer"``, or ``"standardize"`` (by the training set's mean and deviation).
        head: ``"linear"``, or ``"mlp"`` with ``head_hidden_size`` hidden units.
        head_dropout: share of the head's inputs dropped in training.
        label_smoothing: of the single-label loss.
    """

    method = "mope"

    modality: Literal["text_to_vision", "vision_to_text"] = "text_to_vision"
    num_experts: int = 4
    prompt_length: int = 6
    static_prompts: bool = True
    dynamic_prompts: bool = True
    mapped_prompts: int = 1
    complement_prompt_length: int = 4
    prompt_init_range: float | None = None
    complement_prompt_init_range: float = 0.3
    prompt_dropout: float = 0.1
    first_layer: int = 0
    complement_first_layer: int = 0
    route_first_block: bool = False
    router: Literal["multimodal", "complement"] = "multimodal"
    router_main_size: int = 2
    router_complement_size: int = 8
    temperature: float = 0.1
    router_noise_std: float = 1 / 256
    top_k: int | None = None
    mapper_size: int | None = None
    mapper_affine: bool = True
    importance_weight: float = 0.01
    importance_threshold: float = 0.1
    complement_feature: str = "auto"
    head_input: str = "rows"
    head_reads_complement: bool = False
    feature_norm: Literal["none", "layer", "standardize"] = "none"
    head: Literal["linear", "mlp"] = "linear"
    head_hidden_size: int = 256
    head_dropout: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("modality", "router", "feature_norm", "head"):
            check_choice(self, name)
        for name in ("num_experts", "router_main_size", "router_complement_size", "head_hidden_size"):
            check_range(self, name, 1)
        for name in ("prompt_length", "mapped_prompts", "complement_prompt_length"):
            check_range(self, name, 0, MAX_PROMPT_ROWS)
        for name in ("first_layer", "complement_first_layer", "complement_prompt_init_range", "router_noise_std"):
            check_range(self, name, 0)
        for name in ("importance_weight", "importance_threshold"):
            check_range(self, name, 0.0)
        check_range(self, "temperature", 0.0, exclusive=True)
        for name in ("prompt_dropout", "head_dropout", "label_smoothing"):
            check_range(self, name, 0.0, 0.99)
        self._check_optional("top_k", int, 1, self.num_experts)
        self._check_optional("mapper_size", int, 1)
        if isinstance(self.prompt_init_range, int) and not isinstance(self.prompt_init_range, bool):
            self.prompt_init_range = float(self.prompt_init_range)
        self._check_optional("prompt_init_range", float, 0.0)
        if self.rows > MAX_PROMPT_ROWS:
            raise ConfigError(
                f"MopeConfig.prompt_length={self.prompt_length} and mapped_prompts={self.mapped_prompts} make "
                f"{self.rows} prompt rows; wanted at most {MAX_PROMPT_ROWS}"
            )
        if self.prompt_length and not self.rows:
            raise ConfigError(
                f"MopeConfig.prompt_length={self.prompt_length}, but static_prompts, dynamic_prompts and "
                "mapped_prompts are all off; wanted one of them, or prompt_length=0 for the frozen tower"
            )

    def _check_optional(self, name: str, kind: type, low: float, high: float = float("inf")) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if type(value) is not kind:
            raise ConfigError(
                f"MopeConfig.{name}={value!r} is a {type(value).__name__}; wanted {kind.__name__}, or None"
            )
        check_range(self, name, low, high)

    @property
    def rows(self) -> int:
        """M, prompt rows of the main tower."""
        if not self.prompt_length:
            return 0
        return self.prompt_length * (self.static_prompts + self.dynamic_prompts) + self.mapped_prompts


class MopeModel(PromptedModel):
    """A frozen dual encoder with MoPE's prompts, router, mapper and head; made by :func:`epic_fast.wrap`."""

    config: MopeConfig

    def __init__(self, backbone: DualEncoder, config: MopeConfig, **task: Any):
        super().__init__(backbone, config, **task)
        main, complement = self.main, self.complement
        self._check_layers()
        self.complement_feature = self._resolve_complement_feature()
        # Layer of the main tower to its place among the routed ones, which have prompts of their own.
        self.routed = {layer: place for place, layer in enumerate(self._routed_layers())}
        width = complement.feature_width(self.complement_feature)
        stages = stages_of(main)
        stage_of = {layer: stage for stage in stages for layer in range(stage.start, stage.stop)}
        bound = self._init_range()
        first = stage_of[config.first_layer]

        self.prompt_dropout = nn.Dropout(config.prompt_dropout)
        learned = config.rows and config.first_layer not in self.routed
        self.input_prompts = nn.Parameter(uniform(bound, config.rows, first.width)) if learned else None
        self.experts = nn.ModuleList(
            PromptExperts(
                stage_of[layer].width,
                length=config.prompt_length,
                num_experts=config.num_experts,
                static=config.static_prompts,
                dynamic=config.dynamic_prompts,
                init_range=bound,
            )
            for layer in self.routed
        )
        self.router: ExpertRouter | None = None
        if self.routed and config.dynamic_prompts and config.num_experts > 1:
            self.router = ExpertRouter(
                [stage_of[layer].width for layer in self.routed],
                width,
                num_experts=config.num_experts,
                size=config.router_main_size if config.router == "multimodal" else 0,
                other_size=config.router_complement_size,
                noise_std=config.router_noise_std,
                temperature=config.temperature,
            )
        # A stage without a routed layer has no place for a mapped prompt.
        mapped = [stage for stage in stages if any(stage_of[layer] == stage for layer in self.routed)]
        self.mapped_of = {layer: mapped.index(stage_of[layer]) for layer in self.routed}
        self.mapper: PromptMapper | None = None
        if mapped and config.mapped_prompts:
            self.mapper = PromptMapper(
                width,
                [stage.width for stage in mapped],
                hidden_size=config.mapper_size or max(1, width // 2),
                rows=config.mapped_prompts,
                affine=config.mapper_affine,
                dropout=config.prompt_dropout,
            )
        self.complement_prompts: nn.ParameterList | None = None
        if self.reads_complement and config.complement_prompt_length:
            widths = [stage.width for stage in stages_of(complement) for _ in range(stage.start, stage.stop)]
            self.complement_prompts = nn.ParameterList(
                uniform(config.complement_prompt_init_range, config.complement_prompt_length, each)
                for each in widths[config.complement_first_layer :]
            )
        self.head_kinds = self._resolve_head_kinds()
        self.head = Head(
            sum(self._head_width(kind) for kind in self.head_kinds) + (width if config.head_reads_complement else 0),
            self.num_labels,
            kind=config.head,
            hidden_size=config.head_hidden_size,
            dropout=config.head_dropout,
            norm=config.feature_norm,
        )

    # -- towers and layers --------------------------------------------------------------------------------------

    @property
    def main(self) -> Tower:
        """The tower that is classified."""
        return self.backbone.vision if self.config.modality == "text_to_vision" else self.backbone.text

    @property
    def complement(self) -> Tower:
        """The tower that gives y."""
        return self.backbone.text if self.config.modality == "text_to_vision" else self.backbone.vision

    @property
    def reads_complement(self) -> bool:
        """Whether anything reads y."""
        return self.router is not None or self.mapper is not None or self.config.head_reads_complement

    def _check_layers(self) -> None:
        for name, tower in (("first_layer", self.main), ("complement_first_layer", self.complement)):
            layer = getattr(self.config, name)
            if layer >= tower.num_layers:
                raise ConfigError(
                    f"MopeConfig.{name}={layer}, but this {tower.modality} tower has {tower.num_layers} layers "
                    f"(0..{tower.num_layers - 1})"
                )

    def _routed_layers(self) -> list[int]:
        config = self.config
        if not config.rows:
            return []
        layers = range(config.first_layer, self.main.num_layers)
        starts = {stage.start for stage in stages_of(self.main)} | {config.first_layer}
        return [layer for layer in layers if config.route_first_block or layer not in starts]

    def _init_range(self) -> float:
        if self.config.prompt_init_range is not None:
            return self.config.prompt_init_range
        patch = getattr(self.main.config, "patch_size", 0)
        pixels = patch * patch if isinstance(patch, int) else patch[0] * patch[1]
        return (6 / (3 * pixels + stages_of(self.main)[0].width)) ** 0.5

    def _resolve_complement_feature(self) -> str:
        kind, widths = self.config.complement_feature, self.complement.feature_widths
        if kind == "auto":
            return "cls" if "cls" in widths else "pooled"
        return "+".join(self._known(kind, widths, "complement_feature", self.complement))

    def _resolve_head_kinds(self) -> list[str]:
        own = ["rows", "prompts"] if self.config.rows else ["rows"]
        return self._known(self.config.head_input, [*own, *self.main.feature_widths], "head_input", self.main)

    def _head_width(self, kind: str) -> int:
        return self.main.hidden_size if kind in ("rows", "prompts") else self.main.feature_widths[kind]

    @staticmethod
    def _known(kinds: str, known: Any, name: str, tower: Tower) -> list[str]:
        names = kinds.split("+")
        for each in names:
            if each not in known:
                raise ConfigError(
                    f"MopeConfig.{name}={kinds!r} asks for {each!r}; with this {tower.modality} tower there are "
                    f"{', '.join(known)} (join several with '+')"
                )
        return names

    def first_layers(self) -> tuple[int, int]:
        main = self.config.first_layer if self.config.rows else self.main.num_layers
        if not self.reads_complement:
            complement = 0
        elif self.complement_prompts is None:
            complement = self.complement.num_layers
        else:
            complement = self.config.complement_first_layer
        return (complement, main) if self.config.modality == "text_to_vision" else (main, complement)

    # -- forward ------------------------------------------------------------------------------------------------

    def features(self, prefix: Prefix) -> Tensor:
        return self._run(prefix)[0]

    def features_and_penalty(self, prefix: Prefix) -> tuple[Tensor, Tensor | None]:
        features, scores = self._run(prefix)
        if not self.training or not scores or self.router is None:
            return features, None
        self.router.watch(scores)
        if not self.config.importance_weight:
            return features, None
        loss = importance_loss(scores, threshold=self.config.importance_threshold)
        return features, self.config.importance_weight * loss

    @torch.no_grad()
    def routing(self, prefix: Prefix | None = None, **inputs: Any) -> dict[int, Tensor]:
        """Which experts samples take: routed layer of the main tower to scores ``(B, E)`` in float32 (float64 where it
        is); empty without a router.

        Args:
            prefix: as for :meth:`forward`.
            inputs: pictures and texts as for :meth:`forward`.
        """
        inputs.pop("labels", None)
        prefix = self.extract(**inputs) if prefix is None else prefix
        scores = self._run(self._measured(prefix))[1]
        wide = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in scores]
        return dict(zip(self.routed, wide, strict=False))

    def _run(self, prefix: Prefix) -> tuple[Tensor, list[Tensor]]:
        """The head's input, and the scores of each routed layer."""
        text_to_vision = self.config.modality == "text_to_vision"
        main, complement = (prefix.vision, prefix.text) if text_to_vision else (prefix.text, prefix.vision)
        other = self._complement(complement) if self.reads_complement else None
        state, prompts, scores = self._main(main, other)
        parts = [self._feature(state, prompts, kind) for kind in self.head_kinds]
        if self.config.head_reads_complement:
            assert other is not None
            parts.append(other)
        return torch.cat(parts, dim=-1), scores

    def _complement(self, state: TowerState) -> Tensor:
        """y, ``(B, D)``: the complementary tower, every layer with static prompts of its own."""
        tower, reads = self.complement, self.complement_feature
        if self.complement_prompts is None:
            return tower.features(tower.advance(state, tower.num_layers, self.engine, reads), reads)
        prompts = [self.prompt_dropout(each.expand(len(state.hidden), -1, -1)) for each in self.complement_prompts]
        first = self.config.complement_first_layer
        run = tower.begin(state, prompts[0], "full", self.engine, first=first, reads=reads)
        for layer, prompt in enumerate(prompts, start=first):
            if layer > first:
                run.prompts = prompt
            run.step(layer)
        return tower.features(run.finish(), reads)

    def _main(self, state: TowerState, other: Tensor | None) -> tuple[TowerState, Tensor | None, list[Tensor]]:
        """The main tower; its last tokens and prompts, and the scores of each routed layer."""
        tower, config = self.main, self.config
        if not config.rows:
            return tower.advance(state, tower.num_layers, self.engine), None, []
        state = tower.advance(state, config.first_layer, self.engine)
        batch = len(state.hidden)
        swin = self._swin_in_place()
        # What is made of y waits for nobody, and nobody for it before the first routed layer.
        waits = not self.routed or config.first_layer in self.routed
        lane = None if swin is None or waits else lanes.current()
        if lane is None or swin is None or not swin.ready_for_lane(self.engine, state.hidden):
            # Where the model's own blocks run, nobody would join.
            lane = None
        else:
            lane.fork()
        with lanes.beside(lane):
            projected = None if self.router is None or other is None else self.router.project(other)
            mapped = None if self.mapper is None or other is None else self.mapper(other)
        prompts = state.hidden.new_zeros(batch, 0, state.hidden.shape[2])
        if self.input_prompts is not None:
            prompts = self.prompt_dropout(self.input_prompts.expand(batch, -1, -1))
        scores: list[Tensor] = []
        packed: PackedRun | None = None
        windows: SwinRun | None = None
        for layer in range(config.first_layer, tower.num_layers):
            if windows is not None:
                found = windows.step(layer)
                if found is not None:
                    scores.append(found)
                continue
            if layer in self.routed:
                place = self.routed[layer]
                logits = None
                if self.router is not None and projected is not None:
                    logits = self.router(place, mean_row(state, prompts), projected)
                prompts, found = self.experts[place](
                    batch,
                    logits,
                    None if mapped is None else mapped[self.mapped_of[layer]],
                    temperature=config.temperature,
                    top_k=config.top_k,
                )
                if found is not None:
                    scores.append(found)
                if packed is not None:
                    packed.prompts = prompts
            if layer == config.first_layer:
                packed = self._packed(state, prompts)
                if swin is not None:
                    routes = {each: self._route(each, projected, mapped) for each in self.routed if each > layer}
                    windows = swin.routed_run(state, prompts, self.engine, routes, lane)
            if windows is not None:
                windows.step(layer)
            elif packed is None:
                state, prompts = tower.run_prompted(state, layer, prompts, "full", self.engine)
            else:
                packed.step(layer)
                prompts = packed.prompts
                if packed.buffer is not None:
                    state = state.after(packed.buffer[:, prompts.shape[1] :], layer + 1)
        if windows is not None:
            return *windows.finish(), scores
        return state if packed is None else packed.finish(), prompts, scores

    def _swin_in_place(self) -> SwinTower | None:
        """The Swin whose fused blocks make the prompts of their layers where they lie; None where a graph is made,
        noise is to be drawn, or somebody hooked or replaced a module that they would not call."""
        main = self.main
        if torch.is_grad_enabled() or not isinstance(main, SwinTower) or not main.runs_fused(self.engine):
            return None
        return main if self._routes_plainly() else None

    def _routes_plainly(self) -> bool:
        router = self.router
        if not all(untouched(each, PromptExperts) for each in self.experts):
            return False
        if router is None:
            return True
        noisy = router.training and router.noise_std > 0
        if noisy or not untouched(router, ExpertRouter):
            return False
        if router.own is None:
            return True
        return self.config.router_main_size <= MOST_PROBES and all(untouched(each, nn.Linear) for each in router.own)

    def _route(self, layer: int, projected: Tensor | None, mapped: list[Tensor] | None) -> PromptRoute:
        """Of a routed layer: what its prompts are made of."""
        place = self.routed[layer]
        experts, router = self.experts[place], self.router
        assert isinstance(experts, PromptExperts)
        made_of: dict[str, Any] = {"static": experts.static, "experts": experts.experts}
        made_of["mapped"] = None if mapped is None else mapped[self.mapped_of[layer]]
        if router is not None and projected is not None:
            made_of |= {"projected": projected[:, place], "embeddings": router.embeddings[place]}
            made_of |= {"temperature": self.config.temperature, "top_k": self.config.top_k}
            if router.own is not None:
                own: Any = router.own[place]
                made_of |= {"probe": own.weight, "probe_bias": own.bias}
        return PromptRoute(**made_of)

    def _packed(self, state: TowerState, prompts: Tensor) -> PackedRun | None:
        """The main tower's way through fused blocks, prompts and tokens in one buffer; None where there are none."""
        tower = self.main
        if not tower.runs_fused(self.engine):
            return None
        kinds = self.head_kinds
        reads_rows, reads_prompts = "rows" in kinds, "prompts" in kinds
        reads = None if reads_rows else "+".join(kind for kind in kinds if kind != "prompts") or None
        first = self.config.first_layer
        run = tower.begin(state, prompts, "full", self.engine, first=first, reads=reads, reads_prompts=reads_prompts)
        return run if isinstance(run, PackedRun) else None

    def _feature(self, state: TowerState, prompts: Tensor | None, kind: str) -> Tensor:
        tower = self.main
        if kind not in ("rows", "prompts"):
            return tower.features(state, kind)
        if prompts is None:
            prompts = state.hidden.new_zeros(len(state.hidden), 0, state.hidden.shape[2])
        prompts = tower.normalise(prompts.to(state.hidden.dtype))
        if kind == "prompts":
            return prompts.mean(dim=1)
        return mean_row(state.after(tower.normalise(state.hidden), state.layer), prompts)

    # -- looking at it ------------------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups: dict[str, list[nn.Parameter]] = {"prompts": [], "projections": [], "head": []}
        for name, parameter in self.trainable_parameters():
            if name.startswith("head."):
                groups["head"].append(parameter)
            elif name.startswith(("router.", "mapper.")):
                groups["projections"].append(parameter)
            else:
                groups["prompts"].append(parameter)
        return {name: parameters for name, parameters in groups.items() if parameters}

    def diagnostics(self) -> dict[str, float]:
        """Running load of each expert and entropy of the routing (1: all experts alike), by routed layer."""
        if self.router is None:
            return {}
        values: dict[str, float] = {}
        load, entropy = self.router.load.tolist(), self.router.entropy.tolist()
        for layer, place in self.routed.items():
            values[f"routing_entropy/{layer}"] = entropy[place]
            values.update({f"expert_load/{layer}/{number}": each for number, each in enumerate(load[place])})
        return values

    def describe_layer(self, modality: str, layer: int) -> str:
        config = self.config
        if modality != self.main.modality:
            if not self.reads_complement:
                return "not read"
            if self.complement_prompts is None:
                return "extraction, no graph"
            below = layer < config.complement_first_layer
            return "extraction, no graph" if below else f"{config.complement_prompt_length} static prompts"
        if not config.rows or layer < config.first_layer:
            return "extraction, no graph"
        if layer not in self.routed:
            return (
                f"{config.rows} prompts, learned" if layer == config.first_layer else f"{config.rows} prompts, merged"
            )
        length = config.prompt_length
        kinds = [f"{length} static"] if config.static_prompts else []
        if config.dynamic_prompts:
            mixed = "learned" if self.router is None else f"mixed from {config.top_k or config.num_experts} experts"
            kinds.append(f"{length} {mixed}")
        kinds += [f"{config.mapped_prompts} mapped"] if self.mapper is not None else []
        return f"{config.rows} prompts: {', '.join(kinds)}"


def mean_row(state: TowerState, prompts: Tensor) -> Tensor:
    """Mean of the valid tokens and all prompts, ``(B, C)``, at least float32."""
    hidden = state.hidden
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = prompts.sum(dim=1, dtype=wide)
    if state.valid is None:
        return (total + hidden.sum(dim=1, dtype=wide)) / (hidden.shape[1] + prompts.shape[1])
    weight = state.valid.to(wide)
    count = weight.sum(dim=1, keepdim=True) + prompts.shape[1]
    return (total + (weight[:, None, :] @ hidden.to(wide))[:, 0]) / count.clamp_min(1.0)
