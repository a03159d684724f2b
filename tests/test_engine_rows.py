"""Only what is read: a few rows of the last layer, and texts cut to the longest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from epic_fast import EpicConfig, wrap
from epic_fast.engine import EngineConfig
from epic_fast.engine import state as state_module
from epic_fast.engine.rows import RowSelection, row_attention_backward, row_attention_forward
from epic_fast.engine.state import measure
from epic_fast.testing import tiny_bert, tiny_clip, tiny_vit
from epic_fast.testing.probes import lively, make_batch, perturb

BATCH, PROMPTS, TOKENS, HEADS, HEAD_DIM = 3, 2, 5, 4, 8
INNER = HEADS * HEAD_DIM
INDEX = torch.tensor([4, 0, 2])
SELECTIONS = [RowSelection(), RowSelection(prompts=True), RowSelection(index=INDEX), RowSelection(INDEX, prompts=True)]


def rows_of(selection: RowSelection) -> list[list[int]]:
    index = [0] * BATCH if selection.index is None else selection.index.tolist()
    return [[*(range(PROMPTS) if selection.prompts else ()), PROMPTS + each] for each in index]


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda each: f"{each.index is not None}-{each.prompts}")
def test_a_selection_takes_its_rows_and_adds_to_them(selection: RowSelection) -> None:
    hidden = torch.randn(BATCH, PROMPTS + TOKENS, 6)
    taken = selection.take(hidden, PROMPTS)
    wanted = torch.stack([hidden[sample, rows] for sample, rows in enumerate(rows_of(selection))])
    assert torch.equal(taken, wanted)
    assert taken.data_ptr() != hidden.data_ptr()
    values = torch.randn_like(taken)
    sums = hidden.clone()
    for sample, rows in enumerate(rows_of(selection)):
        sums[sample, rows] += values[sample]
    assert torch.equal(selection.add(hidden.clone(), values, PROMPTS), sums)
    # Where the prompts' rows are all there is, the others are left out.
    assert torch.equal(selection.add(hidden[:, :PROMPTS].clone(), values, PROMPTS), sums[:, :PROMPTS])


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda each: f"{each.index is not None}-{each.prompts}")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, (5, 1, 3)])
def test_attention_of_a_few_rows_is_that_of_all(
    selection: RowSelection, causal: bool, lengths: tuple[int, ...] | None
) -> None:
    random = torch.Generator().manual_seed(0)
    rows = PROMPTS + TOKENS
    query = torch.randn(BATCH, rows, INNER, generator=random, dtype=torch.float64, requires_grad=True)
    key_value = torch.randn(BATCH, rows, 2, INNER, generator=random, dtype=torch.float64, requires_grad=True)
    ends = None if lengths is None else torch.tensor(lengths)
    position = torch.arange(TOKENS)
    seen = torch.ones(BATCH, TOKENS, TOKENS, dtype=torch.bool)
    if ends is not None:
        seen &= position < ends[:, None, None]
    to_tokens = seen[:, -1:].expand(-1, PROMPTS, -1)
    if causal:
        seen = seen & (position <= position[:, None])
    visible = torch.cat([to_tokens, seen], dim=1)
    visible = torch.cat([visible.new_ones(BATCH, rows, PROMPTS), visible], dim=2)
    split = (each.view(BATCH, rows, HEADS, HEAD_DIM).transpose(1, 2) for each in (query, *key_value.unbind(2)))
    whole = torch.nn.functional.scaled_dot_product_attention(*split, attn_mask=visible[:, None], scale=0.4)
    wanted = selection.take(whole.transpose(1, 2).reshape(BATCH, rows, INNER), PROMPTS)
    grad = torch.randn(wanted.shape, generator=random, dtype=torch.float64)
    wanted_query, wanted_key_value = torch.autograd.grad(wanted, (query, key_value), grad)

    with torch.no_grad():
        taken = selection.take(query, PROMPTS)
        mask = selection.visible(rows, PROMPTS, ends, False, causal, query.device)
        output, probabilities = row_attention_forward(taken, key_value, HEADS, 0.4, mask)
        found = row_attention_backward(grad, taken, key_value, probabilities, HEADS, 0.4)
    torch.testing.assert_close(output, wanted.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0], selection.take(wanted_query, PROMPTS), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], wanted_key_value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("valid", "pool", "regular", "longest"),
    [
        ([[1, 1, 0], [1, 0, 0]], None, True, 2),
        ([[1, 1, 1], [1, 0, 0]], [2, 0], True, 3),
        ([[0, 1, 1], [1, 1, 1]], None, False, 3),
        ([[1, 0, 1], [1, 1, 1]], None, False, 3),
        ([[1, 1, 0], [0, 0, 0]], None, False, 2),
        ([[1, 1, 0], [1, 0, 0]], [1, 2], False, 2),
    ],
    ids=["right", "full", "left", "hole", "nothing", "pooled in the padding"],
)
def test_where_texts_end(valid: list[list[int]], pool: list[int] | None, regular: bool, longest: int) -> None:
    index = None if pool is None else torch.tensor(pool)
    lengths, found, most = measure(torch.tensor(valid).bool(), index)
    assert lengths.tolist() == [sum(row) for row in valid]
    assert (found, most) == (regular, longest)


# -- whole models -----------------------------------------------------------------------------------------------------


def model_of(kind: str, engine: EngineConfig | None, **fields: Any) -> Any:
    backbone = tiny_clip() if kind == "clip" else (tiny_vit(), tiny_bert())
    torch.manual_seed(0)
    config = EpicConfig(head_dropout=0.0, **fields)
    return perturb(wrap(lively(backbone), config, 3, engine=engine, self_check=False)).double()


def double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "pixel_values": batch["pixel_values"].double()}


class Shapes:
    """The shapes that a function's result takes while it is watched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str):
        original = getattr(module, name)
        self.seen: list[tuple[int, ...]] = []

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.seen.append(tuple(result[0].shape))
            return result

        monkeypatch.setattr(module, name, watched)


