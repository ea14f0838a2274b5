"""Reasons to distrust a number, which its record carries as flags: of bank and queries, training, and accuracies.

Flags of gradients come from what an attack counted (`hsat.eval.outcomes`) and from `hsat.eval.diagnostics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from torch import nn

from hsat.eval.options import Provenance
from hsat.fingerprints import digest_patient
from hsat.models.metadata import check_training
from hsat.types import EmbeddingTable

_SAME = 1e-6  # of an entry of a unit row: less is rounding
_BLOCK, _NEIGHBOURS = 65_536, 4  # rows of a bank at a time; rows around a query's place that are compared with it


def bank_flags(bank: EmbeddingTable, queries: EmbeddingTable) -> tuple[str, ...]:
    """Reasons to distrust every number that a bank gives on these queries.

    Patients that are known already from the bank, or slides where patients are not known; a class of the queries of
    which the bank has no row, which can never be right; and a bank or queries of a single class.  Classes are told
    apart by name.  Equal embeddings tell of images that are in both, whatever is known of cohorts.

    Args:
        bank: What the classifier was fitted on.
        queries: What it decides on.
    """
    flags = []
    if bank.cohort and bank.cohort == queries.cohort:
        shared = np.intersect1d(bank.patient, queries.patient)
        flags += [f"bank and queries share {len(shared)} patients"] if len(shared) else []
        if not flags and any(np.array_equal(table.patient, table.slide) for table in (bank, queries)):
            shared = np.intersect1d(bank.slide, queries.slide)  # one of them takes its slides for patients
            flags += [f"bank and queries share {len(shared)} slides"] if len(shared) else []
    if repeated := count_shared_rows(bank, queries):
        flags.append(f"{repeated} of {len(queries)} queries are also in the bank, with the same embedding")
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


def count_shared_rows(bank: EmbeddingTable, queries: EmbeddingTable) -> int:
    """How many queries have the embedding of a row of the bank, up to the rounding of other batch sizes.

    Rows are compared that have nearly the same product with one random direction, so that a bank of a million rows
    costs one product and a sort.

    Args:
        bank: (n, d).
        queries: (m, d); of another width, nothing is shared.
    """
    if bank.z.shape[1] != queries.z.shape[1] or not len(bank):
        return 0
    direction = np.random.default_rng(0).standard_normal(bank.z.shape[1])
    blocks = [np.asarray(bank.z[start : start + _BLOCK]) @ direction for start in range(0, len(bank), _BLOCK)]
    keys: np.ndarray = np.concatenate(blocks)
    asked: np.ndarray = np.asarray(queries.z) @ direction
    order = np.argsort(keys, kind="stable")
    places = np.searchsorted(keys[order], asked)
    shared = np.zeros(len(queries), dtype=bool)
    lengths = None if bank.norm is None or queries.norm is None else (bank.norm, queries.norm)
    for step in range(-_NEIGHBOURS, _NEIGHBOURS):
        rows = order[np.clip(places + step, 0, len(bank) - 1)]
        close = np.flatnonzero(~shared & (np.abs(keys[rows] - asked) < _SAME * bank.z.shape[1]))
        found = rows[close]
        equal = (np.abs(bank.z[found] - queries.z[close]) < _SAME).all(1)
        if lengths is not None:
            equal &= np.isclose(lengths[0][found], lengths[1][close], rtol=100 * _SAME, atol=0)
        shared[close[equal]] = True
    return int(shared.sum())


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


def stated_training(encoder: object, provenance: Provenance = Provenance()) -> Mapping[str, Any] | None:
    """What is known of an encoder's training: `kind`, `image_size` and `patients`, as in encoder files.

    Args:
        encoder: Any; the file of a module's weights, or of a module in it, may state the training.
        provenance: What it says of the training comes first.

    Returns:
        The facts; None where nobody states them.

    Raises:
        ValueError: For facts of another form in the provenance.
    """
    if provenance.training is not None:
        check_training(provenance.training, "provenance")
        return provenance.training
    if isinstance(encoder, nn.Module):
        for module in encoder.modules():
            report = getattr(module, "weights_report", None)
            metadata = getattr(report, "metadata", None)
            if isinstance(metadata, Mapping) and _is_training(metadata.get("training")):
                return cast(Mapping[str, Any], metadata["training"])
    return None


@dataclass(frozen=True)
class MeasuredData:
    """What a loader's dataset says of the images that an encoder is measured on.

    Attributes:
        kind: Of the patches; "" where it is unknown.
        image_size: The side of the images that the encoder is given; None where it is unknown.
        patients: Names of the patients; empty where they are unknown.
    """

    kind: str = ""
    image_size: int | None = None
    patients: tuple[str, ...] = ()

    @classmethod
    def of(cls, loader: object, encoder: object = None) -> MeasuredData:
        """What is known of the images of a loader; images of their own size have that which the encoder resizes to."""
        dataset = getattr(loader, "dataset", None)
        cohort, size = getattr(dataset, "cohort", None), getattr(dataset, "image_size", None)
        if size is None:
            size = _side(getattr(encoder, "input_size", None))
        names, ids = getattr(cohort, "patient_names", ()), getattr(cohort, "patient", None)
        rows = getattr(dataset, "rows", None)
        if ids is not None and rows is not None:
            names = tuple(names[number] for number in np.unique(ids[np.asarray(rows, dtype=np.int64)]))
        return cls(str(getattr(cohort, "kind", "")), size if isinstance(size, int) else None, tuple(names))

    def trained_on(self, training: Mapping[str, Any] | None) -> int:
        """How many of the patients an encoder of this training was trained on, by digests of their names."""
        known = set(training["patients"]) if training else set()
        return sum(digest_patient(name) in known for name in self.patients) if known else 0

    def flags(self, training: Mapping[str, Any] | None) -> tuple[str, ...]:
        """Reasons to distrust numbers of an encoder of this training on these images."""
        if training is None:
            return ()
        flags = []
        if count := self.trained_on(training):
            flags.append(f"{count} of {len(self.patients)} queries' patients were trained on")
        if (size := _side(training["image_size"])) and self.image_size and size != self.image_size:
            flags.append(f"the encoder was trained on images of {size} pixels a side, and these have {self.image_size}")
        if self.kind and training["kind"] != self.kind:
            flags.append(f"the encoder was trained on {training['kind']} patches, and these are {self.kind}")
        return tuple(flags)


def _is_training(values: object) -> bool:
    """Whether these are facts of a training of ours: a file of another program may use the word for something else."""
    try:
        check_training(values, "")
    except ValueError:
        return False
    return True


def _side(size: Any) -> int | None:
    """The side of squares, as files state it: a number, a pair or null."""
    if isinstance(size, list | tuple):
        return int(size[0]) if size[0] == size[1] else None
    return None if size is None else int(size)
