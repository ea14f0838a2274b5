"""The attacks of the paper under any of their names, ensembles, and noise for every threat model."""

from __future__ import annotations

import pytest
import torch

from hsat.attacks import (
    BIM,
    FFGSM,
    FGSM,
    L2,
    MIFGSM,
    PGD,
    AttackEnsemble,
    FittedUniversal,
    Linf,
    Masked,
    RandomNoise,
    Reparametrized,
    Stains,
)
from hsat.eval import add_noise_baselines, ensemble_attacks, paper_attacks


def test_the_papers_columns():
    attacks = paper_attacks()
    assert list(attacks) == ["PGD-4", "BIM-4", "MIFGSM-4", "PGD-8", "BIM-8", "MIFGSM-8"]
    for eps in (4, 8):
        options = dict(step_size=2 / 255, steps=10, random_start=True)
        assert attacks[f"PGD-{eps}"] == PGD(Linf(eps / 255), **options)
        assert attacks[f"BIM-{eps}"] == BIM(Linf(eps / 255), **options)
        assert attacks[f"MIFGSM-{eps}"] == MIFGSM(Linf(eps / 255), decay=1.0, **options)


def test_options_reach_the_attacks():
    attacks = paper_attacks((0.01,), steps=3, step_size=1 / 255, names=("pgd", "ffgsm", "fgsm"))
    assert attacks == {
        "PGD-0.01": PGD(Linf(0.01), step_size=1 / 255, steps=3),
        "FFGSM-0.01": FFGSM(Linf(0.01), step_size=10 / 255),
        "FGSM-0.01": FGSM(Linf(0.01)),
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("pgd_r", PGD),
        ("bim_r", BIM),
        ("mifgsm_r", MIFGSM),
        ("mifgsn_r", MIFGSM),
        ("pgd_knn", PGD),
        ("bimr_knn", BIM),
        ("mifgsmr_knn", MIFGSM),
        ("ffgsmr_knn", FFGSM),
        ("FGSM", FGSM),
        (" PGD ", PGD),
    ],
)
def test_published_names(name, kind):
    (attack,) = paper_attacks((8 / 255,), names=(name,)).values()
    assert type(attack) is kind


def test_two_names_of_one_attack_are_one():
    assert list(paper_attacks((8 / 255,), names=("pgd", "pgd_r", "PGD"))) == ["PGD-8"]


def test_an_unknown_name():
    with pytest.raises(ValueError, match="unknown attack 'pdg'; choose from pgd, pgd_r"):
        paper_attacks(names=("pdg",))


def test_ensembles_by_eps():
    ensembles = ensemble_attacks((4 / 255, 8 / 255), steps=3)
    assert list(ensembles) == ["ensemble-4", "ensemble-8"]
    assert ensembles["ensemble-8"] == AttackEnsemble(Linf(8 / 255), steps=3, step_size=2 / 255)
    assert "step_size=2/255" in repr(ensembles["ensemble-8"])


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
    found = add_noise_baselines(attacks)
    noise = {name: attack for name, attack in found.items() if name not in attacks}
    assert noise == {
        "noise-8": RandomNoise(Linf(8 / 255)),
        "noise-L2-8": RandomNoise(L2(8 / 255)),
        "noise-Masked-8": RandomNoise(Masked(Linf(8 / 255), top)),
        "noise-Masked-8 (2)": RandomNoise(Masked(Linf(8 / 255), bottom)),
        "noise-0.1": Reparametrized(Stains(), RandomNoise(Linf(0.1, low=-1, high=1))),
    }
    assert list(found) == [*noise, *attacks]
    assert add_noise_baselines({}) == {}
