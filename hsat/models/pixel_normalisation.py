"""Which mean and std pixels are normalised by, and who says so: it is never assumed in silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from hsat.models.zoo import IMAGENET, pretrained_normalisation

Values = Sequence[float] | float
NORMS = ("imagenet", "timm", "none")
HOW_TO_STATE = (
    "mean= and std=, or norm='imagenet', norm='timm' (those of the timm model), or norm='none' ([0, 1] as it is)"
)
CALLER, NOBODY = "the caller", ""


@dataclass(frozen=True)
class PixelNormalisation:
    """Pixels become (x - mean) / std; both None: they stay as they are.

    Attributes:
        mean: One value per channel, or one for all, on the [0, 1] scale.
        std: Likewise.
        stated_by: Who says that the weights were trained so, for messages and records; "" where nobody does.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    stated_by: str = NOBODY

    def __str__(self) -> str:
        by = f"stated by {self.stated_by}" if self.stated_by else "stated by nobody"
        return f"{self.describe()} ({by})"

    def describe(self) -> str:
        """What happens to pixels, in words."""
        if self.mean is None or self.std is None:
            return "pixels in [0, 1] as they are"
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"pixels minus mean ({mean}) over std ({std})"

    @property
    def values(self) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        """Mean and std."""
        return self.mean, self.std


def choose_normalisation(
    norm: str | None, mean: Values | None, std: Values | None, *, backbone: nn.Module | None = None
) -> PixelNormalisation | None:
    """What a caller states by `norm`, or by `mean` and `std`.

    Args:
        norm: "imagenet"; "timm", the values that come with the timm model; "none", pixels as they are, or normalised by
            the module itself; or the values as text, "m,m,m/s,s,s".
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
