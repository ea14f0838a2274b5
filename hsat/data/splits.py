"""Patient-disjoint splits, stratified by class, or by the classes that each patient has."""

from __future__ import annotations

import hashlib
import operator
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from hsat.data.records import PatchRecord

_DRAWS = 100


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
    counts: dict[str, Counter[str]] = {}
    for row in records:
        if of is None or row.split == of:
            counts.setdefault(row.patient, Counter())[row.class_name] += 1
    if all(len(classes) == 1 for classes in counts.values()):
        strata: dict[str, set[str]] = {}
        for patient, classes in counts.items():
            strata.setdefault(next(iter(classes)), set()).add(patient)
        held_out = _draw(strata, val_fraction, seed)
        alone = sorted(name for name, patients in strata.items() if len(patients) == 1)
    else:
        held_out, alone = _best_draw(counts, val_fraction, seed)
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


def _draw(strata: Mapping[str, set[str]], val_fraction: float, seed: int) -> set[str]:
    """Patients to hold out: the wanted share of each stratum, none of a stratum of one."""
    held_out: set[str] = set()
    for name, patients in sorted(strata.items()):
        if len(patients) > 1:
            count = min(max(round(val_fraction * len(patients)), 1), len(patients) - 1)
            order = _class_generator(seed, name).permutation(len(patients))
            in_order = sorted(patients)
            held_out.update(in_order[i] for i in order[:count])
    return held_out


def _best_draw(counts: Mapping[str, Mapping[str, int]], val_fraction: float, seed: int) -> tuple[set[str], list[str]]:
    """Patients of several classes: the best of many draws that are stratified by the set of classes.

    Returns:
        Patients to hold out, and the classes that only one patient has.
    """
    strata: dict[str, set[str]] = {}
    for patient, classes in counts.items():
        strata.setdefault("\0".join(sorted(classes)), set()).add(patient)
    rare = [name for name, patients in strata.items() if len(patients) == 1]
    if len(rare) > 1:
        strata["\0rare"] = set[str]().union(*(strata.pop(name) for name in rare))
    patients, names = sorted(counts), sorted({name for classes in counts.values() for name in classes})
    patches = np.array([[counts[patient].get(name, 0) for name in names] for patient in patients])

    def cost(held_out: set[str]) -> tuple[int, int, float]:
        inside = np.isin(patients, sorted(held_out))
        missing = [int((~patches[part].any(0)).sum()) for part in (~inside, inside)]
        return missing[0], sum(missing), float(np.abs(patches[inside].sum(0) / patches.sum(0) - val_fraction).max())

    draws = [_draw(strata, val_fraction, seed * _DRAWS + number) for number in range(_DRAWS)]
    return min(draws, key=cost), [name for name, owners in zip(names, (patches > 0).sum(0), strict=True) if owners == 1]


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
