"""Which kernels take a call: Hopper's own where they were measured to be faster, else the portable ones.

The choice depends on the card, the type and the numbers of rows and keys, never on the batch.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
import triton
from torch import Tensor

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.cards import is_hopper
from epic_fast.kernels.common.plan import Tape, precision, unit_last_stride
from epic_fast.kernels.prompt_attention import triton_backward, triton_forward

# Gluon is experimental, and each release compiles it differently: these are the ones it was measured with.
MEASURED_TRITON = ((3, 6),)
# Resident kernels hold a head's keys in shared memory; elsewhere the portable backward is faster.
BACKWARD_ROWS = range(129, 289)
# Where all rows see the same, these too; the gap is where tiles of 128 keys are too wide for what is left.
BACKWARD_MORE_ROWS = (range(289, 417), range(577, 609))
# Up to here one program takes a whole head.
SHORT_ROWS = 128


@functools.cache
def _hopper(device: torch.device) -> tuple[Any, Any, Any] | None:
    """The modules with Hopper's kernels, where this card and this Triton can run them."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version not in MEASURED_TRITON or not is_hopper(device):
        return None
    from epic_fast.kernels.prompt_attention import gluon_backward, gluon_forward, gluon_short_backward

    return gluon_forward, gluon_backward, gluon_short_backward


def prompt_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor | None,
    prompt_key: Tensor,
    prompt_value: Tensor,
    lengths: Tensor | None,
    *,
    prefix: bool,
    causal: bool,
    scale: float,
    output: Tensor | None = None,
    prompt_output: Tensor | None = None,
    save_lse: bool = True,
    alike: Hashable = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As :func:`triton_forward.prompt_attention_forward`; ``alike`` is for :func:`plan.run`."""
    tensors = (query, key, value, prompt_query, prompt_key, prompt_value, lengths, output, prompt_output)
    options = (prefix, causal, float(scale), save_lse, precision(query.dtype))
    return plan.run(_forward, tensors, options, alike)  # pyright: ignore[reportReturnType]


def _forward(tape: Tape, *arguments: Any) -> tuple[Tensor | None, ...]:
    *inputs, _, output, prompt_output, _, _, scale, _, _ = arguments
    query = inputs[0]
    hopper = _hopper(query.device)
    if (
        hopper is not None
        and query.shape[3] == 64
        and not hopper[0].limits(*inputs, scale=scale, output=output, prompt_output=prompt_output)
    ):
        return hopper[0].forward(tape, *arguments[:-1])
    return triton_forward.forward(tape, *arguments)


def prompt_attention_backward(
    grad_output: Tensor | None,
    grad_prompt_output: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_query: Tensor | None,
    prompt_key: Tensor,
    prompt_value: Tensor,
    lengths: Tensor | None,
    output: Tensor,
    prompt_output: Tensor | None,
    lse: Tensor,
    *,
    prefix: bool,
    causal: bool,
    scale: float,
    needs: tuple[bool, bool, bool, bool, bool, bool],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    | None = None,
    alike: Hashable = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As :func:`triton_backward.prompt_attention_backward`; ``alike`` is for :func:`plan.run`."""
    return plan.run(
        _backward,
        (
            grad_output,
            grad_prompt_output,
            query,
            key,
            value,
            prompt_query,
            prompt_key,
            prompt_value,
            lengths,
            output,
            prompt_output,
            lse,
            *(() if grads is None else grads),
        ),
        (prefix, causal, float(scale), needs, precision(query.dtype)),
        alike,
    )  # pyright: ignore[reportReturnType]


def _backward(tape: Tape, *arguments: Any) -> tuple[Tensor | None, ...]:
    *tensors, prefix, causal, scale, needs, precision = arguments
    tensors[:2] = [unit_last_stride(tape, each) for each in tensors[:2]]
    query, _, _, prompt_query, prompt_key, _ = tensors[2:8]
    tokens, prompts = query.shape[2], prompt_key.shape[2]
    rows = tokens + (0 if prompt_query is None else prompts)
    hopper = _hopper(query.device)
    # Measured with all gradients wanted; where prompts alone want them, the portable kernels visit only those rows.
    if hopper is not None and query.shape[3] == 64 and all(needs[:3]):
        _, resident, short = hopper
        if tokens + prompts <= SHORT_ROWS:
            if not short.limits(*tensors[:8], scale=scale, grads=tensors[12:]):
                return short.backward(tape, *tensors, prefix, causal, scale, needs, None)
        elif _resident_backward(
            rows, tokens + prompts, causal or prefix or tensors[8] is not None
        ) and not resident.limits(*tensors[:8], *tensors[9:11], scale=scale, grads=tensors[12:]):
            return resident.backward(tape, *tensors, prefix, causal, scale, needs, None)
    return triton_backward.backward(tape, *tensors, prefix, causal, scale, needs, precision, None)


def _resident_backward(rows: int, keys: int, varied: bool) -> bool:
    if varied:
        return rows in BACKWARD_ROWS and keys in BACKWARD_ROWS
    return any(rows in each and keys in each for each in (BACKWARD_ROWS, *BACKWARD_MORE_ROWS))
