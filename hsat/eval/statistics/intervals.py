"""From the values of a number in resamples of patients to an interval around it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np

Method = Literal["t", "percentile", "basic", "bca"]
METHODS: tuple[Method, ...] = ("t", "percentile", "basic", "bca")
NO_SPREAD = "every resample gives the same value"
EXACT = "exact bound: every patient scores alike"

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """An interval for a number.  low and high are None where there is none.

    reason: why there is none, or how an unusual one came about; "" for the usual one.
    """

    low: float | None
    high: float | None
    reason: str = ""


def interval_around(
    point: float,
    replicates: np.ndarray,
    *,
    people: int,
    method: Method,
    confidence: float,
    left_out: np.ndarray | None = None,
    difference: bool = False,
) -> Interval:
    """The interval of a share in [0, 1], or of a difference of two shares, in [-1, 1].

    replicates: the number in each resample; people: how many patients were drawn from; left_out: the number
    with each patient left out in turn, which only "bca" needs.

    "t": the standard deviation s of the replicates, widened by sqrt(people / (people - 1)), times Student's quantile
    with people - 1 degrees of freedom.  For a share this is done on the logit scale, s / (p (1 - p)) around logit(p),
    so the interval stays inside (0, 1) and is skewed as shares near 0 or 1 are; for a difference on the plain scale.
    "percentile": quantiles of the replicates.  "basic": the same mirrored at the point.  "bca": bias-corrected and
    accelerated (Efron 1987).  Every interval is cut to the range of the number.
    Replicates without any spread give no interval.
    """
    tail, low, high = (1 - confidence) / 2, -1.0 if difference else 0.0, 1.0
    if np.ptp(replicates) < 1e-12:
        return Interval(None, None, NO_SPREAD)
    if method == "t":
        spread = float(replicates.std(ddof=1)) * math.sqrt(people / (people - 1)) if len(replicates) > 1 else 0.0
        ends = _student_ends(point, spread * student_quantile(1 - tail, people - 1), logit=not difference)
    elif method == "bca":
        assert left_out is not None  # the callers of this module give it
        first, last = np.quantile(replicates, _bca_tails(point, replicates, left_out, tail))
        ends = (float(first), float(last))
    else:
        first, last = (float(edge) for edge in np.quantile(replicates, (tail, 1 - tail)))
        ends = (first, last) if method == "percentile" else (2 * point - last, 2 * point - first)
    return Interval(min(max(ends[0], low), high), min(max(ends[1], low), high))


def _student_ends(point: float, reach: float, *, logit: bool) -> tuple[float, float]:
    if not logit or not 0 < point < 1:
        return point - reach, point + reach
    centre, reach = math.log(point / (1 - point)), reach / (point * (1 - point))
    return _logistic(centre - reach), _logistic(centre + reach)


def _logistic(x: float) -> float:
    return 0.5 * (1 + math.tanh(x / 2))


def _bca_tails(point: float, replicates: np.ndarray, left_out: np.ndarray, tail: float) -> tuple[float, float]:
    """The two shares of the replicates at which a BCa interval ends; ties with the point count half."""
    below = ((replicates < point).sum() + 0.5 * (replicates == point).sum()) / len(replicates)
    bias = _NORMAL.inv_cdf(min(max(float(below), 1 / len(replicates)), 1 - 1 / len(replicates)))
    pull = left_out.mean() - left_out
    total = float((pull**2).sum())
    acceleration = float((pull**3).sum()) / (6 * total**1.5) if total > 0 else 0.0

    def moved(share: float) -> float:
        reach = bias + _NORMAL.inv_cdf(share)
        return _NORMAL.cdf(bias + reach / (1 - acceleration * reach))

    return moved(tail), moved(1 - tail)


@lru_cache
def student_quantile(share: float, freedom: int) -> float:
    """The `share` quantile of Student's t with `freedom` degrees of freedom, share in [0.5, 1).

    With t = sqrt(freedom) tan(a) the distribution is an integral of cos(a) ** (freedom - 1), taken by a Gauss-Legendre
    rule and inverted by bisection; SciPy would do it, and is no dependency.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)

    def area(angle: float) -> float:
        at = 0.5 * angle * (nodes + 1)
        return float(0.5 * angle * (weights * np.cos(at) ** (freedom - 1)).sum())

    norm = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 + norm * area(middle) < share else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def exact_reach(patients: np.ndarray, tail: float) -> float:
    """How far the mean over groups may lie from 0 when every patient of every group scored exactly 0 (or from 1).

    patients: (groups,) how many patients each group has; one group gives the Clopper-Pearson bound 1 - tail ** (1 / n).
    A patient whose mean is r scores 0 with probability 1 - r at most, so all of them do with probability
    prod (1 - r_g) ** n_g at most.  The bound is the largest mean of r_g for which that is `tail`; by Lagrange
    1 - r_g = min(1, level * n_g), and `level` is found by bisection.
    """
    counts = np.asarray(patients, dtype=float)
    wanted = math.log(tail)
    low, high = wanted / counts.min() - math.log(counts.max()) - 1, 0.0
    for _ in range(100):
        middle = (low + high) / 2
        total = float((counts * np.minimum(0.0, middle + np.log(counts))).sum())
        low, high = (middle, high) if total < wanted else (low, middle)
    return float(1 - np.minimum(1.0, np.exp(low + np.log(counts))).mean())
