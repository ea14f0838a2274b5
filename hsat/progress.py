"""How far a loop is: a bar where somebody watches, a line every half minute where output goes into a file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from hsat.quantities import time_text

__all__ = ["Progress", "show_progress", "shown_log"]

_library_log = logging.getLogger("hsat")

EVERY = 30.0
"""Seconds between two lines."""

Item = TypeVar("Item")


class Progress:
    """Shows how many of the items of a loop are done, on standard error.

    On a terminal and in a notebook it is a bar (tqdm.auto).  Where standard error is a file or a pipe, it is a line
    every half minute, without carriage returns; a loop that takes less than that leaves no line.

    Args:
        description: What is done, such as "training" or "PGD-8 on hsat".
        total: Number of items; None where it is not known.
        unit: What an item is, such as "step".
        shown: Whether to show anything.
        initial: Items that were done before.

    Example:
        >>> with Progress("counting", total=2, unit="number", shown=False) as progress:
        ...     for number in (1, 2):
        ...         progress.update(last=number)
        >>> progress.done
        2
    """

    def __init__(
        self, description: str, *, total: int | None, unit: str = "batch", shown: bool = True, initial: int = 0
    ) -> None:
        self.description, self.total, self.unit, self.shown = description, total, unit, shown
        self.done, self._initial = initial, initial
        self._began = self._spoke = time.monotonic()
        self._bar: Any = None
        if shown and is_watched():
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, initial=initial, desc=description, unit=unit)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def describe(self, description: str) -> None:
        """Say what is done from now on."""
        self.description = description
        if self._bar is not None:
            self._bar.set_description(description)

    def update(self, **numbers: object) -> None:
        """One more item is done; numbers are shown beside it."""
        self.done += 1
        if self._bar is not None:
            self._bar.set_postfix(numbers, refresh=False)
            self._bar.update()
        elif self.shown and time.monotonic() - self._spoke >= EVERY:
            self._spoke = time.monotonic()
            sys.stderr.write(self.line(**numbers) + "\n")
            sys.stderr.flush()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Lines that are logged inside the block stand above the bar, where there is one."""
        if self._bar is not None:
            self._bar.clear()
        yield
        if self._bar is not None:
            self._bar.refresh()

    def line(self, **numbers: object) -> str:
        """How far it is, in a line."""
        gone, made = time.monotonic() - self._began, self.done - self._initial
        unit = self.unit + ("es" if self.unit.endswith("ch") else "s")
        text = f"{self.description}: {self.done}{f' of {self.total}' if self.total else ''} {unit}"
        text += "".join(f", {name} {value}" for name, value in numbers.items()) + f", {time_text(gone)} gone"
        if self.total and made:
            text += f", about {time_text(gone / made * (self.total - self.done))} to go"
        return text


def show_progress(items: Iterable[Item], description: str, *, unit: str = "batch") -> Iterator[Item]:
    """The items, with their `Progress`.

    Args:
        items: Any; of those that know their length it is the total.
        description: What is done with them.
        unit: What an item is.
    """
    try:
        total = len(items) if isinstance(items, Sized) else None
    except TypeError:  # a loader around one that does not know its length
        total = None
    with Progress(description, total=total, unit=unit) as progress:
        for item in items:
            yield item
            progress.update()


def is_watched() -> bool:
    """Whether a bar can move: on a terminal, and in a notebook."""
    return "ipykernel" in sys.modules or sys.stderr.isatty()


@contextmanager
def shown_log(shown: bool) -> Iterator[None]:
    """A block in which the library's notes and estimates of time are seen, where nobody set up logging.

    Args:
        shown: Whether to show anything.
    """
    if not shown or _library_log.hasHandlers():
        yield
        return
    handler, level = logging.StreamHandler(sys.stderr), _library_log.level
    handler.setFormatter(logging.Formatter("%(message)s"))
    _library_log.addHandler(handler)
    _library_log.setLevel(logging.INFO)
    try:
        yield
    finally:
        _library_log.removeHandler(handler)
        _library_log.setLevel(level)
