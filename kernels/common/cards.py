"""What a card has, asked once for each: what tables of tile sizes look at."""

# pyright: basic

from __future__ import annotations

import functools

import torch

# The data-centre cards have this or less; the interpreter counts as one of them.
_MOST_SHARED = 232448


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may have."""
    if device.type != "cuda":
        return _MOST_SHARED
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the card; the interpreter counts as a card with two."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether this is a card with wgmma and the shared memory that Hopper's kernels count on."""
    return _capability(device) == (9, 0)


@functools.cache
def has_descriptors(device: torch.device) -> bool:
    """Whether the card copies tiles by tensor descriptors (Hopper and newer)."""
    return _capability(device)[0] >= 9


def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA card; zeros for all others."""
    if device.type != "cuda" or torch.version.hip:
        return 0, 0
    return torch.cuda.get_device_capability(device)
