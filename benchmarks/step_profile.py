"""Where the time of a step goes: device time of its kernels, by what they do."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch.profiler import ProfilerActivity

from benchmarks.step_cases import Setting, StepCase
from benchmarks.step_providers import StepProvider, captured, release

STEPS, NAMES = 5, 24
KINDS: dict[str, str] = {
    "attention": r"attention|fmha|flash|sdpa|softmax|cudnn_generated",
    "matrix products": r"gemm|cutlass|cublas|nvjet|linear|product|matmul|addmm|::mm|::bmm|conv|implicit|xmma|splitk",
    "interaction": r"interaction|hub|cosine|\bmix|mix_",
    "norms": r"norm|rsqrt",
    "activation": r"gelu|sigmoid|activation|silu",
    "quantisation": r"quantis|quantiz|fp8|float8|int8|amax",
    "copies": r"copy|memcpy|memset|\bcat|concat|fill|gather|index|embedding|contiguous|clone|transpose|\broll_",
}
"""The first kind whose expression is found in a kernel's name has it; a fused kernel counts for the first."""


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    name = kernel.lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def profile(setting: Setting, case: StepCase, provider: StepProvider) -> str:
    """Tables of kinds and of the longest kernels, in milliseconds a step.

    On a CPU the time is that of operators themselves, not of kernels.
    """
    with provider.settings():
        step = provider.prepare(setting, case)
        if provider.graphed:
            step = captured(step, setting.device, copies=provider.copies)
        for _ in range(3):
            step.call()
        gpu = setting.device.type == "cuda"
        if gpu:
            torch.cuda.synchronize()
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as found:
            for _ in range(STEPS):
                step.call()
            if gpu:
                torch.cuda.synchronize()
    release(step, setting.device)
    kernels: dict[str, tuple[float, float]] = {}
    for event in found.key_averages():
        micros = event.self_device_time_total if gpu else event.self_cpu_time_total
        if micros > 0:
            kernels[event.key] = (micros / 1e3 / STEPS, event.count / STEPS)
    return f"{case.name}, {provider.label}\n{report(kernels)}"


def report(kernels: Mapping[str, tuple[float, float]]) -> str:
    """The tables, out of ``{kernel: (milliseconds a step, launches a step)}``."""
    kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, (milliseconds, launches) in kernels.items():
        kinds[kind_of(name)][0] += milliseconds
        kinds[kind_of(name)][1] += launches
    total = sum(milliseconds for milliseconds, _ in kernels.values())
    lines = [f"{'all kernels':18}{total:9.3f} ms {sum(count for _, count in kernels.values()):7.0f} launches"]
    for kind, (milliseconds, launches) in sorted(kinds.items(), key=lambda each: -each[1][0]):
        lines.append(f"{kind:18}{milliseconds:9.3f} ms {launches:7.0f} launches {100 * milliseconds / total:5.1f} %")
    lines.append("")
    for name, (milliseconds, launches) in sorted(kernels.items(), key=lambda each: -each[1][0])[:NAMES]:
        lines.append(f"{milliseconds:9.3f} ms {launches:6.1f} x  {kind_of(name):16} {name[:110]}")
    return "\n".join(lines)
