"""Where else gradients are read when they should carry over to other models: ahead, resized, smoothed, all around."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hsat.attacks.placing import beside
from hsat.attacks.running import Look, Run, View, shaped
from hsat.attacks.starts import Noise
from hsat.attacks.threat import Linf


def look_ahead(run: Run, *, scales: int) -> Look:
    """Gradients at the point that the momentum alone leads to, averaged over the copies image / 2^i, i < scales."""
    climb = run.climb

    def look(y: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        along = momentum if isinstance(climb.threat, Linf) else climb.threat.ascent(momentum)
        point = y + (climb.decay or 0.0) * shaped(climb.step_size, y) * along
        value, grad = run.evaluate(point, feasible=False)
        for i in range(1, scales):
            grad = grad + run.evaluate(point, view=_scaled(2.0**-i), feasible=False)[1]
        return value, grad / scales

    return look


def _scaled(factor: float) -> View:
    return lambda images, keep: images * factor


def diverse(run: Run, *, probability: float, resize: float, restart: int) -> Look:
    """Gradients through images that are, with this probability, shrunk and put at a random place on black."""
    noise = Noise(len(run.x), generator=run.generator, ids=run.ids, restart=restart, purpose="diversity")

    def look(y: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        layout = Layout.drawn(noise.uniform(4, like=y), run.x, probability=probability, resize=resize)
        return run.evaluate(y, view=layout.view)

    return look


@dataclass(frozen=True)
class Layout:
    """Where each image lies on a canvas of its own size.  All fields are (n,) on the device of the images.

    height, width: what it is resized to; top, left: its corner; changed: False leaves the image as it is.
    """

    height: Tensor
    width: Tensor
    top: Tensor
    left: Tensor
    changed: Tensor

    @staticmethod
    def drawn(u: Tensor, x: Tensor, *, probability: float, resize: float) -> Layout:
        """A layout from u (n, 4) uniform in [0, 1): the height is one of int(resize h), ..., h - 1, and so on."""
        h, w = x.shape[2:]
        height = _whole(u[:, 0], int(resize * h), h).clamp(min=1)
        width = (height * w + h // 2) // h  # the same share of the width; equal to the height for square images
        width = width.clamp(min=1, max=w)
        top, left = _whole(u[:, 1], 0, h - height), _whole(u[:, 2], 0, w - width)
        return Layout(height, width, top, left, u[:, 3] < probability)

    def view(self, images: Tensor, keep: Tensor | None) -> Tensor:
        """The images `keep` of the batch (None: all), resized (bilinear, pixel centres) and placed; differentiable."""
        fields = (self.height, self.width, self.top, self.left, self.changed)
        height, width, top, left, changed = (f if keep is None else f[keep] for f in fields)
        rows, row_inside = _sources(images.shape[2], height, top)
        columns, column_inside = _sources(images.shape[3], width, left)
        n, h, w = len(images), images.shape[2], images.shape[3]
        grid = torch.stack((columns[:, None, :].expand(n, h, w), rows[:, :, None].expand(n, h, w)), dim=3)
        exact = images.to(torch.promote_types(images.dtype, torch.float32))
        with torch.autocast(images.device.type, enabled=False):
            placed = F.grid_sample(exact, grid.to(exact.dtype), padding_mode="border", align_corners=False)
        placed = placed * (row_inside[:, None, :, None] & column_inside[:, None, None, :])
        return torch.where(changed[:, None, None, None], placed.to(images.dtype), images)


def _sources(size: int, length: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """For each pixel of an axis, (n, size): its source in grid_sample's coordinates, and whether it has one."""
    place = torch.arange(size, device=length.device) - first[:, None]
    inside = (place >= 0) & (place < length[:, None])
    return 2 * (place + 0.5).double() / length[:, None] - 1, inside


def _whole(u: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """Uniform whole numbers in [low, high) from u in [0, 1); low where high is not above it."""
    room = high - low
    room = room.clamp(min=1) if isinstance(room, Tensor) else max(room, 1)
    return low + (u * room).long().clamp(max=room - 1)


def smoothed(look: Look, *, size: int, sigma: float) -> Look:
    """The gradients of another look, blurred with a Gaussian kernel."""
    kernel = gaussian(size, sigma)

    def blurred(y: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = look(y, momentum)
        return value, blur(grad, kernel)

    return blurred


def gaussian(size: int, sigma: float) -> Tensor:
    """(size,) float64 weights proportional to exp(-t^2 / 2) at `size` even steps from t = -sigma to sigma; sum 1.

    This is the published kernel: its number counts the standard deviations that the kernel reaches, not pixels.
    """
    weights = torch.exp(-(torch.linspace(-sigma, sigma, size, dtype=torch.float64) ** 2) / 2)
    return weights / weights.sum()


def blur(grad: Tensor, kernel: Tensor) -> Tensor:
    """Each channel of (n, c, h, w) convolved with kernel along rows and along columns; zero outside."""
    c, reach = grad.shape[1], len(kernel) // 2
    kernel = beside(kernel, grad, grad.dtype)
    with torch.autocast(grad.device.type, enabled=False):
        grad = F.conv2d(grad, kernel[None, None, :, None].expand(c, 1, -1, 1), padding=(reach, 0), groups=c)
        return F.conv2d(grad, kernel[None, None, None, :].expand(c, 1, 1, -1), padding=(0, reach), groups=c)


def variance_tuned(run: Run, *, samples: int, reach: float, restart: int) -> Look:
    """Gradient plus the mean difference to it of the gradients around the iterate before; see VMIFGSM."""
    noise = Noise(len(run.x), generator=run.generator, ids=run.ids, restart=restart, purpose="variance")
    before: tuple[Tensor, Tensor] | None = None

    def variance() -> Tensor | float:  # asked for one step late, so that the last step does not pay for it
        if before is None:
            return 0.0
        y, grad = before
        around = torch.zeros_like(grad)
        for _ in range(samples):
            point = y + reach * (noise.point(y, run.climb.threat, inside=True) - y)
            around = around + run.evaluate(point, feasible=False)[1]
        return around / samples - grad

    def look(y: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal before
        tuning = variance()
        value, grad = run.evaluate(y)
        before = (y, grad)
        return value, grad + tuning

    return look
