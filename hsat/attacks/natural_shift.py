"""Shifts without an adversary: stain, blur, JPEG, brightness and sampling, as they differ between laboratories."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hsat.attacks.initialization import NoiseSource, check_ids, check_start
from hsat.attacks.pgd import unguided_result
from hsat.attacks.threat import Linf, detach_images, require_images
from hsat.stains import HAEMATOXYLIN_EOSIN, check_colour, mix_planes, stain_basis, to_stains
from hsat.types import AttackResult, Objective, SuccessTest

ShiftKind = Literal["stain", "blur", "jpeg", "brightness", "resampling"]

STRENGTHS = ("mild", "medium", "strong")
STANDARD_AMOUNTS: dict[ShiftKind, tuple[float, float, float]] = {
    "stain": (0.05, 0.1, 0.2),  # the ends are HED-light and HED-strong of arXiv:1902.06543, section 3.2
    "blur": (1.0, 2.0, 3.0),  # these and all below: severities 1 to 3 of ImageNet-C, arXiv:1903.12261
    "jpeg": (25, 18, 15),
    "brightness": (0.1, 0.2, 0.3),
    "resampling": (0.6, 0.5, 0.4),
}
"""Amounts of `NaturalShift.standard`, mild to strong."""

_RANGES: dict[ShiftKind, tuple[float, float]] = {
    "stain": (0.0, 1.0),
    "blur": (0.0, 100.0),
    "jpeg": (1, 95),
    "brightness": (0.0, 1.0),
    "resampling": (0.0, 1.0),
}
_TEXTS: dict[ShiftKind, Callable[[float], str]] = {
    "stain": lambda amount: f"haematoxylin and eosin each {100 * amount:g} % more or less",
    "blur": lambda amount: f"Gaussian blur, sigma {amount:g} pixels",
    "jpeg": lambda amount: f"JPEG of quality {amount:g}",
    "brightness": lambda amount: f"brightness {amount:g} up or down",
    "resampling": lambda amount: f"down to {amount:g} of the side and up again",
}
_TRUNCATE = 4.0  # standard deviations at which the kernel of a blur ends
_PIXELS = Linf(1.0)  # the pixel range: images outside of it are refused


@dataclass(frozen=True)
class NaturalShift:
    """No attack at all: what happens to a patch between two laboratories, scanners and files.

    It has no eps and asks no objective, so that an evaluation takes it like `RandomNoise`, as a condition of its own.

    - "stain": the optical density of haematoxylin and that of eosin grow or shrink by the share `amount`, each in a
      direction that chance chooses for the patch.  Colour images only; SRH patches are not stained.
    - "blur": Gaussian, `amount` is sigma in pixels of the image that the encoder is given.
    - "jpeg": compression, `amount` is the quality (whole, 1 to 95, lower is worse), after rounding to 8 bits.
    - "brightness": the value of the HSV model, plus or minus `amount` as chance chooses for the patch.
    - "resampling": averaged down to the share `amount` of the side, then interpolated up again (bilinear).

    `standard` gives the fifteen conditions that are usually reported.  Directions depend on (seed, kind, id), so that
    the three strengths of a kind push a patch the same way.  They differ between the patches of a slide: what a whole
    laboratory does to all of its slides alike may cost a slide more than this shows.

    Attributes:
        kind: Which shift.
        amount: How much, see above.

    Raises:
        ValueError: For an unknown kind, and for an amount out of its range.

    References:
        Hendrycks and Dietterich, arXiv:1903.12261 (ImageNet-C: blur, JPEG, brightness, pixelation).
        Tellez et al., arXiv:1902.06543 (HED-light and HED-strong: factors of stains).

    Example:
        >>> images = torch.full((1, 3, 8, 8), 0.5)
        >>> images[..., 4:] = 0.9
        >>> blurred = NaturalShift("blur", 2)(images, None)
        >>> bool((blurred[..., 3:5].std() < images[..., 3:5].std()))
        True
        >>> list(NaturalShift.standard(stained=False))[:3]
        ['blur 1', 'blur 2', 'blur 3']
    """

    kind: ShiftKind
    amount: float

    def __post_init__(self) -> None:
        if self.kind not in _RANGES:
            raise ValueError(f"kind must be one of {', '.join(map(repr, get_args(ShiftKind)))}; got {self.kind!r}")
        low, high = _RANGES[self.kind]
        is_number = isinstance(self.amount, int | float) and not isinstance(self.amount, bool)
        if not (is_number and low <= self.amount <= high and self.amount > 0):
            raise ValueError(
                f"the amount of {self.kind!r} must be above 0 and in [{low:g}, {high:g}], got {self.amount!r}"
            )
        if self.kind == "jpeg" and self.amount != round(self.amount):
            raise ValueError(
                f"the amount of 'jpeg' is a quality, a whole number; got {self.amount!r}: give {round(self.amount)}"
            )

    @classmethod
    def standard(cls, *, stained: bool = True) -> dict[str, NaturalShift]:
        """Every kind of shift, mild (1), medium and strong (3).

        Args:
            stained: Whether the images are of stained tissue; without it, as for SRH, there is no "stain".

        Returns:
            The conditions by name: {"stain 1": ..., "stain 2": ..., "stain 3": ..., "blur 1": ...}.
        """
        return {
            f"{kind} {number}": cls(kind, amount)
            for kind, amounts in STANDARD_AMOUNTS.items()
            if stained or kind != "stain"
            for number, amount in enumerate(amounts, 1)
        }

    @property
    def strength(self) -> str:
        """One of `STRENGTHS` for the standard amounts; "" for any other."""
        amounts = STANDARD_AMOUNTS[self.kind]
        return STRENGTHS[amounts.index(self.amount)] if self.amount in amounts else ""

    @property
    def text(self) -> str:
        """What it does, in words."""
        return _TEXTS[self.kind](self.amount)

    @property
    def uses_objective(self) -> bool:
        """False: the objective is not asked."""
        return False

    @property
    def random_start(self) -> bool:
        """Whether chance chooses a direction."""
        return self.kind in ("stain", "brightness")

    def __call__(
        self,
        x: Tensor,
        objective: Objective | None,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: SuccessTest | None = None,
    ) -> Tensor:
        """Shifted images in [0, 1]: shape, dtype and device of x, (n, c, h, w).

        The objective, `start` and `success` are not used: nothing is searched.

        Raises:
            ValueError: For images outside [0, 1], and for a stain of images that have not three channels.
        """
        check_ids(ids, len(x))
        check_start(start, x)
        inside = require_images(detach_images(x), _PIXELS)
        if self.kind == "stain":
            check_colour(inside)
        work = inside.to(torch.promote_types(x.dtype, torch.float32))
        source = NoiseSource(len(x), generator=generator, ids=ids, restart=0, purpose=f"natural shift, {self.kind}")
        shifted = self._shift(work, source) if x.numel() else work.clone()
        return shifted.clamp(0.0, 1.0).to(x.dtype)

    def run(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: SuccessTest | None = None,
        score: bool = True,
    ) -> AttackResult:
        """The same with the objective's value at the images and at the shifted images.

        Args:
            x: (n, c, h, w) in [0, 1].
            objective: Asked for the two values only.
            start: Not used.
            generator: Source of the directions (torch's global one if None).
            ids: (n,) ints that make each image's direction its own.
            success: Asked once about the result.
            score: False does not ask for the values either; both are then 0.

        Returns:
            The result; no forward pass is spent without `score`.
        """
        shifted = self(x, objective, start=start, generator=generator, ids=ids)
        return unguided_result(shifted, x, objective, success=success, score=score)

    def _shift(self, x: Tensor, source: NoiseSource) -> Tensor:
        if self.kind == "blur":
            return blur(x, self.amount)
        if self.kind == "jpeg":
            return compress(x, round(self.amount))
        if self.kind == "resampling":
            return resample(x, self.amount)
        stains = 2 if self.kind == "stain" else 1
        up = source.uniform(stains, 1, 1, like=x) < 0.5
        change = torch.where(up, self.amount, -self.amount).to(x)
        return change_stains(x, change) if self.kind == "stain" else brighten(x, change)


def change_stains(x: Tensor, change: Tensor) -> Tensor:
    """Images (n, 3, h, w) with (1 + change) times the haematoxylin and eosin; change: (n, 2, 1, 1).

    By Beer and Lambert's law the light is dimmed by what is added, so that a change of 0 gives x itself.
    """
    added = to_stains(x)[:, :2] * change
    return x * torch.exp(-mix_planes(added, stain_basis(HAEMATOXYLIN_EOSIN)[:2].to(x)))


def brighten(x: Tensor, change: Tensor) -> Tensor:
    """Images whose value in the HSV model, the largest channel, is moved by change (n, 1, 1, 1).

    Hue and saturation stay; black has neither, and becomes grey.
    """
    value = x.amax(1, keepdim=True)
    moved = (value + change).clamp(0.0, 1.0)
    return torch.where(value > 0, x * (moved / torch.where(value > 0, value, 1.0)), moved)


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with edges continued; the kernel ends at four sigma.

    Planes are added, and not convolved, so that rounding depends neither on the batch nor on threads.
    """
    radius = max(1, math.ceil(_TRUNCATE * sigma))
    weights = [math.exp(-0.5 * (place / sigma) ** 2) for place in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    for dim in (2, 3):
        size = x.shape[dim]
        places = torch.arange(-radius, size + radius, device=x.device).clamp(0, size - 1)
        wide = x.index_select(dim, places)
        sum_ = wide.narrow(dim, radius, size) * (weights[0] / total)
        for place in range(1, radius + 1):
            both = wide.narrow(dim, radius - place, size) + wide.narrow(dim, radius + place, size)
            sum_ = sum_ + both * (weights[place] / total)
        x = sum_
    return x


def resample(x: Tensor, share: float) -> Tensor:
    """Averaged over boxes down to `share` of each side, at least one pixel, and interpolated up again."""
    height, width = x.shape[-2:]
    small = max(1, int(height * share)), max(1, int(width * share))
    return F.interpolate(F.interpolate(x, small, mode="area"), (height, width), mode="bilinear", align_corners=False)


def compress(x: Tensor, quality: int) -> Tensor:
    """Images through JPEG files of a quality, colour as one file, other channels as a grey file each."""
    from PIL import Image

    as_bytes = (x.cpu() * 255).round().to(torch.uint8)
    is_colour = x.shape[1] == 3
    planes = as_bytes.movedim(1, -1) if is_colour else as_bytes.flatten(0, 1)
    read = []
    for plane in planes.numpy():
        file = io.BytesIO()
        Image.fromarray(plane).save(file, "JPEG", quality=quality)
        with Image.open(file) as image:
            read.append(torch.from_numpy(np.array(image)))
    out = torch.stack(read)
    out = out.movedim(-1, 1) if is_colour else out.reshape(as_bytes.shape)
    return out.to(x) / 255
