"""The columns of an embedding table, checked: rows of embeddings, labels and ids as integers, or as names."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsat.types.names import DIFFERENCE, check_cells, name_notes

NAMED_IDS = "named ids"
"""What tables of named patients and slides are called: their ids come from the names, and so can be compared."""

_FIRST_DIGEST = 1 << 62  # ids from here on are digests of names; below are numbers as they were given
_NO_PATIENTS = (
    "no patients are given, so that every row counts as a slide and a patient of its own: the three levels coincide,"
    " intervals are too narrow, and a patient in both bank and queries is not seen"
)
_NO_PATIENTS_BUT_SLIDES = (
    "no patients are given, so that every slide counts as a patient: intervals are too narrow where a patient has"
    " several slides"
)

Place = Callable[[int], str]
"""Words where a row stands, for messages."""


def row_place(row: int) -> str:
    """Where a row of an array stands."""
    return f"row {row}"


@dataclass(frozen=True, eq=False)
class NamedColumns:
    """Integer columns of a table that was given by names.

    Attributes:
        label: (n,) int64, indices of `class_names`.
        class_names: The classes.
        patient: (n,) int64.
        slide: (n,) int64.
        cohort: What the table is called, where the caller does not say: `NAMED_IDS`, or "" where nothing has a name,
            so that nothing is compared.
    """

    label: np.ndarray
    class_names: tuple[str, ...]
    patient: np.ndarray
    slide: np.ndarray
    cohort: str = NAMED_IDS

    @classmethod
    def of(
        cls,
        n: int,
        labels: Any,
        patients: Any,
        slides: Any,
        class_names: Sequence[str] | None,
        *,
        place: Place = row_place,
        text: str = "",
    ) -> NamedColumns:
        """Columns of n rows; what is missing is filled in, with a warning.

        Args:
            n: Number of rows.
            labels, patients, slides: Texts or whole numbers, one per row; patients and slides may be None.
            class_names: The classes in their order; None: those that occur, sorted.
            place: Words where a row stands.
            text: What tells ids of rows without a name from those of another table, beside their labels.

        Raises:
            ValueError: For a column of another length, and for a value that is missing or cannot be used, with its
                place.
        """
        label, names = _labels(_cells("label", labels, n, place), class_names, place)
        if patients is None and slides is None:
            begin = digest_id(f"{text} {n} {names}".encode() + label.tobytes()) - _FIRST_DIGEST
            patient = slide = (begin + np.arange(n)) % _FIRST_DIGEST + _FIRST_DIGEST
            _warn(f"{_NO_PATIENTS}; give patients=, one name per row")
            return cls(label, names, patient, slide, cohort="")
        cells = {
            name: _cells(name, column, n, place)
            for name, column in (("patient", patients), ("slide", slides))
            if column is not None
        }
        ids = {name: _ids(name, column, place) for name, column in cells.items()}
        if patients is None:
            _warn(f"{_NO_PATIENTS_BUT_SLIDES}; give patients=, one name per row")
            return cls(label, names, ids["slide"], ids["slide"])
        if slides is None:
            return cls(label, names, ids["patient"], ids["patient"])
        _check_nesting(cells, ids, place)
        return cls(label, names, ids["patient"], ids["slide"])


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)  # at the call of EmbeddingTable.from_arrays or from_h5


def id_of_name(name: str) -> int:
    """The id of a patient or slide: a whole number as it is written ("7" is 7), else a digest ("007" is another).

    Args:
        name: Its name.

    Returns:
        A number that depends on nothing else, so that tables that were made apart can be compared.

    Example:
        >>> id_of_name("7"), id_of_name("007") == id_of_name("7"), id_of_name("007") == id_of_name("007")
        (7, False, True)
    """
    if name.isascii() and name.isdecimal() and len(name) < 20 and str(int(name)) == name and int(name) < _FIRST_DIGEST:
        return int(name)
    return digest_id(name.encode())


def digest_id(content: bytes) -> int:
    """A number from 2^62 to 2^63 - 1 that stands for some bytes: 62 bits of their SHA-256."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 2 | _FIRST_DIGEST


