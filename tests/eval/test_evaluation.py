"""What all evaluations share: classifiers of a bank and their names, settings that decide results, record templates."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hsat.attacks import PGD, Linf
from hsat.classifiers import KNNClassifier, NearestCentroid
from hsat.embedding import embed
from hsat.eval import Provenance, RunOptions, Scoring, Target, evaluate_whitebox
from hsat.eval.evaluation import Evaluation, classifier_settings, fit_bank, score_queries

PGD2 = PGD(Linf(2 / 255), step_size=1 / 255, steps=2)


@pytest.fixture
def bank(toy_encoder, toy_batches):
    return embed(toy_encoder, toy_batches(seed=1, sizes=(30,), first_id=1000))


@pytest.fixture
def queries(toy_batches):
    return toy_batches(seed=2, sizes=(12,))


def test_keys_are_k_for_nearest_neighbours_and_settings_for_others(bank):
    settings = [KNNClassifier(k=5), NearestCentroid(), KNNClassifier(k=np.int64(3))]
    classifiers = fit_bank(settings, bank)
    assert [one.key for one in classifiers] == [5, repr(settings[1]), 3] and type(classifiers[2].key) is int
    assert [one.attacked for one in classifiers] == [True, False, False]
    assert [one.name for one in classifiers] == ["k=5", repr(settings[1]), "k=3"]
    scores = score_queries(classifiers, bank)
    assert list(scores) == [one.key for one in classifiers]
    for one in classifiers:
        np.testing.assert_array_equal(scores[one.key], one.fitted.predict_proba(bank))


def test_ks_that_are_cut_to_the_same_are_one(bank):
    with pytest.warns(UserWarning, match="k=40 is more than the 30 rows"):
        assert [one.key for one in fit_bank([KNNClassifier(k=40), KNNClassifier(k=30)], bank)] == [30]
    with pytest.raises(ValueError, match="no classifier"):
        fit_bank([], bank)


def test_two_classifiers_of_one_key_are_refused_unless_they_are_the_same(bank):
    two = [KNNClassifier(k=5), NearestCentroid(), KNNClassifier(k=5, temperature=0.5)]
    with pytest.raises(ValueError, match=r"key 5: KNNClassifier\(k=5, temperature=0.07.*temperature=0.5"):
        fit_bank(two, bank)
    assert [one.key for one in fit_bank([*two[:2], KNNClassifier(k=5)], bank)] == [5, repr(two[1])]


def test_any_classifier_can_be_attacked(toy_encoder, bank, queries):
    options = dict(scoring=Scoring(bootstrap=0), run=RunOptions(noise=False))
    result = evaluate_whitebox(toy_encoder, bank, queries, {"PGD-2": PGD2}, classifier=NearestCentroid(), **options)
    accuracy = {r.attack_name: r.value for r in result.records if (r.level, r.metric) == ("patch", "accuracy")}
    assert accuracy["PGD-2"] < accuracy["clean"]
    assert {(r.classifier, r.k, r.temperature) for r in result.records} == {(repr(NearestCentroid()), 0, 0.0)}
    assert list(result.scores["clean"]) == [repr(NearestCentroid())]


def evaluation(encoder, **options):
    chosen = dict(target=Target(), scoring=Scoring(), run=RunOptions(), provenance=Provenance()) | options
    return Evaluation(encoder, **chosen)


def test_settings_hold_what_decides_results_and_nothing_else(toy_encoder, bank, queries):
    attacks = {"a": PGD2}
    before = evaluation(toy_encoder).settings(queries, attacks)
    same = evaluation(
        toy_encoder,
        scoring=Scoring(bootstrap=3, pooling="paper"),
        run=RunOptions(progress=True, diagnose=3, noise=False),
        provenance=Provenance(model="m", checkpoint="c"),
    )
    assert same.settings(queries, attacks) == before
    for changed, names in (
        (dict(run=RunOptions(seed=1)), {"seed"}),
        (dict(run=RunOptions(keep_examples=1)), {"examples_of_classes"}),
        (dict(scoring=Scoring(layer="embedding")), {"layer"}),
        (dict(target=Target("features", branch="pgd")), {"target", "attack_branch"}),
        (dict(provenance=Provenance(class_names=("a", "b", "c"))), {"encoder.classes"}),
    ):
        after = evaluation(toy_encoder, **changed).settings(queries, attacks)
        assert {name for name in before | after if before.get(name) != after.get(name)} == names
    other = evaluation(toy_encoder).settings(queries, {"a": dataclasses.replace(PGD2, steps=3)})
    assert {name for name in before if before[name] != other[name]} == {"attack.a"}
    one, two = (classifier_settings(fit_bank(KNNClassifier(k=k), bank), bank) for k in (3, 5))
    assert {name for name in one if one[name] != two[name]} == {"classifier"}


def test_labels_of_a_loader_without_class_names_are_those_of_the_classifier(toy_encoder, queries):
    unnamed = list(queries)
    assert evaluation(toy_encoder).query_info(unnamed, ("x", "y", "z")).class_names == ("x", "y", "z")
    assert evaluation(toy_encoder).query_info(queries, ("x", "y", "z")).class_names == ("cyan", "green", "red")
    named = evaluation(toy_encoder, provenance=Provenance(class_names=("a", "b", "c")))
    assert named.query_info(queries, ("x", "y", "z")).class_names == ("a", "b", "c")
