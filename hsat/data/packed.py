"""A cohort's patches as one memory-mapped array: opened, checked against its files, and read in place of them.

A packed folder holds images.npy (all patches one after another, flat: uint16 counts or uint8 colours, planes first),
index.npy (a row per patch: its first element, channels, height, width), sources.npy (a row per patch: size and
modification time of its file), checksums.npy (a row per patch: SHA-256 of its packed values and of its file) and
packed.json (format, kind, paths, unreadable files, SHA-256 of the three tables).  `hsat.data.packing` writes it.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hsat.data.files import file_sizes, shortened
from hsat.data.readers import BadPatch, as_image
from hsat.files import load_array

if TYPE_CHECKING:
    from hsat.data.cohort import Cohort

FORMAT = 1
TABLES = ("index.npy", "sources.npy", "checksums.npy")
DTYPES: dict[str, np.dtype[Any]] = {"srh": np.dtype("<u2"), "rgb": np.dtype("u1")}
HEAD = 128  # bytes of the .npy header of a flat array, whatever its length
_BLOCK = 1 << 20
_MOST = 2**60  # elements, so that sums of them are exact


class PackedPatches:
    """The patches of a cohort in a packed folder; made by `PackedPatches.open` or `hsat.data.pack_cohort`.

    Row i is row i of the cohort.  Values equal those of the files bit for bit.  The array is mapped when it is first
    read, in each process by itself; a copy sent to a worker process holds the path and small tables only.
    """

    def __init__(
        self, folder: Path, cohort: Cohort, places: np.ndarray, head: dict[str, Any], tables: dict[str, np.ndarray]
    ) -> None:
        """places: for each row of the cohort its row in the folder's tables; `open` finds them and reads the rest."""
        self.folder, self.kind, self.root = folder, cohort.kind, cohort.root
        self._places, self._paths = places, tuple(record.path for record in cohort.records)
        self._bad: dict[str, str] = head["bad"]
        self._index = tables["index.npy"]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], cohort: Cohort, *, verify: bool = False) -> PackedPatches:
        """The packed patches of this cohort; any cohort will do whose files were packed, however it is split.

        Checksums and shapes of the tables are compared, the array's size, and each file of the cohort with what was
        packed: by size, and by content where it was modified since.  verify=True compares the contents of all files,
        and the packed values with their checksums: it reads everything once.

        Raises FileNotFoundError where there is no packed folder, ValueError where it is damaged (naming the patches),
        of another format or kind, lacks files of the cohort, or holds files that have changed since (naming them).
        """
        folder = Path(folder)
        head = read_header(folder)
        if head["kind"] != cohort.kind:
            raise ValueError(f"{folder} holds {head['kind']!r} patches and the cohort is {cohort.kind!r}; pack it anew")
        tables = _checked_tables(folder, head)
        row_of = {path: row for row, path in enumerate(head["paths"])}
        paths = [record.path for record in cohort.records]
        if lost := [path for path in paths if path not in row_of]:
            raise ValueError(f"{folder} lacks files of the cohort: {shortened(lost)}; {_REBUILD}")
        packed = cls(folder, cohort, np.array([row_of[path] for path in paths], dtype=np.int64), head, tables)
        packed.check_sources(cohort, verify=verify)
        if verify:
            packed.check()
        return packed

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"PackedPatches({len(self)} patches, kind={self.kind!r}, folder={str(self.folder)!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_values"}

    @cached_property
    def _values(self) -> np.ndarray:
        values = load_array(self.folder / "images.npy", memory_map=True)
        wanted = _end(self._index)
        if values.dtype != DTYPES[self.kind] or values.shape != (wanted,):
            raise ValueError(
                f"{self.folder / 'images.npy'} is damaged: it holds {values.shape} {values.dtype}, and the index"
                f" {wanted} {DTYPES[self.kind]}; pack it anew"
            )
        return values

    def stored(self, row: int) -> np.ndarray:
        """A copy of the integers of one patch, as `read_stored` gives them; BadPatch where its file was unreadable."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is outside these {len(self)} packed patches")
        return np.array(self._mapped(row))

    def read(self, row: int) -> Tensor:
        """One patch as (3, h, w) float32 in [0, 1], equal to `read_patch` of its file; BadPatch as `stored`."""
        return as_image(torch.from_numpy(self.stored(row)), kind=self.kind)

    def _mapped(self, row: int) -> np.ndarray:
        if self._paths[row] in self._bad:
            raise BadPatch(self.root / self._paths[row], self._bad[self._paths[row]])
        begin, *shape = (int(number) for number in self._index[self._places[row]])
        return self._values[begin : begin + int(np.prod(shape))].reshape(shape)

    def check_rows(self, cohort: Cohort) -> None:
        """Raise ValueError unless row i here is row i of this cohort; its splits do not matter."""
        if self._paths != tuple(record.path for record in cohort.records):
            raise ValueError(f"{self!r} was opened for another cohort; open it with PackedPatches.open(folder, cohort)")

    def refuse_bad(self) -> None:
        """Raise BadPatch for the first patch of the cohort whose file was unreadable when it was packed."""
        for path in self._paths:
            if path in self._bad:
                raise BadPatch(self.root / path, self._bad[path])

    def check(self) -> None:
        """Compare every packed patch with its checksum; ValueError names those that differ."""
        checksums = load_array(self.folder / "checksums.npy")[:, 0]
        good = [row for row in range(len(self)) if self._paths[row] not in self._bad]
        changed = [
            self._paths[row]
            for row in good
            if hashlib.sha256(self._mapped(row).data).digest() != checksums[self._places[row]].tobytes()
        ]
        if changed:
            raise ValueError(f"{self.folder / 'images.npy'} is damaged at {shortened(changed)}; pack it anew")

    def content_digest(self) -> str:
        """SHA-256 (hex) of what is packed of the cohort: the checksum of every patch, in the cohort's order."""
        checksums = load_array(self.folder / "checksums.npy")[self._places, 0]
        return hashlib.sha256(np.ascontiguousarray(checksums).data).hexdigest()

    def check_sources(self, cohort: Cohort, *, verify: bool = False) -> None:
        """Compare the cohort's files with what was packed, see `open`; ValueError names those that changed."""
        sizes = file_sizes(cohort.root, self._paths, map(cohort.path, range(len(self))))
        sources = load_array(self.folder / "sources.npy")[self._places]
        digests = load_array(self.folder / "checksums.npy")[:, 1]
        changed = []
        for row, (size, then) in enumerate(zip(sizes, sources, strict=True)):
            path = cohort.path(row)
            same = size == then[0]
            if same and (verify or os.stat(path).st_mtime_ns != then[1]):
                same = file_digest(path) == digests[self._places[row]].tobytes()
            if not same:
                changed.append(self._paths[row])
        if changed:
            raise ValueError(
                f"files have changed since they were packed into {self.folder}: {shortened(changed)}; {_REBUILD}"
            )


