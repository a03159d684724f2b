"""README.md does what it says: every block of code in it runs, every picture and link in it exists.

Blocks run in the order of the file, in one fresh folder.  ``python`` blocks share their variables.  In ``bash``
blocks every line is a command, in ``console`` blocks those after ``$``; ``epic-fast`` commands run for real,
those that set the project up (``make``, ``pip install``, ``git clone`` ...) are checked against the Makefile and
``pyproject.toml``.  What a reader would bring along, a comment right before the block prepares:

    <!-- setup:
    from epic_fast.testing import tiny_clip
    tiny_clip("my-clip")
    -->
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = {"bash", "sh", "shell", "console"}
SHOWN_ONLY = {"text", "mermaid", "bibtex"}

BLOCK = re.compile(
    r"(?:<!--[ \t]*setup:(?P<setup>.*?)-->\s*\n)?"
    r"^[ \t]*```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^[ \t]*```[ \t]*$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    code: str
    setup: str

    def commands(self) -> list[list[str]]:
        """The commands of a shell block, without comments and without the output shown in a console."""
        lines = self.code.replace("\\\n", " ").splitlines()
        if self.language == "console":
            prompted = [line[2:] for line in lines if line.startswith("$ ")]
            lines = prompted or lines
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def blocks_of(text: str) -> list[Block]:
    return [
        Block(
            line=text.count("\n", 0, found.start("language")) + 1,
            language=found["language"],
            code=textwrap.dedent(found["code"]),
            setup=textwrap.dedent(found["setup"] or "").strip(),
        )
        for found in BLOCK.finditer(text)
    ]


def run_blocks(blocks: list[Block], folder: Path) -> None:
    """Run them in ``folder``, the process's working directory; an error names the README's line."""
    variables: dict[str, Any] = {"__name__": "readme"}
    for block in blocks:
        try:
            if block.setup:
                exec(compile(block.setup, f"README.md, setup before line {block.line}", "exec"), variables)
            run_block(block, variables, folder)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"README.md, the block at line {block.line} failed: {error}") from error


def run_block(block: Block, variables: dict[str, Any], folder: Path) -> None:
    if block.language == "python":
        exec(compile("\n" * block.line + block.code, "README.md", "exec"), variables)
    elif block.language in SHELL:
        for command in block.commands():
            run_command(command, folder)
    elif block.language == "json":
        json.loads(block.code)
    elif block.language in ("yaml", "toml"):
        if block.language == "toml":
            tomllib.loads(block.code)
        else:
            import yaml

            yaml.safe_load(block.code)
    elif block.language not in SHOWN_ONLY:
        raise ValueError(f"the language {block.language!r} is neither run nor in {sorted(SHOWN_ONLY)}")


def run_command(command: list[str], folder: Path) -> None:
    program, *arguments = command
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        wanted = {each for each in arguments if "=" not in each}
        if not wanted or not wanted <= targets:
            raise ValueError(f"{shlex.join(command)}: the Makefile has {sorted(targets)}")
    elif (program, *arguments[:1]) == ("pip", "install") or arguments[:3] == ["-m", "pip", "install"]:
        check_install(command)
    elif (program, *arguments[:1]) in {("git", "clone"), ("cd", *arguments[:1]), ("source", ".venv/bin/activate")}:
        pass
    elif program == "epic-fast" or (program.startswith("python") and arguments[:2] == ["-m", "epic_fast"]):
        own = arguments if program == "epic-fast" else arguments[2:]
        # The demo takes minutes and has its own tests: here its options are parsed.
        own = [*own, "--help"] if own[:1] == ["demo"] else own
        result = subprocess.run(
            [sys.executable, "-m", "epic_fast", *own],
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise ValueError(f"{shlex.join(command)} gave {result.returncode}:\n{result.stdout}\n{result.stderr}")
    else:
        raise ValueError(f"{shlex.join(command)}: README tests know make, pip install, git clone, cd and epic-fast")


def check_install(command: list[str]) -> None:
    """``pip install "epic_fast[hf]"`` or ``pip install -e ".[test]"``: the extras exist."""
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for word in command:
        named = re.fullmatch(r"(?:\.|epic[_-]fast)\[([\w,-]+)\](?: @ .*)?", word)
        unknown = set(named[1].split(",")) - extras if named else set()
        if unknown:
            raise ValueError(f"{shlex.join(command)}: no extra {sorted(unknown)} among {sorted(extras)}")


@pytest.mark.slow
def test_every_block_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(README)
    assert blocks
    run_blocks(blocks, tmp_path)


def test_no_block_is_left_out() -> None:
    assert "not run:" not in README
    assert len(re.findall(r"^[ \t]*```", README, re.MULTILINE)) == 2 * len(blocks_of(README))


def test_the_two_commands_stand_in_the_readme() -> None:
    commands = [command for block in blocks_of(README) if block.language in SHELL for command in block.commands()]
    assert ["make", "demo"] in commands
    assert ["make", "test"] in commands


def test_the_readme_says_that_epic_is_a_reconstruction() -> None:
    assert "reconstruction" in README
    assert "arxiv.org/abs/2507.07415" in README


def prose(text: str) -> str:
    return BLOCK.sub("", text)


def link_targets(text: str) -> list[str]:
    text = prose(text)
    return re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r"\b(?:src|href|srcset)=\"([^\"]+)\"", text)


def anchors_of(text: str) -> set[str]:
    headings = re.findall(r"^#+\s+(.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "document",
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{each.name}" for each in sorted(ROOT.glob("docs/*.md")))],
)
def test_every_picture_and_link_exists(document: str) -> None:
    folder, text = (ROOT / document).parent, (ROOT / document).read_text(encoding="utf-8")
    for target in link_targets(text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        assert (folder / path).exists(), f"{document} points to {path}, which is not there"
        if anchor and not path:
            assert anchor in anchors_of(text), f"{document} has no heading #{anchor}"


SAMPLE = """
<!-- setup:
    from pathlib import Path
    Path("mine.txt").write_text("42")
-->
```python
number = int(open("mine.txt").read())
```

  ```python
  assert number == 42
  ```

```console
$ make test WORKERS=1  # the checks
all fine
$ pip install -e ".[test]"
```
"""


def test_blocks_share_variables_and_follow_their_setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(SAMPLE)
    assert [block.language for block in blocks] == ["python", "python", "console"]
    assert blocks[2].commands() == [["make", "test", "WORKERS=1"], ["pip", "install", "-e", ".[test]"]]
    run_blocks(blocks, tmp_path)


@pytest.mark.parametrize(
    ("language", "code", "message"),
    [
        ("python", "1 / 0", "division by zero"),
        ("bash", "make nonsense", "the Makefile has"),
        ("bash", 'pip install "epic_fast[nonsense]"', "no extra"),
        ("bash", "curl example.org", "README tests know"),
        ("console", "$ epic-fast nonsense", "gave 2"),
        ("json", "{", "Expecting"),
        ("", "anything", "neither run nor"),
    ],
)
def test_a_wrong_block_is_found(language: str, code: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the block at line 2 failed") as caught:
        run_blocks(blocks_of(f"\n```{language}\n{code}\n```\n"), tmp_path)
    assert message in str(caught.value)
