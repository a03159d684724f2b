"""Where prefixes are kept between epochs and runs: in memory, or in a folder, each record checked as it is read.

A folder holds ``cache.json``, which says what the prefixes were made of, and segments.  Every process that fills the
cache appends to a segment of its own (``NAME.data`` and ``NAME.index``) and reads those of all; so nobody writes where
another does, and what an interrupted run has written counts for the next.  A record is 48 bytes in the index (digest
of the sample's picture or text, place, length and checksum of its rows, and a checksum of the entry itself), written
only after its rows are on the disk.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import tempfile
import time
import uuid
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from epic_fast.engine.prefix import Prefix
from epic_fast.engine.state import TowerState
from epic_fast.errors import ConfigError, EpicFastError
from epic_fast.files import to_json

HEADER = "cache.json"
FORMAT = 1
DIGEST_BYTES = 16
TOWERS = ("text", "vision")
ENTRY = np.dtype(
    [
        ("digest", f"V{DIGEST_BYTES}"),
        ("offset", "<u8"),
        ("tokens", "<u4"),
        ("pool", "<i4"),
        ("checksum", "<u4"),
        ("tower", "u1"),
        ("masked", "u1"),
        ("unused", "<u2"),
        ("unused_too", "<u4"),
        ("entry_checksum", "<u4"),
    ]
)
CHUNK_BYTES = 256 * 2**20
COMMIT_SECONDS = 5.0
SPARE_BYTES = 64 * 2**20


class SampleKey(NamedTuple):
    """Digests, 16 bytes each, of what a sample's text and picture are made of."""

    text: bytes
    vision: bytes


class DamagedRecords(EpicFastError):
    """Records that are not what was written; ``positions`` are those of the samples in the batch asked for."""

    def __init__(self, message: str, positions: Sequence[int]):
        super().__init__(message)
        self.positions = list(positions)


