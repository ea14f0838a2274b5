"""Shared material: a half-space, whose certificates are known exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hsat.classifiers import KNNClassifier
from hsat.eval import CertificateResult, CertifyOptions, Scoring, Smoothing, certify
from hsat.types import EmbeddingTable, HierarchicalBatch


class HalfSpace:
    """An encoder whose kNN vote is the sign of w . (x - 1/2) with |w| = 1: its smoothed form is known exactly."""

    def __init__(self) -> None:
        w = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.w = w / w.norm()

    def __call__(self, images: Tensor) -> Tensor:
        side = self.side(images)
        return torch.stack((side, torch.full_like(side, 0.3)), 1).float()

    def side(self, images: Tensor) -> Tensor:
        """Signed distance of each image to the decision boundary, (n,)."""
        return ((images.double() - 0.5) * self.w).sum((1, 2, 3))

    def at(self, distance: Tensor) -> Tensor:
        """Images at these signed distances, (n, 3, 4, 4), well inside [0, 1]."""
        images = torch.rand(len(distance), 3, 4, 4, generator=torch.Generator().manual_seed(1)).double() * 0.2 + 0.4
        return (images + (distance - self.side(images))[:, None, None, None] * self.w).float()


class HalfSpaceCohort:
    """40 images in 8 slides and 4 patients on both sides of a half-space; labels are the sides.

    Attributes:
        encoder: See `HalfSpace`.
        bank: Two rows, one on each side.
        distance: (40,) signed distances of the images to the boundary.
    """

    def __init__(self) -> None:
        self.encoder = HalfSpace()
        one = np.arange(2)
        self.bank = EmbeddingTable(np.array([[1, 0.3], [-1, 0.3]]), one, one, one, one, ("above", "below"))
        self.distance = torch.cat((torch.linspace(0.02, 0.6, 20), -torch.linspace(0.02, 0.6, 20))).double()

    def batches(self, *, size: int = 16) -> list[HierarchicalBatch]:
        """A loader of the images."""
        images, index = self.encoder.at(self.distance), torch.arange(40)
        whole = (images, index + 100, index // 5, index // 10, (self.distance < 0).long())
        return Sides(HierarchicalBatch(*(part[at : at + size] for part in whole)) for at in range(0, 40, size))


class Sides(list):
    class dataset:
        class_names = ("above", "below")
        split = "val"


@pytest.fixture(scope="session")
def half_space() -> HalfSpaceCohort:
    return HalfSpaceCohort()


SMOOTHING = Smoothing(sigma=0.25, samples=400, selection=20)


@pytest.fixture(scope="session")
def certified(half_space: HalfSpaceCohort) -> CertificateResult:
    """The half-space, certified at sigma = 0.25 by 400 draws."""
    return certify(
        half_space.encoder,
        half_space.bank,
        half_space.batches(),
        SMOOTHING,
        options=CertifyOptions(radii=(0, 0.1, 0.3, 9)),
        classifier=KNNClassifier(k=1),
        scoring=Scoring(bootstrap=20),
    )
