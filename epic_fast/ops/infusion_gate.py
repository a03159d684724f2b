"""infusion_gate as PyTorch sees it."""

from __future__ import annotations

from epic_fast.kernels.infusion_gate import reference  # pyright: ignore[reportMissingImports]
from epic_fast.ops.dispatch import Operation

infusion_gate = Operation("infusion_gate", reference=reference.infusion_gate)
