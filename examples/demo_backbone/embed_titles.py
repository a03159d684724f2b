"""Embed the titles of a zip of pictures with all-MiniLM-L6-v2 (mean-pooled, length 1).

python examples/demo_backbone/embed_titles.py pictures.zip titles.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import read_rows, title_features
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pictures", type=Path, help="zip with a metadata.jsonl")
    parser.add_argument("output", type=Path, help="safetensors file to write")
    args = parser.parse_args()
    titles = [row["text"] for row in read_rows(args.pictures)]
    distinct = sorted(set(titles))
    embedded = torch.nn.functional.normalize(title_features(distinct), dim=-1)
    position = {title: index for index, title in enumerate(distinct)}
    rows = torch.tensor([position[title] for title in titles])
    save_file({"titles": embedded[rows].half().contiguous()}, args.output)
    print(f"{args.output}: {len(titles)} titles, {len(distinct)} distinct")


if __name__ == "__main__":
    main()
