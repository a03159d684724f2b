"""infused_swiglu as PyTorch sees it."""

from __future__ import annotations

from epic_fast.kernels.infused_swiglu import reference  # pyright: ignore[reportMissingImports]
from epic_fast.ops.dispatch import Operation

infused_swiglu = Operation("infused_swiglu", reference=reference.infused_swiglu)
