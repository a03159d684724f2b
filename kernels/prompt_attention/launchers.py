"""Which kernels take a call: Hopper's own where they were measured to be faster, else the portable ones.

The choice depends on the card, the type and the numbers of rows and keys, never on the batch.
"""

# pyright: basic

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from epic_fast.kernels.prompt_attention import triton_backward, triton_forward

# Gluon is experimental, and each release compiles it differently: these are the ones it was measured with.
MEASURED_TRITON = ((3, 6),)
# Resident kernels hold a head's keys in shared memory; above and below, the portable backward is faster.
BACKWARD_ROWS = range(129, 289)


@functools.cache
def _hopper(device: torch.device) -> tuple[Any, Any] | None:
    """The modules with Hopper's kernels, where this card and this Triton can run them."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version not in MEASURED_TRITON:
        return None
    from epic_fast.kernels.prompt_attention import gluon_backward, gluon_forward

    return gluon_forward, gluon_backward


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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As :func:`triton_forward.prompt_attention_forward`."""
    tensors = (query, key, value, prompt_query, prompt_key, prompt_value)
    forward = triton_forward.prompt_attention_forward
    hopper = _hopper(query.device)
    if (
        hopper is not None
        and query.shape[3] == 64
        and not hopper[0].limits(*tensors, scale=scale, output=output, prompt_output=prompt_output)
    ):
        forward = hopper[0].prompt_attention_forward
    return forward(
        *tensors,
        lengths,
        prefix=prefix,
        causal=causal,
        scale=scale,
        output=output,
        prompt_output=prompt_output,
        save_lse=save_lse,
    )


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As :func:`triton_backward.prompt_attention_backward`."""
    inputs = (query, key, value, prompt_query, prompt_key, prompt_value)
    backward = triton_backward.prompt_attention_backward
    hopper = _hopper(query.device)
    tokens, prompts = query.shape[2], prompt_key.shape[2]
    rows = tokens + (0 if prompt_query is None else prompts)
    if (
        hopper is not None
        and query.shape[3] == 64
        and rows in BACKWARD_ROWS
        and tokens + prompts in BACKWARD_ROWS
        # Measured with all gradients wanted; where prompts alone want them, the portable kernels visit only those rows.
        and all(needs[:3])
        and not hopper[1].limits(
            grad_output, grad_prompt_output, *inputs, output, prompt_output, scale=scale, grads=grads
        )
    ):
        backward = hopper[1].prompt_attention_backward
    return backward(
        grad_output,
        grad_prompt_output,
        *inputs,
        lengths,
        output,
        prompt_output,
        lse,
        prefix=prefix,
        causal=causal,
        scale=scale,
        needs=needs,
        grads=grads,
    )
