"""Data that comes as one file: unpacked once into a cache folder, found there ever after."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from epic_fast.errors import ConfigError, DataError
from epic_fast.files import cache_folder

DEMO = "demo"
DEMO_ARCHIVE = Path(__file__).resolve().parent.parent / "demo" / "assets" / "openclipart12.zip"
IGNORED = ("__MACOSX", ".DS_Store")


def resolve_data(spec: str | os.PathLike[str]) -> Path:
    """The data folder that ``spec`` stands for.

    A folder is itself.  A ``.zip`` file is unpacked into the cache (``$EPIC_FAST_CACHE``, by default
    ``~/.cache/epic_fast``) under its sha256, once: later calls, and other processes at the same time, use the same
    folder.  ``"demo"`` is the data that comes with the package (a folder of that name is ``"./demo"``).

    Raises:
        DataError: nothing there, no zip file, a damaged one, or one with members that would leave the folder.
        ConfigError: the cache cannot be written.
    """
    if spec == DEMO:
        if not DEMO_ARCHIVE.is_file():
            raise DataError(
                f"the demo's data is missing from this installation ({DEMO_ARCHIVE.name} beside the package's demo); "
                "install epic_fast again"
            )
        return unpack(DEMO_ARCHIVE)
    path = Path(spec).expanduser()
    if path.is_dir():
        return path
    if not path.exists():
        raise DataError(f"the data {str(spec)!r} does not exist; wanted a folder, a .zip file, or 'demo'")
    if not zipfile.is_zipfile(path):
        raise DataError(
            f"the data {str(spec)!r} is a file but no zip (or a damaged one); wanted a folder, a .zip file, or 'demo'. "
            "Unpack other archives first"
        )
    return unpack(path)


def unpack(archive: Path) -> Path:
    """The folder with the archive's contents; of one that holds a single folder, that folder."""
    folder = cache_folder() / "data" / f"{archive.stem}-{_digest(archive)[:16]}"
    if not folder.is_dir():
        _unpack_to(archive, folder)
    return _inner(folder)


def _digest(archive: Path) -> str:
    digest = hashlib.sha256()
    with archive.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _unpack_to(archive: Path, folder: Path) -> None:
    """Unpack beside ``folder``, then rename: whoever sees the folder sees all of it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ConfigError(
            f"the cache folder {str(folder.parent)!r} cannot be written: {error}; set EPIC_FAST_CACHE to one that can"
        ) from error
    try:
        with zipfile.ZipFile(archive) as file:
            members = file.infolist()
            for info in members:
                _check_member(info, archive)
            needed, free = sum(info.file_size for info in members), shutil.disk_usage(temporary).free
            if needed > free:
                raise DataError(
                    f"{archive.name!r} unpacks to {needed / 1e9:.1f} GB, but the disk of the cache folder "
                    f"{str(folder.parent)!r} has {free / 1e9:.1f} GB left; set EPIC_FAST_CACHE to another"
                )
            file.extractall(temporary, members)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            # Another process was faster; its folder is whole, since it too was renamed into place.
            if not folder.is_dir():
                raise
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise DataError(
            f"the archive {str(archive)!r} cannot be unpacked into {str(folder.parent)!r}: {error}; fetch or make it "
            "again, or unpack it yourself and give the folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_member(info: zipfile.ZipInfo, archive: Path) -> None:
    name = info.filename.replace("\\", "/")
    path = PurePosixPath(name)
    drive = len(name) > 1 and name[1] == ":"
    if path.is_absolute() or drive or ".." in path.parts:
        raise DataError(
            f"the archive {str(archive)!r} has a member {info.filename!r} that would be written outside of the folder; "
            "nothing was unpacked. Wanted relative paths without '..'"
        )
    if stat.S_ISLNK(info.external_attr >> 16):
        raise DataError(
            f"the archive {str(archive)!r} has a link, {info.filename!r}; nothing was unpacked. Wanted files only: "
            "pack what the link points to"
        )


def _inner(folder: Path) -> Path:
    children = [child for child in folder.iterdir() if child.name not in IGNORED]
    if len(children) == 1 and children[0].is_dir() and children[0].name not in ("train", "validation", "test"):
        return children[0]
    return folder
