"""One row of a cohort, and the rules that all rows of a cohort keep."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

_DRIVE = re.compile(r"[A-Za-z]:")
_SAFE_PATH = re.compile(r"(?:(?!\.{1,2}(?:/|\Z))[^/\\\x00]+(?:/(?=[^/])|\Z))+")
_NAMED = ("class_name", "patient", "slide", "split")


class PatchRecord(NamedTuple):
    """One patch: where its file lies and where it belongs.

    Attributes:
        path: Relative to the cohort's root, with forward slashes.
        class_name: Not empty.
        patient: Not empty.
        slide: Not empty; the name need only be unique within its patient.
        split: "" means none.
    """

    path: str
    class_name: str
    patient: str
    slide: str
    split: str = ""


def path_error(path: str) -> str | None:
    """Why a path may not stand in a cohort, or None.  Allowed: relative, forward slashes, no `.` or `..` parts."""
    if _SAFE_PATH.fullmatch(path) and not _DRIVE.match(path):
        return None
    if not path or "\0" in path:
        return "it is empty or holds a NUL character"
    if "\\" in path:
        return "it holds a backslash; write forward slashes"
    if path.startswith("/") or _DRIVE.match(path):
        return "it is absolute; write it relative to the cohort's root"
    if ".." in path.split("/"):
        return "'..' may lead out of the cohort's root; write it relative to the root"
    return "it has an empty part or a '.' part; write it in its shortest form, such as class/patient/slide/patch.png"


def to_record(row: Any) -> PatchRecord:
    """A row as a PatchRecord; anything but a tuple or list of its four or five fields is left for `check_records`."""
    if type(row) is PatchRecord or not isinstance(row, tuple | list) or len(row) not in {4, 5}:
        return row  # type: ignore[no-any-return]
    return PatchRecord(*row)


def _number(index: int) -> str:
    return f"record {index}"


def check_records(
    records: Sequence[PatchRecord], class_names: Sequence[str], *, where: Callable[[int], str] = _number
) -> None:
    """Raise TypeError or ValueError, naming the culprit, unless the rows form a cohort.

    Rules: at least one row; all fields strings, names not empty and without white space around them; safe relative
    paths, each once; one split per patient; classes taken from class_names, which has no repeats.  Patches of one slide
    or patient may be of different classes: a label belongs to a patch.  The checks pass over whole columns, so that a
    million rows take seconds.

    Args:
        records: The rows.
        class_names: All classes.
        where: Words the place of row i in messages.
    """
    _check_classes(class_names)
    if not records:
        raise ValueError("a cohort needs at least one patch; no record was given")
    wrong = next((i for i, row in enumerate(records) if not isinstance(row, tuple) or len(row) != 5), None)
    if wrong is not None:
        raise TypeError(f"{where(wrong)} must be a PatchRecord, got {records[wrong]!r}")
    columns = dict(zip(PatchRecord._fields, zip(*records, strict=True), strict=True))
    for name, column in columns.items():
        if set(map(type, column)) != {str}:
            at = next(i for i, value in enumerate(column) if type(value) is not str)
            raise TypeError(f"{where(at)}: {name} must be a string, got {column[at]!r} ({type(column[at]).__name__})")
    for name in _NAMED:
        _check_names(name, columns[name], where)
    _check_paths(columns["path"], where)
    _check_known(columns["class_name"], class_names, where)
    _check_one_split(columns["patient"], columns["split"], where)


def _check_classes(class_names: Sequence[str]) -> None:
    if isinstance(class_names, str) or not all(isinstance(name, str) and name for name in class_names):
        raise TypeError(f"class_names must be a sequence of non-empty strings, got {class_names!r}")
    if len(set(class_names)) != len(class_names):
        twice = next(name for i, name in enumerate(class_names) if name in class_names[:i])
        raise ValueError(f"class {twice!r} stands twice in class_names {tuple(class_names)}")


def _check_names(field: str, column: Sequence[str], where: Callable[[int], str]) -> None:
    for name in set(column):
        if field != "split" and not name:
            raise ValueError(f"{where(column.index(name))}: {field} is empty; every patch needs one")
        if name != name.strip() or "\0" in name:
            at = where(column.index(name))
            raise ValueError(
                f"{at}: {field} {name!r} has white space around it or a NUL; write {name.replace(chr(0), '').strip()!r}"
            )


def _check_paths(paths: Sequence[str], where: Callable[[int], str]) -> None:
    for i, path in enumerate(paths):
        if not _SAFE_PATH.fullmatch(path) or _DRIVE.match(path):
            raise ValueError(f"{where(i)}: path {path!r} is refused: {path_error(path)}")
    if len(set(paths)) != len(paths):
        first: dict[str, int] = {}
        at = next(i for i, path in enumerate(paths) if first.setdefault(path, i) != i)
        raise ValueError(f"path {paths[at]!r} is listed twice: {where(first[paths[at]])} and {where(at)}")


def _check_known(column: Sequence[str], class_names: Sequence[str], where: Callable[[int], str]) -> None:
    unknown = set(column) - set(class_names)
    if unknown:
        at = next(i for i, name in enumerate(column) if name in unknown)
        raise ValueError(f"{where(at)}: unknown class {column[at]!r}; class_names are {tuple(class_names)}")


def _check_one_split(patients: Sequence[str], splits: Sequence[str], where: Callable[[int], str]) -> None:
    if len(set(zip(patients, splits, strict=True))) == len(set(patients)):
        return
    first: dict[str, int] = {}
    for i, (patient, split) in enumerate(zip(patients, splits, strict=True)):
        before = first.setdefault(patient, i)
        if splits[before] != split:
            raise ValueError(
                f"patient {patient!r} is in two splits, {splits[before]!r} ({where(before)})"
                f" and {split!r} ({where(i)}); a patient belongs to one split only: read without them"
                " (keep_splits=False) and draw patients anew with .with_split()"
            )


def sorted_classes(records: Iterable[PatchRecord]) -> tuple[str, ...]:
    """The classes that occur, in alphabetical order: one list for all splits."""
    return tuple(sorted({row.class_name for row in records}))


def check_group_labels(level: str, labels: Mapping[Any, str], groups: set[Any], class_names: Sequence[str]) -> None:
    """Raise ValueError for the label of a slide or patient that is not there, and for one that is no class."""
    for group, name in labels.items():
        if group not in groups:
            raise ValueError(f"{level} {group!r} has a label and no patch in this cohort")
        if name not in class_names:
            raise ValueError(
                f"{level} {group!r} has the label {name!r}, which is none of the classes of patches"
                f" {tuple(class_names)}; patches' scores are pooled, so that slides and patients need the same classes"
            )