@pytest.mark.parametrize("kind", ["clip", "vit+bert"])
@pytest.mark.parametrize("reads_prompts", [False, True])
@pytest.mark.parametrize("pairs", [None, [(0, 1), (1, 2)]], ids=["to the last layer", "ending below it"])
def test_the_last_layer_computes_what_is_read(
    kind: str, reads_prompts: bool, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from epic_fast.engine import fused

    fields = {"prompt_length": 4, "num_layer_pairs": 2, "layer_pairs": pairs, "head_reads_prompts": reads_prompts}
    batch = double(make_batch([4, 6, 5], width=9))
    plain = model_of(kind, None, **fields)(**batch).logits
    watch = Shapes(monkeypatch, fused, "row_attention_forward")
    found = model_of(kind, EngineConfig(blocks="fused"), **fields)(**batch).logits
    torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-9)
    rows = 5 if reads_prompts and pairs is None else 1
    assert [shape[1] for shape in watch.seen] == [rows, rows]
    watch.seen.clear()
    model_of(kind, EngineConfig(blocks="fused", pooled_rows=False), **fields)(**batch)
    model_of(kind, EngineConfig(blocks="fused"), **fields, text_head_input="mean", vision_head_input="mean")(**batch)
    assert not watch.seen


@pytest.mark.parametrize("kind", ["clip", "vit+bert"])
@pytest.mark.parametrize("blocks", ["plain", "fused"])
def test_texts_are_cut_to_the_longest(kind: str, blocks: str) -> None:
    batch = double(make_batch([4, 6, 5], width=12))
    plain = model_of(kind, None)(**batch).logits
    model = model_of(kind, EngineConfig(blocks=blocks))  # pyright: ignore[reportArgumentType]
    assert model.extract(**batch).text.hidden.shape[1] == 6
    torch.testing.assert_close(model(**batch).logits, plain, rtol=1e-9, atol=1e-9)
    untrimmed = model_of(kind, EngineConfig(blocks=blocks, trim_text=False))  # pyright: ignore[reportArgumentType]
    assert untrimmed.extract(**batch).text.hidden.shape[1] == 12
    torch.testing.assert_close(untrimmed(**batch).logits, plain, rtol=1e-9, atol=1e-9)


def test_clip_texts_without_a_mask_end_where_they_are_pooled() -> None:
    batch = double(make_batch([4, 6, 5], width=12))
    del batch["attention_mask"]
    model = model_of("clip", EngineConfig(blocks="fused"))
    assert model.extract(**batch).text.hidden.shape[1] == 6
    torch.testing.assert_close(model(**batch).logits, model_of("clip", None)(**batch).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["clip", "vit+bert"])
@pytest.mark.parametrize("hole", [(0, slice(0, 2)), (1, slice(2, 3))], ids=["left", "middle"])
def test_padding_elsewhere_keeps_the_plain_path(kind: str, hole: Any, caplog: pytest.LogCaptureFixture) -> None:
    from epic_fast.engine.packed import say_plain

    say_plain.cache_clear()
    batch = double(make_batch([6, 6, 6], width=8))
    batch["attention_mask"][hole] = 0
    model = model_of(kind, EngineConfig(blocks="fused"))
    with caplog.at_level("INFO", logger="epic_fast"):
        found = [model(**batch).logits for _ in range(2)]
    assert model.prepare(batch).keys() == batch.keys()
    torch.testing.assert_close(found[0], model_of(kind, None)(**batch).logits, rtol=1e-9, atol=1e-9)
    said = [record.getMessage() for record in caplog.records if "padding is on the left" in record.getMessage()]
    assert len(said) == 1
    assert "text tower" in said[0]


@pytest.mark.parametrize("kind", ["clip", "vit+bert"])
@pytest.mark.parametrize("trim", [True, False])
def test_a_prepared_batch_is_not_measured_again(kind: str, trim: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from epic_fast.backbones import towers

    batch = double(make_batch([4, 6, 5], width=12))
    model = model_of(kind, EngineConfig(blocks="fused", trim_text=trim))
    wanted = model(**batch).logits
    prepared = model.prepare(batch, multiple=8)
    assert prepared["input_ids"].shape[1] == (8 if trim else 12)
    assert prepared["text_lengths"].tolist() == [4, 6, 5]
    assert model.prepare(prepared)["input_ids"] is prepared["input_ids"]

    def refuse(*args: Any) -> Any:
        raise AssertionError("the texts were measured")

    monkeypatch.setattr(state_module, "measure", refuse)
    monkeypatch.setattr(towers, "measure", refuse)
    torch.testing.assert_close(model(**prepared).logits, wanted, rtol=1e-9, atol=1e-9)
    prefix = model.extract(**prepared)
    torch.testing.assert_close(model(prefix=prefix).logits, wanted, rtol=1e-9, atol=1e-9)


def test_without_an_engine_a_batch_is_left_alone() -> None:
    batch = make_batch([4, 6], width=12)
    prepared = model_of("clip", None).prepare(batch)
    assert prepared.keys() == batch.keys()
    assert all(prepared[name] is batch[name] for name in batch)