@dataclass(frozen=True)
class Form:
    """What the states of a tower are: width, type that is kept, type that is given back, layer."""

    width: int
    kept: str
    given: str
    layer: int

    @classmethod
    def of(cls, state: TowerState, compute: torch.dtype | None) -> Form:
        """The form of these states; ``compute`` is what float32 is kept as."""
        given = state.hidden.dtype
        kept = compute if compute is not None and given == torch.float32 else given
        return cls(state.hidden.shape[2], _name(kept), _name(given), state.layer)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token."""
        return self.width * self.kept_type.itemsize

    @property
    def kept_type(self) -> torch.dtype:
        return getattr(torch, self.kept)

    @property
    def given_type(self) -> torch.dtype:
        return getattr(torch, self.given)


class _Record(NamedTuple):
    segment: int
    offset: int
    tokens: int
    pool: int
    masked: bool
    checksum: int


class PrefixStore(ABC):
    """Prefixes by what their samples are; a text or a picture that stands in many samples is kept once.

    What comes out is what went in: exact in float32, rounded once to ``compute`` where that is narrower, and then the
    same in the first epoch as in every later one.

    Args:
        compute: type in which float32 states are kept, such as ``torch.bfloat16`` where the model computes in it;
            None keeps them as they are.
    """

    def __init__(self, compute: torch.dtype | None = None):
        self.compute = compute
        self.forms: dict[str, Form] | None = None
        self._records: dict[str, dict[bytes, _Record]] = {tower: {} for tower in TOWERS}

    def __len__(self) -> int:
        """Pictures held."""
        return len(self._records["vision"])

    @property
    @abstractmethod
    def where(self) -> str:
        """Where the prefixes are, in words."""

    def holds(self, key: SampleKey) -> bool:
        """Whether both halves of a sample are there."""
        return key.text in self._records["text"] and key.vision in self._records["vision"]

    def put(self, keys: Sequence[SampleKey], prefix: Prefix, *, replace: bool = False) -> None:
        """Keep the prefix of a batch of samples; halves that are there already stay unless ``replace``.

        Raises:
            ConfigError: texts padded on the left, or states of another width, type or layer than those held.
            EpicFastError: the disk is full; what was written before stays whole.
        """
        forms = {tower: Form.of(getattr(prefix, tower), self.compute) for tower in TOWERS}
        if self.forms is None:
            self._start(forms)
        if forms != self.forms:
            raise ConfigError(
                f"the prefix cache {self.where} holds {_describe(self.forms)}; the states given are "
                f"{_describe(forms)}. Wanted states of one model: use another cache"
            )
        for tower in TOWERS:
            self._put_tower(tower, [getattr(key, tower) for key in keys], getattr(prefix, tower), replace)

    def _put_tower(self, tower: str, digests: Sequence[bytes], state: TowerState, replace: bool) -> None:
        assert self.forms is not None
        form, records = self.forms[tower], self._records[tower]
        batch, width = state.hidden.shape[:2]
        lengths = torch.full((batch,), width)
        if state.valid is not None:
            valid = state.valid.cpu()
            lengths = valid.sum(dim=1)
            if not torch.equal(valid, torch.arange(width) < lengths[:, None]):
                raise ConfigError("prefix cache: a text is padded on the left or in the middle; wanted right padding")
        pools = [-1] * batch if state.pool_index is None else state.pool_index.tolist()
        hidden = state.hidden.detach().to(form.kept_type).cpu().contiguous().view(torch.uint8).numpy()
        for row, (digest, tokens) in enumerate(zip(digests, lengths.tolist(), strict=True)):
            if digest not in records or (replace and digests.index(digest) == row):
                data = hidden[row, :tokens].reshape(-1)
                records[digest] = self._append(tower, digest, data, tokens, pools[row], state.valid is not None)

    def batch(self, keys: Sequence[SampleKey], *, pin: bool = False) -> Prefix:
        """The prefix of these samples on the CPU, texts padded with zeros to the longest of them.

        Args:
            keys: of samples that are held.
            pin: in page-locked memory, from where a GPU takes it without waiting.

        Raises:
            DamagedRecords: rows that do not have the checksum with which they were written.
        """
        damaged: set[int] = set()
        towers = {tower: self._read(tower, [getattr(key, tower) for key in keys], pin, damaged) for tower in TOWERS}
        if damaged:
            raise DamagedRecords(
                f"the prefix cache {self.where} is damaged: {len(damaged)} of {len(keys)} samples read do not have the "
                "checksum with which they were written",
                sorted(damaged),
            )
        return Prefix(text=towers["text"], vision=towers["vision"])

    def given_back(self, prefix: Prefix) -> Prefix:
        """The prefix in the type in which the model made it; to be called where it is used, after any copy."""
        assert self.forms is not None
        text, vision = (
            replace(state, hidden=state.hidden.to(self.forms[tower].given_type))
            for tower, state in (("text", prefix.text), ("vision", prefix.vision))
        )
        return Prefix(text=text, vision=vision)

    def _read(self, tower: str, digests: Sequence[bytes], pin: bool, damaged: set[int]) -> TowerState:
        assert self.forms is not None
        form = self.forms[tower]
        records = [self._records[tower][digest] for digest in digests]
        lengths = [record.tokens for record in records]
        longest = max(lengths)
        hidden = torch.empty((len(records), longest, form.width), dtype=form.kept_type, pin_memory=pin)
        rows = hidden.view(torch.uint8).numpy()
        for row, record in enumerate(records):
            data = self._data(record, record.tokens * form.row_bytes)
            if data is None or zlib.crc32(data.data) != record.checksum:
                damaged.add(row)
                continue
            rows[row, : record.tokens] = data.reshape(record.tokens, form.row_bytes)
            rows[row, record.tokens :] = 0
        if not any(record.masked for record in records) and min(lengths) == longest:
            return TowerState(hidden, form.layer)
        ends = torch.tensor(lengths, dtype=torch.int32)
        valid = torch.arange(longest) < ends[:, None]
        pool = None if records[0].pool < 0 else torch.tensor([record.pool for record in records])
        return TowerState(hidden, form.layer, _pinned(valid, pin), _pinned(pool, pin), lengths=_pinned(ends, pin))

    def bytes_for(self, prefix: Prefix, pictures: int, text_tokens: int) -> int:
        """Bytes that so many pictures like those of ``prefix``, and texts of so many tokens in all, will take."""
        text, vision = Form.of(prefix.text, self.compute), Form.of(prefix.vision, self.compute)
        picture_bytes = prefix.vision.hidden.shape[1] * vision.row_bytes
        return pictures * (picture_bytes + 2 * ENTRY.itemsize) + text_tokens * text.row_bytes

    @abstractmethod
    def check_room(self, needed: int) -> None:
        """Refuse what will not fit.

        Raises:
            EpicFastError: saying how many bytes are needed and how many are free.
        """

    @abstractmethod
    def _start(self, forms: dict[str, Form]) -> None:
        """The first states are about to be kept."""

    @abstractmethod
    def _append(
        self, tower: str, digest: bytes, data: np.ndarray[Any, Any], tokens: int, pool: int, masked: bool
    ) -> _Record:
        """Keep the bytes of one record."""

    @abstractmethod
    def _data(self, record: _Record, size: int) -> np.ndarray[Any, Any] | None:
        """The bytes of a record, None where they are not there."""

    @abstractmethod
    def refresh(self) -> None:
        """Take notice of what other processes have added."""

    @abstractmethod
    def commit(self) -> None:
        """Put on the disk what is not there yet."""

    @abstractmethod
    def close(self) -> None:
        """The same, and let go of the files or the memory."""


class MemoryStore(PrefixStore):
    """Prefixes in the host's memory, page-locked where there is a GPU to take them.

    Args:
        compute: as for :class:`PrefixStore`.
        pin: whether to lock the pages.
    """

    def __init__(self, compute: torch.dtype | None = None, *, pin: bool = False):
        super().__init__(compute)
        self._pin = pin
        self._chunks: list[np.ndarray[Any, Any]] = []
        self._tensors: list[Tensor] = []
        self._end = 0

    @property
    def where(self) -> str:
        return "in memory"

    def check_room(self, needed: int) -> None:
        free = _available_memory()
        if free is not None and needed + SPARE_BYTES > free:
            raise EpicFastError(
                f"the prefix cache in memory needs {_size(needed)} more, but only {_size(free)} are free: keep it in a "
                "folder (engine.prefix_cache=FOLDER), or train without it (engine.prefix_cache=null)"
            )

    def _start(self, forms: dict[str, Form]) -> None:
        self.forms = forms

    def _append(
        self, tower: str, digest: bytes, data: np.ndarray[Any, Any], tokens: int, pool: int, masked: bool
    ) -> _Record:
        if not self._chunks or self._end + data.size > self._chunks[-1].size:
            # Untouched pages of an ordinary chunk cost nothing; locked ones would, so these start small.
            size = CHUNK_BYTES if not self._pin else min(CHUNK_BYTES, 2**22 << len(self._chunks))
            tensor = torch.empty(max(size, data.size), dtype=torch.uint8, pin_memory=self._pin)
            self._tensors.append(tensor)
            self._chunks.append(tensor.numpy())
            self._end = 0
        start, self._end = self._end, self._end + data.size
        self._chunks[-1][start : self._end] = data
        return _Record(len(self._chunks) - 1, start, tokens, pool, masked, zlib.crc32(data.data))

    def refresh(self) -> None:
        """Nobody else can add."""

    def commit(self) -> None:
        """There is no disk."""

    def close(self) -> None:
        self._chunks.clear()
        self._tensors.clear()
        self._records = {tower: {} for tower in TOWERS}

    def _data(self, record: _Record, size: int) -> np.ndarray[Any, Any] | None:
        return self._chunks[record.segment][record.offset : record.offset + size]


class DiskStore(PrefixStore):
    """Prefixes in a folder, for this run and later ones.

    Args:
        folder: made when the first prefix is kept.
        key: what the prefixes are made of but for the samples, in JSON's types: the backbone's tensors, the layers, the
            processors' settings, the type.  A folder that was made of anything else is refused.
        compute: as for :class:`PrefixStore`.

    Raises:
        ConfigError: the folder belongs to another key (naming what differs), or holds something else.
    """

    def __init__(self, folder: str | Path, key: Mapping[str, Any], compute: torch.dtype | None = None):
        super().__init__(compute)
        self.folder = Path(folder)
        self.key = json.loads(json.dumps(key))
        self._segments: list[_Segment] = []
        self._mine: _Writer | None = None
        self._ignored = 0
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"the prefix cache {self.folder} is a file; wanted a folder, or a name that is free")
        if not self._open_header() and self.folder.exists():
            strangers = [name for name in sorted(os.listdir(self.folder)) if not name.startswith(".")]
            if strangers:
                raise ConfigError(
                    f"{self.folder} is no prefix cache: it has no {HEADER}, but holds {', '.join(strangers[:3])}; "
                    "wanted an empty folder, or a name that is free"
                )
        self.refresh()

    @property
    def where(self) -> str:
        return f"in {self.folder}"

    @property
    def damaged_entries(self) -> int:
        """Entries of indexes that are damaged or whose rows are not there; their samples count as missing."""
        return self._ignored

    def check_room(self, needed: int) -> None:
        existing = next(each for each in (self.folder.absolute(), *self.folder.absolute().parents) if each.exists())
        free = shutil.disk_usage(existing).free
        if needed + SPARE_BYTES > free:
            raise EpicFastError(
                f"the disk is too small for the prefix cache {self.where}: it needs {_size(needed)} more, but only "
                f"{_size(free)} are free. Free some, choose a folder on another disk (engine.prefix_cache=FOLDER), or "
                "train without it (engine.prefix_cache=null)"
            )

    def refresh(self) -> None:
        if self.forms is None and not self._open_header():
            return
        known = {segment.name for segment in self._segments}
        for path in sorted(self.folder.glob("*.index")):
            if path.stem not in known:
                self._segments.append(_Segment(self.folder, path.stem))
        for number, segment in enumerate(self._segments):
            if self._mine is None or segment is not self._mine.segment:
                self._take(number, segment)

    def close(self) -> None:
        if self._mine is not None:
            self._written(self._mine.close)
            self._mine = None
        for segment in self._segments:
            segment.close()

    def commit(self) -> None:
        if self._mine is not None:
            self._written(self._mine.commit)

    def _take(self, number: int, segment: _Segment) -> None:
        assert self.forms is not None
        end = segment.size()
        for entry in segment.new_entries():
            if zlib.crc32(entry.tobytes()[: -ENTRY["entry_checksum"].itemsize]) != entry["entry_checksum"]:
                self._ignored += 1
                continue
            tower = TOWERS[int(entry["tower"]) % 2]
            offset, tokens = int(entry["offset"]), int(entry["tokens"])
            if offset + tokens * self.forms[tower].row_bytes > end:
                self._ignored += 1
                continue
            self._records[tower][entry["digest"].tobytes()] = _Record(
                number, offset, tokens, int(entry["pool"]), bool(entry["masked"]), int(entry["checksum"])
            )

    def _append(
        self, tower: str, digest: bytes, data: np.ndarray[Any, Any], tokens: int, pool: int, masked: bool
    ) -> _Record:
        if self._mine is None:
            self._mine = _Writer(_Segment(self.folder, f"{time.time_ns():016x}-{os.getpid()}-{uuid.uuid4().hex[:8]}"))
            self._segments.append(self._mine.segment)
        mine = self._mine
        entry = np.zeros((), ENTRY)
        entry["digest"], entry["tokens"], entry["pool"], entry["masked"] = np.void(digest), tokens, pool, masked
        entry["tower"], entry["checksum"] = TOWERS.index(tower), zlib.crc32(data.data)
        offset = self._written(lambda: mine.append(data, entry))
        return _Record(self._segments.index(mine.segment), offset, tokens, pool, masked, int(entry["checksum"]))

    def _data(self, record: _Record, size: int) -> np.ndarray[Any, Any] | None:
        return self._segments[record.segment].data(record.offset, size)

    def _written(self, write: Any) -> Any:
        try:
            return write()
        except OSError as error:
            raise EpicFastError(
                f"the prefix cache {self.where} could not be written: {error}. What was written before is whole and is "
                "used by the next run; make room on the disk, or choose another folder (engine.prefix_cache=FOLDER)"
            ) from error

    def _start(self, forms: dict[str, Form]) -> None:
        towers = {tower: asdict(form) for tower, form in forms.items()}
        content = {"library": "epic_fast", "format": FORMAT, "key": self.key, "towers": towers}
        self._written(lambda: self._write_header({**content, "checksum": _checksum(content)}))
        self._open_header()

    def _write_header(self, content: Mapping[str, Any]) -> None:
        """Whole or not at all, and never over that of another process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{HEADER}.", suffix=".tmp", dir=self.folder)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(to_json(content))
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            try:
                os.link(temporary, self.folder / HEADER)
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                temporary.replace(self.folder / HEADER)
        finally:
            temporary.unlink(missing_ok=True)

    def _open_header(self) -> bool:
        path = self.folder / HEADER
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
            content = {name: header[name] for name in ("library", "format", "key", "towers")}
            damaged = header["checksum"] != _checksum(content)
            forms = {tower: Form(**content["towers"][tower]) for tower in TOWERS}
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is damaged: {error}; remove {self.folder} and let it be filled anew") from error
        if header["format"] != FORMAT:
            raise ConfigError(
                f"the prefix cache {self.folder} has format {header['format']!r}; this version reads {FORMAT}. Remove "
                "it, or choose another folder (engine.prefix_cache=FOLDER)"
            )
        if damaged:
            raise ConfigError(f"{path} is damaged; remove {self.folder} and let it be filled anew")
        differing = describe_changes(header["key"], self.key)
        if differing:
            raise ConfigError(
                f"the prefix cache {self.folder} was made of something else and is not used: {differing}. Choose "
                "another folder (engine.prefix_cache=FOLDER), or remove that one"
            )
        self.forms = forms
        return True


