"""Dispatch of prompt-concatenated attention."""

from epic_fast.kernels.prompt_attention import reference  # pyright: ignore[reportMissingImports]
from epic_fast.ops.dispatch import Operation

prompt_attention = Operation("prompt_attention", reference=reference.prompt_attention)
