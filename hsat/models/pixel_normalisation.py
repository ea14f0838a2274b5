"""Which mean and std pixels are normalised by, and who says so: it is never assumed in silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hsat.models.zoo import IMAGENET, pretrained_normalisation

Values = Sequence[float] | float
NORMS = ("imagenet", "timm", "none", "image")
HOW_TO_STATE = (
    "mean= and std=, or norm='imagenet', norm='timm' (those of the timm model), norm='none' ([0, 1] as it is), or"
    " norm='image' (each image's channels by their own mean and std)"
)
CALLER, NOBODY = "the caller", ""
LEAST_STD = 8 / 255
"""Added, squared, to the variance of an image's channel, so that what is blank is not blown up with its noise."""


@dataclass(frozen=True)
class PixelNormalisation:
    """Pixels become (x - mean) / std; both None: they stay as they are, unless per_image is set.

    Attributes:
        mean: One value per channel, or one for all, on the [0, 1] scale.
        std: Likewise.
        stated_by: Who says that the weights were trained so, for messages and records; "" where nobody does.
        per_image: Mean and std are those of each channel of each image, see `standardise_images`.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    stated_by: str = NOBODY
    per_image: bool = False

    def __str__(self) -> str:
        by = f"stated by {self.stated_by}" if self.stated_by else "stated by nobody"
        return f"{self.describe()} ({by})"

    def describe(self) -> str:
        """What happens to pixels, in words."""
        if self.per_image:
            return "each channel of each image minus its own mean over its own std"
        if self.mean is None or self.std is None:
            return "pixels in [0, 1] as they are"
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"pixels minus mean ({mean}) over std ({std})"

    @property
    def values(self) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        """Mean and std; both None where they are each image's own."""
        return self.mean, self.std

    def agrees_with(self, other: PixelNormalisation) -> bool:
        """Whether both do the same to pixels, whoever states it.

        Args:
            other: Another one.

        Returns:
            Whether mean, std and per_image are equal.
        """
        return (*self.values, self.per_image) == (*other.values, other.per_image)


def standardise_images(images: Tensor) -> Tensor:
    """Each channel of each image minus its mean, over its standard deviation: the stain's strength goes, tissue stays.

    Instance normalisation of the pixels (Ulyanov et al., arXiv:1607.08022), which is Reinhard's colour transfer (IEEE
    Computer Graphics and Applications 21(5), 2001) to one common colour in RGB: y = (x - m) / sqrt(v + `LEAST_STD`^2),
    m and v the mean and the variance over the pixels.  It is differentiable, so that attacks reckon with it.

    Args:
        images: (n, c, h, w) in [0, 1].

    Returns:
        Same shape; a channel of one value becomes zeros.

    Example:
        >>> import torch
        >>> images = torch.rand(2, 3, 8, 8)
        >>> paler = 0.5 * images + 0.4
        >>> (standardise_images(images) - standardise_images(paler)).abs().max() < 0.1
        tensor(True)
    """
    centred = images - images.mean((2, 3), keepdim=True)
    variance = centred.square().mean((2, 3), keepdim=True)
    return centred / (variance + LEAST_STD**2).sqrt()


def choose_normalisation(
    norm: str | None, mean: Values | None, std: Values | None, *, backbone: nn.Module | None = None
) -> PixelNormalisation | None:
    """What a caller states by `norm`, or by `mean` and `std`.

    Args:
        norm: "imagenet"; "timm", the values that come with the timm model; "none", pixels as they are, or normalised by
            the module itself; "image", each image's channels by their own mean and std (`standardise_images`); or the
            values as text, "m,m,m/s,s,s".
        mean: One value per channel or one for all, on the [0, 1] scale.
        std: Likewise.
        backbone: The timm model, for "timm".

    Returns:
        It, or None where nothing is stated.

    Raises:
        ValueError: For an unknown name, for both forms at once, and as `check_normalisation`.
    """
    mean, std = check_normalisation(mean, std)
    if norm is None:
        return None if mean is None else PixelNormalisation(mean, std, CALLER)
    if mean is not None:
        raise ValueError(f"norm={norm!r} and mean=, std= both state the pixel normalisation; give one of them")
    if norm == "none":
        return PixelNormalisation(None, None, CALLER)
    if norm == "image":
        return PixelNormalisation(None, None, CALLER, per_image=True)
    if norm == "imagenet":
        return PixelNormalisation(*IMAGENET, CALLER)
    if norm == "timm":
        if not isinstance(getattr(backbone, "pretrained_cfg", None), Mapping):
            raise ValueError(
                f"norm='timm' takes mean and std from a timm model, and {type(backbone).__name__} is none; give mean="
                " and std="
            )
        assert backbone is not None
        return PixelNormalisation(*pretrained_normalisation(backbone), CALLER)
    return PixelNormalisation(*check_normalisation(*_parse_values(norm)), CALLER)


def _parse_values(text: str) -> tuple[list[float], list[float]]:
    """Mean and std of a text "m,m,m/s,s,s"."""
    first, slash, second = str(text).partition("/")
    try:
        mean, std = ([float(value) for value in part.split(",")] for part in (first, second if slash else "?"))
    except ValueError:
        raise ValueError(
            f"norm must be one of {', '.join(NORMS)}, or mean and std as text, such as 0.5,0.5,0.5/0.25,0.25,0.25;"
            f" got {text!r}"
        ) from None
    return mean, std


def check_normalisation(
    mean: Values | None, std: Values | None
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """mean and std as tuples, one value per channel (or one for all); both None means no normalisation."""
    if mean is None and std is None:
        return None, None
    if mean is None or std is None:
        missing = "mean" if mean is None else "std"
        raise ValueError(f"mean and std go together; {missing} is missing (no centring is mean=0, no scaling is std=1)")
    centre, scale = ((float(v),) if isinstance(v, int | float) else tuple(map(float, v)) for v in (mean, std))
    if len(centre) != len(scale):
        raise ValueError(f"mean has {len(centre)} values and std has {len(scale)}; both need one per channel")
    if not min(scale) > 0:
        raise ValueError(f"std must be positive, got {scale}")
    if not max(map(abs, centre)) <= 1.5:
        raise ValueError(f"images are in [0, 1], so mean={centre} is out of scale; divide mean and std by 255")
    return centre, scale
