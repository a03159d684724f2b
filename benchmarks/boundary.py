"""What each way to put Python behind PyTorch costs a call, where nothing is computed.

    python -m benchmarks.boundary --output benchmarks/results/boundary.jsonl     # a CPU will do
    python -m benchmarks.boundary --line benchmarks/results/boundary.jsonl       # the line of docs/speed.md

Nine tensors come in, as for the interaction; the implementation makes two empty ones, its backward pass nine.  What
differs is only what stands between the caller and the implementation.  Everybody is timed in each round, in another
order (:func:`benchmarks.launches.rounds`); a row has the medians over rounds of its time and of its ratio to the
package's own way in the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.launches import MODES, Timed, rounds
from benchmarks.run import append, read

INPUTS, SIZE = 9, 8
ROUNDS, CALLS = 21, 300
OURS = "library"
WAYS = {
    "direct": "the launcher, called directly",
    "function": "an autograd.Function alone",
    OURS: "operators of torch.library.Library below an autograd.Function",
    "library-registered": "the same operators with torch.library.register_autograd",
    "custom_op": "torch.library.custom_op with register_autograd",
}
Way = tuple[Callable[..., Any], Callable[..., Any]]
_NAMES = ", ".join(f"Tensor x{number}" for number in range(INPUTS))
_NAMES_LIST = "Tensor g0, Tensor g1, " + _NAMES


def launch(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The forward launcher that launches nothing."""
    return inputs[0].new_empty(inputs[0].shape), inputs[1].new_empty(inputs[1].shape)


def launch_backward(first: Tensor, second: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The backward launcher that launches nothing."""
    return tuple(each.new_empty(each.shape) for each in inputs)


def function_of(forward_of: Callable[..., Any], backward_of: Callable[..., Any]) -> Callable[..., Any]:
    """An ``autograd.Function`` over both."""

    class Boundary(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Any:
            ctx.save_for_backward(*inputs)
            return forward_of(*inputs)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return tuple(backward_of(*grads, *ctx.saved_tensors))

    return Boundary.apply


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _defined(library: Any, suffix: str) -> Way:
    """Operators as ``epic_fast.ops.library.register`` makes them: schema, implementation, fake."""
    found = []
    returns = {"forward": "(Tensor, Tensor)", "backward": f"({', '.join(['Tensor'] * INPUTS)})"}
    for name, implementation in {"forward": launch, "backward": launch_backward}.items():
        own, names = f"{name}{suffix}", _NAMES if name == "forward" else _NAMES_LIST
        library.define(f"{own}({names}) -> {returns[name]}", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(own, implementation, "CPU")
        torch.library.register_fake(f"epic_fast_boundary::{own}", implementation, lib=library)
        found.append(getattr(torch.ops.epic_fast_boundary, own).default)
    return found[0], found[1]


def _custom() -> Callable[..., Any]:
    def own(name: str, implementation: Callable[..., Any], names: str, returns: str) -> Any:
        made = torch.library.custom_op(
            f"epic_fast_boundary_custom::{name}", implementation, mutates_args=(), schema=f"({names}) -> {returns}"
        )
        made.register_fake(implementation)
        return made

    forward = own("forward", launch, _NAMES, "(Tensor, Tensor)")
    backward = own("backward", launch_backward, _NAMES_LIST, f"({', '.join(['Tensor'] * INPUTS)})")
    forward.register_autograd(lambda ctx, *grads: backward(*grads, *ctx.saved_tensors), setup_context=_save)
    return forward


def ways() -> tuple[dict[str, Callable[..., Any]], list[Any]]:
    """Each way's callable, and what has to live as long as they do."""
    library = torch.library.Library("epic_fast_boundary", "FRAGMENT")
    forward, backward = _defined(library, "")
    registered, registered_backward = _defined(library, "_registered")
    torch.library.register_autograd(
        "epic_fast_boundary::forward_registered",
        lambda ctx, *grads: registered_backward(*grads, *ctx.saved_tensors),
        setup_context=_save,
        lib=library,
    )
    made = {
        "direct": launch,
        "function": function_of(launch, launch_backward),
        OURS: function_of(forward, backward),
        "library-registered": registered,
        "custom_op": _custom(),
    }
    return made, [library]


def measure(*, count: int, calls: int) -> list[dict[str, Any]]:
    """A row for each way and mode: without gradients, and forward with backward."""
    made, alive = ways()
    inputs = [torch.zeros(SIZE, requires_grad=True) for _ in range(INPUTS)]
    grads = [torch.ones(SIZE) for _ in range(2)]
    plain = [each.detach() for each in inputs]

    def call_of(name: str, mode: str) -> Callable[[], Any]:
        call = made[name]
        if mode == "forward":
            return lambda: call(*plain)
        if name == "direct":
            return lambda: (call(*plain), launch_backward(*grads, *plain))
        return lambda: torch.autograd.grad(call(*inputs), inputs, grads)

    rows = []
    for mode in MODES:
        everybody = [Timed(name, WAYS[name], False, contextlib.nullcontext, call_of(name, mode), []) for name in made]
        rounds(everybody, torch.device("cpu"), count=count, calls=calls)
        ours = next(each for each in everybody if each.name == OURS)
        rows += [
            {
                "kind": "boundary",
                "way": each.name,
                "label": each.label,
                "mode": mode,
                "inputs": INPUTS,
                "us": 1e3 * statistics.median(each.times),
                "fastest_us": 1e3 * min(each.times),
                "of_ours": each.of(ours),
                "rounds": count,
                "calls": calls,
                "threads": torch.get_num_threads(),
            }
            for each in everybody
        ]
    del alive
    return rows


def line(rows: Sequence[dict[str, Any]]) -> str:
    """What docs/speed.md says: microseconds without gradients, and forward with backward."""
    said = []
    for way, label in WAYS.items():
        forward, both = (
            next(row for row in rows if (row["way"], row["mode"]) == (way, mode)) for mode in ("forward", MODES[-1])
        )
        said.append(f"{label} {forward['us']:.0f} and {both['us']:.0f} µs")
    return "; ".join(said)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.boundary", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="append rows of JSON here")
    parser.add_argument("--line", type=Path, metavar="FILE", help="print the line of these rows")
    parser.add_argument("--smoke", action="store_true", help="a few calls: does everything run?")
    given = parser.parse_args(arguments)
    if given.line is not None:
        print(line(read(given.line)))
        return 0
    run = timing.machine(" ".join(["python -m benchmarks.boundary", *arguments]))
    rows = measure(count=3 if given.smoke else ROUNDS, calls=2 if given.smoke else CALLS)
    for row in rows:
        append(given.output, {**row, "run": run})
    print(line(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
