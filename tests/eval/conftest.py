"""Shared material: a toy problem on which attacks succeed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hsat.types import HierarchicalBatch


class ToyEncoder(nn.Module):
    """Features: two colour contrasts of the whole image beside a constant; embedding: a fixed mixture of them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 4, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[2.0, 0.5, 0.3], [0.0, 2.0, 0.3], [-1.0, 1.0, 0.2], [0.0, 0.0, 1.0]]))
        self.forwards = 0

    def features(self, images: Tensor) -> Tensor:
        self.forwards += 1
        mean = self.norm(images).mean((2, 3)) - 0.5
        contrast = torch.stack((mean[:, 0] - mean[:, 1], mean[:, 1] - mean[:, 2]), 1)
        return torch.cat((40 * contrast, torch.ones_like(contrast[:, :1])), 1)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(self.head(self.features(images)), dim=1)


class ToyLoader(list):
    """Batches of grey images with a faint tint per class, and the dataset that describes them."""

    class dataset:
        class_names = ("cyan", "green", "red")
        split = "val"

        class cohort:
            @staticmethod
            def fingerprint() -> str:
                return "toy"


def _toy_batches(*, seed: int, sizes: tuple[int, ...], patients: int = 9, first_id: int = 0) -> ToyLoader:
    generator = torch.Generator().manual_seed(seed)
    tint = torch.tensor([[-4.0, 2.0, 2.0], [-2.0, 4.0, -2.0], [4.0, -2.0, -2.0]]) / 255
    loader, patch = ToyLoader(), first_id
    for size in sizes:
        index = torch.arange(patch, patch + size)
        slide = index % (2 * patients)
        label = (slide % patients) % 3
        noise = torch.randn(size, 3, 6, 6, generator=generator) * 4 / 255
        images = (0.5 + tint[label][:, :, None, None] + noise).clamp(0, 1)
        loader.append(HierarchicalBatch(images, index, slide + 1000 * first_id, slide % patients + first_id, label))
        patch += size
    return loader


@pytest.fixture(scope="session")
def toy_batches() -> Callable[..., ToyLoader]:
    return _toy_batches


@pytest.fixture
def toy_encoder() -> ToyEncoder:
    return ToyEncoder()
