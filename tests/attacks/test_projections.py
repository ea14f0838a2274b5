"""Neighbouring floats of every type."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
