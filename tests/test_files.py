"""Files are whole or not there."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from epic_fast.files import (
    atomic_file,
    atomic_files,
    atomic_folder,
    atomic_write_json,
    atomic_write_text,
    recover_folder,
)


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def fail(*paths: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_text_and_json_are_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    atomic_write_json(path, {"é": [1]})
    assert path.read_text(encoding="utf-8") == '{\n  "é": [\n    1\n  ]\n}\n'
    atomic_write_json(path, {"b": 2})
    assert json.loads(path.read_text()) == {"b": 2}
    atomic_write_text(path, "text")
    assert path.read_text() == "text"
    assert names(path.parent) == ["a.json"]


def test_files_get_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "a", "a")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_file_and_no_other(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def write() -> None:
        with atomic_file(path) as temporary:
            assert temporary.parent == tmp_path
            temporary.write_text("half")
            assert path.read_text() == "old"
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_several_files_change_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    with atomic_files(one, str(two)) as (first, second):
        first.write_text("1")
        assert names(tmp_path) == sorted([first.name, second.name])
        second.write_text("2")
    assert (one.read_text(), two.read_text()) == ("1", "2")

    def write(error: Exception | None = None) -> None:
        with atomic_files(one, two) as (first, second):
            first.write_text("new")
            if error is not None:
                raise error
            second.write_text("new")

    with pytest.raises(RuntimeError):
        write(RuntimeError())
    monkeypatch.setattr(os, "fsync", fail)  # a disk that is full may say so only here
    with pytest.raises(OSError, match="No space left"):
        write()
    assert (one.read_text(), two.read_text()) == ("1", "2")
    assert names(tmp_path) == ["one", "two"]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run"
    for content in ("first", "second"):
        with atomic_folder(path) as temporary:
            (temporary / content).mkdir()
            (temporary / content / "file").write_text(content)
    assert names(path) == ["second"]
    assert (path / "second" / "file").read_text() == "second"
    assert names(path.parent) == ["run"]


def test_a_failure_leaves_the_old_folder_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    with atomic_folder(path) as temporary:
        (temporary / "old").write_text("old")

    def write(error: Exception) -> None:
        with atomic_folder(path) as temporary:
            (temporary / "new").write_text("new")
            raise error

    with pytest.raises(RuntimeError):
        write(RuntimeError())
    assert (names(tmp_path), names(path)) == (["run"], ["old"])
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"), atomic_folder(path) as temporary:
            (temporary / "new").write_text("new")
    assert (names(tmp_path), names(path)) == (["run"], ["old"])


@pytest.mark.parametrize("renames", [0, 1])
def test_a_folder_survives_a_death_at_any_rename(renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    with atomic_folder(path) as temporary:
        (temporary / "old").write_text("old")
    replace, done = Path.replace, []

    def dies(self: Path, target: Any) -> Any:
        if len(done) == renames:
            raise SystemExit
        done.append(target)
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", dies)
        with pytest.raises(SystemExit), atomic_folder(path) as temporary:
            (temporary / "new").write_text("new")
    recover_folder(path)
    assert (names(tmp_path), names(path)) == (["run"], ["old"])
    recover_folder(path)
    recover_folder(tmp_path / "never")
    assert names(path) == ["old"]
    with atomic_folder(path) as temporary:
        (temporary / "new").write_text("new")
    assert (names(tmp_path), names(path)) == (["run"], ["new"])


def test_folders_get_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    """mkdtemp makes folders that only their owner reads; a saved run is for the whole group."""
    old = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "run") as temporary:
            (temporary / "a").write_text("a")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o750
