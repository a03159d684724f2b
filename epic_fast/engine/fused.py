"""Fused frozen blocks: a transformer layer as one ``autograd.Function`` that knows its weights never change.

Pre-norm (CLIP, SigLIP, ViT), with x the rows of ``[prompts ; tokens]``::

    x' = x + O(attention(QKV(norm_1(x))))        y = x' + W_2 act(W_1 norm_2(x'))

Post-norm (BERT)::

    x' = norm_1(x + O(attention(QKV(x))))        y = norm_2(x' + W_2 act(W_1 x'))

Backward computes the gradient of x alone.  It is given what forward saved: the inputs of the two norms with their
statistics, QKV, the attention's output and log-sum-exp, and the MLP's pre-activation.  With ``save="eight_bit"`` the
activation's derivative and the normalised rows of both norms are kept in 8 bits instead, with ``"recompute"`` nothing
of the MLP.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from epic_fast.engine.blocks import LayerParts, Weights
from epic_fast.engine.products import (
    EightBitRows,
    Rows,
    activated_product,
    activated_product_backward,
    product,
    product_backward,
)
from epic_fast.engine.rows import RowSelection, row_attention_backward, row_attention_forward
from epic_fast.ops.packed_attention import packed_attention_backward, packed_attention_forward
from epic_fast.ops.residual_norm import (
    residual_norm_backward,
    residual_norm_forward,
    residual_norm_forward_kept,
)

KEEP = {"full": "full", "eight_bit": "eight_bit", "recompute": "none"}


@dataclass(frozen=True)
class Geometry:
    """What the rows of a buffer ``(B, P + N, D)`` are.

    Attributes:
        prompts: P.
        lengths: ``(B,)`` valid tokens of each sample; None where all are.
        prompt_mask: ``"full"`` or ``"prefix"``.
        causal: whether tokens see no later tokens.
        rows: the rows that are read of the result; None: all.
    """

    prompts: int = 0
    lengths: Tensor | None = None
    prompt_mask: str = "full"
    causal: bool = False
    rows: RowSelection | None = None


class FrozenBlock:
    """One layer, computed from its own weights.

    Args:
        layer: a layer of which :func:`epic_fast.engine.blocks.why_not` says None; or what was read of it before.
        eight_bit: ``"fp8"`` or ``"int8"``: the weights of its products, and what goes into them, are in 8 bits.
    """

    def __init__(self, layer: nn.Module | LayerParts, eight_bit: str | None = None):
        self.parts = layer if isinstance(layer, LayerParts) else LayerParts(layer)
        self.eight_bit = eight_bit

    def weights(self, dtype: torch.dtype | None, *, backward: bool = False) -> Weights:
        """The weights that this block multiplies with, for results in ``dtype``."""
        return self.parts.weights(dtype, self.eight_bit, backward=backward)

    def made(self) -> list[Any]:
        """What it has made of its weights."""
        return [dict(self.parts._cache)]

    def __call__(
        self,
        hidden: Tensor,
        geometry: Geometry,
        *,
        prompts: Tensor | None = None,
        save: str = "full",
        owned: bool = False,
        waiting: int = 0,
    ) -> Tensor:
        """The layer on one buffer.

        Args:
            hidden: ``(B, P + N, D)``, or with ``prompts`` the tokens ``(B, N, D)``.
            prompts: ``(B, P, D)`` that join the tokens here; P is ``geometry.prompts``.
            save: what is kept for backward: ``"full"``, ``"eight_bit"`` or ``"recompute"``.
            owned: nobody reads ``hidden`` later: it may be overwritten.
            waiting: so many rows of ``hidden``, before those that ``geometry`` speaks of, pass by the layer as they
                are; where a graph is made of a pre-norm layer that computes all rows.

        Returns:
            ``(B, P + N, D)`` with what waited before them, or ``(B, R, D)`` where ``geometry.rows`` selects R rows.
        """
        if torch.is_grad_enabled() and (hidden.requires_grad or (prompts is not None and prompts.requires_grad)):
            if prompts is not None and hidden.requires_grad:
                hidden, prompts, owned = torch.cat([prompts.to(hidden.dtype), hidden], dim=1), None, True
            return _Block.apply(hidden, prompts, self, geometry, save, owned, waiting)  # pyright: ignore[reportReturnType]
        if prompts is None:
            return run_blocks([self], hidden, geometry, owned=owned)
        return run_blocks([self], pack(hidden, prompts), geometry, owned=True)


def pack(tokens: Tensor, prompts: Tensor) -> Tensor:
    """``[prompts ; tokens]`` in one new buffer."""
    batch, count, width = tokens.shape
    length = prompts.shape[1]
    buffer = tokens.new_empty(batch, length + count, width)
    buffer[:, :length] = prompts
    buffer[:, length:] = tokens
    return buffer


def run_blocks(
    blocks: Sequence[FrozenBlock], hidden: Tensor, geometry: Geometry, *, save: str = "full", owned: bool = False
) -> Tensor:
    """Consecutive layers on the same rows; ``geometry.rows`` is about the last of them.

    Without a graph nothing is saved, the residual stream stays in one buffer, and the first norm of each layer is
    fused with the last sum of the one before.

    Args:
        hidden: ``(B, S, D)``; may be overwritten if ``owned``.
    """
    if not blocks:
        return hidden
    whole = replace(geometry, rows=None)
    if torch.is_grad_enabled() and hidden.requires_grad:
        for block in blocks[:-1]:
            hidden, owned = block(hidden, whole, save=save, owned=owned), True
        return blocks[-1](hidden, geometry, save=save, owned=owned)
    with torch.no_grad(), no_autocast(hidden) as dtype:
        hidden = hidden.contiguous()
        normed = None
        for index, block in enumerate(blocks):
            following = blocks[index + 1] if index + 1 < len(blocks) else None
            last = geometry if following is None else whole
            weights = block.weights(dtype)
            if block.parts.post_norm:
                hidden = _post_norm_step(block.parts, weights, hidden, last, owned)
            else:
                next_weights = None
                if following is not None and not following.parts.post_norm:
                    next_weights = following.weights(dtype)
                hidden, normed = _pre_norm_step(block.parts, weights, hidden, normed, last, next_weights, owned)
            owned = True
    return hidden


def _pre_norm_step(
    parts: LayerParts,
    weights: Weights,
    stream: Tensor,
    normed: Rows | None,
    geometry: Geometry,
    following: Weights | None,
    owned: bool,
) -> tuple[Tensor, Rows | None]:
    if normed is None:
        normed = _norm(stream, None, weights.first_norm, weights)[1]
    attended, _ = _attend(parts, weights, normed, geometry, save=False)
    del normed
    branch = product(attended, weights.output, weights.output_bias)[0]
    if geometry.rows is not None:
        stream, owned = geometry.rows.take(stream, geometry.prompts), True
    stream, normed = _norm(stream, branch, weights.second_norm, weights, in_place=owned)
    del branch
    hidden = activated_product(normed, weights.up, weights.up_bias, activation_of(parts), "none")[0]
    del normed
    branch = product(hidden, weights.down, weights.down_bias)[0]
    del hidden
    if following is None:
        return stream.add_(branch), None
    return _norm(stream, branch, following.first_norm, following, in_place=True)


def _post_norm_step(parts: LayerParts, weights: Weights, stream: Tensor, geometry: Geometry, owned: bool) -> Tensor:
    dtype = weights.dtype
    attended, _ = _attend(parts, weights, stream.to(dtype), geometry, save=False)
    branch = product(attended, weights.output, weights.output_bias)[0]
    if geometry.rows is not None:
        stream, owned = geometry.rows.take(stream, geometry.prompts), True
    stream = residual_norm_forward(
        stream, branch, *weights.first_norm, normed_dtype=stream.dtype, in_place=owned
    )[1]  # fmt: skip
    del branch
    hidden = activated_product(stream.to(dtype), weights.up, weights.up_bias, activation_of(parts), "none")[0]
    branch = product(hidden, weights.down, weights.down_bias)[0]
    del hidden
    return residual_norm_forward(stream, branch, *weights.second_norm, normed_dtype=stream.dtype, in_place=True)[1]


def _norm(
    stream: Tensor,
    branch: Tensor | None,
    norm: tuple[Tensor, Tensor, float],
    weights: Weights,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Rows]:
    """``stream + branch``, and its norm as the products with ``weights`` read it."""
    return kept_norm(stream, branch, norm, weights, False, in_place=in_place)[:2]


def activation_of(parts: LayerParts) -> str:
    assert parts.activation is not None
    return parts.activation


def _mlp_gradient(
    parts: LayerParts, weights: Weights, grad: Tensor, kept: Tensor | None, keep: str, normed: Rows | None
) -> Tensor:
    """The gradient of the MLP's input; ``normed`` is that input, where nothing was kept."""
    if kept is None:
        assert normed is not None
        kept, keep = product(normed, weights.up, weights.up_bias)[0].flatten(0, -2), "full"
    assert parts.activation is not None
    rows = activated_product_backward(grad, weights.down, kept=kept, keep=keep, activation=parts.activation)
    return product_backward(rows, weights.up)


