"""The safeguard against attacks of one step that have stopped to work."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hsat.attacks import FFGSM, NFGSM, PGD, Linf, RandomNoise
from hsat.losses import HiDiscLoss
from hsat.training import LossGap, OverfittingGuard
from hsat.types import HierarchicalBatch

EPS = 8 / 255
BALL = Linf(EPS)
STRONG = PGD(BALL, step_size=2 / 255, steps=5)


def images(n: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))


def weights() -> Tensor:
    return torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(9))


def linear(w: Tensor, v: Tensor) -> Tensor:
    return (v * w).flatten(1).sum(1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: OverfittingGuard(FFGSM(BALL), STRONG, check_every=0), ValueError, "every must be a whole number"),
        (
            lambda: OverfittingGuard(FFGSM(BALL), STRONG, min_share=1.5),
            ValueError,
            r"min_share must lie in \[0, 1\]",
        ),
    ],
)
def test_bad_settings_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_share_of_the_rise():
    assert LossGap(1.0, 2.0, 3.0).share == 0.5
    assert LossGap(1.0, 0.5, 3.0).share == -0.25
    assert LossGap(1.0, 0.5, 1.0).share == 1.0, "where the strong attack finds nothing there is nothing to miss"


def test_the_fallback_follows_the_last_check():
    fast = FFGSM(BALL)
    guard = OverfittingGuard(fast, STRONG, check_every=7, min_share=0.5)
    assert [step for step in range(20) if guard.is_due(step)] == [0, 7, 14]
    assert guard.choose_attack(None) is fast
    assert guard.choose_attack(LossGap(0.0, 0.6, 1.0)) is fast
    assert guard.choose_attack(LossGap(0.0, 0.4, 1.0)) is STRONG


class Rippled(nn.Module):
    """Embeddings whose gradient at noise-sized distance points anywhere, as after catastrophic overfitting."""

    def __init__(self, height: float) -> None:
        super().__init__()
        self.height = nn.Parameter(torch.tensor(height, dtype=torch.float64))
        self.norm = nn.BatchNorm2d(3).double()

    def forward(self, x: Tensor) -> Tensor:
        slope = weights().double()
        ripples = self.height * torch.sin(x * 255 * 3.1)
        return ((x * slope + ripples * slope).flatten(1).sum(1, keepdim=True) * 0.1).tanh()


def total(z: Tensor, batch: HierarchicalBatch) -> Tensor:
    return z.sum()


def batch_of(x: Tensor) -> HierarchicalBatch:
    ids = torch.arange(len(x))
    return HierarchicalBatch(x, ids, ids, ids)


@pytest.mark.parametrize(("height", "trusted"), [(0.0, True), (0.05, False)])
def test_a_smooth_loss_is_trusted_and_a_rippled_one_is_not(height, trusted):
    """Small steps see the slope of a linear loss as well as one step does; between ripples one step is a lottery."""
    model = Rippled(height).train()
    batch = batch_of((0.3 + 0.4 * images(8)).double())
    guard = OverfittingGuard(FFGSM(BALL), PGD(BALL, step_size=0.5 / 255, steps=40), min_share=0.8)
    gap = guard.measure(model, total, batch, generator=torch.Generator().manual_seed(0))
    assert gap.strong > gap.clean
    assert (gap.share > 0.8) == trusted, gap
    if trusted:  # of a linear loss: the mean of min(u + 1.25, 1) for u uniform in [-1, 1]
        assert gap.share == pytest.approx(1 - 0.75**2 / 4, abs=0.03)
    assert isinstance(guard.choose_attack(gap), FFGSM if trusted else PGD)


def test_measuring_leaves_the_model_alone_and_projects_the_fast_attack():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 8)).train()
    before = copy.deepcopy(model.state_dict())
    batch = HierarchicalBatch.from_grid(torch.rand(2, 2, 2, 2, 3, 5, 5, generator=torch.Generator().manual_seed(0)))
    far = RandomNoise(Linf(0.9))
    near = {
        name: OverfittingGuard(attack, STRONG).measure(model, HiDiscLoss(), batch)
        for name, attack in (("zero", RandomNoise(Linf(0.0))), ("far", far))
    }
    assert near["zero"].fast == near["zero"].clean == near["far"].clean
    seen = []
    spy = OverfittingGuard(far, STRONG).measure(model, lambda z, b: seen.append(z) or z.sum(), batch)
    assert spy.strong > spy.clean
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_fast_attack_that_leaves_the_ball_is_measured_inside_it():
    w = weights().double()
    model = nn.Flatten()
    batch = batch_of((0.3 + 0.4 * images(4)).double())
    guard = OverfittingGuard(NFGSM(BALL, noise=0.0, step_size=10 * EPS), PGD(BALL, step_size=EPS, steps=3))
    gap = guard.measure(model.train(), lambda z, _: (z * w.flatten()).sum(), batch)
    assert gap.share == pytest.approx(1.0, abs=1e-9)
