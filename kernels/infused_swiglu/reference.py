"""The specification of SwiGLU times an infused vector, in plain PyTorch, good in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def infused_swiglu(gate_projection: Tensor, up_projection: Tensor, multiplier: Tensor) -> Tensor:
    """The public contract is that of :func:`epic_fast.functional.infused_swiglu`.

    In float32 (float64 where one of the inputs is), rounded once.
    """
    wide = torch.promote_types(torch.promote_types(gate_projection.dtype, multiplier.dtype), torch.float32)
    hidden = silu(gate_projection.to(wide)) * up_projection.to(wide) * multiplier.to(wide)[:, None]
    return hidden.to(gate_projection.dtype)
