"""A bank in several tables answers as one; several classifiers on one bank share a search and answer as alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hsat.classifiers import (
    FittedKNN,
    Head,
    KNNClassifier,
    NearestCentroid,
    fit_classifiers,
    fit_shards,
    knn,
    predict_scores,
)


def clusters(seed: int, n: int, d: int, *, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, n)
    return 2 * rng.standard_normal((classes, d))[label] + rng.standard_normal((n, d)), label


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(1, 119), max_size=4, unique=True),
    copies=st.booleans(),
    k=st.sampled_from([1, 9, 60]),
    index=st.sampled_from(["flat", "stream"]),
)
def test_shards_are_one_table(table, seed, cuts, copies, k, index):
    z, label = clusters(seed, 120, 7)
    if copies:
        z = z[np.random.default_rng(seed).integers(0, 6, 120)]
    whole = table(z, label, classes=4)
    edges = [0, *sorted(cuts), 120]
    parts = [table(z[a:b], label[a:b], classes=4) for a, b in itertools.pairwise(edges)]
    queries = np.concatenate((z[:5], np.random.default_rng(seed).standard_normal((5, 7))))
    knn = KNNClassifier(k=k, index=index)
    one, many = knn.fit(whole), fit_shards(knn, parts)
    for a, b in zip(one.neighbours(queries), many.neighbours(queries), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one.predict_proba(queries), many.predict_proba(queries))
    np.testing.assert_array_equal(one.predict(queries), many.predict(queries))


def test_classes_of_shards_are_matched_by_name(table):
    z = np.eye(4)
    knn = fit_shards(
        KNNClassifier(k=1),
        [table(z[:2], [0, 1], class_names=("hgg", "lgg")), table(z[2:], [0, 1], class_names=("normal", "hgg"))],
    )
    assert knn.class_names == ("hgg", "lgg", "normal")
    assert [knn.class_names[c] for c in knn.predict(z)] == ["hgg", "lgg", "normal", "hgg"]
    with pytest.raises(ValueError, match="'mening'"):
        knn.predict(table(z[:1], [0], class_names=("mening",)))


def test_shards_that_do_not_fit(table):
    knn = KNNClassifier(k=1)
    with pytest.raises(ValueError, match="at least one table"):
        fit_shards(knn, [])
    with pytest.raises(ValueError, match="shard 1 has width 3, shard 0 has 4"):
        fit_shards(knn, [table(np.eye(4)), table(np.eye(3))])
    with pytest.raises(ValueError, match="shard 1 was embedded by 'b', shard 0 by 'a'"):
        fit_shards(knn, [table(np.eye(4), encoder="a"), table(np.eye(4), encoder="b")])
    with pytest.warns(UserWarning, match="k=200 is more than the 8 rows of the bank; using k=8"):
        assert fit_shards(KNNClassifier(), [table(np.eye(4)), table(np.eye(4))]).k == 8


def bank_and_queries(table, n=300, d=8):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, n)
    z = rng.standard_normal((3, d))[label] + rng.standard_normal((n, d))
    return table(z, label), table(rng.standard_normal((40, d)), classes=3, norm=np.full(40, 2.0, dtype=np.float32))


@pytest.mark.parametrize("index", ["flat", "stream", "IVF4,Flat", "IVF4,PQ4x4", "HNSW16"])
def test_each_answers_as_alone(table, monkeypatch, index):
    bank, queries = bank_and_queries(table)
    searches = []
    neighbours = FittedKNN.neighbours

    def counting(self, z):
        searches.append(self.k)
        return neighbours(self, z)

    several = [
        KNNClassifier(k=20, index=index),
        NearestCentroid(),
        KNNClassifier(k=200, index=index),
        Head(nn.Linear(8, 3), ("a", "b", "c")),
        KNNClassifier(k=5, index=index, temperature=0.5),
        KNNClassifier(k=20, index="stream", chunk=7),
    ]
    fitted = fit_classifiers(several, bank)
    assert [f.k for f in fitted if isinstance(f, FittedKNN)] == [20, 200, 5, 20]
    assert [f.settings for f in fitted if isinstance(f, FittedKNN)] == [several[i] for i in (0, 2, 4, 5)]
    monkeypatch.setattr(FittedKNN, "neighbours", counting)
    scores = predict_scores(fitted, queries)
    assert searches == [200, 20]
    for classifier, score in zip(fitted, scores, strict=True):
        np.testing.assert_array_equal(score, classifier.predict_proba(queries))
    if index in ("flat", "stream"):
        for settings, score in zip(several, scores, strict=True):
            np.testing.assert_array_equal(score, settings.fit(bank).predict_proba(queries))


def test_an_index_is_built_once(table, monkeypatch):
    bank, _ = bank_and_queries(table)
    built = []
    build = knn.build_index
    monkeypatch.setattr(knn, "build_index", lambda *args, **options: built.append(args) or build(*args, **options))
    fit_classifiers([KNNClassifier(k=k, index="IVF4,Flat") for k in (3, 30, 9)], bank)
    assert len(built) == 1


def test_k_is_clipped_for_each_with_a_warning(table):
    bank, queries = bank_and_queries(table, n=10)
    with pytest.warns(UserWarning, match="is more than the 10 rows") as warned:
        fitted = fit_classifiers([KNNClassifier(k=20), KNNClassifier(k=12), KNNClassifier(k=3)], bank)
    assert [f.k for f in fitted] == [10, 10, 3] and len(warned) == 2
    assert fit_classifiers([], bank) == [] and predict_scores([], queries) == []
