"""What can go wrong, by whose hand it must be mended.

Every message says what was given, what was wanted and how to mend it.  The command line turns the class
into its exit code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class EpicFastError(Exception):
    """Base of the errors that this library raises on purpose."""

    exit_code = 4


class ConfigError(EpicFastError, ValueError):
    """A configuration, an argument or a backbone that cannot be used as given."""

    exit_code = 2


class DataError(EpicFastError, ValueError):
    """A data folder, a row or a file in it that cannot be used."""

    exit_code = 3


class AdapterError(EpicFastError, ValueError):
    """A saved folder that is no adapter, is damaged, or belongs to another backbone."""

    exit_code = 2


class ImplementationError(EpicFastError, RuntimeError):
    """An explicitly requested implementation of an operation that cannot run here."""

    exit_code = 4


def check_names(owner: str, given: Iterable[object], known: Sequence[str]) -> None:
    """Refuse names that are none of an owner's fields.

    Raises:
        ConfigError: with the nearest that is, where one is near.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"{owner} has no field {name!r}; {hint}It has {', '.join(known)}")
