"""Which kernel takes a product: Hopper's own where it was measured to be faster, else the portable one.

The choice depends on the card, the types and the layout, never on the number of rows.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import Any

from torch import Tensor

from epic_fast.kernels.frozen_linear import triton_product


def product(left: Tensor, right: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """As :func:`triton_product.product`."""
    return triton_product.product(left, right, **options)
