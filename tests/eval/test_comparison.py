"""Paired differences: exact answers, the matching of rows, coverage, and what is refused."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest

from hsat.attacks import PGD, Linf
from hsat.classifiers import KNNClassifier
from hsat.eval import (
    PAPER,
    Difference,
    Provenance,
    RunOptions,
    ScoreTable,
    Scoring,
    compare_models,
    evaluate_whitebox,
    load_scores,
    metrics,
    metrics_by_level,
    paired_difference,
    save_scores,
    score_tables,
)
from hsat.eval.confidence import METHODS, NO_SPREAD
from hsat.eval.metrics import METRICS
from hsat.report import differences_table
from hsat.types import LEVELS, EmbeddingTable


def scored(right, label, patient, *, classes=3, model="a", **more) -> ScoreTable:
    """Certain predictions: the true class where `right`, else the next one."""
    n = len(label)
    columns = dict(label=label, patch=np.arange(n) * 3 + 1, slide=np.asarray(patient) * 2 + np.arange(n) % 2)
    scores = np.eye(classes)[np.where(right, label, (label + 1) % classes)]
    return ScoreTable(
        scores=scores,
        **columns,
        patient=np.asarray(patient),
        class_names=tuple("abc"[:classes]),
        model=model,
        **more,
    )


def two_models(rng, patients, *, gap=0.1, per_patient=None):
    """Patients are hard or easy for both models; the first is right more often by `gap` in the mean."""
    size = rng.integers(4, 16, patients) if per_patient is None else np.full(patients, per_patient)
    group = rng.permutation(np.arange(patients) % 3)
    expected = 0.7 + np.array([-0.1, 0.0, 0.1])[group]
    own = rng.beta(3 * expected, 3 * (1 - expected))
    label, patient = np.repeat(group, size), np.repeat(np.arange(patients), size)
    first = rng.random(len(label)) < np.repeat(own, size)
    second = first & (rng.random(len(label)) < 1 - gap / np.repeat(expected, size))
    return scored(first, label, patient, model="a"), scored(second, label, patient, model="b")


def draw(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    "scoring", [Scoring(bootstrap=40), replace(PAPER.scoring, bootstrap=40)], ids=["hsat", "paper"]
)
def test_equals_drawing_patients_again(scoring):
    """Against loops: each resample's rows are written out and both models measured on them."""
    rng = draw(1)
    a, b = two_models(rng, 6)
    noise = rng.random(a.scores.shape) * 0.7
    a, b = dataclasses.replace(a, scores=a.scores + noise), dataclasses.replace(b, scores=b.scores + noise[::-1])
    scoring = replace(scoring, bootstrap=40)
    found = paired_difference(a, b, generator=draw(3), scoring=scoring, method="percentile", confidence=0.8)
    drawn = draw(3).multinomial(6, np.full(6, 1 / 6), size=40)
    values = {(level, name): [] for level in LEVELS for name in METRICS}
    for counts in drawn:
        of = []
        for table in (a, b):
            rows = np.concatenate([np.flatnonzero(table.patient == p) for p in range(6) for _ in range(counts[p])])
            copy = np.concatenate(
                [[p * 100 + i] * (table.patient == p).sum() for p in range(6) for i in range(counts[p])]
            )
            z = np.zeros((len(rows), 1), dtype=np.float32)
            again = EmbeddingTable(z, table.label[rows], rows, table.slide[rows] + 1000 * copy, copy, table.class_names)
            of.append(metrics_by_level(table.scores[rows], again, scoring=scoring))
        for (level, name), replicates in values.items():
            replicates.append(getattr(of[0][level], name) - getattr(of[1][level], name))
    assert [(each.level, each.metric) for each in found] == list(values)
    for each in found:
        replicates = np.array(values[each.level, each.metric])
        assert each.not_above == pytest.approx((replicates <= 1e-12).mean(), abs=1e-9)
        if each.reason:
            assert each.reason == NO_SPREAD and np.ptp(replicates) < 1e-12
            continue
        assert (each.low, each.high) == pytest.approx(tuple(np.quantile(replicates, (0.1, 0.9))), abs=1e-9)


