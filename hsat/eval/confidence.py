"""How certain a number is: intervals from resampled patients, and exact bounds of proportions.

The library's own part is the bootstrap over patients, which weighs counts and so measures all resamples at once.
Quantiles and tails are SciPy's, loaded when they are first needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hsat.eval.metrics import METRICS, average_precision, rank_of_true_class
from hsat.eval.options import AbsentClasses, check_choice
from hsat.eval.pooling import check_scores

Method = Literal["t", "percentile", "basic", "bca"]
METHODS: tuple[Method, ...] = ("t", "percentile", "basic", "bca")
NO_SPREAD = "every resample gives the same value"
EXACT = "exact bound: every patient scores alike"
OF_PATIENTS = "; of the mean over patients, whose numbers of rows differ"
_SHARES = ("accuracy", "mca", "top2", "top3")  # means over patients; average precision is none
_CHUNK_CELLS = 4_000_000
_SAFETY = 1e-13  # share of a quantile by which SciPy may err; tests compare with fractions


@dataclass(frozen=True)
class Interval:
    """An interval for a number.

    Attributes:
        low, high: Its ends; None where there is no interval.
        reason: Why there is none, or how an unusual one came about; "" for the usual one.
    """

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
    method: Method = "t",
    absent_classes: AbsentClasses = "skip",
) -> dict[str, Interval]:
    """Intervals of metrics when whole patients are drawn anew with replacement.

    Patches of a patient are alike, so that resampling patches would promise too much.  A patient drawn twice counts
    twice; metrics of a resample are taken over the classes that occur in it.  The draw depends on `generator` and on
    the number of patients only: the same seed gives the same patients for every attack and level.

    Where every patient scores 0, or every patient 1, no resample differs.  Accuracy, mca, top2 and top3 then get an
    exact bound at the open side (see `clopper_pearson_radius`, with patients as the trials), and `reason` says so.  It
    bounds the mean in which every patient counts once (for mca: every patient who has the class).  Where patients have
    unequal numbers of rows and those with more are more often right than others, the metric itself can lie outside, by
    how much no sample of patients who score alike can tell; `reason` then says whose mean it is.
    Otherwise, with one patient, and with resamples=0, there is no interval, and `reason` says why.

    Args:
        scores: (n, classes), rows of one level (patches, slides or patients).
        labels: (n,) class indices.
        patients: (n,) ids.
        generator: Draws the patients.
        names: Which metrics.
        resamples: How many resamples; 0 for no intervals.
        confidence: In (0, 1).
        method: "t" (Student's quantile times the bootstrap's standard error, on the logit scale), "percentile", "basic"
            or "bca"; see `confidence_interval`.  In simulated cohorts "t" covered nearest to what it promises, and the
            percentile method too seldom with fewer than 60 patients; docs/conventions.md has the figures.
        absent_classes: See `metrics`.

    Returns:
        The interval of each metric, by its name.

    Raises:
        ValueError: For an unknown name, method or `absent_classes`, resamples below zero, a confidence outside (0, 1)
            and lengths that differ.
    """
    check_choice("absent_classes", absent_classes, AbsentClasses)
    scores, labels, patients = check_scores(scores), np.asarray(labels), np.asarray(patients)
    _check_columns(len(scores), labels=labels, patients=patients)
    check_bootstrap_options(names, resamples, confidence, method)
    patient_ids, member_of = np.unique(patients, return_inverse=True)
    n_patients = len(patient_ids)
    if reason := missing_interval_reason(n_patients, resamples):
        return {name: Interval(None, None, reason) for name in names}

    def values(weights: np.ndarray) -> dict[str, np.ndarray]:
        return weighted_metrics(scores, labels, member_of, weights, names=names, absent_classes=absent_classes)

    point, replicates = values(np.ones((1, n_patients))), values(bootstrap_draws(n_patients, resamples, generator))
    left_out = values(jackknife(n_patients)) if method == "bca" else {}
    intervals = {}
    for name in names:
        value = float(point[name][0])
        interval = confidence_interval(
            value,
            replicates[name],
            n_patients=n_patients,
            method=method,
            confidence=confidence,
            left_out=left_out.get(name),
        )
        if interval.reason == NO_SPREAD and name in _SHARES and value in (0.0, 1.0):
            groups = labels if name == "mca" else np.zeros(len(labels))
            interval = _exact_interval(value, member_of, groups, confidence)
        intervals[name] = interval
    return intervals


def confidence_interval(
    point: float,
    replicates: np.ndarray,
    *,
    n_patients: int,
    method: Method,
    confidence: float,
    left_out: np.ndarray | None = None,
    difference: bool = False,
) -> Interval:
    """The interval of a share in [0, 1], or of a difference of two shares, in [-1, 1].

    "t": the standard deviation s of the replicates, widened by sqrt(n / (n - 1)), times Student's quantile with n - 1
    degrees of freedom, n the number of patients.  For a share this is done on the logit scale, s / (p (1 - p)) around
    logit(p), so the interval stays inside (0, 1) and is skewed as shares near 0 or 1 are; for a difference on the plain
    scale.  "percentile": quantiles of the replicates.  "basic": the same mirrored at the point.  "bca": bias-corrected
    and accelerated (Efron 1987).  Every interval is cut to the range of the number.  Replicates without any spread give
    no interval.

    Args:
        point: The number.
        replicates: (resamples,) the number in each resample.
        n_patients: How many patients were drawn from.
        method: See above.
        confidence: In (0, 1).
        left_out: (n_patients,) the number with each patient left out in turn, which only "bca" needs.
        difference: Whether the number is a difference of two shares.
    """
    tail, low, high = (1 - confidence) / 2, -1.0 if difference else 0.0, 1.0
    if np.ptp(replicates) < 1e-12:
        return Interval(None, None, NO_SPREAD)
    if method == "t":
        from scipy import stats

        deviation = float(replicates.std(ddof=1)) if len(replicates) > 1 else 0.0
        spread = deviation * math.sqrt(n_patients / (n_patients - 1))
        ends = _student_interval(point, spread * float(stats.t.ppf(1 - tail, n_patients - 1)), logit=not difference)
    elif method == "bca":
        assert left_out is not None  # the callers of this module give it
        first, last = np.quantile(replicates, _bca_tails(point, replicates, left_out, tail))
        ends = (float(first), float(last))
    else:
        first, last = (float(edge) for edge in np.quantile(replicates, (tail, 1 - tail)))
        ends = (first, last) if method == "percentile" else (2 * point - last, 2 * point - first)
    return Interval(min(max(ends[0], low), high), min(max(ends[1], low), high))


def _student_interval(point: float, radius: float, *, logit: bool) -> tuple[float, float]:
    if not logit or not 0 < point < 1:
        return point - radius, point + radius
    centre, radius = math.log(point / (1 - point)), radius / (point * (1 - point))
    return _logistic(centre - radius), _logistic(centre + radius)


def _logistic(x: float) -> float:
    return 0.5 * (1 + math.tanh(x / 2))


def _bca_tails(point: float, replicates: np.ndarray, left_out: np.ndarray, tail: float) -> tuple[float, float]:
    """The two shares of the replicates at which a BCa interval ends; ties with the point count half."""
    from scipy import stats

    below = ((replicates < point).sum() + 0.5 * (replicates == point).sum()) / len(replicates)
    bias = float(stats.norm.ppf(min(max(float(below), 1 / len(replicates)), 1 - 1 / len(replicates))))
    pull = left_out.mean() - left_out
    total = float((pull**2).sum())
    acceleration = float((pull**3).sum()) / (6 * total**1.5) if total > 0 else 0.0

    def moved(share: float) -> float:
        distance = bias + float(stats.norm.ppf(share))
        return float(stats.norm.cdf(bias + distance / (1 - acceleration * distance)))

    return moved(tail), moved(1 - tail)


def bootstrap_draws(n_patients: int, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """How often each patient is drawn in each resample, (resamples, n_patients).

    A function of the generator and these two numbers only.
    """
    return generator.multinomial(n_patients, np.full(n_patients, 1 / n_patients), size=resamples).astype(float)


def jackknife(n_patients: int) -> np.ndarray:
    """The weights of the jackknife, (n_patients, n_patients): row i leaves out patient i."""
    return 1.0 - np.eye(n_patients)


def weighted_metrics(
    scores: np.ndarray,
    labels: np.ndarray,
    member_of: np.ndarray,
    weights: np.ndarray,
    *,
    names: Sequence[str],
    absent_classes: AbsentClasses = "skip",
) -> dict[str, np.ndarray]:
    """Each metric under each row of weights.

    Args:
        scores: (n, classes).
        labels: (n,).
        member_of: (n,) the position of each row's patient.
        weights: (rows, patients), non-negative, some above zero.  A patient of weight 2 counts twice.
        names: Which metrics.
        absent_classes: See `metrics`.

    Returns:
        {name: (rows,)}.  Metrics are taken over the classes that occur under the weights.
    """
    values = _ratio_metrics(scores, labels, member_of, weights, names=names, absent_classes=absent_classes)
    if "map" in names:
        values["map"] = _mean_average_precision(scores, labels, member_of, weights)
    return {name: values[name] for name in names}


def _ratio_metrics(
    scores: np.ndarray,
    labels: np.ndarray,
    member_of: np.ndarray,
    weights: np.ndarray,
    *,
    names: Sequence[str],
    absent_classes: AbsentClasses,
) -> dict[str, np.ndarray]:
    """All metrics that are ratios of counts: counted per patient, then weighted by the draws."""
    n_patients, classes = weights.shape[1], scores.shape[1]
    rank = rank_of_true_class(scores, labels)
    size = np.bincount(member_of, minlength=n_patients)
    values = {}
    for name, limit in (("accuracy", 1), ("top2", 2), ("top3", 3)):
        if name in names:
            hits = np.bincount(member_of, weights=rank < limit, minlength=n_patients)
            values[name] = weights @ hits / (weights @ size)
    if "mca" in names:
        truth, hit, predicted = (np.zeros((n_patients, classes)) for _ in range(3))
        np.add.at(truth, (member_of, labels), 1)
        np.add.at(hit, (member_of, labels), rank == 0)
        np.add.at(predicted, (member_of, scores.argmax(1)), 1)
        occurs = weights @ truth
        recall = np.divide(weights @ hit, occurs, out=np.zeros(occurs.shape), where=occurs > 0)
        counted = (occurs > 0) | (weights @ predicted > 0) if absent_classes == "zero" else occurs > 0
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


def _exact_interval(value: float, member_of: np.ndarray, groups: np.ndarray, confidence: float) -> Interval:
    """The interval of a metric that is 0, or 1, for every patient; groups: the class of each row, or one for all."""
    pairs, rows = np.unique(np.stack((groups, member_of)), axis=1, return_counts=True)
    place, patient = (np.unique(ids, return_inverse=True)[1] for ids in pairs)
    patients = np.bincount(place, weights=1.0 / np.bincount(patient)[patient])
    radius = clopper_pearson_radius(patients, (1 - confidence) / 2)
    reason = EXACT if rows.min() == rows.max() else EXACT + OF_PATIENTS
    return Interval(0.0, radius, reason) if value == 0 else Interval(1 - radius, 1.0, reason)


def clopper_pearson_radius(patients: np.ndarray, tail: float) -> float:
    """How far the mean over groups may lie from 0 when every patient of every group scored exactly 0 (or from 1).

    A patient whose mean is r scores 0 with probability 1 - r at most, so all of them do with probability
    prod (1 - r_g) ** n_g at most.  The bound is the largest mean of r_g for which that is `tail`; by Lagrange
    1 - r_g = min(1, level * n_g), and `level` is found by bisection.

    A patient in m groups scores 0 in all of them with probability min (1 - r_g) at most, however they depend on each
    other, and so with prod (1 - r_g) ** (1 / m) at most: such a patient counts as 1 / m in each.

    Args:
        patients: (groups,) how many patients each group has, counted so; one group gives the Clopper-Pearson bound
            1 - tail ** (1 / n).
        tail: In (0, 1).
    """
    counts = np.asarray(patients, dtype=float)
    log_tail = math.log(tail)
    low, high = log_tail / counts.min() - math.log(counts.max()) - 1, -math.log(counts.min())
    for _ in range(100):
        middle = (low + high) / 2
        total = float((counts * np.minimum(0.0, middle + np.log(counts))).sum())
        low, high = (middle, high) if total < log_tail else (low, middle)
    return float(1 - np.minimum(1.0, np.exp(low + np.log(counts))).mean())


def binomial_tail(count: int, n: int, p: float) -> float:
    """P(X >= count) for X ~ Binomial(n, p).

    Raises:
        ValueError: Unless 0 <= count <= n and 0 <= p <= 1.
    """
    _check_count(count, n)
    if not 0 <= p <= 1:
        raise ValueError(f"p is a probability and must lie in [0, 1], got {p}")
    from scipy import stats

    return 1.0 if count == 0 else float(stats.binom.sf(count - 1, n, p))


def clopper_pearson_lower(count: Any, n: Any, alpha: float) -> np.ndarray:
    """The exact lower confidence bound of a proportion: p is at least this with probability at least 1 - alpha.

    The bound is the p for which `binomial_tail(count, n, p)` equals alpha (Clopper and Pearson 1934), less 1e-13 of
    itself, so that rounding errs to the safe side; 0 for count = 0.

    Args:
        count: How many of the trials succeeded, a number or an array.
        n: How many trials there were, likewise.
        alpha: In (0, 0.5).

    Returns:
        float64 of the common shape.

    Raises:
        ValueError: Unless 0 <= count <= n, n >= 1 and 0 < alpha < 0.5.
    """
    from scipy import stats

    count, n = np.broadcast_arrays(np.asarray(count, dtype=np.int64), np.asarray(n, dtype=np.int64))
    _check_count(count, n)
    if (n < 1).any() or not 0 < alpha < 0.5:
        raise ValueError(f"a bound needs n >= 1 trials and alpha between 0 and 0.5, got n={n}, alpha={alpha}")
    some = count > 0
    positive = np.maximum(count, 1)
    lower = stats.beta.ppf(alpha, positive, n - positive + 1) * (1 - _SAFETY)
    return np.where(some, np.nextafter(lower, 0.0), 0.0)


def clopper_pearson_upper(count: Any, n: Any, alpha: float) -> np.ndarray:
    """The exact upper confidence bound of a proportion, rounded up; see `clopper_pearson_lower`."""
    _check_count(count, n)
    upper = 1.0 - clopper_pearson_lower(np.asarray(n) - np.asarray(count), n, alpha)
    return np.minimum(1.0, np.nextafter(upper, 2.0))


def missing_interval_reason(n_patients: int, resamples: int) -> str:
    """Why there can be no interval, or ""."""
    if n_patients == 1:
        return "one patient only"
    return "no resamples" if resamples == 0 else ""


def check_bootstrap_options(names: Sequence[str], resamples: int, confidence: float, method: str) -> None:
    """ValueError for what `bootstrap_intervals` and `paired_difference` refuse."""
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


def _check_count(count: Any, n: Any) -> None:
    if not (np.less_equal(0, count) & np.less_equal(count, n)).all():
        raise ValueError(f"{count} of {n} trials cannot succeed; the count must lie in [0, {n}]")
