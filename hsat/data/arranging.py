"""What a hierarchical dataset settles once: rows by patient and slide, and the published choices."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import numpy as np

from hsat.data.augment import Uncropped

if TYPE_CHECKING:
    from hsat.data.cohort import Cohort
    from hsat.data.packed import PackedPatches

PUBLISHED_STATIC_EPOCHS = 50
"""The published training keeps its static augmentation for the first plateau of the dynamic one."""


def rows_by_patient(cohort: Cohort, rows: np.ndarray) -> dict[int, list[np.ndarray]]:
    """Rows of each slide of each patient, patients and slides in order of their ids."""
    rows = rows[np.argsort(cohort.slide[rows], kind="stable")]
    slides = np.split(rows, np.flatnonzero(np.diff(cohort.slide[rows])) + 1)
    groups: dict[int, list[np.ndarray]] = {}
    for slide in slides:
        groups.setdefault(int(cohort.patient[slide[0]]), []).append(slide)
    return dict(sorted(groups.items()))


def as_published(
    compat: str | None, augmentation: str, uncropped: Uncropped | None, static_epochs: int | None
) -> tuple[Uncropped, int]:
    """(uncropped, static_epochs) as they are given, else as compat chooses them."""
    if compat not in (None, "paper"):
        raise ValueError(f"compat must be None or 'paper', got {compat!r}")
    if static_epochs is not None and static_epochs < 0:
        raise ValueError(f"static_epochs must be 0 or more, got {static_epochs}")
    dynamic = augmentation in ("v0", "v1")
    if static_epochs is None:
        static_epochs = PUBLISHED_STATIC_EPOCHS if compat == "paper" and dynamic else 0
    return uncropped or ("keep" if compat == "paper" else "resize"), static_epochs


def fitting(packed: PackedPatches | None, cohort: Cohort) -> PackedPatches | None:
    """The packed patches, if any; ValueError where they were opened for another cohort."""
    if packed is not None:
        packed.check_rows(cohort)
    return packed


def position(index: int, length: int, what: str) -> int:
    """The index counted from 0, also where it was from the end; IndexError for one that is out of range."""
    place = operator.index(index)
    if not -length <= place < length:
        raise IndexError(f"index {place} is out of range for {length} {what}")
    return place % length
