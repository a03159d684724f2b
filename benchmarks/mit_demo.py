"""MiT on the demo's two tasks: the demo's pictures infused into SmolLM2, beside what reads frozen features.

    python -m benchmarks.mit_demo prepare --file FILE          # a CPU; SmolLM2 and the demo's towers, 50 MB
    python -m benchmarks.mit_demo run --file FILE              # a GPU; appends rows
    python -m benchmarks.mit_demo show                         # the README's tables, from the rows
    python -m benchmarks.mit_demo figure --output docs/images/mit_demo.png

``prepare`` runs every frozen layer that no training can change: the demo's ViT on all pictures and their views, and
SmolLM2 below :data:`FIRST_LAYER` on all titles in both templates (a token's state depends on the tokens up to its own,
so titles that begin alike share rows).  FILE has these, and SmolLM2's layers from there on in the 4-bit blocks that
they are published in: nothing else has to travel, neither pictures nor language model.

``run`` trains many models at a time, a process each.  Rows that are there already are not made again, and after
``--seconds`` no training is begun: call it until it says that all is done.  Every method has the same declared seeds;
its setting is the one of the grid with the best mean validation accuracy over them.  The test pairs are scored once a
training and decide nothing.

MiT reads the picture through class token and patch mean of the ViT, layer-normed, and the text's last token through
a linear head.  "MiT, no picture" is the same frozen language model with the same head and nothing infused.  The rivals
are those of :mod:`epic_fast.demo.rivals` on the same picture feature and on SmolLM2's last token or mean row.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, multiprocessing

from benchmarks import demo, timing
from benchmarks.mope_study import append, engine_of, read_rows
from epic_fast.backbones import DualEncoder, load_backbone
from epic_fast.backbones.source import LANGUAGE_MODEL, locate
from epic_fast.backbones.towers import VisionTower
from epic_fast.demo.frozen import FrozenPairs, read_frozen_pairs
from epic_fast.demo.pairs import Pairs
from epic_fast.demo.prompted import train_prompted
from epic_fast.demo.recipes import VIEWS, Recipe
from epic_fast.demo.rivals import Result, linear_probe, majority, mlp
from epic_fast.demo.run import make_task
from epic_fast.demo.table import score
from epic_fast.demo.tasks import Task
from epic_fast.engine import EngineConfig, PrefixCache, TowerCache, TowerState
from epic_fast.models import MitConfig
from epic_fast.plots.style import BLUE, INK, QUIET, figure_style, new_figure, save_figure
from epic_fast.training import TrainingConfig

ROWS = Path(__file__).resolve().parent / "results" / "mit_demo.jsonl"
SEEDS = demo.SEEDS
# SmolLM2-135M has 30 layers; the last third may be infused.
FIRST_LAYER = 20
TEMPLATES = {
    "classify": "Title of a drawing: {text}\nCategory:",
    "match": "Title of a drawing: {text}\nMatch:",
}
BATCH = {"classify": 64, "match": 128}
HEAD_RATE = 2e-3
EPOCHS = {"classify": (8, 20), "match": (16, 40)}
MIT, NO_PICTURE = "MiT", "MiT, no picture"
# What a rival reads, by task and method.
RIVALS: dict[str, dict[str, tuple[str, ...]]] = {
    "classify": {
        "linear probe, picture": ("picture",),
        "linear probe, title": ("title",),
        "linear probe, both": ("picture", "title"),
        "MLP on frozen features": ("picture", "title"),
    },
    "match": {
        "linear probe, both": ("picture", "title"),
        "MLP on frozen features": ("picture", "title"),
    },
}
MAJORITY = "majority class"
TEXT_FEATURES = {"last": "pooled", "mean": "mean"}
COMPARED = {
    task: [(MIT, NO_PICTURE), *((MIT, method) for method in ("linear probe, both", "MLP on frozen features"))]
    for task in TEMPLATES
}


# -- what the frozen layers make of the data -------------------------------------------------------------------------


@dataclass
class Prepared:
    """The file of ``prepare``.

    Attributes:
        states: ``(U, D)`` tokens in front of the first layer that may be infused, of all texts.
        tokens: task to ``(n, N)`` rows of ``states``, -1 behind a text's end.
        vision: ``(m, S)`` the pictures' features, views included.
        labels, views: as in :class:`~epic_fast.demo.frozen.FrozenPairs`.
        weights: of the language model from that layer on, names to tensors, in 4-bit blocks (uint8) or as they are.
        about: what else there is to know, JSON.
    """

    states: Tensor
    tokens: dict[str, Tensor]
    vision: Tensor
    labels: Tensor
    views: Tensor
    weights: dict[str, Tensor]
    about: dict[str, Any]

    def save(self, path: Path) -> None:
        """States and features in float16."""
        tensors = {"states": self.states.half(), "vision": self.vision.half(), "labels": self.labels}
        tensors["views"] = self.views.int()
        tensors |= {f"tokens.{task}": each.int() for task, each in self.tokens.items()}
        tensors |= {f"weights.{name}": each for name, each in self.weights.items()}
        save_file(
            {name: each.cpu().contiguous() for name, each in tensors.items()}, path, {"about": json.dumps(self.about)}
        )

    @classmethod
    def load(cls, path: Path) -> Prepared:
        """What :meth:`save` wrote, on the CPU."""
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
        tensors = load_file(path)

        def under(name: str) -> dict[str, Tensor]:
            return {each.removeprefix(name): tensors[each] for each in tensors if each.startswith(name)}

        return cls(
            states=tensors["states"].float(),
            tokens={task: each.long() for task, each in under("tokens.").items()},
            vision=tensors["vision"].float(),
            labels=tensors["labels"].long(),
            views=tensors["views"].long(),
            weights=under("weights."),
            about=about,
        )

    def pairs(self, task: str, device: torch.device, dtype: torch.dtype, *, most: int | None = None) -> FrozenPairs:
        """The data of a task, the cache in front of the first layer of :func:`upper_model`; ``text`` is empty.

        Args:
            dtype: of the tokens.
            most: samples of each split; None: all.
        """
        states, parts = self.states.to(device, dtype), []
        for tokens in self.tokens[task].to(device).split(64):
            valid = tokens >= 0
            width = int(valid.sum(dim=1).max())
            tokens, valid = tokens[:, :width], valid[:, :width]
            hidden = states[tokens.clamp_min(0)] * valid[:, :, None]
            parts.append(TowerState(hidden, 0, valid, valid.sum(dim=1) - 1))
        rows = {split: torch.arange(first, end)[:most] for split, (first, end) in self.about["rows"].items()}
        vision = self.vision.to(device)
        return FrozenPairs(
            cache=PrefixCache.from_towers(TowerCache(parts), TowerCache([TowerState(vision[:, None])])),
            text=vision.new_empty(len(self.labels), 0),
            vision=vision,
            labels=self.labels.to(device),
            rows={split: each.to(device) for split, each in rows.items()},
            views=self.views[:, : 1 + VIEWS[task]].to(device),
            names=self.about["names"],
            titles=self.about["titles"],
            pictures=[],
        )


def token_ids(language: DualEncoder, template: str, titles: Iterable[str]) -> list[list[int]]:
    """Each title in the template, as the tokenizer has it."""
    return [language.tokenizer(template.replace("{text}", title)).input_ids for title in titles]


@torch.no_grad()
def text_states(
    language: DualEncoder, texts: dict[str, list[list[int]]], layer: int, *, batch_size: int = 64
) -> tuple[Tensor, dict[str, Tensor]]:
    """Tokens in front of ``layer``, each once, and their rows of each text; see :class:`Prepared`.

    Args:
        texts: task to token ids.
    """
    known: dict[tuple[int, ...], int] = {}
    found: list[Tensor] = []
    tokens: dict[str, Tensor] = {}
    for task, ids in texts.items():
        rows = torch.full((len(ids), max(map(len, ids))), -1)
        wanted = []
        for text, each in enumerate(ids):
            begins = [tuple(each[: end + 1]) for end in range(len(each))]
            new = [place for place, begin in enumerate(begins) if begin not in known]
            for place in new:
                known[begins[place]] = len(known)
            rows[text, : len(each)] = torch.tensor([known[begin] for begin in begins])
            if new:
                wanted.append((each, new))
        for start in range(0, len(wanted), batch_size):
            batch = wanted[start : start + batch_size]
            width = max(len(each) for each, _ in batch)
            padded = torch.tensor([each + [0] * (width - len(each)) for each, _ in batch])
            mask = torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each, _ in batch])
            hidden = language.text.run(language.text.start(padded, mask), layer).hidden
            found += [state[new] for state, (_, new) in zip(hidden, batch, strict=True)]
        tokens[task] = rows
    return torch.cat(found), tokens


def prepare(pictures: FrozenPairs, towers: DualEncoder, language: DualEncoder, first_layer: int) -> Prepared:
    """All that :func:`run_study` reads.

    Args:
        pictures: the demo's pairs as ``towers``, the demo's own, see them.
        language: the language model with its tokenizer.
        first_layer: the lowest that may be infused.
    """
    texts = {task: token_ids(language, template, pictures.titles) for task, template in TEMPLATES.items()}
    states, tokens = text_states(language, texts, first_layer)
    model = language.text.model
    config = {**model.config.to_dict(), "num_hidden_layers": model.config.num_hidden_layers - first_layer}
    if config.get("layer_types") is not None:
        config["layer_types"] = config["layer_types"][first_layer:]
    ends = {split: (int(rows[0]), int(rows[-1]) + 1) for split, rows in pictures.rows.items()}
    return Prepared(
        states=states,
        tokens=tokens,
        vision=pictures.vision,
        labels=pictures.labels,
        views=pictures.views,
        weights=packed_weights(language, first_layer),
        about={
            "rows": ends,
            "names": pictures.names,
            "titles": pictures.titles,
            "first_layer": first_layer,
            "language_model": {**config, "dtype": "float32"},
            "frozen_parameters": sum(
                each.numel() for tower in (towers.vision.model, model) for each in tower.parameters()
            ),
        },
    )


# -- the language model from the first infused layer on --------------------------------------------------------------

# Names of transformers to those of GGUF.
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def packed_weights(language: DualEncoder, first_layer: int) -> dict[str, Tensor]:
    """Layers from ``first_layer`` on, numbered from 0, and the final norm: where the published 4-bit blocks give a
    weight bit for bit these blocks, else the weight."""
    blocks = _published_blocks(language, first_layer)
    found = {}
    for name, weight in language.text.model.state_dict().items():
        part, _, rest = name.partition(".")
        number, _, inner = rest.partition(".")
        if part == "norm":
            found[name] = weight.clone()
        elif part == "layers" and int(number) >= first_layer:
            packed = blocks.get(name)
            exact = packed is not None and torch.equal(dequantised(packed), weight)
            found[f"layers.{int(number) - first_layer}.{inner}"] = packed if exact else weight.clone()
    return found


def _published_blocks(language: DualEncoder, first_layer: int) -> dict[str, Tensor]:
    """Names to rows of Q4_1 blocks ``(rows, bytes)``, of a language model that comes in a GGUF file; else nothing."""
    folder, options = locate((language.source or "").removeprefix("text="), "text")
    if "gguf_file" not in options:
        return {}
    gguf: Any = importlib.import_module("gguf")
    config, found = language.text.model.config, {}
    tensors = {each.name: each for each in gguf.GGUFReader(str(Path(folder) / options["gguf_file"])).tensors}
    for layer in range(first_layer, config.num_hidden_layers):
        for name, short in GGUF_NAMES.items():
            tensor = tensors[f"blk.{layer}.{short}.weight"]
            if tensor.tensor_type != gguf.GGMLQuantizationType.Q4_1:
                continue
            rows = torch.from_numpy(np.array(tensor.data))
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(short)
            if heads is not None:
                # GGUF has the two halves of a rotation side by side.
                rows = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            found[f"layers.{layer}.{name}.weight"] = rows.contiguous()
    return found


def dequantised(blocks: Tensor) -> Tensor:
    """Rows of Q4_1 blocks, 20 bytes each (scale and minimum in float16, then 32 numbers of 4 bits, the low halves of
    all bytes first), to float32."""
    parts = blocks.unflatten(1, (-1, 20))
    scale, minimum = parts[:, :, :4].contiguous().view(torch.float16).float().split(1, dim=2)
    codes = torch.cat([parts[:, :, 4:] & 15, parts[:, :, 4:] >> 4], dim=2)
    return (codes.float() * scale + minimum).flatten(1)


class PictureFeatures(VisionTower):
    """In the place of a vision tower that has run: its token is the picture's feature, class token and patch mean."""

    def __init__(self, width: int):
        self.model, self.projection, self.layers = None, None, []
        self.config = SimpleNamespace(model_type="features", hidden_size=width // 2)

    def find_layers(self) -> Sequence[Any]:
        return []

    @property
    def feature_widths(self) -> dict[str, int]:
        return dict.fromkeys(("cls", "mean"), self.hidden_size)

    def features(self, state: TowerState, kinds: str) -> Tensor:
        assert kinds == "cls+mean"
        return state.hidden[:, 0]

    def start(self, pixel_values: Tensor) -> TowerState:
        raise NotImplementedError

    def normalise(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def pool(self, state: TowerState) -> Tensor:
        raise NotImplementedError


def upper_model(prepared: Prepared, device: torch.device, dtype: torch.dtype) -> DualEncoder:
    """The language model's layers from the first that may be infused on, beside :class:`PictureFeatures`."""
    from transformers import AutoConfig, AutoModel

    # Words are no longer asked of it.
    about = {**prepared.about["language_model"], "vocab_size": 1}
    about |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    model = AutoModel.from_config(AutoConfig.for_model(about.pop("model_type"), **about))
    weights = {
        name: dequantised(each) if each.dtype == torch.uint8 else each for name, each in prepared.weights.items()
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["embed_tokens.weight"], [])
    backbone = DualEncoder(model.eval())
    # Parameters alone: angles stay in float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    backbone.to(device)
    backbone.vision = PictureFeatures(prepared.vision.shape[1])
    return backbone


# -- what is trained -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One training; ``setting`` is of the method's grid."""

    task: str
    method: str
    setting: dict[str, Any]
    seed: int

    @property
    def key(self) -> tuple[Any, ...]:
        return key_of(asdict(self))


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is the row of."""
    return (row["task"], row["method"], json.dumps(row["setting"], sort_keys=True), row["seed"])


@dataclass(frozen=True)
class Study:
    """The declared grid.  MiT is trained with the first layers, epochs and shift at every rate, and with each of the
    others in their place at the middle rate.

    Attributes:
        layers: lists of infused layers, numbered as in the whole language model.
        rates: of the transforms.
        epochs: by task.
        shifts: standard deviations of W_a at the start.
        head_rates, head_epochs: of the language model without a picture.
        most: pictures of each split; None: all.
    """

    layers: tuple[tuple[int, ...], ...] = (tuple(range(FIRST_LAYER, 30)), tuple(range(25, 30)))
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    epochs: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: EPOCHS)
    shifts: tuple[float, ...] = (0.0, 0.02)
    head_rates: tuple[float, ...] = (2e-3, 8e-3)
    head_epochs: tuple[int, ...] = (8, 16)
    seeds: tuple[int, ...] = SEEDS
    most: int | None = None

    def settings(self, task: str) -> dict[str, list[dict[str, Any]]]:
        """Each method's settings."""
        middle = self.rates[len(self.rates) // 2]
        epochs, *longer = self.epochs[task]
        base = {"layers": list(self.layers[0]), "epochs": epochs, "value_shift_std": self.shifts[0], "rate": middle}
        infused = [
            *({**base, "rate": rate} for rate in self.rates),
            *({**base, "layers": list(each)} for each in self.layers[1:]),
            *({**base, "epochs": each} for each in longer),
            *({**base, "value_shift_std": each} for each in self.shifts[1:]),
        ]
        features = [{"text": each} for each in TEXT_FEATURES]
        return {
            MIT: infused,
            NO_PICTURE: [{"rate": rate, "epochs": each} for each in self.head_epochs for rate in self.head_rates],
            **{method: features if "title" in reads else [{}] for method, reads in RIVALS[task].items()},
            MAJORITY: [{}],
        }

    def jobs(self, tasks: Iterable[str] = tuple(TEMPLATES)) -> list[Job]:
        """Every training, one seed after the other, the longest of a seed first."""
        return [
            Job(task, method, setting, seed)
            for seed in self.seeds
            for task in sorted(tasks, reverse=True)
            for method, settings in self.settings(task).items()
            for setting in sorted(settings, key=lambda each: -each.get("epochs", 0))
        ]


SMOKE = Study(
    layers=(tuple(range(25, 30)), (29,)),
    rates=(1e-3,),
    epochs=dict.fromkeys(EPOCHS, (1,)),
    shifts=(0.0,),
    head_rates=(1e-3,),
    head_epochs=(1,),
    seeds=(0, 1),
    most=24,
)


def recipe_of(job: Job, first_layer: int) -> Recipe:
    """MiT, or its frozen language model, with the job's setting; layers as :func:`upper_model` numbers them."""
    setting = job.setting
    config = MitConfig(
        layers=[layer - first_layer for layer in setting.get("layers", [])],
        prompt_template=TEMPLATES[job.task],
        image_feature="cls+mean",
        source_norm="layer",
        value_shift_std=setting.get("value_shift_std"),
        feature_norm="standardize",
        head_dropout=0.5,
    )
    training = TrainingConfig(
        epochs=setting["epochs"],
        batch_size=BATCH[job.task],
        learning_rate=setting["rate"],
        head_learning_rate=HEAD_RATE if job.method == MIT else setting["rate"],
        tensorboard=False,
    )
    recipe = Recipe(MIT, config, training)
    return recipe if job.method == MIT else recipe.control()


class Bench:
    """A process's copy of the data, and what it made of it; the frozen part of a training runs once.

    Args:
        file: of ``prepare``.
        engine: of the language model.
        most: pictures of each split; None: all.
    """

    def __init__(self, file: Path, device: torch.device, engine: EngineConfig | None = None, most: int | None = None):
        self.prepared = Prepared.load(file)
        self.device, self.engine, self.most = device, engine, most
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.backbone = upper_model(self.prepared, device, self.dtype)
        self.first_layer: int = self.prepared.about["first_layer"]
        self._pairs: dict[tuple[str, int], FrozenPairs] = {}
        self._features: dict[tuple[str, str], FrozenPairs] = {}

    def pairs(self, task: str, layer: int) -> FrozenPairs:
        """A task's data in front of a layer of :func:`upper_model`."""
        if (task, layer) not in self._pairs:
            if layer == 0:
                found = self.prepared.pairs(task, self.device, self.dtype, most=self.most)
            else:
                below = max((known for name, known in self._pairs if name == task and known < layer), default=0)
                found = self.pairs(task, below).advanced(self.backbone, (layer, 0))
            self._pairs[task, layer] = found
        return self._pairs[task, layer]

    @torch.no_grad()
    def features(self, task: str, kind: str) -> FrozenPairs:
        """A task's data on the CPU, ``text`` being a feature of :data:`TEXT_FEATURES` behind the last layer."""
        if (task, kind) not in self._features:
            tower = self.backbone.text
            top = self.pairs(task, tower.num_layers)
            rows = torch.arange(len(top.labels), device=self.device).split(64)
            parts = [tower.features(top.cache.text.rows(each), TEXT_FEATURES[kind]).float() for each in rows]
            self._features[task, kind] = replace(
                top,
                text=torch.cat(parts).cpu(),
                vision=top.vision.cpu(),
                labels=top.labels.cpu(),
                rows={split: each.cpu() for split, each in top.rows.items()},
                views=top.views.cpu(),
            )
        return self._features[task, kind]

    def train(self, job: Job) -> dict[str, Any]:
        """What a row has to say of one training."""
        if job.method in (MIT, NO_PICTURE):
            recipe = recipe_of(job, self.first_layer)
            assert isinstance(recipe.config, MitConfig)
            layers = recipe.config.layers
            frozen = self.pairs(job.task, layers[0] if layers else self.backbone.text.num_layers)
            task = make_task(job.task, frozen, job.seed)
            result, extra = train_prompted(recipe, self.backbone, frozen, task, seed=job.seed, engine=self.engine)
            history = [[row["train_loss"], row["validation"]["accuracy"]] for row in extra["history"]]
        else:
            frozen = self.features(job.task, job.setting.get("text", "last"))
            task = make_task(job.task, frozen, job.seed)
            result, history = rival(job, frozen, task), []
        # Beside the whole frozen towers, of which a part was run here.
        row = score(task, replace(result, total=0), self.prepared.about["frozen_parameters"])
        row["right"] = "".join(map(str, (result.predictions.cpu() == task.test.labels).int().tolist()))
        row["history"] = [[round(loss, 4), round(accuracy, 4)] for loss, accuracy in history]
        return {**row, "pictures": task.test.pictures.tolist()}


def rival(job: Job, frozen: FrozenPairs, task: Task) -> Result:
    """A rival of :mod:`epic_fast.demo.rivals` on frozen features."""
    task.train.set_epoch(0)
    splits: dict[str, Pairs] = {"train": task.train, "validation": task.validation, "test": task.test}
    labels = {split: pairs.labels for split, pairs in splits.items()}
    if job.method == MAJORITY:
        return majority(labels)
    reads = RIVALS[job.task][job.method]

    def features(pairs: Pairs) -> Tensor:
        parts = {"picture": frozen.vision[pairs.pictures], "title": frozen.text[pairs.titles]}
        return torch.cat([parts[each] for each in reads], dim=1)

    if job.method.startswith("linear"):
        inputs = {split: features(pairs) for split, pairs in splits.items()}
        return linear_probe(job.method, inputs, labels, len(task.labels))

    def draw(epoch: int) -> tuple[Tensor, Tensor]:
        task.train.set_epoch(epoch)
        return features(task.train), task.train.labels

    validation = (features(task.validation), labels["validation"])
    return mlp(job.method, draw, validation, features(task.test), len(task.labels), seed=job.seed)


def work(
    number: int,
    jobs: Sequence[Job],
    file: Path,
    most: int | None,
    engine: EngineConfig | None,
    rows: Path,
    run: dict[str, Any],
    end: float,
    taken: Any,
) -> None:
    """One process: the next job that nobody has taken, until there is none or the time is over."""
    torch.set_num_threads(1)
    device = timing.device_of(number)
    bench = None
    while time.time() < end:
        with taken.get_lock():
            place = taken.value
            taken.value += 1
        if place >= len(jobs):
            return
        job = jobs[place]
        bench = bench or Bench(file, device, engine, most)
        row: dict[str, Any] = {"kind": "train", **asdict(job)}
        try:
            row |= bench.train(job)
        except Exception as error:
            # The others' trainings are worth keeping; the next call tries this one again.
            row |= {"kind": "failed", "why": repr(error)}
            bench.backbone.release()
        with taken.get_lock():
            pictures = row.pop("pictures", None)
            if pictures and not any(each["kind"] == "pairs" and each["task"] == job.task for each in read_rows(rows)):
                append(rows, {"kind": "pairs", "task": job.task, "pictures": pictures})
            append(rows, {**row, "run": run})
        said = row.get("validation", row.get("why"))
        print(f"{place + 1}/{len(jobs)} {job.key}: {said}, {row.get('seconds', 0):.1f} s", flush=True)


def run_study(
    study: Study,
    file: Path,
    rows: Path,
    *,
    command: str,
    tasks: Sequence[str] = tuple(TEMPLATES),
    processes: int = 1,
    seconds: float = math.inf,
    engine: EngineConfig | None = None,
) -> bool:
    """Train what ``rows`` do not have yet.

    Args:
        file: of ``prepare``.
        processes: trainings at a time; 1 trains in this process.
        seconds: after these no training is begun.

    Returns:
        whether all of it is done.
    """
    started = time.time()
    run = {
        **timing.machine(command),
        **timing.libraries(),
        "processes": processes,
        "engine": engine and engine.to_dict(),
        "file_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    rows.parent.mkdir(parents=True, exist_ok=True)

    def left() -> list[Job]:
        done = {key_of(row) for row in read_rows(rows) if row["kind"] == "train"}
        return [job for job in study.jobs(tasks) if job.key not in done]

    jobs = left()
    print(f"{len(jobs)} trainings to do, {len(study.jobs(tasks)) - len(jobs)} done", flush=True)
    context = multiprocessing.get_context("spawn")
    arguments = (jobs, file, study.most, engine, rows, run, started + seconds, context.Value("i", 0))
    if processes == 1:
        work(0, *arguments)
    elif jobs:
        multiprocessing.spawn(work, args=arguments, nprocs=min(processes, len(jobs)))
    missing = len(left())
    print(f"{missing} trainings left after {time.time() - started:.0f} s" if missing else "all is done", flush=True)
    return not missing


# -- what came of it -------------------------------------------------------------------------------------------------


def select(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each task and method the rows of the setting with the best mean validation accuracy over the seeds.

    A setting counts where it has a row for every seed that any of the task's rows has; of rows made twice the last.
    """
    trained = {key_of(row): row for row in rows if row["kind"] == "train"}
    seeds: dict[str, set[int]] = {}
    by_setting: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for (task, method, setting, seed), row in trained.items():
        seeds.setdefault(task, set()).add(seed)
        by_setting.setdefault((task, method), {}).setdefault(setting, []).append(row)
    order = [MAJORITY, *RIVALS["classify"], NO_PICTURE, MIT]
    found = []
    for (task, _), settings in sorted(by_setting.items(), key=lambda each: (each[0][0], order.index(each[0][1]))):
        whole = [each for each in settings.values() if {row["seed"] for row in each} == seeds[task]]
        if whole:
            best = max(whole, key=lambda each: statistics.mean(row["validation"] for row in each))
            found += sorted(best, key=lambda row: row["seed"])
    return found


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By task as :func:`benchmarks.demo.summarise`, and ``setting`` of each method."""
    pictures = {row["task"]: row["pictures"] for row in rows if row["kind"] == "pairs"}
    chosen = [{**row, "right": list(map(int, row["right"])), "pictures": pictures[row["task"]]} for row in select(rows)]
    tasks = {row["task"] for row in chosen}
    found = demo.summarise(chosen, {task: pairs for task, pairs in COMPARED.items() if task in tasks})
    for task, each in found.items():
        settings = {row["method"]: row["setting"] for row in chosen if row["task"] == task}
        for line in each["methods"]:
            line["setting"] = settings[line["method"]]
    return found


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The README's tables in Markdown, and below each which settings validation chose."""
    found = summarise(rows)
    parts = []
    for task, each in found.items():
        parts.append(demo.readme({"tasks": {task: each}}))
        said = [f"{line['method']}: {say(line['setting'])}" for line in each["methods"] if line["setting"]]
        parts.append(f"Chosen on validation: {'; '.join(said)}.\n")
    return "\n".join(parts)


def say(setting: dict[str, Any]) -> str:
    """A setting in words."""
    said = []
    for name, value in setting.items():
        if name == "layers":
            said.append(f"layers {value[0]} to {value[-1]}" if len(value) > 1 else f"layer {value[0]}")
        elif name == "text":
            said.append("last token" if value == "last" else "mean token")
        elif name == "epochs":
            said.append(f"{value} epochs")
        else:
            said.append(f"{'std of the value shift' if name == 'value_shift_std' else name} {value:g}")
    return ", ".join(said)


def draw(rows: Sequence[dict[str, Any]], output: str | Path) -> Path:
    """A panel a task: test accuracy of every method, mean and standard deviation, and each seed."""
    found = summarise(rows)
    if not found:
        raise SystemExit("no trainings in these rows")
    with figure_style():
        figure = new_figure(5.6 * len(found), 3.6)
        for panel, (task, each) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
            lines = each["methods"]
            draw_bars(panel, {line["method"]: list(line["seeds"].values()) for line in lines}, chosen=MIT)
            panel.set_xlim(0, 1)
            what = "which of the 12 classes?" if task == "classify" else "is this the picture's title?"
            seeds = len(lines[0]["seeds"])
            panel.set_title(f"{what} Test accuracy, {seeds} seeds", loc="left", fontsize=10)
        say_where(figure, rows)
        return save_figure(figure, output)


def draw_bars(panel: Any, values: Mapping[str, Sequence[float]], chosen: str) -> None:
    """A bar a method, from below: the mean of its seeds, their standard deviation, and each of them."""
    for place, (method, each) in enumerate(values.items()):
        mean = statistics.mean(each)
        panel.barh(place, mean, height=0.62, color=BLUE if method == chosen else QUIET, alpha=0.45)
        spread = statistics.stdev(each) if len(each) > 1 else 0.0
        panel.errorbar(mean, place, xerr=spread, color=INK, capsize=3, linewidth=1.2)
        panel.plot(each, [place] * len(each), "|", color=INK, markersize=7)
    panel.set_yticks(range(len(values)), list(values))


def say_where(figure: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Card, torch and commits of the trainings, below a figure."""
    runs = [row["run"] for row in rows if row["kind"] == "train"]
    commits = " and ".join(dict.fromkeys((run["commit"] or "unknown")[:10] for run in runs))
    place = runs[0]["gpu"] or "CPU"
    figure.supxlabel(f"{place}, torch {runs[0]['torch']}, commit {commits}", fontsize=7, color=QUIET)


# -- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    gpu = torch.cuda.is_available()
    preparing = commands.add_parser("prepare")
    preparing.add_argument("--file", type=Path, required=True, help="what is written")
    preparing.add_argument("--language-model", default=LANGUAGE_MODEL, help="smollm2, or its folder")
    running = commands.add_parser("run")
    running.add_argument("--file", type=Path, required=True, help="of `prepare`")
    running.add_argument("--task", action="append", choices=list(TEMPLATES), help="by default both")
    running.add_argument("--smoke", action="store_true", help="two dozen pictures and an epoch, to see that it works")
    running.add_argument("--processes", type=int, default=min(14, max(1, (os.cpu_count() or 1) - 2)) if gpu else 1)
    running.add_argument("--seconds", type=float, default=math.inf, help="after these no training is begun")
    running.add_argument("--engine", choices=["plain", "fused", "graphs"], default="fused" if gpu else "plain")
    for each in (running, commands.add_parser("show"), drawing := commands.add_parser("figure")):
        each.add_argument("--rows", type=Path, default=ROWS)
    drawing.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    if given.command == "prepare":
        towers = load_backbone("demo")
        layers = (towers.text.num_layers, towers.vision.num_layers)
        pictures = read_frozen_pairs(towers, layers, views=max(VIEWS.values()))
        print(f"{len(pictures.vision)} pictures and views", flush=True)
        found = prepare(pictures, towers, load_backbone(f"text={given.language_model}"), FIRST_LAYER)
        found.save(given.file)
        print(f"{len(found.states)} tokens; {given.file}: {given.file.stat().st_size / 1e6:.1f} MB")
        return 0
    if given.command == "run":
        tasks = given.task or list(TEMPLATES)
        said = "".join(f" --task {each}" for each in given.task or []) + (" --smoke" if given.smoke else "")
        whole = run_study(
            SMOKE if given.smoke else Study(),
            given.file,
            given.rows,
            command=f"python -m benchmarks.mit_demo run{said} --processes {given.processes} --engine {given.engine}",
            tasks=tasks,
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
