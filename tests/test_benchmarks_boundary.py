"""Every way to put Python behind PyTorch computes the same, is timed, and stands on the page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import boundary  # pyright: ignore[reportMissingImports]
from benchmarks.run import read  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parents[1]


def test_every_way_is_timed_and_reaches_both_launchers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once: operators are defined once a process."""
    output = tmp_path / "rows.jsonl"
    made, kept = boundary.ways()
    assert list(made) == list(boundary.WAYS)
    inputs = [torch.zeros(3, requires_grad=True) for _ in range(boundary.INPUTS)]
    for name, call in made.items():
        found = call(*inputs)
        assert [each.shape for each in found] == [(3,), (3,)]
        assert all(each.requires_grad == (name != "direct") for each in found)
        if name != "direct":
            grads = torch.autograd.grad(found, inputs, [torch.ones(3)] * 2)
            assert [each.shape for each in grads] == [(3,)] * boundary.INPUTS
    monkeypatch.setattr(boundary, "ways", lambda: (made, kept))
    assert boundary.main(["--smoke", "--output", str(output)]) == 0
    rows = read(output)
    assert {(row["way"], row["mode"]) for row in rows} == {
        (way, mode) for way in boundary.WAYS for mode in boundary.MODES
    }
    assert all(0 < row["fastest_us"] <= row["us"] and row["of_ours"] > 0 for row in rows)
    assert {row["run"]["command"] for row in rows} == {f"python -m benchmarks.boundary --smoke --output {output}"}
    said = capsys.readouterr().out.strip()
    assert boundary.main(["--line", str(output)]) == 0
    assert capsys.readouterr().out.strip() == said == boundary.line(rows)


def test_the_page_of_speed_shows_the_recorded_line() -> None:
    """And what the package's own way is said to be, it is: of those with an operator the one that costs the least."""
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    section = page.partition("\n## Calls, one by one\n")[2].partition("\n## ")[0]
    rows = read(ROOT / "benchmarks/results/boundary.jsonl")
    assert boundary.line(rows) in " ".join(section.split())
    assert {row["run"]["commit"][:10] for row in rows if row["run"]["commit"][:10] not in section} == set()
    assert not any(row["run"]["modified"] for row in rows)
    with_operator = (boundary.OURS, "library-registered", "custom_op")
    both = {row["way"]: row["us"] for row in rows if row["mode"] == boundary.MODES[-1] and row["way"] in with_operator}
    assert min(both, key=both.__getitem__) == boundary.OURS
