"""Settings of ``pytest benchmarks --benchmark-only``."""

from __future__ import annotations

import os

import pytest
import torch

collect_ignore_glob: list[str] = []
try:
    import pytest_benchmark  # noqa: F401
except ImportError:
    collect_ignore_glob.append("test_*.py")

if not torch.cuda.is_available():
    # Read when triton is imported: without a GPU only the cost of reaching a kernel is measured, in front of none.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
