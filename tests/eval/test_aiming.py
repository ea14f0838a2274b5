"""Attacks on the kNN vote itself: target="knn"."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hsat.attacks import PGD, Linf, soft_knn
from hsat.eval import KNNClassifier, embed, evaluate_whitebox
from hsat.testing import check_feasible

PGD2 = PGD(Linf(2 / 255), step_size=1 / 255, steps=4)
FAST = dict(k=15, bootstrap=0)


@pytest.fixture(scope="module")
def bank(toy_batches):
    return toy_batches(seed=1, sizes=(30, 30, 30), first_id=1000)


@pytest.fixture(scope="module")
def queries(toy_batches):
    return toy_batches(seed=2, sizes=(20, 16))


def accuracy(result, name, k=15):
    (value,) = (
        r.value for r in result.records if (r.attack_name, r.level, r.metric, r.k) == (name, "patch", "accuracy", k)
    )
    return value


def test_the_vote_falls_further_than_under_drift(toy_encoder, bank, queries):
    found = {
        target: evaluate_whitebox(toy_encoder, bank, queries, {"PGD-2": PGD2}, target=target, noise=True, **FAST)
        for target in ("features", "knn")
    }
    assert accuracy(found["knn"], "PGD-2") < accuracy(found["features"], "PGD-2") < accuracy(found["knn"], "clean")
    assert accuracy(found["knn"], "noise-2") > 0.8
    records = found["knn"].records
    assert {record.target for record in records} == {"knn"}
    assert all(record.settings["attacked_k"] == 15 and record.flags == () for record in records)
    assert all("attacked_k" not in record.settings for record in found["features"].records)


def test_images_are_what_the_attack_on_the_vote_gives(toy_encoder, bank, queries):
    result = evaluate_whitebox(
        toy_encoder, bank, queries, {"PGD-2": PGD2}, target="knn", seed=3, keep_examples=36, **FAST
    )
    table = embed(toy_encoder, bank)
    toy_encoder.eval()
    parts = []
    for batch in queries:
        vote = soft_knn(toy_encoder.features, table, batch.label, k=15)
        parts.append(PGD2(batch.images, vote, generator=torch.Generator().manual_seed(3), ids=batch.patch))
        wrong = vote.success(parts[-1])
        predicted = KNNClassifier(k=15).fit(table).predict(toy_encoder.features(parts[-1]).detach())
        assert torch.equal(wrong, torch.from_numpy(predicted) != batch.label)
    assert torch.equal(result.examples["PGD-2"], torch.cat(parts))
    check_feasible(torch.cat(parts), torch.cat([batch.images for batch in queries]), PGD2.threat)


def test_labels_are_matched_by_name(toy_encoder, bank, queries):
    """A bank whose classes stand in another order gives the same attack."""
    table = embed(toy_encoder, bank)
    turned = dataclasses.replace(
        table, label=(table.label + 1) % 3, class_names=("red", "cyan", "green"), cohort="another"
    )
    one, other = (
        evaluate_whitebox(toy_encoder, b, queries, {"PGD-2": PGD2}, target="knn", **FAST) for b in (table, turned)
    )
    np.testing.assert_allclose(one.tables["PGD-2"].z, other.tables["PGD-2"].z, atol=1e-5)
    assert accuracy(one, "PGD-2") == accuracy(other, "PGD-2")


def test_the_embedding_can_be_what_votes(toy_encoder, bank, queries):
    result = evaluate_whitebox(toy_encoder, bank, queries, {"PGD-2": PGD2}, target="knn", layer="embedding", **FAST)
    assert result.tables["PGD-2"].z.shape[1] == 4
    assert accuracy(result, "PGD-2") < accuracy(result, "clean")


def test_the_first_k_is_attacked_and_the_others_say_so(toy_encoder, bank, queries):
    result = evaluate_whitebox(
        toy_encoder, bank, queries, {"PGD-2": PGD2}, target="knn", k=(7, 15), bootstrap=0, noise=True
    )
    alone = evaluate_whitebox(toy_encoder, bank, queries, {"PGD-2": PGD2}, target="knn", k=7, bootstrap=0)
    np.testing.assert_array_equal(result.tables["PGD-2"].z, alone.tables["PGD-2"].z)
    for record in result.records:
        assert record.settings["attacked_k"] == 7
        doubted = record.attack_name == "PGD-2" and record.k == 15
        assert record.flags == (("the attack climbed the vote of 7 neighbours, not of 15",) if doubted else ())


def test_k_above_the_bank_is_cut_once(toy_encoder, bank, queries):
    with pytest.warns(UserWarning, match="k=200 is more than the 90 rows") as seen:
        result = evaluate_whitebox(toy_encoder, bank, queries, {"PGD-2": PGD2}, target="knn", k=200, bootstrap=0)
    assert len(seen) == 1 and {r.settings["attacked_k"] for r in result.records} == {90}
