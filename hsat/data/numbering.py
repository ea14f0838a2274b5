"""Numbers for names."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)


def numbered(keys: Sequence[Key]) -> tuple[np.ndarray, tuple[Key, ...]]:
    """Numbers in order of first appearance, (n,) int64 and read-only, and what they stand for."""
    codes: dict[Key, int] = {}
    numbers = np.fromiter((codes.setdefault(key, len(codes)) for key in keys), np.int64, len(keys))
    return read_only(numbers), tuple(codes)


def read_only(array: np.ndarray) -> np.ndarray:
    """The same array, locked."""
    array.setflags(write=False)
    return array
