"""Names in tables and folders that are missing or lie: empty cells in every spelling, formulas, ids that look alike."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

_MISSING = frozenset(
    (
        "nan na n/a n.a. n.a <na> #n/a #na null nil none nat - -- -nan ? unknown missing <null> (null) \\n"
        " #value! #ref! #name? #div/0! #null! #num!"
    ).split()
) | {"", "not available"}
"""What programs write for a value that is not there, in small letters: pandas, R, Excel, SQL, and people."""
_CLASSES = frozenset({"none", "unknown", "missing"})  # may be meant as classes; they are warned of
_NUMBER = re.compile(r"0*(\d+)(?:\.0*)?")
_DECIMAL = re.compile(r"\d+\.0+")
_DAMAGED = re.compile("\\ufffd")


def is_missing(text: str) -> bool:
    """Whether a cell says that its value is not there: empty, or "nan", "NA", "NULL", "None", "#N/A", "-" and so on.

    Args:
        text: The cell.

    Example:
        >>> [is_missing(text) for text in ("", " NaN ", "N/A", "none", "004", "normal")]
        [True, True, True, True, False, False]
    """
    return text.strip().casefold() in _MISSING


def check_cells(column: str, cells: Sequence[str], where: Callable[[int], str]) -> None:
    """Raise ValueError for the first cell of a column that is missing, a formula, or decoded wrongly.

    Args:
        column: Its name, for the message.
        cells: The column.
        where: Words the place of row i.
    """
    allowed = _CLASSES if column in ("class", "label") else frozenset()
    wrong = {
        text
        for text in set(cells)
        if (is_missing(text) and text.casefold() not in allowed) or text.startswith("=") or _DAMAGED.search(text)
    }
    if not wrong:
        return
    at = next(i for i, text in enumerate(cells) if text in wrong)
    text, count = cells[at], sum(cell in wrong for cell in cells)
    more = f"; {count} cells of this column are like that" if count > 1 else ""
    if is_missing(text):
        what = "is empty" if not text.strip() else f"is {text!r}, which programs write where a value is missing"
        cure = "fill it in or take the row out"
        if text.strip():
            cure += " (a name that really is spelled so has to be spelled otherwise)"
    elif text.startswith("="):
        what, cure = f"is the formula {text!r:.60}", "save the table with values, not formulas"
    else:
        what, cure = f"is {text!r:.60}, text that was read in a wrong encoding", "save the table as UTF-8"
    raise ValueError(f"{where(at)}: {column} {what}{more}; {cure}")


DIFFERENCE = "case, spaces, leading zeros or Unicode form"
"""What names that people take for one differ in."""


def name_notes(name: str, values: Iterable[str]) -> list[str]:
    """What is doubtful about the different names of a column, a text each: alike, decimals, or said to be missing.

    Args:
        name: Of the column.
        values: Its different names.
    """
    names = list(values)
    notes = []
    if pairs := alike_names(names):
        more = f" (and {len(pairs) - 1} more pairs)" if len(pairs) > 1 else ""
        notes.append(f"{name} {pairs[0][0]!r} and {name} {pairs[0][1]!r} differ only in {DIFFERENCE}{more}")
    decimals = [text for text in names if _DECIMAL.fullmatch(text)]
    if decimals:
        notes.append(
            f"{name} {decimals[0]!r} and {len(decimals) - 1} more look like whole numbers that a program read as"
            " decimals because values were missing"
        )
    if missing := [text for text in names if is_missing(text)]:
        notes.append(
            f"{name} {missing[0]!r} is what programs write where a value is missing; if it is no {name}, take these"
            " rows or this folder out"
        )
    return notes


def alike_names(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names that people would take for one: equal but for case, spaces, leading zeros and Unicode form.

    Args:
        names: Different names.

    Returns:
        (first, other) for each name that resembles an earlier one.

    Example:
        >>> alike_names(["P 1", "p1", "004", "4", "p2"])
        [('P 1', 'p1'), ('004', '4')]
    """
    first: dict[str, str] = {}
    pairs = []
    for name in names:
        plain = re.sub(r"\s+", "", unicodedata.normalize("NFKC", name).casefold())
        number = _NUMBER.fullmatch(plain)
        before = first.setdefault(number[1] if number else plain, name)
        if before != name:
            pairs.append((before, name))
    return pairs
