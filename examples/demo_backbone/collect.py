"""Gather the pictures and titles that the demo's vision tower is trained on, without class labels.

    python examples/demo_backbone/collect.py --openclipart usr/share/openclipart \\
        --icons icons/noto icons/noto-v1 ... --held-out epic_fast/demo/assets/openclipart12.zip \\
        --output pictures.zip

Every picture is squashed to a square of 192 px and stored as WebP with its transparency; ``metadata.jsonl`` in the
zip has one line a picture: ``file_name``, ``text`` (the title), ``collection``, ``source``.

Left out is whatever could leak the validation or test split of the held-out data set: a picture made from the
same source file, one with the same normalised title, one with the same pixels, and one that looks nearly the same
(``NEAR``). Looks are compared on thumbnails of the drawn part alone, each brought to mean 0 and length 1, so that
two thin drawings on much white do not count as alike for their white.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import io
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 192
NEAR = 0.95  # correlation of two thumbnails from which on they count as the same picture
THUMBNAIL = 24
Image.MAX_IMAGE_PIXELS = None  # some of openclipart's PNG files have over 200 million pixels
TIMESTAMP = (2020, 1, 1, 0, 0, 0)
# Whole series of look-alikes: one picture in four is kept.
SERIES = re.compile(r"/flags?/|/cards/|(^|/)flag-")
# Variants of an icon that add nothing to the first one: skin tones, outlines, other sizes.
VARIANT = re.compile(r"-(medium-)?(light|dark|medium)(-skin-tone)?(-|$)|-skin-tone|-outline|-negative|-24px|-?(11|15)$")


@dataclass
class Item:
    """One candidate: an RGBA picture (SIDE x SIDE), its title and where it comes from."""

    picture: Image.Image
    text: str
    collection: str
    source: str


def normalise(title: str) -> str:
    """Lower case, letters and digits alone, single blanks."""
    return " ".join(re.findall(r"[^\W_]+", title.lower()))


def square(picture: Image.Image) -> Image.Image:
    """The whole picture squashed to SIDE x SIDE (Pillow premultiplies RGBA here, so no halo appears)."""
    rgba = picture.convert("RGBA")
    return rgba.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)


def on_white(picture: Image.Image) -> Image.Image:
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


def fingerprint(picture: Image.Image) -> str:
    """A hash of the picture as it looks on white."""
    return hashlib.sha256(on_white(picture).tobytes()).hexdigest()


def thumbnail(picture: Image.Image) -> np.ndarray:
    """The drawn part of the picture as a vector of mean 0 and length 1."""
    rgb = np.asarray(on_white(picture), dtype=np.float32)
    drawn = (rgb < 245).any(axis=-1)
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    box = (0, 0, *picture.size)
    if len(rows) and len(columns):
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    small = on_white(picture).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX, box=box)
    vector = np.asarray(small, dtype=np.float32).ravel()
    vector = vector - vector.mean()
    return vector / max(float(np.linalg.norm(vector)), 1e-6)


def openclipart(root: Path) -> Iterator[Item]:
    """The PNG files of Debian's openclipart-png with the titles in openclipart-svg."""
    for path in sorted((root / "png").rglob("*.png")):
        source = path.relative_to(root / "png").with_suffix(".svg").as_posix()
        svg = (root / "svg" / source).read_text(encoding="utf-8", errors="replace")
        found = re.search(r"<dc:title>\s*([^<]*?)\s*</dc:title>", svg)
        title = html.unescape(found.group(1)) if found else ""
        with Image.open(path) as picture:
            yield Item(square(picture), title or path.stem.replace("_", " "), "openclipart", source)


def icons(folder: Path) -> Iterator[Item]:
    """An icon set in Iconify's JSON format; the title is the icon's name."""
    import resvg_py

    data = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    prefix = data["prefix"]
    for name, icon in sorted(data["icons"].items()):
        if VARIANT.search(name):
            continue
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", data.get("width", 16))
        height = icon.get("height", data.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="black" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True))
        with Image.open(io.BytesIO(png)) as picture:
            yield Item(square(picture), name.replace("-", " "), prefix, f"{prefix}/{name}")


