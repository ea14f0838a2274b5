"""Stain space: optical density, the directions of haematoxylin and eosin, and what an attacker does to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsat.attacks.placing import beside
from hsat.types import ThreatModel

Vectors = tuple[tuple[float, ...], ...]

HAEMATOXYLIN_EOSIN: Vectors = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11))
"""Optical density per unit of haematoxylin and of eosin in red, green and blue (Ruifrok and Johnston 2001)."""

DARKEST = 1 / 255
"""Transmitted light below one grey level is taken for one, so that optical density stays finite."""


def optical_density(images: Tensor) -> Tensor:
    """-log(max(I, 1/255)), natural logarithm: 0 for white, about 5.54 for black; shape of images in [0, 1]."""
    return -images.clamp_min(DARKEST).log()


def stain_basis(vectors: Sequence[Sequence[float]] = HAEMATOXYLIN_EOSIN) -> Tensor:
    """The stain vectors as unit rows, with their cross product, the residual, as third row: (3, 3) float64.

    vectors: two or three rows of three numbers, one row per stain.  Raises ValueError for other shapes, for numbers
    that are not finite, and for rows that (nearly) depend on each other.
    """
    rows = torch.as_tensor([[float(value) for value in row] for row in vectors], dtype=torch.float64)
    if rows.shape not in ((2, 3), (3, 3)) or not bool(rows.isfinite().all()):
        raise ValueError(f"stain vectors must be two or three rows of three finite numbers, got {vectors!r}")
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
    if len(rows) == 2:
        residual = torch.linalg.cross(rows[0], rows[1])
        rows = torch.cat((rows, residual[None] / residual.norm().clamp_min(1e-300)))
    if not abs(float(torch.linalg.det(rows))) > 1e-3:
        raise ValueError(f"stain vectors {vectors!r} nearly lie in one plane; give different stains")
    return rows


def to_stains(images: Tensor, vectors: Sequence[Sequence[float]] = HAEMATOXYLIN_EOSIN) -> Tensor:
    """Concentrations (n, 3, h, w) of images (n, 3, h, w) in [0, 1]: stain 1, stain 2, residual; differentiable.

    Beer and Lambert's law: optical density = concentrations x stain vectors (`stain_basis`).  Concentrations are in
    units of optical density, and may be negative where a colour is not a mixture of the stains.
    """
    _check_colour(images)
    unmix = torch.linalg.inv(stain_basis(vectors)).to(images)
    return _mixed(optical_density(images), unmix)


def from_stains(concentrations: Tensor, vectors: Sequence[Sequence[float]] = HAEMATOXYLIN_EOSIN) -> Tensor:
    """Images (n, 3, h, w) of concentrations as `to_stains` gives them, clamped to [0, 1]; differentiable.

    from_stains(to_stains(x)) is x, to rounding, where x >= 1/255.
    """
    _check_colour(concentrations)
    density = _mixed(concentrations, stain_basis(vectors).to(concentrations))
    return torch.exp(-density).clamp(0.0, 1.0)


def estimate_stains(images: Tensor, *, least: float = 0.15, percentile: float = 1.0) -> Vectors:
    """The two stain vectors of a set of images, haematoxylin first, for `vectors=`.

    images: (n, 3, h, w) in [0, 1].  Macenko et al. 2009: pixels with optical density above `least` in every channel;
    the plane of the two strongest directions of their covariance; the extreme angles in it, `percentile` % from either
    end.  Of the two, haematoxylin is the one with more red density.  Raises ValueError where fewer than 100 pixels are
    stained, or all of them have one hue.
    """
    _check_colour(images)
    density = optical_density(images.detach().double().cpu()).movedim(1, -1).reshape(-1, 3)
    density = density[(density > least).all(1)]
    if len(density) < 100:
        raise ValueError(
            f"only {len(density)} pixels have an optical density above {least} in every channel; estimate stains from"
            " more images, or lower least="
        )
    plane = torch.linalg.eigh(torch.cov(density.T)).eigenvectors[:, 1:]
    plane = plane * torch.where(plane.sum(0) < 0, -1.0, 1.0)
    angle = torch.atan2(density @ plane[:, 0], density @ plane[:, 1]).sort().values
    ends = [angle[round((len(angle) - 1) * share)] for share in (percentile / 100, 1 - percentile / 100)]
    if float(ends[1] - ends[0]) < 1e-3:  # radians
        raise ValueError(
            f"the {len(density)} stained pixels have one hue only, which is one stain at most; estimate stains from"
            " images that show both, or give vectors= yourself"
        )
    found = [plane[:, 0] * end.sin() + plane[:, 1] * end.cos() for end in ends]
    found.sort(key=lambda row: -float(row[0]))
    return tuple(tuple(float(value) for value in row) for row in found)


@dataclass(frozen=True)
class Stains:
    """The space of stain changes: the attacker adds to or takes from the first stains, in units of optical density.

    vectors: rows per stain as in `stain_basis`; all that are given may change (two: haematoxylin and eosin, while the
    residual stays).  per_pixel: True lets every pixel change by itself, (n, stains, h, w); False changes a stain of the
    whole image at once, (n, stains, 1, 1), as a slide that was stained for longer.
    The variable d is the change, zero for the clean image, and the image becomes clip(x exp(-d x vectors), 0, 1): by
    Beer and Lambert's law light that passes more stain is dimmed by a factor, so that optical density grows by
    d x vectors, and x itself is never turned into concentrations and back.  Black stays black; taking away more stain
    than there is gives light above 1, which is clipped.  eps = 0.1 with Linf changes light of the stain's main colour
    by up to about 10 %.

    The threat model holds for d and must allow both signs: InSpace(Stains(), PGD(Linf(0.1, low=-1, high=1), ...)).
    """

    vectors: Vectors = HAEMATOXYLIN_EOSIN
    per_pixel: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "vectors", tuple(tuple(map(float, row)) for row in self.vectors))
        stain_basis(self.vectors)

    def encode(self, y: Tensor, x: Tensor) -> Tensor:
        """The change of stains that leads from x to y (or near it): zeros where y is x."""
        _check_colour(x)
        density = optical_density(y) - optical_density(x)
        unmix = beside(torch.linalg.inv(stain_basis(self.vectors)), x, x.dtype)[:, : len(self.vectors)]
        change = _mixed(density, unmix)
        return change if self.per_pixel else change.mean((2, 3), keepdim=True)

    def decode(self, variable: Tensor, x: Tensor) -> Tensor:
        """Images in [0, 1] from changes (n, stains, h or 1, w or 1), differentiable; dtype of x."""
        work = torch.promote_types(x.dtype, torch.float32)
        vectors = beside(stain_basis(self.vectors)[: len(self.vectors)], x, work)
        density = _mixed(variable.to(work), vectors)
        return (x.to(work) * torch.exp(-density)).clamp(0.0, 1.0).to(x.dtype)

    def check(self, threat: ThreatModel | None) -> None:
        """Refuse a range that cuts the ball around zero: the default [0, 1] would allow adding stain only."""
        eps = torch.as_tensor(getattr(threat, "eps", 0.0), dtype=torch.float64)
        low, high = getattr(threat, "low", -math.inf), getattr(threat, "high", math.inf)
        largest = float(eps.max()) if eps.numel() else 0.0
        if threat is not None and not (low <= -largest and high >= largest and low < 0 < high):
            name = type(threat).__name__
            raise ValueError(
                f"changes of stain go both ways, so the range must reach from -eps to eps; got [{low}, {high}] with eps"
                f" up to {largest:g}. Write {name}({largest:g}, low=-1, high=1)"
            )


def _check_colour(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"stain space needs colour images, (n, 3, h, w); got shape {tuple(images.shape)}")


def _mixed(planes: Tensor, matrix: Tensor) -> Tensor:
    """sum over i of planes[:, i] * matrix[i, j], (n, i, h, w) -> (n, j, h, w).

    Elementwise and not a matrix product, whose rounding may depend on the size of the batch.
    """
    total = planes[:, :1] * matrix[0][None, :, None, None]
    for index in range(1, len(matrix)):
        total = total + planes[:, index : index + 1] * matrix[index][None, :, None, None]
    return total
