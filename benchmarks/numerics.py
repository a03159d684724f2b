"""The numerics page: how far ours and PyTorch itself are from float64, for each operation and type.

    python -m benchmarks.numerics --output docs/numerics.md

writes the page and, to ``--rows`` (``benchmarks/results/numerics.json``), every tensor's errors that it was made of.
Nearly all of its time is compilation, so on a GPU several processes share the cases.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.registry import OPERATIONS
from benchmarks.run import gate, provenance
from epic_fast.files import atomic_file
from epic_fast.testing.cases import (
    ATTENTION_PRODUCTION,
    ATTENTION_SMOKE,
    INTERACTION_PRODUCTION,
    INTERACTION_SMOKE,
    MIX_PRODUCTION,
    MIX_SMOKE,
    WINDOW_PRODUCTION,
    WINDOW_SMOKE,
    AttentionCase,
    Case,
    WindowCase,
)

KINDS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CASES: dict[str, tuple[Case, ...]] = {
    "attention": (
        *ATTENTION_PRODUCTION,
        *(
            replace(case, prompt_mask="prefix", layout="packed", name=f"{case.name}, prefix mask, packed")
            for case in ATTENTION_PRODUCTION[1::3]
        ),
        *(
            replace(
                case,
                shared=True,
                layout="tokens",
                lengths=(case.tokens, case.tokens // 2, 1, 0),
                name=f"{case.name}, shared prompts, lengths",
            )
            for case in ATTENTION_PRODUCTION[1::3]
        ),
        *(replace(case, prefix_tuning=True, name=f"{case.name}, prefix tuning") for case in ATTENTION_PRODUCTION[1::3]),
        *(
            AttentionCase(2, 4, 197, 16, head_dim, name=f"head_dim {head_dim}")
            for head_dim in (16, 48, 72, 80, 96, 128, 256)
        ),
        AttentionCase(1, 2, 2048, 64, causal=True, name="2048 tokens, causal"),
        AttentionCase(1, 1, 8192, 16, name="8192 tokens"),
        AttentionCase(2, 4, 300, 256, causal=True, name="256 prompts, causal"),
        AttentionCase(2, 4, 257, 0, name="no prompts"),
    ),
    "interaction": INTERACTION_PRODUCTION,
    "windows": (
        *WINDOW_PRODUCTION,
        *(
            replace(case, bias_gradient=True, name=f"{case.name}, bias with a gradient")
            for case in WINDOW_PRODUCTION[1:3]
        ),
        *(WindowCase(2, 4, 4, 49, 13, head_dim, name=f"head_dim {head_dim}") for head_dim in (16, 48, 64, 80, 128)),
        WindowCase(2, 2, 2, 144, 256, mask=True, name="256 prompts"),
        WindowCase(2, 4, 2, 49, 0, mask=True, name="no prompts"),
    ),
    "experts": MIX_PRODUCTION,
}
HEAD = """# Numerics

Made by `python -m benchmarks.numerics`; do not edit.

Inputs are made in the type named, then promoted: what stands here is the error of the computation, not that of rounding
the inputs. *Largest* and *mean* are absolute errors against the reference in float64, over all cases and elements;
*PyTorch* is the reference run eagerly in the same type. An error may be at most twice PyTorch's for outputs and three
times for gradients, plus one rounding; *budget used* is the largest share of that which any tensor takes. `float32` is
IEEE arithmetic. `float32 (TF32)` is what both do where PyTorch's matrix products may use TF32: the kernels multiply on
tensor cores then, in pieces of a number, with float32's digits, since PyTorch too computes attention and small products
there with more than TF32 has.
"""
SMOKE: dict[str, tuple[Case, ...]] = {
    "attention": ATTENTION_SMOKE,
    "interaction": INTERACTION_SMOKE,
    "windows": WINDOW_SMOKE,
    "experts": MIX_SMOKE,
}


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Matrix products of float32 in TF32."""
    settings: Any = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


def measure(
    operation: str, dtypes: Sequence[str], device: torch.device, impl: str, *, smoke: bool, workers: int = 1
) -> list[dict[str, Any]]:
    """A row for every case, type and tensor, in this order whatever the number of processes."""
    calls = [
        (operation, kind, case, device, impl) for kind in dtypes for case in (SMOKE if smoke else CASES)[operation]
    ]
    if workers == 1:
        found = list(map(_measure_one, calls))
    else:
        # Neighbours share kernels: whole stretches go to one process, short enough for the last ones to be shared out.
        stretch = max(1, len(calls) // (4 * workers))
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(_measure_one, calls, chunksize=stretch))
    return [row for rows in found for row in rows]


