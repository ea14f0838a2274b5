"""What the attacks of an evaluation maximise: the decision of the classifier that scores, or drift; no pass twice."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hsat.attacks import MIFGSM, PGD, Linf, RandomNoise, margin
from hsat.classifiers import DecisionModel, KNNClassifier
from hsat.embedding import embed
from hsat.eval import RunOptions, Scoring, evaluate_whitebox
from hsat.eval.objectives import CleanLayers, ObjectiveFactory
from hsat.eval.options import Target
from hsat.models import build_encoder
from hsat.testing import check_feasible

PGD2 = PGD(Linf(2 / 255), step_size=1 / 255, steps=4)
KNN = KNNClassifier(k=15)
SCORING, QUIET = Scoring(bootstrap=0), RunOptions(noise=False)
FAST = dict(classifier=KNN, scoring=SCORING, run=QUIET)


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
        target: evaluate_whitebox(
            toy_encoder, bank, queries, {"PGD-2": PGD2}, target=target, **FAST | dict(run=RunOptions())
        )
        for target in ("features", "decision")
    }
    assert (
        accuracy(found["decision"], "PGD-2")
        < accuracy(found["features"], "PGD-2")
        < accuracy(found["decision"], "clean")
    )
    assert accuracy(found["decision"], "noise-2") > 0.8
    records = found["decision"].records
    assert {record.target for record in records} == {"decision"}
    assert all(record.settings["attacked_k"] == 15 and record.flags == () for record in records)
    assert all("attacked_k" not in record.settings for record in found["features"].records)


def test_images_are_what_the_attack_on_the_vote_gives(toy_encoder, bank, queries):
    run = RunOptions(noise=False, seed=3, keep_examples=36)
    result = evaluate_whitebox(toy_encoder, bank, queries, {"PGD-2": PGD2}, **FAST | dict(run=run))
    table = embed(toy_encoder, bank)
    toy_encoder.eval()
    parts = []
    for batch in queries:
        vote = margin(DecisionModel(toy_encoder, KNN.fit(table)), batch.label)
        parts.append(PGD2(batch.images, vote, generator=torch.Generator().manual_seed(3), ids=batch.patch))
        wrong = vote.success(parts[-1])
        predicted = KNN.fit(table).predict(toy_encoder.features(parts[-1]).detach())
        assert torch.equal(wrong, torch.from_numpy(predicted) != batch.label)
    assert torch.equal(result.examples["PGD-2"], torch.cat(parts))
    check_feasible(torch.cat(parts), torch.cat([batch.images for batch in queries]), PGD2.threat)


def test_decisions_are_climbed_in_float64_by_one_model(toy_encoder, bank):
    """A margin of float32 logits would lose what is below 1e-6, which searches that compare margins would follow."""
    toy_encoder.eval()
    factory = ObjectiveFactory(toy_encoder, Target(), "features", KNN.fit(embed(toy_encoder, bank)))
    first, second = (factory.decision(batch.label) for batch in bank[:2])
    value = first(bank[0].images)
    assert value.dtype == torch.float64 and not torch.equal(value.float().double(), value)
    assert first.model is second.model and isinstance(first.model, DecisionModel)
    usual = margin(DecisionModel(toy_encoder, KNN.fit(embed(toy_encoder, bank))), bank[0].label)(bank[0].images)
    torch.testing.assert_close(usual.double(), value, atol=1e-5, rtol=0)


def test_labels_are_matched_by_name(toy_encoder, bank, queries):
    """A bank whose classes stand in another order gives the same attack."""
    table = embed(toy_encoder, bank)
    turned = dataclasses.replace(
        table, label=(table.label + 1) % 3, class_names=("red", "cyan", "green"), cohort="another"
    )
    one, other = (evaluate_whitebox(toy_encoder, b, queries, {"PGD-2": PGD2}, **FAST) for b in (table, turned))
    np.testing.assert_allclose(one.tables["PGD-2"].z, other.tables["PGD-2"].z, atol=1e-5)
    assert accuracy(one, "PGD-2") == accuracy(other, "PGD-2")


def test_the_embedding_can_be_what_votes(toy_encoder, bank, queries):
    result = evaluate_whitebox(
        toy_encoder, bank, queries, {"PGD-2": PGD2}, **FAST | dict(scoring=Scoring(layer="embedding", bootstrap=0))
    )
    assert result.tables["PGD-2"].z.shape[1] == 4
    assert accuracy(result, "PGD-2") < accuracy(result, "clean")


def test_the_first_classifier_is_attacked_and_the_others_say_so(toy_encoder, bank, queries):
    several = [KNNClassifier(k=7), KNNClassifier(k=15)]
    options = FAST | dict(classifier=several, run=RunOptions())
    result = evaluate_whitebox(toy_encoder, bank, queries, {"PGD-2": PGD2}, **options)
    alone = evaluate_whitebox(toy_encoder, bank, queries, {"PGD-2": PGD2}, **FAST | dict(classifier=several[0]))
    np.testing.assert_array_equal(result.tables["PGD-2"].z, alone.tables["PGD-2"].z)
    for record in result.records:
        assert record.settings["attacked_k"] == 7
        assert record.settings["attacked_classifier"] == repr(several[0])
        doubted = record.attack_name == "PGD-2" and record.k == 15
        assert bool(record.flags) == doubted
        assert not doubted or ("k=7" in record.flags[0] and "k=15" in record.flags[0])


def test_k_above_the_bank_is_cut_once(toy_encoder, bank, queries):
    with pytest.warns(UserWarning, match="k=200 is more than the 90 rows") as seen:
        result = evaluate_whitebox(
            toy_encoder, bank, queries, {"PGD-2": PGD2}, **FAST | dict(classifier=KNNClassifier(k=200))
        )
    assert len(seen) == 1
    assert {r.settings["attacked_k"] for r in result.records} == {90}


STEPS = 3
CLIMBERS = {
    "noise-4": (RandomNoise(Linf(4 / 255)), 0),
    "PGD-4": (PGD(Linf(4 / 255), step_size=1 / 255, steps=STEPS), STEPS),
    "MIFGSM-4": (MIFGSM(Linf(4 / 255), step_size=1 / 255, steps=STEPS, random_start=True), STEPS),
}


@pytest.mark.parametrize(("target", "extra"), [("features", 0), ("embedding", 1), ("decision", 0)])
def test_no_pass_through_the_encoder_is_made_twice(toy_batches, target, extra):
    """Per batch: the clean images, each step of each attack, what each attack gave; and once the whole encoder."""
    encoder = build_encoder("test_byobnet", embedding_dim=8, seed=0).eval()
    bank, queries = toy_batches(seed=0, sizes=(18,)), toy_batches(seed=1, sizes=(6, 6), first_id=500)
    passes = []
    table = embed(encoder, bank)
    handle = encoder.backbone.register_forward_hook(lambda *_: passes.append(1))
    attacks = {name: attack for name, (attack, _) in CLIMBERS.items()}
    options = FAST | dict(classifier=KNNClassifier(k=5), target=target)
    result = evaluate_whitebox(encoder, table, queries, attacks, **options)
    handle.remove()
    assert len(passes) == len(queries) * (1 + sum(steps + 1 for _, steps in CLIMBERS.values())) + extra
    spent = {r.attack_name: (r.forwards, r.backwards) for r in result.records if r.attack}
    assert spent == {name: (steps, steps) for name, (_, steps) in CLIMBERS.items()}


def test_references_of_an_embedding_that_is_no_projection_are_encoded(toy_batches):
    """A hook changes what the call gives, so that the projection of the features is not the embedding."""
    encoder = build_encoder("test_byobnet", embedding_dim=8, seed=0).eval()
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, embedding = encoder.features(x), encoder(x)
        plain = CleanLayers(encoder, "features")
        assert plain.value("features", x, features) is features
        for _ in range(2):
            assert torch.equal(plain.value("embedding", x, features), embedding)
        encoder.register_forward_hook(lambda module, inputs, output: output.flip(1))
        hooked = CleanLayers(encoder, "features")
        for _ in range(2):
            assert torch.equal(hooked.value("embedding", x, features), encoder(x))
