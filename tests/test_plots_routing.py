"""The routing of a MoPE run: the numbers of `epic-fast plot routing`, its pictures, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import epic_fast
from epic_fast.cli import main
from epic_fast.cli.routing import summarise
from epic_fast.data import Collator, read_folder
from epic_fast.errors import ConfigError, DataError
from epic_fast.plots import RoutingHistory, SheetItem, contact_sheet, entropy_curves, expert_load, routing_history
from epic_fast.plots.routing import spread
from epic_fast.plots.style import SERIES
from epic_fast.testing import make_folder, tiny_clip
from epic_fast.training import predict_routing

SMALL = ("prompt_length=1", "complement_prompt_length=1", "batch_size=8", "tensorboard=false", "router_noise_std=0")
EXPERTS, EPOCHS = 3, 2


def run_command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def train(here: Path, run: str, *more: str, method: str = "mope", data: str = "data") -> None:
    where = ("--data", here / data, "--backbone", here / "clip", "--method", method, "--output", here / run)
    assert run_command("train", *where, "--epochs", EPOCHS, *more) == 0


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``clip``, ``data``, ``multi``, and the runs ``run``, ``multi_run``, ``one`` (expert), ``epic``."""
    folder = tmp_path_factory.mktemp("routing")
    tiny_clip(folder / "clip")
    make_folder(folder / "data")
    make_folder(folder / "multi", multi_label=True)
    train(folder, "run", *SMALL, f"num_experts={EXPERTS}")
    train(folder, "multi_run", *SMALL, "num_experts=2", data="multi")
    train(folder, "one", *SMALL, "num_experts=1")
    train(folder, "epic", "prompt_length=1", "tensorboard=false", method="epic")
    return folder


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """The JSON object that ``plot routing`` prints."""

    def run(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        assert run_command("plot", "routing", *arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_the_numbers_are_those_of_the_model(here: Path, tmp_path: Path, answer: Callable[..., Any]) -> None:
    found = answer(here / "run", "--data", here / "data", "--output", tmp_path, "--layer", 2, "--count", 2)
    model = epic_fast.from_pretrained(here / "run").eval()
    dataset = read_folder(here / "data").splits["test"]
    batch = Collator.for_model(model)([dataset[index] for index in range(len(dataset))])
    wanted = model.routing(**batch)
    assert (found["split"], found["samples"], found["experts"], found["layer"]) == ("test", 9, EXPERTS, 2)
    assert list(found["layers"]) == [str(layer) for layer in wanted] == ["1", "2", "3"]
    for layer, scores in wanted.items():
        numbers = found["layers"][str(layer)]
        assert numbers["load"] == pytest.approx(scores.mean(dim=0).tolist(), abs=1e-5)
        entropy = -(scores * scores.clamp_min(1e-30).log()).sum(dim=1).mean() / np.log(EXPERTS)
        assert numbers["entropy"] == pytest.approx(float(entropy), abs=1e-5)
        assert numbers["first"] == [int((scores.argmax(dim=1) == expert).sum()) for expert in range(EXPERTS)]
    mean = torch.stack(list(wanted.values())).mean(dim=0)
    assert found["mean"]["load"] == pytest.approx(mean.mean(dim=0).tolist(), abs=1e-5)
    texts = dict(zip(dataset.names(), dataset.texts(), strict=True))
    for name, scores in (("layer", wanted[2]), ("mean", mean)):
        for expert, top in enumerate(found["top"][name]):
            best = scores[:, expert].sort(descending=True).values[:2]
            assert [each["score"] for each in top] == pytest.approx(best.tolist(), abs=1e-5)
            for each in top:
                assert texts[each["file_name"]] == each["text"]
                row = dataset.names().index(each["file_name"])
                assert float(scores[row, expert]) == pytest.approx(each["score"], abs=1e-5)
    names = ["routing_layer_2.png", "routing_mean.png", "routing_load.png", "routing_entropy.png"]
    assert found["pictures"] == [str(tmp_path / name) for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names), "something else was left behind"
    for name in names:
        assert len(set(Image.open(tmp_path / name).convert("L").tobytes())) > 20, "blank"


def test_the_training_is_that_of_the_log(here: Path, tmp_path: Path, answer: Callable[..., Any]) -> None:
    training = answer(here / "run", "--data", here / "data", "--output", tmp_path)["training"]
    epochs = [json.loads(line) for line in (here / "run" / "log.jsonl").read_text().splitlines()]
    epochs = [row for row in epochs if row["type"] == "epoch"]
    assert training["epochs"] == [0, *range(1, EPOCHS + 1)]
    for layer in ("1", "2", "3"):
        assert training["entropy"][layer] == [1.0, *(row["gates"][f"routing_entropy/{layer}"] for row in epochs)]
        assert training["load"][layer][0] == pytest.approx([1 / EXPERTS] * EXPERTS)
        for load, row in zip(training["load"][layer][1:], epochs, strict=True):
            assert load == [row["gates"][f"expert_load/{layer}/{expert}"] for expert in range(EXPERTS)]
            assert sum(load) == pytest.approx(1, abs=1e-4)


def test_the_layer_of_the_lowest_entropy_is_shown() -> None:
    sharp, even = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.95, 0.05]]), torch.tensor([[0.6, 0.4]] * 3)
    found = summarise({3: even, 5: sharp}, count=2)
    assert found.layer == 5
    assert summarise({3: even, 5: sharp}, count=2, layer=3).layer == 3
    assert [[index for index, _ in top] for top in found.layers[5].top] == [[2, 0], [1, 0]]
    assert found.layers[5].first == [2, 1]
    assert found.layers[3].entropy == pytest.approx(-(0.6 * np.log2(0.6) + 0.4 * np.log2(0.4)), abs=1e-6)
    assert found.mean.entropy == pytest.approx((found.layers[3].entropy + found.layers[5].entropy) / 2)


