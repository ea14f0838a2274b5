from __future__ import annotations

import numpy as np
import pytest

from hsat.eval import Interval, bootstrap_intervals, metrics
from hsat.eval.scoring import METRICS


def cohort(rng, *, patients, patches, classes=3, sharpness=1.0):
    """Scores whose quality varies from patient to patient."""
    label = np.repeat(np.arange(patients) % classes, patches)
    good = np.repeat(rng.beta(2, 1, patients), patches)
    correct = rng.random(patients * patches) < good
    predicted = np.where(correct, label, (label + rng.integers(1, classes, len(label))) % classes)
    scores = np.eye(classes)[predicted] * sharpness + rng.random((len(label), classes)) * 0.5
    return scores, label, np.repeat(np.arange(patients) * 7, patches)


@pytest.mark.parametrize("compat", [None, "paper"])
def test_equals_drawing_rows_again(compat):
    """Weights per patient give what repeating each patient's rows gives."""
    rng = np.random.default_rng(0)
    scores, labels, patients = cohort(rng, patients=7, patches=5)
    order = rng.permutation(len(labels))[:24]  # patients of different sizes
    scores, labels, patients = scores[order], labels[order], patients[order]
    found = bootstrap_intervals(
        scores, labels, patients, generator=np.random.default_rng(3), resamples=60, confidence=0.8, compat=compat
    )
    drawn = np.random.default_rng(3).multinomial(7, np.full(7, 1 / 7), size=60)
    rows = np.unique(patients, return_inverse=True)[1]
    values = [
        metrics(np.repeat(scores, counts[rows], 0), np.repeat(labels, counts[rows]), compat=compat).as_dict()
        for counts in drawn
    ]
    for name in METRICS:
        expected = np.quantile([value[name] for value in values], (0.1, 0.9))
        np.testing.assert_allclose((found[name].low, found[name].high), expected, atol=1e-12)


def test_same_seed_same_interval_and_order_does_not_matter():
    scores, labels, patients = cohort(np.random.default_rng(1), patients=9, patches=4)

    def run(rows, seed):
        return bootstrap_intervals(
            scores[rows], labels[rows], patients[rows], generator=np.random.default_rng(seed), resamples=200
        )

    first, shuffled = run(np.arange(36), 5), run(np.random.default_rng(2).permutation(36), 5)
    assert run(np.arange(36), 5) == first
    assert run(np.arange(36), 6) != first
    for name in METRICS:
        assert (shuffled[name].low, shuffled[name].high) == pytest.approx((first[name].low, first[name].high))
        assert 0 <= first[name].low <= first[name].high <= 1


def test_interval_of_a_constant_is_a_point():
    labels = np.arange(12) % 3
    found = bootstrap_intervals(np.eye(3)[labels], labels, np.arange(12) // 2, generator=np.random.default_rng(0))
    assert all(interval == Interval(1.0, 1.0) for interval in found.values())


def test_a_wider_confidence_is_a_wider_interval():
    scores, labels, patients = cohort(np.random.default_rng(1), patients=12, patches=4)
    narrow, wide = (
        bootstrap_intervals(scores, labels, patients, generator=np.random.default_rng(0), confidence=c)["accuracy"]
        for c in (0.5, 0.99)
    )
    assert wide.low < narrow.low < narrow.high < wide.high


def test_coverage_and_why_patients_are_resampled():
    """About 95 % of the intervals hold the true accuracy; resampling patches would hold it far less often."""
    rng = np.random.default_rng(4)
    truth, rounds = 2 / 3, 150  # mean of Beta(2, 1)
    held = {"patients": 0, "patches": 0}
    for _ in range(rounds):
        scores, labels, patients = cohort(rng, patients=40, patches=25)
        for name, units in (("patients", patients), ("patches", np.arange(len(labels)))):
            interval = bootstrap_intervals(scores, labels, units, generator=rng, names=("accuracy",), resamples=200)[
                "accuracy"
            ]
            held[name] += interval.low <= truth <= interval.high
    assert 0.88 <= held["patients"] / rounds <= 0.99
    assert held["patches"] / rounds <= 0.75


def test_no_interval_and_why():
    scores, labels = np.eye(3), np.arange(3)
    one = bootstrap_intervals(scores, labels, [5, 5, 5], generator=np.random.default_rng(0))
    assert one["mca"] == Interval(None, None, "one patient only")
    none = bootstrap_intervals(scores, labels, [1, 2, 3], generator=np.random.default_rng(0), resamples=0)
    assert none["mca"] == Interval(None, None, "no resamples")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(patients=[0, 1]), r"3 rows of scores but patients has shape \(2,\)"),
        (dict(labels=[0]), r"3 rows of scores but labels has shape \(1,\)"),
        (dict(names=["recall"]), r"unknown metrics \['recall'\]; choose from \['accuracy'"),
        (dict(resamples=-1), r"resamples must be 0 \(no interval\) or more, got -1"),
        (dict(confidence=95), "confidence must lie between 0 and 1, got 95; for 95 % write 0.95"),
    ],
)
def test_errors(options, message):
    arguments = dict(labels=[0, 1, 2], patients=[0, 1, 2], generator=np.random.default_rng(0)) | options
    with pytest.raises(ValueError, match=message):
        bootstrap_intervals(np.eye(3), **arguments)
