"""Files that appear whole or not at all, arrays without pickle and with checksums, and JSON that is checked when read.

This is the ground floor, beside `untrusted`: it imports nothing else of hsat.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np

from hsat.untrusted import open_regular, strict_json

if TYPE_CHECKING:
    from pydantic import ConfigDict, TypeAdapter

Arrays = dict[str, np.ndarray]
PathLike = str | os.PathLike[str]

STRICT: ConfigDict = {"strict": True, "extra": "forbid", "allow_inf_nan": False}
"""How pydantic reads values of files: no kind is taken for another, and NaN and infinity are no numbers."""

_T = TypeVar("_T")
MOST_GROWTH, SMALL = 64, 256 << 20  # of a compressed archive; up to this many bytes it may grow as it likes
_PARTIAL = ".partial"
_LONGEST_HEADER = 1 << 24  # bytes; no first line that `write_arrays` makes is longer
_CHUNK = 1 << 20
_DEEPEST_LINE, _MOST_IN_A_LINE = 32, 10_000  # objects and lists in a line of JSON
_MAGIC = b"\x93NUMPY"

# numpy parses a file's header with ast.literal_eval, whose recursion counter CPython 3.11 shares between threads
# (python/cpython#106905): two headers read at the same time can end in SystemError.
_header_lock = threading.Lock()


class CorruptFileError(ValueError):
    """A file was changed, cut off, or was never written by the function that should have written it."""


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """A temporary path beside `path`; when the block ends without an error, its file replaces `path` in one step.

    The file is flushed to the disk first, so a process may be killed at any moment: `path` holds the old content or
    the new one, never a part.  Missing parent folders are made.  After an error the temporary file is removed.

    Args:
        path: The file to write.

    Yields:
        A path in the same folder that does not exist yet; the block has to create a file there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", suffix=_PARTIAL, dir=path.parent)
    os.close(handle)
    working = Path(name)
    try:
        yield working
        with working.open("rb") as file:
            os.fsync(file.fileno())
        working.chmod(0o644)  # mkstemp makes files that only their owner can read
        working.replace(path)
    except BaseException:
        working.unlink(missing_ok=True)
        raise


def write_file(path: PathLike, content: bytes | str) -> Path:
    """Write bytes, or text as UTF-8, so that the file appears whole or not at all; returns the path."""
    with atomic_path(path) as working:
        working.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return Path(path)


@contextmanager
def atomic_folder(path: PathLike, *, marker: str, what: str) -> Iterator[Path]:
    """A new empty folder that replaces `path` in one step when the block ends without an error.

    Args:
        path: The folder to write.
        marker: Name of a file that every folder of this kind holds; an existing `path` without it is not replaced.
        what: The kind of folder, for the error message, as in "an embedding table".

    Yields:
        The folder to fill.

    Raises:
        FileExistsError: If `path` exists and is no folder of this kind; it is left untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not (path / marker).is_file():
        raise FileExistsError(f"{path} exists and is not {what}; it is left untouched")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        working = Path(scratch) / "new"
        working.mkdir()  # with the permissions of an ordinary folder, which the scratch folder does not have
        yield working
        if path.exists():
            path.replace(Path(scratch) / "old")
        working.replace(path)


def is_partial(path: Path) -> bool:
    """Whether a file is what `atomic_path` leaves behind when the process is killed."""
    return path.name.startswith(".") and path.name.endswith(_PARTIAL)


def remove_partials(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder."""
    for path in filter(is_partial, folder.iterdir()):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def digest_file(path: PathLike) -> str:
    """SHA-256 of a file's bytes as hex, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def write_arrays(path: PathLike, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays with a description and a checksum.

    The first line is JSON: {"about": header, "sha256": checksum of the rest}.  The rest is numpy's .npz format.

    Args:
        path: The file to write; it appears whole or not at all.
        header: Texts, numbers, lists and mappings.
        arrays: Arrays of plain values by name.
    """
    body = io.BytesIO()
    np.savez(body, allow_pickle=False, **arrays)
    content = body.getvalue()
    line = json.dumps({"about": dict(header), "sha256": hashlib.sha256(content).hexdigest()}, sort_keys=True)
    write_file(path, line.encode() + b"\n" + content)


