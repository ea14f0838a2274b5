"""A universal perturbation across encoders: fitted on one, without labels, and measured on the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hsat.attacks import FittedUniversal, Linf, RandomNoise, UniversalPerturbation
from hsat.eval import evaluate_transfer, evaluate_whitebox
from hsat.types import HierarchicalBatch

EPS = 12 / 255


class Contrasts(nn.Module):
    """Two colour contrasts and a constant, the contrasts mixed by a small matrix of the encoder's own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        mix = torch.eye(2) + 0.2 * torch.randn(2, 2, generator=torch.Generator().manual_seed(seed))
        self.mix = nn.Parameter(mix)

    def features(self, images):
        mean = images.mean((2, 3)) - 0.5
        contrast = torch.stack((mean[:, 0] - mean[:, 1], mean[:, 1] - mean[:, 2]), 1)
        return torch.cat((40 * contrast @ self.mix, torch.ones_like(contrast[:, :1])), 1)

    def forward(self, images):
        return nn.functional.normalize(self.features(images), dim=1)


@pytest.fixture(scope="module")
def bank(toy_batches):
    return toy_batches(seed=1, sizes=(30, 30, 30), first_id=1000)


@pytest.fixture(scope="module")
def queries(toy_batches):
    return toy_batches(seed=2, sizes=(20, 16))


def fitted_on(encoder: nn.Module, bank) -> FittedUniversal:
    unlabelled = [HierarchicalBatch(b.images, b.patch, b.slide, b.patient) for b in bank]
    settings = UniversalPerturbation(threat=Linf(EPS), step_size=2 / 255, epochs=4)
    return settings.fit(unlabelled, encoder.features, generator=torch.Generator().manual_seed(0), note="toy bank")


def test_one_perturbation_lowers_every_encoder_and_the_matrix_says_so(bank, queries, tmp_path):
    encoders = {name: Contrasts(seed).requires_grad_(False) for seed, name in enumerate("ab")}
    delta = FittedUniversal.load(fitted_on(encoders["a"], bank).save(tmp_path / "u.safetensors"))
    attacks = {"universal-12": delta, "noise-12": RandomNoise(Linf(EPS))}
    found = evaluate_transfer(encoders, bank, queries, attacks, surrogates=["a"], k=15, bootstrap=0)
    wanted = {"metric": "accuracy", "level": "patch"}

    def value(model: str, attack: str) -> float:
        (record,) = [
            r for r in found.records if (r.model, r.attack_name, r.metric, r.level) == (model, attack, *wanted.values())
        ]
        return record.value

    for name, encoder in encoders.items():
        clean, noisy = value(name, "clean"), value(name, "noise-12")
        assert value(name, "universal-12") < noisy - 0.15 <= clean - 0.1
        alone = evaluate_whitebox(encoder, bank, queries, attacks, k=15, bootstrap=0, diagnose=True)
        (same,) = [r for r in alone.records if (r.attack_name, r.metric, r.level) == ("universal-12", *wanted.values())]
        assert same.value == value(name, "universal-12"), "nothing of it depends on the surrogate that is asked"
        assert "FittedUniversal" in same.attack and "toy bank" in same.attack
        assert not same.flags and "diagnosis" not in same.settings, "it follows no gradient that could be masked"
    moved = np.concatenate([delta(b.images, None).sub(b.images).abs().flatten().numpy() for b in queries])
    assert moved.max() <= EPS + 1e-7 and (moved > 0.9 * EPS).mean() > 0.3
