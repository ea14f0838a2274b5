"""Attacks on raw channels and on stains: exact answers, the laws of every attack, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.attacks import (
    L2,
    MIFGSM,
    PGD,
    Linf,
    Masked,
    RandomNoise,
    RawChannels,
    Reparametrized,
    Stains,
    classification,
    compose_objective,
    feature_drift,
)
from hsat.data import srh_to_rgb
from hsat.stains import from_stains, stain_basis, to_stains
from hsat.testing import DTYPES, LAWS, check_attack

seeds = st.integers(0, 10_000)
RAW = Reparametrized(RawChannels(srh_to_rgb), PGD(Linf(0.05), step_size=0.02, steps=4))
STAIN = Reparametrized(Stains(), PGD(Linf(0.1, low=-1, high=1), step_size=0.04, steps=4))
WHOLE = Reparametrized(Stains(per_pixel=False), PGD(Linf(0.1, low=-1, high=1), step_size=0.04, steps=4))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def raw_images(seed=0, n=3, dtype=torch.float32):
    return (torch.rand(n, 2, 5, 4, generator=generator(seed), dtype=torch.float64) * 0.6).to(dtype)


def colour(seed=0, n=3, dtype=torch.float32):
    return (torch.rand(n, 3, 5, 4, generator=generator(seed), dtype=torch.float64) * 0.9 + 0.05).to(dtype)


def linear(w):
    return lambda v: (v * w.to(v.dtype)).sum((1, 2, 3))


# ---------------------------------------------------------------------------------------------------- through


def test_through_is_composition_and_keeps_what_the_objective_offers():
    raw, net = raw_images(n=4), torch.nn.Linear(60, 3)
    logits = lambda v: net(v.flatten(1))
    labels = torch.tensor([0, 1, 2, 0])
    objective = compose_objective(srh_to_rgb, classification(logits, labels))
    torch.testing.assert_close(objective(raw), classification(logits, labels)(srh_to_rgb(raw)))
    some = torch.tensor([3, 1])
    torch.testing.assert_close(objective.select(some)(raw[some]), objective(raw)[some])
    assert not objective.stationary_at_clean
    assert compose_objective(srh_to_rgb, feature_drift(logits, srh_to_rgb(raw))).stationary_at_clean
    assert not hasattr(compose_objective(srh_to_rgb, lambda v: v.sum()), "select")


def test_an_attack_on_raw_images_reaches_the_corner_and_carries_the_third_channel():
    """d/dCH3 of w.rgb is w0 + w2 and d/dCH2 is w1 - w0, where nothing is clamped."""
    raw, w = raw_images() * 0.5 + 0.2, torch.randn(1, 3, 5, 4, generator=generator(1))
    w[:, 0] *= 0.1
    raw[:, 1] = raw[:, 0] + 0.1  # the difference channel stays inside [0, 1]
    attack = PGD(Linf(0.03125), step_size=0.03125, steps=3)
    raw_adv = attack(raw, compose_objective(srh_to_rgb, linear(w)), generator=generator())
    slope = torch.stack((w[:, 1] - w[:, 0], w[:, 0] + w[:, 2]), 1)
    torch.testing.assert_close(raw_adv - raw, (0.03125 * slope.sign()).expand_as(raw), atol=1e-7, rtol=0)
    in_space = Reparametrized(RawChannels(srh_to_rgb), attack)(srh_to_rgb(raw), linear(w), generator=generator())
    torch.testing.assert_close(in_space, srh_to_rgb(raw_adv), atol=0, rtol=0)


# ---------------------------------------------------------------------------------------------------- raw channels


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([torch.float32, torch.float64]), st.sampled_from([0.0, 8 / 255, 0.3]))
def test_raw_results_are_images_that_two_channels_can_make(seed, dtype, eps):
    x = srh_to_rgb(raw_images(seed, dtype=dtype))
    attack = Reparametrized(RawChannels(srh_to_rgb), PGD(Linf(eps), step_size=0.1, steps=2))
    w = torch.randn(1, 3, 5, 4, generator=generator(seed))
    x_adv = attack(x, linear(w), generator=generator(seed))
    assert torch.equal(srh_to_rgb(x_adv[:, 1:]), x_adv)
    assert ((x_adv[:, 1:].double() - x[:, 1:].double()).abs() <= eps).all()
    assert eps or torch.equal(x_adv, x)
    assert not eps or (linear(w)(x_adv) > linear(w)(x)).all()


def test_raw_refuses_images_whose_first_channel_is_free():
    x = srh_to_rgb(raw_images())
    x[1, 0] += 0.01
    with pytest.raises(ValueError, match=r"image 1 .*image_size=None"):
        RAW(x, linear(torch.ones(1, 3, 5, 4)), generator=generator())
    with pytest.raises(ValueError, match=r"\(3, 2, 5, 4\)"):
        RAW(raw_images(), lambda v: v.sum(), generator=generator())
    with pytest.raises(ValueError, match=r"\[-1"):
        Reparametrized(RawChannels(srh_to_rgb), PGD(Linf(0.1, low=-1, high=1), step_size=0.1, steps=1))
    assert repr(RAW).startswith("Reparametrized(space=RawChannels(srh_to_rgb), attack=PGD(threat=Linf(eps=0.05")


# ---------------------------------------------------------------------------------------------------- stains


def test_stains_have_gradients():
    x = colour(n=1, dtype=torch.float64)[:, :, :2, :2].contiguous().requires_grad_()
    assert torch.autograd.gradcheck(to_stains, (x,))
    assert torch.autograd.gradcheck(from_stains, (to_stains(x.detach()).requires_grad_(),))
    d = torch.full((1, 2, 2, 2), 0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: Stains().decode(v, x.detach() * 0.8), (d,))


@pytest.mark.parametrize("per_pixel", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stain_attack_changes_the_stains_by_at_most_eps_and_the_residual_not_at_all(dtype, per_pixel):
    x, eps = (colour(dtype=torch.float64) * 0.7).to(dtype), 0.1
    attack = Reparametrized(Stains(per_pixel=per_pixel), PGD(Linf(eps, low=-1, high=1), step_size=0.04, steps=6))
    w = torch.randn(1, 3, 5, 4, generator=generator(1))
    x_adv = attack(x, linear(w), generator=generator())
    assert x_adv.dtype == dtype and 0 <= x_adv.min() and x_adv.max() <= 1
    change = to_stains(x_adv.double()) - to_stains(x.double())
    slack = 20 * torch.finfo(dtype).eps  # of light 0.05 and more, rounded to dtype
    assert change[:, :2].abs().max() <= eps + 10 * slack
    assert change[:, 2].abs().max() <= 10 * slack
    if not per_pixel:
        assert (change - change.mean((2, 3), keepdim=True)).abs().max() <= 20 * slack
    assert (linear(w)(x_adv.double()) > linear(w)(x.double())).all()


@pytest.mark.parametrize("per_pixel", [True, False])
def test_the_variable_is_the_stain_that_is_added(per_pixel):
    space, x = Stains(per_pixel=per_pixel), colour(dtype=torch.float64) * 0.5
    size = (5, 4) if per_pixel else (1, 1)
    added = 0.2 * torch.rand(3, 2, *size, generator=generator(2), dtype=torch.float64)
    images = space.decode(added, x)
    change = to_stains(images) - to_stains(x)
    torch.testing.assert_close(change[:, :2], added.expand(3, 2, 5, 4))
    torch.testing.assert_close(space.encode(images, x), added)
    assert not space.encode(x, x).any()


def test_the_corner_of_stain_space():
    """More haematoxylin darkens everything: an objective that wants darkness takes eps of both stains everywhere."""
    x = colour() * 0.8
    attack = Reparametrized(Stains(), PGD(Linf(0.1, low=-1, high=1), step_size=0.05, steps=5))
    x_adv = attack(x, lambda v: -v.sum((1, 2, 3)), generator=generator())
    expected = x * torch.exp(-0.1 * stain_basis()[:2].sum(0).float().view(1, 3, 1, 1))
    torch.testing.assert_close(x_adv, expected)


def test_black_stays_black_white_clips_and_eps_0_is_the_identity():
    x = torch.tensor([0.0, 1.0, 0.3]).view(1, 3, 1, 1).expand(2, 3, 2, 2).contiguous()
    brighter = STAIN(x, lambda v: v.sum((1, 2, 3)), generator=generator())
    assert (brighter[:, 0] == 0).all() and (brighter[:, 1] == 1).all() and (brighter[:, 2] > 0.3).all()
    for dtype in DTYPES:
        images = colour(dtype=dtype)
        still = Reparametrized(Stains(), PGD(Linf(0.0, low=-1, high=1), step_size=0.1, steps=2))
        assert torch.equal(still(images, linear(torch.ones(1, 3, 5, 4)), generator=generator()), images)


def test_ranges_that_allow_adding_stain_only_are_refused():
    with pytest.raises(ValueError, match=r"Linf\(0.1, low=-1, high=1\)"):
        Reparametrized(Stains(), PGD(Linf(0.1), step_size=0.1, steps=1))
    with pytest.raises(TypeError, match="Parametrization"):
        Reparametrized("stains", PGD(Linf(0.1), step_size=0.1, steps=1))
    with pytest.raises(TypeError, match="attack"):
        Reparametrized(Stains(), Linf(0.1))
    for vectors in ([(1, 0, 0)], [(1, 0, 0), (1, 0, 1e-9)], [(1, 0, 0), (0, math.nan, 1)], [(0, 0, 0), (1, 0, 0)]):
        with pytest.raises(ValueError, match="stain vectors"):
            Stains(vectors)
    with pytest.raises(ValueError, match="colour"):
        to_stains(torch.rand(1, 2, 4, 4))


# ---------------------------------------------------------------------------------------------------- laws of attacks


class _Ball:
    """What a stain attack may reach, in the form of a threat model: only what `check_attack` asks of one."""

    eps = 0.1

    def project(self, x_adv, x):
        slack = 200 * torch.finfo(x.dtype).eps
        lit = (x > 0.2) & (x < 0.8)
        change = (Stains().encode(x_adv.double(), x.double())).abs()
        fine = (change <= self.eps + slack) | ~lit.all(1, keepdim=True)
        return x_adv if bool(fine.all()) else x_adv + 1


@pytest.mark.parametrize(
    "attack", [STAIN, WHOLE, Reparametrized(Stains(), MIFGSM(L2(0.1, low=-1, high=1), step_size=0.05, steps=4))]
)
def test_stain_attacks_keep_the_contract(attack):
    """All laws but those that replace eps in `attack.threat`; eps = 0 is tested above."""
    assert check_attack(attack, threat=_Ball()) == tuple(LAWS)


def test_noise_of_stains_keeps_the_laws_that_are_not_about_objectives():
    names = check_attack(Reparametrized(Stains(), RandomNoise(Linf(0.1, low=-1, high=1))), threat=_Ball())
    assert "same seed, same bytes" in names and "the objective grows for every image" not in names


@dataclasses.dataclass(frozen=True)
class _Recorded:
    """An attack on two recorded channels, as one on images of which the first channel is not shown to it."""

    attack: Reparametrized

    def __call__(self, x, objective, *, start=None, **options):
        first, begin = x[:, :1].detach(), None if start is None else srh_to_rgb(start[:, 1:])
        whole = lambda v: torch.cat((first, v[:, 1:]), 1)
        inner = {name: option for name, option in options.items() if name != "success"}
        if options.get("success") is not None:
            inner["success"] = lambda v: options["success"](whole(v))
        return whole(self.attack(srh_to_rgb(x[:, 1:].detach()), lambda v: objective(whole(v)), start=begin, **inner))


@pytest.mark.parametrize("kind", [PGD, MIFGSM])
def test_attacks_on_recorded_channels_keep_the_contract(kind):
    mask = torch.ones(1, 3, 5, 4)
    mask[:, 0] = 0
    attack = _Recorded(Reparametrized(RawChannels(srh_to_rgb), kind(Linf(0.05), step_size=0.02, steps=4)))
    assert check_attack(attack, threat=Masked(Linf(0.05), mask)) == tuple(LAWS)


def test_success_start_ids_and_counts_are_in_terms_of_images():
    x, w = srh_to_rgb(raw_images(n=4)), torch.randn(1, 3, 5, 4, generator=generator(1))
    seen = []

    def success(images):
        seen.append(images.shape)
        return linear(w)(images) > linear(w)(x) + 0.1

    result = RAW.run(x, linear(w), generator=generator(), ids=torch.arange(4), success=success, start=x)
    assert result.success.any() and set(seen) == {x.shape}
    assert torch.equal(result.success, success(result.x_adv))
    assert result.backwards <= 4
    torch.testing.assert_close(
        RAW.run(x, linear(w), generator=generator()).value, linear(w)(RAW(x, linear(w), generator=generator()))
    )
    parts = [RAW(x[i : i + 1], linear(w), generator=generator(), ids=torch.tensor([i])) for i in range(4)]
    assert torch.equal(RAW(x, linear(w), generator=generator(), ids=torch.arange(4)), torch.cat(parts))


def test_a_drift_has_a_way_out_of_the_clean_images():
    x, net = srh_to_rgb(raw_images()), torch.nn.Linear(60, 3)
    encode = lambda v: net(v.flatten(1))
    drift = feature_drift(encode, x)
    for space, ball in ((RawChannels(srh_to_rgb), Linf(0.1)), (Stains(), Linf(0.2, low=-1, high=1))):
        bim = Reparametrized(space, PGD(ball, step_size=0.05, steps=4, random_start=False))
        result = bim.run(x, drift, generator=generator())
        noise = Reparametrized(space, RandomNoise(ball))(x, drift, generator=generator(1))
        assert result.stationary.all()
        assert (result.value > drift(noise)).all()


def test_spaces_take_masks():
    mask = torch.zeros(5, 4, dtype=torch.bool)
    mask[:2] = True
    x = srh_to_rgb(raw_images())
    attack = Reparametrized(RawChannels(srh_to_rgb), PGD(Masked(Linf(0.1), mask), step_size=0.1, steps=2))
    x_adv = attack(x, lambda v: v.sum((1, 2, 3)), generator=generator())
    assert torch.equal(x_adv[:, :, 2:], x[:, :, 2:]) and not torch.equal(x_adv, x)
    assert attack.eps == 0.1 and attack.random_start is True
