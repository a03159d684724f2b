"""Speed and memory of the operations beside everything a user could pick in their place.

    python -m benchmarks.run attention --output benchmarks/results/attention.jsonl
    python -m benchmarks.run interaction --output benchmarks/results/interaction.jsonl
    python -m benchmarks.run windows --output benchmarks/results/windows.jsonl
    python -m benchmarks.run experts --output benchmarks/results/experts.jsonl
    python -m benchmarks.run infused --output benchmarks/results/infused.jsonl       # and gate, swiglu
    python -m benchmarks.run table benchmarks/results/attention.jsonl       # the tables of docs/speed.md

At every case ours is held against its error budget first (``epic_fast.testing.numerics``).  Where it fails, no
speed-up is printed, and the command ends with status 1.  A row is one case, provider and mode:

- ``p20_ms``, ``p50_ms``, ``p80_ms``: on the device, L2 flushed before each call (``triton.testing.do_bench``);
- ``launched_ms``: a call when Python launches one after the other; ``launched_one_thread_ms``: the same with the
  backward pass in the calling thread (``torch.autograd.set_multithreading_enabled(False)``), for everybody;
- ``graph_ms``: a call inside a CUDA graph;
- ``peak_mib``: memory that the call adds;
- ``floor_ms``: bytes moved once or products done, whichever takes longer, at the rates of a copy and a product in the
  same run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.registry import MODES, OPERATIONS, OURS, Call, CannotRun, Operation, Provider, as_tuple
from epic_fast.testing.cases import LAYOUTS, AttentionCase, Case, WindowCase
from epic_fast.testing.numerics import Measured, measure_operation

COLUMNS = ("p50_ms", "launched_ms", "launched_one_thread_ms", "graph_ms", "peak_mib")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def gate(operation: Operation, case: Case, dtype: torch.dtype, device: torch.device, impl: str) -> list[Measured]:
    """Ours against float64 at this case: every output and gradient."""
    return measure_operation(
        lambda **given: operation.function(**given, impl=impl),
        operation.reference,
        case.make(dtype, device),
        case.options(device),
        reduction=case.reductions,
        output_names=case.outputs,
    )


def measure(provider: Provider, call: Call, mode: str, device: torch.device) -> dict[str, Any]:
    """One row's numbers."""
    run = {"forward": call.forward, "forward+backward": call.forward_backward}.get(mode) or call.backward()
    p20, p50, p80 = timing.measure_device(run, device)
    row: dict[str, Any] = {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "launched_ms": None, "graph_ms": None}
    if mode != "backward":  # alone it is never launched, and cannot be captured apart from its forward pass
        row["launched_ms"] = timing.measure_launched(run, device)
        row["launched_one_thread_ms"] = timing.measure_launched(run, device, one_thread=True)
        try:
            row["graph_ms"] = timing.measure_graph(run, device)
        except RuntimeError as error:
            row["graph_problem"] = first_line(error)
            torch.cuda.synchronize(device)
    row["peak_mib"] = timing.measure_memory(run, device)
    if provider.name == OURS:
        row["kernels"] = timing.launched_kernels(run)
    return row


