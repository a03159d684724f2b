"""Do more experts help where a longer prompt stops helping?  k experts of l rows beside one prompt of k·l rows.

    python -m benchmarks.mope_study texts --data demo --data posters=FOLDER --texts FILE   # a CPU will do
    python -m benchmarks.mope_study run --data demo --data posters=FOLDER --texts FILE     # a GPU; appends rows
    python -m benchmarks.mope_study show                                                   # the tables, from the rows
    python -m benchmarks.mope_study figure --output docs/images/mope_study.png             # the figure, from the rows

``run`` reads every data set once, runs the frozen towers once, and trains many models at a time, a process each, on
all GPUs that it sees; it then times one training step of each model, alone on the machine.  Rows that are there already
are not made again, and after ``--seconds`` no training is begun, so that several calls share the work: call it until it
says that all is done.
What has to be on the machine with the GPU: the project, the data's folders (nothing for ``demo``) and the FILE of
``texts``, 0.8 kB a sample in float16, in whose place the demo's text tower will do.

Both forms have as many prompt numbers a layer and nothing else that differs but the router: no static prompts, which
would lengthen with the single prompt, and every layer from :data:`FIRST_LAYER` on is routed, so that none has learned
rows of another length.  The text tower has no prompts; its feature reaches the pictures through the router and the one
mapped row that both forms have, and the head reads pictures and prompts alone, as in the released code.  Each form has
its learning rate chosen on validation among :data:`RATES`, for each k by itself, by the mean over the seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, multiprocessing

from benchmarks import timing
from benchmarks.eight_bit import METRIC, SPLITS, Chosen, FromCache
from benchmarks.step import where
from epic_fast.backbones import DualEncoder, load_backbone
from epic_fast.backbones.demo import load_demo_vision
from epic_fast.data import PairDataset, read_folder, resolve_data
from epic_fast.engine import EngineConfig, PrefixCache, TowerCache, TowerState
from epic_fast.engine.graphs import backend_for
from epic_fast.models import MopeConfig, wrap
from epic_fast.plots.style import BLUE, INK, QUIET, VERMILLION, figure_style, new_figure, save_figure
from epic_fast.training import TrainingConfig, compute_metrics, fit, predict

ROWS = Path(__file__).parent / "results" / "mope_study.jsonl"
EXPERTS = (1, 2, 4, 8, 16)
LENGTH = 6
FIRST_LAYER = 4
RATES = (5e-4, 2e-3, 8e-3)
SEEDS = (0, 1, 2, 3, 4)
EPOCHS = 8
BATCH = 64
# What a text becomes: the mean of the text tower's last rows, as in the demo.
TEXT_FEATURE = "mean"
ARMS = {"experts": "k experts of {length} rows", "single": "one prompt of k·{length} rows"}


# -- the data, as the frozen towers see it ---------------------------------------------------------------------------


@dataclass
class Frozen:
    """A data set below the first layer with prompts.

    Attributes:
        name: as the rows call it.
        vision: ``(n, N, C)`` tokens of the pictures below :data:`FIRST_LAYER`, bfloat16.
        text: ``(n, D)`` the texts' features.
        labels: ``(n,)`` or ``(n, K)``.
        rows: of each split, (first, end).
        classes: K.
        problem_type: one of Hugging Face's three.
        record: what a result has to say of its data.
    """

    name: str
    vision: Tensor
    text: Tensor
    labels: Tensor
    rows: dict[str, tuple[int, int]]
    classes: int
    problem_type: str
    record: dict[str, Any]

    def save(self, path: Path) -> None:
        """Into a safetensors file, from which every process takes its own copy."""
        about = {"name": self.name, "rows": self.rows, "classes": self.classes, "record": self.record}
        about["problem_type"] = self.problem_type
        tensors = {"vision": self.vision, "text": self.text, "labels": self.labels}
        save_file({name: each.cpu().contiguous() for name, each in tensors.items()}, path, {"about": json.dumps(about)})

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Frozen:
        """What :meth:`save` wrote, the labels on the CPU."""
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
        about["rows"] = {split: (first, end) for split, (first, end) in about["rows"].items()}
        tensors = load_file(path, device=str(device))
        return cls(vision=tensors["vision"], text=tensors["text"], labels=tensors["labels"].cpu(), **about)

    def cache(self, text_layers: int) -> PrefixCache:
        """Prefixes that end where the first prompts begin; of a text one row is left, its feature."""
        texts = TowerCache([TowerState(self.text[:, None], text_layers)])
        return PrefixCache.from_towers(texts, TowerCache([TowerState(self.vision, FIRST_LAYER)]))

    def split(self, name: str) -> Chosen:
        """The samples of a split."""
        return Chosen(range(*self.rows[name]))


def read_parts(path: str | Path, most: int | None) -> tuple[Any, list[PairDataset], str]:
    """A folder, its splits (``most`` samples of each) and the digest of its metadata."""
    folder = read_folder(path)
    parts = [replace(folder.splits[split], rows=folder.splits[split].rows[:most]) for split in SPLITS]
    digest = hashlib.sha256(json.dumps(sorted(folder.metadata.values())).encode()).hexdigest()
    return folder, parts, digest


@torch.no_grad()
def text_features(backbone: DualEncoder, texts: Sequence[str], device: torch.device) -> Tensor:
    """``(n, D)`` float32 on the CPU: what the text tower makes of each text."""
    tower, found = backbone.text, []
    for start in range(0, len(texts), BATCH):
        words = backbone.tokenizer(
            list(texts[start : start + BATCH]),
            padding=True,
            truncation=True,
            max_length=backbone.max_text_length,
            return_tensors="pt",
        )
        state = tower.start(**{name: each.to(device) for name, each in words.items()})
        found.append(tower.features(tower.run_all(state), TEXT_FEATURE).float().cpu())
    return torch.cat(found)


def write_texts(data: dict[str, str], output: Path, *, most: int | None = None) -> None:
    """The text features of these data sets (name to folder) as one safetensors file, in float16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = load_backbone("demo")
    backbone.to(device)
    tensors, digests = {}, {}
    for name, path in data.items():
        _, parts, digests[name] = read_parts(path, most)
        tensors[name] = text_features(backbone, [text for part in parts for text in part.texts()], device).half()
        print(f"{name}: {len(tensors[name])} texts", flush=True)
    save_file(tensors, output, digests)


