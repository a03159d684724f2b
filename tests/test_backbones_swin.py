"""Swin towers: bit for bit the model's own without prompts, and with them the naive copy into every window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

import epic_fast
from epic_fast import EpicConfig
from epic_fast.backbones import Stage, SwinTower, load_backbone, stages_of
from epic_fast.engine import TowerState
from epic_fast.errors import ConfigError
from epic_fast.testing import tiny_bert, tiny_swin, tiny_vit
from epic_fast.testing.probes import lively, make_batch

SWINS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "even": ({}, (32, 32)),
    "three stages, no pooler": ({"depths": (2, 3, 1), "image_size": 64, "pooler": False}, (64, 64)),
    "padding, odd grids": ({"depths": (3, 2)}, (40, 36)),
    "pixels that patches do not divide": ({}, (33, 47)),
    "window 3, not square": ({"window": 3, "image_size": 28}, (28, 44)),
}


def tower_of(case: str, dtype: torch.dtype = torch.float32) -> tuple[SwinTower, Any, Tensor]:
    options, size = SWINS[case]
    model = lively(tiny_swin(**options)).to(dtype)
    tower = load_backbone((model, tiny_bert())).vision
    assert isinstance(tower, SwinTower)
    pictures = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return tower, model, pictures


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", SWINS)
@torch.no_grad()
def test_without_prompts_the_models_own_output(case: str, attention: str) -> None:
    tower, model, pictures = tower_of(case)
    model.set_attn_implementation(attention)
    wanted = model(pictures)
    whole = tower.run_all(tower.start(pictures))
    assert torch.equal(tower.normalise(whole.hidden), wanted.last_hidden_state)
    pooled = wanted.last_hidden_state.mean(dim=1) if wanted.pooler_output is None else wanted.pooler_output
    assert torch.equal(tower.pool(whole), pooled)
    # A layer at a time, with no prompts to put in.
    state, prompts = tower.start(pictures), torch.zeros(3, 0, tower.stages[0].width)
    for index in range(tower.num_layers):
        state, prompts = tower.run_prompted(state, index, prompts, "full")
    assert torch.equal(state.hidden, whole.hidden)
    assert prompts.shape == (3, 0, tower.hidden_size)


def test_stages_and_widths() -> None:
    tower, _, _ = tower_of("three stages, no pooler")
    assert stages_of(tower) == [Stage(0, 2, 16), Stage(2, 5, 32), Stage(5, 6, 64)]
    assert (tower.num_layers, tower.hidden_size) == (6, 64)
    assert [tower.stage_at(layer) for layer in range(7)] == [0, 0, 1, 1, 1, 2, 2]
    assert set(tower.feature_widths) == {"pooled", "mean"}
    vit = load_backbone((tiny_vit(layers=3), tiny_bert()))
    assert stages_of(vit.vision) == [Stage(0, 3, 32)]
    assert stages_of(vit.text) == [Stage(0, 3, 24)]


def naive_block(block: Any, hidden: Tensor, prompts: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Prompts copied into every window of every sample, bias and mask padded, outputs averaged after the projection."""
    (batch, _, width), (rows, columns), window = hidden.shape, grid, block.window_size
    shift = block.shift_size
    count = prompts.shape[1]
    tokens = block.layernorm_before(hidden).view(batch, rows, columns, width)
    tokens = pad(tokens, (0, 0, 0, -columns % window, 0, -rows % window))
    height, breadth = tokens.shape[1:3]
    if shift:
        tokens = torch.roll(tokens, (-shift, -shift), (1, 2))
    mine = block.layernorm_before(prompts)
    attention = block.attention
    heads, head_dim = attention.num_attention_heads, attention.head_dim
    result = torch.zeros_like(tokens)
    of_prompts = torch.zeros_like(prompts)
    native = block.get_attn_mask(height, breadth, dtype=hidden.dtype, device=hidden.device)
    windows = [(top, left) for top in range(0, height, window) for left in range(0, breadth, window)]
    for sample in range(batch):
        for number, (top, left) in enumerate(windows):
            inside = tokens[sample, top : top + window, left : left + window].reshape(-1, width)
            together = torch.cat([mine[sample], inside])
            query, key, value = (
                layer(together).view(-1, heads, head_dim).transpose(0, 1)
                for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            added = attention.relative_position_bias()[0]
            if native is not None:
                added = added + native[number]
            scores = query @ key.transpose(1, 2) * head_dim**-0.5 + pad(added, (count, 0, count, 0))
            found = attention.o_proj((scores.softmax(dim=-1) @ value).transpose(0, 1).reshape(-1, width))
            of_prompts[sample] += found[:count] / len(windows)
            result[sample, top : top + window, left : left + window] = found[count:].view(window, window, width)
    if shift:
        result = torch.roll(result, (shift, shift), (1, 2))
    hidden = hidden + result[:, :rows, :columns].reshape(hidden.shape)
    prompts = prompts + of_prompts
    return tuple(each + block.mlp(block.layernorm_after(each)) for each in (hidden, prompts))  # pyright: ignore


@pytest.mark.parametrize("case", SWINS)
def test_with_prompts_the_naive_copy_into_every_window(case: str) -> None:
    """Shifted and unshifted blocks, windows that are filled up, and the merging between stages, in float64."""
    tower, model, pictures = tower_of(case, torch.float64)
    random = torch.Generator().manual_seed(4)
    state = tower.start(pictures)
    prompts = torch.randn(3, 2, tower.stages[0].width, generator=random, dtype=torch.float64)
    shifted = set()
    for number, (stage, module) in enumerate(zip(tower.stages, model.encoder.layers, strict=True)):
        for index in range(stage.start, stage.stop):
            block = tower.layers[index]
            grid = tower.grid(state)
            block.set_shift_and_window_size(grid)
            wanted, wanted_prompts = naive_block(block, state.hidden, prompts, grid)
            shifted.add(block.shift_size > 0)
            if index + 1 == stage.stop and module.downsample is not None:
                wanted = module.downsample(wanted, grid)
                four = torch.cat([wanted_prompts] * 4, dim=-1)
                wanted_prompts = module.downsample.reduction(module.downsample.norm(four))
            state, prompts = tower.run_prompted(state, index, prompts, "full")
            torch.testing.assert_close(state.hidden, wanted, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(prompts, wanted_prompts, rtol=1e-10, atol=1e-10)
            assert tower.stage_at(state.layer) in (number, number + 1)
    assert shifted == {True, False}


def test_gradients_reach_the_prompts_and_no_weight() -> None:
    tower, model, pictures = tower_of("padding, odd grids")
    prompts = torch.randn(3, 2, 16, requires_grad=True)
    state, found = tower.start(pictures), prompts
    for index in range(tower.num_layers):
        state, found = tower.run_prompted(state, index, found, "full")
    (found.square().sum() + tower.mean(state).square().sum()).backward()
    assert prompts.grad is not None
    assert prompts.grad.abs().amin() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
def test_what_a_picture_gives_does_not_depend_on_the_sizes_before_it() -> None:
    """transformers' blocks drop their shift for good when they meet a grid of one window."""
    tower, _, _ = tower_of("even")
    large = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    first = tower.run_all(tower.start(large)).hidden
    tower.run_all(tower.start(large[:, :, :32, :32]))
    assert torch.equal(tower.run_all(tower.start(large)).hidden, first)


def test_a_prefix_that_was_kept_finds_its_grid_again() -> None:
    tower, _, pictures = tower_of("padding, odd grids")
    hidden = torch.zeros(1, 64, 16)
    assert tower.grid(TowerState(hidden)) == (8, 8)
    assert tower.grid(TowerState(torch.zeros(1, 16, 32), 3)) == (4, 4)
    assert tower.grid(TowerState(torch.zeros(1, 81, 16))) == (9, 9)
    assert tower.start(pictures).to("cpu").grid == (10, 9)
    with pytest.raises(ConfigError, match=r"90 tokens of a Swin tower came without their grid; wanted .* 32 pixels"):
        tower.grid(TowerState(torch.zeros(1, 90, 16)))


def test_pictures_that_are_too_small_are_refused() -> None:
    tower, _, _ = tower_of("even")
    with pytest.raises(ConfigError, match=r"in stage 1 of this Swin 2 x 4 tokens are left, fewer than a window of 4"):
        tower.start(torch.zeros(1, 3, 16, 32))
    with pytest.raises(ConfigError, match="prompt_mask='prefix' with a Swin tower"):
        tower.run_prompted(tower.start(torch.zeros(1, 3, 32, 32)), 0, torch.zeros(1, 2, 16), "prefix")


@torch.no_grad()
def test_epic_in_the_last_stage() -> None:
    backbone = (lively(tiny_swin()), lively(tiny_bert()))
    batch = make_batch([9, 4, 7])
    model = epic_fast.wrap(backbone, EpicConfig(prompt_length=0), num_labels=3).eval()
    assert model(**batch).logits.shape == (3, 3)
    model = epic_fast.wrap(backbone, EpicConfig(prompt_length=2, layer_pairs=[(1, 2), (2, 3)]), num_labels=3).eval()
    whole, alone = model(**batch).logits, model(**{name: each[1:2] for name, each in batch.items()}).logits
    torch.testing.assert_close(alone, whole[1:2], rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match=r"layer_pairs.*vision layer 1 .* width 16.*wanted layers 2 to 3"):
        epic_fast.wrap(backbone, EpicConfig(prompt_length=2, layer_pairs=[(1, 1), (2, 3)]), num_labels=3)


def test_saved_and_loaded_by_name(tmp_path: Any) -> None:
    tiny_swin(tmp_path / "swin")
    tiny_bert(tmp_path / "bert")
    encoder = load_backbone(f"vision={tmp_path / 'swin'},text={tmp_path / 'bert'}")
    encoder.self_check()
    assert encoder.family == "swin+bert"
    assert encoder.image_processor is not None
