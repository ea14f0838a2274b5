"""Records say what does not fit an encoder's training: its patients, the size of the images, the kind of patches."""

from __future__ import annotations

import pytest

from hsat.attacks import PGD, Linf
from hsat.classifiers import KNNClassifier
from hsat.data import PatchDataset, patch_loader, read_opensrh
from hsat.eval import (
    CertifyOptions,
    Provenance,
    RunOptions,
    Scoring,
    Smoothing,
    certify,
    evaluate_budget,
    evaluate_classifier,
    evaluate_transfer,
    evaluate_whitebox,
)
from hsat.eval.flags import stated_training
from hsat.fingerprints import digest_patient
from hsat.models import build_encoder, load_encoder, save_encoder

FEW = dict(scoring=Scoring(bootstrap=0), run=RunOptions(noise=False))
ATTACK = PGD(Linf(8 / 255), step_size=8 / 255, steps=1)


@pytest.fixture(scope="module")
def cohort(root):
    return read_opensrh(root)


@pytest.fixture(scope="module")
def loaders(cohort):
    return [
        patch_loader(PatchDataset(cohort, split, image_size=32).subset(slice(0, None, 4)), batch_size=8)
        for split in ("train", "val")
    ]


def facts(cohort, split, *, image_size=32, kind="srh"):
    names = {cohort.records[row].patient for row in cohort.rows(split)}
    return {"kind": kind, "image_size": image_size, "patients": sorted(map(digest_patient, names))}


def encoder_of(tmp_path, training):
    encoder = build_encoder("test_byobnet", embedding_dim=16, seed=0)
    return load_encoder(save_encoder(encoder, tmp_path / "encoder.safetensors", metadata={"training": training}))


def flags_of(records):
    return {flag for record in records for flag in record.flags}


def evaluations(encoder, bank, queries, **options):
    knn = KNNClassifier(k=5)
    yield evaluate_whitebox(encoder, bank, queries, {"PGD": ATTACK}, classifier=knn, **FEW, **options).records
    yield evaluate_budget(encoder, bank, queries, ATTACK, classifier=knn, **FEW, **options).records
    noise = Smoothing(sigma=0.1, selection=2, samples=2)
    scoring = FEW["scoring"]
    clean = CertifyOptions(noisy_bank=False)
    yield certify(encoder, bank, queries, noise, options=clean, classifier=knn, scoring=scoring, **options).records
    chosen = {name: {"a": value} for name, value in options.items()}
    yield evaluate_transfer({"a": encoder}, bank, queries, {"PGD": ATTACK}, classifier=knn, **FEW, **chosen).records


def test_every_evaluation_knows_the_patients_the_size_and_the_kind(cohort, loaders, tmp_path):
    encoder = encoder_of(tmp_path, facts(cohort, "val", image_size=48, kind="rgb"))
    bank, queries = loaders
    patients = len({cohort.records[row].patient for row in queries.dataset.rows})
    for records in evaluations(encoder, bank, queries):
        assert flags_of(records) >= {
            f"{patients} of {patients} queries' patients were trained on",
            "the encoder was trained on images of 48 pixels a side, and these have 32",
            "the encoder was trained on rgb patches, and these are srh",
        }
        assert {record.settings["image_size"] for record in records if not record.surrogate == "others"} == {32}


def test_nothing_is_flagged_where_all_fits_or_nothing_is_stated(cohort, loaders, tmp_path):
    bank, queries = loaders
    for training in (facts(cohort, "train"), None):
        encoder = (
            encoder_of(tmp_path, training) if training else build_encoder("test_byobnet", embedding_dim=16, seed=0)
        )
        result = evaluate_whitebox(encoder, bank, queries, {}, classifier=KNNClassifier(k=5), **FEW)
        assert not any("trained on" in flag for flag in flags_of(result.records))


def test_the_caller_may_state_the_training(cohort, loaders):
    encoder, (bank, queries) = build_encoder("test_byobnet", embedding_dim=16, seed=0), loaders
    provenance = Provenance(training=facts(cohort, "val"))
    result = evaluate_whitebox(encoder, bank, queries, {}, provenance=provenance, classifier=KNNClassifier(k=5), **FEW)
    assert any("queries' patients were trained on" in flag for flag in flags_of(result.records))
    with pytest.raises(ValueError, match=r"provenance: training\.kind must be"):
        stated_training(encoder, Provenance(training={"kind": 3, "image_size": 32, "patients": []}))


def test_a_classifier_with_logits_of_its_own(cohort, loaders):
    _, queries = loaders
    names = cohort.class_names
    encoder = build_encoder("test_byobnet", embedding_dim=len(names), seed=0)
    stated = Provenance(training=facts(cohort, "val", image_size=16))
    result = evaluate_classifier(encoder, queries, {}, class_names=names, provenance=stated, **FEW)
    assert any("queries' patients were trained on" in flag for flag in flags_of(result.records))
    assert any("images of 16 pixels" in flag for flag in flags_of(result.records))


def test_loaders_that_say_nothing_raise_no_flag(cohort, loaders, tmp_path):
    encoder = encoder_of(tmp_path, facts(cohort, "val", image_size=16))
    batches = [list(loader) for loader in loaders]
    names = Provenance(class_names=cohort.class_names)
    result = evaluate_whitebox(encoder, *batches, {}, provenance=names, classifier=KNNClassifier(k=5), **FEW)
    assert not any("trained on" in flag for flag in flags_of(result.records))
    assert all("image_size" not in record.settings for record in result.records)


def test_words_of_other_programs_are_no_training():
    encoder = build_encoder("test_byobnet", embedding_dim=16, seed=0)
    encoder.weights_report = type("Report", (), {"metadata": {"training": {"epochs": 3}}})()
    assert stated_training(encoder) is None
