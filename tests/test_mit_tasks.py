"""MiT's two further tasks from end to end: referring segmentation, and sentiment with acoustic and facial sequences."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import epic_fast
from epic_fast.cli import main
from epic_fast.data import (
    Collator,
    check_folder,
    load_mask,
    make_scenes,
    make_sentiment,
    read_folder,
    read_sequences,
    write_sequences,
)
from epic_fast.engine import EngineConfig
from epic_fast.errors import ConfigError, DataError
from epic_fast.models import EpicConfig, MitConfig, from_pretrained, wrap
from epic_fast.testing import tiny_clip, tiny_llama, tiny_vit
from epic_fast.training import TrainingConfig, compute_metrics, count_masks, fit, mask_metrics, predict, predict_masks


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def ask(*arguments: object) -> Any:
        capsys.readouterr()
        assert run(*arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return ask


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``vit`` and ``llama``, towers; ``scenes`` and ``sentiment``, data."""
    folder = tmp_path_factory.mktemp("tasks")
    tiny_vit(folder / "vit")
    tiny_llama(folder / "llama")
    make_scenes(folder / "scenes", train=64, validation=16, test=16, side=32)
    make_sentiment(folder / "sentiment", train=1000, validation=100, test=300)
    return folder


def towers(here: Path) -> str:
    return f"vision={here / 'vit'},text={here / 'llama'}"


SMALL = {"decoder_size": 16, "decoder_heads": 2, "decoder_mlp_size": 32}


def segmenter(here: Path, engine: EngineConfig | None = None, **more: Any) -> Any:
    torch.manual_seed(0)
    config = MitConfig(**{**SMALL, **more})
    return wrap(towers(here), config, 2, "segmentation", engine=engine)


# -- masks -----------------------------------------------------------------------------------------------------------


def test_the_decoder_reads_what_it_should(here: Path) -> None:
    model = segmenter(here).eval()
    assert model.decoder_layers == [3, 2, 1]  # 18, 12 and 6 of 24, in a tower of 4
    assert model.first_layers()[1] == 1
    assert model.text_template.endswith("Segmentation:")
    data = read_folder(here / "scenes").splits["test"]
    batch = Collator.for_model(model)([data[0], data[1]])
    out = model(**batch)
    assert out.logits.shape == (2, 2, 32, 32)
    hidden = model.backbone.vision.model(batch["pixel_values"], output_hidden_states=True).hidden_states
    inputs = {name: each for name, each in batch.items() if name != "labels"}
    prefix = model._measured(model.extract(**inputs))
    for level, states in zip((3, 2, 1), model.see(prefix)[0], strict=True):
        torch.testing.assert_close(states, hidden[level])
    torch.testing.assert_close(model(prefix=prefix).logits, out.logits)
    levels, above = model.see(prefix)
    known = epic_fast.engine.Prefix(prefix.text, above.vision, {"picture_levels": torch.stack(levels, dim=1)})
    torch.testing.assert_close(model(prefix=known).logits, out.logits)


def test_the_text_reaches_the_mask_and_the_picture_the_text(here: Path) -> None:
    model = segmenter(here, value_shift_std=0.1).eval()
    with torch.no_grad():
        for infusion in model.infusions.values():
            infusion.transform.weight.add_(0.3 * torch.randn_like(infusion.transform.weight))
    data = read_folder(here / "scenes").splits["test"]
    batch = Collator.for_model(model)([data[0], data[0]])
    batch.pop("labels")
    batch["input_ids"][1, 2] = batch["input_ids"][1, 2] + 1
    logits = model(**batch).logits
    assert not torch.allclose(logits[0], logits[1], atol=1e-4)
    prefix = model._measured(model.extract(**batch))
    feature = model.features(prefix)
    other = model.features(model._measured(model.extract(**{**batch, "pixel_values": -batch["pixel_values"]})))
    assert not torch.allclose(feature, other, atol=1e-4)


