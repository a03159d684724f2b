"""The settings of the demo's EPIC and MoPE, chosen on validation pairs (``benchmarks/results/demo_search.jsonl``).

EPIC, ``classify``: the best of those that let the whole demo end in five minutes on two CPU cores.  ``match``: the
best of all that were tried, which want a GPU; without one the demo trains a shorter :class:`Cut` of them and says so.
MoPE is not in the demo unless it is asked for; its settings are the best of :data:`MOPE_GRID` for each task and head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from epic_fast.models import EpicConfig, MitConfig, MopeConfig
from epic_fast.training import TrainingConfig


@dataclass(frozen=True)
class Recipe:
    """One EPIC or MoPE of the demo's table, or a MiT beside it.

    Attributes:
        name: as the table prints it.
        config, training: of the model and its training.
    """

    name: str
    config: EpicConfig | MopeConfig | MitConfig
    training: TrainingConfig

    def control(self) -> Recipe:
        """The same, of EPIC the hub taken away, of MoPE all experts but one and with them the router,
        of MiT the infusion."""
        if isinstance(self.config, MitConfig):
            return Recipe(f"{self.name}, no picture", replace(self.config, layers=[]), self.training)
        if isinstance(self.config, MopeConfig):
            return Recipe(f"{self.name}, one expert", replace(self.config, num_experts=1, top_k=None), self.training)
        return Recipe(f"{self.name}, interaction off", replace(self.config, interaction=False), self.training)

    def cut(self, cut: Cut | None) -> Recipe:
        """The same, trained for the cut's epochs."""
        return self if cut is None else replace(self, training=replace(self.training, epochs=cut.epochs))


@dataclass(frozen=True)
class Cut:
    """Less training than the recipes want.

    Attributes:
        epochs: instead of the recipe's.
        views: augmented views of each training picture, instead of the task's ``VIEWS``.
        why: as the demo says it.
    """

    epochs: int
    views: int
    why: str


QUICK = Cut(epochs=1, views=0, why="--quick")
# What a task is cut to where there is no GPU: the whole would take hours on two cores.
WITHOUT_GPU = {"match": Cut(epochs=4, views=0, why="no GPU; --full trains the whole recipe")}

# Augmented views of each training picture that the frozen towers see beside the picture itself.
VIEWS = {"classify": 1, "match": 3}

_READS: dict[str, Any] = {
    "text_head_input": "mean",
    "vision_head_input": "cls+mean",
    "feature_norm": "standardize",
    "head_dropout": 0.5,
}
_MATCH: dict[str, Any] = {
    **_READS,
    "num_layer_pairs": 3,
    "vision_prompt_init": "gaussian",
    "projection_init": "least_squares",
    "head_reads_prompts": True,
}


def recipes(task: str) -> list[Recipe]:
    """The EPICs of a task's table, without their controls; the last one is kept in the run folder."""
    if task == "classify":
        training = TrainingConfig(
            epochs=4, batch_size=64, learning_rate=2e-3, head_learning_rate=2e-3, precision="fp32"
        )
        return [Recipe("EPIC", EpicConfig(**_READS, num_layer_pairs=3, head="mlp"), training)]
    training = TrainingConfig(epochs=15, batch_size=128, head_learning_rate=1e-3, precision="fp32")
    return [
        Recipe("EPIC, linear head", EpicConfig(**_MATCH, head="linear"), training),
        Recipe("EPIC, MLP head", EpicConfig(**_MATCH, head="mlp", head_reads_similarity=True), training),
    ]


# MoPE's head reads what the rivals on frozen features read, here behind the prompts, beside the text's feature.
MOPE_READS: dict[str, Any] = {
    "head_input": "cls+mean",
    "complement_feature": "mean",
    "head_reads_complement": True,
    "feature_norm": "standardize",
    "head_dropout": 0.5,
}
# What was tried on validation: prompts in all layers of both towers, as in the released code, or in the upper half of
# the picture's alone, each with two learning rates.
MOPE_GRID: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    f"{where}-lr-{rate:g}": (config, {"learning_rate": rate})
    for where, config in {
        "all-layers": {},
        "upper-half": {"first_layer": 4, "complement_prompt_length": 0},
    }.items()
    for rate in (5e-4, 2e-3)
}
MOPE_TRAINING: dict[str, dict[str, Any]] = {
    "classify": {"epochs": 8, "batch_size": 64, "head_learning_rate": 1e-3, "precision": "fp32"},
    "match": {"epochs": 15, "batch_size": 128, "head_learning_rate": 1e-3, "precision": "fp32"},
}
MOPE_HEADS = {"classify": ("mlp",), "match": ("linear", "mlp")}
MOPE_CHOSEN = {
    ("classify", "mlp"): "upper-half-lr-0.002",
    ("match", "linear"): "upper-half-lr-0.002",
    ("match", "mlp"): "all-layers-lr-0.002",
}


def mope_recipe(task: str, head: str, choice: str) -> Recipe:
    """MoPE with one of the settings of :data:`MOPE_GRID`."""
    config, training = MOPE_GRID[choice]
    name = "MoPE" if len(MOPE_HEADS[task]) == 1 else f"MoPE, {'MLP' if head == 'mlp' else head} head"
    return Recipe(
        name,
        MopeConfig(**{**MOPE_READS, "head": head, **config}),
        TrainingConfig(**{**MOPE_TRAINING[task], **training}),
    )


def mope_recipes(task: str) -> list[Recipe]:
    """The MoPEs of a task's table, without their controls."""
    return [mope_recipe(task, head, MOPE_CHOSEN[task, head]) for head in MOPE_HEADS[task]]
