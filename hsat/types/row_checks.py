"""One row and one label per image: the shapes that encoders, classifiers and callers have to give."""

from __future__ import annotations

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
