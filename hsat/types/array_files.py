"""Reading numpy's files, from any thread, without ever unpickling."""

from __future__ import annotations

import os
import threading
from typing import IO, Any

import numpy as np

# numpy parses a file's header with ast.literal_eval, whose recursion counter CPython 3.11 shares between threads
# (python/cpython#106905): two headers read at the same time can end in SystemError.
_one_header_at_a_time = threading.Lock()


def load_array(path: str | os.PathLike[str], *, memory_map: bool = False) -> np.ndarray:
    """The array of one .npy file; with memory_map=True its values stay on disk.

    Raises ValueError where it holds anything but one array of plain values, FileNotFoundError, OSError, EOFError.
    """
    with _one_header_at_a_time:
        found: Any = np.load(path, mmap_mode="r" if memory_map else None, allow_pickle=False)
    if not isinstance(found, np.ndarray):
        found.close()
        raise ValueError(f"{os.fspath(path)} is an archive of arrays, and one array was wanted")
    return found


def load_arrays(file: IO[bytes]) -> dict[str, np.ndarray]:
    """All arrays of one .npz file by name.

    Raises ValueError where it is not such an archive, or holds anything but plain values; OSError, EOFError,
    zipfile.BadZipFile and zlib.error where it is damaged.
    """
    with _one_header_at_a_time:
        found: Any = np.load(file, allow_pickle=False)
        if isinstance(found, np.ndarray):
            raise ValueError("it is one array, and an archive of arrays was wanted")
        with found:
            return {name: found[name] for name in found.files}
