"""The benchmark of a training step: no time without right numbers, and tables and figure come from rows alone."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from epic_fast import functional
from epic_fast.engine import EngineConfig
from epic_fast.engine.graphs import flatten

# The root is no place to import from for longer than this: the folder `kernels` lies there.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import figures, step, step_cases, step_gate, step_profile, step_providers, timing
from benchmarks.registry import CannotRun
from benchmarks.run import read
from benchmarks.step_cases import CASES, Setting, StepCase, TowerShape, Work
from benchmarks.step_providers import PROVIDERS

sys.path.pop()

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
QUICK = [name for name, each in PROVIDERS.items() if each.compile is None]
TINY = ["late-8", "deep-8", "late-1-inference"]


def run(output: Path, *arguments: str) -> int:
    return step.main(["--tiny", "--device", "cpu", "--output", str(output), *arguments])


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting.make(CPU, torch.float32, tiny=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("step") / "step.jsonl"
    assert run(output, "--cases", *TINY, "--providers", *QUICK) == 0
    return read(output)


def test_every_provider_leaves_a_row_that_carries_everything(rows: list[dict[str, Any]]) -> None:
    expected = [(case, name) for case in TINY for name in QUICK if step.measured_at(PROVIDERS[name], CASES[case])]
    assert [(row["case"], row["provider"]) for row in rows] == expected
    for row in rows:
        assert row["kind"] in ("time", "skipped"), row
        assert row["towers"] == "tiny"
        assert row["frozen_dtype"] == "float32"
        assert row["texts"]["padded_to"] == 16
        assert row["flops"] > 0
        assert row["run"]["command"].startswith("python -m benchmarks.step --tiny")
        assert {"commit", "gpu", "driver", "torch", "triton", "cuda", "time", "modified", "ceilings"} <= set(row["run"])
        if row["kind"] == "skipped":
            assert row["why"]
            continue
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["steps"] >= 10
        assert row["samples_s"] == pytest.approx(1e3 * row["batch"] / row["p50_ms"])
        kinds = {"logits"}
        if row["mode"] == "step":
            kinds |= {"epic": {"prompts", "projections", "gates", "head"}, "lora": {"adapters", "head"}}.get(
                row["method"], {"backbone", "head"} if row["method"] == "full" else set()
            )
        assert set(row["gate"]["errors"]) == kinds
        assert all(0 <= each["error"] <= each["budget"] < 0.5 for each in row["gate"]["errors"].values())


def test_plain_providers_always_run(rows: list[dict[str, Any]]) -> None:
    ran = {(row["case"], row["provider"]) for row in rows if row["kind"] == "time"}
    assert {(case, name) for case in TINY for name in ("eager", "hub", "blocks", "pooled", "trimmed")} <= ran
    assert {("late-8", "full"), ("late-8", "frozen"), ("late-1-inference", "frozen")} <= ran
    assert {(case, "saved") for case in TINY[:2]} <= ran
    # What needs a GPU says so.
    reasons = {row["provider"]: row["why"] for row in rows if row["kind"] == "skipped"}
    assert "CUDA graphs need a GPU" in reasons["graphs"]


def test_half_precision_is_within_its_own_budget(setting: Setting) -> None:
    """Against float32: plain bfloat16 has an error to speak of, and the budget follows it."""
    half = Setting(copy.deepcopy(setting.clip).bfloat16(), CPU, torch.bfloat16, tiny=True)
    wanted = step_gate.wanted_of(half, CASES["late-8"], "epic")
    assert wanted.logits.dtype == torch.float32
    assert set(wanted.plain) == {"logits", "prompts", "projections", "gates", "head"}
    assert all(1e-4 < each < 0.1 for each in wanted.plain.values()), wanted.plain
    made = PROVIDERS["hub"].prepare(half, CASES["late-8"])
    assert step_gate.gate(PROVIDERS["hub"], made, wanted, torch.bfloat16)["passes"]
    assert step._types(made.model) == "float32"


def test_the_reference_in_parts_is_the_gradient_of_the_whole_batch(setting: Setting) -> None:
    case = StepCase("deep", 2 * step_gate.PART + 3)
    wanted = step_gate.wanted_of(setting, case, "epic")
    whole = PROVIDERS["eager"].prepare(setting, case)
    logits, gradients = whole.call()
    torch.testing.assert_close(wanted.logits, logits)
    for name, each in zip(whole.names, gradients, strict=True):
        torch.testing.assert_close(wanted.gradients[name], each, rtol=1e-4, atol=1e-7)
        assert each.abs().max() > 0, name


class Broken(step_providers.StepProvider):
    """The plain path with one thing spoilt."""

    def prepare(self, setting: Setting, case: StepCase) -> step_providers.Step:
        made = super().prepare(setting, case)
        compute = made.compute

        def spoilt(inputs: dict[str, Any]) -> step_providers.Result:
            logits, gradients = compute(inputs)
            return SPOIL[self.label](logits, list(gradients), made.names)

        made.compute = spoilt
        return made


def _scaled(logits: Any, gradients: list[Any], names: list[str]) -> Any:
    gradients[names.index("text_prompt")] = 1.01 * gradients[names.index("text_prompt")]
    return logits, gradients


def _not_a_number(logits: Any, gradients: list[Any], names: list[str]) -> Any:
    gradients[-1] = torch.full_like(gradients[-1], math.nan)
    return logits, gradients


SPOIL: dict[str, Any] = {
    "scaled": _scaled,
    "nan": _not_a_number,
    "logits": lambda logits, gradients, names: (logits + 0.01, gradients),
}


@pytest.mark.parametrize(("how", "what"), [("scaled", "prompts"), ("nan", "head"), ("logits", "logits")])
def test_no_time_where_the_numbers_are_wrong(
    how: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PROVIDERS, "eager", Broken("eager", how, group="plain", hub=False))
    monkeypatch.setattr(step, "measure", lambda *given: pytest.fail("a broken provider was timed"))
    output = tmp_path / "step.jsonl"
    assert run(output, "--cases", "late-8", "--providers", "eager") == 1
    (row,) = read(output)
    assert row["kind"] == "failed"
    assert row["why"].startswith("numerics failed: ")
    assert f"{what}: relative error" in row["why"]
    assert "p50_ms" not in row
    assert "numerics failed" in capsys.readouterr().err
    assert f"| late, {how} | numerics fail | – | – | – |" in step.tables([row]).splitlines()


def test_a_provider_that_breaks_says_so_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPOIL, "breaks", lambda *given: torch.ones(2) + torch.ones(3))
    monkeypatch.setitem(PROVIDERS, "eager", Broken("eager", "breaks", group="plain"))
    output = tmp_path / "step.jsonl"
    assert run(output, "--cases", "late-8", "--providers", "eager", "hub") == 0
    first, second = read(output)
    assert (first["kind"], second["kind"]) == ("skipped", "time")
    assert "RuntimeError: The size of tensor a" in first["why"]


def test_an_engine_that_does_not_run_is_not_timed(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither plain layers under the name of fused ones, nor exact results under that of rounded ones."""
    build = step_providers.build_epic

    def without(setting: Setting, case: StepCase, engine: EngineConfig | None = None, clip: Any = None) -> Any:
        return build(setting, case, None, clip)

    monkeypatch.setattr(step_providers, "build_epic", without)
    case = CASES["late-8"]
    with pytest.raises(CannotRun, match="leaves 9 layers to the backbone's own modules"):
        PROVIDERS["blocks"].prepare(setting, case)
    monkeypatch.setattr(step_providers, "count_plain_layers", lambda *given: 0)
    with pytest.raises(CannotRun, match="save='eight_bit' changes no bit"):
        PROVIDERS["saved"].prepare(setting, case)
    fp8 = dataclasses.replace(PROVIDERS["fp8"], engine=EngineConfig(blocks="fused", weights="fp8"))
    with pytest.raises(CannotRun, match="weights='fp8' changes no bit"):
        fp8.prepare(setting, case)


