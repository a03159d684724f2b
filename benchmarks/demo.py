"""The demo's two tables with 5 seeds: mean, standard deviation, and a paired bootstrap over the test pictures.

    python -m benchmarks.demo train --processes 14 --rows rows.jsonl              # every method, 5 seeds
    python -m benchmarks.demo train --processes 14 --rows more.jsonl --methods mope   # some of them
    python -m benchmarks.demo summarise rows.jsonl --output benchmarks/results/demo.json
    python -m benchmarks.demo summarise more.jsonl --keep benchmarks/results/demo.json --output ...   # of some anew
    python -m benchmarks.demo tables benchmarks/results/demo.json                 # the README's two tables

``results/demo.json`` is the summary of ``results/demo_rows.jsonl``, EPIC's and MoPE's rows (``--methods epic`` and
``--methods mope --search``, each with ``--tf32``, on a GPU), and ``results/demo_rivals.jsonl``, the others' (a CPU).
A row says which test pairs were answered right (``right``): by that methods are compared pair for pair.

Settings are those of ``epic_fast.demo.recipes``, chosen on validation pairs.  The test pairs are the same for every
seed; a seed decides weights, dropout, batches, training negatives and views.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import multiprocessing

from benchmarks import demo_search, timing
from benchmarks.demo_search import allow_tf32

SEEDS = (0, 1, 2, 3, 4)
COMPARED = {
    "classify": [
        ("EPIC", "EPIC, interaction off"),
        ("EPIC", "MLP on frozen features"),
        ("EPIC", "linear probe, both"),
        ("MoPE", "MoPE, one expert"),
        ("MoPE", "MLP on frozen features"),
        ("MoPE", "linear probe, both"),
        ("MoPE", "EPIC"),
    ],
    "match": [
        ("EPIC, linear head", "EPIC, linear head, interaction off"),
        ("EPIC, linear head", "linear probe, both"),
        ("EPIC, MLP head", "EPIC, MLP head, interaction off"),
        ("EPIC, MLP head", "MLP on frozen features"),
        ("EPIC, MLP head", "cosine of the aligned features"),
        ("MoPE, linear head", "MoPE, linear head, one expert"),
        ("MoPE, linear head", "EPIC, linear head"),
        ("MoPE, MLP head", "MoPE, MLP head, one expert"),
        ("MoPE, MLP head", "MLP on frozen features"),
        ("MoPE, MLP head", "cosine of the aligned features"),
    ],
}


def trained_of(task: str) -> list[Any]:
    """The recipes of a task, each behind its control: those of EPIC, then those of MoPE."""
    from epic_fast.demo.recipes import mope_recipes, recipes

    return [each for recipe in (*recipes(task), *mope_recipes(task)) for each in (recipe.control(), recipe)]


def work(
    number: int, processes: int, jobs: list[tuple[str, int, str]], output: Path, run: dict[str, Any], pairs: Any = None
) -> None:
    """One process: every ``processes``-th job ``(task, seed, method)``.  ``pairs``: what :func:`read` gives."""
    from epic_fast.backbones import load_backbone
    from epic_fast.demo.frozen import FrozenPairs
    from epic_fast.demo.prompted import train_prompted
    from epic_fast.demo.recipes import VIEWS
    from epic_fast.demo.run import first_layers, make_task
    from epic_fast.demo.table import score
    from epic_fast.demo.tasks import rivals

    torch.set_num_threads(1)
    allow_tf32(run)
    take_choices(run)
    backbone = load_backbone("demo")
    size = sum(parameter.numel() for parameter in backbone.parameters())
    layers, pairs = read(jobs) if pairs is None else pairs
    pairs = demo_search.placed(pairs, timing.device_of(number))
    backbone.to(pairs.device)
    # Below the first prompts of each method, made once of what was read.
    held: dict[tuple[int, int], FrozenPairs] = {layers: pairs}
    for job, (name, seed, method) in enumerate(jobs):
        if job % processes != number:
            continue
        trained = {each.name: each for each in trained_of(name)}
        frozen = replace(pairs, views=pairs.views[:, : 1 + VIEWS[name]])
        if method == "rivals":
            rows = {split: each.cpu() for split, each in frozen.rows.items()}
            features = {"text": frozen.text.cpu(), "vision": frozen.vision.cpu(), "labels": frozen.labels.cpu()}
            frozen = replace(frozen, rows=rows, **features)
            task = make_task(name, frozen, seed)
            found = list(rivals(frozen, task, seed))
        else:
            task = make_task(name, frozen, seed)
            recipe = trained[method]
            layers = first_layers([recipe], backbone)
            if layers not in held:
                held[layers] = pairs.advanced(backbone, layers)
            frozen = replace(frozen, cache=held[layers].cache)
            found = [train_prompted(recipe, backbone, frozen, task, seed=seed)[0]]
        for result in found:
            row = {"task": name, "seed": seed, **score(task, result, size)}
            row["right"] = (result.predictions.cpu() == task.test.labels).int().tolist()
            row["pictures"] = task.test.pictures.tolist()
            row["run"] = run
            with output.open("a") as lines:
                lines.write(json.dumps(row) + "\n")


def choices(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Of ``demo_search --round 5``: TASK/HEAD to MoPE's setting with the best mean validation."""
    from epic_fast.demo.recipes import MOPE_CHOSEN

    found = {}
    for task, head in MOPE_CHOSEN:
        place = f"mope/{task}/{head}/"
        mine = demo_search.best([row for row in rows if row["name"].startswith(place)])
        if not mine:
            raise SystemExit(
                f"there is no row of {place}... in the search; `benchmarks.demo_search --round 5` makes them"
            )
        found[place.removeprefix("mope/").rstrip("/")] = mine[0][0].removeprefix(place)
    return found


