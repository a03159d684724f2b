"""Everybody is timed in every round, and stands in the table with the ratio of its own rounds."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import launches  # pyright: ignore[reportMissingImports]
from benchmarks.registry import OPERATIONS, OURS, Call, CannotRun, Provider  # pyright: ignore[reportMissingImports]
from benchmarks.run import read  # pyright: ignore[reportMissingImports]
from epic_fast.ops import native

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


def test_everybody_takes_part_in_each_round_inside_its_settings() -> None:
    said: list[str] = []

    @contextlib.contextmanager
    def settings() -> Iterator[None]:
        said.append("in")
        yield
        said.append("out")

    names = ("a", "b", "c")
    everybody = [launches.Timed(name, name, False, settings, lambda name=name: said.append(name), []) for name in names]
    launches.rounds(everybody, CPU, count=8, calls=2)
    assert all(len(each.times) == 8 for each in everybody)
    calls = 2 + launches.WARM
    turns = [said[start : start + calls + 2] for start in range(0, len(said), calls + 2)]
    assert all(turn == ["in", *[turn[1]] * calls, "out"] for turn in turns)
    taken = ["".join(turn[1] for turn in turns[start : start + 3]) for start in range(0, len(turns), 3)]
    assert all(Counter(each) == Counter("abc") for each in taken)
    assert len(set(taken)) > 2, "always the same order"


def test_rows_compare_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down in every round changes times and no ratio."""
    operation = OPERATIONS["interaction"]
    case = operation.smoke[0]
    seen: list[bool] = []

    def ours(case: Any, inputs: Any, options: Any) -> Call:
        def compute() -> tuple[torch.Tensor, ...]:
            seen.append(native.find.__wrapped__() is not None)
            return (leaf * 2,)

        leaf = torch.ones(3, requires_grad=True)
        return Call(compute, [leaf])

    def refused(case: Any, inputs: Any, options: Any) -> Call:
        raise CannotRun("not today")

    def slower(everybody: list[Any], device: Any, *, count: int, calls: int) -> None:
        for each in everybody:
            with each.settings():
                each.run()
            factor = {OURS: 1.0, launches.FROM_PYTHON: 1.5, launches.NOTHING: 0.5}[each.name]
            each.times.extend(factor * 2**number for number in range(5))

    monkeypatch.delenv("EPIC_FAST_NATIVE", raising=False)
    monkeypatch.setattr(native, "load", lambda: "built")
    monkeypatch.setattr(launches, "rounds", slower)
    providers = [Provider(OURS, "ours", ours), Provider("sdpa-x", "another", refused)]
    rows = list(launches.rows_of("interaction", case, providers, CPU, True))
    assert [row["why"] for row in rows if row["kind"] == "skipped"] == ["CannotRun: not today"]
    timed = [row for row in rows if row["kind"] == "launched"]
    assert {(row["provider"], row["ms"], row["fastest_ms"], row["of_ours"]) for row in timed} == {
        (OURS, 4.0, 1.0, 1.0),
        (launches.FROM_PYTHON, 6.0, 1.5, 1.5),
        (launches.NOTHING, 2.0, 0.5, 0.5),
    }
    # Prepared, then compiled and from Python in each of three turns (the function that does nothing is another one).
    assert seen[-6:] == [True, False] * 3
    printed = launches.table(rows).splitlines()
    assert len(printed) == 2 + 3
    assert f"| {case.name}: ours, from Python | 6.000 | 1.50× | 6.000 | 1.50× |" in printed


def test_the_page_of_speed_shows_the_recorded_rounds() -> None:
    """The whole table of the rows, and the commit that they are of."""
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    section = page.partition("\n## Calls, one by one\n")[2].partition("\n## ")[0]
    rows = read(ROOT / "benchmarks/results/launches.jsonl")
    assert launches.table(rows).strip() in section
    assert {row["run"]["commit"][:10] for row in rows if row["run"]["commit"][:10] not in section} == set()
    assert not any(row["run"]["modified"] for row in rows)
    assert {row["run"]["launches"] for row in rows if row["provider"] == "ours"} == {"compiled"}
