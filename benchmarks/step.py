"""One training step of EPIC on CLIP ViT-L/14: what a user could run, and the engine, part by part.

    python -m benchmarks.step --cases late-64 --providers eager hub blocks pooled --seconds 240
    python -m benchmarks.step --cases late-64 deep-64 --seconds 280     # goes on where the last call stopped
    python -m benchmarks.step --table                                   # the tables of docs/speed.md
    python -m benchmarks.step --figure docs/images/speed_step.png
    python -m benchmarks.step --profile late-64 graphs                  # where the time goes, by kinds of kernels
    python -m benchmarks.step --warm --cases late-64 --providers compiled   # fills the compiler's caches; no row

A step is forward, loss and the gradients of the trainable tensors, without an optimiser; inference is logits alone.
Weights and pictures are random; frozen weights are bfloat16, EPIC's trainable tensors float32, as the library trains
them, and LoRA's adapters bfloat16.  Everybody gets the same batch of texts padded to 77 tokens, whose lengths are drawn
like those of captions (``StepCase.draw_lengths``); in cases ending in ``-full`` all have 77.  With a CUDA graph the
texts are cut before the graph, since it has one shape; cached prefixes lie on the device.

Before it is timed, each provider's logits and gradients at this very batch are held against float32
(``benchmarks/step_gate.py``); where they fail, no time is printed.  A row is a case and a provider:

- ``p20_ms``, ``p50_ms``, ``p80_ms``: a step by CUDA events, one step launched after the other, at least ten;
- ``samples_s``: pairs a second at the median;
- ``peak_mib``: memory that the step adds at its peak to weights and inputs, a graph's own included;
- ``held_mib``: what the prepared model holds beside the backbone: trainable tensors, joined or 8-bit weights, a prefix;
- ``flops``: operations that the method needs (``step_cases.useful_flops``), the same whoever computes it; ``share``:
  that a second, of what a bfloat16 product of 8192 x 8192 x 8192 reaches in the same run;
- ``gate``: errors beside their budgets.

LoRA, full fine-tuning and the frozen forward know no layer pairs: they are measured at ``late`` and shown in both.

Compilers take minutes of a processor while the card stands idle: several ``--warm`` at once, before anything is timed,
leave in their caches what the timed runs then find.

A provider that cannot run says why in its row.  Rows of the same commit are not measured again (unless ``--again``), so
that a long list can be spread over several calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import step_profile, timing
from benchmarks.registry import CannotRun
from benchmarks.run import first_line, read
from benchmarks.step_cases import CASES, Setting, StepCase, describe_lengths, useful_flops
from benchmarks.step_gate import Wanted, gate, wanted_of
from benchmarks.step_providers import PROVIDERS, StepProvider, captured, release
from epic_fast.models import PromptedModel

ROWS = Path(__file__).parent / "results" / "step.jsonl"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FEWEST, MOST, WARMUP, TIMED_SECONDS = 10, 100, 3, 2.0
GIB = 1024.0


@dataclass(frozen=True)
class Benchmark:
    """A method whose steps are timed: what the command has to know of it.

    Attributes:
        name: of its module here, and in the rows.
        about: the command's description.
        output: where rows go.
        cases, providers: by their names.
        usual: the cases that are measured if none are named.
        make: ``(device, dtype, *, tiny)`` to the frozen weights and their batches, such as :class:`Setting`.
        measured_at: whether a provider has a row of its own at a case.
        wanted: ``(setting, case, method)`` to what is right.
        describe: ``(setting, case, provider)`` to what the row says besides; ``flops`` is among it.
        tables: rows to Markdown.
        draw: rows and a path to a figure, where there is one.
    """

    name: str
    about: str | None
    output: Path
    cases: Mapping[str, StepCase]
    providers: Mapping[str, StepProvider]
    usual: Sequence[str]
    make: Callable[..., Any]
    measured_at: Callable[[StepProvider, StepCase], bool]
    wanted: Callable[[Any, StepCase, str], Wanted]
    describe: Callable[[Any, StepCase, StepProvider], dict[str, Any]]
    tables: Callable[[Sequence[dict[str, Any]]], str]
    draw: Callable[[Sequence[dict[str, Any]], Path], Any] | None = None


def measure(call: Callable[[], Any], device: torch.device, seconds: float = TIMED_SECONDS) -> dict[str, Any]:
    """Quantiles of a step's time: at least ten steps, then as many as fit into ``seconds``, at most 100."""
    for _ in range(WARMUP):
        call()
    if device.type != "cuda":
        times = []
        for _ in range(FEWEST):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return _quantiles(times)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    steps = int(min(max(seconds / (time.perf_counter() - start), FEWEST), MOST))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(steps)]
    for before, after in events:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize(device)
    return _quantiles([before.elapsed_time(after) for before, after in events])


