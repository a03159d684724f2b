"""Which tensor learns how fast and which decays; the course of the rates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import epic_fast
from epic_fast.errors import ConfigError
from epic_fast.testing import tiny_clip
from epic_fast.training import TrainingConfig
from epic_fast.training.optim import (
    learning_rates,
    make_optimizer,
    make_schedule,
    moments,
    optimizer_groups,
    restore_moments,
    warmup_cosine,
)


def build(**options):
    config = epic_fast.EpicConfig(**{"prompt_length": 2, "num_layer_pairs": 2, **options})
    return epic_fast.wrap(tiny_clip(), config, num_labels=3, self_check=False)


def test_only_matrices_of_projections_and_head_decay():
    model = build(vision_prompt_init="gaussian", gate="channel", head="mlp")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimizer_groups(model, TrainingConfig(weight_decay=0.1))
    decayed = {names[id(each)] for group in groups if group["weight_decay"] for each in group["params"]}
    free = {names[id(each)] for group in groups if not group["weight_decay"] for each in group["params"]}
    assert decayed
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    assert all(model.get_parameter(name).ndim == 2 and name.endswith("weight") for name in decayed)
    assert all("prompt" in name or "gate" in name or "temperature" in name or "bias" in name for name in free)
    trainable = {name for name, each in model.named_parameters() if each.requires_grad}
    assert decayed | free == trainable
    assert not decayed & free


def test_rates_by_group():
    config = TrainingConfig(learning_rate=0.1, head_learning_rate=0.2, gate_learning_rate=0.3)
    rates = {group["name"]: group["lr"] for group in optimizer_groups(build(), config)}
    assert rates == {"prompts": 0.1, "projections": 0.1, "gates": 0.3, "head": 0.2}


def test_frozen_gates_are_left_out():
    model = build(learn_gates=False, gate_init=0.5, learn_temperature=False)
    assert "gates" not in {group["name"] for group in optimizer_groups(model, TrainingConfig())}


class Grouped(nn.Module):
    def __init__(self, **groups):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.groups = groups

    def parameter_groups(self):
        return {
            name: [p for each in names for p in getattr(self, each).parameters()] for name, names in self.groups.items()
        }


def test_groups_that_do_not_fit_the_model():
    with pytest.raises(ConfigError, match=r"second\.weight, second\.bias"):
        optimizer_groups(Grouped(head=["first"]), TrainingConfig())
    with pytest.raises(ConfigError, match=r"'first\.weight' is in two groups"):
        optimizer_groups(Grouped(head=["first", "second"], prompts=["first"]), TrainingConfig())
    with pytest.raises(ConfigError, match="bfloat16; wanted float32"):
        optimizer_groups(Grouped(head=["first", "second"]).bfloat16(), TrainingConfig())
    with pytest.raises(ConfigError, match="no trainable parameter"):
        optimizer_groups(Grouped(head=["first", "second"]).requires_grad_(False), TrainingConfig())


def test_schedule_values():
    values = [warmup_cosine(step, warmup=4, total=20) for step in range(21)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert values[12] == pytest.approx(0.5)
    assert values[8] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert values[19] > 0
    assert values[20] == pytest.approx(0.0)
    assert warmup_cosine(0, warmup=0, total=1) == 1.0


def test_schedule_drives_every_group():
    optimizer = make_optimizer(build(), TrainingConfig())
    schedule = make_schedule(optimizer, total=40, warmup_ratio=0.05)
    seen = []
    for _ in range(40):
        seen.append(learning_rates(optimizer))
        optimizer.step()
        schedule.step()
    peak = {"prompts": 1e-3, "projections": 1e-3, "gates": 1e-2, "head": 5e-4}
    assert seen[2] == pytest.approx(peak)
    for name, rate in peak.items():
        assert [row[name] / rate for row in seen] == pytest.approx(
            [warmup_cosine(step, warmup=2, total=40) for step in range(40)]
        )


@pytest.mark.parametrize(("total", "ratio"), [(1, 1.0), (1, 0.0), (3, 1.0)])
def test_schedule_of_very_short_runs_never_has_rate_zero(total, ratio):
    optimizer = make_optimizer(build(), TrainingConfig())
    schedule = make_schedule(optimizer, total=total, warmup_ratio=ratio)
    for _ in range(total):
        assert all(rate > 0 for rate in learning_rates(optimizer).values())
        optimizer.step()
        schedule.step()


def test_moments_by_name_survive_another_order_of_groups():
    first, second = Grouped(head=["first"], prompts=["second"]), Grouped(prompts=["second"], head=["first"])
    optimizer = make_optimizer(first, TrainingConfig())
    for parameter in first.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    other = make_optimizer(second, TrainingConfig())
    restore_moments(second, other, moments(first, optimizer))
    assert set(moments(second, other)) == set(moments(first, optimizer))
    for name, value in moments(first, optimizer).items():
        assert torch.equal(moments(second, other)[name], value)
    assert "first.weight/exp_avg_sq" in moments(second, other)
