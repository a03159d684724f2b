"""A batch out of the prefix cache is the batch itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import epic_fast
from epic_fast import EpicConfig
from epic_fast.engine import Prefix, PrefixCache, prompted_visibility
from epic_fast.errors import ConfigError
from epic_fast.testing import tiny_bert, tiny_clip, tiny_vit
from epic_fast.testing.probes import lively, make_batch, perturb

LENGTHS = [9, 4, 6, 12, 5, 5, 3]


def make_model(kind: str, **fields: Any) -> Any:
    backbone: Any = (tiny_vit(), tiny_bert()) if kind.startswith("pair") else tiny_clip()
    if kind.endswith("means"):
        fields.update(text_head_input="mean+pooled", vision_head_input="mean+pooled")
    if kind.endswith("prefix"):
        fields.update(prompt_mask="prefix")
    config = EpicConfig(**{"prompt_length": 3, "layer_pairs": [(1, 2), (2, 3)], **fields})
    return perturb(epic_fast.wrap(lively(backbone), config, num_labels=4)).eval()


def rows(batch: dict[str, Tensor], pictures: list[int], texts: list[int]) -> dict[str, Tensor]:
    """These pictures beside these texts, padded to the longest of them."""
    width = int(batch["attention_mask"][texts].sum(1).max()) if "attention_mask" in batch else max(LENGTHS)
    return {name: each[pictures] if name == "pixel_values" else each[texts][:, :width] for name, each in batch.items()}


@pytest.mark.parametrize("no_prompts", [False, True], ids=["prompts", "no prompts"])
@pytest.mark.parametrize("kind", ["clip", "clip, means", "clip, prefix", "pair", "pair, means", "pair, prefix"])
@torch.no_grad()
def test_a_cached_batch_gives_the_logits_of_the_batch(kind: str, no_prompts: bool) -> None:
    model = make_model(kind, **({"prompt_length": 0} if no_prompts else {}))
    batch = make_batch(LENGTHS)
    parts = [rows(batch, part, part) for part in ([0, 1, 2], [3, 4], [5, 6])]
    assert len({part["input_ids"].shape[1] for part in parts}) == 3
    cache = PrefixCache(model.extract(**part) for part in parts)
    assert len(cache) == 7
    assert cache.nbytes > 0
    for pictures, texts in (
        ([0, 1, 2, 3, 4, 5, 6], None),
        ([3, 0, 6], None),
        ([1], None),
        ([0, 0, 5, 2], [3, 1, 1, 6]),
        ([4, 2], [6, 4]),
    ):
        given = None if texts is None else torch.tensor(texts)
        prefix = cache.batch(torch.tensor(pictures), given)
        direct = rows(batch, pictures, pictures if texts is None else texts)
        assert prefix.text.hidden.shape[1] == direct["input_ids"].shape[1]
        found, wanted = model(prefix=prefix).logits, model(**direct).logits
        assert torch.allclose(found, wanted, atol=1e-6, rtol=1e-5), (found - wanted).abs().max()


@pytest.mark.parametrize("kind", ["clip", "pair"])
@torch.no_grad()
def test_texts_without_a_mask_are_cached_too(kind: str) -> None:
    model = make_model(kind)
    batch = make_batch([9, 9, 9] if kind == "pair" else [9, 4, 6])
    del batch["attention_mask"]
    cache = PrefixCache([model.extract(**batch)])
    found = model(prefix=cache.batch(torch.tensor([2, 0]))).logits
    wanted = model(**{name: each[[2, 0]] for name, each in batch.items()}).logits
    assert torch.allclose(found, wanted, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_batches_of_different_lengths_without_a_mask_keep_their_lengths() -> None:
    """Rows of 4 tokens, none of them padding, beside rows of 9: what fills them up is padding and must not be read."""
    model = make_model("pair")
    parts = []
    for seed, length in enumerate((4, 9)):
        part = make_batch([length, length], seed=seed)
        del part["attention_mask"]
        parts.append(part)
    cache = PrefixCache([model.extract(**part) for part in parts])
    found = model(prefix=cache.batch(torch.tensor([0, 2, 1, 3]))).logits
    assert torch.allclose(found[[0, 2]], model(**parts[0]).logits, atol=1e-6, rtol=1e-5)
    assert torch.allclose(found[[1, 3]], model(**parts[1]).logits, atol=1e-6, rtol=1e-5)
    mixed = PrefixCache([model.extract(**parts[0]), model.extract(**make_batch([9, 5], seed=1))])
    found = model(prefix=mixed.batch(torch.tensor([0, 2]))).logits
    assert torch.allclose(found[0], model(**parts[0]).logits[0], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_what_no_cache_can_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="no prefixes were given"):
        PrefixCache([])
    model, batch = make_model("pair"), make_batch([6, 4])
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    with pytest.raises(ConfigError, match="padded on the left"):
        PrefixCache([model.extract(**batch)])


@torch.no_grad()
def test_a_prefix_of_other_layer_pairs_is_refused() -> None:
    prefix = make_model("clip").extract(**make_batch([6, 4]))
    with pytest.raises(ConfigError, match=r"have been through \d layers.*made for another configuration"):
        make_model("clip", layer_pairs=[(0, 1), (2, 3)])(prefix=prefix)


@torch.no_grad()
def test_training_from_the_cache_is_training_from_the_inputs() -> None:
    model, batch = make_model("pair"), make_batch(LENGTHS)
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    cache = PrefixCache([model.extract(**batch)])
    gradients = []
    for inputs in (batch, {"prefix": cache.batch(torch.arange(7))}):
        with torch.enable_grad():
            model.zero_grad()
            model(**inputs, labels=labels).loss.backward()
        gradients.append({name: each.grad.clone() for name, each in model.trainable_parameters()})
    for name, wanted in gradients[0].items():
        assert torch.allclose(gradients[1][name], wanted, atol=1e-5, rtol=1e-4), name


@torch.no_grad()
def test_a_prefix_moves_between_devices_without_its_mask() -> None:
    model, batch = make_model("pair"), make_batch([6, 4])
    prefix = model.extract(**batch)
    moved = prefix.to("cpu")
    assert isinstance(moved, Prefix)
    assert not moved.text.has_native_mask
    assert torch.equal(model(prefix=moved).logits, model(prefix=prefix).logits)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prompt_mask", ["full", "prefix"])
def test_visibility_row_by_row(prompt_mask: str, causal: bool) -> None:
    valid = torch.tensor([[True, True, False], [True, True, True]])
    seen = prompted_visibility(valid, 2, causal=causal, prompt_mask=prompt_mask)
    assert seen.shape == (2, 1, 5, 5)
    full = [1, 1, 0] if prompt_mask == "full" else [0, 0, 0]
    tokens = [[1, 0, 0], [1, 1, 0], [1, 1, 0]] if causal else [[1, 1, 0]] * 3
    assert seen[0, 0].int().tolist() == [[1, 1, *full]] * 2 + [[1, 1, *row] for row in tokens]
    full = [1, 1, 1] if prompt_mask == "full" else [0, 0, 0]
    tokens = [[1, 0, 0], [1, 1, 0], [1, 1, 1]] if causal else [[1, 1, 1]] * 3
    assert seen[1, 0].int().tolist() == [[1, 1, *full]] * 2 + [[1, 1, *row] for row in tokens]
