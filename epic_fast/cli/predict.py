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

    OUTPUT appears whole or not at all. A run that makes masks writes them as PNGs into OUTPUT_masks/, and their names
    into the rows. INPUT may be an .npz of utterances.
    """
    from epic_fast.cli.console import json_answer, plain_json, say
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
            records = _records(source, dataset)
            if model.problem_type == "segmentation":
                _write_masks(model, source, dataset, records, target, batch_size)
                what, where = "masks", f"{target}, {_mask_folder(target)}"
            else:
                found = run_model(model, dataset, collator=Collator.for_model(model), batch_size=batch_size)
                with atomic_file(target) as temporary, temporary.open("w", encoding="utf-8") as lines:
                    for record, logits in zip(records, found.logits, strict=True):
                        row = plain_json({**record, **verdict(model, logits, top_k)})
                        lines.write(jsonlib.dumps(row, ensure_ascii=False) + "\n")
                what, where = "rows", str(target)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; {target} was not written") from None
        answer({"rows": len(dataset), "skipped": len(dataset.skipped), "output": str(target)})
        if not json:
            left_out = f", {len(dataset.skipped)} skipped" if dataset.skipped else ""
            say(f"{len(dataset)} {what}{left_out}: {where}")


def _mask_folder(target: Path) -> Path:
    return target.with_name(f"{target.stem}_masks")


def _check_replaceable(folder: Path, source: Path, dataset: Any, records: list[dict[str, Any]]) -> None:
    """Raise a ConfigError if a folder of masks holds what this command has not written, or what INPUT refers to."""
    if not folder.exists():
        return
    if not folder.is_dir() or not all(re.fullmatch(r"\d{6,}\.png", each.name) for each in folder.iterdir()):
        raise ConfigError(f"{folder} holds what is no predicted mask; remove it, or choose another OUTPUT")
    named = [row.path for row in getattr(dataset, "rows", ())]
    named += [source.parent / record["mask"] for record in records if isinstance(record.get("mask"), str)]
    if any(each.resolve().is_relative_to(folder.resolve()) for each in named):
        raise ConfigError(f"{folder}, where the masks go, holds files that INPUT names; choose another OUTPUT")


def _write_masks(
    model: Any, source: Path, dataset: Any, records: list[dict[str, Any]], target: Path, batch_size: int
) -> None:
    """A PNG (0 and 255) of the picture's size for each row, and the rows with its name."""
    import numpy as np
    from PIL import Image

    from epic_fast.data import Collator
    from epic_fast.files import atomic_folder, atomic_write_text
    from epic_fast.training import predict_masks

    folder = _mask_folder(target)
    _check_replaceable(folder, source, dataset, records)
    lines = []
    masks = predict_masks(model, dataset, collator=Collator.for_model(model), batch_size=batch_size)
    with atomic_folder(folder) as place:
        for number, (record, mask) in enumerate(zip(records, masks, strict=True)):
            name = f"{number:06d}.png"
            Image.fromarray(mask.astype(np.uint8) * 255).save(place / name)
            said = {"predicted_mask": f"{folder.name}/{name}", "predicted_share": round(float(mask.mean()), 6)}
            lines.append(jsonlib.dumps({**record, **said}, ensure_ascii=False) + "\n")
    atomic_write_text(target, "".join(lines))


def _records(source: Path, dataset: Any) -> list[dict[str, Any]]:
    """The rows as the file has them, all fields kept; of utterances id and text."""
    if source.suffix == ".npz":
        return [{"id": name, "text": text} for name, text in zip(dataset.names(), dataset.texts(), strict=True)]
    rows = dataset.rows
    if source.suffix == ".csv":
        return [{"file_name": row.name, "text": row.text} for row in rows]
    lines = source.read_bytes().split(b"\n")
    return [jsonlib.loads(lines[_line_number(row.where) - 1].decode("utf-8-sig")) for row in rows]


def _line_number(where: str) -> int:
    """12 out of ``"rows.jsonl, line 12"``, as the reader names a row."""
    found = re.search(r"line (\d+)$", where)
    assert found is not None, where
    return int(found.group(1))
