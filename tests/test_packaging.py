"""The folder ``kernels`` reaches nobody as a top-level package, in whichever form the project is installed.

transformers probes for a distribution named ``kernels`` when it is imported, and a folder of that name on
``sys.path`` has broken it before (CONTRIBUTING.md, "The folder kernels").
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

import epic_fast

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).resolve().parent.parent
OPERATIONS = sorted(path.parent.name for path in ROOT.glob("kernels/*/__init__.py"))

PROBE = """
import importlib.util, json, sys
from transformers import CLIPConfig, CLIPModel
from transformers.utils import is_kernels_available
small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
config = CLIPConfig(text_config=dict(small, vocab_size=9), vision_config=dict(small, image_size=8, patch_size=4))
parameters = sum(each.numel() for each in CLIPModel(config).parameters())
kernels_available = is_kernels_available()
import torch, epic_fast, epic_fast.functional
import epic_fast.kernels.prompt_attention.reference as reference
tokens, prompts = torch.ones(2, 1, 3, 4), torch.ones(1, 1, 2, 4)
output, _ = epic_fast.functional.prompt_attention(tokens, tokens, tokens, prompts, prompts, prompts)
kernels = importlib.util.find_spec("kernels")
print(json.dumps(dict(
    package=epic_fast.__file__, version=epic_fast.__version__, reference=reference.__file__,
    kernels_available=kernels_available, parameters=parameters, output=output.sum().item(),
    kernels="absent" if kernels is None else "package" if kernels.origin else "plain folder",
)))
"""

BARE_PROBE = """
import sys
for name in ("triton", "transformers", "accelerate", "torchmetrics", "matplotlib", "PIL", "typer"):
    sys.modules[name] = None
import torch, epic_fast, epic_fast.functional, epic_fast.ops
tokens, prompts = torch.ones(2, 1, 3, 4), torch.ones(1, 1, 2, 4)
output, _ = epic_fast.functional.prompt_attention(tokens, tokens, tokens, prompts, prompts, prompts)
print(output.sum().item())
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project's source files, as a clone would hold them: builds may write into it."""
    copy = tmp_path_factory.mktemp("source") / "clone"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("epic_fast", "kernels", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return copy


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist of the tree and the wheel that was built from that sdist."""
    output = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, tree)
    return output


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _environment(tmp_path_factory.mktemp("wheel") / "venv", wheel)


@pytest.fixture(scope="module")
def installed_editable(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _environment(tmp_path_factory.mktemp("editable") / "venv", "--editable", tree)


def test_wheel_holds_the_operations_below_the_package_and_nothing_else_on_top(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"epic_fast", f"epic_fast-{epic_fast.__version__}.dist-info"}
    assert OPERATIONS
    for operation in OPERATIONS:
        for source in (ROOT / "kernels" / operation).glob("*.py"):
            assert f"epic_fast/kernels/{operation}/{source.name}" in names
        assert f"epic_fast/kernels/{operation}/README.md" in names
    assert "epic_fast/py.typed" in names
    assert "epic_fast/kernels/__init__.py" not in names


def test_wheel_holds_every_module_and_asset(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "epic_fast").rglob("*.py")}
    assets = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "epic_fast/demo/assets").rglob("*") if path.is_file()
    }
    assert assets
    missing = sorted((sources | assets) - names)
    assert not missing, f"the wheel lacks {missing}: is an __init__.py or a package_data pattern missing?"


def test_version_and_licence_of_the_wheel(wheel: Path) -> None:
    metadata = (
        zipfile.ZipFile(wheel).read(f"epic_fast-{epic_fast.__version__}.dist-info/METADATA").decode().splitlines()
    )
    assert f"Version: {epic_fast.__version__}" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert f"epic_fast-{epic_fast.__version__}.dist-info/licenses/LICENSE" in zipfile.ZipFile(wheel).namelist()


def test_sdist_holds_the_kernels_beside_the_package(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    top = f"epic_fast-{epic_fast.__version__}"
    assert f"{top}/kernels/prompt_attention/reference.py" in names
    assert f"{top}/kernels/__init__.py" not in names


@pytest.mark.parametrize("place", ["root", "elsewhere"])
@pytest.mark.parametrize("form", ["tree", "editable", "wheel"])
def test_transformers_and_epic_fast_live_together(
    form: str, place: str, tree: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    python, environment = Path(sys.executable), {}
    if form == "tree":
        # The development environment may hold an editable install: the tree must win all the same.
        environment = {"PYTHONPATH": str(tree)}
    else:
        python = request.getfixturevalue(f"installed_{form}")
    where = tree if place == "root" else tmp_path

    found = _probe(python, where, environment)

    in_tree = form != "wheel" or place == "root"
    assert Path(found["package"]).is_relative_to(tree) == in_tree
    assert Path(found["reference"]).is_relative_to(tree) == in_tree
    assert found["version"] == epic_fast.__version__
    assert found["kernels_available"] is False
    assert found["parameters"] > 0
    assert found["output"] == pytest.approx(24.0)
    # With the tree itself on sys.path Python cannot but see a plain folder; elsewhere there must be nothing.
    assert found["kernels"] == ("plain folder" if place == "root" or form == "tree" else "absent")


@pytest.mark.parametrize("form", ["editable", "wheel"])
def test_import_needs_nothing_but_torch(form: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    python = request.getfixturevalue(f"installed_{form}")
    assert _run(python, "-c", BARE_PROBE, cwd=tmp_path).strip() == "24.0"


@pytest.mark.parametrize("form", ["editable", "wheel"])
def test_import_kernels_fails_elsewhere(form: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    python = request.getfixturevalue(f"installed_{form}")
    code = "try:\n    import kernels\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    assert _run(python, "-c", code, cwd=tmp_path).strip() == "kernels"


def test_command_is_installed(installed_wheel: Path) -> None:
    assert (installed_wheel.parent / "epic-fast").is_file()


def _environment(folder: Path, *what: str | Path) -> Path:
    """A new environment that shares the packages of this one, but no installation of epic_fast; its Python.

    A path in a ``.pth`` file joins ``sys.path`` without its own ``.pth`` files being read, so an editable
    installation of the project in the development environment stays unseen.
    """
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    own = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own / "shared.pth").write_text("\n".join(sorted(shared)) + "\n")
    quiet = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
    _run(sys.executable, "-m", "pip", "--python", python, "install", *quiet, *what)
    return python


def _probe(python: Path, where: Path, environment: dict[str, str]) -> dict[str, Any]:
    return json.loads(_run(python, "-c", PROBE, cwd=where, environment=environment).splitlines()[-1])


def _run(*command: str | Path, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
    """The standard output of a command; a failure shows what it printed."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(each) for each in command],
        cwd=cwd,
        env={**clean, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    return result.stdout
