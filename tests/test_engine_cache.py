"""The prefix cache: what it holds is what the layers made, of these samples, by this model, and of nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import epic_fast
from epic_fast import EpicConfig
from epic_fast.data import Collator, read_folder
from epic_fast.engine import DamagedRecords, DiskStore, EngineConfig, MemoryStore, SampleKey
from epic_fast.engine.store import ENTRY, HEADER
from epic_fast.errors import ConfigError, EpicFastError
from epic_fast.testing import make_folder, tiny_bert, tiny_clip, tiny_vit
from epic_fast.testing.pairs import RandomPairs
from epic_fast.testing.probes import lively, make_batch
from epic_fast.training import TrainingConfig, fit
from epic_fast.training.batches import Batch, ordered_batches
from epic_fast.training.prefixes import PrefixFeed

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = [9, 4, 6, 12, 5, 5, 3]
KEY = {"backbone": {"layer": "abc"}, "first_layers": {"text": 1, "vision": 2}}


def make_model(
    cache: str | Path | None = None, kind: str = "clip", *, folder: Path | None = None, seed: int = 0, **fields: Any
) -> Any:
    given: Any = str(folder) if folder is not None else (tiny_vit(), tiny_bert()) if kind == "pair" else tiny_clip()
    if folder is None:
        given = lively(given)
    config = EpicConfig(**{"prompt_length": 2, "layer_pairs": [(1, 2), (2, 3)], **fields})
    engine = None if cache is None else EngineConfig(prefix_cache=str(cache))
    torch.manual_seed(seed)
    return epic_fast.wrap(given, config, num_labels=3, engine=engine, self_check=False)


def settings(**changes: Any) -> TrainingConfig:
    values = {"epochs": 2, "batch_size": 8, "log_every_steps": 1, "tensorboard": False, "device": "cpu"}
    return TrainingConfig(**{**values, "learning_rate": 1e-2, "head_learning_rate": 1e-2, **changes})


def keys(count: int = 7, *, start: int = 0) -> list[SampleKey]:
    return [SampleKey(b"t%015d" % index, b"v%015d" % index) for index in range(start, start + count)]


def same(one: Any, other: Any) -> bool:
    """Whether two prefixes hold the same valid rows, bit for bit."""
    for tower in ("text", "vision"):
        first, second = getattr(one, tower), getattr(other, tower)
        for row in range(len(first.hidden)):
            rows = [
                each.hidden[row] if each.valid is None else each.hidden[row][each.valid[row]]
                for each in (first, second)
            ]
            if not torch.equal(*rows):
                return False
        if first.pool_index is not None and not torch.equal(first.pool_index, second.pool_index):
            return False
    return True


def take(prefix: Any, rows: list[int]) -> Any:
    def of(state: Any) -> Any:
        pick = [None if each is None else each[rows] for each in (state.hidden, state.valid, state.pool_index)]
        return type(state)(pick[0], state.layer, pick[1], pick[2])

    return type(prefix)(of(prefix.text), of(prefix.vision))


def stores(tmp_path: Path, **options: Any) -> list[Any]:
    return [MemoryStore(**options), DiskStore(tmp_path / "cache", KEY, **options)]


class Stopped(Exception):
    """What an interrupted run ends with."""


# -- stores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "pair"])
@pytest.mark.parametrize("place", [0, 1], ids=["memory", "disk"])
def test_what_comes_out_is_what_went_in(tmp_path: Path, place: int, kind: str) -> None:
    prefix = make_model(kind=kind).extract(**make_batch(LENGTHS))
    store = stores(tmp_path)[place]
    store.put(keys(4), take(prefix, [0, 1, 2, 3]))
    store.put(keys(3, start=4), take(prefix, [4, 5, 6]))
    assert len(store) == 7
    for rows in ([0, 1, 2, 3, 4, 5, 6], [6, 2, 0], [1], [3, 3]):
        found = store.given_back(store.batch([keys()[row] for row in rows]))
        assert same(found, take(prefix, rows))
        assert found.text.hidden.shape[1] == max(LENGTHS[row] for row in rows)
        assert found.text.layer == prefix.text.layer
        assert found.vision.layer == prefix.vision.layer
        assert found.text.hidden[~found.text.valid].abs().sum() == 0
    assert not store.holds(keys(1, start=7)[0])


@pytest.mark.parametrize("place", [0, 1], ids=["memory", "disk"])
def test_float32_is_kept_in_the_type_of_the_computation(tmp_path: Path, place: int) -> None:
    prefix = make_model().extract(**make_batch(LENGTHS))
    store = stores(tmp_path, compute=torch.bfloat16)[place]
    store.put(keys(), prefix)
    kept = store.batch(keys())
    assert kept.vision.hidden.dtype == torch.bfloat16
    back = store.given_back(kept)
    assert back.vision.hidden.dtype == torch.float32
    assert torch.equal(back.vision.hidden, prefix.vision.hidden.bfloat16().float())


def test_a_picture_with_two_texts_is_kept_once() -> None:
    prefix = make_model().extract(**make_batch([5, 6]))
    store = MemoryStore()
    store.put([SampleKey(b"a" * 16, b"p" * 16), SampleKey(b"b" * 16, b"p" * 16)], prefix)
    assert len(store) == 1
    found = store.batch([SampleKey(b"b" * 16, b"p" * 16)])
    assert torch.equal(found.vision.hidden[0], prefix.vision.hidden[0])
    assert torch.equal(found.text.hidden[0, :6], prefix.text.hidden[1, :6])


def filled(folder: Path, count: int = 7) -> Any:
    prefix = make_model().extract(**make_batch(LENGTHS))
    store = DiskStore(folder, KEY)
    for row in range(count):
        store.put(keys(1, start=row), take(prefix, [row]))
    store.close()
    return prefix


def test_a_later_run_finds_what_an_earlier_one_wrote(tmp_path: Path) -> None:
    prefix = filled(tmp_path)
    store = DiskStore(tmp_path, KEY)
    assert same(store.given_back(store.batch(keys())), prefix)
    assert not list(tmp_path.glob(".*")), "temporary files are left"


def test_a_flipped_byte_is_detected_wherever_it_is(tmp_path: Path) -> None:
    filled(tmp_path)
    (data,) = tmp_path.glob("*.data")
    whole = data.read_bytes()
    store = DiskStore(tmp_path, KEY)
    places = {name: record.offset for name, record in zip("abcdefg", store._records["vision"].values(), strict=True)}
    for position, offset in enumerate(places.values()):
        data.write_bytes(whole[: offset + 5] + bytes([whole[offset + 5] ^ 1]) + whole[offset + 6 :])
        with pytest.raises(DamagedRecords, match="do not have the checksum") as caught:
            DiskStore(tmp_path, KEY).batch(keys())
        assert caught.value.positions == [position]
    data.write_bytes(whole)
    (index,) = tmp_path.glob("*.index")
    entries = index.read_bytes()
    for place in range(0, len(entries), 11):
        index.write_bytes(entries[:place] + bytes([entries[place] ^ 4]) + entries[place + 1 :])
        damaged = DiskStore(tmp_path, KEY)
        assert damaged.damaged_entries == 1
        assert sum(damaged.holds(key) for key in keys()) == 6
    index.write_bytes(entries)
    header = (tmp_path / HEADER).read_bytes()
    for place in range(0, len(header), 7):
        (tmp_path / HEADER).write_bytes(header[:place] + bytes([header[place] ^ 1]) + header[place + 1 :])
        try:
            opened = DiskStore(tmp_path, KEY)
        except ConfigError:
            continue
        assert same(opened.batch(keys()), opened.batch(keys()))
        assert json.loads((tmp_path / HEADER).read_bytes()) == json.loads(header)


def test_a_torn_record_counts_as_missing(tmp_path: Path) -> None:
    prefix = filled(tmp_path)
    (index,), (data,) = tmp_path.glob("*.index"), tmp_path.glob("*.data")
    whole, rows = index.read_bytes(), data.read_bytes()
    assert len(whole) == 14 * ENTRY.itemsize
    index.write_bytes(whole[: 13 * ENTRY.itemsize + 20])
    store = DiskStore(tmp_path, KEY)
    assert [store.holds(key) for key in keys()] == [True] * 6 + [False]
    index.write_bytes(whole)
    data.write_bytes(rows[:-10])
    store = DiskStore(tmp_path, KEY)
    assert [store.holds(key) for key in keys()] == [True] * 6 + [False]
    store.put(keys(1, start=6), take(prefix, [6]))
    store.close()
    assert same(DiskStore(tmp_path, KEY).batch(keys()), prefix)


def test_rows_that_are_not_on_the_disk_yet_have_no_entry(tmp_path: Path) -> None:
    """A process that dies between rows and entry leaves nothing that another would read."""
    prefix = make_model().extract(**make_batch(LENGTHS))
    store = DiskStore(tmp_path, KEY)
    store.put(keys(3), take(prefix, [0, 1, 2]))
    assert all(store.holds(key) for key in keys(3)), "its own are served at once"
    assert same(store.batch(keys(3)), take(prefix, [0, 1, 2]))
    (index,) = tmp_path.glob("*.index")
    assert index.stat().st_size == 0
    assert not any(DiskStore(tmp_path, KEY).holds(key) for key in keys())
    store.commit()
    assert index.stat().st_size == 6 * ENTRY.itemsize
    assert all(DiskStore(tmp_path, KEY).holds(key) for key in keys(3))


def test_two_that_fill_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    prefix = make_model().extract(**make_batch(LENGTHS))
    one, two = DiskStore(tmp_path, KEY), DiskStore(tmp_path, KEY)
    for row in range(6):
        (one if row % 2 else two).put(keys(1, start=row), take(prefix, [row]))
    one.put(keys(1, start=6), take(prefix, [6]))
    two.put(keys(1, start=6), take(prefix, [6]))
    one.commit()
    two.refresh()
    assert same(two.batch(keys()), prefix)
    two.close()
    one.close()
    assert same(DiskStore(tmp_path, KEY).batch(keys()), prefix)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"backbone": {"layer": "xyz"}}, r"backbone\.layer was 'abc', now 'xyz'"),
        ({"first_layers": {"text": 0, "vision": 2}}, r"first_layers\.text was 1, now 0"),
        ({"precision": "bf16"}, r"precision was '\(not set\)', now 'bf16'"),
    ],
)
def test_a_folder_of_another_key_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    filled(tmp_path)
    with pytest.raises(ConfigError, match=said):
        DiskStore(tmp_path, {**KEY, **change})


def test_two_keys_cannot_share_a_folder_even_if_they_start_together(tmp_path: Path) -> None:
    prefix = make_model().extract(**make_batch(LENGTHS))
    one, two = DiskStore(tmp_path, KEY), DiskStore(tmp_path, {**KEY, "precision": "bf16"})
    one.put(keys(), prefix)
    with pytest.raises(ConfigError, match="precision"):
        two.put(keys(), prefix)


def test_states_of_another_layer_are_refused(tmp_path: Path) -> None:
    store = MemoryStore()
    store.put(keys(), make_model().extract(**make_batch(LENGTHS)))
    with pytest.raises(ConfigError, match=r"layer 2; the states given are.*layer 1"):
        store.put(keys(start=7), make_model(layer_pairs=[(0, 1), (2, 3)]).extract(**make_batch(LENGTHS)))


def test_a_folder_that_is_no_cache_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"is no prefix cache.*thesis\.txt"):
        DiskStore(tmp_path, KEY)
    with pytest.raises(ConfigError, match="is a file"):
        DiskStore(tmp_path / "thesis.txt", KEY)


def test_a_full_disk_leaves_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = make_model().extract(**make_batch(LENGTHS))
    store = DiskStore(tmp_path, KEY)
    store.put(keys(3), take(prefix, [0, 1, 2]))
    store.commit()
    pwrite = os.pwrite

    def full(handle: int, content: Any, offset: int) -> int:
        if len(content) > 100:
            return pwrite(handle, content[:100], offset)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(EpicFastError, match=r"could not be written: .*No space left.*is whole"):
        store.put(keys(1, start=3), take(prefix, [3]))
    monkeypatch.undo()
    assert not store.holds(keys(1, start=3)[0])
    store.put(keys(4, start=3), take(prefix, [3, 4, 5, 6]))
    store.close()
    assert same(DiskStore(tmp_path, KEY).batch(keys()), prefix)


# -- training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip(folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data", train=20, validation=6, test=0)


class Counted:
    """How many samples go through the layers below the prompts."""

    def __init__(self, model: Any):
        self.samples = 0
        extract = model.extract

        def counting(**inputs: Any) -> Any:
            self.samples += len(inputs["pixel_values"])
            return extract(**inputs)

        model.extract = counting


def train(model: Any, data: Path, *, callbacks: Any = (), **options: Any) -> Any:
    changes = {name: options.pop(name) for name in list(options) if name in TrainingConfig.__dataclass_fields__}
    splits = read_folder(data).splits
    return fit(
        model,
        splits["train"],
        splits["validation"],
        config=settings(**changes),
        progress=False,
        callbacks=callbacks,
        **options,
    )


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.state_dict().items()}


def losses(result: Any) -> list[float]:
    return [value for row in result.history for value in (row["train_loss"], row["validation"]["loss"])]


@pytest.mark.parametrize("statistics", [False, True], ids=["plain", "statistics first"])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_training_with_the_cache_is_training_without(
    tmp_path: Path, pictures: Path, clip_folder: Path, place: str, statistics: bool
) -> None:
    fields: dict[str, Any] = {"feature_norm": "standardize", "projection_init": "least_squares"} if statistics else {}
    plain = make_model(folder=clip_folder, **fields)
    expected = train(plain, pictures, epochs=3)
    where = "memory" if place == "memory" else tmp_path / "cache"
    for workers in (0, 1) if place == "disk" and not statistics else (0,):
        model = make_model(where, folder=clip_folder, **fields)
        seen = Counted(model)
        found = train(model, pictures, epochs=3, num_workers=workers)
        assert seen.samples == (26 if workers == 0 else 0), "each sample goes through the lower layers once"
        assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
        for name, wanted in weights(plain).items():
            assert torch.allclose(weights(model)[name], wanted, atol=1e-5, rtol=1e-5), name


def test_samples_that_are_tensors_are_known_by_their_contents(tmp_path: Path) -> None:
    data = RandomPairs(13), RandomPairs(5, seed=1)
    expected = fit(make_model(), *data, config=settings(), progress=False)
    for first in (True, False):
        model = make_model(tmp_path / "cache")
        seen = Counted(model)
        found = fit(model, *data, config=settings(), progress=False)
        assert seen.samples == (18 if first else 0)
        assert losses(found) == pytest.approx(losses(expected), rel=1e-5)


class StopAt:
    def __init__(self, step: int):
        self.step = step

    def on_step(self, row: Any) -> None:
        if row["step"] == self.step:
            raise Stopped


def test_an_interrupted_fill_is_finished(tmp_path: Path, pictures: Path, clip_folder: Path) -> None:
    expected = train(make_model(folder=clip_folder), pictures)
    with pytest.raises(Stopped):
        train(make_model(tmp_path / "cache", folder=clip_folder), pictures, callbacks=[StopAt(2)])
    (index,) = (tmp_path / "cache").glob("*.index")
    assert index.stat().st_size % ENTRY.itemsize == 0
    index.write_bytes(index.read_bytes()[: -ENTRY.itemsize // 2])
    model = make_model(tmp_path / "cache", folder=clip_folder)
    seen = Counted(model)
    found = train(model, pictures)
    assert 10 <= seen.samples <= 26 - 16 + 1, "16 were there, the last of them torn"
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)


def test_a_killed_fill_is_finished(tmp_path: Path, pictures: Path, clip_folder: Path) -> None:
    """SIGKILL in the middle of the second batch's rows."""
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from epic_fast.engine import store
import importlib.util
spec = importlib.util.spec_from_file_location("cases", {str(Path(__file__))!r})
cases = importlib.util.module_from_spec(spec); spec.loader.exec_module(cases)
from pathlib import Path
store.COMMIT_SECONDS = 0.0
pwrite, written = os.pwrite, [0]
def dying(handle, content, offset):
    written[0] += 1
    if written[0] == 40:
        pwrite(handle, content[: len(content) // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)
    return pwrite(handle, content, offset)
os.pwrite = dying
cases.train(cases.make_model({str(tmp_path / "cache")!r}, folder=Path({str(clip_folder)!r})), Path({str(pictures)!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    expected = train(make_model(folder=clip_folder), pictures)
    model = make_model(tmp_path / "cache", folder=clip_folder)
    seen = Counted(model)
    found = train(model, pictures)
    assert 10 <= seen.samples < 26
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)


def test_resuming_in_the_middle_of_an_epoch(tmp_path: Path, pictures: Path, clip_folder: Path) -> None:
    options = {"checkpoint_every_steps": 1, "epochs": 3}
    expected = train(make_model(folder=clip_folder), pictures, output_dir=tmp_path / "plain", **options)
    for place in ("memory", str(tmp_path / "cache")):
        run = tmp_path / f"run-{place == 'memory'}"
        for step in (2, 5):  # in the first epoch, which fills, and in the second
            model = make_model(place, folder=clip_folder)
            with pytest.raises(Stopped):
                train(model, pictures, output_dir=run, resume="auto", callbacks=[StopAt(step)], **options)
        found = train(make_model(place, folder=clip_folder), pictures, output_dir=run, resume="auto", **options)
        assert losses(found) == pytest.approx(losses(expected), rel=1e-5)


def test_damage_found_while_training_is_mended(
    tmp_path: Path, pictures: Path, clip_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = train(make_model(folder=clip_folder), pictures)
    train(make_model(tmp_path / "cache", folder=clip_folder), pictures)
    (data,) = (tmp_path / "cache").glob("*.data")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 16
    data.write_bytes(content)
    for mended in (False, True):
        model = make_model(tmp_path / "cache", folder=clip_folder)
        seen = Counted(model)
        caplog.clear()
        found = train(model, pictures)
        assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
        assert seen.samples == (0 if mended else 1)
        assert ("computed anew" in caplog.text) is not mended


def test_a_changed_sample_is_computed_anew(tmp_path: Path, pictures: Path, clip_folder: Path) -> None:
    train(make_model(tmp_path / "cache", folder=clip_folder), pictures)
    shutil.copy(pictures / "0001.png", pictures / "0000.png")  # same name, another picture
    lines = (pictures / "metadata.jsonl").read_text().splitlines()
    row = json.loads(lines[3])
    lines[3] = json.dumps({**row, "text": "a star above the bird"})
    (pictures / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    expected = train(make_model(folder=clip_folder), pictures)
    model = make_model(tmp_path / "cache", folder=clip_folder)
    seen = Counted(model)
    found = train(model, pictures)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    assert seen.samples == 1, "the copied picture is known, the text is new"


def test_a_changed_model_or_processor_is_refused(tmp_path: Path, pictures: Path, clip_folder: Path) -> None:
    cache = tmp_path / "cache"
    train(make_model(cache, folder=clip_folder), pictures, epochs=1)

    def refused(said: str, model: Any, **options: Any) -> None:
        with pytest.raises(ConfigError, match=f"made of something else.*{said}"):
            train(model, pictures, epochs=1, **options)

    refused(r"first_layers\.text was 1, now 0", make_model(cache, folder=clip_folder, layer_pairs=[(0, 2), (2, 3)]))
    refused("precision was 'fp32', now 'bf16'", make_model(cache, folder=clip_folder), precision="bf16")
    model = make_model(cache, folder=clip_folder)
    with torch.no_grad():
        next(model.backbone.vision.model.parameters())[0] += 1
    refused(r"backbone\.", model)
    model = make_model(cache, folder=clip_folder)
    model.backbone.image_processor.image_mean = [0.5, 0.5, 0.5]
    refused(r"image_processor\.image_mean", model)
    model = make_model(cache, folder=clip_folder)
    model.backbone.tokenizer.add_tokens(["drawings"])
    refused(r"tokenizer\.rules", model)
    model = make_model(cache, folder=clip_folder)
    shorter = Collator(model.backbone.image_processor, model.backbone.tokenizer, max_text_length=5, num_labels=3)
    refused("max_text_length was 16, now 5", model, collator=shorter)
    model = make_model(cache, folder=clip_folder)
    object.__setattr__(model.engine, "weights", "int8")
    refused("weights was 'frozen', now 'int8, first layers exact: 1'", model)
    seen = Counted(model := make_model(cache, folder=clip_folder))
    train(model, pictures, epochs=1)
    assert seen.samples == 0


class Unseeded(RandomPairs):
    """Augmentation by a generator of its own."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        noise = np.random.default_rng().standard_normal(sample["pixel_values"].shape)
        return {**sample, "pixel_values": sample["pixel_values"] + torch.from_numpy(noise).float()}


class ByEpoch(RandomPairs):
    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Drawing:
    """A collator that draws."""

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        batch = torch.utils.data.default_collate(samples)
        batch["pixel_values"] = batch["pixel_values"] + 0.1 * torch.randn_like(batch["pixel_values"])
        return batch


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_random_augmentation_is_refused(tmp_path: Path, place: str) -> None:
    where = "memory" if place == "memory" else tmp_path / "cache"
    for data, collator, said in (
        (RandomPairs(9, augment=True), None, "sample 0 draws random numbers"),
        (Unseeded(9), None, "pixel_values of sample 0 are others at a second look"),
        (ByEpoch(9), None, r"has set_epoch\(\)"),
        (RandomPairs(9), Drawing(), "the collator draws random numbers"),
    ):
        with pytest.raises(ConfigError, match=f"random augmentation is on: .*{said}"):
            fit(make_model(where), data, config=settings(), collator=collator, progress=False)
    assert not (tmp_path / "cache").exists()


class Flipping(Collator):
    """A collator of pictures that flips half of them."""

    def __call__(self, examples: Any) -> dict[str, Any]:
        batch = super().__call__(examples)
        flipped = torch.rand(len(examples)) < 0.5
        batch["pixel_values"] = torch.where(
            flipped.view(-1, 1, 1, 1), batch["pixel_values"].flip(-1), batch["pixel_values"]
        )
        return batch


def test_augmentation_is_refused_where_a_cache_is_full_too(tmp_path: Path, pictures: Path, clip_folder: Path) -> None:
    model = make_model(tmp_path / "cache", folder=clip_folder)
    train(model, pictures, epochs=1)
    with pytest.raises(ConfigError, match="the collator draws random numbers"):
        train(model, pictures, epochs=1, collator=Flipping.for_model(model))


def test_augmentation_of_a_later_sample_is_refused_when_it_is_met(tmp_path: Path) -> None:
    class Later(RandomPairs):
        def __getitem__(self, index: int) -> dict[str, Any]:
            self.augment = index == 5
            return super().__getitem__(index)

    with pytest.raises(ConfigError, match="sample 5 draws random numbers"):
        fit(make_model("memory"), Later(9), config=settings(), progress=False)


def test_a_disk_that_is_too_small_is_refused_before_it_is_filled(
    tmp_path: Path, pictures: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 64 * 2**20 + 70_000))
    model = make_model(tmp_path / "cache", folder=clip_folder)
    with pytest.raises(EpicFastError, match=r"too small.*needs 9\d\.\d KiB more, but only 64\.1 MiB are free"):
        train(model, pictures)
    assert not (tmp_path / "cache").exists()
    train(make_model("memory", folder=clip_folder), pictures, epochs=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 64 * 2**20 + 110_000))
    train(model, pictures, epochs=1)
    taken = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir() if path.name != HEADER)
    assert 0.9 * 99_000 < taken < 110_000
    train(model, pictures, epochs=1)


def test_a_memory_that_is_too_small_is_refused(
    pictures: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("epic_fast.engine.store._available_memory", lambda: 10_000)
    with pytest.raises(EpicFastError, match=r"in memory needs .* only 9\.8 KiB are free"):
        train(make_model("memory", folder=clip_folder), pictures)


def test_inputs_that_a_prefix_cannot_stand_for_are_refused() -> None:
    class More(RandomPairs):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {**super().__getitem__(index), "depth": torch.zeros(2)}

    with pytest.raises(ConfigError, match="the batches hold depth"):
        fit(make_model("memory"), More(9), config=settings(), progress=False)


def test_batches_are_read_ahead_of_use(tmp_path: Path, pictures: Path, clip_folder: Path) -> None:
    """While a batch is used, those after it are being read by other threads."""
    import threading
    import time
    from contextlib import nullcontext

    model = make_model(tmp_path / "cache", folder=clip_folder)
    dataset = read_folder(pictures).splits["train"]
    feed = PrefixFeed(model, [dataset], Collator.for_model(model), precision="fp32", autocast=nullcontext)
    batches = ordered_batches(20, 2)
    assert len(list(feed.batches(dataset, batches))) == 10
    readers: list[tuple[int, str]] = []
    batch = feed.store.batch

    def watched(wanted: Any, **options: Any) -> Any:
        readers.append((feed._sources[0].keys.index(wanted[0]), threading.current_thread().name))
        return batch(wanted, **options)

    feed.store.batch = watched  # pyright: ignore[reportAttributeAccessIssue]
    served = iter(feed.batches(dataset, batches))
    which, _ = next(served)
    assert isinstance(which, Batch)
    deadline = time.monotonic() + 10
    while len(readers) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(first for first, _ in readers) == [0, 2, 4, 6]
    assert threading.main_thread().name not in {name for _, name in readers}
    assert [which.indices[0] for which, _ in served] == list(range(2, 20, 2))
