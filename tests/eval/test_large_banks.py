"""Banks in blocks, on disk, in several tables, and behind approximate indexes."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.attacks import PGD, Linf
from hsat.classifiers import search as neighbours
from hsat.eval import KNNClassifier, embed, evaluate_whitebox, fit_shards, load_knn
from hsat.types import EmbeddingTable

DOCUMENT = Path(__file__).parents[2] / "docs" / "large_banks.md"


def clusters(seed: int, n: int, d: int, *, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, n)
    return 2 * rng.standard_normal((classes, d))[label] + rng.standard_normal((n, d)), label


def equal_to_the_definition(found, bank, queries):
    """Neighbours one by one: similarity in float64, then the lower row."""
    z = bank.z.astype(np.float64)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    for query, similarity, rows in zip(queries, *found, strict=True):
        true = np.round(z @ (query / np.linalg.norm(query)), 13)  # rows that differ by less than rounding are tied
        order = sorted(range(len(z)), key=lambda j: (-true[j], j))[: len(rows)]
        assert rows.tolist() == order
        np.testing.assert_allclose(similarity, true[order], atol=1e-12)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(neighbours, "_GATHER_BYTES", 2048)


@pytest.mark.parametrize("index", ["flat", "stream"])
def test_ties_by_the_dozen_go_to_the_lower_rows(table, small_blocks, index):
    """Many more equal rows than the index proposes beyond k: a copy of a row is as near as the row."""
    rng = np.random.default_rng(0)
    few = rng.integers(-2, 3, (5, 8)) + 0.5
    bank = table(few[rng.integers(0, 5, 300)])
    for queries in (few, rng.standard_normal((20, 8))):
        for k in (1, 7, 100):
            equal_to_the_definition(KNNClassifier(k=k, index=index).fit(bank).neighbours(queries), bank, queries)


@pytest.mark.parametrize("index", ["flat", "stream"])
def test_a_crowd_closer_than_float32_can_tell_is_ordered(table, index):
    rng = np.random.default_rng(1)
    bank = table((rng.standard_normal(16) + 2e-5 * rng.standard_normal((400, 16))).astype(np.float32))
    queries = rng.standard_normal((6, 16))
    equal_to_the_definition(KNNClassifier(k=5, index=index).fit(bank).neighbours(queries), bank, queries)


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


def test_flat_and_stream_agree_bit_for_bit_in_any_blocks(table, small_blocks):
    z, label = clusters(2, 500, 12)
    bank, queries = table(z, label), clusters(3, 60, 12)[0]
    first = KNNClassifier(k=20).fit(bank).predict_proba(queries)
    for options in (dict(index="stream"), dict(index="flat", chunk=7), dict(index="stream", chunk=3)):
        np.testing.assert_array_equal(KNNClassifier(k=20, **options).fit(bank).predict_proba(queries), first)


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


def test_a_mapped_bank_of_other_lengths_is_named(table, tmp_path):
    bank = table(clusters(4, 40, 6)[0])
    bank.save(tmp_path / "bank")
    z = np.array(bank.z)
    z[17] *= 3
    np.save(tmp_path / "bank" / "z.npy", z)
    mapped = EmbeddingTable.load(tmp_path / "bank", memory_map=True)
    with pytest.raises(ValueError, match=r"row 17 of the memory-mapped bank has length 3, but z must hold unit rows"):
        KNNClassifier(k=3, index="stream").fit(mapped)


@pytest.mark.parametrize("index", ["flat", "stream", "IVF4,Flat;nprobe=4"])
def test_a_bank_stored_in_float16_is_searched_exactly_as_stored(table, tmp_path, small_blocks, index):
    z, label = clusters(5, 300, 40)
    bank, queries = table(z, label=label), clusters(6, 30, 40)[0]
    bank.save(tmp_path / "whole")
    bank.save(tmp_path / "half", dtype="float16")
    sizes = [(tmp_path / name / "z.npy").stat().st_size - 128 for name in ("whole", "half")]
    assert sizes == [300 * 40 * 4, 300 * 40 * 2]
    mapped = EmbeddingTable.load(tmp_path / "half", memory_map=True)
    assert mapped.z.dtype == np.float16
    knn = KNNClassifier(k=7, index=index).fit(mapped)
    equal_to_the_definition(knn.neighbours(queries), mapped, queries)
    assert (knn.predict(queries) == KNNClassifier(k=7).fit(bank).predict(queries)).mean() > 0.9
    assert EmbeddingTable.load(tmp_path / "half").z.dtype == np.float32  # read into memory, it is as any table
    with pytest.raises(ValueError, match="'float32' or 'float16', got 'float8'"):
        bank.save(tmp_path / "eighth", dtype="float8")
    assert not (tmp_path / "eighth").exists()


def test_attacks_on_the_vote_take_a_bank_stored_in_float16(tmp_path, toy_encoder, toy_batches):
    bank = embed(toy_encoder, toy_batches(seed=0, sizes=(60,)))
    bank.save(tmp_path / "half", dtype="float16")
    mapped = EmbeddingTable.load(tmp_path / "half", memory_map=True)
    attacks = {"PGD-8": PGD(Linf(8 / 255), step_size=4 / 255, steps=2)}
    results = [
        evaluate_whitebox(
            toy_encoder, each, toy_batches(seed=1, sizes=(20,), first_id=1000), attacks, k=3, target="knn", bootstrap=0
        )
        for each in (bank, mapped)
    ]
    values = [[record.value for record in result.records] for result in results]
    assert np.isfinite(values).all()
    np.testing.assert_allclose(*values, atol=0.2)


def test_rows_a_little_off_unit_length_are_still_ranked_exactly(table, tmp_path):
    """Lengths that differ by more than neighbouring cosines do must not decide who is a neighbour."""
    rng = np.random.default_rng(5)
    bank = table((rng.standard_normal(16) + 0.02 * rng.standard_normal((400, 16))).astype(np.float32))
    bank.save(tmp_path / "bank")
    np.save(tmp_path / "bank" / "z.npy", bank.z * (1 + 5e-4 * rng.uniform(-1, 1, (400, 1))).astype(np.float32))
    mapped = EmbeddingTable.load(tmp_path / "bank", memory_map=True)
    queries = mapped.z[:10].astype(np.float64)
    for index in ("flat", "stream"):
        equal_to_the_definition(KNNClassifier(k=5, index=index).fit(mapped).neighbours(queries), mapped, queries)


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


def test_a_bank_stored_column_by_column_is_not_copied(table, tmp_path):
    bank, queries = table(clusters(0, 60, 6)[0]), clusters(1, 5, 6)[0]
    bank.save(tmp_path / "bank")
    np.save(tmp_path / "bank/z.npy", np.asfortranarray(bank.z))
    mapped = EmbeddingTable.load(tmp_path / "bank", memory_map=True)
    assert KNNClassifier(k=7).fit(mapped).tensors() == {}, "it would have to be copied"
    equal_to_the_definition(KNNClassifier(k=7).fit(mapped).neighbours(queries), bank, queries)


def test_records_say_how_good_an_approximate_index_was(toy_encoder, toy_batches):
    bank = embed(toy_encoder, toy_batches(seed=0, sizes=(60, 60)))
    queries = toy_batches(seed=1, sizes=(30,), first_id=1000)
    attacks = {"PGD-2": PGD(Linf(2 / 255), step_size=1 / 255, steps=2)}
    found = evaluate_whitebox(toy_encoder, bank, queries, attacks, k=9, index="IVF8,Flat;nprobe=2", bootstrap=0)
    knn = KNNClassifier(k=9, index="IVF8,Flat;nprobe=2").fit(bank)
    for record in found.records:
        z = found.tables[record.attack_name].z
        assert record.settings["index_recall"] == knn.recall(z) < 1
        assert record.settings["index_agreement"] == knn.agreement(z)
        assert record.settings["index_queries"] == 30
    exact = evaluate_whitebox(toy_encoder, bank, queries, {}, k=9, bootstrap=0)
    assert not any("index_recall" in record.settings for record in exact.records)


@pytest.mark.filterwarnings("ignore:k=")
def test_the_document_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(code, str(DOCUMENT), "exec", dont_inherit=True), names)
    np.testing.assert_array_equal(
        names["one"].predict_proba(names["queries"]), names["many"].predict_proba(names["queries"])
    )
    assert names["recall"] > 0.5 and (tmp_path / "index" / "index.faiss").is_file()
