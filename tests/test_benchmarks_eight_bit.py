"""The benchmark of 8-bit weights: whose logits it compares, and what it makes of its rows."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.eight_bit import engines, layer_errors, main, report, summarise
from epic_fast import EpicConfig, wrap
from epic_fast.engine import EngineConfig
from epic_fast.testing import tiny_clip
from epic_fast.testing.probes import lively, make_batch, perturb


def rows_of(fp8: list[float], frozen: list[float], name: str = "films") -> list[dict[str, Any]]:
    return [
        {"data": name, "kind": "fp8", "metric": "f1_micro", "seed": seed, "engine": engine, "test": {"f1_micro": value}}
        for engine, values in (("frozen", frozen), ("fp8", fp8))
        for seed, value in enumerate(values)
    ]


def test_the_errors_are_those_of_each_layer() -> None:
    torch.manual_seed(0)
    engine = EngineConfig(weights="fp8", exact_layers=0)
    model = perturb(wrap(lively(tiny_clip()), EpicConfig(head_dropout=0.0), 3, engine=engine))
    batches = [make_batch([3, 9]), make_batch([5, 4], seed=1)]
    rows = layer_errors(model, batches, "fp8", torch.device("cpu"))
    assert model.engine is engine
    towers = {"text": model.backbone.text, "vision": model.backbone.vision}
    names = [f"{name} {index}" for name, tower in towers.items() for index in range(tower.num_layers)]
    assert [row["layers"] for row in rows] == ["none", *names, "all but the first", "all"]
    errors = {row["layers"]: row["error"] for row in rows}
    # bfloat16 itself errs less than any layer in 8 bits, and one layer less than all of them.
    assert 0 < errors["none"] < max(errors[name] for name in names) < errors["all"] < 0.5
    assert errors["none"] < errors["all but the first"] < errors["all"]
    assert all(errors[name] > 0 for name in names)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = torch.cat([model(**batch).logits.float() for batch in batches])
        model.engine = EngineConfig(weights="fp8")
        first_exact = torch.cat([model(**batch).logits.float() for batch in batches])
        model.engine = EngineConfig(blocks="fused")
        wanted = torch.cat([model(**batch).logits.float() for batch in batches])
    for name, logits in (("all", found), ("all but the first", first_exact)):
        assert errors[name] == pytest.approx(float((logits - wanted).norm() / wanted.norm()), rel=1e-6)


def test_the_difference_is_that_of_the_same_seeds() -> None:
    rows = rows_of([0.500, 0.610, 0.700], [0.502, 0.606, 0.704])
    rows += [{**rows[0], "engine": "switched", "test": {"f1_micro": 0.51}}]
    found = summarise(rows)["films"]
    assert found["table"]["fp8"]["mean"] == pytest.approx(1.81 / 3)
    assert found["table"]["fp8"]["difference"] == pytest.approx(-0.002 / 3)
    assert found["table"]["fp8, tested only"]["difference"] == pytest.approx(0.008)
    assert found["table"]["frozen"]["difference"] == 0
    spread = statistics.stdev([-0.002, 0.004, -0.004])
    assert found["table"]["fp8"]["standard_error"] == pytest.approx(spread / math.sqrt(3))
    assert found["passed"] == {"fp8": True}


@pytest.mark.parametrize("sign", [-1, 1])
def test_more_than_three_tenths_of_a_point_is_said(sign: int) -> None:
    rows = rows_of([0.5 + 0.004 * sign] * 3, [0.5] * 3)
    assert summarise(rows)["films"]["passed"] == {"fp8": False}
    assert "fp8 is more than 0.3 points from frozen" in report(rows)
    assert f"{0.4 * sign:+.2f}" in report(rows)
    rows = rows_of([0.5 + 0.0029 * sign] * 3, [0.5] * 3)
    assert "fp8 is within 0.3 points from frozen" in report(rows)


def test_the_engines() -> None:
    assert list(engines(["int8"], False)) == ["frozen", "int8"]
    found = engines(["fp8"], True)
    assert found["plain"].blocks == "plain"
    assert found["fp8"].weights == "fp8"
    assert found["frozen"].weights == "frozen"


def test_many_seeds_are_one_column() -> None:
    rows = rows_of([0.501, 0.503] * 4, [0.5] * 8)
    text = report(rows)
    assert "of 8 seeds: std" in text
    assert "seed 0" not in text
    # Half the difference of 0.2 points, times the root of 8/7, by the root of 8.
    assert f"+0.20 ± {0.1 * math.sqrt(8 / 7) / math.sqrt(8):.2f}" in text


@pytest.mark.slow
def test_processes_share_the_seeds(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    given = ["--data", "demo", "--seeds", "4-5", "8", "--kind", "int8", "--most", "6", "--epochs", "1"]
    main(["measure", *given, "--workers", "0", "--processes", "2", "--rows", str(rows)])
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    made = sorted((row["seed"], row["engine"]) for row in found if "test" in row)
    assert made == [(seed, engine) for seed in (4, 5, 8) for engine in ("frozen", "int8", "int8, tested only")]
    assert [row["seed"] for row in found if "logits" in row] == [4]
    called = "--data demo --kind int8 --seeds 4 5 8 --epochs 1 --most 6 --processes 2"
    assert {row["run"]["command"] for row in found} == {f"python -m benchmarks.eight_bit measure {called}"}


def test_unfinished_rows() -> None:
    rows = rows_of([0.5, 0.6], [0.5, 0.6])
    with pytest.raises(SystemExit, match="films: no row of the engine 'frozen' yet"):
        report(rows[2:])
    ahead = {**rows[2], "seed": 9, "engine": "int8", "kind": "int8"}
    assert "int8" not in report([*rows, ahead])
    with pytest.raises(SystemExit):
        main(["measure", "--data", "demo", "--seeds", "5-2"])


def test_the_page_shows_the_recorded_seeds() -> None:
    root = Path(__file__).resolve().parent.parent
    page = (root / "docs/engine.md").read_text(encoding="utf-8").replace("−", "-")
    rows = [json.loads(line) for line in (root / "benchmarks/results/eight_bit_seeds.jsonl").read_text().splitlines()]
    summaries = summarise(rows)
    assert len(summaries) == 2
    for data, found in summaries.items():
        assert found["passed"] == {"fp8": True, "int8": True}
        for engine, row in found["table"].items():
            change = f"{100 * row['difference']:+.2f} ± {100 * row['standard_error']:.2f}" if engine != "frozen" else ""
            assert f"| {len(row['seeds'])} | {row['mean']:.4f} | {change}".rstrip() in page, (data, engine)
