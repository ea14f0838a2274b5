"""What an evaluation will cost: passes that were counted agree with those that are spent, and nothing is disturbed."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from torch import nn

from hsat.attacks import APGD, L2, MIFGSM, PGD, VMIFGSM, AttackEnsemble, Linf, Masked, NaturalShift, RandomNoise, Square
from hsat.classifiers import KNNClassifier
from hsat.eval import RunOptions, Scoring, evaluate_whitebox, paper_attacks
from hsat.eval.cost import EvaluationCost, sample_batch
from hsat.eval.passes import affordable_diagnosis, count_passes, diagnosis_passes

BALL = Linf(8 / 255)
ATTACKS = {
    "PGD": PGD(BALL, step_size=2 / 255, steps=3),
    "restarts": PGD(BALL, step_size=2 / 255, steps=2, restarts=2),
    "MIFGSM": MIFGSM(L2(0.5), step_size=0.1, steps=4),
    "APGD": APGD(BALL, steps=5),
    "VMIFGSM": VMIFGSM(BALL, step_size=2 / 255, steps=2, samples=3),
    "Square": Square(BALL, queries=7),
    "noise": RandomNoise(BALL),
    "shift": NaturalShift("blur", 1.0),
}
FAST = {"classifier": KNNClassifier(k=15), "scoring": Scoring(bootstrap=0)}


@pytest.fixture(scope="module")
def bank(toy_batches):
    return toy_batches(seed=1, sizes=(30, 30), first_id=1000)


@pytest.mark.parametrize("name", ATTACKS)
def test_passes_are_those_that_are_spent(name, toy_encoder, toy_batches, bank):
    queries = toy_batches(seed=2, sizes=(6,))
    result = evaluate_whitebox(
        toy_encoder, bank, queries, {"attack": ATTACKS[name]}, run=RunOptions(noise=False), **FAST
    )
    record = next(record for record in result.records if record.attack_name == "attack")
    assert count_passes(ATTACKS[name]) == (record.forwards, record.backwards)


def test_passes_of_an_ensemble_are_a_bound(toy_encoder, toy_batches, bank):
    ensemble = AttackEnsemble(BALL, steps=2, decision_steps=3, restarts=1, queries=5)
    result = evaluate_whitebox(toy_encoder, bank, toy_batches(seed=2, sizes=(6,)), {"e": ensemble}, **FAST)
    record = next(record for record in result.records if record.attack_name == "e")
    forwards, backwards = count_passes(ensemble, classes=3)
    assert 0 < record.forwards <= forwards and 0 < record.backwards <= backwards


def test_an_attack_of_another_shape_says_its_steps():
    mask = torch.ones(1, 1, 6, 6)
    assert count_passes(PGD(Masked(BALL, mask), step_size=0.1, steps=4, restarts=2)) == (8, 8)


def test_the_diagnosis_takes_at_most_a_quarter_where_there_are_enough_patches():
    attacks = paper_attacks() | NaturalShift.standard()
    forwards, backwards = diagnosis_passes([attack for attack in attacks.values() if hasattr(attack, "threat")])
    each = sum(1 + sum(count_passes(attack)) + count_passes(attack)[1] for attack in attacks.values()) + 1
    for images in (100, 254, 300):
        count = affordable_diagnosis(images, attacks)
        assert 8 <= count <= 32
        spent, whole = count * (forwards + 2 * backwards), images * each
        assert spent <= 0.25 * (spent + whole)
    assert affordable_diagnosis(5, attacks) == 8 and affordable_diagnosis(10_000, attacks) == 32


def test_attacks_that_do_the_same_count_once():
    pgd, bim = paper_attacks(names=["pgd"]), paper_attacks(names=["pgd", "bim"])
    assert diagnosis_passes([*pgd.values()]) == diagnosis_passes([*bim.values()])
    assert diagnosis_passes([]) == (0, 0)


def test_it_is_said_where_progress_is_shown_and_nothing_moves(
    toy_encoder, toy_batches, bank, caplog, capsys, monkeypatch
):
    monkeypatch.setattr("hsat.progress.EVERY", 0.0)
    queries, attacks = toy_batches(seed=2, sizes=(6, 4)), {"PGD-8": ATTACKS["PGD"], "blur 1": NaturalShift("blur", 1)}
    with caplog.at_level(logging.INFO, logger="hsat"):
        silent = evaluate_whitebox(toy_encoder, bank, queries, attacks, run=RunOptions(diagnose=4), **FAST)
        assert not caplog.messages
        state = torch.get_rng_state()
        loud = evaluate_whitebox(toy_encoder, bank, queries, attacks, run=RunOptions(diagnose=4, progress=True), **FAST)
    assert torch.equal(torch.get_rng_state(), state)
    assert [dataclasses.asdict(one) for one in loud.records] == [dataclasses.asdict(one) for one in silent.records]
    first, second = caplog.messages
    assert first.startswith("10 patches: at most 7 forward and 3 backward passes each, about ")
    assert "; diagnosis of 4 of them about " in first
    assert second == "memory beside the encoder: bank under 1 MB, images of a batch under 1 MB"
    assert "diagnosing PGD-8" in capsys.readouterr().err


def test_a_loader_that_can_be_read_once_is_left_alone(toy_batches):
    batches = toy_batches(seed=2, sizes=(6, 4))
    assert len(sample_batch(batches, 3)) == 3
    assert sample_batch(iter(batches), 3) is None
    assert sample_batch([], 3) is None


def test_text_without_measurement():
    cost = EvaluationCost(images=None, forwards=12, backwards=5, bank_bytes=2_000_000)
    assert str(cost).splitlines() == [
        "patches: at most 12 forward and 5 backward passes each",
        "memory beside the encoder: bank 2 MB",
    ]


class Slow(nn.Module):
    def forward(self, images):
        return images.mean((2, 3))


def test_a_large_bank_is_announced(toy_batches, bank, caplog, monkeypatch):
    monkeypatch.setattr("hsat.eval.announcements.LONG_BANK", 0.0)
    with caplog.at_level(logging.INFO, logger="hsat"):
        run = RunOptions(progress=True, noise=False)
        evaluate_whitebox(Slow(), bank, toy_batches(seed=2, sizes=(3,)), {"n": RandomNoise(BALL)}, run=run, **FAST)
    assert caplog.messages[0].startswith("bank of 60 patches: about ")
