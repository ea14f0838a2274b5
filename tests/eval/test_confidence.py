from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hsat.eval import Interval, bootstrap_intervals, metrics
from hsat.eval.confidence import (
    EXACT,
    METHODS,
    NO_SPREAD,
    binomial_tail,
    clopper_pearson_lower,
    clopper_pearson_radius,
    clopper_pearson_upper,
)
from hsat.eval.metrics import METRICS


def cohort(rng, *, patients, patches, classes=3, sharpness=1.0):
    """Scores whose quality varies from patient to patient."""
    label = np.repeat(np.arange(patients) % classes, patches)
    good = np.repeat(rng.beta(2, 1, patients), patches)
    correct = rng.random(patients * patches) < good
    predicted = np.where(correct, label, (label + rng.integers(1, classes, len(label))) % classes)
    scores = np.eye(classes)[predicted] * sharpness + rng.random((len(label), classes)) * 0.5
    return scores, label, np.repeat(np.arange(patients) * 7, patches)


@pytest.mark.parametrize("absent_classes", ["skip", "zero"])
def test_equals_drawing_rows_again(absent_classes):
    """Weights per patient give what repeating each patient's rows gives."""
    rng = np.random.default_rng(0)
    scores, labels, patients = cohort(rng, patients=7, patches=5)
    order = rng.permutation(len(labels))[:24]  # patients of different sizes
    scores, labels, patients = scores[order], labels[order], patients[order]
    found = bootstrap_intervals(
        scores,
        labels,
        patients,
        generator=np.random.default_rng(3),
        resamples=60,
        confidence=0.8,
        absent_classes=absent_classes,
        method="percentile",
    )
    drawn = np.random.default_rng(3).multinomial(7, np.full(7, 1 / 7), size=60)
    rows = np.unique(patients, return_inverse=True)[1]
    values = [
        metrics(
            np.repeat(scores, counts[rows], 0), np.repeat(labels, counts[rows]), absent_classes=absent_classes
        ).as_dict()
        for counts in drawn
    ]
    for name in METRICS:
        if found[name].reason:
            assert len({value[name] for value in values}) == 1
            continue
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


@pytest.mark.parametrize("right", [True, False])
def test_patients_that_all_score_alike_get_an_exact_bound(right):
    """Twelve patients, all right or all wrong: the Clopper-Pearson bound with patients as trials, never a point."""
    labels, patients = np.repeat(np.arange(12) % 3, 2), np.repeat(np.arange(12), 2)
    scores = np.eye(3)[labels if right else (labels + 1) % 3] + np.eye(3)[(labels + 2) % 3] * (0 if right else 0.5)
    found = bootstrap_intervals(scores, labels, patients, generator=np.random.default_rng(0))
    bound = 1 - 0.025 ** (1 / 12)
    expected = (1 - bound, 1.0) if right else (0.0, bound)
    assert (found["accuracy"].low, found["accuracy"].high) == pytest.approx(expected)
    assert found["accuracy"].reason == EXACT
    # four patients in each class: prod (1 - r) ** 4 = 0.025 is met with equal r
    assert (found["mca"].low, found["mca"].high) == pytest.approx(expected)
    if right:
        assert found["map"] == Interval(None, None, NO_SPREAD)


@pytest.mark.parametrize("counts", [(5,), (3, 3), (2, 9), (1, 4, 30)])
def test_the_exact_bound_is_the_largest_mean(counts):
    """No vector of recalls whose likelihood reaches the tail lies further out; the bound itself is reached."""
    counts, tail = np.array(counts), 0.025
    bound = clopper_pearson_radius(counts, tail)
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(len(counts), 0.4), size=20_000)  # how the log-likelihood is spent on the groups
    recall = 1 - np.exp(np.log(tail) * shares / counts)
    assert recall.mean(1).max() <= bound + 1e-9
    assert recall.mean(1).max() >= bound - 2e-3


@pytest.mark.parametrize("seed", range(4))
def test_patients_of_several_classes_are_one_trial_however_their_classes_depend(seed):
    """No recalls under which all patients are wrong as often as the tail average more than the bound allows."""
    rng = np.random.default_rng(seed)
    has = np.ones((10, 2), dtype=bool) if seed == 0 else rng.random((12, 3)) < 0.6
    patients, labels = np.nonzero(has)
    scores = np.eye(has.shape[1] + 1)[np.full(len(labels), has.shape[1])]
    found = bootstrap_intervals(scores, labels, patients, generator=np.random.default_rng(0))
    log_wrong = np.log(rng.random((20_000, has.shape[1])))
    together = np.where(has, log_wrong[:, None], 0.0).min(2).sum(1)  # the classes of a patient fail together
    recall = (1 - np.exp(log_wrong * (np.log(0.025) / together)[:, None])).mean(1)
    assert recall.max() <= found["mca"].high + 1e-9
    if seed == 0:
        assert found["mca"] == found["accuracy"] == Interval(0.0, pytest.approx(1 - 0.025 ** (1 / 10)), EXACT)