def mlp_backward(parts: LayerParts, weights: Weights, grad: Tensor, second: Sequence[Any], keep: str) -> Tensor:
    """The gradient of the sum that the second half of a pre-norm layer starts from."""
    total, mean, rstd, _ = second
    branch = mlp_branch_backward(parts, weights, grad, second, keep)
    return residual_norm_backward(branch, grad, total, weights.second_norm[0], mean, rstd, grad_dtype=grad.dtype)


def mlp_branch_backward(parts: LayerParts, weights: Weights, grad: Tensor, second: Sequence[Any], keep: str) -> Tensor:
    """The gradient of that sum's norm."""
    total, _, _, kept = second
    normed = _norm(total, None, weights.second_norm, weights)[1] if kept is None else None
    return _mlp_gradient(parts, weights, grad.to(weights.dtype), kept, keep, normed)


# -- attention: of all rows, or of those that are read ----------------------------------------------------------------


def _attend(
    parts: LayerParts, weights: Weights, normed: Rows, geometry: Geometry, *, save: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Attention of the rows that are read ``(B, R, inner)``, and what its backward needs."""
    batch, rows, _ = normed.shape
    heads = parts.heads
    inner = weights.inner
    head_dim = inner // heads
    if geometry.rows is None:
        qkv = product(normed, weights.qkv, weights.qkv_bias)[0].view(batch, rows, 3, heads, head_dim)
        output, lse = packed_attention_forward(qkv, **_options(parts, geometry), save_lse=save)
        return output.view(batch, rows, inner), (qkv, output, lse) if save and lse is not None else ()
    key_value = product(normed, *weights.key_value())[0]
    query = product(_take(normed, geometry.rows, geometry.prompts), *weights.query())[0]
    output, probabilities = row_attention_forward(
        query, key_value.view(batch, rows, 2, inner), heads, parts.scale, _visible(geometry, rows, query.device)
    )
    return output, (query, key_value, probabilities) if save else ()


def _attend_backward(
    parts: LayerParts,
    weights: Weights,
    grad: Tensor,
    saved: tuple[Tensor, ...],
    geometry: Geometry,
    prompt_rows_only: bool,
) -> Tensor:
    """The gradient of the rows that attention read, ``(B, S, D)`` or ``(B, P, D)``."""
    inner = weights.inner
    if geometry.rows is None:
        qkv, output, lse = saved
        found = packed_attention_backward(
            grad.view(output.shape), qkv, output, lse, **_options(parts, geometry), prompt_rows_only=prompt_rows_only
        )
        return product_backward(found.flatten(2), weights.qkv)
    query, key_value, probabilities = saved
    batch, rows, _ = key_value.shape
    grad_query, grad_key_value = row_attention_backward(
        grad, query, key_value.view(batch, rows, 2, inner), probabilities, parts.heads, parts.scale
    )
    grad_key_value = grad_key_value.flatten(2)
    if prompt_rows_only:
        grad_key_value = grad_key_value[:, : geometry.prompts].contiguous()
    found = product_backward(grad_key_value, weights.key_value()[0])
    geometry.rows.add(found, product_backward(grad_query, weights.query()[0]), geometry.prompts)
    return found


def _take(rows: Rows, selection: RowSelection, prompts: int) -> Rows:
    if not isinstance(rows, EightBitRows):
        return selection.take(rows, prompts)
    data = selection.take(rows.data.view(torch.uint8), prompts).view(rows.data.dtype)
    scale = selection.take(rows.scale.view(*rows.shape[:-1], 1), prompts)
    return EightBitRows(data, scale.reshape(-1), rows.dtype)


def _options(parts: LayerParts, geometry: Geometry) -> dict[str, Any]:
    return {
        "prompts": geometry.prompts,
        "lengths": geometry.lengths,
        "prompt_mask": geometry.prompt_mask,
        "causal": geometry.causal,
        "scale": parts.scale,
    }


def _visible(geometry: Geometry, rows: int, device: torch.device) -> Tensor | None:
    assert geometry.rows is not None
    return geometry.rows.visible(
        rows, geometry.prompts, geometry.lengths, geometry.prompt_mask == "prefix", geometry.causal, device
    )


# -- the graph --------------------------------------------------------------------------------------------------------


class _Block(torch.autograd.Function):
    """A layer whose input needs a gradient; where prompts join tokens that need none, the prompts' rows alone do."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        prompts: Tensor | None,
        block: FrozenBlock,
        geometry: Geometry,
        save: str,
        owned: bool,
        waiting: int,
    ) -> Tensor:
        stream = hidden.contiguous() if prompts is None else pack(hidden, prompts)
        owned = owned or stream is not hidden
        parts = block.parts
        ctx.parts, ctx.geometry, ctx.keep = parts, geometry, KEEP[save]
        ctx.prompt_dtype = None if prompts is None else prompts.dtype
        ctx.waiting = waiting
        with no_autocast(stream) as dtype:
            ctx.weights = weights = block.weights(dtype, backward=True)
            options = (geometry, ctx.keep, prompts is not None, owned)
            if parts.post_norm:
                result, saved = _post_norm_forward(parts, weights, stream, *options)
            else:
                result, saved = _pre_norm_forward(parts, weights, stream, *options, waiting)
        ctx.save_for_backward(*saved)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        joined = ctx.prompt_dtype is not None
        waited, grad = grad[:, : ctx.waiting], grad[:, ctx.waiting :]
        with no_autocast(grad):
            backward = _post_norm_backward if ctx.parts.post_norm else _pre_norm_backward
            found = backward(
                ctx.parts, ctx.weights, grad.contiguous(), ctx.saved_tensors, ctx.geometry, ctx.keep, joined
            )
        if joined:
            return None, found.to(ctx.prompt_dtype), None, None, None, None, None
        if ctx.waiting:
            found = torch.cat([waited.contiguous(), found], dim=1)
        return found, None, None, None, None, None, None


