"""The benchmarks run on a CPU at tiny shapes, refuse speed-ups on a red gate, and print what their rows say."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from epic_fast.ops import native
from epic_fast.testing.cases import ATTENTION_SMOKE, WINDOW_SMOKE, AttentionCase, InteractionCase

pytest.importorskip("triton")
# The root is no place to import from for longer than this: the folder `kernels` lies there.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import figures, gpu_tests, numerics, registry, run, summary, timing
from benchmarks.test_dispatch import no_kernels, test_dispatch_stays_cheap  # noqa: F401  (collected here as well)

sys.path.pop()
ROOT = Path(__file__).resolve().parent.parent
QUICK = ["eager", "cat+sdpa-math", "sdpa-math", "cat+sdpa-flash"]


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    output = tmp_path_factory.mktemp("rows") / "attention.jsonl"
    command = ["attention", "--smoke", "--device", "cpu", "--dtype", "fp32", "--output", str(output)]
    assert run.main([*command, "--cases", "0", "--providers", "ours", *QUICK]) == 0
    return output, run.read(output)


def test_rows_carry_everything(attention: tuple[Path, list[dict[str, Any]]]) -> None:
    rows = attention[1]
    (gate,) = [row for row in rows if row["kind"] == "gate"]
    assert gate["passes"]
    assert not gate["problems"]
    timed = {(row["provider"], row["mode"]) for row in rows if row["kind"] == "time"}
    assert timed == {(name, mode) for name in ("ours", *QUICK[:3]) for mode in registry.MODES} | {
        (QUICK[3], mode) for mode in registry.MODES
    }
    for row in rows:
        assert (row["operation"], row["case"], row["dtype"]) == ("attention", "smoke", "float32")
        assert row["shape"]["tokens"] == 9
        assert row["run"]["torch"] == torch.__version__
        assert row["run"]["command"].startswith("python -m benchmarks.run attention --smoke")
        assert {"commit", "gpu", "driver", "triton", "cuda", "time", "modified"} <= set(row["run"])
        if row["kind"] == "time":
            assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
            assert row["bytes"] > 0
            assert row["flops"] > 0


def test_a_mask_that_a_rival_cannot_take_is_said(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    command = ["attention", "--smoke", "--device", "cpu", "--dtype", "fp32", "--output", str(output)]
    run.main([*command, "--cases", "causal", "--providers", "cat+sdpa-flash", "xformers", "sdpa-cudnn"])
    skipped = {row["provider"]: row["why"] for row in run.read(output)}
    assert "takes no mask" in skipped["cat+sdpa-flash"]
    assert set(skipped) == {"cat+sdpa-flash", "xformers", "sdpa-cudnn"}
    assert all(skipped.values())


@pytest.mark.parametrize("name", [each.name for each in registry.ATTENTION.providers if not each.compiled][1:])
def test_rivals_compute_the_operation(name: str) -> None:
    """With and without a mask, forward and backward, against the reference; those that cannot run here say so."""
    (provider,) = [each for each in registry.ATTENTION.providers if each.name == name]
    device = torch.device("cpu")
    for case in ATTENTION_SMOKE:
        inputs = case.make(torch.float32)
        wanted = registry.ATTENTION.reference(**inputs, **case.options())
        try:
            call = provider.prepare(case, case.make(torch.float32), case.options())
            with call.settings():
                found = call.outputs(call.forward())
                gradients = call.forward_backward()
        except (registry.CannotRun, RuntimeError):
            continue
        valid = torch.arange(case.tokens)[None, None, :, None]
        lengths = torch.tensor(case.lengths or (case.tokens,) * case.batch)[:, None, None, None]
        keep = valid < lengths
        assert found[0] is not None
        torch.testing.assert_close(found[0] * keep, wanted[0] * keep)
        torch.testing.assert_close(found[1], wanted[1])
        assert all(each.isfinite().all() for each in gradients)
        assert len(call.backward()()) == len(gradients) == (3 if provider.in_place else 6)
        run.check_same(registry.ATTENTION, provider, case, call, torch.float32, device)


@pytest.mark.parametrize("name", [each.name for each in registry.WINDOWS.providers if "sdpa" in each.name])
def test_rivals_compute_window_attention(name: str) -> None:
    """With and without a mask, forward and backward, against the reference; those that cannot run here say so."""
    (provider,) = [each for each in registry.WINDOWS.providers if each.name == name]
    ran = 0
    for case in WINDOW_SMOKE:
        wanted = registry.WINDOWS.reference(**case.make(torch.float32), **case.options())
        try:
            call = provider.prepare(case, case.make(torch.float32), case.options())
            with call.settings():
                found = call.outputs(call.forward())
                gradients = call.forward_backward()
        except (registry.CannotRun, RuntimeError):
            continue
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        assert all(each.isfinite().all() for each in gradients)
        assert len(gradients) == (3 if provider.in_place else 6)
        run.check_same(registry.WINDOWS, provider, case, call, torch.float32, torch.device("cpu"))
        ran += 1
    assert ran == (2 if name.endswith("math") else 0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [False, True])
def test_flex_attention_has_the_right_mask(causal: bool) -> None:
    """Forward only: on a CPU it has no backward pass."""
    case = AttentionCase(2, 2, 7, 3, 16, causal=causal)
    call = registry._attention_rival(registry._flex, cat=True)(case, case.make(torch.float32), case.options())
    wanted = registry.ATTENTION.reference(**case.make(torch.float32), **case.options())
    for one, other in zip(call.outputs(call.forward()), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_rival_that_computes_something_else_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def halve(case: Any, inputs: dict[str, Any], options: dict[str, Any]) -> registry.Call:
        return registry.Call(
            lambda: tuple(0.9 * each for each in registry.ATTENTION.reference(**inputs, **options)),
            registry.leaves_of(inputs),
        )

    cheat = registry.Provider("cheat", "cheat", halve)
    rows = list(run.rows_of(registry.ATTENTION, ATTENTION_SMOKE[:1], [cheat], torch.float32, torch.device("cpu")))
    assert [row["kind"] for row in rows] == ["skipped"]
    assert "computes something else" in rows[0]["why"]


def test_no_speedup_on_a_red_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    function = registry.INTERACTION.function

    def off(*, impl: str, **given: Any) -> Any:
        outputs = function(**given, impl="reference")
        return outputs if impl == "reference" else tuple(each * 1.001 for each in outputs)

    broken = registry.Operation(
        "interaction",
        off,
        registry.INTERACTION.cases,
        (InteractionCase(2, 2, 2, 16, 16, name="smoke"),),
        (
            registry.Provider("ours", "epic_fast", registry._ours(off, "triton")),
            registry.Provider("eager", "PyTorch, eager", registry._ours(off, "reference")),
        ),
    )
    monkeypatch.setitem(run.OPERATIONS, "interaction", broken)
    output = tmp_path / "rows.jsonl"
    command = ["interaction", "--smoke", "--device", "cpu", "--dtype", "fp32", "--output", str(output)]
    assert run.main(command) == 1
    said = capsys.readouterr().out
    assert "ERROR BUDGET NOT KEPT" in said
    assert "is too far from float64" in said
    table = run.tables(run.read(output))
    assert "numerics fail" in table
    for text in (said, table):
        assert not re.search(r"\d[x×]", text), text
    picture = figures.draw(run.read(output), tmp_path / "figure.png")
    assert picture.stat().st_size > 5_000


def made_up(case: str = "case", *, passes: bool = True, **times: float) -> list[dict[str, Any]]:
    machine = timing.machine("python -m benchmarks.run made up") | {"ceilings": None}
    common = {"operation": "attention", "case": case, "dtype": "bfloat16", "run": machine}
    rows: list[dict[str, Any]] = [{**common, "kind": "gate", "passes": passes, "problems": []}]
    for name, value in times.items():
        provider = next(
            each for each in registry.ATTENTION.providers if each.name.replace("+", "_") == name.replace("__", "-")
        )
        rows.append(
            {
                **common,
                "kind": "time",
                "provider": provider.name,
                "label": provider.label,
                "group": provider.group or provider.label,
                "in_place": provider.in_place,
                "mode": "forward",
                "p50_ms": value,
                "launched_ms": value,
                "graph_ms": None,
                "peak_mib": None,
                "floor_ms": 0.5,
            }
        )
    return rows


def test_tables_take_the_best_rival_of_each_kind() -> None:
    rows = made_up("one", ours=1.0, eager=9.0, cat_sdpa__cudnn=2.5, cat_sdpa__math=4.0, sdpa__cudnn=1.25)
    rows += made_up("two", ours=2.0, eager=3.0)
    lines = run.tables(rows).splitlines()
    assert lines[0].startswith("| forward, ms | epic_fast | PyTorch, eager | cat + SDPA, best backend |")
    assert lines[2] == "| one, bfloat16 | 1.000 | 9.000 | 2.500 | 1.250 | 2.50× | 1.25× | 0.500 |"
    assert lines[3] == "| two, bfloat16 | 2.000 | 3.000 | – | – | 1.50× | – | 0.500 |"
    assert "made up" in lines[-1]
    every = run.tables(rows, every=True).splitlines()
    assert "| 2.500 | 4.000 | 1.250 |" in every[2]
    assert "2.00" not in run.tables(made_up(passes=False, ours=1.0, eager=2.0)).split("numerics fail")[1]


def test_the_floor_is_the_longer_of_moving_and_computing() -> None:
    row = {"kind": "time", "dtype": "bfloat16", "bytes": 3e9, "flops": 7.5e11}
    assert run.floor_of(row, {"copy_tb_s": 3.0, "bf16_tflop_s": 750.0}) == {"floor_ms": pytest.approx(1.0)}
    assert run.floor_of({**row, "bytes": 6e9}, {"copy_tb_s": 3.0, "bf16_tflop_s": 750.0})["floor_ms"] == pytest.approx(
        2
    )
    assert run.floor_of({**row, "flops": 3e12}, {"copy_tb_s": 3.0, "bf16_tflop_s": 750.0})["floor_ms"] == pytest.approx(
        4
    )
    assert run.floor_of(row, None) == {}


def test_the_figure_is_drawn_from_rows(attention: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    picture = tmp_path / "figure.png"
    assert figures.main([str(attention[0]), "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="no graph_ms"):
        figures.main([str(attention[0]), "--output", str(picture), "--column", "graph_ms"])


def test_the_numerics_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, rows = tmp_path / "numerics.md", tmp_path / "numerics.json"
    command = ["--smoke", "--device", "cpu", "--output", str(page), "--rows", str(rows)]
    assert numerics.main([*command, "--impl", "reference", "--dtype", "fp32", "bf16"]) == 0
    found = json.loads(rows.read_text())
    assert {row["dtype"] for row in found["rows"]} == {"float32", "bfloat16"}
    assert {row["operation"] for row in found["rows"]} == set(numerics.CASES) == set(registry.OPERATIONS)
    text = page.read_text()
    assert text == numerics.page(found)
    for part in (
        "## prompt_attention",
        "## prompt_interaction",
        "## window_prompt_attention",
        "## mix_prompt_experts",
        "## infused_attention",
        "## infusion_gate",
        "## infused_swiglu",
        "| bfloat16 | gradient of temperature |",
        "CPU; torch",
    ):
        assert part in text
    found["rows"][0]["passes"] = False
    assert "**fails**" in numerics.page(found)


def test_numerics_by_several_workers_are_those_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows in the same order; threads stand for the processes, which get nothing that cannot be pickled."""

    class Threads(ThreadPoolExecutor):
        def __init__(self, workers: int, context: Any) -> None:
            assert context.get_start_method() == "spawn"
            super().__init__(workers)

        def map(self, function: Any, calls: Any, chunksize: int = 1) -> Any:
            assert chunksize >= 1
            return super().map(pickle.loads(pickle.dumps(function)), pickle.loads(pickle.dumps(calls)))

    monkeypatch.setattr(numerics, "ProcessPoolExecutor", Threads)
    device = torch.device("cpu")
    one, two = (
        numerics.measure("interaction", ["bf16", "fp32"], device, "reference", smoke=True, workers=workers)
        for workers in (1, 2)
    )
    assert one == two
    assert len(one) == 2 * 2 * 11


