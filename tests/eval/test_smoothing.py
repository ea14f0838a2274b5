"""Noise of each draw, and votes under it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hsat.eval import Smoothing
from hsat.eval.smoothing import count_votes, gaussian_noise

scipy_stats = pytest.importorskip("scipy.stats")


def test_noise_is_of_the_draw_and_votes_are_counted_once(half_space):
    """Counts equal a loop over images and draws, whatever the chunk; rows sum to the draws."""
    encoder = half_space.encoder
    images, patch = encoder.at(half_space.distance[:6] / 5), torch.arange(6) + 7
    expected = np.zeros((6, 2), dtype=int)
    for row in range(6):
        for draw in range(3, 20):
            noise = gaussian_noise((3, 4, 4), int(patch[row]), range(draw, draw + 1), sigma=0.5, seed=2)
            expected[row, int(encoder.side(images[row : row + 1] + noise)[0] < 0)] += 1
    assert len(np.unique(expected[:, 0])) > 1
    for chunk in (1, 4, 17, 50, 1000):
        widths = []

        def vote(noisy, widths=widths):
            widths.append(len(noisy))
            return (encoder.side(noisy) < 0).long().numpy()

        found = count_votes(vote, images, patch, classes=2, draws=range(3, 20), sigma=0.5, seed=2, chunk=chunk)
        np.testing.assert_array_equal(found, expected)
        assert max(widths) <= chunk and sum(widths) == 6 * 17


def test_noise_is_gaussian_and_not_clipped():
    noise = gaussian_noise((3, 8, 8), 5, range(200), sigma=0.5, seed=0)
    assert scipy_stats.kstest(noise.flatten().numpy() / 0.5, "norm").pvalue > 0.01
    assert not torch.equal(noise, gaussian_noise((3, 8, 8), 5, range(200), sigma=0.5, seed=1))
    assert torch.equal(noise[40:], gaussian_noise((3, 8, 8), 5, range(40, 200), sigma=0.5, seed=0))
    seen = []
    count_votes(
        lambda v: seen.append(v) or np.zeros(len(v), dtype=int),
        torch.ones(1, 3, 8, 8),
        torch.tensor([5]),
        classes=2,
        draws=range(200),
        sigma=0.5,
        seed=0,
        chunk=64,
    )
    assert torch.equal(torch.cat(seen), 1 + noise)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "sigma must be above 0"),
        ({"sigma": math.nan}, "sigma must be above 0"),
        ({"sigma": 0.1, "samples": 0}, "samples must be a whole number of at least 1"),
        ({"sigma": 0.1, "alpha": 0.7}, "alpha must lie between 0 and 0.5"),
    ],
)
def test_bad_smoothing(options, message):
    with pytest.raises(ValueError, match=message):
        Smoothing(**options)