def test_the_bound_says_that_it_is_of_patients_where_their_rows_differ():
    labels, patients = np.zeros(7, dtype=int), np.array([0, 0, 0, 1, 2, 3, 4])
    found = bootstrap_intervals(np.eye(2)[labels], labels, patients, generator=np.random.default_rng(0))
    assert found["accuracy"].reason == EXACT + "; of the mean over patients, whose numbers of rows differ"


def test_no_spread_away_from_the_ends_is_no_interval():
    labels = np.zeros(8, dtype=int)
    scores = np.eye(2)[[0, 1] * 4]
    found = bootstrap_intervals(scores, labels, np.repeat(np.arange(4), 2), generator=np.random.default_rng(0))
    assert found["accuracy"] == Interval(None, None, NO_SPREAD)


def test_a_class_that_drops_out_of_a_resample():
    """The class of the one patient who has it is missing from a third of the resamples: they average the others."""
    labels = np.array([0, 0, 0, 0, 1, 1])
    scores = np.eye(2)[[0, 0, 1, 0, 1, 0]]
    options = dict(generator=np.random.default_rng(0), names=("mca",), resamples=400, method="percentile")
    found = bootstrap_intervals(scores, labels, [0, 0, 1, 1, 2, 2], **options)["mca"]
    drawn = np.random.default_rng(0).multinomial(3, np.full(3, 1 / 3), size=400)
    assert (drawn[:, 2] == 0).mean() > 0.2
    values = []
    for a, b, c in drawn:
        recalls = [(2 * a + b) / (2 * a + 2 * b)] if a + b else []
        values.append(np.mean(recalls + ([0.5] if c else [])))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, (0.025, 0.975))))


def test_a_wider_confidence_is_a_wider_interval():
    scores, labels, patients = cohort(np.random.default_rng(1), patients=12, patches=4)
    narrow, wide = (
        bootstrap_intervals(scores, labels, patients, generator=np.random.default_rng(0), confidence=c)["accuracy"]
        for c in (0.5, 0.99)
    )
    assert wide.low < narrow.low < narrow.high < wide.high


def simulated(rng, patients, *, mean=0.8, spread=3.0):
    """Patients of three classes and of different sizes, each right with a probability of its own: Beta distributed.

    The true accuracy and mean class accuracy of such patients are both `mean`.
    """
    group = rng.permutation(np.arange(patients) % 3)
    expected = mean + np.array([-0.1, 0.0, 0.1])[group]
    own = rng.beta(expected * spread, (1 - expected) * spread)
    size = rng.integers(4, 20, patients)
    label, right = np.repeat(group, size), rng.random(size.sum()) < np.repeat(own, size)
    scores = np.eye(3)[np.where(right, label, (label + 1) % 3)]
    return scores, label, np.repeat(np.arange(patients), size)


def coverage(patients, rounds, *, units="patients", **options):
    """Share of the intervals that hold the true accuracy, and the true mean class accuracy."""
    rng = np.random.default_rng(patients)
    held = []
    for _ in range(rounds):
        scores, label, patient = simulated(rng, patients)
        rows = patient if units == "patients" else np.arange(len(label))
        found = bootstrap_intervals(
            scores, label, rows, generator=rng, names=("accuracy", "mca"), resamples=200, **options
        )
        held.append([interval.low <= 0.8 <= interval.high for interval in found.values()])
    return np.mean(held, 0)


@pytest.mark.parametrize(("patients", "rounds"), [(20, 300), (60, 200), (200, 100)])
def test_intervals_hold_the_truth_as_often_as_they_promise(patients, rounds):
    """With 300 rounds a coverage of 95 % is measured to 1.3 %; three times that is allowed."""
    assert (np.abs(coverage(patients, rounds) - 0.95) <= 3 * np.sqrt(0.05 * 0.95 / rounds)).all()


def test_resampling_patches_promises_too_much():
    assert (coverage(60, 100, units="patches") <= 0.8).all()


def test_the_percentile_method_covers_less_with_few_patients():
    assert (coverage(12, 300, method="percentile") < coverage(12, 300) - 0.03).all()


@pytest.mark.parametrize("method", METHODS)
def test_methods_agree_where_patients_are_many(method):
    scores, label, patient = simulated(np.random.default_rng(0), 400)
    options = dict(names=("accuracy",), resamples=2000)
    found = bootstrap_intervals(scores, label, patient, generator=np.random.default_rng(1), method=method, **options)[
        "accuracy"
    ]
    usual = bootstrap_intervals(scores, label, patient, generator=np.random.default_rng(2), **options)["accuracy"]
    assert (found.low, found.high) == pytest.approx((usual.low, usual.high), abs=5e-3)


