"""Attention of a frozen layer on one packed buffer: queries, keys and values of ``[prompts ; tokens]`` as one product
left them, ``(B, S, 3, H, head_dim)`` with the P prompts in rows 0 to P - 1 and ``S = P + N``.

Raw operations, tensors in and tensors out: whoever calls them owns the graph.  Rows see what they see in
:func:`epic_fast.functional.prompt_attention`; rows at or past a length give output 0 and gradient 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from epic_fast.ops import library
from epic_fast.ops.dispatch import Operation
from epic_fast.ops.prompt_attention import KERNEL_TYPES, LARGEST_HEAD, LENGTH_TYPES

LOG2_E = math.log2(math.e)

_FLAGS = "int prompts, Tensor? lengths, bool prefix, bool causal, float scale"


def packed_attention_forward(
    qkv: Tensor,
    *,
    prompts: int,
    lengths: Tensor | None = None,
    prompt_mask: str = "full",
    causal: bool = False,
    scale: float | None = None,
    save_lse: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention of every row.

    Args:
        qkv: ``(B, S, 3, H, head_dim)``.
        prompts: P, how many of the first rows are prompts.
        lengths: ``(B,)`` int32 or int64, valid tokens of each sample (prompts not counted); None: all N.
        prompt_mask: ``"full"`` or ``"prefix"``, what prompt rows see of the tokens.
        scale: of the scores; None is ``head_dim ** -0.5``.
        save_lse: whether a backward pass will want the second result.

    Returns:
        The output ``(B, S, H, head_dim)``, and the base-2 log-sum-exp of the scores ``(B, H, S)`` in float32
        (float64 for float64) or None.  Where a row sees nothing that log-sum-exp has no meaning.
    """
    scale = qkv.shape[4] ** -0.5 if scale is None else scale
    lengths = _integers(lengths)
    return _forward(
        qkv, prompts, lengths, prompt_mask == "prefix", causal, scale, save_lse=save_lse, impl=impl
    )  # fmt: skip


def packed_attention_backward(
    grad_output: Tensor,
    qkv: Tensor,
    output: Tensor,
    lse: Tensor,
    *,
    prompts: int,
    lengths: Tensor | None = None,
    prompt_mask: str = "full",
    causal: bool = False,
    scale: float | None = None,
    prompt_rows_only: bool = False,
    impl: str = "auto",
) -> Tensor:
    """The gradient of ``qkv`` ``(B, S, 3, H, head_dim)``, or with ``prompt_rows_only`` of its first P rows.

    Args:
        grad_output: ``(B, S, H, head_dim)``; what it holds in rows at or past a length is not read into any gradient.
        output, lse: what :func:`packed_attention_forward` gave, called with the same options.
    """
    scale = qkv.shape[4] ** -0.5 if scale is None else scale
    lengths = _integers(lengths)
    return _backward(
        grad_output, qkv, output, lse, prompts, lengths, prompt_mask == "prefix", causal, scale,
        prompt_rows_only=prompt_rows_only, impl=impl,
    )  # fmt: skip


def _integers(lengths: Tensor | None) -> Tensor | None:
    return lengths if lengths is None or lengths.dtype in LENGTH_TYPES else lengths.to(torch.int32)


# -- kernels: views of the one buffer, handed to the launchers of prompt attention -----------------------------------


@functools.cache
def _launchers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from epic_fast.kernels.prompt_attention import launchers  # pyright: ignore[reportMissingImports]

    return launchers.prompt_attention_forward, launchers.prompt_attention_backward


def _views(packed: Tensor, prompts: int) -> tuple[Tensor, Tensor]:
    """Tokens ``(B, H, N, head_dim)`` and prompts ``(B, H, P, head_dim)`` of ``(B, S, H, head_dim)``."""
    rows = packed.transpose(1, 2)
    return rows[:, :, prompts:], rows[:, :, :prompts]


def _inputs(qkv: Tensor, prompts: int) -> tuple[Tensor | None, ...]:
    query, key, value = (_views(qkv[:, :, part], prompts) for part in range(3))
    return query[0], key[0], value[0], query[1] if prompts else None, key[1], value[1]


def _kernel_forward(
    qkv: Tensor, prompts: int, lengths: Tensor | None, prefix: bool, causal: bool, scale: float, save_lse: bool
) -> tuple[Tensor, Tensor]:
    batch, rows, _, heads, head_dim = qkv.shape
    result = qkv.new_empty(batch, rows, heads, head_dim)
    output, prompt_output = _views(result, prompts)
    _, _, lse = _launchers()[0](
        *_inputs(qkv, prompts),
        lengths,
        prefix=prefix,
        causal=causal,
        scale=scale,
        output=output,
        prompt_output=prompt_output if prompts else None,
        save_lse=save_lse,
    )
    return result, qkv.new_empty(0) if lse is None else lse


