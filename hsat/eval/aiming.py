"""What the attacks of an evaluation maximise."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from hsat.attacks import feature_drift, soft_knn
from hsat.attacks.nearest_vote import SoftKNN
from hsat.classifiers import FittedKNN
from hsat.embedding import LAYERS, encode, select_layer
from hsat.eval.conventions import Compat
from hsat.eval.engine.layers import Layers
from hsat.eval.records import Record
from hsat.types import EmbeddingFunction, Objective

TARGETS = (*LAYERS, "knn")


def published_aim(
    compat: Compat | None, encoder: EmbeddingFunction, target: str | None, attack_branch: str | None
) -> tuple[str, str | None]:
    """(target, attack_branch) as they are given, or as compat chooses them."""
    if compat == "paper" and attack_branch is None and isinstance(encoder, torch.nn.Module):
        from hsat.models import is_dual

        attack_branch = "pgd" if is_dual(encoder) else None
    return target or ("embedding" if compat == "paper" else "features"), attack_branch


class Aim:
    """The objective of each batch: the cosine drift of a layer, or the kNN vote on the layer that is scored.

    target: the layer, or "knn".  layer: what kNN reads.  k: neighbours of the vote under attack, cut to the bank.
    branch: of a dual encoder, the one that attacks go through; None is the one that is scored.  layers: the encoder's,
    where an evaluation shares what they remember; not used for another branch than the scored one.
    """

    def __init__(
        self,
        encoder: EmbeddingFunction,
        target: str,
        layer: str,
        *,
        knn: FittedKNN,
        k: int,
        branch: str | None,
        layers: Layers | None = None,
    ) -> None:
        self._target, self._knn, self.k, self.branch = target, knn, min(k, knn.k), branch
        names = (layer if target == "knn" else target, layer)
        if layers is None or branch is not None:
            self._attacked, self._scored = (select_layer(encoder, name) for name in names)
        else:
            self._attacked, self._scored = map(layers.select, names)
        self._reuse = target == layer and branch is None
        self._vote: SoftKNN | None = None

    def objective(self, images: Tensor, clean: Tensor, labels: np.ndarray) -> Objective:
        """clean: (n, d), what the scored layer says of these images (n, c, h, w).  labels: (n,), the bank's classes."""
        if self._target != "knn":
            reference = clean if self._reuse else encode(self._attacked, images)
            return feature_drift(self._attacked, images, "cosine", reference=reference)
        return self.vote(torch.from_numpy(labels).to(images.device))

    def vote(self, own: Tensor) -> SoftKNN:
        """The margin of the vote on the scored layer for images of these labels (n,), on the device of the images."""
        if self._vote is None:  # made with the first batch, which says where the bank has to be
            bank, temperature = self._knn.table, self._knn.settings.temperature
            self._vote = soft_knn(self._scored, bank, own, k=self.k, temperature=temperature, classes=self._classes)
        return self._vote.relabel(own)

    def describe(self, record: Record) -> Record:
        """The record with the vote that was attacked; other numbers of neighbours are flagged: theirs was not."""
        if self._target != "knn":
            return record
        flags = record.flags
        if record.attack and not record.attack.startswith("RandomNoise") and record.k != self.k:
            flags += (f"the attack climbed the vote of {self.k} neighbours, not of {record.k}",)
        return dataclasses.replace(record, flags=flags, settings=record.settings | {"attacked_k": self.k})

    @property
    def _classes(self) -> int:
        return max(2, len(self._knn.class_names))
