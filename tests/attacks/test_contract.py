"""The contract list over all attacks and threat models, and proof that it catches broken ones."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from hsat.attacks import (
    APGD,
    BIM,
    DIFGSM,
    FFGSM,
    FGSM,
    L2,
    MIFGSM,
    NIFGSM,
    PGD,
    TIFGSM,
    VMIFGSM,
    Linf,
    RandomNoise,
    Square,
)
from hsat.attacks.initialization import image_seed
from hsat.testing import LAWS, check_attack


def attacks_of(threat):
    step = threat.eps / 4
    return [
        PGD(threat, step_size=step, steps=5),
        PGD(threat, step_size=step, steps=3, restarts=3),
        PGD(threat, step_size=step, steps=5, random_start=False),
        BIM(threat, step_size=step, steps=5),
        BIM(threat, step_size=step, steps=5, random_start=True),
        MIFGSM(threat, step_size=step, steps=5),
        MIFGSM(threat, step_size=step, steps=5, decay=0.5, random_start=True, restarts=2),
        FGSM(threat),
        FFGSM(threat),
        FFGSM(threat, step_size=0.7 * threat.eps),
    ]


THREATS = [Linf(8 / 255), Linf(0.4), L2(0.5), L2(3.0)]
ALL_ATTACKS = [attack for threat in THREATS for attack in attacks_of(threat)]


def searches_of(threat):
    numbers = {"step_size": threat.eps / 2, "steps": 3}
    return [
        APGD(threat, steps=5),
        APGD(threat, steps=2, restarts=2, random_start=False),
        NIFGSM(threat, scales=2, **numbers),
        DIFGSM(threat, **numbers),
        VMIFGSM(threat, samples=2, **numbers),
        TIFGSM(threat, size=3, probability=0.5, **numbers),
        Square(threat, queries=16, area=0.3),
    ]


SEARCHES = searches_of(Linf(8 / 255)) + searches_of(L2(3.0))[::2]  # in L2 those with rules of their own


@pytest.mark.parametrize("attack", ALL_ATTACKS + SEARCHES, ids=repr)
def test_contract(attack):
    assert check_attack(attack) == tuple(LAWS)


@pytest.mark.parametrize("threat", THREATS, ids=repr)
def test_random_noise_keeps_the_laws_that_are_not_about_climbing(threat):
    check_attack(RandomNoise(threat), skip=("the objective grows for every image", "non-finite gradients are refused"))


class _Broken:
    """PGD with a way to break it; deliberately written outside the library."""

    def __init__(self):
        self.threat = Linf(8 / 255)
        self.inner = PGD(self.threat, step_size=2 / 255, steps=5)

    def __call__(self, x, objective, **options):
        return self.inner(x, objective, **options)


class ReturnsItsInput(_Broken):
    def __call__(self, x, objective, **options):
        return x.detach().clone()


class SkipsProjection(_Broken):
    def __call__(self, x, objective, **options):
        x_adv = self.inner(x, objective, **options)
        return (x_adv + 1.5 * (x_adv - x.detach())).detach()


class ForgetsTheBox(_Broken):
    def __call__(self, x, objective, **options):
        v = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(objective(v).sum(), v)
        return (x + self.threat.eps * grad.sign()).detach()


class BoundsInTheImagesOwnDtype(_Broken):
    def __call__(self, x, objective, **options):
        v = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(objective(v).sum(), v)
        return (
            torch.minimum(torch.maximum(x + grad.sign(), x - self.threat.eps), x + self.threat.eps).clamp(0, 1).detach()
        )


class ForgetsTheSeed(_Broken):
    def __call__(self, x, objective, **options):
        return self.inner(x, objective, **options | {"generator": torch.Generator().manual_seed(torch.seed() % 1000)})


class DrawsFromTheGlobalGenerator(_Broken):
    def __call__(self, x, objective, **options):
        torch.rand(1)
        return self.inner(x, objective, **options)


class IgnoresIds(_Broken):
    def __call__(self, x, objective, **options):
        return self.inner(x, objective, **options | {"ids": None})


class FillsGradients(_Broken):
    def __call__(self, x, objective, **options):
        v = x.detach().requires_grad_()
        objective(v).sum().backward()
        return self.inner(x, objective, **options)


class WritesIntoItsInput(_Broken):
    def __call__(self, x, objective, **options):
        x_adv = self.inner(x, objective, **options)
        x.data.copy_(x_adv)
        return x_adv


class SwallowsNonFinite(_Broken):
    def __call__(self, x, objective, **options):
        with contextlib.suppress(FloatingPointError):
            return self.inner(x, objective, **options)
        return x.detach()


class DividesByZero(_Broken):
    def __call__(self, x, objective, **options):
        v = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(objective(v).sum(), v)
        return self.threat.project((x + self.threat.eps * grad / grad.abs()).to(x.dtype), x).detach()


@pytest.mark.parametrize("mutant", _Broken.__subclasses__(), ids=lambda c: c.__name__)
def test_the_contract_catches_broken_attacks(mutant):
    assert check_attack(_Broken())
    with pytest.raises(AssertionError, match="breaks the law"):
        check_attack(mutant())


def test_an_attack_that_leaves_a_model_in_another_mode_is_caught():
    class LeavesEvalMode(_Broken):
        def __call__(self, x, objective, **options):
            for cell in objective.__closure__ or ():
                if isinstance(cell.cell_contents, torch.nn.Module):
                    cell.cell_contents.eval()
            return self.inner(x, objective, **options)

    with pytest.raises(AssertionError, match="mode of module"):
        check_attack(LeavesEvalMode())


def test_check_attack_takes_attacks_without_a_threat_attribute_and_refuses_unknown_laws():
    pgd = PGD(Linf(8 / 255), step_size=2 / 255, steps=5)

    def plain(x, objective, **options):
        return pgd(x, objective, **options)

    assert check_attack(plain, threat=pgd.threat)
    with pytest.raises(ValueError, match="unknown laws"):
        check_attack(pgd, skip=("gravity",))


@pytest.mark.parametrize("attack", ALL_ATTACKS[:10] + SEARCHES[:7], ids=repr)
def test_settings_are_frozen_complete_and_replaceable(attack):
    assert eval(repr(attack)) == attack and hash(attack) == hash(eval(repr(attack)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.threat = Linf(0.1)
    assert dataclasses.replace(attack, threat=Linf(0.1)) != attack


def test_seeds_of_images_differ_in_every_argument():
    seeds = {image_seed(s, i, r) for s in range(10) for i in range(-5, 20) for r in range(3)}
    assert len(seeds) == 10 * 25 * 3
