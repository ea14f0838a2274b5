"""One row per image: the shape that encoders and classifiers have to give."""

from __future__ import annotations

from torch import Tensor

SQUEEZED = (
    "Its squeeze() drops the axis of the images too where there is only one: name the axes, as in squeeze((2, 3)),"
    " or write flatten(1)"
)


def check_rows(z: Tensor, n: int, giver: str, *, columns: str = "d") -> None:
    """Raise ValueError unless z is (n, columns), one row per image; giver: who gave it, for the message."""
    if z.ndim == 2 and len(z) == n:
        return
    shape = tuple(z.shape)
    raise ValueError(f"{giver} gave shape {shape} for {n} images; expected ({n}, {columns}).{row_advice(shape, n)}")


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
