"""The nearest point that lies in a Euclidean ball and in a box at once."""

from __future__ import annotations

import torch
from torch import Tensor

from hsat.attacks.placing import beside

FARTHEST = 1e140
"""Beyond this the square of a distance would overflow; an infinite pixel then counts as one this far away."""


def norm(d: Tensor) -> Tensor:
    """Euclidean norm per image, (n, 1, 1, 1)."""
    result: Tensor = torch.linalg.vector_norm(d, dim=(1, 2, 3), keepdim=True)
    return result


def nearest_in_ball_and_box(y: Tensor, x: Tensor, eps: float | Tensor, low: float, high: float) -> Tensor:
    """argmin |z - y| over |z - x| <= eps and low <= z <= high, per image, in float64.

    The minimiser is clip(x + t d), d = y - x.  On the pixels that are not yet clipped the squared norm grows as
    a t^2 + b; solving that for eps^2 undershoots whenever more pixels clip, so t climbs to the answer from the
    feasible side and is exact once the set of clipped pixels no longer changes.
    """
    d = (y - x).clamp(-FARTHEST, FARTHEST)
    room = torch.where(d > 0, high - x, x - low)
    # not as_tensor, which would make a GPU wait for one number
    target = (beside(eps, y, y.dtype) if isinstance(eps, Tensor) else y.new_full((), eps)) ** 2
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
