"""The demo: its pairs, its rivals, and both tasks from end to end on a part of the real data."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import epic_fast.demo.run as run_module
from epic_fast.backbones import load_backbone
from epic_fast.data import read_folder, resolve_data
from epic_fast.demo import frozen as frozen_module
from epic_fast.demo import run_demo
from epic_fast.demo.frozen import SPLITS, read_frozen_pairs
from epic_fast.demo.pairs import CacheCollator, MatchPairs, OwnTitles
from epic_fast.demo.recipes import MOPE_CHOSEN, MOPE_HEADS, MOPE_TRAINING, VIEWS, WITHOUT_GPU, mope_recipes, recipes
from epic_fast.demo.rivals import accuracy, cosine, linear_probe, majority, mlp
from epic_fast.demo.run import first_layers
from epic_fast.models import wrap

KEPT = {"train": 60, "validation": 20, "test": 20}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPIC_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "epic_fast_cache"))


def small_folder(path: Path) -> SimpleNamespace:
    """Every 20th picture or so of the demo's data, in its own splits."""
    whole = read_folder(path)
    for name, count in KEPT.items():
        part = whole.splits[name]
        part.rows = part.rows[:: len(part.rows) // count][:count]
    return SimpleNamespace(splits=whole.splits, labels=whole.labels)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_module, "read_folder", small_folder)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("demo")


@pytest.fixture
def frozen(small: None, backbone):
    return read_frozen_pairs(backbone, (3, 5), views=2)


def test_the_shipped_data_is_the_12_classes_in_their_splits():
    folder = read_folder(resolve_data("demo"))
    assert {name: len(part) for name, part in folder.splits.items()} == {"train": 1513, "validation": 243, "test": 370}
    assert len(folder.labels) == 12


