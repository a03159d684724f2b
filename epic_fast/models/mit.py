"""MiT: a modality infused into a frozen language model, without a token of its own (arXiv 2403.05060).

Written after the released code (github.com/kiva12138/MiT), which has referring segmentation alone, and the paper; the
other two tasks are built from what the paper says of them.  Departures: the gate's cosine reads valid tokens only, so
that padding changes nothing; with grouped-query attention gate and transforms have the shape of the key/value heads;
layers are numbered from 0; training starts from the frozen model itself.  The published results are not claimed here.

A source gives one feature I (a picture: of a frozen vision tower).  In an infused layer, keys after their rotation::

    γ  = σ(L + cos(V, W_a I))                                   one gate a head, shared by keys and values
    K' = K + γ (K ⊙ W_k I)          V' = V + γ (V ⊙ W_v I + W_a I)
    x  ← x + W_o softmax(Q K'ᵀ / √D) V'
    x  ← x + W_down (SiLU(W_gate x) ⊙ W_up x ⊙ W_f I)

The vector that is added to the keys too is left out: it moves all scores of a query alike, so the softmax takes it
out again, and its gradient is exactly zero.  ``form="replace"`` is the paper's own equation, K' = γ (...) and V' =
γ (...).  Several sources add up, each with transforms and gates of its own.  The last valid token behind the final
norm is what a head reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from epic_fast.backbones import LANGUAGE_MODELS, DualEncoder, LlamaTower, NoVisionTower
from epic_fast.engine import EngineConfig, Prefix, TowerState
from epic_fast.errors import ConfigError
from epic_fast.models.base import PROBLEM_TYPES, SEGMENTATION, PromptedModel, PromptedModelOutput
from epic_fast.models.configuration import MethodConfig, check_choice, check_range
from epic_fast.nn import FeatureNorm, FilmDecoder, Head, Infusion, LayerInfusion, SequenceEncoder, segmentation_loss

# The published layers of a model of 32, numbered from 0.
PUBLISHED_LAYERS, PUBLISHED_DEPTH = (12, 16, 20, 24, 28, 31), 32
TEXT_FIELD = "{text}"
PICTURE = "picture"
READS = "pooled"
LEVELS = "picture_levels"
# The published hidden states of a vision tower of 24 layers that the decoder of masks reads.
PUBLISHED_LEVELS, PUBLISHED_VISION_DEPTH = (18, 12, 6), 24
TEMPLATES = {
    "classification": "Look at the picture and read the text, then name the category.\nText: {text}\nCategory:",
    SEGMENTATION: "Segment the object that the text describes.\nText: {text}\nSegmentation:",
    "regression": "How does the speaker feel?\nText: {text}\nSentiment:",
}


@dataclass
class MitConfig(MethodConfig):
    """The choices of MiT.  Defaults are those of the released code where it has them, but for the start.

    Attributes:
        form: ``"residual"``, as released, or ``"replace"``, as written in the paper.
        layers: that are infused, numbered from 0; None takes six as published, (12, 16, 20, 24, 28, 31) of 32, and the
            same places of another depth, fewer where two fall together.  An empty list is the frozen model with a head.
        prompt_template: what the language model reads, with ``{text}`` in the text's place; it ends with what the
            pooled token is to stand for.  None: :data:`TEMPLATES` by task.
        picture: whether the picture is a source; None: where the backbone has a vision tower.
        image_feature: what I is: ``"projected"``, ``"pooled"``, ``"cls"``, ``"mean"``, joined by ``+``; ``"auto"`` is
            ``"projected"`` where there is such a map, else ``"pooled"``.
        source_norm: of the picture's feature: ``"none"``, ``"layer"``, or ``"l2"`` (of length 1).
        sequences: further sources: names to widths, such as ``{"acoustic": 74, "facial": 35}``.  The model takes
            each as ``name=(B, T, width)``, and ``name_lengths=(B,)``.
        sequence_size: width of the feature that a sequence's encoder makes.
        init: ``"identity"`` starts from the frozen model, ``"released"`` as ``nn.Linear`` does.
        value_shift_std: standard deviation of W_a's weights under ``"identity"``.  None: 0 in residual form, which is
            the frozen model bit for bit; 0.001 in replacing form, of its biases too, which starts near it: there the
            cosine has a say from the start, and at a W_a I of zeros its slope of 1e8 would reach them.
        head_bias_init: L at the start.
        key_shift: keep the transform without effect, for the published number of parameters.
        gate_reads_padding: the cosine runs over padding too, as released: results then depend on the batch.
        feature_norm: of the head's input: ``"none"``, ``"layer"``, or ``"standardize"`` (by the training set's mean and
            deviation).
        head: ``"linear"``, or ``"mlp"`` with ``head_hidden_size`` hidden units.
        head_dropout: share of the head's inputs dropped in training.
        label_smoothing: of the single-label loss.
        regression_loss: ``"mse"``, or ``"l1"``.
        decoder_layers: of segmentation: after how many layers of the vision tower its hidden states are read, the
            deepest first; None takes (18, 12, 6) of 24, as published, and the same places of another depth.
        decoder_size, decoder_heads, decoder_mlp_size: of :class:`~epic_fast.nn.FilmDecoder`.
        mask_size: pixels of a mask's side in training and in scores; None: as the pictures that the tower takes.
        mask_loss: of :func:`~epic_fast.nn.segmentation_loss`: ``"cross_entropy"``, ``"bce"``,
            ``"dice_cross_entropy"`` or ``"focal"``.
        mask_class_weights: of background and object in it.
    """

    method = "mit"

    form: Literal["residual", "replace"] = "residual"
    layers: Sequence[int] | None = None
    prompt_template: str | None = None
    picture: bool | None = None
    image_feature: str = "auto"
    source_norm: Literal["none", "layer", "l2"] = "none"
    sequences: Mapping[str, int] | None = None
    sequence_size: int = 256
    init: Literal["identity", "released"] = "identity"
    value_shift_std: float | None = None
    head_bias_init: float = 1.0
    key_shift: bool = False
    gate_reads_padding: bool = False
    feature_norm: Literal["none", "layer", "standardize"] = "none"
    head: Literal["linear", "mlp"] = "linear"
    head_hidden_size: int = 256
    head_dropout: float = 0.1
    label_smoothing: float = 0.0
    regression_loss: Literal["mse", "l1"] = "mse"
    decoder_layers: Sequence[int] | None = None
    decoder_size: int = 64
    decoder_heads: int = 4
    decoder_mlp_size: int = 2048
    mask_size: int | None = None
    mask_loss: Literal["cross_entropy", "bce", "dice_cross_entropy", "focal"] = "cross_entropy"
    mask_class_weights: Sequence[float] = (0.9, 1.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("form", "source_norm", "init", "feature_norm", "head", "regression_loss", "mask_loss"):
            check_choice(self, name)
        for name in ("sequence_size", "head_hidden_size", "decoder_size", "decoder_heads", "decoder_mlp_size"):
            check_range(self, name, 1)
        for name in ("head_dropout", "label_smoothing"):
            check_range(self, name, 0.0, 0.99)
        if self.picture is not None and not isinstance(self.picture, bool):
            raise ConfigError(f"MitConfig.picture={self.picture!r}; wanted true, false, or None")
        if self.value_shift_std is not None:
            if isinstance(self.value_shift_std, bool) or not isinstance(self.value_shift_std, (int, float)):
                raise ConfigError(f"MitConfig.value_shift_std={self.value_shift_std!r}; wanted a number, or None")
            self.value_shift_std = float(self.value_shift_std)
            check_range(self, "value_shift_std", 0.0)
        if not isinstance(self.prompt_template, (str, type(None))):
            raise ConfigError(
                f"MitConfig.prompt_template={self.prompt_template!r}; wanted a string with {TEXT_FIELD} in the text's "
                "place, or None (in YAML and on the command line in quotes: 'prompt_template=\"{text}\"')"
            )
        if self.prompt_template is not None and self.prompt_template.count(TEXT_FIELD) != 1:
            raise ConfigError(
                f"MitConfig.prompt_template={self.prompt_template!r} has {TEXT_FIELD} "
                f"{self.prompt_template.count(TEXT_FIELD)} times; wanted it once, in the text's place"
            )
        self._check_layers()
        self._check_sequences()
        self._check_masks()

    def _check_layers(self) -> None:
        if self.layers is None:
            return
        if not isinstance(self.layers, (list, tuple)) or not all(
            isinstance(layer, int) and not isinstance(layer, bool) for layer in self.layers
        ):
            raise ConfigError(f"MitConfig.layers={self.layers!r}; wanted a list of layers, integers from 0, or None")
        self.layers = list(self.layers)
        if self.layers != sorted(set(self.layers)):
            raise ConfigError(f"MitConfig.layers={self.layers!r}; wanted rising numbers, each once")

    def _check_sequences(self) -> None:
        if self.sequences is None:
            return
        if not isinstance(self.sequences, Mapping):
            raise ConfigError(
                f"MitConfig.sequences={self.sequences!r}; wanted names and widths, such as {{'acoustic': 74}}, or None"
            )
        self.sequences = dict(self.sequences)
        taken = (PICTURE, LEVELS, "labels", "prefix", "pixel_values", "input_ids", "attention_mask", "token_type_ids")
        taken = (*taken, "text", "self")
        for name, width in self.sequences.items():
            if not isinstance(name, str) or not name.isidentifier() or name in taken or name.endswith("_lengths"):
                raise ConfigError(
                    f"MitConfig.sequences has the name {name!r}; wanted an identifier such as 'acoustic', none of "
                    f"{', '.join(taken)}, that does not end with _lengths"
                )
            if hasattr(nn.ModuleDict, name) or hasattr(nn.ModuleDict(), name):
                raise ConfigError(
                    f"MitConfig.sequences has the name {name!r}, which PyTorch's modules have a use for; wanted "
                    f"another, such as {f'{name}_features'!r}"
                )
            if not isinstance(width, int) or isinstance(width, bool) or width < 1:
                raise ConfigError(f"MitConfig.sequences[{name!r}]={width!r}; wanted the width of a frame, at least 1")

    def _check_masks(self) -> None:
        weights = self.mask_class_weights
        if (
            not isinstance(weights, (list, tuple))
            or len(weights) != 2
            or not all(
                isinstance(each, (int, float)) and not isinstance(each, bool) and 0 < each < math.inf
                for each in weights
            )
        ):
            raise ConfigError(
                f"MitConfig.mask_class_weights={weights!r}; wanted two positive numbers, of background and object"
            )
        self.mask_class_weights = [float(each) for each in weights]
        if self.mask_size is not None and (type(self.mask_size) is not int or self.mask_size < 1):
            raise ConfigError(f"MitConfig.mask_size={self.mask_size!r}; wanted a number of pixels, or None")
        levels = self.decoder_layers
        if levels is None:
            return
        if (
            not isinstance(levels, (list, tuple))
            or not levels
            or not all(type(each) is int for each in levels)
            or list(levels) != sorted(set(levels), reverse=True)
        ):
            raise ConfigError(
                f"MitConfig.decoder_layers={levels!r}; wanted falling numbers of layers, such as [18, 12, 6], or None"
            )
        self.decoder_layers = list(levels)

    def resolve_decoder_layers(self, depth: int) -> list[int]:
        """After how many of the vision tower's ``depth`` layers the decoder reads, the deepest first.

        Raises:
            ConfigError: more layers than it has.
        """
        if self.decoder_layers is None:
            scaled = {max(1, round(level * depth / PUBLISHED_VISION_DEPTH)) for level in PUBLISHED_LEVELS}
            return sorted(scaled, reverse=True)
        for level in self.decoder_layers:
            if not 0 <= level <= depth:
                raise ConfigError(
                    f"MitConfig.decoder_layers reads after {level} layers, but this vision tower has {depth} "
                    f"(0..{depth}, 0 being the embeddings)"
                )
        return list(self.decoder_layers)

    def resolve_layers(self, depth: int) -> list[int]:
        """The infused layers of a language model of ``depth`` layers.

        Raises:
            ConfigError: a layer that it does not have.
        """
        if self.layers is None:
            # From 1, rounded, so that the last layer stays the last one.
            scaled = {max(1, round((layer + 1) * depth / PUBLISHED_DEPTH)) - 1 for layer in PUBLISHED_LAYERS}
            return sorted(scaled)
        for layer in self.layers:
            if not 0 <= layer < depth:
                raise ConfigError(
                    f"MitConfig.layers names layer {layer}, but this language model has {depth} (0..{depth - 1}); a "
                    "list that numbers them from 1 has to be lowered by one"
                )
        return list(self.layers)


class MitModel(PromptedModel):
    """A frozen language model with MiT's transforms, gates and head; made by :func:`epic_fast.wrap`.

    Attributes:
        layers: infused ones, from 0.
        source_widths: names of the sources to the widths of their features.
        infusions: an :class:`~epic_fast.nn.Infusion` of each source.
        encoders: a :class:`~epic_fast.nn.SequenceEncoder` of each sequence; none where nothing is infused.
        decoder_layers: after how many layers of the vision tower the decoder of masks reads; empty without masks.
    """

    config: MitConfig
    problem_types = (*PROBLEM_TYPES, SEGMENTATION)
    # transformers' Trainer would take ``**sequences`` for a place to put its own arguments.
    accepts_loss_kwargs = False

    def __init__(self, backbone: DualEncoder, config: MitConfig, **task: Any):
        super().__init__(backbone, config, **task)
        tower = self.language_model
        self.layers = config.resolve_layers(tower.num_layers)
        self.uses_picture = self._resolve_picture()
        self.image_feature = self._resolve_image_feature()
        self.decoder_layers = self._resolve_decoder_layers()
        sequences = dict(config.sequences or {})
        self.source_widths: dict[str, int] = dict.fromkeys(sequences, config.sequence_size)
        if self.uses_picture:
            width = self.backbone.vision.feature_width(self.image_feature)
            self.source_widths = {PICTURE: width, **self.source_widths}
        if self.layers and not self.source_widths:
            raise ConfigError(
                "this model has no source to infuse: no picture and no MitConfig.sequences; wanted a backbone with a "
                "vision tower ('vision=PATH,text=PATH'), sequences={'acoustic': 74}, or layers=[] for the frozen model"
            )
        # With nothing infused nobody reads what they make.
        encoded = sequences if self.layers else {}
        self.encoders = nn.ModuleDict(
            {name: SequenceEncoder(width, config.sequence_size) for name, width in encoded.items()}
        )
        shift = config.value_shift_std
        if shift is None:
            shift = 0.0 if config.form == "residual" else 1e-3
        self.infusions = nn.ModuleDict(
            {
                name: Infusion(
                    width,
                    layers=len(self.layers),
                    kv_heads=tower.kv_heads,
                    head_dim=tower.head_dim,
                    mlp_width=tower.mlp_width,
                    form=config.form,
                    init=config.init,
                    value_shift_std=shift,
                    head_bias_init=config.head_bias_init,
                    key_shift=config.key_shift,
                    sources=len(self.source_widths),
                )
                for name, width in (self.source_widths if self.layers else {}).items()
            }
        )
        self.head = self.make_head(tower.hidden_size)

    def make_head(self, width: int) -> nn.Module:
        """What reads the last valid token, ``(B, width)``; of masks, the decoder that reads the picture too."""
        config = self.config
        if self.problem_type == SEGMENTATION:
            vision = self.backbone.vision
            return FilmDecoder(
                vision.hidden_size,
                width,
                levels=len(self.decoder_layers),
                patch_size=vision.config.patch_size,
                width=config.decoder_size,
                heads=config.decoder_heads,
                mlp_size=config.decoder_mlp_size,
                norm=config.feature_norm,
            )
        return Head(
            width,
            self.num_labels,
            kind=config.head,
            hidden_size=config.head_hidden_size,
            dropout=config.head_dropout,
            norm=config.feature_norm,
        )

    @property
    def language_model(self) -> LlamaTower:
        """The text tower.

        Raises:
            ConfigError: it is none of the LLaMA family.
        """
        tower = self.backbone.text
        if not isinstance(tower, LlamaTower):
            raise ConfigError(
                f"MiT infuses into a language model; this text tower is a {type(tower.model).__name__} (model type "
                f"{tower.config.model_type!r}). Wanted one of {', '.join(LANGUAGE_MODELS)}, such as "
                "'vision=PATH,text=PATH' with a LlamaForCausalLM, or MopeConfig or EpicConfig for this backbone"
            )
        return tower

    @property
    def text_template(self) -> str:
        """What texts are put into before they are tokenized."""
        if self.config.prompt_template is not None:
            return self.config.prompt_template
        return TEMPLATES.get(self.problem_type, TEMPLATES["classification"])

    @property
    def mask_size(self) -> tuple[int, int] | None:
        """(height, width) of the logits of masks; None in other tasks."""
        if self.problem_type != SEGMENTATION:
            return None
        side = self.config.mask_size or self.backbone.vision.image_size
        return (side, side)

    def _resolve_decoder_layers(self) -> list[int]:
        if self.problem_type != SEGMENTATION:
            return []
        vision = self.backbone.vision
        if not self.uses_picture:
            raise ConfigError(
                "masks need pictures; wanted a backbone with a vision tower, and MitConfig.picture not False"
            )
        if not isinstance(getattr(vision.config, "patch_size", None), int) or vision.config.model_type == "swin":
            raise ConfigError(
                f"masks are made of patch tokens behind a class token; this vision tower is of type "
                f"{vision.config.model_type!r}. Wanted a ViT or CLIP's"
            )
        return self.config.resolve_decoder_layers(vision.num_layers)

    @property
    def text_engine(self) -> EngineConfig | None:
        """:attr:`engine`; but a gate that reads padding wants it as the model's own layers leave it."""
        if self.engine is None or not self.config.gate_reads_padding:
            return self.engine
        return replace(self.engine, blocks="plain", weights="frozen")

    def _resolve_picture(self) -> bool:
        absent = isinstance(self.backbone.vision, NoVisionTower)
        if self.config.picture and absent:
            raise ConfigError(
                "MitConfig.picture=True, but this backbone has no vision tower; wanted 'vision=PATH,text=PATH'"
            )
        return not absent if self.config.picture is None else self.config.picture

    def _resolve_image_feature(self) -> str:
        if not self.uses_picture:
            return ""
        kinds, widths = self.config.image_feature, self.backbone.vision.feature_widths
        if kinds == "auto":
            return "projected" if "projected" in widths else "pooled"
        for kind in kinds.split("+"):
            if kind not in widths:
                raise ConfigError(
                    f"MitConfig.image_feature={kinds!r} asks for {kind!r}; this vision tower has {', '.join(widths)} "
                    "(join several with '+')"
                )
        return kinds

    def first_layers(self) -> tuple[int, int]:
        text = self.layers[0] if self.layers else self.language_model.num_layers
        if self.decoder_layers:
            return text, self.decoder_layers[-1]
        return text, self.backbone.vision.num_layers if self.uses_picture else 0

    # -- forward ------------------------------------------------------------------------------------------------

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        prefix: Prefix | None = None,
        text_lengths: Tensor | None = None,
        **sequences: Tensor,
    ) -> PromptedModelOutput:
        """Logits of texts with their pictures and sequences, and the loss where there are labels.

        Args:
            pixel_values, input_ids, attention_mask, token_type_ids, labels, prefix, text_lengths: as in
                :meth:`PromptedModel.forward`; texts stand in :attr:`text_template`, padded on the right.
            sequences: ``name=(B, T, width)`` of each of ``config.sequences``, and ``name_lengths=(B,)`` where not all
                frames are valid.
        """
        if prefix is None:
            prefix = self.extract(pixel_values, input_ids, attention_mask, token_type_ids, text_lengths, **sequences)
        return super().forward(labels=labels, prefix=prefix)

    @torch.no_grad()
    def extract(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        text_lengths: Tensor | None = None,
        **sequences: Tensor,
    ) -> Prefix:
        """The whole vision tower (for masks up to what the decoder reads first), and the language model below its first
        infused layer; sequences as they are."""
        self._check_sequences(sequences)
        if self.uses_picture:
            prefix = super().extract(pixel_values, input_ids, attention_mask, token_type_ids, text_lengths)
        else:
            if input_ids is None:
                raise ConfigError("input_ids was not given; wanted texts, or prefix=")
            if pixel_values is not None and isinstance(self.backbone.vision, NoVisionTower):
                self.backbone.vision.start(pixel_values)  # says that nobody sees them
            if not torch.compiler.is_compiling():
                self.backbone.ensure_eval()
            text = self.extract_text(input_ids, attention_mask, token_type_ids, text_lengths)
            prefix = Prefix(text=text, vision=TowerState(text.hidden.new_zeros(len(text.hidden), 1, 1)))
        return replace(prefix, sequences=sequences)

    def _check_sequences(self, sequences: Mapping[str, Tensor]) -> None:
        known = dict(self.config.sequences or {})
        for name in sequences:
            if name.removesuffix("_lengths") not in known:
                raise ConfigError(
                    f"{name} was given; this model's sequences are {', '.join(known) or 'none (MitConfig.sequences)'}"
                )
        for name, width in known.items():
            if name not in sequences:
                raise ConfigError(
                    f"the sequence {name} was not given; wanted (batch, frames, {width}). transformers' Trainer drops "
                    "it unless remove_unused_columns=False"
                )
            if sequences[name].dim() != 3 or sequences[name].shape[2] != width:
                raise ConfigError(
                    f"the sequence {name} has shape {tuple(sequences[name].shape)}; wanted (batch, frames, {width})"
                )
            lengths = sequences.get(f"{name}_lengths")
            if lengths is not None and lengths.shape != sequences[name].shape[:1]:
                raise ConfigError(
                    f"{name}_lengths has shape {tuple(lengths.shape)}; wanted ({len(sequences[name])},), the valid "
                    "frames of each sample"
                )

    def _measured(self, prefix: Prefix) -> Prefix:
        """A prefix of which it is known where its texts end: gates and the pooled row depend on it."""
        if torch.compiler.is_compiling():
            return prefix
        text = prefix.text.measured()
        if text.irregular:
            raise ConfigError(
                "a text has padding on its left or in its middle, or no token at all; wanted padding on the right "
                "(padding_side='right') behind at least one token"
            )
        return replace(prefix, text=text)

    def logits_and_penalty(self, prefix: Prefix) -> tuple[Tensor, Tensor | None]:
        if self.problem_type != SEGMENTATION:
            return super().logits_and_penalty(prefix)
        levels, prefix = self.see(prefix)
        return self.head(levels, self.features(prefix), size=self.mask_size), None

    @torch.no_grad()
    def see(self, prefix: Prefix) -> tuple[list[Tensor], Prefix]:
        """The vision tower's hidden states that the decoder reads, the deepest first, and the prefix above them.

        A prefix whose ``sequences`` have them under :data:`LEVELS`, ``(B, levels, N, C)``, is taken at its word.
        """
        if LEVELS in prefix.sequences:
            return list(prefix.sequences[LEVELS].unbind(dim=1)), prefix
        vision, state, found = self.backbone.vision, prefix.vision, []
        for layer in reversed(self.decoder_layers):
            state = vision.advance(state, layer, self.engine)
            found.insert(0, state.hidden)
        return found, replace(prefix, vision=state)

    def features(self, prefix: Prefix) -> Tensor:
        """h, ``(B, D)``: the last valid token behind the final norm."""
        return self.read(prefix.text, self.infuse(self.sources(prefix)))

    def sources(self, prefix: Prefix) -> dict[str, Tensor]:
        """Names of the sources to their features ``(B, S)``."""
        found = {PICTURE: self.picture(prefix)} if self.uses_picture else {}
        for name, encoder in self.encoders.items():
            if name not in prefix.sequences:
                raise ConfigError(
                    f"this prefix comes without the sequence {name}, which a prefix cache does not keep; wanted one "
                    "from model.extract(), or engine.prefix_cache=None"
                )
            found[name] = encoder(prefix.sequences[name], prefix.sequences.get(f"{name}_lengths"))
        return found

    def picture(self, prefix: Prefix) -> Tensor:
        """I of the picture, ``(B, S)``; no graph."""
        with torch.no_grad():
            vision = self.backbone.vision
            state = vision.advance(prefix.vision, vision.num_layers, self.engine, self.image_feature)
            feature = vision.features(state, self.image_feature).float()
        if self.config.source_norm == "l2":
            return nn.functional.normalize(feature, dim=-1)
        return FeatureNorm(feature.shape[-1], self.config.source_norm)(feature)

    def infuse(self, sources: Mapping[str, Tensor]) -> list[list[LayerInfusion]]:
        """What goes into each infused layer, of each source."""
        made = [infusion(sources[name]) for name, infusion in self.infusions.items()]
        return [list(layer) for layer in zip(*made, strict=True)]

    def read(self, text: TowerState, infused: Sequence[Sequence[LayerInfusion]]) -> Tensor:
        """From the tokens in front of the first infused layer to h, ``(B, D)``."""
        tower, config = self.language_model, self.config
        for layer, sources in zip(self.layers, infused, strict=True):
            text = tower.run_infused(
                text,
                layer,
                sources,
                self.text_engine,
                form=config.form,
                gate_reads_padding=config.gate_reads_padding,
                reads=READS,
                more=True,
            )
        text = tower.advance(text, tower.num_layers, self.text_engine, READS, more=True)
        return tower.features(text, READS)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.problem_type == SEGMENTATION:
            weights = (self.config.mask_class_weights[0], self.config.mask_class_weights[1])
            return segmentation_loss(logits, labels, kind=self.config.mask_loss, class_weights=weights)
        if self.problem_type == "regression" and self.config.regression_loss == "l1":
            self._check_labels(logits, labels)
            return nn.functional.l1_loss(logits, labels.to(logits.dtype).reshape(logits.shape))
        return super().loss(logits, labels)

    # -- looking at it ------------------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups: dict[str, list[nn.Parameter]] = {"projections": [], "gates": [], "head": []}
        for name, parameter in self.trainable_parameters():
            if name.startswith("head."):
                groups["head"].append(parameter)
            elif name.endswith(".head_bias"):
                groups["gates"].append(parameter)
            else:
                groups["projections"].append(parameter)
        return {name: parameters for name, parameters in groups.items() if parameters}

    def diagnostics(self) -> dict[str, float]:
        """How far each layer's gates are open with a cosine of 0, σ(L), mean over its heads."""
        values: dict[str, float] = {}
        for name, infusion in self.infusions.items():
            assert isinstance(infusion, Infusion)
            opened = infusion.head_bias.detach().sigmoid().mean(dim=1).tolist()
            values.update({f"gate/{name}/{layer}": each for layer, each in zip(self.layers, opened, strict=True)})
        return values

    def describe_layer(self, modality: str, layer: int) -> str:
        if modality == "vision":
            return "extraction, no graph" if self.uses_picture else "not read"
        if layer in self.layers:
            return f"infusion of {', '.join(self.source_widths)}"
        return "extraction, no graph" if layer < self.first_layers()[0] else "extraction"