def test_numbers_are_those_of_the_two_models():
    a, b = two_models(draw(2), 9)
    found = {(d.level, d.metric): d for d in paired_difference(a, b, generator=draw(), scoring=Scoring(bootstrap=50))}
    for table, word in ((a, "value"), (b, "value_against")):
        expected = metrics(table.scores, table.label)
        for name in METRICS:
            assert getattr(found["patch", name], word) == pytest.approx(getattr(expected, name))
    one = found["patch", "accuracy"]
    assert (one.model, one.against, one.patients, one.n) == ("a", "b", 9, len(a))
    assert one.difference == pytest.approx(one.value - one.value_against)
    assert found["patient", "mca"].n == 9 and found["slide", "mca"].n == 18


def test_rows_are_matched_by_patch_and_classes_by_name():
    a, b = (
        dataclasses.replace(t, scores=t.scores + draw(3).random(t.scores.shape) / 2) for t in two_models(draw(4), 8)
    )
    expected = paired_difference(a, b, generator=draw(), scoring=Scoring(bootstrap=30))
    order, turned = draw(5).permutation(len(b)), [2, 0, 1]
    columns = {name: getattr(b, name)[order] for name in ("patch", "slide", "patient")}
    shuffled = dataclasses.replace(
        b,
        scores=b.scores[order][:, turned],
        label=np.argsort(turned)[b.label[order]],
        class_names=tuple(b.class_names[i] for i in turned),
        **columns,
    )
    mixed = draw(6).permutation(len(a))
    a = dataclasses.replace(
        a, **{name: getattr(a, name)[mixed] for name in ("scores", "label", "patch", "slide", "patient")}
    )
    for one, other in zip(
        paired_difference(a, shuffled, generator=draw(), scoring=Scoring(bootstrap=30)), expected, strict=True
    ):
        numbers = [(d.difference, d.low or 0, d.high or 0, d.not_above) for d in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1])


@pytest.mark.parametrize("method", METHODS)
def test_turning_the_pair_around_turns_the_interval_around(method):
    a, b = two_models(draw(6), 30)
    options = dict(names=("accuracy",), levels=("patch",), scoring=Scoring(bootstrap=600), method=method)
    (one,), (other,) = (paired_difference(*pair, generator=draw(), **options) for pair in ((a, b), (b, a)))
    assert (one.difference, one.low, one.high) == pytest.approx((-other.difference, -other.high, -other.low), abs=1e-9)
    assert one.low < one.difference < one.high
    assert one.not_above < 0.01 < 0.99 < other.not_above


def test_one_patient_no_resamples_and_equal_models():
    a, b = two_models(draw(7), 1, per_patient=6)
    alone = paired_difference(a, b, generator=draw())
    assert {(d.low, d.high, d.not_above, d.reason) for d in alone} == {(None, None, None, "one patient only")}
    a, b = two_models(draw(7), 5)
    assert {d.reason for d in paired_difference(a, b, generator=draw(), scoring=Scoring(bootstrap=0))} == {
        "no resamples"
    }
    same = paired_difference(a, dataclasses.replace(a, model="b"), generator=draw())
    assert {(d.difference, d.low, d.reason, d.not_above) for d in same} == {(0.0, None, NO_SPREAD, 1.0)}


