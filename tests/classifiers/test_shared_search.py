"""Several classifiers on one bank share an index and a search, and each answers as it does alone."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from hsat.classifiers import FittedKNN, Head, KNNClassifier, NearestCentroid, fit_classifiers, knn, predict_scores


def problem(table, n=300, d=8):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, n)
    z = rng.standard_normal((3, d))[label] + rng.standard_normal((n, d))
    return table(z, label), table(rng.standard_normal((40, d)), classes=3, norm=np.full(40, 2.0, dtype=np.float32))


@pytest.mark.parametrize("index", ["flat", "stream", "IVF4,Flat", "IVF4,PQ4x4", "HNSW16"])
def test_each_answers_as_alone(table, monkeypatch, index):
    bank, queries = problem(table)
    searches = []
    search = FittedKNN._search

    def counting(self, *args, **options):
        searches.append(self.k)
        return search(self, *args, **options)

    wanted = [
        KNNClassifier(k=20, index=index),
        NearestCentroid(),
        KNNClassifier(k=200, index=index),
        Head(nn.Linear(8, 3), ("a", "b", "c")),
        KNNClassifier(k=5, index=index, temperature=0.5),
        KNNClassifier(k=20, index="stream", chunk=7),
    ]
    fitted = fit_classifiers(wanted, bank)
    assert [f.k for f in fitted if isinstance(f, FittedKNN)] == [20, 200, 5, 20]
    assert [f.settings for f in fitted if isinstance(f, FittedKNN)] == [wanted[i] for i in (0, 2, 4, 5)]
    monkeypatch.setattr(FittedKNN, "_search", counting)
    scores = predict_scores(fitted, queries)
    assert searches == [200, 20]
    for classifier, score in zip(fitted, scores, strict=True):
        np.testing.assert_array_equal(score, classifier.predict_proba(queries))
    if index in ("flat", "stream"):
        for settings, score in zip(wanted, scores, strict=True):
            np.testing.assert_array_equal(score, settings.fit(bank).predict_proba(queries))


def test_an_index_is_built_once(table, monkeypatch):
    bank, _ = problem(table)
    built = []
    build = knn.build_index
    monkeypatch.setattr(knn, "build_index", lambda *args, **options: built.append(args) or build(*args, **options))
    fit_classifiers([KNNClassifier(k=k, index="IVF4,Flat") for k in (3, 30, 9)], bank)
    assert len(built) == 1


def test_k_is_clipped_for_each_with_a_warning(table):
    bank, queries = problem(table, n=10)
    with pytest.warns(UserWarning, match="is more than the 10 rows") as told:
        fitted = fit_classifiers([KNNClassifier(k=20), KNNClassifier(k=12), KNNClassifier(k=3)], bank)
    assert [f.k for f in fitted] == [10, 10, 3] and len(told) == 2
    assert fit_classifiers([], bank) == [] and predict_scores([], queries) == []
