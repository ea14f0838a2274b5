"""Stains: optical density, and the directions of haematoxylin and eosin in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "HAEMATOXYLIN_EOSIN",
    "StainVectors",
    "estimate_stains",
    "from_stains",
    "optical_density",
    "stain_basis",
    "to_stains",
]

StainVectors = tuple[tuple[float, ...], ...]

HAEMATOXYLIN_EOSIN: StainVectors = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11))
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
    check_colour(images)
    unmix = torch.linalg.inv(stain_basis(vectors)).to(images)
    return mix_planes(optical_density(images), unmix)


def from_stains(concentrations: Tensor, vectors: Sequence[Sequence[float]] = HAEMATOXYLIN_EOSIN) -> Tensor:
    """Images (n, 3, h, w) of concentrations as `to_stains` gives them, clamped to [0, 1]; differentiable.

    from_stains(to_stains(x)) is x, to rounding, where x >= 1/255.
    """
    check_colour(concentrations)
    density = mix_planes(concentrations, stain_basis(vectors).to(concentrations))
    return torch.exp(-density).clamp(0.0, 1.0)


def estimate_stains(images: Tensor, *, least: float = 0.15, percentile: float = 1.0) -> StainVectors:
    """The two stain vectors of a set of images, haematoxylin first, for `vectors=`.

    images: (n, 3, h, w) in [0, 1].  Macenko et al. 2009: pixels with optical density above `least` in every channel;
    the plane of the two strongest directions of their covariance; the extreme angles in it, `percentile` % from either
    end.  Of the two, haematoxylin is the one with more red density.  Raises ValueError where fewer than 100 pixels are
    stained, or all of them have one hue.
    """
    check_colour(images)
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
    stains = [plane[:, 0] * end.sin() + plane[:, 1] * end.cos() for end in ends]
    stains.sort(key=lambda row: -float(row[0]))
    return tuple(tuple(float(value) for value in row) for row in stains)


def check_colour(images: Tensor) -> None:
    """Raise ValueError unless these are colour images."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"stain space needs colour images, (n, 3, h, w); got shape {tuple(images.shape)}")


def mix_planes(planes: Tensor, matrix: Tensor) -> Tensor:
    """sum over i of planes[:, i] * matrix[i, j], (n, i, h, w) -> (n, j, h, w).

    Elementwise and not a matrix product, whose rounding may depend on the size of the batch.
    """
    total = planes[:, :1] * matrix[0][None, :, None, None]
    for index in range(1, len(matrix)):
        total = total + planes[:, index : index + 1] * matrix[index][None, :, None, None]
    return total
