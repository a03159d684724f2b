"""The demo's two tasks: which pairs, which labels, and every rival on frozen features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from epic_fast.demo.frozen import FrozenPairs
from epic_fast.demo.pairs import MatchPairs, OwnTitles, Pairs
from epic_fast.demo.rivals import Result, cosine, linear_probe, majority, mlp

# Fixed pairs for judging: each picture of the split with its own title, and with one of another picture.
VALIDATION_REPEATS = 3
JUDGED_SAME_CLASS = 0.5


@dataclass
class Task:
    """A task on the demo's pairs.

    Attributes:
        name: ``"classify"`` or ``"match"``.
        labels: names of the classes.
        train: training pairs, which may be drawn anew for each epoch.
        validation: fixed pairs by which settings and epochs are chosen.
        test: fixed pairs, answered once.
        groups: parts of the test pairs that are reported apart, by name, as boolean masks ``(n,)``.
    """

    name: str
    labels: list[str]
    train: OwnTitles | MatchPairs
    validation: Pairs
    test: Pairs
    groups: dict[str, Tensor]


def classify_task(frozen: FrozenPairs, seed: int) -> Task:
    """Which of the 12 classes?"""
    return Task(
        "classify",
        frozen.names,
        OwnTitles(frozen, "train", seed=seed, fresh=True),
        OwnTitles(frozen, "validation"),
        OwnTitles(frozen, "test"),
        {},
    )


def match_task(frozen: FrozenPairs, seed: int, *, same_class: float = 0.5) -> Task:
    """Does this title describe this picture?

    The test pairs are each picture with its own title, with one of any other picture, and with one of another
    picture of its class: two sets of as many own as other titles, reported apart.

    Args:
        seed: of the training pairs; validation and test pairs never change.
        same_class: share of same-class titles among the training negatives.
    """
    any_class = MatchPairs(frozen, "test", same_class=0.0)
    same = MatchPairs(frozen, "test", same_class=1.0, seed=1)
    test = Pairs(
        torch.cat([any_class.pictures, same.pictures]),
        torch.cat([any_class.titles, same.titles]),
        torch.cat([any_class.labels, same.labels]),
    )
    from_any = torch.arange(len(test)) < len(any_class)
    return Task(
        "match",
        ["another's title", "own title"],
        MatchPairs(frozen, "train", same_class=same_class, seed=seed, fresh=True),
        MatchPairs(frozen, "validation", same_class=JUDGED_SAME_CLASS, repeats=VALIDATION_REPEATS),
        test,
        {"any class": from_any, "same class": ~from_any},
    )


Features = Callable[[Pairs], Tensor]


def rivals(frozen: FrozenPairs, task: Task, seed: int) -> Iterator[Result]:
    """Every rival of a task, one after the other."""

    def text(pairs: Pairs) -> Tensor:
        return frozen.text[pairs.titles.to(frozen.device)]

    def vision(pairs: Pairs) -> Tensor:
        return frozen.vision[pairs.pictures.to(frozen.device)]

    def both(pairs: Pairs) -> Tensor:
        return torch.cat([vision(pairs), text(pairs)], dim=1)

    task.train.set_epoch(0)
    splits: dict[str, Pairs] = {"train": task.train, "validation": task.validation, "test": task.test}
    labels = {name: pairs.labels.to(frozen.device) for name, pairs in splits.items()}
    classes = len(task.labels)
    yield majority(labels)
    if task.name == "classify":
        for name, features in (("linear probe, picture", vision), ("linear probe, title", text)):
            yield linear_probe(name, {split: features(each) for split, each in splits.items()}, labels, classes)
    yield linear_probe("linear probe, both", {split: both(each) for split, each in splits.items()}, labels, classes)
    candidates: list[tuple[str, Features]] = [("MLP on frozen features", both)]
    if task.name == "match":
        aligned = frozen.aligned_vision()

        def in_title_space(pairs: Pairs) -> tuple[Tensor, Tensor]:
            return aligned[pairs.pictures.to(frozen.device)], text(pairs)

        def compared(pairs: Pairs) -> Tensor:
            u, v = (torch.nn.functional.normalize(each, dim=1) for each in in_title_space(pairs))
            return torch.cat([u, v, u * v, (u - v).abs()], dim=1)

        yield cosine({split: in_title_space(each) for split, each in splits.items()}, labels)
        candidates.append(("MLP on [u, v, u·v, |u−v|], aligned", compared))
    for name, features in candidates:

        def draw(epoch: int, features: Features = features) -> tuple[Tensor, Tensor]:
            task.train.set_epoch(epoch)
            return features(task.train), task.train.labels.to(frozen.device)

        validation = (features(task.validation), labels["validation"])
        yield mlp(name, draw, validation, features(task.test), classes, seed=seed)
