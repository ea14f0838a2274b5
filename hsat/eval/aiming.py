"""What the attacks of an evaluation maximise."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from hsat.attacks import feature_drift, soft_knn
from hsat.attacks.nearest_vote import SoftKNN
from hsat.eval.banks.knn import FittedKNN
from hsat.eval.conventions import Compat
from hsat.eval.embedding import LAYERS, encode, select_layer
from hsat.eval.records import Record
from hsat.types import Encoder, Objective

TARGETS = (*LAYERS, "knn")


def published_aim(
    compat: Compat | None, encoder: Encoder, target: str | None, attack_branch: str | None
) -> tuple[str, str | None]:
    """(target, attack_branch) as they are given, or as compat chooses them."""
    if compat == "paper" and attack_branch is None and isinstance(encoder, torch.nn.Module):
        from hsat.models import is_dual

        attack_branch = "pgd" if is_dual(encoder) else None
    return target or ("embedding" if compat == "paper" else "features"), attack_branch


class CleanLayers:
    """What the layers of an encoder say of clean images whose scored layer is known already.

    The embedding of `hsat.models.Encoder` is the projection of its features, which costs no pass through the backbone.
    Whether that holds for this encoder (somebody may have given it hooks or another forward) is looked at in the first
    batch, where both are computed and have to agree in every bit; where they do not, every batch is encoded.
    """

    def __init__(self, encoder: Encoder, scored: str) -> None:
        self._encoder, self._scored = encoder, scored
        self._projected: bool | None = None  # not yet known

    def value(self, layer: str, images: Tensor, clean: Tensor) -> Tensor:
        """The layer at images (n, c, h, w); clean: (n, d), the scored layer there."""
        wanted = select_layer(self._encoder, layer)
        if wanted == select_layer(self._encoder, self._scored):
            return clean
        projected = None if self._projected is False or layer != "embedding" else _projection(self._encoder, clean)
        if projected is not None and self._projected:
            return projected
        value = encode(wanted, images)
        self._projected = projected is not None and torch.equal(projected, value)
        return value


def _projection(encoder: Encoder, features: Tensor) -> Tensor | None:
    """The embedding that hsat's own encoder makes of its features; None for other encoders."""
    from hsat.models import Encoder as OwnEncoder

    return encode(encoder.project, features) if isinstance(encoder, OwnEncoder) else None


class Aim:
    """The objective of each batch: the cosine drift of a layer, or the kNN vote on the layer that is scored.

    target: the layer, or "knn".  layer: what kNN reads.  k: neighbours of the vote under attack, cut to the bank.
    branch: of a dual encoder, the one that attacks go through; None is the one that is scored.
    """

    def __init__(
        self,
        encoder: Encoder,
        target: str,
        layer: str,
        *,
        knn: FittedKNN,
        k: int,
        branch: str | None,
    ) -> None:
        self._target, self._knn, self.k, self.branch = target, knn, min(k, knn.k), branch
        self._attacked = select_layer(encoder, layer if target == "knn" else target)
        self._scored, self.clean = select_layer(encoder, layer), CleanLayers(encoder, layer)
        self._vote: SoftKNN | None = None

    def objective(self, images: Tensor, clean: Tensor, labels: np.ndarray) -> Objective:
        """clean: (n, d), what the scored layer says of these images (n, c, h, w).  labels: (n,), the bank's classes."""
        if self._target != "knn":
            if self.branch is None:
                reference = self.clean.value(self._target, images, clean)
            else:
                reference = encode(self._attacked, images)
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
