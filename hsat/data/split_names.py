"""Which splits of a cohort are its bank and its queries, from the names that people give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from hsat.data.cohort import Cohort
from hsat.data.paths import shorten_names

ROLES: Mapping[str, str] = MappingProxyType(
    {
        "train": "train",
        "training": "train",
        "trainset": "train",
        "train_set": "train",
        "training_set": "train",
        "val": "val",
        "valid": "val",
        "validation": "val",
        "validation_set": "val",
        "test": "test",
        "testing": "test",
        "testset": "test",
        "test_set": "test",
        "tune": "tune",
        "tuning": "tune",
        "nct-crc-he-100k": "train",
        "nct-crc-he-100k-nonorm": "train",
        "crc-val-he-7k": "val",
    }
)
"""What a split is for, by its name in small letters: "train", "val", "test" or "tune"."""
_QUERIES = ("val", "test", "tune")


def split_role(name: str) -> str:
    """What a split is for, by its name in any case.

    Args:
        name: Of the split.

    Returns:
        "train", "val", "test" or "tune"; "" for a name that says nothing.

    Example:
        >>> [split_role(name) for name in ("Training", "valid", "CRC-VAL-HE-7K", "fold1")]
        ['train', 'val', 'val', '']
    """
    return ROLES.get(name.strip().casefold(), "")


def find_splits(names: Iterable[str]) -> tuple[str, str]:
    """The split of the bank and that of the queries.

    The bank is the training split.  The queries are the validation split, else the test split, else the one that models
    are chosen by ("tune").  A split whose name is the role itself goes before other spellings.

    Args:
        names: All splits of a cohort.

    Returns:
        (bank, queries), "" for one that is not there.

    Raises:
        ValueError: Two splits have one role, and none of them is named by it.
    """
    of_role: dict[str, list[str]] = {}
    for name in names:
        of_role.setdefault(split_role(name), []).append(name)
    chosen = {}
    for role in ("train", *_QUERIES):
        spelled = of_role.get(role, [])
        if len(spelled) > 1 and role not in spelled:
            raise ValueError(
                f"the splits {', '.join(map(repr, spelled))} are all a {role} split by their names; say which one is"
                f" meant: rename_splits(cohort, {{{role!r}: {spelled[0]!r}}})"
            )
        chosen[role] = role if role in spelled else next(iter(spelled), "")
    return chosen["train"], next((chosen[role] for role in _QUERIES if chosen[role]), "")


def rename_splits(cohort: Cohort, names: Mapping[str, str]) -> Cohort:
    """The cohort with other names of splits.

    Args:
        cohort: With splits.
        names: The split that each new name stands for: {"train": "0", "val": "1"}.  A split that has one of the new
            names already and is not renamed itself loses it: its patches are in no split then, which the notes say.

    Returns:
        The cohort with the new names; splits that are not mentioned stay.

    Raises:
        ValueError: The cohort has no such split, or one split is given two names.

    Example:
        >>> rename_splits(cohort, {"train": "Training", "val": "Testing"})  # doctest: +SKIP
    """
    if unknown := [old for old in names.values() if old not in cohort.splits]:
        have = ", ".join(map(repr, cohort.splits)) or "none"
        raise ValueError(f"the cohort has no split {unknown[0]!r}; it has {have}")
    if len(set(names.values())) != len(names):
        raise ValueError(f"one split is given two names in {dict(names)!r}")
    new = {old: name for name, old in names.items()}
    lost = [name for name in names if name in cohort.splits and name not in new]
    new |= dict.fromkeys(lost, "")
    records = [row._replace(split=new.get(row.split, row.split)) for row in cohort.records]
    notes = list(cohort.notes)
    if changed := [f"{old!r} as {name!r}" for name, old in names.items() if old != name]:
        notes.append(f"splits taken: {', '.join(changed)}")
    if lost:
        notes.append(f"in no split any more, for another one has its name now: patches of split {shorten_names(lost)}")
    options = {name: getattr(cohort, name) for name in type(cohort).model_fields}
    return Cohort(**options | {"records": records, "notes": notes})


def describe_unused(cohort: Cohort, used: Iterable[str]) -> list[str]:
    """Notes on patches that an evaluation of some splits leaves out.

    Args:
        cohort: With splits.
        used: The splits that are looked at.

    Returns:
        A note on the other splits, and one on patches without a split, where there are any.
    """
    taken = set(used)
    notes = []
    if others := [name for name in cohort.splits if name not in taken]:
        counts = ", ".join(f"{name!r} ({len(cohort.rows(name))} patches)" for name in others)
        notes.append(f"left alone, neither in the bank nor attacked: split {counts}")
    if without := sum(not row.split for row in cohort.records):
        notes.append(f"left out: {without} of {len(cohort)} patches, which are in no split")
    return notes
