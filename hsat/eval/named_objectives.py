"""What an evaluation attacks, by name: the kNN vote, or the drift of a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hsat.attacks import feature_drift, soft_knn
from hsat.attacks.nearest_vote import SoftKNN
from hsat.classifiers import FittedKNN
from hsat.embedding import select_layer
from hsat.types import EmbeddingFunction, HierarchicalBatch, Objective

MakeObjective = Callable[[Tensor, HierarchicalBatch], Objective]
"""(images, batch) -> the objective of these images; the batch's labels are indices of the bank's classes."""

TARGETS = ("knn", "features", "embedding")


def objective_named(encoder: EmbeddingFunction, target: str, layer: str, knn: FittedKNN) -> MakeObjective:
    """How to make the objective of a batch: "knn" is the margin of the vote (`soft_knn`), else the drift of a layer."""
    if target != "knn":
        attacked = select_layer(encoder, target)
        return lambda images, batch: feature_drift(attacked, images)
    scored, prepared = select_layer(encoder, layer), dict[torch.device, SoftKNN]()

    def on_the_vote(images: Tensor, batch: HierarchicalBatch) -> Objective:
        assert batch.label is not None  # the trial has matched the labels to the bank's classes
        labels = batch.label.to(images.device)
        if images.device not in prepared:  # the bank goes to the device once
            temperature = knn.settings.temperature
            prepared[images.device] = soft_knn(scored, knn.table, labels, k=knn.k, temperature=temperature)
        return prepared[images.device].relabel(labels)

    return on_the_vote
