"""Maps the folder ``kernels/<op>`` to the package ``epic_fast.kernels.<op>``.

Everything else about the build stands in ``pyproject.toml``.  ``kernels`` must never be importable as a
top-level package: transformers probes for a distribution of that name, so the folder has no ``__init__.py``
and is only ever installed below ``epic_fast`` (CONTRIBUTING.md, "The folder kernels").
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
operations = sorted(path.parent.name for path in ROOT.glob("kernels/*/__init__.py"))

setup(
    packages=[
        *find_packages(include=["epic_fast", "epic_fast.*"]),
        "epic_fast.kernels",
        *(f"epic_fast.kernels.{operation}" for operation in operations),
    ],
    package_dir={
        "epic_fast.kernels": "kernels",
        **{f"epic_fast.kernels.{operation}": f"kernels/{operation}" for operation in operations},
    },
    package_data={
        "epic_fast": ["py.typed", "ops/native.cpp", "demo/assets/*", "demo/assets/*/*"],
        **{f"epic_fast.kernels.{operation}": ["README.md"] for operation in operations},
    },
)
