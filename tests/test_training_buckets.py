"""Batches of texts of similar length: every sample once, named by seed and epoch, resumed in the middle."""

from __future__ import annotations

import collections
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import epic_fast
from epic_fast.data import Collator, read_folder
from epic_fast.errors import ConfigError
from epic_fast.testing import make_folder, tiny_clip
from epic_fast.testing.pairs import RandomPairs
from epic_fast.training import TrainingConfig, fit
from epic_fast.training.batches import POOL, text_lengths, training_batches


def lengths_of(count, seed=0):
    return torch.randint(3, 78, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@given(
    count=st.integers(1, 300),
    size=st.integers(1, 40),
    ranks=st.integers(1, 3),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_every_sample_once(count, size, ranks, seed, epoch):
    lengths = lengths_of(count)
    options = {"seed": seed, "epoch": epoch, "text_lengths": lengths}
    shares = [training_batches(count, size, rank=rank, ranks=ranks, **options) for rank in range(ranks)]
    plain = training_batches(count, size, seed=seed, epoch=epoch)
    assert [batch.total for batch in shares[0]] == [batch.total for batch in plain]
    assert [batch.number for batch in shares[0]] == list(range(len(plain)))
    counted = [index for share in shares for batch in share for index in batch.indices[: batch.count]]
    assert sorted(counted) == list(range(count))


def padding(batches, lengths):
    """Padding tokens in an epoch, the last, smaller batch left out."""
    full = [batch for batch in batches if len(batch.indices) == len(batches[0].indices)]
    return sum(max(lengths[i] for i in b.indices) - lengths[i] for b in full for i in b.indices)


def test_batches_are_of_similar_length():
    lengths = lengths_of(1000)
    plain = training_batches(1000, 8, seed=0, epoch=0)
    found = training_batches(1000, 8, seed=0, epoch=0, text_lengths=lengths)
    assert padding(found, lengths) < 0.1 * padding(plain, lengths)


def test_the_order_of_batches_says_nothing_of_their_lengths():
    lengths = lengths_of(8 * POOL)
    found = training_batches(8 * POOL, 8, seed=0, epoch=0, text_lengths=lengths)
    longest = torch.tensor([float(max(lengths[i] for i in batch.indices)) for batch in found])
    position = torch.arange(float(len(longest)))
    assert abs(torch.corrcoef(torch.stack([longest, position]))[0, 1]) < 0.4


def test_epochs_differ_and_repeat():
    lengths = lengths_of(200)

    def made(**changes):
        return training_batches(200, 8, **{"seed": 1, "epoch": 0, "text_lengths": lengths, **changes})

    assert made() == made()
    assert [batch.indices for batch in made()] != [batch.indices for batch in made(epoch=1)]
    assert [batch.indices for batch in made()] != [batch.indices for batch in made(seed=2)]


def test_samples_meet_others_in_the_next_epoch():
    """A batch is not the same set of samples for ever, although all texts of one length are."""
    lengths = [3] * 64
    sets = [
        {frozenset(batch.indices) for batch in training_batches(64, 8, seed=0, epoch=epoch, text_lengths=lengths)}
        for epoch in (0, 1)
    ]
    assert not sets[0] & sets[1]


def test_the_last_small_batch_is_a_random_one():
    """It must not be made of the longest texts in each epoch."""
    lengths = list(range(20))
    seen = collections.Counter()
    for epoch in range(50):
        seen.update(training_batches(20, 8, seed=0, epoch=epoch, text_lengths=lengths)[-1].indices)
    assert len(seen) == 20


def test_pools_keep_an_epoch_random():
    """Samples are sorted among those of a pool only."""
    count = 2 * POOL * 4
    lengths = lengths_of(count)
    order = [i for batch in training_batches(count, 4, seed=0, epoch=0) for i in batch.indices]
    pools = [set(order[: count // 2]), set(order[count // 2 :])]
    for batch in training_batches(count, 4, seed=0, epoch=0, text_lengths=lengths):
        assert any(set(batch.indices) <= pool for pool in pools)


# -- lengths --------------------------------------------------------------------------------------------------


class Ragged(RandomPairs):
    """Texts of 3 to 6 tokens; what is read is remembered."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.reads = []

    def __getitem__(self, index):
        self.reads.append(index)
        sample = dict(super().__getitem__(index))
        sample["attention_mask"] = (torch.arange(6) < 3 + index % 4).long()
        return sample


def test_lengths_of_samples_that_are_tensors():
    data = Ragged(9, augment=True)
    state = torch.get_rng_state()
    assert text_lengths(data, None) == [3 + index % 4 for index in range(9)]
    assert torch.equal(torch.get_rng_state(), state)
    bare = [{"input_ids": torch.zeros(5)}, {"input_ids": torch.zeros(7)}]
    assert text_lengths(bare, None) == [5, 7]


def test_lengths_of_texts_read_no_picture(tmp_path, monkeypatch):
    tiny_clip(tmp_path / "towers")
    make_folder(tmp_path / "data")
    train = read_folder(tmp_path / "data").splits["train"]
    train.rows = [replace(row, text=" ".join(["cat"] * (1 + at % 5))) for at, row in enumerate(train.rows)]
    model = epic_fast.wrap(str(tmp_path / "towers"), self_check=False)
    collator = Collator.for_model(model)
    monkeypatch.setattr(type(train), "__getitem__", lambda *args: pytest.fail("a picture was read"))
    expected = [int(collator.encode([text])["attention_mask"].sum()) for text in train.texts()]
    assert text_lengths(train, collator) == expected
    assert len(set(expected)) > 1


def test_a_data_set_may_know_its_lengths():
    class Known(list):
        def text_lengths(self):
            return torch.arange(3)

    assert text_lengths(Known("abc"), None) == [0, 1, 2]
    with pytest.raises(ConfigError, match="gave 3 lengths of text for 2 samples"):
        text_lengths(Known("ab"), None)


def test_without_lengths_it_is_refused():
    with pytest.raises(ConfigError, match="a sample of type str does not tell; wanted a data set with text_lengths"):
        text_lengths(["a", "b"], None)


# -- training -------------------------------------------------------------------------------------------------


def build():
    backbone = tiny_clip()
    torch.manual_seed(0)
    config = epic_fast.EpicConfig(prompt_length=2, num_layer_pairs=2, head_dropout=0.3)
    return epic_fast.wrap(backbone, config, num_labels=3, self_check=False)


class Stop:
    def on_step(self, row):
        if row["step"] == 6:
            raise KeyboardInterrupt


def train(folder, *, callbacks=(), model=None, **changes):
    model = build() if model is None else model
    values = {"epochs": 2, "batch_size": 4, "checkpoint_every_steps": 1, "device": "cpu", "tensorboard": False}
    config = TrainingConfig(**{**values, "bucket_by_length": True, **changes})
    fit(
        model,
        Ragged(18, augment=True),
        config=config,
        output_dir=folder,
        resume="auto",
        progress=False,
        callbacks=callbacks,
    )
    return model


def test_resumed_in_the_middle_of_an_epoch(tmp_path):
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", callbacks=[Stop()])
    resumed = train(tmp_path / "cut")
    for name, each in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], each), name
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_it_is_off_unless_asked_for_and_another_run_if_it_is(tmp_path):
    assert TrainingConfig().bucket_by_length is False
    with pytest.raises(ConfigError, match=r"TrainingConfig\.bucket_by_length is 1; wanted true or false"):
        TrainingConfig(bucket_by_length=1)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, callbacks=[Stop()])
    with pytest.raises(ConfigError, match="bucket_by_length was True, now False"):
        train(tmp_path, bucket_by_length=False)


def test_lengths_are_taken_once_and_make_the_batches():
    data = Ragged(18)
    config = TrainingConfig(epochs=3, batch_size=4, device="cpu", tensorboard=False, bucket_by_length=True)
    fit(build(), data, config=config, progress=False)
    once, look_at_the_first = 18, 1
    assert len(data.reads) == 3 * 18 + once + look_at_the_first
    lengths = [3 + index % 4 for index in range(18)]
    wanted = []
    for epoch in range(3):
        wanted += [i for b in training_batches(18, 4, seed=0, epoch=epoch, text_lengths=lengths) for i in b.indices]
    assert data.reads[-len(wanted) :] == wanted
