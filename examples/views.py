"""Batches of augmented views to train on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from hsat.data import AugmentationPolicy, HierarchicalDataset, PatchStore, PatientBatchSampler, hierarchical_loader
from hsat.types import HierarchicalBatch

if TYPE_CHECKING:
    from train_hsat import TrainHSAT


def view_loader(
    settings: TrainHSAT,
    sampler: PatientBatchSampler,
    *,
    plateau: int,
    device: torch.device,
    packed: PatchStore | None,
) -> Iterable[HierarchicalBatch]:
    """Batches of augmented views.  Under --compat paper the first plateau of a dynamic augmentation is static."""
    data, static_epochs = settings.data, settings.data.static_epochs
    if static_epochs is None:
        dynamic = data.dynamic and data.augmentation in ("v0", "v1")
        static_epochs = plateau if settings.compat == "paper" and dynamic else 0
    policy = AugmentationPolicy(
        data.augmentation,
        uncropped=data.uncropped or ("keep" if settings.compat == "paper" else "resize"),
        static_epochs=static_epochs,
        batched=data.augment == "items",
    )
    views = HierarchicalDataset(
        sampler.cohort,
        "train",
        image_size=data.image_size,
        transform=policy,
        slides=data.slides,
        patches=data.patches,
        views=data.views,
        seed=settings.seed,
        on_bad=data.on_bad,
        store=packed,
    )
    return hierarchical_loader(
        views,
        sampler,
        workers=data.workers,
        pin_memory=device.type == "cuda",
        ids=data.ids,
        compat=settings.compat,
    )