class Replayed:
    """A recording that computes again what it was made of."""

    def __init__(self, work: Any):
        self.work = work
        self.result = work()
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for old, new in zip(flatten(self.result)[0], flatten(self.work())[0], strict=True):
            old.copy_(new)


class Recorder:
    """The part of a GPU's graphs that a CPU can play."""

    def __init__(self) -> None:
        self.recorded: list[Replayed] = []

    def rehearse(self, work: Any) -> None:
        work()

    def record(self, work: Any) -> Replayed:
        self.recorded.append(Replayed(work))
        return self.recorded[-1]

    def recover(self) -> None:
        pass

    def turn(self) -> Any:
        return contextlib.nullcontext()

    def position(self) -> None:
        return None

    def restore(self, position: None) -> None:
        pass


@pytest.mark.parametrize("name", ["graphs", "prefix"])
def test_graphs_and_prefixes_run_what_is_timed(name: str, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(step_providers, "backend_for", lambda device: recorder)
    case = CASES["late-8"]
    wanted = step_gate.wanted_of(setting, case, "epic")
    row = step.measure_case(step.EPIC, setting, case, PROVIDERS[name], lambda method: wanted, 1.0)
    assert row["kind"] == "time", row
    (recording,) = recorder.recorded
    assert recording.replays == 1 + 1 + step.WARMUP + step.FEWEST
    assert row["share"] == pytest.approx(row["flops"] / row["p50_ms"] / 1e9)
    made = PROVIDERS[name].prepare(setting, case)
    if name == "prefix":
        assert set(made.inputs) == {"prefix", "labels"}
        assert made.inputs["prefix"].text.layer == 1
        assert made.inputs["prefix"].vision.layer == 4
    else:
        # Cut to the longest text and filled up to a length that graphs are kept for, or to the most there is.
        assert made.inputs["input_ids"].shape[1] == 16
    monkeypatch.setattr(recorder, "record", lambda work: 1 / 0)
    with pytest.raises(CannotRun, match="no graph of this step: its capture failed: ZeroDivisionError"):
        step_providers.captured(made, CPU)


def test_the_parts_of_the_engine_are_switched_on_in_turn() -> None:
    ladder = ["blocks", "pooled", "trimmed", "saved", "graphs"]
    changed = []
    for one, two in itertools.pairwise(ladder):
        before, after = PROVIDERS[one].parts, PROVIDERS[two].parts
        assert before is not None
        assert after is not None
        changed.append([name for name in before if before[name] != after[name]])
    assert changed == [["pooled_rows"], ["trim_text"], ["save"], ["graphs"]]
    graphs, fp8 = PROVIDERS["graphs"].parts, PROVIDERS["fp8"].parts
    assert graphs is not None
    assert fp8 == {**graphs, "weights": "fp8"}
    assert PROVIDERS["prefix"].parts == graphs
    assert PROVIDERS["fp8-prefix"].parts == fp8


def test_plain_pytorch_has_no_kernel_of_ours(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = functional.prompt_interaction

    def noting(*args: Any, impl: str = "auto", **kwargs: Any) -> Any:
        asked.append(impl)
        return original(*args, impl=impl, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(functional, "prompt_interaction", noting)
    for name in ("eager", "hub"):
        with PROVIDERS[name].settings():
            PROVIDERS[name].prepare(setting, CASES["late-8"]).call()
    assert asked == ["reference", "auto"]
    assert functional.prompt_interaction is noting


def test_backbones_come_back_as_they_were(setting: Setting) -> None:
    before = copy.deepcopy(setting.clip.state_dict())
    for name in ("eager", "lora", "full", "frozen"):
        try:
            made = PROVIDERS[name].prepare(setting, CASES["late-8"])
        except CannotRun:
            continue
        made.call()
        step_providers.release(made, CPU)
    after = setting.clip.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_lora_trains_two_adapters_a_layer_and_the_head(setting: Setting) -> None:
    pytest.importorskip("peft")
    made = PROVIDERS["lora"].prepare(setting, CASES["late-8"])
    layers = setting.text.layers + setting.vision.layers
    assert sum("lora_" in name for name in made.names) == 4 * layers
    assert [name for name in made.names if "lora_" not in name] == [
        "head.classifier.1.weight",
        "head.classifier.1.bias",
    ]
    assert all(each.abs().max() > 0 for each in made.call()[1])


# -- texts ---------------------------------------------------------------------------------------------------


def test_texts_have_the_lengths_of_captions() -> None:
    for batch, longest in ((1, 16), (8, 32), (64, 47), (256, 59)):
        drawn = StepCase("late", batch).draw_lengths(77)
        assert max(drawn) == longest
        assert min(drawn) >= step_cases.FEWEST
        assert sorted(drawn)[batch // 2] == pytest.approx(16, abs=4 if batch < 64 else 1)
        assert drawn == StepCase("deep", batch).draw_lengths(77)
    assert StepCase("late", 3, lengths="full").draw_lengths(77) == [77] * 3


def test_batches_are_padded_and_end_where_they_say(setting: Setting) -> None:
    case = CASES["late-64"]
    batch, lengths = setting.batch(case), torch.tensor(case.draw_lengths(16))
    config = setting.clip.config.text_config
    assert batch["input_ids"].shape == (64, 16)
    assert torch.equal(batch["attention_mask"].sum(dim=1), lengths)
    assert torch.equal((batch["input_ids"] == config.eos_token_id).int().argmax(dim=1), lengths - 1)
    assert (batch["input_ids"][:, 0] == config.bos_token_id).all()
    same = Setting(setting.clip, CPU, torch.float32, tiny=True).batch(case)
    assert all(torch.equal(batch[name], same[name]) for name in batch)


# -- operations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [False, True])
def test_operations_of_a_layer_are_those_that_pytorch_counts(wanted: bool, setting: Setting) -> None:
    clip = copy.deepcopy(setting.clip).requires_grad_(False)
    clip.set_attn_implementation("eager")
    layer = clip.vision_model.encoder.layers[0]
    config = clip.config.vision_config
    width, mlp, rows = config.hidden_size, config.intermediate_size, 21
    hidden = torch.randn(1, rows, width, requires_grad=wanted)
    with FlopCounterMode(display=False) as counted:
        found = layer(hidden, None)
        if wanted:
            (found[0] if isinstance(found, tuple) else found).sum().backward()
    work = Work(rows, rows, rows * rows, rows, rows * rows)
    mine = work.forward(width, mlp) + (work.backward(width, mlp) if wanted else 0.0)
    assert mine == counted.get_total_flops()


def test_operations_of_vit_l() -> None:
    """The usual formula, ``24 layers * (24 n d^2 + 4 n^2 d)``, for whole layers without prompts."""
    shape = TowerShape(24, 1024, 4096, 257)
    whole = step_cases.vision_work(shape, [], 0)
    assert 24 * whole[0].forward(1024, 4096) == pytest.approx(24 * (24 * 257 * 1024**2 + 4 * 257**2 * 1024))
    # In the last layer one row is read: keys and values of all, everything else of one.
    assert whole[-1].forward(1024, 4096) == 4 * 257 * 1024**2 + 4 * 1024**2 + 4 * 1024 * 4096 + 4 * 257 * 1024
    assert not any(each.backward(1024, 4096) for each in whole)
    prompted = step_cases.vision_work(shape, [22, 23], 8)
    assert [each.rows for each in prompted[20:]] == [257, 257, 265, 265]
    assert [each.backward(1024, 4096) > 0 for each in prompted[20:]] == [False, False, True, True]
    # The first prompted layer wants gradients of eight rows: no queries, keys and values of the others.
    full = Work(265, 265, 265**2, 265, 265**2).backward(1024, 4096)
    assert full - prompted[22].backward(1024, 4096) > 6 * (265 - 8) * 1024**2


def test_operations_of_the_methods(setting: Setting) -> None:
    case = CASES["late-8"]
    found = {method: step_cases.useful_flops(setting, case, method) for method in ("frozen", "epic", "lora", "full")}
    assert list(found.values()) == sorted(found.values())
    assert step_cases.useful_flops(setting, case, from_prefix=True) < 0.8 * found["epic"]
    assert step_cases.useful_flops(setting, CASES["late-8"]) < step_cases.useful_flops(setting, CASES["deep-8"])
    inference = step_cases.useful_flops(setting, StepCase("late", 8, "inference"))
    assert found["frozen"] < inference < found["epic"]
    longer = step_cases.useful_flops(setting, StepCase("late", 8, lengths="full"))
    assert longer > found["epic"]


# -- tables, figure, command ---------------------------------------------------------------------------------


def made_up(case: str, provider: str, milliseconds: float | None, **more: Any) -> dict[str, Any]:
    of, who = CASES[case], PROVIDERS[provider]
    machine = timing.machine("made up") | {"ceilings": {"bf16_tflop_s": 750.0}, "gpu": "a card", "driver": "1"}
    row: dict[str, Any] = {
        "case": case,
        "layout": of.layout,
        "batch": of.batch,
        "mode": of.mode,
        "texts": {"drawn": of.lengths},
        "towers": "CLIP ViT-L/14",
        "frozen_dtype": "bfloat16",
        "provider": provider,
        "label": who.label,
        "method": who.method,
        "from_prefix": who.from_prefix,
        "flops": 12.7e12,
        "run": machine,
    }
    if milliseconds is None:
        return row | {"kind": "skipped", "why": "it cannot", **more}
    numbers = {"p50_ms": milliseconds, "samples_s": 1e3 * of.batch / milliseconds, "peak_mib": 2048.0, "share": 0.5}
    return row | {"kind": "time", **numbers, **more}


def test_tables_print_what_the_rows_say() -> None:
    rows = [
        made_up("late-64", "eager", 51.44),
        made_up("late-8", "eager", 9.876),
        made_up("late-64", "blocks", 33.0),
        made_up("late-8", "blocks", None),
        made_up("late-64", "saved", None),
        made_up("late-8", "saved", None),
        made_up("late-64-full", "eager", 53.0),
        made_up("late-64", "eager", 50.0),
    ]
    lines = step.tables(rows).splitlines()
    assert lines[0] == (
        "| late, one step | B=8, ms | B=64, ms | B=64: pairs/s | memory added, GiB | of the product rate |"
    )
    # The last measurement of a provider is the one that counts.
    assert lines[2:4] == [
        "| late, PyTorch, eager | 9.88 | 50.0 | 1280 | 2.00 | 50 % |",
        "| late, + fused blocks | – | 33.0 | 1939 | 2.00 | 50 % |",
    ]
    assert "| late, one step, all texts 77 tokens |" in lines[5]
    assert "| late, PyTorch, eager | 53.0 |" in lines[7]
    assert "- + fused blocks (late-8): it cannot" in lines
    assert "- + derivative kept in 8 bits (late-8, late-64): it cannot" in lines
    assert lines[-1].startswith("a card, driver 1")


def test_methods_without_layer_pairs_are_measured_once_and_shown_twice() -> None:
    rows = [made_up("late-64", "lora", 90.0), made_up("late-64", "eager", 50.0), made_up("deep-64", "eager", 80.0)]
    lines = step.tables(rows).splitlines()
    assert [line[:44] for line in lines if "| 90.0 |" in line] == [
        "| late, LoRA r=16 (peft), eager | 90.0 | 711 "[:44],
        "| deep, LoRA r=16 (peft), eager | 90.0 | 711 "[:44],
    ]
    assert [line for line in lines if line.startswith("| deep, PyTorch, eager | 80.0 |")]
    assert "deep" not in step.tables(rows[:2])
    assert not step.measured_at(PROVIDERS["frozen"], CASES["deep-64"])
    assert step.measured_at(PROVIDERS["eager"], CASES["deep-64"])
    same = [
        step_cases.useful_flops(Setting.make(CPU, torch.float32, tiny=True), CASES[name], "lora") for name in TINY[:2]
    ]
    assert same[0] == same[1]


def test_the_figure_is_drawn_from_rows(tmp_path: Path) -> None:
    rows = [made_up(case, name, 30.0) for case in ("late-64", "deep-64") for name in ("eager", "hub", "prefix")]
    rows += [made_up("late-64", "blocks", 21.0), made_up("late-64", "fp8", None)]
    rows += [made_up("deep-64", "fp8", 12.0, kind="failed", why="numerics failed")]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    picture = tmp_path / "step.png"
    assert step.main(["--output", str(path), "--figure", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="no times of late-64, deep-64"):
        figures.draw_step([made_up("late-8", "eager", 1.0)], picture)


def test_rows_of_this_commit_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        timing,
        "machine",
        lambda command: {"command": command, "commit": "c", "gpu": None, "torch": "t", "modified": False},
    )
    output = tmp_path / "step.jsonl"
    command = ["--cases", "late-1-inference", "--providers"]
    assert run(output, *command, "eager") == 0
    assert run(output, *command, "eager", "hub", "blocks") == 0
    assert [row["provider"] for row in read(output)][:2] == ["eager", "hub"]
    count = len(read(output))
    assert run(output, *command, "eager", "--again") == 0
    assert len(read(output)) == count + 1
    # No time: nothing is begun, and the command that does it is said.
    assert run(output, "--cases", "late-8", "--providers", "eager", "lora", "--seconds", "-1") == 0
    assert len(read(output)) == count + 1
    assert "no time left for: --cases late-8 --providers eager lora" in capsys.readouterr().err


def test_commands_say_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no case nothing; there are late-1, late-8"):
        run(tmp_path / "rows", "--cases", "nothing")
    with pytest.raises(SystemExit, match=r"no provider nobody; there are eager, compiled"):
        run(tmp_path / "rows", "--providers", "nobody")


def test_the_profile_sorts_kernels_by_what_they_do(setting: Setting) -> None:
    kernels = {
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT": "matrix products",
        "void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": "attention",
        "prompt_attention_forward_kernel": "attention",
        "product_kernel": "matrix products",
        "residual_norm_forward": "norms",
        "vectorized_layer_norm_kernel": "norms",
        "activation_backward": "activation",
        "CatArrayBatchedCopy_alignedK_contig": "copies",
        "Memcpy DtoD (Device -> Device)": "copies",
        "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>": "other",
    }
    assert {name: step_profile.kind_of(name) for name in kernels} == kernels
    text = step_profile.report({"nvjet_x": (3.0, 10), "Memcpy DtoD": (1.0, 5)})
    assert "all kernels           4.000 ms      15 launches" in text
    assert re.search(r"matrix products\s+3\.000 ms\s+10 launches\s+75\.0 %", text)
    found = step_profile.profile(setting, CASES["late-8"], PROVIDERS["eager"])
    assert found.startswith("late-8, PyTorch, eager")
    assert "matrix products" in found


@pytest.mark.slow
def test_compiled_providers_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for the real compiler, whose minutes of C++ say nothing about a GPU."""
    modes = []

    def traced(function: Any, *, dynamic: bool, mode: str | None) -> Any:
        modes.append(mode)
        return compiler(function, dynamic=dynamic, backend="aot_eager")

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    output = tmp_path / "step.jsonl"
    names = ["compiled", "frozen-compiled"]
    assert run(output, "--cases", "late-8", "--providers", *names) == 0
    assert [(row["provider"], row["kind"]) for row in read(output)] == [(name, "time") for name in names]
    assert modes == [None, None]


HEADING = "## Speed of a training step"


def test_the_page_of_speed_shows_the_recorded_steps() -> None:
    """Where the page has the section, its tables are what the rows print, all of them and nothing else."""
    _, heading, text = (ROOT / "docs/speed.md").read_text(encoding="utf-8").partition(f"\n{HEADING}\n")
    shown = [line for line in text.split("\n## ")[0].splitlines() if re.match(r"\| (late|deep),", line)]
    assert bool(heading) == bool(shown)
    if heading:
        rows = read(step.ROWS)
        assert all(row["run"]["gpu"] and row["run"]["commit"] and not row["run"]["modified"] for row in rows)
        assert not any(row["towers"] == "tiny" for row in rows)
        printed = [line for line in step.tables(rows).splitlines() if re.match(r"\| (late|deep),", line)]
        assert shown == printed
