"""Settings that every test shares."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Whether somebody has built it on this machine decides nothing; its own tests build it.
os.environ.setdefault("EPIC_FAST_NATIVE", "0")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Read when triton is imported: kernels then run in its interpreter, on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def no_plans() -> None:
    """Launches are planned once for all calls alike: no test is to find the kernels that another one patched."""
    plan = sys.modules.get("epic_fast.kernels.common.plan")
    if plan is not None:
        plan.forget()


settings.register_profile("epic_fast", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("epic_fast")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