def _measure_one(call: tuple[str, str, Case, torch.device, str]) -> list[dict[str, Any]]:
    operation, kind, case, device, impl = call
    with tf32() if kind == "tf32" else contextlib.nullcontext():
        tensors = gate(OPERATIONS[operation], case, KINDS[kind], device, impl)
    common = {"operation": operation, "case": case.name, "shape": case.row()}
    other_name = {"dtype": "float32 (TF32)"} if kind == "tf32" else {}
    return [{**common, **each.row(), "passes": each.passes, **other_name} for each in tensors]


def page(found: dict[str, Any]) -> str:
    """The page in Markdown."""
    rows, lines = found["rows"], [HEAD]
    for operation in dict.fromkeys(row["operation"] for row in rows):
        here = [row for row in rows if row["operation"] == operation]
        cases = list(dict.fromkeys(row["case"] for row in here))
        lines += [
            f"## {OPERATIONS[operation].function.__name__}",
            "",
            "| type | tensor | largest value | largest, ours | PyTorch | mean, ours | PyTorch | budget used |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for dtype, tensor in dict.fromkeys((row["dtype"], row["tensor"]) for row in here):
            kin = [row for row in here if (row["dtype"], row["tensor"]) == (dtype, tensor)]
            used = max(max(_share(row, "max"), _share(row, "rms")) for row in kin)
            cells = [
                max(row["magnitude"] for row in kin),
                max(row["max_error"] for row in kin),
                max(row["eager_max_error"] for row in kin),
                sum(row["mean_error"] for row in kin) / len(kin),
                sum(row["eager_mean_error"] for row in kin) / len(kin),
            ]
            verdict = "" if all(row["passes"] for row in kin) else " **fails**"
            numbers = " | ".join(f"{each:.2g}" for each in cells)
            lines.append(f"| {dtype} | {tensor} | {numbers} | {100 * used:.0f} %{verdict} |")
        lines += ["", f"Cases: {'; '.join(cases)}.", ""]
    return "\n".join([*lines, provenance(found["run"]), ""])


def as_lines(found: dict[str, Any]) -> str:
    """JSON with a row a line, numbers to six figures and shapes once a case; what is wrong with a tensor is in its
    numbers, not told again."""
    shapes = {f"{row['operation']}, {row['case']}": row["shape"] for row in found["rows"] if "shape" in row}
    rows = [
        json.dumps(
            {
                name: float(f"{value:.6g}") if isinstance(value, float) else value
                for name, value in row.items()
                if name not in ("problem", "shape")
            }
        )
        for row in found["rows"]
    ]
    return (
        f'{{"run": {json.dumps(found["run"])},\n"shapes": {json.dumps(shapes or found.get("shapes"))},\n"rows": [\n'
        + ",\n".join(rows)
        + "\n]}\n"
    )


def _share(row: dict[str, Any], kind: str) -> float:
    return row[f"{kind}_error"] / row[f"{kind}_budget"] if row[f"{kind}_budget"] else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if any tensor is beyond its budget."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.numerics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="the page")
    parser.add_argument("--rows", type=Path, help="the numbers; default: benchmarks/results/numerics.json")
    parser.add_argument("--operations", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--dtype", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--impl", default="triton", choices=["triton", "reference"])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--workers", type=int, help="processes; default: on a GPU up to 12, else 1")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    workers = given.workers or (max(1, min(12, (os.cpu_count() or 1) - 2)) if device.type == "cuda" else 1)
    rows = []
    for operation in given.operations:
        rows += measure(operation, given.dtype, device, given.impl, smoke=given.smoke, workers=workers)
    found = {"run": timing.machine(" ".join(["python -m benchmarks.numerics", *arguments])), "rows": rows}
    target = given.rows or Path(__file__).parent / "results" / "numerics.json"
    kept = as_lines(found)
    for path, text in ((target, kept), (given.output, page(json.loads(kept)))):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_text(text)
    problems = [f"{row['operation']}, {row['case']}: {row['problem']}" for row in rows if not row["passes"]]
    print("\n".join(problems) or f"{len(rows)} tensors, all within their budgets: {given.output}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
