from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.classifiers import KNNClassifier, load_knn

EXACT = ("flat", "stream", "torch")


def unit(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    z = rng.standard_normal((n, d))
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def loop_scores(bank, labels, queries, *, k, temperature, classes):
    """The definition, one neighbour at a time."""
    out = np.zeros((len(queries), classes))
    for i, query in enumerate(queries / np.linalg.norm(queries, axis=1, keepdims=True)):
        similarity = [float(np.dot(row, query) / np.linalg.norm(row)) for row in bank.astype(np.float64)]
        nearest = sorted(range(len(bank)), key=lambda j: (-similarity[j], j))[:k]
        total = sum(np.exp(similarity[j] / temperature) for j in nearest)
        for j in nearest:
            out[i, labels[j]] += np.exp(similarity[j] / temperature) / total
    return out


@pytest.mark.parametrize("index", EXACT)
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("k", [1, 200, 500])
def test_equals_the_published_scores(golden, table, index, k, temperature):
    bank = table(golden["bank"], golden["bank_labels"], classes=7)
    scores = KNNClassifier(k=k, temperature=temperature, index=index).fit(bank).predict_proba(golden["queries"])
    expected = golden[f"knn/float64/k{k}/T{temperature}/logits_l1"]
    np.testing.assert_allclose(scores, expected, atol=1e-6, rtol=0)
    assert (scores.argmax(1) == expected.argmax(1)).all()


def test_a_negated_query_finds_the_published_neighbour(golden, table):
    bank = table(golden["bank"], golden["bank_labels"], classes=7)
    published = golden["k1_negated_query/pred_scores"]
    scores = KNNClassifier(k=1).fit(bank).predict_proba(-golden["queries"])
    np.testing.assert_array_equal(scores, (published > 0).astype(float))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 60),
    d=st.integers(1, 9),
    k=st.integers(1, 60),
    temperature=st.sampled_from([0.02, 0.07, 1.0]),
    index=st.sampled_from(EXACT),
    scale=st.sampled_from([1e-3, 1.0, 500.0]),
)
def test_laws(table, seed, n, d, k, temperature, index, scale):
    rng = np.random.default_rng(seed)
    k = min(k, n)
    z, labels, queries = unit(rng, n, d), rng.integers(0, 4, n), rng.standard_normal((5, d))
    bank = table(z, labels, classes=4)
    knn = KNNClassifier(k=k, temperature=temperature, index=index).fit(bank)
    scores = knn.predict_proba(queries * scale)
    np.testing.assert_allclose(scores.sum(1), 1.0, atol=1e-12)
    assert (scores >= 0).all()
    expected = loop_scores(bank.z, labels, queries, k=k, temperature=temperature, classes=4)
    ranked = np.sort(bank.z.astype(np.float64) @ (queries / np.linalg.norm(queries, axis=1, keepdims=True)).T, axis=0)
    clear = np.ones(5, bool) if k == n else ranked[-k] - ranked[-k - 1] > 1e-9  # the k-th neighbour is not tied
    np.testing.assert_allclose(scores[clear], expected[clear], atol=1e-9)
    order = rng.permutation(n)
    shuffled = KNNClassifier(k=k, temperature=temperature, index=index).fit(table(z[order], labels[order], classes=4))
    np.testing.assert_allclose(shuffled.predict_proba(queries)[clear], scores[clear], atol=1e-9)


@pytest.mark.parametrize("index", EXACT)
def test_ties_go_to_the_lower_bank_row(table, index):
    z = np.tile(np.eye(2), (6, 1))  # rows 0, 2, 4, ... are all equal
    knn = KNNClassifier(k=3, index=index).fit(table(z, np.arange(12), classes=None, class_names=tuple("abcdefghijkl")))
    found = knn.neighbours(np.array([[1.0, 0.0]]))
    assert found.row.tolist() == [[0, 2, 4]]
    assert knn.predict(np.array([[1.0, 0.0]])).tolist() == [0]


def test_close_neighbours_are_told_apart_in_float64(table):
    """Similarities that differ by less than float32 can hold come out in their true order."""
    rng = np.random.default_rng(0)
    centre = unit(rng, 1, 64)
    z = (centre + 1e-4 * rng.standard_normal((12, 64))).astype(np.float32)
    bank = table(z)
    exact = bank.z.astype(np.float64)
    true = exact @ centre[0] / np.linalg.norm(exact, axis=1)
    for index in EXACT:
        found = KNNClassifier(k=5, index=index).fit(bank).neighbours(centre)
        assert found.row[0].tolist() == np.argsort(-true)[:5].tolist()
        np.testing.assert_allclose(found.similarity[0], np.sort(true)[::-1][:5], atol=1e-14)


def test_agrees_with_scikit_learn(table):
    sklearn = pytest.importorskip("sklearn.neighbors")
    rng = np.random.default_rng(1)
    bank, queries = table(unit(rng, 300, 16), rng.integers(0, 5, 300), classes=5), unit(rng, 80, 16)
    peer = sklearn.KNeighborsClassifier(30, weights=lambda gap: np.exp((1 - gap) / 0.07), metric="cosine")
    expected = peer.fit(bank.z.astype(np.float64), bank.label).predict_proba(queries)
    scores = KNNClassifier(k=30).fit(bank).predict_proba(queries)
    np.testing.assert_allclose(scores, expected, atol=1e-9)


