"""Exact binomial tails and confidence bounds, without SciPy."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

_HALVINGS = 55  # of an interval of length 1: the spacing of floats


def binomial_tail(count: int, n: int, p: float) -> float:
    """P(X >= count) for X ~ Binomial(n, p): the sum of the terms, each formed from its logarithm, in float64.

    Raises ValueError unless 0 <= count <= n and 0 <= p <= 1.
    """
    _check(count, n)
    if not 0 <= p <= 1:
        raise ValueError(f"p is a probability and must lie in [0, 1], got {p}")
    if count == 0 or p == 1:
        return 1.0
    if p == 0:
        return 0.0
    k, log_choose = _terms(count, n, n)
    return min(1.0, _sum(k, log_choose, n, p))


@lru_cache(maxsize=65536)
def clopper_pearson_lower(count: int, n: int, alpha: float) -> float:
    """The exact lower confidence bound of a proportion: p is at least this with probability at least 1 - alpha.

    count of n trials succeeded.  The bound is the p for which `binomial_tail(count, n, p)` equals alpha (Clopper and
    Pearson 1934), found by halving an interval from below, so that rounding errs to the safe side; 0 for count = 0.
    Raises ValueError unless 0 <= count <= n, n >= 1 and 0 < alpha < 0.5.
    """
    _check(count, n)
    if n < 1 or not 0 < alpha < 0.5:
        raise ValueError(f"a bound needs n >= 1 trials and alpha between 0 and 0.5, got n={n}, alpha={alpha}")
    if count == 0:
        return 0.0
    # The median of Binomial(n, count / n) is count, so that the bound lies below count / n for alpha < 0.5; there,
    # terms further than 12 sqrt(n) beyond count add less than exp(-288) (Hoeffding).
    low, high = 0.0, count / n
    k, log_choose = _terms(count, min(n, count + int(12 * math.sqrt(n)) + 1), n)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _sum(k, log_choose, n, middle) <= alpha:
            low = middle
        else:
            high = middle
    return low


def clopper_pearson_upper(count: int, n: int, alpha: float) -> float:
    """The exact upper confidence bound of a proportion; see `clopper_pearson_lower`."""
    _check(count, n)
    return 1.0 - clopper_pearson_lower(n - count, n, alpha)


def _terms(first: int, last: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers first, ..., last and the logarithms of their binomial coefficients, float64."""
    k = torch.arange(first, last + 1, dtype=torch.float64)
    return k, math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def _sum(k: torch.Tensor, log_choose: torch.Tensor, n: int, p: float) -> float:
    """The sum of the binomial terms k, for 0 < p < 1."""
    return float((log_choose + k * math.log(p) + (n - k) * math.log1p(-p)).exp().sum())


def _check(count: int, n: int) -> None:
    if not 0 <= count <= n:
        raise ValueError(f"{count} of {n} trials cannot succeed; the count must lie in [0, {n}]")
