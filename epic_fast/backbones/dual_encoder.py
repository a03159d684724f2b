"""A frozen image-text backbone, seen as two towers."""

from __future__ import annotations

import logging
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

# At the top of transformers 5.13 this name wants torchvision; here it is content with Pillow.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from epic_fast.backbones.absent import NoVisionTower
from epic_fast.backbones.fingerprint import fingerprint
from epic_fast.backbones.llama import LANGUAGE_MODELS, LlamaTower
from epic_fast.backbones.source import locate, split_pair
from epic_fast.backbones.towers import TextTower, Tower, VisionTower, make_tower
from epic_fast.engine import TowerState
from epic_fast.errors import ConfigError

logger = logging.getLogger("epic_fast")


class _Before(NamedTuple):
    """How a model was before it was frozen: the names of what had gradients and of what was in training."""

    required_grad: frozenset[str]
    training: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> _Before:
        return cls(
            frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad),
            frozenset(name for name, module in model.named_modules() if module.training),
        )

    def restore(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.required_grad)
        for name, module in model.named_modules():
            module.training = name in self.training


# Who keeps a model frozen.
_HOLDERS: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[DualEncoder]] = weakref.WeakKeyDictionary()


class DualEncoder(nn.Module):
    """Two towers of a backbone, frozen from here to :meth:`release`.

    Args:
        backbone: a ``CLIPModel``, a ``VisionTextDualEncoderModel``, two models ``(vision, text)``, or a language model
            alone, which is ``(None, text)``.
        source: where it came from (a name, a folder, ``"demo"``), remembered in saved adapters.
        image_processor, tokenizer: what belongs to it, where known.

    Raises:
        ConfigError: a backbone that there is no adapter for, naming those that there are.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        source: str | None = None,
        image_processor: Any = None,
        tokenizer: Any = None,
    ):
        super().__init__()
        self._alone = getattr(getattr(backbone, "config", None), "model_type", None) in LANGUAGE_MODELS
        if self._alone:
            backbone = (None, backbone)
        if isinstance(backbone, (tuple, list)):
            if len(backbone) != 2:
                raise ConfigError(f"a pair of towers has two models (vision, text); {len(backbone)} were given")
            self.vision_model, self.text_model = backbone
            self._whole: str | None = None
            projections: tuple[Any, Any] = (getattr(self.vision_model, "visual_projection", None), None)
        elif hasattr(backbone, "vision_model") and hasattr(backbone, "text_model"):
            self.model = backbone
            self._whole = "model"
            projections = (getattr(backbone, "visual_projection", None), getattr(backbone, "text_projection", None))
        else:
            raise ConfigError(
                f"a backbone of type {type(backbone).__module__}.{type(backbone).__name__} was given; wanted a "
                "transformers CLIPModel, a VisionTextDualEncoderModel, a pair (ViTModel or SwinModel, BertModel or "
                "LlamaModel), or the name or folder of one. Weights of other libraries usually exist in transformers' "
                "format on hubs"
            )
        whole = self.model if self._whole else self
        vision = NoVisionTower()
        if whole.vision_model is not None:
            # A pair's tower may come with its projection: CLIPVisionModelWithProjection.
            inner = getattr(whole.vision_model, "vision_model", whole.vision_model)
            vision = make_tower(inner, "vision", projections[0])
        text = make_tower(whole.text_model, "text", projections[1])
        if whole.vision_model is None and not isinstance(text, LlamaTower):
            raise ConfigError(
                f"the pair has no vision tower, and its text tower is a {type(text.model).__name__}; wanted a vision "
                "tower, or a language model alone"
            )
        assert isinstance(vision, VisionTower)
        assert isinstance(text, TextTower)
        self.vision, self.text = vision, text
        self.source = source
        self._processors: dict[str, Any] = {}
        if image_processor is not None:
            self.image_processor = image_processor
        if tokenizer is not None:
            self.tokenizer = tokenizer
        self._fingerprint: tuple[Any, dict[str, str]] | None = None
        self._frozen = False
        self.freeze()

    # -- frozen ---------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """No gradients and ``eval()``, remembering what was before; nothing if it is frozen already.

        Several may hold the same models at once; what was before the first of them comes back after the last.
        """
        if self._frozen:
            return
        self._before = []
        for model in self._models():
            holders = _HOLDERS.setdefault(model, weakref.WeakSet())
            other = next(iter(holders), None)
            self._before.append(_Before.of(model) if other is None else other.before(model))
            holders.add(self)
        self._frozen = True
        self.requires_grad_(False)
        self.train(False)

    def before(self, model: nn.Module) -> _Before:
        """What one of its models was like before it was frozen."""
        return next(before for each, before in zip(self._models(), self._before, strict=True) if each is model)

    def train(self, mode: bool = True) -> DualEncoder:
        """Frozen towers stay in ``eval()``, whatever the model around them does."""
        return super().train(False)

    def ensure_eval(self) -> None:
        """Put back to ``eval()`` what somebody switched by hand (dropout in a frozen tower comes alive otherwise)."""
        if any(module.training for module in self.modules()):
            self.train(False)

    def release(self) -> Any:
        """The backbone as it was given: the same objects, gradients and modes as before."""
        if self._frozen:
            self._frozen = False
            for model, before in zip(self._models(), self._before, strict=True):
                holders = _HOLDERS.get(model, set())
                holders.discard(self)
                if not holders:
                    before.restore(model)
        return self.original

    def _models(self) -> list[nn.Module]:
        models = [self.model] if self._whole else [self.vision_model, self.text_model]
        return [model for model in models if model is not None]

    @property
    def original(self) -> Any:
        """What was given: one model, or the pair."""
        if self._alone:
            return self.text_model
        return self.model if self._whole else (self.vision_model, self.text_model)

    @property
    def family(self) -> str:
        """Such as ``"clip"`` or ``"vit+bert"``."""
        if self._whole:
            return self.model.config.model_type
        return f"{self.vision.config.model_type}+{self.text.config.model_type}"

    @property
    def max_text_length(self) -> int:
        """The most tokens of a text, special ones included."""
        limit = getattr(self.tokenizer, "model_max_length", None)
        return min(self.text.max_length, limit) if limit else self.text.max_length

    @property
    def dtype(self) -> torch.dtype:
        return self.text.dtype if isinstance(self.vision, NoVisionTower) else self.vision.dtype

    def fingerprint(self) -> dict[str, str]:
        """Digest of every tensor; kept until a tensor changes."""
        key = tuple((tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in self.state_dict().values())
        if self._fingerprint is None or self._fingerprint[0] != key:
            self._fingerprint = (key, fingerprint(self.model if self._whole else self._towers()))
        return self._fingerprint[1]

    def _towers(self) -> nn.ModuleDict:
        """The models of a pair; a language model without its map to the vocabulary, which nothing reads."""
        models = {"vision_model": self.vision_model, "text_model": self.text.model}
        return nn.ModuleDict({name: model for name, model in models.items() if model is not None})

    # -- processors -----------------------------------------------------------------------------------------

    @property
    def image_processor(self) -> Any:
        """The image processor given, or the one beside the weights; None where there is neither."""
        return self._processor("image", AutoImageProcessor, 0)

    @image_processor.setter
    def image_processor(self, value: Any) -> None:
        self._processors["image"] = value

    @property
    def tokenizer(self) -> Any:
        """The tokenizer given, or the one beside the weights; None where there is neither."""
        return self._processor("text", AutoTokenizer, 1)

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self._processors["text"] = value

    def _processor(self, key: str, loader: Any, side: int) -> Any:
        if key not in self._processors:
            self._processors[key] = None
            if self.source is not None:
                source = split_pair(self.source)[side]
                if not source:
                    return None
                place, options = locate(source, ("vision", "text")[side])
                try:
                    self._processors[key] = self._fit_to_tower(loader.from_pretrained(place, **options))
                except (OSError, ValueError, KeyError) as error:
                    logger.warning("no %s beside %r: %s", loader.__name__, source, str(error).splitlines()[0])
        return self._processors[key]

    def _fit_to_tower(self, processor: Any) -> Any:
        """Language models' tokenizers often have no padding; their end token then stands for it, and is masked."""
        if isinstance(self.text, LlamaTower) and getattr(processor, "pad_token", "") is None:
            processor.pad_token = processor.eos_token
        return processor

    # -- self-check -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def self_check(self) -> None:
        """Run one small batch through the towers layer by layer and through the models themselves.

        Raises:
            ConfigError: the outputs differ, so this release of transformers runs the model in another way than
                the adapter knows, and prompts would sit in the wrong place.
        """
        device = next(self.parameters()).device
        pixel_values, input_ids, attention_mask = self._probe(device)
        text = self.text.start(input_ids, attention_mask)
        below = self.text.run(text, self.text.num_layers - 1)
        text = self.text.run_all(below)
        expected_text = self.text.model(input_ids=input_ids, attention_mask=attention_mask)
        runs: list[tuple[Tower, TowerState, Any]] = [(self.text, text, expected_text)]
        if pixel_values is not None:
            vision = self.vision.run_all(self.vision.start(pixel_values))
            runs.append((self.vision, vision, self.vision.model(pixel_values=pixel_values.to(self.vision.dtype))))
        for tower, state, expected in runs:
            wanted = getattr(expected, "pooler_output", None)
            if wanted is None:
                rows = expected.last_hidden_state
                if state.pool_index is not None:
                    wanted = rows[torch.arange(len(rows), device=device), state.pool_index]
                else:
                    wanted = rows[:, 0] if "cls" in tower.feature_widths else rows.mean(dim=1)
            found = tower.pool(state)
            self._check_error(tower, "run layer by layer", (found - wanted).abs().max() / _largest(wanted))
        if isinstance(self.text, LlamaTower):
            self._check_error(self.text, "with an infusion of nothing", self.text.infusion_error(below))

    def _check_error(self, tower: Tower, how: str, error: Tensor | float) -> None:
        tolerance = 1e-5 if tower.dtype in (torch.float32, torch.float64) else 2e-2
        # An error that is no number must not pass for a small one.
        if not bool(error <= tolerance):
            raise ConfigError(
                f"self-check: the {tower.modality} tower ({type(tower.model).__name__}) {how} differs "
                f"from the model's own output by {float(error):.2e} (at most {tolerance:.0e} wanted). This release "
                "of transformers may run the model differently: report it with the output of 'epic-fast doctor', "
                "or pass self_check=False to go on at your own risk"
            )

    def _probe(self, device: torch.device) -> tuple[Tensor | None, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        pixel_values = None
        if not isinstance(self.vision, NoVisionTower):
            channels = getattr(self.vision.config, "num_channels", 3)
            size = self.vision.image_size
            pixel_values = torch.randn(2, channels, size, size, generator=generator).to(device)
        length = min(8, self.text.max_length)
        vocabulary = self.text.config.vocab_size
        end = getattr(self.text.model, "eos_token_id", None)
        end = vocabulary - 1 if end in (None, 2) else end
        input_ids = torch.randint(3, max(4, vocabulary - 1), (2, length), generator=generator)
        input_ids[0, -1] = end
        input_ids[1, length // 2] = end
        attention_mask = torch.ones(2, length, dtype=torch.long)
        attention_mask[1, length // 2 + 1 :] = 0
        input_ids = torch.where(attention_mask.bool(), input_ids, torch.zeros_like(input_ids))
        return pixel_values, input_ids.to(device), attention_mask.to(device)


def _largest(tensor: Tensor) -> Tensor:
    return tensor.abs().max().clamp_min(1e-6)
