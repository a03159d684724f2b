"""``epic-fast demo``: train, compare, draw, and load the result again in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from epic_fast.backbones import DualEncoder, load_backbone
from epic_fast.data import load_image
from epic_fast.demo.frozen import FrozenPairs, read_frozen_pairs
from epic_fast.demo.pairs import Pairs
from epic_fast.demo.prompted import train_prompted
from epic_fast.demo.recipes import QUICK, VIEWS, WITHOUT_GPU, Cut, Recipe, mope_recipes, recipes
from epic_fast.demo.rivals import Result
from epic_fast.demo.table import cells, headings, score
from epic_fast.demo.tasks import Task, classify_task, match_task, rivals
from epic_fast.errors import EpicFastError
from epic_fast.files import atomic_write_json, atomic_write_text
from epic_fast.models import wrap
from epic_fast.plots import SheetItem, confusion_matrix, contact_sheet, training_curves

SHEET_PICTURES = 24
WIDTH_OF_FILES = 120


def run(
    name: str,
    output: Path,
    *,
    seed: int = 0,
    quick: bool = False,
    full: bool = False,
    mope: bool = False,
    plain: bool = False,
) -> dict[str, Any]:
    """Run a task of the demo.

    Args:
        name: ``"classify"`` or ``"match"``.
        output: the run folder; it ends as the adapter of the last EPIC of the table, with its log and pictures.
        quick: one epoch.
        full: the whole recipe, also where no GPU is there to make it short.
        mope: train MoPE and its unrouted form too.
        plain: print to stderr only.

    Returns:
        the table's rows, the pairs that were classified again, and seconds in all.
    """
    console = Console(stderr=plain, highlight=False)
    if not console.is_terminal:
        console.width = WIDTH_OF_FILES
    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console.print(f"epic_fast demo, task [bold]{name}[/], on {device}")
    cut = cut_of(name, device, quick=quick, full=full)
    if cut is not None:
        whole = recipes(name)[-1].training.epochs
        console.print(
            f"shortened ({cut.why}): {cut.epochs} of {whole} epochs, {cut.views} of {VIEWS[name]} augmented views"
        )
    backbone = load_backbone("demo")
    trained = [*(mope_recipes(name) if mope else []), *recipes(name)]
    views = VIEWS[name] if cut is None else cut.views
    frozen = _read(backbone, trained, device, console, views)
    task = make_task(name, frozen, seed)
    size = sum(parameter.numel() for parameter in backbone.parameters())
    console.print(
        f"{len(task.train):,} training pairs a pass, {len(task.validation):,} validation, {len(task.test):,} test; "
        f"frozen towers of {size / 1e6:.1f} M parameters"
    )
    rows: list[dict[str, Any]] = []
    result: Result | None = None
    for result in results(task, trained, backbone, frozen, seed, output, cut=cut, console=console):
        rows.append(score(task, result, size))
        console.print(f"  {escape(result.name)}: accuracy {rows[-1]['accuracy']:.3f}  ({result.seconds:.1f} s)")
    assert result is not None
    groups = list(task.groups)
    table = Table(title=f"Test split, task {name}, seed {seed}", title_justify="left")
    for heading in headings(groups):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        table.add_row(*map(escape, cells(row, groups)))
    console.print(table)
    pictures = draw(task, frozen, result, output)
    console.print("adapter, log and pictures: " + ", ".join([escape(str(output)), *(path.name for path in pictures)]))
    again = reload(task, frozen, result, output)
    for pair in again:
        console.print(f"  fresh process: {escape(repr(pair['text']))} -> {escape(pair['label'])} (as before)")
    found = {"task": name, "seed": seed, "cut": None if cut is None else asdict(cut), "rows": rows, "reloaded": again}
    found["seconds"] = time.perf_counter() - started
    atomic_write_json(output / "table.json", found)
    console.print(f"{found['seconds']:.0f} s in all")
    return found


def cut_of(name: str, device: str, *, quick: bool = False, full: bool = False) -> Cut | None:
    """What the training of a task's EPICs is cut to; None: the whole recipe."""
    if quick:
        return QUICK
    return None if full or device == "cuda" else WITHOUT_GPU.get(name)


