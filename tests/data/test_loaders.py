"""Batches and loaders: ids and order, any number of workers, resumed epochs, no global generator."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hsat.data.cohort import Cohort, PatchRecord
from hsat.data.datasets import HierarchicalDataset, PatchDataset
from hsat.data.loaders import collate, hierarchical_loader, patch_loader
from hsat.data.readers import BadPatch
from hsat.data.sampler import PatientBatchSampler
from hsat.types import HierarchicalBatch

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    """Two classes of 4 and 2 patients, two slides of three patches each, and one validation patient."""
    rng, records = np.random.default_rng(0), []
    for patient in ("v0", "a0", "a1", "a2", "a3", "b0", "b1"):
        for slide in ("s", "t"):
            for number in range(3):
                path = f"{patient}/{slide}/{number}.png"
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(tmp_path / path)
                label, split = ("b" if patient[0] == "b" else "a"), ("val" if patient[0] == "v" else "train")
                records.append(PatchRecord(path, label, patient, slide, split))
    return Cohort(root=tmp_path, records=tuple(records), class_names=("a", "b"), kind="rgb")


def same(one: HierarchicalBatch, two: HierarchicalBatch) -> bool:
    fields = ("images", "patch", "slide", "patient", "label")
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in fields)


def all_same(one: list[HierarchicalBatch], two: list[HierarchicalBatch]) -> bool:
    return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))


def dataset_of(cohort: Cohort, **options) -> HierarchicalDataset:
    return HierarchicalDataset(cohort, image_size=12, **options)


# --- collate ---------------------------------------------------------------------------------------------------------


def test_collate_concatenates_samples_in_order(cohort):
    dataset = dataset_of(cohort)
    items = [dataset[2], dataset[0], dataset[5]]
    batch = collate(items)
    assert len(batch) == 24
    assert torch.equal(batch.images[8:16], items[1].images)
    assert batch.patient.tolist() == [3] * 8 + [1] * 8 + [6] * 8
    assert batch.label.tolist() == [0] * 16 + [1] * 8
    assert batch.counts == {"patch": 12, "slide": 6, "patient": 3}
    assert batch.levels.anchors == {"patch": 24, "slide": 24, "patient": 24}


def test_collate_names_files_of_different_sizes(cohort):
    Image.new("RGB", (7, 9)).save(cohort.path(1))
    dataset = PatchDataset(cohort)
    message = r"v0/s/0.png \(patch 0\) gives .*\(3, 12, 12\) and v0/s/1.png \(patch 1\) of shape \(3, 9, 7\)"
    with pytest.raises(ValueError, match=message):
        collate([dataset[0], dataset[1]])
    assert len(collate([PatchDataset(cohort, image_size=8)[i] for i in range(2)])) == 2


def test_collate_refuses_nothing_and_ids_of_two_cohorts(cohort):
    with pytest.raises(ValueError, match="at least one sample, got none"):
        collate([])
    item = PatchDataset(cohort)[0]
    with pytest.raises(ValueError, match="belongs to"):
        collate([item, item._replace(slide=item.slide + 1)])


# --- loaders ---------------------------------------------------------------------------------------------------------


def test_patch_loader_gives_every_patch_once_for_any_number_of_workers(cohort):
    dataset = PatchDataset(cohort, "train", image_size=9, transform=lambda x: (x + torch.rand(())).clamp(max=1.0))
    here = list(patch_loader(dataset, batch_size=7))
    there = list(patch_loader(dataset, batch_size=7, workers=2))
    assert [len(batch) for batch in here] == [7, 7, 7, 7, 7, 1]
    assert torch.cat([batch.patch for batch in here]).tolist() == cohort.rows("train").tolist()
    assert all_same(here, there)
    assert all_same([collate([dataset[i] for i in range(7)])], here[:1])


def test_hierarchical_batches_are_the_same_for_any_number_of_workers_over_epochs(cohort):
    epochs = []
    for workers in (0, 2):
        sampler = PatientBatchSampler(cohort, batch_patients=2, seed=1)
        loader = hierarchical_loader(dataset_of(cohort, seed=1), sampler, workers=workers)
        batches = []
        for epoch in range(2):
            sampler.set_epoch(epoch, strength=1.0 - 0.5 * epoch)
            assert len(loader) == 4
            batches += list(loader)
        epochs.append(batches)
        del loader
    assert all_same(*epochs)
    direct = dataset_of(cohort, seed=1)
    sampler.set_epoch(1, strength=0.5)
    assert all_same(epochs[0][4:], [collate([direct[draw] for draw in draws]) for draws in sampler])
    assert not torch.equal(epochs[0][0].images, epochs[0][4].images)


def test_an_interrupted_epoch_goes_on_with_the_same_batches(cohort):
    whole = PatientBatchSampler(cohort, batch_patients=2)
    resumed = PatientBatchSampler(cohort, batch_patients=2)
    whole.set_epoch(3)
    resumed.set_epoch(3, start_batch=2)
    complete = list(hierarchical_loader(dataset_of(cohort), whole))
    rest = list(hierarchical_loader(dataset_of(cohort), resumed))
    assert len(rest) == 2
    assert all_same(rest, complete[2:])


def test_two_ranks_together_see_the_single_process(cohort):
    single = list(hierarchical_loader(dataset_of(cohort), PatientBatchSampler(cohort, batch_patients=4)))
    ranks = [
        list(
            hierarchical_loader(dataset_of(cohort), PatientBatchSampler(cohort, batch_patients=2, rank=r, world_size=2))
        )
        for r in range(2)
    ]
    for one, two, both in zip(*ranks, single, strict=True):
        assert torch.equal(torch.cat([one.images, two.images]), both.images)
        assert torch.equal(torch.cat([one.patch, two.patch]), both.patch)


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_touch_no_global_generator(cohort, workers):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    list(hierarchical_loader(dataset_of(cohort), PatientBatchSampler(cohort, batch_patients=3), workers=workers))
    list(patch_loader(PatchDataset(cohort), batch_size=20, workers=workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


@pytest.mark.filterwarnings("ignore:.*of the same slide instead")
def test_replacements_in_workers_are_counted_and_the_same(cohort):
    for row in (6, 19, 40):
        cohort.path(row).write_bytes(b"")
    counts, batches = [], []
    for workers in (0, 2):
        dataset = dataset_of(cohort, on_bad="replace", patches=3)
        sampler = PatientBatchSampler(cohort, batch_patients=2)
        batches.append(list(hierarchical_loader(dataset, sampler, workers=workers)))
        counts.append(dataset.replaced)
    assert all_same(*batches)
    assert counts[0] == counts[1] >= 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_patch_reaches_the_caller(cohort, workers):
    cohort.path(3).write_bytes(b"")
    with pytest.raises(BadPatch, match=r"v0/t/0\.png"):
        list(patch_loader(PatchDataset(cohort), batch_size=2, workers=workers))


def test_loaders_refuse_what_does_not_fit(cohort, tmp_path):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        patch_loader(PatchDataset(cohort), batch_size=0)
    with pytest.raises(ValueError, match="split 'train' but the sampler draws from 'val'"):
        hierarchical_loader(dataset_of(cohort), PatientBatchSampler(cohort, "val", batch_patients=1))
    other = Cohort(root=tmp_path, records=cohort.records[::-1], class_names=("a", "b"), kind="rgb")
    with pytest.raises(ValueError, match="different cohorts"):
        hierarchical_loader(dataset_of(cohort), PatientBatchSampler(other, batch_patients=1))
