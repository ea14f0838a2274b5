"""Which arithmetic turns scores into numbers: hsat's, or that of the published evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Compat = Literal["paper"]
How = Literal["mean", "paper"]
Absent = Literal["skip", "zero"]
Keys = Literal["id", "id_and_label"]

_CHOICES = {"how": ("mean", "paper"), "absent": ("skip", "zero"), "keys": ("id", "id_and_label")}


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """The three choices between class scores and metrics; the defaults are hsat's.

    how: pooling of patches, see `pool`.  absent: what a class that is predicted and never true does to the mean class
    accuracy, see `metrics`.  keys: what makes a slide or patient one group, see `pool`.
    """

    how: How = "mean"
    absent: Absent = "skip"
    keys: Keys = "id"


PAPER = Arithmetic(how="paper", absent="zero", keys="id_and_label")


def resolve_arithmetic(
    compat: Compat | None, *, how: How | None = None, absent: Absent | None = None, keys: Keys | None = None
) -> Arithmetic:
    """What is meant by compat and the single options: an option that is given wins over what compat would choose.

    Raises ValueError for a value that is none of the choices.
    """
    if compat not in (None, "paper"):
        raise ValueError(f"compat must be None or 'paper', got {compat!r}")
    for name, value in (("how", how), ("absent", absent), ("keys", keys)):
        if value is not None and value not in _CHOICES[name]:
            first, second = _CHOICES[name]
            raise ValueError(f"{name} must be {first!r} or {second!r}, got {value!r}")
    rest = PAPER if compat == "paper" else Arithmetic()
    return Arithmetic(how=how or rest.how, absent=absent or rest.absent, keys=keys or rest.keys)
