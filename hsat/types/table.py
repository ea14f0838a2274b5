"""One row per image: all that evaluation knows of a model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hsat.files import atomic_folder, load_array
from hsat.quantities import fields_repr
from hsat.types.columns import NamedColumns, embedding_rows, rows_of_index
from hsat.types.h5_files import PathLike, read_h5_columns
from hsat.types.row_checks import align_labels, integer_column, row_lengths, rows_in_memory, unit_rows

_TABLE_IDS = ("label", "patch", "slide", "patient")
GROUP_LABELS = ("slide_label", "patient_label")
_TABLE_TEXT = ("cohort", "split", "encoder")


@dataclass(frozen=True, eq=False)
class EmbeddingTable:
    """One row per image: all that evaluation knows of a model.

    Attributes:
        z: (n, d) float32 unit rows, may be memory-mapped; float64 is rounded and rows of other lengths are normalised
            (an all-zero row stays zero).  Memory-mapped rows may be float16, as `save(path, dtype="float16")` writes
            them.
        label: (n,) int64; label i is class_names[i].
        patch: (n,) int64.
        slide: (n,) int64.
        patient: (n,) int64.
        class_names: Names of the classes.
        cohort: Fingerprint or name; ids of tables of different cohorts are never compared.
        split: Name of the split.
        encoder: Fingerprint or name.
        norm: (n,) float32, the length of each row before normalisation, which `raw` gives back; None where it is not
            known.  It is taken from z where z holds rows of other lengths and no norm is given.
        slide_label: (n,) int64, the class of each row's slide where the cohort has a column that says it, -1 where the
            column says nothing; None without.  Without it a slide is of the class that all its patches share.
        patient_label: (n,) int64; likewise.

    Raises:
        ValueError: When lengths differ, a label has no class name or a name comes twice, or z is not finite; it names
            the field.
        TypeError: For other kinds of values.

    Example:
        >>> ids = np.arange(2)
        >>> table = EmbeddingTable([[3.0, 4.0], [0.0, 2.0]], [0, 1], ids, ids, ids, class_names=("hgg", "normal"))
        >>> table.z.tolist(), table.norm.tolist()
        ([[0.6000000238418579, 0.800000011920929], [0.0, 1.0]], [5.0, 2.0])
    """

    z: np.ndarray
    label: np.ndarray
    patch: np.ndarray
    slide: np.ndarray
    patient: np.ndarray
    class_names: tuple[str, ...]
    cohort: str = ""
    split: str = ""
    encoder: str = ""
    norm: np.ndarray | None = None
    slide_label: np.ndarray | None = None
    patient_label: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.z, np.memmap):
            object.__setattr__(self, "z", np.asarray(self.z))
        elif self.z.dtype not in (np.float32, np.float16):
            raise TypeError(
                f"a memory-mapped z must hold float32 or float16 unit rows, got {self.z.dtype};"
                " np.array(z) reads it into memory"
            )
        if isinstance(self.class_names, str):
            raise TypeError(f"class_names must be a tuple of names, got the text {self.class_names!r}")
        if self.z.ndim != 2:
            raise ValueError(f"z must be (n, d), got shape {self.z.shape}")
        n = len(self.z)
        for name in (*_TABLE_IDS, *GROUP_LABELS):
            if getattr(self, name) is not None or name in _TABLE_IDS:
                object.__setattr__(self, name, integer_column(name, getattr(self, name), n))
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if not all(isinstance(name, str) for name in self.class_names):
            raise TypeError(f"class_names must be names, got {self.class_names!r}")
        if len(set(self.class_names)) < len(self.class_names):
            raise ValueError(f"class_names must differ, got {self.class_names!r}")
        if n and not (self.label.min() >= 0 and self.label.max() < len(self.class_names)):
            raise ValueError(
                f"labels run from {self.label.min()} to {self.label.max()} but there are {len(self.class_names)}"
                f" class names: {self.class_names}"
            )
        _check_group_labels(self)
        lengths = self.norm
        if not isinstance(self.z, np.memmap):
            z, own_lengths = unit_rows(self.z)
            object.__setattr__(self, "z", z)
            lengths = own_lengths if lengths is None else lengths
        object.__setattr__(self, "norm", None if lengths is None else row_lengths(lengths, n))

    @classmethod
    def from_arrays(
        cls,
        z: Any,
        labels: Any,
        patients: Any = None,
        slides: Any = None,
        *,
        class_names: Sequence[str] | None = None,
        cohort: str | None = None,
        split: str = "",
        encoder: str = "",
        norm: Any = None,
    ) -> EmbeddingTable:
        """A table of embeddings that another program made, with labels, patients and slides by name.

        Classes are sorted, texts by alphabet and numbers by size, unless `class_names` has them.  Ids of patients and
        slides depend on their names alone ("004" is not 4, "4" is), so that tables that were made apart, a bank and
        its queries, are compared: a patient that is in both is flagged.

        Without patients every slide counts as a patient, and without both every row does; a warning says so, because
        intervals are then too narrow.  Without slides a patient has one slide.

        Args:
            z: (n, d) floats, array or tensor, as the encoder gave them: rows become unit rows, `norm` keeps lengths.
            labels: (n,) texts, or whole numbers: indices of `class_names` where that is given, else names themselves.
            patients: (n,) texts or whole numbers.
            slides: (n,) texts or whole numbers, each of one patient.
            class_names: The classes in their order.
            cohort: Its name; ids are compared among tables of one cohort only.  None: "named ids", or "", which is
                compared with nothing, where neither patients nor slides are given.
            split: Name of the split.
            encoder: Name of the encoder.
            norm: (n,) lengths before normalisation, where z holds unit rows.

        Returns:
            The table; row i is patch i.

        Raises:
            ValueError: For another number of values than rows, values that are missing ("", NaN, None, "NA", a number
                below 0), a slide of two patients, rows of z that are zero or not finite, and labels that are no class,
                with the row.
            TypeError: For other kinds of values.

        Example:
            >>> z, patients = [[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]], ["004", "004", "011"]
            >>> table = EmbeddingTable.from_arrays(z, ["tumour", "normal", "tumour"], patients)
            >>> table.class_names, table.label.tolist(), table.norm.tolist()
            (('normal', 'tumour'), [1, 0, 1], [5.0, 2.0, 1.0])
        """
        rows = embedding_rows(z)
        columns = NamedColumns.of(len(rows), labels, patients, slides, class_names, text=f"{cohort} {split}")
        return cls._of_columns(rows, columns, cohort, split=split, encoder=encoder, norm=norm)

    @classmethod
    def _of_columns(cls, z: np.ndarray, columns: NamedColumns, cohort: str | None, **text: Any) -> EmbeddingTable:
        return cls(
            z=z,
            label=columns.label,
            patch=np.arange(len(z)),
            slide=columns.slide,
            patient=columns.patient,
            class_names=columns.class_names,
            cohort=columns.cohort if cohort is None else cohort,
            **text,
        )

    @classmethod
    def from_h5(
        cls,
        paths: PathLike | Iterable[PathLike],
        *,
        features: str = "features",
        labels: str | Mapping[Any, Any] = "labels",
        patients: str | Mapping[Any, Any] | None = None,
        slides: str | None = None,
        class_names: Sequence[str] | None = None,
        cohort: str | None = None,
        split: str = "",
        encoder: str = "",
        max_bytes: int | None = None,
    ) -> EmbeddingTable:
        """A table of the embeddings in HDF5 files: one of everything, or one per slide as CLAM and TRIDENT write them.

        Where several files or a mapping are given and no `slides`, each file is a slide, which is called as the file
        without its ending.  What is not known is filled in as in `from_arrays`.

        Files may come from anybody: links, virtual datasets, values in other files, objects, and datasets that say
        they are larger than what the file holds are refused before anything is followed or allocated.

        Args:
            paths: A file, or several; rows follow one another.
            features: Name of the dataset (n, d), such as "features" or "patches/features".
            labels: Name of a dataset (n,), or a mapping from each slide's name to its label.
            patients: Likewise; None: not known.
            slides: Name of a dataset (n,).
            class_names, cohort, split, encoder: See `from_arrays`.
            max_bytes: Most bytes of a dataset in memory.  By default what the file holds; of packed data 64 times that,
                and always 256 MiB.

        Returns:
            The table.

        Raises:
            FileNotFoundError: For a file that is not there.
            ImportError: Without h5py; it names the command that installs it.
            ValueError: For a dataset that is missing or refused, with the file, for a slide that a mapping lacks, and
                what `from_arrays` refuses, with file and row.
            TypeError: For other kinds of values, and for labels or patients that are neither a name nor a mapping.

        Example:
            >>> files = sorted(Path("features").glob("*.h5"))
            >>> EmbeddingTable.from_h5(files, labels={"S1": "tumour"}, patients={"S1": "004"})  # doctest: +SKIP
        """
        read = read_h5_columns(
            paths, features=features, labels=labels, patients=patients, slides=slides, max_bytes=max_bytes
        )
        z, text = np.concatenate(read.z), f"{cohort} {split}"
        columns = NamedColumns.of(
            len(z), read.labels, read.patients, read.slides, class_names, place=read.place(), text=text
        )
        return cls._of_columns(z, columns, cohort, split=split, encoder=encoder)

    @classmethod
    def concat(cls, tables: Iterable[EmbeddingTable]) -> EmbeddingTable:
        """The rows of several tables as one in memory; classes are matched by name.

        Args:
            tables: At least one, of one width, one encoder and one cohort.

        Returns:
            The rows in their order.  Its split is the names of the splits with "+" between; `norm`, `slide_label` and
            `patient_label` are kept where every table has them.

        Raises:
            ValueError: Without tables, and for tables of other widths, encoders or cohorts, with their numbers.
            TypeError: For what is no table.
        """
        parts = list(tables)
        if not parts:
            raise ValueError("no table is given, so there is nothing to concatenate")
        first = parts[0]
        for number, part in enumerate(parts):
            if not isinstance(part, EmbeddingTable):
                raise TypeError(f"table {number} is a {type(part).__name__}, not an EmbeddingTable")
            for what, own, other in (
                ("has width", part.z.shape[1], first.z.shape[1]),
                ("was embedded by", part.encoder, first.encoder),
                ("is of cohort", part.cohort, first.cohort),
            ):
                if own != other:
                    raise ValueError(f"table {number} {what} {own!r}, and table 0 {what} {other!r}")
        names = tuple(dict.fromkeys(name for part in parts for name in part.class_names))
        columns: dict[str, Any] = {"z": np.concatenate([rows_in_memory(part.z) for part in parts])}
        columns |= {name: np.concatenate([getattr(part, name) for part in parts]) for name in _TABLE_IDS}
        columns["label"] = np.concatenate([align_labels(part.label, part.class_names, names) for part in parts])
        for name in ("norm", *GROUP_LABELS):
            known = [getattr(part, name) for part in parts if getattr(part, name) is not None]
            columns[name] = np.concatenate(known) if len(known) == len(parts) else None
        for name in GROUP_LABELS:
            if columns[name] is not None:
                places = [np.array([*map(names.index, part.class_names), -1]) for part in parts]
                columns[name] = np.concatenate(
                    [place[getattr(part, name)] for place, part in zip(places, parts, strict=True)]
                )
        split = "+".join(dict.fromkeys(part.split for part in parts))
        return replace(first, **columns, class_names=names, split=split)

    def __getitem__(self, index: Any) -> EmbeddingTable:
        """The table of some rows: a slice, a mask (n,), or numbers of rows; classes and all else stay.

        A slice of a memory-mapped table stays on the disk; masks and numbers read their rows into memory.
        """
        rows = rows_of_index(index, len(self))
        columns = {name: getattr(self, name) for name in (*_TABLE_IDS, "norm", *GROUP_LABELS)}
        chosen: dict[str, Any] = {name: None if column is None else column[rows] for name, column in columns.items()}
        z = self.z[rows]
        return replace(self, z=z if isinstance(z, np.memmap) else rows_in_memory(z), **chosen)

    def raw(self) -> np.ndarray:
        """The rows as the encoder gave them, (n, d) float32: unit rows times their lengths.

        Raises ValueError if the table does not know the lengths.
        """
        if self.norm is None:
            raise ValueError(
                "this table holds unit rows and does not know their lengths, which a classifier of raw features needs;"
                " embed the images again (hsat.embed keeps the lengths), or give EmbeddingTable(norm=...)"
            )
        raw: np.ndarray = np.asarray(self.z, dtype=np.float32) * self.norm[:, None]
        return raw

    def __len__(self) -> int:
        return len(self.z)

    def __repr__(self) -> str:
        texts = [name for name in _TABLE_TEXT if getattr(self, name)]
        return fields_repr(self, ("z", *_TABLE_IDS, "class_names", *texts, "norm", *GROUP_LABELS))

    def save(self, path: str | os.PathLike[str], *, dtype: Literal["float32", "float16"] = "float32") -> Path:
        """Write the table as a folder of .npy files and a table.json; the folder appears whole or not at all.

        dtype: of z in the file.  float16 halves it and rounds each value to three digits.

        Args:
            path: The folder; a table that is there already is replaced.
            dtype: Of z in the file; float16 halves it and rounds each value to three digits.

        Returns:
            The folder.

        Raises:
            ValueError: For another dtype.
            FileExistsError: If something else than a table is at `path`.
        """
        if dtype not in ("float32", "float16"):
            raise ValueError(f"dtype must be 'float32' or 'float16', got {dtype!r}")
        path = Path(path)
        with atomic_folder(path, marker="table.json", what="an embedding table") as folder:
            np.save(folder / "z.npy", np.asarray(self.z, dtype=dtype), allow_pickle=False)
            for name in _TABLE_IDS:
                np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
            for name in ("norm", *GROUP_LABELS):
                if getattr(self, name) is not None:
                    np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
            text: dict[str, Any] = {name: getattr(self, name) for name in _TABLE_TEXT}
            text["class_names"] = list(self.class_names)
            (folder / "table.json").write_text(json.dumps(text, indent=1))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, memory_map: bool = False) -> EmbeddingTable:
        """Read a table written by `save`; with memory_map=True z stays on disk.  Never unpickles.

        Raises FileNotFoundError where no table is, ValueError naming the file where one is damaged.

        Args:
            path: The folder.
            memory_map: Leave z on disk, and read its rows when they are asked for.

        Returns:
            The table.

        Raises:
            FileNotFoundError: Where no table is.
            ValueError: Naming the file where one is damaged.
        """
        path = Path(path)
        if not (path / "table.json").is_file():
            raise FileNotFoundError(f"{path} is not an embedding table: {path / 'table.json'} is missing")
        text = _read_text(path / "table.json")
        arrays: dict[str, Any] = {}
        for name in ("z", *_TABLE_IDS):
            arrays[name] = load_array(path / f"{name}.npy", memory_map=memory_map and name == "z")
        for name in ("norm", *GROUP_LABELS):
            if (path / f"{name}.npy").exists():
                arrays[name] = load_array(path / f"{name}.npy")
        names = {name: text[name] for name in _TABLE_TEXT}
        try:
            return cls(**arrays, class_names=tuple(text["class_names"]), **names)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no table: {error}") from error


def _read_text(path: Path) -> dict[str, Any]:
    """What `save` wrote into table.json."""
    try:
        text = json.loads(path.read_text())
        wrong = [name for name in _TABLE_TEXT if not isinstance(text[name], str)]
        names = text["class_names"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            wrong.append("class_names")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or of no table ({type(error).__name__}: {error})") from error
    if wrong:
        raise ValueError(f"{path} is damaged or of no table: {', '.join(wrong)} cannot be used")
    return dict(text)


def _check_group_labels(table: EmbeddingTable) -> None:
    for name in GROUP_LABELS:
        stated = getattr(table, name)
        if stated is not None and len(stated) and not -1 <= stated.min() <= stated.max() < len(table.class_names):
            raise ValueError(
                f"{name} runs from {stated.min()} to {stated.max()}; wanted -1 (not known) or a number below"
                f" {len(table.class_names)}, of the classes {table.class_names}"
            )
