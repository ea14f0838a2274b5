"""Values that come from JSON files of others: read with the file's name in every error, and checked for their kind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hsat.types.untrusted import open_regular


def read_text(path: Path) -> str:
    """The text of a file; ValueError naming it for what is not UTF-8."""
    try:
        with open_regular(path, kind="text file") as file:
            return file.read().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error.reason} at byte {error.start})") from error


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; ValueError beginning with `where` for other text, and for what is nested endlessly."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not JSON that anybody wrote (nested too deeply)") from error


def is_number(value: Any) -> bool:
    """A finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> bool:
    """A whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_text(value: Any) -> bool:
    """A text."""
    return isinstance(value, str)


def is_texts(value: Any) -> bool:
    """Several texts."""
    return isinstance(value, list | tuple) and all(map(is_text, value))


def is_object(value: Any) -> bool:
    """What JSON calls an object."""
    return isinstance(value, dict)


Kind = tuple[str, Callable[[Any], bool]]  # what is wanted, in words; whether a value is that

NUMBER: Kind = ("a finite number", is_number)
COUNT: Kind = ("a whole number of at least 0", is_count)
TEXT: Kind = ("a text", is_text)
TEXTS: Kind = ("a list of texts", is_texts)
OBJECT: Kind = ("a JSON object", is_object)


def check_fields(
    values: Mapping[str, Any], where: str, kinds: Mapping[str, Kind], *, optional: Iterable[str] = ()
) -> None:
    """ValueError naming the first field that is there and not of its kind; `optional` fields may be null."""
    for name, (wanted, fits) in kinds.items():
        if name in values and not fits(values[name]) and not (values[name] is None and name in optional):
            shown = repr(values[name])
            shown = shown if len(shown) <= 40 else shown[:40] + "..."
            raise ValueError(f"{where}: {name} is {shown}; wanted {wanted}")
