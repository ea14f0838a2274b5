"""A cohort's patches as one memory-mapped array: written once, checked against the files, and read in place of them.

The folder of a patch store holds images.npy (all patches one after another, flat: uint16 counts or uint8 colours,
planes first), index.npy (a row per patch: its first element, channels, height, width), sources.npy (a row per patch:
size and modification time of its file), checksums.npy (a row per patch: SHA-256 of its stored values and of its file)
and packed.json (format, kind, paths, unreadable files, SHA-256 of the three tables).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hsat.data.cohort import Cohort
from hsat.data.paths import file_sizes, shorten_names
from hsat.data.readers import BadPatch, as_image, read_stored
from hsat.files import digest_file, load_array, write_file

FORMAT = 1
TABLES = ("index.npy", "sources.npy", "checksums.npy")
DTYPES: dict[str, np.dtype[Any]] = {"srh": np.dtype("<u2"), "rgb": np.dtype("u1")}
HEAD = 128  # bytes of the .npy header of a flat array, whatever its length
_CHUNK = 256  # patches that are read ahead of writing
_MOST = 2**60  # elements, so that sums of them are exact
_REBUILD = "write it again with write_patch_store(cohort, folder, rebuild=True), or delete the folder first"


class PatchStore:
    """The patches of a cohort in one folder; made by `PatchStore.open` or `write_patch_store`.

    Row i is row i of the cohort.  Values equal those of the files bit for bit.  The array is mapped when it is first
    read, in each process by itself; a copy sent to a worker process holds the path and small tables only.

    Args:
        folder: The folder of the store.
        cohort: The cohort whose patches are read.
        table_rows: (n,) for each row of the cohort its row in the folder's tables.
        header: The content of packed.json.
        tables: The three tables by file name.
    """

    def __init__(
        self,
        folder: Path,
        cohort: Cohort,
        table_rows: np.ndarray,
        header: dict[str, Any],
        tables: dict[str, np.ndarray],
    ) -> None:
        self.folder, self.kind, self.root = folder, cohort.kind, cohort.root
        self._table_rows, self._paths = table_rows, tuple(record.path for record in cohort.records)
        self._bad: dict[str, str] = header["bad"]
        self._index = tables["index.npy"]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], cohort: Cohort, *, verify: bool = False) -> PatchStore:
        """The stored patches of this cohort; any cohort will do whose files were stored, however it is split.

        Checksums and shapes of the tables are compared, the array's size, and each file of the cohort with what was
        stored: by size, and by content where it was modified since.

        Args:
            folder: The folder of the store.
            cohort: The cohort whose patches are read.
            verify: Compare the contents of all files, and the stored values with their checksums: this reads
                everything once.

        Raises:
            FileNotFoundError: There is no patch store.
            ValueError: It is damaged (the patches are named), of another format or kind, lacks files of the cohort, or
                holds files that have changed since (they are named).
        """
        folder = Path(folder)
        header = _read_header(folder)
        if header["kind"] != cohort.kind:
            raise ValueError(f"{folder} holds {header['kind']!r} patches and the cohort is {cohort.kind!r}; {_REBUILD}")
        tables = _checked_tables(folder, header)
        row_of = {path: row for row, path in enumerate(header["paths"])}
        paths = [record.path for record in cohort.records]
        if lost := [path for path in paths if path not in row_of]:
            raise ValueError(f"{folder} lacks files of the cohort: {shorten_names(lost)}; {_REBUILD}")
        store = cls(folder, cohort, np.array([row_of[path] for path in paths], dtype=np.int64), header, tables)
        store.check_sources(cohort, verify=verify)
        if verify:
            store.check()
        return store

    def __len__(self) -> int:
        return len(self._table_rows)

    def __repr__(self) -> str:
        return f"PatchStore({len(self)} patches, kind={self.kind!r}, folder={str(self.folder)!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_values"}

    @cached_property
    def _values(self) -> np.ndarray:
        values = load_array(self.folder / "images.npy", memory_map=True)
        length = _end(self._index)
        if values.dtype != DTYPES[self.kind] or values.shape != (length,):
            raise ValueError(
                f"{self.folder / 'images.npy'} is damaged: it holds {values.shape} {values.dtype}, and the index"
                f" {length} {DTYPES[self.kind]}; {_REBUILD}"
            )
        return values

    def stored(self, row: int) -> np.ndarray:
        """A copy of the integers of one patch, as `read_stored` gives them; BadPatch where its file was unreadable."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is outside these {len(self)} stored patches")
        return np.array(self._mapped(row))

    def read(self, row: int) -> Tensor:
        """One patch as (3, h, w) float32 in [0, 1], equal to `read_patch` of its file; BadPatch as `stored`."""
        return as_image(torch.from_numpy(self.stored(row)), kind=self.kind)

    def _mapped(self, row: int) -> np.ndarray:
        if self._paths[row] in self._bad:
            raise BadPatch(self.root / self._paths[row], self._bad[self._paths[row]])
        begin, *shape = (int(number) for number in self._index[self._table_rows[row]])
        return self._values[begin : begin + int(np.prod(shape))].reshape(shape)

    def check_rows(self, cohort: Cohort) -> None:
        """Raise ValueError unless row i here is row i of this cohort; its splits do not matter."""
        if self._paths != tuple(record.path for record in cohort.records):
            raise ValueError(f"{self!r} was opened for another cohort; open it with PatchStore.open(folder, cohort)")

    def refuse_bad(self) -> None:
        """Raise BadPatch for the first patch of the cohort whose file was unreadable when it was stored."""
        for path in self._paths:
            if path in self._bad:
                raise BadPatch(self.root / path, self._bad[path])

    def check(self) -> None:
        """Compare every stored patch with its checksum; ValueError names those that differ."""
        checksums = load_array(self.folder / "checksums.npy")[:, 0]
        good = [row for row in range(len(self)) if self._paths[row] not in self._bad]
        changed = [
            self._paths[row]
            for row in good
            if hashlib.sha256(self._mapped(row).data).digest() != checksums[self._table_rows[row]].tobytes()
        ]
        if changed:
            raise ValueError(f"{self.folder / 'images.npy'} is damaged at {shorten_names(changed)}; {_REBUILD}")

    def content_digest(self) -> str:
        """SHA-256 (hex) of what is stored of the cohort: the checksum of every patch, in the cohort's order."""
        checksums = load_array(self.folder / "checksums.npy")[self._table_rows, 0]
        return hashlib.sha256(np.ascontiguousarray(checksums).data).hexdigest()

    def check_sources(self, cohort: Cohort, *, verify: bool = False) -> None:
        """Compare the cohort's files with what was stored, see `open`; ValueError names those that changed."""
        sizes = file_sizes(cohort.root, self._paths, map(cohort.path, range(len(self))))
        sources = load_array(self.folder / "sources.npy")[self._table_rows]
        digests = load_array(self.folder / "checksums.npy")[:, 1]
        changed = []
        for row, (size, then) in enumerate(zip(sizes, sources, strict=True)):
            path = cohort.path(row)
            same = size == then[0]
            if same and (verify or os.stat(path).st_mtime_ns != then[1]):
                same = bytes.fromhex(digest_file(path)) == digests[self._table_rows[row]].tobytes()
            if not same:
                changed.append(self._paths[row])
        if changed:
            raise ValueError(
                f"files have changed since they were stored in {self.folder}: {shorten_names(changed)}; {_REBUILD}"
            )