def read_arrays(path: PathLike) -> tuple[dict[str, Any], Arrays]:
    """Read the header and the arrays that `write_arrays` wrote.

    Raises:
        CorruptFileError: If a single bit differs, or the file is of another kind.
        FileNotFoundError: If there is no file.
    """
    try:
        stream = open_regular(path, kind="file of arrays")
    except ValueError as error:
        raise CorruptFileError(str(error)) from error
    with stream as file:
        line, content = file.readline(_LONGEST_HEADER), file.read()
    try:
        first = json.loads(line)
        header, digest = dict(first["about"]), first["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFileError(f"{path} does not begin with a description of its arrays") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise CorruptFileError(f"{path} was changed or cut off: its checksum is not that of its arrays")
    try:
        return header, load_arrays(io.BytesIO(content))
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CorruptFileError(f"{path} holds no arrays ({error})") from error


def load_array(path: PathLike, *, memory_map: bool = False) -> np.ndarray:
    """Load the array of one .npy file from any thread, without ever unpickling.

    Args:
        path: The file.
        memory_map: Leave the values on the disk and read them when they are used.

    Raises:
        ValueError: If the file is damaged, shorter than its header says (nothing is allocated for it), an archive, or
            holds anything but plain values; the message names the file.
        FileNotFoundError: If there is no file.
    """
    with _header_lock:
        try:
            _check_length(path)
            array: Any = np.load(path, mmap_mode="r" if memory_map else None, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{os.fspath(path)} is damaged or no array of plain values: {error}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"{os.fspath(path)} is an archive of arrays, and one array was wanted")
    return array


def load_arrays(file: IO[bytes]) -> Arrays:
    """Load all arrays of an open .npz file by name, from any thread, without ever unpickling.

    Raises:
        ValueError: If it is no such archive, holds anything but plain values, would take more than 64 times its own
            length (and more than 256 MiB) in memory, or an array in it is shorter than its header says.
        OSError, EOFError, zipfile.BadZipFile, zlib.error: If it is damaged.
    """
    with _header_lock:
        _check_unpacked(file)
        archive: Any = np.load(file, allow_pickle=False)
        with archive:
            return {name: archive[name] for name in archive.files}


def _check_unpacked(file: IO[bytes]) -> None:
    """Raise ValueError for an archive that unpacks to gigabytes, and for arrays that claim more than it holds."""
    begin = file.tell()
    if file.read(len(_MAGIC)) == _MAGIC:
        raise ValueError("it is one array, and an archive of arrays was wanted")
    if zipfile.is_zipfile(file):
        packed = file.seek(0, os.SEEK_END)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            unpacked = sum(entry.file_size for entry in entries)
            if unpacked > max(SMALL, MOST_GROWTH * packed):
                raise ValueError(f"its {packed} bytes unpack to {unpacked}, which is more than arrays of ours ever do")
            for entry in entries:
                if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
                    raise ValueError(f"its entry {entry.filename[:40]!r} is packed as np.savez never does")
                with archive.open(entry) as array:
                    if array.read(len(_MAGIC)) == _MAGIC:
                        array.seek(0)
                        _check_header(array, entry.file_size)
    file.seek(begin)


def _check_length(path: PathLike) -> None:
    """Raise ValueError where the header of a .npy file promises more than the file holds."""
    with open_regular(path, kind="array") as file:
        if file.read(2) == b"PK":
            return  # an archive, which np.load reads as one
        file.seek(0)
        _check_header(file, os.fstat(file.fileno()).st_size)


def _check_header(file: IO[bytes], size: int) -> None:
    """Raise ValueError where the header of an array, at which a file stands, promises more than `size` bytes hold."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its format is {version[0]}.{version[1]}, which is for structured arrays")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        return  # np.load says so
    if min(shape, default=0) < 0:
        raise ValueError(f"its header says shape {shape}")
    end = file.tell() + dtype.itemsize * math.prod(shape)
    if size < end:
        raise ValueError(f"{shape} values of {dtype} end at byte {end}, and the file has {size}")


def read_text(path: PathLike) -> str:
    """The text of a file; ValueError, naming the file, for what is not UTF-8."""
    try:
        with open_regular(path, kind="text file") as file:
            return file.read().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error.reason} at byte {error.start})") from error


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text.

    Args:
        text: The JSON text.
        where: File and line; error messages begin with it.

    Raises:
        ValueError: If the text is not JSON, or is nested so deeply that it cannot be read.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError(f"{where}: invalid JSON: nested too deeply") from error
    except ValueError as error:  # a number of more digits than Python reads
        raise ValueError(f"{where}: {error}") from error


def read_json_object(path: PathLike) -> dict[str, Any]:
    """The JSON object in a file; ValueError, naming the file, for anything else."""
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def write_json_lines(path: PathLike, objects: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object per line; the file appears whole or not at all.

    Raises:
        ValueError: If a number is NaN or infinite.
    """
    lines = [json.dumps(value, allow_nan=False, sort_keys=True) + "\n" for value in objects]
    return write_file(path, "".join(lines))


def read_json_lines(path: PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with its place ("FILE, line 3"); empty lines are skipped.

    Raises:
        ValueError: If a line holds no JSON object, or one with a key that comes twice, NaN or infinity; the message
            begins with its place.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            parse_json(line, where)  # which names the column
            value = strict_json(line, where=where, depth=_DEEPEST_LINE, containers=_MOST_IN_A_LINE)
            if not isinstance(value, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
            yield where, value


def read_fields(kind: type[_T], values: Any, where: str) -> _T:
    """Values of a file as an object of some kind, which pydantic checks.

    Args:
        kind: A dataclass with `STRICT` as its `__pydantic_config__`, or a pydantic model.
        values: Fields by name.
        where: The file; error messages begin with it.

    Raises:
        ValueError: Naming the first field that does not fit.
    """
    from pydantic import ValidationError

    try:
        # as JSON: there a list is a tuple, and an object a dataclass, also where nothing else is converted
        fields: _T = _adapter(kind).validate_json(json.dumps(values))  # type: ignore[arg-type]  # a class is hashable
        return fields
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name, shown = ".".join(map(str, first["loc"])) or "its value", repr(first["input"])
        shown = shown if len(shown) <= 40 else shown[:40] + "..."
        raise ValueError(f"{where}: {name} is {shown}; {first['msg']}") from error


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
