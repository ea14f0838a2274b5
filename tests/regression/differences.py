"""Where the results of two checkouts differ, entry by entry and bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from editions import Edition, Ignored
from results import Content, Fields

MISSING = "(missing)"


class Difference(NamedTuple):
    """One value that differs; old and new are as a person reads them."""

    command: str
    file: str
    entry: str
    field: str
    old: str
    new: str

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.command, self.file, self.entry, self.field) if part)
        return f"{place}: {self.old} -> {self.new}"


def compare_results(
    command: str,
    old: Mapping[str, Content],
    new: Mapping[str, Content],
    *,
    ignored: Ignored,
    edition: Edition | None = None,
) -> list[Difference]:
    """All differences of one command's results.  edition: of the newer checkout, for what it may add."""
    edition = edition or Edition()
    differences: list[Difference] = []
    for file in _joined(old, new):
        if file not in new:
            differences.append(Difference(command, file, "", "", "a file", MISSING))
        elif file not in old:
            if not edition.is_added("", file):
                differences.append(Difference(command, file, "", "", MISSING, "a file"))
        else:
            differences += _compare_content(command, file, old[file], new[file], ignored, edition)
    return differences


def _compare_content(
    command: str, file: str, old: Content, new: Content, ignored: Ignored, edition: Edition
) -> Iterator[Difference]:
    for entry in _joined(old, new):
        if entry not in new:
            yield Difference(command, file, entry, "", "an entry", MISSING)
        elif entry not in old:
            yield Difference(command, file, entry, "", MISSING, "an entry")
        else:
            yield from _compare_fields(command, file, entry, old[entry], new[entry], ignored, edition)
    shared = [entry for entry in old if entry in new]
    order = [entry for entry in new if entry in old]
    if shared != order:
        first = next(number for number, pair in enumerate(zip(shared, order, strict=True)) if pair[0] != pair[1])
        yield Difference(command, file, f"order, number {first + 1}", "", shared[first], order[first])


def _compare_fields(
    command: str, file: str, entry: str, old: Fields, new: Fields, ignored: Ignored, edition: Edition
) -> Iterator[Difference]:
    for name in _joined(old, new):
        if ignored.field(name, file) or (name not in old and edition.is_added(name, file)):
            continue
        before, now = old.get(name, MISSING), new.get(name, MISSING)
        if not same(before, now) and not near(before, now, ignored.distance(name, file)):
            yield Difference(command, file, entry, name, *_described(before, now))


def count_values(results: Mapping[str, Content], ignored: Ignored) -> int:
    """How many values are compared."""
    return sum(
        not ignored.field(name, file)
        for file, content in results.items()
        for fields in content.values()
        for name in fields
    )


def same(old: Any, new: Any) -> bool:
    """Whether two values are equal in kind and in every bit; NaN equals NaN of the same bits, 0.0 differs from -0.0."""
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
        return old.dtype == new.dtype and old.shape == new.shape and old.tobytes() == new.tobytes()
    if isinstance(old, np.ndarray) or isinstance(new, np.ndarray):
        return False
    return type(old) is type(new) and repr(old) == repr(new)


def near(old: Any, new: Any, distance: float) -> bool:
    """Whether two numbers, or arrays of one form, are equal up to this relative distance; never where it is 0."""
    if not distance or type(old) is not type(new):
        return False
    if isinstance(old, np.ndarray) and (old.dtype != new.dtype or old.shape != new.shape or old.dtype.kind != "f"):
        return False
    if not isinstance(old, np.ndarray | float):
        return False
    scale = np.maximum(np.maximum(np.abs(old), np.abs(new)), 1e-3)
    return bool(np.all(np.abs(np.subtract(old, new)) <= distance * scale))


def _described(old: Any, new: Any) -> tuple[str, str]:
    if not (isinstance(old, np.ndarray) and isinstance(new, np.ndarray)):
        return _text(old), _text(new)
    if old.dtype != new.dtype or old.shape != new.shape:
        return _text(old), _text(new)
    bits = np.frombuffer(old.tobytes(), np.uint8) != np.frombuffer(new.tobytes(), np.uint8)
    differing = np.flatnonzero(bits.reshape(old.size, -1).any(1))
    place = tuple(int(index) for index in np.unravel_index(differing[0], old.shape))
    share = f"{len(differing)} of {old.size} entries differ"
    if old.dtype.kind in "fiu":
        with np.errstate(all="ignore"):
            gap = np.nanmax(np.abs(old.astype(np.float64) - new.astype(np.float64)))
        share += f", by at most {gap:.3g}"
    return f"{old[place]} at {list(place)}", f"{new[place]} ({share})"


def _text(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"array {value.dtype} {list(value.shape)}"
    return value if value is MISSING else repr(value)


def _joined(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys([*old, *new]))
