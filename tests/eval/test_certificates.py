"""Radii of patches and groups against known answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.eval.certificates import ABSTAIN, group_radius, patch_radius
from hsat.eval.confidence import binomial_tail, clopper_pearson_lower

scipy_stats = pytest.importorskip("scipy.stats")
NORMAL = scipy_stats.norm


def test_radius_of_counts_known_by_hand():
    """p_A from all of 100 draws is alpha^(1/100); half of them is no majority; the choice comes from other draws."""
    selected = np.array([[9, 1, 0], [9, 1, 0], [1, 9, 0]])
    counts = np.array([[100, 0, 0], [50, 50, 0], [100, 0, 0]])
    prediction, radius = patch_radius(selected, counts, sigma=0.5, alpha=0.001)
    assert prediction.tolist() == [0, ABSTAIN, ABSTAIN]
    np.testing.assert_allclose(radius, [0.5 * NORMAL.ppf(0.001**0.01), 0, 0], atol=1e-9)


def test_certificates_fail_no_more_often_than_they_say():
    """From exact binomial counts at p = 0.6, the radius exceeds the true one with a probability of at most alpha."""
    rng, alpha, p = np.random.default_rng(0), 0.05, 0.6
    counts = rng.binomial(200, p, size=4000)
    _, radius = patch_radius(np.tile([1, 0], (4000, 1)), np.stack((counts, 200 - counts), 1), sigma=1.0, alpha=alpha)
    failures = int((radius > NORMAL.ppf(p)).sum())
    assert 0 < failures and binomial_tail(failures, 4000, alpha) > 0.001


@pytest.mark.parametrize("pooling", ["mean", "vote"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_group_certificates_are_sound(pooling, data):
    """With bounds that hold, no allowed shift of the patches' probabilities changes the decision inside the radius.

    The probabilities are drawn inside the confidence bounds, the attack is the worst that the lemma allows: the
    decision's class falls, one rival rises.
    """
    m, classes, n, sigma = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 4)), 200, 0.5
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    truth = rng.dirichlet(np.r_[4.0, np.full(classes - 1, 0.4)], size=m)
    counts = np.array([rng.multinomial(n, row) for row in truth])
    share = counts / n  # lies inside its own bounds
    winner, radius = group_radius(counts, counts, sigma=sigma, alpha=0.01, pooling=pooling)
    if winner == ABSTAIN:
        assert radius == 0
        return
    for rival in set(range(classes)) - {winner}:
        for step in (0.0, 0.5, 1.0):
            shift = step * radius / sigma
            own = NORMAL.cdf(NORMAL.ppf(share[:, winner]) - shift)
            other = np.minimum(NORMAL.cdf(NORMAL.ppf(share[:, rival]) + shift), 1 - own)
            if pooling == "mean":
                assert own.mean() > other.mean()
            else:  # a patch whose own class may fall to one half may vote for the rival
                assert (own > 0.5).sum() > (own <= 0.5).sum()


def test_votes_of_patches_by_hand():
    """Three certified patches for class 0 and two lost ones: the majority ends where the first of the three goes."""
    full, half = [1000, 0, 0], [500, 500, 0]
    counts = np.array([full, full, [990, 10, 0], half, half])
    winner, radius = group_radius(counts, counts, sigma=1.0, alpha=0.001, pooling="vote")
    expected = NORMAL.ppf(clopper_pearson_lower(990, 1000, 0.001 / 5))
    assert winner == 0 and radius == pytest.approx(expected, abs=1e-9)
    assert group_radius(counts[:4], counts[:4], sigma=1.0, alpha=0.001, pooling="vote")[0] == 0
    assert group_radius(counts[2:], counts[2:], sigma=1.0, alpha=0.001, pooling="vote") == (ABSTAIN, 0.0)
    with pytest.raises(ValueError, match="unknown pooling 'paper'"):
        group_radius(counts, counts, sigma=1.0, alpha=0.001, pooling="paper")
    with pytest.raises(ValueError, match="at least two classes"):
        group_radius(counts[:, :1], counts[:, :1], sigma=1.0, alpha=0.001, pooling="mean")


def test_a_single_patch_and_its_mean_by_hand():
    """One patch, two classes: bounds at alpha / 2 each, and the margin l - (1 - l) ends at l = 1/2."""
    counts = np.array([[90, 10]])
    winner, radius = group_radius(counts, counts, sigma=0.3, alpha=0.01, pooling="mean")
    assert winner == 0
    assert radius == pytest.approx(0.3 * NORMAL.ppf(clopper_pearson_lower(90, 100, 0.005)), abs=1e-9)
