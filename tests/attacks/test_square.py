"""The Square attack: its algorithms written out for one image, exact answers, and no gradient anywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.attacks import L2, Linf, Masked, RandomNoise, Square, feature_drift, margin
from hsat.attacks.square import bump, bump_grid, count_bumps, move_mass, random_square, square_area, square_side
from hsat.testing import check_feasible

seeded = lambda seed=0: torch.Generator().manual_seed(seed)


def images(n: int = 3, h: int = 10, w: int = 10, *, low: float = 0.0, dtype=torch.float64):
    return (low + (1 - 2 * low) * torch.rand(n, 3, h, w, generator=seeded(), dtype=torch.float64)).to(dtype)


def linear(x):
    w = torch.randn(x[0].shape, generator=seeded(1), dtype=torch.float64)
    return lambda v: (v * w).sum((1, 2, 3)).detach()


def test_the_schedule_halves_at_the_papers_queries():
    areas = [square_area(q, 10_000, 0.8) for q in range(10_000)]
    changes = [q for q in range(1, 10_000) if areas[q] != areas[q - 1]]
    assert changes == [11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]
    assert areas[0] == 0.8 and areas[-1] == 0.8 / 512
    assert [square_area(q, 100, 0.8) for q in range(100)] == areas[::100]


def test_sides():
    assert square_side(0.05, 224, 224, bumps=False) == 50
    assert square_side(0.05, 224, 224, bumps=True) == 51
    assert square_side(1e-9, 10, 10, bumps=False) == 1
    assert square_side(1e-9, 10, 10, bumps=True) == 3
    assert square_side(1.0, 4, 9, bumps=False) == 4


def test_squares_reach_every_place_and_hold_one_sign_per_channel():
    like = torch.zeros(3000, 2, 4, 5)
    drawn = random_square(torch.rand(3000, 4, generator=seeded()), like, 3)
    places = set()
    for image in drawn:
        rows, columns = (image[0] != 0).any(1).nonzero().flatten(), (image[0] != 0).any(0).nonzero().flatten()
        top, left = int(rows[0]), int(columns[0])
        places.add((top, left))
        inside = image[:, top : top + 3, left : left + 3]
        assert (inside == inside[:, :1, :1]).all() and int((image != 0).sum()) == 2 * 9
        assert (inside.abs() == 1).all()
    assert places == {(top, left) for top in range(2) for left in range(3)}


def eta(h1, h2):
    """Eq. 2 with its sum as loops; M is the number of further squares that cover a pixel."""
    n = max(h1, h2) // 2
    result = torch.zeros(h1, h2, dtype=torch.float64)
    for r in range(h1):
        for s in range(h2):
            reach = n - max(abs(r - h1 // 2), abs(s - h2 // 2))
            result[r, s] = sum(1 / (n + 1 - k) ** 2 for k in range(reach + 1))
    return result / result.norm()


@pytest.mark.parametrize("side", [2, 3, 5, 8, 11])
def test_the_bump_is_that_of_the_paper(side):
    half = side // 2
    expected = torch.cat([eta(half, side), -eta(side - half, side)])
    torch.testing.assert_close(bump(side), expected / expected.norm())


@pytest.mark.parametrize("shape", [(10, 10), (7, 12), (3, 3), (1, 4)])
def test_the_first_grid_is_centred_and_full_of_bumps(shape):
    h, w = shape
    u = torch.rand(2, 3, count_bumps(h, w), generator=seeded())
    grid = bump_grid(u, torch.zeros(2, 3, h, w, dtype=torch.float64))
    side = max(min(h, w) // 5, 1)
    top, left = (h % side) // 2, (w % side) // 2
    tile = grid[:, :, top : top + side, left : left + side]
    sign = torch.where(u[:, :, 0] < 0.5, -1.0, 1.0)[:, :, None, None]
    torch.testing.assert_close(tile, (sign * bump(side)).to(tile))
    assert (grid != 0).sum() == 6 * count_bumps(h, w) * (bump(side) != 0).sum()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([3, 5]), st.floats(0.2, 3.0))
def test_moved_mass_is_algorithm_3(seed, side, eps):
    x = torch.randn(2, 3, 8, 9, generator=seeded(seed), dtype=torch.float64)
    gap = 0.9 * eps * x / x.flatten(1).norm(dim=1)[:, None, None, None]
    u = torch.rand(2, 8, generator=seeded(seed + 1))
    moved = move_mass(u, gap, eps, side)
    for i in range(2):
        place = [int(u[i, k] * (size - side + 1)) for k, size in enumerate((8, 9, 8, 9))]
        first = (slice(place[0], place[0] + side), slice(place[1], place[1] + side))
        second = (slice(place[2], place[2] + side), slice(place[3], place[3] + side))
        nu, union = gap[i].clone(), torch.zeros(8, 9, dtype=torch.bool)
        union[first] = union[second] = True
        unused = eps**2 - float(nu.norm()) ** 2
        pattern = bump(side) if u[i, 4] < 0.5 else bump(side).T
        for c in range(3):
            rho = -1 if u[i, 5 + c] < 0.5 else 1
            old = gap[i, c][first]
            temporary = rho * pattern + old / old.norm()
            available = math.sqrt(float((gap[i][:, union] ** 2).sum()) + unused / 3)  # over all channels: AutoAttack
            nu[c][second] = 0
            nu[c][first] = temporary / temporary.norm() * available
        torch.testing.assert_close(moved[i], eps * nu / nu.norm(), atol=1e-12, rtol=0)
        assert float(moved[i].norm()) == pytest.approx(eps), "the whole budget is used"


def loop(x, f, eps, *, queries, area, first, draws):
    """Algorithm 1 with algorithm 2 for one image (c, h, w), given the uniform draws."""
    ball = lambda y: torch.clamp(y, (x - eps).clamp_min(0), (x + eps).clamp_max(1))
    best, value = first, f(first)
    for i in range(queries - 1):
        p, at = area, i * 10_000 // queries
        for mark in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000):
            p = p / 2 if at > mark else p
        side = min(max(round(math.sqrt(p * x[0].numel())), 1), *x.shape[1:])
        u = draws[i]
        top, left = int(u[0] * (x.shape[1] - side + 1)), int(u[1] * (x.shape[2] - side + 1))
        proposed = best.clone()
        for c in range(len(x)):
            proposed[c, top : top + side, left : left + side] += 2 * eps * (-1 if u[2 + c] < 0.5 else 1)
        proposed = ball(proposed)
        if f(proposed) > value:
            best, value = proposed, f(proposed)
    return best, value


def test_against_the_algorithm_image_by_image():
    x, objective = images(3), lambda v: (9 * v).sin().flatten(1).cumsum(1)[:, -1]
    queries, eps = 50, 0.1
    result = Square(Linf(eps), queries=queries, area=0.3).run(x, objective, generator=seeded(4))
    noise = seeded(4)
    stripes = torch.where(torch.rand(3, 3, 1, 10, generator=noise) < 0.5, -1.0, 1.0)
    draws = torch.rand(3, 64, 5, generator=noise)
    first = Linf(eps).project(x + eps * stripes, x)
    for i in range(3):
        one = lambda v: float(objective(v[None]))
        best, value = loop(x[i], one, eps, queries=queries, area=0.3, first=first[i], draws=draws[i])
        torch.testing.assert_close(result.x_adv[i], best, atol=1e-12, rtol=0)
        assert float(result.value[i]) == pytest.approx(value, abs=1e-9)
    torch.testing.assert_close(result.start_value, objective(first))


def test_finds_the_corner_of_a_linear_objective():
    x = images(4, 2, 3)
    objective, w = linear(x), torch.randn(x[0].shape, generator=seeded(1), dtype=torch.float64)
    corner = Linf(0.1).project(x + w.sign(), x)
    found = Square(Linf(0.1), queries=600, area=0.1)(x, objective, generator=seeded())
    torch.testing.assert_close(found, corner, atol=1e-12, rtol=0)


def test_finds_most_of_a_linear_optimum_in_a_euclidean_ball():
    x = images(3, 5, 5, low=0.4)
    w = torch.randn(x[0].shape, generator=seeded(1), dtype=torch.float64)
    result = Square(L2(0.3), queries=250, area=0.3).run(x, linear(x), generator=seeded())
    gain = (result.value - linear(x)(x)) / (0.3 * w.norm())
    noise = (linear(x)(RandomNoise(L2(0.3))(x, linear(x), generator=seeded())) - linear(x)(x)) / (0.3 * w.norm())
    assert (gain <= 1 + 1e-9).all()
    assert (gain > 0.35).all() and (gain > noise + 0.2).all()


@pytest.mark.parametrize("threat", [Linf(0.1), L2(1.0)], ids=repr)
@pytest.mark.parametrize("queries", [1, 2, 30])
def test_only_rises_are_kept_and_queries_are_counted(threat, queries):
    x, seen = images(4), []
    service = lambda v: torch.from_numpy(np.sin(9 * v.numpy()).sum((1, 2, 3)))  # no gradient could come back from here

    def watched(v):
        assert not torch.is_grad_enabled()
        check_feasible(v, x, threat)
        seen.append(service(v))
        return seen[-1]

    result = Square(threat, queries=queries, area=0.2).run(x, watched, generator=seeded(2))
    assert (result.forwards, result.backwards) == (queries, 0) == (len(seen), 0)
    assert torch.equal(result.value, torch.stack(seen).amax(0))
    assert torch.equal(service(result.x_adv), result.value)
    assert result.zero_gradient.tolist() == [0] * 4
    more = Square(threat, queries=queries, area=0.2, restarts=3).run(x, watched, generator=seeded(2))
    assert more.forwards == 3 * queries
    assert (more.value >= result.value).all()


def test_a_proposal_of_equal_value_is_not_taken():
    x, seen = images(2), []

    def flat(v):
        seen.append(v.clone())
        return torch.ones(2)

    assert torch.equal(Square(Linf(0.1), queries=10)(x, flat, generator=seeded()), seen[0])
    assert not torch.equal(seen[0], seen[1])


def test_ids_make_each_image_a_search_of_its_own():
    x, ids = images(5), torch.tensor([3, 1, 4, 15, 9])
    objective = lambda v: (9 * v).sin().flatten(1).cumsum(1)[:, -1]
    for threat in (Linf(0.1), L2(1.0)):
        attack = Square(threat, queries=30, area=0.2)
        whole = attack(x, objective, generator=seeded(), ids=ids)
        parts = [attack(x[i : i + 1], objective, generator=seeded(), ids=ids[i : i + 1]) for i in range(5)]
        assert torch.equal(whole, torch.cat(parts))
        same = attack(x[:1].repeat(2, 1, 1, 1), objective, generator=seeded(), ids=torch.tensor([7, 7]))
        assert torch.equal(same[0], same[1])


def test_breaks_a_classifier_from_scores_alone_and_stops_there():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(300, 4)).double().eval()
    x = images(12)
    labels = model(x).argmax(1)
    asked = []
    service = lambda v: torch.from_numpy(model(v).numpy())

    def broken(v):
        asked.append(v.clone())
        return service(v).argmax(1) != labels

    attack = Square(Linf(0.03), queries=60, area=0.3)
    for objective in (margin(service, labels), margin(service, labels).__call__):
        asked.clear()
        result = attack.run(x, objective, generator=seeded(), success=broken)
        assert torch.equal(result.success, result.value > 0)
        assert 3 <= int(result.success.sum()) < 12, "the problem should leave some of both"
        for i in result.success.nonzero().flatten().tolist():
            first = next(v[i] for v in asked if model(v[i : i + 1]).argmax(1) != labels[i])
            assert torch.equal(result.x_adv[i], first)
        free = attack.run(x, objective, generator=seeded())
        assert torch.equal(result.x_adv[~result.success], free.x_adv[~result.success])


def test_start_replaces_the_first_stripes_and_drift_needs_no_escape():
    x = images(2)
    drift = feature_drift(lambda v: v.flatten(1), x)
    result = Square(Linf(0.1), queries=40).run(x, drift, start=x, generator=seeded())
    torch.testing.assert_close(result.start_value, torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (result.value > 1e-4).all() and not result.stationary.any()


def test_a_scalar_objective_keeps_or_drops_a_proposal_for_the_whole_batch():
    x, seen = images(3), []

    def watched(v):
        seen.append((9 * v).sin().sum())
        return seen[-1]

    result = Square(Linf(0.1), queries=40, area=0.2).run(x, watched, generator=seeded())
    assert result.value.shape == ()
    assert result.value == max(seen) == watched(result.x_adv)
    assert result.value > result.start_value


def test_other_threat_models():
    x = images(2)
    mask = torch.zeros(10, 10, dtype=torch.bool)
    mask[2:8, 2:8] = True
    for inner in (Linf(0.2), L2(1.0)):
        result = Square(Masked(inner, mask), queries=60, area=0.2).run(x, linear(x), generator=seeded())
        check_feasible(result.x_adv, x, inner)
        assert torch.equal(result.x_adv[:, :, ~mask], x[:, :, ~mask])
        assert (result.value > linear(x)(x)).all()


def test_inference_mode_is_fine_and_bad_values_are_not():
    x = images(2)
    with torch.inference_mode():
        found = Square(Linf(0.1), queries=10)(x, linear(x), generator=seeded())
    assert torch.equal(found, Square(Linf(0.1), queries=10)(x, linear(x), generator=seeded()))
    with pytest.raises(FloatingPointError, match=r"the objective is not finite for images \[1\] \(1 of 2\)"):
        Square(Linf(0.1), queries=10)(x, lambda v: torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match=r"a scalar or one value per image, shape \(2,\); got \(3,\)"):
        Square(Linf(0.1), queries=10)(x, lambda v: torch.zeros(3))
    assert len(Square(Linf(0.1), queries=3)(x[:0], lambda v: v.sum((1, 2, 3)))) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "queries must be a whole number >= 1, got 0"),
        ({"queries": 5, "restarts": 0}, "restarts must be a whole number >= 1"),
        ({"queries": 5, "area": 1.2}, r"area must be a finite number in \[0, 1\], got 1.2"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Square(Linf(0.1), **options)