def test_a_difference_that_is_nothing_but_rounding_is_not_above_zero():
    """0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1: two models whose mean recall is the same number, added in another order."""
    label, patient, place = np.repeat(np.arange(3), 20), np.tile(np.arange(2), 30), np.tile(np.arange(20) // 2, 3)
    a, b = (scored(place < np.array(right)[label], label, patient) for right in ([1, 2, 3], [3, 2, 1]))
    (found,) = paired_difference(a, b, generator=draw(), names=("mca",), levels=("patch",))
    assert 0 < found.difference < 1e-15 and found.not_above == 1.0


def test_a_perfect_model_and_a_useless_one():
    label, patient = np.repeat(np.arange(6) % 3, 4), np.repeat(np.arange(6), 4)
    perfect, useless = (scored(np.full(24, right), label, patient) for right in (True, False))
    (found,) = paired_difference(perfect, useless, generator=draw(), names=("accuracy",), levels=("patch",))
    assert (found.difference, found.low, found.not_above, found.reason) == (1.0, None, 0.0, NO_SPREAD)


def coverage(patients, rounds, *, pair=True):
    rng, held, width = draw(patients), [], []
    for _ in range(rounds):
        a, b = two_models(rng, patients)
        options = dict(generator=rng, names=("accuracy", "mca"), levels=("patch",), scoring=Scoring(bootstrap=200))
        found = paired_difference(a, b, **options)
        held.append([d.low <= 0.1 <= d.high for d in found])
        width.append(found[0].high - found[0].low)
    return np.mean(held, 0), np.mean(width)


@pytest.mark.parametrize(("patients", "rounds"), [(20, 150), (60, 120), (200, 60)])
def test_intervals_hold_the_true_difference_as_often_as_they_promise(patients, rounds):
    held, _ = coverage(patients, rounds)
    assert (np.abs(held - 0.95) <= 3 * np.sqrt(0.05 * 0.95 / rounds)).all(), held


def test_pairing_is_why_the_interval_is_short():
    """Two cohorts of other patients would need far longer intervals for the same difference."""
    rng = draw(0)
    a, b = two_models(rng, 60)
    options = dict(names=("accuracy",), levels=("patch",))
    (paired,) = paired_difference(a, b, generator=draw(), **options)
    alone = np.array([(t.scores.argmax(1) == t.label) for t in (a, b)], dtype=float)
    means = np.array([[alone[i][a.patient == p].mean() for p in range(60)] for i in range(2)])
    unpaired = 2 * 2.0 * np.sqrt((means.var(1, ddof=1) / 60).sum())
    assert paired.high - paired.low < 0.5 * unpaired


def test_several_models_against_the_first():
    a, b = two_models(draw(8), 12)
    tables = [dataclasses.replace(t, condition=name, k=5) for t in (a, b) for name in ("clean", "PGD-8")]
    tables.append(dataclasses.replace(b, model="c", condition="clean", k=5))
    tables.append(dataclasses.replace(b, model="c", condition="other", k=5))
    options = dict(scoring=Scoring(bootstrap=20), names=("accuracy", "mca"))
    found = compare_models(tables, **options)
    assert [(d.model, d.against, d.condition) for d in found[::6]] == [
        ("b", "a", "clean"),
        ("b", "a", "PGD-8"),
        ("c", "a", "clean"),
    ]
    alone = paired_difference(
        tables[2], tables[0], generator=draw(), scoring=Scoring(bootstrap=20), names=("accuracy", "mca")
    )
    assert found[:6] == alone
    assert {d.against for d in compare_models(tables, against="c", scoring=Scoring(bootstrap=0))} == {"c"}
    table = differences_table(found)
    assert len(table.rows) == len(found) and "| b | a | PGD-8 | 5 | slide | mca |" in table.to_markdown()
    with pytest.raises(ValueError, match=r"at least one other are needed; there are \['a'\]"):
        compare_models(tables[:2])
    with pytest.raises(ValueError, match="'d' and at least one other"):
        compare_models(tables, against="d")
    with pytest.raises(ValueError, match="7 tables but 6 combinations"):
        compare_models([*tables, tables[0]])


def test_the_table_writes_dashes_where_there_is_no_interval():
    one = Difference(
        model="m", against="n", condition="clean", k=5, level="patch", metric="mca", value=0.5, value_against=0.25,
        difference=0.25, low=None, high=None, not_above=None, n=4, patients=1, reason="one patient only",
    )  # fmt: skip
    assert differences_table([one]).to_markdown().splitlines()[2].endswith("| 50.0 | 25.0 | +25.0 | – | – | 1 |")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(cohort="other"), "the tables come from different cohorts"),
        (dict(patch=np.arange(12) * 3 + 4), r"1 are only in the first and 1 only in the second \(patch ids 1, 37\)"),
        (
            dict(label=np.array([1] * 4 + [1] * 4 + [2] * 4)),
            "patch 1 has class a in the first table and b in the second",
        ),
        (dict(slide=np.arange(12)), "patch 7 has slide 0 in the first table and 2 in the second"),
        (dict(patient=np.array([0] * 4 + [1] * 4 + [3] * 4)), "patch 25 has patient 2 in the first table and 3 in the"),
    ],
)
def test_tables_that_do_not_match(change, message):
    label, patient = np.repeat(np.arange(3), 4), np.repeat(np.arange(3), 4)
    a = scored(np.ones(12, bool), label, patient, cohort="one")
    with pytest.raises(ValueError, match=message):
        paired_difference(a, dataclasses.replace(a, **change), generator=draw())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(names=("recall",)), r"unknown metrics \['recall'\]"),
        (dict(levels=("image",)), r"unknown levels \['image'\]; choose from"),
        (dict(method="normal"), "unknown method 'normal'"),
        (dict(confidence=95), "confidence must lie between 0 and 1"),
    ],
)
def test_options_are_checked(options, message):
    a, b = two_models(draw(9), 4)
    with pytest.raises(ValueError, match=message):
        paired_difference(a, b, generator=draw(), **options)


