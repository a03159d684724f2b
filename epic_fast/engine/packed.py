"""A tower's way through its fused layers: prompts and tokens in one buffer from one layer to the next.

The prompts of both towers are exchanged where they lie: the next ones are written into the slots that the last ones
came out of, and their gradients into the slots of the buffers that the tokens' gradients come in.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from epic_fast.engine.blocks import why_not
from epic_fast.engine.fused import FrozenBlock, Geometry, run_blocks
from epic_fast.engine.plain import call_layer
from epic_fast.engine.rows import RowSelection
from epic_fast.engine.state import TowerState
from epic_fast.hooks import all_hooked
from epic_fast.ops import prompt_interaction as interaction
from epic_fast.ops.prompt_interaction import BACKWARD as INTERACTION_BACKWARD

logger = logging.getLogger("epic_fast")

# What a layer adds to its rows may differ by so much from what its block adds: products in TF32 or bfloat16 do.
SAME = 0.05
ALL_HOOKED = "there are hooks on all modules, which a fused block would not call"


class FrozenTower:
    """The fused blocks of a tower, where each of its layers has one.

    Args:
        layers: in order.
        name: of the tower, for messages.
        make: the block of a layer.
        compare: how far a block is from its layer, relative; :func:`differs` if not given.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        name: str,
        *,
        make: Callable[..., Any] = FrozenBlock,
        compare: Callable[[Any, Any], float] | None = None,
    ):
        self._layers = list(layers)
        self._name = name
        self._make = make
        self._compare = compare
        self._blocks: list[Any] | None = None
        self._eight_bit: dict[str, list[Any]] = {}
        self._error = 0.0

    def blocks(self, eight_bit: str | None = None, exact: int = 0) -> list[Any] | None:
        """The blocks, read anew where a layer was changed; None, saying why once, where a layer cannot have one.

        Args:
            eight_bit: ``"fp8"`` or ``"int8"``: blocks that multiply in 8 bits.
            exact: so many first ones that do not.
        """
        if all_hooked():
            say_plain(self._name, ALL_HOOKED)
            return None
        if self._blocks is None or not all(block.parts.unchanged() for block in self._blocks):
            self._blocks, self._eight_bit = None, {}
            for layer in self._layers:
                reason = why_not(layer)
                if reason is not None:
                    say_plain(self._name, reason)
                    return None
            self._blocks = [self._make(layer) for layer in self._layers]
            compare = self._compare or differs
            self._error = compare(self._layers[0], self._blocks[0]) if self._blocks else 0.0
        # What is not a number is no small one.
        if not self._error <= SAME:
            name = type(self._layers[0]).__name__
            say_plain(self._name, f"this release's {name} differs from its fused block by {self._error:.1e}")
            return None
        if eight_bit is None:
            return self._blocks
        if eight_bit not in self._eight_bit:
            self._eight_bit[eight_bit] = [self._make(block.parts, eight_bit) for block in self._blocks]
        return [*self._blocks[:exact], *self._eight_bit[eight_bit][exact:]]

    def made(self) -> list[Any]:
        """What the blocks have made of their weights; a captured graph knows only where it lies, and has to hold it."""
        return [each for block in self._blocks or () for each in block.made()]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """How far apart two tensors are, against the size of ``wanted``; infinite where that is no number."""
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    return error if math.isfinite(error) else math.inf


@torch.no_grad()
def differs(layer: nn.Module, block: FrozenBlock) -> float:
    """How far apart a layer and its block are on a few rows, relative: what the names of modules cannot tell."""
    weight = block.parts.parts["query"].weight
    rows = torch.arange(4 * weight.shape[1], device=weight.device).view(1, 4, -1).sin().to(weight.dtype)
    with torch.autocast(weight.device.type, enabled=False):
        wanted = call_layer(layer, rows, None).double() - rows
        found = block(rows, Geometry()).double() - rows
    return relative_error(found, wanted)


@functools.cache
def say_plain(name: str, reason: str) -> None:
    """Log, once, why a tower runs its own modules."""
    logger.info("engine: the %s tower runs the backbone's own layers: %s", name, reason)


