"""Compiling kernels for cards that are not here, and reading back what they need.

What is compiled is what is launched: the launchers run on tensors without memory under a driver that compiles in
place of launching, so that types, alignment, tile sizes and flags are those of the real call::

    python -m epic_fast.testing.aot attention interaction --target cuda:90 --dtype bf16

It needs triton, but no GPU; not the interpreter either (``TRITON_INTERPRET=0``).
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from epic_fast.testing.cases import (
    ATTENTION_MEASURED,
    ATTENTION_PRODUCTION,
    GATE_MEASURED,
    GATE_PRODUCTION,
    INFUSED_MEASURED,
    INFUSED_PRODUCTION,
    INTERACTION_MEASURED,
    INTERACTION_PRODUCTION,
    MIX_MEASURED,
    MIX_PRODUCTION,
    ROUTE_PRODUCTION,
    SWIGLU_MEASURED,
    SWIGLU_PRODUCTION,
    WINDOW_MEASURED,
    WINDOW_PRODUCTION,
    AttentionCase,
    Case,
    GateCase,
    InfusedAttentionCase,
    InteractionCase,
    MixCase,
    RouteCase,
    SwigluCase,
    WindowCase,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
"""``tf32``: float32 where PyTorch's matrix products may use TF32."""


@dataclass(frozen=True)
class Target:
    """A card: the architecture, and what one block may have of it."""

    backend: str
    arch: int | str
    card: str
    shared: int
    processors: int

    @property
    def name(self) -> str:
        return f"{self.backend}:{self.arch}"

    @property
    def capability(self) -> tuple[int, int]:
        return divmod(self.arch, 10) if isinstance(self.arch, int) else (9, 4)

    @property
    def warp_size(self) -> int:
        return 32 if self.backend == "cuda" else 64


TARGETS = {
    each.name: each
    for each in (
        Target("cuda", 80, "A100", 166_912, 108),
        Target("cuda", 90, "H100", 232_448, 132),
        Target("cuda", 100, "B200", 232_448, 148),
        Target("hip", "gfx942", "MI300X", 65_536, 304),
    )
}
"""Shared memory that a block may have is in bytes, from the vendors' tables."""


