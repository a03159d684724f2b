"""Our attention inside Hugging Face models that know nothing of it: ``attn_implementation="epic_fast"``.

    handle = epic_fast.hf.enable(model)      # this model alone
    handle.restore()                         # or: with epic_fast.hf.enable(model): ...

or, with transformers' own means, ``epic_fast.hf.register()`` once and then
``model.set_attn_implementation("epic_fast")`` or ``from_pretrained(..., attn_implementation="epic_fast")``.

Both registries of transformers get an entry.  An attention whose mask function is missing silently loses the padding.
Our mask function gives the kernel the length of each sample in place of a dense mask, where that says the same.  It
says the same only of rows that are not padding (those come out as 0), so it is done for models known to read none of
them.  Whatever the kernel cannot express exactly goes to transformers' ``sdpa``, with one line in the log.
"""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any, Literal

import torch
from torch import Tensor

from epic_fast import functional
from epic_fast.errors import ConfigError, ImplementationError

logger = logging.getLogger("epic_fast")

KEY = "epic_fast"
READ_NO_PADDING = frozenset({"bert", "roberta", "xlm-roberta", "distilbert", "clip", "clip_text_model"})
"""``model_type`` of the models that pool a token of the text: its first, or its end token.  Not so SigLIP, which pools
the last row, padding or not; nor does it hold for a head that looks at every row, as for question answering."""
_READS_EVERY_ROW = "QuestionAnswering"

__all__ = ["KEY", "Handle", "enable", "register"]


def register() -> str:
    """Enters our attention and its mask function into transformers' registries; again does nothing.

    Returns:
        the name to ask for, ``"epic_fast"``.  ``"epic_fast_strict"`` raises where that one falls back to ``sdpa``,
        ``"epic_fast_right_padded"`` and ``"epic_fast_right_padded_strict"`` trust the caller as :func:`enable` says.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ConfigError(f"epic_fast.hf needs transformers >= 5.13 (pip install 'epic_fast[hf]'): {error}") from error
    for right_padded in (False, True):
        for strict in (False, True):
            key = _key(right_padded, strict)
            AttentionInterface.register(key, _attentions()[strict])
            AttentionMaskInterface.register(key, _masks()[right_padded])
    return KEY


class Handle:
    """What :func:`enable` did to a model, and how to undo it; also a context manager."""

    def __init__(self, changed: list[tuple[Any, str, Any]]) -> None:
        self._changed = changed

    def restore(self) -> None:
        """The model has its own configuration objects back, and so its own attention.  Again does nothing."""
        while self._changed:
            module, name, config = self._changed.pop()
            setattr(module, name, config)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()


def enable(model: Any, *, padding: Literal["checked", "right"] = "checked", strict: bool = False) -> Handle:
    """Lets one model, or one tower of a model, attend by ``epic_fast.functional.prompt_attention``.

    The model has copies of its configuration objects until the handle's ``restore()``, so that no other model that
    was built from the same ones changes with it; what is changed in the copies goes with them.

    Args:
        model: a ``PreTrainedModel``; give ``model.text_model`` or the like for one tower.
        padding: ``"checked"`` looks at each mask (which waits for the GPU, as transformers' own mask functions do) and
            hands lengths to the kernel if it is padded on the right and the model is known to read no row of padding.
            With ``"right"`` you vouch for both: nothing is looked at, and ``torch.compile`` gets lengths as well.
        strict: raise :class:`~epic_fast.errors.ImplementationError` with the reason in place of falling back to
            ``sdpa``.

    Returns:
        a handle with ``restore()``.

    Raises:
        ConfigError: the model does not take its attention from transformers' registry.
    """
    register()
    from transformers import PretrainedConfig, PreTrainedModel

    if padding not in ("checked", "right"):
        raise ConfigError(f"epic_fast.hf.enable: padding={padding!r} is not one of 'checked', 'right'")
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"epic_fast.hf.enable: wanted a transformers PreTrainedModel, found {type(model).__name__}")
    copies: dict[int, Any] = {}
    changed: list[tuple[Any, str, Any]] = []
    for module in model.modules():
        for name, config in list(vars(module).items()):
            if isinstance(config, PretrainedConfig):
                changed.append((module, name, config))
                setattr(module, name, copy.deepcopy(config, copies))
    for config in copies.values():
        if isinstance(config, PretrainedConfig) and _READS_EVERY_ROW in type(model).__name__:
            config.architectures = [type(model).__name__]
    handle = Handle(changed)
    key = _key(padding == "right", strict)
    try:
        model.set_attn_implementation(key)
    except Exception:
        handle.restore()
        raise
    refused = sorted(
        {
            type(module).__name__
            for module in model.modules()
            if isinstance(module, PreTrainedModel) and module.config._attn_implementation != key
        }
    )
    if refused:
        handle.restore()
        raise ConfigError(
            f"epic_fast.hf.enable: {', '.join(refused)} does not take its attention from transformers' "
            "AttentionInterface, so it cannot be changed from outside"
        )
    return handle


def _key(right_padded: bool, strict: bool) -> str:
    return KEY + ("_right_padded" if right_padded else "") + ("_strict" if strict else "")


# A mask as we hand it through the model, where the kernel takes lengths: int32 (B, 1, 1, 1), every row sees the
# valid tokens, or (B, 1, 1, 2), those up to itself.  The shape tells, because values on a GPU are not looked at.
_EVERYBODY, _CAUSAL = 1, 2


def _as_mask(lengths: Tensor, kind: int) -> Tensor:
    return lengths.to(torch.int32)[:, None, None, None].expand(-1, 1, 1, kind)


def _is_lengths(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.dim() == 4


def _dense(mask: Tensor, tokens: int) -> Tensor:
    """The boolean mask that ``sdpa`` takes, (B, 1, 1 or N, N), of one that holds lengths."""
    position = torch.arange(tokens, device=mask.device)
    valid = position < mask[:, :, :, :1]
    return valid & (position[None, :] <= position[:, None]) if mask.shape[3] == _CAUSAL else valid


@functools.cache
def _masks() -> dict[bool, Any]:
    return {right_padded: functools.partial(_mask, right_padded) for right_padded in (False, True)}


def _mask(
    right_padded: bool,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **others: Any,
) -> Tensor | None:
    """transformers' mask function: lengths where they say what the dense mask would, else what ``sdpa`` takes."""
    from transformers import masking_utils

    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    if attention_mask is not None:
        # An offset or a cache, a window, packed samples, other functions on top, a mask that will be worked on: dense.
        kind = 0
        if mask_function is masking_utils.causal_mask_function and allow_is_causal_skip:
            kind = _CAUSAL
        elif mask_function is masking_utils.bidirectional_mask_function and allow_is_bidirectional_skip:
            kind = _EVERYBODY
        plain = isinstance(q_offset, int) and q_offset == kv_offset == 0 and others.get("local_size") is None
        if kind and plain and q_length == kv_length == attention_mask.shape[-1] and attention_mask.dim() == 2:
            if right_padded:
                return _as_mask(attention_mask.sum(dim=1), kind)
            if _reads_no_padding(config) and not torch.compiler.is_compiling():
                lengths = attention_mask.sum(dim=1)
                position = torch.arange(kv_length, device=lengths.device)
                ordered = ((position < lengths[:, None]) == attention_mask.bool()).all()
                # Masked altogether, sdpa gives what it gives and we give 0.
                ordered, full = torch.stack([ordered & (lengths > 0).all(), (lengths == kv_length).all()]).tolist()
                if full:
                    return None
                if ordered:
                    return _as_mask(lengths, kind)
    return masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # pyright: ignore[reportArgumentType]
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **others,
    )


