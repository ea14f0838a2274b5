"""Neighbouring floats of every type, and bounds of large batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsat.attacks import Linf, projections
from hsat.attacks.projections import next_float
from hsat.testing import DTYPES


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e4, 1e4), st.sampled_from(DTYPES), st.booleans())
def test_next_float_is_the_neighbour(value, dtype, up):
    t = torch.tensor([value], dtype=torch.float64).to(dtype)
    n = next_float(t, up=up)
    assert (n > t).item() if up else (n < t).item()
    middle = ((n.double() + t.double()) / 2).to(dtype)  # nothing of this dtype lies between
    assert middle.item() in (n.item(), t.item())
    assert torch.equal(next_float(n, up=not up), t)


@pytest.mark.parametrize("shape", [None, (7,), (7, 1, 1, 1), (1, 3, 1, 1), (7, 3, 5, 5)])
def test_bounds_are_the_same_in_pieces(shape, monkeypatch):
    """Large batches are bounded some images at a time, whatever form eps has."""
    x = torch.rand(7, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    eps = 8 / 255 if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(1)) / 4
    far = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    whole = Linf(eps).project(far, x)
    monkeypatch.setattr(projections, "MOST_WIDE", 160)
    assert torch.equal(Linf(eps).project(far, x), whole)
