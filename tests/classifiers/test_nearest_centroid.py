"""The nearest class mean, against a loop and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.classifiers import NearestCentroid
from hsat.types import Classifier, EmbeddingTable, FittedClassifier


def problem(table, seed=0, *, n=60, d=6, classes=3, **options):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, n)
    z = 2 * rng.standard_normal((classes, d))[label] + rng.standard_normal((n, d))
    return table(z, label, **options), torch.from_numpy(rng.standard_normal((20, d)))


def test_logits_are_cosines_to_the_mean_of_unit_rows(table):
    bank, z = problem(table)
    fitted = NearestCentroid(temperature=0.2).fit(bank)
    for row, logits in zip(z.numpy(), fitted.logits(z).numpy(), strict=True):
        for c, logit in enumerate(logits):
            mean = bank.z[bank.label == c].astype(np.float64).mean(0)
            cosine = mean @ row / np.linalg.norm(mean) / np.linalg.norm(row)
            assert logit == pytest.approx(cosine / 0.2, abs=1e-12)
    np.testing.assert_array_equal(fitted.predict(z), fitted.logits(z).argmax(1))
    np.testing.assert_allclose(fitted.predict_proba(z), torch.softmax(fitted.logits(z), 1), atol=1e-12)
    assert isinstance(fitted, FittedClassifier) and isinstance(NearestCentroid(), Classifier)
    assert fitted.reads == "unit" and fitted.classes_with_rows == 3


def test_decisions_are_those_of_scikit_learn(table):
    neighbors = pytest.importorskip("sklearn.neighbors")
    bank, z = problem(table, 1)
    unit = torch.nn.functional.normalize(z, dim=1)
    sums = np.stack([bank.z[bank.label == c].sum(0) for c in range(3)])
    centroids = sums / np.linalg.norm(sums, axis=1, keepdims=True)  # its own means are not normalised
    peer = neighbors.NearestCentroid().fit(np.concatenate((0.9 * centroids, 1.1 * centroids)), np.tile(np.arange(3), 2))
    np.testing.assert_array_equal(NearestCentroid().fit(bank).predict(z), peer.predict(unit))


def test_a_class_without_rows_is_never_decided_for(table):
    bank, _ = problem(table, class_names=("unused", *"abc"))
    bank = table(bank.z, bank.label + 1, class_names=(*bank.class_names, "too"))
    fitted = NearestCentroid().fit(bank)
    assert fitted.classes_with_rows == 3 and fitted.has_rows.tolist() == [False, True, True, True, False]
    z = torch.cat((torch.from_numpy(-bank.z), torch.zeros(1, 6)))
    logits = fitted.logits(z)
    assert (logits[:, [0, 4]] == torch.tensor(-1 / 0.07)).all()
    assert set(logits.argmax(1).tolist()) <= {1, 2, 3}
    only = NearestCentroid().fit(table([[1.0, 0.0]], [1], classes=2))  # a query opposite to the only centroid
    assert only.logits(torch.tensor([[-1.0, 0.0]])).argmax(1).tolist() == [1]
    assert only.predict(np.array([[-1.0, 0.0]])).tolist() == [1]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    temperature=st.sampled_from([1e-20, 0.003, 0.07, 1e6]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    d=st.integers(1, 5),
)
def test_logits_and_scores_decide_alike(table, seed, temperature, dtype, d):
    rng = np.random.default_rng(seed)
    few = rng.integers(-1, 2, (4, d)).astype(float)  # equal and opposite centroids, rows of zeros
    fitted = NearestCentroid(temperature=temperature).fit(table(few, rng.integers(0, 3, 4), classes=3))
    z = torch.from_numpy(few).to(dtype)
    decision = fitted.predict(z).tolist()
    logits, scores = fitted.logits(z), fitted.scores(z)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logits.argmax(1).tolist() == scores.argmax(1).tolist() == decision
    assert logits.isfinite().all() and torch.allclose(scores.sum(1), torch.ones(4, dtype=scores.dtype))


def test_gradients_and_blocks(table, tmp_path):
    bank, z = problem(table, 2)
    fitted = NearestCentroid().fit(bank)
    assert torch.autograd.gradcheck(fitted.logits, (z[:4].requires_grad_(),))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fitted.logits(z), fitted.logits(z))
    mapped = EmbeddingTable.load(bank.save(tmp_path / "bank"), memory_map=True)
    assert torch.equal(NearestCentroid().fit(mapped).logits(z), fitted.logits(z))
    assert torch.equal(fitted.to("cpu").logits(z), fitted.logits(z))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_queries_that_are_not_finite_are_refused_as_knn_does(table, value):
    fitted = NearestCentroid().fit(problem(table)[0])
    queries = np.ones((1200, fitted.tensors()["centroid"].shape[-1]))
    queries[1100, 2] = value
    for ask in (fitted.predict, fitted.predict_proba, lambda rows: fitted.logits(torch.from_numpy(rows))):
        with pytest.raises(ValueError, match="queries are not finite, first in row 1100"):
            ask(queries)


def test_no_share_underflows_to_no_vote_at_all(table):
    bank, queries = problem(table)
    scores = NearestCentroid(temperature=1e-4).fit(bank).predict_proba(queries)
    assert (scores > 0).all() and np.abs(scores.sum(1) - 1).max() < 1e-12
    assert (scores < 1e-300).any(), "a softmax in float64 would be 0 there"


def test_what_cannot_be_fitted_is_refused(table):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        NearestCentroid(temperature=0)
    with pytest.raises(ValueError, match=r"the bank is empty \(cohort 'c', split 'train'\)"):
        NearestCentroid().fit(table(np.zeros((0, 4)), classes=2, cohort="c", split="train"))
    bank, z = problem(table)
    with pytest.raises(ValueError, match=r"embeddings must be \(n, 6\) as the bank's are, got \(20, 5\)"):
        NearestCentroid().fit(bank).logits(z[:, :5])
    with pytest.raises(ValueError, match=r"\['never seen'\] that the bank does not know"):
        NearestCentroid().fit(bank).predict(table(z, class_names=("never seen",)))
