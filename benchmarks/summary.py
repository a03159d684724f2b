"""The README's table of speed: ours beside the best of everybody else, out of the recorded rows and nothing else.

    python -m benchmarks.summary

Operations are those in a CUDA graph, forward and backward; the best other is whoever has to join prompts and tokens, as
a user's own code has to.  Steps are ours in a CUDA graph beside the best of plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import run
from benchmarks.registry import OURS
from benchmarks.step import GIB

RESULTS = Path(__file__).parent / "results"
MODE = "forward+backward"
# Of each operation: the recorded case, and what the table calls it.
OPERATIONS = {
    "attention": {
        "vision L/14": "attention, ViT-L/14, 16 prompts",
        "vision L/14@336": "attention, ViT-L/14 at 336 px, 16 prompts",
        "text L": "attention, CLIP-L's text tower, 16 prompts",
    },
    "interaction": {"L, B=64, P=8": "interaction of 8 and 8 prompts, CLIP-L"},
    "windows": {"Swin-B, stage 0": "attention in Swin-B's windows, 13 prompts"},
    "experts": {"Swin-B, C=512, E=4": "MoPE's prompts out of four experts, 512 channels"},
    "infused": {"LLaMA-2-7B, n=40": "MiT's infused attention, LLaMA-2-7B, 40 tokens"},
    "gate": {"LLaMA-2-7B, n=40": "its gate"},
    "swiglu": {"LLaMA-2-7B, n=40": "its SwiGLU"},
}
STEPS = {
    "step": {
        "late-64": "EPIC on ViT-L/14, a training step, six layer pairs, B=64",
        "deep-64": "the same, twelve layer pairs",
    },
    "mope_step": {"step-64": "MoPE on Swin-B and BERT, a training step, B=64"},
    "mit_step": {"step-40": "MiT on LLaMA-2-7B, a training step, 8 texts of 40 tokens"},
}
CAPTURED = "graphs"


def table(results: Path = RESULTS) -> str:
    """In Markdown."""
    lines = ["| one H200, bfloat16 | epic_fast | the best other | |", "|---|---|---|---|"]
    for operation, cases in OPERATIONS.items():
        rows = run.read(results / f"{operation}.jsonl")
        lines += [_operation(rows, case, name) for case, name in cases.items()]
    for file, cases in STEPS.items():
        last = {(row["case"], row["provider"]): row for row in run.read(results / f"{file}.jsonl")}
        lines += [_step(list(last.values()), case, name) for case, name in cases.items()]
    return "\n".join(lines)


def _operation(rows: Sequence[dict[str, Any]], case: str, name: str) -> str:
    here = [row for row in rows if row["kind"] == "time" and (row["case"], row["mode"]) == (case, MODE)]
    here = [row for row in here if row["graph_ms"] is not None]
    if not all(run.passes(rows, case, row["dtype"]) for row in here):
        raise SystemExit(f"{case}: its numerics fail, so it has no place in a table of speed")
    ours = next(row for row in here if row["provider"] == OURS)
    best = min(
        (row for row in here if row["provider"] != OURS and not row["in_place"]), key=lambda row: row["graph_ms"]
    )
    return _line(name, *((row["graph_ms"], _mib(row["peak_mib"])) for row in (ours, best)), best["label"])


def _mib(memory: float) -> str:
    return f"{memory:.{0 if memory > 9.5 else 1}f} MiB"


def _step(rows: Sequence[dict[str, Any]], case: str, name: str) -> str:
    here = [row for row in rows if row["kind"] == "time" and row["case"] == case]
    ours = next(row for row in here if row["provider"] == CAPTURED)
    best = min((row for row in here if row["group"] == "plain"), key=lambda row: row["p50_ms"])
    return _line(name, *((row["p50_ms"], f"{row['peak_mib'] / GIB:.2f} GiB") for row in (ours, best)), best["label"])


def _line(name: str, ours: tuple[float, str], best: tuple[float, str], who: str) -> str:
    cells = [f"{run.number(time) if time < 10 else f'{time:.1f}'} ms, {memory}" for time, memory in (ours, best)]
    return f"| {name} | {cells[0]} | {cells[1]} ({who}) | {best[0] / ours[0]:.2f}× |"


if __name__ == "__main__":
    print(table())
