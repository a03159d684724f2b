"""Rows in 8 bits inside a kernel that holds whole rows; ``eight_bit.py`` beside this file is the specification."""

# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportMissingImports=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from epic_fast.kernels.common.eight_bit import INVERSE_LARGEST, SMALLEST_SCALE

_INVERSE_FP8 = tl.constexpr(INVERSE_LARGEST["fp8"])
_INVERSE_INT8 = tl.constexpr(INVERSE_LARGEST["int8"])
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: added to a small number, it leaves its nearest integer in the bits


@triton.jit
def row_scales(values, KIND: tl.constexpr):
    """The scales of rows in float32, zero where there is no column; NaN for a row that is not finite.  # [rows]"""
    # As integers, because the maximum of floats steps over NaN; without their sign they sort as the floats do.
    bits = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    largest = bits.to(tl.float32, bitcast=True)
    if KIND == "fp8":
        scale = largest * _INVERSE_FP8
    else:
        tl.static_assert(KIND == "int8")
        scale = largest * _INVERSE_INT8
    return tl.where(bits < 0x7F800000, tl.maximum(scale, _SMALLEST_SCALE), float("nan"))


@triton.jit
def quantise(values, scale, KIND: tl.constexpr):
    """Rows in 8 bits, rounded to the nearest, ties to even.  # [rows, columns]"""
    scaled = values * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None]
    if KIND == "fp8":
        data = scaled.to(tl.float8e4nv)
    else:
        data = (scaled + _TO_INTEGER).to(tl.int32, bitcast=True).to(tl.int8)
    return data
