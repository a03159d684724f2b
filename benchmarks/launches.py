"""What a call costs where Python launches one after the other: everybody in turn, round after round.

    python -m benchmarks.launches --output benchmarks/results/launches.jsonl     # a GPU
    python -m benchmarks.launches --table benchmarks/results/launches.jsonl      # the table of docs/speed.md
    python -m benchmarks.launches --smoke                                        # does everything run?

On a shared machine Python takes twice as long in one minute as in another, so that times that were taken one after the
other say little about each other.  Here a round times every provider, each time in another order, and a row has the
median over rounds of its time and of its ratio to ours in the same round.  Ours stands there twice: compiled
(``epic-fast native``, which is built if it is not there) and from Python; beside them an ``autograd.Function`` of nine
inputs that does nothing, PyTorch's own share.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.registry import OPERATIONS, OURS, CannotRun
from benchmarks.run import append, first_line, read
from epic_fast.ops import native

CASES = {"attention": ["text L", "vision L/14"], "interaction": ["L, B=64, P=8"]}
RIVALS = ("cat+sdpa", "sdpa-", "eager")
FROM_PYTHON, NOTHING = "ours-python", "nothing"
MODES = ("forward", "forward+backward")
ROUNDS, CALLS, WARM = 21, 20, 3


@dataclass
class Timed:
    """Somebody in the rounds."""

    name: str
    label: str
    in_place: bool
    settings: Callable[[], AbstractContextManager[Any]]
    run: Callable[[], Any]
    times: list[float]

    def of(self, other: Timed) -> float:
        """The median over rounds of the time in units of another's in the same round."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.times, other.times, strict=True))


def rounds(everybody: Sequence[Timed], device: torch.device, *, count: int, calls: int) -> None:
    """Time all of them ``count`` times, milliseconds a call, into their lists."""
    order = random.Random(0)
    for _ in range(count):
        for each in order.sample(everybody, len(everybody)):
            with each.settings():
                for _ in range(WARM):
                    each.run()
                timing.wait(device)
                start = time.perf_counter()
                for _ in range(calls):
                    each.run()
                timing.wait(device)
                each.times.append(1e3 * (time.perf_counter() - start) / calls)


def rows_of(
    name: str, case: Any, providers: Sequence[Any], device: torch.device, smoke: bool
) -> Iterator[dict[str, Any]]:
    """A row for everybody, mode and thread at a case."""
    dtype = torch.float32 if smoke else torch.bfloat16
    count, calls = (2, 1) if smoke else (ROUNDS, CALLS)
    prepared, skipped = [], []
    for provider in providers:
        try:
            call = provider.prepare(case, case.make(dtype, device), case.options(device))
            with call.settings():
                call.forward_backward()
            prepared.append((provider, call))
        except (CannotRun, RuntimeError, NotImplementedError) as reason:
            if provider.name == OURS:
                raise
            skipped.append((provider, first_line(reason)))
    common = {"operation": name, "case": case.name, "shape": case.row(), "dtype": str(dtype).removeprefix("torch.")}
    for provider, why in skipped:
        yield {**common, "provider": provider.name, "label": provider.label, "kind": "skipped", "why": why}
    for mode in MODES:
        for one_thread in (False, True) if mode != "forward" else (False,):
            everybody = []
            for provider, call in prepared:
                run = call.forward if mode == "forward" else call.forward_backward
                everybody.append(Timed(provider.name, provider.label, provider.in_place, call.settings, run, []))
                if provider.name == OURS:
                    label = f"{provider.label}, from Python"
                    everybody.append(Timed(FROM_PYTHON, label, False, native.left_out, run, []))
            if mode != "forward":
                nothing = timing.empty_call(device)
                everybody.append(
                    Timed(NOTHING, "a function that does nothing", False, contextlib.nullcontext, nothing, [])
                )
            with torch.autograd.set_multithreading_enabled(not one_thread):
                rounds(everybody, device, count=count, calls=calls)
            ours = next(each for each in everybody if each.name == OURS)
            for each in everybody:
                yield {
                    **common,
                    "kind": "launched",
                    "provider": each.name,
                    "label": each.label,
                    "in_place": each.in_place,
                    "mode": mode,
                    "one_thread": one_thread,
                    "ms": statistics.median(each.times),
                    "fastest_ms": min(each.times),
                    "of_ours": each.of(ours),
                    "rounds": count,
                }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each case, mode and provider."""
    lines = ["| launched, forward and backward | ms | times ours | in the calling thread, ms | times ours |"]
    lines.append("|---|---|---|---|---|")
    timed = [row for row in rows if row["kind"] == "launched" and row["mode"] == "forward+backward"]
    for case in dict.fromkeys(row["case"] for row in timed):
        here = [row for row in timed if row["case"] == case]
        for provider in dict.fromkeys(row["provider"] for row in here):
            cells = []
            for one_thread in (False, True):
                row = next(row for row in here if row["provider"] == provider and row["one_thread"] == one_thread)
                cells += [f"{row['ms']:.3f}", f"{row['of_ours']:.2f}×"]
            label = next(row["label"] for row in here if row["provider"] == provider)
            lines.append(f"| {case}: {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="append rows of JSON here")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of these rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: does everything run?")
    given = parser.parse_args(arguments)
    if given.table is not None:
        print(table(read(given.table)))
        return 0
    device, rows = torch.device(given.device), []
    if device.type == "cuda":
        native.build()
    run = timing.machine(" ".join(["python -m benchmarks.launches", *arguments]))
    for name, wanted in CASES.items():
        operation = OPERATIONS[name]
        cases = operation.smoke[:1] if given.smoke else [case for case in operation.cases if case.name in wanted]
        providers = [each for each in operation.providers if each.name == OURS or each.name.startswith(RIVALS)]
        for case in cases:
            for row in rows_of(name, case, providers, device, given.smoke):
                rows.append({**row, "run": run})
                append(given.output, rows[-1])
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