class PackedRun:
    """Tokens and prompts of one tower between the layers; prompts wait where layers run on the tokens alone.

    Args:
        blocks: of all layers.
        state: the tokens below the first layer that prompts join.
        prompts: ``(B, P, D)``, P at least 1.
        prompt_mask: ``"full"`` or ``"prefix"``.
        causal: of the tower.
        save: see :class:`~epic_fast.engine.EngineConfig`.
        rows: what is read after the last layer; None: all.
    """

    def __init__(
        self,
        blocks: Sequence[FrozenBlock],
        state: TowerState,
        prompts: Tensor,
        *,
        prompt_mask: str,
        causal: bool,
        save: str,
        rows: RowSelection | None,
    ):
        self._blocks = blocks
        self._state = state
        self._layer = state.layer
        self._save = save
        self._rows = rows
        self._alone = Geometry(0, state.lengths, "full", causal)
        self._together = Geometry(prompts.shape[1], state.lengths, prompt_mask, causal)
        # Either one buffer with the prompts in its first rows, or the two apart.
        self._buffer: Tensor | None = None
        self._tokens = state.hidden
        self._prompts: Tensor | None = prompts

    @property
    def prompts(self) -> Tensor:
        """``(B, P, D)``; where they lie in the buffer, a view of it."""
        if self._buffer is not None:
            return self._buffer[:, : self._together.prompts]
        assert self._prompts is not None
        return self._prompts

    @prompts.setter
    def prompts(self, value: Tensor) -> None:
        if self._buffer is not None:
            self._tokens, self._buffer = self._buffer[:, self._together.prompts :], None
        self._prompts = value

    @property
    def buffer(self) -> Tensor | None:
        """``(B, P + N, D)`` where prompts and tokens lie together."""
        return self._buffer

    @buffer.setter
    def buffer(self, value: Tensor) -> None:
        self._buffer = value

    def step(self, index: int) -> None:
        """The tokens alone up to layer ``index``, then that layer on ``[prompts ; tokens]``."""
        if self._layer < index and not self._pass_by(index):
            self._part()
            self._run_alone(index)
        block, geometry = self._blocks[index], self._geometry(self._together, index + 1)
        if self._buffer is not None:
            found = block(self._buffer, geometry, save=self._save, owned=True)
        else:
            found = block(self._tokens, geometry, prompts=self._prompts, save=self._save)
        self._layer = index + 1
        self._buffer, self._prompts = found, None
        if geometry.rows is not None:
            first = geometry.prompts if geometry.rows.prompts else 0
            self._tokens, self._prompts, self._buffer = found[:, first:], found[:, :first], None
            self._read_rows()

    def finish(self) -> TowerState:
        """The tokens after the layers that are left."""
        if self._layer < len(self._blocks):
            self._part()
            self._run_alone(len(self._blocks))
        elif self._buffer is not None:
            self.prompts = self.prompts
        return self._state.after(self._tokens, self._layer)

    def _pass_by(self, index: int) -> bool:
        """One layer up to ``index`` on the tokens while the prompts stay in the buffer, where that saves copies."""
        block = self._blocks[self._layer]
        # Of several layers each would copy gradients; a view in the graph would have its own made whole with zeros.
        graph = self._buffer is not None and torch.is_grad_enabled() and self._buffer.requires_grad
        if not graph or index - self._layer != 1 or block.parts.post_norm:
            return False
        assert self._buffer is not None
        self._buffer = block(self._buffer, self._alone, save=self._save, owned=True, waiting=self._together.prompts)
        self._layer = index
        return True

    def _part(self) -> None:
        """Tokens and prompts apart; in a graph in memory of their own."""
        if self._buffer is None:
            return
        if torch.is_grad_enabled() and self._buffer.requires_grad:
            self._tokens, self._prompts = _Part.apply(self._buffer, self._together.prompts)  # pyright: ignore
            self._buffer = None
        else:
            self.prompts = self.prompts

    def _run_alone(self, stop: int) -> None:
        geometry = self._geometry(self._alone, stop)
        if geometry.rows is not None:
            # The prompts wait beside the tokens: they are read from where they are.
            geometry = replace(geometry, rows=replace(geometry.rows, prompts=False))
        # A view shares its version with prompts that something above may have saved.
        owned = self._tokens is not self._state.hidden and not self._tokens._is_view()
        self._tokens = run_blocks(
            self._blocks[self._layer : stop], self._tokens, geometry, save=self._save, owned=owned
        )
        self._layer = stop
        if geometry.rows is not None:
            self._read_rows()

    def _geometry(self, geometry: Geometry, stop: int) -> Geometry:
        return replace(geometry, rows=self._rows) if self._rows is not None and stop == len(self._blocks) else geometry

    def _read_rows(self) -> None:
        self._state = self._state.one_row(self._tokens)


