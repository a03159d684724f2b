"""What frozen weights in 8 bits cost: the test metric of EPIC trained with them and without, and the logits' errors.

    python -m benchmarks.eight_bit measure --data demo --data posters=FOLDER      # 3 seeds, appends rows
    python -m benchmarks.eight_bit measure --data demo --seeds 0-59 --kind fp8 int8 --control --processes 20
    python -m benchmarks.eight_bit show                                           # the tables, from the rows

Every engine trains the same model from the same seeds on the demo's frozen towers, in bfloat16, from prefixes that it
computed itself.  ``KIND, tested only`` trains with ``frozen`` and tests with 8 bits, so that nothing but the test pass
differs.  With ``--control``, ``plain`` runs the backbone's own modules: how far it is from ``frozen``, which computes
the same, says how much of a difference is rounding that training then carries elsewhere.  Differences are between
trainings of the same seed; their standard error is that of the mean over the seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, multiprocessing
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from benchmarks import timing
from epic_fast.data import Collator, PairDataset, read_folder, resolve_data
from epic_fast.demo.recipes import recipes
from epic_fast.engine import EngineConfig, PrefixCache
from epic_fast.models import wrap
from epic_fast.training import fit, predict
from epic_fast.training.metrics import compute_metrics

ROWS = Path(__file__).parent / "results" / "eight_bit.jsonl"
SPLITS = ("train", "validation", "test")
SEEDS = (0, 1, 2)
METRIC = {"single_label_classification": "accuracy", "multi_label_classification": "f1_micro"}
# A film has two or three of 21 genres: at 0.5 most of them are never said.
THRESHOLD = 0.3
ALLOWED = 0.003
LOGITS_OF = 256
KINDS = ("fp8", "int8")
TESTED_ONLY = ", tested only"
# As many seeds have a column each.
FEW = 5


def engines(kinds: Sequence[str], control: bool) -> dict[str, EngineConfig]:
    """The engines that are compared, by name; ``frozen`` is what the others are measured against."""
    found = {"frozen": EngineConfig(blocks="fused")}
    found |= {kind: EngineConfig(blocks="fused", weights=kind) for kind in kinds}  # pyright: ignore[reportArgumentType]
    return found | {"plain": EngineConfig(blocks="plain")} if control else found


@dataclass
class Samples:
    """A data set as the towers take it.

    Attributes:
        batches: of all splits in turn, without labels.
        labels: ``(n,)`` or ``(n, K)``.
        rows: of each split.
        record: what a result has to say of its data.
    """

    name: str
    batches: list[dict[str, Tensor]]
    labels: Tensor
    rows: dict[str, range]
    names: list[str]
    problem_type: str
    record: dict[str, Any]


class Chosen(Dataset[int]):
    """The samples of one split, by their rows."""

    def __init__(self, rows: Sequence[int]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> int:
        return self.rows[index]


class FromCache:
    """Rows to batches out of prefixes."""

    def __init__(self, cache: PrefixCache, labels: Tensor):
        self.cache = cache
        self.labels = labels

    def __call__(self, rows: list[int]) -> dict[str, Any]:
        index = torch.tensor(rows)
        return {"prefix": self.cache.batch(index), "labels": self.labels[index]}


def read(name: str, path: str | Path, backbone: Any, *, most: int | None, workers: int) -> Samples:
    """A folder in the imagefolder convention, each picture and text read once.

    Args:
        most: samples of each split; None: all.
        workers: processes that read; 0 reads here.
    """
    folder = read_folder(path)
    assert folder.problem_type is not None
    parts: list[PairDataset] = [folder.splits[split] for split in SPLITS]
    parts = [replace(part, rows=part.rows[:most]) for part in parts]
    collator = Collator(
        backbone.image_processor,
        backbone.tokenizer,
        max_text_length=backbone.max_text_length,
        problem_type=folder.problem_type,
        num_labels=folder.num_labels,
    )
    loader: Iterable[dict[str, Tensor]] = DataLoader(
        ConcatDataset(parts), batch_size=64, collate_fn=collator, num_workers=workers
    )
    # Tensors that worker processes share would each hold a file open.
    batches = [{key: value.clone() for key, value in batch.items()} for batch in loader]
    rows, first = {}, 0
    for split, part in zip(SPLITS, parts, strict=True):
        rows[split] = range(first, first + len(part))
        first += len(part)
    labels = torch.cat([batch.pop("labels") for batch in batches])
    record = {
        "samples": {split: len(each) for split, each in rows.items()},
        "metadata_sha256": hashlib.sha256(json.dumps(sorted(folder.metadata.values())).encode()).hexdigest(),
    }
    return Samples(name, batches, labels, rows, folder.labels, folder.problem_type, record)


def prefixes(model: Any, samples: Samples, device: torch.device) -> PrefixCache:
    """What the layers below the first prompts make of all samples, in bfloat16."""
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        return PrefixCache([model.extract(**_on(batch, device)) for batch in samples.batches])


def _on(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def layer_errors(
    model: Any, batches: Iterable[dict[str, Tensor]], kind: str, device: torch.device
) -> list[dict[str, Any]]:
    """Relative error of the logits, in the L2 norm over all samples, with one layer in 8 bits, and with all of them.

    Measured against the same model in bfloat16, whose own error against float32 is the first row's.
    """
    held = [_on(batch, device) for batch in batches]
    towers = {"text": model.backbone.text, "vision": model.backbone.vision}

    def logits(*, autocast: bool = True) -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            return torch.cat([model(**batch).logits.float() for batch in held])

    def error(found: Tensor, wanted: Tensor) -> float:
        return float((found - wanted).norm() / wanted.norm())

    def with_layers(chosen: dict[str, set[int]]) -> Tensor:
        with ExitStack() as patches:
            for name, tower in towers.items():
                mixed = [
                    rounded if index in chosen.get(name, ()) else exact
                    for index, (exact, rounded) in enumerate(
                        zip(tower.frozen.blocks(), tower.frozen.blocks(kind), strict=True)
                    )
                ]
                patches.enter_context(mock.patch.object(tower.frozen, "blocks", lambda *_, mixed=mixed: mixed))
            return logits()

    engine, model.engine = model.engine, EngineConfig(blocks="fused")
    try:
        wanted = logits()
        rows: list[dict[str, Any]] = [{"layers": "none", "error": error(wanted, logits(autocast=False))}]
        for name, tower in towers.items():
            for index in range(tower.num_layers):
                found = with_layers({name: {index}})
                rows.append({"layers": f"{name} {index}", "error": error(found, wanted)})
        for first, name in ((EngineConfig.exact_layers, "all but the first"), (0, "all")):
            every = {tower: set(range(first, towers[tower].num_layers)) for tower in towers}
            rows.append({"layers": name, "error": error(with_layers(every), wanted)})
    finally:
        model.engine = engine
    return rows


def measure_data(
    samples: Samples,
    backbone: Any,
    kinds: Sequence[str],
    seeds: Sequence[int],
    epochs: int,
    device: torch.device,
    *,
    control: bool = False,
    errors: bool = True,
) -> Iterator[dict[str, Any]]:
    """Rows of one data set: a run for every engine and seed and, if ``errors``, those of the first seed's logits."""
    recipe = recipes("classify")[0]
    training = replace(recipe.training, epochs=epochs, precision="bf16", tensorboard=False)
    compared = engines(kinds, control)
    metric = METRIC[samples.problem_type]
    sets = {split: Chosen(rows) for split, rows in samples.rows.items()}
    labels = samples.labels[list(samples.rows["test"])]

    def build(engine: EngineConfig) -> Any:
        return wrap(
            backbone,
            recipe.config,
            num_labels=len(samples.names),
            problem_type=samples.problem_type,
            self_check=False,
            engine=engine,
        ).to(device)

    def tested(model: Any, cache: PrefixCache) -> dict[str, float]:
        collator = FromCache(cache, samples.labels)
        found = predict(model, sets["test"], collator=collator, precision="bf16", progress=False).logits
        return compute_metrics(
            found, labels, samples.problem_type, num_labels=len(samples.names), threshold=THRESHOLD
        )  # fmt: skip

    caches = {}
    for name, engine in compared.items():
        model = build(engine)
        caches[name] = prefixes(model, samples, device)
        model.unwrap()
    for seed in seeds:
        for name, engine in compared.items():
            torch.manual_seed(seed)
            model = build(engine)
            started = time.perf_counter()
            outcome = fit(
                model,
                sets["train"],
                sets["validation"],
                config=replace(training, seed=seed),
                collator=FromCache(caches[name], samples.labels),
                progress=False,
            )
            row = {"data": samples.name, "seed": seed, "metric": metric, "epochs": epochs}
            row |= {"threshold": THRESHOLD if metric == "f1_micro" else None, **samples.record}
            seconds = time.perf_counter() - started
            yield row | {"engine": name, "test": tested(model, caches[name]), "epoch": outcome.best_epoch,
                         "seconds": seconds}  # fmt: skip
            for kind in kinds if name == "frozen" else ():
                model.engine = compared[kind]
                yield row | {"engine": f"{kind}{TESTED_ONLY}", "test": tested(model, caches[kind]),
                             "epoch": outcome.best_epoch}  # fmt: skip
                if errors and seed == seeds[0]:
                    count = max(1, min(LOGITS_OF, len(samples.rows["test"])) // 64)
                    found = layer_errors(model, samples.batches[-count:], kind, device)
                    yield row | {"kind": kind, "logits": found}
            model.unwrap()


def work(place: int, samples: Samples, arguments: argparse.Namespace, run: dict[str, Any]) -> None:
    """One process: every ``processes``-th seed of a data set."""
    from epic_fast.backbones import load_backbone

    if arguments.processes > 1:
        torch.set_num_threads(1)
    seeds = arguments.seeds[place :: arguments.processes]
    if not seeds:
        return
    device = timing.device_of(place)
    backbone = load_backbone("demo")
    backbone.to(device)
    rows = measure_data(
        samples,
        backbone,
        arguments.kind,
        seeds,
        arguments.epochs,
        device,
        control=arguments.control,
        errors=place == 0,
    )
    started = time.perf_counter()
    for row in rows:
        with arguments.rows.open("a") as lines:
            lines.write(json.dumps({**row, "run": run}) + "\n")
        if "test" in row:
            print(f"{samples.name} seed {row['seed']} {row['engine']}: {row['test'][row['metric']]:.4f} "
                  f"after {time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip


def measure(arguments: argparse.Namespace) -> None:
    """Append the rows of every data set to ``arguments.rows``."""
    from epic_fast.backbones import load_backbone

    run = timing.machine(_called(arguments))
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    backbone = load_backbone("demo")
    for given in arguments.data:
        name, _, path = given.partition("=")
        samples = read(
            name, path or resolve_data(name), backbone, most=arguments.most, workers=arguments.workers
        )  # fmt: skip
        print(f"{name}: read after {time.perf_counter() - started:.0f} s", flush=True)
        if arguments.processes == 1:
            work(0, samples, arguments, run)
        else:
            multiprocessing.spawn(work, args=(samples, arguments, run), nprocs=arguments.processes)
    print(report(_read_rows(arguments.rows)))


def _called(given: argparse.Namespace) -> str:
    """The command that makes these rows again, without where data and rows lie."""
    words = [f"--data {each.partition('=')[0]}" for each in given.data]
    words += [f"--kind {' '.join(given.kind)}", f"--seeds {' '.join(map(str, given.seeds))}"]
    words += [f"--epochs {given.epochs}"] + ["--control"] * given.control
    words += [f"--most {given.most}"] if given.most is not None else []
    return " ".join(["python -m benchmarks.eight_bit measure", *words, f"--processes {given.processes}"])


def _seeds(given: str) -> Sequence[int]:
    """``7``, or ``0-59`` with both ends."""
    first, _, last = given.partition("-")
    found = range(int(first), int(last or first) + 1)
    if not found:
        raise argparse.ArgumentTypeError(f"{given!r} holds no seed; wanted such as 0-59")
    return found


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By data set: the metric, every engine's by seed and on average, its distance from ``frozen``, and the logits'
    errors of each kind; of rows that were measured twice the last."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        each = found.setdefault(row["data"], {"metric": row["metric"], "engines": {}, "logits": {}})
        if "logits" in row:
            each["logits"][row["kind"]] = row["logits"]
        else:
            engine = f"{row['kind']}{TESTED_ONLY}" if row["engine"] == "switched" else row["engine"]
            each["engines"].setdefault(engine, {})[row["seed"]] = row["test"][row["metric"]]
    for name, each in found.items():
        if "frozen" not in each["engines"]:
            raise SystemExit(f"{name}: no row of the engine 'frozen' yet, which the others are measured against")
        base = each["engines"]["frozen"]
        # While trainings still run, an engine may have none of the seeds yet.
        each["engines"] = {engine: by for engine, by in each["engines"].items() if base.keys() & by.keys()}
        each["table"] = {
            name: {
                "seeds": dict(sorted(by_seed.items())),
                "mean": statistics.mean(by_seed.values()),
                **_difference([by_seed[seed] - base[seed] for seed in by_seed if seed in base]),
            }
            for name, by_seed in sorted(each["engines"].items(), key=lambda item: item[0] != "frozen")
        }
        each["passed"] = {
            kind: abs(each["table"][kind]["difference"]) <= ALLOWED for kind in KINDS if kind in each["table"]
        }
    return found


def _difference(pairs: Sequence[float]) -> dict[str, float | None]:
    """The mean of paired differences and, of two or more, its standard error."""
    error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
    return {"difference": statistics.mean(pairs), "standard_error": error}


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The tables in Markdown; seed by seed where they are few."""
    lines = []
    for name, each in summarise(rows).items():
        seeds = sorted(each["engines"]["frozen"])
        few = [f"seed {seed}" for seed in seeds] if len(seeds) <= FEW else [f"of {len(seeds)} seeds: std"]
        heads = [f"{name}, {each['metric']}", *few, "mean", "minus frozen, points"]
        lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for engine, row in each["table"].items():
            values = list(row["seeds"].values())
            cells = [f"{row['seeds'][seed]:.4f}" if seed in row["seeds"] else "" for seed in seeds]
            if len(seeds) > FEW:
                cells = [f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""]
            spread = "" if row["standard_error"] is None else f" ± {100 * row['standard_error']:.2f}"
            difference = "" if engine == "frozen" else f"{100 * row['difference']:+.2f}{spread}"
            lines.append(f"| {engine} | {' | '.join(cells)} | {row['mean']:.4f} | {difference} |")
        lines.append("")
        for kind, passed in each["passed"].items():
            verdict = "within" if passed else "more than"
            lines += [f"{kind} is {verdict} {100 * ALLOWED:.1f} points from frozen.", ""]
        for kind, (first, *others) in each["logits"].items():
            lines.append(f"{kind}: relative error of the logits; that of bfloat16 itself is {first['error']:.1e}:")
            lines += [", ".join(f"{row['layers']} {row['error']:.4f}" for row in others), ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--data", action="append", required=True, help="demo, or NAME=FOLDER (imagefolder)")
    measuring.add_argument("--kind", choices=KINDS, nargs="+", default=["fp8"])
    measuring.add_argument("--seeds", type=_seeds, nargs="+", default=[SEEDS], help="numbers, or such as 0-59")
    measuring.add_argument("--epochs", type=int, default=6)
    measuring.add_argument("--control", action="store_true", help="train with the backbone's own modules too")
    measuring.add_argument("--most", type=int, help="samples of each split")
    measuring.add_argument("--workers", type=int, default=max(0, min(12, (os.cpu_count() or 1) - 2)))
    measuring.add_argument("--processes", type=int, default=1, help="that share the seeds")
    measuring.add_argument("--rows", type=Path, default=ROWS)
    showing = commands.add_parser("show")
    showing.add_argument("--rows", type=Path, default=ROWS)
    given = parser.parse_args(arguments)
    if given.command == "measure":
        given.seeds = [seed for several in given.seeds for seed in several]
        measure(given)
    else:
        print(report(_read_rows(given.rows)))


if __name__ == "__main__":
    main()
