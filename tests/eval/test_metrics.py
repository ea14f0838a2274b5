from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.eval import PAPER, Scoring, chance_levels, metrics, metrics_by_level, pool, pool_by_level
from hsat.eval.metrics import METRICS, average_precision
from hsat.types import align_labels


def loop_metrics(scores, labels, *, absent_classes="skip"):
    """The definitions, one row at a time."""
    n, classes = scores.shape
    ranked = [sorted(range(classes), key=lambda c: (-row[c], c)) for row in scores]
    recall, precision = [], []
    for c in range(classes):
        rows = [i for i in range(n) if labels[i] == c]
        if not rows:
            if absent_classes == "zero" and any(r[0] == c for r in ranked):
                recall.append(0.0)
            continue
        recall.append(sum(ranked[i][0] == c for i in rows) / len(rows))
        area = found = 0.0
        for value in sorted(set(scores[:, c]), reverse=True):
            taken = [i for i in range(n) if scores[i, c] >= value]
            hits = sum(labels[i] == c for i in taken)
            area += (hits - found) / len(rows) * hits / len(taken)
            found = hits
        precision.append(area)
    without_vote = [
        (scores[i] >= 0).all() and abs(scores[i].sum() - 1) < 1e-9 and scores[i][labels[i]] == 0 for i in range(n)
    ]
    top = [sum(labels[i] in ranked[i][:k] and not without_vote[i] for i in range(n)) / n for k in (1, 2, 3)]
    return dict(accuracy=top[0], mca=np.mean(recall), map=np.mean(precision), top2=top[1], top3=top[2])


def level_ids(paths):
    parts = [path.split("/") for path in paths]
    patient = np.unique([p[-4] for p in parts], return_inverse=True)[1]
    slide = np.unique(["/".join(p[-4:-2]) for p in parts], return_inverse=True)[1]
    return slide, patient


@pytest.mark.parametrize("case", ["all7_shuffled", "five_classes"])
def test_equals_the_published_metrics(golden, table, case):
    slide, patient = level_ids(golden[f"specs/{case}/paths"])
    scores, labels = golden[f"specs/{case}/logits"], golden[f"specs/{case}/labels"]
    queries = table(np.ones((len(labels), 2)), labels, slide=slide, patient=patient, classes=7)
    found = metrics_by_level(scores, queries, scoring=PAPER.scoring)
    for row, level in enumerate(("patch", "slide", "patient")):
        ours = [getattr(found[level], name) for name in ("accuracy", "top2", "top3", "mca", "map")]
        np.testing.assert_allclose(ours, golden[f"specs/{case}/metrics"][row], atol=1e-6, rtol=0)
        confusion, expected = found[level].confusion, golden[f"specs/{case}/{level}_conf"]
        if expected.shape != confusion.shape:
            occurs = (confusion.sum(0) + confusion.sum(1)) > 0
            confusion = confusion[occurs][:, occurs]
        np.testing.assert_array_equal(confusion, expected)


