"""Plain execution of Swin's blocks: as they are, and with prompts that all windows of a sample share."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from epic_fast import functional


def call_swin_block(block: Any, hidden: Tensor, grid: tuple[int, int], *, window: int, shift: int) -> Tensor:
    """One unmodified block on tokens ``(B, N, C)`` that fill ``grid``.

    A block whose grid is no larger than its window drops its shift for good: it is given back the one that it was
    built with, so that what a picture gives does not depend on the sizes of those before it.
    """
    if (block.window_size, block.shift_size) != (window, shift):
        block.window_size, block.shift_size = window, shift
    output = block(hidden, grid)
    return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class Windows:
    """How a block cuts its tokens.

    Attributes:
        grid: (rows, columns) that the tokens fill.
        window: tokens along a side of a window.
        shift: by how much the grid is moved first; 0: not.
    """

    grid: tuple[int, int]
    window: int
    shift: int

    @classmethod
    def of(cls, grid: tuple[int, int], window: int, shift: int) -> Windows:
        """Where one window covers a side of the grid, nothing is shifted."""
        return cls(grid, window, 0 if min(grid) <= window else shift)

    def cut(self, tokens: Tensor) -> Tensor:
        """``(B, N, C)`` to ``(B * nW, window ** 2, C)``."""
        return to_windows(tokens.unflatten(1, self.grid), self.window, self.shift)

    def join(self, windows: Tensor, batch: int) -> Tensor:
        """The inverse of :meth:`cut`."""
        tokens = from_windows(windows, batch, self.grid, self.window, self.shift)
        return tokens.reshape(batch, -1, windows.shape[-1])

    def rows(self, batch: int, prompts: int, device: torch.device) -> WindowRows:
        """Where rows of tokens and prompts lie once they are cut."""
        if torch.compiler.is_compiling():
            return _make_rows(self, batch, prompts, device)
        with torch.inference_mode(False):
            return _kept_rows(self, batch, prompts, device)

    def mask(self, device: torch.device) -> Tensor | None:
        """Who sees whom, ``(nW, window ** 2, window ** 2)``; None: everybody."""
        if not self.shift:
            return None
        down, across = (-(-side // self.window) for side in self.grid)
        return shift_mask(down, across, self.window, self.shift, device)


@dataclass(frozen=True)
class WindowRows:
    """All rows of a batch in two orders: the tokens of each sample one after the other, or window by window; the
    prompts of all samples stand behind them either way, so that what is done to each row is done to all at once.

    Attributes:
        tokens: rows of tokens in the first order, ``B * N``.
        cut_tokens: in the second, ``B * nW * window ** 2``: more where windows are filled up with zeros.
        place: ``(B * (N + P),)``, the place in the second order of each row of the first.
        source: ``(cut_tokens + B * P,)``, the inverse; None where windows are filled up.
    """

    tokens: int
    cut_tokens: int
    place: Tensor
    source: Tensor | None

    @property
    def move(self) -> Tensor | None:
        """:attr:`place` where it has every place of the second order; None where windows are filled up."""
        return None if self.source is None else self.place

    def cut(self, rows: Tensor) -> Tensor:
        """Rows ``(R, C)`` of the first order in the second."""
        if self.source is not None:
            return rows.index_select(0, self.source)
        found = rows.new_zeros(self.cut_tokens + len(rows) - self.tokens, rows.shape[1])
        return found.index_copy_(0, self.place, rows)


def _make_rows(windows: Windows, batch: int, prompts: int, device: torch.device) -> WindowRows:
    tokens = batch * windows.grid[0] * windows.grid[1]
    numbers = torch.arange(1, tokens + 1, device=device).view(batch, *windows.grid, 1)
    # Zero is no token: a place that was filled up.
    source = to_windows(numbers, windows.window, windows.shift).flatten() - 1
    cut_tokens = len(source)
    behind = torch.arange(batch * prompts, device=device)
    if cut_tokens == tokens:
        place = torch.cat([source.argsort(), behind + tokens])
        return WindowRows(tokens, cut_tokens, place, torch.cat([source, behind + tokens]))
    filled = torch.cat([source, behind + tokens])
    order = filled.argsort(stable=True)
    return WindowRows(tokens, cut_tokens, order[cut_tokens - tokens :].contiguous(), None)


# A training step asks for two orders of each stage.
_kept_rows = functools.lru_cache(maxsize=64)(_make_rows)


def call_swin_block_with_prompts(
    block: Any, hidden: Tensor, prompts: Tensor, grid: tuple[int, int], *, window: int, shift: int
) -> tuple[Tensor, Tensor]:
    """The same block with prompts in each of its windows.

    Every window holds its tokens and all prompts of its sample; what a prompt gets from the attention is the mean over
    the windows.  Query, key, value and output of prompts are projected once a sample, which is the same
    (``kernels/window_prompt_attention/README.md``).

    Args:
        block: the block; its weights are used as they are.
        hidden: ``(B, N, C)`` tokens, row by row of the grid.
        prompts: ``(B, P, C)``.
        grid: (rows, columns), N in all.
        window: tokens along a side of a window.
        shift: by how much a shifted block moves the grid; not done where one window covers a side of it.

    Returns:
        tokens ``(B, N, C)`` and prompts ``(B, P, C)`` after the block.
    """
    windows = Windows.of(grid, window, shift)
    prompts = prompts.to(hidden.dtype)
    attention = block.attention
    output, prompt_output = functional.window_prompt_attention(
        *_projected(attention, windows.cut(block.layernorm_before(hidden))),
        *_projected(attention, block.layernorm_before(prompts)),
        relative_position_bias=attention.relative_position_bias()[0],
        window_mask=windows.mask(hidden.device),
        scale=attention.scaling,
    )
    output, prompt_output = (attention.o_proj(each.transpose(1, 2).flatten(2)) for each in (output, prompt_output))
    hidden = hidden + windows.join(output, len(hidden))
    prompts = prompts + prompt_output
    return tuple(each + block.mlp(block.layernorm_after(each)) for each in (hidden, prompts))  # pyright: ignore[reportReturnType]


def halved(grid: tuple[int, int]) -> tuple[int, int]:
    """What a merging of patches leaves of a grid."""
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


def merge_prompts(downsample: nn.Module, prompts: Tensor) -> Tensor:
    """Prompts ``(B, P, C)`` through the merging of patches, each as if it were all four neighbours: ``(B, P, 2 C)``."""
    parts: Any = downsample
    return parts.reduction(parts.norm(prompts.repeat(1, 1, 4)))


def to_windows(tokens: Tensor, window: int, shift: int) -> Tensor:
    """``(B, rows, columns, C)``, filled up with zeros and shifted, to ``(B * nW, window ** 2, C)``, batch-major."""
    _, rows, columns, _ = tokens.shape
    tokens = pad(tokens, (0, 0, 0, -columns % window, 0, -rows % window))
    if shift:
        tokens = tokens.roll((-shift, -shift), dims=(1, 2))
    return _cut(tokens, window)


def _cut(tokens: Tensor, window: int) -> Tensor:
    # (B, down, window, across, window, C)
    tokens = tokens.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return tokens.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def from_windows(windows: Tensor, batch: int, grid: tuple[int, int], window: int, shift: int) -> Tensor:
    """The inverse of :func:`to_windows`: ``(B, rows, columns, C)``."""
    rows, columns = grid
    down, across = -(-rows // window), -(-columns // window)
    tokens = windows.reshape(batch, down, across, window, window, -1).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    if shift:
        tokens = tokens.roll((shift, shift), dims=(1, 2))
    return tokens[:, :rows, :columns]


def shift_mask(down: int, across: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Who sees whom in shifted windows: ``(down * across, window ** 2, window ** 2)`` boolean, True = attend.

    The shift brings the first rows and columns of the grid behind the last ones; they do not see each other.
    """
    if torch.compiler.is_compiling():
        return _make_shift_mask(down, across, window, shift, device)
    with torch.inference_mode(False):
        return _kept_shift_mask(down, across, window, shift, device)


def _make_shift_mask(down: int, across: int, window: int, shift: int, device: torch.device) -> Tensor:
    def region(count: int) -> Tensor:
        position = torch.arange(count * window, device=device)
        return (position >= count * window - window).long() + (position >= count * window - shift).long()

    regions = region(down)[:, None] * 3 + region(across)
    of_tokens = _cut(regions[None, :, :, None], window)[:, :, 0]
    return of_tokens[:, :, None] == of_tokens[:, None, :]


_kept_shift_mask = functools.lru_cache(maxsize=64)(_make_shift_mask)


def _projected(attention: Any, rows: Tensor) -> list[Tensor]:
    """Query, key and value of rows ``(B, M, C)``, each ``(B, H, M, head_dim)``."""
    return [
        projection(rows).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