@dataclass
class Build:
    """One kernel, compiled, and what it needs.

    Attributes:
        kernel, module: its name and where it stands.
        target, triton: for which card and by which release.
        registers: a thread's (on AMD: vector registers).
        spill_bytes: stored to and loaded from local memory because registers ran out (AMD: 4 a spilled register, if any
            went to memory).
        stack_bytes: local memory of a thread, spills included.
        shared: bytes of shared memory of a block.
        warps, stages: as launched.
        constants: the constexpr arguments.
        signature: type of each other argument; ``:16`` marks what is known to be divisible by 16.
        launches: the calls that launch it.
        seconds: of compilation.
    """

    kernel: str
    module: str
    target: str
    triton: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared: int
    warps: int
    stages: int
    constants: dict[str, Any] = field(default_factory=dict)
    signature: dict[str, str] = field(default_factory=dict)
    launches: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether a block of the card has that much shared memory."""
        return self.shared <= TARGETS[self.target].shared

    @property
    def problems(self) -> list[str]:
        """Why it cannot be shipped for a production shape."""
        found = []
        if self.spill_bytes:
            found.append(f"{self.spill_bytes} bytes spilled ({self.registers} registers, {self.stack_bytes} of stack)")
        if not self.fits:
            found.append(f"{self.shared} bytes of shared memory; a block has {TARGETS[self.target].shared}")
        return [f"{self.kernel} for {self.target}, {each}: {', '.join(self.launches)}" for each in found]


class _Driver:
    """Stands where triton looks for the GPU."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(target.backend, target.arch, target.warp_size)
        properties = {
            "max_shared_mem": target.shared,
            "multiprocessor_count": target.processors,
            "warpSize": target.warp_size,
            "max_num_regs": 65_536,
        }
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class _OnCard(TorchFunctionMode):
    """Tensors on the device "meta" say that they are on the first GPU, and new ones asked for there are "meta"."""

    _GPU = torch.device("cuda", 0)
    _ANSWERS: ClassVar[dict[Any, Any]] = {
        inspect.getattr_static(torch.Tensor, "device").__get__: _GPU,
        inspect.getattr_static(torch.Tensor, "is_cuda").__get__: True,
        inspect.getattr_static(torch.Tensor, "is_cpu").__get__: False,
        inspect.getattr_static(torch.Tensor, "is_meta").__get__: False,
        torch.Tensor.get_device: 0,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._ANSWERS:
            return self._ANSWERS[func]
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        return func(*map(_off_card, args), **{name: _off_card(each) for name, each in (kwargs or {}).items()})


def _off_card(value: Any) -> Any:
    if isinstance(value, torch.device | str) and str(value).startswith("cuda"):
        return torch.device("meta")
    return value


_SOME_ADDRESS = 1 << 44


@contextlib.contextmanager
def recorded_launches(target: Target) -> Iterator[list[Build]]:
    """While it holds, tensors on "meta" pass for tensors on this card, and launches compile and are listed.

    One process may pretend to have one card only: launchers remember what they asked it.
    """
    from triton import knobs
    from triton.compiler import CompiledKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from epic_fast.kernels.common import launch, plan  # pyright: ignore[reportMissingImports]

    if knobs.runtime.interpret:
        raise RuntimeError(
            "the interpreter is on, and it compiles nothing; set TRITON_INTERPRET=0 before Python starts"
        )
    builds: list[Build] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        start = time.perf_counter()
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        builds.append(describe(compiled, target, time.perf_counter() - start))
        return compiled

    def again(compiled: Any) -> Callable[..., None]:
        """In place of launching a compiled kernel that somebody kept."""

        def launch(*launched: Any) -> None:
            arguments = launched[-len(compiled.src.fn.arg_names) :]
            options = {
                name: value
                for name in ("num_stages", "num_ctas", "maxnreg")
                if (value := getattr(compiled.metadata, name, None)) is not None
            }
            # The metadata counts the warps of all partitions.
            warps = re.search(r'"ttg.num-warps" = (\d+)', compiled.asm["ttgir"])
            options["num_warps"] = int(warps[1]) if warps else compiled.metadata.num_warps
            fresh = run(compiled.src.fn, *arguments, grid=(1,), warmup=True, **options)
            if fresh is None or fresh.hash != compiled.hash:
                raise AssertionError(
                    f"{compiled.name} is launched again for arguments that it was not compiled for:\n"
                    f"  kept: {_specialisation(compiled)}\n  needed: {fresh and _specialisation(fresh)}"
                )
            builds.append(describe(compiled, target))

        return launch

    major, minor = target.capability
    properties = SimpleNamespace(
        name=target.card,
        major=major,
        minor=minor,
        multi_processor_count=target.processors,
        shared_memory_per_block=min(target.shared, 49_152),
        shared_memory_per_block_optin=target.shared,
        shared_memory_per_multiprocessor=target.shared,
        total_memory=64 << 30,
        warp_size=target.warp_size,
        gcnArchName=str(target.arch),
    )
    answers: dict[str, Callable[..., Any]] = {
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: target.capability,
        "get_device_name": lambda device=None: target.card,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": lambda device=None: contextlib.nullcontext(),
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch.version, "hip", "6.4" if target.backend == "hip" else None))
        stack.enter_context(
            mock.patch.object(
                torch.Tensor,
                "data_ptr",
                lambda self: _SOME_ADDRESS + self.storage_offset() * self.element_size(),
            )
        )
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        stack.enter_context(mock.patch.object(CompiledKernel, "run", property(again)))
        # `again` has to see tensors, not what stands for them.
        stack.enter_context(mock.patch.object(launch, "addresses", tuple))
        stack.enter_context(mock.patch.object(plan, "DIRECT", False))
        stack.enter_context(mock.patch.object(driver, "_active", _Driver(target)))
        stack.enter_context(_OnCard())
        yield builds


