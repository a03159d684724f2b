"""Files that are whole or not there: everything is written beside its place first, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Where lies what can be made again: ``$EPIC_FAST_CACHE``, by default ``~/.cache/epic_fast``."""
    return Path(os.environ.get("EPIC_FAST_CACHE") or Path.home() / ".cache" / "epic_fast").expanduser()


def whole_path(name: str) -> str:
    """The absolute path of what is there, so that it is found from elsewhere; of what is not there the name itself."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it when the block ends well, and vanishes otherwise."""
    with atomic_files(path) as (temporary,):
        yield temporary


@contextmanager
def atomic_files(*paths: str | Path) -> Iterator[list[Path]]:
    """Temporary paths beside ``paths`` that replace them together, once all of them are whole on the disk."""
    temporaries: list[Path] = []
    try:
        for path in map(Path, paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
            os.close(handle)
            temporaries.append(Path(name))
        yield list(temporaries)
        umask = _umask()
        for temporary in temporaries:
            _sync(temporary)
            temporary.chmod(0o666 & ~umask)
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
    finally:
        for temporary in temporaries:
            with suppress(FileNotFoundError):
                temporary.unlink()


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place when the block ends well.

    What stood at ``path`` survives any failure before that; the exchange itself is two renames, and
    :func:`recover_folder` brings the old one back if the process dies between them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        for each in temporary.rglob("*"):
            if each.is_file():
                _sync(each)
        temporary.chmod(0o777 & ~_umask())
        previous = _previous(path)
        if path.exists():
            if previous.exists():
                shutil.rmtree(previous)
            path.replace(previous)
        temporary.replace(path)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def recover_folder(path: str | Path) -> None:
    """Bring back what :func:`atomic_folder` had set aside, if the process died between its two renames."""
    path = Path(path)
    if not path.exists() and _previous(path).exists():
        _previous(path).replace(path)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path``, whole or not at all."""
    atomic_write_text(path, to_json(value))


def to_json(value: Any) -> str:
    """``value`` as it stands in the project's JSON files: indented, with a last line end."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _sync(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
