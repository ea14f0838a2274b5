"""How much of each class a cohort's splits hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hsat.data.cohort import Cohort


def cohort_counts(cohort: Cohort) -> dict[str, dict[str, dict[str, int]]]:
    """Patients, slides and patches by split and class; see `Cohort.summary`."""
    labels = {name: i for i, name in enumerate(cohort.class_names)}
    found: dict[tuple[str, int], tuple[set[int], set[int], set[int]]] = {}
    for i, row in enumerate(cohort.records):
        members = found.setdefault((row.split, labels[row.class_name]), (set(), set(), set()))
        for group, number in zip(members, (int(cohort.patient[i]), int(cohort.slide[i]), i), strict=True):
            group.add(number)
    nothing: tuple[set[int], set[int], set[int]] = (set(), set(), set())
    return {
        split: {
            name: dict(
                zip(("patients", "slides", "patches"), map(len, found.get((split, label), nothing)), strict=True)
            )
            for name, label in labels.items()
        }
        for split in dict.fromkeys(row.split for row in cohort.records)
    }
