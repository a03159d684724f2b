"""Pack the demo's picture-and-title data set into one small zip file.

    python examples/demo_backbone/pack_data.py SOURCE epic_fast/demo/assets/openclipart12.zip

SOURCE is a folder of pictures with a ``metadata.jsonl`` (imagefolder convention: ``file_name``, ``text``,
``label``, ``split``, ...). Every picture is put on white, shrunk to at most 192 px and stored as WebP; the
zip also holds ``metadata.jsonl`` with the new file names and ``labels.txt`` with one class a line. Nothing in
the zip depends on the clock or on the order of the folder: the same input and the same Pillow give the same
bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import zipfile
from collections import Counter
from pathlib import Path

from PIL import Image

FIELDS = ("file_name", "text", "label", "subcategory", "split", "source")
SPLIT_ORDER = {"train": 0, "validation": 1, "test": 2}
TIMESTAMP = (2020, 1, 1, 0, 0, 0)


def on_white(picture: Image.Image) -> Image.Image:
    """The picture as RGB, whatever was transparent turned white."""
    rgba = picture.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def encode(path: Path, longest: int, quality: int) -> bytes:
    """The picture as WebP bytes, its longer side at most ``longest`` pixels."""
    with Image.open(path) as picture:
        rgb = on_white(picture)
    rgb.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    rgb.save(buffer, "WEBP", quality=quality, method=6)
    return buffer.getvalue()


def pack(source: Path, destination: Path, longest: int = 192, quality: int = 85) -> dict[str, int]:
    """Write the zip (to a temporary name first) and return the number of rows in each split."""
    lines = (source / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    rows.sort(key=lambda row: (SPLIT_ORDER[row["split"]], row["label"], row["source"], row["file_name"]))
    entries: list[tuple[str, bytes]] = []
    packed_lines: list[str] = []
    for row in rows:
        name = Path(row["file_name"]).stem + ".webp"
        entries.append((name, encode(source / row["file_name"], longest, quality)))
        packed = {field: row.get(field, "") for field in FIELDS} | {"file_name": name}
        packed_lines.append(json.dumps(packed, ensure_ascii=False))
    if len({name for name, _ in entries}) != len(entries):
        raise ValueError(f"{source}: two rows share one file name")
    labels = sorted({row["label"] for row in rows})
    entries.append(("metadata.jsonl", ("\n".join(packed_lines) + "\n").encode()))
    entries.append(("labels.txt", ("\n".join(labels) + "\n").encode()))

    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_suffix(".tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted(entries):
            info = zipfile.ZipInfo(name, TIMESTAMP)
            info.create_system = 3
            info.external_attr = 0o644 << 16
            archive.writestr(info, data)
    os.replace(temporary, destination)
    return dict(Counter(row["split"] for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with the pictures and metadata.jsonl")
    parser.add_argument("destination", type=Path, help="the zip file to write")
    parser.add_argument("--longest", type=int, default=192, help="longest side in pixels (default 192)")
    parser.add_argument("--quality", type=int, default=85, help="WebP quality (default 85)")
    args = parser.parse_args()
    counts = pack(args.source, args.destination, args.longest, args.quality)
    data = args.destination.read_bytes()
    print(f"{args.destination}: {len(data):,} bytes, {counts}, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
