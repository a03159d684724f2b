"""Fused frozen Swin blocks: a block and its prompts as one ``autograd.Function``.

As :mod:`epic_fast.engine.fused`, with x the tokens of a picture and p the prompts of its sample::

    a, a' = attention(QKV(windows(norm_1(x))), QKV(norm_1(p)))
    x' = x + back(O(a))        y = x' + W_2 act(W_1 norm_2(x'))
    p' = p + O(a')             q = p' + W_2 act(W_1 norm_2(p'))

Windows share their sample's prompts, which are projected once (``kernels/window_prompt_attention``).  Backward gives
the gradients of x and p alone, and of x only where it needs one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from epic_fast.engine.blocks import LayerParts, Weights
from epic_fast.engine.fused import KEEP, kept_norm, mlp_backward, mlp_forward, no_autocast
from epic_fast.engine.products import product, product_backward
from epic_fast.engine.windows import Windows, call_swin_block_with_prompts
from epic_fast.ops.residual_norm import residual_norm_backward
from epic_fast.ops.window_prompt_attention import window_attention_backward, window_attention_forward


class FrozenWindowBlock:
    """One block of a Swin, computed from its own weights.

    Args:
        layer: a block of which :func:`epic_fast.engine.blocks.why_not` says None.
    """

    def __init__(self, layer: nn.Module):
        self.parts = LayerParts(layer)
        self.position: Any = self.parts.parts["position"]
        self._bias: tuple[Any, Tensor] | None = None

    def bias(self) -> Tensor:
        """The bias of relative positions ``(H, M, M)``, made anew when its table changed."""
        table = self.position.relative_position_bias_table
        key = table.data_ptr(), table._version, table.dtype, table.device
        if self._bias is None or self._bias[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._bias = key, self.position()[0].contiguous()
        return self._bias[1]

    def made(self) -> list[Any]:
        """What it has made of its weights, for a captured graph to hold."""
        return [dict(self.parts._cache), self._bias]

    def __call__(
        self, hidden: Tensor, prompts: Tensor, windows: Windows, *, save: str = "full"
    ) -> tuple[Tensor, Tensor]:
        """Tokens ``(B, N, C)`` and prompts ``(B, P, C)`` behind the block.

        Args:
            save: what is kept for backward: ``"full"``, ``"eight_bit"`` or ``"recompute"``.
        """
        if torch.is_grad_enabled() and (hidden.requires_grad or prompts.requires_grad):
            return _WindowBlock.apply(hidden, prompts, self, windows, save)  # pyright: ignore[reportReturnType]
        with torch.no_grad():
            return _forward(self, hidden, prompts, windows, ("none", "none"), graph=False)[0]

    @torch.no_grad()
    def alone(self, hidden: Tensor, windows: Windows) -> Tensor:
        """Tokens ``(B, N, C)`` behind the block where there are no prompts; never part of a graph."""
        nothing = hidden.new_zeros(len(hidden), 0, hidden.shape[2])
        return _forward(self, hidden, nothing, windows, ("none", "none"), graph=False)[0][0]


def _forward(
    block: FrozenWindowBlock,
    hidden: Tensor,
    prompts: Tensor,
    windows: Windows,
    keeps: tuple[str, str],
    *,
    graph: bool,
) -> tuple[tuple[Tensor, Tensor], Weights, tuple[Tensor | None, ...]]:
    """Tokens and prompts behind the block, the weights, and what backward wants: of tokens and of prompts three tensors
    for the first norm, then four for the rest; then the two projections and the log-sum-exp.  Without a graph there may
    be no prompts."""
    parts, batch = block.parts, len(hidden)
    streams = hidden.contiguous(), prompts.contiguous()
    with no_autocast(hidden) as dtype:
        weights = parts.weights(dtype, backward=graph)
        firsts, normed = [], []
        for stream, keep in zip(streams, keeps, strict=True):
            _, found, *first = kept_norm(stream, None, weights.first_norm, weights, keep == "eight_bit")
            normed.append(found)
            firsts += first
        normed[0] = windows.cut(normed[0])
        qkv, prompt_qkv = (_heads(product(rows, weights.qkv, weights.qkv_bias)[0], parts.heads) for rows in normed)
        del normed
        options = (block.bias(), windows.mask(hidden.device), parts.scale)
        *attended, lse = window_attention_forward(qkv, prompt_qkv, *options, save_lse=graph)
        results, seconds = [], []
        for index, (stream, rows, keep) in enumerate(zip(streams, attended, keeps, strict=True)):
            branch = product(rows, weights.output, weights.output_bias)[0]
            branch = windows.join(branch, batch) if index == 0 else branch
            result, *second = mlp_forward(parts, weights, stream, branch, keep)
            results.append(result)
            seconds += second
    return (results[0], results[1]), weights, (*firsts, *seconds, qkv, prompt_qkv, lse)


class _WindowBlock(torch.autograd.Function):
    """Saves, of tokens and of prompts, what their norms and MLPs want, then the projections."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, prompts: Tensor, block: FrozenWindowBlock, windows: Windows, save: str
    ) -> tuple[Tensor, Tensor]:
        # Prompts are few: their rows are kept as they are.
        ctx.block, ctx.windows, ctx.keeps = block, windows, (KEEP[save], "full")
        results, ctx.weights, saved = _forward(block, hidden, prompts, windows, ctx.keeps, graph=True)
        ctx.save_for_backward(*saved)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        parts, weights, windows = ctx.block.parts, ctx.weights, ctx.windows
        saved = ctx.saved_tensors
        firsts, seconds = (saved[:3], saved[3:6]), (saved[6:10], saved[10:14])
        qkv, prompt_qkv, lse = saved[14:]
        batch = len(grads[0])
        needs_tokens = ctx.needs_input_grad[0]
        with no_autocast(grads[0]):
            streams, branches = [], []
            for index, (grad, second, keep) in enumerate(zip(grads, seconds, ctx.keeps, strict=True)):
                stream = mlp_backward(parts, weights, grad.contiguous(), second, keep)
                rows = stream.to(weights.dtype)
                rows = windows.cut(rows) if index == 0 else rows
                branches.append(product_backward(rows, weights.output))
                streams.append(stream)
            options = (ctx.block.bias(), windows.mask(grads[0].device), parts.scale)
            found = window_attention_backward(
                branches[0], branches[1], qkv, prompt_qkv, *options, lse, tokens=needs_tokens
            )
            results: list[Tensor | None] = []
            for index, (grad, stream, first) in enumerate(zip(found, streams, firsts, strict=True)):
                if grad is None:
                    results.append(None)
                    continue
                branch = product_backward(grad, weights.qkv)
                branch = windows.join(branch, batch) if index == 0 else branch
                results.append(
                    residual_norm_backward(
                        branch, stream, first[0], weights.first_norm[0], *first[1:], grad_dtype=stream.dtype
                    )
                )
        return (*results, None, None, None)


def _heads(rows: Tensor, heads: int) -> Tensor:
    """``(R, M, 3 C)`` to ``(R, M, 3, H, head_dim)``."""
    return rows.unflatten(-1, (3, heads, -1))


@torch.no_grad()
def differs(layer: Any, block: FrozenWindowBlock) -> float:
    """How far apart a block run by its own modules with a prompt and its fused form are on a few windows, relative."""
    weight, side = block.parts.parts["query"].weight, layer.window_size
    windows = Windows((2 * side, 2 * side), side, side // 2)
    count = 4 * side * side
    values = torch.arange((count + 1) * weight.shape[1], device=weight.device).view(1, count + 1, -1).sin()
    rows, prompt = values.to(weight.dtype).split([count, 1], dim=1)
    with torch.autocast(weight.device.type, enabled=False):
        wanted = call_swin_block_with_prompts(layer, rows, prompt, windows.grid, window=side, shift=windows.shift)
        found = block(rows, prompt, windows)
    added, wanted_sum = (torch.cat(each, dim=1).double() - values for each in (found, wanted))
    error = float((added - wanted_sum).norm() / wanted_sum.norm())
    return error if math.isfinite(error) else math.inf