def towers() -> DualEncoder:
    """The demo's picture tower, and in the place of its text tower one of the same width that is never run: what
    reaches the model of a text is its feature."""
    from transformers import BertConfig, BertModel

    vision, processor = load_demo_vision()
    width = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 384, "num_hidden_layers": 1}
    text = BertModel(BertConfig(vocab_size=8, max_position_embeddings=8, **width), add_pooling_layer=False)
    return DualEncoder((vision, text), image_processor=processor)


@torch.no_grad()
def read_frozen(
    name: str,
    path: str | Path,
    backbone: DualEncoder,
    device: torch.device,
    *,
    texts: Path | None,
    most: int | None,
    threads: int,
) -> Frozen:
    """Read a data set and run the layers below the first prompts.

    Args:
        texts: the file of ``texts``; None runs the demo's text tower here.
        most: samples of each split; None: all.
        threads: that decode pictures.
    """
    folder, parts, digest = read_parts(path, most)
    assert folder.problem_type is not None
    samples = [(part, index) for part in parts for index in range(len(part))]
    batches = [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]

    def decoded(batch: Sequence[tuple[PairDataset, int]]) -> Tensor:
        pictures = [part[index].image for part, index in batch]
        return backbone.image_processor(pictures, return_tensors="pt")["pixel_values"]

    states = []
    with ThreadPoolExecutor(threads) as pool, torch.autocast(device.type, dtype=torch.bfloat16):
        for pixels in pool.map(decoded, batches):
            state = backbone.vision.run(backbone.vision.start(pixels.to(device)), FIRST_LAYER)
            states.append(state.hidden.bfloat16())
    if texts is None:
        whole = load_backbone("demo")
        whole.to(device)
        text = text_features(whole, [text for part in parts for text in part.texts()], device)
    else:
        with safe_open(texts, "pt") as file:
            if (file.metadata() or {}).get(name) != digest:
                raise SystemExit(f"{texts} has no features of {name} as it lies in {path}; make them anew with `texts`")
            text = file.get_tensor(name).float()
    if len(text) != len(samples):
        raise SystemExit(f"{texts} has {len(text)} texts of {name} for {len(samples)} samples; make them anew")
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + len(part))
    labels = [label for part in parts for label in part.label_ids()]
    return Frozen(
        name=name,
        vision=torch.cat(states),
        text=text,
        labels=_label_tensor(labels, folder.num_labels, folder.problem_type),
        rows={split: (ends[place], ends[place + 1]) for place, split in enumerate(SPLITS)},
        classes=folder.num_labels,
        problem_type=folder.problem_type,
        record={"samples": dict(zip(SPLITS, map(len, parts), strict=True)), "metadata_sha256": digest},
    )


