"""Augmentation for bright-field tissue stained with haematoxylin and eosin: what varies between slides and scanners.

The published pipelines were made for stimulated Raman images.  On H&E their solarisation turns tissue green and black,
and erased boxes and rotations leave black where a slide has white.  Here colours vary along the stains' own axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hsat.stains import from_stains, to_stains

STAIN_SPREAD, STAIN_SHIFT = 0.25, 0.05  # of the factor on a stain's density, and of what is added to it
TURN = 15.0  # degrees
HALF = 0.5


@dataclass(frozen=True)
class WithProbability:
    """Applies an operation to a share of the patches.

    Attributes:
        prob: The share, in [0, 1].
        operation: The operation.
    """

    prob: float
    operation: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """The patch (3, h, w), changed or not."""
        return self.operation(x) if float(torch.rand(())) < self.prob else x


@dataclass(frozen=True)
class MirrorAndTurn:
    """One of the eight mirrored and turned forms of a square patch; one of the four of another, which keep its shape.

    Tissue has no up and no left, so this changes nothing that matters.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """The patch (3, h, w), its pixels rearranged."""
        mirror, turns = int(torch.randint(2, ())), int(torch.randint(4, ()))
        x = x.flip(-1) if mirror else x
        if x.shape[-1] != x.shape[-2]:
            turns = 2 * (turns % 2)
        return x.rot90(turns, (-2, -1))


@dataclass(frozen=True)
class ReflectedTurn:
    """A turn around the middle by an angle drawn from [-degrees, degrees]; what comes from outside is reflected.

    Attributes:
        degrees: The largest angle.
    """

    degrees: float

    def __call__(self, x: Tensor) -> Tensor:
        """The patch (3, h, w), resampled bilinearly."""
        angle = torch.deg2rad((2 * torch.rand((), dtype=torch.float64) - 1) * self.degrees)
        cos, sin = float(angle.cos()), float(angle.sin())
        height, width = x.shape[-2:]
        matrix = torch.tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]], dtype=x.dtype)
        grid = F.affine_grid(matrix[None], [1, 3, height, width], align_corners=False)
        turned = F.grid_sample(x[None], grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        return turned[0].clamp(0.0, 1.0)


@dataclass(frozen=True)
class StainJitter:
    """Stronger or weaker stains: each stain's density times a factor, plus a shift, in optical density.

    Tellez et al., Whole-slide mitosis detection in H&E breast histology using PHH3 as a reference to train distilled
    stain-invariant convolutional networks, IEEE TMI 2018, section III-C.  Deviations: the residual of the two stains
    stays as it is, and shifts are scaled by how much light a pixel absorbs, so that white stays white.

    Attributes:
        spread: Factors are uniform in [1 - spread, 1 + spread].
        shift: Shifts are uniform in [-shift, shift], in units of optical density (natural logarithm).
    """

    spread: float
    shift: float

    def __call__(self, x: Tensor) -> Tensor:
        """The patch (3, h, w) in [0, 1]."""
        factor = 1 + (2 * torch.rand(2) - 1) * self.spread
        shift = (2 * torch.rand(2) - 1) * self.shift
        stains = to_stains(x[None])
        tissue = (stains[:, :2].sum(1, keepdim=True) / HALF).clamp(0.0, 1.0)
        changed = stains[:, :2] * factor.view(1, 2, 1, 1) + shift.view(1, 2, 1, 1) * tissue
        return from_stains(torch.cat((changed, stains[:, 2:]), 1))[0]
