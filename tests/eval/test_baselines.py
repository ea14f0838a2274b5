"""Random noise for every threat model among the attacks, each under a name of its own."""

from __future__ import annotations

import torch
from hsat.eval.baselines import with_noise

from hsat.attacks import L2, PGD, FittedUniversal, Linf, Masked, RandomNoise, Reparametrized, Stains


def pgd(threat):
    return PGD(threat, step_size=0.01, steps=1)


def test_each_threat_model_gets_one_noise_and_a_name():
    top, bottom = torch.tensor([[True], [False]]), torch.tensor([[False], [True]])
    stain = Reparametrized(Stains(), pgd(Linf(0.1, low=-1, high=1)))
    attacks = {
        "a": pgd(Linf(8 / 255)),
        "b": PGD(Linf(8 / 255), step_size=0.02, steps=3),
        "c": pgd(L2(8 / 255)),
        "d": pgd(Masked(Linf(8 / 255), top)),
        "e": pgd(Masked(Linf(8 / 255), bottom)),
        "f": stain,
        "g": FittedUniversal(threat=Linf(8 / 255), delta=torch.zeros(1, 1, 2, 1)),
        "h": lambda x, objective: x,
    }
    found = with_noise(attacks)
    noise = {name: attack for name, attack in found.items() if name not in attacks}
    assert noise == {
        "noise-8": RandomNoise(Linf(8 / 255)),
        "noise-L2-8": RandomNoise(L2(8 / 255)),
        "noise-Masked-8": RandomNoise(Masked(Linf(8 / 255), top)),
        "noise-Masked-8 (2)": RandomNoise(Masked(Linf(8 / 255), bottom)),
        "noise-0.1": Reparametrized(Stains(), RandomNoise(Linf(0.1, low=-1, high=1))),
    }
    assert list(found) == [*noise, *attacks]
    assert with_noise({}) == {}