def test_batches_do_not_matter_and_the_mode_is_kept(here: Path) -> None:
    model = epic_fast.from_pretrained(here / "run").train()
    dataset = read_folder(here / "data").splits["test"]
    whole, parts = (predict_routing(model, dataset, batch_size=size, progress=False) for size in (9, 2))
    assert model.training
    for layer, scores in whole.items():
        assert scores.shape == (9, EXPERTS)
        torch.testing.assert_close(scores, parts[layer], atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="has no routing"):
        predict_routing(epic_fast.from_pretrained(here / "epic"), dataset)


def test_several_labels(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("plot", "routing", here / "multi_run", "--data", here / "multi", "--output", tmp_path) == 0
    out = capsys.readouterr().out
    assert "entropy" in out
    assert str(tmp_path / "routing_mean.png") in out


@pytest.mark.parametrize(
    ("run", "more", "code", "message"),
    [
        ("epic", [], 2, "a run of epic, which routes nothing; wanted one of MoPE"),
        ("one", [], 2, "num_experts=1"),
        ("run", ["--layer", "0"], 2, "--layer 0 is not routed in"),
        ("no_log", [], 3, "log.jsonl does not exist"),
        ("run", ["--split", "dev"], 3, "dev"),
    ],
)
def test_errors_say_what_is_wrong(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: str, more: list[str], code: int, message: str
) -> None:
    if run == "no_log":
        shutil.copytree(here / "run", here / run, ignore=shutil.ignore_patterns("log.jsonl"), dirs_exist_ok=True)
    found = run_command("plot", "routing", here / run, "--data", here / "data", "--output", tmp_path / "out", *more)
    error = " ".join(capsys.readouterr().err.split())
    assert (found, message in error) == (code, True), error
    assert not (tmp_path / "out").exists()


def test_a_log_without_routing_or_epochs_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"type": "step", "step": 1}\n')
    with pytest.raises(DataError, match="no epoch yet"):
        routing_history(log)
    log.write_text('{"type": "epoch", "step": 1, "epoch": 1, "gates": {"text_gate": 0.1}}\n')
    with pytest.raises(DataError, match="nothing of a routing"):
        routing_history(log)
    row = {"routing_entropy/1": 0.5, "expert_load/1/0": 0.5, "expert_load/1/1": 0.5}
    rows = [{"type": "epoch", "step": n, "epoch": n, "gates": row if n == 1 else {}} for n in (1, 2)]
    log.write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(DataError, match="no routing_entropy/1 at epoch 2"):
        routing_history(log)


def test_the_bands_are_as_high_as_the_loads(tmp_path: Path) -> None:
    load = [[0.5, 0.5], [0.25, 0.75]]
    png = expert_load(RoutingHistory([0, 1], {4: load}, {4: [1.0, 0.8]}), tmp_path / "load.png")
    picture = np.asarray(Image.open(png).convert("RGB")).astype(int)

    def area(colour: str) -> int:
        wanted = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)])
        return int((np.abs(picture - wanted).max(axis=-1) <= 3).sum())

    share = area(SERIES[0]) / (area(SERIES[0]) + area(SERIES[1]))
    assert share == pytest.approx(0.375, abs=0.02)


def test_curves_leave_the_routing_out(here: Path, tmp_path: Path) -> None:
    """Their panel would have a line for each layer and expert."""
    from epic_fast.plots import training_curves

    log = tmp_path / "log.jsonl"
    rows = [json.loads(line) for line in (here / "run" / "log.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("gates", None)
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with_routing = training_curves(here / "run" / "log.jsonl", tmp_path / "with.png")
    assert with_routing.read_bytes() == training_curves(log, tmp_path / "without.png").read_bytes()


def test_many_layers_and_experts_stay_legible(tmp_path: Path) -> None:
    layers = range(20)
    history = RoutingHistory(
        [0, 1, 2],
        {layer: [[1 / 16] * 16] * 3 for layer in layers},
        {layer: [1.0, 0.9, 0.8 + layer * 1e-4] for layer in layers},
    )
    for picture in (expert_load(history, tmp_path / "load.png"), entropy_curves(history, tmp_path / "entropy.png")):
        pixels = np.asarray(Image.open(picture).convert("L"))
        assert max(pixels.shape) < 2500, "too large to look at"
        edge = (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:])
        assert all((each == 255).all() for each in edge), "something reaches over the picture's edge"


def test_labels_that_crowd_are_spread() -> None:
    assert spread([0.2, 0.8], 0.1, 0, 1) == [0.2, 0.8]
    assert spread([0.52, 0.5, 0.51], 0.1, 0, 1) == pytest.approx([0.61, 0.41, 0.51])
    assert spread([0.0, 0.01, 0.9], 0.1, 0, 1) == pytest.approx([0.0, 0.1, 0.9])
    assert spread([0.5] * 5, 10.0, 0, 1) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    found = spread([0.1, 0.11, 0.2, 0.21, 0.3], 0.1, 0, 1)
    assert all(later - earlier >= 0.1 - 1e-9 for earlier, later in pairwise(found))


def test_headings_are_one_a_row(tmp_path: Path) -> None:
    items = [SheetItem(Image.new("RGB", (8, 8)), "a text", None, "label")] * 4
    plain = contact_sheet(items, tmp_path / "plain.png", columns=2)
    headed = contact_sheet(items, tmp_path / "headed.png", columns=2, headings=["one", "two"])
    assert Image.open(headed).height > Image.open(plain).height
    with pytest.raises(DataError, match="1 headings for 2 rows"):
        contact_sheet(items, tmp_path / "wrong.png", columns=2, headings=["one"])