def _read_header(folder: Path) -> dict[str, Any]:
    """packed.json of a patch store.  Raises FileNotFoundError or ValueError saying what is wrong with it."""
    path = folder / "packed.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no patch store: it has no packed.json; make one with write_patch_store")
    try:
        header = json.loads(path.read_text("utf-8"))
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}, this version reads {FORMAT}")
        if header["kind"] not in DTYPES:
            raise ValueError(f"its kind is {header['kind']!r}")
        paths, bad, tables = header["paths"], header["bad"], header["tables"]
        if not isinstance(paths, list) or len({str(name) for name in paths}) != len(paths) or not paths:
            raise ValueError("its paths are no list of different names")
        texts = (*paths, *bad.keys(), *bad.values(), *(tables[name] for name in TABLES))
        if not all(isinstance(text, str) for text in texts) or not bad.keys() <= set(paths):
            raise ValueError("an entry is no text, or is bad and has no path")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used ({type(error).__name__}: {error}); {_REBUILD}") from error
    return dict(header)


def _checked_tables(folder: Path, header: dict[str, Any]) -> dict[str, np.ndarray]:
    """The three tables of a patch store, which belong together and to images.npy; ValueError naming what does not."""
    rows = len(header["paths"])
    forms = {"index.npy": ("i8", (rows, 4)), "sources.npy": ("i8", (rows, 2)), "checksums.npy": ("u1", (rows, 2, 32))}
    tables = {}
    for name in TABLES:
        path = folder / name
        if not path.is_file() or digest_file(path) != header["tables"][name]:
            raise ValueError(f"{path} is damaged: its checksum is not that of packed.json; {_REBUILD}")
        tables[name] = load_array(path)
        if (tables[name].dtype.str[1:], tables[name].shape) != forms[name]:
            raise ValueError(f"{path} is damaged: it holds {tables[name].shape} {tables[name].dtype}; {_REBUILD}")
    index, item = tables["index.npy"], DTYPES[header["kind"]].itemsize
    sizes = index[:, 1:].prod(axis=1)
    bad = np.array([path in header["bad"] for path in header["paths"]])
    sound = index.min() >= 0 and index[:, 1:].astype(np.float64).prod(axis=1).sum() < _MOST
    if not sound or (index[:, 0] != np.cumsum(sizes) - sizes).any() or ((sizes == 0) != bad).any():
        raise ValueError(f"{folder / 'index.npy'} is damaged: its rows do not follow one another; {_REBUILD}")
    images = folder / "images.npy"
    length, size = HEAD + _end(index) * item, images.stat().st_size if images.is_file() else 0
    if size != length:
        raise ValueError(f"{images} is damaged: it has {size} bytes and the index wants {length}; {_REBUILD}")
    return tables


