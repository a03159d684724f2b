"""The benchmark of MiT's step: the rival computes the method, a wrong one has no time, tables come from rows alone."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epic_fast import functional

# The root is no place to import from for longer than this: the folder `kernels` lies there.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import mit_rival, mit_step, step, step_gate, step_profile, timing
from benchmarks.mit_step import CASES, MIT, PROVIDERS, MitCase, MitSetting
from benchmarks.run import read

sys.path.pop()

CPU = torch.device("cpu")
FEW = MitCase("mit", 3, "step", tokens=40)


def run(output: Path, *arguments: str) -> int:
    return step.main(["--tiny", "--device", "cpu", "--output", str(output), *arguments], MIT)


def made(dtype: torch.dtype = torch.float32) -> MitSetting:
    return MitSetting.make(CPU, dtype, tiny=True)


def result(setting: MitSetting, name: str, case: MitCase = FEW) -> dict[str, torch.Tensor]:
    """Logits and gradients by name."""
    with PROVIDERS[name].settings():
        of = PROVIDERS[name].prepare(setting, case)
        logits, gradients = of.call()
    return {"logits": logits, **dict(zip(of.names, gradients, strict=True))}


def furthest(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def test_the_rival_computes_the_method() -> None:
    setting = made()
    ours, rival = result(setting, "ours-plain"), result(setting, "eager")
    assert {name.split(".")[0] for name in ours} == {"logits", "infusions", "head"}
    assert all(each.abs().max() > 0 for each in ours.values())
    assert 0 < furthest(rival, ours) < 1e-4
    assert 0 < furthest(result(setting, "ours"), ours) < 1e-4
    forward = MitCase("mit", 3, "forward", tokens=64)
    assert furthest(result(setting, "eager", forward), result(setting, "ours-plain", forward)) < 1e-4


def test_the_rival_is_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("infusion_gate", "infused_attention", "infused_swiglu"):
        monkeypatch.setattr(functional, name, lambda *given, **named: pytest.fail("ours in the rival"))
    result(made(), "eager")


def test_a_rival_whose_gate_reads_padding_computes_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, gate = made(), mit_rival.naive_gate
    ours = result(setting, "ours-plain")
    monkeypatch.setattr(mit_rival, "naive_gate", lambda value, source, valid: gate(value, source, None))
    assert furthest(result(setting, "eager"), ours) > 1e-3
    one = MitCase("mit", 1, "step", tokens=40)
    # The longest text of a batch has no padding.
    assert furthest(result(setting, "eager", one), result(setting, "ours-plain", one)) < 1e-4
    monkeypatch.setattr(step, "measure", lambda *given: pytest.fail("a wrong provider was timed"))
    assert run(tmp_path / "rows", "--cases", "step-40", "--providers", "ours-plain") == 1
    (row,) = read(tmp_path / "rows")
    assert row["kind"] == "failed"
    assert "relative error" in row["why"]


@torch.no_grad()
def test_the_frozen_model_reads_the_last_valid_token() -> None:
    setting = made()
    batch = setting.batch(FEW)
    found = result(setting, "frozen", MitCase("mit", 3, "forward", tokens=40))["logits"]
    for sample, length in enumerate(batch["text_lengths"].tolist()):
        hidden = setting.language(batch["input_ids"][sample : sample + 1, :length]).last_hidden_state
        torch.testing.assert_close(found[sample], hidden[0, -1], rtol=1e-4, atol=1e-5)


def test_the_frozen_model_in_the_engine_is_the_frozen_model() -> None:
    setting, case = made(), MitCase("mit", 3, "forward", tokens=40)
    wanted = result(setting, "frozen", case)["logits"]
    without_graph = dataclasses.replace(PROVIDERS["frozen-ours"], graph=False)
    found = without_graph.prepare(setting, case).call()[0]
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_visual_tokens_stand_in_front_of_the_text() -> None:
    setting = made()
    found = result(setting, "visual")
    assert set(found) == {"logits", "projector.weight", "projector.bias", "head.weight", "head.bias"}
    assert all(each.abs().max() > 0 for each in found.values())
    model = mit_step.plain_model(setting, FEW, "visual")
    inputs = mit_step.inputs_of(setting, FEW, "visual")
    wanted = model(**inputs)[1].detach()
    torch.testing.assert_close(found["logits"], wanted)
    shifted = {**inputs, "patches": inputs["patches"].roll(1, dims=0)}
    assert not torch.isclose(model(**shifted)[1], wanted).all(dim=1).any()


def test_every_provider_leaves_a_row_that_passes_its_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "FEWEST", 2)
    output, cases = tmp_path / "rows.jsonl", ["forward-40", "step-40"]
    assert run(output, "--cases", *cases) == 0
    rows = read(output)
    assert [(row["case"], row["provider"]) for row in rows] == [
        (case, name) for case in cases for name, each in PROVIDERS.items() if CASES[case].mode in each.modes
    ]
    for row in rows:
        assert row["benchmark"] == "mit_step"
        assert (row["tokens"], row["batch"], row["towers"]) == (40, 8, "tiny")
        assert row["infused_layers"] == ([1, 3] if row["method"] == "mit" else [])
        assert row["run"]["command"].startswith("python -m benchmarks.mit_step --tiny")
        assert min(row["flops"], row["floor_bytes"]) > 0
        if PROVIDERS[row["provider"]].graphed:
            assert row["why"] == "CUDA graphs need a GPU; this is cpu"
            continue
        assert row["kind"] == "time", row
        assert row["gate"]["passes"]
        kinds = {"logits", "gates", "projections", "head"} - ({"gates"} if row["method"] == "visual" else set())
        assert set(row["gate"]["errors"]) == (kinds if row["mode"] == "step" else {"logits"})
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert step.main(["--output", str(output), "--table"], MIT) == 0
    assert "| MiT, one step, B=8 | n=40, ms | n=40: compiled / this |" in capsys.readouterr().out


def test_half_precision_is_within_its_own_budget() -> None:
    half = made(torch.bfloat16)
    wanted = mit_step.wanted_of(half, FEW, "mit")
    assert wanted.logits.dtype == torch.float32
    assert all(1e-4 < each < 0.2 for each in wanted.plain.values()), wanted.plain
    for name in ("ours-plain", "ours"):
        assert step_gate.gate(PROVIDERS[name], PROVIDERS[name].prepare(half, FEW), wanted, torch.bfloat16)["passes"]


def test_every_text_has_the_instruction_and_the_longest_fills_the_row() -> None:
    setting = made()
    for case in CASES.values():
        batch = setting.batch(case)
        tokens = batch["input_ids"].shape[1]
        assert tokens == setting.tokens(case) == int(case.name.split("-")[1]) // 4
        assert torch.equal(batch["attention_mask"].sum(dim=1), batch["text_lengths"])
        assert tokens // 2 < batch["text_lengths"].min() < batch["text_lengths"].max() == tokens
    full = [sorted(MitCase("mit", 8, "step", tokens=tokens).draw_lengths(tokens)) for tokens in (40, 64)]
    assert full == [[25, 27, 28, 29, 31, 32, 35, 40], [40, 43, 45, 47, 49, 52, 56, 64]]


def test_floors_are_those_of_the_seven_billion() -> None:
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "head_dim": 128}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 512}
    setting = MitSetting(SimpleNamespace(config=SimpleNamespace(**shape, **heads)), CPU, torch.bfloat16, tiny=False)
    frozen, forward = (mit_step.floor_of(setting, CASES["forward-40"], method) for method in ("frozen", "mit"))
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert frozen.bytes == 2 * weights
    # Of all 32 layers; what the last one does not compute is 2.5 %.
    products = 2.0 * weights * sum(CASES["forward-40"].draw_lengths(40))
    assert 0.97 < frozen.flops / products < 0.98
    transforms = 8 * 769 * (3 * 4096 + 11008)
    assert forward.bytes - frozen.bytes == 4 * transforms
    one, visual = (mit_step.floor_of(setting, CASES["step-40"], method) for method in ("mit", "visual"))
    assert one.bytes == 2 * weights * 52 / 32 + 8 * transforms
    assert 1.5 < one.flops / forward.flops < 1.65
    assert 20 < visual.flops / one.flops < 30


def test_the_profile_sorts_device_time() -> None:
    found = step_profile.profile(made(), CASES["step-40"], PROVIDERS["ours"])
    assert found.startswith("step-40, + engine")
    assert "matrix products" in found


def made_up(case: str, provider: str, milliseconds: float, gib: float | None = None) -> dict[str, Any]:
    machine = timing.machine("made up") | {"gpu": "a card", "driver": "1"}
    of: Any = CASES[case]
    return {
        "kind": "time",
        "case": case,
        "mode": of.mode,
        "tokens": of.tokens,
        "provider": provider,
        "label": PROVIDERS[provider].label,
        "p50_ms": milliseconds,
        "peak_mib": None if gib is None else 1024 * gib,
        "run": machine,
    }


def test_tables_print_the_ratios_of_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        made_up("forward-40", "frozen", 99.0),
        made_up("forward-40", "frozen", 10.0),
        made_up("forward-40", "frozen-graph", 8.0),
        made_up("forward-40", "eager", 12.0),
        made_up("forward-40", "graphs", 8.2),
        made_up("step-40", "compiled", 16.0, 2.0),
        made_up("step-40", "visual", 300.0, 30.0),
        made_up("step-40", "visual-compiled", 240.0, 20.0),
        made_up("step-40", "graphs", 12.0, 1.2),
        made_up("step-64", "graphs", 18.0),
        {**made_up("step-40", "recompute-graphs", 0.0), "kind": "skipped", "why": "it cannot", "p50_ms": None},
    ]
    output = tmp_path / "rows.jsonl"
    output.write_text("\n".join(map(json.dumps, rows)))
    assert step.main(["--output", str(output), "--table"], MIT) == 0
    lines = capsys.readouterr().out.splitlines()
    over = "over the frozen model, eager"
    assert lines[0] == f"| MiT, forward, B=8 | n=40, ms | n=40: {over} | compiled | CUDA graph | engine and graph |"
    assert lines[2:6] == [
        "| the frozen model, eager | 10.0 | – | – | +25.0 % | – |",
        "| the frozen model, CUDA graph | 8.00 | -20.0 % | – | – | – |",
        "| PyTorch, keys and values infused, eager | 12.0 | +20.0 % | – | +50.0 % | – |",
        "| + CUDA graph | 8.20 | -18.0 % | – | +2.5 % | – |",
    ]
    assert lines[7].startswith("| MiT, one step, B=8 | n=40, ms | n=64, ms | n=40: compiled / this | 576 visual tokens")
    assert lines[9:13] == [
        "| PyTorch, keys and values infused, compiled | 16.0 | – | 1.00× | 15.00× | 2.00 | 1.00 | – | – | – | – |",
        "| 576 visual tokens, eager | 300.0 | – | 0.05× | 0.80× | 30.00 | 15.00 | – | – | – | – |",
        "| 576 visual tokens, compiled | 240.0 | – | 0.07× | 1.00× | 20.00 | 10.00 | – | – | – | – |",
        "| + CUDA graph | 12.0 | 18.0 | 1.33× | 20.00× | 1.20 | 0.60 | – | – | – | – |",
    ]
    assert "- + the MLP computed twice (step-40): it cannot" in lines
    assert lines[-1].startswith("a card, driver 1")


def test_the_page_of_speed_shows_the_recorded_steps() -> None:
    rows = read(mit_step.ROWS)
    assert all(row["run"]["gpu"] and row["run"]["commit"] and not row["run"]["modified"] for row in rows)
    page = (Path(mit_step.__file__).parents[1] / "docs/speed.md").read_text(encoding="utf-8")
    _, _, section = page.partition("| MiT, forward")
    shown = [line for line in ("| MiT, forward" + section).splitlines() if line.startswith("|")]
    printed = mit_step.tables(rows).splitlines()
    assert len(shown) > 12
    assert shown == [line for line in printed if line.startswith("|")]
    assert [line for line in printed if line.startswith("NVIDIA") and line not in section] == []
