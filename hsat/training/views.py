"""The batches of augmented views that a training sees."""

from __future__ import annotations

from collections.abc import Iterable

from hsat.data import AugmentationPolicy, HierarchicalDataset, PatchStore, PatientBatchSampler, hierarchical_loader
from hsat.data.augment import default_augmentation
from hsat.training.config import TrainConfig
from hsat.training.interrupts import leave_process_group
from hsat.types import HierarchicalBatch


def view_loader(
    config: TrainConfig, sampler: PatientBatchSampler, *, plateau: int, pin_memory: bool, store: PatchStore | None
) -> Iterable[HierarchicalBatch]:
    """Batches of augmented views.

    Under the preset "paper" the first plateau of a dynamic augmentation is static.

    Args:
        config: All options.
        sampler: Draws the patients of each batch.
        plateau: Epochs of equal augmentation strength.
        pin_memory: Put batches into page-locked memory, for a GPU.
        store: The cohort's patch store, read in place of its files.

    Returns:
        A loader; the sampler's epoch decides what it draws.
    """
    views, static_epochs = config.views, config.views.static_epochs
    name = views.augmentation or default_augmentation(sampler.cohort.kind)
    if static_epochs is None:
        dynamic = views.dynamic and name in ("v0", "v1")
        static_epochs = plateau if config.preset == "paper" and dynamic else 0
    policy = AugmentationPolicy(
        name,
        uncropped=views.uncropped or ("keep" if config.preset == "paper" else "resize"),
        static_epochs=static_epochs,
        batched=views.augment == "items",
    )
    dataset = HierarchicalDataset(
        sampler.cohort,
        "train",
        image_size=views.image_size,
        transform=policy if config.transform is None else config.transform,
        slides=views.slides,
        patches=views.patches,
        views=views.views,
        seed=config.seed,
        on_bad=views.on_bad,
        store=store,
    )
    if views.balance_classes:
        dataset = dataset.balance_classes()
    loader = hierarchical_loader(
        dataset, sampler, workers=views.workers, pin_memory=pin_memory, ids=views.ids, compat=config.preset
    )
    loader.worker_init_fn = leave_process_group
    return loader
