"""The rivals on frozen features: majority class, linear probes, a small MLP, the cosine of aligned features."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

L2_GRID = tuple(10.0**exponent for exponent in range(-4, 2))


@dataclass
class Result:
    """One row of the demo's table.

    Attributes:
        name: of the method.
        predictions: ``(n,)`` class ids on the test pairs.
        trainable: parameters trained.
        total: parameters of the whole model, frozen ones included.
        seconds: of training, the search on validation included.
        validation: accuracy there, by which settings and epochs were chosen.
        chosen: those settings.
    """

    name: str
    predictions: Tensor
    trainable: int
    total: int
    seconds: float
    validation: float
    chosen: dict[str, float]


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Share of equal entries."""
    return float((predictions == labels).double().mean())


class Standardise:
    """Features to mean 0 and deviation 1 over the training rows."""

    def __init__(self, features: Tensor):
        self.mean = features.mean(dim=0)
        self.deviation = features.std(dim=0).clamp_min(1e-6)

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.deviation


def majority(labels: dict[str, Tensor]) -> Result:
    """Whatever the training set has most of."""
    best = int(labels["train"].bincount().argmax())
    validation = accuracy(torch.full_like(labels["validation"], best), labels["validation"])
    return Result("majority class", torch.full_like(labels["test"], best), 0, 0, 0.0, validation, {})


def linear_probe(name: str, features: dict[str, Tensor], labels: dict[str, Tensor], num_labels: int) -> Result:
    """Multinomial logistic regression on standardised features, L2 chosen on validation.

    Args:
        features, labels: by split, ``(n, F)`` and ``(n,)``.
    """
    started = time.perf_counter()
    standardise = Standardise(features["train"])
    inputs = {split: standardise(each) for split, each in features.items()}
    best: tuple[float, float, nn.Linear] | None = None
    for penalty in L2_GRID:
        linear = _logistic_regression(inputs["train"], labels["train"], num_labels, penalty)
        score = accuracy(linear(inputs["validation"]).argmax(dim=1), labels["validation"])
        if best is None or score > best[0]:
            best = (score, penalty, linear)
    assert best is not None
    score, penalty, linear = best
    trainable = sum(parameter.numel() for parameter in linear.parameters())
    predictions = linear(inputs["test"]).argmax(dim=1)
    return Result(name, predictions, trainable, 0, time.perf_counter() - started, score, {"l2": penalty})


def _logistic_regression(inputs: Tensor, labels: Tensor, num_labels: int, penalty: float) -> nn.Linear:
    linear = nn.Linear(inputs.shape[1], num_labels, dtype=inputs.dtype, device=inputs.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(linear(inputs), labels) + 0.5 * penalty * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return linear.requires_grad_(False)


@dataclass(frozen=True)
class MlpSettings:
    """Of the small MLP; ``search`` are the values of dropout and weight decay tried on validation."""

    hidden_size: int = 256
    epochs: int = 40
    batch_size: int = 64
    learning_rate: float = 1e-3
    search: tuple[tuple[float, float], ...] = ((0.2, 1e-2), (0.5, 1e-2), (0.5, 1e-1))


def mlp(
    name: str,
    draw: Callable[[int], tuple[Tensor, Tensor]],
    validation: tuple[Tensor, Tensor],
    test: Tensor,
    num_labels: int,
    *,
    seed: int,
    settings: MlpSettings | None = None,
) -> Result:
    """One hidden layer on standardised features; dropout, weight decay and epoch chosen on validation.

    Args:
        draw: epoch to training features ``(n, F)`` and labels ``(n,)``.
        validation: features and labels.
        test: features.
    """
    settings = settings or MlpSettings()
    started = time.perf_counter()
    inputs, _ = draw(0)
    standardise = Standardise(inputs)
    device = inputs.device
    validation_inputs, test_inputs = standardise(validation[0]), standardise(test)
    best: tuple[float, Tensor, dict[str, float]] | None = None
    trainable = 0
    for dropout, decay in settings.search:
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(inputs.shape[1], settings.hidden_size),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(settings.hidden_size, num_labels),
        ).to(device)
        trainable = sum(parameter.numel() for parameter in net.parameters())
        optimizer = torch.optim.AdamW(net.parameters(), lr=settings.learning_rate, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
        for epoch in range(settings.epochs):
            features, labels = draw(epoch)
            features = standardise(features)
            net.train()
            for batch in torch.randperm(len(features), generator=generator).to(device).split(settings.batch_size):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(features[batch]), labels[batch]).backward()
                optimizer.step()
            schedule.step()
            net.eval()
            with torch.no_grad():
                score = accuracy(net(validation_inputs).argmax(dim=1), validation[1])
                if best is None or score > best[0]:
                    chosen = {"dropout": dropout, "weight_decay": decay, "epoch": epoch + 1.0}
                    best = (score, net(test_inputs).argmax(dim=1), chosen)
    assert best is not None
    score, predictions, chosen = best
    return Result(name, predictions, trainable, 0, time.perf_counter() - started, score, chosen)


def cosine(pairs: dict[str, tuple[Tensor, Tensor]], labels: dict[str, Tensor]) -> Result:
    """Match where the cosine of aligned features passes a threshold chosen on training and validation pairs."""
    started = time.perf_counter()
    scores = {split: nn.functional.cosine_similarity(*each, dim=1) for split, each in pairs.items()}
    fit = torch.cat([scores["train"], scores["validation"]])
    truth = torch.cat([labels["train"], labels["validation"]])
    order = fit.argsort()
    # Above position k all is called a match: right are the negatives below it and the positives from it on.
    right = torch.cat([truth.new_zeros(1), (1 - truth[order]).cumsum(0)]) + torch.cat(
        [truth[order].flip(0).cumsum(0).flip(0), truth.new_zeros(1)]
    )
    cut = int(right.argmax())
    candidates = torch.cat([fit[order[:1]] - 1, (fit[order[1:]] + fit[order[:-1]]) / 2, fit[order[-1:]] + 1])
    threshold = float(candidates[cut])
    validation = accuracy((scores["validation"] > threshold).long(), labels["validation"])
    predictions = (scores["test"] > threshold).long()
    seconds = time.perf_counter() - started
    return Result("cosine of the aligned features", predictions, 1, 0, seconds, validation, {"threshold": threshold})