def _label_tensor(labels: Sequence[Any], classes: int, problem_type: str) -> Tensor:
    if problem_type == "single_label_classification":
        return torch.tensor(labels)
    found = torch.zeros(len(labels), classes)
    for row, each in enumerate(labels):
        found[row, each] = 1.0
    return found


# -- what is trained -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """``arm``: ``"experts"``, k of ``length`` rows, or ``"single"``: one prompt as long as these together."""

    arm: Literal["experts", "single"]
    k: int
    length: int

    @property
    def config(self) -> MopeConfig:
        experts, rows = (self.k, self.length) if self.arm == "experts" else (1, self.k * self.length)
        return MopeConfig(
            num_experts=experts,
            prompt_length=rows,
            static_prompts=False,
            complement_prompt_length=0,
            first_layer=FIRST_LAYER,
            route_first_block=True,
            complement_feature=TEXT_FEATURE,
        )


@dataclass(frozen=True)
class Job:
    """One training."""

    data: str
    model: Model
    rate: float
    seed: int

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.data, self.model.arm, self.model.k, self.model.length, self.rate, self.seed)


@dataclass(frozen=True)
class Study:
    """The declared grid."""

    experts: tuple[int, ...] = EXPERTS
    length: int = LENGTH
    rates: tuple[float, ...] = RATES
    seeds: tuple[int, ...] = SEEDS
    epochs: int = EPOCHS
    most: int | None = None

    def models(self) -> list[Model]:
        """Every model once; with one expert the two forms are one and the same."""
        return [
            Model(arm, k, self.length)
            for k in sorted(self.experts, reverse=True)
            for arm in ("experts", "single")
            if k > 1 or arm == "experts"
        ]

    def jobs(self, data: Iterable[str]) -> list[Job]:
        """Every training, one seed after the other, so that what a shorter call leaves is whole seeds."""
        data = list(data)
        return [
            Job(name, model, rate, seed)
            for seed in self.seeds
            for name in data
            for model in self.models()
            for rate in self.rates
        ]


SMOKE = Study(experts=(1, 2), length=2, rates=(2e-3,), seeds=(0, 1), epochs=1, most=12)


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """As :attr:`Job.key`."""
    return (row["data"], row["arm"], row["k"], row["length"], row["rate"], row["seed"])


def built(frozen: Frozen, model: Model, backbone: DualEncoder, engine: EngineConfig | None) -> Any:
    """The model around the towers; ``unwrap`` frees them again."""
    return wrap(
        backbone,
        model.config,
        num_labels=frozen.classes,
        problem_type=frozen.problem_type,
        self_check=False,
        engine=engine,
    )


