"""Fused frozen Swin blocks: a block and its prompts as one ``autograd.Function``.

As :mod:`epic_fast.engine.fused`, with x the tokens of a picture and p the prompts of its sample::

    a, a' = attention(QKV(windows(norm_1(x))), QKV(norm_1(p)))
    x' = x + back(O(a))        y = x' + W_2 act(W_1 norm_2(x'))
    p' = p + O(a')             q = p' + W_2 act(W_1 norm_2(p'))

Windows share their sample's prompts, which are projected once (``kernels/window_prompt_attention``).  All but the
attention does the same to each row, so x and p are rows of one matrix: a few hundred rows of prompts in a product of
their own would cost as much time as thousands.  Backward gives the gradients of x and p alone, and of x only where it
needs one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from epic_fast.engine.blocks import LayerParts, Weights
from epic_fast.engine.fused import KEEP, activation_of, mlp_branch_backward, no_autocast
from epic_fast.engine.packed import relative_error
from epic_fast.engine.patches import FrozenMerge
from epic_fast.engine.products import activated_product, product, product_backward
from epic_fast.engine.routes import PromptRoute
from epic_fast.engine.windows import WindowRows, Windows, call_swin_block_with_prompts, halved
from epic_fast.ops.residual_norm import moved_norm_backward, moved_norm_forward
from epic_fast.ops.route_prompts import probe_through
from epic_fast.ops.window_prompt_attention import window_attention_backward, window_attention_forward

# Batches of other sizes, and of other pictures, that a block remembers.
MOST_READ = 16


@dataclass(frozen=True)
class _Sizes:
    batch: int
    prompts: int

    @classmethod
    def of(cls, hidden: Tensor, prompts: Tensor) -> _Sizes:
        return cls(len(hidden), prompts.shape[1])


class FrozenWindowBlock:
    """One block of a Swin, computed from its own weights.

    Args:
        layer: a block of which :func:`epic_fast.engine.blocks.why_not` says None.
    """

    def __init__(self, layer: nn.Module):
        self.parts = LayerParts(layer)
        self.position: Any = self.parts.parts["position"]
        self._bias: tuple[Any, Tensor] | None = None
        # What the last calls read besides weights: a graph made of one reads it again.
        self._read: dict[Any, tuple[WindowRows, Tensor | None]] = {}

    def bias(self) -> Tensor:
        """The bias of relative positions ``(H, M, M)``, made anew when its table changed."""
        table = self.position.relative_position_bias_table
        key = table.data_ptr(), table._version, table.dtype, table.device
        if self._bias is None or self._bias[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._bias = key, self.position()[0].contiguous()
        return self._bias[1]

    def order(self, windows: Windows, sizes: _Sizes, device: torch.device) -> tuple[WindowRows, Tensor | None]:
        """Where the rows of windows lie, and who sees whom in them."""
        found = windows.rows(sizes.batch, sizes.prompts, device), windows.mask(device)
        if not torch.compiler.is_compiling():
            key = windows, sizes, device
            self._read.pop(key, None)
            while len(self._read) >= MOST_READ:
                del self._read[next(iter(self._read))]
            self._read[key] = found
        return found

    def made(self) -> list[Any]:
        """What it has made of its weights, and read besides, for a captured graph to hold."""
        return [dict(self.parts._cache), self._bias, dict(self._read)]

    def __call__(
        self, hidden: Tensor, prompts: Tensor, windows: Windows, *, save: str = "full"
    ) -> tuple[Tensor, Tensor]:
        """Tokens ``(B, N, C)`` and prompts ``(B, P, C)`` behind the block.

        Args:
            save: what is kept for backward: ``"full"``, ``"eight_bit"`` or ``"recompute"``.
        """
        if torch.is_grad_enabled() and (hidden.requires_grad or prompts.requires_grad):
            return _WindowBlock.apply(hidden, prompts, self, windows, save)  # pyright: ignore[reportReturnType]
        stream = WindowStream.of(hidden, prompts)
        stream.step(self, windows)
        return stream.parted()


def joined(hidden: Tensor, prompts: Tensor) -> Tensor:
    """All rows ``(B * (N + P), C)``, tokens before prompts; the tokens themselves where there are no prompts."""
    rows = hidden.flatten(0, 1)
    return torch.cat([rows, prompts.flatten(0, 1)]) if prompts.numel() else rows.contiguous()


def parted(rows: Tensor, hidden: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`joined`: views in the shapes of these tokens and prompts."""
    tokens = hidden.shape[0] * hidden.shape[1]
    return rows[:tokens].view(hidden.shape), rows[tokens:].view(prompts.shape)