def test_bca_agrees_with_scipy():
    scores, label, patient = simulated(np.random.default_rng(3), 30)
    right = (scores.argmax(1) == label).astype(float)
    size = np.bincount(patient).astype(float)
    hits = np.bincount(patient, weights=right)

    def accuracy(hits, size, axis=-1):
        return hits.sum(axis) / size.sum(axis)

    for method, name in (("bca", "BCa"), ("percentile", "percentile"), ("basic", "basic")):
        ours = bootstrap_intervals(
            scores,
            label,
            patient,
            generator=np.random.default_rng(0),
            names=("accuracy",),
            resamples=20_000,
            method=method,
        )["accuracy"]
        theirs = stats.bootstrap(
            (hits, size), accuracy, paired=True, n_resamples=20_000, method=name, rng=np.random.default_rng(1)
        ).confidence_interval
        assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=4e-3), method


def test_the_t_interval_is_what_it_says():
    """Against the formula written out: logit(p) +- t s / (p (1 - p)) with the standard deviation of the resamples."""
    scores, label, patient = simulated(np.random.default_rng(5), 20)
    size, hits = np.bincount(patient), np.bincount(patient, weights=scores.argmax(1) == label)
    drawn = np.random.default_rng(0).multinomial(20, np.full(20, 1 / 20), size=500)
    values, p = [(d * hits).sum() / (d * size).sum() for d in drawn], hits.sum() / size.sum()
    reach = 2.0930241 * np.std(values, ddof=1) * np.sqrt(20 / 19) / (p * (1 - p))
    expected = [1 / (1 + np.exp(-(np.log(p / (1 - p)) + side * reach))) for side in (-1, 1)]
    found = bootstrap_intervals(
        scores, label, patient, generator=np.random.default_rng(0), names=("accuracy",), resamples=500
    )["accuracy"]
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-6)


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
        (dict(method="normal"), r"unknown method 'normal'; choose one of \['t', 'percentile', 'basic', 'bca'\]"),
        (dict(absent_classes="count"), "absent_classes must be one of 'skip', 'zero'; got 'count'"),
        (dict(confidence=95), "confidence must lie between 0 and 1, got 95; for 95 % write 0.95"),
    ],
)
def test_errors(options, message):
    arguments = dict(labels=[0, 1, 2], patients=[0, 1, 2], generator=np.random.default_rng(0)) | options
    with pytest.raises(ValueError, match=message):
        bootstrap_intervals(np.eye(3), **arguments)


def exact_tail(count, n, p):
    """P(X >= count) in fractions; p is the float that it is."""
    p = Fraction(p)
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(count, n + 1))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.floats(0, 1), st.floats(1e-7, 0.4), st.floats(0, 1))
def test_tails_are_exact_and_bounds_err_to_the_safe_side(n, share, alpha, p):
    count = round(share * n)
    assert binomial_tail(count, n, p) == pytest.approx(float(exact_tail(count, n, p)), rel=1e-12, abs=1e-300)
    low, high = float(clopper_pearson_lower(count, n, alpha)), float(clopper_pearson_upper(count, n, alpha))
    assert low <= count / n <= high
    if count:
        assert exact_tail(count, n, low) <= Fraction(alpha), "never above the bound"
        assert exact_tail(count, n, low * (1 + 1e-12)) > Fraction(alpha) * Fraction(1 - 1e-9), "and no further below"
    if count < n:
        assert exact_tail(n - count, n, 1 - Fraction(high)) <= Fraction(alpha), "never below the bound"


def test_bounds_of_arrays_are_those_of_numbers():
    count, n = np.array([[0, 3], [7, 10]]), np.array([[10, 10], [10, 10]])
    for bound in (clopper_pearson_lower, clopper_pearson_upper):
        expected = [[float(bound(int(k), 10, 0.05)) for k in row] for row in count]
        np.testing.assert_array_equal(bound(count, n, 0.05), expected)


def test_bounds_of_all_and_of_many():
    assert clopper_pearson_lower(1000, 1000, 0.001) == pytest.approx(0.001 ** (1 / 1000), abs=1e-12)
    expected = stats.beta.ppf(1e-6, 99_000, 1001)
    assert clopper_pearson_lower(99_000, 100_000, 1e-6) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(("count", "n", "alpha"), [(-1, 5, 0.1), (6, 5, 0.1), (0, 0, 0.1), (1, 5, 0.0), (1, 5, 0.5)])
def test_bad_bounds_are_refused(count, n, alpha):
    with pytest.raises(ValueError, match=r"must lie in|a bound needs"):
        clopper_pearson_lower(count, n, alpha)
    with pytest.raises(ValueError, match="p is a probability"):
        binomial_tail(1, 5, 1.5)
