"""The operations of the augmentation pipelines on many images at once, with a parameter per image.

Every function takes x (m, 3, h, w), floats in [0, 1], and gives images of that kind; x may be written over.  Numbers
per image come as lists of m.  Results are those of torchvision's operations up to float rounding, on any device.
The hue is what makes them worth having: torchvision's takes most of the time of a whole pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""

_LUMA = (0.2989, 0.587, 0.114)
_TINY = 1e-30


def on_part(x: Tensor, chosen: Sequence[int], operation: Callable[[Tensor], Tensor]) -> Tensor:
    """x with the images at the places `chosen` replaced by operation(those images)."""
    if not chosen:
        return x
    if len(chosen) == len(x):
        return operation(x)
    where = to_device_of(chosen, x, torch.int64)
    return x.index_copy_(0, where, operation(x.index_select(0, where)))


def to_device_of(values: Sequence[Any], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers as a tensor on the device of `like`; page-locked on their way to CUDA, which need not wait for them."""
    made = torch.tensor(values, dtype=dtype)
    return (made.pin_memory() if like.is_cuda else made).to(like.device, non_blocking=like.is_cuda)


def per_image(values: Sequence[float], like: Tensor) -> Tensor:
    """m numbers as (m, 1, 1, 1), in the dtype and on the device of `like`."""
    return to_device_of(values, like, like.dtype).view(-1, 1, 1, 1)


def add_noise(x: Tensor, noise: Tensor, std: Sequence[float]) -> Tensor:
    """x + std * noise, clamped; noise has the shape of x and is written over."""
    return noise.mul_(per_image(std, x)).add_(x).clamp_(0.0, 1.0)


def grayscale(x: Tensor) -> Tensor:
    """Each image's luma in all three channels."""
    return _luma(x).expand_as(x).clone()


def brightness(x: Tensor, factor: Sequence[float]) -> Tensor:
    """factor * x, clamped."""
    return x.mul_(per_image(factor, x)).clamp_(0.0, 1.0)


def contrast(x: Tensor, factor: Sequence[float]) -> Tensor:
    """factor * x + (1 - factor) * (mean luma of the image), clamped."""
    mean = _luma(x).mean(dim=(-3, -2, -1), keepdim=True)
    scale = per_image(factor, x)
    return x.mul_(scale).add_((1.0 - scale) * mean).clamp_(0.0, 1.0)


def saturation(x: Tensor, factor: Sequence[float]) -> Tensor:
    """factor * x + (1 - factor) * (luma of the pixel), clamped."""
    scale = per_image(factor, x)
    return x.mul(scale).add_(_luma(x).mul_(1.0 - scale)).clamp_(0.0, 1.0)


