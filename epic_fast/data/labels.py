"""From the labels as written to class ids: which problem it is, which classes there are, in which order."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from epic_fast.data.dataset import Label, Mask
from epic_fast.data.metadata import LABEL_FIELD_HINT, Complain, Entry, is_number, refuse, shorten
from epic_fast.errors import ConfigError, DataError

SINGLE = "single_label_classification"
MULTI = "multi_label_classification"
REGRESSION = "regression"
SEGMENTATION = "segmentation"
PROBLEM_TYPES = (SINGLE, MULTI, REGRESSION, SEGMENTATION)


def infer_problem_type(entries: Iterable[Entry]) -> str | None:
    """The problem that labels of this form pose; None where no entry has a label.

    A list of names is multi-label, names (also whole numbers, and true/false) are single-label, and numbers of
    which at least one has a decimal point are regression.  Masks are segmentation.

    Raises:
        DataError: lists beside names or numbers, or names beside numbers with a decimal point.
    """
    first: dict[str, Entry] = {}
    for entry in entries:
        if entry.label is not None:
            first.setdefault(_form(entry.label), entry)
    forms = set(first)
    if not forms:
        return None
    if forms == {"list"}:
        return MULTI
    if forms == {"mask"}:
        return SEGMENTATION
    if "list" not in forms and "decimal" not in forms:
        return SINGLE
    if forms <= {"decimal", "whole"}:
        return REGRESSION
    one, other = (first[form] for form in sorted(forms)[:2])
    raise DataError(
        f"the labels are of several forms: {shorten(one.label)} ({one.where}) and {shorten(other.label)} "
        f"({other.where}); wanted names only, lists of names only (multi-label), or numbers only (regression)"
    )


def _form(label: Any) -> str:
    if isinstance(label, Mask):
        return "mask"
    if isinstance(label, list):
        return "list"
    if isinstance(label, float):
        return "decimal"
    if isinstance(label, int) and not isinstance(label, bool):
        return "whole"
    return "name"


def check_problem_type(problem_type: str | None) -> None:
    """Raise a ConfigError unless it is one of transformers' three names, ``"segmentation"``, or None."""
    if problem_type is not None and problem_type not in PROBLEM_TYPES:
        raise ConfigError(
            f"problem_type={problem_type!r} is unknown; wanted one of {', '.join(PROBLEM_TYPES)}, or None to infer it "
            "from the labels"
        )


def class_names(entries: Iterable[Entry], problem_type: str, complain: Complain = refuse) -> list[str]:
    """The classes that occur, sorted: by value where all are whole numbers, else by code point."""
    names: set[str] = set()
    for entry in entries:
        try:
            if entry.label is not None:
                names.update(_name(value, entry) for value in _values(entry, problem_type))
        except DataError as error:
            complain(error)
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


class LabelEncoder:
    """Written labels to ids.

    Args:
        problem_type: one of transformers' three, or ``"segmentation"``.
        names: class names in the order of their ids (empty for regression and segmentation).
        named: where they come from, for messages, such as ``"labels.txt"``.
        listed: the names of ``labels.txt``, if there is one: a whole number that is no class name is then the number
            of a line in it, counted from 0.
    """

    def __init__(
        self, problem_type: str, names: Sequence[str] = (), named: str = "", *, listed: Sequence[str] | None = None
    ):
        self.problem_type = problem_type
        self.names = list(names)
        self.named = named
        self.listed = list(listed or ())
        self._ids = {name: index for index, name in enumerate(self.names)}

    def encode(self, entry: Entry) -> Label | None:
        """The label of a row: an id, a list of ids in ascending order, a number, a mask, or None without one.

        Raises:
            DataError: a label of the wrong form, or a class that is not among the names.
        """
        if entry.label is None:
            return None
        if self.problem_type == REGRESSION:
            if not is_number(entry.label):
                raise DataError(
                    f"{entry.where}: label {shorten(entry.label)}; wanted a finite number, the problem being regression"
                )
            return float(entry.label)
        if self.problem_type == SEGMENTATION or isinstance(entry.label, Mask):
            if self.problem_type != SEGMENTATION or not isinstance(entry.label, Mask):
                raise DataError(
                    f"{entry.where}: label {shorten(entry.label)}, the problem being {self.problem_type}; segmentation "
                    f"wants the field 'mask', and no other problem does. Choose another field{LABEL_FIELD_HINT}"
                )
            return entry.label
        ids = [self._id(value, entry) for value in _values(entry, self.problem_type)]
        return sorted(set(ids)) if self.problem_type == MULTI else ids[0]

    def _id(self, value: Any, entry: Entry) -> int:
        name = _name(value, entry)
        if name not in self._ids and is_number(value) and 0 <= value < len(self.listed):
            name = self.listed[int(value)]
        if name in self._ids:
            return self._ids[name]
        raise DataError(
            f"{entry.where} ({entry.split}): unknown label {name!r}{self._nearest(name)}; the {len(self.names)} known "
            f"labels, from {self.named}, are {_shortened(self.names)}. Mend the label, or give the whole list in "
            "labels.txt, one a line"
        )

    def _nearest(self, name: str) -> str:
        folded = {known.strip().casefold(): known for known in reversed(self.names)}
        near = difflib.get_close_matches(name.strip().casefold(), list(folded), n=1, cutoff=0.0)
        return f" (nearest: {folded[near[0]]!r})" if near else ""


def _values(entry: Entry, problem_type: str) -> list[Any]:
    """The classes of a row as written: one, or in a multi-label problem any number of them."""
    if problem_type != MULTI:
        return [entry.label]
    if isinstance(entry.label, str):
        return [entry.label]
    if not isinstance(entry.label, list):
        raise DataError(
            f"{entry.where}: label {shorten(entry.label)}; wanted a list of names, the problem being multi-label"
        )
    return entry.label


def _name(value: Any, entry: Entry) -> str:
    """A class name; 3, 3.0 and "3" are the same class, and so are true and "true"."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if is_number(value) and value == int(value):
        return str(int(value))
    raise DataError(
        f"{entry.where}: label {shorten(value)}; wanted a name, or a list of names in every row (multi-label), or "
        "numbers in every row (regression)"
    )


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
