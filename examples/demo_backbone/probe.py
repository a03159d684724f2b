"""Score a vision tower on the demo's data: linear probes, and how well pictures and titles match.

    python examples/demo_backbone/probe.py --tower tower --data openclipart12.zip --output scores.json

The probes are multinomial logistic regressions on frozen features (standardised by the train split), fitted on
the train split; their L2 strength is the one with the best validation accuracy (ties: the lower validation loss).
The matching scores use the cosine of the aligned picture features and the title embeddings. Everything is
deterministic.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import read_pictures, read_rows, title_features
from safetensors.torch import load_file
from torch import Tensor
from transformers import ViTModel

STRENGTHS = [10.0**power for power in torch.arange(-2.5, 0.51, 0.5).tolist()]


@torch.no_grad()
def picture_features(folder: Path, data: Path, rows: list[dict[str, str]], device: str) -> tuple[Tensor, Tensor]:
    """(rows, 256) [CLS] and (rows, 256) patch mean, after the tower's last layer norm, in fp32."""
    side = json.loads((folder / "config.json").read_text())["image_size"]
    array = read_pictures(data, rows, "RGB", side, threads=os.cpu_count() or 1)
    tower = ViTModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32).eval().to(device)
    cls, mean = [], []
    for start in range(0, len(rows), 64):
        batch = torch.from_numpy(array[start : start + 64]).permute(0, 3, 1, 2).to(device)
        hidden = tower(pixel_values=(batch.float() / 255 - 0.5) / 0.5).last_hidden_state
        cls.append(hidden[:, 0].cpu())
        mean.append(hidden[:, 1:].mean(1).cpu())
    return torch.cat(cls), torch.cat(mean)


def fit(x: Tensor, y: Tensor, classes: int, strength: float, start: Tensor | None) -> Tensor:
    """Weights (classes, features + 1) of the logistic regression with penalty strength / 2 * |W|^2 (no bias)."""
    weight = torch.zeros(classes, x.shape[1] + 1, dtype=x.dtype) if start is None else start.clone()
    weight.requires_grad_()
    solver = torch.optim.LBFGS(
        [weight], max_iter=150, history_size=20, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        logits = x @ weight[:, :-1].T + weight[:, -1]
        value = F.cross_entropy(logits, y) + strength / 2 * weight[:, :-1].square().sum()
        value.backward()
        return value

    solver.step(loss)  # type: ignore[arg-type]
    return weight.detach()


def macro_f1(guess: Tensor, y: Tensor, classes: int) -> float:
    scores = []
    for label in range(classes):
        hits = ((guess == label) & (y == label)).sum().item()
        scores.append(2 * hits / max(1, (guess == label).sum().item() + (y == label).sum().item()))
    return sum(scores) / classes


def probe(x: Tensor, y: Tensor, split: dict[str, Tensor], classes: int) -> dict[str, float]:
    """The probe's scores with the L2 strength that validation chooses."""
    x = x.double()
    train = x[split["train"]]
    x = (x - train.mean(0)) / train.std(0).clamp_min(1e-6)
    best: tuple[float, float] | None = None
    chosen: dict[str, float] = {}
    weight = None
    for strength in reversed(STRENGTHS):
        weight = fit(x[split["train"]], y[split["train"]], classes, strength, weight)
        logits = x @ weight[:, :-1].T + weight[:, -1]
        scores: dict[str, float] = {"l2": strength}
        for name in ("validation", "test"):
            part, truth = logits[split[name]], y[split[name]]
            scores[f"{name}_accuracy"] = (part.argmax(1) == truth).double().mean().item()
            scores[f"{name}_macro_f1"] = macro_f1(part.argmax(1), truth, classes)
        rows = split["validation"]
        key = (scores["validation_accuracy"], -F.cross_entropy(logits[rows], y[rows]).item())
        if best is None or key > best:
            best, chosen = key, scores
    return {name: round(value, 8 if name == "l2" else 4) for name, value in chosen.items()}


def auc(positive: Tensor, negative: Tensor) -> float:
    """The chance that a positive scores above a negative."""
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive, right=False) + torch.searchsorted(ordered, positive, right=True)
    return (below.double().mean() / 2 / len(ordered)).item()