def _reads_no_padding(config: Any) -> bool:
    heads = getattr(config, "architectures", None) or ()
    known = getattr(config, "model_type", None) in READ_NO_PADDING
    return known and not any(_READS_EVERY_ROW in head for head in heads)


@functools.cache
def _attentions() -> dict[bool, Any]:
    return {strict: functools.partial(_attention, strict) for strict in (False, True)}


def _attention(
    strict: bool,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: (B, H, N, D) in, (B, N, H, D) and no weights out."""
    lengths = _is_lengths(attention_mask)
    reason = _why_not(query, key, value, attention_mask, dropout, others)
    if reason:
        if strict:
            raise ImplementationError(f"epic_fast.hf, {type(module).__name__}: {reason} (strict=True)")
        if not torch.compiler.is_compiling():
            _log_once(type(module).__name__, reason)
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if lengths:
            assert attention_mask is not None
            attention_mask = _dense(attention_mask, key.shape[2])
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **others
        )
    if lengths:
        assert attention_mask is not None
        causal = attention_mask.shape[3] == _CAUSAL
    else:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    # No prompts; detached, or their gradient would be a full tensor of zeros for nothing.
    nothing = key.detach()[:, :, :0]
    output, _ = functional.prompt_attention(
        query,
        key,
        value,
        None,
        nothing,
        nothing,
        causal=causal,
        lengths=attention_mask[:, 0, 0, 0] if lengths and attention_mask is not None else None,
        scale=scaling,
    )
    return output.transpose(1, 2).contiguous(), None


def _why_not(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, others: dict[str, Any]
) -> str:
    """Why this call cannot be expressed exactly by ``prompt_attention``; empty if it can."""
    if mask is not None and not _is_lengths(mask):
        return "a mask that is not known to be padding on the right which the model does not read"
    if dropout:
        return f"attention dropout ({dropout})"
    if others.get("output_attentions"):
        return "output_attentions=True: the weights are never there"
    for name in ("position_bias", "softcap", "cache", "s_aux"):
        if others.get(name) is not None:
            return f"the argument {name}"
    if key.shape[1] != query.shape[1]:
        return "fewer heads for keys than for queries"
    if key.shape != query.shape or value.shape != query.shape:
        return "queries, keys and values of different shapes (a cache, cross-attention, or another width of the values)"
    return ""


@functools.cache
def _log_once(module: str, reason: str) -> None:
    logger.info("epic_fast.hf, %s: using sdpa: %s", module, reason)