def _attend(
    block: FrozenWindowBlock,
    weights: Weights,
    normed: Tensor,
    windows: Windows,
    sizes: _Sizes,
    order: WindowRows,
    mask: Tensor | None,
    *,
    graph: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the attention adds to the stream, in the order of windows, from the normed rows in that order; the
    projections and the log-sum-exp."""
    parts = block.parts
    qkv = product(normed, weights.qkv, weights.qkv_bias)[0]
    attended = qkv.new_empty(len(normed), weights.inner)
    *_, lse = window_attention_forward(
        *_qkv_of(qkv, parts.heads, windows, sizes, order.cut_tokens),
        *(block.bias(), mask, parts.scale),
        save_lse=graph,
        out=_split(attended, windows, sizes, order.cut_tokens),
    )
    return product(attended, weights.output, weights.output_bias)[0], qkv, lse


def _forward(
    block: FrozenWindowBlock, stream: Tensor, windows: Windows, sizes: _Sizes, keep: str
) -> tuple[Tensor, Weights, tuple[Tensor | None, ...]]:
    """All rows ``(B * (N + P), C)`` behind the block, the weights, and what backward wants: three tensors for the
    first norm, four for the rest, the projections, and the log-sum-exp."""
    parts = block.parts
    with no_autocast(stream) as dtype:
        weights = parts.weights(dtype, backward=True)
        order, mask = block.order(windows, sizes, stream.device)
        options: dict[str, Any] = {"normed_dtype": weights.dtype, "keep": keep == "eight_bit"}
        _, normed, *first, _ = moved_norm_forward(stream, None, *weights.first_norm, normed_at=order.move, **options)
        normed = normed if order.move is not None else order.cut(normed)
        branch, qkv, lse = _attend(block, weights, normed, windows, sizes, order, mask, graph=True)
        del normed
        total, normed, *second, _ = moved_norm_forward(
            stream, branch, *weights.second_norm, branch_at=order.place, **options
        )  # fmt: skip
        del branch
        hidden, kept = activated_product(normed, weights.up, weights.up_bias, activation_of(parts), keep)
        del normed
        result = total + product(hidden, weights.down, weights.down_bias)[0]
    return result, weights, (*first, *second, kept, qkv, lse)


@dataclass(frozen=True)
class _Ended:
    """Prompts whose last product is not done: what it reads ``(B * P, K)``, its weight and bias, and what tells the
    router of the next block their products without it."""

    hidden: Tensor
    weight: Any
    bias: Tensor | None
    through: Tensor

    @property
    def products(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """As ``moved_norm_forward`` takes them."""
        return self.hidden, self.through, self.bias

    def branch(self) -> Tensor:
        """The product."""
        return product(self.hidden, self.weight, self.bias)[0]


class WindowStream:
    """All rows of a stage where no graph is made, in one matrix from block to block.

    Args:
        rows: ``(B * (N + P), C)``, tokens before prompts; P may be 0.
        tokens, prompts: ``(B, N, C)`` and ``(B, P, C)``, which of them there are.

    What a block adds last waits for the next one, whose first norm adds it; and the prompts of a routed layer are
    written where the last ones lie, once their sum has told the router what it asks.  Of prompts that such a layer
    replaces nothing else is read: the last product before it is not done for them.
    """

    def __init__(self, rows: Tensor, tokens: tuple[int, ...], prompts: tuple[int, ...]):
        self._shapes = tokens, prompts
        self._sizes = _Sizes(prompts[0], prompts[1])
        self._rows = rows
        self._branch: Tensor | None = None
        self._ended: _Ended | None = None

    @classmethod
    def of(cls, hidden: Tensor, prompts: Tensor) -> WindowStream:
        """The stream of these tokens ``(B, N, C)`` and prompts ``(B, P, C)``."""
        return cls(joined(hidden, prompts.to(hidden.dtype)), tuple(hidden.shape), tuple(prompts.shape))

    @torch.no_grad()
    def step(
        self,
        block: FrozenWindowBlock,
        windows: Windows,
        route: PromptRoute | None = None,
        through: Tensor | None = None,
    ) -> Tensor | None:
        """The block on all rows.

        Args:
            block, windows: the block and its windows.
            route: of prompts that take the place of those that are there.
            through: of :func:`before_routes`, where the next block has a route: the prompts end here.

        Returns:
            The routing scores ``(B, E)``, None without a router.
        """
        scores = None
        # What stands in its place holds no rows meanwhile.
        with no_autocast(self._rows.new_empty(0)) as dtype:
            weights = block.parts.weights(dtype, backward=False)
            order, mask = block.order(windows, self._sizes, self._rows.device)
            stream, normed, _, _, _, probed = moved_norm_forward(
                *(self._rows, self._branch, *weights.first_norm),
                normed_at=order.move,
                probe=None if route is None else route.probe,
                ended=None if self._ended is None else self._ended.products,
                normed_dtype=weights.dtype,
            )
            # From here on nobody reads the sum's two terms: the attention and the MLP find their memory free.
            self._rows, self._branch, self._ended = stream, None, None
            normed = normed if order.move is not None else order.cut(normed)
            if route is not None:
                scores = self._route(stream, normed, order, weights, probed, route)
            branch = _attend(block, weights, normed, windows, self._sizes, order, mask, graph=False)[0]
            del normed
            self._rows, normed = moved_norm_forward(
                stream, branch, *weights.second_norm, branch_at=order.place, normed_dtype=weights.dtype
            )[:2]
            del branch, stream
            hidden = activated_product(normed, weights.up, weights.up_bias, activation_of(block.parts), "none")[0]
            del normed
            if through is not None:
                assert isinstance(hidden, Tensor)
                hidden, last = hidden[: order.tokens], hidden[order.tokens :]
                self._ended = _Ended(last, weights.down, weights.down_bias, through)
            self._branch = product(hidden, weights.down, weights.down_bias)[0]
        return scores

    @torch.no_grad()
    def merged(self, merge: FrozenMerge, grid: tuple[int, int]) -> WindowStream:
        """The next stage's stream; ``grid``: what the tokens fill now."""
        assert self._ended is None
        (batch, _, width), (_, prompts, _) = self._shapes
        rows = merge(self._rows, self._branch, batch, grid)
        down, across = halved(grid)
        return WindowStream(rows, (batch, down * across, 2 * width), (batch, prompts, 2 * width))

    def parted(self) -> tuple[Tensor, Tensor]:
        """Tokens and prompts."""
        with torch.no_grad():
            branch = self._branch
            if branch is not None and self._ended is not None:
                branch = torch.cat([branch, self._ended.branch()])
            rows = self._rows if branch is None else self._rows + branch
        hidden, prompts = self._shapes
        tokens = hidden[0] * hidden[1]
        return rows[:tokens].view(hidden), rows[tokens:].view(prompts)

    def _route(
        self,
        stream: Tensor,
        normed: Tensor,
        order: WindowRows,
        weights: Weights,
        probed: Tensor | None,
        route: PromptRoute,
    ) -> Tensor | None:
        hidden, prompts = self._shapes
        of_tokens = of_prompts = None
        if probed is not None:
            of_tokens = probed[: order.tokens].view(*hidden[:2], -1)
            of_prompts = probed[order.tokens :].view(*prompts[:2], -1)
        return route.write(
            stream[order.tokens :].view(prompts),
            normed[order.cut_tokens :].view(prompts),
            weights.first_norm,
            of_tokens,
            of_prompts,
        )


@torch.no_grad()
def before_routes(
    blocks: Sequence[FrozenWindowBlock], routes: Mapping[int, PromptRoute], like: Tensor
) -> dict[int, Tensor]:
    """What tells routers the products of prompts that their block's last product is not done for.

    Args:
        blocks: of one stage, or of all.
        routes: of blocks by their place, each but those that are first in their stage.
        like: the tokens that come in.

    Returns:
        The place of each block before a route with a probe, and ``(J, K)`` in float32 (float64 where tokens are).
    """
    found: dict[int, Tensor] = {}
    wide = torch.promote_types(like.dtype, torch.float32)
    with no_autocast(like) as dtype:
        alike: dict[Any, list[tuple[int, Tensor, Tensor]]] = {}
        for index, route in routes.items():
            if route.probe is not None:
                weight = blocks[index - 1].parts.weights(dtype, backward=False).down
                alike.setdefault((route.probe.shape, weight.shape), []).append((index - 1, route.probe, weight))
        for few in alike.values():
            places, probes, weights = zip(*few, strict=True)
            found |= zip(places, probe_through(probes, weights).to(wide).unbind(), strict=True)
    return found


class _WindowBlock(torch.autograd.Function):
    """Saves what the norms and the MLP want of all rows, then the projections."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, prompts: Tensor, block: FrozenWindowBlock, windows: Windows, save: str
    ) -> tuple[Tensor, Tensor]:
        ctx.block, ctx.windows, ctx.keep, ctx.sizes = block, windows, KEEP[save], _Sizes.of(hidden, prompts)
        result, ctx.weights, saved = _forward(block, joined(hidden, prompts), windows, ctx.sizes, ctx.keep)
        ctx.save_for_backward(*saved)
        # Whoever writes into one of them does not write into the other, and autograd need not think so.
        results = parted(result, hidden, prompts)
        return tuple([_of_its_own(each) for each in results])  # pyright: ignore[reportReturnType]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        block, windows, weights, sizes, keep = ctx.block, ctx.windows, ctx.weights, ctx.sizes, ctx.keep
        parts = block.parts
        first, second, qkv, lse = ctx.saved_tensors[:3], ctx.saved_tensors[3:7], *ctx.saved_tensors[7:]
        needs_tokens = ctx.needs_input_grad[0]
        with no_autocast(grads[0]):
            above = joined(*grads)
            order, mask = block.order(windows, sizes, above.device)
            branch = mlp_branch_backward(parts, weights, above, second, keep)
            total, mean, rstd, _ = second
            stream, moved = moved_norm_backward(
                *(branch, above, total, weights.second_norm[0], mean, rstd),
                moved_at=order.move,
                moved_dtype=weights.dtype,
                grad_dtype=above.dtype,
            )
            moved = order.cut(stream.to(weights.dtype)) if moved is None else moved
            attended = product_backward(moved, weights.output)
            del branch, above, moved
            projected = torch.empty_like(qkv) if needs_tokens else None
            _, of_prompts = window_attention_backward(
                *_split(attended, windows, sizes, order.cut_tokens),
                *_qkv_of(qkv, parts.heads, windows, sizes, order.cut_tokens),
                *(block.bias(), mask, parts.scale),
                lse,
                tokens=needs_tokens,
                out=None if projected is None else _split(projected, windows, sizes, order.cut_tokens),
            )
            del attended
            if projected is not None:
                branch, read, at = product_backward(projected, weights.qkv), slice(None), order.place
            else:
                branch = product_backward(of_prompts.flatten(0, 1), weights.qkv)
                read, at = slice(order.tokens, None), None
            total, mean, rstd = (each[read] for each in first)
            result, _ = moved_norm_backward(
                *(branch, stream[read], total, weights.first_norm[0], mean, rstd),
                normed_at=at,
                grad_dtype=stream.dtype,
            )
        if needs_tokens:
            of_tokens, of_prompts = parted(result, *grads)
            # A leaf's gradient is kept: not with that of all tokens behind it.
            return of_tokens, of_prompts.clone(), None, None, None
        return None, result.view(grads[1].shape), None, None, None


def _qkv_of(
    qkv: Tensor, heads: int, windows: Windows, sizes: _Sizes, cut_tokens: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Projections of all rows as those of windows ``(B * nW, M, 3, H, head_dim)`` and prompts ``(B, P, 3, ...)``."""
    of_windows, of_prompts = _split(qkv, windows, sizes, cut_tokens)
    return _heads(of_windows, heads), _heads(of_prompts, heads)


def _split(rows: Tensor, windows: Windows, sizes: _Sizes, cut_tokens: int) -> tuple[Tensor, Tensor]:
    """Cut rows ``(R, D)`` as those of windows ``(B * nW, M, D)`` and of prompts ``(B, P, D)``."""
    width = rows.shape[1]
    return (
        rows[:cut_tokens].view(-1, windows.window**2, width),
        rows[cut_tokens:].view(sizes.batch, sizes.prompts, width),
    )


def _of_its_own(view: Tensor) -> Tensor:
    """The same memory, no view of anything."""
    return view.new_empty(0).set_(view.untyped_storage(), view.storage_offset(), view.shape, view.stride())


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
    return relative_error(added, wanted_sum)
