"""What both passes know of windows: the prompts' rows held beside a window's, who sees whom, and sums over windows."""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from epic_fast.kernels.common import launch
from epic_fast.kernels.common.plan import Tape, unit_last_stride
from epic_fast.kernels.prompt_attention.triton_rows import head_base, load_rows, padded

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def window_rows(
    held,  # [BLOCK, BLOCK_D], the prompts' rows and zeros; looked at only if HOLD
    prompt_base,  # pointer to (B, H, P, D), or None: those rows count as zeros
    token_base,  # pointer to (B * nW, H, M, D), or None: those rows count as zeros
    batch,
    index,  # of the window among all
    head,
    rows,  # [BLOCK]
    prompts,
    stop,
    prompt_batch,
    prompt_head,
    prompt_row,
    token_batch,
    token_head,
    token_row,
    HOLD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rows of ``[prompts ; the window's tokens]``, ``[BLOCK, BLOCK_D]``; zeros from row ``stop`` on."""
    if token_base is not None:
        token_base = head_base(token_base, index, head, token_batch, token_head, ALIGN)
    if HOLD and prompt_base is not None:
        if token_base is None:
            return held
        else:
            tokens = load_rows(
                None, token_base, rows, prompts, stop, 0, token_row, HEAD_DIM, BLOCK_D, True, ALIGN, WIDE
            )  # [BLOCK, BLOCK_D]
            return tl.where((rows < prompts)[:, None], held, tokens)
    else:
        if prompt_base is not None:
            prompt_base = head_base(prompt_base, batch, head, prompt_batch, prompt_head, ALIGN)
        return load_rows(
            prompt_base, token_base, rows, prompts, stop, prompt_row, token_row, HEAD_DIM, BLOCK_D, True, ALIGN, WIDE
        )


@triton.jit
def positions(
    bias,  # pointer to (H, M, M), or None
    head,
    rows,  # [BLOCK_M]
    columns,  # [BLOCK_N]
    prompts,
    stop,
    bias_head,
    bias_row,
):
    """What is added to scaled scores in powers of two, ``[BLOCK_M or 1, BLOCK_N]``: the bias between tokens, 0 where a
    prompt takes part, -inf for columns from ``stop`` on."""
    inside = (columns < stop)[None, :]
    if bias is None:
        return tl.where(inside, 0.0, float("-inf"))
    else:
        offset = (rows - prompts)[:, None] * bias_row + (columns - prompts)[None, :]
        of_tokens = ((rows >= prompts) & (rows < stop))[:, None] & ((columns >= prompts)[None, :] & inside)
        found = tl.load(bias + head * bias_head + offset, mask=of_tokens, other=0.0).to(tl.float32)
        return tl.where(inside, found * _LOG2_E, float("-inf"))


@triton.jit
def visible(
    words,  # pointer to (nW, R, W) int32
    window,
    rows,  # [BLOCK_M]
    first_column,  # a multiple of BLOCK_N
    stop,
    BLOCK_N: tl.constexpr,
):
    """Whether each row sees each column, ``[BLOCK_M, BLOCK_N]``, from one word for 32 columns of a row."""
    tl.static_assert(BLOCK_N <= 64)
    own = words + (window * stop + rows) * (2 * tl.cdiv(stop, 64)) + first_column // 32  # [BLOCK_M]
    exists = rows < stop
    column = tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    word = tl.load(own, mask=exists, other=0)[:, None]  # [BLOCK_M, 1]
    for later in tl.static_range(1, BLOCK_N // 32):
        another = tl.load(own + later, mask=exists, other=0)[:, None]
        word = tl.where(column < 32 * later, word, another)
    return ((word >> ((first_column + column) & 31)) & 1) != 0


@triton.jit(
    do_not_specialize=["mask_window", "mask_row", "mask_column", "tokens", "prompts"],
)
def _pack_kernel(
    mask,  # (nW, M, M) boolean
    words,  # (nW, R, W) int32, written
    mask_window,
    mask_row,
    mask_column,
    tokens,
    prompts,
    ROWS: tl.constexpr,
):
    """One program: who sees whom in ``ROWS`` rows of one window, prompts included.

    32 columns a word and words in pairs, so that a tile of up to 64 columns finds all of its own.
    """
    stop = prompts + tokens
    tiles = tl.cdiv(stop, ROWS)
    window = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    count = 2 * tl.cdiv(stop, 64)
    bit = tl.arange(0, 32)  # [32]
    for word in range(0, count):
        columns = word * 32 + bit
        of_tokens = ((rows >= prompts) & (rows < stop))[:, None] & ((columns >= prompts) & (columns < stop))[None, :]
        offset = (rows - prompts)[:, None] * mask_row + (columns - prompts)[None, :] * mask_column
        seen = tl.load(mask + window * mask_window + offset, mask=of_tokens, other=1).to(tl.int32)  # [ROWS, 32]
        seen = tl.where((columns < stop)[None, :], seen, 0)
        packed = tl.sum(seen << bit[None, :], 1)  # [ROWS]
        tl.store(words + (window * stop + rows) * count + word, packed, mask=rows < stop)


@triton.jit(
    do_not_specialize=[
        "zero_batch", "zero_head", "zero_row",
        "one_batch", "one_head", "one_row",
        "two_batch", "two_head", "two_row",
        "heads", "prompts", "chunks", "factor",
    ]
)  # fmt: skip
def _sum_kernel(
    share_0,  # (B * chunks, H, P, D) float32, contiguous; or None, as may be the other pairs
    share_1,
    share_2,
    result_0,  # (B, H, P, D), written
    result_1,
    result_2,
    zero_batch,  # strides of the dimensions batch, head, row
    zero_head,
    zero_row,
    one_batch,
    one_head,
    one_row,
    two_batch,
    two_head,
    two_row,
    heads,
    prompts,
    chunks,
    factor,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: the sums over a sample's windows for ``BLOCK_P`` prompts of one head, chunk after chunk."""
    tiles = tl.cdiv(prompts, BLOCK_P)
    rows = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    rest = tl.program_id(0) // tiles
    head = rest % heads
    batch = (rest // heads).to(tl.int64)
    if share_0 is not None:
        _sum(share_0, result_0, batch, head, rows, zero_batch, zero_head, zero_row, heads, prompts, chunks, factor,
             HEAD_DIM, BLOCK_D)  # fmt: skip
    if share_1 is not None:
        _sum(share_1, result_1, batch, head, rows, one_batch, one_head, one_row, heads, prompts, chunks, factor,
             HEAD_DIM, BLOCK_D)  # fmt: skip
    if share_2 is not None:
        _sum(share_2, result_2, batch, head, rows, two_batch, two_head, two_row, heads, prompts, chunks, factor,
             HEAD_DIM, BLOCK_D)  # fmt: skip


@triton.jit
def _sum(
    share,
    result,
    batch,
    head,
    rows,
    stride_batch,
    stride_head,
    stride_row,
    heads,
    prompts,
    chunks,
    factor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column = tl.arange(0, BLOCK_D)[None, :]
    exists = (rows < prompts)[:, None] & (column < HEAD_DIM)  # [BLOCK_P, BLOCK_D]
    inner = rows[:, None] * HEAD_DIM + column
    step = heads.to(tl.int64) * prompts * HEAD_DIM
    own = share + (batch * chunks) * step + head.to(tl.int64) * prompts * HEAD_DIM
    total = tl.zeros(inner.shape, tl.float32)
    for chunk in range(0, chunks):
        total += tl.load(own + chunk * step + inner, mask=exists, other=0.0)
    target = result + batch * stride_batch + head.to(tl.int64) * stride_head + rows.to(tl.int64)[:, None] * stride_row
    tl.store(target + column, (total * factor).to(result.dtype.element_ty), mask=exists)


def pack_mask(tape: Tape, mask: Tensor | None, prompts: int) -> Tensor | None:
    """Who sees whom in each window with its prompts, ``(nW, R, W)``: a bit for a column, nothing beyond the last."""
    if mask is None:
        return None
    windows, tokens, _ = mask.shape
    count = prompts + tokens
    words = tape.scratch((windows, count, 2 * -(-count // 64)), torch.int32)
    rows = 16
    integers = (*mask.stride(), tokens, prompts)
    tape.launch(
        _pack_kernel,
        windows * -(-count // rows),
        (mask, words, *integers, rows),
        {"num_warps": 4},
        launch.facts_of((mask, words), (), integers, rows),
    )
    return words


def shares_of(tape: Tape, results: Sequence[Tensor | None], chunks: int) -> list[Tensor | None]:
    """Where kernels write what prompts get: the results, or a float32 share a chunk of windows."""
    if chunks == 1:
        return list(results)
    return [
        None if each is None else tape.scratch((each.shape[0] * chunks, *each.shape[1:]), torch.float32)
        for each in results
    ]


def sum_shares(
    tape: Tape, results: Sequence[Tensor | None], shares: Sequence[Tensor | None], chunks: int, factor: float = 1.0
) -> None:
    """The sums of up to three tensors' shares over the chunks, in their order."""
    pairs = [(one, other) for one, other in zip(results, shares, strict=True) if one is not None and other is not None]
    if chunks == 1 or not pairs or not pairs[0][0].numel():
        return
    batch, heads, prompts, head_dim = pairs[0][0].shape
    strides = [stride for result, _ in pairs for stride in result.stride()[:3]]
    absent = [None] * (3 - len(pairs))
    rows, width = 16, padded(head_dim)
    integers = (*strides, *(0 for _ in absent for _ in range(3)), heads, prompts, chunks)
    # The last pointer is one that is there: tensors stand before numbers.
    pointers = (*(share for _, share in pairs), *absent, *(result for result, _ in pairs), *absent)
    constants = (head_dim, rows, width)
    tape.launch(
        _sum_kernel,
        batch * heads * -(-prompts // rows),
        (*pointers, *integers, float(factor), *constants),
        {"num_warps": 4},
        launch.facts_of(pointers, (), integers, constants),
    )


def bias_of(tape: Tape, bias: Tensor | None) -> tuple[Tensor | None, tuple[int, int]]:
    """The bias with a unit last stride, and its strides of head and row."""
    bias = unit_last_stride(tape, bias)
    return (None, (0, 0)) if bias is None else (bias, bias.stride()[:2])
