"""Trajectories of the published implementation, from its own starts; see tests/golden/README_attacks.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hsat.attacks import BIM, FFGSM, MIFGSM, PGD, Linf, feature_drift, hierarchical
from hsat.losses import HiDiscLoss
from hsat.types import HierarchicalBatch

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "attacks.npz")
CASES = [key.removesuffix("/adv") for key in GOLDEN.files if key.endswith("/adv")]
DRIFT = [key for key in CASES if "_KNN" in key]
TRAINING = [key for key in CASES if key.startswith("pgd_attack_2")]


def encoder(dtype):
    w = {key.removeprefix("weights/"): torch.tensor(GOLDEN[key]).to(dtype) for key in GOLDEN.files if "weights/" in key}

    def encode(x):
        h = torch.tanh(F.conv2d(x, w["conv1.weight"], w["conv1.bias"], padding=1))
        h = torch.tanh(F.conv2d(h, w["conv2.weight"], w["conv2.bias"], stride=2, padding=1)).mean((2, 3))
        return F.normalize(F.linear(h, w["proj.weight"], w["proj.bias"]), dim=1)

    return encode


def number(key: str, word: str, default: float) -> float:
    found = [
        part.removeprefix(word) for part in key.split("/") if part.startswith(word) and part[len(word) :][:1].isdigit()
    ]
    return float(found[0]) if found else default


@pytest.mark.parametrize("key", DRIFT)
def test_drift_attacks_follow_the_published_trajectories(key):
    name, dtype, distance = key.split("/")[:3]
    dtype, distance = getattr(torch, dtype), {"mse": "l2"}.get(distance, distance)
    eps, steps = number(key, "eps", 8) / 255, int(number(key, "steps", 10))
    x = torch.tensor(GOLDEN["images"][:8]).to(dtype)
    noise = torch.tensor(GOLDEN["U_image0_zero_noise" if "image0" in key else "U"][:8]).to(dtype)
    attack = {
        "PGD_KNN": lambda: PGD(Linf(eps), step_size=2 / 255, steps=steps),
        "BIM_KNN": lambda: BIM(Linf(eps), step_size=2 / 255, steps=steps),
        "MIFGSM_KNN": lambda: MIFGSM(Linf(eps), step_size=2 / 255, steps=steps, decay=number(key, "decay", 1.0)),
        "FFGSM_KNN": lambda: FFGSM(Linf(eps), step_size=number(key, "alpha", 10) / 255),
    }[name]()
    x_adv = attack(x, feature_drift(encoder(dtype), x, distance), start=x + (2 * noise - 1) * eps)
    np.testing.assert_allclose(x_adv.numpy(), GOLDEN[f"{key}/adv"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("key", TRAINING)
def test_the_training_attack_follows_the_published_trajectory(key):
    _, dtype, _, _, code = key.split("/")
    dtype = getattr(torch, dtype)
    eps, steps = number(key, "eps", 8) / 255, int(number(key, "steps", 5))
    x, noise = torch.tensor(GOLDEN["images"]).to(dtype), torch.tensor(GOLDEN["U"]).to(dtype)
    batch = HierarchicalBatch.from_grid(x.unflatten(0, (2, 2, 2, 2)))
    objective = hierarchical(encoder(dtype), HiDiscLoss.from_code(code), batch)
    x_adv = PGD(Linf(eps), step_size=2 / 255, steps=steps)(batch.images, objective, start=x + (2 * noise - 1) * eps)
    np.testing.assert_allclose(x_adv.numpy(), GOLDEN[f"{key}/adv"], atol=1e-6, rtol=0)


def test_there_are_cases():
    assert len(DRIFT) >= 20 and len(TRAINING) == 5