def test_only_paper_repeats_the_published_quirks(golden, table):
    slide, patient = level_ids(golden["specs/five_classes/paths"])
    scores, labels = golden["specs/five_classes/logits"], golden["specs/five_classes/labels"]
    queries = table(np.ones((len(labels), 2)), labels, slide=slide, patient=patient, classes=7)
    published, ours = (
        metrics_by_level(scores, queries, scoring=PAPER.scoring)["patch"],
        metrics_by_level(scores, queries)["patch"],
    )
    assert ours.accuracy == published.accuracy
    assert ours.mca == pytest.approx(published.mca * 7 / 5)  # both absent classes are predicted somewhere
    assert ours.map != published.map
    softmaxed = metrics_by_level(scores, queries, scoring=Scoring(pooling="paper"))["patch"]
    assert (softmaxed.map, softmaxed.mca) == (published.map, ours.mca)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 40),
    classes=st.integers(1, 6),
    grid=st.sampled_from([2, 5, 1000]),
    absent_classes=st.sampled_from(["skip", "zero"]),
)
def test_laws(seed, n, classes, grid, absent_classes):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, grid, (n, classes)) / grid, rng.integers(0, classes, n)  # coarse grids give ties
    found = metrics(scores, labels, absent_classes=absent_classes)
    for name, expected in loop_metrics(scores, labels, absent_classes=absent_classes).items():
        assert found.as_dict()[name] == pytest.approx(expected, abs=1e-12), name
    assert list(found.as_dict()) == list(METRICS)
    assert all(0 <= value <= 1 for value in found.as_dict().values())
    assert found.accuracy <= found.top2 <= found.top3
    assert found.confusion.sum() == found.n == n
    assert found.accuracy == pytest.approx(np.trace(found.confusion) / n)
    assert (np.isnan(found.recall) == (np.bincount(labels, minlength=classes) == 0)).all()
    order = rng.permutation(n)
    assert metrics(scores[order], labels[order], absent_classes=absent_classes).as_dict() == pytest.approx(
        found.as_dict()
    )
    moved = scores + 0.5  # no share is 0 here, so that scores mean their order alone
    assert metrics(moved * 3 + 1, labels, absent_classes=absent_classes).as_dict() == pytest.approx(
        metrics(moved, labels, absent_classes=absent_classes).as_dict()
    )


def test_agrees_with_scikit_learn():
    peer = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 400)
    scores = rng.dirichlet(np.ones(5), 400).round(2) + 0.3 * np.eye(5)[labels]
    found = metrics(scores, labels)
    assert found.accuracy == pytest.approx(peer.accuracy_score(labels, scores.argmax(1)))
    assert found.mca == pytest.approx(peer.balanced_accuracy_score(labels, scores.argmax(1)))
    assert found.map == pytest.approx(peer.average_precision_score(np.eye(5)[labels], scores, average="macro"))
    np.testing.assert_array_equal(found.confusion, peer.confusion_matrix(labels, scores.argmax(1)))
    untied = scores + 1e-6 * rng.random(scores.shape)
    for k, ours in ((2, metrics(untied, labels).top2), (3, metrics(untied, labels).top3)):
        assert ours == pytest.approx(peer.top_k_accuracy_score(labels, untied, k=k))


def test_a_class_without_a_vote_is_among_no_first_ones():
    """With k = 1 one class has the whole vote; the others, of equal share 0, must not follow by their index."""
    votes, labels = np.eye(5)[[4] * 5], np.arange(5)
    found = metrics(votes, labels)
    assert (found.accuracy, found.top2, found.top3) == (0.2, 0.2, 0.2)
    halves = metrics(np.array([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]), np.array([1, 2]))
    assert (halves.top2, halves.top3) == (0.5, 0.5)
    logits = metrics(np.array([[0.0, 1.0, 2.0]]), np.array([0]))
    assert (logits.top2, logits.top3) == (0.0, 1.0), "scores that are no shares have no votes, only an order"


def test_perfect_and_hopeless():
    labels = np.array([0, 1, 2, 2])
    perfect = metrics(np.eye(3)[labels], labels)
    assert list(perfect.as_dict().values()) == [1.0] * 5
    hopeless = metrics(1 - np.eye(3)[labels], labels)
    assert (hopeless.accuracy, hopeless.mca, hopeless.top3) == (0.0, 0.0, 1.0)


def test_ties_go_to_the_lower_class():
    found = metrics(np.zeros((4, 4)), [0, 1, 2, 3])
    assert (found.accuracy, found.top2, found.top3) == (0.25, 0.5, 0.75)


def test_weights_of_average_precision_repeat_rows():
    rng = np.random.default_rng(1)
    scores, labels, weights = rng.integers(0, 4, (12, 3)) / 4, rng.integers(0, 3, 12), rng.integers(0, 4, (5, 12))
    found = average_precision(scores, labels, weights.astype(float))
    for row, weight in zip(found, weights, strict=True):
        expected = average_precision(np.repeat(scores, weight, 0), np.repeat(labels, weight))
        np.testing.assert_allclose(row, expected, atol=1e-12)


