"""The settings of the demo's EPIC, chosen on validation pairs (``benchmarks/results/demo_search.jsonl``).

``classify``: the best of those that let the whole demo end in five minutes on two CPU cores.  ``match``: the best of
all that were tried, which want a GPU; without one the demo trains a shorter :class:`Cut` of them and says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from epic_fast.models import EpicConfig
from epic_fast.training import TrainingConfig


@dataclass(frozen=True)
class Recipe:
    """One EPIC of the demo's table.

    Attributes:
        name: as the table prints it.
        config, training: of the model and its training.
    """

    name: str
    config: EpicConfig
    training: TrainingConfig

    def without_interaction(self) -> Recipe:
        """The control: the same, the hub taken away."""
        return Recipe(f"{self.name}, interaction off", replace(self.config, interaction=False), self.training)

    def cut(self, cut: Cut | None) -> Recipe:
        """The same, trained for the cut's epochs."""
        return self if cut is None else replace(self, training=replace(self.training, epochs=cut.epochs))


@dataclass(frozen=True)
class Cut:
    """Less training than the recipe wants.

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
