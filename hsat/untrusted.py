"""Files that somebody else may have written: looked at before they are opened, and JSON of theirs read strictly."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISFIFO, "a named pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
MOST_DIGITS = 20
_MOST_BITS = 1024


def check_regular(path: str | os.PathLike[str], *, kind: str) -> os.stat_result:
    """What `os.stat` says of a regular file; nothing is opened, so that a pipe or a device cannot make a reader wait.

    kind: what the file should be, for the messages ("checkpoint").  Raises FileNotFoundError where there is nothing,
    ValueError naming a folder, pipe, socket, device or a circle of links, and another OSError as the system gives it.
    """
    try:
        about = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise FileNotFoundError(f"there is no {kind} at {path}: it is a link to a file that is absent") from None
        raise FileNotFoundError(f"there is no {kind} at {path}") from None
    except OSError as error:
        if os.path.islink(path):
            raise ValueError(f"{path} is a link that cannot be followed, not a {kind}: {error.strerror}") from None
        raise
    _check_mode(path, about.st_mode, kind)
    return about


def open_regular(path: str | os.PathLike[str], *, kind: str) -> BufferedReader:
    """The file, open for reading bytes; errors as `check_regular`, also where it was exchanged in between."""
    check_regular(path, kind=kind)
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    handle = os.open(path, flags)
    try:
        _check_mode(path, os.fstat(handle).st_mode, kind)
        return open(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _check_mode(path: str | os.PathLike[str], mode: int, kind: str) -> None:
    if stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode):
        raise ValueError(f"{Path(path)} is a folder; give the {kind} in it")
    name = next((name for fits, name in _KINDS if fits(mode)), "no regular file")
    raise ValueError(f"{Path(path)} is {name}, not a {kind}; give a regular file")


def strict_json(text: str, *, where: str, depth: int, containers: int) -> Any:
    """The value of a JSON text as RFC 8259 has it, within limits.

    Refused are names that come twice in an object, NaN, Infinity and numbers that no double holds, whole numbers of
    more than 20 digits, more than `depth` objects and lists inside each other, more than `containers` of them in all.
    Raises ValueError that begins with `where` and never shows the text, but for a name that comes twice.
    """
    _check_nesting(text, where, depth=depth, containers=containers)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"{where}: the key {shown(twice)} comes twice")
        return values

    def whole(digits: str) -> int:
        if len(digits) > MOST_DIGITS:
            raise ValueError(f"{where}: a whole number has {len(digits)} digits; at most {MOST_DIGITS} are read")
        return int(digits)

    def finite(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"{where}: a number is too large for a double")
        return value

    def refuse(name: str) -> float:
        raise ValueError(f"{where}: {name} is no number in JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_int=whole, parse_float=finite, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at character {error.pos})") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply") from None


def _check_nesting(text: str, where: str, *, depth: int, containers: int) -> None:
    """Count brackets outside of texts: the parser itself would first build what it then refuses."""
    open_now = seen = 0
    for token in _TOKENS.finditer(text):
        first = text[token.start()]
        if first in "[{":
            open_now, seen = open_now + 1, seen + 1
            if open_now > depth:
                raise ValueError(f"{where}: more than {depth} objects or lists inside each other")
            if seen > containers:
                raise ValueError(f"{where}: more than {containers} objects and lists")
        elif first in "]}":
            open_now -= 1


def shown(value: object, *, most: int = 60) -> str:
    """A value from a file for a message: its repr where it is short, else its beginning and its kind."""
    if isinstance(value, str):
        return repr(value) if len(value) <= most else f"{value[:most]!r}... ({len(value)} characters)"
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"a whole number of {value.bit_length()} bits"  # of which Python refuses to make digits
    if value is None or isinstance(value, bool | int | float):
        text = repr(value)
        return text if len(text) <= most else f"{text[:most]}..."
    return (
        f"a {type(value).__name__} of {len(value)}" if isinstance(value, list | tuple | dict) else type(value).__name__
    )


def as_cell(value: object) -> object:
    """A cell of a CSV file, which no spreadsheet runs; other values than texts stay.

    A text that begins as formulas do (= + - @, a tab) gets an apostrophe before it, as OWASP advises, but for numbers.

    Example:
        >>> as_cell("=1+1"), as_cell("-1.5"), as_cell("a-b"), of_cell("'=1+1")
        ("'=1+1", '-1.5', 'a-b', '=1+1')
    """
    if isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def of_cell(cell: str) -> str:
    """The text that `as_cell` wrote."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
