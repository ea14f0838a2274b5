"""Masked: exact in four float types, nearest, and one more threat model for every attack."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.attacks import L2, MIFGSM, PGD, Linf, Masked, RandomNoise
from hsat.testing import DTYPES, LAWS, check_attack

seeds = st.integers(0, 10_000)
dtypes = st.sampled_from(DTYPES)
HALF = torch.zeros(5, 4, dtype=torch.bool)
HALF[:3] = True


def images(seed, dtype, n=3):
    x = torch.rand(n, 3, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.4 - 0.2
    return x.clamp(0, 1).to(dtype)


def masks(seed, n=3):
    generator = torch.Generator().manual_seed(seed + 9)
    shapes = [(5, 4), (1, 1, 5, 4), (n, 1, 5, 4), (1, 3, 5, 4), (n, 3, 5, 4)]
    return torch.rand(shapes[seed % len(shapes)], generator=generator) < 0.6


@settings(max_examples=50, deadline=None)
@given(seeds, dtypes, st.sampled_from([Linf(0.0), Linf(8 / 255), Linf(0.4), L2(0.0), L2(0.3), L2(2.0)]))
def test_projection_is_exact_idempotent_and_keeps_feasible_points(seed, dtype, inner):
    x, mask = images(seed, dtype), masks(seed)
    threat = Masked(inner, mask)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    y = (x.double() + 0.5 * noise).to(dtype)
    z = threat.project(y, x)
    wide = mask.expand(x.shape) if mask.ndim == 4 else mask.expand(3, 3, 5, 4)
    assert z.dtype == dtype
    assert torch.equal(z[~wide], x[~wide])
    gap = z.double() - x.double()
    size = gap.abs().amax() if isinstance(inner, Linf) else gap.flatten(1).norm(dim=1).max()
    assert size <= inner.eps
    assert 0 <= z.min() and z.max() <= 1
    assert torch.equal(threat.project(z, x), z)
    assert torch.equal(threat.projection_at(x)(y), z)
    if inner.eps == 0:
        assert torch.equal(z, x)
    elif isinstance(inner, Linf):
        assert torch.equal(z[wide], inner.project(y, x)[wide])


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_the_l2_projection_is_the_nearest_point_of_the_masked_ball(seed):
    """Against the ball of the masked pixels alone, laid out as an image of their own."""
    x = images(seed, torch.float64, n=1)
    y = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = Masked(L2(0.4), HALF).project(y, x)
    alone = L2(0.4).project(y[:, :, :3], x[:, :, :3])
    torch.testing.assert_close(found[:, :, :3], alone, atol=1e-9, rtol=0)
    assert torch.equal(found[:, :, 3:], x[:, :, 3:])


@pytest.mark.parametrize("inner", [Linf(8 / 255), L2(0.5), Linf(torch.tensor([0.01, 0.02, 0.03]).view(1, 3, 1, 1))])
@pytest.mark.parametrize("kind", [PGD, MIFGSM])
def test_attacks_keep_the_contract_under_a_mask(inner, kind):
    attack = kind(Masked(inner, HALF), step_size=float(torch.as_tensor(inner.eps).max()) / 4, steps=4)
    assert check_attack(attack) == tuple(LAWS)


def test_the_corner_of_a_linear_objective_inside_the_mask():
    x, w = torch.full((2, 3, 5, 4), 0.5), torch.randn(1, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    attack = PGD(Masked(Linf(0.125), HALF), step_size=0.0625, steps=5)
    x_adv = attack(x, lambda v: (v * w).sum((1, 2, 3)), generator=torch.Generator().manual_seed(1))
    assert torch.equal(x_adv - x, torch.where(HALF, 0.125 * w.sign(), 0.0).expand_as(x))


def test_the_l2_step_is_of_unit_size_inside_the_mask():
    grad = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    direction = Masked(L2(1.0), HALF).steepest_ascent(grad)
    torch.testing.assert_close(direction.flatten(1).norm(dim=1), torch.ones(2))
    assert not direction[:, :, 3:].any()


def test_one_mask_per_image_follows_selection_and_ids():
    x, w = images(0, torch.float32, n=4), torch.randn(1, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    each = torch.rand(4, 1, 5, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    threat = Masked(Linf(torch.tensor([0.1, 0.2, 0.3, 0.4])), each)
    assert torch.equal(threat.select(torch.tensor([2, 0])).mask, each[[2, 0]])
    ids = torch.arange(4)

    def run(index):
        attack = PGD(threat.select(index), step_size=0.05, steps=3)
        objective = lambda v: (v.sin() * w).flatten(1).cumsum(1)[:, -1]
        return attack(x[index], objective, generator=torch.Generator().manual_seed(5), ids=ids[index])

    whole = run(ids)
    assert torch.equal(whole, torch.cat([run(ids[i : i + 1]) for i in range(4)]))
    assert torch.equal(whole == x, ~each | (whole == x))
    assert not torch.equal(whole, x)


def test_random_starts_stay_inside_the_mask():
    x = images(3, torch.float16)
    for inner in (Linf(0.1), L2(0.5)):
        noisy = RandomNoise(Masked(inner, HALF))(x, lambda v: v.sum(), generator=torch.Generator().manual_seed(0))
        assert torch.equal(noisy[:, :, 3:], x[:, :, 3:])
        assert not torch.equal(noisy[:, :, :3], x[:, :, :3])


def test_masks_are_kept_compared_and_shown_by_value():
    mask = HALF.clone()
    threat = Masked(Linf(0.1), mask)
    mask[:] = False
    threat.mask[:] = False
    assert torch.equal(threat.mask, HALF[None, None])
    assert threat == Masked(Linf(0.1), HALF.float())
    assert hash(threat) == hash(Masked(Linf(0.1), HALF))
    assert threat != Masked(Linf(0.2), HALF)
    assert threat != Masked(Linf(0.1), ~HALF)
    assert "share=0.6" in repr(threat) and "Linf(eps=0.1" in repr(threat)
    with pytest.raises(dataclasses.FrozenInstanceError):
        threat.threat = Linf(0.2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Masked(0.1, HALF), "threat model such as"),
        (lambda: Masked(Linf(0.1), torch.full((5, 4), 0.5)), "0 and 1"),
        (lambda: Masked(Linf(0.1), torch.ones(3)), r"\(3,\)"),
        (lambda: Masked(Linf(0.1), [True]), "list"),
        (
            lambda: Masked(Linf(0.1), torch.ones(4, 5)).project(images(0, torch.float32), images(0, torch.float32)),
            "4, 5",
        ),
        (lambda: Masked(Linf(0.1), torch.ones(2, 1, 5, 4)).random_start(images(0, torch.float32)), r"\(2, 1, 5, 4\)"),
        (
            lambda: PGD(Masked(Linf(0.1), HALF), step_size=0.1, steps=1)(255 * images(0, torch.float32), torch.sum),
            "255",
        ),
    ],
)
def test_errors_name_the_culprit(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()
