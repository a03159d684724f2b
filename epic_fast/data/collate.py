"""Examples to the batch that a model takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from epic_fast.data.dataset import Example, Mask, Row, read_mask
from epic_fast.data.labels import MULTI, REGRESSION, SEGMENTATION, SINGLE, check_problem_type
from epic_fast.errors import ConfigError, DataError

FIELD = "{text}"
TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids")


class Collator:
    """Examples to ``pixel_values``, ``input_ids``, ``attention_mask``, ``token_type_ids`` and ``labels``.

    Texts are cut at ``max_text_length`` tokens and padded on the right to the longest of the batch; in a template, the
    text is cut and the template stays.  It can be pickled, so it works in the worker processes of a ``DataLoader``.

    Args:
        image_processor, tokenizer: the backbone's own (Hugging Face).
        max_text_length: the most tokens of a text, special ones included.
        problem_type: decides the labels' type and shape: int64 ``(B,)`` for single-label, float32 ``(B, num_labels)``
            of 0 and 1 for multi-label, float32 ``(B,)`` for regression, bool ``(B, height, width)`` for segmentation.
            None takes it from the labels themselves.
        num_labels: number of classes; needed for multi-label, and to check class ids where given.
        mask_size: (height, width) of the masks in a batch, to which they are brought as the pictures are: squeezed or
            stretched, not cut; each pixel is that of the nearest.  Needed for segmentation.
        text_template: what every text is put into, at ``{text}``; None: texts stay as they are.
        pictures: False for a model that sees none; examples' pictures are then left alone.
        sequences: names and widths of sequences that the model takes: each becomes ``(B, T, width)`` float32, padded
            with zeros to the longest of the batch, and ``(B,)`` of its lengths under ``name_lengths``.

    Raises:
        ConfigError: no image processor, no tokenizer, one that cannot pad, or a template without its ``{text}``.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        *,
        max_text_length: int,
        problem_type: str | None = None,
        num_labels: int | None = None,
        mask_size: tuple[int, int] | None = None,
        text_template: str | None = None,
        pictures: bool = True,
        sequences: Mapping[str, int] | None = None,
    ):
        check_problem_type(problem_type)
        if image_processor is None and pictures:
            raise ConfigError(_missing("image processor", "image_processor", "AutoImageProcessor"))
        if tokenizer is None:
            raise ConfigError(_missing("tokenizer", "tokenizer", "AutoTokenizer"))
        if getattr(tokenizer, "pad_token", "") is None:
            raise ConfigError(
                f"the tokenizer {type(tokenizer).__name__} has no padding token, so texts of different lengths cannot "
                "be batched: set tokenizer.pad_token = tokenizer.eos_token first"
            )
        if max_text_length < 1:
            raise ConfigError(f"max_text_length={max_text_length}; wanted at least 1 token")
        if problem_type == MULTI and not num_labels:
            raise ConfigError(f"problem_type={MULTI!r} needs num_labels, the number of classes; {num_labels} was given")
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.max_text_length = max_text_length
        self.problem_type = problem_type
        self.num_labels = num_labels
        self.mask_size = mask_size
        self.pictures = pictures
        self.sequences = dict(sequences or {})
        self.text_template = text_template
        if text_template is not None and text_template.count(FIELD) != 1:
            raise ConfigError(
                f"text_template={text_template!r} has {FIELD} {text_template.count(FIELD)} times; wanted it once"
            )
        if text_template is not None and len(self._ids([""])[0]) >= max_text_length:
            raise ConfigError(
                f"text_template={text_template!r} leaves no room for a text in {max_text_length} tokens; wanted a "
                "shorter one"
            )

    @classmethod
    def for_model(cls, model: Any) -> Collator:
        """The collator of a wrapped model: its backbone's processors and text length, its problem and classes.

        Raises:
            ConfigError: the backbone has no tokenizer or no image processor.
        """
        return cls(
            model.backbone.image_processor,
            model.backbone.tokenizer,
            max_text_length=model.backbone.max_text_length,
            problem_type=model.problem_type,
            num_labels=model.num_labels,
            mask_size=getattr(model, "mask_size", None),
            text_template=getattr(model, "text_template", None),
            pictures=getattr(model, "uses_picture", True),
            sequences=getattr(getattr(model, "config", None), "sequences", None),
        )

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """One batch of B examples; ``labels`` only where they have labels.

        Raises:
            DataError: labels that do not fit the problem, or only in some of the examples.
        """
        batch = self.encode([example.text for example in examples])
        masks = batch.get("attention_mask", batch["input_ids"] >= 0)
        bare = [example.name for example, mask in zip(examples, masks, strict=True) if not mask.any()]
        if bare:
            raise DataError(
                f"the text of {bare[0]!r} makes no token, nor does anything around it; wanted a text, or a "
                "text_template (MitConfig.prompt_template) with words of its own"
            )
        if self.pictures:
            without = next((example.name for example in examples if example.image is None), None)
            if without is not None:
                raise DataError(
                    f"{without!r} has no picture, and this model looks at pictures; wanted data with pictures, or a "
                    "model without (MitConfig.picture=False, or a language model alone: --backbone text=PATH)"
                )
            batch = {"pixel_values": self.pixels([example.image for example in examples]), **batch}
        for name, width in self.sequences.items():
            batch |= self._sequence(name, width, examples)
        labels = self.labels(examples)
        if labels is not None:
            batch["labels"] = labels
        return batch

    def pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures to ``(B, 3, H, W)``: by the backbone's processor, in segmentation without cutting anything off."""
        assert self.image_processor is not None
        return self.image_processor(images=list(pictures), return_tensors="pt", **self._whole)["pixel_values"]

    @property
    def _whole(self) -> dict[str, Any]:
        """The processor's arguments for pictures of which all must be seen."""
        if self.problem_type != SEGMENTATION and self.mask_size is None:
            return {}
        size = getattr(self.image_processor, "size", None) or {}
        cut = getattr(self.image_processor, "do_center_crop", False)
        final = (getattr(self.image_processor, "crop_size", None) if cut else None) or size
        height = final["height"] if "height" in final else final.get("shortest_edge")
        if height is None:
            return {}
        whole: dict[str, Any] = {"size": {"height": height, "width": final.get("width", height)}}
        return {**whole, "do_center_crop": False} if cut else whole

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Texts to token ids and attention mask, ``(B, N)``; token type ids only if the tokenizer makes them."""
        encoded = self.tokenizer(
            [self._in_template(text) for text in texts],
            padding="longest",
            padding_side="right",
            truncation=True,
            max_length=self.max_text_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {key: encoded[key] for key in TEXT_KEYS if key in encoded}

    def _in_template(self, text: str) -> str:
        """The template with the text in its place, the text's end cut off where both are too long together."""
        if self.text_template is None:
            return text
        whole = self.text_template.replace(FIELD, text)
        # No token is shorter than a byte; the special ones are few.
        if len(whole.encode("utf-8", "surrogatepass")) + 8 <= self.max_text_length:
            return whole
        excess = len(self._ids([text])[0]) - self.max_text_length
        while excess > 0 and text:
            own = len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            text = text[: len(text) * max(own - excess, 0) // max(own, 1)]
            excess = len(self._ids([text])[0]) - self.max_text_length
        return self.text_template.replace(FIELD, text)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts in the template, uncut."""
        whole = [(self.text_template or FIELD).replace(FIELD, text) for text in texts]
        return self.tokenizer(whole, truncation=False, padding=False, verbose=False)["input_ids"]

    def settings(self) -> dict[str, Any]:
        """All that decides what becomes of a picture and of a text, in JSON's types."""
        settings = {
            "image_processor": _settings_of(self.image_processor) if self.pictures else None,
            "tokenizer": _tokenizer_settings(self.tokenizer),
            "max_text_length": self.max_text_length,
            **({"whole_pictures": self._whole} if self._whole else {}),
        }
        return settings if self.text_template is None else {**settings, "text_template": self.text_template}

    def labels(self, examples: Sequence[Example | Row]) -> Tensor | None:
        """The labels as a tensor, None where no example has one."""
        bare = [example.name for example in examples if example.label is None]
        if len(bare) == len(examples):
            return None
        if bare:
            raise DataError(
                f"{len(bare)} of {len(examples)} examples have no label, the first is {bare[0]!r}; wanted labels in "
                "all of a batch or in none"
            )
        problem_type = self.problem_type or _problem_of(examples[0].label)
        if problem_type == MULTI:
            return self._multi_hot(examples)
        if problem_type == SEGMENTATION:
            return self._masks(examples)
        values = [example.label for example in examples]
        if problem_type == REGRESSION:
            return self._tensor(values, examples, torch.float32)
        for example in examples:
            self._check_id(example.label, example)
        return self._tensor(values, examples, torch.int64)

    def _multi_hot(self, examples: Sequence[Example | Row]) -> Tensor:
        if not self.num_labels:
            raise ConfigError("labels are lists of class ids; Collator needs num_labels, the number of classes")
        labels = torch.zeros(len(examples), self.num_labels)
        for row, example in enumerate(examples):
            if not isinstance(example.label, (list, tuple)):
                raise _wrong_label(example, "a list of class ids (multi-label)")
            for index in example.label:
                self._check_id(index, example)
                labels[row, index] = 1.0
        return labels

    def _sequence(self, name: str, width: int, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A sequence of all examples, padded, with its lengths."""
        found = []
        for example in examples:
            frames = example.sequences.get(name)
            if frames is None or frames.ndim != 2 or frames.shape[1] != width:
                has = ", ".join(f"{key} {value.shape}" for key, value in example.sequences.items()) or "none"
                raise DataError(f"{example.name!r}: wanted the sequence {name} (frames, {width}); its sequences: {has}")
            found.append(frames)
        lengths = [len(frames) for frames in found]
        padded = torch.zeros(len(found), max(1, *lengths), width)
        for place, frames in enumerate(found):
            padded[place, : len(frames)] = torch.from_numpy(np.ascontiguousarray(frames, dtype=np.float32))
        return {name: padded, f"{name}_lengths": torch.tensor(lengths)}

    def _masks(self, examples: Sequence[Example | Row]) -> Tensor:
        if self.mask_size is None:
            raise ConfigError("labels are masks; Collator needs mask_size=(height, width) to bring them to one size")
        height, width = self.mask_size
        found = np.zeros((len(examples), height, width), dtype=bool)
        for place, example in enumerate(examples):
            label = read_mask(example.label) if isinstance(example.label, Mask) else example.label
            if not isinstance(label, np.ndarray) or label.ndim != 2:
                raise _wrong_label(example, "a mask, booleans (height, width)")
            if label.shape != (height, width):
                label = np.asarray(Image.fromarray(label != 0).resize((width, height), Image.Resampling.NEAREST))
            found[place] = label
        return torch.from_numpy(found)

    def _check_id(self, index: Any, example: Example | Row) -> None:
        if not isinstance(index, int) or index < 0 or (self.num_labels is not None and index >= self.num_labels):
            known = f"0 to {self.num_labels - 1}" if self.num_labels is not None else "0 or more"
            raise _wrong_label(example, f"a class id, {known}")

    def _tensor(self, values: list[Any], examples: Sequence[Example | Row], dtype: torch.dtype) -> Tensor:
        try:
            return torch.tensor(values, dtype=dtype)
        except (TypeError, ValueError) as error:
            odd = next((e for e in examples if not isinstance(e.label, (int, float))), examples[0])
            raise _wrong_label(odd, "a number") from error


def _settings_of(processor: Any) -> dict[str, Any]:
    values = processor.to_dict() if hasattr(processor, "to_dict") else vars(processor)
    return {"class": type(processor).__name__, **json.loads(json.dumps(values, default=_in_words, sort_keys=True))}


def _in_words(value: Any) -> str:
    """A value that JSON lacks, in words that are the same in every process."""
    words = repr(value)
    return type(value).__name__ if " at 0x" in words else words


def _tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer does, its vocabulary and rules as a digest."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        for name in ("truncation", "padding"):  # left there by the last call, and set anew by every call
            rules.pop(name, None)
    else:
        rules = {"vocabulary": tokenizer.get_vocab(), **getattr(tokenizer, "init_kwargs", {})}
    text = json.dumps(rules, sort_keys=True, default=_in_words)
    return {
        "class": type(tokenizer).__name__,
        "rules": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "inputs": list(tokenizer.model_input_names),
    }


def _problem_of(label: Any) -> str:
    if isinstance(label, (Mask, np.ndarray)):
        return SEGMENTATION
    if isinstance(label, (list, tuple)):
        return MULTI
    return REGRESSION if isinstance(label, float) else SINGLE


def _wrong_label(example: Example | Row, wanted: str) -> DataError:
    return DataError(f"{example.name!r} has the label {example.label!r}; wanted {wanted}")


def _missing(what: str, argument: str, loader: str) -> str:
    return (
        f"the backbone has no {what}, which a collator needs; hand one over: epic_fast.load_backbone(backbone, "
        f"{argument}=transformers.{loader}.from_pretrained(NAME_OR_FOLDER)), and give the result to epic_fast.wrap"
    )