def test_the_numerics_page_of_the_tree_is_that_of_its_rows() -> None:
    """Made on a GPU of what is committed, of every operation and type, and found from the README."""
    page, rows = ROOT / "docs/numerics.md", ROOT / "benchmarks/results/numerics.json"
    assert page.exists() == rows.exists() == ("(docs/numerics.md)" in (ROOT / "README.md").read_text(encoding="utf-8"))
    if not page.exists():
        return
    found = json.loads(rows.read_text())
    assert page.read_text(encoding="utf-8") == numerics.page(found)
    assert found["run"]["gpu"]
    assert found["run"]["commit"]
    assert not found["run"]["modified"]
    assert all(row["passes"] for row in found["rows"])
    kinds = ("float32", "float32 (TF32)", "float16", "bfloat16")
    shown = {(row["operation"], row["dtype"], row["case"]) for row in found["rows"]}
    assert shown == {
        (operation, kind, case.name)
        for operation in numerics.CASES
        for kind in kinds
        for case in numerics.CASES[operation]
    }


def test_commands_say_what_there_is() -> None:
    with pytest.raises(SystemExit, match=r"no provider nobody; there are ours, eager"):
        run.main(["attention", "--providers", "nobody"])
    with pytest.raises(SystemExit, match="vision L/14@336"):
        run.main(["attention", "--cases", "nothing"])


