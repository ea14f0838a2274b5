"""Patient-disjoint splits, stratified by class."""

from __future__ import annotations

import hashlib
import operator
import warnings
from collections.abc import Sequence

import numpy as np

from hsat.data.records import PatchRecord


def split_by_patient(
    records: Sequence[PatchRecord],
    *,
    val_fraction: float,
    seed: int,
    names: tuple[str, str],
    of: str | None = None,
) -> tuple[PatchRecord, ...]:
    """The records with new splits; see `Cohort.with_split`.

    Raises:
        ValueError: A fraction outside (0, 1), a negative seed, names that are empty or equal, or no class has two
            patients, so that names[1] would stay empty.
    """
    _check_options(val_fraction, seed, names)
    patients_of: dict[str, set[str]] = {}
    for row in records:
        if of is None or row.split == of:
            patients_of.setdefault(row.class_name, set()).add(row.patient)
    held_out: set[str] = set()
    alone: list[str] = []
    for class_name, patients in sorted(patients_of.items()):
        if len(patients) == 1:
            alone.append(class_name)
            continue
        count = min(max(round(val_fraction * len(patients)), 1), len(patients) - 1)
        order = _class_generator(seed, class_name).permutation(len(patients))
        in_order = sorted(patients)
        held_out.update(in_order[i] for i in order[:count])
    if not held_out:
        raise ValueError(
            f"no class has two patients, so {names[1]!r} would be empty; a split needs more patients than the one each"
            f" of {', '.join(map(repr, sorted(alone)))}"
        )
    if alone:
        warnings.warn(
            f"class {', '.join(map(repr, alone))} has a single patient, which stays in {names[0]!r}:"
            f" {names[1]!r} has none of it",
            stacklevel=3,
        )
    return tuple(
        row._replace(split=names[row.patient in held_out]) if of is None or row.split == of else row for row in records
    )


def _check_options(val_fraction: float, seed: int, names: tuple[str, str]) -> None:
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie in (0, 1), the part of the patients held out; got {val_fraction}")
    if operator.index(seed) < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if len(names) != 2 or not all(isinstance(name, str) and name for name in names) or names[0] == names[1]:
        raise ValueError(f"names must be two different non-empty strings such as ('train', 'val'), got {names!r}")


def _class_generator(seed: int, class_name: str) -> np.random.Generator:
    """A generator of the class's own, so that another class's patients do not change this one's draw."""
    digest = hashlib.sha256(class_name.encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng([operator.index(seed), int.from_bytes(digest[:8], "big")])