def test_tables_tensors_and_arrays_are_one(table):
    rng = np.random.default_rng(2)
    knn = KNNClassifier(k=5).fit(table(unit(rng, 40, 8), rng.integers(0, 3, 40), classes=3, cohort="one"))
    queries = table(unit(rng, 7, 8), cohort="another")
    scores = knn.predict_proba(queries)
    np.testing.assert_array_equal(scores, knn.predict_proba(queries.z))
    np.testing.assert_array_equal(scores, knn.predict_proba(torch.from_numpy(queries.z).requires_grad_()))
    np.testing.assert_array_equal(knn.predict(queries), scores.argmax(1))
    assert knn.predict_proba(np.zeros((0, 8))).shape == (0, 3)


def test_chunks_of_queries_change_nothing(table):
    rng = np.random.default_rng(3)
    bank, queries = table(unit(rng, 50, 8), rng.integers(0, 3, 50), classes=3), unit(rng, 23, 8)
    for index in EXACT:
        whole = KNNClassifier(k=9, index=index).fit(bank).predict_proba(queries)
        parts = KNNClassifier(k=9, index=index, chunk=4).fit(bank).predict_proba(queries)
        np.testing.assert_array_equal(whole, parts)


def test_one_search_serves_several_k(table):
    rng = np.random.default_rng(4)
    bank, queries = table(unit(rng, 50, 8), rng.integers(0, 3, 50), classes=3), unit(rng, 11, 8)
    knn = KNNClassifier(k=30).fit(bank)
    few = knn.score(knn.neighbours(queries), k=4)
    np.testing.assert_allclose(few, KNNClassifier(k=4).fit(bank).predict_proba(queries), atol=1e-15)
    with pytest.raises(ValueError, match=r"k must lie in \[1, 30\].*got 31"):
        knn.score(knn.neighbours(queries), k=31)


def test_a_memory_mapped_bank_serves(table, tmp_path):
    rng = np.random.default_rng(5)
    bank, queries = table(unit(rng, 50, 8), rng.integers(0, 3, 50), classes=3), unit(rng, 11, 8)
    mapped = type(bank).load(bank.save(tmp_path / "bank"), memory_map=True)
    for index in EXACT:
        scores = KNNClassifier(k=5, index=index).fit(mapped).predict_proba(queries)
        np.testing.assert_array_equal(scores, KNNClassifier(k=5, index=index).fit(bank).predict_proba(queries))


def test_approximate_indexes_report_their_recall(table):
    rng = np.random.default_rng(6)
    bank, queries = table(unit(rng, 800, 16), rng.integers(0, 3, 800), classes=3), unit(rng, 40, 16)
    assert KNNClassifier(k=20).fit(bank).recall(queries) == 1.0
    narrow = KNNClassifier(k=20, index="IVF8,Flat").fit(bank)
    wide = KNNClassifier(k=20, index="IVF8,Flat", index_parameters="nprobe=8").fit(bank)
    assert narrow.recall(queries) < 0.9
    assert wide.recall(queries) == 1.0
    true, found = (fitted.neighbours(queries).row for fitted in (KNNClassifier(k=20).fit(bank), narrow))
    by_hand = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(true, found, strict=True)])
    assert narrow.recall(queries) == pytest.approx(by_hand)
    np.testing.assert_allclose(narrow.predict_proba(queries).sum(1), 1.0)


def test_missing_neighbours_of_an_approximate_index_weigh_nothing(table):
    """A cell of the index may hold fewer than k rows: the scores come from those."""
    z = np.concatenate((np.tile([[1.0, 0.0]], (60, 1)), np.tile([[0.0, 1.0]], (60, 1))))
    z += 1e-3 * np.random.default_rng(0).standard_normal(z.shape)
    bank = table(z, np.repeat([0, 1], 60), classes=2)
    knn = KNNClassifier(k=100, temperature=1.0, index="IVF2,Flat").fit(bank)
    scores = knn.predict_proba(np.array([[1.0, 0.0], [0.0, 1.0]]))
    np.testing.assert_allclose(scores, [[1.0, 0.0], [0.0, 1.0]])


def test_k_above_the_bank_is_cut_with_a_warning(table):
    bank = table(np.eye(3), [0, 1, 2])
    with pytest.warns(UserWarning, match=r"k=200 is more than the 3 rows of the bank; using k=3"):
        knn = KNNClassifier().fit(bank)
    assert knn.k == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KNNClassifier(k=3).fit(bank)