def test_every_loss_trains_every_tensor(here: Path) -> None:
    data = read_folder(here / "scenes").splits["train"]
    for kind in ("cross_entropy", "bce", "dice_cross_entropy", "focal"):
        model = segmenter(here, mask_loss=kind, value_shift_std=0.02).train()
        model(**Collator.for_model(model)([data[0], data[1]])).loss.backward()
        for name, parameter in model.trainable_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        assert model.head.film_add.weight.grad.abs().max() > 0
        assert all(each.head_bias.grad.abs().max() > 0 for each in model.infusions.values())


def test_it_learns_and_is_saved(here: Path, tmp_path: Path) -> None:
    """One red disc in front of grey: a decoder that learns finds it; saying nothing or everything does not."""
    random = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for number in range(60):
        picture, mask = np.full((32, 32, 3), 128, np.uint8), np.zeros((32, 32), np.uint8)
        top, left = (8 * int(each) for each in random.integers(0, 3, size=2))
        picture[top : top + 16, left : left + 16] = (220, 20, 20)
        mask[top : top + 16, left : left + 16] = 255
        Image.fromarray(picture).save(folder / f"{number}.png")
        Image.fromarray(mask).save(folder / f"m{number}.png")
        split = "train" if number < 40 else "test"
        row = {"file_name": f"{number}.png", "mask": f"m{number}.png", "text": "the red square", "split": split}
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    data = read_folder(folder)
    model = segmenter(here)
    training = TrainingConfig(epochs=30, batch_size=8, head_learning_rate=5e-3, tensorboard=False, weight_decay=0.0)
    fit(model, data.splits["train"], data.splits["test"], config=training, output_dir=tmp_path / "run", progress=False)
    counts = count_masks(model, data.splits["test"], progress=False)
    found = mask_metrics(counts)
    everything = mask_metrics(torch.tensor([[16 * 16, 32 * 32]]))
    assert found["oiou"] > 2 * everything["oiou"]
    whole = predict(model, data.splits["test"], progress=False)
    assert compute_metrics(whole.logits, whole.labels, "segmentation", num_labels=2) == found
    again = from_pretrained(tmp_path / "run")
    torch.testing.assert_close(count_masks(again, data.splits["test"], progress=False), counts)
    history = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert history["metric"] == "oiou"
    masks = list(predict_masks(model, data.splits["test"], batch_size=7))
    assert [each.shape for each in masks] == [(32, 32)] * 20
    with pytest.raises(ConfigError, match="makes masks, not labels"):
        epic_fast.Classifier(model)


