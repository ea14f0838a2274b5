"""evaluate_budget: what its parts give, what its records say, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from hsat.attacks import PGD, Linf, RandomNoise, Reparametrized, Stains, feature_drift
from hsat.classifiers import KNNClassifier
from hsat.embedding import embed
from hsat.eval import (
    BudgetResult,
    PatchBudget,
    Provenance,
    RunOptions,
    Scoring,
    evaluate_budget,
    evaluate_whitebox,
    metrics_by_level,
    pool,
    read_records,
    write_records,
)
from hsat.eval.patch_flips import patches_to_flip
from hsat.report import markdown_table

PGD8 = PGD(Linf(8 / 255), step_size=2 / 255, steps=5)
FAST = dict(classifier=KNNClassifier(k=15), scoring=Scoring(bootstrap=50))
NAMED = dict(budget=PatchBudget(name="PGD-8"), provenance=Provenance(model="toy"))


@pytest.fixture(scope="module")
def bank(toy_batches):
    return toy_batches(seed=1, sizes=(30, 30, 30), first_id=1000)


@pytest.fixture(scope="module")
def queries(toy_batches):
    return toy_batches(seed=2, sizes=(30, 24))


@pytest.fixture
def result(toy_encoder, bank, queries):
    return evaluate_budget(toy_encoder, bank, queries, PGD8, **NAMED, **FAST)


def test_the_whole_agrees_with_the_white_box_evaluation(toy_encoder, bank, queries):
    """Altering nothing is the clean accuracy; the attacked patches are those of evaluate_whitebox."""
    options = FAST | dict(target="features", run=RunOptions(seed=3))
    found = evaluate_budget(toy_encoder, bank, queries, PGD8, **options)
    other = evaluate_whitebox(toy_encoder, bank, queries, {"PGD": PGD8}, **options)
    np.testing.assert_array_equal(found.attacked.z, other.tables["PGD"].z)
    np.testing.assert_array_equal(found.clean.z, other.tables["clean"].z)
    clean = [r.value for r in other.records if (r.attack_name, r.level, r.metric) == ("clean", "patient", "accuracy")]
    assert found.accuracy(0.0) == clean[0]
    scores = [other.scores[name][15] for name in ("clean", "PGD")]
    labels, patients = other.tables["clean"].label, other.tables["clean"].patient
    np.testing.assert_array_equal(found.needed, patches_to_flip(*scores, patients, labels))


def test_the_attacked_vote_flips_patients_with_a_part_of_their_patches(result):
    assert isinstance(result, BudgetResult)
    assert result.accuracy(0.0) == 1.0
    assert result.accuracy(1.0) == 0.0
    assert ((result.smallest_fraction > 0) & (result.smallest_fraction <= 0.9)).all()
    curve = [result.accuracy(f) for f in np.linspace(0, 1, 21)]
    assert curve == sorted(curve, reverse=True)
    assert result.flipped(1.0) == 1.0
    assert result.sizes.tolist() == [6] * 9


def test_the_smallest_count_does_flip(toy_encoder, bank, result):
    """Replayed through `pool` on the scores of the two tables."""
    knn = KNNClassifier(k=15).fit(embed(toy_encoder, bank))
    clean, attacked = knn.predict_proba(result.clean), knn.predict_proba(result.attacked)
    for group, label, needed in zip(result.groups, result.labels, result.needed, strict=True):
        rows = np.flatnonzero(result.clean.patient == group)
        rival = np.delete(np.arange(3), label)
        gain = (attacked - clean)[rows][:, rival] - (attacked - clean)[rows, label][:, None]
        flipped = []
        for column in range(2):
            mixed = clean[rows].copy()
            chosen = np.argsort(-gain[:, column], kind="stable")[: int(needed)]
            mixed[chosen] = attacked[rows][chosen]
            flipped.append(int(pool(mixed, np.zeros(6)).scores.argmax()) != label)
        assert any(flipped), f"{needed} altered patches do not change the decision of patient {group}"


def test_slides_have_their_own_budget(toy_encoder, bank, queries):
    found = evaluate_budget(toy_encoder, bank, queries, PGD8, budget=PatchBudget(level="slide"), **FAST)
    assert len(found.groups) == 18
    np.testing.assert_array_equal(found.groups, np.unique(found.clean.slide))
    of = dict(zip(found.clean.slide.tolist(), found.clean.patient.tolist(), strict=True))
    assert found.patients.tolist() == [of[slide] for slide in found.groups.tolist()]
    assert {record.level for record in found.records} == {"slide"}


def test_a_harmless_attack_never_flips(toy_encoder, bank, queries):
    still = evaluate_budget(
        toy_encoder,
        bank,
        queries,
        PGD(Linf(0.0), step_size=0.01, steps=1),
        budget=PatchBudget(fractions=(1.0,)),
        **FAST,
    )
    assert np.isinf(still.needed).all()
    assert still.accuracy(1.0) == 1.0
    summary = still.records[-1]
    assert (summary.metric, summary.value) == ("smallest_fraction", 1.0)
    assert summary.settings["never_flipped"] == 9


def test_the_worst_choice_needs_no_more_than_a_random_one(toy_encoder, bank, queries, result):
    drawn = evaluate_budget(toy_encoder, bank, queries, PGD8, budget=PatchBudget(order="random"), **FAST)
    assert (drawn.needed >= result.needed).all()
    assert drawn.records[1].settings["order"] == "random"


def test_objectives_of_ones_own_and_attacks_in_other_spaces(toy_encoder, bank, queries):
    seen = []

    def objective(images, batch):
        seen.append(batch.label.tolist())
        return feature_drift(toy_encoder.features, images, "l2")

    stain = Reparametrized(Stains(), PGD(Linf(0.1, low=-1, high=1), step_size=0.03, steps=4))
    found = evaluate_budget(toy_encoder, bank, queries, stain, budget=PatchBudget(objective=objective), **FAST)
    assert seen == [batch.label.tolist() for batch in queries]
    assert {record.target for record in found.records} == {"custom"}
    assert found.records[1].eps == "0.1"
    noise = evaluate_budget(toy_encoder, bank, queries, RandomNoise(Linf(8 / 255)), **FAST)
    assert (noise.needed >= 1).all() and noise.accuracy(0.5) == 1.0


def test_the_chance_level_is_that_of_the_groups(result):
    """Nine patients, three of each class; the smallest fraction has none."""
    assert {record.chance for record in result.records if record.metric == "accuracy"} == {1 / 3}
    assert result.records[-1].chance is None


def test_records_say_it_all_and_make_a_table(result, tmp_path):
    names = [(record.attack_name, record.metric) for record in result.records]
    budgets = ["PGD-8@5%", "PGD-8@10%", "PGD-8@25%", "PGD-8@50%", "PGD-8@100%"]
    assert names == [("clean", "accuracy"), *((n, "accuracy") for n in budgets), ("PGD-8", "smallest_fraction")]
    assert read_records(write_records(tmp_path / "r.jsonl", result.records)) == result.records
    at = result.records[4]
    assert (at.target, at.level, at.n, at.k, at.eps) == ("decision", "patient", 9, 15, "8/255")
    assert at.value == result.accuracy(0.5)
    assert at.low <= at.value <= at.high
    assert at.settings["budget_fraction"] == 0.5
    assert (at.settings["already_wrong"], at.settings["never_flipped"]) == (0, 0)
    assert result.records[-1].value == pytest.approx(result.smallest_fraction.mean())
    assert "PGD-8@25%" in markdown_table(result.records)


def test_already_wrong_patients_need_nothing(toy_encoder, bank, queries):
    """Labels turned by one: every patient is wrong from the start."""
    turned = type(queries)(type(b)(b.images, b.patch, b.slide, b.patient, (b.label + 1) % 3) for b in queries)
    found = evaluate_budget(toy_encoder, bank, turned, PGD8, **FAST)
    assert not found.needed.any()
    assert found.accuracy(0.0) == 0.0 and np.isnan(found.flipped(1.0))
    assert found.records[-1].settings["already_wrong"] == 9
    assert (
        metrics_by_level(KNNClassifier(k=15).fit(embed(toy_encoder, bank)).predict_proba(found.clean), found.clean)[
            "patient"
        ].accuracy
        == 0
    )


def test_the_encoder_is_left_as_it_was_and_seeds_repeat(toy_encoder, bank, queries, result):
    toy_encoder.train()
    again = evaluate_budget(toy_encoder, bank, queries, PGD8, **NAMED, **FAST)
    assert toy_encoder.training
    np.testing.assert_array_equal(again.needed, result.needed)
    assert again.records == result.records


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": "patch"}, "'slide' or 'patient'"),
        ({"order": "best"}, "'worst', 'random'"),
        ({"fractions": (10,)}, "write 0.1"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        PatchBudget(**options)


def test_targets_and_names_are_checked(toy_encoder, bank, queries):
    with pytest.raises(ValueError, match="'logits'"):
        evaluate_budget(toy_encoder, bank, queries, PGD8, target="logits", **FAST)
    with pytest.raises(ValueError, match="'clean'"):
        evaluate_budget(toy_encoder, bank, queries, PGD8, budget=PatchBudget(name="clean"), **FAST)


def test_fractions_are_checked(result):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        result.accuracy(10)


def test_every_record_has_an_interval_or_says_why_not(result, toy_encoder, bank, queries):
    assert all((r.low is None) == ("no_interval" in r.settings) for r in result.records)
    mean = result.records[-1]
    assert mean.low < mean.value < mean.high
    alone = evaluate_budget(toy_encoder, bank, queries, PGD8, **FAST | dict(scoring=Scoring(bootstrap=0)))
    assert {(r.low, r.settings["no_interval"]) for r in alone.records} == {(None, "no resamples")}
    exact = next(r for r in result.records if r.value == 1.0)
    assert exact.high == 1.0 and exact.settings["interval"].startswith("exact bound")
