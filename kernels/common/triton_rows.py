"""Rows inside a kernel; ``rows.py`` beside this file says how a launcher hands their strides over."""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_offsets(row, inner_rows, outer_stride, inner_stride, UNIT: tl.constexpr):
    """Where rows ``outer * inner_rows + inner`` begin, in elements.  # [rows, 1]"""
    outer = row // inner_rows
    inner = row - outer * inner_rows
    return ((outer.to(tl.int64) * outer_stride + inner.to(tl.int64) * inner_stride) * UNIT)[:, None]
