"""Columns of embeddings from HDF5 files that somebody else may have written: nothing in them is followed or trusted.

A file may lead a reader to other files (external and soft links, external storage, virtual datasets), promise more than
it holds, or hold objects.  All of that is refused before any of it is opened or allocated.
"""

from __future__ import annotations

import itertools
import math
import os
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hsat.files import MOST_GROWTH, SMALL
from hsat.types.columns import embedding_rows
from hsat.untrusted import check_regular, open_regular, shown

PathLike = str | os.PathLike[str]

_GZIP, _CHECKSUM = 1, 3
_FILTERS = {_GZIP: "gzip", 2: "shuffle", _CHECKSUM: "fletcher32", 32000: "lzf"}  # lzf unpacks to at most 88 times
_TEXT_BYTES = 64 << 20  # texts of any length that are read at a time
_LONGEST_TEXT = 1000  # characters of an id or label, on average
_REFERENCE = np.dtype([("length", "<u4"), ("address", "<u8"), ("index", "<u4")])  # to a text, as files hold it
_KINDS = {"embeddings": "f", "ids or labels": "biufSO"}


@dataclass(eq=False)
class H5Columns:
    """The columns of several files, one after another.

    Attributes:
        z: (n_i, d) embeddings of each file.
        labels, patients, slides: One value per row; None where nothing says it.
        files: The files.
    """

    z: list[np.ndarray] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    patients: list[Any] | None = None
    slides: list[Any] | None = None
    files: list[Path] = field(default_factory=list)

    def place(self) -> Callable[[int], str]:
        """Words in which file, and where in it, a row of all stands."""
        begins = [0, *itertools.accumulate(map(len, self.z))]

        def words(row: int) -> str:
            number = bisect_right(begins, row) - 1
            return f"{self.files[number]}, row {row - begins[number]}"

        return words


def read_h5_columns(
    paths: PathLike | Iterable[PathLike],
    *,
    features: str,
    labels: str | Mapping[Any, Any],
    patients: str | Mapping[Any, Any] | None,
    slides: str | None,
    max_bytes: int | None,
) -> H5Columns:
    """Read what `EmbeddingTable.from_h5` is asked for; see there for arguments and errors."""
    files = [Path(paths)] if isinstance(paths, str | os.PathLike) else [Path(path) for path in paths]
    if not files:
        raise ValueError("no file is given; sorted(Path('features').glob('*.h5')) lists those of a folder")
    roles: dict[str, str | Mapping[Any, Any] | None] = {"labels": labels, "patients": patients}
    for name, source in roles.items():
        if not isinstance(source, str | Mapping | None) or (name == "labels" and source is None):
            raise TypeError(
                f"{name} must be the name of a dataset, or a mapping from slide to its value, such as"
                f" dict(zip(frame['slide_id'], frame['label'])); got {type(source).__name__}"
            )
    per_slide = len(files) > 1 or any(isinstance(source, Mapping) for source in roles.values())
    if slides is None and per_slide:
        _check_stems(files)
    columns = H5Columns(
        files=files, patients=None if patients is None else [], slides=[] if slides or per_slide else None
    )
    datasets = {name: source for name, source in (*roles.items(), ("slides", slides)) if isinstance(source, str)}
    for path in files:
        arrays = _read_file(path, features, datasets, max_bytes=max_bytes)
        z, n = arrays[""], len(arrays[""])
        if columns.z and z.shape[1] != columns.z[0].shape[1]:
            raise ValueError(
                f"{path}: {features!r} has {z.shape[1]} columns, and in {files[0]} it has {columns.z[0].shape[1]};"
                " a table holds embeddings of one encoder"
            )
        own_slides = _listed(arrays["slides"]) if "slides" in arrays else [path.stem] * n
        if columns.slides is not None:
            columns.slides.extend(own_slides)
        for name, column in (("labels", columns.labels), ("patients", columns.patients)):
            if column is not None:
                source = roles[name]
                column.extend(_mapped(name, source, own_slides, path) if isinstance(source, Mapping) else arrays[name])
        columns.z.append(z)
    return columns


def _check_stems(files: Sequence[Path]) -> None:
    first: dict[str, Path] = {}
    for path in files:
        if (before := first.setdefault(path.stem, path)) is not path:
            raise ValueError(
                f"{before} and {path} would be one slide, {path.stem!r}: a slide is the name of its file."
                " Give slides=, the name of the dataset that holds the slides"
            )


def _listed(column: np.ndarray) -> list[Any]:
    values: list[Any] = column.tolist()
    return [value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value for value in values]


def _mapped(name: str, source: Mapping[Any, Any], slides: Sequence[Any], path: Path) -> list[Any]:
    """The value of each row's slide, by its name as it is or as a text."""
    values = {}
    for slide in dict.fromkeys(slides):
        if slide not in source and str(slide) not in source:
            known = ", ".join(shown(str(key)) for key in itertools.islice(source, 3))
            raise ValueError(
                f"{path}: {name} has no entry for slide {shown(str(slide))}; its {len(source)} entries are for"
                f" {known}{' ...' if len(source) > 3 else ''}. A slide is called as its file without the ending"
            )
        values[slide] = source[slide if slide in source else str(slide)]
    return [values[slide] for slide in slides]