def _cells(name: str, values: Any, n: int, place: Place) -> np.ndarray | list[int | str]:
    """A column as an integer array, or as whole numbers and texts; "" stands for a value that is missing."""
    if isinstance(values, str | bytes):
        raise TypeError(f"{name}s must be one value per row, got the text {values!r}")
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    if not isinstance(values, list | tuple):
        values = np.asarray(values)
        if values.shape != (n,):
            raise ValueError(f"{n} embeddings but {name}s have shape {values.shape}; expected ({n},)")
        if values.dtype.kind in "biu" and (not n or int(values.max()) < _FIRST_DIGEST):
            return np.asarray(values, dtype=np.int64)
        values = values.tolist()
    if len(values) != n:
        raise ValueError(f"{n} embeddings but {len(values)} {name}s; give one per row")
    return [_cell(name, value, row, place) for row, value in enumerate(values)]


def _cell(name: str, value: Any, row: int, place: Place) -> int | str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")  # check_cells refuses what could not be decoded
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return ""
    if isinstance(value, Integral | np.bool_):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        if math.isnan(number):
            return "nan"
        if number.is_integer():
            return int(number)
    raise TypeError(f"{place(row)}: {name} must be a text or a whole number, got {type(value).__name__} {value!r:.60}")


def _as_names(name: str, cells: np.ndarray | list[int | str], place: Place) -> np.ndarray | list[str]:
    """The cells as an array of whole numbers where all are, else as texts that say something."""
    if not isinstance(cells, np.ndarray):
        if any(isinstance(cell, str) for cell in cells):
            texts = [str(cell) for cell in cells]
            check_cells(name, texts, place)
            return texts
        if any(abs(int(cell)) >= _FIRST_DIGEST for cell in cells):
            return [str(cell) for cell in cells]
        cells = np.array(cells, dtype=np.int64)
    if (negative := np.flatnonzero(cells < 0)).size:
        row, more = int(negative[0]), f"; {negative.size} rows are like that" if negative.size > 1 else ""
        raise ValueError(
            f"{place(row)}: {name} is {cells[row]}, which programs write where a value is missing{more}; fill it in or"
            " take the row out"
        )
    return cells