def make_task(name: str, frozen: FrozenPairs, seed: int) -> Task:
    """The task by its name; training pairs are drawn by a seed of their own."""
    return classify_task(frozen, seed + 1) if name == "classify" else match_task(frozen, seed + 1)


def results(
    task: Task,
    trained: Sequence[Recipe],
    backbone: DualEncoder,
    frozen: FrozenPairs,
    seed: int,
    output: Path,
    *,
    cut: Cut | None,
    console: Console,
) -> Iterator[Result]:
    """Every row of the task's table in turn; the run of the last recipe, an EPIC, is kept in ``output``."""
    yield from rivals(frozen, task, seed)
    for recipe in trained:
        for each in (recipe.control(), recipe):
            yield train_prompted(
                each.cut(cut),
                backbone,
                frozen,
                task,
                seed=seed,
                output=output if each is trained[-1] else None,
                progress=console.is_terminal or None,
            )[0]


def first_layers(trained: Sequence[Recipe], backbone: DualEncoder) -> tuple[int, int]:
    """The lowest (text, vision) layers that any of the recipes puts prompts into."""
    found = []
    for recipe in trained:
        model = wrap(backbone, recipe.config, self_check=False)
        found.append(model.first_layers())
        model.unwrap()
    return min(text for text, _ in found), min(vision for _, vision in found)


def _read(backbone: DualEncoder, trained: Sequence[Recipe], device: str, console: Console, views: int) -> FrozenPairs:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("frozen towers, once", total=None)
        return read_frozen_pairs(
            backbone,
            first_layers(trained, backbone),
            views=views,
            device=device,
            tick=lambda done, total: progress.update(bar, completed=done, total=total),
        )


def draw(task: Task, frozen: FrozenPairs, result: Result, output: Path) -> list[Path]:
    """Training curves, confusion matrix and a contact sheet of test pairs, a PNG each."""
    predicted: Tensor = result.predictions.cpu()
    curves, confusion, sheet = (output / f"{name}.png" for name in ("curves", "confusion", "sheet"))
    training_curves(output / "log.jsonl", curves)
    confusion_matrix(task.test.labels, predicted, task.labels, confusion, title=result.name)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(task.test), generator=generator)[:SHEET_PICTURES].tolist()
    items = [
        SheetItem(
            image=load_image(_picture(frozen, task.test, index)),
            text=frozen.titles[int(task.test.titles[index])],
            label=task.labels[int(task.test.labels[index])],
            predicted=task.labels[int(predicted[index])],
        )
        for index in chosen
    ]
    contact_sheet(items, sheet, title=f"Test pairs, {result.name}")
    return [curves, confusion, sheet]


def _picture(frozen: FrozenPairs, pairs: Pairs, index: int) -> Path:
    return frozen.pictures[int(pairs.pictures[index])]


def reload(task: Task, frozen: FrozenPairs, result: Result, output: Path) -> list[dict[str, str]]:
    """Classify three test pairs with the saved adapter in a fresh process.

    Raises:
        EpicFastError: it says other labels than the model in memory did.
    """
    chosen = [0, len(task.test) // 2, len(task.test) - 1]
    pairs = [
        {
            "file_name": str(_picture(frozen, task.test, index)),
            "text": frozen.titles[int(task.test.titles[index])],
            "label": task.labels[int(result.predictions[index])],
        }
        for index in chosen
    ]
    program = (
        "import json, sys; from epic_fast import Classifier; pairs = json.load(sys.stdin); "
        "classifier = Classifier.from_pretrained(sys.argv[1]); "
        "said = classifier.predict([pair['file_name'] for pair in pairs], [pair['text'] for pair in pairs]); "
        "print(json.dumps([each.label for each in said]))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, str(output)],
        input=json.dumps(pairs),
        capture_output=True,
        text=True,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    if finished.returncode:
        raise EpicFastError(f"the saved adapter in {output} could not be loaded again:\n{finished.stderr}")
    said = json.loads(finished.stdout.splitlines()[-1])
    if said != [pair["label"] for pair in pairs]:
        raise EpicFastError(
            f"the adapter loaded from {output} says {said}, the model in memory said "
            f"{[pair['label'] for pair in pairs]}: saving or loading lost something; please report it"
        )
    atomic_write_text(output / "reloaded.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
    return pairs