def _read_file(
    path: Path, features: str, datasets: Mapping[str, str], *, max_bytes: int | None
) -> dict[str, np.ndarray]:
    """The embeddings of a file, under "", and its other columns by what they are."""
    h5py = _import_h5py()
    size = check_regular(path, kind="HDF5 file").st_size
    try:
        with h5py.File(path, "r") as file:
            z = _H5Dataset(path, size, features, max_bytes).read(file, "embeddings")
            if z.ndim != 2 or 0 in z.shape:
                raise ValueError(
                    f"{path}: {features!r} has shape {z.shape}; wanted (n, d), a row per patch"
                    + "; it holds no patch, so leave the file out" * (z.ndim == 2)
                )
            arrays = {"": embedding_rows(z, lambda row: f"{path}, row {row}")}
            for role, name in datasets.items():
                column = _H5Dataset(path, size, name, max_bytes).read(file, "ids or labels")
                if column.shape not in ((len(z),), (len(z), 1)):
                    raise ValueError(
                        f"{path}: {name!r} ({role}) has shape {column.shape}; wanted ({len(z)},), as {features!r} has"
                        f" {len(z)} rows"
                    )
                arrays[role] = column.reshape(len(z))
    except (OSError, RuntimeError, KeyError, zlib.error) as error:
        raise ValueError(f"{path} is no HDF5 file that can be read: {error}") from error
    return arrays


def _import_h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError('EmbeddingTable.from_h5 needs h5py: pip install "hsat[wsi]"') from error
    return h5py


def _filters_of(dataset: Any) -> list[int]:
    """Codes of the filters of a dataset, in the order in which they pack."""
    settings = dataset.id.get_create_plist()
    return [int(settings.get_filter(number)[0]) for number in range(settings.get_nfilters())]