def _quantiles(times: list[float]) -> dict[str, Any]:
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {"p20_ms": cuts[1], "p50_ms": cuts[4], "p80_ms": cuts[7], "steps": len(times)}


def measure_case(
    benchmark: Benchmark,
    setting: Any,
    case: StepCase,
    provider: StepProvider,
    wanted: Callable[[str], Wanted],
    product_rate: float | None,
) -> dict[str, Any]:
    """One row, without its ``run``."""
    row: dict[str, Any] = {
        "benchmark": benchmark.name,
        "case": case.name,
        "layout": case.layout,
        "batch": case.batch,
        "mode": case.mode,
        "frozen_dtype": str(setting.dtype).removeprefix("torch."),
        "provider": provider.name,
        "label": provider.label,
        "group": provider.group,
        "method": provider.method,
        "from_prefix": provider.from_prefix,
        "engine": provider.parts,
        **benchmark.describe(setting, case, provider),
    }
    device, flops, step = setting.device, row["flops"], None
    try:
        right = wanted(provider.method)
        with provider.settings():
            before = _mark(device)
            step = provider.prepare(setting, case)
            row |= {"trainable_dtype": _types(step.model), **step.notes}
            mark = _mark(device)
            if isinstance(step.model, PromptedModel) and device.type == "cuda":
                row["held_mib"] = (mark - before) / 2**20
            if provider.graphed:
                step = captured(step, device, copies=provider.copies)
                row["peak_mib"] = _peak(mark, device)
            verdict = gate(provider, step, right, setting.dtype)
            row |= {"kind": "time" if verdict["passes"] else "failed", "gate": verdict}
            if verdict["passes"]:
                if not provider.graphed:
                    row["peak_mib"] = peak_of(step.call, mark, device)
                row |= measure(step.call, device)
                row["samples_s"] = 1e3 * case.batch / row["p50_ms"]
                row["share"] = flops / row["p50_ms"] / 1e9 / product_rate if flops and product_rate else None
            else:
                row["why"] = "numerics failed: " + "; ".join(verdict["problems"])
    except CannotRun as reason:
        row |= {"kind": "skipped", "why": str(reason)}
    except Exception as error:  # a provider that breaks is a row that says so, not the end of all others
        row |= {"kind": "skipped", "why": first_line(error)}
    release(step, device)
    return row


def peak_of(call: Callable[[], Any], mark: int, device: torch.device) -> float | None:
    """MiB above ``mark`` (bytes in use before the first step) at the peak of a few steps.  None on a CPU.

    The first step, with whatever a compiler needed beside it, is over by then.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARMUP):
        call()
    return _peak(mark, device)


def _mark(device: torch.device) -> int:
    """Bytes in use; the peak counts from here."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(mark: int, device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - mark) / 2**20


def _types(model: torch.nn.Module) -> str:
    kinds = {str(each.dtype).removeprefix("torch.") for each in model.parameters() if each.requires_grad}
    return ", ".join(sorted(kinds)) or "none"


# -- which, and in which order ---------------------------------------------------------------------------------------


def describe(setting: Setting, case: StepCase, provider: StepProvider) -> dict[str, Any]:
    """For a row: towers, texts and operations."""
    return {
        "towers": "tiny" if setting.tiny else "CLIP ViT-L/14",
        "texts": describe_lengths(case, setting.text.tokens),
        "flops": useful_flops(setting, case, provider.method, from_prefix=provider.from_prefix),
    }


