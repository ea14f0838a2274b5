"""Projection onto ball and box, and the neighbouring floats that make it exact in every dtype."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_WIDE = 1 << 24
"""So many pixels are in float64 at a time: a batch of 100 patches of 224 x 224."""

FARTHEST = 1e140
"""Beyond this the square of a distance would overflow; an infinite pixel then counts as one this far away."""


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


def step_toward(y: Tensor, x: Tensor) -> Tensor:
    """Every element of y moved by one float towards x, unless it is there."""
    lower, upper = next_float(y, up=False), next_float(y, up=True)
    return torch.where(y.double() > x, lower, torch.where(y.double() < x, upper, y))


def l2_norm(d: Tensor) -> Tensor:
    """Euclidean norm per image, (n, 1, 1, 1)."""
    norm: Tensor = torch.linalg.vector_norm(d, dim=(1, 2, 3), keepdim=True)
    return norm


def linf_bounds(
    x: Tensor, eps: float | Tensor, low: float, high: float, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The least and the largest feasible value of every pixel in `dtype`, exactly.

    Args:
        x: (n, c, h, w) images inside [low, high].
        eps: A float, or a float64 tensor that broadcasts against x.
        low: Least pixel value.
        high: Largest pixel value.
        dtype: Of the bounds.

    Returns:
        (lower, upper), each of the shape of x: the outermost floats of `dtype` within eps of x, checked in float64.
    """
    if len(x) > 1 and x.numel() > MOST_WIDE:  # the numbers in float64 would take several times the memory of the images
        size = max(1, MOST_WIDE // x[0].numel())
        own = isinstance(eps, Tensor) and len(eps) == len(x)
        parts = [
            linf_bounds(part, eps[at * size : at * size + size] if own else eps, low, high, dtype=dtype)  # type: ignore[index]
            for at, part in enumerate(torch.split(x, size))
        ]
        return torch.cat([lower for lower, _ in parts]), torch.cat([upper for _, upper in parts])
    exact = x.double()

    def edge(*, up: bool) -> Tensor:
        def inside(t: Tensor) -> Tensor:
            return (t.double() - exact).abs() <= eps

        near = (exact + eps if up else exact - eps).to(dtype)
        inner, outer = next_float(near, up=not up), next_float(near, up=up)
        # rounding to nearest errs by half a float at most, so one float inward always passes the check
        return torch.where(inside(near), torch.where(inside(outer), outer, near), inner)

    lower = edge(up=False).clamp(min=round_inside(low, dtype, up=True))
    return lower, edge(up=True).clamp(max=round_inside(high, dtype, up=False))


def project_l2_box(y: Tensor, x: Tensor, eps: float | Tensor, low: float, high: float) -> Tensor:
    """argmin |z - y| over |z - x| <= eps and low <= z <= high, per image, in float64.

    The minimiser is clip(x + t d), d = y - x.  On the pixels that are not yet clipped the squared norm grows as
    a t^2 + b; solving that for eps^2 undershoots whenever more pixels clip, so t climbs to the answer from the
    feasible side and is exact once the set of clipped pixels no longer changes.

    Args:
        y: (n, c, h, w) float64, the points to project.
        x: (n, c, h, w) float64, the centres.
        eps: A float, or a tensor (n, 1, 1, 1).
        low: Least pixel value.
        high: Largest pixel value.

    Returns:
        The nearest points, (n, c, h, w).
    """
    d = (y - x).clamp(-FARTHEST, FARTHEST)
    room = torch.where(d > 0, high - x, x - low)
    # not as_tensor, which would make a GPU wait for one number
    target = (eps.to(y) if isinstance(eps, Tensor) else y.new_full((), eps)) ** 2
    t = torch.zeros_like(d[:, :1, :1, :1])
    for _ in range(200 if y.device.type == "cpu" else 24):
        clipped = t * d.abs() >= room
        free = torch.where(clipped, 0.0, d * d).sum((1, 2, 3), keepdim=True)
        used = torch.where(clipped, room * room, 0.0).sum((1, 2, 3), keepdim=True)
        step = torch.where(free > 0, ((target - used).clamp_min(0) / free.clamp_min(1e-300)).sqrt(), 1.0).clamp(max=1.0)
        new = torch.maximum(t, step)
        if y.device.type == "cpu" and bool((new == t).all()):
            break
        t = new
    return (x + t * d).clamp(low, high)
