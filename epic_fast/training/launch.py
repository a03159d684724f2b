"""One accelerate ``Accelerator`` for one call of ``fit``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from epic_fast.training.config import TrainingConfig
from epic_fast.training.predict import resolve_precision

_MIXED = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}


@contextmanager
def launched(config: TrainingConfig) -> Iterator[tuple[Any, str]]:
    """The accelerator for this run, and the precision that it has resolved.

    accelerate keeps its state in class-wide dictionaries and refuses another precision or device in the same
    process.  They are set aside here and put back at the end, so that runs of any precision follow one another and
    an accelerator of the caller's own stays whole.  A process group that exists is shared.
    """
    import torch.distributed
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import parse_flag_from_env

    kept = [AcceleratorState._shared_state, GradientState._shared_state]
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        kept.append(PartialState._shared_state)
    saved = [dict(state) for state in kept]
    for state in kept:
        state.clear()
    try:
        cpu = config.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
        device = PartialState(cpu=cpu).device
        assert device is not None
        precision = resolve_precision(config.precision, device)
        yield Accelerator(mixed_precision=_MIXED[precision], cpu=cpu), precision
    finally:
        group = torch.distributed.is_available() and torch.distributed.is_initialized()
        for state, before in zip(kept, saved, strict=True):
            if group and state is PartialState._shared_state:
                continue
            state.clear()
            state.update(before)
