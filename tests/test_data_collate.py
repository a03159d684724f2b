"""Batches with the backbone's own processors, labels by problem, worker processes, truncation counted."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from epic_fast.data import Collator, Example, read_folder, truncation_report
from epic_fast.errors import ConfigError, DataError
from epic_fast.testing import make_folder, tiny_bert, tiny_clip, tiny_tokenizer, tiny_vit

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """Image processor and tokenizer of a saved CLIP, as from a hub."""
    from transformers import AutoTokenizer
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    folder = tmp_path_factory.mktemp("clip")
    tiny_clip(folder)
    return AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def example(text: str = "a cat", label=None, size=(20, 12), colour: str = "red") -> Example:
    return Example(Image.new("RGB", size, colour), text, label, f"{text}.png")


def collator(processors, **options) -> Collator:
    return Collator(*processors, **{"max_text_length": 16, **options})


def test_batch_without_labels(processors):
    batch = collator(processors)([example("a cat"), example("a red dog with a hat", size=(3, 50)), example("")])
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask"}
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 8, 2]
    assert batch["input_ids"].shape == (3, 8)
    assert batch["input_ids"][0, 4:].tolist() == [0] * 4


def test_padding_is_on_the_right_whatever_the_tokenizer_prefers(processors):
    tokenizer = tiny_tokenizer("clip")
    tokenizer.padding_side = "left"
    batch = collator((processors[0], tokenizer))([example("a"), example("a cat and a dog")])
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 0, 0, 0, 0]


def test_long_texts_are_cut_and_keep_their_end_token(processors):
    tokenizer = processors[1]
    ids = collator(processors, max_text_length=6)([example("cat " * 40), example("a")])["input_ids"]
    assert ids.shape == (2, 6)
    assert ids[0, -1] == tokenizer.eos_token_id
    assert ids[0, 0] == tokenizer.bos_token_id


def test_token_type_ids_of_bert(processors):
    batch = collator((processors[0], tiny_tokenizer("bert")))([example("a cat")])
    assert batch["token_type_ids"].shape == batch["input_ids"].shape


def test_pictures_go_through_the_backbones_own_processor(processors):
    found = collator(processors)([example(colour="blue")])["pixel_values"][0]
    mean, std = np.array(processors[0].image_mean), np.array(processors[0].image_std)
    wanted = (np.array([0.0, 0.0, 1.0]) - mean) / std
    np.testing.assert_allclose(found.mean(dim=(1, 2)).numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (3, 40), (40, 3), (1, 40), (200, 1)])
def test_thin_pictures(processors, size):
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[..., 0] = 255
    thin = Example(Image.fromarray(pixels), "a", None, "thin.png")
    found = collator(processors)([thin])["pixel_values"]
    torch.testing.assert_close(
        found, collator(processors)([example("a", size=(32, 32), colour="#ff0000")])["pixel_values"]
    )


def test_labels_by_problem(processors):
    single = collator(processors, problem_type=SINGLE, num_labels=3)([example(label=2), example(label=0)])["labels"]
    assert (single.dtype, single.tolist()) == (torch.int64, [2, 0])
    multi = collator(processors, problem_type=MULTI, num_labels=3)([example(label=[0, 2]), example(label=[])])["labels"]
    assert (multi.dtype, multi.tolist()) == (torch.float32, [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    number = collator(processors, problem_type=REGRESSION, num_labels=1)([example(label=2), example(label=0.5)])
    assert (number["labels"].dtype, number["labels"].tolist()) == (torch.float32, [2.0, 0.5])


def test_labels_without_a_problem_type(processors):
    assert collator(processors)([example(label=1)])["labels"].dtype == torch.int64
    assert collator(processors)([example(label=1.0)])["labels"].dtype == torch.float32
    assert collator(processors, num_labels=2)([example(label=[1])])["labels"].tolist() == [[0.0, 1.0]]
    with pytest.raises(ConfigError, match="num_labels"):
        collator(processors)([example(label=[1])])


@pytest.mark.parametrize(
    ("problem_type", "label", "said"),
    [
        (SINGLE, 3, "class id, 0 to 2"),
        (SINGLE, -1, "class id, 0 to 2"),
        (SINGLE, 1.5, "class id, 0 to 2"),
        (SINGLE, [1], "class id, 0 to 2"),
        (MULTI, [0, 3], "class id, 0 to 2"),
        (MULTI, 1, "list of class ids"),
        (REGRESSION, "two", "wanted a number"),
    ],
)
def test_labels_that_do_not_fit(processors, problem_type, label, said):
    fine = {SINGLE: 0, MULTI: [0], REGRESSION: 0.0}[problem_type]
    with pytest.raises(DataError, match=rf"'odd\.png' has the label .*{said}"):
        collator(processors, problem_type=problem_type, num_labels=3)([example(label=fine), example("odd", label)])


def test_labels_in_some_of_the_batch(processors):
    with pytest.raises(DataError, match=r"1 of 2 examples have no label.*'none\.png'"):
        collator(processors)([example(label=1), example("none")])


def test_for_model():
    backbone = SimpleNamespace(image_processor=lambda **_: None, tokenizer=tiny_tokenizer(), max_text_length=9)
    model = SimpleNamespace(backbone=backbone, problem_type=MULTI, num_labels=5)
    found = Collator.for_model(model)
    assert (found.max_text_length, found.problem_type, found.num_labels) == (9, MULTI, 5)
    assert found.tokenizer is backbone.tokenizer
    for name, loader in (("image_processor", "AutoImageProcessor"), ("tokenizer", "AutoTokenizer")):
        bare = SimpleNamespace(**{**vars(backbone), name: None})
        with pytest.raises(ConfigError, match=rf"no {name.replace('_', ' ')}.*load_backbone\(.*{name}=.*{loader}"):
            Collator.for_model(SimpleNamespace(**{**vars(model), "backbone": bare}))


def test_arguments_that_cannot_work(processors):
    with pytest.raises(ConfigError, match="max_text_length=0"):
        collator(processors, max_text_length=0)
    with pytest.raises(ConfigError, match="problem_type='multi'"):
        collator(processors, problem_type="multi")
    with pytest.raises(ConfigError, match="needs num_labels"):
        collator(processors, problem_type=MULTI)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ConfigError, match=r"no padding token.*pad_token = tokenizer\.eos_token"):
        collator((processors[0], tokenizer))


def test_collator_can_be_pickled(processors):
    found = collator(processors, problem_type=SINGLE, num_labels=3)
    again = pickle.loads(pickle.dumps(found))
    for key, value in found([example(label=1)]).items():
        torch.testing.assert_close(again([example(label=1)])[key], value)


def test_worker_processes_give_the_same_batches(tmp_path, processors, capfd):
    data = read_folder(make_folder(tmp_path))
    made = collator(processors, problem_type=data.problem_type, num_labels=data.num_labels)
    here, there = (
        list(DataLoader(data.splits["train"], batch_size=5, collate_fn=made, num_workers=workers)) for workers in (0, 2)
    )
    assert len(here) == len(there) == 5
    for one, other in zip(here, there, strict=True):
        assert set(one) == set(other) == {"pixel_values", "input_ids", "attention_mask", "labels"}
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)
    assert "parallelism" not in capfd.readouterr().err


def test_error_of_a_worker_names_the_row(tmp_path, processors):
    folder = make_folder(tmp_path)
    (folder / "0002.png").write_text("no picture")
    loader = DataLoader(read_folder(folder).splits["train"], 4, collate_fn=collator(processors), num_workers=2)
    with pytest.raises(DataError, match=r"line 3.*0002\.png.*cannot be read"):
        list(loader)


def test_pair_of_towers_from_their_folders(tmp_path):
    from epic_fast import load_backbone, wrap
    from epic_fast.models import EpicConfig

    tiny_vit(tmp_path / "vit")
    tiny_bert(tmp_path / "bert")
    data = read_folder(make_folder(tmp_path / "data", train=6, validation=3, test=3))
    model = wrap(
        load_backbone(f"vision={tmp_path / 'vit'},text={tmp_path / 'bert'}"),
        EpicConfig(),
        num_labels=data.num_labels,
        problem_type=SINGLE,
        labels=data.labels,
    )
    batch = Collator.for_model(model)([data.splits["train"][index] for index in range(4)])
    out = model(**batch)
    assert out.logits.shape == (4, 3)
    assert torch.isfinite(out.loss)


def test_truncation_report():
    tokenizer = tiny_tokenizer(max_length=6)
    texts = ["a cat", "", "a cat and a dog", "a cat and a", "  "]
    report = truncation_report(texts, tokenizer, 6)
    assert (report.texts, report.truncated, report.longest, report.empty) == (5, 1, 7, 2)
    assert report.share == pytest.approx(0.2)
    assert "1 of 5 texts (20.0%) are longer than 6 tokens" in str(report)


def test_truncation_report_agrees_with_the_collator(processors):
    texts = [" ".join(["cat"] * count) for count in range(12)]
    limit = 8
    full = truncation_report(texts, processors[1], limit)
    cut = collator(processors, max_text_length=limit).encode(texts)
    long = collator(processors, max_text_length=100).encode(texts)
    lost = (long["attention_mask"].sum(dim=1) > cut["attention_mask"].sum(dim=1)).sum()
    assert full.truncated == lost == 5
    assert full.longest == long["input_ids"].shape[1]


def test_truncation_report_of_nothing_and_of_many():
    assert truncation_report([], tiny_tokenizer(), 6).share == 0.0
    assert truncation_report(["a cat"] * 2500, tiny_tokenizer(), 3).truncated == 2500
