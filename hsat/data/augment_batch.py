"""Augmentation of many images at once, on the device where they are, with the draws of the pipelines per image.

First the random numbers of a pipeline are drawn for each image, in its order and without touching a pixel: from torch's
global CPU generator exactly as `hsat.data.augment` takes them, so that the same seed gives the same image.  Then
`hsat.data.image_operations` applies them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hsat.data import image_operations as operations
from hsat.data.augment import Augmentation, CropToSize, check_patches, fork_cpu_rng, resize_patch
from hsat.data.image_operations import Box, on_part

ONE_BY_ONE = ("he",)  # pipelines whose operations have no form for many images
CPU_AT_ONCE = 1  # images per pass: one stays in the cache, and sums run in one order whatever else is in the batch
GPU_AT_ONCE = 128  # on a device that computes in parallel; float32 copies of them are what it costs


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


def augment_batch(
    patches: Sequence[Tensor],
    pipeline: Augmentation,
    seeds: Sequence[int],
    *,
    source: Sequence[int] | None = None,
    replay_noise: bool | None = None,
) -> Tensor:
    """Images (n, 3, size, size), float32 in [0, 1]: image i is patch source[i] augmented with seed seeds[i].

    Image i is what `pipeline` makes of its patch after torch.manual_seed(seeds[i]), up to float rounding: same
    operations, same order, same draws.  It depends on its own patch and seed alone, on the CPU to the last bit.
    torch's global generator is left as it was.

    Args:
        patches: (3, h, w) floats in [0, 1], of any sizes, on one device, which is where the work is done; they are not
            changed.
        pipeline: Made by `build_transform`.
        seeds: One per image.
        source: Which patch each image shows; None takes every patch once, in order.
        replay_noise: False takes white noise from a generator on the device, seeded by seeds[i], in place of the CPU's:
            other draws of the same distribution, and the way to go on a GPU.  None replays on the CPU and only there.

    Returns:
        (n, 3, size, size) on the patches' device.

    Raises:
        ValueError: Lengths do not agree, no image is asked for, or images of different sizes come out; and what the
            pipeline's own checks refuse.
        TypeError: An operation has no batched form.
    """
    images = augment_images(patches, pipeline, seeds, source=source, replay_noise=replay_noise)
    sizes = sorted({tuple(image.shape[1:]) for image in images})
    if len(sizes) > 1:
        raise ValueError(f"images of {len(sizes)} sizes come out: {sizes[:3]}; pass image_size so that they agree")
    return torch.stack(images)


def augment_images(
    patches: Sequence[Tensor],
    pipeline: Augmentation,
    seeds: Sequence[int],
    *,
    source: Sequence[int] | None = None,
    replay_noise: bool | None = None,
) -> list[Tensor]:
    """The images of `augment_batch` one by one; they may have different sizes."""
    chosen = list(range(len(patches)) if source is None else source)
    if len(chosen) != len(seeds) or not chosen:
        raise ValueError(f"one seed per image and at least one image: got {len(seeds)} seeds for {len(chosen)} images")
    check_patches(patches, pipeline.name)
    if pipeline.name in ONE_BY_ONE:
        return _augment_one_by_one(patches, pipeline, seeds, chosen)
    device = patches[0].device
    replay = device.type == "cpu" if replay_noise is None else replay_noise
    at_once = CPU_AT_ONCE if device.type == "cpu" else GPU_AT_ONCE
    augmented: list[Tensor] = [patches[0]] * len(chosen)
    with torch.no_grad(), fork_cpu_rng():
        for places in _groups([tuple(patches[which].shape) for which in chosen], at_once):
            images = torch.stack([patches[chosen[place]] for place in places]).to(torch.float32)
            drawn = [_seeded_parameters(pipeline, seeds[place], images, replay) for place in places]
            own = [seeds[place] for place in places]
            for place, image in zip(places, _run(images, pipeline, drawn, own), strict=True):
                augmented[place] = image
    return augmented


def _augment_one_by_one(
    patches: Sequence[Tensor], pipeline: Augmentation, seeds: Sequence[int], chosen: Sequence[int]
) -> list[Tensor]:
    images = []
    with torch.no_grad(), fork_cpu_rng():
        for which, seed in zip(chosen, seeds, strict=True):
            torch.default_generator.manual_seed(seed)
            images.append(pipeline(patches[which].cpu()).to(patches[which].device))
    return images


def _groups(shapes: Sequence[tuple[int, ...]], at_once: int) -> list[list[int]]:
    """Places of equal shape, at most at_once together."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for place, shape in enumerate(shapes):
        by_shape.setdefault(shape, []).append(place)
    return [places[i : i + at_once] for places in by_shape.values() for i in range(0, len(places), at_once)]


