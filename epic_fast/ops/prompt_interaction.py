"""Dispatch of the similarity-based prompt interaction."""

from epic_fast.kernels.prompt_interaction import reference  # pyright: ignore[reportMissingImports]
from epic_fast.ops.dispatch import Operation

prompt_interaction = Operation("prompt_interaction", reference=reference.prompt_interaction)
