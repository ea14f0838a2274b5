"""Auto-PGD against its algorithm written out image by image, exact answers, and what it promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.attacks import APGD, BIM, L2, PGD, Linf, classification, feature_drift, hierarchical, margin
from hsat.attacks.apgd import checkpoint_steps
from hsat.losses import HiDiscLoss
from hsat.types import HierarchicalBatch

seeds = st.integers(0, 10_000)


def images(n: int = 3, *, seed: int = 0, low: float = 0.0):
    generator = torch.Generator().manual_seed(seed)
    return low + (1 - 2 * low) * torch.rand(n, 3, 4, 5, generator=generator, dtype=torch.float64)


def waves(seed: int = 1):
    """An objective with many hills, elementwise, so that batches of every size round alike."""
    w = 50 * torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda v: ((v * w).sin() * w.abs()).flatten(1).cumsum(1)[:, -1]


def paper(x, f, threat, *, steps, rho=0.75, alpha=0.75):
    """Algorithm 1 of arXiv:2003.01690 for one image (1, c, h, w), from the image itself; best point and value."""

    def gradient(y):
        y = y.clone().requires_grad_()
        return torch.autograd.grad(f(y).sum(), y)[0]

    p = [0, 22]
    while p[-1] < 100:
        p.append(p[-1] + max(p[-1] - p[-2] - 3, 6))
    w = sorted({math.ceil(q * steps / 100) for q in p if q * steps < 100 * steps})
    best, fmax = x, float(f(x))
    step_size, halved, fmax_before = 2 * threat.eps, False, fmax
    before, now, value, rises = None, x, fmax, {}
    for k in range(steps):
        z = threat.project(now + step_size * threat.steepest_ascent(gradient(now)), x)
        new = z if k == 0 else threat.project(now + alpha * (z - now) + (1 - alpha) * (now - before), x)
        rises[k] = float(f(new)) > value
        before, now, value = now, new, float(f(new))
        if value > fmax:
            best, fmax = now, value
        if k + 1 in w and k + 1 < steps:
            last = w[w.index(k + 1) - 1]
            condition1 = sum(rises[i] for i in range(last, k + 1)) < rho * (k + 1 - last)
            condition2 = not halved and fmax_before == fmax
            halved, fmax_before = condition1 or condition2, fmax
            if halved:
                step_size, now, value = step_size / 2, best, fmax
    return best, fmax


@pytest.mark.parametrize("threat", [Linf(0.1), L2(1.0)], ids=repr)
@pytest.mark.parametrize(("steps", "rho"), [(1, 0.75), (7, 0.75), (40, 0.75), (60, 0.0)])
def test_against_the_algorithm_image_by_image(threat, steps, rho):
    """With rho = 0 the second condition stands alone."""
    x = images(5)
    result = APGD(threat, steps=steps, random_start=False, rho=rho).run(x, waves())
    for i in range(5):
        best, value = paper(x[i : i + 1], waves(), threat, steps=steps, rho=rho)
        torch.testing.assert_close(result.x_adv[i : i + 1], best, atol=1e-12, rtol=0)
        assert float(result.value[i]) == pytest.approx(value, abs=1e-9)


def test_checkpoints_of_the_paper():
    assert checkpoint_steps(100) == {22: 0, 41: 22, 57: 41, 70: 57, 80: 70, 87: 80, 93: 87, 99: 93}
    assert list(checkpoint_steps(10)) == [3, 5, 6, 7, 8, 9]
    assert list(checkpoint_steps(1000))[:3] == [220, 410, 570]
    assert checkpoint_steps(1) == {}
    assert checkpoint_steps(2) == {1: 0}


@settings(max_examples=12, deadline=None)
@given(seeds, st.sampled_from([1 / 255, 8 / 255, 0.3, 1.0]))
def test_reaches_the_corner_of_a_linear_objective(seed, eps):
    x, w = images(seed=seed), images(seed=seed + 1) - 0.5
    objective = lambda v: (v * w).sum((1, 2, 3))
    for attack in (APGD(Linf(eps), steps=8), APGD(Linf(eps), steps=1, random_start=False)):
        x_adv = attack(x, objective, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(x_adv, Linf(eps).project(x + w.sign(), x))


@settings(max_examples=6, deadline=None)
@given(seeds, st.floats(0.01, 0.2))
def test_reaches_the_optimum_of_a_linear_objective_in_a_euclidean_ball(seed, eps):
    x, w = images(seed=seed, low=0.3), images(seed=seed + 1) - 0.5
    optimum = x + eps * w / w.flatten(1).norm(dim=1)[:, None, None, None]
    attack = APGD(L2(eps), steps=40)
    x_adv = attack(x, lambda v: (v * w).sum((1, 2, 3)), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(x_adv, optimum, atol=0.02 * eps, rtol=0)


def test_halving_reaches_a_ridge_that_pgd_jumps_over():
    """-|v - ridge| for every pixel: sign steps of a fixed size swing around the ridge for ever."""
    x = images(low=0.3)
    ridge = x + 0.01 * torch.linspace(-0.83, 0.79, 60, dtype=torch.float64).reshape(1, 3, 4, 5)
    objective = lambda v: -(v - ridge).abs().mean((1, 2, 3))
    pgd = PGD(Linf(0.1), step_size=0.025, steps=200, random_start=False).run(x, objective)
    halved = APGD(Linf(0.1), steps=200, random_start=False).run(x, objective)
    assert (pgd.value < -0.004).all(), "PGD was meant to swing here"
    assert (halved.value > -0.001).all()
    assert (halved.value > pgd.value / 10).all()


@settings(max_examples=12, deadline=None)
@given(seeds, st.integers(1, 12), st.sampled_from([Linf(0.1), L2(1.0)]))
def test_the_best_point_is_kept_and_its_value_is_told(seed, steps, threat):
    x, seen = images(seed=seed), []

    def watched(v):
        seen.append(waves()(v).detach())
        return waves()(v)

    result = APGD(threat, steps=steps).run(x, watched, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(result.value, torch.stack(seen).amax(0))
    assert torch.equal(result.value, waves()(result.x_adv))
    assert torch.equal(result.start_value, seen[0])
    assert len(seen) == result.forwards == steps + 1 == result.backwards + 1


def test_more_restarts_never_find_less():
    x, values = images(), []
    for restarts in (1, 2, 4):
        attack = APGD(Linf(0.1), steps=6, restarts=restarts)
        result = attack.run(x, waves(), generator=torch.Generator().manual_seed(0), ids=torch.arange(3))
        values.append(result.value)
        assert result.forwards == 7 * restarts
        assert result.backwards == 6 * restarts
    assert (values[0] <= values[1]).all()
    assert (values[1] <= values[2]).all()
    assert (values[2] > values[0]).any()


@pytest.mark.parametrize("threat", [Linf(0.1), Linf(torch.tensor([0.1, 0.02, 0.3, 0.0])), L2(1.0)], ids=repr)
def test_an_image_knows_nothing_of_the_others(threat):
    x = images(4)
    whole = APGD(threat, steps=15, random_start=False)(x, waves())
    for i in range(4):
        own = threat.select(torch.tensor([i]))
        alone = APGD(own, steps=15, random_start=False)(x[i : i + 1], waves())
        assert torch.equal(whole[i : i + 1], alone)


def test_a_scalar_objective_makes_the_batch_one_image():
    """The sum over the batch as a scalar moves all images as their concatenation would be moved."""
    x = images(2)
    result = APGD(Linf(0.1), steps=20, random_start=False).run(x, lambda v: waves()(v).sum())
    wide = torch.cat(list(x), dim=1)[None]
    joined = lambda v: waves()(torch.cat([v[:, :, :4], v[:, :, 4:]])).sum()[None]
    expected = APGD(Linf(0.1), steps=20, random_start=False).run(wide, joined)
    assert result.value.shape == ()
    assert torch.equal(torch.cat(list(result.x_adv), dim=1), expected.x_adv[0])
    torch.testing.assert_close(result.value, expected.value[0])
    single = APGD(Linf(0.1), steps=20, random_start=False).run(x, waves())
    assert float(single.value.sum()) >= float(result.value), "image by image it climbs at least as far"


def test_the_hierarchical_loss_climbs_further_than_with_pgd_at_equal_cost():
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(288, 8)
    )
    batch = HierarchicalBatch.from_grid(torch.rand(2, 2, 2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    objective = hierarchical(encoder.eval(), HiDiscLoss(), batch)
    seeded = lambda: torch.Generator().manual_seed(2)
    found = APGD(Linf(8 / 255), steps=12).run(batch.images, objective, generator=seeded())
    plain = PGD(Linf(8 / 255), step_size=2 / 255, steps=12).run(batch.images, objective, generator=seeded())
    assert float(found.value) > float(found.start_value)
    assert float(found.value) > float(plain.value) - 0.02
    assert float(objective(found.x_adv).detach()) == pytest.approx(float(found.value), abs=1e-6)


def test_images_stop_where_they_succeed_and_the_others_climb_on():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(60, 4)).double().eval()
    x = images(12)
    labels = model(x).argmax(1)
    labels[0] = (labels[0] + 1) % 4  # misclassified from the start
    calls = []

    def broken(v):
        calls.append(v.clone())
        return model(v).argmax(1) != labels

    attack = APGD(Linf(0.08), steps=10, random_start=False)
    narrow = margin(model, labels)
    for objective in (narrow, narrow.__call__):  # one that can be narrowed to the images that stand, one not
        calls.clear()
        result = attack.run(x, objective, success=broken)
        assert 2 <= int(result.success.sum()) < 12, "the problem should leave some of both"
        assert torch.equal(result.success, model(result.x_adv).argmax(1) != labels)
        assert torch.equal(result.x_adv[0], x[0])
        assert torch.equal(result.value, margin(model, labels)(result.x_adv).detach())
        for i in result.success.nonzero().flatten().tolist():
            first = next(v[i] for v in calls if model(v[i : i + 1]).argmax(1) != labels[i])
            assert torch.equal(result.x_adv[i], first)
        plain = attack.run(x, objective)
        assert torch.equal(result.x_adv[~result.success], plain.x_adv[~result.success])


def test_drift_starts_at_a_random_point_and_beats_bim():
    torch.manual_seed(0)
    encode = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Flatten()).double().eval()
    x = images(6)
    drift = feature_drift(encode, x)
    found = APGD(Linf(8 / 255), steps=20, random_start=False).run(x, drift, generator=torch.Generator().manual_seed(1))
    bim = BIM(Linf(8 / 255), step_size=2 / 255, steps=20).run(x, drift, generator=torch.Generator().manual_seed(1))
    assert found.stationary.all()
    assert (found.value >= bim.value * 0.95).all()
    assert found.value.mean() >= bim.value.mean()


def test_images_without_a_gradient_stay_and_are_counted():
    x = images(3)
    alive = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    objective = lambda v: waves()(v) * alive
    start = Linf(0.1).random_start(x, torch.Generator().manual_seed(4))
    result = APGD(Linf(0.1), steps=9).run(x, objective, start=start)
    assert result.zero_gradient.tolist() == [0, 9, 0]
    assert torch.equal(result.x_adv[1], start[1])
    assert (result.value > result.start_value)[[0, 2]].all()
    moved = APGD(Linf(0.1), steps=9, random_start=False).run(x, objective, generator=torch.Generator().manual_seed(4))
    assert moved.stationary.tolist() == [False, True, False]


def test_half_precision_images_and_empty_batches():
    x = images(2).to(torch.bfloat16)
    result = APGD(Linf(0.1), steps=6).run(x, waves(), generator=torch.Generator().manual_seed(0))
    assert result.x_adv.dtype == torch.bfloat16
    assert torch.equal(result.value, waves()(result.x_adv))
    assert len(APGD(Linf(0.1), steps=3)(x[:0], waves())) == 0
    nothing = APGD(Linf(0.1), steps=3).run(x[:0], lambda v: v.sum())
    assert nothing.value.shape == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number >= 1, got 0"),
        ({"steps": 5, "restarts": True}, "restarts must be a whole number >= 1, got True"),
        ({"steps": 5, "rho": 1.5}, r"rho must be a finite number in \[0, 1\], got 1.5"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        APGD(Linf(0.1), **options)


def test_the_threat_model_comes_first():
    with pytest.raises(TypeError, match="threat must be a threat model"):
        APGD(0.1, steps=5)
    with pytest.raises(ValueError, match="so the objective must return one value per image"):
        x = images(2)
        APGD(Linf(0.1), steps=5)(x, lambda v: v.sum(), success=lambda v: v.sum((1, 2, 3)) > 1e9)


def test_cross_entropy_of_a_classifier_falls_apart_image_by_image():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(60, 20), torch.nn.Tanh(), torch.nn.Linear(20, 4))
    model = model.double().eval()
    x = images(10)
    labels = model(x).argmax(1)
    objective = classification(model, labels)
    found = APGD(Linf(0.1), steps=20).run(x, objective, generator=torch.Generator().manual_seed(0))
    plain = PGD(Linf(0.1), step_size=0.025, steps=20).run(x, objective, generator=torch.Generator().manual_seed(0))
    assert float(found.value.detach().mean()) >= float(plain.value.detach().mean()) - 1e-6
