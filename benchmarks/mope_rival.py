"""MoPE in plain PyTorch as it is published: prompts copied into every window, with each window's own sample's prompts.

A Swin block takes the place of ``epic_fast.engine.windows.call_swin_block_with_prompts``; everything else of the model
is the library's own, without its kernels.  In each window the P prompts stand before the tokens, so query, key, value
and output are projected for ``nW * P`` rows of prompts a sample, the bias is padded for them, and their mean over the
windows is taken behind the projection.  What a careful user would do is done: the padded bias (frozen, like the shift)
is made once, its rows are aligned so that SDPA takes it as it is, it is repeated over the batch only where windows
differ, and norms and MLP of prompts run once a sample.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.registry import dense_bias
from epic_fast import functional
from epic_fast.backbones import swin as swin_tower
from epic_fast.engine.windows import from_windows, shift_mask, to_windows


@torch.no_grad()
def attach_dense_biases(swin: Any, prompts: int) -> None:
    """Give every block of a ``SwinModel`` its padded bias ``dense_bias`` for pictures of the size that it is made for.

    A buffer beside the frozen weights, in the type and on the device that these have or get.
    """
    window, grid = swin.config.window_size, swin.embeddings.patch_grid
    for stage in swin.encoder.layers:
        rows, columns = grid
        for number, block in enumerate(stage.blocks):
            shift = window // 2 if number % 2 and min(grid) > window else 0
            bias = block.attention.relative_position_bias()[0]
            mask = shift_mask(-(-rows // window), -(-columns // window), window, shift, bias.device) if shift else None
            block.register_buffer("dense_bias", dense_bias(bias, mask, prompts, bias.dtype), persistent=False)
        grid = swin_tower.halved(grid)


def swin_block_with_copies(
    block: Any, hidden: Tensor, prompts: Tensor, grid: tuple[int, int], *, window: int, shift: int
) -> tuple[Tensor, Tensor]:
    """The block on tokens ``(B, N, C)`` and prompts ``(B, P, C)``, arguments and result as in the library."""
    (batch, tokens, width), (rows, columns), count = hidden.shape, grid, prompts.shape[1]
    shift = 0 if min(grid) <= window else shift
    prompts = prompts.to(hidden.dtype)
    windows = to_windows(block.layernorm_before(hidden).view(batch, rows, columns, width), window, shift)
    many = len(windows) // batch
    copied = copy_prompts(block.layernorm_before(prompts), many)
    output = _attend(block, torch.cat([copied, windows], dim=1), batch)
    of_tokens, of_prompts = output[:, count:], output[:, :count].unflatten(0, (batch, many)).mean(dim=1)
    hidden = hidden + from_windows(of_tokens, batch, grid, window, shift).reshape(batch, tokens, width)
    prompts = prompts + of_prompts
    return tuple(each + block.mlp(block.layernorm_after(each)) for each in (hidden, prompts))  # pyright: ignore


def copy_prompts(prompts: Tensor, windows: int) -> Tensor:
    """``(B, P, C)`` to ``(B * nW, P, C)``, batch-major like windows: each window gets its own sample's prompts."""
    return prompts.repeat_interleave(windows, dim=0)


def _attend(block: Any, windows: Tensor, batch: int) -> Tensor:
    """``(B * nW, R, C)`` through the attention, output projection included."""
    attention, rows = block.attention, windows.shape[1]
    query, key, value = (
        projection(windows).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    # Where all windows share a bias, SDPA broadcasts it.
    bias = block.dense_bias if len(block.dense_bias) == 1 else block.dense_bias.repeat(batch, 1, 1, 1)
    bias = bias[..., :rows].expand(len(windows), -1, -1, -1)
    output = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=attention.scaling)
    return attention.o_proj(output.transpose(1, 2).flatten(2))


@contextmanager
def copied_windows() -> Iterator[None]:
    """Models run their Swin blocks with copied prompts, and mix their experts, in PyTorch's own operations."""
    plain_mix = functools.partial(functional.mix_prompt_experts, impl="reference")
    with (
        mock.patch.object(swin_tower, "call_swin_block_with_prompts", swin_block_with_copies),
        mock.patch.object(functional, "mix_prompt_experts", plain_mix),
    ):
        yield
