"""rescore: the records that evaluating again under another arithmetic would give."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hsat.attacks import PGD, Linf
from hsat.eval import PAPER, KNNClassifier, RunOptions, Scoring, evaluate_whitebox, rescore

PUBLISHED = dict(pooling="paper", absent_classes="zero", group_by="id_and_label")


@pytest.fixture
def evaluated(toy_encoder, toy_batches):
    bank, queries = toy_batches(seed=1, sizes=(45,), first_id=1000), toy_batches(seed=2, sizes=(20, 16))
    attacks = {"PGD-8": PGD(Linf(8 / 255), step_size=2 / 255, steps=2)}

    classifiers = [KNNClassifier(k=15), KNNClassifier(k=5)]

    def run(**scoring):
        return evaluate_whitebox(
            toy_encoder,
            bank,
            queries,
            attacks,
            classifier=classifiers,
            target="features",
            scoring=Scoring(**scoring, bootstrap=40),
            run=RunOptions(noise=False, seed=2),
        )

    return run


@pytest.mark.parametrize(
    "scoring", [{}, dict(pooling="paper"), dict(absent_classes="zero"), dict(group_by="id_and_label"), PUBLISHED]
)
def test_equals_evaluating_again(evaluated, scoring):
    assert rescore(evaluated(), Scoring(**scoring)).records == evaluated(**scoring).records


def test_there_and_back_again(evaluated):
    own = evaluated()
    assert rescore(rescore(own, PAPER.scoring), Scoring()).records == own.records


def test_a_patient_with_two_labels_is_two_groups(evaluated):
    result = evaluated()
    tables = {}
    for name, table in result.tables.items():
        label = table.label.copy()
        label[0] = (label[0] + 1) % 3  # one patch of a patient gets another label
        tables[name] = dataclasses.replace(table, label=label)
    mixed = dataclasses.replace(result, tables=tables)
    with pytest.raises(ValueError, match="holds patches with labels"):
        rescore(mixed, Scoring())
    split = rescore(mixed, Scoring(group_by="id_and_label"))
    sizes = {record.level: record.n for record in split.records}
    before = {record.level: record.n for record in result.records}
    assert sizes == before | {level: before[level] + 1 for level in ("slide", "patient")}
    assert len(np.unique(result.tables["clean"].patient)) == before["patient"]
