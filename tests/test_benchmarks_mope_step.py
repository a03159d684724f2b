"""The benchmark of MoPE's step: the rival computes the method, a wrong one has no time, tables come from rows alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from epic_fast import functional
from epic_fast.engine.window_blocks import WindowStream
from epic_fast.testing import tiny_bert, tiny_swin
from epic_fast.testing.probes import lively

# The root is no place to import from for longer than this: the folder `kernels` lies there.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import mope_rival, mope_step, step, step_gate, step_profile, timing
from benchmarks.mope_step import CASES, MOPE, PROVIDERS, MopeCase, MopeSetting
from benchmarks.run import read

sys.path.pop()

CPU = torch.device("cpu")
FEW = MopeCase("mope", 3)


def run(output: Path, *arguments: str) -> int:
    return step.main(["--tiny", "--device", "cpu", "--output", str(output), *arguments], MOPE)


def made(size: int) -> MopeSetting:
    """A tiny setting for pictures of ``size`` pixels."""
    swin, bert = lively((tiny_swin(image_size=size, depths=(2, 3)), tiny_bert(layers=2)))
    mope_rival.attach_dense_biases(swin, mope_step.configuration(FEW).rows)
    return MopeSetting(swin, bert, CPU, torch.float32, tiny=True)


def result(setting: MopeSetting, name: str, case: MopeCase = FEW) -> dict[str, torch.Tensor]:
    """Logits and gradients by name."""
    with PROVIDERS[name].settings():
        of = PROVIDERS[name].prepare(setting, case)
        logits, gradients = of.call()
    return {"logits": logits, **dict(zip(of.names, gradients, strict=True))}


def furthest(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


# Windows (and with two sets of biases, shifted blocks) of the blocks: with 40 pixels the grids have to be filled up.
@pytest.mark.parametrize(("size", "windows"), [(32, [1, 4, 1, 1, 1]), (40, [1, 9, 1, 4, 1])])
def test_the_rival_computes_the_method(size: int, windows: list[int]) -> None:
    setting = made(size)
    assert [len(block.dense_bias) for stage in setting.swin.encoder.layers for block in stage.blocks] == windows
    ours, rival = result(setting, "ours-plain"), result(setting, "eager")
    assert len(ours) > 20
    assert all(each.abs().max() > 0 for each in ours.values())
    assert 0 < furthest(rival, ours) < 1e-4
    forward = MopeCase("mope", 3, "forward")
    assert furthest(result(setting, "eager", forward), result(setting, "ours-plain", forward)) < 1e-4


def test_the_rival_is_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    mix = functional.mix_prompt_experts

    def noting(*args: Any, impl: str = "auto", **kwargs: Any) -> Any:
        asked.append(impl)
        return mix(*args, impl=impl, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(functional, "mix_prompt_experts", noting)
    setting = made(32)
    result(setting, "ours-plain")
    assert set(asked) == {"auto"}
    asked.clear()
    monkeypatch.setattr(functional, "window_prompt_attention", lambda *given, **named: pytest.fail("ours in the rival"))
    result(setting, "eager")
    assert set(asked) == {"reference"}


def window_major(prompts: torch.Tensor, windows: int) -> torch.Tensor:
    """The pairing of the released code."""
    return prompts.repeat(windows, 1, 1)


def test_a_window_major_rival_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = made(32)
    ours = result(setting, "ours-plain")
    monkeypatch.setattr(mope_rival, "copy_prompts", window_major)
    assert furthest(result(setting, "eager"), ours) > 1e-2
    one = MopeCase("mope", 1)
    # A single sample has no one to be mixed up with.
    assert furthest(result(setting, "eager", one), result(setting, "ours-plain", one)) < 1e-4
    monkeypatch.setattr(step, "measure", lambda *given: pytest.fail("a wrong provider was timed"))
    assert run(tmp_path / "rows", "--cases", "step-8", "--providers", "ours-plain") == 1
    (row,) = read(tmp_path / "rows")
    assert row["kind"] == "failed"
    assert "relative error" in row["why"]


def test_every_provider_leaves_a_row_that_passes_its_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "FEWEST", 2)
    output, cases = tmp_path / "rows.jsonl", ["step-8", "forward-8"]
    assert run(output, "--cases", *cases) == 0
    rows = read(output)
    assert [(row["case"], row["provider"]) for row in rows] == [
        (case, name) for case in cases for name, each in PROVIDERS.items() if CASES[case].mode in each.modes
    ]
    for row in rows:
        assert row["benchmark"] == "mope_step"
        assert (row["prompt_rows"], row["experts"], row["towers"]) == (13, 4, "tiny")
        assert row["run"]["command"].startswith("python -m benchmarks.mope_step --tiny")
        assert {"commit", "gpu", "torch", "triton", "ceilings"} <= set(row["run"])
        if PROVIDERS[row["provider"]].graphed:
            assert row["why"] == "CUDA graphs need a GPU; this is cpu"
            continue
        assert row["kind"] == "time", row
        assert row["gate"]["passes"]
        step_kinds = {"logits", "prompts", "projections", "head"}
        assert set(row["gate"]["errors"]) == (step_kinds if row["mode"] == "step" else {"logits"})
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert step.main(["--output", str(output), "--table"], MOPE) == 0
    assert "| MoPE, one step | B=8, ms | B=8: × eager |" in capsys.readouterr().out


def test_half_precision_is_within_its_own_budget() -> None:
    half = MopeSetting.make(CPU, torch.bfloat16, tiny=True)
    wanted = mope_step.wanted_of(half, FEW, "mope")
    assert wanted.logits.dtype == torch.float32
    assert all(1e-4 < each < 0.2 for each in wanted.plain.values()), wanted.plain
    assert step_gate.gate(PROVIDERS["ours"], PROVIDERS["ours"].prepare(half, FEW), wanted, torch.bfloat16)["passes"]


def test_rows_of_this_commit_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"commit": "c", "gpu": None, "torch": "t", "modified": False}
    monkeypatch.setattr(timing, "machine", lambda command: {"command": command, **facts})
    monkeypatch.setattr(step, "FEWEST", 2)
    output = tmp_path / "rows.jsonl"
    command = ["--cases", "forward-8", "--providers", "frozen"]
    counts = []
    for more in ([], [], ["--again"], ["--again", "--seconds", "-1"]):
        assert run(output, *command, *more) == 0
        counts.append(len(read(output)))
    assert counts == [1, 1, 2, 2]
    assert "no time left for: --cases forward-8 --providers frozen" in capsys.readouterr().err


def test_texts_are_padded_to_the_longest_of_the_batch() -> None:
    setting = made(32)
    for case in CASES.values():
        batch, lengths = setting.batch(case), setting.lengths(case)
        assert torch.equal(batch["attention_mask"].sum(dim=1), lengths)
        assert batch["input_ids"].shape == (case.batch, setting.padded(case))
        assert lengths.max() <= setting.padded(case) <= 16
    full = [MopeCase("mope", batch).draw_lengths(mope_step.LONGEST) for batch in (8, 64)]
    assert [-(-max(each) // mope_step.MULTIPLE) * mope_step.MULTIPLE for each in full] == [64, 80]


def test_the_profile_sorts_device_time() -> None:
    found = step_profile.profile(made(32), CASES["step-8"], PROVIDERS["ours"])
    assert found.startswith("step-8, + engine")
    assert "matrix products" in found


def test_the_promptless_swin_of_the_engine_is_the_promptless_swin(monkeypatch: pytest.MonkeyPatch) -> None:
    setting, seen = made(40), []
    real = WindowStream.step
    monkeypatch.setattr(WindowStream, "step", lambda *given: (seen.append(given[1]), real(*given))[1])
    pixels = setting.batch(FEW)["pixel_values"]
    ours = mope_step.FrozenInEngine(setting, mope_step._ENGINE)
    ours(pixels)
    # The first call has also checked a fused block against its modules.
    seen.clear()
    _, found = ours(pixels)
    assert len(seen) == len(set(seen)) == ours.model.backbone.vision.num_layers
    ours.model.unwrap()
    _, wanted = mope_step.FrozenPictures(setting.swin)(pixels)
    assert found.shape == wanted.shape == (3, setting.swin.config.hidden_size)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_warming_calls_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called, prepare = [], mope_step.MopeProvider.prepare

    def counted(self: Any, setting: Any, case: Any) -> Any:
        found = prepare(self, setting, case)
        compute = found.compute
        found.compute = lambda inputs: (called.append((case.name, self.name)), compute(inputs))[1]
        return found

    monkeypatch.setattr(mope_step.MopeProvider, "prepare", counted)
    output = tmp_path / "rows.jsonl"
    names = ["eager", "frozen", "graphs"]
    assert run(output, "--warm", "--cases", "step-8", "forward-8", "--providers", *names) == 0
    # No promptless step, no graph on a CPU.
    assert called == [("step-8", "eager"), ("forward-8", "eager"), ("forward-8", "frozen")]
    assert not output.exists()
    said = capsys.readouterr().err
    assert said.count(" warm ") == 3
    assert said.count("CUDA graphs need a GPU") == 2
    monkeypatch.setattr(mope_step.MopeProvider, "prepare", lambda *given: 1 / 0)
    assert run(output, "--warm", "--cases", "step-8", "--providers", "eager") == 1
    assert "failed: ZeroDivisionError" in capsys.readouterr().err


def made_up(case: str, provider: str, milliseconds: float, gib: float | None = None) -> dict[str, Any]:
    machine = timing.machine("made up") | {"gpu": "a card", "driver": "1"}
    of, who = CASES[case], PROVIDERS[provider]
    return {
        "kind": "time",
        "case": case,
        "mode": of.mode,
        "batch": of.batch,
        "provider": provider,
        "label": who.label,
        "p50_ms": milliseconds,
        "peak_mib": None if gib is None else 1024 * gib,
        "run": machine,
    }


def test_tables_print_the_ratios_of_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        made_up("step-64", "eager", 999.0, 30.0),
        made_up("step-64", "eager", 100.0, 30.0),
        made_up("step-8", "eager", 20.0),
        made_up("step-64", "compiled", 80.0, 20.0),
        made_up("step-64", "ours", 50.0, 12.0),
        {**made_up("step-64", "graphs", 0.0), "kind": "skipped", "why": "it cannot", "p50_ms": None},
        made_up("forward-64", "frozen", 20.0),
        made_up("forward-64", "frozen-compiled", 16.0),
        made_up("forward-64", "frozen-ours", 13.0),
        made_up("forward-64", "eager", 25.0),
        made_up("forward-64", "ours", 20.8),
    ]
    output = tmp_path / "rows.jsonl"
    output.write_text("\n".join(map(json.dumps, rows)))
    assert step.main(["--output", str(output), "--table"], MOPE) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "| MoPE, one step | B=8, ms | B=64, ms | B=64: × eager | × compiled | memory added, GiB | of compiled's |"
    )
    assert lines[2:5] == [
        "| PyTorch, prompts copied, eager | 20.0 | 100.0 | 1.00× | 0.80× | 30.00 | 1.50 |",
        "| PyTorch, prompts copied, compiled | – | 80.0 | 1.25× | 1.00× | 20.00 | 1.00 |",
        "| + engine | – | 50.0 | 2.00× | 1.60× | 12.00 | 0.60 |",
    ]
    # Of the promptless ones those that were measured.
    over = [f"B=64: over promptless, {how}" for how in ("eager", "compiled", "engine and graph")]
    assert lines[6] == "| " + " | ".join(["pictures, forward", "B=64, ms", *over]) + " |"
    assert lines[8:13] == [
        "| PyTorch, prompts copied, eager | 25.0 | +25.0 % | +56.2 % | +92.3 % |",
        "| the promptless Swin, eager | 20.0 | – | +25.0 % | +53.8 % |",
        "| the promptless Swin, compiled | 16.0 | -20.0 % | – | +23.1 % |",
        "| the promptless Swin, engine and CUDA graph | 13.0 | -35.0 % | -18.8 % | – |",
        "| + engine | 20.8 | +4.0 % | +30.0 % | +60.0 % |",
    ]
    assert "- + CUDA graph (step-64): it cannot" in lines
    assert lines[-1].startswith("a card, driver 1")


def test_the_page_of_speed_shows_the_recorded_steps() -> None:
    rows = read(mope_step.ROWS)
    assert all(row["run"]["gpu"] and row["run"]["commit"] and not row["run"]["modified"] for row in rows)
    page = (Path(mope_step.__file__).parents[1] / "docs/speed.md").read_text(encoding="utf-8")
    _, _, section = page.partition("**MoPE** on Swin-B")
    shown = [line for line in section.partition("**MiT**")[0].splitlines() if line.startswith("|")]
    printed = mope_step.tables(rows).splitlines()
    assert len(shown) > 12
    assert shown == [line for line in printed if line.startswith("|")]
    assert [line for line in printed if line.startswith("NVIDIA") and line not in section] == []
