"""Approximate indexes: measured, and refused where they cannot answer."""

from __future__ import annotations

import numpy as np
import pytest

from hsat.classifiers import KNNClassifier, load_knn


def clusters(seed: int, n: int, d: int, *, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, n)
    return 2 * rng.standard_normal((classes, d))[label] + rng.standard_normal((n, d)), label


@pytest.mark.parametrize("index", ["SQfp16", "IVF8,Flat;nprobe=4", "HNSW16", "IVF4,SQfp16"])
def test_approximate_indexes_are_measured_saved_and_loaded(table, tmp_path, index):
    z, label = clusters(6, 900, 16)
    bank, queries = table(z, label, classes=4), clusters(6, 950, 16)[0][900:]
    knn = KNNClassifier(k=20, index=index).fit(bank)
    exact = KNNClassifier(k=20).fit(bank)
    hits = [len(set(a) & set(b)) / 20 for a, b in zip(*(f.neighbours(queries).row for f in (knn, exact)), strict=True)]
    assert knn.recall(queries) == pytest.approx(np.mean(hits))
    assert knn.recall(queries) > (0.99 if index == "SQfp16" else 0.3)
    assert knn.agreement(queries) == np.mean(knn.predict(queries) == exact.predict(queries))
    again = load_knn(knn.save(tmp_path / "knn"), bank)
    assert again.settings == knn.settings and again.k == knn.k
    np.testing.assert_array_equal(again.predict_proba(queries), knn.predict_proba(queries))
    same = KNNClassifier(k=20, index=index).fit(bank)
    np.testing.assert_array_equal(same.predict_proba(queries), knn.predict_proba(queries))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(index="flat", index_parameters="nprobe=8"), "exact and takes no parameters, got 'nprobe=8'"),
        (dict(index="stream;nprobe=8"), "exact and takes no parameters"),
        (dict(index=""), "index must be 'flat', 'stream' or a FAISS factory string"),
        (dict(index="HNSW1"), "a graph of 1 links per row"),  # FAISS ends the process
        (dict(index="IVF4,Flat;nprobe=0"), "cannot build index 'IVF4,Flat' 'nprobe=0'"),
        (dict(index="IVF0,Flat"), "cannot build index 'IVF0,Flat'"),
    ],
)
def test_indexes_that_cannot_answer_are_refused_at_once(table, options, named):
    with pytest.raises(ValueError, match=named):
        KNNClassifier(k=3, **options).fit(table(clusters(0, 200, 6)[0]))