def test_features_are_those_of_the_models_themselves(frozen, backbone, small):
    from epic_fast.data import Collator

    part = small_folder(resolve_data("demo")).splits["test"]
    collator = Collator(backbone.image_processor, backbone.tokenizer, max_text_length=128)
    batch = collator([part[index] for index in range(4)])
    with torch.no_grad():
        pictures = backbone.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state
        words = backbone.text_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    mask = batch["attention_mask"][:, :, None]
    vision = torch.cat([pictures[:, 0], pictures[:, 1:].mean(dim=1)], dim=1)
    text = (words.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
    rows = frozen.rows["test"][:4]
    torch.testing.assert_close(frozen.vision[rows], vision, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(frozen.text[rows], text, atol=2e-5, rtol=1e-4)


def test_views_are_of_training_pictures_only_and_differ(frozen):
    train = frozen.rows["train"]
    for split in ("validation", "test"):
        assert torch.equal(frozen.views[frozen.rows[split]], frozen.rows[split][:, None].expand(-1, 3))
    assert torch.equal(frozen.views[train][:, 0], train)
    assert frozen.views[train][:, 1:].min() >= sum(KEPT.values())
    assert frozen.views.max() + 1 == len(frozen.vision)
    assert not torch.allclose(frozen.vision[frozen.views[train][:, 1]], frozen.vision[train], atol=1e-3)


@pytest.mark.parametrize("same_class", [0.0, 1.0])
def test_match_pairs_are_own_and_others_titles(frozen, same_class):
    pairs = MatchPairs(frozen, "train", same_class=same_class, repeats=2)
    own = pairs.labels == 1
    assert own.double().mean() == 0.5
    assert torch.equal(pairs.pictures[own], pairs.titles[own])
    titles = [frozen.titles[row].lower() for row in range(len(frozen.titles))]
    others = [(titles[p], titles[t]) for p, t in zip(pairs.pictures[~own], pairs.titles[~own], strict=True)]
    assert all(first != second for first, second in others)
    allowed = set(frozen.rows["train"].tolist())
    assert set(pairs.titles.tolist()) <= allowed
    same = frozen.labels[pairs.pictures[~own]] == frozen.labels[pairs.titles[~own]]
    if same_class:
        alone = torch.tensor([int((frozen.labels[frozen.rows["train"]] == each).sum()) == 1 for each in
                              frozen.labels[pairs.pictures[~own]]])  # fmt: skip
        assert (same | alone).all()
    else:
        assert not same.all()


def test_only_training_pairs_are_drawn_anew(frozen):
    fixed, fresh = MatchPairs(frozen, "test"), MatchPairs(frozen, "train", seed=3, fresh=True)
    before = fixed.titles.clone(), fresh.titles.clone()
    for pairs in (fixed, fresh):
        pairs.set_epoch(1)
    assert torch.equal(fixed.titles, before[0])
    assert not torch.equal(fresh.titles, before[1])
    fresh.set_epoch(0)
    assert torch.equal(fresh.titles, before[1])
    assert torch.equal(MatchPairs(frozen, "train", seed=3, fresh=True).titles, before[1])
    assert not torch.equal(MatchPairs(frozen, "train", seed=4, fresh=True).titles, before[1])


@pytest.mark.parametrize("of", [recipes, mope_recipes])
def test_a_cached_batch_gives_the_logits_of_the_pictures_and_texts(frozen, backbone, small, of):
    recipe = of("classify")[0]
    model = wrap(backbone, recipe.config, num_labels=12)
    frozen = frozen if of is recipes else read_frozen_pairs(backbone, model.first_layers())
    pairs = OwnTitles(frozen, "train")
    collator = CacheCollator(frozen.cache)
    model.fit_feature_statistics([collator([pairs[index] for index in range(40)])])
    model.eval()
    from epic_fast.data import Collator

    part = small_folder(resolve_data("demo")).splits["train"]
    with torch.no_grad():
        cached = model(**collator([pairs[index] for index in (5, 1, 7)])).logits
        direct = model(**Collator.for_model(model)([part[index] for index in (5, 1, 7)])).logits
    model.unwrap()
    torch.testing.assert_close(cached, direct, atol=1e-4, rtol=1e-4)


def test_rivals_find_what_is_there():
    generator = torch.Generator().manual_seed(0)
    labels = {name: torch.arange(90) % 3 for name in SPLITS}
    features = {
        name: torch.randn(90, 6, generator=generator) + 3 * torch.nn.functional.one_hot(each, 6)
        for name, each in labels.items()
    }
    probe = linear_probe("probe", features, labels, 3)
    assert accuracy(probe.predictions, labels["test"]) > 0.9
    assert probe.trainable == 6 * 3 + 3
    ring = {name: torch.randn(200, 2, generator=generator) for name in SPLITS}
    inside = {name: (each.norm(dim=1) < 1.1).long() for name, each in ring.items()}
    assert accuracy(linear_probe("probe", ring, inside, 2).predictions, inside["test"]) < 0.7
    net = mlp("mlp", lambda epoch: (ring["train"], inside["train"]), (ring["validation"], inside["validation"]),
              ring["test"], 2, seed=0)  # fmt: skip
    assert accuracy(net.predictions, inside["test"]) > 0.9
    assert majority({**labels, "train": torch.tensor([2, 2, 1])}).predictions.eq(2).all()


def test_the_cosine_takes_the_best_threshold():
    direction = torch.tensor([[1.0, 0.0]])
    angles = {"train": [0.1, 0.4, 0.9, 1.2], "validation": [0.3, 1.0], "test": [0.2, 0.5, 1.1]}
    pairs = {}
    for name, each in angles.items():
        angle = torch.tensor(each)
        pairs[name] = (torch.stack([angle.cos(), angle.sin()], dim=1), direction.expand(len(each), 2))
    labels = {"train": torch.tensor([1, 1, 0, 0]), "validation": torch.tensor([1, 0]), "test": torch.tensor([1, 1, 0])}
    found = cosine(pairs, labels)
    assert torch.cos(torch.tensor(0.9)) < found.chosen["threshold"] < torch.cos(torch.tensor(0.4))
    assert torch.equal(found.predictions, labels["test"])
    assert found.validation == 1.0


def test_first_layers_lie_below_every_recipe(backbone):
    for task in ("classify", "match"):
        text, vision = first_layers(recipes(task), backbone)
        lowest = [recipe.config.resolve_layer_pairs(6, 8)[0] for recipe in recipes(task)]
        assert (text, vision) == (min(each for each, _ in lowest), min(each for _, each in lowest))
        together = first_layers([*recipes(task), *mope_recipes(task)], backbone)
        for recipe in mope_recipes(task):
            assert together[1] <= recipe.config.first_layer
        assert together[0] <= text


def test_an_advanced_cache_is_one_made_there(frozen, backbone, small):
    found = read_frozen_pairs(backbone, (0, 0), views=2).advanced(backbone, (3, 5), batch_size=7)
    for wanted, given in ((frozen.cache.text, found.cache.text), (frozen.cache.vision, found.cache.vision)):
        assert given.layer == wanted.layer
        assert torch.equal(given.lengths, wanted.lengths)
        torch.testing.assert_close(given.tokens, wanted.tokens, atol=2e-5, rtol=1e-4)
    assert found.advanced(backbone, (3, 5)).cache.text is found.cache.text


@pytest.mark.parametrize("task", ["classify", "match"])
def test_mope_stands_beside_its_unrouted_form(backbone, task):
    for recipe in mope_recipes(task):
        control = recipe.control()
        assert control.name == f"{recipe.name}, one expert"
        models = [wrap(backbone, each.config, num_labels=2, self_check=False) for each in (recipe, control)]
        assert models[0].router is not None
        assert models[1].router is None
        assert models[0].first_layers() == models[1].first_layers()
        for model in models:
            model.unwrap()


@pytest.mark.parametrize(("task", "head"), MOPE_CHOSEN)
def test_mope_takes_the_best_of_its_grid(task, head):
    """As measured on validation, where it has been."""
    from benchmarks.demo_search import best

    assert head in MOPE_HEADS[task]
    path = Path(__file__).resolve().parent.parent / "benchmarks/results/demo_search.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    mine = best([row for row in rows if row["name"].startswith(f"mope/{task}/{head}/")])
    if not mine:
        pytest.skip("not searched yet")
    assert mine[0][0] == f"mope/{task}/{head}/{MOPE_CHOSEN[task, head]}"


def test_the_best_of_a_search_is_by_mean_validation():
    from benchmarks.demo_search import best

    rows = [{"name": "a", "seed": 0, "validation": 0.5}, {"name": "a", "seed": 1, "validation": 0.7}]
    rows += [{"name": "b", "seed": 0, "validation": 0.65}, {"name": "c", "seed": 0, "error": "no"}]
    assert best(rows) == [("b", 0.65, 1), ("a", pytest.approx(0.6), 2)]
    assert best([*rows, {"name": "a", "seed": 0, "validation": 0.8}])[0] == ("a", pytest.approx(0.75), 2)


def test_a_search_decides_what_mope_is_trained_with(monkeypatch):
    from benchmarks import demo
    from epic_fast.demo import recipes as module

    rows = [
        {"name": f"mope/{task}/{head}/{setting}", "seed": 0, "validation": value}
        for task, head in MOPE_CHOSEN
        for setting, value in (
            ("all-layers-lr-0.002", 0.6),
            ("all-layers-lr-0.0005", 0.7),
            ("upper-half-lr-0.002", 0.5),
        )
    ]
    found = demo.choices(rows)
    assert found == {f"{task}/{head}": "all-layers-lr-0.0005" for task, head in MOPE_CHOSEN}
    monkeypatch.setattr(module, "MOPE_CHOSEN", dict(MOPE_CHOSEN))
    demo.take_choices({"mope_chosen": found})
    assert [each.training.learning_rate for each in mope_recipes("match")] == [5e-4, 5e-4]
    demo.take_choices({})
    assert module.MOPE_CHOSEN["match", "mlp"] == "all-layers-lr-0.0005"
    with pytest.raises(SystemExit, match=r"no row of mope/match/mlp/"):
        demo.choices([row for row in rows if "match/mlp" not in row["name"]])


@pytest.mark.parametrize(
    ("task", "asked", "device", "epochs", "views"),
    [
        ("classify", {}, "cpu", None, VIEWS["classify"]),
        ("match", {}, "cuda", None, VIEWS["match"]),
        ("match", {"full": True}, "cpu", None, VIEWS["match"]),
        ("match", {}, "cpu", WITHOUT_GPU["match"].epochs, WITHOUT_GPU["match"].views),
        ("match", {"quick": True}, "cuda", 1, 0),
    ],
)
def test_training_is_cut_only_where_it_is_said(task, asked, device, epochs, views, monkeypatch, tmp_path, capsys):
    seen = {}

    def read(backbone, trained, device, console, views):
        seen["views"] = views
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "_read", read)
    monkeypatch.setattr(run_module, "load_backbone", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    with pytest.raises(KeyboardInterrupt):
        run_module.run(task, tmp_path, **asked)
    assert seen["views"] == views
    cut = run_module.cut_of(task, device, **asked)
    whole = recipes(task)[0]
    assert whole.cut(cut).training.epochs == (epochs or whole.training.epochs)
    assert ("shortened" in capsys.readouterr().out) == (epochs is not None)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "mope"), [("classify", True), ("match", False)])
