"""The command line ``epic-fast``: one module a command, heavy libraries imported inside the commands only."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``epic-fast`` with these arguments (by default the process's) and leave with its exit code.

    Raises:
        SystemExit: always.  0 fine, 2 bad usage or configuration, 3 data, 4 device or run time, 130 interrupted.
    """
    try:
        from epic_fast.cli.app import app
        from epic_fast.cli.console import set_up_logging
        from epic_fast.cli.failures import show_traceback
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "yaml"):
            raise
        print(
            f"error: the command line needs the package {error.name!r}, which is not installed; "
            "get it with: pip install 'epic_fast[train]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    show_traceback(False)
    set_up_logging()
    app(args=list(arguments) if arguments is not None else None, prog_name="epic-fast")
