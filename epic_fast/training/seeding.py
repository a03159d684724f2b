"""Randomness that can be named: every draw follows from the run's seed and from what it is drawn for."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def derived_seed(seed: int, *words: str | int) -> int:
    """A seed below 2^63 for one purpose: a hash of the run's seed and of the words that name the purpose."""
    text = "\x1f".join(str(each) for each in (seed, *words))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch on the CPU and on every GPU."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - data sets of other people draw from the old global generator
    torch.manual_seed(seed)


def seed_host(seed: int) -> None:
    """Seed Python, NumPy and PyTorch's CPU generator, and leave the GPUs alone."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)


def host_randomness() -> tuple[Any, ...]:
    """Where the generators of the CPU stand: equal as long as nothing is drawn."""
    _, keys, *rest = np.random.get_state()  # noqa: NPY002  # pyright: ignore
    return random.getstate(), np.asarray(keys).tobytes(), rest, torch.get_rng_state().numpy().tobytes()


@contextmanager
def host_randomness_kept() -> Iterator[None]:
    """Give the generators of the CPU back as they were, whatever is drawn inside."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def randomness(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of all generators as tensors (for safetensors) and plain values (for JSON)."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002  # pyright: ignore
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "python": torch.tensor(words, dtype=torch.int64),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    values = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {
            "name": str(name),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gaussian": float(cached),
        },
    }
    return tensors, values


def restore_randomness(tensors: dict[str, Tensor], values: dict[str, Any], device: torch.device) -> None:
    """The inverse of :func:`randomness`."""
    python, numpy = values["python"], values["numpy"]
    random.setstate((python["version"], tuple(tensors["python"].tolist()), python["gauss"]))
    np.random.set_state(  # noqa: NPY002
        (
            numpy["name"],
            tensors["numpy"].numpy().astype(np.uint32),
            numpy["position"],
            numpy["has_gauss"],
            numpy["cached_gaussian"],
        )
    )
    torch.set_rng_state(tensors["torch"].to(torch.uint8))
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"].to(torch.uint8), device)
