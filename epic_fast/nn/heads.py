"""From pooled features to logits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from epic_fast.errors import ConfigError


class FeatureNorm(nn.Module):
    """What is done to features before a head: nothing, a layer norm without parameters, or standardisation.

    Standardisation uses the mean and deviation of each feature over the training set, measured once before
    training (:meth:`fit`) and saved with the head, so a sample's result never depends on its batch.

    Args:
        width: number of features.
        kind: ``"none"``, ``"layer"`` or ``"standardize"``.
    """

    mean: Tensor
    deviation: Tensor
    fitted: Tensor

    def __init__(self, width: int, kind: str = "none"):
        super().__init__()
        self.kind = kind
        if kind == "standardize":
            self.register_buffer("mean", torch.zeros(width))
            self.register_buffer("deviation", torch.ones(width))
            self.register_buffer("fitted", torch.tensor(False))

    @property
    def needs_statistics(self) -> bool:
        return self.kind == "standardize" and not bool(self.fitted)

    @torch.no_grad()
    def fit(self, features: Iterable[Tensor]) -> None:
        """Take mean and deviation from batches of features ``(b, width)``."""
        count, total, squares = 0, None, None
        for batch in features:
            batch = batch.double()
            count += len(batch)
            total = batch.sum(dim=0) if total is None else total + batch.sum(dim=0)
            squares = (batch**2).sum(dim=0) if squares is None else squares + (batch**2).sum(dim=0)
        if total is None or squares is None or count < 2:
            raise ConfigError(f"feature statistics need at least two samples; {count} were given")
        mean = total / count
        variance = (squares / count - mean**2).clamp_min(0.0)
        self.mean.copy_(mean)
        # A feature that never varies carries nothing: leave it at zero instead of dividing by it.
        self.deviation.copy_(torch.where(variance > 1e-12, variance.sqrt(), torch.ones_like(variance)))
        self.fitted.fill_(True)

    def forward(self, features: Tensor) -> Tensor:
        if self.kind == "layer":
            return nn.functional.layer_norm(features, features.shape[-1:])
        if self.kind == "standardize":
            return (features - self.mean) / self.deviation
        return features


class Head(nn.Module):
    """Normalise, drop out, and map features to logits in float32.

    Args:
        width: number of features.
        num_labels: K.
        kind: ``"linear"`` or ``"mlp"`` (one hidden layer with GELU).
        hidden_size: width of the hidden layer of ``"mlp"``.
        dropout: share of features dropped in training (and of hidden units of ``"mlp"``).
        norm: ``kind`` of :class:`FeatureNorm`.
    """

    def __init__(
        self,
        width: int,
        num_labels: int,
        *,
        kind: str = "linear",
        hidden_size: int = 256,
        dropout: float = 0.0,
        norm: str = "none",
    ):
        super().__init__()
        self.norm = FeatureNorm(width, norm)
        if kind == "linear":
            self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, num_labels))
        else:
            self.classifier = nn.Sequential(
                nn.Dropout(dropout),
                nn.Linear(width, hidden_size),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(hidden_size, num_labels),
            )

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(B, width)`` to logits ``(B, K)``, float32; float64 where the head was converted to it."""
        output = self.classifier[-1]
        assert isinstance(output, nn.Linear)
        wide = torch.promote_types(output.weight.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            return self.classifier(self.norm(features.to(wide)).to(output.weight.dtype)).to(wide)