def exchange(text: PackedRun, vision: PackedRun, parameters: Sequence[Tensor], eps: float = 1e-8) -> bool:
    """The prompts of both towers to those of their next layers, where they lie.

    Args:
        text, vision: runs after a layer with prompts.
        parameters: of :func:`epic_fast.functional.prompt_interaction`, weights to temperature.

    Returns:
        False, with nothing done, where a tower's prompts do not lie in a buffer.
    """
    if text.buffer is None or vision.buffer is None:
        return False
    count = text.prompts.shape[1]
    kind = text.buffer.device.type
    prompts = text.prompts.detach(), vision.prompts.detach()
    kernel = interaction.choose("auto", *prompts, *parameters) is not interaction.reference
    if kernel and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        parameters = [*(each.to(dtype) for each in parameters[:4]), *parameters[4:]]
    text.buffer, vision.buffer = _Exchange.apply(text.buffer, vision.buffer, count, eps, kernel, *parameters)  # pyright: ignore
    return True


class _Part(torch.autograd.Function):
    """A buffer's tokens and prompts; their gradients are put together in one pass."""

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return tuple(
            each.clone(memory_format=torch.contiguous_format) for each in (buffer[:, count:], buffer[:, :count])
        )  # pyright: ignore[reportReturnType]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, tokens: Tensor, prompts: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.cat([prompts, tokens], dim=1), None


class _Exchange(torch.autograd.Function):
    """Owns the slots of both buffers; saves the prompts that it found there."""

    @staticmethod
    def forward(
        ctx: Any, text: Tensor, vision: Tensor, count: int, eps: float, kernel: bool, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        slots = text[:, :count], vision[:, :count]
        found = [slot.clone(memory_format=torch.contiguous_format) for slot in slots]
        call = interaction.triton if kernel else interaction.reference
        assert call is not None
        call(*found, *parameters, eps=eps, out=slots)
        ctx.mark_dirty(text, vision)
        ctx.save_for_backward(*found, *parameters)
        ctx.count, ctx.eps, ctx.kernel = count, eps, kernel
        ctx.shapes = text.shape, vision.shape
        kind = text.device.type
        ctx.autocast = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
        return text, vision

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors
        count = ctx.count
        needs = [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[5:]]
        slots = [None if grad is None else grad[:, :count] for grad in grads]
        if ctx.kernel:
            found = INTERACTION_BACKWARD(*slots, *saved, ctx.eps, needs)
        else:
            found = _reference_backward(slots, saved, ctx.eps, needs, ctx.autocast)
        buffers: list[Tensor | None] = []
        for index, (grad, shape) in enumerate(zip(grads, ctx.shapes, strict=True)):
            if not needs[index]:
                buffers.append(None)
                continue
            # The gradient of a buffer comes from the one layer that read it, which made it for nobody else.
            buffer = saved[index].new_zeros(shape) if grad is None else grad
            buffer = buffer if buffer.is_contiguous() else buffer.contiguous()
            gradient = found[index]
            assert gradient is not None
            buffer[:, :count] = gradient
            buffers.append(buffer)
        rest = [gradient if needed else None for gradient, needed in zip(found[2:], needs[2:], strict=True)]
        return (*buffers, None, None, None, *rest)


def _reference_backward(
    grads: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    eps: float,
    needs: Sequence[bool],
    autocast: dict[str, Any],
) -> list[Tensor | None]:
    with torch.enable_grad(), torch.autocast(saved[0].device.type, **autocast):
        inputs = [each.detach().requires_grad_(needed) for each, needed in zip(saved, needs, strict=True)]
        outputs = interaction.reference(*inputs, eps=eps)
    used = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    found = torch.autograd.grad(
        [output for output, _ in used],
        [each for each in inputs if each.requires_grad],
        [grad for _, grad in used],
        allow_unused=True,
        materialize_grads=True,
    )
    gradients = iter(found)
    return [next(gradients) if needed else None for needed in needs]
