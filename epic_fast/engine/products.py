"""Products of rows of any shape with a frozen weight, forward and backward."""

from __future__ import annotations

from torch import Tensor

from epic_fast.ops.frozen_linear import linear_backward, linear_forward


def product(
    rows: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None = None, keep: str = "none"
) -> tuple[Tensor, Tensor | None]:
    """``act(rows @ weight.T + bias)`` of ``(..., K)``: ``(..., N)``, and what backward needs of the activation."""
    output, kept = linear_forward(rows.flatten(0, -2), weight, bias, activation=activation, keep=keep)
    return output.view(*rows.shape[:-1], len(weight)), kept


def product_backward(
    grad: Tensor, weight: Tensor, *, kept: Tensor | None = None, keep: str = "none", activation: str | None = None
) -> Tensor:
    """The gradient of the rows ``(..., K)`` from that of the output ``(..., N)``, through an activation below it."""
    found = linear_backward(grad.flatten(0, -2), weight, kept=kept, keep=keep, activation=activation)
    return found.view(*grad.shape[:-1], weight.shape[1])
