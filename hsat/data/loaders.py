"""Samples to batches, and data loaders that touch no global generator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, SequentialSampler

from hsat.data.datasets import HierarchicalDataset, PatchDataset, Sample
from hsat.data.sampler import PatientBatchSampler
from hsat.types import HierarchicalBatch

Ids = Literal["true", "slots"]


def collate(samples: Sequence[Sample]) -> HierarchicalBatch:
    """One HierarchicalBatch with the images of all samples, in their order.

    Args:
        samples: What datasets give.

    Returns:
        The batch.

    Raises:
        ValueError: There are no samples, images have different shapes (files and shapes are named), or ids do not nest,
            which happens when samples of two cohorts are mixed.
    """
    if not samples:
        raise ValueError("collate needs at least one sample, got none")
    first = samples[0]
    for sample in samples:
        if sample.images.shape[1:] != first.images.shape[1:]:
            raise ValueError(
                f"{first.paths[0]} (patch {int(first.patch[0])}) gives images of shape {tuple(first.images.shape[1:])}"
                f" and {sample.paths[0]} (patch {int(sample.patch[0])}) of shape {tuple(sample.images.shape[1:])};"
                " pass image_size=... to the dataset or evaluation so that all images have one size"
            )
    images, patch, slide, patient, label = (torch.cat(parts) for parts in list(zip(*samples, strict=True))[:5])
    return HierarchicalBatch(images, patch, slide, patient, label)


@dataclass(frozen=True)
class _SlotIds:
    """`collate`, with the ids of places in place of the cohort's; a class, so that worker processes can have it."""

    slides: int
    patches: int
    views: int

    def __call__(self, samples: Sequence[Sample]) -> HierarchicalBatch:
        batch = collate(samples)
        grid = (len(samples), self.slides, self.patches, self.views)
        images = batch.images.reshape(*grid, *batch.images.shape[1:])
        return dataclasses.replace(HierarchicalBatch.from_grid(images), label=batch.label)


def patch_loader(
    dataset: PatchDataset, *, batch_size: int, workers: int = 0, pin_memory: bool = False
) -> DataLoader[Sample]:
    """A DataLoader that yields every patch once, in cohort order, as HierarchicalBatches of up to batch_size images.

    Args:
        dataset: The patches.
        batch_size: Images per batch.
        workers: Reading processes; 0 reads in this one.  The batches are the same for any number.
        pin_memory: Page-lock the batches, so that a GPU copies them while it computes.

    Returns:
        The loader.

    Raises:
        ValueError: batch_size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        generator=torch.Generator(),
    )


class SlideLoader:
    """One slide after another, each in batches of its own; see `slide_loader`.

    Attributes:
        dataset: The patches, slide after slide.
        batch_size: Most images of a batch.
        sampler: The order of the patches, that of `dataset`.
    """

    def __init__(self, dataset: PatchDataset, batch_size: int, workers: int, pin_memory: bool) -> None:
        slides = dataset.cohort.slide[dataset.rows]
        self.dataset = dataset.subset(np.argsort(slides, kind="stable"))
        self.batch_size = batch_size
        self.sampler = SequentialSampler(self.dataset)
        edges = [0, *(np.flatnonzero(np.diff(np.sort(slides))) + 1).tolist(), len(self.dataset)]
        self._batches = [
            list(range(start, min(start + batch_size, end)))
            for first, end in pairwise(edges)
            for start in range(first, end, batch_size)
        ]
        self._loader: DataLoader[Sample] = DataLoader(
            self.dataset,
            batch_sampler=self._batches,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[HierarchicalBatch]:
        return iter(self._loader)


def slide_loader(
    dataset: PatchDataset, *, batch_size: int = 64, workers: int = 0, pin_memory: bool = False
) -> SlideLoader:
    """A loader that yields the slides of a dataset one after another, each in batches of up to batch_size images.

    For `hsat.eval.evaluate_slides`, which reads one slide at a time and takes the batch size for the number of images
    that go through the encoder at a time.

    Args:
        dataset: The patches, in any order; slides come in ascending order of their ids.
        batch_size: Most images of a batch; a batch never holds patches of two slides.
        workers: Reading processes; 0 reads in this one.  The batches are the same for any number.
        pin_memory: Page-lock the batches, so that a GPU copies them while it computes.

    Returns:
        The loader, which can be read again and again.

    Raises:
        ValueError: batch_size is below 1, or there are no patches.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not len(dataset):
        raise ValueError(f"{dataset!r} holds no patches, and so no slide")
    return SlideLoader(dataset, batch_size, workers, pin_memory)


def hierarchical_loader(
    dataset: HierarchicalDataset,
    sampler: PatientBatchSampler,
    *,
    workers: int = 0,
    pin_memory: bool = False,
    ids: Ids | None = None,
    compat: Literal["paper"] | None = None,
) -> DataLoader[Sample]:
    """A DataLoader that yields the sampler's batches of patients as HierarchicalBatches.

    Call sampler.set_epoch before each pass; workers are kept alive between passes.  What comes does not depend on their
    number.

    Args:
        dataset: What the batches hold.
        sampler: Which patients they hold.
        workers: Reading processes; 0 reads in this one.
        pin_memory: Page-lock the batches, so that a GPU copies them while it computes.
        ids: "true" for the cohort's ids, "slots" for one id per place in the grid (`HierarchicalBatch.from_grid`), as
            the published loss sees a batch: a slide or patch that is drawn twice, and a patient that comes twice in a
            batch, then count as others and so as negatives.  None is "true", or "slots" under compat="paper".
        compat: "paper" for the published choice of ids.

    Returns:
        The loader.

    Raises:
        ValueError: Another ids or compat, or dataset and sampler were made for different splits or cohorts.
    """
    if compat not in (None, "paper"):
        raise ValueError(f"compat must be None or 'paper', got {compat!r}")
    ids = ids or ("slots" if compat == "paper" else "true")
    if ids not in ("true", "slots"):
        raise ValueError(f"ids must be 'true' or 'slots', got {ids!r}")
    if dataset.split != sampler.split:
        raise ValueError(f"the dataset reads split {dataset.split!r} but the sampler draws from {sampler.split!r}")
    if dataset.cohort is not sampler.cohort and dataset.cohort != sampler.cohort:
        raise ValueError("dataset and sampler were made for different cohorts; pass the same Cohort to both")
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate if ids == "true" else _SlotIds(dataset.slides, dataset.patches, dataset.views),
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        generator=torch.Generator(),
    )