def test_the_demo_runs_and_its_adapter_loads_again(task, mope, small, tmp_path, capsys):
    found = run_demo(task, tmp_path / "run", quick=True, mope=mope)
    methods = [row["method"] for row in found["rows"]]
    assert methods[0] == "majority class"
    assert [name for name in methods if name.startswith("EPIC")] == [
        each.name for recipe in recipes(task) for each in (recipe.control(), recipe)
    ]
    routed = [each.name for recipe in mope_recipes(task) for each in (recipe.control(), recipe)]
    assert [name for name in methods if name.startswith("MoPE")] == (routed if mope else [])
    if task == "match":
        assert found["rows"][0]["accuracy"] == 0.5
        assert "cosine of the aligned features" in methods
    for name in ("config.json", "model.safetensors", "log.jsonl", "curves.png", "confusion.png", "sheet.png"):
        assert (tmp_path / "run" / name).stat().st_size > 100, name
    assert len(found["reloaded"]) == 3
    assert json.loads((tmp_path / "run" / "table.json").read_text())["rows"] == found["rows"]
    printed = capsys.readouterr().out
    assert "Test split" in printed
    if task == "match":
        assert "MLP on [u, v, u·v, |u−v|], aligned: accuracy" in " ".join(printed.split())


@pytest.mark.slow
def test_the_benchmark_trains_mope_and_the_search_its_grid(small, tmp_path, monkeypatch):
    from benchmarks import demo, demo_search

    def wanted(trial):
        return trial.task == "classify" and trial.name.endswith("0.002")

    monkeypatch.setitem(MOPE_TRAINING["classify"], "epochs", 1)
    jobs = [("classify", 0, method) for method in ("MoPE, one expert", "MoPE")]
    # A process of its own takes what its run says was chosen.
    monkeypatch.setitem(MOPE_CHOSEN, ("classify", "mlp"), "all-layers-lr-0.0005")
    demo.work(
        0, 1, jobs, tmp_path / "rows.jsonl", {"command": "c", "mope_chosen": {"classify/mlp": "upper-half-lr-0.002"}}
    )
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["MoPE, one expert", "MoPE"]
    assert rows[0]["trainable"] < rows[1]["trainable"]
    assert all(len(row["right"]) == KEPT["test"] for row in rows)
    trials = [trial for trial in demo_search.fifth_trials([0]) if wanted(trial)]
    demo_search.work(0, trials, 1, tmp_path / "search.jsonl", 1, (0, 0), {"round": 5})
    found = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()]
    assert [row.get("error") for row in found] == [None, None]
    names = ["mope/classify/mlp/all-layers-lr-0.002", "mope/classify/mlp/upper-half-lr-0.002"]
    assert [row["name"] for row in found] == names
    # The recipe that was searched is the one that is trained.
    assert found[1]["validation"] == rows[1]["validation"]
    assert found[1]["trainable"] == rows[1]["trainable"] < found[0]["trainable"]