def shift_hue(x: Tensor, turns: Sequence[float]) -> Tensor:
    """The hue moved by a share of a turn at unchanged saturation and value (HSV).

    With v the largest channel, c the distance to the smallest and h the hue in sixths of a turn, channel n is
    v - c * clamp(2 - |wrap(h + n)|, 0, 1), where n is 3, 1, -1 for red, green, blue and wrap leads into [-3, 3]: the
    six cases of the usual formula in one.
    """
    red, green, blue = x.unbind(dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # Masks as floats and no torch.where, which takes several times as long on a CPU.
    is_red = torch.eq(red, value).to(x.dtype)
    is_green = torch.eq(green, value).to(x.dtype).mul_(1.0 - is_red)
    is_blue = 1.0 - is_red - is_green
    rise = is_red.mul(green - blue).addcmul_(is_green, blue - red).addcmul_(is_blue, red - green)
    # A pixel without chroma has no hue: its rise is zero too, and any divisor leaves it as it is.
    hue = rise.div_(chroma.clamp_min(_TINY)).add_(is_green, alpha=2.0).add_(is_blue, alpha=4.0)
    hue.add_(per_image(turns, x).squeeze(1), alpha=6.0)
    out = torch.empty_like(x)
    for channel, n in enumerate((3.0, 1.0, -1.0)):
        place = hue + n
        place.sub_(torch.mul(place, 1 / 6).round_().mul_(6.0))
        share = place.abs_().neg_().add_(2.0).clamp_(0.0, 1.0)
        torch.sub(value, share.mul_(chroma), out=out[:, channel])
    return out


def colour_jitter(x: Tensor, orders: Sequence[Sequence[int]], factors: Sequence[Sequence[float | None]]) -> Tensor:
    """Brightness, contrast, saturation and hue, each image in its own order; a factor None leaves its operation out."""
    for place in range(4):
        for which, operation in enumerate((brightness, contrast, saturation, shift_hue)):
            now = {i: factors[i][which] for i, order in enumerate(orders) if order[place] == which}
            given = {i: factor for i, factor in now.items() if factor is not None}
            amounts = list(given.values())
            x = on_part(x, list(given), lambda part, run=operation, by=amounts: run(part, by))  # type: ignore[misc]
    return x


def autocontrast(x: Tensor) -> Tensor:
    """Each channel of each image stretched to [0, 1]; a constant channel stays."""
    low, high = x.amin(dim=(-2, -1), keepdim=True), x.amax(dim=(-2, -1), keepdim=True)
    scale = 1.0 / (high - low)
    flat = ~torch.isfinite(scale)
    low, scale = low.masked_fill(flat, 0.0), scale.masked_fill(flat, 1.0)
    return x.sub_(low).mul_(scale).clamp_(0.0, 1.0)


def solarize(x: Tensor, threshold: float) -> Tensor:
    """1 - x where x is at least the threshold."""
    # |0 - x| or |1 - x|: two passes less than torch.where, and the same bits.
    return x.clone().ge_(threshold).sub_(x).abs_()


def sharpen(x: Tensor, factor: float) -> Tensor:
    """factor * x + (1 - factor) * smooth(x), clamped; smooth is 3 x 3 with weights 1, and 5 in the middle, over 13.

    The outermost pixels stay as they are.
    """
    rows = x[..., :-2, :] + x[..., 1:-1, :]
    rows.add_(x[..., 2:, :])
    smooth = rows[..., :-2] + rows[..., 1:-1]
    smooth.add_(rows[..., 2:])
    middle = x[..., 1:-1, 1:-1]
    smooth.add_(middle, alpha=4.0)
    middle.mul_(factor).add_(smooth, alpha=(1.0 - factor) / 13.0).clamp_(0.0, 1.0)
    return x


def gaussian_blur(x: Tensor, sigma: Sequence[float]) -> Tensor:
    """A Gaussian of 5 x 5 pixels with each image's standard deviation, edges reflected; rows first, then columns."""
    width = per_image(sigma, x)
    near, far = torch.exp(-0.5 / width**2), torch.exp(-2.0 / width**2)
    total = 1.0 + 2.0 * (near + far)
    for dim, padding in ((-1, (2, 2, 0, 0)), (-2, (0, 0, 2, 2))):
        size = x.shape[dim]
        wide = F.pad(x, padding, mode="reflect")
        shifted = [wide.narrow(dim, shift, size) for shift in range(5)]
        out = (shifted[1] + shifted[3]).mul_(near).add_(shifted[2])
        x = out.add_((shifted[0] + shifted[4]).mul_(far)).div_(total)
    return x


def rotate_and_move(x: Tensor, angle: Sequence[float], move: Sequence[tuple[float, float]]) -> Tensor:
    """Turned by `angle` degrees around the middle, then moved (right, down) by whole pixels.

    Each pixel is the nearest of the source; what comes from outside is black.
    """
    m, _, height, width = x.shape
    turn = [math.radians(value) for value in angle]
    rows = []
    for a, (right, down) in zip(turn, move, strict=True):
        cos, sin = math.cos(a), math.sin(a)
        rows.append([cos, sin, -cos * right - sin * down, -sin, cos, sin * right - cos * down])
    back = to_device_of(rows, x, x.dtype).view(m, 2, 3, 1, 1)
    across = torch.arange(width, dtype=x.dtype, device=x.device) - 0.5 * (width - 1)
    along = (torch.arange(height, dtype=x.dtype, device=x.device) - 0.5 * (height - 1))[:, None]
    grid = torch.empty(m, height, width, 2, dtype=x.dtype, device=x.device)
    for axis, half in ((0, 0.5 * width), (1, 0.5 * height)):
        by_column, by_row, moved = (back[:, axis, term] / half for term in range(3))
        torch.add(by_column * across, by_row * along + moved, out=grid[..., axis])
    return F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def erase(x: Tensor, boxes: Sequence[Box]) -> Tensor:
    """Black boxes, one per image."""
    for image, (top, left, height, width) in zip(x, boxes, strict=True):
        image[:, top : top + height, left : left + width] = 0.0
    return x


def _luma(x: Tensor) -> Tensor:
    red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
