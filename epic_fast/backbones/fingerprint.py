"""Which weights an adapter was trained on: a digest of every tensor of the backbone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def tensor_digest(tensor: Tensor) -> str:
    """Digest of type, shape and bits of a tensor, 16 hexadecimal digits."""
    digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=8)
    flat = tensor.detach().cpu().contiguous().view(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(module: nn.Module) -> dict[str, str]:
    """Name and digest of every parameter and persistent buffer of a module."""
    return {name: tensor_digest(tensor) for name, tensor in sorted(module.state_dict().items())}


def describe_difference(recorded: Mapping[str, str], given: Mapping[str, str], *, most: int = 5) -> str | None:
    """What differs between two fingerprints, in words; None where they agree."""
    missing = [name for name in recorded if name not in given]
    added = [name for name in given if name not in recorded]
    changed = [name for name in recorded if name in given and recorded[name] != given[name]]
    if not missing and not added and not changed:
        return None
    parts = []
    for names, what in ((changed, "differ"), (missing, "are missing"), (added, "are new")):
        if names:
            shown = ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
            parts.append(f"{len(names)} of {len(recorded)} tensors {what}: {shown}")
    return "; ".join(parts)
