"""The published way of drawing: slot ids, plain shuffling, the static first epochs, uncropped patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hsat.data import (
    AugmentationPolicy,
    HierarchicalBatch,
    HierarchicalDataset,
    PatientBatchSampler,
    PatientDraw,
    build_transform,
    hierarchical_loader,
    read_opensrh,
)
from hsat.data.sampler import order_patients
from hsat.losses import HiDiscLoss


@pytest.fixture
def cohort(opensrh_root):
    return read_opensrh(opensrh_root)


def dataset(cohort, **options):
    return HierarchicalDataset(cohort, "train", **dict(image_size=16) | options)


def first_batch(cohort, *, workers=0, sampling=None, **options):
    sampler = PatientBatchSampler(cohort, "train", batch_patients=3, **sampling or {})
    return next(iter(hierarchical_loader(dataset(cohort), sampler, workers=workers, **options)))


@pytest.mark.parametrize("options", [dict(ids="slots"), dict(compat="paper")])
@pytest.mark.parametrize("workers", [0, 1])
def test_slot_ids_number_the_places_and_nothing_else_changes(cohort, options, workers):
    true, slots = first_batch(cohort), first_batch(cohort, workers=workers, **options)
    assert torch.equal(slots.images, true.images) and torch.equal(slots.label, true.label)
    expected = HierarchicalBatch.from_grid(true.images.reshape(3, 2, 2, 2, 3, 16, 16))
    for level in ("patch", "slide", "patient"):
        assert torch.equal(getattr(slots, level), getattr(expected, level))
    assert slots.counts == {"patch": 12, "slide": 6, "patient": 3}
    # NIO_002 has one slide of two patches, so the same patches come twice: one patch by its id, two by its slots
    assert true.counts["slide"] < 6 and true.counts["patch"] < 12


def test_an_option_wins_over_compat(cohort):
    true = first_batch(cohort)
    assert torch.equal(first_batch(cohort, compat="paper", ids="true").slide, true.slide)
    assert PatientBatchSampler(cohort, "train", batch_patients=1, compat="paper", order="spread").order == "spread"


def test_a_plain_shuffle_lets_repeats_of_a_patient_meet():
    """Two patients of the small class fill half of the draws: spread out they meet in no batch, shuffled they do."""
    labels, patients = [0] * 8 + [1] * 2, list(range(10))
    doubled = {"spread": 0, "plain": 0}
    for order in doubled:
        for epoch in range(20):
            pairs = order_patients(labels, patients, batch=4, seed=0, epoch=epoch, order=order)
            drawn = [patient for patient, _ in pairs]
            assert sorted(drawn) == sorted([*range(8), *[8] * 4, *[9] * 4])
            for patient in (8, 9):
                assert [number for p, number in pairs if p == patient] == [0, 1, 2, 3]
            doubled[order] += sum(len(set(drawn[i : i + 4])) < 4 for i in range(0, 16, 4))
    assert doubled["spread"] == 0 and doubled["plain"] >= 20


def test_the_sampler_shuffles_plainly_under_compat(cohort):
    sampler = PatientBatchSampler(cohort, "train", batch_patients=3, compat="paper", seed=4)
    pairs = order_patients(sampler.labels, sampler.patients, batch=3, seed=4, epoch=0, order="plain")
    assert [(draw.patient, draw.occurrence) for draw in next(iter(sampler))] == pairs[:3]
    assert "order='plain'" in repr(sampler)


@pytest.mark.parametrize(("augmentation", "static"), [("v0", 50), ("v1", 50), ("static", 0), ("none", 0)])
def test_the_first_epochs_use_the_static_list(cohort, augmentation, static):
    policy = AugmentationPolicy.paper(augmentation)
    assert (policy.uncropped, policy.static_epochs) == ("keep", static)
    published = dataset(cohort, transform=policy)
    usual, plain = dataset(cohort, transform=augmentation), dataset(cohort, transform="static")
    for epoch in (0, 49, 50):
        draw = PatientDraw(usual.patients[0], epoch, 0, 1.0)
        expected = (plain if epoch < static else usual)[draw]
        assert torch.equal(published[draw].images, expected.images)
    if static:
        draw = PatientDraw(usual.patients[0], 49, 0, 1.0)
        assert not torch.equal(published[draw].images, usual[draw].images)


@pytest.mark.parametrize("name", ["static", "v0"])
def test_uncropped_patches_keep_their_size_or_are_refused(name):
    x = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0))
    keep, resize = (build_transform(name, image_size=24, uncropped=how) for how in ("keep", "resize"))
    for seed in range(6):
        torch.manual_seed(seed)
        expected = resize(x)
        torch.manual_seed(seed)
        assert torch.equal(keep(x), expected), "patches of image_size are treated alike"
    with pytest.raises(ValueError, match=r"a patch of 24 x 24 pixels that is not cropped.*Use image_size=24, or unc"):
        build_transform(name, image_size=30, uncropped="keep")(x)


@pytest.mark.parametrize("name", ["v1", "none"])
def test_where_every_patch_is_cropped_or_none_is_nothing_is_refused(name):
    x = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0))
    assert build_transform(name, image_size=30, uncropped="keep")(x).shape == (3, 30, 30)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: AugmentationPolicy(uncropped="crop"), "uncropped must be 'resize' or 'keep', got 'crop'"),
        (lambda c: AugmentationPolicy(static_epochs=-1), "static_epochs must be 0 or more, got -1"),
        (lambda c: AugmentationPolicy(prob=1.5), "prob must be a number"),
        (lambda c: AugmentationPolicy("strong"), "unknown augmentation 'strong'"),
        (lambda c: PatientBatchSampler(c, "train", batch_patients=1, compat="x"), "compat must be None or 'paper'"),
        (lambda c: first_batch(c, sampling=dict(order="random")), "order must be 'spread' or 'plain', got 'random'"),
        (lambda c: first_batch(c, ids="places"), "ids must be 'true' or 'slots', got 'places'"),
        (lambda c: first_batch(c, compat="x"), "compat must be None or 'paper', got 'x'"),
    ],
)
def test_mistakes(cohort, make, message):
    with pytest.raises(ValueError, match=message):
        make(cohort)


def test_slot_ids_make_a_repeated_slide_its_own_negative(cohort):
    """NIO_002 fills both slide places with its one slide.  By slots, an image there has half of the true positives."""
    true, slots = first_batch(cohort), first_batch(cohort, ids="slots")
    rows = torch.tensor([cohort.patient_names[p] == "NIO_002" for p in true.patient.tolist()])
    positives = [(batch.slide[:, None] == batch.slide).sum(1)[rows] - 1 for batch in (true, slots)]
    assert positives[0].tolist() == [7] * 8 and positives[1].tolist() == [3] * 8
    z = torch.from_numpy(np.random.default_rng(0).normal(size=(len(true), 8)))
    losses = [float(HiDiscLoss()(z, batch).slide) for batch in (true, slots)]
    assert abs(losses[0] - losses[1]) > 1e-3
