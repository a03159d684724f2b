"""Which settings the demo takes: many short trainings on the demo's two tasks, judged on validation alone.

    python -m benchmarks.demo_search --round 1 --processes 12 --output FILE.jsonl [--only NAME ...]
    python -m benchmarks.demo_search --best FILE.jsonl        # mean validation of each name, the best first

Every line of FILE holds a name, its overrides, seed and scores.  The test split is scored too, so that the choice
can be held against it afterwards; nothing here reads it to choose.  Pictures are read once, and the processes share
what the frozen towers made of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, multiprocessing

from benchmarks import timing


@dataclass
class Trial:
    """One training: overrides of the base recipe of its task."""

    name: str
    task: str
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    method: str = "epic"


BASE_CONFIG = {
    "num_layer_pairs": 3,
    "prompt_length": 8,
    "text_head_input": "mean",
    "vision_head_input": "cls+mean",
    "feature_norm": "standardize",
    "head_dropout": 0.5,
}
BASE_TRAINING = {"batch_size": 128, "head_learning_rate": 1e-3, "epochs": 15, "precision": "fp32"}


def run(trial: Trial, backbone: Any, frozen: Any) -> dict[str, Any]:
    """Train and score one trial."""
    from epic_fast.demo.prompted import train_prompted
    from epic_fast.demo.tasks import classify_task, match_task, rivals

    if "views" in trial.data:
        frozen = replace(frozen, views=frozen.views[:, : 1 + trial.data["views"]])
    same_class = trial.data.get("same_class", 0.5)
    task = classify_task(frozen, trial.seed + 1)
    if trial.task == "match":
        task = match_task(frozen, trial.seed + 1, same_class=same_class)
    if trial.name == "rivals":
        scores = {each.name: {"validation": each.validation, **test_scores(task, each), **each.chosen} for each in
                  rivals(frozen, task, trial.seed)}  # fmt: skip
        return {"name": trial.name, "task": trial.task, "seed": trial.seed, "scores": scores}
    result, extra = train_prompted(recipe_of(trial), backbone, frozen, task, seed=trial.seed)
    history = [(round(row["train_loss"], 4), row["validation"]["accuracy"]) for row in extra["history"]]
    return {
        "name": trial.name,
        "task": trial.task,
        "seed": trial.seed,
        "config": trial.config,
        "training": trial.training,
        "data": trial.data,
        "validation": result.validation,
        "test": test_scores(task, result),
        "epoch": result.chosen["epoch"],
        "seconds": result.seconds,
        "trainable": result.trainable,
        "history": history,
        "diagnostics": extra["diagnostics"],
    }


def recipe_of(trial: Trial) -> Any:
    """The recipe that a trial trains."""
    from epic_fast.demo.recipes import MOPE_READS, MOPE_TRAINING, Recipe
    from epic_fast.models import EpicConfig, MopeConfig
    from epic_fast.training import TrainingConfig

    if trial.method == "mope":
        training = {**MOPE_TRAINING[trial.task], **trial.training}
        return Recipe(trial.name, MopeConfig(**{**MOPE_READS, **trial.config}), TrainingConfig(**training))
    training = {**BASE_TRAINING, **trial.training}
    return Recipe(trial.name, EpicConfig(**{**BASE_CONFIG, **trial.config}), TrainingConfig(**training))


def test_scores(task: Any, result: Any) -> dict[str, float]:
    """Accuracy on the test pairs and on their parts."""
    right = (result.predictions.cpu() == task.test.labels).double()
    return {"test": float(right.mean()), **{name: float(right[mask].mean()) for name, mask in task.groups.items()}}


def work(
    number: int,
    trials: list[Trial],
    processes: int,
    output: Path,
    views: int,
    first: tuple[int, int],
    record: dict[str, Any],
    pairs: Any = None,
) -> None:
    """One process: every ``processes``-th trial; ``record`` goes into each row.  ``pairs``: read already."""
    from epic_fast.backbones import load_backbone
    from epic_fast.demo.run import first_layers

    torch.set_num_threads(1)
    allow_tf32(record.get("run", {}))
    backbone = load_backbone("demo")
    # Below the first prompts of each trial, made once.
    held = {first: read(first, views) if pairs is None else placed(pairs, timing.device_of(number))}
    backbone.to(held[first].device)
    for trial in trials[number::processes]:
        started = time.perf_counter()
        try:
            layers = first if trial.name == "rivals" else first_layers([recipe_of(trial)], backbone)
            if layers not in held:
                held[layers] = held[first].advanced(backbone, layers)
            row = run(trial, backbone, held[layers])
        except Exception as error:
            row = {"name": trial.name, "seed": trial.seed, "error": repr(error)}
            backbone.release()
        row |= {"wall": time.perf_counter() - started, **record}
        with output.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


def match_trials(seeds: list[int]) -> list[Trial]:
    """Changes of one thing at a time, and a few together, with both heads."""
    reads = {"head_reads_prompts": True}
    variants: dict[str, dict[str, Any]] = {
        "base": {},
        "off": {"config": {"interaction": False}},
        "reads": {"config": reads},
        "reads-off": {"config": {**reads, "interaction": False}},
        "any-class-only": {"data": {"same_class": 0.0}},
        "no-views": {"data": {"views": 0}},
        "reads-gelu-ln-0.3": {"config": {**reads, "activation": "gelu_layernorm", "gate_init": 0.3}},
        "reads-gate-1": {"config": {**reads, "gate_init": 1.0}},
        "reads-epochs-40": {"config": reads, "training": {"epochs": 40}},
        "reads-wd-0.5": {"config": reads, "training": {"weight_decay": 0.5}},
        "reads-lr-3e-4": {"config": reads, "training": {"learning_rate": 3e-4, "head_learning_rate": 3e-4}},
        "gelu-ln-0.3": {"config": {"activation": "gelu_layernorm", "gate_init": 0.3}},
        "gate-1": {"config": {"gate_init": 1.0}},
        "gate-lr-3e-2": {"training": {"gate_learning_rate": 3e-2}},
        "channel": {"config": {"gate": "channel"}},
        "pairs-2": {"config": {"num_layer_pairs": 2}},
        "pairs-4": {"config": {"num_layer_pairs": 4}},
        "prompts-2": {"config": {"prompt_length": 2}},
        "prompts-16": {"config": {"prompt_length": 16}},
        "temperature-1": {"config": {"temperature": 1.0}},
        "temperature-0.03": {"config": {"temperature": 0.03}},
        "gaussian-0.2": {"config": {"prompt_init_std": 0.2, "vision_prompt_init": "gaussian"}},
        "per-step": {"config": {"shared_projections": False}},
        "wd-0.5": {"training": {"weight_decay": 0.5}},
        "lr-3e-4": {"training": {"learning_rate": 3e-4}},
        "lr-3e-3": {"training": {"learning_rate": 3e-3}},
        "epochs-40": {"training": {"epochs": 40}},
        "smooth-0.1": {"config": {"label_smoothing": 0.1}},
    }
    trials = [Trial("rivals", "match", seed=seed) for seed in seeds]
    trials += [
        Trial(
            f"{head}/{name}",
            "match",
            seed=seed,
            config={"head": head, **change.get("config", {})},
            training=change.get("training", {}),
            data=change.get("data", {}),
        )
        for seed in seeds
        for name, change in variants.items()
        for head in ("linear", "mlp")
    ]
    return trials


def second_trials(seeds: list[int]) -> list[Trial]:
    """After the first round: a head that reads the cosines, projections that start from a regression; and the
    depth and length of training of the 12 classes."""
    start = {"projection_init": "least_squares", "vision_prompt_init": "gaussian"}
    cosines = {"head_reads_similarity": True}
    reads = {"head_reads_prompts": True}
    variants: dict[str, dict[str, Any]] = {
        "cosines-start": {"config": {**cosines, **start}},
        "cosines": {"config": cosines},
        "cosines-start-reads": {"config": {**cosines, **start, **reads}},
        "start-reads-gate-1": {"config": {**start, **reads, "gate_init": 1.0}},
        "cosines-start-reads-gate-1": {"config": {**cosines, **start, **reads, "gate_init": 1.0}},
        "cosines-start-lr-1e-4": {"config": {**cosines, **start}, "training": {"learning_rate": 1e-4}},
        "cosines-start-wd-0.5": {"config": {**cosines, **start}, "training": {"weight_decay": 0.5}},
        "cosines-start-prompts-4": {"config": {**cosines, **start, "prompt_length": 4}},
        "start-reads": {"config": {**start, **reads}},
    }
    trials = [
        Trial(f"{head}/{name}", "match", seed, {"head": head, **change["config"]}, change.get("training", {}))
        for seed in seeds
        for name, change in variants.items()
        for head in ("linear", "mlp")
    ]
    trials += [
        Trial(
            f"classify/pairs-{pairs}-epochs-{epochs}",
            "classify",
            seed,
            {"head": "mlp", "num_layer_pairs": pairs},
            {"epochs": epochs, "batch_size": 64},
        )
        for seed in seeds
        for pairs, epochs in ((2, 8), (3, 8), (2, 15), (3, 15))
    ]
    return trials


def third_trials(seeds: list[int]) -> list[Trial]:
    """After the second round: longer and gentler training of the best, and less dropout before the head."""
    start = {"projection_init": "least_squares", "vision_prompt_init": "gaussian", "head_reads_prompts": True}
    cosines = {**start, "head_reads_similarity": True}
    slow = {"learning_rate": 1e-4, "epochs": 40}
    variants: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "mlp/cosines-start-reads-epochs-40": ({**cosines, "head": "mlp"}, {"epochs": 40}),
        "mlp/cosines-start-reads-epochs-40-dropout-0.2": (
            {**cosines, "head": "mlp", "head_dropout": 0.2},
            {"epochs": 40},
        ),
        "mlp/cosines-start-reads-epochs-40-lr-1e-4": ({**cosines, "head": "mlp"}, slow),
        "mlp/cosines-start-reads-epochs-40-lr-1e-4-dropout-0.2": (
            {**cosines, "head": "mlp", "head_dropout": 0.2},
            slow,
        ),
        "mlp/start-reads-epochs-40-lr-1e-4": ({**start, "head": "mlp"}, slow),
        "linear/start-reads-epochs-40-lr-1e-4": ({**start, "head": "linear"}, slow),
        "linear/start-reads-epochs-40": ({**start, "head": "linear"}, {"epochs": 40}),
    }
    return [
        Trial(name, "match", seed, config, training) for seed in seeds for name, (config, training) in variants.items()
    ]


def fourth_trials(seeds: list[int]) -> list[Trial]:
    """The 12 classes within the demo's five minutes on two CPU cores: (layer pairs, epochs, views) that fit."""
    fit = [(2, 5, 0), (2, 6, 1), (3, 4, 0), (3, 4, 1), (3, 5, 0)]
    trials = [
        Trial(
            f"classify/pairs-{pairs}-epochs-{epochs}-views-{views}",
            "classify",
            seed,
            {"head": "mlp", "num_layer_pairs": pairs},
            {"epochs": epochs, "batch_size": 64},
            {"views": views},
        )
        for seed in seeds
        for pairs, epochs, views in fit
    ]
    return trials + [
        Trial(
            "classify/pairs-3-epochs-4-views-1-lr-2e-3",
            "classify",
            seed,
            {"head": "mlp", "num_layer_pairs": 3},
            {"epochs": 4, "batch_size": 64, "learning_rate": 2e-3, "head_learning_rate": 2e-3},
            {"views": 1},
        )
        for seed in seeds
    ]


