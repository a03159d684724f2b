"""AdamW over named groups, and the course of their learning rates."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from epic_fast.errors import ConfigError
from epic_fast.training.config import TrainingConfig

DECAYED = ("projections", "head")


def optimizer_groups(model: Any, config: TrainingConfig) -> list[dict[str, Any]]:
    """The groups for an optimizer: ``params``, ``lr``, ``weight_decay`` and the ``name`` of ``parameter_groups()``.

    A name comes twice where its matrices decay and its other tensors do not.

    Raises:
        ConfigError: no parameter is trainable, a trainable parameter is in no group or in two, or is not float32.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {"head": config.head_learning_rate, "gates": config.gate_learning_rate}
    groups: list[dict[str, Any]] = []
    seen: set[int] = set()
    for name, parameters in model.parameter_groups().items():
        split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            if id(parameter) in seen:
                raise ConfigError(
                    f"parameter {names.get(id(parameter))!r} is in two groups of the model's parameter_groups(); "
                    "wanted each in one"
                )
            seen.add(id(parameter))
            if parameter.dtype.itemsize < 4:
                raise ConfigError(
                    f"trainable parameter {names.get(id(parameter))!r} is {parameter.dtype}; wanted float32: its "
                    "updates would round to nothing. Keep it in float32 and let `precision` choose the passes' type."
                )
            split[name in DECAYED and parameter.ndim >= 2].append(parameter)
        for decays, members in split.items():
            if members:
                groups.append(
                    {
                        "name": name,
                        "params": members,
                        "lr": rates.get(name, config.learning_rate),
                        "weight_decay": config.weight_decay if decays else 0.0,
                    }
                )
    forgotten = [name for name, each in model.named_parameters() if each.requires_grad and id(each) not in seen]
    if forgotten:
        raise ConfigError(f"trainable parameters are in none of the model's parameter_groups(): {', '.join(forgotten)}")
    if not groups:
        raise ConfigError("the model has no trainable parameter: every one is frozen; there is nothing to fit")
    return groups


def make_optimizer(model: Any, config: TrainingConfig, *, fused: bool = False) -> AdamW:
    """AdamW over :func:`optimizer_groups`; ``fused`` as a captured step needs it, equal but for roundings."""
    return AdamW(optimizer_groups(model, config), fused=True if fused else None)


def warmup_cosine(step: int, *, warmup: int, total: int) -> float:
    """The factor on the peak rate at ``step`` (from 0) of ``total``.

    It rises linearly through the ``warmup`` steps, is 1 at step ``warmup`` and falls as a half cosine that would
    be 0 at step ``total``, so no step is spent at a rate of 0.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def make_schedule(optimizer: Optimizer, *, total: int, warmup_ratio: float) -> LambdaLR:
    """:func:`warmup_cosine` over ``total`` optimizer steps, the first ``warmup_ratio`` of them (rounded) rising."""
    warmup = min(round(warmup_ratio * total), total - 1)
    return LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup=warmup, total=total))


def learning_rates(optimizer: Any) -> dict[str, float]:
    """The rate of the step to come, by the groups' names."""
    return {group["name"]: float(group["lr"]) for group in optimizer.param_groups}


def moments(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The optimizer's state as ``"parameter name/key" -> tensor``."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_moments(model: nn.Module, optimizer: Any, tensors: dict[str, Any]) -> None:
    """The inverse of :func:`moments`, through the optimizer's own ``load_state_dict``."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_name: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        by_name.setdefault(name, {})[entry] = value
    state = optimizer.state_dict()
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    state["state"] = {
        index: by_name[names[id(parameter)]]
        for index, parameter in zip(indices, ordered, strict=True)
        if names[id(parameter)] in by_name
    }
    optimizer.load_state_dict(state)