def rows_of(
    benchmark: Benchmark,
    setting: Any,
    cases: Sequence[StepCase],
    providers: Sequence[StepProvider],
    *,
    done: set[tuple[str, str]],
    seconds: float,
    product_rate: float | None,
) -> Iterator[dict[str, Any]]:
    """A row for every case and provider that is not ``done``, until the time is over.

    A provider is only begun where as much time is left as it is known to take; what was left out is said, as the
    command that measures it.
    """
    start, left = time.perf_counter(), []
    for case in cases:
        references: dict[str, Wanted] = {}

        def wanted(method: str, case: StepCase = case, references: dict[str, Wanted] = references) -> Wanted:
            if method not in references:
                references[method] = benchmark.wanted(setting, case, method)
            return references[method]

        for provider in providers:
            if not benchmark.measured_at(provider, case) or (case.name, provider.name) in done:
                continue
            needed = 0.0 if setting.device.type == "cpu" else provider.seconds
            if time.perf_counter() - start + needed > seconds:
                left.append((case.name, provider.name))
                continue
            began = time.perf_counter()
            row = measure_case(benchmark, setting, case, provider, wanted, product_rate)
            row["measuring_s"] = time.perf_counter() - began
            print(line_of(row), file=sys.stderr, flush=True)
            yield row
        setting.forget()
        references.clear()
    for case in dict.fromkeys(name for name, _ in left):
        names = " ".join(provider for name, provider in left if name == case)
        print(f"no time left for: --cases {case} --providers {names}", file=sys.stderr, flush=True)


