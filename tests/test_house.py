"""The rules of the house, read off the source: who imports whom, and what stands in no file."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import epic_fast
from epic_fast import functional

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "epic_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

# Which rooms a room may know.  Errors, files and hooks are for everybody but the kernels, which know nobody.
KNOWS: dict[str, set[str]] = {
    "kernels": set(),
    "ops": {"kernels"},
    "functional": {"ops"},
    "hf": {"functional"},
    "nn": {"functional"},
    "engine": {"functional", "ops"},
    "backbones": {"engine"},
    "models": {"nn", "backbones", "engine", "functional"},
    # Data meets a model only as an argument (`Collator.for_model(model)`), so that readers need no towers.
    "data": set(),
    "plots": {"data"},
    "training": {"data", "models", "backbones", "engine", "plots"},
}
EVERYBODYS = {"errors", "files", "hooks", "__version__"}
# What may be imported from outside, where that is a short list.
OUTSIDE: dict[str, set[str]] = {
    "kernels": {"torch", "triton"},
    "ops": {"torch", "triton"},
    "functional": {"torch"},
    "hf": {"torch", "transformers"},
    "nn": {"torch"},
    "errors": set(),
    "files": set(),
    "hooks": {"torch"},
}
LIGHT_AT_TOP = {"transformers", "accelerate", "torchmetrics", "matplotlib", "PIL", "typer", "rich", "tensorboard"}
# A public name taken from the package itself counts as taken from the room that it lives in.
WHERE = {name: module.split(".")[1] for name, module in epic_fast._WHERE.items()}
STANDARD = set(__import__("sys").stdlib_module_names)


def room_of(path: Path) -> str:
    """``epic_fast/models/epic.py`` -> ``models``; ``kernels/common/tiles.py`` -> ``kernels``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every import in a file, at any depth, as ``(line, absolute dotted name)``; names taken from a package count."""
    package = path.relative_to(ROOT).parts[:-1]
    package = ("epic_fast", *package) if package[0] == "kernels" else package
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name != "epic_fast":
                    yield node.lineno, name.name
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "epic_fast":
            yield node.lineno, f"epic_fast.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            if base in ("epic_fast", "epic_fast.kernels"):
                yield from ((node.lineno, f"{base}.{name.name}") for name in node.names)
            else:
                yield node.lineno, base


def top_level_imports_of(path: Path) -> Iterator[str]:
    """The packages that importing this very file imports (not those inside functions or ``TYPE_CHECKING``)."""
    for node in ast.parse(path.read_text(), str(path)).body:
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0]


def identifiers(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=identifiers)
def test_rooms_know_only_what_lies_below_them(path: Path) -> None:
    room = room_of(path)
    broken = []
    for line, name in imports_of(path):
        top, *rest = name.split(".")
        if top == "epic_fast":
            # Above `training` (cli, demo, the package's own face) everything may be used; nobody uses `testing`.
            target = WHERE.get(rest[0], rest[0])
            allowed = KNOWS.get(room)
            if target == room or target in (EVERYBODYS if room != "kernels" else ()):
                continue
            if target == "testing" or (allowed is not None and target not in allowed):
                wanted = "anything but testing" if allowed is None else ", ".join(sorted(allowed)) or "no other room"
                broken.append(f"line {line}: {room} imports epic_fast.{target}; it may import {wanted}")
        elif room in OUTSIDE and top not in STANDARD | OUTSIDE[room]:
            broken.append(f"line {line}: {room} imports {top}; of other packages it may import {OUTSIDE[room]}")
    assert not broken, f"{identifiers(path)}:\n" + "\n".join(broken)


@pytest.mark.parametrize("room", ["__init__", "functional", "hf", "ops", "nn", "engine", "backbones", "models"])
def test_heavy_packages_are_imported_when_used(room: str) -> None:
    """``import epic_fast`` and ``epic_fast.functional`` need PyTorch alone; below the models nothing else is heavy."""
    if room in ("backbones", "models"):
        forbidden = LIGHT_AT_TOP - {"transformers"}
    else:
        forbidden = LIGHT_AT_TOP
    for path in SOURCES:
        if room_of(path) == room:
            found = forbidden & set(top_level_imports_of(path))
            assert not found, f"{identifiers(path)} imports {found} at its top; import it in the function that uses it"


@pytest.mark.parametrize("path", SOURCES, ids=identifiers)
def test_nothing_is_pickled(path: Path) -> None:
    """Files come from strangers: safetensors and JSON only, and YAML by its safe loader."""
    source = path.read_text()
    tree = ast.parse(source)
    modules = {name.split(".")[0] for _, name in imports_of(path)}
    safe_loaders = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any("SafeLoader" in ast.unparse(base) for base in node.bases)
    }
    assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {each.arg: ast.unparse(each.value) for each in node.keywords}
        where = f"{identifiers(path)}:{node.lineno}: {called}"
        assert called != "torch.save", f"{where} pickles; use safetensors.torch.save_file"
        assert called != "torch.load" or keywords.get("weights_only") == "True", f"{where} needs weights_only=True"
        assert called != "np.load" or keywords.get("allow_pickle") != "True", f"{where} must not allow pickles"
        assert called not in ("yaml.unsafe_load", "yaml.full_load"), f"{where}: use yaml.safe_load"
        loader = keywords.get("Loader") or (ast.unparse(node.args[1]) if len(node.args) > 1 else None)
        assert called != "yaml.load" or loader in safe_loaders, f"{where} needs a loader made from yaml.SafeLoader"


def test_every_folder_of_the_package_is_one() -> None:
    """setuptools finds a folder of modules only if it has an ``__init__.py``."""
    for path in (ROOT / "epic_fast").rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), f"{path.parent.relative_to(ROOT)} has no __init__.py"


def test_kernels_is_no_package_but_its_operations_are() -> None:
    folder = ROOT / "kernels"
    assert not list(folder.glob("*.py")), "a file here would make `kernels` look like a top-level package"
    for operation in folder.iterdir():
        if operation.is_dir() and operation.name != "__pycache__":
            assert (operation / "__init__.py").is_file()
            assert (operation / "README.md").is_file() or operation.name == "common"
            assert (operation / "reference.py").is_file() or operation.name == "common"


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def texts() -> Iterator[tuple[Path, str]]:
    for path in tracked_files():
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def test_no_path_of_anybodys_machine() -> None:
    machine = re.compile(r"(?<![\w.}$)-])/(?:work|root|home|Users|opt)/(?!somebody\b)[\w.-]+")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path, text in texts()
        if path != Path(__file__)
        for number, line in enumerate(text.splitlines(), start=1)
        if machine.search(line)
    ]
    assert not found, "\n".join(found)


def test_nobody_imports_the_folder_kernels() -> None:
    found = []
    for path in tracked_files():
        if path.suffix != ".py" or path.name == "test_packaging.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            found += [f"{path.relative_to(ROOT)}: {name}" for name in names if name.split(".")[0] == "kernels"]
    assert not found, f"write epic_fast.kernels in place of {found}"


def test_no_large_file_slips_in() -> None:
    large = {
        identifiers(path): f"{path.stat().st_size / 2**20:.1f} MiB"
        for path in tracked_files()
        if path.stat().st_size > 2**20 and "assets" not in path.parts
    }
    assert not large, f"only the demo's assets may be large: {large}"


@pytest.mark.parametrize("name", functional.__all__)
def test_public_functions_are_documented(name: str) -> None:
    function = getattr(functional, name)
    documentation = inspect.getdoc(function) or ""
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in documentation, f"{name} has no section {section}"
    described = documentation.split("Args:")[1].split("Returns:")[0]
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b", described), f"{name}: the parameter {parameter} is not described"


def test_public_names_are_all_documented_or_reexported() -> None:
    public = {
        name
        for name, value in vars(functional).items()
        if inspect.isfunction(value) and not name.startswith("_") and value.__module__ == functional.__name__
    }
    assert public == set(functional.__all__)