def _labels(
    cells: np.ndarray | list[int | str], class_names: Sequence[str] | None, place: Place
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as indices, and the names of the classes."""
    names = _as_names("label", cells, place)
    if isinstance(class_names, str):
        raise TypeError(f"class_names must be a tuple of names, got the text {class_names!r}")
    if isinstance(names, np.ndarray):
        if class_names is None:
            values, label = np.unique(names, return_inverse=True)
            return label.astype(np.int64), tuple(map(str, values.tolist()))
        if (outside := np.flatnonzero(names >= len(class_names))).size:
            row = int(outside[0])
            raise ValueError(
                f"{place(row)}: label is {names[row]}, but there are {len(class_names)} classes, numbered from 0:"
                f" {tuple(class_names)}"
            )
        return names, tuple(class_names)
    different = dict.fromkeys(names)
    _warn_of("class", different)
    classes = tuple(sorted(different)) if class_names is None else tuple(class_names)
    index = {name: number for number, name in enumerate(classes)}
    if unknown := different.keys() - index.keys():
        row = next(row for row, name in enumerate(names) if name in unknown)
        raise ValueError(f"{place(row)}: label is {names[row]!r}, which is none of class_names {classes}")
    return np.array([index[name] for name in names], dtype=np.int64), classes


def _ids(name: str, cells: np.ndarray | list[int | str], place: Place) -> np.ndarray:
    names = _as_names(name, cells, place)
    if isinstance(names, np.ndarray):
        return names
    ids = {text: id_of_name(text) for text in dict.fromkeys(names)}
    _warn_of(name, ids)
    return np.array([ids[text] for text in names], dtype=np.int64)


def _warn_of(name: str, different: dict[str, Any]) -> None:
    for note in name_notes(name, different):
        cure = "; if they are the same, write them alike" if DIFFERENCE in note else ""
        warnings.warn(f"{note}{cure}", stacklevel=6)


def _check_nesting(cells: dict[str, Any], ids: dict[str, np.ndarray], place: Place) -> None:
    """Raise ValueError for a slide of several patients."""
    _, first, member_of = np.unique(ids["slide"], return_index=True, return_inverse=True)
    before = first[member_of]
    wrong = np.flatnonzero(ids["patient"] != ids["patient"][before])
    if wrong.size:
        row, earlier = int(wrong[0]), int(before[wrong[0]])
        slide, patient, other = cells["slide"][row], cells["patient"][row], cells["patient"][earlier]
        raise ValueError(
            f"{place(row)}: slide {_shown(slide)} belongs to patient {_shown(patient)} here and to {_shown(other)} in"
            f" {place(earlier)}; a slide has one patient. Where slides are numbered anew for each patient, put the"
            f" patient into the slide's name: {str(patient) + '_' + str(slide)!r}"
        )


def _shown(cell: Any) -> str:
    return repr(cell) if isinstance(cell, str) else str(cell)


def embedding_rows(z: Any, place: Place = row_place) -> np.ndarray:
    """Embeddings as they were given, as a float array (n, d) of which every row has a direction.

    Args:
        z: Array, tensor or nested lists.
        place: Words where a row stands.

    Raises:
        ValueError: For another shape, no rows, and rows that are zero or not finite, with their place.
        TypeError: For anything but real floats.
    """
    if isinstance(z, Tensor):
        if z.layout != torch.strided:
            raise TypeError(f"z must be a dense tensor, got {z.layout}; write z.to_dense()")
        z = z.detach().cpu()
        z = (z.float() if z.dtype == torch.bfloat16 else z).numpy()
    if isinstance(z, np.ma.MaskedArray):
        raise TypeError("z is a masked array, and an embedding has no masked values; give z.data or leave rows out")
    try:
        rows = np.asarray(z)
    except ValueError as error:
        raise ValueError(f"z must be (n, d), rows of one length: {error}") from None
    if rows.dtype.kind != "f":
        cure = "; write z.astype('float32')" if rows.dtype.kind in "iu" else ""
        what = "complex numbers" if rows.dtype.kind == "c" else f"values of dtype {rows.dtype}"
        raise TypeError(f"z must hold real floats (n, d), got {what} of shape {rows.shape}{cure}")
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"z must be (n, d) with at least one row and one column, got shape {rows.shape}")
    wide = rows.astype(np.float64) if rows.dtype.itemsize > 8 else rows
    lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide, dtype=np.float64))
    for wrong, what in (
        (~np.isfinite(lengths), "holds NaN or infinity"),
        (lengths == 0, "is all zero, which has no direction"),
    ):
        if (bad := np.flatnonzero(wrong)).size:
            more = f"; {bad.size} of {len(rows)} rows are like that" if bad.size > 1 else ""
            raise ValueError(f"{place(int(bad[0]))}: the embedding {what}{more}; embed it again or take the row out")
    return rows


def rows_of_index(index: Any, n: int) -> slice | np.ndarray:
    """What stands in the brackets of a table, as a slice or as numbers of rows (m,) int64.

    Args:
        index: A slice, a mask (n,) of bool, or numbers of rows, negative ones from the end.
        n: Rows of the table.

    Raises:
        TypeError: For one number alone, and for anything else.
        IndexError: For a mask of another length, and a number of no row.
    """
    if isinstance(index, slice):
        return index
    if isinstance(index, Tensor):
        index = index.detach().cpu().numpy()
    numbers = np.asarray(index)
    if numbers.ndim != 1 or (numbers.dtype.kind not in "biu" and numbers.size):
        what = f"{numbers.dtype} of shape {numbers.shape}" if numbers.ndim else repr(index)
        raise TypeError(
            f"a table takes a slice, a mask ({n},) of bool, or row numbers (m,), such as table[2:10] or"
            f" table[table.label == 0]; got {what}" + ("; one row is table[i:i+1]" if not numbers.ndim else "")
        )
    if numbers.dtype.kind == "b":
        if len(numbers) != n:
            raise IndexError(f"a mask of {len(numbers)} values for a table of {n} rows; give one per row")
        return np.flatnonzero(numbers)
    numbers = numbers.astype(np.int64)
    if numbers.size and not -n <= numbers.min() <= numbers.max() < n:
        wrong = numbers[(numbers < -n) | (numbers >= n)][0]
        raise IndexError(f"row {wrong} of a table of {n} rows")
    return numbers
