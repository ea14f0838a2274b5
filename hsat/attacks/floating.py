"""Neighbouring floats: what exact projections need and torch offers for 32 and 64 bits only."""

from __future__ import annotations

import torch
from torch import Tensor


def next_float(t: Tensor, *, up: bool) -> Tensor:
    """The next representable number above (up=True) or below each element; any of the four float types.

    float16 and bfloat16 go through their bit patterns, since torch.nextafter is not offered for both everywhere.
    """
    if t.dtype in (torch.float32, torch.float64):
        return torch.nextafter(t, torch.full_like(t, torch.inf if up else -torch.inf))
    if t.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"expected float16, bfloat16, float32 or float64, got {t.dtype}")
    t = t + 0.0  # -0.0 becomes 0.0, so that zero has one bit pattern
    bits = t.contiguous().view(torch.int16)
    away = (t > 0) if up else (t < 0)  # growing magnitude means growing bit pattern
    moved = torch.where(away, bits + 1, bits - 1).to(torch.int16).view(t.dtype)
    smallest = torch.full((), 1 if up else -32767, dtype=torch.int16, device=t.device).view(t.dtype)
    return torch.where(t == 0, smallest, moved)


def round_inside(value: float, dtype: torch.dtype, *, up: bool) -> float:
    """The float of `dtype` nearest to value among those not below it (up=True) or not above it (up=False)."""
    rounded = torch.tensor(value, dtype=torch.float64).to(dtype)
    outside = rounded.double() < value if up else rounded.double() > value
    return float(next_float(rounded, up=up) if outside else rounded)
