"""Pickle files that hold plain values, read without executing them.

Public annotations (RefCOCO's among them) come as pickles, and Python's own reader runs whatever a pickle names.  Here
the opcodes are listed by :mod:`pickletools`, which executes nothing, and a small stack machine builds containers,
strings and numbers from them.  It has no way to import or to call anything; whatever asks for that is refused.
"""

from __future__ import annotations

import os
import pickletools
from pathlib import Path
from typing import Any

from epic_fast.errors import DataError

_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_SHORT_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


class _Refused(Exception):
    """What stands in a pickle and is no plain value."""


def read_plain_pickle(path: str | os.PathLike[str]) -> Any:
    """The value of a pickle made of None, bool, int, float, str, bytes, list, tuple and dict alone.

    Nothing of the file is executed.  Strings of Python 2 become ``str``, byte by byte (Latin-1).

    Raises:
        DataError: no such file, no whole pickle, or one that asks for anything else (a class, a function, a call).
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"the pickle {str(path)!r} cannot be read: {error}") from error
    try:
        return _run(content)
    except _Refused as refused:
        raise DataError(
            f"the pickle {str(path)!r} {refused}; nothing of it was run. Wanted plain values only (lists, dicts, "
            "strings, numbers), as the published files have them: fetch the file again from its source"
        ) from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise DataError(
            f"the pickle {str(path)!r} is broken ({type(error).__name__}: {error}); fetch it again"
        ) from error


def _run(content: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def marked() -> list[Any]:
        for place in range(len(stack) - 1, -1, -1):
            if stack[place] is _MARK:
                found = stack[place + 1 :]
                del stack[place:]
                return found
        raise ValueError("a mark is missing")

    for opcode, argument, position in pickletools.genops(content):
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(argument)] = stack[-1]  # pyright: ignore[reportArgumentType]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument)])  # pyright: ignore[reportArgumentType]
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in ("SETITEMS", "DICT"):
            pairs = marked()
            if name == "DICT":
                stack.append({})
            _dict(stack).update(zip(pairs[::2], pairs[1::2], strict=True))
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _dict(stack)[key] = value
        elif name in ("APPENDS", "LIST"):
            values = marked()
            if name == "LIST":
                stack.append([])
            _list(stack).extend(values)
        elif name == "APPEND":
            value = stack.pop()
            _list(stack).append(value)
        elif name == "TUPLE":
            stack.append(tuple(marked()))
        elif name in _SHORT_TUPLES:
            count = _SHORT_TUPLES[name]
            if len(stack) < count:
                raise IndexError("too few values for a tuple")
            values = tuple(stack[len(stack) - count :])
            del stack[len(stack) - count :]
            stack.append(values)
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            marked()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "STOP":
            if len(stack) != 1 or stack[0] is _MARK:
                raise ValueError(f"{len(stack)} values are left at its end, wanted one")
            return stack[0]
        elif name not in ("PROTO", "FRAME"):
            said = f" {argument!r}" if argument is not None else ""
            raise _Refused(f"asks for {name}{said} at byte {position}, which is no plain value")
    raise ValueError("it has no end")


def _dict(stack: list[Any]) -> dict[Any, Any]:
    if type(stack[-1]) is not dict:
        raise TypeError("a pair is put into what is no dict")
    return stack[-1]


def _list(stack: list[Any]) -> list[Any]:
    if type(stack[-1]) is not list:
        raise TypeError("a value is put into what is no list")
    return stack[-1]
