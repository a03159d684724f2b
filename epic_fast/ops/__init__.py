"""The operations as PyTorch sees them: one function each, dispatched to an implementation by ``impl``."""

from epic_fast.ops.dispatch import available_implementations
from epic_fast.ops.prompt_attention import prompt_attention
from epic_fast.ops.prompt_interaction import prompt_interaction

__all__ = ["available_implementations", "prompt_attention", "prompt_interaction"]