def rows_of(
    operation: Operation,
    cases: Sequence[Case],
    providers: Sequence[Provider],
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """The gate's row and then a row for every provider and mode, case by case."""
    for case in cases:
        common = {
            "operation": operation.name,
            "case": case.name,
            "shape": case.row(),
            "dtype": str(dtype).removeprefix("torch."),
        }
        if any(provider.name == OURS for provider in providers):
            tensors = gate(operation, case, dtype, device, "triton")
            worst = max(tensors, key=lambda each: each.max_error / each.max_budget if each.max_budget else 0.0)
            yield {
                **common,
                "kind": "gate",
                "passes": all(each.passes for each in tensors),
                "problems": [each.problem for each in tensors if not each.passes],
                "worst": worst.row(),
            }
            _free(device)
        for provider in providers:
            start = time.perf_counter()
            named = {
                **common,
                "provider": provider.name,
                "label": provider.label,
                "group": provider.group or provider.label,
                "in_place": provider.in_place,
            }
            try:
                call = provider.prepare(case, case.make(dtype, device), case.options(device))
                with call.settings():
                    check_same(operation, provider, case, call, dtype, device)
                    for mode in provider.modes:
                        yield {
                            **named,
                            "kind": "time",
                            "mode": mode,
                            "bytes": case.bytes_moved(dtype, mode),
                            "flops": case.flops(mode),
                            **measure(provider, call, mode, device),
                        }
            except CannotRun as reason:
                yield {**named, "kind": "skipped", "why": str(reason)}
            except (RuntimeError, NotImplementedError) as error:
                if provider.name == OURS:
                    raise
                yield {**named, "kind": "skipped", "why": first_line(error)}
            call = None
            _free(device)
            seconds = time.perf_counter() - start
            print(f"{operation.name}, {case.name}, {provider.name}: {seconds:.1f} s", file=sys.stderr, flush=True)


def check_same(
    operation: Operation, provider: Provider, case: Case, call: Call, dtype: torch.dtype, device: torch.device
) -> None:
    """A rival has to compute the operation; that its numbers are close enough to say so is all that is asked of it."""
    if provider.name == OURS or (isinstance(case, AttentionCase) and case.lengths is not None):
        return  # ours has its own gate; rivals leave something in rows past a length
    with torch.no_grad():
        wanted = operation.reference(**case.make(dtype, device), **case.options(device))
        found = call.outputs(call.forward())
    for want, got in zip(as_tuple(wanted), found, strict=True):
        if want is None or got is None or not want.numel():
            continue
        off = ((got - want).float().norm() / want.float().norm()).item()
        if not off < 0.02:
            raise CannotRun(f"it computes something else: {off:.3g} away, relative to the reference")


def floor_of(row: dict[str, Any], ceilings: dict[str, float] | None) -> dict[str, float]:
    """The time that the card itself needs for a row: its bytes moved once or its products done, the longer one."""
    if row["kind"] != "time" or ceilings is None or row["dtype"] == "float32":
        return {}
    moving, computing = row["bytes"] / ceilings["copy_tb_s"] / 1e9, row["flops"] / ceilings["bf16_tflop_s"] / 1e9
    return {"floor_ms": max(moving, computing)}


def first_line(error: BaseException) -> str:
    """What went wrong, without the traceback that PyTorch's compiler puts into its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def append(path: Path | None, row: dict[str, Any]) -> None:
    """One more line of a file, if there is to be one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


def read(*paths: str | Path) -> list[dict[str, Any]]:
    """The rows of these files."""
    return [json.loads(line) for path in paths for line in Path(path).read_text().splitlines() if line.strip()]


def cases_of(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """``(case, dtype)`` in the order of the rows."""
    return list(dict.fromkeys((row["case"], row["dtype"]) for row in rows))


def passes(rows: Sequence[dict[str, Any]], case: str, dtype: str) -> bool:
    """Whether ours kept its error budget at this case."""
    gates = [row for row in rows if row["kind"] == "gate" and (row["case"], row["dtype"]) == (case, dtype)]
    return bool(gates) and all(row["passes"] for row in gates)


def tables(rows: Sequence[dict[str, Any]], column: str = "p50_ms", *, every: bool = False) -> str:
    """Markdown: a table for each mode that has the column; cases down, providers across, factors of ours at the end.

    Kin (the backends of SDPA) share a column that shows the best of them, unless ``every``.  No factor stands where
    ours failed its error budget.
    """
    timed = [row for row in rows if row["kind"] == "time"]
    lines = []
    for mode in MODES:
        chosen = [row for row in timed if row["mode"] == mode and row.get(column) is not None]
        if not chosen:
            continue
        columns = list(dict.fromkeys(row["label" if every else "group"] for row in chosen))
        floors = {(row["case"], row["dtype"]): row.get("floor_ms") for row in chosen if column.endswith("_ms")}
        with_floor = any(floors.values())
        apart = any(row["in_place"] for row in chosen)
        header = [f"{mode}, {'MiB' if column == 'peak_mib' else 'ms'}", *columns]
        header.append("ours against the best that has to join prompts and tokens" if apart else "ours against the best")
        header += ["ours against the best that finds them joined"] if apart else []
        header += ["floor of the card"] if with_floor else []
        lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for case, dtype in cases_of(chosen):
            here = [row for row in chosen if (row["case"], row["dtype"]) == (case, dtype)]
            cells = [
                number(min((row[column] for row in here if row["label" if every else "group"] == name), default=None))
                for name in columns
            ]
            cells.append(_factor(rows, here, column, in_place=False))
            cells += [_factor(rows, here, column, in_place=True)] if apart else []
            cells += [number(floors[case, dtype])] if with_floor else []
            lines.append(f"| {case}, {dtype} | " + " | ".join(cells) + " |")
        lines.append("")
    skipped = [row for row in rows if row["kind"] == "skipped"]
    reasons = dict.fromkeys(f"- {row['label']}, {row['case']}: {row['why']}" for row in skipped)
    lines += ["Could not run:", "", *reasons, ""] if reasons else []
    runs = dict.fromkeys(provenance(row["run"]) for row in rows)
    return "\n".join([*lines, *runs])


def _factor(rows: Sequence[dict[str, Any]], here: Sequence[dict[str, Any]], column: str, *, in_place: bool) -> str:
    """Of the best rival of a kind over ours, at one case."""
    ours = [row[column] for row in here if row["provider"] == OURS]
    rivals = [row[column] for row in here if row["provider"] != OURS and row["in_place"] == in_place]
    if not ours or not rivals:
        return "–"
    if not passes(rows, here[0]["case"], here[0]["dtype"]):
        return "numerics fail"
    return f"{min(rivals) / ours[0]:.2f}×" if ours[0] else "–"


def number(value: float | None) -> str:
    """Three figures or so."""
    if value is None:
        return "–"
    return f"{value:.{4 if value < 0.1 else 3 if value < 10 else 0}f}"


def provenance(run: dict[str, Any]) -> str:
    """Where, with what and by which command."""
    where = f"{run['gpu']}, driver {run['driver']}, CUDA {run['cuda']}" if run["gpu"] else "CPU"
    changed = ", with changes that are not committed" if run["modified"] else ""
    return (
        f"{where}; torch {run['torch']}, triton {run['triton']}; commit {(run['commit'] or 'unknown')[:10]}{changed}; "
        f"{run['time'][:10]}; `{run['command']}`"
    )


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """For the terminal: one line a case, mode and provider; the factor is its time over ours."""
    lines = []
    for case, dtype in cases_of(rows):
        here = [row for row in rows if (row["case"], row["dtype"]) == (case, dtype)]
        good = passes(here, case, dtype)
        lines.append(f"{case} ({dtype}): " + ("error budget kept" if good else "ERROR BUDGET NOT KEPT, no speed-ups"))
        for mode in MODES:
            timed = [row for row in here if row["kind"] == "time" and row["mode"] == mode]
            ours = next((row["p50_ms"] for row in timed if row["provider"] == OURS), None)
            for row in timed:
                factor = f"{row['p50_ms'] / ours:.2f}x" if ours and good and row["provider"] != OURS else ""
                extra = [
                    f"{name} {row[key]:.4f}"
                    for name, key in (("launched", "launched_ms"), ("graph", "graph_ms"), ("MiB", "peak_mib"))
                    if row[key] is not None
                ]
                lines.append(f"  {mode:17}{row['label']:34}{row['p50_ms']:8.4f} ms {factor:8} {'  '.join(extra)}")
        lines += [f"  {row['label']} skipped: {row['why']}" for row in here if row["kind"] == "skipped"]
        lines += [problem for row in here if row["kind"] == "gate" for problem in row["problems"]]
    return "\n".join(lines)


def choose(operation: Operation, given: argparse.Namespace) -> tuple[list[Case], list[Provider]]:
    """The cases and providers that the command line names; by number (from 0) or by a part of the name."""
    cases: list[Case] = list(operation.smoke if given.smoke else operation.cases)
    if given.cases:
        cases = [
            case
            for number, case in enumerate(cases)
            if any(wanted == str(number) or wanted.lower() in case.name.lower() for wanted in given.cases)
        ]
    if given.layout:
        cases = [
            replace(case, layout=given.layout) if isinstance(case, AttentionCase | WindowCase) else case
            for case in cases
        ]
    known = {each.name: each for each in operation.providers}
    unknown = set(given.providers or ()) - set(known)
    if unknown:
        raise SystemExit(f"no provider {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if not cases:
        raise SystemExit(f"no case matches {given.cases}; there are {[case.name for case in operation.cases]}")
    return cases, [known[name] for name in given.providers or known]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in OPERATIONS:
        command = commands.add_parser(name)
        command.add_argument("--dtype", nargs="+", default=["bf16"], choices=DTYPES)
        command.add_argument("--cases", nargs="+", help="numbers from 0, or parts of names; all if not given")
        command.add_argument("--providers", nargs="+", help="all if not given")
        command.add_argument("--layout", choices=LAYOUTS, help="memory order of the inputs")
        command.add_argument("--output", type=Path, help="append rows of JSON here")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--smoke", action="store_true", help="tiny shapes: does everything run?")
    table = commands.add_parser("table", help="Markdown out of rows")
    table.add_argument("files", nargs="+", type=Path)
    table.add_argument("--every", action="store_true", help="a column for every provider")
    table.add_argument("--column", default="p50_ms", choices=COLUMNS)
    given = parser.parse_args(arguments)
    if given.command == "table":
        print(tables(read(*given.files), given.column, every=given.every))
        return 0

    operation, device = OPERATIONS[given.command], torch.device(given.device)
    cases, providers = choose(operation, given)
    run = timing.machine(" ".join(["python -m benchmarks.run", *arguments]))
    run["ceilings"], run["empty_function"] = timing.ceilings(device), timing.empty_function(device)
    rows = []
    for kind in given.dtype:
        for row in rows_of(operation, cases, providers, DTYPES[kind], device):
            rows.append({**row, **floor_of(row, run["ceilings"]), "run": run})
            append(given.output, rows[-1])
    print(summary(rows))
    return 0 if all(row["passes"] for row in rows if row["kind"] == "gate") else 1


if __name__ == "__main__":
    sys.exit(main())
