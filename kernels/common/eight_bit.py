"""Rows in 8 bits, each with a scale of its own: ``value ≈ data * scale``; the specification, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EIGHT_BIT_TYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST = {"fp8": 448.0, "int8": 127.0}
# Their inverses as float32 has them.  A product is rounded alike everywhere; PyTorch divides by a number on a CPU and
# multiplies by its inverse on a GPU.
INVERSE_LARGEST = {kind: torch.tensor(1.0 / largest, dtype=torch.float32).item() for kind, largest in LARGEST.items()}
# The smallest normal float32: a row of zeros has this scale, and its inverse is finite.
SMALLEST_SCALE = 2.0**-126


def quantise_rows(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Data (..., D) in ``EIGHT_BIT_TYPES[kind]``, scale (rows,) float32: a row's largest magnitude becomes the type's.

    The scale of a row that holds an infinity or NaN is NaN, so that no product with it passes for a number.
    """
    values = values.float()
    largest = values.abs().amax(dim=-1, keepdim=True)
    scale = (largest * INVERSE_LARGEST[kind]).clamp_min(SMALLEST_SCALE).masked_fill(largest.isinf(), math.nan)
    data = values * scale.reciprocal()
    data = data.to(torch.float8_e4m3fn) if kind == "fp8" else data.nan_to_num(0.0).round().to(torch.int8)
    return data, scale.reshape(-1)
