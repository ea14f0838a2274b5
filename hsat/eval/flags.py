"""Reasons to distrust a number, which its record carries as flags: of bank and queries, and of accuracies.

Flags of gradients come from what an attack counted (`hsat.eval.outcomes`) and from `hsat.eval.diagnostics`.
"""

from __future__ import annotations

import numpy as np

from hsat.types import EmbeddingTable


def bank_flags(bank: EmbeddingTable, queries: EmbeddingTable) -> tuple[str, ...]:
    """Reasons to distrust every number that a bank gives on these queries.

    Patients that are known already from the bank; a class of the queries of which the
    bank has no row, which can never be right; and a bank or queries of a single class.  Classes are told apart by name.

    Args:
        bank: What the classifier was fitted on.
        queries: What it decides on.
    """
    flags = []
    if bank.cohort and bank.cohort == queries.cohort:
        shared = np.intersect1d(bank.patient, queries.patient)
        flags += [f"bank and queries share {len(shared)} patients"] if len(shared) else []
    held, asked = _class_counts(bank), _class_counts(queries)
    if len(held) == 1:
        flags.append(f"the bank holds one class only ({next(iter(held))}): no attack can change a decision")
    if absent := [name for name in asked if name not in held]:
        count, listed = sum(asked[name] for name in absent), ", ".join(absent)
        flags.append(
            f"the bank has no row of {len(absent)} of the queries' classes ({listed}): {count} of {len(queries)}"
            " queries can never be right"
        )
    if len(asked) == 1:
        flags.append(f"the queries hold one class only ({next(iter(asked))}): always saying it is right every time")
    return tuple(flags)


def _class_counts(table: EmbeddingTable) -> dict[str, int]:
    """Rows of each class that a table holds, by name."""
    classes, counts = np.unique(table.label, return_counts=True)
    return {table.class_names[int(index)]: int(count) for index, count in zip(classes, counts, strict=True)}


def accuracy_flags(
    accuracy: float, *, level: str, chance: float | None = None, clean: float | None = None
) -> tuple[str, ...]:
    """Reasons to distrust an accuracy, from what stands beside it at the same level.

    An attack that leaves more right than there was has pushed images the wrong way, however small the excess.  Clean
    images that do worse than chance point at labels, class names or pixel normalisation that do not fit.  An attacked
    accuracy below chance is no reason for doubt: that is what attacks are for.

    Args:
        accuracy: Of the images of one condition.
        level: "patch", "slide" or "patient".
        chance: Of clean images, the chance level; None for other conditions.
        clean: Of an attack, the accuracy on the clean images; None for other conditions.
    """
    flags = []
    if chance is not None and accuracy < chance:
        flags.append(f"{level} accuracy below chance: {100 * accuracy:.1f} % against {100 * chance:.1f} %")
    if clean is not None and accuracy > clean:
        flags.append(
            f"{level} accuracy under attack above that of the clean images: {100 * accuracy:.1f} % against"
            f" {100 * clean:.1f} %"
        )
    return tuple(flags)
