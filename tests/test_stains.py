"""Optical density and stain vectors: a pixel by hand, there and back, and stains that are estimated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.stains import HAEMATOXYLIN_EOSIN, estimate_stains, from_stains, stain_basis, to_stains

seeds = st.integers(0, 10_000)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def colour(seed=0, n=3, dtype=torch.float32):
    return (torch.rand(n, 3, 5, 4, generator=generator(seed), dtype=torch.float64) * 0.9 + 0.05).to(dtype)


def test_stains_of_a_pixel_by_hand():
    """One unit of haematoxylin is its unit vector in optical density."""
    h = torch.tensor(HAEMATOXYLIN_EOSIN[0], dtype=torch.float64)
    pixel = torch.exp(-0.7 * h / h.norm()).view(1, 3, 1, 1)
    torch.testing.assert_close(to_stains(pixel).flatten(), torch.tensor([0.7, 0.0, 0.0], dtype=torch.float64))
    basis = stain_basis()
    torch.testing.assert_close(basis.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert abs(float(basis[2] @ basis[0])) < 1e-12 and abs(float(basis[2] @ basis[1])) < 1e-12


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_stains_and_back(seed):
    x = colour(seed, dtype=torch.float64)
    torch.testing.assert_close(from_stains(to_stains(x)), x)
    c = to_stains(x)
    torch.testing.assert_close(to_stains(from_stains(c)), c)


def test_estimated_stains_are_those_the_images_were_painted_with():
    wanted = stain_basis(((0.55, 0.75, 0.35), (0.15, 0.9, 0.3)))[:2]
    amount = torch.rand(2, 4000, generator=generator(), dtype=torch.float64) ** 3
    density = 1.6 * amount.T @ wanted + 0.2 * wanted.sum(0)
    pen = torch.tensor([[0.0, 0.1, 3.0]], dtype=torch.float64).expand(400, 3)  # a mark that leaves red light alone
    images = torch.exp(-torch.cat((density, pen))).T.reshape(1, 3, 44, 100)
    found = torch.tensor(estimate_stains(images, percentile=0.1), dtype=torch.float64)
    cosine = (found * wanted).sum(1) / found.norm(dim=1)
    assert (cosine > 0.998).all(), cosine
    with pytest.raises(ValueError, match="only 0 pixels"):
        estimate_stains(torch.ones(1, 3, 20, 20))