def _end(index: np.ndarray) -> int:
    """Elements in images.npy."""
    return int(index[-1, 0] + index[-1, 1:].prod())


class _StoredPatch(NamedTuple):
    """One patch on its way into a store: its values, and what the tables say of it."""

    values: np.ndarray
    source: tuple[int, int]
    digests: tuple[str, str]
    bad: str | None


def write_patch_store(
    cohort: Cohort,
    folder: str | os.PathLike[str],
    *,
    rebuild: bool = False,
    verify: bool = False,
    on_bad: Literal["raise", "record"] = "raise",
    threads: int = 1,
    wait: bool = False,
) -> PatchStore:
    """The cohort's patches stored in `folder`, which is opened and checked if it is there already.

    The folder appears under its name only when it is whole.  Until then it is called .NAME.packing; what a killed
    process left there is thrown away by the next call.  Room: two bytes per pixel and plane for "srh", one per pixel
    and channel for "rgb".

    Args:
        cohort: The cohort; its splits do not matter.
        folder: The folder of the store.
        rebuild: Replace a store that no longer fits the cohort; one that fits is kept.
        verify: As for `PatchStore.open`.
        on_bad: "record" writes the reason in place of an unreadable file; reading that patch then raises its BadPatch
            as the file would.  "raise" raises it at once.
        threads: Files read at a time.
        wait: Wait where another process is writing, and open what it made.

    Raises:
        FileExistsError: The folder exists and is no patch store.
        ValueError: As `PatchStore.open` where rebuild=False; threads below 1, or another on_bad.
        BadPatch: A file cannot be read.
        RuntimeError: Another process is writing there and wait=False.
    """
    if on_bad not in ("raise", "record"):
        raise ValueError(f"on_bad must be 'raise' or 'record', got {on_bad!r}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    folder = Path(os.path.abspath(folder))
    store = _open_if_present(cohort, folder, rebuild=rebuild, verify=verify)
    if store is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = folder.parent / f".{folder.name}.packing"
        with _lock(work, wait=wait):
            store = _open_if_present(cohort, folder, rebuild=rebuild, verify=verify)  # another process was faster
            if store is None:
                shutil.rmtree(work, ignore_errors=True)
                try:
                    _write_folder(cohort, work, record_bad=on_bad == "record", threads=threads)
                    _rename_folder(work, folder)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
                store = PatchStore.open(folder, cohort, verify=verify)
    if on_bad == "raise":
        store.refuse_bad()
    return store


def _open_if_present(cohort: Cohort, folder: Path, *, rebuild: bool, verify: bool) -> PatchStore | None:
    """The store that is there already; None where there is none, or one that no longer fits and may be replaced."""
    if not os.path.lexists(folder):
        return None
    if not (folder / "packed.json").is_file():
        raise FileExistsError(f"{folder} exists and is no patch store; name a folder that does not exist")
    try:
        return PatchStore.open(folder, cohort, verify=verify)
    except ValueError:
        if not rebuild:
            raise
    return None


@contextmanager
def _lock(work: Path, *, wait: bool) -> Iterator[None]:
    """A lock beside the work folder; the system lets go of it when the process ends, however it ends."""
    with open(f"{work}.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"another process is packing into {work}; wait for it to end, or pass wait=True"
            ) from error
        yield  # the empty file stays: another process may wait at it, and a new one would be another lock


def _write_folder(cohort: Cohort, work: Path, *, record_bad: bool, threads: int) -> None:
    """All files of a store; packed.json comes last."""
    work.mkdir()
    paths = [record.path for record in cohort.records]
    shapes: list[tuple[int, ...]] = []
    patches: list[_StoredPatch] = []
    with open(work / "images.npy", "wb") as images, ThreadPoolExecutor(threads) as pool:
        images.write(bytes(HEAD))
        for first in range(0, len(cohort), _CHUNK):
            rows = range(first, min(first + _CHUNK, len(cohort)))
            for patch in pool.map(lambda row: _read_source(cohort, row, record_bad=record_bad), rows):
                images.write(patch.values.data)
                shapes.append(patch.values.shape)
                patches.append(patch._replace(values=np.empty(0)))
        sizes = np.array(shapes, dtype=np.int64).prod(axis=1)
        description = {"descr": DTYPES[cohort.kind].str, "fortran_order": False, "shape": (int(sizes.sum()),)}
        images.seek(0)
        np.lib.format.write_array_header_1_0(images, description)
        if images.tell() != HEAD:
            raise RuntimeError(f"numpy wrote a header of {images.tell()} bytes where {HEAD} were expected")
        images.flush()
        os.fsync(images.fileno())
    digests = b"".join(bytes.fromhex(text) for patch in patches for text in patch.digests)
    tables = {
        "index.npy": np.column_stack([np.cumsum(sizes) - sizes, np.array(shapes, dtype=np.int64)]),
        "sources.npy": np.array([patch.source for patch in patches], dtype=np.int64),
        "checksums.npy": np.frombuffer(digests, dtype=np.uint8).reshape(-1, 2, 32),
    }
    for name in TABLES:
        np.save(work / name, tables[name], allow_pickle=False)
    header = {"format": FORMAT, "kind": cohort.kind, "paths": paths}
    bad = {path: patch.bad for path, patch in zip(paths, patches, strict=True) if patch.bad}
    checksums = {name: digest_file(work / name) for name in TABLES}
    write_file(work / "packed.json", json.dumps(header | {"bad": bad, "tables": checksums}))


def _read_source(cohort: Cohort, row: int, *, record_bad: bool) -> _StoredPatch:
    """One patch from its file; BadPatch where the file changes meanwhile, or cannot be read."""
    path, dtype = cohort.path(row), DTYPES[cohort.kind]
    before = os.stat(path)
    bad = None
    try:
        values = read_stored(path, kind=cohort.kind).astype(dtype, copy=False)
    except BadPatch as error:
        if not record_bad:
            raise
        bad, values = error.reason, np.empty((0, 0, 0), dtype)
    digest = digest_file(path)
    after = os.stat(path)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise BadPatch(path, "it changed while it was stored")
    digests = hashlib.sha256(values.data).hexdigest(), digest
    return _StoredPatch(values, (after.st_size, after.st_mtime_ns), digests, bad)


def _rename_folder(work: Path, folder: Path) -> None:
    """Give the finished work folder its name; an older store is replaced."""
    old = folder.parent / f".{folder.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    work.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
