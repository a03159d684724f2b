"""The settings of a training run: config file, options and ``key=value``, checked and put together."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from epic_fast.errors import ConfigError

TOP_LEVEL = ("data", "backbone", "method", "output")


class MissingSetting(ConfigError):
    """A setting that has no default, and that nobody gave."""


@dataclass
class DataSettings:
    """Section ``data:`` of a config file.

    Attributes:
        path: folder or zip with ``metadata.jsonl``, or ``"demo"``.
        text_field, label_field, split_field: the rows' fields; ``label_field`` None takes ``label``,
            ``labels`` or ``mask``.
        skip_bad: skip and count rows whose picture cannot be read.
        pos_weight: weight of the positives in the multi-label loss: None, ``"auto"`` (negatives over positives of
            the training split, a label) or one number a label.
        problem_type: one of transformers' three names or "segmentation", in place of what the labels look like.
    """

    path: str | None = None
    text_field: str = "text"
    label_field: str | None = None
    split_field: str = "split"
    skip_bad: bool = False
    pos_weight: Any = None
    problem_type: str | None = None


@dataclass
class RunSettings:
    """All settings of a run; ``training.yaml`` in the run folder holds exactly these.

    Attributes:
        engine: all fields of an ``EngineConfig`` where one was given; False for the backbone's own modules; None for
            what the device wants, see :func:`engine_for`.
    """

    output: str
    backbone: str
    data: DataSettings
    method: str = "epic"
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] | bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to ``training.yaml``."""
        return {
            "output": self.output,
            "backbone": self.backbone,
            "method": self.method,
            "data": dataclasses.asdict(self.data),
            "model": self.model,
            "training": self.training,
            "engine": self.engine,
        }

    def to_yaml(self) -> str:
        """The text of ``training.yaml``, which is a config file itself."""
        return yaml.safe_dump(_plain(self.to_dict()), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML with the numbers that people write: PyYAML takes ``1e-3`` for a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.\d*)?[eE][-+]?\d+$|^[-+]?\.\d+[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_value(text: str) -> Any:
    """A value of ``key=value``, read as YAML."""
    try:
        return yaml.load(text, _Loader) if text.strip() else None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the value {text!r} is no YAML: {_first_line(error)}. A text with a colon or a brace in it stands in "
            "double quotes, and those in single ones for the shell: 'key=\"...\"'"
        ) from error


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The values of a YAML or JSON config file.

    Raises:
        ConfigError: not there, not readable, or no mapping.
    """
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"the config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"the config file {path} is neither YAML nor JSON: {_first_line(error)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"the config file {path} holds a {type(values).__name__}; wanted a mapping of keys to values")
    return values


def known_keys(method: str) -> dict[str, list[str]]:
    """The keys of each section, for this method.

    Raises:
        ConfigError: no such method.
    """
    from epic_fast.engine import EngineConfig
    from epic_fast.training import TrainingConfig

    sections = {
        "model": method_config_class(method),
        "training": TrainingConfig,
        "data": DataSettings,
        "engine": EngineConfig,
    }
    return {name: [each.name for each in dataclasses.fields(cls) if each.init] for name, cls in sections.items()}


def engine_for(choice: Mapping[str, Any] | bool | None, *, gpu: bool) -> Any:
    """The ``EngineConfig`` to run with: the one given; else its defaults on a GPU (exact, without CUDA graphs and
    prefix cache), and none on a CPU.

    Raises:
        ConfigError: no such choice.
    """
    from epic_fast.engine import EngineConfig

    if isinstance(choice, Mapping):
        return EngineConfig.from_dict(choice)
    if choice not in (None, False):
        raise ConfigError(f"engine={choice!r}; wanted false, or settings such as engine.prefix_cache=FOLDER")
    return EngineConfig() if gpu and choice is None else None


def method_config_class(method: str) -> Any:
    """The config dataclass of a method by its name."""
    from epic_fast.models import METHODS

    if method not in METHODS:
        raise ConfigError(f"the method {method!r} is unknown; wanted one of {', '.join(METHODS)}")
    return METHODS[method][0]


def resolve_settings(
    *,
    config_file: str | Path | None = None,
    options: Mapping[str, Any],
    overrides: Iterable[str] = (),
    base: Mapping[str, Any] | None = None,
) -> RunSettings:
    """Put the settings together: ``base`` (a resumed run's own) < config file < options < ``key=value``.

    Args:
        config_file: YAML or JSON.
        options: qualified keys (``"training.epochs"``, ``"backbone"``) to values; None means not given.
        overrides: ``key=value`` each, the key bare where that is unambiguous, or ``section.key``.
        base: values that lie below all others, nested as in a config file.

    Raises:
        ConfigError: an unknown or ambiguous key, a value that a section refuses, a missing one
            (:class:`MissingSetting`), or another method than the base's.
    """
    file_values = read_config_file(config_file) if config_file else {}
    pairs = [_split_override(text) for text in overrides]
    method = _method(base or {}, file_values, options, pairs)
    keys = known_keys(method)
    values: dict[str, Any] = {}
    if base:
        trained = base.get("method") or "epic"
        if trained != method:
            raise ConfigError(
                f"the run to resume has the method {trained!r}, not {method!r}; leave the method out to resume it, or "
                "train into another folder (or with --overwrite into this one)"
            )
        _overlay(values, _flatten(base, keys, "the run's training.yaml"))
    _overlay(values, _flatten(file_values, keys, f"{config_file}"))
    _overlay(values, {key: value for key, value in options.items() if value is not None})
    _overlay(values, {_qualify(key, keys, "the command line"): parse_value(text) for key, text in pairs})
    return _build(values, method, keys)


def _overlay(values: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Lay values over others; an engine that is given as a whole replaces its settings, and these replace it."""
    for key, value in more.items():
        section, dot, _ = key.partition(".")
        if section == "engine":
            for other in [each for each in values if each.partition(".")[0] == "engine" and ("." in each) != bool(dot)]:
                del values[other]
        values[key] = value


def _method(
    base: Mapping[str, Any], file_values: Mapping[str, Any], options: Mapping[str, Any], pairs: list[tuple[str, str]]
) -> str:
    given = [text for key, text in pairs if key == "method"]
    return str(
        (given[-1] if given else None)
        or options.get("method")
        or file_values.get("method")
        or base.get("method")
        or "epic"
    )


def _split_override(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"the argument {text!r} is no key=value; write for example prompt_length=4")
    return key.strip(), value


def _flatten(values: Mapping[str, Any], keys: Mapping[str, list[str]], where: str) -> dict[str, Any]:
    """Nested values of a file as qualified keys; every key is checked."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key == "data" and not isinstance(value, Mapping):
            flat["data.path"] = value
        elif key == "engine" and isinstance(value, bool):
            flat["engine"] = value
        elif key in keys:
            if value is not None and not isinstance(value, Mapping):
                raise ConfigError(f"{where}: the section {key!r} is a {type(value).__name__}; wanted keys and values")
            for name, each in (value or {}).items():
                flat[_qualify(f"{key}.{name}", keys, where)] = each
        else:
            flat[_qualify(str(key), keys, where)] = value
    return flat


def _qualify(key: str, keys: Mapping[str, list[str]], where: str) -> str:
    """The full name of a key."""
    if key == "engine":
        return key
    if key in TOP_LEVEL:
        return "data.path" if key == "data" else key
    section, dot, name = key.partition(".")
    if dot and name in keys.get(section, ()):
        return key
    homes = [] if dot else [f"{each}.{key}" for each, names in keys.items() if key in names]
    if len(homes) == 1:
        return homes[0]
    if homes:
        raise ConfigError(f"{where}: the key {key!r} is ambiguous; write one of {', '.join(homes)}")
    raise ConfigError(f"{where}: {_unknown(key, keys)}")


def _unknown(key: str, keys: Mapping[str, list[str]]) -> str:
    section, dot, name = key.partition(".")
    inside = section if dot and section in keys else None
    names = {
        each: each if home is None else f"{home}.{each}"
        for home, members in ((None, TOP_LEVEL), *keys.items())
        if inside is None or home == inside
        for each in members
    }
    nearest = names[_nearest(name if dot else key, list(names))]
    home = nearest.partition(".")[0]
    listed = (
        f"Section {home} has {', '.join(keys[home])}" if home in keys else f"Top-level keys: {', '.join(TOP_LEVEL)}"
    )
    return f"unknown key {key!r}; did you mean {nearest!r}? {listed}"


def _nearest(key: str, names: list[str]) -> str:
    """The name that was meant: one that the key abbreviates (``lr``), else the most similar."""
    initials = [name for name in names if "_" in name and "".join(word[0] for word in name.split("_")) == key]
    return initials[0] if initials else difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]


def _build(values: Mapping[str, Any], method: str, keys: Mapping[str, list[str]]) -> RunSettings:
    from epic_fast.engine import EngineConfig
    from epic_fast.training import TrainingConfig

    sections: dict[str, dict[str, Any]] = {name: {} for name in keys}
    for key, value in values.items():
        section, dot, name = key.partition(".")
        if dot:
            sections[section][name] = value
    for key, option in (("output", "--output RUN"), ("backbone", "--backbone NAME"), ("data.path", "--data FOLDER")):
        if values.get(key) is None:
            raise MissingSetting(
                f"no {key.removesuffix('.path')} was given; add {option}, or `{key}` to the config file"
            )
    data = DataSettings(**sections["data"])
    data.path = str(data.path)
    for name in ("text_field", "split_field"):
        if not isinstance(getattr(data, name), str) or not getattr(data, name):
            raise ConfigError(f"data.{name}={getattr(data, name)!r}; wanted the name of a field")
    engine: dict[str, Any] | bool | None = values.get("engine")
    if sections["engine"]:
        engine = _checked(EngineConfig, sections["engine"], "engine")
    engine_for(engine, gpu=False)
    return RunSettings(
        output=str(values["output"]),
        backbone=str(values["backbone"]),
        method=method,
        data=data,
        model=_checked(method_config_class(method), sections["model"], "model"),
        training=_checked(TrainingConfig, sections["training"], "training"),
        engine=engine,
    )


def _checked(cls: Any, values: Mapping[str, Any], section: str) -> dict[str, Any]:
    """The values of the dataclass with these fields, defaults included."""
    try:
        return dataclasses.asdict(cls(**values))
    except ConfigError as error:
        raise ConfigError(f"section {section}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"section {section} cannot be used: {error} (given {dict(values)})") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