def test_classes_are_matched_by_name(table):
    rng = np.random.default_rng(7)
    knn = KNNClassifier(k=2).fit(table(unit(rng, 6, 4), [0, 1, 2] * 2, class_names=("mening", "hgg", "lgg")))
    unused = table(unit(rng, 2, 4), [0, 0], class_names=("hgg", "never seen"))
    assert knn.predict_proba(unused).shape == (2, 3)
    with pytest.raises(ValueError, match=r"queries hold classes \['normal'\] that the bank does not know.*'mening'"):
        knn.predict_proba(table(unit(rng, 2, 4), [0, 1], class_names=("hgg", "normal")))


def test_settings_are_complete_and_frozen():
    knn = KNNClassifier(k=20, temperature=0.1)
    assert eval(repr(knn), {"KNNClassifier": KNNClassifier}) == knn
    with pytest.raises(AttributeError):
        knn.k = 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be a whole number of at least 1, got 0"),
        ({"k": 2.0}, "k must be a whole number of at least 1, got 2.0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"chunk": 0}, "chunk must be a whole number"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        KNNClassifier(**options)


def test_an_empty_bank(table):
    with pytest.raises(ValueError, match=r"the bank is empty \(cohort 'c', split 'train'\)"):
        KNNClassifier().fit(table(np.zeros((0, 4)), classes=2, cohort="c", split="train"))


def test_a_bad_factory_string(table):
    with pytest.raises(ValueError, match=r"FAISS cannot build index 'Flut'.*'HNSW32'.*choices are 'flat' and 'stream'"):
        KNNClassifier(k=1, index="Flut").fit(table(np.eye(4)))
    with pytest.raises(ValueError, match=r"'IVF9999,Flat' has 9999 lists, more than the 4 rows of the bank"):
        KNNClassifier(k=1, index="IVF9999,Flat").fit(table(np.eye(4)))
    with pytest.raises(ValueError, match="give them once"):
        KNNClassifier(index="IVF4,Flat;nprobe=2", index_parameters="nprobe=3")


def test_bad_index_parameters(table):
    with pytest.raises(ValueError, match="FAISS cannot build index 'IVF2,Flat' 'nprobes=3'"):
        KNNClassifier(k=1, index="IVF2,Flat", index_parameters="nprobes=3").fit(
            table(np.random.default_rng(0).standard_normal((100, 4)))
        )


def test_queries_of_another_width(table):
    with pytest.raises(ValueError, match=r"queries must be \(n, 4\) as the bank's embeddings are, got shape \(2, 5\)"):
        KNNClassifier(k=1).fit(table(np.eye(4))).predict(np.ones((2, 5)))


def test_queries_that_are_not_finite(table):
    queries = np.ones((3, 4))
    queries[1, 2] = np.nan
    with pytest.raises(ValueError, match="queries are not finite, first in row 1"):
        KNNClassifier(k=1).fit(table(np.eye(4))).predict(queries)


def clusters(seed: int, n: int, d: int, *, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, n)
    return 2 * rng.standard_normal((classes, d))[label] + rng.standard_normal((n, d)), label


def test_saved_classifiers_know_their_bank_and_their_file(table, tmp_path):
    z, label = clusters(7, 300, 8)
    bank = table(z, label, classes=4)
    path = KNNClassifier(k=5, index="IVF4,Flat").fit(bank).save(tmp_path / "knn")
    other = label.copy()
    other[0] = (other[0] + 1) % 4
    for stale in (table(z[1:], label[1:], classes=4), table(z[::-1], label, classes=4), table(z, other, classes=4)):
        with pytest.raises(ValueError, match=r"was fitted on another bank of 300 rows"):
            load_knn(path, stale)
    file = path / "index.faiss"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"index\.faiss is missing or was changed"):
        load_knn(path, bank)
    KNNClassifier(k=5).fit(bank).save(path)  # replaces the older one as a whole
    assert sorted(p.name for p in path.iterdir()) == ["knn.json"] and list(tmp_path.iterdir()) == [path]
    assert json.loads((path / "knn.json").read_text())["settings"]["index"] == "flat"
    assert load_knn(path, bank).predict(bank).shape == (300,)
    with pytest.raises(FileNotFoundError, match=r"knn\.json is missing"):
        load_knn(tmp_path / "nothing", bank)
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="not a saved classifier"):
        KNNClassifier(k=5).fit(bank).save(tmp_path / "mine")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": 10**12}, "k is 1000000000000 in a bank of 60 rows"),
        ({"k": "3"}, "k is '3'"),
        ({"slack": -1.0}, "slack -1.0"),
        ({"index_sha256": ""}, "not of this index"),
        ({"settings": {"k": 3, "width": 1}}, "unexpected keyword argument 'width'"),
        ({"settings": {"index": "flat"}}, "not of this index"),
        ({"settings": []}, "TypeError"),
    ],
)
def test_damaged_settings_of_a_saved_classifier_are_named(table, tmp_path, change, named):
    bank = table(clusters(0, 60, 6)[0])
    path = KNNClassifier(k=3, index="IVF2,Flat").fit(bank).save(tmp_path / "knn") / "knn.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | change))
    with pytest.raises(ValueError, match=rf"knn\.json is damaged.*{named}"):
        load_knn(tmp_path / "knn", bank)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"knn\.json is damaged"):
        load_knn(tmp_path / "knn", bank)