def test_levels_are_pooled_and_labels_matched_by_name(table):
    rng = np.random.default_rng(2)
    patient = np.repeat([3, 1, 2], 8)
    slide = np.repeat([9, 4, 7, 8, 2, 1], 4)
    label = np.array([0, 1, 0])[np.array([2, 0, 1])[patient - 1]]
    queries = table(rng.standard_normal((24, 4)), label, slide=slide, patient=patient, class_names=("lgg", "hgg"))
    scores, bank_classes = rng.dirichlet(np.ones(3), 24), ("hgg", "mening", "lgg")
    found = metrics_by_level(scores, queries, class_names=bank_classes)
    matched = np.array([2, 0])[label]
    np.testing.assert_array_equal(align_labels(queries.label, queries.class_names, bank_classes), matched)
    assert found["patch"].as_dict() == metrics(scores, matched).as_dict()
    for level, groups in (("slide", slide), ("patient", patient)):
        pooled = pool(scores, groups, matched)
        assert found[level].as_dict() == metrics(pooled.scores, pooled.labels).as_dict()
    assert [found[level].n for level in found] == [24, 6, 3]
    patients = {
        level: owner.tolist()
        for level, (_, _, owner) in pool_by_level(scores, queries, class_names=bank_classes).items()
    }
    owner_of = dict(zip(slide.tolist(), patient.tolist(), strict=True))
    assert patients == {
        "patch": patient.tolist(),
        "slide": [owner_of[s] for s in sorted(owner_of)],
        "patient": [1, 2, 3],
    }
    assert found["slide"].class_names == bank_classes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(labels=[0, 1]), ValueError, r"3 rows of scores but labels has shape \(2,\)"),
        (dict(labels=[0, 1, 4]), ValueError, "labels run from 0 to 4 but scores have 4 classes"),
        (dict(labels=[0.0, 1.0, 2.0]), TypeError, "labels must be integers.*float64"),
        (dict(labels=[0, 1, 2], class_names=["a"]), ValueError, r"1 class names \['a'\] for scores of 4 classes"),
        (
            dict(labels=[0, 1, 2], absent_classes="published"),
            ValueError,
            "absent_classes must be one of 'skip', 'zero'; got 'published'",
        ),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        metrics(np.eye(4)[:3], **arguments)


def test_scores_of_another_length_than_the_table(table):
    with pytest.raises(ValueError, match="2 rows of scores for a table of 3 embeddings"):
        metrics_by_level(np.ones((2, 3)), table(np.eye(3), classes=3))


def test_an_unknown_class(table):
    queries = table(np.eye(3), [0, 1, 1], class_names=("hgg", "sarcoma"))
    with pytest.raises(
        ValueError, match=r"classes \['sarcoma'\] that the bank does not know; it knows \['hgg', 'lgg'\]"
    ):
        metrics_by_level(np.ones((3, 2)), queries, class_names=("hgg", "lgg"))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_chance_is_what_the_shares_of_the_classes_reach_as_scores(labels):
    counts = np.bincount(labels, minlength=5)
    blind = metrics(np.tile(counts / len(labels), (len(labels), 1)), labels)
    assert chance_levels(labels) == pytest.approx(blind.as_dict(), abs=1e-12)
    assert blind.chance == chance_levels(labels)


def test_chance_by_counting():
    assert chance_levels([3, 3, 3, 0, 0, 1]) == pytest.approx(
        {"accuracy": 1 / 2, "mca": 1 / 3, "map": (3 + 2 + 1) / 18, "top2": 5 / 6, "top3": 1.0}
    )
    assert chance_levels(np.zeros(7, dtype=int)) == dict.fromkeys(METRICS, 1.0)


@pytest.mark.parametrize("labels", [[], [[0, 1]]])
def test_chance_of_nothing(labels):
    with pytest.raises(ValueError, match=r"labels must be \(n,\) with n >= 1"):
        chance_levels(labels)
