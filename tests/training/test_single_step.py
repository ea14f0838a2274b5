"""N-FGSM as its paper writes it, and the safeguard against attacks of one step that have stopped to work."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hsat.attacks import FFGSM, L2, PGD, Linf, RandomNoise
from hsat.losses import HiDiscLoss
from hsat.training import NFGSM, Gap, Safeguard
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


def test_nfgsm_is_noise_plus_a_step_without_clipping_to_the_ball():
    """x + eta + eps * sign(gradient), eta uniform in 2 eps: known exactly for a linear objective."""
    x, w = 0.3 + 0.4 * images(), weights()
    x_adv = NFGSM(BALL)(x, partial(linear, w), generator=torch.Generator().manual_seed(1))
    eta = x_adv - x - EPS * w.sign()
    assert eta.abs().max() <= 2 * EPS + 1e-6
    assert eta.abs().mean() == pytest.approx(EPS, rel=0.15), "a uniform draw in [-2 eps, 2 eps]"
    assert (x_adv - x).abs().max() > EPS, "clipped to the ball"


def test_the_gradient_is_read_at_the_noisy_images():
    x, seen = images(), []

    def objective(v: Tensor) -> Tensor:
        seen.append(v.detach().clone())
        return v.square().flatten(1).sum(1)

    x_adv = NFGSM(BALL, step_size=EPS / 2)(x, objective, generator=torch.Generator().manual_seed(1))
    (start,) = seen
    expected = (start + EPS / 2 * start.sign()).clamp(0, 1)
    torch.testing.assert_close(x_adv, expected)


@settings(max_examples=12, deadline=None)
@given(eps=st.floats(0, 0.5), noise=st.floats(0, 3), seed=st.integers(0, 99))
def test_reach_holds_exactly_and_the_seed_decides(eps, noise, seed):
    attack, x = NFGSM(Linf(eps), noise=noise), images(seed=seed)
    first, again = (attack(x, partial(linear, weights()), generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert ((first.double() - x.double()).abs() <= attack.reach.eps).all()
    assert first.min() >= 0 and first.max() <= 1


def test_noise_by_id_does_not_depend_on_the_batch():
    x, ids = images(), torch.tensor([5, 6, 7, 8])
    call = partial(NFGSM(BALL), objective=partial(linear, weights()))
    whole = call(x, generator=torch.Generator().manual_seed(0), ids=ids)
    part = call(x[1:3], generator=torch.Generator().manual_seed(0), ids=ids[1:3])
    assert torch.equal(whole[1:3], part)


def test_run_gives_the_same_images_and_start_replaces_the_noise():
    x, objective = images(), partial(linear, weights())
    attack = NFGSM(BALL)
    result = attack.run(x, objective, generator=torch.Generator().manual_seed(1))
    assert torch.equal(result.x_adv, attack(x, objective, generator=torch.Generator().manual_seed(1)))
    assert (result.value > result.start_value).all()
    torch.testing.assert_close(attack(x, objective, start=x), (x + EPS * weights().sign()).clamp(0, 1))


def test_the_repr_is_the_setting():
    assert eval(repr(NFGSM(BALL, noise=1.0))) == NFGSM(BALL, noise=1.0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NFGSM(L2(1.0)), TypeError, "defined for Linf balls, got L2"),
        (lambda: NFGSM(Linf(torch.tensor([0.1]))), TypeError, r"one eps for all images, such as Linf\(8/255\)"),
        (lambda: NFGSM(BALL, noise=-1.0), ValueError, "noise must be a finite number >= 0, got -1.0"),
        (lambda: NFGSM(BALL, step_size=float("nan")), ValueError, "step_size must be a finite number >= 0, got nan"),
        (lambda: Safeguard(FFGSM(BALL), STRONG, every=0), ValueError, "every must be a whole number of steps"),
        (lambda: Safeguard(FFGSM(BALL), STRONG, least=1.5), ValueError, r"least is a share and must lie in \[0, 1\]"),
    ],
)
def test_bad_settings_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_images_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        NFGSM(BALL)(images() * 255, partial(linear, weights()))


def test_share_of_the_rise():
    assert Gap(1.0, 2.0, 3.0).share == 0.5
    assert Gap(1.0, 0.5, 3.0).share == -0.25
    assert Gap(1.0, 0.5, 1.0).share == 1.0, "where the strong attack finds nothing there is nothing to miss"


def test_the_fallback_follows_the_last_check():
    fast = FFGSM(BALL)
    guard = Safeguard(fast, STRONG, every=7, least=0.5)
    assert [step for step in range(20) if guard.due(step)] == [0, 7, 14]
    assert guard.attack(None) is fast
    assert guard.attack(Gap(0.0, 0.6, 1.0)) is fast
    assert guard.attack(Gap(0.0, 0.4, 1.0)) is STRONG


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
    guard = Safeguard(FFGSM(BALL), PGD(BALL, step_size=0.5 / 255, steps=40), least=0.8)
    gap = guard.measure(model, total, batch, generator=torch.Generator().manual_seed(0))
    assert gap.strong > gap.clean
    assert (gap.share > 0.8) == trusted, gap
    if trusted:  # of a linear loss: the mean of min(u + 1.25, 1) for u uniform in [-1, 1]
        assert gap.share == pytest.approx(1 - 0.75**2 / 4, abs=0.03)
    assert isinstance(guard.attack(gap), FFGSM if trusted else PGD)


def test_measuring_leaves_the_model_alone_and_projects_the_fast_attack():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 8)).train()
    before = copy.deepcopy(model.state_dict())
    batch = HierarchicalBatch.from_grid(torch.rand(2, 2, 2, 2, 3, 5, 5, generator=torch.Generator().manual_seed(0)))
    far = RandomNoise(Linf(0.9))
    near = {
        name: Safeguard(attack, STRONG).measure(model, HiDiscLoss(), batch)
        for name, attack in (("zero", RandomNoise(Linf(0.0))), ("far", far))
    }
    assert near["zero"].fast == near["zero"].clean == near["far"].clean
    seen = []
    spy = Safeguard(far, STRONG).measure(model, lambda z, b: seen.append(z) or z.sum(), batch)
    assert spy.strong > spy.clean
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_fast_attack_that_leaves_the_ball_is_measured_inside_it():
    w = weights().double()
    model = nn.Flatten()
    batch = batch_of((0.3 + 0.4 * images(4)).double())
    guard = Safeguard(NFGSM(BALL, noise=0.0, step_size=10 * EPS), PGD(BALL, step_size=EPS, steps=3))
    gap = guard.measure(model.train(), lambda z, _: (z * w.flatten()).sum(), batch)
    assert gap.share == pytest.approx(1.0, abs=1e-9)