GOOD = dict(
    scores=np.array([[0.2, 0.8], [0.6, 0.4]]),
    label=np.array([1, 0]),
    patch=np.array([7, 5]),
    slide=np.array([1, 1]),
    patient=np.array([3, 3]),
    class_names=("no", "yes"),
)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(class_names=("one",)), ValueError, "scores of 2 classes but 1 class names"),
        (dict(slide=np.array([1])), ValueError, r"2 rows of scores but slide has shape \(1,\)"),
        (dict(patient=np.array([0.5, 1.0])), TypeError, "patient must hold integers, got float64"),
        (dict(label=np.array([0, 2])), ValueError, "labels run from 0 to 2 for 2 class names"),
        (dict(patch=np.array([5, 5])), ValueError, "patch 5 stands 2 times in the table; wanted once"),
        (dict(scores=np.array([[np.nan, 1], [0, 1]])), ValueError, "scores are not finite"),
    ],
)
def test_tables_that_do_not_fit(change, error, message):
    with pytest.raises(error, match=message):
        ScoreTable(**GOOD | change)


def test_a_file_gives_back_what_was_written(tmp_path):
    first = ScoreTable(**GOOD, cohort="abc", split="val", model="a", condition="PGD-8", k=20)
    second = dataclasses.replace(first, scores=first.scores[:, ::-1].copy(), model="ü", class_names=("yes", "no"))
    path = save_scores(tmp_path / "deep" / "scores.npz", [first, second])
    assert [file.name for file in path.parent.iterdir()] == ["scores.npz"]
    for table, again in zip((first, second), load_scores(path), strict=True):
        for field in dataclasses.fields(ScoreTable):
            np.testing.assert_array_equal(getattr(again, field.name), getattr(table, field.name))


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04 damaged"])
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "scores.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"scores.npz: no file of scores"):
        load_scores(tmp_path / "scores.npz")


def test_pickles_are_not_opened(tmp_path):
    np.savez(tmp_path / "scores.npz", about=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="no file of scores"):
        load_scores(tmp_path / "scores.npz")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_scores(tmp_path / "scores.npz")


def test_of_an_evaluation(toy_encoder, toy_batches):
    attack = PGD(Linf(8 / 255), step_size=2 / 255, steps=2)
    bank, queries = toy_batches(seed=1, sizes=(45,), first_id=1000), toy_batches(seed=2, sizes=(20, 16))
    result = evaluate_whitebox(
        toy_encoder,
        bank,
        queries,
        {"PGD-8": attack},
        classifier=[KNNClassifier(k=15), KNNClassifier(k=5)],
        target="features",
        scoring=Scoring(bootstrap=0),
        run=RunOptions(noise=False),
        provenance=Provenance(model="toy"),
    )
    tables = score_tables(result)
    assert [(t.model, t.condition, t.k) for t in tables] == [
        ("toy", name, k) for name in ("clean", "PGD-8") for k in (15, 5)
    ]
    for table in tables:
        expected = metrics_by_level(result.scores[table.condition][table.k], result.tables[table.condition])
        assert expected["patch"].accuracy == (table.scores.argmax(1) == table.label).mean()
        assert (table.cohort, table.split) == ("toy", "val")