def _pre_norm_forward(
    parts: LayerParts,
    weights: Weights,
    stream: Tensor,
    geometry: Geometry,
    keep: str,
    prompt_rows_only: bool,
    owned: bool,
    waiting: int,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    prompts = geometry.prompts
    eight_bit = keep == "eight_bit"
    waited, stream = stream[:, :waiting], stream[:, waiting:]
    # Of the rows of tokens that need no gradient the first norm's backward reads none.
    _, normed, *first = kept_norm(stream, None, weights.first_norm, weights, eight_bit and not prompt_rows_only)
    if prompt_rows_only:
        first = [stream[:, :prompts].clone(), *(_first_rows(each, stream, prompts) for each in first[1:])]
    attended, attention = _attend(parts, weights, normed, geometry, save=True)
    del normed
    branch = product(attended, weights.output, weights.output_bias)[0]
    del attended
    if geometry.rows is not None:
        stream, owned = geometry.rows.take(stream, prompts), True
    # Nobody else reads a buffer that is owned, nor saves it where its rows are kept in 8 bits.
    in_place = geometry.rows is not None or prompt_rows_only or (owned and eight_bit)
    total, normed, *second = kept_norm(
        stream, branch, weights.second_norm, weights, eight_bit, in_place=in_place
    )  # fmt: skip
    # What lives here lives at the peak of a step.
    del branch
    hidden, kept = activated_product(normed, weights.up, weights.up_bias, activation_of(parts), keep)
    del normed
    branch = product(hidden, weights.down, weights.down_bias)[0]
    del hidden
    saved = (*first, *second, kept, *attention)
    if not waiting:
        return total + branch, saved
    batch, rows, width = total.shape
    result = total.new_empty(batch, waiting + rows, width)
    torch.add(total, branch, out=result[:, waiting:])
    result[:, :waiting] = waited
    return result, saved


def _pre_norm_backward(
    parts: LayerParts,
    weights: Weights,
    grad: Tensor,
    saved: tuple[Tensor, ...],
    geometry: Geometry,
    keep: str,
    prompt_rows_only: bool,
) -> Tensor:
    stream, mean, rstd, total, second_mean, second_rstd, kept, *attention = saved
    dtype, stream_dtype, prompts = weights.dtype, grad.dtype, geometry.prompts
    grad = mlp_backward(parts, weights, grad, (total, second_mean, second_rstd, kept), keep)
    branch = product_backward(grad.to(dtype), weights.output)
    branch = _attend_backward(parts, weights, branch, tuple(attention), geometry, prompt_rows_only)
    if geometry.rows is None:
        above = grad[:, :prompts].contiguous() if prompt_rows_only else grad
        return residual_norm_backward(branch, above, stream, weights.first_norm[0], mean, rstd, grad_dtype=stream_dtype)
    found = residual_norm_backward(branch, None, stream, weights.first_norm[0], mean, rstd, grad_dtype=stream_dtype)
    return geometry.rows.add(found, grad, prompts)


def _post_norm_forward(
    parts: LayerParts,
    weights: Weights,
    stream: Tensor,
    geometry: Geometry,
    keep: str,
    prompt_rows_only: bool,
    owned: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    dtype, stream_dtype = weights.dtype, stream.dtype
    eight_bit = keep == "eight_bit"
    attended, attention = _attend(parts, weights, stream.to(dtype), geometry, save=True)
    branch = product(attended, weights.output, weights.output_bias)[0]
    del attended
    if geometry.rows is not None:
        stream, owned = geometry.rows.take(stream, geometry.prompts), True
    _, normed, *first = kept_norm(
        stream, branch, weights.first_norm, weights, eight_bit, normed_dtype=stream_dtype,
        in_place=prompt_rows_only or geometry.rows is not None or (owned and eight_bit),
    )  # fmt: skip
    del branch
    hidden, kept = activated_product(normed.to(dtype), weights.up, weights.up_bias, activation_of(parts), keep)
    branch = product(hidden, weights.down, weights.down_bias)[0]
    del hidden
    _, result, *second = kept_norm(
        normed, branch, weights.second_norm, weights, eight_bit, normed_dtype=stream_dtype,
        in_place=eight_bit or normed.dtype != dtype or kept is None,
    )  # fmt: skip
    return result, (*first, *second, kept, *attention)


def _post_norm_backward(
    parts: LayerParts,
    weights: Weights,
    grad: Tensor,
    saved: tuple[Tensor, ...],
    geometry: Geometry,
    keep: str,
    prompt_rows_only: bool,
) -> Tensor:
    total, mean, rstd, second_total, second_mean, second_rstd, kept, *attention = saved
    dtype, stream_dtype, prompts = weights.dtype, grad.dtype, geometry.prompts
    normed = None
    if kept is None:
        normed = residual_norm_forward(total, None, *weights.first_norm, normed_dtype=dtype)[1]
    grad = residual_norm_backward(
        grad, None, second_total, weights.second_norm[0], second_mean, second_rstd, grad_dtype=stream_dtype
    )
    branch = _mlp_gradient(parts, weights, grad.to(dtype), kept, keep, normed)
    grad = residual_norm_backward(
        grad + branch, None, total, weights.first_norm[0], mean, rstd, grad_dtype=stream_dtype
    )
    branch = product_backward(grad.to(dtype), weights.output)
    branch = _attend_backward(parts, weights, branch, tuple(attention), geometry, prompt_rows_only)
    if geometry.rows is not None:
        return geometry.rows.add(branch.to(grad.dtype), grad, prompts)
    return branch + (grad[:, :prompts] if prompt_rows_only else grad)


def kept_norm(
    stream: Tensor,
    branch: Tensor | None,
    norm: tuple[Tensor, Tensor, float],
    weights: Weights,
    rows_in_eight_bit: bool,
    *,
    normed_dtype: torch.dtype | None = None,
    in_place: bool = False,
) -> tuple[Any, ...]:
    """``stream + branch``, its norm, and the three tensors by which a backward pass knows it.

    Args:
        rows_in_eight_bit: these hold the normalised rows in 8 bits, not the sum.
        normed_dtype: of a norm that no product reads; None: as the products with ``weights`` read it.
    """
    eight_bit = weights.eight_bit if normed_dtype is None else None
    operation = residual_norm_forward_kept if rows_in_eight_bit else residual_norm_forward
    total, normed, *saved, scale = operation(
        stream, branch, *norm, normed_dtype=normed_dtype or weights.dtype, in_place=in_place, eight_bit=eight_bit
    )
    if scale is not None:
        normed = EightBitRows(normed, scale, weights.dtype)
    return total, normed, *(saved if rows_in_eight_bit else (total, *saved))


def _first_rows(statistics: Tensor, stream: Tensor, prompts: int) -> Tensor:
    """The statistics ``(B * P,)`` of the prompts' rows."""
    batch, rows, _ = stream.shape
    return statistics.view(batch, rows)[:, :prompts].reshape(-1).contiguous()


@contextlib.contextmanager
def no_autocast(like: Tensor) -> Any:
    """Autocast switched off, giving the type that it wants for products (None where it was off)."""
    kind = like.device.type
    if not torch.is_autocast_enabled(kind):
        yield None
        return
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        yield None if like.dtype == torch.float64 else dtype
