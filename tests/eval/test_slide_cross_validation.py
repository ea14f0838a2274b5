"""cross_validate_slides: whole patients in one fold, alike by class, decided by classifiers that never saw them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hsat.classifiers import ABMIL, MIL, predict_slides
from hsat.eval import Provenance, Scoring, cross_validate_slides
from hsat.types import EmbeddingTable


def cohort(*, patients=12, slides=2, patches=5, signal=6.0, seed=0):
    rng = np.random.default_rng(seed)
    n = patients * slides * patches
    slide = np.arange(n) // patches
    patient = slide // slides
    label = patient % 2
    z = rng.normal(size=(n, 6)) + 2
    first = np.arange(n) % patches == 0
    z[first, 1] += np.where(label[first] == 1, signal, -signal)
    return EmbeddingTable(
        z, label, np.arange(n), slide + 500, patient + 30, ("benign", "tumour"), cohort="c", split="s"
    )


class Learner:
    """Notes the patients it is trained on, and answers with the constant 0."""

    def __init__(self):
        self.trained = []

    def __repr__(self):
        return "Learner()"

    def fit(self, bank):
        self.trained.append(set(bank.patient.tolist()))
        assert bank.norm is not None

        class Constant(torch.nn.Module):
            def forward(self, bag):
                return torch.tensor([1.0, 0.0])

        return MIL(Constant(), bank.class_names)


def test_no_patient_is_trained_on_and_decided():
    table, learner = cohort(patients=13), Learner()
    result = cross_validate_slides(learner, table, folds=4, scoring=Scoring(bootstrap=20))
    for number, trained in enumerate(learner.trained):
        decided = set(result.patient[result.fold == number].tolist())
        assert decided and not decided & trained and decided | trained == set(table.patient.tolist())
    for patient in np.unique(result.patient):
        assert len(set(result.fold[result.patient == patient].tolist())) == 1
    for label in (0, 1):
        per_fold = [len(set(result.patient[(result.fold == f) & (result.label == label)])) for f in range(4)]
        assert max(per_fold) - min(per_fold) <= 1, "classes are dealt out alike"
    np.testing.assert_array_equal(result.slide, np.unique(table.slide))
    other = cross_validate_slides(Learner(), table, folds=4, seed=1, scoring=Scoring(bootstrap=20))
    assert not np.array_equal(other.fold, result.fold)


def test_out_of_fold_accuracy_of_a_problem_that_can_be_learned():
    settings = ABMIL(hidden=8, epochs=20, learning_rate=3e-3)
    result = cross_validate_slides(
        settings, cohort(), folds=3, scoring=Scoring(bootstrap=50), provenance=Provenance(model="m")
    )
    again = cross_validate_slides(settings, cohort(), folds=3, scoring=Scoring(bootstrap=50))
    np.testing.assert_array_equal(result.scores, again.scores)
    assert result.accuracy >= 0.9 and len(result.classifiers) == 3
    by = {(record.level, record.metric): record for record in result.records}
    accuracy = by["slide", "accuracy"]
    assert accuracy.value == result.accuracy and accuracy.n == 24 and by["patient", "accuracy"].n == 12
    assert accuracy.low is not None and accuracy.high is not None
    assert (accuracy.model, accuracy.cohort, accuracy.split, accuracy.attack_name) == ("m", "c", "s", "clean")
    assert accuracy.settings["cross_validation_folds"] == 3 and accuracy.classifier == repr(settings)


@pytest.mark.slow
def test_nothing_leaks_where_there_is_nothing_to_learn():
    """Labels by patient and patches of pure noise of the patient: a leak of patients would show as high accuracy."""
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(16), 10)
    own = rng.normal(size=(16, 12)) * 3
    z = own[patient] + 0.1 * rng.normal(size=(160, 12))
    label = rng.permutation(np.arange(16) % 2)[patient]
    table = EmbeddingTable(z, label, np.arange(160), np.arange(160) // 5, patient, ("a", "b"))
    settings = ABMIL(hidden=8, epochs=60, learning_rate=5e-3, weight_decay=0.0, dropout=0.0)
    result = cross_validate_slides(settings, table, folds=4, scoring=Scoring(bootstrap=0))
    assert result.accuracy < 0.8
    fitted = settings.fit(table)
    assert (predict_slides(fitted, table).argmax(1) == result.label).mean() > 0.95, "it does learn what it is shown"


def test_folds_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match=r"class 'benign' has 2 patients, too few for 5 folds.*folds=2"):
        cross_validate_slides(Learner(), cohort(patients=4))
    with pytest.raises(ValueError, match="at least 2, got 1"):
        cross_validate_slides(Learner(), cohort(), folds=1)
