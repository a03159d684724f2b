"""The study of MiT's two further tasks, on tiny towers: prefixes out of the frozen parts, rows, tables, the sheet."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import mit_tasks
from benchmarks.mit_tasks import FromFrozen, Frozen, Job, Plan, jobs_of, read_scenes, read_utterances, report, run_tasks
from benchmarks.mope_study import read_rows
from epic_fast.data import Collator, Example, make_sentiment, read_folder
from epic_fast.data.scenes import draw_scene
from epic_fast.models import wrap
from epic_fast.testing import tiny_llama, tiny_vit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("towers")
    tiny_vit(folder / "vit")
    tiny_llama(folder / "llama")
    return Plan(
        scenes=(12, 4, 6),
        utterances=(40, 10, 12),
        epochs=(1, 1),
        batch=8,
        seeds=(0, 1),
        layers=(2, 3),
        mlp_size=32,
        language_model=str(folder / "llama"),
        vision=str(folder / "vit"),
    )


@pytest.mark.parametrize("arm", ["mit", "frozen"])
def test_what_is_cached_of_scenes_is_what_the_model_would_compute(plan: Plan, tmp_path: Path, arm: str) -> None:
    backbone = mit_tasks.towers(plan, "segmentation", CPU)
    frozen = read_scenes(plan, backbone, CPU, 1)
    frozen.save(tmp_path / "file")
    frozen = Frozen.load(tmp_path / "file", CPU)
    model = wrap(backbone, plan.config("segmentation", arm), 2, "segmentation", self_check=False).eval()
    with torch.no_grad():
        for infusion in model.infusions.values():
            infusion.transform.weight.add_(0.1 * torch.randn_like(infusion.transform.weight))
    rows = [0, 5, 13, 17, 21]
    drawn = [draw_scene(0, *next((s, row - a) for s, (a, b) in frozen.rows.items() if a <= row < b)) for row in rows]
    batch = Collator.for_model(model)(
        [
            Example(
                each.picture,
                each.scene.text,
                (torch.tensor(list(each.mask.get_flattened_data())) > 0).reshape(160, 160).numpy(),
                "",
            )
            for each in drawn
        ]
    )
    found = FromFrozen(frozen, model)(rows)
    assert torch.equal(found["labels"], batch["labels"])
    # The picture's tokens are kept in bfloat16.
    torch.testing.assert_close(model(**found).logits, model(**batch).logits, rtol=0.05, atol=0.05)
    assert (found["prefix"].text.hidden.shape[1] == 1) == (arm == "frozen")
    model.unwrap()


@pytest.mark.parametrize("arm", ["both", "facial", "text"])
def test_what_is_cached_of_utterances_is_what_the_model_would_compute(plan: Plan, tmp_path: Path, arm: str) -> None:
    backbone = mit_tasks.towers(plan, "sentiment", CPU)
    frozen = read_utterances(plan, backbone, CPU)
    config = replace(plan.config("sentiment", arm), feature_norm="none")
    model = wrap(backbone, config, 1, "regression", self_check=False).eval()
    with torch.no_grad():
        for infusion in model.infusions.values():
            infusion.transform.weight.add_(0.1 * torch.randn_like(infusion.transform.weight))
    data = read_folder(make_sentiment(tmp_path / "made", train=40, validation=10, test=12))
    first = frozen.rows["test"][0]
    batch = Collator.for_model(model)([data.splits["test"][each] for each in (0, 3, 7)])
    found = FromFrozen(frozen, model)([first, first + 3, first + 7])
    torch.testing.assert_close(found["labels"], batch["labels"])
    torch.testing.assert_close(model(**found).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
    model.unwrap()


def test_a_whole_run_and_its_tables(plan: Plan, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    arguments = {"command": "python -m benchmarks.mit_tasks run", "sheet": tmp_path / "sheet.png"}
    assert run_tasks(plan, ["segmentation", "sentiment"], rows, **arguments)
    made = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row.get("why") for row in made] == [None] * len(jobs_of(plan, list(mit_tasks.ARMS)))
    assert Image.open(tmp_path / "sheet.png").width > 300
    one = made[0]
    assert set(one["run"]) >= {"command", "commit", "gpu", "torch", "transformers", "plan"}
    assert one["parts"]["seen"]["samples"] == one["parts"]["held out"]["samples"] == 3
    text = report(made)
    assert "a shape at random" in text
    assert "The target, an oIoU of 0.60 on held-out scenes, is missed" in text
    assert "MiT, voice and face" in text
    before = rows.read_text()
    assert run_tasks(plan, ["segmentation", "sentiment"], rows, **arguments)  # nothing is made again
    assert rows.read_text() == before
    assert not run_tasks(replace(plan, seeds=(0, 1, 2)), ["sentiment"], rows, seconds=-1.0, **arguments)
    # Rows of other settings are no rows of these.
    assert not run_tasks(replace(plan, sentiment_rate=0.5), ["sentiment"], rows, seconds=-1.0, **arguments)
    assert mit_tasks.main(["figure", "--rows", str(rows), "--output", str(tmp_path / "both.png")]) == 0
    assert mit_tasks.draw([row for row in made if row["task"] == "sentiment"], tmp_path / "one.png")
    # A panel each.
    assert Image.open(tmp_path / "both.png").width > 1.5 * Image.open(tmp_path / "one.png").width


def test_the_target_is_judged_by_the_held_out_scenes() -> None:
    names = ("oiou", "miou", "precision@0.5", "precision@0.7", "precision@0.9")
    scores = {part: dict.fromkeys(names, value) for part, value in (("held out", 0.5), ("seen", 0.9))}
    row = {"kind": "train", "task": "segmentation", "arm": "mit", "seed": 0, "trainable": 1, "parts": scores}
    row |= {"test": dict.fromkeys(names, 0.7), "chance": dict.fromkeys(names, 0.1)}
    assert "The target, an oIoU of 0.60 on held-out scenes, is missed: 0.500." in report([row])


def test_what_the_infusion_brings_to_masks_is_told_by_seed() -> None:
    names = ("oiou", "miou", "precision@0.5", "precision@0.7", "precision@0.9")

    def row(arm: str, seed: int, held_out: float, seen: float) -> dict:
        scores = {part: dict.fromkeys(names, value) for part, value in (("held out", held_out), ("seen", seen))}
        test = dict.fromkeys(names, (held_out + seen) / 2)
        common = {"kind": "train", "task": "segmentation", "trainable": 1, "chance": dict.fromkeys(names, 0.1)}
        return {**common, "arm": arm, "seed": seed, "parts": scores, "test": test}

    rows = [row("mit", 0, 0.5, 0.8), row("mit", 1, 0.7, 0.9), row("mit", 2, 0.1, 0.1)]
    # Seed 2 has nobody to be compared with; the seeds come in any order.
    rows += [row("frozen", 1, 0.8, 0.9), row("frozen", 0, 0.6, 0.6)]
    said = "all scenes +0.000 ± 0.050, held out -0.100 ± 0.000, seen +0.100 ± 0.100."
    assert f"MiT minus the same decoder, nothing infused, oIoU, mean and standard error by seed: {said}" in report(rows)
    assert "minus" not in report(rows[:3])


def test_every_arm_has_every_seed_but_what_draws_nothing() -> None:
    jobs = jobs_of(Plan(), ["sentiment", "segmentation"])
    assert len(jobs) == 4 * 5 + 1 + 2 * 5
    assert jobs.count(Job("sentiment", "ridge", 0)) == 1


def test_the_report_says_whether_both_beat_each() -> None:
    def row(arm: str, seed: int, mae: float) -> dict:
        test = dict.fromkeys(("pearson", "acc7", "acc2_non0", "f1_non0", "acc2_has0", "f1_has0"), 0.5)
        return {
            "kind": "train",
            "task": "sentiment",
            "arm": arm,
            "seed": seed,
            "test": {"mae": mae, **test},
            "trainable": 1,
        }

    rows = [row("both", 0, 0.4), row("both", 1, 0.5), row("acoustic", 0, 0.7), row("facial", 0, 0.6)]
    text = report(rows)
    assert "MAE -0.250 against MiT, voice, -0.150 against MiT, face; every seed of it beats" in text
    assert "0.450 ± 0.071" in text
    assert "not every seed" in report([*rows, row("both", 2, 0.65)])


def test_a_row_is_made_again_where_its_own_task_has_other_settings() -> None:
    plan = Plan()
    row = json.loads(json.dumps(asdict(plan)))
    for changed, tasks in (
        ({}, []),
        ({"seeds": [7], "language_model": "/elsewhere/smollm2"}, []),
        ({"rate": 1e-3}, ["segmentation"]),
        ({"decoder_rate": 1e-3}, ["segmentation"]),
        ({"epochs": [25, 3]}, ["sentiment"]),
        ({"epochs": [3, 15]}, ["segmentation"]),
        ({"sentiment_rate": 1e-3}, ["sentiment"]),
        ({"layers": [1]}, ["segmentation", "sentiment"]),
        ({"data_seed": 1}, ["segmentation", "sentiment"]),
    ):
        assert [task for task in ("segmentation", "sentiment") if not plan.made(task, {**row, **changed})] == tasks


def test_the_page_shows_what_was_recorded() -> None:
    rows = read_rows(mit_tasks.ROWS)
    assert rows
    page = (Path(__file__).resolve().parent.parent / "docs/mit_tasks.md").read_text(encoding="utf-8")
    printed = [line for line in report(rows).splitlines() if line]
    assert len(printed) > 7
    assert [line for line in printed if line not in page] == []
    for task in dict.fromkeys(row["task"] for row in rows):
        done = {(row["arm"], row["seed"]) for row in rows if row["task"] == task}
        assert done == {(job.arm, job.seed) for job in jobs_of(Plan(), [task])}
    for row in rows:
        assert row["kind"] == "train"
        assert Plan().made(row["task"], row["run"]["plan"])
        assert row["run"]["gpu"]
        assert len(row["run"]["commit"]) == 40


def test_the_page_tells_of_the_other_rates_what_their_rows_say() -> None:
    """They are one seed each and stand apart, so that no table takes them for the study's."""
    path = mit_tasks.ROWS.with_name("mit_tasks_rates.jsonl")
    rows = read_rows(path)
    page = (Path(__file__).resolve().parent.parent / "docs/mit_tasks.md").read_text(encoding="utf-8")
    assert f"../benchmarks/results/{path.name}" in page
    scores: dict[tuple[float, float], dict[str, float]] = {}
    for row in rows:
        assert (row["kind"], row["task"], row["seed"]) == ("train", "segmentation", 0)
        assert row["run"]["gpu"]
        assert len(row["run"]["commit"]) == 40
        assert not row["run"]["modified"]
        assert not Plan().made(row["task"], row["run"]["plan"])
        plan = row["run"]["plan"]
        scores.setdefault((plan["rate"], plan["decoder_rate"]), {})[row["arm"]] = row["test"]["oiou"]
    assert sorted(scores) == [(1e-4, 1e-3), (3e-4, 5e-4)]
    for found in scores.values():
        assert f"{found['mit']:.3f} against {found['frozen']:.3f}" in page