def train_one(
    frozen: Frozen, job: Job, backbone: DualEncoder, engine: EngineConfig | None, epochs: int
) -> dict[str, Any]:
    """Train, keep the epoch that is best on validation, score the test split once."""
    torch.manual_seed(job.seed)
    model = built(frozen, job.model, backbone, engine)
    try:
        collator = FromCache(frozen.cache(backbone.text.num_layers), frozen.labels)
        training = TrainingConfig(
            epochs=epochs,
            batch_size=BATCH,
            learning_rate=job.rate,
            head_learning_rate=job.rate,
            precision="bf16",
            seed=job.seed,
            tensorboard=False,
        )
        started = time.perf_counter()
        outcome = fit(
            model, frozen.split("train"), frozen.split("validation"), config=training, collator=collator, progress=False
        )
        seconds = time.perf_counter() - started
        test = frozen.split("test")
        logits = predict(model, test, collator=collator, precision="bf16", progress=False).logits
        scores = compute_metrics(
            logits,
            frozen.labels[list(test.rows)],
            frozen.problem_type,
            num_labels=frozen.classes,
            threshold=model.threshold,
        )
        metric = METRIC[frozen.problem_type]
        entropy = [value for name, value in model.diagnostics().items() if name.startswith("routing_entropy/")]
        return {
            "metric": metric,
            "validation": outcome.best_metrics[metric],
            "test": scores,
            "epoch": outcome.best_epoch,
            "epochs": epochs,
            "trainable": model.get_nb_trainable_parameters()[0],
            "routing_entropy": statistics.mean(entropy) if entropy else None,
            "seconds": seconds,
        }
    finally:
        model.unwrap()


def work(
    number: int,
    jobs: Sequence[Job],
    files: dict[str, Path],
    epochs: int,
    engine: EngineConfig | None,
    rows: Path,
    run: dict[str, Any],
    end: float,
    taken: Any,
) -> None:
    """One process: the next job that nobody has taken, until there is none or the time is over."""
    torch.set_num_threads(1)
    device = timing.device_of(number)
    backbone = towers()
    backbone.to(device)
    held: dict[str, Frozen] = {}
    while time.time() < end:
        with taken.get_lock():
            place = taken.value
            taken.value += 1
        if place >= len(jobs):
            return
        job = jobs[place]
        if job.data not in held:
            held[job.data] = Frozen.load(files[job.data], device)
        frozen = held[job.data]
        row = {"kind": "train", "data": job.data, **asdict(job.model), "rate": job.rate, "seed": job.seed}
        try:
            row |= train_one(frozen, job, backbone, engine, epochs)
        except Exception as error:
            # The others' trainings are worth keeping; the next call tries this one again.
            row |= {"kind": "failed", "why": repr(error)}
            backbone.release()
        with taken.get_lock():
            append(rows, {**row, **frozen.record, "run": run})
        print(f"{place + 1}/{len(jobs)} {job.key}: {row.get('validation', row.get('why'))}", flush=True)


def measure_steps(
    frozen: Frozen, models: Sequence[Model], backbone: DualEncoder, engine: EngineConfig | None, device: torch.device
) -> list[dict[str, Any]]:
    """One training step of each model on a batch of :data:`BATCH`: ms as launched from Python, ms of forward and
    backward in a CUDA graph (what the GPU does), MiB added."""
    found = []
    collator = FromCache(frozen.cache(backbone.text.num_layers), frozen.labels.to(device))
    batch = collator(list(range(min(BATCH, frozen.rows["train"][1]))))
    for each in models:
        model = built(frozen, each, backbone, engine).train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")

        def gradients(model: Any = model, parameters: Sequence[Tensor] = parameters) -> None:
            for parameter in parameters:
                parameter.grad = None
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = model(**batch).loss
            with torch.autograd.set_multithreading_enabled(False):
                loss.backward()

        def step(gradients: Any = gradients, optimizer: torch.optim.Optimizer = optimizer) -> None:
            gradients()
            optimizer.step()

        row: dict[str, Any] = {"kind": "step", "data": frozen.name, **asdict(each), "batch": len(batch["labels"])}
        row["launched_ms"] = timing.measure_launched(step, device, one_thread=True)
        row["peak_mib"] = timing.measure_memory(step, device)
        try:
            row["graph_ms"] = timing.measure_graph(gradients, device)
        except RuntimeError as error:
            row |= {"graph_ms": None, "graph_error": repr(error)}
            backend = backend_for(device)
            if backend is not None:
                backend.recover()
        found.append(row)
        model.unwrap()
    return found