def test_the_readme_shows_the_recorded_tables():
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "benchmarks.demo", "tables", "benchmarks/results/demo.json"]
    printed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    readme = (root / "README.md").read_text(encoding="utf-8")
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) > 20
    assert [row for row in rows if row not in readme] == []


def test_a_result_keeps_what_a_former_one_says_of_other_methods(tmp_path, monkeypatch, capsys):
    from benchmarks import demo

    monkeypatch.setattr(
        demo, "COMPARED", {"classify": [("MoPE", "MLP on frozen features"), ("EPIC", "linear probe, both")]}
    )

    def rows(methods, right, pictures=(7, 8)):
        path = tmp_path / f"{methods[0]}.jsonl"
        made = [
            {"task": "classify", "seed": seed, "method": method, "accuracy": right, "f1_macro": right,
             "validation": 0.5, "trainable": 1, "share": 0.1, "seconds": 1.0, "chosen": {}, "right": [1, 0],
             "pictures": list(pictures), "run": {"commit": method[0]}}
            for method in methods
            for seed in demo.SEEDS
        ]  # fmt: skip
        path.write_text("\n".join(map(json.dumps, made)))
        return path

    former = demo.summarised([rows(["EPIC", "linear probe, both", "MLP on frozen features"], 0.25)])
    former = json.loads(json.dumps(former))
    again = demo.summarised([rows(["MoPE", "MLP on frozen features"], 0.75)], former)
    task = again["tasks"]["classify"]
    assert [(each["method"], each["accuracy"]) for each in task["methods"]] == [
        ("linear probe, both", 0.25), ("MLP on frozen features", 0.75), ("EPIC", 0.25), ("MoPE", 0.75)]  # fmt: skip
    assert [(each["first"], each["second"]) for each in task["compared"]] == demo.COMPARED["classify"]
    said = {method: run["commit"] for run in again["runs"] for method in run["methods"]}
    assert said == {"EPIC": "E", "linear probe, both": "l", "MLP on frozen features": "M", "MoPE": "M"}
    # A pair is kept where its methods scored as before, and is not where one did not.
    for score, pairs in ((0.25, demo.COMPARED["classify"][1:]), (0.5, [])):
        found = demo.summarised([rows(["linear probe, both"], score)], former)["tasks"]["classify"]
        assert [(each["first"], each["second"]) for each in found["compared"]] == pairs
    monkeypatch.setattr(demo, "COMPARED", {"classify": [("MoPE", "EPIC")]})
    assert demo.summarised([rows(["MoPE"], 0.75)], former)["tasks"]["classify"]["compared"] == []
    assert "classify: no rows to compare MoPE with EPIC" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="of other test pairs"):
        demo.summarised([rows(["MoPE"], 0.75, pictures=(7, 7))], former)
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(SystemExit, match="no row of classify"):
        demo.summarised([tmp_path / "none.jsonl"])