class _Segment:
    """The two files that one process has written."""

    def __init__(self, folder: Path, name: str):
        self.name = name
        self.data_path, self.index_path = folder / f"{name}.data", folder / f"{name}.index"
        self._consumed = 0
        self._map: np.ndarray[Any, Any] | None = None

    def size(self) -> int:
        try:
            return self.data_path.stat().st_size
        except FileNotFoundError:
            return 0

    def new_entries(self) -> np.ndarray[Any, Any]:
        """Whole entries that came since the last call."""
        with self.index_path.open("rb") as file:
            file.seek(self._consumed)
            content = file.read()
        whole = len(content) // ENTRY.itemsize * ENTRY.itemsize
        self._consumed += whole
        return np.frombuffer(content[:whole], ENTRY)

    def data(self, offset: int, size: int) -> np.ndarray[Any, Any] | None:
        """Bytes of the memory-mapped data file, None past its end."""
        if self._map is None or offset + size > self._map.size:
            try:
                with self.data_path.open("rb") as file:
                    if os.fstat(file.fileno()).st_size < max(offset + size, 1):
                        return None
                    self._map = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            except FileNotFoundError:
                return None
        return self._map[offset : offset + size]

    def close(self) -> None:
        self._map = None


class _Writer:
    """Appends to a segment: rows first, and once they are on the disk, their entries."""

    def __init__(self, segment: _Segment):
        self.segment = segment
        self._data = os.open(segment.data_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._index = os.open(segment.index_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._end = self._indexed = self._uncommitted = 0
        self._entries: list[bytes] = []
        self._committed_at = time.monotonic()

    def append(self, data: np.ndarray[Any, Any], entry: np.ndarray[Any, Any]) -> int:
        offset = self._end
        _write_all(self._data, data.data, offset)
        entry["offset"] = offset
        entry["entry_checksum"] = zlib.crc32(entry.tobytes()[: -ENTRY["entry_checksum"].itemsize])
        self._end += data.size
        self._uncommitted += data.size
        self._entries.append(entry.tobytes())
        if self._uncommitted >= CHUNK_BYTES or time.monotonic() - self._committed_at >= COMMIT_SECONDS:
            self.commit()
        return offset

    def commit(self) -> None:
        if self._entries:
            os.fsync(self._data)
            content = b"".join(self._entries)
            _write_all(self._index, memoryview(content), self._indexed)
            os.fsync(self._index)
            self._indexed += len(content)
            self._entries.clear()
        self._uncommitted, self._committed_at = 0, time.monotonic()

    def close(self) -> None:
        try:
            self.commit()
        finally:
            os.close(self._data)
            os.close(self._index)


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any], *, most: int = 5) -> str | None:
    """What differs between two keys, in words; None where they agree."""
    missing = object()
    old, new = flat(before), flat(now)
    names = [name for name in {**old, **new} if old.get(name, missing) != new.get(name, missing)]
    if not names:
        return None
    shown = [f"{name} was {old.get(name, '(not set)')!r}, now {new.get(name, '(not set)')!r}" for name in names[:most]]
    return "; ".join(shown) + (f"; and {len(names) - most} more" if len(names) > most else "")


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Mappings in mappings as one, its names joined by dots."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, each in value.items():
        found |= flat(each, f"{prefix}.{name}" if prefix else str(name))
    return found


def _write_all(handle: int, content: memoryview, offset: int) -> None:
    content = content.cast("B")
    while content:
        written = os.pwrite(handle, content, offset)
        content, offset = content[written:], offset + written


def _pinned(value: Any, pin: bool) -> Any:
    return value.pin_memory() if pin and value is not None else value


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _describe(forms: Mapping[str, Form] | None) -> str:
    return "; ".join(
        f"{tower}: width {form.width}, {form.kept}, layer {form.layer}" for tower, form in (forms or {}).items()
    )


def _available_memory() -> int | None:
    """Bytes that the host can still give, None where it does not say."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
