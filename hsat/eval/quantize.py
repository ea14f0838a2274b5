"""Adversarial images that a file can hold: whole counts, inside the threat model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hsat.types import ThreatModel

_SLACK = 1e-9
_HALVINGS = 20


@dataclass(frozen=True)
class ValueGrid:
    """Values that files hold: counts 0 ... top, read as count / scale in float32."""

    name: str
    scale: int
    top: int

    def values(self, counts: Tensor) -> Tensor:
        """What a reader makes of counts, float32."""
        return counts.to(torch.float32) / self.scale

    def counts(self, images: Tensor) -> Tensor:
        """Counts of images read from files, int64.  ValueError where they are not on the grid."""
        levels = (images.double() * self.scale).round().clamp(0, self.top).long()
        if not torch.equal(self.values(levels), images.float()):
            raise ValueError(
                f"the images are not on the grid of their files ({self.name}): they were resized or changed. Read the"
                " patches at their own size (PatchDataset without image_size) and let the encoder resize"
            )
        return levels


PNG_GRID = ValueGrid("8-bit PNG", 255, 255)
TIFF_GRID = ValueGrid("16-bit TIFF", 65536, 65535)


def quantize_in_ball(x_adv: Tensor, x: Tensor, threat: ThreatModel, grid: ValueGrid) -> Tensor:
    """Counts (n, c, h, w) int64 near x_adv that lie on the grid and in the threat model around x.

    x: images as read, on the grid, so that a feasible point exists: x itself.  The ball is that of the stored numbers,
    |count - count of x| <= eps * scale for Linf, in exact arithmetic; read as float32 each number is rounded, and a
    difference of two readings may show 1e-7 more.

    The nearest counts, where they are feasible.  Else the nearer to x_adv of two: per pixel the next count towards x
    where the nearest is not feasible (for Linf and Masked(Linf) the nearest feasible counts); or the nearest counts of
    the largest share of the perturbation that fits (for L2, where rounding lengthens many small changes at once).
    """
    origin, wide = grid.counts(x), _widen(threat, x)
    clean = origin.double() / grid.scale
    aim = x_adv.double() * grid.scale

    def feasible_pixels(counts: Tensor) -> Tensor:
        values = counts.double() / grid.scale
        return wide.project(values, clean) == values

    def nearest(points: Tensor) -> Tensor:
        return points.round().clamp(0, grid.top).long()

    counts = nearest(aim)
    kept = feasible_pixels(counts)
    if bool(kept.all()):
        return counts
    inward = torch.where(aim >= origin, aim.floor().clamp(min=origin.double()), aim.ceil().clamp(max=origin.double()))
    mixed = torch.where(kept, counts, nearest(inward))
    shrunk = _largest_feasible(lambda share: nearest(origin + share * (aim - origin)), feasible_pixels, origin)
    loss = [(option - aim).square().flatten(1).sum(1) for option in (mixed, shrunk)]
    by_pixels = feasible_pixels(mixed).flatten(1).all(1) & (loss[0] <= loss[1])
    return torch.where(by_pixels[:, None, None, None], mixed, shrunk)


def _largest_feasible(
    rounded: Callable[[Tensor], Tensor], feasible_pixels: Callable[[Tensor], Tensor], origin: Tensor
) -> Tensor:
    """The counts of the largest share of each image's perturbation that bisection finds feasible."""
    good = torch.zeros(len(origin), 1, 1, 1, dtype=torch.float64, device=origin.device)
    bad, best = torch.ones_like(good), origin
    for _ in range(_HALVINGS):
        share = (good + bad) / 2
        trial = rounded(share)
        fits = feasible_pixels(trial).flatten(1).all(1)[:, None, None, None]
        best = torch.where(fits, trial, best)
        good, bad = torch.where(fits, share, good), torch.where(fits, bad, share)
    return best


def _widen(threat: Any, x: Tensor) -> ThreatModel:
    """The threat model with eps larger by a billionth: 8 counts are 8/255, however the two are rounded.

    No ball becomes larger than its threat model admits for images x: the whole pixel range, or its diagonal.
    """
    names = {option.name for option in dataclasses.fields(threat)} if dataclasses.is_dataclass(threat) else set()
    if "eps" in names:
        eps = threat.eps
        eps = eps.double() * (1 + _SLACK) if isinstance(eps, Tensor) else eps * (1 + _SLACK)
        largest = threat.high - threat.low
        if type(threat).__name__ == "L2":
            largest *= math.sqrt(x[0].numel()) if len(x) else math.inf
        if type(threat).__name__ in ("Linf", "L2"):
            eps = eps.clamp(max=largest) if isinstance(eps, Tensor) else min(eps, largest)
        widened: ThreatModel = dataclasses.replace(threat, eps=eps)
        return widened
    if "threat" in names:
        confined: ThreatModel = dataclasses.replace(threat, threat=_widen(threat.threat, x))
        return confined
    known: ThreatModel = threat
    return known
