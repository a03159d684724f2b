"""What the configurations of all methods have in common: checks, and a way to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from epic_fast.errors import ConfigError, check_names


@dataclass
class MethodConfig:
    """Base of a method's configuration: a dataclass of JSON values."""

    method: ClassVar[str]

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if hints[field.name] is float and isinstance(value, int) and not isinstance(value, bool):
                setattr(self, field.name, float(value))
            elif hints[field.name] in (int, float, bool, str) and type(value) is not hints[field.name]:
                raise ConfigError(
                    f"{type(self).__name__}.{field.name}={value!r} is a {type(value).__name__}; wanted "
                    f"{hints[field.name].__name__}"
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{type(self).__name__}.{field.name}={value!r}; wanted a finite number")

    def to_dict(self) -> dict[str, Any]:
        """JSON values of all fields."""
        return dataclasses.asdict(self)

    def to_json_string(self) -> str:
        """The same as JSON; the loggers of transformers' Trainer ask a model's configuration for it."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Any:
        """The configuration of these fields.

        Raises:
            ConfigError: a name that is no field.
        """
        check_names(cls.__name__, values, [field.name for field in dataclasses.fields(cls)])
        return cls(**values)


def check_choice(config: MethodConfig, name: str) -> None:
    """The field is one of the strings of its Literal type."""
    hint = get_type_hints(type(config))[name]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    value = getattr(config, name)
    if value not in choices:
        raise ConfigError(f"{type(config).__name__}.{name}={value!r}; wanted one of {', '.join(map(repr, choices))}")


def check_range(
    config: MethodConfig, name: str, low: float, high: float = math.inf, *, exclusive: bool = False
) -> None:
    """The field lies in [low, high], or in (low, high] if ``exclusive``."""
    value = getattr(config, name)
    if not (low <= value <= high) or (exclusive and value == low):
        above = f"more than {low}" if exclusive else f"at least {low}"
        limit = "" if high == math.inf else f" and at most {high}"
        raise ConfigError(f"{type(config).__name__}.{name}={value!r}; wanted {above}{limit}")
