"""A cohort's patches as one memory-mapped array: written once, checked against the files, and read in place of them.

The folder of a patch store holds images.npy (all patches one after another, flat: uint16 counts or uint8 colours,
planes first), index.npy (a row per patch: its first element, channels, height, width), sources.npy (a row per patch:
size and modification time of its file), checksums.npy (a row per patch: SHA-256 of its stored values and of its file)
and packed.json (format, kind, paths, unreadable files, SHA-256 of the three tables).
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsat.data.cohort import Cohort
from hsat.data.paths import file_sizes, shorten_names
from hsat.data.readers import BadPatch, as_image
from hsat.files import digest_file, load_array

FORMAT = 1
TABLES = ("index.npy", "sources.npy", "checksums.npy")
DTYPES: dict[str, np.dtype[Any]] = {"srh": np.dtype("<u2"), "rgb": np.dtype("u1")}
CHANNELS = {"srh": 2, "rgb": 3}
HEAD = 128  # bytes of the .npy header of a flat array, whatever its length
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

        Returns:
            The store, with its rows in the cohort's order.

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
        """A copy of the integers of one patch, as `read_stored` gives them; BadPatch where its file was unreadable.

        Args:
            row: Row of the cohort.

        Returns:
            (2, h, w) uint16 for "srh", (3, h, w) uint8 for "rgb".

        Raises:
            IndexError: For a row outside the cohort.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is outside these {len(self)} stored patches")
        return np.array(self._mapped(row))

    def read(self, row: int) -> Tensor:
        """One patch as (3, h, w) float32 in [0, 1], equal to `read_patch` of its file; BadPatch as `stored`.

        Args:
            row: Row of the cohort.

        Returns:
            (3, h, w) float32.
        """
        return as_image(torch.from_numpy(self.stored(row)), kind=self.kind)

    def _mapped(self, row: int) -> np.ndarray:
        if self._paths[row] in self._bad:
            raise BadPatch(self.root / self._paths[row], self._bad[self._paths[row]])
        begin, *shape = (int(number) for number in self._index[self._table_rows[row]])
        return self._values[begin : begin + int(np.prod(shape))].reshape(shape)

    def check_rows(self, cohort: Cohort) -> None:
        """Raise ValueError unless row i here is row i of this cohort; its splits do not matter.

        Args:
            cohort: Any cohort.

        Raises:
            ValueError: Where they differ.
        """
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
        """Compare the cohort's files with what was stored, see `open`; ValueError names those that changed.

        Args:
            cohort: The cohort that the store was opened for.
            verify: Compare the contents of all files.

        Raises:
            ValueError: Naming files that have changed.
        """
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
    if wrong := [header["paths"][row] for row in np.flatnonzero((index[:, 1] != CHANNELS[header["kind"]]) & ~bad)]:
        raise ValueError(
            f"{folder / 'index.npy'} is damaged: {shorten_names(wrong)} have not {CHANNELS[header['kind']]} channels;"
            f" {_REBUILD}"
        )
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
