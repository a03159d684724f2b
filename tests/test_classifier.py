"""A saved adapter classifies pictures with texts, one at a time or many."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import epic_fast
from epic_fast import Classifier, EpicConfig, Prediction
from epic_fast.cli.scoring import verdict
from epic_fast.errors import ConfigError, DataError
from epic_fast.testing import tiny_bert, tiny_clip, tiny_vit
from epic_fast.testing.probes import perturb

TEXTS = ["a red circle", "", "a large blue square and a small green star on the left of a white cat", "a dog"]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers")
    tiny_clip(folder / "clip")
    tiny_vit(folder / "vit")
    tiny_bert(folder / "bert")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """A path, a path in a string, bytes and a PIL picture with an alpha channel."""
    folder = tmp_path_factory.mktemp("pictures")
    made = [Image.effect_noise((40 + 9 * index, 50), 80 + index).convert("RGB") for index in range(4)]
    for index, picture in enumerate(made[:2]):
        picture.save(folder / f"{index}.png")
    stream = io.BytesIO()
    made[2].save(stream, format="PNG")
    return [folder / "0.png", str(folder / "1.png"), stream.getvalue(), made[3].convert("RGBA")]


def make_model(backbone: Any, threshold: float | None = None, **task: Any) -> Any:
    task = {"num_labels": 3, "labels": ["a", "b", "c"], **task}
    model = perturb(epic_fast.wrap(backbone, EpicConfig(prompt_length=2), **task))
    model.threshold = threshold
    return model


@pytest.mark.parametrize("kind", ["clip", "pair"])
def test_a_saved_adapter_predicts_what_the_model_says(
    kind: str, towers: Path, pictures: list[Any], tmp_path: Path
) -> None:
    backbone = str(towers / "clip") if kind == "clip" else f"vision={towers / 'vit'},text={towers / 'bert'}"
    make_model(backbone).save_pretrained(tmp_path)
    classifier = Classifier.from_pretrained(tmp_path, device="cpu")
    found = classifier.predict(images=pictures, texts=TEXTS, top_k=2)
    assert len(found) == 4
    encoder = classifier.model.backbone
    for prediction, picture, text in zip(found, pictures, TEXTS, strict=True):
        image = (
            Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)
            if not isinstance(picture, Image.Image)
            else picture
        )
        encoded = encoder.tokenizer([text], truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            logits = classifier.model(
                encoder.image_processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"], **encoded
            ).logits[0]
        chances = {name: float(value) for name, value in zip("abc", logits.softmax(0), strict=True)}
        best = sorted(chances, key=lambda name: -chances[name])
        assert isinstance(prediction, Prediction)
        assert prediction.label == best[0]
        assert prediction.probability == pytest.approx(chances[best[0]], abs=1e-5)
        assert [name for name, _ in prediction.top] == best[:2]
        assert [value for _, value in prediction.top] == pytest.approx([chances[name] for name in best[:2]], abs=1e-5)


def test_batch_size_and_company_change_nothing(towers: Path, pictures: list[Any]) -> None:
    classifier = Classifier(make_model(str(towers / "clip")))
    whole = classifier.predict(pictures, TEXTS, top_k=9)
    assert [len(each.top) for each in whole] == [3] * 4
    for size in (1, 3):
        for one, other in zip(classifier.predict(pictures, TEXTS, batch_size=size, top_k=9), whole, strict=True):
            assert one.label == other.label
            assert dict(one.top) == pytest.approx(dict(other.top), abs=1e-5)
    assert classifier.predict([], []) == []
    assert classifier.predict(pictures[:1], TEXTS[:1], top_k=0)[0].top == []


@pytest.mark.parametrize("threshold", [None, 0.2, 0.8])
def test_multi_label_tasks_use_the_saved_threshold(
    threshold: float | None, towers: Path, pictures: list[Any], tmp_path: Path
) -> None:
    make_model(str(towers / "clip"), threshold, problem_type="multi_label_classification").save_pretrained(tmp_path)
    classifier = Classifier.from_pretrained(tmp_path)
    assert classifier.model.threshold == threshold
    for prediction in classifier.predict(pictures, TEXTS):
        assert prediction.probability is None
        assert len(prediction.top) == 3
        chosen = {name for name, value in prediction.top if value > (threshold or 0.5)}
        assert set(prediction.label) == chosen
    logits = torch.tensor([0.0, 1.0, -1.0])  # 0.5, 0.73, 0.27
    # Above it, not at it: as the metrics count and as `epic-fast predict` says.
    assert classifier.describe(logits).label == {None: ["b"], 0.2: ["b", "a", "c"], 0.8: []}[threshold]
    assert set(classifier.describe(logits).label) == set(verdict(classifier.model, logits, 3)["predicted"])


@pytest.mark.parametrize("outputs", [1, 2])
def test_regression_gives_numbers(outputs: int, towers: Path, pictures: list[Any]) -> None:
    model = make_model(str(towers / "clip"), num_labels=outputs, labels=None, problem_type="regression")
    prediction = Classifier(model).predict(pictures[:1], TEXTS[:1])[0]
    assert isinstance(prediction.label, float) if outputs == 1 else len(prediction.label) == 2
    assert (prediction.probability, prediction.top) == (None, [])


def test_labels_without_names_are_their_numbers(towers: Path, pictures: list[Any]) -> None:
    classifier = Classifier(make_model(str(towers / "clip"), labels=None))
    assert classifier.predict(pictures[:1], TEXTS[:1])[0].label in ("0", "1", "2")


def test_dropout_is_off_and_no_graph_is_left(towers: Path, pictures: list[Any]) -> None:
    model = make_model(str(towers / "clip")).train()
    classifier = Classifier(model)
    assert not model.training
    assert classifier.predict(pictures, TEXTS) == classifier.predict(pictures, TEXTS)


def test_bad_input_says_what_was_wanted(towers: Path, pictures: list[Any], tmp_path: Path) -> None:
    classifier = Classifier(make_model(str(towers / "clip")))
    for images, texts, said in (
        (pictures, TEXTS[:3], "4 images and 3 texts were given"),
        (pictures[:1], "a dog", r"takes lists: predict\(images=\[picture\], texts=\[text\]\)"),
        (pictures[1], TEXTS[:1], "takes lists"),
        (pictures[2], TEXTS[:1], "takes lists"),
        (pictures[3], TEXTS[:1], "takes lists"),
    ):
        with pytest.raises(ConfigError, match=said):
            classifier.predict(images, texts)
    with pytest.raises(ConfigError, match="batch_size=0; wanted at least 1"):
        classifier.predict(pictures, TEXTS, batch_size=0)
    with pytest.raises(ConfigError, match="top_k=-1; wanted at least 0"):
        classifier.predict(pictures, TEXTS, top_k=-1)
    with pytest.raises(DataError, match=r"nowhere\.png"):
        classifier.predict([tmp_path / "nowhere.png"], ["a dog"])
    with pytest.raises(ConfigError, match="text 1 is 3, of type int; wanted a string"):
        classifier.predict(pictures[:2], ["a dog", 3])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="no image processor"):
        Classifier(make_model(tiny_clip()))
