"""How far a number could have come out otherwise: intervals from resampled patients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hsat.eval.conventions import Absent, Compat, resolve_arithmetic
from hsat.eval.pooling import check_scores
from hsat.eval.scoring import METRICS
from hsat.eval.statistics.intervals import EXACT, METHODS, NO_SPREAD, Interval, Method, exact_reach, interval_around
from hsat.eval.statistics.resampling import metric_values, patient_draws, without_each

__all__ = ["Interval", "bootstrap_intervals"]

_SHARES = ("accuracy", "mca", "top2", "top3")  # means over patients; average precision is none


def bootstrap_intervals(
    scores: Any,
    labels: Any,
    patients: Any,
    *,
    generator: np.random.Generator,
    names: Sequence[str] = METRICS,
    resamples: int = 1000,
    confidence: float = 0.95,
    method: Method = "t",
    absent: Absent | None = None,
    compat: Compat | None = None,
) -> dict[str, Interval]:
    """Intervals of metrics when whole patients are drawn anew with replacement.

    Patches of a patient are alike, so that resampling patches would promise too much.  scores: (n, classes), labels:
    (n,) and patients: (n,) belong to the rows of one level (patches, slides or patients).  A patient drawn twice counts
    twice; metrics of a resample are taken over the classes that occur in it.  The draw depends on `generator` and on
    the number of patients only: the same seed gives the same patients for every attack and level.

    method: "t" (default: Student's quantile times the bootstrap's standard error, on the logit scale), "percentile",
    "basic" or "bca"; see `interval_around`.  In simulated cohorts "t" covered nearest to what it promises, and
    the percentile method too seldom with fewer than 60 patients; docs/conventions.md has the figures.
    absent, compat: see `metrics`.

    Where every patient scores 0, or every patient 1, no resample differs.  Accuracy, mca, top2 and top3 then get an
    exact bound at the open side (`exact_reach`: Clopper-Pearson, with patients as the trials), and `reason` says so.
    Otherwise, with one patient, and with resamples=0, there is no interval, and `reason` says why.  Raises ValueError
    for an unknown name or method, resamples below zero, a confidence outside (0, 1) and lengths that differ.
    """
    absent = resolve_arithmetic(compat, absent=absent).absent
    scores, labels, patients = check_scores(scores), np.asarray(labels), np.asarray(patients)
    _check_columns(len(scores), labels=labels, patients=patients)
    check_options(names, resamples, confidence, method)
    people, member_of = np.unique(patients, return_inverse=True)
    if reason := no_interval(len(people), resamples):
        return {name: Interval(None, None, reason) for name in names}

    def values(weights: np.ndarray) -> dict[str, np.ndarray]:
        return metric_values(scores, labels, member_of, weights, names=names, absent=absent)

    point, drawn = values(np.ones((1, len(people)))), values(patient_draws(len(people), resamples, generator))
    left_out = values(without_each(len(people))) if method == "bca" else {}
    found = {}
    for name in names:
        value = float(point[name][0])
        found[name] = interval_around(
            value,
            drawn[name],
            people=len(people),
            method=method,
            confidence=confidence,
            left_out=left_out.get(name),
        )
        if found[name].reason == NO_SPREAD and name in _SHARES and value in (0.0, 1.0):
            groups = labels if name == "mca" else np.zeros(len(labels))
            found[name] = _exact(value, member_of, groups, confidence)
    return found


def _exact(value: float, member_of: np.ndarray, groups: np.ndarray, confidence: float) -> Interval:
    """The interval of a metric that is 0, or 1, for every patient; groups: the class of each row, or one for all."""
    pairs = np.unique(np.stack((groups, member_of)), axis=1)
    counts = np.unique(pairs[0], return_counts=True)[1]
    reach = exact_reach(counts, (1 - confidence) / 2)
    return Interval(0.0, reach, EXACT) if value == 0 else Interval(1 - reach, 1.0, EXACT)


def no_interval(people: int, resamples: int) -> str:
    """Why there can be no interval, or ""."""
    if people == 1:
        return "one patient only"
    return "no resamples" if resamples == 0 else ""


def check_options(names: Sequence[str], resamples: int, confidence: float, method: str) -> None:
    """ValueError for what bootstrap_intervals and paired_difference refuse."""
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"unknown metrics {unknown}; choose from {list(METRICS)}")
    if resamples < 0:
        raise ValueError(f"resamples must be 0 (no interval) or more, got {resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}; for 95 % write 0.95")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {list(METHODS)}")


def _check_columns(n: int, **columns: np.ndarray) -> None:
    for name, column in columns.items():
        if column.shape != (n,):
            raise ValueError(f"{n} rows of scores but {name} has shape {column.shape}; expected ({n},)")
