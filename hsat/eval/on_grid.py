"""Adversarial images that a file can hold: whole counts, inside the threat model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hsat.types import ThreatModel

_SLACK = 1e-9
_HALVINGS = 20


@dataclass(frozen=True)
class Grid:
    """Values that files hold: counts 0 ... top, read as count / scale in float32."""

    name: str
    scale: int
    top: int

    def values(self, counts: Tensor) -> Tensor:
        """What a reader makes of counts, float32."""
        return counts.to(torch.float32) / self.scale

    def counts(self, images: Tensor) -> Tensor:
        """Counts of images read from files, int64.  ValueError where they are not on the grid."""
        found = (images.double() * self.scale).round().clamp(0, self.top).long()
        if not torch.equal(self.values(found), images.float()):
            raise ValueError(
                f"the images are not on the grid of their files ({self.name}): they were resized or changed. Read the"
                " patches at their own size (PatchDataset without image_size) and let the encoder resize"
            )
        return found


PNG_GRID = Grid("8-bit PNG", 255, 255)
TIFF_GRID = Grid("16-bit TIFF", 65536, 65535)


def round_in_ball(x_adv: Tensor, x: Tensor, threat: ThreatModel, grid: Grid) -> Tensor:
    """Counts (n, c, h, w) int64 near x_adv that lie on the grid and in the threat model around x.

    x: images as read, on the grid, so that a feasible point exists: x itself.  The ball is that of the stored numbers,
    |count - count of x| <= eps * scale for Linf, in exact arithmetic; read as float32 each number is rounded, and a
    difference of two readings may show 1e-7 more.

    Per pixel: the nearest count where it is feasible, else the next one towards x (for Linf and Masked that is the
    nearest feasible count).  Where the whole image is infeasible all the same (L2: rounding lengthens some pixels),
    the perturbation is shrunk until its nearest counts fit, by bisection, image by image.
    """
    origin, wide = grid.counts(x), _widened(threat)
    clean = origin.double() / grid.scale
    aim = x_adv.double() * grid.scale

    def feasible_pixels(counts: Tensor) -> Tensor:
        values = counts.double() / grid.scale
        return wide.project(values, clean) == values

    def nearest(points: Tensor) -> Tensor:
        return points.round().clamp(0, grid.top).long()

    inward = torch.where(aim >= origin, aim.floor().clamp(min=origin.double()), aim.ceil().clamp(max=origin.double()))
    counts = nearest(aim)
    counts = torch.where(feasible_pixels(counts), counts, nearest(inward))
    outside = ~feasible_pixels(counts).flatten(1).all(1)
    if not bool(outside.any()):
        return counts
    good, bad = torch.zeros(len(x), device=x.device), torch.ones(len(x), device=x.device)
    shrunk = origin
    for _ in range(_HALVINGS):
        share = ((good + bad) / 2).double()[:, None, None, None]
        trial = nearest(origin + share * (aim - origin))
        fits = feasible_pixels(trial).flatten(1).all(1)
        shrunk = torch.where(fits[:, None, None, None], trial, shrunk)
        good, bad = torch.where(fits, (good + bad) / 2, good), torch.where(fits, bad, (good + bad) / 2)
    return torch.where(outside[:, None, None, None], shrunk, counts)


def _widened(threat: Any) -> ThreatModel:
    """The threat model with eps larger by a billionth: 8 counts are 8/255, however the two are rounded."""
    names = {option.name for option in dataclasses.fields(threat)} if dataclasses.is_dataclass(threat) else set()
    if "eps" in names:
        eps = threat.eps
        eps = eps.double() * (1 + _SLACK) if isinstance(eps, Tensor) else eps * (1 + _SLACK)
        largest = threat.high - threat.low
        if type(threat).__name__ == "Linf":
            eps = eps.clamp(max=largest) if isinstance(eps, Tensor) else min(eps, largest)
        widened: ThreatModel = dataclasses.replace(threat, eps=eps)
        return widened
    if "threat" in names:
        confined: ThreatModel = dataclasses.replace(threat, threat=_widened(threat.threat))
        return confined
    known: ThreatModel = threat
    return known
