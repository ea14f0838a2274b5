"""Fingerprints: the same for the same numbers, another one when a bit, a shape or a way to compute differs."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch
from torch import nn

from hsat.attacks import PGD, Linf
from hsat.data import PatchDataset, patch_loader, read_opensrh, write_synthetic_cohort
from hsat.embedding import embed
from hsat.eval.evaluation import describe_loader
from hsat.fingerprints import (
    fingerprint_attack,
    fingerprint_batch,
    fingerprint_classifier,
    fingerprint_encoder,
    fingerprint_loader,
    fingerprint_settings,
    fingerprint_table,
    numerics_of,
)
from hsat.models import build_encoder


@pytest.fixture
def loader(tmp_path):
    root = write_synthetic_cohort(tmp_path / "srh", classes=("hgg", "lgg"), patients_per_class=3, patches=2, size=32)
    return patch_loader(PatchDataset(read_opensrh(root), "train", image_size=32), batch_size=8)


def test_who_cannot_say_what_it_gives_has_none(loader):
    assert fingerprint_loader(loader, describe_loader) and fingerprint_loader([1], describe_loader) is None
    loader.dataset.transform = nn.Identity()
    assert fingerprint_loader(loader, describe_loader) is None
    assert fingerprint_encoder(lambda x: x) is None
    assert fingerprint_encoder(lambda x: x, "v1") == {"checkpoint": "v1"}


def test_a_file_that_was_written_anew_is_another_one(loader):
    before = fingerprint_loader(loader, describe_loader)
    os.utime(loader.dataset.cohort.path(int(loader.dataset.rows[0])), ns=(1, 1))
    after = fingerprint_loader(loader, describe_loader)
    assert {name for name in before if before[name] != after[name]} == {"files"}


def test_an_encoder_is_its_weights_and_how_they_are_computed_with():
    encoder = build_encoder("test_byobnet", embedding_dim=8, seed=0)
    before = fingerprint_encoder(encoder)
    assert fingerprint_encoder(build_encoder("test_byobnet", embedding_dim=8, seed=0)) == before
    assert fingerprint_encoder(build_encoder("test_byobnet", embedding_dim=8, seed=1))["weights"] != before["weights"]
    assert fingerprint_encoder(encoder.to(memory_format=torch.channels_last)) != before
    with torch.autocast("cpu", torch.bfloat16):
        assert fingerprint_encoder(encoder)["autocast"] == "bfloat16"
    with torch.no_grad():
        next(encoder.parameters()).mul_(1 + 1e-6)
    assert fingerprint_encoder(encoder)["weights"] != before["weights"]


def test_numerics_are_named_where_they_are_not_the_plain_ones(toy_encoder):
    assert numerics_of(toy_encoder) == {} == numerics_of(toy_encoder.features)
    with torch.autocast("cpu", torch.bfloat16):
        assert numerics_of(toy_encoder) == {"autocast": "bfloat16"}
    assert numerics_of(toy_encoder.double()) == {"dtype": "float64"}


def test_a_batch_is_its_bytes_however_they_lie(toy_batches):
    (batch,) = toy_batches(seed=0, sizes=(6,))
    digest = fingerprint_batch(batch)
    columns = {name: getattr(batch, name) for name in ("slide", "patient", "label")}
    wide = torch.stack([batch.patch, batch.patch], 1)
    assert fingerprint_batch(type(batch)(batch.images, patch=wide[:, 0], **columns)) == digest
    assert fingerprint_batch(batch.replace(images=batch.images.to(memory_format=torch.channels_last))) == digest
    assert fingerprint_batch(batch.replace(images=batch.images + 1e-6)) != digest
    assert fingerprint_batch(type(batch)(batch.images, patch=batch.patch + 1, **columns)) != digest
    one = type(batch)(*(getattr(batch, name)[:1] for name in ("images", "patch", "slide", "patient", "label")))
    assert fingerprint_batch(one) != digest


def test_a_table_is_its_rows_labels_and_class_names(toy_encoder, toy_batches):
    table = embed(toy_encoder, toy_batches(seed=0, sizes=(6,)))
    digest = fingerprint_table(table)
    assert fingerprint_table(dataclasses.replace(table, patch=table.patch + 1, encoder="other")) == digest
    assert fingerprint_table(dataclasses.replace(table, label=(table.label + 1) % 3)) != digest
    assert fingerprint_table(dataclasses.replace(table, class_names=("a", "b", "c"))) != digest
    assert fingerprint_table(dataclasses.replace(table, z=np.roll(table.z, 1, 0))) != digest


def test_an_attack_is_its_settings_without_addresses():
    assert fingerprint_attack(PGD(Linf(0.1), step_size=0.1, steps=1)) == repr(PGD(Linf(0.1), step_size=0.1, steps=1))
    assert " at 0x" not in fingerprint_attack(object())
    assert fingerprint_settings({"b": 1, "a": [2]}) == fingerprint_settings({"a": [2], "b": 1})


def test_classifiers_are_known_by_their_settings_and_heads_by_their_weights():
    from hsat.classifiers import Head, KNNClassifier, LinearProbe

    assert fingerprint_classifier(KNNClassifier(k=3)) == repr(KNNClassifier(k=3))
    several = [LinearProbe(), KNNClassifier(k=3)]
    assert fingerprint_classifier(several) == repr(several)
    heads = [Head(nn.Linear(2, 3), ("a", "b", "c")) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    assert fingerprint_classifier(heads[0]) == fingerprint_classifier(heads[1])
    with torch.no_grad():
        heads[1].module.bias[0] += 1
    assert fingerprint_classifier(heads[0]) != fingerprint_classifier(heads[1])