def take_choices(run: dict[str, Any]) -> None:
    """Let this process train MoPE with the settings that the rows will say of their run, if they say any."""
    from epic_fast.demo.recipes import MOPE_CHOSEN

    for place, setting in run.get("mope_chosen", {}).items():
        task, _, head = place.partition("/")
        MOPE_CHOSEN[task, head] = setting


def read(jobs: list[tuple[str, int, str]]) -> tuple[tuple[int, int], Any]:
    """The lowest (text, vision) layers with prompts of any of these jobs, and the demo's pairs below them."""
    from epic_fast.backbones import load_backbone
    from epic_fast.demo.recipes import VIEWS
    from epic_fast.demo.run import first_layers

    names = {name for name, _, _ in jobs}
    trained = [each for name in names for each in trained_of(name) if any(each.name == method for _, _, method in jobs)]
    recipes = trained or [each for name in names for each in trained_of(name)]
    layers = first_layers(recipes, load_backbone("demo"))
    return layers, demo_search.read(layers, max(VIEWS[name] for name in names))


def bootstrap(first: np.ndarray, second: np.ndarray, pictures: np.ndarray, draws: int = 10_000) -> dict[str, float]:
    """Difference of two methods' mean accuracies over seeds, test pictures drawn with replacement.

    Args:
        first, second: ``(seeds, n)`` right answers.
        pictures: ``(n,)`` which picture each pair shows: pairs of one picture are drawn together.
    """
    difference = first.mean(axis=0) - second.mean(axis=0)
    names, index = np.unique(pictures, return_inverse=True)
    sums, counts = np.bincount(index, difference), np.bincount(index)
    random = np.random.default_rng(0)
    chosen = random.integers(0, len(names), size=(draws, len(names)))
    drawn = sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {
        "difference": float(difference.mean()),
        "standard_error": float(drawn.std()),
        "low_95": float(low),
        "high_95": float(high),
    }


