"""guide and choose_guide_images: the pull, whose embedding it is, and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hsat.attacks import PGD, Linf, choose_guide_images, match_features
from hsat.types import EmbeddingTable


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def bank():
    z = torch.randn(40, 5, generator=seeded(1)).numpy()
    index = np.arange(40)
    return EmbeddingTable(z, index % 3, index, index // 2, index // 5, ("a", "b", "c"))


@pytest.fixture
def encoder():
    weight = torch.randn(48, 5, generator=seeded(2))
    return lambda v: (v.flatten(1) - 0.5) @ weight


def test_values_gradient_and_select(encoder):
    x, targets = torch.rand(4, 3, 4, 4, generator=seeded()), torch.randn(4, 5, generator=seeded(3))
    pull = match_features(encoder, targets * 7)
    torch.testing.assert_close(pull(x), torch.nn.functional.cosine_similarity(encoder(x), targets))
    index = torch.tensor([2, 0])
    torch.testing.assert_close(pull.select(index)(x[index]), pull(x)[index])
    z = torch.randn(4, 5, generator=seeded(4), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(match_features(lambda v: v, targets.double()), (z,))


def test_the_attack_reaches_the_guide(encoder):
    """A linear encoder and a wide ball: the embedding can be turned all the way."""
    x = torch.rand(4, 3, 4, 4, generator=seeded()) * 0.2 + 0.4
    pull = match_features(encoder, torch.randn(4, 5, generator=seeded(3)))
    result = PGD(Linf(0.4), step_size=0.02, steps=60).run(x, pull, generator=seeded())
    assert (result.value > 0.98).all() and (pull(x) < 0.9).all()


@pytest.mark.parametrize("which", ["nearest", "farthest"])
@pytest.mark.parametrize("known", [True, False])
def test_guides_are_what_a_loop_finds(bank, which, known):
    z = torch.randn(9, 5, generator=seeded(5))
    labels, patients = torch.arange(9) % 3, torch.arange(9) % 8
    found = choose_guide_images(bank, z, labels=labels, patients=patients if known else None, which=which)
    for i in range(9):
        allowed = [j for j in range(40) if bank.label[j] != labels[i] and (not known or bank.patient[j] != patients[i])]
        similar = {
            j: float(torch.nn.functional.cosine_similarity(z[i], torch.from_numpy(bank.z[j]), 0)) for j in allowed
        }
        best = (max if which == "nearest" else min)(similar, key=similar.get)
        assert torch.equal(found[i], torch.from_numpy(bank.z[best]))


def test_errors(bank, encoder):
    z, labels = torch.randn(2, 5), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="which must be 'nearest' or 'farthest', got 'near'"):
        choose_guide_images(bank, z, labels=labels, which="near")
    with pytest.raises(ValueError, match=r"embeddings must be \(n, 5\) as the bank's are, got \(2, 4\)"):
        choose_guide_images(bank, z[:, :4], labels=labels)
    with pytest.raises(ValueError, match="labels run from 0 to 3, but there are 3 classes"):
        choose_guide_images(bank, z, labels=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"2 labels but patients of shape \(3,\)"):
        choose_guide_images(bank, z, labels=labels, patients=torch.arange(3))
    one = EmbeddingTable(bank.z[:3], [1, 1, 1], range(3), range(3), range(3), ("a", "b", "c"))
    with pytest.raises(ValueError, match="no row of another class and patient for image 1"):
        choose_guide_images(one, z, labels=labels)
    with pytest.raises(ValueError, match=r"floats \(n, d\), one embedding per image; got torch.float32 \(5,\)"):
        match_features(encoder, z[0])
    with pytest.raises(ValueError, match="the target of image 1 is zero or not finite"):
        match_features(encoder, torch.tensor([[1.0, 0], [0, 0]]))
    with pytest.raises(ValueError, match=r"gave embeddings \(3, 5\), the targets are \(2, 5\)"):
        match_features(encoder, z)(torch.rand(3, 3, 4, 4))