_REBUILD = "pack again with pack_cohort(cohort, folder, rebuild=True), or delete the folder first"


def read_header(folder: Path) -> dict[str, Any]:
    """packed.json of a packed folder.  Raises FileNotFoundError or ValueError saying what is wrong with it."""
    path = folder / "packed.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a packed cohort: it has no packed.json; make one with pack_cohort")
    try:
        head = json.loads(path.read_text("utf-8"))
        if head["format"] != FORMAT:
            raise ValueError(f"its format is {head['format']!r}, this version reads {FORMAT}")
        if head["kind"] not in DTYPES:
            raise ValueError(f"its kind is {head['kind']!r}")
        paths, bad, tables = head["paths"], head["bad"], head["tables"]
        if not isinstance(paths, list) or len({str(name) for name in paths}) != len(paths) or not paths:
            raise ValueError("its paths are no list of different names")
        texts = (*paths, *bad.keys(), *bad.values(), *(tables[name] for name in TABLES))
        if not all(isinstance(text, str) for text in texts) or not bad.keys() <= set(paths):
            raise ValueError("an entry is no text, or is bad and has no path")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used ({type(error).__name__}: {error}); pack the cohort anew") from error
    return dict(head)


def _checked_tables(folder: Path, head: dict[str, Any]) -> dict[str, np.ndarray]:
    """The three tables of a packed folder, which belong together and to images.npy; ValueError naming what does not."""
    rows = len(head["paths"])
    forms = {"index.npy": ("i8", (rows, 4)), "sources.npy": ("i8", (rows, 2)), "checksums.npy": ("u1", (rows, 2, 32))}
    found = {}
    for name in TABLES:
        path = folder / name
        if not path.is_file() or file_digest(path).hex() != head["tables"][name]:
            raise ValueError(f"{path} is damaged: its checksum is not that of packed.json; pack it anew")
        found[name] = load_array(path)
        if (found[name].dtype.str[1:], found[name].shape) != forms[name]:
            raise ValueError(f"{path} is damaged: it holds {found[name].shape} {found[name].dtype}; pack it anew")
    index, item = found["index.npy"], DTYPES[head["kind"]].itemsize
    sizes = index[:, 1:].prod(axis=1)
    bad = np.array([path in head["bad"] for path in head["paths"]])
    sound = index.min() >= 0 and index[:, 1:].astype(np.float64).prod(axis=1).sum() < _MOST
    if not sound or (index[:, 0] != np.cumsum(sizes) - sizes).any() or ((sizes == 0) != bad).any():
        raise ValueError(f"{folder / 'index.npy'} is damaged: its rows do not follow one another; pack it anew")
    images = folder / "images.npy"
    wanted, size = HEAD + _end(index) * item, images.stat().st_size if images.is_file() else 0
    if size != wanted:
        raise ValueError(f"{images} is damaged: it has {size} bytes and the index wants {wanted}; pack it anew")
    return found


def _end(index: np.ndarray) -> int:
    """Elements in images.npy."""
    return int(index[-1, 0] + index[-1, 1:].prod())


def file_digest(path: Path) -> bytes:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.digest()