def _fake_forward(
    qkv: Tensor, prompts: int, lengths: Tensor | None, prefix: bool, causal: bool, scale: float, save_lse: bool
) -> tuple[Tensor, Tensor]:
    batch, rows, _, heads, head_dim = qkv.shape
    lse = qkv.new_empty(batch, heads, rows, dtype=torch.float32) if save_lse else qkv.new_empty(0)
    return qkv.new_empty(batch, rows, heads, head_dim), lse


def _kernel_backward(
    grad_output: Tensor,
    qkv: Tensor,
    output: Tensor,
    lse: Tensor,
    prompts: int,
    lengths: Tensor | None,
    prefix: bool,
    causal: bool,
    scale: float,
    prompt_rows_only: bool,
) -> Tensor:
    result = _fake_backward(
        grad_output, qkv, output, lse, prompts, lengths, prefix, causal, scale, prompt_rows_only
    )  # fmt: skip
    if prompt_rows_only:
        parts = [result[:, :, part].transpose(1, 2) for part in range(3)]
        grads: tuple[Tensor | None, ...] = (None, None, None, *parts)
    else:
        grads = _inputs(result, prompts)
    grad_tokens, grad_prompts = _views(grad_output, prompts)
    outputs = _views(output, prompts)
    _launchers()[1](
        grad_tokens,
        grad_prompts if prompts else None,
        *_inputs(qkv, prompts),
        lengths,
        outputs[0],
        outputs[1] if prompts else None,
        lse,
        prefix=prefix,
        causal=causal,
        scale=scale,
        needs=(*((not prompt_rows_only,) * 3), *((prompts > 0,) * 3)),
        grads=grads,
    )
    return result


def _fake_backward(
    grad_output: Tensor,
    qkv: Tensor,
    output: Tensor,
    lse: Tensor,
    prompts: int,
    lengths: Tensor | None,
    prefix: bool,
    causal: bool,
    scale: float,
    prompt_rows_only: bool,
) -> Tensor:
    batch, rows, _, heads, head_dim = qkv.shape
    return qkv.new_empty(batch, prompts if prompt_rows_only else rows, 3, heads, head_dim)


FORWARD = library.register(
    f"packed_attention_forward(Tensor qkv, {_FLAGS}, bool save_lse) -> (Tensor, Tensor)", _kernel_forward, _fake_forward
)
BACKWARD = library.register(
    f"packed_attention_backward(Tensor grad_output, Tensor qkv, Tensor output, Tensor lse, {_FLAGS}, "
    "bool prompt_rows_only) -> Tensor",
    _kernel_backward,
    _fake_backward,
)


def _triton_forward(
    qkv: Tensor, prompts: int, lengths: Tensor | None, *flags: Any, save_lse: bool
) -> tuple[Tensor, Tensor | None]:
    forward: Any = _kernel_forward if library.direct(qkv, lengths) else FORWARD
    output, lse = forward(qkv, prompts, lengths, *flags, save_lse)
    return output, lse if save_lse else None


def _triton_backward(*args: Any, prompt_rows_only: bool) -> Tensor:
    *tensors, _, lengths, _, _, _ = args
    backward: Any = _kernel_backward if library.direct(*tensors, lengths) else BACKWARD
    return backward(*args, prompt_rows_only)


# -- reference: PyTorch's own attention with a mask -------------------------------------------------------------------


def visible_keys(
    rows: int, prompts: int, lengths: Tensor | None, prefix: bool, causal: bool, device: torch.device
) -> Tensor:
    """How many of the first keys each row sees, ``(B or 1, S)``; what it sees is a prefix of ``[prompts ; tokens]``.

    Rows at or past a length see themselves and what is before them, so that their softmax is finite: their output
    has to be put to zero.
    """
    position = torch.arange(rows, device=device)[None]
    stop = torch.full_like(position[:, :1], rows) if lengths is None else lengths.to(device)[:, None] + prompts
    limit = torch.minimum(position + 1, stop) if causal else stop.expand(-1, rows)
    if causal or prefix:
        of_prompts = torch.full_like(stop, prompts) if prefix else stop
        limit = torch.where(position < prompts, of_prompts, limit)
    return torch.where(position < stop, limit, position + 1)