class Filter:
    """Says of every candidate whether it may be used, and why not."""

    def __init__(self, held_out: Path, root: Path) -> None:
        with zipfile.ZipFile(held_out) as archive:
            rows = [json.loads(line) for line in archive.read("metadata.jsonl").decode().splitlines()]
        rows = [row for row in rows if row["split"] != "train"]
        self.sources = {row["source"] for row in rows}
        self.titles = {normalise(row["text"]) for row in rows}
        self.pixels: set[str] = set()
        self.seen: set[str] = set()
        thumbnails = []
        for row in rows:
            with Image.open((root / "png" / row["source"]).with_suffix(".png")) as picture:
                squared = square(picture)
            self.pixels.add(fingerprint(squared))
            thumbnails.append(thumbnail(squared))
        self.thumbnails = np.stack(thumbnails)
        self.reference = [row["source"] for row in rows]
        self.near: list[tuple[str, str, float]] = []

    def reason(self, item: Item) -> str:
        """Empty if the candidate may be used."""
        if item.source in self.sources:
            return "held-out file"
        if normalise(item.text) in self.titles:
            return "held-out title"
        key = fingerprint(item.picture)
        if key in self.pixels:
            return "held-out pixels"
        if key in self.seen:
            return "duplicate"
        self.seen.add(key)
        likeness = self.thumbnails @ thumbnail(item.picture)
        best = int(likeness.argmax())
        if likeness[best] >= NEAR:
            self.near.append((item.source, self.reference[best], float(likeness[best])))
            return "looks like a held-out picture"
        if SERIES.search(item.source) and int(hashlib.sha256(item.source.encode()).hexdigest(), 16) % 4:
            return "thinned series"
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--openclipart", type=Path, required=True, help="folder with png/ and svg/")
    parser.add_argument("--icons", type=Path, nargs="*", default=[], help="folders with an icons.json each")
    parser.add_argument("--held-out", type=Path, required=True, help="zip made by pack_data.py")
    parser.add_argument("--output", type=Path, required=True, help="zip to write")
    parser.add_argument("--quality", type=int, default=70, help="WebP quality (default 70)")
    parser.add_argument("--limit", type=int, help="stop after this many pictures of each collection")
    args = parser.parse_args()

    keep = Filter(args.held_out, args.openclipart)
    counts: dict[str, Counter[str]] = {}
    temporary = args.output.with_suffix(".tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        lines = []
        for candidates in [openclipart(args.openclipart), *(icons(folder) for folder in args.icons)]:
            for item in candidates:
                tally = counts.setdefault(item.collection, Counter())
                if args.limit and tally["used"] >= args.limit:
                    break
                why = keep.reason(item)
                tally[why or "used"] += 1
                if why:
                    continue
                buffer = io.BytesIO()
                item.picture.save(buffer, "WEBP", quality=args.quality, alpha_quality=80, method=4)
                name = f"{len(lines):05d}.webp"
                archive.writestr(zipfile.ZipInfo(name, TIMESTAMP), buffer.getvalue())
                row = {
                    "file_name": name,
                    "text": item.text,
                    "collection": item.collection,
                    "source": item.source,
                }
                lines.append(json.dumps(row, ensure_ascii=False))
        archive.writestr(zipfile.ZipInfo("metadata.jsonl", TIMESTAMP), "\n".join(lines) + "\n")
    os.replace(temporary, args.output)
    summary = {name: dict(tally) for name, tally in counts.items()}
    args.output.with_suffix(".json").write_text(
        json.dumps({"pictures": len(lines), "collections": summary, "near": keep.near}, indent=1)
    )
    print(json.dumps(summary, indent=1))
    print(f"{args.output}: {len(lines)} pictures, {args.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