def test_the_record_is_the_summary_of_its_rows():
    from benchmarks import demo

    results = Path(__file__).resolve().parent.parent / "benchmarks/results"
    files = [results / "demo_rows.jsonl", results / "demo_rivals.jsonl"]
    assert not any(re.search(r"[\"' =]/\w", each.read_text()) for each in files)  # no place on a machine

    def rounded(value):
        if isinstance(value, dict):
            return {key: rounded(each) for key, each in value.items()}
        if isinstance(value, list):
            return [rounded(each) for each in value]
        return round(value, 9) if isinstance(value, float) else value

    made = json.loads(json.dumps(demo.summarised(files)))
    assert rounded(made) == rounded(json.loads((results / "demo.json").read_text()))
    # Every pair that is to be compared is.
    for task, pairs in demo.COMPARED.items():
        assert [(each["first"], each["second"]) for each in made["tasks"][task]["compared"]] == pairs


def test_the_record_is_complete():
    root = Path(__file__).resolve().parent.parent
    found = json.loads((root / "benchmarks/results/demo.json").read_text())
    assert found["seeds"] == [0, 1, 2, 3, 4]
    for run in found["runs"]:
        assert run["command"].startswith("python -m benchmarks.demo train")
        assert len(run["commit"]) == 40
        assert not run.get("modified")
        assert run["torch"]
    assert any(run.get("gpu") and run.get("driver") for run in found["runs"])
    for task in ("classify", "match"):
        methods = {row["method"] for row in found["tasks"][task]["methods"]}
        assert {each.name for recipe in recipes(task) for each in (recipe, recipe.control())} <= methods