def line_of(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    head = f"{row['case']:18} {row['label']:42}"
    if row["kind"] != "time":
        return f"{head} {row['why']}  [{row.get('measuring_s', 0):.0f} s]"
    memory = f"{row['peak_mib'] / GIB:6.2f} GiB" if row["peak_mib"] is not None else ""
    share = f"{100 * row['share']:5.1f} %" if row["share"] else ""
    used = max(each["error"] / each["budget"] for each in row["gate"]["errors"].values())
    return (
        f"{head} {row['p50_ms']:9.2f} ms ({row['p20_ms']:.2f} to {row['p80_ms']:.2f}) {memory} {share} "
        f"budget used {100 * used:.0f} %  [{row['measuring_s']:.0f} s]"
    )


def measured_at(provider: StepProvider, case: StepCase) -> bool:
    """Whether there is a row of its own: other methods know no layer pairs, so ``late`` stands for ``deep``."""
    return case.mode in provider.modes and (provider.method == "epic" or case.layout == "late")


def latest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last row of each case and provider, in the order of :data:`CASES` and :data:`PROVIDERS`.

    What does not depend on the layer pairs stands in ``deep`` as it was measured at ``late``, the same batch, where
    there is something beside it.
    """
    last = {(row["case"], row["provider"]): row for row in rows}
    tables = {(row["layout"], row["mode"]) for row in rows}
    found = []
    for case in CASES.values():
        if (case.layout, case.mode) not in tables:
            continue
        for provider in PROVIDERS.values():
            own = replace(case, layout=case.layout if measured_at(provider, case) else "late")
            row = last.get((own.name, provider.name))
            if row is not None:
                found.append({**row, "case": case.name, "layout": case.layout})
    return found


# -- tables ----------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: for each layout and mode providers down and batches across; then what could not run, and where it ran.

    Memory, samples a second and the share of the product rate stand for the batch of 64, or the largest there is.
    """
    rows, lines = latest(rows), []
    for layout, mode, lengths in dict.fromkeys((row["layout"], row["mode"], row["texts"]["drawn"]) for row in rows):
        here = [row for row in rows if (row["layout"], row["mode"], row["texts"]["drawn"]) == (layout, mode, lengths)]
        batches = sorted({row["batch"] for row in here})
        chosen = 64 if 64 in batches else batches[-1]
        what = "one step" if mode == "step" else "inference"
        texts = ", all texts 77 tokens" if lengths == "full" else ""
        header = [f"{layout}, {what}{texts}", *(f"B={batch}, ms" for batch in batches)]
        header += [f"B={chosen}: pairs/s", "memory added, GiB", "of the product rate"]
        lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for provider in PROVIDERS.values():
            kin = {row["batch"]: row for row in here if row["provider"] == provider.name}
            if not any(row["kind"] in ("time", "failed") for row in kin.values()):
                continue
            cells = [time_cell(kin.get(batch)) for batch in batches]
            of = kin.get(chosen)
            if of is not None and of["kind"] == "time":
                cells.append(f"{of['samples_s']:.0f}")
                cells.append("–" if of["peak_mib"] is None else f"{of['peak_mib'] / GIB:.2f}")
                cells.append("–" if of["share"] is None else f"{100 * of['share']:.0f} %")
            else:
                cells += ["–"] * 3
            lines.append(f"| {layout}, {provider.label} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, *footnotes(rows)])


def footnotes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines under the tables: what could not run, and where the rest ran."""
    lines, reasons = [], {}
    for row in rows:
        if row["kind"] == "skipped":
            reasons.setdefault((row["label"], row["why"]), []).append(row["case"])
    if reasons:
        said = [f"- {label} ({', '.join(cases)}): {why}" for (label, why), cases in reasons.items()]
        lines += ["Could not run:", "", *said, ""]
    return [*lines, *dict.fromkeys(where(row["run"]) for row in rows)]


def time_cell(row: dict[str, Any] | None) -> str:
    """Milliseconds, or why there are none."""
    if row is None or row["kind"] == "skipped":
        return "–"
    if row["kind"] == "failed":
        return "numerics fail"
    return f"{row['p50_ms']:.{2 if row['p50_ms'] < 10 else 1}f}"


def ratio_cell(rows: dict[str, dict[str, Any]], above: str, below: str, what: str, form: str) -> str:
    """One provider's number over another's, of ``rows`` by provider; a dash where one of them has none."""
    one, other = (rows.get(name, {}).get(what) for name in (above, below))
    return form.format(one / other) if one and other else "–"


def overhead_cell(rows: dict[str, dict[str, Any]], name: str, frozen: str) -> str:
    """How much longer one provider takes than another, in percent."""
    one, other = (rows.get(each, {}).get("p50_ms") for each in (name, frozen))
    return f"{100 * (one / other - 1):+.1f} %" if one and other and name != frozen else "–"


def where(run: dict[str, Any]) -> str:
    """Machine, versions, commit and day of a run; commands stand in the rows."""
    place = f"{run['gpu']}, driver {run['driver']}, CUDA {run['cuda']}" if run["gpu"] else "CPU"
    changed = ", with changes that are not committed" if run["modified"] else ""
    commit = (run["commit"] or "unknown")[:10]
    return f"{place}; torch {run['torch']}, triton {run['triton']}; commit {commit}{changed}; {run['time'][:10]}."


# -- the command -----------------------------------------------------------------------------------------------------


def draw(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """The figure."""
    from benchmarks.figures import draw_step

    return draw_step(rows, path)


EPIC = Benchmark(
    name="step",
    about=__doc__,
    output=ROWS,
    cases=CASES,
    providers=PROVIDERS,
    usual=[name for name, case in CASES.items() if case.lengths == "captions"],
    make=Setting.make,
    measured_at=measured_at,
    wanted=wanted_of,
    describe=describe,
    tables=tables,
    draw=draw,
)


def choose(benchmark: Benchmark, given: argparse.Namespace) -> tuple[list[StepCase], list[StepProvider]]:
    """The cases and providers that the command line names."""
    of_cases, of_providers = (given.cases, benchmark.cases, "case"), (given.providers, benchmark.providers, "provider")
    for wanted, known, what in (of_cases, of_providers):
        unknown = [name for name in wanted or () if name not in known]
        if unknown:
            raise SystemExit(f"no {what} {', '.join(unknown)}; there are {', '.join(known)}")
    cases = [benchmark.cases[name] for name in given.cases or benchmark.usual]
    return cases, [benchmark.providers[name] for name in given.providers or benchmark.providers]


def main(arguments: Sequence[str] | None = None, benchmark: Benchmark = EPIC) -> int:
    """The command; 1 if a provider's numerics failed."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = f"python -m benchmarks.{benchmark.name}"
    parser = argparse.ArgumentParser(
        prog=command, description=benchmark.about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    others = "" if len(benchmark.usual) == len(benchmark.cases) else f"; if none is named {', '.join(benchmark.usual)}"
    parser.add_argument("--cases", nargs="+", metavar="CASE", help=f"{', '.join(benchmark.cases)}{others}")
    parser.add_argument("--providers", nargs="+", metavar="PROVIDER", help=f"{', '.join(benchmark.providers)}; all")
    parser.add_argument("--output", type=Path, default=benchmark.output, help="append rows of JSON here")
    parser.add_argument("--seconds", type=float, default=280.0, help="begin nothing that would end later than this")
    parser.add_argument("--again", action="store_true", help="measure what is measured at this commit once more")
    parser.add_argument("--dtype", choices=DTYPES, help="of frozen weights; bf16, with --tiny fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny towers: does everything run?")
    parser.add_argument("--table", action="store_true", help="print the rows as Markdown")
    if benchmark.draw is not None:
        parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the rows")
    parser.add_argument("--profile", nargs=2, metavar=("CASE", "PROVIDER"), help="device time by kinds of kernels")
    parser.add_argument("--warm", action="store_true", help="call each once, without reference, time and row")
    given = parser.parse_args(arguments)
    figure: Path | None = getattr(given, "figure", None)
    if given.table or figure:
        rows = read(given.output)
        if given.table:
            print(benchmark.tables(rows))
        if figure and benchmark.draw is not None:
            print(benchmark.draw(rows, figure))
        return 0
    if given.profile:
        given.cases, given.providers = ([name] for name in given.profile)
    cases, providers = choose(benchmark, given)
    device = torch.device(given.device)
    setting = benchmark.make(device, DTYPES[given.dtype or ("fp32" if given.tiny else "bf16")], tiny=given.tiny)
    if given.profile:
        print(step_profile.profile(setting, cases[0], providers[0]))
        return 0
    if given.warm:
        broken = [not warm(benchmark, setting, case, each) for case in cases for each in providers]
        return int(any(broken))
    run = timing.machine(" ".join([command, *arguments]))
    run["ceilings"] = timing.ceilings(device)
    rate = run["ceilings"]["bf16_tflop_s"] if run["ceilings"] else None
    before = read(given.output) if given.output.exists() else []
    done = {(row["case"], row["provider"]) for row in before if _stands(row, run)} if not given.again else set()
    good = True
    given.output.parent.mkdir(parents=True, exist_ok=True)
    for row in rows_of(benchmark, setting, cases, providers, done=done, seconds=given.seconds, product_rate=rate):
        good = good and row["kind"] != "failed"
        with given.output.open("a") as lines:
            lines.write(json.dumps({**row, "run": run}) + "\n")
    return 0 if good else 1


def warm(benchmark: Benchmark, setting: Any, case: StepCase, provider: StepProvider) -> bool:
    """One call of a provider at a case, for what compilers keep of it; False, saying why, where it breaks."""
    if not benchmark.measured_at(provider, case):
        return True
    step, began = None, time.perf_counter()
    try:
        with provider.settings():
            step = provider.prepare(setting, case)
            step.call()
        said = "warm"
    except CannotRun as reason:
        said = str(reason)
    except Exception as error:
        said = f"failed: {first_line(error)}"
    release(step, setting.device)
    print(
        f"{case.name:18} {provider.label:42} {said}  [{time.perf_counter() - began:.0f} s]", file=sys.stderr, flush=True
    )
    return not said.startswith("failed")


def _stands(row: dict[str, Any], run: dict[str, Any]) -> bool:
    """Whether a row need not be measured again: it has a time, of this very code and on such a machine."""
    same = all(row["run"][name] == run[name] for name in ("commit", "gpu", "torch"))
    return row["kind"] == "time" and same and not run["modified"] and not row["run"]["modified"]


if __name__ == "__main__":
    sys.exit(main())