def test_the_commands(here: Path, tmp_path: Path, answer: Callable[..., Any]) -> None:
    where = ("--data", here / "scenes", "--backbone", towers(here), "--method", "mit", "--output", tmp_path / "run")
    small = [f"{name}={value}" for name, value in SMALL.items()]
    trained = answer("train", *where, "--epochs", 1, *small, "batch_size=16", "tensorboard=false", "mask_size=16")
    assert set(trained["validation"]) >= {"oiou", "miou", "precision@0.5"}
    scored = answer("eval", tmp_path / "run", "--data", here / "scenes", "--split", "test")
    assert scored["oiou"] == trained["test"]["oiou"]
    rows = here / "scenes" / "metadata.jsonl"
    said = answer("predict", tmp_path / "run", rows, tmp_path / "out.jsonl")
    assert said["rows"] == 96
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines[0]["text"] == json.loads(rows.read_text().splitlines()[0])["text"]
    mask = load_mask(tmp_path / lines[5]["predicted_mask"])
    assert mask.shape == (32, 32)
    assert mask.mean() == pytest.approx(lines[5]["predicted_share"], abs=1e-6)
    assert run("plot", "sheet", tmp_path / "run", "--data", here / "scenes", "--count", 5) == 0
    assert Image.open(tmp_path / "run" / "mask_sheet.png").width > 300
    (tmp_path / "out_masks" / "mine.txt").write_text("")
    assert run("predict", tmp_path / "run", rows, tmp_path / "out.jsonl") == 2
    assert (tmp_path / "out_masks" / "mine.txt").exists()
    (tmp_path / "out_masks" / "mine.txt").unlink()
    assert run("predict", tmp_path / "run", rows, tmp_path / "out.jsonl") == 0
    # Pictures of somebody's own, and masks that the rows name, are not replaced.
    (tmp_path / "own_masks").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "own_masks" / "truth.png")
    assert run("predict", tmp_path / "run", rows, tmp_path / "own.jsonl") == 2
    assert (tmp_path / "own_masks" / "truth.png").exists()
    (tmp_path / "true_masks").mkdir()
    Image.new("L", (32, 32)).save(tmp_path / "true_masks" / "000000.png")
    (tmp_path / "0.png").write_bytes((here / "scenes" / lines[0]["file_name"]).read_bytes())
    row = {"file_name": "0.png", "mask": "true_masks/000000.png", "text": "the circle"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert run("predict", tmp_path / "run", tmp_path / "rows.jsonl", tmp_path / "true.jsonl") == 2
    assert not load_mask(tmp_path / "true_masks" / "000000.png").any()


def test_the_prefix_cache_changes_nothing(here: Path) -> None:
    data = read_folder(here / "scenes")
    losses = []
    for cache in (None, "memory"):
        model = segmenter(here, engine=EngineConfig(prefix_cache=cache))
        training = TrainingConfig(epochs=2, batch_size=16, tensorboard=False)
        found = fit(model, data.splits["train"], data.splits["validation"], config=training, progress=False)
        losses.append([row["validation"]["loss"] for row in found.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"decoder_layers": [5, 1]}, "reads after 5 layers, but this vision tower has 4"),
        ({"decoder_layers": [1, 2]}, "wanted falling numbers"),
        ({"mask_class_weights": [1.0]}, "wanted two positive numbers"),
        ({"mask_size": 0}, "mask_size=0"),
        ({"mask_loss": "iou"}, "mask_loss='iou'"),
        ({"picture": False, "layers": []}, "masks need pictures"),
        ({"decoder_heads": 3}, "width=16 with heads=3"),
    ],
)
def test_what_cannot_be_built(here: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        segmenter(here, **config)


def test_other_methods_make_no_masks(here: Path) -> None:
    with pytest.raises(ConfigError, match="masks are what MiT makes"):
        wrap(tiny_clip(), EpicConfig(prompt_length=2), 2, "segmentation")
    with pytest.raises(ConfigError, match="wanted 2 for segmentation"):
        wrap(towers(here), MitConfig(**SMALL), 3, "segmentation")


# -- sentiment -------------------------------------------------------------------------------------------------------


def sentiment(here: Path, names: tuple[str, ...] = ("acoustic", "facial"), **more: Any) -> Any:
    torch.manual_seed(0)
    widths = {"acoustic": 74, "facial": 35}
    sequences = {name: widths[name] for name in names}
    config = MitConfig(sequences=sequences, sequence_size=32, regression_loss="l1", **more)
    return wrap(tiny_llama(), config, 1, "regression", tokenizer=_tokenizer())


def _tokenizer() -> Any:
    from epic_fast.testing import tiny_tokenizer

    tokenizer = tiny_tokenizer("llama", max_length=64)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.mark.slow
def test_two_sequences_beat_each_and_the_mean(here: Path) -> None:
    data = read_folder(here / "sentiment")
    assert data.sequences == {"acoustic": 74, "facial": 35}
    labels = np.array(data.splits["test"].label_ids())
    errors = {}
    for names in (("acoustic", "facial"), ("acoustic",), ("facial",)):
        model = sentiment(here, names, head_dropout=0.0)
        training = TrainingConfig(
            epochs=8, batch_size=64, learning_rate=5e-3, head_learning_rate=5e-3, tensorboard=False
        )
        fit(model, data.splits["train"], data.splits["validation"], config=training, progress=False)
        found = predict(model, data.splits["test"], progress=False)
        errors[names] = compute_metrics(found.logits, found.labels, "regression", num_labels=1)["mae"]
    mean = np.abs(labels - np.median(data.splits["train"].label_ids())).mean()
    both = errors[("acoustic", "facial")]
    assert both < 0.95 * min(errors[("acoustic",)], errors[("facial",)]), errors
    assert max(errors.values()) < mean


def test_the_label_needs_each_modality(tmp_path: Path) -> None:
    """A least-squares fit on what was drawn for each, without any of them, and with all."""
    data = read_sequences(make_sentiment(tmp_path / "made", train=1500, validation=0, test=0) / "train.npz")
    parts = {}
    for name in ("acoustic", "facial"):
        means = np.stack([example.sequences[name].mean(axis=0) for example in data])
        parts[name] = means
    words = sorted({word for text in data.texts() for word in text.split()})
    parts["text"] = np.array([[word in text.split() for word in words] for text in data.texts()], dtype=float)
    labels = np.array(data.label_ids())

    def explained(names: tuple[str, ...]) -> float:
        inputs = np.concatenate([parts[name] for name in names] + [np.ones((len(labels), 1))], axis=1)
        fitted = inputs @ np.linalg.lstsq(inputs[:1000], labels[:1000], rcond=None)[0]
        return 1 - ((labels - fitted)[1000:] ** 2).mean() / labels[1000:].var()

    everything = explained(("acoustic", "facial", "text"))
    assert everything > 0.8
    for name in parts:
        assert explained((name,)) < 0.5, name
        assert explained(tuple(other for other in parts if other != name)) < everything - 0.15, name


def test_the_sequences_of_a_batch(here: Path) -> None:
    data = read_folder(here / "sentiment").splits["test"]
    model = sentiment(here).eval()
    collate = Collator.for_model(model)
    batch = collate([data[0], data[1], data[2]])
    assert batch["acoustic"].shape == (3, int(batch["acoustic_lengths"].max()), 74)
    for row in range(3):
        length = int(batch["facial_lengths"][row])
        np.testing.assert_array_equal(batch["facial"][row, :length].numpy(), data[row].sequences["facial"])
        assert not batch["facial"][row, length:].any()
    logits = model(**batch).logits
    for row in range(3):  # alone, without padding
        torch.testing.assert_close(model(**collate([data[row]])).logits[0], logits[row], rtol=1e-4, atol=1e-5)


def test_sentiment_by_the_commands(
    here: Path, tmp_path: Path, answer: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--data", here / "sentiment", "--backbone", f"text={here / 'llama'}", "--method", "mit")
    trained = answer(
        "train",
        *where,
        "--output",
        tmp_path / "run",
        "--epochs",
        1,
        "sequence_size=16",
        "regression_loss=l1",
        "tensorboard=false",
        "batch_size=64",
    )
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["sequences"] == {
        "acoustic": 74,
        "facial": 35,
    }
    scored = answer("eval", tmp_path / "run", "--data", here / "sentiment", "--split", "test")
    assert set(scored) >= {"mae", "pearson", "acc7", "acc2_has0", "acc2_non0", "f1_has0", "f1_non0"}
    assert scored["mae"] == pytest.approx(trained["test"]["mae"])
    answer("predict", tmp_path / "run", here / "sentiment" / "test.npz", tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(lines) == 300
    assert isinstance(lines[0]["predicted"], float)
    assert set(lines[0]) == {"id", "text", "predicted"}
    # A model that went wrong says null, which JSON knows.
    weights = load_file(tmp_path / "run" / "model.safetensors")
    save_file({name: torch.full_like(each, math.nan) for name, each in weights.items()}, tmp_path / "run" / "new")
    (tmp_path / "run" / "new").replace(tmp_path / "run" / "model.safetensors")
    answer("predict", tmp_path / "run", here / "sentiment" / "test.npz", tmp_path / "out.jsonl")
    assert '"predicted": null}' in (tmp_path / "out.jsonl").read_text().splitlines()[0]
    epic = ("train", "--data", here / "sentiment", "--backbone", towers(here), "--method", "epic")
    assert run(*epic, "--output", tmp_path / "other") == 2
    cached = ("train", *where, "--output", tmp_path / "cached", "--epochs", 1, "engine.prefix_cache=memory")
    assert run(*cached) == 2
    pictures = ("train", "--data", here / "sentiment", "--backbone", towers(here), "--method", "mit")
    assert run(*pictures, "--output", tmp_path / "third") == 3
    error = " ".join(capsys.readouterr().err.split())
    assert "train.npz, validation.npz, test.npz in" in error
    assert "looks at pictures" in error
    assert not (tmp_path / "third").exists(), "it is seen before training"


def test_texts_alone_with_a_prefix_cache(here: Path) -> None:
    data = read_folder(here / "sentiment")
    few = [torch.utils.data.Subset(data.splits[split], range(24)) for split in ("train", "validation")]
    losses = []
    for cache in (None, "memory"):
        torch.manual_seed(0)
        model = epic_fast.wrap(
            f"text={here / 'llama'}", MitConfig(layers=[]), 1, "regression", engine=EngineConfig(prefix_cache=cache)
        )
        training = TrainingConfig(epochs=2, batch_size=8, tensorboard=False)
        found = fit(model, *few, config=training, progress=False)
        losses.append([row["validation"]["loss"] for row in found.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# -- npz files -------------------------------------------------------------------------------------------------------


def arrays(count: int = 3, **more: Any) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    found = {
        "text": np.array([f"text {each}" for each in range(count)]),
        "acoustic": random.standard_normal((count, 5, 74)),
        "acoustic_lengths": np.array([5, 1, 0][:count]),
        "facial": random.standard_normal((count, 4, 47)).astype(np.float32),
        "label": np.linspace(-3, 3, count),
    }
    return {name: each for name, each in {**found, **more}.items() if each is not None}


def test_arrays_come_back(tmp_path: Path) -> None:
    write_sequences(tmp_path / "train.npz", arrays())
    data = read_sequences(tmp_path / "train.npz")
    assert data.widths == {"acoustic": 74, "facial": 47}
    assert [len(each.sequences["acoustic"]) for each in data] == [5, 1, 0]
    assert [len(each.sequences["facial"]) for each in data] == [4, 4, 4]
    assert data[1].label == 0.0
    assert data[2].name == "train[2]"
    np.testing.assert_array_equal(data[1].sequences["acoustic"], arrays()["acoustic"][1, :1].astype(np.float32))


def test_infinities_of_public_features_count_as_zero(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = arrays()
    given["acoustic"][0, 1, 3] = -np.inf
    given["acoustic"][0, 2, 3] = np.nan
    write_sequences(tmp_path / "train.npz", given)
    data = read_sequences(tmp_path / "train.npz")
    assert data[0].sequences["acoustic"][1, 3] == data[0].sequences["acoustic"][2, 3] == 0
    assert "2 values of acoustic are no numbers" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": None}, "no array 'text'"),
        ({"text": np.arange(3)}, r"text has shape \(3,\) and type int64"),
        ({"text": np.array(["a", 1, None], dtype=object)}, "save strings with dtype=str"),
        ({"label": np.array([1.0, np.nan, 0.0])}, r"label\[1\] is nan, no finite number; wanted \(3,\) finite numbers"),
        ({"label": np.array([[1.0], [np.inf], [np.nan]])}, r"label\[1\] is inf, no finite number \(and 1 more\)"),
        ({"label": np.array([1.0])}, r"label has shape \(1,\)"),
        ({"acoustic_lengths": np.array([5, 6, 1])}, "whole numbers from 0 to 5, the frames of acoustic"),
        ({"acoustic_lengths": np.array([5, 1])}, r"acoustic_lengths has shape \(2,\)"),
        ({"acoustic": np.zeros((2, 5, 74))}, r"acoustic has shape \(2, 5, 74\)"),
        (
            {"facial_length": np.array([1, 2, 3]), "voice_lengths": np.array([1, 2, 3])},
            "voice_lengths without the sequence",
        ),
        ({"id": np.array(["a"])}, r"id has shape \(1,\); wanted \(3,\)"),
        ({"id": np.array("a")}, r"id has shape \(\); wanted \(3,\)"),
        ({"label": np.array([1.0, 1e300, 0.0])}, r"wanted \(3,\) finite numbers"),
        ({"label": np.ones((1, 3))}, r"label has shape \(1, 3\)"),
        ({"acoustic": np.zeros((3, 5, 0))}, r"acoustic has shape \(3, 5, 0\)"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    np.savez(tmp_path / "train.npz", **arrays(**change))
    with pytest.raises(DataError, match=said):
        read_sequences(tmp_path / "train.npz")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_sequences(tmp_path / "train.npz")
    (tmp_path / "train.npz").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(DataError, match="cannot be read"):
        read_sequences(tmp_path / "train.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "train.npz")
    with pytest.raises(DataError, match="one array, no npz file"):
        read_sequences(tmp_path / "train.npz")


def test_damaged_files_are_errors_of_data_and_nothing_else(tmp_path: Path) -> None:
    write_sequences(tmp_path / "train.npz", arrays())
    whole = (tmp_path / "train.npz").read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        broken = bytearray(whole)
        for place in random.integers(len(whole), size=3):
            broken[place] = random.integers(256)
        (tmp_path / "broken.npz").write_bytes(broken)
        try:
            read_sequences(tmp_path / "broken.npz")
        except DataError:
            refused += 1
    assert refused > 100


def test_members_that_are_no_arrays_or_larger_than_the_memory(tmp_path: Path, monkeypatch: Any) -> None:
    write_sequences(tmp_path / "train.npz", arrays())
    with zipfile.ZipFile(tmp_path / "train.npz", "a") as file:
        file.writestr("README.txt", "by somebody")
    with pytest.raises(DataError, match=r"README\.txt in it is no array"):
        read_sequences(tmp_path / "train.npz")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (3, 10**13, 7)})
    write_sequences(tmp_path / "train.npz", arrays(acoustic=None, acoustic_lengths=None))
    with zipfile.ZipFile(tmp_path / "train.npz", "a") as file:
        file.writestr("acoustic.npy", header.getvalue())
    with pytest.raises(DataError, match=r"train.npz: cannot be read"):
        read_sequences(tmp_path / "train.npz")
    write_sequences(tmp_path / "train.npz", arrays(acoustic=np.zeros((3, 10**4, 74))))
    assert (tmp_path / "train.npz").stat().st_size < 10**5
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096}.get(name, 1000))
    with pytest.raises(DataError, match=r"its arrays take 0.0 GiB"):
        read_sequences(tmp_path / "train.npz")


@pytest.mark.parametrize("metadata", ["metadata.csv", "train/metadata.csv"])
def test_features_beside_pictures_are_no_utterances(tmp_path: Path, metadata: str) -> None:
    write_sequences(tmp_path / "train.npz", arrays())
    (tmp_path / "train").mkdir()
    place = (tmp_path / metadata).parent
    Image.new("RGB", (4, 4)).save(place / "1.png")
    (tmp_path / metadata).write_text("file_name,text,label\n1.png,a,x\n1.png,b,y\n")
    assert read_folder(tmp_path).labels == ["x", "y"]
    assert check_folder(tmp_path).labels == ["x", "y"]


def test_halves_of_characters_are_replaced(tmp_path: Path) -> None:
    write_sequences(tmp_path / "train.npz", arrays(text=np.array(["a\ud83d", "b", "c"])))
    assert read_sequences(tmp_path / "train.npz").texts() == ["a\ufffd", "b", "c"]


def test_splits_have_the_same_sequences(tmp_path: Path) -> None:
    write_sequences(tmp_path / "train.npz", arrays())
    write_sequences(tmp_path / "val.npz", arrays(facial=np.zeros((3, 2, 35))))
    with pytest.raises(DataError, match=r"the sequences of validation are .*35.*, those of train .*47"):
        read_folder(tmp_path)
    write_sequences(tmp_path / "val.npz", arrays(label=None))
    data = read_folder(tmp_path)
    assert not data.split("validation").has_labels
    assert (data.problem_type, data.num_labels) == ("regression", 1)
    write_sequences(tmp_path / "validation.npz", arrays())
    with pytest.raises(
        DataError, match=r"val.npz and validation.npz for the split 'validation'|validation.npz and val.npz"
    ):
        read_folder(tmp_path)