def describe(compiled: Any, target: Target, seconds: float = 0.0) -> Build:
    """Reads registers, spills and shared memory off a compiled kernel."""
    import triton

    function, metadata = compiled.src.fn, compiled.metadata
    names = list(function.arg_names)
    constants = {names[path[0]]: _readable(value) for path, value in compiled.src.constants.items()}
    aligned = {path[0] for path, each in compiled.src.attrs.items() if ["tt.divisibility", 16] in each}
    read = _read_nvidia if target.backend == "cuda" else _read_amd
    registers, spilled, stack = read(compiled, target)
    return Build(
        kernel=compiled.name,
        module=function.module,
        target=target.name,
        triton=triton.__version__,
        registers=registers,
        spill_bytes=spilled,
        stack_bytes=stack,
        shared=metadata.shared,
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        constants=constants,
        signature={
            name: f"{kind}{':16' if index in aligned else ''}"
            for index, (name, kind) in enumerate(compiled.src.signature.items())
            if name not in constants
        },
        seconds=round(seconds, 2),
    )


def _specialisation(compiled: Any) -> str:
    return f"{compiled.src.signature} {compiled.src.attrs} {compiled.src.constants}"


def _readable(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else str(value)


def _read_nvidia(compiled: Any, target: Target) -> tuple[int, int, int]:
    """Registers, spilled bytes and stack, by the tools that triton carries: those of the very binary."""
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        binary, source = os.path.join(folder, "kernel.cubin"), os.path.join(folder, "kernel.ptx")
        with open(binary, "wb") as file:
            file.write(compiled.asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", binary)
        counts = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        stack = counts["STACK"] + counts["LOCAL"]
        spilled = 0
        if stack:  # there is no spilling without it
            with open(source, "w") as file:
                file.write(compiled.asm["ptx"])
            arch = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)
            assert arch is not None
            assembler = get_ptxas(int(target.arch)).path  # the one that knows the version of this PTX
            said = _output(assembler, "-v", f"--gpu-name={arch[1]}", source, "-o", os.path.join(folder, "again"))
            spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill", said))
    return counts["REG"], spilled, stack


def _read_amd(compiled: Any, target: Target) -> tuple[int, int, int]:
    said = {
        name: int(number) for name, number in re.findall(r"\.(\w+):\s+(\d+)$", compiled.asm["amdgcn"], re.MULTILINE)
    }
    stack = said["private_segment_fixed_size"]
    # Without memory of its own a thread's spills went into other registers: scalars into lanes, vectors into AGPRs.
    spilled = 4 * (said["vgpr_spill_count"] + said["sgpr_spill_count"]) if stack else 0
    return said["vgpr_count"], spilled, stack


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_kernel(
    kernel: str,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    target: Target,
    *,
    aligned: Sequence[str] = (),
    warps: int = 4,
    stages: int = 3,
) -> Build:
    """Compiles one kernel by hand.

    Args:
        kernel: ``module:name``.
        signature: type of each argument as triton writes it: ``*bf16``, ``i32``, ``fp32``.
        constants: the constexpr arguments.
        target: the card.
        aligned: arguments that are divisible by 16.
        warps, stages: options of the launch.
    """
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = kernel.partition(":")
    function = getattr(importlib.import_module(module), name)
    source = ASTSource(
        function,
        {each: "constexpr" if each in constants else signature[each] for each in function.arg_names},
        constexprs={(function.arg_names.index(each),): value for each, value in constants.items()},
        attrs={(function.arg_names.index(each),): [["tt.divisibility", 16]] for each in aligned},
    )
    start = time.perf_counter()
    compiled = triton.compile(
        source,
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options={"num_warps": warps, "num_stages": stages},
    )
    return describe(compiled, target, time.perf_counter() - start)


def launch_attention(case: AttentionCase, dtype: torch.dtype) -> None:
    """Forward and backward on tensors without memory: the kernels that this card is given, and the portable ones."""
    from epic_fast.kernels.prompt_attention import (  # pyright: ignore[reportMissingImports]
        launchers,
        triton_backward,
        triton_forward,
    )

    inputs = tuple(case.make(dtype, "meta").values())
    lengths = case.options("meta")["lengths"]
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    flags = {"prefix": case.prompt_mask == "prefix", "causal": case.causal, "scale": scale}
    needs = tuple(each is not None for each in inputs)
    for forwards, backwards in ((launchers, launchers), (triton_forward, triton_backward)):
        output, prompt_output, lse = forwards.prompt_attention_forward(*inputs, lengths, **flags)
        results = (output, prompt_output, lse)
        backwards.prompt_attention_backward(output, prompt_output, *inputs, lengths, *results, **flags, needs=needs)


def launch_interaction(case: InteractionCase, dtype: torch.dtype) -> None:
    """Forward and backward launchers on tensors without memory."""
    from epic_fast.kernels.prompt_interaction.triton_backward import (  # pyright: ignore[reportMissingImports]
        prompt_interaction_backward,
    )
    from epic_fast.kernels.prompt_interaction.triton_forward import (  # pyright: ignore[reportMissingImports]
        prompt_interaction_forward,
    )

    inputs = tuple(case.make(dtype, "meta").values())
    outputs = prompt_interaction_forward(*inputs, eps=1e-8)
    prompt_interaction_backward(*outputs, *inputs, eps=1e-8, needs=(True,) * len(inputs))


def launch_windows(case: WindowCase, dtype: torch.dtype) -> None:
    """Forward and backward launchers on tensors without memory; backward also for what a first block needs: prompts."""
    from epic_fast.kernels.window_prompt_attention.triton_backward import (  # pyright: ignore[reportMissingImports]
        window_prompt_attention_backward,
    )
    from epic_fast.kernels.window_prompt_attention.triton_forward import (  # pyright: ignore[reportMissingImports]
        window_prompt_attention_forward,
    )

    made, options = case.make(dtype, "meta"), case.options("meta")
    bias = made.pop("relative_position_bias") if case.bias_gradient else options["relative_position_bias"]
    given = (*made.values(), bias, options["window_mask"])
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    window_prompt_attention_forward(*given, scale=scale, save_lse=False)
    output, prompt_output, lse = window_prompt_attention_forward(*given, scale=scale)
    grads = torch.empty_like(output), torch.empty_like(prompt_output)
    for tokens in (True, False):
        needs = (tokens,) * 3 + (True,) * 3 + (case.bias_gradient,)
        window_prompt_attention_backward(*grads, *given, lse, scale=scale, needs=needs)


def launch_experts(case: MixCase, dtype: torch.dtype) -> None:
    """Forward and backward launchers on tensors without memory."""
    from epic_fast.kernels.mix_prompt_experts.triton_backward import (  # pyright: ignore[reportMissingImports]
        mix_prompt_experts_backward,
    )
    from epic_fast.kernels.mix_prompt_experts.triton_forward import (  # pyright: ignore[reportMissingImports]
        mix_prompt_experts_forward,
    )

    inputs, options = tuple(case.make(dtype, "meta").values()), case.options("meta")
    outputs = mix_prompt_experts_forward(*inputs, **options)
    mix_prompt_experts_backward(*outputs, *inputs, **options, needs=(True, True))


def launch_routing(case: RouteCase, dtype: torch.dtype) -> None:
    """The launchers on tensors without memory, with parameters in the type of the rows and in float32, and routing
    again with products that start anywhere."""
    from epic_fast.kernels.route_prompts.triton_forward import (  # pyright: ignore[reportMissingImports]
        route_prompts,
    )
    from epic_fast.kernels.route_prompts.triton_through import probe_through  # pyright: ignore[reportMissingImports]

    for kind in dict.fromkeys((dtype, torch.float32)):
        given = case.make(kind, "meta")
        if case.own:
            probes = [torch.empty(case.own, case.width, dtype=kind, device="meta") for _ in range(9)]
            weights = [torch.empty(case.width, 4 * case.width, dtype=dtype, device="meta") for _ in range(9)]
            probe_through(probes, weights)
        route_prompts(*case.targets(dtype, "meta"), **given, **case.options("meta"))
        if given["token_dots"] is not None:
            joined = torch.cat([given["prompt_dots"], given["token_dots"]], dim=1)
            given |= {"prompt_dots": joined[:, :13], "token_dots": joined[:, 13:]}
            route_prompts(*case.targets(dtype, "meta"), **given, **case.options("meta"))


def launch_infused_attention(case: InfusedAttentionCase, dtype: torch.dtype) -> None:
    """Forward and backward launchers on tensors without memory: everything with a gradient, and what the first infused
    layer needs, where only the vectors have one."""
    from epic_fast.kernels.infused_attention.triton_backward import (  # pyright: ignore[reportMissingImports]
        infused_attention_backward,
    )
    from epic_fast.kernels.infused_attention.triton_forward import (  # pyright: ignore[reportMissingImports]
        infused_attention_forward,
    )

    inputs, lengths = tuple(case.make(dtype, "meta").values()), case.options("meta")["lengths"]
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    flags = {"replace": case.form == "replace", "causal": case.causal, "scale": scale}
    infused_attention_forward(*inputs, lengths, **flags, save_lse=False)
    output, lse = infused_attention_forward(*inputs, lengths, **flags)
    grad = torch.empty_like(output)
    for rows in (True, False):
        infused_attention_backward(grad, *inputs, lengths, lse, **flags, needs=(rows,) * 3 + (True,) * 4)


def launch_gate(case: GateCase, dtype: torch.dtype) -> None:
    """Forward and backward launchers on tensors without memory, with and without a gradient of the values."""
    from epic_fast.kernels.infusion_gate.triton_kernels import (  # pyright: ignore[reportMissingImports]
        infusion_gate_backward,
        infusion_gate_forward,
    )

    inputs, lengths = tuple(case.make(dtype, "meta").values()), case.options("meta")["lengths"]
    infusion_gate_forward(*inputs, lengths, save=False)
    gate, *statistics = infusion_gate_forward(*inputs, lengths)
    infusion_gate_backward(gate, *inputs, lengths, *statistics, needs=(True, True, True))
    infusion_gate_backward(gate, None, *inputs[1:], None, *statistics, needs=(False, True, True))


def launch_swiglu(case: SwigluCase, dtype: torch.dtype) -> None:
    """Forward and backward launchers on tensors without memory, with and without gradients of the projections."""
    from epic_fast.kernels.infused_swiglu.triton_kernels import (  # pyright: ignore[reportMissingImports]
        infused_swiglu_backward,
        infused_swiglu_forward,
    )

    gate, up, multiplier = tuple(case.make(dtype, "meta").values())
    hidden, kind = infused_swiglu_forward(gate, up, multiplier), torch.float32 if case.wide_vectors else dtype
    for projections in (True, False):
        needs = (projections, projections, True)
        infused_swiglu_backward(hidden, gate, up, multiplier, multiplier_dtype=kind, needs=needs)


@dataclass(frozen=True)
class RowsCase:
    """Rows of a frozen layer, ``(batch, rows, width)``; the first half of each sample's rows as a slice as well."""

    batch: int
    rows: int
    width: int
    name: str


def launch_norm(case: RowsCase, dtype: torch.dtype) -> None:
    """Residual sum and layer norm on tensors without memory: whole and sliced, with and without a branch, in
    8 bits; and the RMS norm."""
    from epic_fast.kernels.residual_norm.triton_backward import (  # pyright: ignore[reportMissingImports]
        moved_norm_backward,
        residual_norm_backward,
    )
    from epic_fast.kernels.residual_norm.triton_forward import (  # pyright: ignore[reportMissingImports]
        moved_norm_forward,
        residual_norm_forward,
    )

    weight = torch.empty(case.width, dtype=dtype, device="meta")
    branch = torch.empty(case.batch, case.rows, case.width, dtype=dtype, device="meta")
    for kind in dict.fromkeys((dtype, torch.float32)):
        whole = branch.to(kind)
        for stream, other in ((whole, branch), (whole[:, : case.rows // 2], None), (whole, None)):
            for eight_bit in _eight_bit_types():
                total, _, mean, rstd, _ = residual_norm_forward(
                    stream, other, weight, weight, 1e-5, normed_dtype=dtype, eight_bit=eight_bit
                )
                _, _, data, step, _, _ = residual_norm_forward(
                    stream, other, weight, weight, 1e-5, normed_dtype=dtype, eight_bit=eight_bit, keep=True
                )
            grad = torch.empty(total.shape, dtype=dtype, device="meta")
            above = None if other is None else total
            residual_norm_backward(grad, above, total, weight, mean, rstd)
            residual_norm_backward(grad, above, data, weight, step, rstd, grad_dtype=total.dtype)
            total, _, mean, rstd, _ = residual_norm_forward(stream, other, weight, None, 1e-5, normed_dtype=dtype)
            residual_norm_backward(grad, above, total, weight, mean, rstd)
        rows = whole.flatten(0, 1)
        order = torch.empty(len(rows), dtype=torch.int64, device="meta")
        probe = torch.empty(2, case.width, device="meta")
        for keep in (False, True):
            _, _, kept, mean, rstd, _ = moved_norm_forward(
                rows, None, weight, weight, 1e-5, normed_at=order, probe=probe, normed_dtype=dtype, keep=keep
            )
            moved_norm_forward(
                rows, branch.flatten(0, 1), weight, weight, 1e-5, branch_at=order, normed_dtype=dtype, keep=keep
            )
            if not keep:
                ends = torch.empty(case.batch, 4 * case.width, dtype=dtype, device="meta")
                through = torch.empty(2, 4 * case.width, device="meta")
                before = branch.flatten(0, 1)[: -len(ends)]
                moved_norm_forward(
                    *(rows, before, weight, weight, 1e-5),
                    normed_at=order,
                    probe=probe,
                    ended=(ends, through, weight),
                    normed_dtype=dtype,
                )
            grad = torch.empty(rows.shape, dtype=dtype, device="meta")
            for places in ({"normed_at": order}, {"moved_at": order, "moved_dtype": dtype}):
                moved_norm_backward(grad, rows, kept, weight, mean, rstd, grad_dtype=kind, **places)


def launch_rotary(case: RowsCase, dtype: torch.dtype) -> None:
    """Packed heads of 128 channels on tensors without memory: as many key heads as query heads, a quarter, none."""
    from epic_fast.kernels.rotary.triton_kernels import (  # pyright: ignore[reportMissingImports]
        join_rotated_back,
        rotate_heads,
    )

    depth = 128
    queries = case.width // depth
    for keys in (queries, queries // 4):
        table = torch.empty(case.rows, depth, dtype=dtype, device="meta")
        for heads in (queries, 0):
            rows = torch.empty(case.batch, case.rows, heads + 2 * keys, depth, dtype=dtype, device="meta")
            rotate_heads(rows, table, table, heads + keys)
            query, key, value = rows.transpose(1, 2).split([heads, keys, keys], dim=1)
            join_rotated_back(query if heads else None, key, value, table, table)


def launch_activation(case: RowsCase, dtype: torch.dtype) -> None:
    """Every activation on tensors without memory, forward and backward, for all that can be kept, and in 8 bits."""
    from epic_fast.kernels.activation.reference import ACTIVATIONS, KEEPS  # pyright: ignore[reportMissingImports]
    from epic_fast.kernels.activation.triton_kernels import (  # pyright: ignore[reportMissingImports]
        activation_backward,
        activation_backward_8bit,
        activation_forward,
    )

    pre = torch.empty(case.batch * case.rows, case.width, dtype=dtype, device="meta")
    for kind in ACTIVATIONS:
        for keep in KEEPS:
            for eight_bit in _eight_bit_types():
                _, kept, _ = activation_forward(pre, kind, keep=keep, eight_bit=eight_bit)
            if kept is not None:
                activation_backward(pre, kept, kind, keep)
                for eight_bit in filter(None, _eight_bit_types()):
                    activation_backward_8bit(pre, kept, kind, keep, eight_bit)


def launch_linear(case: RowsCase, dtype: torch.dtype) -> None:
    """The MLP's products on tensors without memory: forward and backward for all that can be kept, and in 8 bits."""
    from epic_fast.kernels.frozen_linear import (  # pyright: ignore[reportMissingImports]
        reference,
        triton_product,
        triton_quantise,
    )

    rows, width, hidden = case.batch * case.rows, case.width, 4 * case.width
    stream = torch.empty(rows, width, dtype=dtype, device="meta")
    up = torch.empty(hidden, width, dtype=dtype, device="meta")
    bias = torch.empty(hidden, dtype=dtype, device="meta")
    kinds = [kind for kind in _eight_bit_types() if kind and not (kind == "fp8" and torch.version.hip)]
    quantised = {kind: triton_quantise.quantise_rows(stream, kind) for kind in kinds}
    product = triton_product.product
    for keep in reference.KEEPS:
        _, kept = product(stream, up, bias=bias, activation="quick_gelu", keep=keep)
        if kept is not None:
            product(stream, up.t().contiguous(), depth_last=False, kept=kept, keep=keep, activation="quick_gelu")
    for data, scale in quantised.values():
        weight = torch.empty(up.shape, dtype=data.dtype, device="meta")
        scales = (scale, torch.empty(hidden, device="meta"))
        for keep in reference.KEEPS:
            options = {"activation": "quick_gelu", "keep": keep, "scales": scales, "out_dtype": dtype}
            _, kept = product(data, weight, bias=bias, **options)
            if kept is not None:
                product(data, weight, kept=kept, **options)


def _eight_bit_types() -> tuple[str | None, ...]:
    """What this card can write."""
    fp8 = torch.version.hip is not None or torch.cuda.get_device_capability() >= (8, 9)
    return ("fp8", "int8", None) if fp8 else ("int8", None)


def _variants(case: AttentionCase) -> tuple[AttentionCase, ...]:
    """The call as a tower makes it, and with what EPIC's options change; masks matter where the text tower is."""
    case = replace(case, layout="tokens")
    lengths = tuple(case.tokens - each for each in range(case.batch))
    common = (case, replace(case, shared=True, lengths=lengths, name=f"{case.name}, shared prompts, lengths"))
    if not case.causal:
        return common
    return (
        *common,
        replace(case, layout="packed", name=f"{case.name}, packed"),
        replace(case, prompt_mask="prefix", name=f"{case.name}, prefix mask"),
        replace(case, prefix_tuning=True, name=f"{case.name}, prefix tuning"),
    )


OPERATIONS: dict[str, tuple[Callable[[Any, torch.dtype], None], tuple[Case | RouteCase | RowsCase, ...]]] = {
    "attention": (
        launch_attention,
        (*ATTENTION_MEASURED, *(variant for case in ATTENTION_PRODUCTION for variant in _variants(case))),
    ),
    "interaction": (launch_interaction, (*INTERACTION_MEASURED, *INTERACTION_PRODUCTION)),
    "windows": (launch_windows, (*WINDOW_MEASURED, *WINDOW_PRODUCTION)),
    "experts": (launch_experts, (*MIX_MEASURED, *MIX_PRODUCTION)),
    "routing": (launch_routing, ROUTE_PRODUCTION),
    "infused": (launch_infused_attention, (*INFUSED_MEASURED, *INFUSED_PRODUCTION)),
    "gate": (launch_gate, (*GATE_MEASURED, *GATE_PRODUCTION)),
    "swiglu": (launch_swiglu, (*SWIGLU_MEASURED, *SWIGLU_PRODUCTION)),
    "rotary": (launch_rotary, (RowsCase(8, 40, 4096, "LLaMA-2-7B, n 40"),)),
    "norm": (
        launch_norm,
        (
            RowsCase(64, 265, 1024, "vision L/14"),
            RowsCase(64, 85, 768, "text L/14"),
            RowsCase(8, 265, 4096, "width 4096"),
        ),
    ),
    "activation": (
        launch_activation,
        (
            RowsCase(64, 265, 4096, "vision L/14"),
            RowsCase(64, 85, 3072, "text L/14"),
            RowsCase(8, 265, 768, "width 768"),
            RowsCase(8, 265, 1024, "width 1024"),
        ),
    ),
    "linear": (
        launch_linear,
        (
            RowsCase(64, 265, 1024, "vision L/14"),
            RowsCase(8, 265, 1024, "vision L/14, 8 samples"),
            RowsCase(64, 85, 768, "text L/14"),
        ),
    ),
    "attention-wide": (
        launch_attention,
        tuple(AttentionCase(2, 4, 257, 16, head_dim, name=f"head_dim {head_dim}") for head_dim in (80, 128, 256)),
    ),
    "infused-wide": (
        launch_infused_attention,
        tuple(
            InfusedAttentionCase(2, 4, 2, tokens, head_dim, name=f"head_dim {head_dim}, n={tokens}")
            for head_dim in (80, 256)
            for tokens in (48, 200)
        ),
    ),
    "windows-wide": (
        launch_windows,
        (
            *(WindowCase(2, 4, 4, 49, 13, head_dim, name=f"head_dim {head_dim}") for head_dim in (64, 80, 128)),
            WindowCase(2, 4, 4, 49, 13, bias_gradient=True, name="bias with a gradient"),
            WindowCase(2, 4, 4, 144, 256, mask=True, name="256 prompts"),
        ),
    ),
}
"""What ``build_production`` launches.  Heads beyond CLIP's are no production shape: they may spill, but must fit."""


def build_production(operation: str, target: Target, dtypes: Iterable[str] = ("bf16",)) -> list[Build]:
    """Every kernel that an operation launches at the production shapes, each once, in this process."""
    launch, cases = OPERATIONS[operation]
    found: dict[str, Build] = {}
    for kind in dtypes:
        for case in cases:
            with recorded_launches(target) as builds, _products_in(kind):
                launch(case, DTYPES[kind])
            for build in builds:
                key = json.dumps([build.kernel, build.constants, build.signature, build.warps, build.stages])
                found.setdefault(key, build).launches.append(f"{case.name} ({kind})")
    for build in found.values():
        build.launches = list(dict.fromkeys(build.launches))
    return list(found.values())


@contextlib.contextmanager
def _products_in(kind: str) -> Iterator[None]:
    settings: Any = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def build_production_elsewhere(operation: str, target: str, dtypes: Iterable[str] = ("bf16",)) -> list[Build]:
    """:func:`build_production` in a process of its own, where the interpreter is off."""
    done = subprocess.run(
        [sys.executable, "-m", "epic_fast.testing.aot", operation, "--target", target, "--dtype", *dtypes, "--json"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"compiling {operation} for {target} failed:\n{done.stdout[-2000:]}{done.stderr[-6000:]}")
    return [Build(**row) for row in json.loads(done.stdout)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 if something spills or does not fit."""
    parser = argparse.ArgumentParser(prog="python -m epic_fast.testing.aot", description=__doc__)
    parser.add_argument("operations", nargs="+", choices=OPERATIONS)
    parser.add_argument("--target", default="cuda:90", choices=TARGETS)
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    builds = [
        build
        for operation in given.operations
        for build in build_production(operation, TARGETS[given.target], given.dtype)
    ]
    if given.json:
        print(json.dumps([asdict(build) for build in builds]))
        return 0
    for build in builds:
        print(
            f"{build.kernel} {build.target}: {build.registers} registers, {build.spill_bytes} spilled, "
            f"{build.shared} shared, {build.warps} warps, {build.stages} stages, {build.seconds} s\n"
            f"  {build.constants}\n  {'; '.join(build.launches)}"
        )
    problems = [problem for build in builds for problem in build.problems]
    print("\n".join(problems) or f"{len(builds)} kernels, no spill, all fit", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