def fifth_trials(seeds: list[int]) -> list[Trial]:
    """MoPE: the declared grid, for each task and head."""
    from epic_fast.demo.recipes import MOPE_GRID, MOPE_HEADS

    # The longest first.
    return [
        Trial(f"mope/{task}/{head}/{name}", task, seed, {"head": head, **config}, training, method="mope")
        for task in ("match", "classify")
        for name, (config, training) in MOPE_GRID.items()
        for head in MOPE_HEADS[task]
        for seed in seeds
    ]


def read(first: tuple[int, int], views: int) -> Any:
    """The demo's pairs below these (text, vision) layers, on the GPU if there is one."""
    from epic_fast.backbones import load_backbone
    from epic_fast.demo.frozen import read_frozen_pairs

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return read_frozen_pairs(load_backbone("demo"), first, views=views, device=device)


def placed(pairs: Any, device: torch.device) -> Any:
    """The same pairs on this device."""

    def moved(tower: Any) -> Any:
        there = copy.copy(tower)
        vars(there).update({name: each.to(device) for name, each in vars(tower).items() if isinstance(each, Tensor)})
        return there

    return replace(
        pairs,
        cache=type(pairs.cache).from_towers(moved(pairs.cache.text), moved(pairs.cache.vision)),
        rows={name: rows.to(device) for name, rows in pairs.rows.items()},
        **{name: each.to(device) for name, each in vars(pairs).items() if isinstance(each, Tensor)},
    )


