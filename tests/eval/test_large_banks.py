"""Evaluations with banks on disk and approximate indexes, and the document about them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from hsat.attacks import PGD, Linf
from hsat.classifiers import KNNClassifier
from hsat.eval import Scoring, embed, evaluate_whitebox
from hsat.types import EmbeddingTable

DOCUMENT = Path(__file__).parents[2] / "docs" / "large_banks.md"


@pytest.mark.filterwarnings("ignore:the bank is a file")
def test_attacks_on_the_vote_take_a_bank_stored_in_float16(tmp_path, toy_encoder, toy_batches):
    bank = embed(toy_encoder, toy_batches(seed=0, sizes=(60,)))
    bank.save(tmp_path / "half", dtype="float16")
    mapped = EmbeddingTable.load(tmp_path / "half", memory_map=True)
    attacks = {"PGD-8": PGD(Linf(8 / 255), step_size=4 / 255, steps=2)}
    results = [
        evaluate_whitebox(
            toy_encoder,
            each,
            toy_batches(seed=1, sizes=(20,), first_id=1000),
            attacks,
            classifier=KNNClassifier(k=3),
            scoring=Scoring(bootstrap=0),
        )
        for each in (bank, mapped)
    ]
    values = [[record.value for record in result.records] for result in results]
    assert np.isfinite(values).all()
    np.testing.assert_allclose(*values, atol=0.2)


def test_records_say_how_good_an_approximate_index_was(toy_encoder, toy_batches):
    bank = embed(toy_encoder, toy_batches(seed=0, sizes=(60, 60)))
    queries = toy_batches(seed=1, sizes=(30,), first_id=1000)
    attacks = {"PGD-2": PGD(Linf(2 / 255), step_size=1 / 255, steps=2)}
    settings, scoring = KNNClassifier(k=9, index="IVF8,Flat;nprobe=2"), Scoring(bootstrap=0)
    found = evaluate_whitebox(
        toy_encoder, bank, queries, attacks, classifier=settings, target="features", scoring=scoring
    )
    knn = settings.fit(bank)
    for record in found.records:
        z = found.tables[record.attack_name].z
        assert record.settings["index_recall"] == knn.recall(z) < 1
        assert record.settings["index_agreement"] == knn.agreement(z)
        assert record.settings["index_queries"] == 30
    exact = evaluate_whitebox(toy_encoder, bank, queries, {}, classifier=KNNClassifier(k=9), scoring=scoring)
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
