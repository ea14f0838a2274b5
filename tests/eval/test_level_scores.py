"""Metrics from embeddings alone: the clean records of an evaluation, tables of them, and what is refused."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from hsat import embed
from hsat.attacks import Linf, RandomNoise
from hsat.classifiers import Head, KNNClassifier, LinearProbe, MeanPooling, NearestCentroid
from hsat.eval import (
    Provenance,
    RunOptions,
    Scoring,
    compare_models,
    evaluate_whitebox,
    load_scores,
    read_records,
    score_levels,
    score_tables,
)
from hsat.report import markdown_table, write_report
from hsat.types import EmbeddingTable

KNNS = (KNNClassifier(k=5), KNNClassifier(k=15), NearestCentroid())


@pytest.fixture
def tables(toy_encoder, toy_batches):
    bank, queries = toy_batches(seed=1, sizes=(30, 30), first_id=1000), toy_batches(seed=2, sizes=(18, 9))
    return (bank, queries), (embed(toy_encoder, bank), embed(toy_encoder, queries))


@pytest.mark.parametrize("pooling", ["mean", "paper"])
def test_records_are_those_of_clean_queries(tables, toy_encoder, pooling):
    (bank, queries), (bank_table, query_table) = tables
    scoring = Scoring(bootstrap=50, pooling=pooling)
    result = score_levels(
        bank_table, query_table, classifier=KNNS, scoring=scoring, seed=3, provenance=Provenance(model="toy")
    )
    attacked = evaluate_whitebox(
        toy_encoder,
        bank,
        queries,
        {"noise": RandomNoise(Linf(8 / 255))},
        classifier=KNNS,
        scoring=scoring,
        run=RunOptions(seed=3, noise=False),
        provenance=Provenance(model="toy"),
    )
    wanted = [record for record in attacked.records if record.attack_name == "clean"]
    assert [asdict(record) for record in result.records] == [asdict(record) for record in wanted]
    assert len(wanted) == 3 * 3 * 5 and all(record.low is not None for record in wanted if record.metric == "accuracy")
    for key, rows in attacked.scores["clean"].items():
        np.testing.assert_array_equal(result.scores["clean"][key], rows)


def test_fitted_classifiers_give_the_same_numbers(tables):
    _, (bank, queries) = tables
    fast = Scoring(bootstrap=20)
    wanted = score_levels(bank, queries, classifier=KNNS, scoring=fast)
    fitted = [one.fit(bank) for one in KNNS]
    assert score_levels(fitted, queries, scoring=fast).records == wanted.records
    (alone,) = [score_levels(fitted[2], queries, scoring=fast)]
    values = [record.value for record in wanted.records if record.classifier == repr(KNNS[2])]
    assert [record.value for record in alone.records] == values
    assert {record.settings["layer"] for record in alone.records} == {"features"}
    parts = score_levels([bank[:25], bank[25:]], queries, classifier=KNNS, scoring=fast)
    assert [record.value for record in parts.records] == [record.value for record in wanted.records]
    probe = score_levels(LinearProbe().fit(bank), queries, scoring=fast)
    assert 0 <= probe.records[0].value <= 1
    head = Head(torch.nn.Linear(3, 3), bank.class_names)
    assert len(score_levels(bank, queries, classifier=head, scoring=fast).records) == 15


def test_the_default_is_the_papers_vote(tables):
    _, (bank, queries) = tables
    with pytest.warns(UserWarning, match="60"):  # k = 200 is cut to the bank
        result = score_levels(bank, queries, scoring=Scoring(bootstrap=0))
    assert {record.k for record in result.records} == {60}


def test_its_table_in_every_form(tables):
    pandas = pytest.importorskip("pandas")
    _, (bank, queries) = tables
    result = score_levels(bank, queries, classifier=KNNS[0], scoring=Scoring(bootstrap=50))
    lines = str(result).splitlines()
    assert lines[2] == "| level | metric | value | low | high | chance | n |"
    assert [line.split(" | ")[0] for line in lines[4:10]] == [
        f"| {level}" for level in ("patch", "slide", "patient") for _ in range(2)
    ]
    frame = result.to_frame(metrics=("accuracy", "top2"))
    assert list(frame["metric"]) == ["accuracy", "top2"] * 3
    record = next(record for record in result.records if (record.level, record.metric) == ("slide", "accuracy"))
    row = frame.iloc[2]
    for name, value in (("value", record.value), ("low", record.low), ("high", record.high), ("chance", record.chance)):
        assert row[name] == pytest.approx(100 * value, abs=0.051)
    assert row["n"] == record.n and pandas.api.types.is_numeric_dtype(frame["low"])
    assert r"\toprule" in result.to_latex() and "slide & mca" in result.to_latex()
    assert (
        repr(result).startswith("LevelScores of (unnamed model): 15 records") and len(repr(result).splitlines()) <= 10
    )
    several = score_levels(bank, queries, classifier=KNNS, scoring=Scoring(bootstrap=0)).table(metrics=("mca",))
    assert several.head[0] == "classifier" and len(several.rows) == 9 and "no interval: no resamples" in several.notes
    with pytest.raises(ValueError, match=r"unknown metrics \['auc'\]"):
        result.table(metrics=("auc",))
    assert "Patient level" in markdown_table(result.records)


def test_it_is_saved_reported_and_compared_as_an_evaluation_is(tables, tmp_path):
    _, (bank, queries) = tables
    results = [
        score_levels(bank, queries, classifier=one, scoring=Scoring(bootstrap=20), provenance=Provenance(model=name))
        for name, one in (("a", KNNS[0]), ("b", KNNS[1]))
    ]
    folder = results[0].save(tmp_path / "run")
    assert read_records(folder / "records.jsonl") == results[0].records
    (stored,) = load_scores(folder / "scores.npz")
    np.testing.assert_allclose(stored.scores, results[0].scores["clean"][5])
    assert "patient" in write_report([folder], tmp_path / "page.html").read_text()
    again = score_levels(bank, queries, classifier=KNNS[0], provenance=Provenance(model="b"))
    differences = compare_models([*score_tables(results[0]), *score_tables(again)])
    assert differences and all(one.difference == 0 for one in differences)


def test_doubtful_tables_are_flagged():
    rng = np.random.default_rng(0)
    z, labels = rng.normal(size=(40, 6)) + 3 * np.eye(6)[np.arange(40) % 2], np.array(["a", "b"])[np.arange(40) % 2]
    fast = {"classifier": KNNClassifier(k=3), "scoring": Scoring(bootstrap=0)}
    bank = EmbeddingTable.from_arrays(z, labels, [f"{i % 4:03}" for i in range(40)])
    shared = EmbeddingTable.from_arrays(z + 0.1, labels, [f"{i % 4 + 2:03}" for i in range(40)])
    flags = {flag for record in score_levels(bank, shared, **fast).records for flag in record.flags}
    assert flags == {"bank and queries share 2 patients"}
    with pytest.warns(UserWarning, match="every row counts as a slide and a patient"):
        nameless = EmbeddingTable.from_arrays(z + 0.1, labels)
    result = score_levels(bank, nameless, **fast)
    (flag,) = {flag for record in result.records for flag in record.flags}
    assert flag.startswith("every query is a patient of its own: the three levels coincide, and the intervals")
    assert f"- {flag}" in str(result)
    unknown = EmbeddingTable.from_arrays(z, np.where(labels == "a", "c", "b"), [str(i % 4 + 10) for i in range(40)])
    with pytest.raises(ValueError, match=r"classes \['c'\] that the bank does not know"):
        score_levels(bank, unknown, **fast)


def test_what_is_no_bank_is_named(tables):
    _, (bank, queries) = tables
    with pytest.raises(ValueError, match=r"fitted already; leave out classifier="):
        score_levels(KNNS[0].fit(bank), queries, classifier=KNNS[0])
    with pytest.raises(TypeError, match=r"an EmbeddingTable or a fitted classifier, got KNNClassifier.*classifier=KNN"):
        score_levels(KNNS[0], queries)
    with pytest.raises(TypeError, match=r"decides about slides, not patches; hsat\.eval\.cross_validate_slides"):
        score_levels(MeanPooling(KNNS[0].fit(bank)), queries)
    with pytest.raises(TypeError, match="the queries must be an EmbeddingTable"):
        score_levels(bank, queries.z)
    with pytest.raises(ValueError, match="the bank is empty"):
        score_levels([], queries)
    with pytest.raises(ValueError, match="embedded by 'UNI' and the queries by 'CONCH'"):
        score_levels(replace(bank, encoder="UNI"), replace(queries, encoder="CONCH"))
    classes = replace(bank, class_names=("x", "y", "z"))
    with pytest.raises(ValueError, match="have different classes"):
        score_levels([KNNS[0].fit(bank), KNNS[0].fit(classes)], queries)
