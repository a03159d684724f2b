"""The ways into a Swin and between its stages, computed from its own weights, are those of its modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.swin import modeling_swin

from epic_fast import MopeConfig, wrap
from epic_fast.engine import EngineConfig, patches
from epic_fast.engine.patches import FrozenEmbedding, FrozenMerge
from epic_fast.engine.windows import merge_prompts
from epic_fast.errors import ConfigError
from epic_fast.testing import tiny_bert, tiny_swin
from epic_fast.testing.probes import lively, make_batch


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


FUSED = EngineConfig(blocks="fused")


@pytest.fixture
def swin() -> Any:
    torch.manual_seed(0)
    return lively((tiny_swin(depths=(2, 3)), tiny_bert(layers=1)))[0].requires_grad_(False)


def tower_of(model: Any) -> Any:
    return wrap((model, tiny_bert(layers=1)), MopeConfig(prompt_length=0), 2, self_check=False).backbone.vision


@pytest.mark.parametrize("size", [(32, 32), (33, 50), (40, 31)])
def test_an_embedding_is_that_of_its_modules(swin: Any, size: tuple[int, int]) -> None:
    embeddings = swin.embeddings.double()
    pixels = torch.randn(2, 3, *size, dtype=torch.float64)
    wanted, grid = embeddings(pixels)
    found, sides = FrozenEmbedding(embeddings)(pixels)
    assert tuple(grid) == sides
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    # Pictures need not be contiguous, and a batch may be empty.
    torch.testing.assert_close(
        FrozenEmbedding(embeddings)(pixels.transpose(0, 1).contiguous().transpose(0, 1))[0], found
    )
    assert FrozenEmbedding(embeddings)(pixels[:0])[0].shape == (0, *wanted.shape[1:])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_autocast_changes_types_as_it_does_for_the_modules(swin: Any, device: str) -> None:
    pixels, rows, prompts = (torch.randn(shape, device=device) for shape in ((2, 3, 32, 32), (1, 12, 32), (1, 2, 32)))
    embeddings, merge = swin.embeddings.to(device), merging_of(swin, 32).to(device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        wanted, found = embeddings(pixels)[0], FrozenEmbedding(embeddings)(pixels)[0]
        joined = torch.cat([rows.flatten(0, 1), prompts.flatten(0, 1)])
        merged = FrozenMerge(merge)(joined, None, 1, (3, 4))
        other = torch.cat([merge(rows, (3, 4)), merge_prompts(merge, prompts)], dim=1)[0]
    assert (found.dtype, merged.dtype) == (wanted.dtype, other.dtype)
    assert distance(found, wanted) <= 0.02
    assert distance(merged, other) <= 0.02


def merging_of(model: Any, width: int) -> nn.Module:
    torch.manual_seed(1)
    merge = modeling_swin.SwinPatchMerging(width).eval().requires_grad_(False)
    with torch.no_grad():
        merge.norm.weight.normal_(1.0, 0.3)
        merge.norm.bias.normal_(0.0, 0.3)
    return merge.to(next(model.parameters()).dtype)


@pytest.mark.parametrize("with_branch", [True, False])
@pytest.mark.parametrize("prompts", [0, 3])
@pytest.mark.parametrize("grid", [(4, 6), (5, 4), (3, 7), (1, 1)])
def test_merging_is_that_of_the_module_and_of_prompts(
    swin: Any, grid: tuple[int, int], prompts: int, with_branch: bool
) -> None:
    merge, count = merging_of(swin, 32).double(), grid[0] * grid[1]
    tokens, others = torch.randn(2, count, 32).double(), torch.randn(2, prompts, 32).double()
    rows = torch.cat([tokens.flatten(0, 1), others.flatten(0, 1)])
    part = torch.randn_like(rows) if with_branch else None
    found = FrozenMerge(merge)(rows if part is None else rows - part, part, 2, grid)
    wanted = [merge(tokens, grid).flatten(0, 1), merge_prompts(merge, others).flatten(0, 1)]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-12, atol=1e-12)


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


SPOILED: dict[str, Any] = {
    "training": lambda each: each.train(),
    "a hook on the whole": hook,
    "a hook on the patches": lambda each: hook(each.patch_embeddings),
    "a hook on the convolution": lambda each: hook(each.patch_embeddings.projection),
    "a hook on the norm": lambda each: hook(each.norm),
    "a hook on the dropout": lambda each: hook(each.dropout),
    "another dropout": lambda each: setattr(each, "dropout", nn.Tanh()),
    "a norm without a bias": lambda each: each.norm.register_parameter("bias", None),
    "another norm": lambda each: setattr(each, "norm", nn.GroupNorm(1, 1)),
    "places": lambda each: setattr(each, "position_embeddings", nn.Parameter(torch.zeros(1, 64, 16))),
    "overlapping patches": lambda each: setattr(each.patch_embeddings.projection, "stride", (2, 2)),
    "padding": lambda each: setattr(each.patch_embeddings.projection, "padding", (1, 1)),
    "another convolution": lambda each: setattr(each.patch_embeddings, "projection", nn.Identity()),
    "a stranger's class": lambda each: setattr(each, "__class__", type("SwinEmbeddings", (type(each),), {})),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_no_longer_is_an_embedding_is_left_to_its_modules(swin: Any, spoil: Any) -> None:
    embedding = FrozenEmbedding(swin.embeddings)
    assert embedding.usable()
    spoil(swin.embeddings)
    assert not embedding.usable()
    assert not FrozenEmbedding(swin.embeddings).usable()


def test_another_release_that_computes_something_else_is_found_out(swin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = merging_of(swin, 32)
    assert FrozenMerge(merge).usable()
    assert FrozenEmbedding(swin.embeddings).usable()
    real = modeling_swin.SwinPatchMerging.forward
    monkeypatch.setattr(
        modeling_swin.SwinPatchMerging, "forward", lambda self, rows, grid: real(self, rows.flip(1), grid)
    )
    assert not FrozenMerge(merge).usable()
    embed = modeling_swin.SwinPatchEmbeddings.forward
    monkeypatch.setattr(modeling_swin.SwinPatchEmbeddings, "forward", lambda self, pixels: embed(self, pixels.flip(3)))
    assert not FrozenEmbedding(swin.embeddings).usable()
    monkeypatch.setattr(
        modeling_swin.SwinPatchEmbeddings, "forward", lambda self, pixels: embed(self, pixels * torch.nan)
    )
    assert not FrozenEmbedding(swin.embeddings).usable()


MERGE_SPOILED: dict[str, Any] = {
    "a hook on the whole": hook,
    "a hook on the norm": lambda each: hook(each.norm),
    "a hook on the product": lambda each: hook(each.reduction),
    "another product": lambda each: setattr(each, "reduction", nn.Sequential(each.reduction)),
    "a norm without a weight": lambda each: each.norm.register_parameter("weight", None),
    "a stranger's class": lambda each: setattr(each, "__class__", type("SwinPatchMerging", (type(each),), {})),
}


@pytest.mark.parametrize("spoil", MERGE_SPOILED.values(), ids=MERGE_SPOILED)
def test_what_no_longer_merges_is_left_to_its_module(swin: Any, spoil: Any) -> None:
    merge = FrozenMerge(merging_of(swin, 32))
    assert merge.usable()
    spoil(merge.module)
    assert not merge.usable()


def test_weights_that_change_are_read_as_they_are(swin: Any) -> None:
    merge, rows = merging_of(swin, 32), torch.randn(12, 32)
    embedding, frozen, pixels = FrozenEmbedding(swin.embeddings), FrozenMerge(merge), torch.randn(1, 3, 32, 32)
    before = embedding(pixels)[0], frozen(rows, None, 1, (3, 4))
    with torch.no_grad():
        swin.embeddings.norm.eps, merge.norm.eps = 0.5, 0.5
        swin.embeddings.patch_embeddings.projection.weight.mul_(1.5)
        merge.reduction.weight.mul_(1.5)
    found = embedding(pixels)[0], frozen(rows, None, 1, (3, 4))
    assert distance(found[0], swin.embeddings(pixels)[0]) <= 1e-5
    assert distance(found[1], merge(rows[None], (3, 4))[0]) <= 1e-5
    assert all(distance(one, other) > 0.1 for one, other in zip(found, before, strict=True))


def test_weights_that_were_no_numbers_are_looked_at_again(swin: Any) -> None:
    merge = merging_of(swin, 32)
    embedding, frozen = FrozenEmbedding(swin.embeddings), FrozenMerge(merge)
    for each, norm in ((embedding, swin.embeddings.norm), (frozen, merge.norm)):
        weight = norm.weight.clone()
        norm.weight.fill_(torch.nan)
        assert not each.usable()
        norm.weight.copy_(weight)
        assert each.usable()


def test_what_differs_is_said_once(
    swin: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = modeling_swin.SwinPatchMerging.forward
    monkeypatch.setattr(
        modeling_swin.SwinPatchMerging, "forward", lambda self, rows, grid: 1.5 * real(self, rows, grid)
    )
    caplog.set_level("INFO", "epic_fast")
    patches._say_differs.cache_clear()
    merge = FrozenMerge(merging_of(swin, 32))
    assert not any(merge.usable() for _ in range(3))
    said = [each.getMessage() for each in caplog.records if "SwinPatchMerging" in each.getMessage()]
    assert said == ["engine: this release's SwinPatchMerging runs itself: its fused form differs by 3.2e-01"]


def test_pictures_of_other_channels_are_refused_by_name(swin: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"pixel_values has shape \(2, 1, 32, 32\); wanted \(batch, 3, height, width\)"
    ):
        FrozenEmbedding(swin.embeddings)(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ConfigError, match=r"pixel_values has shape \(3, 32, 32\); wanted"):
        FrozenEmbedding(swin.embeddings)(torch.zeros(3, 32, 32))


def test_a_merging_that_was_replaced_is_the_new_one(swin: Any) -> None:
    tower, rows = tower_of(swin), torch.randn(1, 3, 32, 32)
    stage = tower.model.encoder.layers[0]
    with torch.no_grad():
        before = tower.advance(tower.enter(rows, FUSED), tower.num_layers, FUSED).hidden
        first = tower.frozen_merge(1)
        assert tower.frozen_merge(1) is first
        stage.downsample = merging_of(swin, stage.downsample.norm.normalized_shape[0] // 4)
        after = tower.advance(tower.enter(rows, FUSED), tower.num_layers, FUSED).hidden
        wanted = tower.run(tower.start(rows), tower.num_layers).hidden
    assert len(tower._merges) == 1
    assert distance(after, wanted) <= 1e-5
    assert distance(before, wanted) > 1e-2


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    for kind in (FrozenEmbedding, FrozenMerge):
        real = kind.__call__

        def call(self: Any, *given: Any, real: Any = real, name: str = kind.__name__) -> Any:
            calls.append(name)
            return real(self, *given)

        monkeypatch.setattr(kind, "__call__", call)
    return calls


@pytest.mark.parametrize("size", [64, 72])
def test_the_engine_takes_them_and_the_backbone_alone_does_not(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    towers = lively((tiny_swin(image_size=size, depths=(2, 1, 2)), tiny_bert(layers=1)))
    batch, found = make_batch([3, 5]), []
    batch["pixel_values"] = torch.randn(2, 3, size, size)
    calls = counted(monkeypatch)
    for engine in (None, FUSED):
        torch.manual_seed(0)
        model = wrap(towers, MopeConfig(prompt_length=2, temperature=2.0), 3, self_check=False, engine=engine).eval()
        with torch.no_grad():
            model(**batch)  # the first call also looks whether they are the same
            calls.clear()
            found.append(model(**batch).logits)
        assert calls == ([] if engine is None else ["FrozenEmbedding", "FrozenMerge", "FrozenMerge"])
        # With a graph to make the stages' modules run, as what they merge has a gradient.
        calls.clear()
        model(**batch).logits.sum().backward()
        assert calls == ([] if engine is None else ["FrozenEmbedding"])
        model.unwrap()
    assert distance(found[1], found[0]) <= 1e-5


def test_hooks_on_merging_modules_are_called(swin: Any) -> None:
    plain = tower_of(copy.deepcopy(swin))
    tower, pixels, seen = tower_of(swin), torch.randn(1, 3, 32, 32), []
    for stage in tower.model.encoder.layers[:-1]:
        stage.downsample.register_forward_hook(lambda *given: seen.append(given[2].shape))
    with torch.no_grad():
        found = tower.advance(tower.enter(pixels, FUSED), tower.num_layers, FUSED)
        wanted = plain.advance(plain.enter(pixels, FUSED), plain.num_layers, FUSED)
    assert len(seen) == len(tower.stages) - 1
    assert (found.grid, found.layer) == (wanted.grid, wanted.layer)
    assert distance(found.hidden, wanted.hidden) <= 1e-5


def test_too_small_pictures_are_refused_by_the_engine_too(swin: Any) -> None:
    tower = tower_of(swin)
    for enter in (tower.start, lambda pixels: tower.enter(pixels, FUSED)):
        with torch.no_grad(), pytest.raises(ConfigError, match="fewer than a window"):
            enter(torch.zeros(1, 3, 16, 32))


def test_an_embedding_with_a_gradient_to_pass_on_is_its_modules(swin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tower, calls = tower_of(swin), counted(monkeypatch)
    pixels: Tensor = torch.randn(1, 3, 32, 32, requires_grad=True)
    tower.enter(pixels, FUSED).hidden.sum().backward()
    assert pixels.grad is not None
    assert not calls
