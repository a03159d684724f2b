"""The operations as PyTorch sees them: one function each, dispatched to an implementation by ``impl``."""

from epic_fast.ops.dispatch import available_implementations
from epic_fast.ops.infused_attention import infused_attention
from epic_fast.ops.infused_swiglu import infused_swiglu
from epic_fast.ops.infusion_gate import infusion_gate
from epic_fast.ops.mix_prompt_experts import mix_prompt_experts
from epic_fast.ops.prompt_attention import prompt_attention
from epic_fast.ops.prompt_interaction import prompt_interaction
from epic_fast.ops.window_prompt_attention import window_prompt_attention

__all__ = [
    "available_implementations",
    "infused_attention",
    "infused_swiglu",
    "infusion_gate",
    "mix_prompt_experts",
    "prompt_attention",
    "prompt_interaction",
    "window_prompt_attention",
]