def allow_tf32(run: dict[str, Any]) -> None:
    """Let float32 products of this process use TF32 where that is what the rows will say of their run."""
    if run.get("tf32"):
        torch.set_float32_matmul_precision("high")


def best(rows: list[dict[str, Any]]) -> list[tuple[str, float, int]]:
    """Names with their mean validation over seeds and how many those are, the best first; of a seed the last row."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if "validation" in row:
            found.setdefault(row["name"], {})[row["seed"]] = row["validation"]
    means = [(name, sum(each.values()) / len(each), len(each)) for name, each in found.items()]
    return sorted(means, key=lambda mean: -mean[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--best", type=Path, help="show what a search found, and train nothing")
    parser.add_argument("--round", type=int, choices=[1, 2, 3, 4, 5], default=1)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--views", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--tf32", action="store_true", help="float32 products may use TF32; the rows say so")
    arguments = parser.parse_args()
    if arguments.best:
        for name, validation, seeds in best([json.loads(line) for line in arguments.best.read_text().splitlines()]):
            print(f"{validation:.4f}  {name}  ({seeds} seeds)")
        return
    if arguments.output is None:
        parser.error("--output FILE.jsonl is wanted, where the rows are appended")
    make = {1: match_trials, 2: second_trials, 3: third_trials, 4: fourth_trials, 5: fifth_trials}[arguments.round]
    trials = [trial for trial in make(arguments.seeds) if not arguments.only or trial.name in arguments.only]
    first = {1: (2, 4), 5: (0, 0)}.get(arguments.round, (3, 5))
    record = {
        "round": arguments.round,
        "run": timing.machine(f"python -m benchmarks.demo_search --round {arguments.round}"),
    }
    if arguments.tf32:
        record["run"]["tf32"] = True
    allow_tf32(record["run"])
    pairs = read(first, arguments.views)
    multiprocessing.spawn(
        work,
        args=(trials, arguments.processes, arguments.output, arguments.views, first, record, pairs),
        nprocs=arguments.processes,
    )


if __name__ == "__main__":
    main()