def _mask(
    qkv: Tensor, prompts: int, lengths: Tensor | None, prefix: bool, causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What PyTorch's attention adds to the scores ``(B or 1, 1, S, S)``, and which rows count ``(B, S, 1, 1)``."""
    if lengths is None and not causal and not (prefix and prompts):
        return None, None
    rows = qkv.shape[1]
    if qkv.device.type == "cpu":
        # The layers of a tower, there and back, ask for the same one.
        return _mask_of_numbers(
            None if lengths is None else tuple(lengths.tolist()), rows, prompts, prefix, causal, qkv.dtype
        )
    return _make_mask(lengths, rows, prompts, prefix, causal, qkv.dtype, qkv.device)


@functools.lru_cache(maxsize=4)
def _mask_of_numbers(
    lengths: tuple[int, ...] | None, rows: int, prompts: int, prefix: bool, causal: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    ends = None if lengths is None else torch.tensor(lengths)
    with torch.inference_mode(False):
        return _make_mask(ends, rows, prompts, prefix, causal, dtype, torch.device("cpu"))


def _make_mask(
    lengths: Tensor | None,
    rows: int,
    prompts: int,
    prefix: bool,
    causal: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    limit = visible_keys(rows, prompts, lengths, prefix, causal, device)
    position = torch.arange(rows, device=device)
    hidden = position >= limit[:, :, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))[:, None]
    counts = None if lengths is None else (position < lengths.to(device)[:, None] + prompts)[:, :, None, None]
    return mask, counts


def _reference_forward(
    qkv: Tensor,
    prompts: int,
    lengths: Tensor | None,
    prefix: bool,
    causal: bool,
    scale: float,
    *,
    save_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    mask, counts = _mask(qkv, prompts, lengths, prefix, causal)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    if qkv.device.type == "cpu" and qkv.numel():
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scale
        )
        lse = lse * LOG2_E
    else:
        scores = _scores(query, key, mask, scale)
        lse = scores.logsumexp(dim=-1) * LOG2_E
        output = scores.softmax(dim=-1).to(value.dtype) @ value
    output = output.transpose(1, 2)
    if counts is not None:
        output = torch.where(counts, output, 0.0)
    return output.contiguous(), lse if save_lse else None


def _reference_backward(
    grad_output: Tensor,
    qkv: Tensor,
    output: Tensor,
    lse: Tensor,
    prompts: int,
    lengths: Tensor | None,
    prefix: bool,
    causal: bool,
    scale: float,
    *,
    prompt_rows_only: bool,
) -> Tensor:
    mask, counts = _mask(qkv, prompts, lengths, prefix, causal)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    if counts is not None:
        grad_output = torch.where(counts, grad_output, 0.0)
    grad_output, output = grad_output.transpose(1, 2), output.transpose(1, 2)
    if qkv.device.type == "cpu" and qkv.numel():
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_output, query, key, value, output, lse / LOG2_E, 0.0, False, attn_mask=mask, scale=scale
        )
    else:
        weights = torch.exp2(_scores(query, key, mask, scale) * LOG2_E - lse[..., None])
        grad, wide_value = grad_output.to(weights.dtype), value.to(weights.dtype)
        delta = (grad * output).sum(dim=-1, keepdim=True)
        grad_scores = (weights * (grad @ wide_value.transpose(-1, -2) - delta) * scale).to(query.dtype)
        parts = (grad_scores @ key, grad_scores.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad)
    if prompt_rows_only:
        parts = [part[:, :, :prompts] for part in parts]
    return torch.stack([part.transpose(1, 2).to(qkv.dtype) for part in parts], dim=2)


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(wide) @ key.to(wide).transpose(-1, -2)) * scale
    return scores if mask is None else scores + mask


def _limits(*args: Any) -> list[str]:
    # Forward: (qkv, ...); backward: (grad_output, qkv, ...).  Both start with the buffer's type and head size.
    tensor = args[0]
    head_dim = tensor.shape[-1]
    reasons = []
    if tensor.is_cuda:
        old = library.too_old(tensor.get_device())
        reasons = [old] if old else []
    if tensor.dtype not in KERNEL_TYPES:
        reasons.append(f"the tensors are {tensor.dtype}; the kernel takes float32, bfloat16 and float16")
    if not 0 < head_dim <= LARGEST_HEAD:
        reasons.append(f"head_dim is {head_dim}; the kernel takes 1 to {LARGEST_HEAD}")
    return reasons


_forward = Operation("packed_attention_forward", _reference_forward, _triton_forward, _limits)
_backward = Operation("packed_attention_backward", _reference_backward, _triton_backward, _limits)