def summarise(
    rows: list[dict[str, Any]], compared: Mapping[str, Sequence[tuple[str, str]]] | None = None
) -> dict[str, Any]:
    """By task: every method's mean and standard deviation over seeds, and the compared pairs."""
    tasks: dict[str, Any] = {}
    for name, pairs in (COMPARED if compared is None else compared).items():
        methods = list(dict.fromkeys(row["method"] for row in rows if row["task"] == name))
        right, table = {}, []
        pictures = np.array(next(row["pictures"] for row in rows if row["task"] == name))
        for method in methods:
            mine = sorted(
                (row for row in rows if row["task"] == name and row["method"] == method), key=lambda r: r["seed"]
            )
            right[method] = np.array([row["right"] for row in mine], dtype=float)
            numbers = [
                key for key in mine[0] if key in ("accuracy", "any class", "same class", "f1_macro", "validation")
            ]
            table.append(
                {
                    "method": method,
                    **{key: float(np.mean([row[key] for row in mine])) for key in numbers},
                    **{f"{key}_std": float(np.std([row[key] for row in mine], ddof=1)) for key in numbers},
                    "trainable": mine[0]["trainable"],
                    "share": mine[0]["share"],
                    "seconds": float(np.median([row["seconds"] for row in mine])),
                    "seeds": {row["seed"]: row["accuracy"] for row in mine},
                    "chosen": {row["seed"]: row["chosen"] for row in mine},
                }
            )
        tasks[name] = {
            "test_pairs": len(pictures),
            "test_pictures": len(np.unique(pictures)),
            "methods": table,
            "compared": [
                {"first": first, "second": second, **bootstrap(right[first], right[second], pictures)}
                for first, second in pairs
                if first in right and second in right
            ],
        }
    return tasks


def machine() -> dict[str, Any]:
    """What a result must carry to be believed."""
    command = " ".join(["python -m benchmarks.demo", *(Path(each).name for each in sys.argv[1:])])
    return {**timing.machine(command), **timing.libraries()}


