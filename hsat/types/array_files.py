"""Reading numpy's files, from any thread, without ever unpickling."""

from __future__ import annotations

import math
import os
import threading
import zipfile
from typing import IO, Any

import numpy as np

from hsat.types.untrusted import open_regular

MOST_GROWTH, SMALL = 64, 256 << 20  # of a compressed archive; up to this many bytes it may grow as it likes

# numpy parses a file's header with ast.literal_eval, whose recursion counter CPython 3.11 shares between threads
# (python/cpython#106905): two headers read at the same time can end in SystemError.
_one_header_at_a_time = threading.Lock()


def load_array(path: str | os.PathLike[str], *, memory_map: bool = False) -> np.ndarray:
    """The array of one .npy file; with memory_map=True its values stay on disk.

    Nothing is allocated for a file that is shorter than its header says.  Raises ValueError naming the file where it
    is damaged or holds anything but one array of plain values, FileNotFoundError, OSError.
    """
    with _one_header_at_a_time:
        try:
            _check_length(path)
            found: Any = np.load(path, mmap_mode="r" if memory_map else None, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{os.fspath(path)} is damaged or no array of plain values: {error}") from error
    if not isinstance(found, np.ndarray):
        found.close()
        raise ValueError(f"{os.fspath(path)} is an archive of arrays, and one array was wanted")
    return found


def _check_length(path: str | os.PathLike[str]) -> None:
    """Raise ValueError where the header of a .npy file promises more than the file holds."""
    with open_regular(path, kind="array") as file:
        if file.read(2) == b"PK":
            return  # an archive, which np.load reads as one
        file.seek(0)
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"its format is {version[0]}.{version[1]}, which is for structured arrays")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if dtype.hasobject:
            return  # np.load says so
        if min(shape, default=0) < 0:
            raise ValueError(f"its header says shape {shape}")
        wanted, size = file.tell() + dtype.itemsize * math.prod(shape), os.fstat(file.fileno()).st_size
    if size < wanted:
        raise ValueError(f"{shape} values of {dtype} end at byte {wanted}, and the file has {size}")


def _check_unpacked(file: IO[bytes]) -> None:
    """Raise ValueError for an archive that a few bytes unpack to gigabytes."""
    begin = file.tell()
    if zipfile.is_zipfile(file):
        packed = file.seek(0, os.SEEK_END)
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > max(SMALL, MOST_GROWTH * packed):
            raise ValueError(f"its {packed} bytes unpack to {unpacked}, which is more than arrays of ours ever do")
    file.seek(begin)


def load_arrays(file: IO[bytes]) -> dict[str, np.ndarray]:
    """All arrays of one .npz file by name.

    Raises ValueError where it is not such an archive, holds anything but plain values, or would take more than 64 times
    its own length (and more than 256 MiB) in memory; OSError, EOFError,
    zipfile.BadZipFile and zlib.error where it is damaged.
    """
    _check_unpacked(file)
    with _one_header_at_a_time:
        found: Any = np.load(file, allow_pickle=False)
        if isinstance(found, np.ndarray):
            raise ValueError("it is one array, and an archive of arrays was wanted")
        with found:
            return {name: found[name] for name in found.files}
