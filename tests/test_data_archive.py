"""Data in one file: unpacked once, whole or not at all, never outside of its folder; and the demo's own."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import stat
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from epic_fast.data import archive, check_folder, read_folder, resolve_data
from epic_fast.errors import ConfigError, DataError
from epic_fast.files import cache_folder
from epic_fast.testing import make_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EPIC_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pack(folder: Path, to: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(to, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, prefix + str(path.relative_to(folder)))
    return to


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folder_is_itself(tmp_path, cache):
    assert resolve_data(tmp_path) == tmp_path
    assert resolve_data(str(tmp_path)) == tmp_path
    assert not cache.exists()


def test_zip_is_unpacked_once(tmp_path, cache, monkeypatch):
    folder = make_folder(tmp_path / "data")
    packed = pack(folder, tmp_path / "birds.zip")
    found = resolve_data(packed)
    assert everything(found) == everything(folder)
    assert found.parent == cache / "data"
    assert found.name.startswith("birds-")
    monkeypatch.setattr(archive, "_unpack_to", lambda *_: pytest.fail("unpacked again"))
    assert resolve_data(str(packed)) == found
    assert [path.name for path in (cache / "data").iterdir()] == [found.name]


def test_other_contents_are_another_folder(tmp_path):
    first = resolve_data(pack(make_folder(tmp_path / "data"), tmp_path / "a.zip"))
    make_folder(tmp_path / "data", seed=1)
    second = resolve_data(pack(tmp_path / "data", tmp_path / "a.zip"))
    assert first != second
    assert everything(first) != everything(second)


def test_single_folder_inside_is_taken(tmp_path):
    packed = pack(make_folder(tmp_path / "data"), tmp_path / "a.zip", "birds/")
    with zipfile.ZipFile(packed, "a") as file:
        file.writestr("__MACOSX/birds/._metadata.jsonl", "junk")
    found = resolve_data(packed)
    assert found.name == "birds"
    assert len(read_folder(found).splits["train"]) == 24


def test_single_split_folder_inside_is_not_the_data(tmp_path):
    make_folder(tmp_path / "data" / "train", validation=0, test=0)
    found = resolve_data(pack(tmp_path / "data", tmp_path / "a.zip"))
    assert found.name != "train"
    assert len(read_folder(found).splits["train"]) == 24


@pytest.mark.parametrize("name", ["../out.txt", "a/../../out.txt", "/tmp/out.txt", "..\\out.txt", "C:\\out.txt"])
def test_member_outside_of_the_folder(tmp_path, cache, name):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as file:
        file.writestr("metadata.jsonl", "{}")
        file.writestr(name, "x")
    with pytest.raises(DataError, match=r"bad\.zip.*outside of the folder; nothing was unpacked"):
        resolve_data(tmp_path / "bad.zip")
    assert everything(cache) == {}
    assert list((cache / "data").iterdir()) == []


def test_link_in_an_archive(tmp_path, cache):
    link = zipfile.ZipInfo("images")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as file:
        file.writestr(link, "/etc")
    with pytest.raises(DataError, match="link, 'images'"):
        resolve_data(tmp_path / "bad.zip")
    assert list((cache / "data").iterdir()) == []


def test_damaged_member(tmp_path, cache):
    packed = pack(make_folder(tmp_path / "data"), tmp_path / "a.zip")
    content = bytearray(packed.read_bytes())
    content[200] ^= 0xFF
    packed.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.zip.*cannot be unpacked.*CRC"):
        resolve_data(packed)
    assert list((cache / "data").iterdir()) == []


def test_full_disk_leaves_nothing(tmp_path, cache, monkeypatch):
    packed = pack(make_folder(tmp_path / "data"), tmp_path / "a.zip")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DataError, match="EPIC_FAST_CACHE"):
        resolve_data(packed)
    monkeypatch.undo()
    monkeypatch.setenv("EPIC_FAST_CACHE", str(cache))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(DataError, match="No space left"):
            resolve_data(packed)
    assert list((cache / "data").iterdir()) == []
    assert resolve_data(packed).is_dir()


def test_what_is_no_data(tmp_path):
    with pytest.raises(DataError, match=r"'nowhere' does not exist; wanted a folder, a \.zip file, or 'demo'"):
        resolve_data("nowhere")
    (tmp_path / "data.tar.gz").write_text("x")
    with pytest.raises(DataError, match=r"data\.tar\.gz' is a file but no zip"):
        resolve_data(tmp_path / "data.tar.gz")
    whole = pack(make_folder(tmp_path / "data"), tmp_path / "cut.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged"):
        resolve_data(tmp_path / "cut.zip")


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    packed = pack(make_folder(tmp_path / "data"), tmp_path / "a.zip")
    monkeypatch.setenv("EPIC_FAST_CACHE", str(packed))
    with pytest.raises(ConfigError, match="set EPIC_FAST_CACHE"):
        resolve_data(packed)


def test_cache_folder_by_default(monkeypatch):
    monkeypatch.delenv("EPIC_FAST_CACHE")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/somebody"))
    assert cache_folder() == Path("/home/somebody/.cache/epic_fast")


def resolve_at_once(packed: Path, barrier, answers) -> None:
    barrier.wait()
    found = resolve_data(packed)
    answers.put((str(found), len(everything(found))))


def test_processes_at_the_same_time(tmp_path, cache):
    packed = pack(make_folder(tmp_path / "data"), tmp_path / "a.zip")
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.Queue()
    processes = [context.Process(target=resolve_at_once, args=(packed, barrier, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    found = {answers.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert {count for _, count in found} == {43}
    assert len(found) == 1
    assert len(list((cache / "data").iterdir())) == 1


def test_loser_of_a_race_takes_the_winners_folder(tmp_path, cache, monkeypatch):
    packed = pack(make_folder(tmp_path / "data"), tmp_path / "a.zip")
    real = archive._check_member
    won: list[Path] = []

    def overtaken(info, path):
        real(info, path)
        if not won:
            won.append(tmp_path)
            won.append(resolve_data(packed))
            (won[1] / "mark").touch()

    monkeypatch.setattr(archive, "_check_member", overtaken)
    found = resolve_data(packed)
    assert found == won[1]
    assert (found / "mark").exists()
    assert len(list((cache / "data").iterdir())) == 1


def test_demo_data():
    """The pictures that the package carries: their counts are those of its PROVENANCE.md."""
    assert archive.DEMO_ARCHIVE.is_file(), "the demo's data is missing from the package"
    assert archive.DEMO_ARCHIVE.stat().st_size <= 8_000_000
    data = read_folder(resolve_data("demo"))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 1513, "validation": 243, "test": 370}
    assert (data.problem_type, len(data.labels)) == ("single_label_classification", 12)
    counts = Counter(data.labels[label] for label in data.splits["test"].label_ids() if isinstance(label, int))
    assert (counts["food"], counts["buildings"]) == (84, 7)
    example = data.splits["train"][0]
    assert example.image.mode == "RGB"
    assert max(example.image.size) <= 192
    assert example.text == "2 dead frogs"


def test_demo_data_is_sound():
    report = check_folder(resolve_data("demo"))
    assert report.ok, str(report)
    assert report.shared_pictures == {"train+validation": 0, "train+test": 0, "validation+test": 0}


def test_demo_data_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(archive, "DEMO_ARCHIVE", tmp_path / "openclipart12.zip")
    with pytest.raises(DataError, match="install epic_fast again"):
        resolve_data("demo")


def test_unpacked_files_can_be_read_by_all(tmp_path):
    found = resolve_data(pack(make_folder(tmp_path / "data"), tmp_path / "a.zip"))
    assert os.stat(found).st_mode & 0o055 == 0o055
