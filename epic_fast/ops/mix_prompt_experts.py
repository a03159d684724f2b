"""The mixture of prompt experts as PyTorch sees it."""

from __future__ import annotations

from epic_fast.kernels.mix_prompt_experts import reference  # pyright: ignore[reportMissingImports]
from epic_fast.ops.dispatch import Operation

mix_prompt_experts = Operation("mix_prompt_experts", reference=reference.mix_prompt_experts)
