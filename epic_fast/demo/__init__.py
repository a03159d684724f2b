"""The demo: EPIC and its rivals on real drawings with titles, on two pretrained frozen towers, nothing to download."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run_demo(
    task: str = "classify",
    output: str | Path = "runs/demo",
    *,
    seed: int = 0,
    quick: bool = False,
    full: bool = False,
    mope: bool = False,
    json_output: bool = False,
) -> Mapping[str, Any]:
    """What ``epic-fast demo`` does; see :mod:`epic_fast.demo.run`."""
    from epic_fast.demo.run import run

    return run(task, Path(output), seed=seed, quick=quick, full=full, mope=mope, plain=json_output)
