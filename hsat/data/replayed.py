"""What a pipeline would draw for one patch: its random numbers, in its order, without touching a pixel.

The numbers come from torch's global CPU generator exactly as `hsat.data.augment` takes them, so that after the same
seed the operations of `hsat.data.image_operations` with these parameters give the same image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hsat.data.augment import Augmentation, CropToSize
from hsat.data.image_operations import Box


class Noise(NamedTuple):
    """White noise (3, h, w), or None where it is to be drawn on the device, and its standard deviation."""

    white: Tensor | None
    std: float


class Jitter(NamedTuple):
    """The order of brightness (0), contrast, saturation and hue (3), and their factors."""

    order: tuple[int, ...]
    factors: tuple[float | None, ...]


class Move(NamedTuple):
    """Degrees, and pixels to the right and down."""

    angle: float
    shift: tuple[float, float]


Parameters = bool | float | Noise | Jitter | Move | Box
"""Of one operation: True where it has none of its own; a number is the blur's width."""


def draw_parameters(
    pipeline: Augmentation, height: int, width: int, *, with_noise: bool = True
) -> list[Parameters | None]:
    """One entry per step of the pipeline for a patch of that size; None where the step does nothing to it.

    with_noise=False leaves the white noise undrawn: the numbers that follow are then others, equally distributed.
    """
    found: list[Parameters | None] = []
    for step in pipeline.steps:
        found.append(_draw(step, height, width, with_noise))
        if isinstance(step, CropToSize) and step.size is not None:
            height = width = step.size
    return found


def _draw(step: Any, height: int, width: int, with_noise: bool) -> Parameters | None:
    kind = type(step).__name__
    if kind == "RandomApply":
        return None if step.p < torch.rand(1) else _draw(step.transforms[0], height, width, with_noise)
    shape = torch.empty(()).expand(3, height, width)  # what torchvision asks a size of; no pixels
    if kind in _DRAWS:
        return _DRAWS[kind](step, shape, with_noise)
    if not torch.rand(1) < step.p:
        return None
    return _erased(step, shape) if kind == "RandomErasing" else True


def _noise(step: Any, shape: Tensor, with_noise: bool) -> Noise:
    white = torch.randn(tuple(shape.shape)) if with_noise else None
    return Noise(white, float(step.low + (step.high - step.low) * torch.rand(())))


def _cropped(step: Any, shape: Tensor, _: bool) -> Box | None:
    from torchvision.transforms import RandomResizedCrop

    if step.prob > 0.0 and float(torch.rand(())) < step.prob:
        return _box(RandomResizedCrop.get_params(shape, list(step.scale), list(step.ratio)))
    return None


def _jitter(step: Any, _shape: Tensor, _: bool) -> Jitter:
    order, *factors = step.get_params(step.brightness, step.contrast, step.saturation, step.hue)
    return Jitter(tuple(order.tolist()), tuple(factors))


def _move(step: Any, shape: Tensor, _: bool) -> Move:
    size = [shape.shape[2], shape.shape[1]]
    angle, shift, _scale, _shear = step.get_params(step.degrees, step.translate, step.scale, step.shear, size)
    return Move(angle, shift)


_DRAWS: dict[str, Callable[[Any, Tensor, bool], Parameters | None]] = {
    "GaussianNoise": _noise,
    "CropToSize": _cropped,
    "ColorJitter": _jitter,
    "GaussianBlur": lambda step, shape, with_noise: float(step.get_params(*step.sigma)),
    "RandomAffine": _move,
}
"""What steps draw that toss no coin of their own (or, for crops, another one than torchvision's)."""


def _erased(step: Any, shape: Tensor) -> Box | None:
    *box, value = step.get_params(shape, scale=step.scale, ratio=step.ratio, value=[float(step.value)])
    return None if value is shape else _box(box)  # ten boxes in vain: nothing is erased


def _box(numbers: Any) -> Box:
    top, left, height, width = map(int, numbers)
    return top, left, height, width
