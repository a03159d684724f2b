"""Products with a frozen weight for Hopper, in Gluon: one warp loads, two groups of four warps multiply in turn.

Each group owns a tile of its own, so that one group's epilogue (bias, activation, derivative, stores) runs while the
other multiplies.  Both take their operands from one ring in shared memory, in the order in which the loading warp fills
it.  A group begins when the other has met its last step: a barrier's phase is one bit, so who waits for a slot of the
ring must not be more than one filling behind or ahead.  Operands and results move by tensor descriptors.
"""

# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportMissingImports=false
# pyright: reportRedeclaration=false, reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from epic_fast.kernels.activation import triton_functions
from epic_fast.kernels.common import launch, plan
from epic_fast.kernels.common.descriptors import Described
from epic_fast.kernels.common.plan import Tape
from epic_fast.kernels.frozen_linear.tiles import HopperTile, hopper_tile, is_hopper, processors
from epic_fast.kernels.frozen_linear.triton_product import describable, rows_of

# Triton 3.9 has other names for these than 3.6.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
# The same functions of a tile, compiled for tiles that have a layout.
gate_of = gluon.jit(triton_functions.gate_of.fn)
slope_of = gluon.jit(triton_functions.slope_of.fn)
encode_derivative = gluon.jit(triton_functions.encode_derivative.fn)
decode_derivative = gluon.jit(triton_functions.decode_derivative.fn)


if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def as_codes(place):
        """The same shared memory for codes of one byte."""
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(place.shape, gl.uint8)
        return place.reinterpret(gl.uint8, place.shape, LAYOUT)

else:

    @gluon.jit
    def as_codes(place):
        """The same shared memory for codes of one byte."""
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for(place.shape, gl.uint8)
        return place._reinterpret(gl.uint8, place.shape, LAYOUT)


@gluon.jit
def tile_place(tile, tiles_m, tiles_n, GROUP: gl.constexpr):
    """Row and column of a tile: GROUP rows of tiles go through all columns before the next ones."""
    first = tile // (GROUP * tiles_n) * GROUP
    high = gl.minimum(tiles_m - first, GROUP)
    rest = tile % (GROUP * tiles_n)
    return first + rest % high, rest // high


