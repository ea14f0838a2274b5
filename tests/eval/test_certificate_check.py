"""Attacks inside the radius never beat a certificate, and find out one that claims three times too much."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hsat.attacks import L2, PGD, AttackEnsemble, Linf
from hsat.eval import CheckOptions, check_certificates
from hsat.eval.certificates import ABSTAIN
from hsat.types import HierarchicalBatch


def check(half_space, certified, *, queries=None, target="decision", attack=None, **options):
    queries = half_space.batches() if queries is None else queries
    options = CheckOptions(**options)
    return check_certificates(half_space.encoder, certified, queries, options=options, target=target, attack=attack)


def test_no_attack_beats_a_certificate_and_a_wrong_one_is_caught(half_space, certified):
    options = dict(steps=5, copies=4, samples=300)
    honest = check(half_space, certified, **options)
    assert honest.tested == int((certified.levels["patch"].prediction != ABSTAIN).sum()) > 25
    assert not honest.violated and honest.changed <= 1
    wrong = check(half_space, certified, inflate=3.0, **options)
    assert wrong.violated and wrong.changed > 0.5 * wrong.tested


def test_the_check_would_find_a_boundary_crossed_by_a_hair(half_space, certified):
    """Radii of the true distance times 1.3 are wrong by little: an attack that is any good still shows it."""
    patch = certified.levels["patch"]
    boasting = dataclasses.replace(
        patch, radius=half_space.distance.abs().numpy(), prediction=(half_space.distance < 0).long().numpy()
    )
    claimed = dataclasses.replace(certified, levels={"patch": boasting})
    options = dict(steps=10, copies=8, samples=1000, share=1.0)
    assert not check(half_space, claimed, share=0.9, steps=10, samples=300).violated
    assert check(half_space, claimed, inflate=1.5, **options).violated


def test_limits_and_strangers_of_the_check(half_space, certified):
    found = check(half_space, certified, limit=3, steps=1, copies=1, samples=50)
    assert found.tested == 3
    other = half_space.batches()
    other[0] = HierarchicalBatch(other[0].images, other[0].patch + 999, other[0].slide, other[0].patient)
    with pytest.raises(ValueError, match=r"patch 1\d\d\d was not certified"):
        check(half_space, certified, queries=other, steps=1)
    nothing = dataclasses.replace(certified.levels["patch"], prediction=np.full(40, ABSTAIN))
    with pytest.raises(ValueError, match="no patch is certified"):
        check(half_space, dataclasses.replace(certified, levels={"patch": nothing}))


@pytest.mark.parametrize("target", ["decision", "features"])
@pytest.mark.parametrize(
    "attack",
    [AttackEnsemble(L2(0.1), steps=3, decision_steps=4, restarts=1, queries=5), PGD(L2(0.1), step_size=0.1, steps=4)],
)
def test_target_and_attack_may_be_chosen(half_space, certified, target, attack):
    """An ensemble needs no steps of its own to be told: it attacks each image inside its own radius."""
    honest = check(half_space, certified, target=target, attack=attack, copies=4, samples=200, limit=12)
    assert honest.tested == 12 and not honest.violated
    wrong = check(half_space, certified, target=target, attack=attack, copies=4, samples=200, inflate=4.0, limit=12)
    assert wrong.changed > honest.changed or target == "features"


def test_an_attack_in_another_norm_checks_no_certificate(half_space, certified):
    with pytest.raises(ValueError, match="L2 threat model; got PGD"):
        check(half_space, certified, attack=PGD(Linf(0.1), step_size=0.1, steps=1))
