"""COCO's segmentations to masks: polygons, and run lengths as numbers or packed into a string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from epic_fast.data.metadata import is_number, shorten
from epic_fast.errors import DataError


def coco_mask(segmentation: Any, height: int, width: int, where: str = "a segmentation") -> np.ndarray:
    """A segmentation of COCO's annotations as booleans ``(height, width)``.

    Args:
        segmentation: polygons ``[[x0, y0, x1, y1, ...], ...]``, whose union it is, or run lengths
            ``{"size": [height, width], "counts": [...] or "..."}``.
        where: what it is called in a message.

    A pixel belongs to a polygon where its centre does (inside by the even-odd rule).

    Raises:
        DataError: neither of these, or one that does not fit the size.
    """
    if isinstance(segmentation, dict):
        return _from_runs(segmentation, height, width, where)
    if not isinstance(segmentation, list) or not all(isinstance(each, list) for each in segmentation):
        raise DataError(
            f"{where}: {shorten(segmentation)}; wanted a list of polygons [[x, y, x, y, ...]], or run lengths "
            '{"size": [height, width], "counts": ...}'
        )
    mask = np.zeros((height, width), dtype=bool)
    for polygon in segmentation:
        if len(polygon) < 6 or len(polygon) % 2 or not all(map(is_number, polygon)):
            raise DataError(f"{where}: the polygon {shorten(polygon)}; wanted x, y of three corners or more")
        mask |= _inside(np.asarray(polygon, dtype=np.float64).reshape(-1, 2), height, width)
    return mask


def _inside(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels whose centres lie in a polygon: those with an odd number of edges to their left."""
    crossings = np.zeros((height, width + 1), dtype=np.int64)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y0 == y1:
            continue
        low, high = min(y0, y1), max(y0, y1)
        rows = np.arange(max(int(np.ceil(low - 0.5)), 0), min(int(np.ceil(high - 0.5)), height))
        across = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
        columns = np.clip(np.ceil(across - 0.5), 0, width).astype(np.int64)
        np.add.at(crossings, (rows, columns), 1)
    return np.cumsum(crossings, axis=1)[:, :width] % 2 == 1


def _from_runs(segmentation: dict[str, Any], height: int, width: int, where: str) -> np.ndarray:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        raise DataError(f"{where}: run lengths of size {size}, but its picture has [{height}, {width}]")
    if isinstance(counts, (str, bytes)):
        counts = unpack_counts(counts, where)
    if not isinstance(counts, list) or not all(type(each) is int and each >= 0 for each in counts):
        raise DataError(f"{where}: counts {shorten(counts)}; wanted whole numbers, or a string that packs them")
    if sum(counts) != height * width:
        raise DataError(f"{where}: run lengths of {sum(counts)} pixels in all, wanted {height} x {width}")
    return _runs(counts).reshape(width, height).T


def _runs(counts: Sequence[int]) -> np.ndarray:
    """Runs of False and True in turn, False first."""
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts)


def unpack_counts(text: str | bytes, where: str = "a segmentation") -> list[int]:
    """The run lengths in COCO's packed string: 5 bits a character, from the third on as differences to the one before
    the last.

    Raises:
        DataError: characters that no such string has, or one that ends within a number.
    """
    codes = text.encode("latin-1", "replace") if isinstance(text, str) else text
    counts: list[int] = []
    value = shift = 0
    for code in codes:
        part = code - 48
        if not 0 <= part < 64:
            raise DataError(f"{where}: packed run lengths with the character {chr(code)!r}; fetch the file again")
        value |= (part & 31) << shift
        shift += 5
        if part & 32:
            continue
        if part & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise DataError(f"{where}: packed run lengths that end within a number; fetch the file again")
    return counts