def readme(found: dict[str, Any]) -> str:
    """The two tables in Markdown."""
    lines = []
    for name, task in found["tasks"].items():
        groups = [key for key in ("any class", "same class") if key in task["methods"][0]]
        columns = ["method", "accuracy", *groups, "macro-F1", "trained parameters"]
        lines += [f"Task `{name}`", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for row in task["methods"]:
            numbers = [f"{row[key]:.3f} ± {row[key + '_std']:.3f}" for key in ("accuracy", *groups, "f1_macro")]
            trained = f"{row['trainable']:,} ({100 * row['share']:.2f} %)" if row["trainable"] else "none"
            method = row["method"].replace("|", "\\|")
            lines.append("| " + " | ".join([method, *numbers, trained]) + " |")
        lines += ["", "| paired bootstrap over pictures | difference | 95 % interval |", "|---|---|---|"]
        for row in task["compared"]:
            lines.append(
                f"| {row['first']} − {row['second']} | {100 * row['difference']:+.1f} points | "
                f"{100 * row['low_95']:+.1f} to {100 * row['high_95']:+.1f} |"
            )
        lines.append("")
    return "\n".join(lines)


def _scores(row: dict[str, Any]) -> dict[str, float]:
    """Accuracy of each seed, whose names JSON makes strings."""
    return {str(seed): value for seed, value in row["seeds"].items()}


def train(arguments: argparse.Namespace) -> None:
    """Append a row for every method and seed to ``arguments.rows``."""
    run = machine()
    if arguments.search:
        run["mope_chosen"] = choices([json.loads(line) for line in arguments.search.read_text().splitlines()])
        take_choices(run)
    methods = {name: [*(each.name for each in trained_of(name)), "rivals"] for name in COMPARED}
    wanted = {"all": "", "epic": "EPIC", "mope": "MoPE", "rivals": "rivals"}[arguments.methods]
    # The longest first.
    jobs = [
        (name, seed, method)
        for name in sorted(methods)[::-1]
        for method in methods[name]
        if method.startswith(wanted)
        for seed in SEEDS
    ]
    if arguments.commit:
        run |= {"commit": arguments.commit, "modified": False}
    if arguments.tf32:
        run["tf32"] = True
    allow_tf32(run)
    multiprocessing.spawn(
        work, args=(arguments.processes, jobs, arguments.rows, run, read(jobs)), nprocs=arguments.processes
    )


def place_of(method: str) -> tuple[int, str]:
    """Where a method stands in a table."""
    order = {"majority": 0, "linear": 1, "cosine": 2, "MLP": 3, "EPIC": 4, "MoPE": 5}
    return order[method.split()[0].rstrip(",")], method


def summarised(paths: list[Path], former: dict[str, Any] | None = None) -> dict[str, Any]:
    """All rows of these files as one result.

    Args:
        former: a result; what it says of methods without a row here is kept, and of pairs whose methods have for every
            seed the accuracy that they had then.  A pair of which only one method has rows is left out, and said.

    Raises:
        SystemExit: a method without a row for every seed, or with two; a task without any.
    """
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    missing = COMPARED.keys() - {row["task"] for row in rows}
    if missing:
        raise SystemExit(f"there is no row of {', '.join(sorted(missing))}; wanted rows of {', '.join(COMPARED)}")
    rows.sort(key=lambda row: place_of(row["method"]))
    for key in {(row["task"], row["method"]) for row in rows}:
        seeds = sorted(row["seed"] for row in rows if (row["task"], row["method"]) == key)
        if seeds != list(SEEDS):
            raise SystemExit(f"{key} has rows for the seeds {seeds}; wanted {list(SEEDS)}")
    runs = {
        json.dumps(row["run"]): sorted({each["method"] for each in rows if each["run"] == row["run"]}) for row in rows
    }
    found: dict[str, Any] = {
        "seeds": list(SEEDS),
        "runs": [{**json.loads(run), "methods": sorted(methods)} for run, methods in runs.items()],
        "tasks": summarise(rows),
    }
    return found if former is None else beside(found, former)


def beside(found: dict[str, Any], former: dict[str, Any]) -> dict[str, Any]:
    """A result with what a former one says of methods that it does not have."""
    tasks, made = {}, set()
    for name, task in found["tasks"].items():
        mine = {each["method"]: _scores(each) for each in task["methods"]}
        made |= mine.keys()
        old = former["tasks"][name]
        sizes = {key: (task[key], old[key]) for key in ("test_pairs", "test_pictures")}
        if any(one != other for one, other in sizes.values()):
            raise SystemExit(f"{name}: the former result is of other test pairs: {sizes}")
        kept = [each for each in old["methods"] if each["method"] not in mine]
        same = {each["method"] for each in old["methods"] if mine.get(each["method"], _scores(each)) == _scores(each)}
        methods = sorted([*task["methods"], *kept], key=lambda each: place_of(each["method"]))
        pairs = {(each["first"], each["second"]): each for each in old["compared"]}
        pairs = {pair: each for pair, each in pairs.items() if same.issuperset(pair)}
        pairs |= {(each["first"], each["second"]): each for each in task["compared"]}
        for pair in COMPARED[name]:
            if pair not in pairs and {each["method"] for each in methods}.issuperset(pair):
                print(f"{name}: no rows to compare {pair[0]} with {pair[1]}", file=sys.stderr)
        compared = [pairs[pair] for pair in COMPARED[name] if pair in pairs]
        tasks[name] = {**task, "methods": methods, "compared": compared}
    runs = [{**run, "methods": [each for each in run["methods"] if each not in made]} for run in former["runs"]]
    return {**found, "runs": [*found["runs"], *(run for run in runs if run["methods"])], "tasks": tasks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("--rows", type=Path, required=True)
    training.add_argument("--processes", type=int, default=1)
    training.add_argument("--methods", choices=["all", "epic", "mope", "rivals"], default="all")
    training.add_argument("--search", type=Path, help="MoPE's settings: the best of these rows of its search")
    training.add_argument("--tf32", action="store_true", help="float32 products may use TF32; the rows say so")
    training.add_argument("--commit", help="of the code that runs, where it runs outside its repository")
    summary = commands.add_parser("summarise")
    summary.add_argument("rows", type=Path, nargs="+")
    summary.add_argument("--keep", type=Path, help="a former result, of methods without rows here")
    summary.add_argument("--output", type=Path, required=True)
    tables = commands.add_parser("tables")
    tables.add_argument("result", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "train":
        train(arguments)
    elif arguments.command == "summarise":
        former = None if arguments.keep is None else json.loads(arguments.keep.read_text())
        arguments.output.write_text(json.dumps(summarised(arguments.rows, former), indent=1) + "\n")
    else:
        print(readme(json.loads(arguments.result.read_text())))


if __name__ == "__main__":
    main()
