"""``epic-fast predict``: labels for rows of pictures and texts."""

from __future__ import annotations

import json as jsonlib
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from epic_fast.cli.options import Backbone, BatchSize, Debug, Device, Json, Run, SkipBad, TextField
from epic_fast.errors import ConfigError


def predict(
    run: Run,
    source: Annotated[
        Path, typer.Argument(metavar="INPUT.jsonl", help='Rows such as {"file_name": "1.jpg", "text": "a red bird"}.')
    ],
    target: Annotated[Path, typer.Argument(metavar="OUTPUT.jsonl", help="The rows with what the model says of them.")],
    batch_size: BatchSize = 64,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="How many classes to list with probabilities.")] = 5,
    text_field: TextField = None,
    backbone: Backbone = None,
    device: Device = None,
    skip_bad: SkipBad = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write every row of INPUT to OUTPUT with `predicted` and `top_k`; pictures are relative to INPUT.

    OUTPUT appears whole or not at all.
    """
    from epic_fast.cli.console import json_answer, say
    from epic_fast.cli.failures import Interrupted
    from epic_fast.cli.scoring import verdict
    from epic_fast.cli.sources import load_model, run_fields
    from epic_fast.files import atomic_file

    if target.is_dir():
        raise ConfigError(f"OUTPUT {target} is a folder; wanted the name of a file")
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigError(f"OUTPUT {target} is INPUT itself; wanted another file")
    with json_answer(json) as answer:
        try:
            from epic_fast.data import Collator, read_rows
            from epic_fast.training import predict as run_model

            dataset = read_rows(source, text_field=text_field or run_fields(run).text or "text", skip_bad=skip_bad)
            model = load_model(run, backbone, device)
            found = run_model(model, dataset, collator=Collator.for_model(model), batch_size=batch_size)
            records = _records(source, dataset.rows)
            with atomic_file(target) as temporary, temporary.open("w", encoding="utf-8") as lines:
                for record, logits in zip(records, found.logits, strict=True):
                    row = {**record, **verdict(model, logits, top_k)}
                    lines.write(jsonlib.dumps(row, ensure_ascii=False) + "\n")
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; {target} was not written") from None
        answer({"rows": len(dataset), "skipped": len(dataset.skipped), "output": str(target)})
        if not json:
            left_out = f", {len(dataset.skipped)} skipped" if dataset.skipped else ""
            say(f"{len(dataset)} rows{left_out}: {target}")


def _records(source: Path, rows: Any) -> list[dict[str, Any]]:
    """The rows as the file has them, all fields kept."""
    if source.suffix == ".csv":
        return [{"file_name": row.name, "text": row.text} for row in rows]
    lines = source.read_bytes().split(b"\n")
    return [jsonlib.loads(lines[_line_number(row.where) - 1].decode("utf-8-sig")) for row in rows]


def _line_number(where: str) -> int:
    """12 out of ``"rows.jsonl, line 12"``, as the reader names a row."""
    found = re.search(r"line (\d+)$", where)
    assert found is not None, where
    return int(found.group(1))