@dataclass(frozen=True)
class _H5Dataset:
    """A dataset of a file that is not trusted.

    Attributes:
        path: The file, for messages.
        size: Its bytes.
        name: Of the dataset.
        max_bytes: See `EmbeddingTable.from_h5`.
    """

    path: Path
    size: int
    name: str
    max_bytes: int | None

    def read(self, file: Any, what: str) -> np.ndarray:
        """The values, after all checks; what: a key of the kinds of values that are allowed."""
        dataset = self._find(file)
        self._check_storage(dataset)
        dtype = self._dtype(dataset, what)
        if dataset.shape is None or not dataset.shape:
            raise self._refused("holds no array", "wanted one value per row")
        self._check_size(dataset, dtype)
        if dtype.kind != "O":
            return np.asarray(dataset[()])
        return self._read_texts(dataset)

    def _refused(self, what: str, why: str) -> ValueError:
        return ValueError(f"{self.path}: {self.name!r} {what}; {why}")

    def _find(self, file: Any) -> Any:
        """The dataset, by hard links of this file only: `group.get` would follow others to see whether they exist."""
        from h5py import Dataset, Group, h5l

        node, parts = file, [part for part in self.name.split("/") if part]
        if not parts or {".", ".."} & set(parts):
            raise ValueError(f"{self.name!r} is no name of a dataset, such as 'features' or 'patches/features'")
        for part in parts:
            key = part.encode()
            if not isinstance(node, Group) or not node.id.links.exists(key):
                there = ", ".join(shown(one) for one in itertools.islice(node, 10)) if isinstance(node, Group) else ""
                raise ValueError(f"{self.path} has no dataset {self.name!r}; there is {there or 'nothing'}")
            kind = node.id.links.get_info(key).type
            if kind != h5l.TYPE_HARD:
                word = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "a link into another file"}
                raise self._refused(
                    f"is {word.get(kind, 'a link of an unknown kind')}", "it is not followed. Copy the values instead"
                )
            node = node[part]
        if not isinstance(node, Dataset):
            raise self._refused("is no dataset", f"it is a {type(node).__name__.lower()}")
        return node

    def _check_storage(self, dataset: Any) -> None:
        """Refuse values that lie in other files, and filters whose output nobody can bound."""
        from h5py import h5d

        settings = dataset.id.get_create_plist()
        if settings.get_layout() == h5d.VIRTUAL:
            raise self._refused("is a virtual dataset, made of other files", "it is not followed. Copy the values")
        if settings.get_external_count():
            raise self._refused("is stored in other files", "they are not opened. Copy the values")
        codes = _filters_of(dataset)
        if unknown := [code for code in codes if code not in _FILTERS]:
            known = ", ".join(_FILTERS.values())
            raise self._refused(
                f"is packed by filter {unknown[0]}", f"known are {known}. Save it with compression='gzip'"
            )

    def _dtype(self, dataset: Any, what: str) -> np.dtype[Any]:
        from h5py import check_string_dtype

        try:
            dtype: np.dtype[Any] = dataset.dtype
        except (TypeError, ValueError) as error:
            raise self._refused("holds values of an unknown type", str(error)) from None
        is_text = dtype.kind != "O" or check_string_dtype(dtype) is not None
        if dtype.kind not in _KINDS[what] or not is_text or dtype.subdtype is not None:
            kind = "objects or lists of any length" if dtype.kind == "O" and not is_text else f"values of dtype {dtype}"
            wanted = "floats" if what == "embeddings" else "texts or whole numbers"
            raise self._refused(f"holds {kind}", f"{what} are {wanted}")
        return dtype

    def _check_size(self, dataset: Any, dtype: np.dtype[Any]) -> None:
        """Refuse what takes more memory than the file accounts for, before any of it is taken."""
        shape, each = dataset.shape, _REFERENCE.itemsize if dtype.kind == "O" else dtype.itemsize
        declared, stored = math.prod(shape) * each, dataset.id.get_storage_size()
        chunk = math.prod(dataset.chunks) * each if dataset.chunks else 0
        most = max(declared, chunk)
        if not _filters_of(dataset):
            if declared > min(stored, self.size):
                raise self._refused(
                    f"says it has shape {tuple(shape)}, {declared:,} bytes, and holds {min(stored, self.size):,}",
                    "the file was cut off, or never filled",
                )
            limit = self.size if self.max_bytes is None else self.max_bytes
        else:
            limit = max(SMALL, MOST_GROWTH * min(stored, self.size)) if self.max_bytes is None else self.max_bytes
        if most > limit:
            raise self._refused(
                f"of shape {tuple(shape)} unpacks from {stored:,} to {most:,} bytes, and the limit is {limit:,}",
                f"give max_bytes={most} if it should",
            )
        if dataset.chunks:
            whole = math.prod(-(-size // step) for size, step in zip(shape, dataset.chunks, strict=True))
            if (there := dataset.id.get_num_chunks()) < whole:
                raise self._refused(f"holds {there} of its {whole} chunks", "the others were never written")

            if _GZIP in _filters_of(dataset):
                self._check_gzip(dataset, chunk)

    def _check_gzip(self, dataset: Any, chunk_bytes: int) -> None:
        """Refuse a chunk that unpacks to more than a chunk: HDF5 would take as much memory as it asks for."""
        codes, chunks = _filters_of(dataset), list[Any]()
        place = codes.index(_GZIP)
        if any(code != _CHECKSUM for code in codes[place + 1 :]):
            raise self._refused("is packed by gzip and again by another filter", "save it with compression='gzip'")
        dataset.id.chunk_iter(chunks.append)
        for one in chunks:
            if not one.filter_mask >> place & 1:
                _, packed = dataset.id.read_direct_chunk(one.chunk_offset)
                packed = packed[: len(packed) - 4 * codes.count(_CHECKSUM)]
                if len(zlib.decompressobj().decompress(packed, chunk_bytes + 1)) > chunk_bytes:
                    where = ", ".join(map(str, one.chunk_offset))
                    raise self._refused(f"unpacks to more than it says, at ({where})", "the file is not to be trusted")

    def _read_texts(self, dataset: Any) -> np.ndarray:
        """Texts of any length, at once where it is known how much they are, else a few at a time.

        Each text is at most as long as the file, but many may be one and the same: a small file can hold terabytes.
        """
        n, limit = math.prod(dataset.shape), SMALL if self.max_bytes is None else self.max_bytes
        if dataset.ndim != 1:
            raise self._refused(f"has shape {dataset.shape}", "texts are one per row")
        limit = limit if self.max_bytes else max(limit, _LONGEST_TEXT * n)
        stated = self._stated_text(dataset)
        step = max(1, min(4096, _TEXT_BYTES // self.size)) if stated is None else max(1, n)
        texts, read = list[Any](), stated or 0
        for begin in range(0, n, step):
            if read <= limit:
                part = dataset[begin : begin + step].tolist()
                read += 0 if stated else sum(map(len, part))
                texts += part
        if read > limit:
            raise self._refused(f"holds over {limit:,} bytes of text", "ids and labels are short")
        return np.array(texts, dtype=object)

    def _stated_text(self, dataset: Any) -> int | None:
        """Bytes of all texts, as the references to them say and HDF5 will take; None where these are packed."""
        if _filters_of(dataset):
            return None
        count = math.prod(dataset.shape)
        if dataset.chunks:
            chunks = list[Any]()
            dataset.id.chunk_iter(chunks.append)
            raw = b"".join(dataset.id.read_direct_chunk(one.chunk_offset)[1] for one in chunks)
            count = len(chunks) * math.prod(dataset.chunks)
        elif (offset := dataset.id.get_offset()) is None:
            return None
        else:
            with open_regular(self.path, kind="HDF5 file") as file:
                file.seek(offset)
                raw = file.read(min(dataset.id.get_storage_size(), self.size))
        if len(raw) != count * _REFERENCE.itemsize:
            return None
        return int(np.frombuffer(raw, dtype=_REFERENCE)["length"].sum())
