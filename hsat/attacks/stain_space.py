"""Stain space: what an attacker does to the haematoxylin and eosin of a slide."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hsat.attacks.initialization import to_device_of
from hsat.stains import HAEMATOXYLIN_EOSIN, StainVectors, check_colour, mix_planes, optical_density, stain_basis
from hsat.types import ThreatModel


@dataclass(frozen=True)
class Stains:
    """The space of stain changes: the attacker adds to or takes from the first stains, in units of optical density.

    The variable d is the change, zero for the clean image, and the image becomes clip(x exp(-d x vectors), 0, 1): by
    Beer and Lambert's law light that passes more stain is dimmed by a factor, so that optical density grows by d x
    vectors, and x itself is never turned into concentrations and back.  Black stays black; taking away more stain than
    there is gives light above 1, which is clipped.  eps = 0.1 with Linf changes light of the stain's main colour by up
    to about 10 %.

    The threat model holds for d and must allow both signs:
    Reparametrized(Stains(), PGD(Linf(0.1, low=-1, high=1), ...)).

    Attributes:
        vectors: Rows per stain as in `stain_basis`; all that are given may change (two: haematoxylin and eosin,
            while the residual stays).
        per_pixel: True lets every pixel change by itself, (n, stains, h, w); False changes a stain of the whole
            image at once, (n, stains, 1, 1), as a slide that was stained for longer.
    """

    vectors: StainVectors = HAEMATOXYLIN_EOSIN
    per_pixel: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "vectors", tuple(tuple(map(float, row)) for row in self.vectors))
        stain_basis(self.vectors)

    def encode(self, y: Tensor, x: Tensor) -> Tensor:
        """The change of stains that leads from x to y (or near it): zeros where y is x.

        Args:
            y: (n, 3, h, w) colour images in [0, 1].
            x: (n, 3, h, w) clean images in [0, 1].

        Returns:
            (n, stains, h, w), or (n, stains, 1, 1) with per_pixel=False.
        """
        check_colour(x)
        density = optical_density(y) - optical_density(x)
        unmix = to_device_of(torch.linalg.inv(stain_basis(self.vectors)), x, x.dtype)[:, : len(self.vectors)]
        change = mix_planes(density, unmix)
        return change if self.per_pixel else change.mean((2, 3), keepdim=True)

    def decode(self, variable: Tensor, x: Tensor) -> Tensor:
        """Images from changes of stain.

        Args:
            variable: (n, stains, h or 1, w or 1).
            x: (n, 3, h, w) clean images in [0, 1].

        Returns:
            (n, 3, h, w) in [0, 1], differentiable; dtype of x.
        """
        work = torch.promote_types(x.dtype, torch.float32)
        vectors = to_device_of(stain_basis(self.vectors)[: len(self.vectors)], x, work)
        density = mix_planes(variable.to(work), vectors)
        return (x.to(work) * torch.exp(-density)).clamp(0.0, 1.0).to(x.dtype)

    def check(self, threat: ThreatModel | None) -> None:
        """Refuse a range that cuts the ball around zero: the default [0, 1] would allow adding stain only.

        Args:
            threat: Of the attack, or None.

        Raises:
            ValueError: For such a range.
        """
        if threat is None:
            return
        eps, low, high = torch.as_tensor(threat.eps, dtype=torch.float64), threat.low, threat.high
        largest = float(eps.max()) if eps.numel() else 0.0
        if not (low <= -largest and high >= largest and low < 0 < high):
            name = type(threat).__name__
            raise ValueError(
                f"changes of stain go both ways, so the range must reach from -eps to eps; got [{low}, {high}] with eps"
                f" up to {largest:g}. Write {name}({largest:g}, low=-1, high=1)"
            )
