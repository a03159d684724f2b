"""The scaling study of MoPE's experts: that its two forms are alike, what it makes of its rows, and that it resumes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from epic_fast.backbones import load_backbone
from epic_fast.data import Collator
from epic_fast.errors import DataError
from epic_fast.testing import make_folder

pytest.importorskip("triton")
# The root is no place to import from for longer than this: the folder `kernels` lies there.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import mope_study
from benchmarks.mope_study import (
    Job,
    Model,
    Study,
    difference,
    key_of,
    main,
    measure_steps,
    read_frozen,
    read_rows,
    report,
    summarise,
)

sys.path.pop()

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("study") / "squares", multi_label=True)


@pytest.fixture(scope="module")
def backbone() -> Any:
    return mope_study.towers()


def test_the_study_runs_is_resumed_and_is_shown(folder: Path, tmp_path: Path, capsys: Any) -> None:
    rows, texts = tmp_path / "rows.jsonl", tmp_path / "texts.safetensors"
    data = ["--data", f"squares={folder}"]
    assert main(["texts", *data, "--texts", str(texts), "--smoke"]) == 0
    run = ["run", *data, "--texts", str(texts), "--rows", str(rows), "--smoke"]
    assert main([*run, "--seconds", "0"]) == 1
    assert "6 trainings left" in capsys.readouterr().out
    assert main(run) == 0
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["kind"] for row in found] == ["train"] * 6 + ["step"] * 3
    jobs = mope_study.SMOKE.jobs(["squares"])
    assert [mope_study.key_of(row) for row in found[:6]] == [job.key for job in jobs]
    for row in found:
        assert row["run"]["command"].startswith("python -m benchmarks.mope_study run --data squares --processes 1")
        assert str(folder) not in json.dumps(row)
    for row in found[:6]:
        assert row["samples"] == {"train": 12, "validation": 9, "test": 9}
        assert set(row["test"]) == {"f1_micro", "f1_macro", "threshold"}
        assert (row["routing_entropy"] is None) == (row["k"] == 1 or row["arm"] == "single")
    assert all(row["launched_ms"] > 0 and row["graph_ms"] is None for row in found[6:])
    # A failed training and a lost one are made again, and nothing else is.
    again = [{**found[0], "kind": "failed", "why": "no memory"}, *found[2:]]
    rows.write_text("".join(json.dumps(row) + "\n" for row in again))
    assert main(run) == 0
    resumed = [json.loads(line) for line in rows.read_text().splitlines()]
    assert resumed[: len(again)] == again
    assert [mope_study.key_of(row) for row in resumed[len(again) :]] == [job.key for job in jobs[:2]]
    same = ("validation", "test", "epoch", "trainable")
    assert [[row[key] for key in same] for row in resumed[len(again) :]] == [
        [row[key] for key in same] for row in found[:2]
    ]
    capsys.readouterr()
    assert main(["show", "--rows", str(rows)]) == 0
    assert "squares, f1-micro" in capsys.readouterr().out
    picture = tmp_path / "study.png"
    assert main(["figure", "--rows", str(rows), "--output", str(picture)]) == 0
    assert len(set(Image.open(picture).convert("L").tobytes())) > 20, "blank"


def test_a_training_that_fails_costs_only_itself(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    rows = tmp_path / "rows.jsonl"
    made = []

    def train(frozen: Any, job: Job, *rest: Any) -> dict[str, Any]:
        made.append(job)
        if len(made) == 1:
            raise DataError("a broken picture")
        return {"validation": 0.5}

    monkeypatch.setattr(mope_study, "train_one", train)
    run = ["run", "--data", f"squares={folder}", "--rows", str(rows), "--smoke"]
    monkeypatch.setattr(mope_study, "text_features", lambda backbone, texts, device: torch.zeros(len(texts), 384))
    assert main(run) == 1
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["kind"] for row in found] == ["failed", *["train"] * 5]
    assert "a broken picture" in found[0]["why"]
    assert "1 trainings left" in capsys.readouterr().out


def test_both_forms_have_the_same_prompts(folder: Path, backbone: Any) -> None:
    frozen = read_frozen("squares", folder, backbone, CPU, texts=None, most=4, threads=1)

    def size(model: Model) -> tuple[int, int]:
        built = mope_study.built(frozen, model, backbone, None)
        router = 0 if built.router is None else sum(each.numel() for each in built.router.parameters())
        assert built.first_layers() == (backbone.text.num_layers, mope_study.FIRST_LAYER)
        rows = built.config.rows
        found = built.get_nb_trainable_parameters()[0] - router
        built.unwrap()
        return found, rows

    for k in (1, 4):
        experts, single = size(Model("experts", k, 3)), size(Model("single", k, 3))
        assert experts[0] == single[0]
        assert (experts[1], single[1]) == (4, 3 * k + 1)
    names = [(model.arm, model.k) for model in Study(experts=(1, 2)).models()]
    assert names == [("experts", 2), ("single", 2), ("experts", 1)]


def test_a_cached_sample_gives_the_logits_of_its_picture_and_text(folder: Path, backbone: Any, tmp_path: Path) -> None:
    """The stand-in for the text tower changes nothing: of a text only its feature is read."""
    frozen = read_frozen("squares", folder, backbone, CPU, texts=None, most=4, threads=1)
    frozen.save(tmp_path / "frozen.safetensors")
    frozen = mope_study.Frozen.load(tmp_path / "frozen.safetensors", CPU)
    assert frozen.vision.dtype == torch.bfloat16
    frozen = replace(frozen, vision=frozen.vision.float())
    assert frozen.rows == {"train": (0, 4), "validation": (4, 8), "test": (8, 12)}
    torch.manual_seed(0)
    model = mope_study.built(frozen, Model("experts", 3, 2), backbone, None).eval()
    trained = dict(model.trainable_parameters())
    embeddings = model.router.embeddings
    with torch.no_grad():
        found = model(prefix=frozen.cache(backbone.text.num_layers).batch(torch.tensor([8, 10]))).logits
    model.unwrap()
    whole = load_backbone("demo")
    real = mope_study.built(frozen, Model("experts", 3, 2), whole, None).eval()
    for name, parameter in real.trainable_parameters():
        parameter.data.copy_(trained[name])
    real.router.embeddings.copy_(embeddings)
    _, parts, _ = mope_study.read_parts(folder, 4)
    batch = Collator.for_model(real)([parts[2][0], parts[2][2]])
    assert torch.equal(frozen.labels[[8, 10]], batch.pop("labels"))
    with torch.no_grad():
        wanted = real(**batch).logits
    # The cache was in bfloat16.
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0.02)
    assert not torch.allclose(found[0], wanted[1], atol=0.02, rtol=0.02)


def test_texts_of_other_data_are_refused(folder: Path, backbone: Any, tmp_path: Path) -> None:
    texts = tmp_path / "texts.safetensors"
    mope_study.write_texts({"squares": str(folder)}, texts, most=4)
    other = make_folder(tmp_path / "other", seed=1)
    with pytest.raises(SystemExit, match="no features of squares"):
        read_frozen("squares", other, backbone, CPU, texts=texts, most=4, threads=1)
    with pytest.raises(SystemExit, match="12 texts of squares for 15 samples"):
        read_frozen("squares", folder, backbone, CPU, texts=texts, most=5, threads=1)


def test_a_step_is_timed_with_its_update(folder: Path, backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = read_frozen("squares", folder, backbone, CPU, texts=None, most=4, threads=1)
    seen = []

    def launched(step: Any, device: torch.device, *, one_thread: bool) -> float:
        step()
        seen.append(one_thread)
        return 1.5

    monkeypatch.setattr(mope_study.timing, "measure_launched", launched)
    rows = measure_steps(frozen, [Model("experts", 2, 2)], backbone, None, CPU)
    assert seen == [True]
    assert [(row["launched_ms"], row["batch"], row["arm"], row["k"]) for row in rows] == [(1.5, 4, "experts", 2)]


def row_of(
    arm: str, k: int, rate: float, seed: int, validation: float, test: float, data: str = "films"
) -> dict[str, Any]:
    scores = {"f1_micro": test, "f1_macro": test / 2}
    about = {"kind": "train", "data": data, "arm": arm, "k": k, "length": 6, "rate": rate, "seed": seed}
    return {**about, "metric": "f1_micro", "validation": validation, "test": scores, "trainable": 10 * k}


def test_the_rate_is_chosen_on_validation_alone() -> None:
    rows = [
        row_of("experts", 1, rate, seed, validation + 0.01 * seed, test)
        for rate, validation, test in ((1e-3, 0.6, 0.1), (1e-2, 0.5, 0.9))
        for seed in (0, 1)
    ]
    # Better on validation, but not with every seed.
    rows.append(row_of("experts", 1, 0.1, 0, 0.99, 0.99))
    (point,) = summarise(rows)["films"]["points"]
    assert (point["rate"], point["mean"], point["std"]) == (1e-3, pytest.approx(0.1), 0)
    assert point["validation"] == pytest.approx(0.605)


def test_a_row_made_twice_counts_once() -> None:
    rows = [row_of("experts", 1, 1e-3, seed, 0.5, 0.5) for seed in (0, 1)]
    rows.append(row_of("experts", 1, 1e-3, 0, 0.5, 0.7))
    (point,) = summarise(rows)["films"]["points"]
    assert point["test"] == [0.7, 0.5]


def test_the_page_shows_what_was_recorded() -> None:
    rows = read_rows(mope_study.ROWS)
    page = (Path(mope_study.__file__).parents[1] / "docs/mope_study.md").read_text(encoding="utf-8")
    printed = [line for line in report(rows).splitlines() if line]
    assert len(printed) > 25
    assert {row["run"]["commit"][:10] for row in rows if f"commit {row['run']['commit'][:10]};" not in page} == set()
    assert [line.partition(":")[0] for line in printed[-2:]] == ["Trainings", "Step times"]
    assert [line for line in printed if line not in page] == []
    assert {row["run"]["modified"] for row in rows} == {False}
    done = {key_of(row) for row in rows if row["kind"] == "train"}
    assert done == {job.key for job in Study().jobs(("demo", "posters"))}
    timed = {(row["data"], row["arm"], row["k"]) for row in rows if row["kind"] == "step"}
    assert timed == {(data, arm, k) for data, arm, k, *_ in done}


def test_the_report_says_what_was_gained_by_the_same_seeds() -> None:
    one, four, long = [0.50, 0.52, 0.54], [0.53, 0.55, 0.58], [0.49, 0.51, 0.53]
    rows = [
        row_of(arm, k, 1e-3, seed, 0.5, test)
        for arm, k, tests in (("experts", 1, one), ("experts", 4, four), ("single", 4, long))
        for seed, test in enumerate(tests)
    ]
    rows.append({"kind": "failed", "data": "films", "why": "no memory"})
    step = {"launched_ms": 12.345, "graph_ms": 3.2}
    rows.append({"kind": "step", "data": "films", "arm": "single", "k": 4, "length": 6, **step})
    said = report(rows)
    assert "k experts of 6 rows: k = 4 minus k = 1: +3.3 ± 0.3 points" in said
    assert "one prompt of k·6 rows: k = 4 minus k = 1: -1.0 ± 0.0 points" in said
    assert "Experts minus one prompt at k = 4: +4.3 ± 0.3 points" in said
    assert "| one prompt of k·6 rows | 4 | 24 | 0.001 | 0.5100 ± 0.0200 | 0.2550 | 40 | 12.35 | 3.20 |" in said
    assert difference([1.0, 2.0], [0.0, 3.0]) == (0.0, pytest.approx(1.0))
