"""Options of evaluations: what they refuse, and the published preset."""

from __future__ import annotations

import dataclasses

import pytest

from hsat.attacks import FGSM, AttackEnsemble, Linf
from hsat.eval import PAPER, RunOptions, Scoring, Target
from hsat.eval.evaluation import arithmetic_settings
from hsat.eval.objectives import attacks_decision


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (Scoring, {"layer": "pixels"}, "layer .*'features', 'embedding'; got 'pixels'"),
        (Scoring, {"pooling": "sum"}, "pooling .*'mean', 'paper'; got 'sum'"),
        (Scoring, {"absent_classes": "count"}, "absent_classes .*'skip', 'zero'; got 'count'"),
        (Scoring, {"group_by": "name"}, "group_by .*'id', 'id_and_label'; got 'name'"),
        (Scoring, {"bootstrap": -1}, "bootstrap .*at least 0, got -1"),
        (Scoring, {"bootstrap": True}, "bootstrap .*got True"),
        (RunOptions, {"seed": -1}, "seed .*got -1"),
        (RunOptions, {"diagnose": -1}, "diagnose .*got -1"),
        (RunOptions, {"diagnose": True}, "diagnose .*got True"),
        (RunOptions, {"keep_examples": 2.5}, "keep_examples .*got 2.5"),
        (Target, {"objective": "knn"}, "target .*'decision', 'features', 'embedding'; got 'knn'"),
    ],
)
def test_mistakes_name_the_option_and_what_may_be_given(kind, options, words):
    with pytest.raises(ValueError, match=words):
        kind(**options)


def test_options_are_frozen_and_compare_by_value():
    assert Scoring(bootstrap=5) == dataclasses.replace(Scoring(), bootstrap=5) != Scoring()
    with pytest.raises(dataclasses.FrozenInstanceError):
        Scoring().bootstrap = 5


def test_a_target_from_its_name():
    assert Target.of("features") == Target("features") and Target.of(PAPER.target) is PAPER.target
    assert Target() == Target("decision")
    with pytest.raises(ValueError, match="'margin'"):
        Target.of("margin")


def test_the_published_evaluation_is_recognised_by_its_arithmetic():
    assert arithmetic_settings(PAPER.scoring)["compat"] == "paper"
    assert arithmetic_settings(dataclasses.replace(PAPER.scoring, bootstrap=5, layer="embedding"))["compat"] == "paper"
    assert arithmetic_settings(dataclasses.replace(PAPER.scoring, group_by="id"))["compat"] == ""
    assert PAPER.target == Target("embedding", branch="paper")


def test_ensembles_always_attack_the_decision():
    assert attacks_decision(Target("features"), AttackEnsemble(Linf(0.1)))
    assert attacks_decision(Target("decision"), FGSM(Linf(0.1)))
    assert not attacks_decision(Target("features"), FGSM(Linf(0.1)))
