"""What separates the columns of a table."""

from __future__ import annotations

_SEPARATORS = ";\t|"


def find_separator(header: str) -> str:
    """What separates the columns of a table: commas, or what else stands in a header without any.

    Args:
        header: The first line.

    Returns:
        One character.

    Example:
        >>> find_separator("path,class"), find_separator("path;class")
        (',', ';')
    """
    counts = {one: header.count(one) for one in _SEPARATORS}
    best = max(counts, key=lambda one: counts[one])
    return best if counts[best] and "," not in header else ","
