"""Objectives whose best attack is known in closed form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hsat.attacks import BIM, FFGSM, FGSM, L2, MIFGSM, PGD, Linf

seeds = st.integers(0, 10_000)
greys = st.sampled_from([1 / 255, 4 / 255, 8 / 255, 0.3, 1.0])


def problem(seed: int, dtype=torch.float64, *, margin: float = 0.0):
    generator = torch.Generator().manual_seed(seed)
    x = margin + (1 - 2 * margin) * torch.rand(3, 3, 4, 5, generator=generator, dtype=torch.float64)
    w = torch.randn(3, 3, 4, 5, generator=generator, dtype=torch.float64)
    return x.to(dtype), w.to(dtype), lambda v: (v * w.to(dtype)).sum((1, 2, 3))


@settings(max_examples=60, deadline=None)
@given(seeds, greys, st.sampled_from([torch.float32, torch.float64]))
def test_linf_attacks_reach_the_corner_of_a_linear_objective(seed, eps, dtype):
    x, w, objective = problem(seed, dtype)
    threat = Linf(eps)
    corner = threat.project(x + w.sign(), x)
    for attack in (
        PGD(threat, step_size=eps / 4, steps=9),
        PGD(threat, step_size=eps / 4, steps=9, restarts=2),
        BIM(threat, step_size=eps / 4, steps=5),
        MIFGSM(threat, step_size=eps / 4, steps=5),
        MIFGSM(threat, step_size=eps / 4, steps=9, random_start=True),
    ):
        assert torch.equal(attack(x, objective, generator=torch.Generator().manual_seed(seed)), corner), attack
    torch.testing.assert_close(FGSM(threat)(x, objective), corner, atol=1e-7, rtol=0)
    torch.testing.assert_close(BIM(threat, step_size=eps / 4, steps=4)(x, objective), corner, atol=1e-6, rtol=0)


@settings(max_examples=40, deadline=None)
@given(seeds, greys, st.sampled_from([torch.float32, torch.float64]))
def test_ffgsm_is_one_step_from_its_start(seed, eps, dtype):
    x, w, objective = problem(seed, dtype)
    threat = Linf(eps)
    start = threat.random_start(x, torch.Generator().manual_seed(seed))
    for attack, step in ((FFGSM(threat), 1.25 * eps), (FFGSM(threat, step_size=0.4 * eps), 0.4 * eps)):
        expected = threat.project(start + step * w.sign(), x)
        assert torch.equal(attack(x, objective, generator=torch.Generator().manual_seed(seed)), expected)


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(0.01, 0.2))
def test_l2_attacks_reach_the_optimum_away_from_the_box(seed, eps):
    x, w, objective = problem(seed, margin=0.3)
    optimum = x + eps * w / w.flatten(1).norm(dim=1)[:, None, None, None]
    for attack in (
        FGSM(L2(eps)),
        BIM(L2(eps), step_size=eps / 2, steps=3),
        MIFGSM(L2(eps), step_size=eps / 2, steps=3),
        PGD(L2(eps), step_size=2 * eps, steps=60),
    ):
        x_adv = attack(x, objective, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(x_adv, optimum, atol=1e-4, rtol=0)


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(0.5, 4))
def test_l2_attack_beats_shrink_then_clip_at_the_box(seed, eps):
    x, w, objective = problem(seed)
    x_adv = PGD(L2(eps), step_size=eps, steps=100)(x, objective, generator=torch.Generator().manual_seed(seed))
    naive = (x + eps * w / w.flatten(1).norm(dim=1)[:, None, None, None]).clamp(0, 1)
    assert (objective(x_adv) >= objective(naive) - 1e-3).all()


@settings(max_examples=40, deadline=None)
@given(seeds, greys, st.sampled_from([torch.float32, torch.float64]))
@example(4723, 8 / 255, torch.float64)
def test_a_linear_objective_never_falls(seed, eps, dtype):
    x, _, objective = problem(seed, dtype)
    for threat in (Linf(eps), L2(min(3.0, 10 * eps))):
        seen = []

        def watched(v, seen=seen, objective=objective):
            seen.append(objective(v).detach())
            return objective(v)

        for attack in (
            PGD(threat, step_size=threat.eps / 5, steps=8),
            BIM(threat, step_size=threat.eps / 5, steps=8),
            MIFGSM(threat, step_size=threat.eps / 5, steps=8),
        ):
            seen.clear()
            attack.run(x, watched, generator=torch.Generator().manual_seed(seed))
            values = torch.stack(seen).double()
            # L2 projects to a radius 1e-12 smaller, which costs |w| eps 1e-12 of a point that lay on the sphere itself
            slack = 1e-5 if dtype == torch.float32 else 1e-11
            assert (values[1:] - values[:-1] >= -slack * values.abs().max()).all(), attack


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_reach_the_corner_too(dtype):
    x, w, objective = problem(0, dtype)
    threat = Linf(8 / 255)
    x_adv = PGD(threat, step_size=2 / 255, steps=10)(x, objective, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x_adv, threat.project(x + w.sign(), x))


def test_pgd_and_bim_differ_by_the_start_only():
    x, _, _ = problem(0)
    objective = lambda v: (v * 3).sin().sum((1, 2, 3))
    numbers = {"step_size": 2 / 255, "steps": 4}
    seeded = lambda: torch.Generator().manual_seed(5)
    pgd, bim = PGD(Linf(8 / 255), **numbers), BIM(Linf(8 / 255), **numbers)
    assert not torch.equal(pgd(x, objective, generator=seeded()), bim(x, objective, generator=seeded()))
    random_bim = BIM(Linf(8 / 255), random_start=True, **numbers)
    assert torch.equal(pgd(x, objective, generator=seeded()), random_bim(x, objective, generator=seeded()))
    from_x = pgd(x, objective, start=x, generator=seeded())
    assert torch.equal(from_x, bim(x, objective))


def test_momentum_follows_its_equation():
    """Three steps written out, on an objective whose gradient changes sign."""
    x, w, _ = problem(1, margin=0.2)
    objective = lambda v: -((v - x - 0.03 * w.tanh()) * w).square().sum((1, 2, 3))
    y, m = x.clone(), torch.zeros_like(x)
    for _ in range(3):
        g = -2 * (y - x - 0.03 * w.tanh()) * w * w
        m = 0.7 * m + g / g.abs().mean((1, 2, 3), keepdim=True)
        y = Linf(0.05).project(y + 0.02 * m.sign(), x)
    x_adv = MIFGSM(Linf(0.05), step_size=0.02, steps=3, decay=0.7)(x, objective)
    torch.testing.assert_close(x_adv, y, atol=1e-12, rtol=0)
    plain = BIM(Linf(0.05), step_size=0.02, steps=3)(x, objective)
    assert not torch.equal(x_adv, plain)
