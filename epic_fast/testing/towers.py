"""Tiny random towers in Hugging Face's own classes, with the processors that belong to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = (
    "a the red green blue yellow black white circle square triangle star cat dog bird tree house car boat cup "
    "left right above below of with and on in photo drawing picture small large not"
).split()


def tiny_tokenizer(kind: str = "clip", max_length: int = 16) -> Any:
    """A word-level tokenizer over :data:`WORDS`: ``<s> text </s>`` for CLIP, ``[CLS] text [SEP]`` for BERT, and for a
    language model (``"llama"``) ``<s> text``, without a token for padding.

    Ids are 0 padding, 1 unknown, 2 start, then the words; the end token is the last id, as in CLIP.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    start, end = ("[CLS]", "[SEP]") if kind == "bert" else ("<s>", "</s>")
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<unk>", start, *WORDS, end])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{start} $A" + ("" if kind == "llama" else f" {end}"),
        special_tokens=[(start, vocabulary[start]), (end, vocabulary[end])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=None if kind == "llama" else "<pad>",
        unk_token="<unk>",
        bos_token=start,
        eos_token=end,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"] + (["token_type_ids"] if kind == "bert" else []),
    )


def tiny_clip(
    folder: str | Path | None = None,
    *,
    text_layers: int = 3,
    vision_layers: int = 4,
    text_width: int = 32,
    vision_width: int = 48,
    heads: int = 4,
    old_eos: bool = False,
    seed: int = 0,
) -> Any:
    """A random ``CLIPModel``, 32-pixel pictures in patches of 8, 16 text positions.

    With ``folder`` it is saved there with its image processor and tokenizer, as on a model hub.
    ``old_eos`` gives the ``eos_token_id`` 2 of configurations written before its meaning was mended: the text
    is then pooled at the highest token id.
    """
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = tiny_tokenizer("clip")
    torch.manual_seed(seed)
    text = {
        "hidden_size": text_width,
        "intermediate_size": 2 * text_width,
        "num_hidden_layers": text_layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 16,
        "vocab_size": len(tokenizer),
        "eos_token_id": 2 if old_eos else tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": vision_width,
        "intermediate_size": 2 * vision_width,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": heads,
        "image_size": 32,
        "patch_size": 8,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


def tiny_vit(folder: str | Path | None = None, *, layers: int = 4, width: int = 32, seed: int = 0) -> Any:
    """A random ``ViTModel`` without pooler: 32-pixel pictures in patches of 8."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    if folder is not None:
        model.save_pretrained(folder)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


def tiny_swin(
    folder: str | Path | None = None,
    *,
    image_size: int = 32,
    window: int = 4,
    depths: tuple[int, ...] = (2, 2),
    width: int = 16,
    pooler: bool = True,
    seed: int = 0,
) -> Any:
    """A random ``SwinModel``, patches of 4: at 32 pixels 8 x 8 tokens in 4 windows, then 4 x 4 in one."""
    from transformers import SwinConfig, SwinModel, ViTImageProcessor

    torch.manual_seed(seed)
    config = SwinConfig(
        image_size=image_size,
        patch_size=4,
        embed_dim=width,
        depths=depths,
        num_heads=[2 * 2**stage for stage in range(len(depths))],
        window_size=window,
        mlp_ratio=2.0,
    )
    model = SwinModel(config, add_pooling_layer=pooler).eval()
    if folder is not None:
        model.save_pretrained(folder)
        ViTImageProcessor(size={"height": image_size, "width": image_size}).save_pretrained(folder)
    return model


def tiny_bert(folder: str | Path | None = None, *, layers: int = 3, width: int = 24, seed: int = 1) -> Any:
    """A random ``BertModel`` with pooler: 16 positions."""
    from transformers import BertConfig, BertModel

    tokenizer = tiny_tokenizer("bert")
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=16,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertModel(config).eval()
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model


LLAMAS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mistral, narrow window": {"sliding_window": 3},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}
"""Kinds of :func:`tiny_llama`, with what their configurations have of their own."""


def tiny_llama(
    folder: str | Path | None = None,
    *,
    kind: str = "llama",
    layers: int = 4,
    width: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    language_model: bool = True,
    seed: int = 2,
) -> Any:
    """A random language model of the LLaMA family, 64 positions: ``LlamaForCausalLM`` and so on, or ``LlamaModel``.

    Args:
        kind: a key of :data:`LLAMAS`.
        language_model: with the map to the vocabulary.
    """
    import transformers

    tokenizer = tiny_tokenizer("llama", max_length=64)
    torch.manual_seed(seed)
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind.split(",")[0]]
    config = getattr(transformers, f"{name}Config")(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        **LLAMAS[kind],
    )
    model = getattr(transformers, f"{name}ForCausalLM" if language_model else f"{name}Model")(config).eval()
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model
