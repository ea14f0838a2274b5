"""Augmentation pipelines: static, v0 and v1 of the paper, the last two with a strength that decays over training; he.

A pipeline maps one patch (3, h, w), floats in [0, 1], to (3, size, size) float32 in [0, 1].  All randomness comes from
torch's global CPU generator, so a caller that forks and seeds that generator decides every draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from numbers import Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

AUGMENTATIONS = ("none", "static", "v0", "v1", "he")

Uncropped = Literal["resize", "keep"]

Transform = Callable[[Tensor], Tensor]

PAPER_STATIC_EPOCHS = 50
"""The published training keeps its static augmentation for the first plateau of the dynamic one."""

_JITTER, _HUE = 0.4, 0.1  # at strength 1: brightness, contrast and saturation within 40%, hue within a tenth of a turn
_SMALLEST_SIDE = 5  # the Gaussian blur's kernel; reflection needs at least half of it
_RANGE_SLACK = 1e-6


def resize_patch(x: Tensor, size: tuple[int, int], *, mode: str = "bilinear") -> Tensor:
    """The patch x (c, h, w) resampled to `size` (height, width), antialiased and clamped to [0, 1].

    A patch that has that size already is returned as it is, bit for bit.
    """
    if tuple(x.shape[-2:]) == size:
        return x
    return F.interpolate(x[None], size=size, mode=mode, align_corners=False, antialias=True)[0].clamp(0.0, 1.0)


@dataclass(frozen=True)
class GaussianNoise:
    """Adds white noise whose standard deviation is uniform in [low, high], then clamps to [0, 1].

    The published code calls the two bounds variances but uses the draw as a standard deviation; so does this, and the
    names say so.  The draw comes from torch's generator (there: Python's `random`), so that one seed rules everything.
    """

    low: float
    high: float

    def __call__(self, x: Tensor) -> Tensor:
        """The noisy patch, same shape as x."""
        noise = torch.randn(x.shape, dtype=x.dtype)
        std = self.low + (self.high - self.low) * torch.rand(())
        return (x + std * noise).clamp(0.0, 1.0)


@dataclass(frozen=True)
class CropToSize:
    """With probability `prob` a random crop; then a resize, also where no crop was drawn.

    Attributes:
        size: Side of what leaves; None is the patch's own size.
        prob: Of the crop.
        scale: Range of the crop's share of the area.
        ratio: Range of the crop's aspect.
        mode: Of the resampling.
        uncropped: "resize" gives every patch the same size.  "keep" is the published way: a patch that was not cropped
            stays as large as it came, so that patches of any size but `size` could not be stacked; they are refused.
    """

    size: int | None
    prob: float
    scale: tuple[float, float]
    ratio: tuple[float, float]
    mode: str = "bilinear"
    uncropped: Uncropped = "resize"

    def __call__(self, x: Tensor) -> Tensor:
        """The patch at its final size; draws nothing where `prob` is zero."""
        target = self.check_size(x.shape[-2], x.shape[-1])
        if self.prob > 0.0 and float(torch.rand(())) < self.prob:
            crop = _torchvision().RandomResizedCrop
            top, left, height, width = crop.get_params(x, list(self.scale), list(self.ratio))
            x = x[..., top : top + height, left : left + width]
        return resize_patch(x, target, mode=self.mode)

    def check_size(self, height: int, width: int) -> tuple[int, int]:
        """The size at which a patch of this size leaves; ValueError where uncropped="keep" cannot give it that."""
        target = (height, width) if self.size is None else (self.size, self.size)
        if self.uncropped == "keep" and self.prob < 1.0 and (height, width) != target:
            raise ValueError(
                f"a patch of {height} x {width} pixels that is not cropped keeps its size in the published"
                f" pipelines, and crops have {target[0]} x {target[1]}: the two cannot be stacked."
                f" Use image_size={width}, or uncropped='resize'"
            )
        return target


@dataclass(frozen=True)
class Augmentation:
    """One augmentation pipeline, fixed by its four numbers; `steps` are the operations in order.

    Called on x (3, h, w), floats in [0, 1]; gives (3, image_size, image_size) float32 in [0, 1], or (3, h, w) where
    image_size is None.  x is not changed.  Raises TypeError or ValueError naming what is wrong with x.

    Attributes:
        name: Of the pipeline, see `build_transform`.
        image_size: Side of the images that come out; None keeps a patch's own size.
        strength: In [0, 1].
        prob: In [0, 1].
        steps: The operations.
    """

    name: str
    image_size: int | None
    strength: float
    prob: float
    steps: tuple[Transform, ...] = field(repr=False, compare=False)

    def __call__(self, x: Tensor) -> Tensor:
        """The augmented patch."""
        check_patches([x], self.name)
        x = x.to(torch.float32)
        for step in self.steps:
            x = step(x)
        return x.clamp(0.0, 1.0)


def build_transform(
    name: str,
    *,
    image_size: int | None,
    strength: float = 1.0,
    prob: float = 0.5,
    uncropped: Uncropped = "resize",
) -> Augmentation:
    """The augmentation pipeline called `name`, ending at image_size x image_size.

    "none": only the resize.  "static": flips, noise, autocontrast, solarize, sharpness, blur, affine, crop, erasing,
    each with probability `prob`.  "v0": the same ideas, where `strength` s scales the ranges of noise, colour jitter,
    solarize, blur, erasing, affine and crop, and the probabilities of jitter, solarize, blur, erasing and affine.  "v1"
    (DynACL's): crop, horizontal flip, colour jitter with probability 0.8 s, grayscale with probability 0.2 s.
    "he", for bright-field tissue: mirrored and turned forms, turns by up to 15 s degrees with reflected edges, crops
    down to 1 - 0.6 s of the area, jitter of haematoxylin and eosin in optical density, mild colour jitter, blur; see
    `augment_he`.

    Source: Malik et al. (arXiv:2503.10629) and its published pipelines; parameters agree with them for every strength.
    Deliberate differences: the published output size is always 300, and a patch that was not cropped keeps its size;
    here every patch ends at image_size (with uncropped="keep", patches of another size are refused).  Pixels are
    clamped to [0, 1], after the bicubic crop of v1 too, which overshoots.  The static list's colour jitter has no
    ranges and does nothing, so it is left out.  v0 at strength 0 fails there (blur of width 0); here operations of
    probability zero are left out.

    Args:
        name: One of `AUGMENTATIONS`.
        image_size: Side of the images; None keeps the patch's own size.
        strength: In [0, 1]; it changes nothing in "none" and "static".
        prob: In [0, 1]; it changes nothing in "none", "v1" and "he".
        uncropped: See `CropToSize`.

    Returns:
        The pipeline.

    Raises:
        ValueError: An unknown name or uncropped, a size below 1, or strength or prob outside [0, 1].
        ImportError: torchvision does not load; every name but "none" needs it.
    """
    _check_choices(name, uncropped, prob)
    _check_share("strength", strength)
    if image_size is not None and (isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1):
        raise ValueError(f"image_size must be a whole number of pixels, at least 1, or None; got {image_size!r}")
    steps: tuple[Transform, ...]
    if name == "none":
        steps = (CropToSize(image_size, 0.0, (1.0, 1.0), (1.0, 1.0)),)
    elif name == "static":
        steps = _static_steps(image_size, prob)
    elif name == "v0":
        steps = _v0_steps(image_size, prob, strength)
    elif name == "v1":
        steps = _v1_steps(image_size, strength)
    else:
        steps = _he_steps(image_size, strength)
    if name != "none":
        steps = tuple(replace(step, uncropped=uncropped) if isinstance(step, CropToSize) else step for step in steps)
    return Augmentation(name, image_size, float(strength), float(prob), steps)


@dataclass(frozen=True)
class AugmentationPolicy:
    """A published pipeline over the epochs of a training; its strength comes with each draw.

    Attributes:
        name: The pipeline, see `build_transform`.
        prob: The probability of each operation of "static" and "v0".
        uncropped: See `CropToSize`.
        static_epochs: In epochs below it the static pipeline takes the place of `name`.
        batched: Run hsat's own operations on all views of an item (`augment_batch`) in place of torchvision's on one
            view after another: the same draws, the same images up to float rounding, in a third of the time.

    Raises:
        ValueError: For an unknown name or uncropped, prob outside [0, 1], or negative static_epochs.
    """

    name: str = "v0"
    prob: float = 0.5
    uncropped: Uncropped = "resize"
    static_epochs: int = 0
    batched: bool = False

    def __post_init__(self) -> None:
        _check_choices(self.name, self.uncropped, self.prob)
        if self.static_epochs < 0:
            raise ValueError(f"static_epochs must be 0 or more, got {self.static_epochs}")

    @classmethod
    def paper(cls, name: str = "v0") -> AugmentationPolicy:
        """The published choices: uncropped="keep", and 50 static epochs for "v0" and "v1".

        The first strength of the published training never comes to be used, since the static pipeline runs meanwhile.

        Args:
            name: Of the pipeline, see `build_transform`.

        Returns:
            The policy.
        """
        return cls(name, uncropped="keep", static_epochs=PAPER_STATIC_EPOCHS if name in ("v0", "v1") else 0)

    def pipeline(self, image_size: int | None, *, epoch: int = 0, strength: float = 1.0) -> Augmentation:
        """The pipeline of an epoch, ending at image_size; raises as `build_transform` does.

        Args:
            image_size: Side of the images; None keeps a patch's own size.
            epoch: Number of the epoch, from 0.
            strength: In [0, 1].

        Returns:
            The pipeline.
        """
        name = "static" if epoch < self.static_epochs else self.name
        return _cached_pipeline(name, image_size, strength, self.prob, self.uncropped)


@lru_cache(maxsize=16)
def _cached_pipeline(
    name: str, image_size: int | None, strength: float, prob: float, uncropped: Uncropped
) -> Augmentation:
    return build_transform(name, image_size=image_size, strength=strength, prob=prob, uncropped=uncropped)


@contextmanager
def fork_cpu_rng() -> Iterator[None]:
    """Leave torch's CPU generator as it was, and compute on one thread inside.

    One thread, because sums over a large patch differ in the last bits with the number of threads, and worker processes
    have one.  Devices' generators are neither read nor seeded: transforms run on the CPU.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _static_steps(size: int | None, p: float) -> tuple[Transform, ...]:
    tv = _torchvision()
    return (
        tv.RandomHorizontalFlip(p),
        tv.RandomVerticalFlip(p),
        tv.RandomApply([GaussianNoise(0.01, 0.1)], p),
        tv.RandomAutocontrast(p),
        tv.RandomSolarize(0.2, p),
        tv.RandomAdjustSharpness(2.0, p),
        tv.RandomApply([tv.GaussianBlur(5, (1.0, 1.0))], p),
        tv.RandomApply([tv.RandomAffine(10.0, translate=(0.1, 0.3))], p),
        CropToSize(size, p, (0.08, 1.0), (3 / 4, 4 / 3)),
        tv.RandomErasing(p, scale=(0.02, 0.33), ratio=(0.3, 3.3)),
    )


def _v0_steps(size: int | None, p: float, s: float) -> tuple[Transform, ...]:
    tv = _torchvision()
    before = (tv.RandomHorizontalFlip(p), tv.RandomVerticalFlip(p))
    always = (tv.RandomAutocontrast(p), tv.RandomAdjustSharpness(2.0, p))
    crop = CropToSize(size, p, (1.0 - 0.92 * s, 1.0), (0.75, 1.333))
    if s == 0.0:
        return (*before, *always, crop)
    jitter = tv.ColorJitter(s * _JITTER, s * _JITTER, s * _JITTER, s * _HUE)
    return (
        *before,
        tv.RandomApply([GaussianNoise(0.01 * s, 0.1 * s)], p),
        tv.RandomApply([jitter], p * s),
        always[0],
        tv.RandomSolarize(0.2 + 0.8 * (1.0 - s), p * s),
        always[1],
        tv.RandomApply([tv.GaussianBlur(5, (s, s))], p * s),
        tv.RandomErasing(p * s, scale=(0.02 * s, 0.33 * s), ratio=(0.3, 3.3)),
        tv.RandomApply([tv.RandomAffine(10.0 * s, translate=(0.1 * s, 0.3 * s))], p * s),
        crop,
    )


def _v1_steps(size: int | None, s: float) -> tuple[Transform, ...]:
    tv = _torchvision()
    before = (CropToSize(size, 1.0, (1.0 - 0.9 * s, 1.0), (3 / 4, 4 / 3), "bicubic"), tv.RandomHorizontalFlip(0.5))
    if s == 0.0:
        return before
    jitter = tv.ColorJitter(s * _JITTER, s * _JITTER, s * _JITTER, s * _HUE)
    return (*before, tv.RandomApply([jitter], 0.8 * s), tv.RandomGrayscale(0.2 * s))


def _he_steps(size: int | None, s: float) -> tuple[Transform, ...]:
    from hsat.data import augment_he as he

    tv = _torchvision()
    crop = CropToSize(size, 1.0, (1.0 - 0.6 * s, 1.0), (3 / 4, 4 / 3))
    if s == 0.0:
        return (he.MirrorAndTurn(), crop)
    jitter = tv.ColorJitter(0.15 * s, 0.15 * s, 0.15 * s, 0.03 * s)
    return (
        he.MirrorAndTurn(),
        he.WithProbability(0.5, he.ReflectedTurn(he.TURN * s)),
        crop,
        he.StainJitter(he.STAIN_SPREAD * s, he.STAIN_SHIFT * s),
        he.WithProbability(0.8, jitter),
        he.WithProbability(0.3 * s, tv.GaussianBlur(5, (0.1, 1.0))),
    )


def default_augmentation(kind: str) -> str:
    """The pipeline for patches of this kind: the published "v0" for "srh", "he" for others."""
    return "v0" if kind == "srh" else "he"


def _check_choices(name: str, uncropped: str, prob: float) -> None:
    if name not in AUGMENTATIONS:
        raise ValueError(f"unknown augmentation {name!r}; known are {', '.join(AUGMENTATIONS)}")
    if uncropped not in ("resize", "keep"):
        raise ValueError(f"uncropped must be 'resize' or 'keep', got {uncropped!r}")
    _check_share("prob", prob)


def _check_share(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")


def check_patches(patches: Sequence[Tensor], name: str) -> None:
    """Raise TypeError or ValueError, naming what is wrong, for what the pipeline `name` does not take.

    Their device is read once, however many there are.
    """
    for patch in patches:
        _check_form(patch, name)
    ends: list[list[float]] = torch.stack([torch.stack(torch.aminmax(patch)) for patch in patches]).tolist()
    for low, high in ends:
        if not (low >= -_RANGE_SLACK and high <= 1.0 + _RANGE_SLACK and math.isfinite(low + high)):
            raise ValueError(f"augmentations take values in [0, 1], got {low:g} to {high:g}")


def _check_form(x: Tensor, name: str) -> None:
    smallest = 1 if name == "none" else _SMALLEST_SIDE
    if not isinstance(x, Tensor):
        raise TypeError(f"augmentations take a tensor (3, h, w) with values in [0, 1], got {type(x).__name__}")
    if x.ndim != 3 or x.shape[0] != 3:
        raise ValueError(
            f"augmentations take one patch (3, h, w), got shape {tuple(x.shape)}; call them patch by patch"
        )
    if not x.dtype.is_floating_point:
        raise TypeError(f"augmentations take floats in [0, 1], got {x.dtype}; divide integers by their range")
    if min(x.shape[1:]) < smallest:
        raise ValueError(f"a patch of {x.shape[1]} x {x.shape[2]} pixels is too small, need {smallest} x {smallest}")


def _torchvision() -> Any:
    """torchvision.transforms, or an ImportError that says how to mend the installation."""
    try:
        import torchvision.transforms as tv
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise ImportError(
            f"torchvision does not load ({error}); most often torch and torchvision come from different builds."
            " Install both at once: pip install --force-reinstall torch torchvision"
        ) from error
    return tv