@pytest.mark.slow
@pytest.mark.parametrize("operation", registry.OPERATIONS)
def test_the_command_runs_from_the_root_without_installing(operation: str, tmp_path: Path) -> None:
    """Compiled rivals included."""
    output = tmp_path / "rows.jsonl"
    command = ["benchmarks.run", operation, "--smoke", "--device", "cpu", "--dtype", "fp32", "--cases", "0"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--providers", "eager", "compiled", "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = run.read(output)
    assert {row["mode"] for row in rows if row["provider"] == "compiled"} == {"forward", "forward+backward"}


def test_the_readme_shows_what_the_rows_say() -> None:
    """Its table is what the command prints, line by line, and each line can be found in the rows."""
    shown = [
        line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if re.search(r"× \|$", line)
    ]
    assert shown == summary.table().splitlines()[2:]
    attention = run.read(ROOT / "benchmarks/results/attention.jsonl")
    times = {
        row["provider"]: row["graph_ms"]
        for row in attention
        if row["kind"] == "time" and row["case"] == "vision L/14" and row["mode"] == "forward+backward"
    }
    best = min(time for name, time in times.items() if name not in ("ours", "xformers") and not name.startswith("sdpa"))
    assert f"| {best / times['ours']:.2f}× |" in shown[0]
    assert f"| {times['ours']:.3f} ms, " in shown[0]


@pytest.mark.parametrize("case", ["text L", "LLaMA-2-7B, n=40"])
def test_no_speed_is_shown_of_wrong_numbers(tmp_path: Path, case: str) -> None:
    for name in summary.OPERATIONS:
        rows = run.read(ROOT / f"benchmarks/results/{name}.jsonl")
        for row in rows:
            if row["kind"] == "gate" and row["case"] == case:
                row["passes"] = False
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(SystemExit, match=f"{case}: its numerics fail"):
        summary.table(tmp_path)


BOTH = ("forward", "forward+backward")
# Of each operation: the columns that docs/speed.md has a table of, and the modes.
SHOWN = {
    "attention": {
        "graph_ms": BOTH,
        "launched_ms": BOTH[1:],
        "launched_one_thread_ms": BOTH[1:],
        "peak_mib": BOTH[1:],
    },
    "interaction": {"graph_ms": BOTH, "launched_ms": BOTH[1:], "launched_one_thread_ms": BOTH[1:]},
    "windows": {"graph_ms": BOTH},
    "experts": {"graph_ms": BOTH},
    "infused": {"graph_ms": BOTH, "peak_mib": BOTH[1:]},
    "gate": {"graph_ms": BOTH},
    "swiglu": {"graph_ms": BOTH},
}


def test_the_page_of_speed_shows_the_recorded_speed() -> None:
    """Every operation's tables, whole, those of graphs in the operations' order, and no other table."""
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8").partition("\n## Calls, one by one\n")[0]
    assert list(SHOWN) == list(registry.OPERATIONS)
    wanted, places = [], []
    for name, columns in SHOWN.items():
        rows = run.read(ROOT / f"benchmarks/results/{name}.jsonl")
        assert all(row["run"]["gpu"] and row["run"]["commit"] and not row["run"]["modified"] for row in rows)
        assert all(row["passes"] for row in rows if row["kind"] == "gate")
        assert not any(row["kind"] == "skipped" and row["provider"] == "ours" for row in rows)
        assert f"](../benchmarks/results/{name}.jsonl)" in page
        assert {row["run"]["commit"][:10] for row in rows if row["run"]["commit"][:10] not in page} == set()
        for column, modes in columns.items():
            tables = [each.strip() for each in run.tables(rows, column).split("\n\n")]
            tables = [each for each in tables if each.startswith(tuple(f"| {mode}, " for mode in modes))]
            wanted += tables
            places += [page.find(each) for each in tables if column == "graph_ms"]
    assert len(wanted) == sum(len(modes) for columns in SHOWN.values() for modes in columns.values())
    found = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    assert sorted(table.strip() for table in found) == sorted(wanted)
    assert places == sorted(places)


def test_the_notes_of_attention_show_the_recorded_speed() -> None:
    """The table of both cards, cell by cell, and the distance to the floor of 273 rows."""

    def cells(name: str, case: str) -> list[str]:
        rows = run.read(ROOT / f"benchmarks/results/{name}.jsonl")
        timed = [row for row in rows if row["kind"] == "time" and row["case"] == case and row["graph_ms"] is not None]

        def both(choose: Any) -> str:
            return ", ".join(f"{choose([row for row in timed if row['mode'] == mode]):.3f}" for mode in BOTH)

        return [
            both(lambda here: next(row["graph_ms"] for row in here if row["provider"] == "ours")),
            both(lambda here: min(row["graph_ms"] for row in here if row["provider"].startswith("sdpa-"))),
            both(lambda here: here[0]["floor_ms"]),
        ]

    text = (ROOT / "kernels/prompt_attention/README.md").read_text(encoding="utf-8")
    section = text.partition("\n## Measured\n")[2]
    shown = [line for line in section.splitlines() if line.startswith("| ")][1:]
    names = [line.split("|")[1].strip() for line in shown]
    assert names == ["vision L/14", "vision L/14@336", "text L", "long text", "vision L/14, large batch"]
    files = ("attention", "attention_h100")
    wanted = [" | ".join([f"| {name}", *(cell for file in files for cell in cells(file, name))]) for name in names]
    assert shown == [f"{line} |" for line in wanted]
    for file in files:
        row = next(
            row
            for row in run.read(ROOT / f"benchmarks/results/{file}.jsonl")
            if row["kind"] == "time" and (row["case"], row["provider"], row["mode"]) == (names[0], "ours", "forward")
        )
        assert f" {row['graph_ms'] / row['floor_ms']:.2f} times its floor" in section


def test_the_record_of_gpu_tests_counts_what_pytest_reports(tmp_path: Path) -> None:
    """A pass, a failure, an error and a skip each land where they belong."""
    source = tmp_path / "test_four.py"
    source.write_text(
        "import pytest\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no')\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "def test_error(broken): pass\n"
        "@pytest.mark.skip(reason='another card')\n"
        "def test_not_here(): pass\n"
    )
    report = tmp_path / "report.xml"
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"]
    subprocess.run([*run, f"--junit-xml={report}", str(source)], cwd=tmp_path, check=False, capture_output=True)
    record = gpu_tests.summarise(report.read_text())
    assert record["passed"] == 1
    assert sorted(name.rsplit("::", 1)[1] for name in record["failed"]) == ["test_bad", "test_error"]
    assert list(record["skipped"].values()) == ["another card"]
    assert record["files"] == {"test_four.py": {"passed": 1, "failed": 2, "skipped": 1}}


@pytest.mark.parametrize(("asked", "said"), [(None, "Python"), ("1", "compiled")])
def test_the_record_of_gpu_tests_says_how_the_tests_launched(
    asked: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the tests' own process, where the default is set by tests/conftest.py, and of this one alike."""
    seen: list[str | None] = []
    run = subprocess.run

    def no_pytest(command: Any, **more: Any) -> Any:
        if "pytest" not in command:
            return run(command, **more)
        (report,) = [each.partition("=")[2] for each in command if each.startswith("--junit-xml=")]
        Path(report).write_text('<testsuites><testcase file="tests/test_one.py" name="test_one"/></testsuites>')
        seen.append(os.environ.get("EPIC_FAST_NATIVE"))
        return subprocess.CompletedProcess(command, 0)

    # Set first, so that what the command leaves in the environment is taken away with it.
    monkeypatch.setenv("EPIC_FAST_NATIVE", asked or "")
    if asked is None:
        monkeypatch.delenv("EPIC_FAST_NATIVE")
    monkeypatch.setattr(subprocess, "run", no_pytest)
    monkeypatch.setattr(native, "load", lambda: "built")
    monkeypatch.setattr(native, "_wanted", True)
    native.find.cache_clear()
    try:
        output = tmp_path / "record.json"
        assert gpu_tests.main(["--output", str(output)]) == 0
    finally:
        native.find.cache_clear()
    record = json.loads(output.read_text())
    assert (record["passed"], record["run"]["launches"]) == (1, said)
    assert seen == [asked or "0"]