def append(path: Path, row: dict[str, Any]) -> None:
    """One more line."""
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows; none where there is no file yet."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def run_study(
    study: Study,
    data: dict[str, str],
    rows: Path,
    *,
    command: str,
    texts: Path | None = None,
    processes: int = 1,
    seconds: float = math.inf,
    engine: EngineConfig | None = None,
) -> bool:
    """Train and time what ``rows`` do not have yet.

    Args:
        data: name to folder.
        processes: trainings at a time; 1 trains in this process.
        seconds: after these no training is begun.

    Returns:
        whether all of it is done.
    """
    started = time.time()
    end = started + seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = {
        **timing.machine(command),
        **timing.libraries(),
        "processes": processes,
        "engine": engine and engine.to_dict(),
    }
    rows.parent.mkdir(parents=True, exist_ok=True)
    there = read_rows(rows)
    done = {key_of(row) for row in there if row["kind"] == "train"}
    timed = {(row["data"], row["arm"], row["k"], row["length"]) for row in there if row["kind"] == "step"}
    jobs = [job for job in study.jobs(data) if job.key not in done]
    backbone = towers()
    backbone.to(device)
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Path] = {}
        for place, (name, path) in enumerate(data.items()):
            threads = max(1, (os.cpu_count() or 1) - 1)
            frozen = read_frozen(name, path, backbone, device, texts=texts, most=study.most, threads=threads)
            files[name] = Path(folder) / f"{place}.safetensors"
            frozen.save(files[name])
            print(f"{name}: the frozen towers' part after {time.time() - started:.0f} s", flush=True)
        print(f"{len(jobs)} trainings to do, {len(done)} done", flush=True)
        context = multiprocessing.get_context("spawn")
        arguments = (jobs, files, study.epochs, engine, rows, run, end, context.Value("i", 0))
        if processes == 1:
            work(0, *arguments)
        elif jobs:
            multiprocessing.spawn(work, args=arguments, nprocs=processes)
        left = {job.key for job in study.jobs(data)} - {
            key_of(row) for row in read_rows(rows) if row["kind"] == "train"
        }
        for name, file in files.items():
            models = [each for each in study.models() if (name, each.arm, each.k, each.length) not in timed]
            if left or not models:
                continue
            for row in measure_steps(Frozen.load(file, device), models, backbone, engine, device):
                append(rows, {**row, "run": run})
    print(f"{len(left)} trainings left after {time.time() - started:.0f} s" if left else "all is done", flush=True)
    return not left