def matching(seen: Tensor, titles: Tensor, rows: list[dict[str, str]], split: dict[str, Tensor]) -> dict[str, Any]:
    """Own title against another picture's title, of any class and of the same class."""
    report: dict[str, Any] = {}
    threshold: dict[str, float] = {}
    for name in ("validation", "test"):
        index = split[name].tolist()
        texts = [rows[i]["text"].strip().lower() for i in index]
        labels = [rows[i]["label"] for i in index]
        cosine = seen[split[name]] @ titles[split[name]].T
        other = torch.tensor([[a != b for b in texts] for a in texts])
        same = torch.tensor([[a == b for b in labels] for a in labels])
        own = cosine.diagonal().contiguous()
        scores: dict[str, float] = {}
        for kind, allowed in (("any_class", other), ("same_class", other & same)):
            scores[f"auc_{kind}"] = auc(own, cosine[allowed])
            per_picture = [
                (own[i] > cosine[i][allowed[i]]).double().mean() for i in range(len(index)) if allowed[i].any()
            ]
            scores[f"own_above_other_{kind}"] = torch.stack(per_picture).mean().item()
            generator = torch.Generator().manual_seed(0)
            draws = [i for i in range(len(index)) if allowed[i].any()]
            drawn = torch.stack(
                [cosine[i][torch.multinomial(allowed[i].double(), 1, generator=generator)[0]] for i in draws]
            )
            mine = own[draws]
            if name == "validation":  # one foreign title a picture; the threshold is chosen here
                cuts = torch.cat([mine, drawn]).sort().values
                hits = [(((mine >= c).double().mean() + (drawn < c).double().mean()) / 2).item() for c in cuts]
                threshold[kind] = cuts[max(range(len(cuts)), key=hits.__getitem__)].item()
            cut = threshold[kind]
            scores[f"pair_accuracy_{kind}"] = (
                ((mine >= cut).double().mean() + (drawn < cut).double().mean()) / 2
            ).item()
        rank = (cosine.masked_fill(~other, -9) > own.unsqueeze(1)).sum(1)
        scores["title_in_top_1"] = (rank < 1).double().mean().item()
        scores["title_in_top_10"] = (rank < 10).double().mean().item()
        report[name] = {key: round(value, 4) for key, value in scores.items()}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tower", type=Path, required=True, help="folder written by distill.py")
    parser.add_argument("--data", type=Path, required=True, help="zip made by pack_data.py")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rows = read_rows(args.data)
    classes = sorted({row["label"] for row in rows})
    y = torch.tensor([classes.index(row["label"]) for row in rows])
    split = {
        name: torch.tensor([i for i, row in enumerate(rows) if row["split"] == name])
        for name in ("train", "validation", "test")
    }
    text = title_features([row["text"] for row in rows])
    cls, mean = picture_features(args.tower, args.data, rows, args.device)
    both = torch.cat([cls, mean], -1)
    report: dict[str, Any] = {"text_only": probe(text, y, split, len(classes)), "image_only": {}, "image_and_text": {}}
    for name, x in (("cls", cls), ("patch_mean", mean), ("cls_and_patch_mean", both)):
        report["image_only"][name] = probe(x, y, split, len(classes))
        report["image_and_text"][name] = probe(torch.cat([x, text], -1), y, split, len(classes))
    path = args.tower / "alignment.safetensors"
    if path.exists():
        maps = load_file(path)
        seen = F.linear(both, maps["visual_projection.weight"], maps["visual_projection.bias"])
        report["matching"] = matching(F.normalize(seen, dim=-1), F.normalize(text, dim=-1), rows, split)
    print(json.dumps(report, indent=1))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
