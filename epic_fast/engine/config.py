"""How the frozen towers are executed: one dataclass, given to ``wrap(..., engine=...)`` and to the commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from epic_fast.errors import ConfigError, check_names


@dataclass(frozen=True)
class EngineConfig:
    """The parts of the engine, each switched by itself.  All are exact but ``weights`` and
    ``save="eight_bit"``, which rounds what the backward pass reads.

    Attributes:
        blocks: ``"fused"`` runs the layers that the engine knows as fused frozen blocks, ``"plain"`` runs the
            backbone's own modules; ``"auto"`` is fused on a GPU, and plain on a CPU but with ``weights`` in 8 bits.
        save: what a fused block keeps for its backward pass: ``"full"`` (the MLP's pre-activation and the inputs of
            the norms), ``"eight_bit"`` (the activation's derivative and the normalised rows, both in 8 bits: a quarter
            of the memory of float32, half of that of bfloat16; in a language model as ``"full"``) or ``"recompute"``
            (of the MLP nothing, in a language model its input: one more product in the backward pass).
        pooled_rows: in the last layer only rows that the head reads get queries, output projection and MLP.
        trim_text: texts are cut to the longest of the batch.
        prefix_cache: None; ``"memory"``; or a folder, for what the layers below the first prompts compute, filled in
            the first epoch or by ``epic-fast data cache``.
        weights: ``"frozen"`` (as the backbone has them), or the frozen products in 8 bits: ``"fp8"`` (Ada,
            Hopper and newer), ``"int8"``, ``"8bit"`` (whichever the card has).  A CPU computes the same numbers,
            slowly.
        exact_layers: with ``weights`` in 8 bits, so many first layers of each tower that multiply with their own
            weights nevertheless: what is rounded there passes all layers above.
        graphs: capture whole steps as CUDA graphs, one per shape; falls back with a reason.
    """

    blocks: Literal["auto", "fused", "plain"] = "auto"
    save: Literal["full", "eight_bit", "recompute"] = "full"
    pooled_rows: bool = True
    trim_text: bool = True
    prefix_cache: str | None = None
    weights: Literal["frozen", "fp8", "int8", "8bit"] = "frozen"
    exact_layers: int = 1
    graphs: bool = False

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), get_args(hints[field.name])
            if hints[field.name] is bool and not isinstance(value, bool):
                raise ConfigError(f"EngineConfig.{field.name}={value!r}; wanted true or false")
            if field.name == "exact_layers":
                if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                    raise ConfigError(f"EngineConfig.exact_layers={value!r}; wanted a number of layers, 0 or more")
            elif field.name == "prefix_cache":
                if value is not None and (not isinstance(value, str) or not value):
                    raise ConfigError(f"EngineConfig.prefix_cache={value!r}; wanted None, 'memory' or a folder")
            elif choices and value not in choices:
                raise ConfigError(f"EngineConfig.{field.name}={value!r}; wanted one of {', '.join(map(repr, choices))}")
        if self.weights != "frozen" and self.blocks == "plain":
            raise ConfigError(
                f"EngineConfig.weights={self.weights!r} with blocks='plain', whose modules multiply with their own "
                "weights; wanted blocks='auto' or 'fused'"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON values of all fields."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineConfig:
        """The configuration of these fields.

        Raises:
            ConfigError: a name that is no field.
        """
        check_names(cls.__name__, values, [field.name for field in dataclasses.fields(cls)])
        return cls(**values)