# -- what came of it -------------------------------------------------------------------------------------------------


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By data set: of each form and k the learning rate with the best mean validation over the seeds, with its scores.

    A rate counts where it has a row for every seed that any of the data set's rows has; of rows made twice the last.
    """
    trained = {key_of(row): row for row in rows if row["kind"] == "train"}
    steps = {(row["data"], row["arm"], row["k"], row["length"]): row for row in rows if row["kind"] == "step"}
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["data"] for row in trained.values()):
        here = [row for row in trained.values() if row["data"] == name]
        seeds = sorted({row["seed"] for row in here})
        by_rate: dict[tuple[str, int, int], dict[float, list[dict[str, Any]]]] = {}
        for row in sorted(here, key=lambda row: row["seed"]):
            of_rate = by_rate.setdefault((row["arm"], row["k"], row["length"]), {})
            of_rate.setdefault(row["rate"], []).append(row)
        points = []
        for (arm, k, length), rates in sorted(by_rate.items(), key=lambda each: (each[0][1], each[0][0])):
            whole = {rate: each for rate, each in rates.items() if [row["seed"] for row in each] == seeds}
            if not whole:
                continue
            rate = max(whole, key=lambda rate: statistics.mean(row["validation"] for row in whole[rate]))
            metric = here[0]["metric"]
            test = [row["test"][metric] for row in whole[rate]]
            points.append(
                {
                    "arm": arm,
                    "k": k,
                    "rows": k * length,
                    "rate": rate,
                    "validation": statistics.mean(row["validation"] for row in whole[rate]),
                    "test": test,
                    "mean": statistics.mean(test),
                    "std": statistics.stdev(test) if len(test) > 1 else 0.0,
                    "f1_macro": statistics.mean(row["test"]["f1_macro"] for row in whole[rate]),
                    "trainable": whole[rate][0]["trainable"],
                    "step": steps.get((name, arm, k, length)),
                }
            )
        found[name] = {"metric": here[0]["metric"], "seeds": seeds, "length": here[0]["length"], "points": points}
    return found


def line_of(study: dict[str, Any], arm: str) -> list[dict[str, Any]]:
    """The points of a form by k; the one with k = 1 belongs to both."""
    return [point for point in study["points"] if point["arm"] == arm or point["k"] == 1]


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean over the seeds of ``first`` minus ``second``, and its standard error."""
    each = [one - other for one, other in zip(first, second, strict=True)]
    error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return statistics.mean(each), error


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The tables in Markdown, what each form gains from its first to its last point, and where the rows are from."""
    lines = []
    for name, study in summarise(rows).items():
        heads = [f"{name}, {study['metric'].replace('_', '-')}", "k", "rows k·l", "rate"]
        heads += [f"{len(study['seeds'])} seeds", "macro-F1", "trained"]
        timed = any(point["step"] for point in study["points"])
        heads += ["step, ms", "in a graph, ms"] if timed else []
        lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for arm, label in ARMS.items():
            for point in line_of(study, arm):
                step = point["step"] or {}
                cells = [
                    label.format(length=study["length"]),
                    str(point["k"]),
                    str(point["rows"]),
                    f"{point['rate']:g}",
                ]
                cells += [f"{point['mean']:.4f} ± {point['std']:.4f}", f"{point['f1_macro']:.4f}"]
                cells.append(f"{point['trainable']:,}")
                cells += [_number(step.get("launched_ms")), _number(step.get("graph_ms"))] if timed else []
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        ends = {arm: line_of(study, arm) for arm in ARMS}
        for arm, line in ends.items():
            if len(line) > 1:
                gain, error = difference(line[-1]["test"], line[0]["test"])
                what = ARMS[arm].format(length=study["length"])
                lines.append(f"{what}: k = {line[-1]['k']} minus k = 1: {_points(gain, error)}.")
        if all(len(line) > 1 for line in ends.values()) and ends["experts"][-1]["k"] == ends["single"][-1]["k"]:
            gain, error = difference(ends["experts"][-1]["test"], ends["single"][-1]["test"])
            lines.append(f"Experts minus one prompt at k = {ends['experts'][-1]['k']}: {_points(gain, error)}.")
        lines.append("")
    return "\n".join([*lines, *footnotes(rows)])


def footnotes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Where trainings and steps ran, with what, and of which commit."""
    return [
        f"{what}: {place}"
        for kind, what in (("train", "Trainings"), ("step", "Step times"))
        for place in dict.fromkeys(where(row["run"]) for row in rows if row["kind"] == kind and "run" in row)
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _points(gain: float, error: float) -> str:
    return f"{100 * gain:+.1f} ± {100 * error:.1f} points (standard error over seeds)"


def draw(rows: Sequence[dict[str, Any]], output: str | Path) -> Path:
    """For each data set a panel of the test metric and, where steps were timed, one of the step's time, over k."""
    studies = summarise(rows)
    if not studies:
        raise SystemExit("no trainings in these rows")
    timed = any(point["step"] for study in studies.values() for point in study["points"])
    columns = 2 if timed else 1
    looks = {
        "experts": {"color": BLUE, "marker": "o"},
        "single": {"color": VERMILLION, "marker": "s", "linestyle": "--"},
    }
    with figure_style():
        figure = new_figure(4.6 * columns, 3.2 * len(studies) + 0.7)
        panels = figure.subplots(len(studies), columns, squeeze=False)
        for (name, study), line in zip(studies.items(), panels, strict=True):
            for arm, look in looks.items():
                points = line_of(study, arm)
                label = ARMS[arm].format(length=study["length"])
                place = [point["k"] * (0.97 if arm == "experts" else 1.03) for point in points]
                means, spread = [point["mean"] for point in points], [point["std"] for point in points]
                line[0].errorbar(place, means, yerr=spread, linewidth=1.8, markersize=5, capsize=3, label=label, **look)
                steps = [point for point in points if point["step"]]
                if not steps:
                    continue
                column = "graph_ms" if all(each["step"]["graph_ms"] for each in steps) else "launched_ms"
                times = [each["step"][column] for each in steps]
                line[1].plot([each["k"] for each in steps], times, linewidth=1.8, markersize=5, label=label, **look)
                what = "forward + backward on the GPU, ms" if column == "graph_ms" else "training step, ms"
                line[1].set_title(f"{name}: {what}", loc="left", fontsize=10)
            if timed:
                line[1].set_ylim(0, 1.08 * line[1].get_ylim()[1])
            metric = study["metric"].replace("_", "-")
            line[0].set_title(f"{name}: test {metric}, {len(study['seeds'])} seeds", loc="left", fontsize=10)
            for panel in line:
                ticks = sorted({point["k"] for point in study["points"]})
                panel.set_xscale("log", base=2)
                panel.set_xticks(ticks, [str(k) for k in ticks])
                panel.minorticks_off()
                panel.set_xlabel(f"k  (k·{study['length']} prompt rows a layer)", color=INK)
        panels[0][0].legend(fontsize=8.5)
        run = next(row for row in rows if row["kind"] == "train")["run"]
        place = f"{run['gpu']}, bfloat16" if run["gpu"] else "CPU, bfloat16"
        commit = (run["commit"] or "unknown")[:10]
        figure.supxlabel(
            f"{place}, torch {run['torch']}, commit {commit};\nmean and standard deviation over seeds",
            fontsize=7,
            color=QUIET,
        )
        return save_figure(figure, output)


# -- the command -----------------------------------------------------------------------------------------------------


def data_of(given: Sequence[str]) -> dict[str, str]:
    """``["demo", "films=FOLDER"]`` to name to folder."""
    found = {}
    for each in given:
        name, _, path = each.partition("=")
        found[name] = str(path or resolve_data(name))
    return found


def engine_of(kind: str) -> EngineConfig | None:
    """``plain``: the backbone's own modules; ``fused``: fused blocks; ``graphs``: these, whole steps as CUDA graphs."""
    return None if kind == "plain" else EngineConfig(blocks="fused", graphs=kind == "graphs")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    gpu = torch.cuda.is_available()
    for name in ("texts", "run"):
        command = commands.add_parser(name)
        command.add_argument("--data", action="append", required=True, help="demo, or NAME=FOLDER (imagefolder)")
        command.add_argument("--texts", type=Path, required=name == "texts", help="the file of text features")
        command.add_argument("--smoke", action="store_true", help="a dozen samples and an epoch, to see that it works")
    command.add_argument("--processes", type=int, default=min(14, max(1, (os.cpu_count() or 1) - 2)) if gpu else 1)
    command.add_argument("--seconds", type=float, default=math.inf, help="after these no training is begun")
    command.add_argument("--engine", choices=["plain", "fused", "graphs"], default="fused" if gpu else "plain")
    for name in ("run", "show", "figure"):
        each = command if name == "run" else commands.add_parser(name)
        each.add_argument("--rows", type=Path, default=ROWS)
    each.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    if given.command == "texts":
        write_texts(data_of(given.data), given.texts, most=SMOKE.most if given.smoke else None)
        return 0
    if given.command == "run":
        names = " ".join(f"--data {each.partition('=')[0]}" for each in given.data)
        smoke = " --smoke" if given.smoke else ""
        whole = run_study(
            SMOKE if given.smoke else Study(),
            data_of(given.data),
            given.rows,
            command=f"python -m benchmarks.mope_study run {names} --processes {given.processes} "
            f"--engine {given.engine}{smoke}",
            texts=given.texts,
            processes=given.processes,
            seconds=given.seconds,
            engine=engine_of(given.engine),
        )
        return 0 if whole else 1
    if given.command == "show":
        print(report(read_rows(given.rows)))
    else:
        print(draw(read_rows(given.rows), given.output))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