def _seeded_parameters(pipeline: Augmentation, seed: int, images: Tensor, replay: bool) -> list[Parameters | None]:
    torch.default_generator.manual_seed(seed)
    return draw_parameters(pipeline, images.shape[-2], images.shape[-1], with_noise=replay)


def _run(
    x: Tensor, pipeline: Augmentation, drawn: Sequence[Sequence[Parameters | None]], seeds: Sequence[int]
) -> Tensor:
    """The steps in order, each on the images that it was drawn for."""
    for k, step in enumerate(pipeline.steps):
        if isinstance(step, CropToSize):
            x = _crop(x, step, [parameters[k] for parameters in drawn])
            continue
        chosen = [i for i, parameters in enumerate(drawn) if parameters[k] is not None]
        values = [drawn[i][k] for i in chosen]
        kind = getattr(step, "transforms", [step])[0]  # inside RandomApply
        own = [seeds[i] for i in chosen]
        x = on_part(x, chosen, lambda part, kind=kind, values=values, own=own: _apply(part, kind, values, own))  # type: ignore[misc]
    return x.clamp_(0.0, 1.0)


def _apply(x: Tensor, step: Any, values: Sequence[Any], seeds: Sequence[int]) -> Tensor:
    """One operation on all images of x; values holds the parameters of each, seeds the seed."""
    kind = type(step).__name__
    if kind not in _OPERATIONS:
        raise TypeError(
            f"augment_batch knows the operations {', '.join(_OPERATIONS)}, not {step!r};"
            " call a pipeline of your own image by image"
        )
    return _OPERATIONS[kind](x, step, values, seeds)


def _add_noise(x: Tensor, values: Sequence[Noise], seeds: Sequence[int]) -> Tensor:
    white = torch.empty_like(x)
    for place, noise, seed in zip(white, values, seeds, strict=True):
        if noise.white is None:
            place.normal_(generator=torch.Generator(x.device).manual_seed(seed))
        else:
            place.copy_(noise.white)
    return operations.add_noise(x, white, [noise.std for noise in values])


_OPERATIONS: dict[str, Callable[[Tensor, Any, Sequence[Any], Sequence[int]], Tensor]] = {
    "RandomHorizontalFlip": lambda x, step, values, seeds: x.flip(-1),
    "RandomVerticalFlip": lambda x, step, values, seeds: x.flip(-2),
    "GaussianNoise": lambda x, step, values, seeds: _add_noise(x, values, seeds),
    "ColorJitter": lambda x, step, values, seeds: operations.colour_jitter(
        x, [jitter.order for jitter in values], [jitter.factors for jitter in values]
    ),
    "RandomAutocontrast": lambda x, step, values, seeds: operations.autocontrast(x),
    "RandomSolarize": lambda x, step, values, seeds: operations.solarize(x, step.threshold),
    "RandomAdjustSharpness": lambda x, step, values, seeds: operations.sharpen(x, step.sharpness_factor),
    "GaussianBlur": lambda x, step, values, seeds: operations.gaussian_blur(x, values),
    "RandomAffine": lambda x, step, values, seeds: operations.rotate_and_move(
        x, [move.angle for move in values], [move.shift for move in values]
    ),
    "RandomErasing": lambda x, step, values, seeds: operations.erase(x, values),
    "RandomGrayscale": lambda x, step, values, seeds: operations.grayscale(x),
}
"""What each step of a pipeline does to a batch, by the name of its class."""