@gluon.jit
def load_all(
    left,
    right,
    lefts,
    rights,
    ready,
    free,
    rows,
    columns,
    depth,
    DEPTH_LAST: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """The loading warp: the operands of every tile of this program, one step of the sum after the other."""
    tiles_m, tiles_n = gl.cdiv(rows, BLOCK_M), gl.cdiv(columns, BLOCK_N)
    BYTES: gl.constexpr = (BLOCK_M + BLOCK_N) * BLOCK_K * lefts.dtype.primitive_bitwidth // 8
    slot = 0
    phase = 1  # a slot that was never filled is free
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = tile_place(tile, tiles_m, tiles_n, GROUP)
        for first in range(0, depth, BLOCK_K):
            mbarrier.wait(free.index(slot), phase)
            mbarrier.expect(ready.index(slot), BYTES)
            load_tile(left, [tile_m * BLOCK_M, first], ready.index(slot), lefts.index(2 * slot))
            load_tile(left, [tile_m * BLOCK_M + BLOCK_M // 2, first], ready.index(slot), lefts.index(2 * slot + 1))
            if DEPTH_LAST:
                load_tile(right, [tile_n * BLOCK_N, first], ready.index(slot), rights.index(slot))
            else:
                load_tile(right, [first, tile_n * BLOCK_N], ready.index(slot), rights.index(slot))
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1


@gluon.jit
def load_kept(kept, first_row, first_column, place, known, KEEP: gl.constexpr):
    """Start fetching half a tile of what was kept into the place that its result will have."""
    if KEEP == "eight_bit":
        codes = as_codes(place)
        mbarrier.expect(known, codes.shape[0] * codes.shape[1])
        load_tile(kept, [first_row, first_column], known, codes)
    else:
        mbarrier.expect(known, place.shape[0] * place.shape[1] * place.dtype.primitive_bitwidth // 8)
        load_tile(kept, [first_row, first_column], known, place)


@gluon.jit
def finish(
    value,  # [HALF, BLOCK_N], float32
    left_scale,
    right_scale,
    bias,
    output,
    kept,
    place,  # shared memory of half a result, [HALF, BLOCK_N]
    known,
    known_phase,
    first_row,
    first_column,
    rows,
    columns,
    SCALED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    KEEP: gl.constexpr,
    BACKWARD: gl.constexpr,
    EVEN: gl.constexpr,
):
    """The epilogue of half a tile; what lies outside is not written."""
    LAYOUT: gl.constexpr = value.type.layout
    column = first_column + gl.arange(0, value.shape[1], gl.SliceLayout(0, LAYOUT))
    inside = None if EVEN else column < columns
    if SCALED:
        row = first_row + gl.arange(0, value.shape[0], gl.SliceLayout(1, LAYOUT))
        scale = gl.load(left_scale + row, row < rows, other=0.0)
        value = value * scale[:, None] * gl.load(right_scale + column, inside)[None, :]
    if HAS_BIAS:
        value = value + gl.load(bias + column, inside).to(gl.float32)[None, :]
    pre = value
    if BACKWARD:
        mbarrier.wait(known, known_phase)
        if KEEP == "eight_bit":
            value = value * decode_derivative(as_codes(place).load(LAYOUT))
        else:
            x = place.load(LAYOUT).to(gl.float32)
            value = value * slope_of(x, gate_of(x, ACTIVATION), ACTIVATION)
    else:
        if ACTIVATION is not None:
            gate = gate_of(pre, ACTIVATION)
            value = pre * gate
            if KEEP == "eight_bit":
                codes = as_codes(place)
                codes.store(encode_derivative(slope_of(pre, gate, ACTIVATION)))
                fence_async_shared()
                store_tile(kept, [first_row, first_column], codes)
        if KEEP == "eight_bit":
            tma.store_wait(0)
    place.store(value.to(place.dtype))
    fence_async_shared()
    store_tile(output, [first_row, first_column], place)
    if KEEP == "full" and not BACKWARD:
        tma.store_wait(0)
        place.store(pre.to(place.dtype))
        fence_async_shared()
        store_tile(kept, [first_row, first_column], place)


@gluon.jit
def multiply_all(
    left_scale,
    right_scale,
    bias,
    output,
    kept,
    lefts,
    rights,
    places,  # shared memory of this group, [4, HALF, BLOCK_N]: two halves of each group's result
    ready,
    free,
    turns,
    knowns,
    rows,
    columns,
    depth,
    GROUP_INDEX: gl.constexpr,
    DEPTH_LAST: gl.constexpr,
    SCALED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    KEEP: gl.constexpr,
    BACKWARD: gl.constexpr,
    EVEN: gl.constexpr,  # BLOCK_N divides the columns
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """A multiplying group: every other tile of this program, in two halves of rows."""
    OPERAND_BITS: gl.constexpr = lefts.dtype.primitive_bitwidth
    HALF: gl.constexpr = BLOCK_M // 2
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 256 // OPERAND_BITS]
    )
    tiles_m, tiles_n = gl.cdiv(rows, BLOCK_M), gl.cdiv(columns, BLOCK_N)
    steps = gl.cdiv(depth, BLOCK_K)
    step = GROUP_INDEX * steps
    known_phase = 0
    turn_phase = 1 - GROUP_INDEX  # the first group's first turn is now
    known_1, known_2 = knowns.index(2 * GROUP_INDEX), knowns.index(2 * GROUP_INDEX + 1)
    for tile in range(gl.program_id(0) + GROUP_INDEX * gl.num_programs(0), tiles_m * tiles_n, 2 * gl.num_programs(0)):
        tile_m, tile_n = tile_place(tile, tiles_m, tiles_n, GROUP)
        first_row, first_column = tile_m * BLOCK_M, tile_n * BLOCK_N
        # The first place still, but not for the compiler, which else keeps addresses in it through the products.
        at = 2 * GROUP_INDEX + (tile >> 30)
        place_1, place_2 = places.index(at), places.index(at + 1)
        if BACKWARD:
            # What was kept arrives while the group multiplies; the last result has left its place by then.
            tma.store_wait(0)
            fence_async_shared()
            load_kept(kept, first_row, first_column, place_1, known_1, KEEP)
            load_kept(kept, first_row + HALF, first_column, place_2, known_2, KEEP)
        total_1 = gl.full([HALF, BLOCK_N], 0.0, gl.float32, MMA)
        total_2 = gl.full([HALF, BLOCK_N], 0.0, gl.float32, MMA)
        slot = step % STAGES
        phase = (step // STAGES) & 1
        previous = slot
        mbarrier.wait(turns.index(GROUP_INDEX), turn_phase)
        turn_phase ^= 1
        for k in range(steps):
            mbarrier.wait(ready.index(slot), phase)
            if DEPTH_LAST:
                b = rights.index(slot).permute((1, 0))
            else:
                b = rights.index(slot)
            total_1 = warpgroup_mma(lefts.index(2 * slot), b, total_1, is_async=True)
            total_2 = warpgroup_mma(lefts.index(2 * slot + 1), b, total_2, is_async=True)
            if k == steps - 1:
                mbarrier.arrive(turns.index(1 - GROUP_INDEX), count=1)
            # All but the two products just begun are done: their operands may be overwritten.
            total_1, total_2 = warpgroup_mma_wait(2, deps=(total_1, total_2))
            if k > 0:
                mbarrier.arrive(free.index(previous), count=1)
            previous = slot
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        total_1, total_2 = warpgroup_mma_wait(0, deps=(total_1, total_2))
        mbarrier.arrive(free.index(previous), count=1)
        step += 2 * steps
        if not BACKWARD:
            tma.store_wait(0)
        finish(total_1, left_scale, right_scale, bias, output, kept, place_1, known_1, known_phase, first_row,
               first_column, rows, columns, SCALED, HAS_BIAS, ACTIVATION, KEEP, BACKWARD, EVEN)  # fmt: skip
        finish(total_2, left_scale, right_scale, bias, output, kept, place_2, known_2, known_phase, first_row + HALF,
               first_column, rows, columns, SCALED, HAS_BIAS, ACTIVATION, KEEP, BACKWARD, EVEN)  # fmt: skip
        known_phase ^= 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows", "columns", "depth"])
def _hopper_kernel(
    left,  # descriptors; shapes as in triton_product._product_kernel
    right,
    left_scale,  # pointers
    right_scale,
    bias,
    output,  # descriptors
    kept,
    rows,
    columns,
    depth,
    DEPTH_LAST: gl.constexpr,
    SCALED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    KEEP: gl.constexpr,
    BACKWARD: gl.constexpr,
    EVEN: gl.constexpr,  # BLOCK_N divides the columns
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """Grid: (programs,); a program has every so manieth tile, its two groups take turns."""
    HALF: gl.constexpr = BLOCK_M // 2
    lefts = gl.allocate_shared_memory(left.dtype, [2 * STAGES] + left.block_type.shape, left.layout)  # noqa: RUF005
    rights = gl.allocate_shared_memory(right.dtype, [STAGES] + right.block_type.shape, right.layout)  # noqa: RUF005
    places = gl.allocate_shared_memory(output.dtype, [4, HALF, BLOCK_N], output.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    knowns = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
        mbarrier.init(free.index(slot), count=1)
    for group in gl.static_range(2):
        mbarrier.init(turns.index(group), count=1)
    for half in gl.static_range(4):
        mbarrier.init(knowns.index(half), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (multiply_all, (left_scale, right_scale, bias, output, kept, lefts, rights, places, ready, free,
                            turns, knowns, rows, columns, depth, 0, DEPTH_LAST, SCALED, HAS_BIAS, ACTIVATION, KEEP,
                            BACKWARD, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP)),
            (multiply_all, (left_scale, right_scale, bias, output, kept, lefts, rights, places, ready, free,
                            turns, knowns, rows, columns, depth, 1, DEPTH_LAST, SCALED, HAS_BIAS, ACTIVATION, KEEP,
                            BACKWARD, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUP)),
            (load_all, (left, right, lefts, rights, ready, free, rows, columns, depth, DEPTH_LAST, BLOCK_M, BLOCK_N,
                        BLOCK_K, STAGES, GROUP)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.uint8: gl.uint8,
          torch.float8_e4m3fn: gl.float8e4nv}  # fmt: skip


@functools.cache
def layout_for(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], _TYPES[dtype])


@functools.cache
def describer(rows: int, columns: int, dtype: torch.dtype):
    """What makes a descriptor of a matrix, in blocks."""
    return functools.partial(
        TensorDescriptor.from_tensor, block_shape=[rows, columns], layout=layout_for(rows, columns, dtype)
    )


def described(tensor: Tensor, rows: int, columns: int) -> Described:
    return Described(tensor, describer(rows, columns, tensor.dtype))


def limits(
    left: Tensor,
    right: Tensor,
    *,
    depth_last: bool = True,
    keep: str = "none",
    kept: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> list[str]:
    """Why this kernel cannot take a call; an empty list if it can."""
    dtype = out_dtype or left.dtype
    columns = right.shape[0 if depth_last else 1]
    reasons = []
    if not is_hopper(left.device):
        reasons.append("wgmma needs a Hopper GPU (compute capability 9.0)")
    if left.dtype not in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        reasons.append(f"operands are {left.dtype}; wanted bfloat16, float16 or float8_e4m3fn")
    if dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"the output is {dtype}; wanted bfloat16 or float16")
    if left.element_size() == 1 and not depth_last:
        reasons.append("products of eight bits need the depth as last dimension of both operands")
    if left.shape[1] == 0:
        reasons.append("the depth is 0")
    # Codes of the derivative take one byte, everything else that is written two.
    if columns % (16 if keep == "eight_bit" else 8) or not describable(left, right, kept):
        reasons.append("a row does not start at a multiple of 16 bytes")
    if kept is not None and kept.dtype not in (torch.uint8, dtype):
        reasons.append(f"kept is {kept.dtype}; wanted {dtype} or uint8")
    return reasons


def product(
    left: Tensor,
    right: Tensor,
    *,
    depth_last: bool = True,
    bias: Tensor | None = None,
    activation: str | None = None,
    keep: str = "none",
    kept: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
    tile: HopperTile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As ``triton_product.product``, for calls to which :func:`limits` has no objection."""
    options = (depth_last, activation, keep, out_dtype or left.dtype, tile)
    return plan.run(multiply, (left, right, *(scales or (None, None)), bias, kept), options)


def multiply(
    tape: Tape,
    left: Tensor,
    right: Tensor,
    left_scale: Tensor | None,
    right_scale: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    depth_last: bool,
    activation: str | None,
    keep: str,
    out_dtype: torch.dtype,
    tile: HopperTile | None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`product` on a tape."""
    left, right = rows_of(tape, left), rows_of(tape, right)
    rows, depth = left.shape
    columns = right.shape[0 if depth_last else 1]
    output = tape.empty((rows, columns), out_dtype)
    backward = kept is not None
    made = None
    if backward:
        kept = rows_of(tape, kept)
    elif keep != "none":
        kept = made = tape.empty((rows, columns), torch.uint8 if keep == "eight_bit" else out_dtype)
    if output.numel() == 0:
        return output, made
    if tile is None:
        tile = hopper_tile(left.element_size())
    blocks = (tile.rows, tile.columns, tile.depth)
    tiles = -(-rows // tile.rows) * -(-columns // tile.columns)
    descriptors = (
        described(left, tile.rows // 2, tile.depth),
        described(right, tile.columns, tile.depth) if depth_last else described(right, tile.depth, tile.columns),
    )
    results = (output, output if kept is None else kept)
    # A pointer that the kernel never follows still has to be one.
    vectors = tuple(output if each is None else each for each in (left_scale, right_scale, bias))
    flags = (
        depth_last, left_scale is not None, bias is not None, activation, keep, backward, columns % tile.columns == 0
    )  # fmt: skip
    sizes = (rows, columns, depth)
    constants = (*flags, *blocks, tile.stages, tile.group, tile.registers)
    facts = launch.facts_of((left, right, *vectors, *results), (), sizes, (constants, tile.maximum))
    arguments = (*descriptors, *vectors, *(described(each, tile.rows // 2, tile.columns) for each in results), *sizes,
                 *constants)  # fmt: skip
    options = {"num_warps": 4, "maxnreg": tile.maximum}
    tape.launch(_hopper_kernel, min(tiles, processors(left.device)), arguments, options, facts)
    return output, made
