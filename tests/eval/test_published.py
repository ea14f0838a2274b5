from __future__ import annotations

import pytest

from hsat.attacks import BIM, FFGSM, FGSM, MIFGSM, PGD, Linf
from hsat.eval import paper_attacks


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
