"""The specification of Swin's merging of patches up to its product, in plain PyTorch, good in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_patches(
    stream: Tensor,
    branch: Tensor | None,
    batch: int,
    grid: tuple[int, int],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    normed_dtype: torch.dtype | None = None,
) -> Tensor:
    """The contract is that of :func:`epic_fast.ops.merge_patches.merge_patches`.

    Everything between the rounded sum and the rounded norm in float32 (float64 for float64).
    """
    wide = torch.promote_types(stream.dtype, torch.float32)
    total = stream if branch is None else (stream.to(wide) + branch.to(wide)).to(stream.dtype)
    tokens, width = batch * grid[0] * grid[1], stream.shape[1]
    # A last row of zeros stands where an odd side has no neighbour.
    with_zeros = torch.cat([total, total.new_zeros(1, width)])
    members = with_zeros.index_select(0, member_rows(batch, grid, len(total), stream.device))
    joined = torch.cat([members.view(-1, 4 * width), total[tokens:].repeat(1, 4)]).to(wide)
    normed, _, _ = torch.native_layer_norm(joined, (4 * width,), weight.to(wide), bias.to(wide), eps)
    return normed.to(stream.dtype if normed_dtype is None else normed_dtype)


def member_rows(batch: int, grid: tuple[int, int], missing: int, device: torch.device) -> Tensor:
    """Rows of the stream that each group's four members are, one after the other; ``missing`` where there is none."""
    rows, columns = grid
    sample, down, across, member = (
        torch.arange(count, device=device) for count in (batch, (rows + 1) // 2, (columns + 1) // 2, 4)
    )
    # The left column first, in it the upper token.
    y, x = 2 * down.view(-1, 1, 1) + member % 2, 2 * across.view(-1, 1) + member // 2
    found = (sample.view(-1, 1, 1, 1) * rows + y) * columns + x
    return torch.where((y < rows) & (x < columns), found, missing).flatten()
