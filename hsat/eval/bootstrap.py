"""How far a number could have come out otherwise: percentile intervals from resampled patients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsat.eval.pooling import check_scores
from hsat.eval.scoring import METRICS, Compat, average_precision, true_rank

_CHUNK_CELLS = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A percentile interval.  low and high are None when there is none, and `reason` says why."""

    low: float | None
    high: float | None
    reason: str = ""


def bootstrap_intervals(
    scores: Any,
    labels: Any,
    patients: Any,
    *,
    generator: np.random.Generator,
    names: Sequence[str] = METRICS,
    resamples: int = 1000,
    confidence: float = 0.95,
    compat: Compat | None = None,
) -> dict[str, Interval]:
    """Percentile intervals of metrics when whole patients are drawn anew with replacement.

    Patches of a patient are alike, so that resampling patches would promise too much.  scores: (n, classes), labels:
    (n,) and patients: (n,) belong to the rows of one level (patches, slides or patients).  A patient drawn twice counts
    twice; metrics of a resample are taken over the classes that occur in it.  The draw depends on `generator` and on
    the number of patients only: the same seed gives the same patients for every attack and level.
    The reported value itself may lie outside the interval, as percentile intervals have it.

    With one patient, or resamples=0, there is no interval.  Raises ValueError for an unknown name, resamples below
    zero, a confidence outside (0, 1) and lengths that differ.
    """
    scores, labels, patients = check_scores(scores), np.asarray(labels), np.asarray(patients)
    _check_columns(len(scores), labels=labels, patients=patients)
    _check_options(names, resamples, confidence)
    people, member_of = np.unique(patients, return_inverse=True)
    if resamples == 0 or len(people) == 1:
        reason = "one patient only" if len(people) == 1 else "no resamples"
        return {name: Interval(None, None, reason) for name in names}
    drawn = generator.multinomial(len(people), np.full(len(people), 1 / len(people)), size=resamples).astype(float)
    values = _counted(scores, labels, member_of, drawn, names=names, compat=compat)
    if "map" in names:
        values["map"] = _mean_average_precision(scores, labels, member_of, drawn)
    tail = (1 - confidence) / 2
    intervals = {}
    for name in names:
        low, high = np.quantile(values[name], (tail, 1 - tail))
        intervals[name] = Interval(float(low), float(high))
    return intervals


def _counted(
    scores: np.ndarray,
    labels: np.ndarray,
    member_of: np.ndarray,
    drawn: np.ndarray,
    *,
    names: Sequence[str],
    compat: Compat | None,
) -> dict[str, np.ndarray]:
    """All metrics that are ratios of counts: counted once per patient, then weighted by the draws, (resamples,)."""
    people, classes = drawn.shape[1], scores.shape[1]
    rank = true_rank(scores, labels)
    size = np.bincount(member_of, minlength=people)
    values = {}
    for name, limit in (("accuracy", 1), ("top2", 2), ("top3", 3)):
        hits = np.bincount(member_of, weights=rank < limit, minlength=people)
        values[name] = drawn @ hits / (drawn @ size)
    if "mca" in names:
        truth, found, predicted = (np.zeros((people, classes)) for _ in range(3))
        np.add.at(truth, (member_of, labels), 1)
        np.add.at(found, (member_of, labels), rank == 0)
        np.add.at(predicted, (member_of, scores.argmax(1)), 1)
        occurs = drawn @ truth
        recall = np.divide(drawn @ found, occurs, out=np.zeros(occurs.shape), where=occurs > 0)
        counted = (occurs > 0) | (drawn @ predicted > 0) if compat == "paper" else occurs > 0
        values["mca"] = (recall * counted).sum(1) / counted.sum(1)
    return values


def _mean_average_precision(
    scores: np.ndarray, labels: np.ndarray, member_of: np.ndarray, drawn: np.ndarray
) -> np.ndarray:
    """Mean average precision of each resample, (resamples,); in chunks, to bound the memory."""
    step = max(1, _CHUNK_CELLS // len(scores))
    parts = []
    for start in range(0, len(drawn), step):
        weights = drawn[start : start + step][:, member_of]
        parts.append(np.nanmean(average_precision(scores, labels, weights), -1))
    return np.concatenate(parts)


def _check_columns(n: int, **columns: np.ndarray) -> None:
    for name, column in columns.items():
        if column.shape != (n,):
            raise ValueError(f"{n} rows of scores but {name} has shape {column.shape}; expected ({n},)")


def _check_options(names: Sequence[str], resamples: int, confidence: float) -> None:
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"unknown metrics {unknown}; choose from {list(METRICS)}")
    if resamples < 0:
        raise ValueError(f"resamples must be 0 (no interval) or more, got {resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}; for 95 % write 0.95")
