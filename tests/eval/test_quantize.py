"""Whole counts inside the ball: nearest for Linf, feasible for everything else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.attacks import L2, Linf, Masked, RandomNoise
from hsat.eval.quantize import PNG_GRID, TIFF_GRID, quantize_in_ball
from hsat.types import ThreatModel

seeds = st.integers(0, 10_000)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def on_grid(seed, grid, shape=(2, 3, 5, 4)):
    counts = torch.randint(-20, grid.top + 21, shape, generator=generator(seed)).clamp(0, grid.top)
    return grid.values(counts)


@settings(max_examples=80, deadline=None)
@given(
    seeds, st.sampled_from([PNG_GRID, TIFF_GRID]), st.sampled_from([0.0, 1 / 255, 4 / 255, 8 / 255, 0.03, 1.0, 1e-5])
)
def test_linf_counts_are_the_nearest_feasible_ones(seed, grid, eps):
    x = on_grid(seed, grid)
    x_adv = Linf(eps).project(x + 2 * eps * torch.randn(x.shape, generator=generator(seed + 1)), x)
    counts, origin = quantize_in_ball(x_adv, x, Linf(eps), grid), grid.counts(x)
    reach = eps * grid.scale * (1 + 1e-8)
    assert (counts - origin).abs().max() <= reach
    assert 0 <= counts.min() and counts.max() <= grid.top
    aim = x_adv.double() * grid.scale
    for step in (-1, 1):  # no neighbouring feasible count is nearer
        other = counts + step
        feasible = ((other - origin).abs() <= reach) & (other >= 0) & (other <= grid.top)
        assert ((other - aim).abs() >= (counts - aim).abs() - 1e-9)[feasible].all()


def test_eight_grey_levels_are_eight_counts():
    """Half of the float32 differences of 8 counts exceed 8/255 by a rounding; none of them is given away."""
    x = torch.arange(0, 248).float().view(1, 1, 8, 31) / 255
    x_adv = Linf(8 / 255).project(x + 1, x)
    moved = quantize_in_ball(x_adv, x, Linf(8 / 255), PNG_GRID) - PNG_GRID.counts(x)
    assert (moved == 8).all()
    per_channel = Linf(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1) / 255)
    wide = torch.full((1, 2, 2, 2), 100 / 255)
    moved = quantize_in_ball(per_channel.project(wide + 1, wide), wide, per_channel, PNG_GRID) - 100
    assert moved[0, :, 0, 0].tolist() == [1, 2]


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from([0.0, 0.004, 0.02, 0.3, 2.0]))
def test_l2_counts_lie_in_the_ball_and_use_it(seed, eps):
    x = on_grid(seed, PNG_GRID)
    threat = L2(eps)
    x_adv = threat.project(x + torch.randn(x.shape, generator=generator(seed + 1)), x)
    gap = (quantize_in_ball(x_adv, x, threat, PNG_GRID) - PNG_GRID.counts(x)).double() / 255
    norms = gap.flatten(1).norm(dim=1)
    assert norms.max() <= eps * (1 + 1e-8)
    if eps == 0.3:
        assert norms.min() > 0.25, "the budget is not given away"


@pytest.mark.parametrize("seed", range(4))
def test_small_l2_perturbations_are_not_rounded_away(seed):
    """Most pixels move by less than a count: towards x all of them would vanish."""
    x = on_grid(seed, PNG_GRID, (2, 3, 40, 40)).clamp(0.2, 0.8)
    moved = x + 0.5 / 255 * torch.randn(x.shape, generator=generator(seed + 1))
    threat = L2(float((moved - x).flatten(1).norm(dim=1).min()))
    gap = (quantize_in_ball(threat.project(moved, x), x, threat, PNG_GRID) - PNG_GRID.counts(x)).double() / 255
    norms = gap.flatten(1).norm(dim=1)
    assert (norms <= threat.eps * (1 + 1e-8)).all()
    assert (norms > 0.95 * threat.eps).all()


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from([Linf(4 / 255), L2(0.2)]))
def test_masks_hold_on_the_grid(seed, inner):
    mask = torch.rand(5, 4, generator=generator(seed)) < 0.5
    x, threat = on_grid(seed, PNG_GRID), Masked(inner, mask)
    x_adv = RandomNoise(threat)(x, torch.sum, generator=generator(seed))
    counts = quantize_in_ball(x_adv, x, threat, PNG_GRID)
    assert torch.equal(counts[..., ~mask], PNG_GRID.counts(x)[..., ~mask])


def test_a_small_perturbation_rounds_to_none_and_grids_refuse_what_is_not_on_them():
    x = on_grid(0, PNG_GRID)
    assert torch.equal(quantize_in_ball((x + 0.4 / 255).clamp(max=1), x, Linf(1 / 255), PNG_GRID), PNG_GRID.counts(x))
    assert torch.equal(TIFF_GRID.values(TIFF_GRID.counts(on_grid(1, TIFF_GRID))), on_grid(1, TIFF_GRID))
    with pytest.raises(ValueError, match=r"8-bit PNG.*own size"):
        quantize_in_ball(x, x + 1e-4, Linf(1 / 255), PNG_GRID)


def test_a_threat_model_of_ones_own():
    class Up(ThreatModel):
        """May only brighten, by at most eps."""

        eps = 2 / 255

        def random_start(self, x, generator=None):
            return x

        def steepest_ascent(self, grad):
            return grad.clamp(min=0)

        def project(self, x_adv, x):
            return torch.minimum(torch.maximum(x_adv, x), (x + self.eps * (1 + 1e-9)).clamp(max=1))

    x = torch.full((1, 1, 2, 2), 0.2)
    x_adv = x + torch.tensor([[[[0.0, 0.6], [1.4, 2.0]]]]) / 255
    assert (quantize_in_ball(x_adv, x, Up(), PNG_GRID) - 51).flatten().tolist() == [0, 1, 1, 2]


def test_the_largest_l2_ball_is_the_whole_range():
    """eps may be the diagonal of the pixel range, which is not to be widened: black becomes white."""
    x = torch.zeros(2, 3, 4, 4)
    for eps in (48**0.5, torch.full((2,), 48**0.5, dtype=torch.float64)):
        assert (quantize_in_ball(torch.ones_like(x), x, L2(eps), PNG_GRID) == 255).all()
