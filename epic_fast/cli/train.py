"""``epic-fast train``: tune a method's prompts on a data folder."""

from __future__ import annotations

import json as jsonlib
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from epic_fast.cli.options import Debug, Json
from epic_fast.errors import ConfigError, EpicFastError


def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]...",
            help="Any setting, such as prompt_length=4, training.batch_size=32 or engine.prefix_cache=memory.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="FOLDER|ZIP|demo", help="A folder (or zip) with pictures and metadata.jsonl."),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option("--backbone", metavar="NAME|FOLDER|demo", help='The frozen towers; also "vision=PATH,text=PATH".'),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="epic|mope|mit", help="What to train on them.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", metavar="RUN", help="The run folder to write.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the training split.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of everything that is drawn.")] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="YAML or JSON with sections model, training, data, engine."),
    ] = None,
    resume: Annotated[
        str, typer.Option("--resume", metavar="auto|never", help="auto: go on from the run's last checkpoint.")
    ] = "never",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in RUN.")] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip and count rows whose picture cannot be read, instead of stopping.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Tune prompts on a frozen backbone and write a run folder.

    Settings come from the config file, then from the options, then from key=value; the later wins. RUN/training.yaml
    holds all of them, so a run can be resumed with --output RUN --resume auto alone.
    """
    from epic_fast.backbones.source import absolute
    from epic_fast.cli.console import json_answer
    from epic_fast.cli.runs import check_output, is_main_process, saved_settings
    from epic_fast.cli.settings import MissingSetting, resolve_settings
    from epic_fast.cli.sources import cache_path_made_absolute, data_path_made_absolute

    if resume not in ("auto", "never"):
        raise ConfigError(f"--resume {resume!r}; wanted auto or never")
    with json_answer(json) as answer:
        options = {
            "data.path": data,
            "backbone": backbone,
            "method": method,
            "output": output,
            "training.epochs": epochs,
            "training.seed": seed,
            "data.skip_bad": skip_bad or None,
        }
        resuming = resume == "auto"
        base = saved_settings(Path(output)) if resuming and output else None
        try:
            settings = resolve_settings(config_file=config, options=options, overrides=overrides or (), base=base)
        except MissingSetting as error:
            if not resuming or not output or base:
                raise
            what = "holds no run of `epic-fast train` to resume" if Path(output).exists() else "does not exist"
            raise ConfigError(
                f"--resume auto: {output} {what}; mend its name, or start a run there: {error}"
            ) from error
        remembered = base is not None and settings.backbone == base["backbone"]
        settings.backbone = absolute(settings.backbone)
        settings.data.path = data_path_made_absolute(str(settings.data.path))
        if isinstance(settings.engine, dict):
            settings.engine["prefix_cache"] = cache_path_made_absolute(settings.engine["prefix_cache"])
        run = Path(settings.output)
        if is_main_process():
            check_output(run, resume=resuming, overwrite=overwrite)
        summary = _train(settings, run, resuming=resuming, overwrite=overwrite, remembered=remembered)
        if is_main_process():
            answer(summary)
            if not json:
                _show(summary, run, settings.data.path)


def _train(settings: Any, run: Path, *, resuming: bool, overwrite: bool, remembered: bool) -> dict[str, Any]:
    """The work: data, model, training, scores; the content of ``metrics.json``."""
    from epic_fast.cli.console import plain_json, quiet_transformers, say
    from epic_fast.cli.runs import SETTINGS, is_main_process, set_aside, settle
    from epic_fast.cli.scoring import score
    from epic_fast.cli.sources import make_model, read_training_folder
    from epic_fast.files import atomic_write_json, atomic_write_text
    from epic_fast.training import TrainingConfig
    from epic_fast.training.seeding import seed_everything

    main = is_main_process()
    speak = say if main else (lambda message: None)
    quiet_transformers()
    folder = read_training_folder(settings.data)
    training = TrainingConfig(**settings.training)
    rows = ", ".join(f"{len(dataset):,} {name}" for name, dataset in folder.splits.items())
    kind = folder.problem_type.replace("_", " ")
    classes = f", {len(folder.labels)} labels" if folder.labels else ""
    speak(f"data: {rows} rows{classes}, {kind}")
    if folder.skipped:
        speak(f"skipped: {len(folder.skipped)} rows whose picture cannot be read, the first: {folder.skipped[0]}")

    seed_everything(training.seed)
    model = make_model(settings, folder, remembered=remembered)
    truncated = _report_texts(model, folder, speak)
    trainable, total = model.get_nb_trainable_parameters()
    speak(f"model: {trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})")

    text = settings.to_yaml()
    if main:
        try:
            if overwrite:
                set_aside(run)
            if not (resuming and (run / SETTINGS).is_file()):  # a run that refuses to be resumed keeps its own
                atomic_write_text(run / SETTINGS, text)
        except BaseException:
            settle(run)
            raise
    result = _fit(model, folder, training, run, resuming)
    if not main:
        return {}
    atomic_write_text(run / SETTINGS, text)
    if not training.load_best:  # the scores are those of the adapter that was saved
        from epic_fast.models.saving import load_weights

        load_weights(model, run / "model.safetensors")
    summary: dict[str, Any] = {
        **jsonlib.loads((run / "metrics.json").read_text(encoding="utf-8")),
        "method": settings.method,
        "best_epoch": result.best_epoch,
        "epochs": training.epochs,
        "seconds": round(result.seconds, 3),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "truncated_texts": truncated,
        "skipped_rows": len(folder.skipped),
        "samples": {name: len(dataset) for name, dataset in folder.splits.items()},
    }
    size = training.eval_batch_size or training.batch_size
    for split in ("validation", "test"):
        if split in folder.splits and folder.splits[split].has_labels:
            with _adapter_is_saved(run, settings.data.path, split):
                summary[split], _ = score(model, folder.splits[split], batch_size=size)
    atomic_write_json(run / "metrics.json", plain_json(summary))
    return summary


@contextmanager
def _adapter_is_saved(run: Path, data: str, split: str) -> Iterator[None]:
    """Scores that fail or are stopped leave a trained adapter; the message says so."""
    from epic_fast.cli.console import print_error
    from epic_fast.cli.failures import Interrupted

    kept = f"{run} holds the trained adapter; score it with: {_how_to_score(run, data, split)}"
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {kept}") from None
    except EpicFastError as error:
        raise type(error)(f"{error}\n{kept}") from error
    except Exception:
        print_error(kept, "saved")
        raise


def _report_texts(model: Any, folder: Any, speak: Any) -> dict[str, float]:
    """Say and return the share of texts that the text tower cannot take whole."""
    from epic_fast.data import truncation_report

    shares = {}
    longest = model.backbone.max_text_length
    for name, dataset in folder.splits.items():
        report = truncation_report(dataset.texts(), model.backbone.tokenizer, longest, model.text_template)
        shares[name] = report.share
        if report.truncated:
            speak(f"texts: {report.share:.1%} of {name} are cut at {longest} tokens (the longest has {report.longest})")
    if not any(shares.values()):
        speak(f"texts: none is cut (the text tower takes {longest} tokens)")
    return shares


def _fit(model: Any, folder: Any, training: Any, run: Path, resuming: bool) -> Any:
    """The training itself; an end before its time says how to go on."""
    from epic_fast.cli.console import print_error
    from epic_fast.cli.failures import Interrupted, RunTimeError, is_disk_full
    from epic_fast.cli.runs import how_to_resume, is_main_process, settle
    from epic_fast.training import fit

    validation = folder.splits.get("validation")
    if validation is not None and not validation.has_labels:
        validation = None

    restored = f"{run} holds the run that it held before"

    def what_is_left() -> str:
        return restored if is_main_process() and settle(run) else how_to_resume(run)

    try:
        found = fit(
            model,
            folder.splits["train"],
            validation,
            config=training,
            output_dir=run,
            resume="auto" if resuming else "never",
        )
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {what_is_left()}") from None
    except Exception as error:
        left = what_is_left()
        if is_disk_full(error):
            raise RunTimeError(f"the disk is full: {error}\nFree some space; {left}") from error
        if left == restored and isinstance(error, EpicFastError):
            raise type(error)(f"{error}\n{restored}") from error
        if left == restored:
            print_error(restored, "restored")
        raise
    if is_main_process():
        settle(run)
    return found


def _show(summary: dict[str, Any], run: Path, data: str) -> None:
    from epic_fast.cli.console import say, show_table

    rows = [{"split": split, **summary[split]} for split in ("validation", "test") if summary.get(split)]
    if rows:
        epochs = f"best epoch {summary['best_epoch']} of {summary['epochs']}"
        show_table(rows, title=f"{epochs}, {summary['seconds']:.1f} s")
    split = rows[-1]["split"] if rows else "train"
    say(f"saved: {run} (score it with: {_how_to_score(run, data, split)})")


def _how_to_score(run: Path, data: str, split: str) -> str:
    return f"epic-fast eval {shlex.quote(str(run))} --data {shlex.quote(data)} --split {split}"
