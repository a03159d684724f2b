"""``wrap``: a backbone and a method's configuration to a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from epic_fast.backbones import LlamaTower, load_backbone
from epic_fast.engine import EngineConfig
from epic_fast.errors import ConfigError
from epic_fast.models.base import PromptedModel
from epic_fast.models.configuration import MethodConfig
from epic_fast.models.epic import EpicConfig, EpicModel
from epic_fast.models.mit import MitConfig, MitModel
from epic_fast.models.mope import MopeConfig, MopeModel

METHODS: dict[str, tuple[type[MethodConfig], type[PromptedModel]]] = {
    "epic": (EpicConfig, EpicModel),
    "mope": (MopeConfig, MopeModel),
    "mit": (MitConfig, MitModel),
}


def wrap(
    backbone: Any,
    config: MethodConfig | None = None,
    num_labels: int = 2,
    problem_type: str = "single_label_classification",
    *,
    labels: Sequence[str] | None = None,
    pos_weight: Tensor | Sequence[float] | str | None = None,
    image_processor: Any = None,
    tokenizer: Any = None,
    self_check: bool = True,
    engine: EngineConfig | None = None,
) -> Any:
    """Put a method's prompts into a frozen backbone.

    The backbone's objects are used, not copied: they are frozen and put in ``eval()`` until
    ``model.unwrap()`` gives them back as they were.

    Args:
        backbone: a transformers dual encoder, a pair ``(vision, text)`` of models, a language model, or whatever string
            :func:`epic_fast.load_backbone` takes: a name, a folder, ``"vision=PATH,text=PATH"``, ``"demo"``.
        config: the method's configuration, ``EpicConfig``, ``MopeConfig`` or ``MitConfig``; default ``EpicConfig()``.
        num_labels: K, outputs of the head.
        problem_type: ``"single_label_classification"``, ``"multi_label_classification"`` or ``"regression"``; with MiT
            also ``"segmentation"``, whose ``num_labels`` is 2 and whose labels are masks ``(B, height, width)``.
        labels: K names, saved with the adapter.
        pos_weight: of the multi-label loss: K numbers, None, or ``"auto"``.
        image_processor, tokenizer: take the place of those beside the backbone's weights.
        self_check: run one small batch to prove that zero prompts give the backbone's own output.
        engine: how the frozen towers are executed; None runs the backbone's own modules, bit for bit.

    Returns:
        The method's model, an ``nn.Module`` with ``forward(pixel_values, input_ids, attention_mask, ...)``.

    Raises:
        ConfigError: a backbone, configuration or task that does not fit, and how to mend it.
    """
    config = EpicConfig() if config is None else config
    model_class = next((model for kind, model in METHODS.values() if isinstance(config, kind)), None)
    if model_class is None:
        kinds = ", ".join(kind.__name__ for kind, _ in METHODS.values())
        raise ConfigError(f"config is a {type(config).__name__}; wanted one of {kinds}")
    encoder = load_backbone(backbone, image_processor=image_processor, tokenizer=tokenizer)
    if isinstance(encoder.text, LlamaTower) and not isinstance(config, MitConfig):
        encoder.release()
        raise ConfigError(
            f"the text tower is a language model (model type {encoder.text.config.model_type!r}), which takes no "
            f"prompt rows; wanted MitConfig in the place of {type(config).__name__}, or a BertModel as text tower"
        )
    encoder.freeze()
    try:
        if self_check:
            encoder.self_check()
        device = next(encoder.parameters()).device
        task = {"num_labels": num_labels, "problem_type": problem_type, "labels": labels, "pos_weight": pos_weight}
        return model_class(encoder, config, **task, engine=engine).to(device)
    except Exception:
        encoder.release()
        raise
