"""A whole training step as one CUDA graph: forward pass, loss, backward pass, gradient norm, clipping and update.

The host decides nothing in it.  Learning rates are read from the device, where they are written before each replay.
Whether loss and norm are finite is found on the device too, and handed to fused AdamW as ``found_inf``, the way in
which a gradient scaler makes it skip: the kernel then changes neither weights nor moments and the step count is taken
back, so that after a step that is not finite everything is as it was before it.  The host reads loss and norm, once a
step, from a tensor of two numbers.

Before a graph is captured the step is rehearsed eagerly with ``found_inf`` set and its random draws given back: that
makes the optimizer's state and warms up kernels without a trace.  Every step that counts is then a replay, also the
first of each shape, so a resumed run does what the run would have done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from epic_fast.engine.graphs import (
    CAPACITY,
    Backend,
    GraphCache,
    Watch,
    hooked,
    made_of_weights,
    own_autocast_cache,
    ready,
)
from epic_fast.errors import DataError

NO_LABELS = "the training samples carry no labels (the model returned no loss); wanted 'labels' in every batch"


def why_not_captured(model: nn.Module, accelerator: Any, backend: Backend | None) -> str | None:
    """Why a run's steps cannot be graphs; None where they can."""
    if backend is None:
        return f"graphs need a CUDA device; this run is on {accelerator.device}"
    if accelerator.num_processes > 1:
        return f"{accelerator.num_processes} processes average their gradients between backward pass and update"
    if accelerator.scaler is not None:
        return "with precision 'fp16' the loss scale changes from step to step on the host; bf16 and fp32 have graphs"
    if accelerator.gradient_accumulation_steps > 1:
        return f"gradients are accumulated over {accelerator.gradient_accumulation_steps} batches"
    return hooked(model)


class CapturedStep:
    """Optimizer steps as graphs, one for each shape of a batch.

    Args:
        forward: what gives a batch's output with its ``loss``; the model, or accelerate's wrapping of it.
        model: whose memory and modes the graphs depend on.
        optimizer: AdamW with ``fused=True``, not yet wrapped; the rates in its groups are numbers, as a schedule
            writes them.
        max_grad_norm: clip the gradient to this L2 norm; None leaves it alone.
        device: of the parameters.
        backend: records the graphs.
        capacity: the most graphs kept.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        model: nn.Module,
        optimizer: AdamW,
        *,
        max_grad_norm: float | None,
        device: torch.device,
        backend: Backend,
        capacity: int = CAPACITY,
    ):
        self.forward = forward
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.device = device
        self.parameters = [each for group in optimizer.param_groups for each in group["params"]]
        self.model = model
        # [loss, norm of the gradient before clipping]
        self.report = torch.zeros(2, device=device)
        self.found_inf = torch.zeros((), device=device)
        self.rates = torch.zeros(len(optimizer.param_groups), device=device)
        self._rate_of_group = list(self.rates.unbind())
        self._written: list[float] | None = None
        optimizer.found_inf = self.found_inf  # pyright: ignore[reportAttributeAccessIssue]
        self._backend = backend
        self._before: Any = None
        self.cache = GraphCache(
            f"{type(model).__name__} (training step)",
            self._step,
            backend,
            device,
            rehearse=lambda inputs: self._step(inputs, counts=False),
            take=lambda result: None,
            depends=Watch(model).state,
            holds=lambda: made_of_weights(model),
            capacity=capacity,
        )

    def __call__(self, inputs: Mapping[str, Any]) -> tuple[float, float]:
        """One step on a batch with labels: its loss and its gradient's norm before clipping.

        Where one of them is not finite, nothing was changed but the position of the random generator.
        """
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        if rates != self._written:
            self.rates.copy_(torch.tensor(rates), non_blocking=True)
            self._written = rates
        self._before = self._backend.position()
        inputs, reason = ready(self.model, inputs)
        self.cache(inputs, reason=reason)
        loss, norm = self.report.tolist()
        return loss, norm

    def rewind(self) -> None:
        """Give the random draws of the last step back, so that it can be looked at once more."""
        self._backend.restore(self._before)

    def _step(self, inputs: Mapping[str, Any], *, counts: bool = True) -> None:
        # A gradient from elsewhere would be added to, and its memory would become a part of the graph.
        self.optimizer.zero_grad(set_to_none=True)
        with own_autocast_cache():
            out = self.forward(**inputs)
            if out.loss is None:
                raise DataError(NO_LABELS)
            # In this thread: the stream, the graph and the device are all known here, and no hand-over is paid for.
            with torch.autograd.set_multithreading_enabled(False):
                out.loss.backward()
        norm = torch.nn.utils.get_total_norm([each.grad for each in self.parameters if each.grad is not None])
        loss = out.loss.detach().float()
        self.report.copy_(torch.stack([loss, norm.to(loss)]))
        if counts:
            self.found_inf.copy_(1.0 - torch.isfinite(self.report).all().float())
        else:
            self.found_inf.fill_(1.0)
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        with self._rates_on_device():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        groups = self.optimizer.param_groups
        kept: list[float | Tensor] = [group["lr"] for group in groups]
        # The optimizer asks for the flag when it is captured, and warns of it when it is not; fused, they are the same.
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        try:
            for group, rate in zip(groups, self._rate_of_group, strict=True):
                group["lr"], group["capturable"] = rate, capturing
            yield
        finally:
            for group, rate in zip(groups, kept, strict=True):
                group["lr"], group["capturable"] = rate, False
