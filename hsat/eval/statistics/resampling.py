"""Metrics of many resamples of patients at once: counted per patient, then weighted by the draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hsat.eval.conventions import Absent
from hsat.eval.scoring import average_precision, true_rank

_CHUNK_CELLS = 4_000_000


def patient_draws(people: int, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """How often each patient is drawn in each resample, (resamples, people); a function of the generator and these."""
    return generator.multinomial(people, np.full(people, 1 / people), size=resamples).astype(float)


def without_each(people: int) -> np.ndarray:
    """The weights of the jackknife, (people, people): row i leaves out patient i."""
    return 1.0 - np.eye(people)


def metric_values(
    scores: np.ndarray,
    labels: np.ndarray,
    member_of: np.ndarray,
    weights: np.ndarray,
    *,
    names: Sequence[str],
    absent: Absent = "skip",
) -> dict[str, np.ndarray]:
    """Each metric under each row of weights, {name: (rows,)}.

    scores: (n, classes), labels: (n,).  member_of: (n,) the position of each row's patient.  weights: (rows, patients),
    non-negative, some above zero.  A patient of weight 2 counts twice.  Metrics are taken over the classes that occur
    under the weights.
    """
    values = _counted(scores, labels, member_of, weights, names=names, absent=absent)
    if "map" in names:
        values["map"] = _mean_average_precision(scores, labels, member_of, weights)
    return {name: values[name] for name in names}


def _counted(
    scores: np.ndarray,
    labels: np.ndarray,
    member_of: np.ndarray,
    weights: np.ndarray,
    *,
    names: Sequence[str],
    absent: Absent,
) -> dict[str, np.ndarray]:
    """All metrics that are ratios of counts."""
    people, classes = weights.shape[1], scores.shape[1]
    rank = true_rank(scores, labels)
    size = np.bincount(member_of, minlength=people)
    values = {}
    for name, limit in (("accuracy", 1), ("top2", 2), ("top3", 3)):
        if name in names:
            hits = np.bincount(member_of, weights=rank < limit, minlength=people)
            values[name] = weights @ hits / (weights @ size)
    if "mca" in names:
        truth, found, predicted = (np.zeros((people, classes)) for _ in range(3))
        np.add.at(truth, (member_of, labels), 1)
        np.add.at(found, (member_of, labels), rank == 0)
        np.add.at(predicted, (member_of, scores.argmax(1)), 1)
        occurs = weights @ truth
        recall = np.divide(weights @ found, occurs, out=np.zeros(occurs.shape), where=occurs > 0)
        counted = (occurs > 0) | (weights @ predicted > 0) if absent == "zero" else occurs > 0
        values["mca"] = (recall * counted).sum(1) / counted.sum(1)
    return values


def _mean_average_precision(
    scores: np.ndarray, labels: np.ndarray, member_of: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Mean average precision under each row of weights, (rows,); in chunks, to bound the memory."""
    step = max(1, _CHUNK_CELLS // len(scores))
    parts = []
    for start in range(0, len(weights), step):
        part = weights[start : start + step][:, member_of]
        parts.append(np.nanmean(average_precision(scores, labels, part), -1))
    return np.concatenate(parts)
