"""One row and one label per image: what encoders, classifiers, tables and callers have to give."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SQUEEZED = (
    "Its squeeze() drops the axis of the images too where there is only one: name the axes, as in squeeze((2, 3)),"
    " or write flatten(1)"
)


def check_rows(z: Tensor, n: int, giver: str, *, columns: str = "d") -> None:
    """Raise unless z is a tensor (n, columns), one row per image; giver: who gave it, for the message."""
    if not isinstance(z, Tensor):
        raise TypeError(
            f"{giver} gave {type(z).__name__} for {n} images; expected a tensor ({n}, {columns}). Pick the entry that"
            " holds it: lambda x: model(x)[0], or hsat.models.wrap_encoder(model, features=ENTRY)"
        )
    if z.ndim == 2 and len(z) == n:
        return
    shape = tuple(z.shape)
    raise ValueError(f"{giver} gave shape {shape} for {n} images; expected ({n}, {columns}).{row_advice(shape, n)}")


def check_labels(label: Tensor, *, classes: int | None = None) -> None:
    """Raise unless these are class indices (n,), below `classes` when that is given."""
    if not isinstance(label, Tensor) or label.dtype.is_floating_point or label.dtype == torch.bool or label.ndim != 1:
        form = f"{label.dtype} {tuple(label.shape)}" if isinstance(label, Tensor) else type(label).__name__
        raise TypeError(f"labels must be integers (n,), the index of each image's class; got {form}")
    if classes is not None and len(label) and not (0 <= int(label.min()) and int(label.max()) < classes):
        raise ValueError(
            f"labels run from {int(label.min())} to {int(label.max())}, but there are {classes} classes;"
            " they must index the classes of the bank or model"
        )


def row_advice(shape: tuple[int, ...], n: int) -> str:
    """What to do about an output of this shape for n images, as further sentences; "" where nobody can tell."""
    if is_squeezed(shape, n):
        return f" {SQUEEZED}"
    if shape == (n,):
        return " One number per image needs an axis of its own: write unsqueeze(1)"
    if len(shape) > 2 and set(shape[2:]) == {1}:
        return " Drop the axes of size one: write flatten(1)"
    if len(shape) > 2:
        return " Wrap a module that gives maps or tokens with hsat.models.wrap_encoder"
    return ""


def is_squeezed(shape: tuple[int, ...], n: int) -> bool:
    """Whether this is what squeeze() leaves of one image's (1, d), (1, d, 1, 1) or (1, d, h, w)."""
    return n == 1 and (not shape or (len(shape) in (1, 3) and shape[0] != 1))


def unit_rows(z: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Float32 unit rows, and their lengths before normalisation; None where they were unit rows already.

    An all-zero row stays zero, and other rows that have length one already stay as they are, bit for bit.
    """
    if not np.issubdtype(z.dtype, np.floating):
        raise TypeError(f"z must hold floats, got {z.dtype}")
    z = z.astype(np.float64) if z.dtype.itemsize > np.dtype(np.float64).itemsize else z
    lengths = np.sqrt(np.einsum("ij,ij->i", z, z, dtype=np.float64))
    finite = np.isfinite(lengths)
    if not finite.all():
        rows = np.flatnonzero(~finite)
        raise ValueError(f"z holds non-finite values in {len(rows)} of {len(z)} rows, first in row {rows[0]}")
    zero = lengths == 0
    if np.abs(lengths[~zero] - 1.0).max(initial=0.0) <= 1e-5:
        return np.ascontiguousarray(z, dtype=np.float32), lengths.astype(np.float32) if zero.any() else None
    unit = z / np.where(zero, 1.0, lengths)[:, None]
    return np.ascontiguousarray(unit, dtype=np.float32), lengths.astype(np.float32)


def rows_in_memory(z: np.ndarray) -> np.ndarray:
    """Unit rows of a table as a float32 array; those of float16 are of length one but for rounding, and become so."""
    rows = np.asarray(z, dtype=np.float32)
    return rows if z.dtype == np.float32 else unit_rows(rows)[0]


def integer_column(name: str, values: object, n: int) -> np.ndarray:
    """A column as (n,) int64; ValueError for another shape, TypeError for other values, with its name."""
    ids = np.asarray(values)
    if ids.shape != (n,):
        raise ValueError(f"{n} embeddings but {name} has shape {ids.shape}; expected ({n},)")
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"{name} must hold integers, got {ids.dtype}")
    return ids.astype(np.int64, copy=False)


def row_lengths(norm: np.ndarray, n: int) -> np.ndarray:
    """Lengths of rows as (n,) float32; ValueError for another shape or negative lengths, TypeError for no floats."""
    norm = np.asarray(norm)
    if norm.shape != (n,):
        raise ValueError(f"{n} embeddings but norm has shape {norm.shape}; expected ({n},)")
    if not np.issubdtype(norm.dtype, np.floating):
        raise TypeError(f"norm must hold floats, got {norm.dtype}")
    if not (np.isfinite(norm) & (norm >= 0)).all():
        row = int(np.flatnonzero(~(np.isfinite(norm) & (norm >= 0)))[0])
        raise ValueError(f"norm must hold finite lengths of at least 0, got {norm[row]} in row {row}")
    return norm.astype(np.float32, copy=False)


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
