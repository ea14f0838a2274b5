"""One row per image: all that evaluation knows of a model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hsat.files import atomic_folder, load_array
from hsat.quantities import fields_repr

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
                object.__setattr__(self, name, _checked_integers(name, getattr(self, name), n))
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
            z, own_lengths = _unit_rows(self.z)
            object.__setattr__(self, "z", z)
            lengths = own_lengths if lengths is None else lengths
        object.__setattr__(self, "norm", None if lengths is None else _checked_norm(lengths, n))

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
        except ValueError as error:
            raise ValueError(f"{path} is no table: {error}") from error


def align_labels(labels: np.ndarray, own_names: Sequence[str], class_names: Sequence[str]) -> np.ndarray:
    """Labels as indices into another list of class names, matched by name.

    Args:
        labels: (n,) indices into `own_names`.
        own_names: The classes of the labels.
        class_names: The other classes, those of a classifier.

    Returns:
        (n,) int64 indices into `class_names`.

    Raises:
        ValueError: Naming every class that occurs in the labels and is missing from `class_names`, or for a label that
            is no index of `own_names`.
    """
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(own_names):
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}, and there are {len(own_names)} classes:"
            f" {list(own_names)}"
        )
    position = {name: index for index, name in enumerate(class_names)}
    used = {own_names[index] for index in np.unique(labels)}
    if unknown := sorted(used - position.keys()):
        raise ValueError(
            f"the queries hold classes {unknown} that the bank does not know; it knows {list(class_names)}."
            " Give both cohorts the same class names, or leave those rows out"
        )
    lookup = np.array([position.get(name, -1) for name in own_names], dtype=np.int64)
    aligned: np.ndarray = lookup[labels]
    return aligned


def _read_text(path: Path) -> dict[str, Any]:
    """What `save` wrote into table.json."""
    try:
        text = json.loads(path.read_text())
        wrong = [name for name in _TABLE_TEXT if not isinstance(text[name], str)]
        if not isinstance(text["class_names"], list):
            wrong.append("class_names")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or of no table ({type(error).__name__}: {error})") from error
    if wrong:
        raise ValueError(f"{path} is damaged or of no table: {', '.join(wrong)} cannot be used")
    return dict(text)


def _unit_rows(z: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Float32 unit rows, and their lengths before normalisation; None where they were unit rows already."""
    if not np.issubdtype(z.dtype, np.floating):
        raise TypeError(f"z must hold floats, got {z.dtype}")
    z = z.astype(np.float64) if z.dtype.itemsize > np.dtype(np.float64).itemsize else z
    lengths = np.sqrt(np.einsum("ij,ij->i", z, z, dtype=np.float64))
    finite = np.isfinite(lengths)
    if not finite.all():
        rows = np.flatnonzero(~finite)
        raise ValueError(f"z holds non-finite values in {len(rows)} of {len(z)} rows, first in row {rows[0]}")
    if np.abs(lengths - 1.0).max(initial=0.0) <= 1e-5:
        return np.ascontiguousarray(z, dtype=np.float32), None
    unit = z / np.where(lengths > 0, lengths, 1.0)[:, None]
    return np.ascontiguousarray(unit, dtype=np.float32), lengths.astype(np.float32)


def _checked_integers(name: str, values: object, n: int) -> np.ndarray:
    ids = np.asarray(values)
    if ids.shape != (n,):
        raise ValueError(f"{n} embeddings but {name} has shape {ids.shape}; expected ({n},)")
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"{name} must hold integers, got {ids.dtype}")
    return ids.astype(np.int64, copy=False)


def _check_group_labels(table: EmbeddingTable) -> None:
    for name in GROUP_LABELS:
        stated = getattr(table, name)
        if stated is not None and len(stated) and not -1 <= stated.min() <= stated.max() < len(table.class_names):
            raise ValueError(
                f"{name} runs from {stated.min()} to {stated.max()}; wanted -1 (not known) or a number below"
                f" {len(table.class_names)}, of the classes {table.class_names}"
            )


def _checked_norm(norm: np.ndarray, n: int) -> np.ndarray:
    norm = np.asarray(norm)
    if norm.shape != (n,):
        raise ValueError(f"{n} embeddings but norm has shape {norm.shape}; expected ({n},)")
    if not np.issubdtype(norm.dtype, np.floating):
        raise TypeError(f"norm must hold floats, got {norm.dtype}")
    if not (np.isfinite(norm) & (norm >= 0)).all():
        row = int(np.flatnonzero(~(np.isfinite(norm) & (norm >= 0)))[0])
        raise ValueError(f"norm must hold finite lengths of at least 0, got {norm[row]} in row {row}")
    return norm.astype(np.float32, copy=False)
