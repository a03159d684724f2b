"""A router's rows through the product before them: what tells a row's products from what that product reads.

README.md beside this file says what for.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common import plan
from epic_fast.kernels.common.launch import facts_of
from epic_fast.kernels.common.plan import Tape
from epic_fast.kernels.common.rows import contiguous

# Matrices of one launch, and the tile; so many of its steps are asked for together.
TOGETHER = 8
BLOCK_C, BLOCK_K, WARPS, STEPS = 128, 64, 4, 4


@triton.jit(do_not_specialize=["before"])
def _through_kernel(
    probe_0,  # each (J, C), contiguous
    probe_1,
    probe_2,
    probe_3,
    probe_4,
    probe_5,
    probe_6,
    probe_7,
    weight_0,  # each (C, K), contiguous
    weight_1,
    weight_2,
    weight_3,
    weight_4,
    weight_5,
    weight_6,
    weight_7,
    through,  # (before + matrices, J, K) float32, contiguous, written
    before,
    J: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One program: ``BLOCK_K`` numbers of a row.  Grid: (matrices * column tiles * J,); rows run fastest, over the same
    part of a weight."""
    row = tl.program_id(0) % J
    tile = tl.program_id(0) // J
    tiles = tl.cdiv(K, BLOCK_K)
    number = tile // tiles
    probe, weight = probe_0, weight_0
    if number == 1:
        probe, weight = probe_1, weight_1
    if number == 2:
        probe, weight = probe_2, weight_2
    if number == 3:
        probe, weight = probe_3, weight_3
    if number == 4:
        probe, weight = probe_4, weight_4
    if number == 5:
        probe, weight = probe_5, weight_5
    if number == 6:
        probe, weight = probe_6, weight_6
    if number == 7:
        probe, weight = probe_7, weight_7
    column = tile % tiles * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    total = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    for first in tl.range(0, C, BLOCK_C, loop_unroll_factor=STEPS):
        inner = first + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        source = weight + inner.to(tl.int64)[:, None] * K + column[None, :]
        own = tl.load(source, mask=(inner < C)[:, None] & (column < K)[None, :], other=0.0).to(tl.float32)
        direction = tl.load(probe + row * C + inner, mask=inner < C, other=0.0).to(tl.float32)
        total += own * direction[:, None]
    target = through + ((before + number) * J + row).to(tl.int64) * K + column
    tl.store(target, tl.sum(total, 0), mask=column < K)


def probe_through(probes: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Shapes and meanings are those of :func:`epic_fast.ops.route_prompts.probe_through`."""
    return plan.run(forward, (*probes, *weights), (len(probes),))[0]


def forward(tape: Tape, *given: Any) -> tuple[Tensor]:
    """:func:`probe_through` on a tape."""
    count = given[-1]
    probes, weights = given[:count], given[count : 2 * count]
    (rows, width), depth = probes[0].shape, weights[0].shape[1]
    through = tape.empty((count, rows, depth), torch.float32)
    if not through.numel():
        return (through,)
    constants = (rows, width, depth, BLOCK_C, BLOCK_K, STEPS)
    for first in range(0, count, TOGETHER):
        few = slice(first, first + TOGETHER)
        tensors: list[Tensor] = []
        for each in (probes[few], weights[few]):
            found = [contiguous(tape, one) for one in each]
            tensors += found + found[:1] * (TOGETHER - len(found))
        programs = len(probes[few]) * -(-depth // BLOCK_K) * rows
        tape.launch(
            _through_kernel,
            programs,
            (*tensors, through, first, *constants),
            {"num_warps": WARPS},
            facts_of((*tensors, through), (), (first,), (constants, WARPS)),
        )
    return (through,)
