"""How long a call takes, how much memory it adds, and on which machine that was."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import epic_fast
from epic_fast.ops import native

QUANTILES = (0.2, 0.5, 0.8)
WARMUP_MS, REPEAT_MS, GRAPH_MS, LAUNCHES = 8, 40, 4, 30


def measure_device(call: Callable[[], Any], device: torch.device) -> list[float]:
    """Milliseconds on the device, cold L2: the quantiles 0.2, 0.5 and 0.8.  On a CPU by the clock, five calls."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return list(do_bench(call, warmup=WARMUP_MS, rep=REPEAT_MS, quantiles=list(QUANTILES)))  # pyright: ignore
    call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return [statistics.quantiles(times, n=10, method="inclusive")[round(10 * each) - 1] for each in QUANTILES]


def measure_launched(call: Callable[[], Any], device: torch.device, *, one_thread: bool = False) -> float:
    """Milliseconds a call when Python launches one after the other, waiting once at the end: the median of 5 rounds.

    Args:
        one_thread: a backward pass runs in the calling thread, as in this project's training loop on one GPU, and not
            in the thread that PyTorch keeps for a device.
    """
    wait(device)
    launches, rounds = (LAUNCHES, 5) if device.type == "cuda" else (1, 3)
    times = []
    with torch.autograd.set_multithreading_enabled(not one_thread):
        for _ in range(rounds):
            start = time.perf_counter()
            for _ in range(launches):
                call()
            wait(device)
            times.append(1e3 * (time.perf_counter() - start) / launches)
    return statistics.median(times)


def measure_graph(call: Callable[[], Any], device: torch.device) -> float | None:
    """Milliseconds a call inside a CUDA graph, warm L2: the median.  None where there are no CUDA graphs."""
    if device.type != "cuda":
        return None
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, rep=GRAPH_MS, return_mode="median"))  # pyright: ignore[reportArgumentType]


def measure_memory(call: Callable[[], Any], device: torch.device) -> float | None:
    """MiB that a call adds at its peak, what it returns included.  None on a CPU."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def launched_kernels(call: Callable[[], Any]) -> list[dict[str, Any]]:
    """The Triton kernels of this project that a call launches: tiles and flags, warps, stages, registers, spills."""
    found: list[dict[str, Any]] = []
    try:
        from triton import knobs
        from triton.runtime.jit import JITFunction
    except ImportError:
        return found
    hooks = knobs.runtime.launch_enter_hook
    run = JITFunction.run

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled = run(self, *args, **kwargs)
        if compiled is not None and self.module.startswith("epic_fast."):
            names = self.arg_names
            constants = {names[path[0]]: value for path, value in compiled.src.constants.items()}
            plain = {name: value for name, value in constants.items() if isinstance(value, bool | int | float | str)}
            found.append(
                {
                    "kernel": compiled.name,
                    "warps": compiled.metadata.num_warps,
                    "stages": compiled.metadata.num_stages,
                    "shared": compiled.metadata.shared,
                    "registers": getattr(compiled, "n_regs", None),
                    "spills": getattr(compiled, "n_spills", None),
                    "constants": plain,
                }
            )
        return compiled

    def watching(metadata: Any) -> None:
        """Its being there makes launchers that keep their compiled kernels go through Triton."""

    hooks.add(watching)
    try:
        with mock.patch.object(JITFunction, "run", noting):
            call()
    finally:
        hooks.remove(watching)
    return found


def machine(command: str) -> dict[str, Any]:
    """What a row must carry to be believed.

    A copy without its repository says its commit in the variable ``EPIC_FAST_COMMIT``, and vouches for being it.
    """
    commit = os.environ.get("EPIC_FAST_COMMIT")
    run = {
        "command": command,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or _said("git", "rev-parse", "HEAD"),
        "modified": not commit
        and bool(_said("git", "status", "--porcelain", "--", "epic_fast", "kernels", "benchmarks")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "epic_fast": epic_fast.__version__,
        "launches": "Python" if native.find() is None else "compiled",
        "gpu": None,
        "driver": None,
    }
    if torch.cuda.is_available():
        run["gpu"] = torch.cuda.get_device_name()
        drivers = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")  # a line for each card
        run["driver"] = drivers and drivers.splitlines()[0]
    else:
        run["processor"] = platform.processor() or platform.machine()
    return run


def libraries() -> dict[str, str]:
    """Versions of what a training runs on besides."""
    import accelerate
    import transformers

    return {"transformers": transformers.__version__, "accelerate": accelerate.__version__}


def device_of(number: int) -> torch.device:
    """Processes take turns at the GPUs that are there; what a process makes without naming one lies on its own."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", number % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def ceilings(device: torch.device) -> dict[str, float] | None:
    """What the card does at best: TB/s of a copy, read and written, and TFLOP/s of a bf16 product.  None on a CPU."""
    if device.type != "cuda":
        return None
    source = torch.empty(1 << 29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = measure_device(lambda: target.copy_(source), device)[1]
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    multiplied = measure_device(lambda: left @ right, device)[1]
    return {"copy_tb_s": 2 * source.nbytes / copied / 1e9, "bf16_tflop_s": 2 * 8192**3 / multiplied / 1e9}


class _Nothing(torch.autograd.Function):
    """Nine inputs, two outputs, no work."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(*inputs)
        return inputs[0].new_empty(inputs[0].shape), inputs[1].new_empty(inputs[1].shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ctx.saved_tensors


def empty_call(device: torch.device) -> Callable[[], Any]:
    """Forward and backward through an ``autograd.Function`` of nine inputs that does nothing."""
    inputs = [torch.zeros(8, device=device, requires_grad=True) for _ in range(9)]
    grads = [torch.ones(8, device=device) for _ in range(2)]
    return lambda: torch.autograd.grad(_Nothing.apply(*inputs), inputs, grads)  # pyright: ignore[reportArgumentType]


def empty_function(device: torch.device) -> dict[str, float]:
    """Milliseconds of a step, launched from Python, through an ``autograd.Function`` of nine inputs that does nothing.

    What PyTorch itself costs a call whose backward pass is written in Python, on this machine: the least that the
    interaction can take without a graph.
    """
    call = empty_call(device)
    for _ in range(LAUNCHES):
        call()
    return {
        "launched_ms": measure_launched(call, device),
        "launched_one_thread_ms": measure_launched(call, device, one_thread=True),
    }


def wait(device: torch.device) -> None:
    """Until everything that was launched has run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _said(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
