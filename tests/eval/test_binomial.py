"""Tails and bounds of the binomial distribution are those of scipy."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.eval.statistics.binomial import binomial_tail, clopper_pearson_lower, clopper_pearson_upper

scipy_stats = pytest.importorskip("scipy.stats")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.floats(0, 1), st.floats(1e-7, 0.4), st.floats(0, 1))
def test_tails_and_bounds_are_those_of_scipy(n, share, alpha, p):
    count = round(share * n)
    assert binomial_tail(count, n, p) == pytest.approx(scipy_stats.binom.sf(count - 1, n, p), rel=1e-8, abs=1e-300)
    low, high = clopper_pearson_lower(count, n, alpha), clopper_pearson_upper(count, n, alpha)
    exact = scipy_stats.beta.ppf(alpha, count, n - count + 1) if count else 0.0
    assert low == pytest.approx(exact, abs=1e-10) and low <= count / n <= high
    assert high == pytest.approx(scipy_stats.beta.isf(alpha, count + 1, n - count) if count < n else 1.0, abs=1e-10)
    if count:
        assert binomial_tail(count, n, low) <= alpha * (1 + 1e-9), "never above the bound"


def test_bounds_of_all_and_of_many():
    assert clopper_pearson_lower(1000, 1000, 0.001) == pytest.approx(0.001 ** (1 / 1000), abs=1e-12)
    expected = scipy_stats.beta.ppf(1e-6, 99_000, 1001)
    assert clopper_pearson_lower(99_000, 100_000, 1e-6) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(("count", "n", "alpha"), [(-1, 5, 0.1), (6, 5, 0.1), (0, 0, 0.1), (1, 5, 0.0), (1, 5, 0.5)])
def test_bad_bounds_are_refused(count, n, alpha):
    with pytest.raises(ValueError, match=r"must lie in|a bound needs"):
        clopper_pearson_lower(count, n, alpha)
    with pytest.raises(ValueError, match="p is a probability"):
        binomial_tail(1, 5, 1.5)
