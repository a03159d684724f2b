"""A record of the tests that need a GPU: no machine that checks a change by itself has one.

    python -m benchmarks.gpu_tests --output benchmarks/results/gpu_tests.json [-- pytest's own arguments]

The record says for each test file how many tests passed, which failed and which were skipped and why, beside the same
facts of the machine and the commit as every other row here.  The command ends with pytest's status.  The tests run
from Python, and the record says so, unless EPIC_FAST_NATIVE=1 stands in front of the command: then calls are compiled
(``epic-fast native`` first).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks import timing
from epic_fast.files import atomic_write_json

RUN = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--tb=short", "-o", "junit_family=xunit1"]


def summarise(report: str) -> dict[str, Any]:
    """Counts a file, and the names of what did not pass, from pytest's JUnit report."""
    files: dict[str, Counter[str]] = {}
    failed: list[str] = []
    skipped: dict[str, str] = {}
    seconds = 0.0
    for case in ElementTree.fromstring(report).iter("testcase"):
        file = case.get("file") or case.get("classname", "").replace(".", "/") + ".py"
        name = f"{file}::{case.get('name')}"
        seconds += float(case.get("time", 0.0))
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            outcome = "failed"
            failed.append(name)
        elif "skipped" in kinds:
            outcome = "skipped"
            skipped[name] = next(child for child in case if child.tag == "skipped").get("message", "")
        else:
            outcome = "passed"
        files.setdefault(file, Counter())[outcome] += 1
    total = sum(files.values(), Counter())
    return {
        "passed": total["passed"],
        "failed": failed,
        "skipped": skipped,
        "files": {file: dict(counts) for file, counts in sorted(files.items())},
        "test_seconds": round(seconds, 1),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the tests, write the record."""
    arguments = sys.argv[1:] if arguments is None else arguments
    own, more = arguments, []
    if "--" in arguments:
        own, more = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_tests", description="Record the GPU tests.")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    output = parser.parse_args(own).output
    # As tests/conftest.py has it, before either process asks whether launches are compiled.
    os.environ.setdefault("EPIC_FAST_NATIVE", "0")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        status = subprocess.run([sys.executable, *RUN, f"--junit-xml={report}", *more]).returncode
        if not report.is_file():
            print(f"pytest ended with status {status} and left no report: nothing was written", file=sys.stderr)
            return status or 1
        record = summarise(report.read_text())
    record["run"] = timing.machine("python -m benchmarks.gpu_tests " + " ".join(arguments))
    atomic_write_json(output, record)
    print(f"{record['passed']} passed, {len(record['failed'])} failed, {len(record['skipped'])} skipped")
    return status


if __name__ == "__main__":
    sys.exit(main())