def _crop(x: Tensor, step: CropToSize, boxes: Sequence[Any]) -> Tensor:
    """Crops and resizes, image by image where crops differ; what is not cropped is resized together."""
    target = step.check_size(x.shape[-2], x.shape[-1])
    if all(box is None for box in boxes) and tuple(x.shape[-2:]) == target:
        return x
    images = []
    for image, box in zip(x, boxes, strict=True):
        top, left, height, width = box or (0, 0, *x.shape[-2:])
        images.append(resize_patch(image[:, top : top + height, left : left + width], target, mode=step.mode))
    return images[0][None] if len(images) == 1 else torch.stack(images)


def draw_parameters(
    pipeline: Augmentation, height: int, width: int, *, with_noise: bool = True
) -> list[Parameters | None]:
    """One entry per step of the pipeline for a patch of that size; None where the step does nothing to it.

    with_noise=False leaves the white noise undrawn: the numbers that follow are then others, equally distributed.
    """
    drawn: list[Parameters | None] = []
    for step in pipeline.steps:
        drawn.append(_draw(step, height, width, with_noise))
        if isinstance(step, CropToSize) and step.size is not None:
            height = width = step.size
    return drawn


def _draw(step: Any, height: int, width: int, with_noise: bool) -> Parameters | None:
    kind = type(step).__name__
    if kind == "RandomApply":
        return None if step.p < torch.rand(1) else _draw(step.transforms[0], height, width, with_noise)
    shape = torch.empty(()).expand(3, height, width)  # what torchvision asks a size of; no pixels
    if kind in _DRAWS:
        return _DRAWS[kind](step, shape, with_noise)
    if not torch.rand(1) < step.p:
        return None
    return _erasing_box(step, shape) if kind == "RandomErasing" else True


def _draw_noise(step: Any, shape: Tensor, with_noise: bool) -> Noise:
    white = torch.randn(tuple(shape.shape)) if with_noise else None
    return Noise(white, float(step.low + (step.high - step.low) * torch.rand(())))


def _crop_box(step: Any, shape: Tensor, _: bool) -> Box | None:
    from torchvision.transforms import RandomResizedCrop

    if step.prob > 0.0 and float(torch.rand(())) < step.prob:
        return _box(RandomResizedCrop.get_params(shape, list(step.scale), list(step.ratio)))
    return None


def _draw_jitter(step: Any, _shape: Tensor, _: bool) -> Jitter:
    order, *factors = step.get_params(step.brightness, step.contrast, step.saturation, step.hue)
    return Jitter(tuple(order.tolist()), tuple(factors))


def _draw_move(step: Any, shape: Tensor, _: bool) -> Move:
    size = [shape.shape[2], shape.shape[1]]
    angle, shift, _scale, _shear = step.get_params(step.degrees, step.translate, step.scale, step.shear, size)
    return Move(angle, shift)


_DRAWS: dict[str, Callable[[Any, Tensor, bool], Parameters | None]] = {
    "GaussianNoise": _draw_noise,
    "CropToSize": _crop_box,
    "ColorJitter": _draw_jitter,
    "GaussianBlur": lambda step, shape, with_noise: float(step.get_params(*step.sigma)),
    "RandomAffine": _draw_move,
}
"""What steps draw that toss no coin of their own (or, for crops, another one than torchvision's)."""


def _erasing_box(step: Any, shape: Tensor) -> Box | None:
    *box, value = step.get_params(shape, scale=step.scale, ratio=step.ratio, value=[float(step.value)])
    return None if value is shape else _box(box)  # ten boxes in vain: nothing is erased


def _box(numbers: Any) -> Box:
    top, left, height, width = map(int, numbers)
    return top, left, height, width
