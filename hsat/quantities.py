"""Amounts of memory and time, and values with many numbers in them, as people read them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MOST_LINES, LINE_WIDTH = 10, 100
"""Of a repr: more is no help at a prompt."""
_MOST_ENTRIES, _LONGEST_VALUE = 6, 60


def memory_text(size: float) -> str:
    """Bytes as GB or MB, for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def time_text(seconds: float) -> str:
    """Seconds as the two largest units, for people."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def fields_repr(value: object, names: Iterable[str]) -> str:
    """What `repr` says of an object with tensors, arrays or tables in it: their kinds and shapes, in few lines.

    Args:
        value: The object.
        names: Its fields, in order; those that are None are left out.

    Returns:
        At most `MOST_LINES` lines of at most `LINE_WIDTH` characters.
    """
    fields = ((name, getattr(value, name)) for name in names)
    parts = [f"{name}={value_text(field)}" for name, field in fields if field is not None]
    return clip_lines(f"{type(value).__name__}({', '.join(parts)})")


def clip_lines(text: str) -> str:
    """A text of few lines, each line of it broken where it is too long, the rest left out."""
    lines: list[str] = []
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())] + "  "
        lines += textwrap.wrap(line, LINE_WIDTH, subsequent_indent=indent, break_on_hyphens=False) or [""]
    kept = lines[:MOST_LINES]
    if len(lines) > MOST_LINES:
        kept[-1] = f"  ... {len(lines) - MOST_LINES + 1} more lines"
    return "\n".join(kept)


def value_text(value: Any) -> str:
    """A value in a few words: a tensor by kind and shape, a collection by its length, anything else by its repr."""
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "dtype"):
        if tuple(shape) == ():
            return f"{float(value.detach() if hasattr(value, 'detach') else value):.4g}"
        device = str(getattr(value, "device", "cpu"))
        place = "" if device == "cpu" else f" on {device}"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(shape)}{place}"
    if isinstance(value, Mapping) and len(value) > _MOST_ENTRIES:
        return f"{{{len(value)} entries}}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {value_text(one)}" for key, one in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > _MOST_ENTRIES:
        return f"{type(value).__name__} of {len(value)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
