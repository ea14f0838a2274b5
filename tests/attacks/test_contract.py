"""The contract over all attacks and threat models of hsat; wrong attacks are in tests/testing."""

from __future__ import annotations

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
    AttackEnsemble,
    FittedUniversal,
    Linf,
    Masked,
    RandomNoise,
    Square,
    worst_case,
)
from hsat.attacks.initialization import image_seed
from hsat.testing import LAWS, check_attack

ABOUT_OBJECTIVES = (
    "the objective grows for every image",
    "the objective's error arrives",
    "non-finite gradients are refused",
    "success stops images",
)
HALF = torch.arange(20).view(5, 4) < 12
CHANNELS = Linf(torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))


def attacks_of(threat):
    """Every attack that climbs and whose settings are plain numbers."""
    step = float(torch.as_tensor(threat.eps).max()) / 4
    numbers = {"step_size": step, "steps": 4}
    return [
        PGD(threat, **numbers),
        PGD(threat, step_size=step, steps=3, restarts=3),
        PGD(threat, **numbers, random_start=False),
        BIM(threat, **numbers),
        BIM(threat, **numbers, random_start=True),
        MIFGSM(threat, **numbers),
        MIFGSM(threat, **numbers, decay=0.5, random_start=True, restarts=2),
        FGSM(threat),
        FFGSM(threat),
        FFGSM(threat, step_size=2.8 * step),
        APGD(threat, steps=5),
        APGD(threat, steps=2, restarts=2, random_start=False),
        NIFGSM(threat, scales=2, **numbers),
        DIFGSM(threat, **numbers),
        VMIFGSM(threat, samples=2, **numbers),
        TIFGSM(threat, size=3, probability=0.5, **numbers),
        Square(threat, queries=32, area=0.3),
    ]


def ensembles_of(threat):
    step = float(torch.as_tensor(threat.eps).max()) / 4
    pgd = PGD(threat, step_size=step, steps=4)
    return [
        worst_case(RandomNoise(threat), pgd),
        worst_case(FGSM(threat), APGD(threat, steps=3)),
        AttackEnsemble(threat, steps=3, decision_steps=4, restarts=2, queries=5),
        AttackEnsemble.standard(threat, steps=5, targets=2, queries=6),
    ]


def universal(threat):
    return FittedUniversal(
        threat=threat, delta=0.2 * torch.randn(1, 3, 5, 4, generator=torch.Generator().manual_seed(4))
    )


OTHER_THREATS = [
    Linf(0.4),
    L2(3.0),
    Masked(Linf(8 / 255), HALF),
    Masked(L2(0.5), HALF),
    CHANNELS,
    Linf(1 / 255),
    L2(0.05),
]
QUICK = [a for threat in (Linf(8 / 255), L2(0.5)) for a in attacks_of(threat) + ensembles_of(threat)]
MORE = [a for threat in OTHER_THREATS for a in attacks_of(threat) + ensembles_of(threat)]
CASES = QUICK + [
    attack if index % 7 == 0 else pytest.param(attack, marks=pytest.mark.slow) for index, attack in enumerate(MORE)
]


@pytest.mark.parametrize("attack", CASES, ids=repr)
def test_contract(attack):
    assert check_attack(attack) == tuple(LAWS)


@pytest.mark.parametrize("threat", [Linf(8 / 255), L2(0.5), *OTHER_THREATS], ids=repr)
def test_random_noise_keeps_the_laws_that_are_not_about_objectives(threat):
    assert check_attack(RandomNoise(threat)) == tuple(law for law in LAWS if law not in ABOUT_OBJECTIVES)


@pytest.mark.parametrize("threat", [Linf(8 / 255), Linf(1.0), L2(0.5)], ids=repr)
def test_universal_perturbations_keep_the_laws_that_are_not_about_objectives_and_starts(threat):
    names = tuple(law for law in LAWS if law not in (*ABOUT_OBJECTIVES, "start is obeyed"))
    assert check_attack(universal(threat)) == names
    pgd = PGD(threat, step_size=threat.eps / 4, steps=4)
    assert (
        check_attack(worst_case(universal(threat), pgd))
        == check_attack(worst_case(pgd, universal(threat)))
        == tuple(LAWS)
    )


@pytest.mark.parametrize("attack", attacks_of(Linf(8 / 255)), ids=repr)
def test_settings_are_frozen_complete_and_replaceable(attack):
    assert eval(repr(attack)) == attack and hash(attack) == hash(eval(repr(attack)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.threat = Linf(0.1)
    assert dataclasses.replace(attack, threat=Linf(0.1)) != attack


@pytest.mark.parametrize("attack", [*attacks_of(Linf(8 / 255)), *attacks_of(L2(0.5)), RandomNoise(Linf(0.1))], ids=repr)
def test_without_the_last_value_the_images_are_the_same(attack):
    x, asked = torch.rand(3, 3, 5, 4, generator=torch.Generator().manual_seed(0)), []

    def objective(v):
        asked.append(len(v))
        return v.sin().flatten(1).cumsum(1)[:, -1]

    def run(**options):
        asked.clear()
        return attack.run(x, objective, generator=torch.Generator().manual_seed(1), ids=torch.arange(3), **options)

    whole = run()
    assert whole.forwards == len(asked) and torch.equal(whole.value, objective(whole.x_adv))
    short = run(score=False)
    assert short.forwards == len(asked) and torch.equal(short.x_adv, whole.x_adv)
    known = getattr(attack, "restarts", 1) > 1 or isinstance(attack, APGD | Square)  # values that the search needs
    saved = 2 if isinstance(attack, RandomNoise) else int(not known)
    assert (short.forwards, short.backwards) == (whole.forwards - saved, whole.backwards)


def test_seeds_of_images_differ_in_every_argument():
    seeds = {image_seed(s, i, r) for s in range(10) for i in range(-5, 20) for r in range(3)}
    assert len(seeds) == 10 * 25 * 3
