"""Exact searches: ties, crowds, blocks, files, and the arithmetic bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.classifiers import KNNClassifier, fit_classifiers, fit_shards, search
from hsat.classifiers.base import unit_rows
from hsat.types import EmbeddingTable


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
    monkeypatch.setattr(search, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(search, "GATHER_BYTES", 2048)


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


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    noise=st.sampled_from([0.0, 1e-9, 1e-7, 1e-6]),
    copies=st.booleans(),
    k=st.sampled_from([1, 5, 40]),
    index=st.sampled_from(["flat", "stream"]),
)
def test_crowds_closer_than_rounding_are_in_the_documented_order(table, seed, noise, copies, k, index):
    """By float64 similarity, then by row: whatever else is asked in the same call, in one table or in two."""
    rng = np.random.default_rng(seed)
    z = np.ones(8) + noise * rng.standard_normal((300, 8))
    z = z[rng.integers(0, 150, 300)] if copies else z
    bank, queries = table(z, rng.integers(0, 3, 300), classes=3), np.concatenate((z[:3], rng.standard_normal((3, 8))))
    everything = np.tile(np.arange(300), (6, 1))
    true = search.topk(search.BankRows(bank).similarities(unit_rows(queries), everything), everything, k)
    parts = [table(z[a:b], bank.label[a:b], classes=3) for a, b in ((0, 110), (110, 300))]
    alone = KNNClassifier(k=k, index=index)
    for knn in (
        alone.fit(bank),
        fit_classifiers([alone, KNNClassifier(k=140, index=index)], bank)[0],
        fit_shards(alone, parts),
    ):
        found = knn.neighbours(queries)
        np.testing.assert_array_equal(found.row, true.row)
        np.testing.assert_array_equal(found.similarity, true.similarity)


def test_flat_and_stream_agree_bit_for_bit_in_any_blocks(table, small_blocks):
    z, label = clusters(2, 500, 12)
    bank, queries = table(z, label), clusters(3, 60, 12)[0]
    first = KNNClassifier(k=20).fit(bank).predict_proba(queries)
    for options in (dict(index="stream"), dict(index="flat", chunk=7), dict(index="stream", chunk=3)):
        np.testing.assert_array_equal(KNNClassifier(k=20, **options).fit(bank).predict_proba(queries), first)


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


def test_a_bank_stored_column_by_column_is_not_copied(table, tmp_path):
    bank, queries = table(clusters(0, 60, 6)[0]), clusters(1, 5, 6)[0]
    bank.save(tmp_path / "bank")
    np.save(tmp_path / "bank/z.npy", np.asfortranarray(bank.z))
    mapped = EmbeddingTable.load(tmp_path / "bank", memory_map=True)
    assert KNNClassifier(k=7).fit(mapped).tensors() == {}, "it would have to be copied"
    equal_to_the_definition(KNNClassifier(k=7).fit(mapped).neighbours(queries), bank, queries)


def similarities_as_first_written(queries, bank, row):
    """The arithmetic that scores have come from since the first version: whole lines of gathered rows."""
    close = bank[row].astype(np.float64)
    length = np.sqrt(np.einsum("nkd,nkd->nk", close, close))
    return np.einsum("nkd,nd->nk", close, queries) / np.where(length > 0, length, 1.0)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (7, 9, 3), (5, 208, 2048), (40, 30, 513), (3, 1, 8192)])
def test_similarities_keep_their_bits_whatever_is_measured_together(table, monkeypatch, n, m, d, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(search, "LEAST_PER_THREAD", 1)
    rng = np.random.default_rng(0)
    bank = table(rng.standard_normal((50, d)))
    unit = unit_rows(rng.standard_normal((n, d)))
    row = rng.integers(0, 50, (n, m))
    expected = similarities_as_first_written(unit, bank.z, row)
    rows = search.BankRows(bank)
    np.testing.assert_array_equal(rows.similarities(unit, row), expected)
    np.testing.assert_array_equal(rows.similarities(unit[-1:], row[-1:, ::-1]), expected[-1:, ::-1])
    np.testing.assert_allclose(rows.similarities(unit, row, on_device=True), expected, atol=1e-14)


def test_very_long_rows_do_not_depend_on_what_is_measured_together_either(table):
    rng = np.random.default_rng(1)
    bank, unit = table(rng.standard_normal((9, 20_001))), unit_rows(rng.standard_normal((4, 20_001)))
    rows, row = search.BankRows(bank), rng.integers(0, 9, (4, 5))
    whole = rows.similarities(unit, row)
    np.testing.assert_allclose(whole, similarities_as_first_written(unit, bank.z, row), atol=1e-14)
    for n, m in np.ndindex(row.shape):
        assert rows.similarities(unit[n : n + 1], row[n : n + 1, m : m + 1]) == whole[n, m]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 60),
    directions=st.integers(1, 6),
    noise=st.sampled_from([0.0, 1e-7, 1e-3, 1.0]),
    k=st.integers(1, 70),
    temperature=st.sampled_from([1e-9, 0.003, 0.07, 10.0]),
    d=st.sampled_from([1, 2, 5, 33, 700]),
)
@pytest.mark.filterwarnings("ignore:k=")
def test_predict_is_the_highest_score_also_where_products_cannot_tell(
    table, seed, rows, directions, noise, k, temperature, d
):
    rng = np.random.default_rng(seed)
    few = rng.standard_normal((directions, d))
    z = few[rng.integers(0, directions, rows)] + noise * rng.standard_normal((rows, d))
    knn = KNNClassifier(k=k, temperature=temperature).fit(table(z, rng.integers(0, 3, rows), classes=3))
    queries = np.concatenate((few, rng.standard_normal((5, d)), np.zeros((1, d))))
    np.testing.assert_array_equal(knn.predict(queries), knn.predict_proba(queries).argmax(1))


def test_clear_decisions_are_taken_without_measuring(table, monkeypatch):
    z, label = clusters(8, 400, 20)
    knn = KNNClassifier(k=20).fit(table(z, label))
    queries = clusters(8, 400, 20)[0][:100]
    measured = []
    rank = search.BankRows.rank

    def counting(self, unit, *args, **options):
        measured.append(len(unit))
        return rank(self, unit, *args, **options)

    monkeypatch.setattr(search.BankRows, "rank", counting)
    winner = knn.predict(queries)
    assert sum(measured) < 20
    np.testing.assert_array_equal(winner, knn.predict_proba(queries).argmax(1))


@pytest.mark.parametrize("index", ["flat", "stream"])
def test_low_precision_products_are_not_trusted(table, monkeypatch, index):
    z, label = clusters(9, 300, 12)
    knn, queries = KNNClassifier(k=9, index=index).fit(table(z, label)), clusters(10, 40, 12)[0]
    expected = knn.predict_proba(queries)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(knn.predict_proba(queries), expected)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    np.testing.assert_array_equal(knn.predict_proba(queries), expected)


def test_a_bank_that_cannot_be_written_is_searched_in_place_and_without_a_warning(table, recwarn):
    z, label = clusters(11, 100, 8)
    z = np.array(table(z).z)
    z.flags.writeable = False
    bank = table(z, label)
    knn = KNNClassifier(k=3).fit(bank)
    assert knn.tensors()["rows"].data_ptr() == bank.z.ctypes.data == z.ctypes.data
    assert knn.predict(z).shape == (100,) and not recwarn.list


@pytest.mark.parametrize("k", [1, 20])
def test_predict_is_the_highest_score_in_crowds_of_wide_rows(table, k):
    """Undecided queries are normalised once, as those of `predict_proba`: the last digits decide among such rows."""
    rng = np.random.default_rng(4)
    few = rng.standard_normal((60, 2048))
    rows = few[rng.integers(0, 60, 900)] + 1e-7 * rng.standard_normal((900, 2048))
    knn = KNNClassifier(k=k).fit(table(rows, rng.integers(0, 5, 900), classes=5))
    np.testing.assert_array_equal(knn.predict(few), knn.predict_proba(few).argmax(1))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("n", "m", "count"), [(1, 1, 1), (5, 40, 7), (6, 40, 40), (3, 9, 20), (4, 1000, 999)])
def test_the_highest_products_are_those_of_topk(monkeypatch, n, m, count, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(search, "LEAST_PER_THREAD", 1)
    product = torch.randn(n, m, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    value, column = search.highest(product, count)
    assert torch.equal(value.sort(dim=1, descending=True).values, product.topk(min(count, m), dim=1).values)
    assert torch.equal(product.gather(1, column), value)
    assert all(len(set(line)) == min(count, m) for line in column.tolist())
