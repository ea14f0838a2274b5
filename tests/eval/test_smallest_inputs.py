"""One image, patient, slide, class, row of the bank or neighbour: numbers without NaN, or a reason."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hsat.attacks import PGD, Linf
from hsat.classifiers import KNNClassifier
from hsat.embedding import embed
from hsat.eval import (
    PAPER,
    PatchBudget,
    Provenance,
    RunOptions,
    Scoring,
    Smoothing,
    certify,
    diagnose,
    ensemble_attacks,
    evaluate_budget,
    evaluate_transfer,
    evaluate_whitebox,
    paired_difference,
    score_tables,
)
from hsat.types import HierarchicalBatch

ATTACKS = {"pgd": PGD(Linf(8 / 255), step_size=4 / 255, steps=2)}
COHORTS = {  # (slide, patient, label) of each image
    "one image": [(0, 0, 0)],
    "one image of the last class": [(0, 0, 2)],
    "one slide": [(0, 0, 0)] * 3,
    "one patient": [(0, 0, 0), (1, 0, 0), (1, 0, 0)],
    "one class": [(0, 0, 1), (1, 1, 1), (2, 2, 1)],
    "one image of each class": [(0, 0, 0), (1, 1, 1), (2, 2, 2)],
    "a class of one row": [(0, 0, 0), (1, 1, 0), (2, 2, 0), (3, 3, 1)],
}
BANK = [(row, row, row % 3) for row in range(9)]


FAST = dict(classifier=KNNClassifier(k=1), scoring=Scoring(bootstrap=20))


class Loader(list):
    class dataset:
        class_names = ("cyan", "green", "red")
        split = "val"


def loader(rows, *, batch_size=2, first_id=0):
    """Tinted noise; ids of banks and queries differ by first_id."""
    tint = torch.tensor([[-0.3, 0.1, 0.1], [0.1, 0.1, -0.3], [0.1, -0.3, 0.1]])
    generator, batches = torch.Generator().manual_seed(first_id), Loader()
    for start in range(0, len(rows), batch_size):
        slide, patient, label = torch.tensor(rows[start : start + batch_size]).T
        noise = 0.1 * torch.rand(len(label), 3, 6, 6, generator=generator)
        index = torch.arange(start, start + len(label)) + first_id
        images = 0.5 + tint[label][:, :, None, None] + noise
        batches.append(HierarchicalBatch(images, index, slide + first_id, patient + first_id, label))
    return batches


def bank_of(rows):
    return loader(rows, first_id=1000)


def whitebox(encoder, bank, queries, attacks=ATTACKS, **options):
    return evaluate_whitebox(encoder, bank, queries, attacks, **FAST | options)


def check_numbers(records):
    assert records
    for record in records:
        assert math.isfinite(record.value), record
        assert (record.low is None) == (record.high is None)
        if record.low is None:
            assert record.settings["no_interval"]
        else:
            assert 0 <= record.low <= record.high <= 1


@pytest.mark.parametrize("images", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("state", [False, True])
def test_any_number_of_images_is_diagnosed(toy_encoder, tmp_path, images, batch_size, state):
    """The last batch of the diagnosis may hold one image, whose ids lie in memory as a column does."""
    queries = loader([(row, row, row % 3) for row in range(6)], batch_size=batch_size)
    run = RunOptions(noise=False, diagnose=images, resume_dir=tmp_path / "state" if state else None)
    result = whitebox(toy_encoder, bank_of(BANK), queries, run=run)
    measures = [record.settings["diagnosis"]["images"] for record in result.records if record.attack]
    assert set(measures) == {images}
    if state:  # and what was kept is recognised: the digest is of the values, however they lie
        again = whitebox(toy_encoder, bank_of(BANK), queries, run=run)
        assert again.records == result.records


@pytest.mark.parametrize("bank", ["one image", "one image of the last class", "a class of one row", "nine rows"])
@pytest.mark.parametrize("queries", COHORTS)
def test_whitebox(toy_encoder, tmp_path, bank, queries):
    rows = COHORTS.get(bank, BANK)
    run = RunOptions(diagnose=32, resume_dir=tmp_path / "state", cache_dir=tmp_path / "cache")
    result = whitebox(toy_encoder, bank_of(rows), loader(COHORTS[queries]), run=run)
    check_numbers(result.records)
    patients = {row[1] for row in COHORTS[queries]}
    reasons = {record.settings.get("no_interval") for record in result.records}
    assert reasons == {"one patient only"} if len(patients) == 1 else "one patient only" not in reasons
    tables = score_tables(result)
    options = dict(generator=np.random.default_rng(0), scoring=Scoring(bootstrap=20))
    for difference in paired_difference(tables[0], tables[-1], **options):
        assert math.isfinite(difference.difference)
        assert difference.reason or difference.low is not None


@pytest.mark.parametrize("queries", COHORTS)
@pytest.mark.parametrize("target", ["decision", "embedding"])
def test_targets_and_the_published_conventions(toy_encoder, queries, target):
    for scoring in (FAST["scoring"], PAPER.scoring):
        found = whitebox(toy_encoder, bank_of(BANK), loader(COHORTS[queries]), target=target, scoring=scoring)
        check_numbers(found.records)


@pytest.mark.parametrize("queries", COHORTS)
def test_ensembles(toy_encoder, queries):
    attacks = ensemble_attacks((8 / 255,), steps=2, decision_steps=2, restarts=1, queries=3)
    result = whitebox(toy_encoder, bank_of(BANK), loader(COHORTS[queries]), attacks, run=RunOptions(diagnose=2))
    check_numbers(result.records)


@pytest.mark.parametrize("queries", COHORTS)
@pytest.mark.parametrize("names", ["a", "ab"])
def test_transfer(toy_encoder, tmp_path, queries, names):
    """One encoder alone, and two."""
    encoders = {name: toy_encoder if name == "a" else (lambda x: x.mean((2, 3))) for name in names}
    run = RunOptions(resume_dir=tmp_path / "state")
    result = evaluate_transfer(encoders, bank_of(BANK), loader(COHORTS[queries]), ATTACKS, run=run, **FAST)
    assert all(math.isfinite(record.value) for record in result.records)


@pytest.mark.parametrize("queries", COHORTS)
@pytest.mark.parametrize("level", ["slide", "patient"])
@pytest.mark.parametrize("order", ["worst", "random"])
def test_budget(toy_encoder, queries, level, order):
    budget, attack = PatchBudget(level=level, order=order), ATTACKS["pgd"]
    result = evaluate_budget(
        toy_encoder, bank_of(BANK), loader(COHORTS[queries]), attack, budget=budget, target="decision", **FAST
    )
    assert all(math.isfinite(record.value) for record in result.records)


@pytest.mark.parametrize("queries", COHORTS)
@pytest.mark.parametrize("samples", [1, 5])
def test_certificates(toy_encoder, queries, samples):
    smoothing = Smoothing(sigma=0.1, selection=1, samples=samples, alpha=0.1, chunk=1)
    result = certify(toy_encoder, bank_of(BANK), loader(COHORTS[queries]), smoothing, **FAST)
    check_numbers(result.records)


def test_one_image_is_diagnosed(toy_encoder):
    found = diagnose(
        toy_encoder, bank_of(BANK), loader(COHORTS["one image"]), ATTACKS["pgd"], classifier=KNNClassifier(k=1)
    )
    assert found.measures["images"] == 1
    assert all(math.isfinite(value) for value in found.measures.values())


def test_the_last_batch_of_one_image_has_the_rows_of_a_whole_batch(toy_encoder):
    rows = [(row, row, row % 3) for row in range(5)]
    whole = embed(toy_encoder, loader(rows, batch_size=5))
    images = loader(rows, batch_size=5)[0]
    parts = Loader()
    for start in (0, 2, 4):
        part = slice(start, start + 2)
        columns = (getattr(images, name)[part] for name in ("images", "patch", "slide", "patient", "label"))
        parts.append(HierarchicalBatch(*columns))
    split = embed(toy_encoder, parts)
    np.testing.assert_allclose(split.z, whole.z, atol=1e-6)
    assert split.patch.tolist() == whole.patch.tolist()


def test_a_bank_of_one_row_answers_its_class(toy_encoder):
    knn = KNNClassifier(k=1).fit(embed(toy_encoder, bank_of(COHORTS["one image of the last class"])))
    queries = embed(toy_encoder, loader(COHORTS["one image of each class"]))
    assert knn.predict(queries.z).tolist() == [2, 2, 2]
    np.testing.assert_array_equal(knn.predict_proba(queries.z), [[0, 0, 1]] * 3)


@pytest.mark.parametrize("target", ["features", "decision"])
def test_a_bank_of_one_class_is_flagged(toy_encoder, target):
    """Every decision is that class, whatever an attack does: a number that must not pass for robustness."""
    for rows, flagged in ((COHORTS["one class"], True), (BANK, False)):
        records = whitebox(toy_encoder, bank_of(rows), loader(COHORTS["one patient"]), target=target).records
        assert all(any("one class only (green)" in flag for flag in record.flags) == flagged for record in records)


@pytest.mark.parametrize("target", ["features", "decision"])
def test_one_class_in_all(toy_encoder, target):
    """A cohort that knows one class only: its vote can be attacked in vain, and is."""
    rows = [(row, row, 0) for row in range(3)]
    bank, queries = bank_of(rows), loader(rows)
    options = FAST | {"target": target, "provenance": Provenance(class_names=("cyan",))}
    found = (
        evaluate_whitebox(toy_encoder, bank, queries, ATTACKS, run=RunOptions(diagnose=32), **options),
        evaluate_budget(toy_encoder, bank, queries, ATTACKS["pgd"], **options),
    )
    for result in found:
        assert {record.value for record in result.records if record.metric == "accuracy"} == {1.0}
        assert all(any("one class only (cyan)" in flag for flag in record.flags) for record in result.records)


def test_certificates_refuse_a_bank_of_one_class_by_name(toy_encoder):
    smoothing = Smoothing(sigma=0.1, selection=1, samples=1)
    with pytest.raises(ValueError, match=r"'green' of .*at least two classes"):
        certify(toy_encoder, bank_of(COHORTS["one class"]), loader(BANK), smoothing, classifier=KNNClassifier(k=1))


@pytest.mark.parametrize("images", [1, 3])
def test_an_encoder_that_squeezes_is_told_so(images):
    """Whole batches pass, the last one with a single image does not: the message says what to write."""

    def squeezing(x):
        return x.mean((2, 3), keepdim=True).squeeze()

    queries = loader([(row, row, row % 3) for row in range(images)])
    bank = embed(lambda x: x.mean((2, 3)), bank_of(BANK))
    calls = (
        lambda: embed(squeezing, queries),
        lambda: embed(squeezing, queries, attack=ATTACKS["pgd"]),
        lambda: whitebox(squeezing, bank, queries),
        lambda: whitebox(squeezing, bank, queries, target="decision"),
        lambda: evaluate_transfer({"a": squeezing}, {"a": bank}, queries, ATTACKS, **FAST),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"gave shape \(3,\) for 1 images; expected \(1, d\).*flatten\(1\)"):
            call()


def test_an_encoder_of_one_number_per_image_is_told_so():
    with pytest.raises(ValueError, match=r"gave shape \(2,\) for 2 images; expected \(2, d\).*unsqueeze\(1\)"):
        embed(lambda x: x.mean((1, 2, 3)), loader(COHORTS["one patient"]))
    with pytest.raises(ValueError, match=r"gave shape \(\) for 1 images; expected \(1, d\).*flatten\(1\)"):
        embed(lambda x: x.mean((1, 2, 3)).squeeze(), loader(COHORTS["one image"]))
