"""Against torchattacks on a classifier: same steps from the same start, pixel by pixel."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from hsat.attacks import BIM, FGSM, L2, MIFGSM, PGD, Linf, classification

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torchattacks = pytest.importorskip("torchattacks", reason='needs the peer: pip install "hsat[crosscheck]"')

EPS, STEP, STEPS = 8 / 255, 2 / 255, 7


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(6 * 16, 5)
    return nn.Sequential(*layers).eval()


@pytest.fixture
def images():
    return torch.rand(6, 3, 10, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels(model, images):
    return model(images).argmax(1)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (FGSM(Linf(EPS)), lambda m: torchattacks.FGSM(m, eps=EPS)),
        (BIM(Linf(EPS), step_size=STEP, steps=STEPS), lambda m: torchattacks.BIM(m, eps=EPS, alpha=STEP, steps=STEPS)),
        (
            PGD(Linf(EPS), step_size=STEP, steps=STEPS, random_start=False),
            lambda m: torchattacks.PGD(m, eps=EPS, alpha=STEP, steps=STEPS, random_start=False),
        ),
        (
            MIFGSM(Linf(EPS), step_size=STEP, steps=STEPS, decay=0.9),
            lambda m: torchattacks.MIFGSM(m, eps=EPS, alpha=STEP, steps=STEPS, decay=0.9),
        ),
    ],
    ids=["FGSM", "BIM", "PGD", "MIFGSM"],
)
def test_same_adversarial_images(model, images, labels, ours, theirs):
    expected = theirs(model)(images, labels)
    got = ours(images, classification(model, labels))
    assert not torch.equal(expected, images)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)


def test_pgd_from_its_random_start(model, images, labels):
    torch.manual_seed(3)
    expected = torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=STEPS, random_start=True)(images, labels)
    torch.manual_seed(3)
    start = images + torch.empty_like(images).uniform_(-EPS, EPS)
    got = PGD(Linf(EPS), step_size=STEP, steps=STEPS)(images, classification(model, labels), start=start)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)


def test_l2_attack_is_at_least_as_strong(model, images, labels):
    objective = classification(model, labels)
    theirs = torchattacks.PGDL2(model, eps=1.0, alpha=0.2, steps=20, random_start=False)(images, labels)
    ours = PGD(L2(1.0), step_size=0.2, steps=20, random_start=False)(images, objective)
    assert (objective(ours) >= objective(theirs) - 1e-3).all()
