"""What can go wrong, by whose hand it must be mended.

Every message says what was given, what was wanted and how to mend it.  The command line turns the class
into its exit code.
"""

from __future__ import annotations


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
