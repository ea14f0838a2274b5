"""Attacks that carry over to models they have not seen: MI-FGSM with gradients that say less about one model.

Gradients are read ahead (Nesterov), of resized copies (input diversity), smoothed (translation invariance), or all
around (variance tuning).
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hsat.attacks.base import GradientAttack, check_counts, check_number, check_steps
from hsat.attacks.initialization import NoiseSource, to_device_of
from hsat.attacks.loop import AscentConfig, AttackState, GradientFunction, InputTransform, broadcast_size
from hsat.attacks.threat import Linf
from hsat.types import ThreatModel


def _momentum_config(attack: NIFGSM | DIFGSM | TIFGSM | VMIFGSM) -> AscentConfig:
    return AscentConfig(
        threat=attack.threat,
        step_size=attack.step_size,
        steps=attack.steps,
        random_start=attack.random_start,
        restarts=attack.restarts,
        decay=attack.decay,
        gradients=attack._gradients,
    )


def _check(attack: NIFGSM | DIFGSM | TIFGSM | VMIFGSM) -> None:
    check_steps(attack.threat, attack.step_size, attack.steps, attack.restarts)
    check_number("decay", attack.decay)


@dataclass(frozen=True, repr=False)
class NIFGSM(GradientAttack):
    """MI-FGSM with gradients at the Nesterov point x + decay * step_size * m.

    With scales > 1 the gradient is the mean over the copies x / 2^i, i = 0 ... scales - 1, at `scales` passes per step
    (SI-NI-FGSM, algorithm 1).  m is MI-FGSM's sum of gradients of mean size 1, which the paper's step follows by its
    sign only.

    Deviations: the point ahead is clamped to the pixel range (not to the ball; the published code does neither); under
    threat models other than Linf it is x + decay * step_size * ascent(m), since m has no length to speak of there.

    Attributes:
        threat, step_size, steps, random_start, restarts: As in `BIM`.
        decay: As in `MIFGSM`.
        scales: Copies whose gradients are averaged, at least 1; 5 in the paper.

    Raises:
        ValueError: For numbers out of range.

    References:
        Lin et al., Nesterov Accelerated Gradient and Scale Invariance, arXiv:1908.06281, section 3.2, eq. 6 to 8.

    Example:
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> NIFGSM(Linf(0.25), step_size=0.25, steps=2)(x, lambda images: images.sum((1, 2, 3)))
        tensor([[[[0.7500, 0.7500]]]])
    """

    threat: ThreatModel
    _: KW_ONLY
    step_size: float
    steps: int
    decay: float = 1.0
    scales: int = 1
    random_start: bool = False
    restarts: int = 1

    def __post_init__(self) -> None:
        _check(self)
        check_counts(scales=self.scales)

    def _config(self) -> AscentConfig:
        return _momentum_config(self)

    def _gradients(self, state: AttackState, restart: int) -> GradientFunction:
        return nesterov(state, scales=self.scales)


@dataclass(frozen=True, repr=False)
class DIFGSM(GradientAttack):
    """MI-FGSM with input diversity: gradients through randomly resized and padded images (M-DI2-FGSM).

    At each step, with this probability, an image is resized (bilinear) to int(resize h), ..., h - 1 rows, and as large
    a share of its columns, and put at a random place on a black image of the old size.  Every image has its own draws.
    The defaults are those of common implementations; the paper resizes 299 pixels to 299 ... 329 on a canvas of 330,
    which only models without a fixed input size can take, and it uses probability 0.5.

    Attributes:
        threat, step_size, steps, random_start, restarts: As in `BIM`.
        decay: As in `MIFGSM`; 0 is the paper's DI2-FGSM without momentum.
        probability: That an image is resized at a step, in [0, 1].
        resize: Least share of the side, in (0, 1]; 1 leaves the images as they are.

    Raises:
        ValueError: For numbers out of range.

    References:
        Xie et al., Improving Transferability with Input Diversity, arXiv:1803.06978, section 3.3, eq. 5 to 7.

    Example:
        >>> x = torch.full((1, 1, 8, 8), 0.5)
        >>> x_adv = DIFGSM(Linf(0.25), step_size=0.25, steps=2)(x, lambda images: images.sum((1, 2, 3)))
        >>> x_adv.max()
        tensor(0.7500)
    """

    threat: ThreatModel
    _: KW_ONLY
    step_size: float
    steps: int
    decay: float = 1.0
    probability: float = 0.5
    resize: float = 0.9
    random_start: bool = False
    restarts: int = 1

    def __post_init__(self) -> None:
        _check(self)
        check_number("probability", self.probability, high=1.0)
        _check_resize(self.resize)

    def _config(self) -> AscentConfig:
        return _momentum_config(self)

    def _gradients(self, state: AttackState, restart: int) -> GradientFunction:
        return input_diversity(state, probability=self.probability, resize=self.resize, restart=restart)


@dataclass(frozen=True, repr=False)
class TIFGSM(GradientAttack):
    """MI-FGSM with gradients that are blurred by a Gaussian kernel: translation invariance.

    Attributes:
        threat, step_size, steps, random_start, restarts: As in `BIM`.
        decay: As in `MIFGSM`.
        size: Odd number of pixels of the kernel's side, 15 in the paper; on small images take a smaller one.
        sigma: How many standard deviations the kernel reaches to each side.
        probability: Above 0 it adds the input diversity of DIFGSM (TI-DIM in the paper); in [0, 1].
        resize: As in DIFGSM.

    Raises:
        ValueError: For numbers out of range.

    References:
        Dong et al., Evading Defenses by Translation-Invariant Attacks, arXiv:1904.02884, section 3.2, eq. 7 and 8
        (TI-MI-FGSM).

    Example:
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> TIFGSM(Linf(0.25), step_size=0.25, steps=2, size=3)(x, lambda images: images.sum((1, 2, 3)))
        tensor([[[[0.7500, 0.7500]]]])
    """

    threat: ThreatModel
    _: KW_ONLY
    step_size: float
    steps: int
    decay: float = 1.0
    size: int = 15
    sigma: float = 3.0
    probability: float = 0.0
    resize: float = 0.9
    random_start: bool = False
    restarts: int = 1

    def __post_init__(self) -> None:
        _check(self)
        check_counts(size=self.size)
        if self.size % 2 == 0:
            raise ValueError(f"size must be odd, so that the kernel has a middle; got {self.size}")
        check_number("sigma", self.sigma)
        check_number("probability", self.probability, high=1.0)
        _check_resize(self.resize)

    def _config(self) -> AscentConfig:
        return _momentum_config(self)

    def _gradients(self, state: AttackState, restart: int) -> GradientFunction:
        diverse = input_diversity(state, probability=self.probability, resize=self.resize, restart=restart)
        return translation_invariant(
            diverse if self.probability > 0 else state.gradient, size=self.size, sigma=self.sigma
        )


@dataclass(frozen=True, repr=False)
class VMIFGSM(GradientAttack):
    """MI-FGSM with variance tuning: each gradient is corrected by how those around the last iterate differed from it.

    m <- decay * m + (g + v) / mean|g + v| (the paper divides by the sum), then v <- mean over `samples` points around x
    of their gradients, minus g.  The points are the threat model's random starts around x with `beta` times its radius,
    inside the pixel range (for Linf uniform in [-beta eps, beta eps]).  Each step but the last costs `samples` more
    passes.

    Attributes:
        threat, step_size, steps, random_start, restarts: As in `BIM`.
        decay: As in `MIFGSM`.
        samples: Points around the iterate, at least 1; 20 in the paper.
        beta: Their radius as a multiple of eps, at least 0; 1.5 in the paper.

    Raises:
        ValueError: For numbers out of range.

    References:
        Wang and He, Enhancing Transferability through Variance Tuning, arXiv:2103.15571, algorithm 1.

    Example:
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> VMIFGSM(Linf(0.25), step_size=0.25, steps=2, samples=2)(x, lambda images: images.sum((1, 2, 3)))
        tensor([[[[0.7500, 0.7500]]]])
    """

    threat: ThreatModel
    _: KW_ONLY
    step_size: float
    steps: int
    decay: float = 1.0
    samples: int = 20
    beta: float = 1.5
    random_start: bool = False
    restarts: int = 1

    def __post_init__(self) -> None:
        _check(self)
        check_counts(samples=self.samples)
        check_number("beta", self.beta)

    def _config(self) -> AscentConfig:
        return _momentum_config(self)

    def _gradients(self, state: AttackState, restart: int) -> GradientFunction:
        return variance_tuning(state, samples=self.samples, beta=self.beta, restart=restart)


def _check_resize(resize: float) -> None:
    if not 0 < resize <= 1:
        raise ValueError(
            f"resize must lie in (0, 1], a share of the image's side; got {resize!r}."
            " Images are shrunk and padded back to their size"
        )


def nesterov(state: AttackState, *, scales: int) -> GradientFunction:
    """Gradients at the point that the momentum alone leads to, averaged over the copies image / 2^i, i < scales."""
    config = state.config

    def gradient(y: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        along = momentum if isinstance(config.threat, Linf) else config.threat.steepest_ascent(momentum)
        point = y + (config.decay or 0.0) * broadcast_size(config.step_size, y) * along
        value, grad = state.evaluate(point, feasible=False)
        for i in range(1, scales):
            grad = grad + state.evaluate(point, transform=_scale(2.0**-i), feasible=False)[1]
        return value, grad / scales

    return gradient


def _scale(factor: float) -> InputTransform:
    return lambda images, keep: images * factor


def input_diversity(state: AttackState, *, probability: float, resize: float, restart: int) -> GradientFunction:
    """Gradients through images that are, with this probability, shrunk and put at a random place on black."""
    noise = NoiseSource(len(state.x), generator=state.generator, ids=state.ids, restart=restart, purpose="diversity")

    def gradient(y: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        resized = ResizePad.draw(noise.uniform(4, like=y), state.x, probability=probability, resize=resize)
        return state.evaluate(y, transform=resized.transform)

    return gradient


@dataclass(frozen=True)
class ResizePad:
    """Input diversity: where each image lies, resized, on a black canvas of its own size.

    All fields are (n,) on the device of the images.  height, width: what it is resized to; top, left: its corner;
    changed: False leaves the image as it is.
    """

    height: Tensor
    width: Tensor
    top: Tensor
    left: Tensor
    changed: Tensor

    @staticmethod
    def draw(u: Tensor, x: Tensor, *, probability: float, resize: float) -> ResizePad:
        """Sizes and places from u (n, 4) uniform in [0, 1): the height is one of int(resize h), ..., h - 1."""
        h, w = x.shape[2:]
        height = _whole_numbers(u[:, 0], int(resize * h), h).clamp(min=1)
        width = (height * w + h // 2) // h  # the same share of the width; equal to the height for square images
        width = width.clamp(min=1, max=w)
        top, left = _whole_numbers(u[:, 1], 0, h - height), _whole_numbers(u[:, 2], 0, w - width)
        return ResizePad(height, width, top, left, u[:, 3] < probability)

    def transform(self, images: Tensor, keep: Tensor | None) -> Tensor:
        """The images `keep` of the batch (None: all), resized (bilinear, pixel centres) and placed; differentiable."""
        fields = (self.height, self.width, self.top, self.left, self.changed)
        height, width, top, left, changed = (f if keep is None else f[keep] for f in fields)
        rows, row_inside = _source_pixels(images.shape[2], height, top)
        columns, column_inside = _source_pixels(images.shape[3], width, left)
        n, h, w = len(images), images.shape[2], images.shape[3]
        grid = torch.stack((columns[:, None, :].expand(n, h, w), rows[:, :, None].expand(n, h, w)), dim=3)
        exact = images.to(torch.promote_types(images.dtype, torch.float32))
        with torch.autocast(images.device.type, enabled=False):
            placed = F.grid_sample(exact, grid.to(exact.dtype), padding_mode="border", align_corners=False)
        placed = placed * (row_inside[:, None, :, None] & column_inside[:, None, None, :])
        return torch.where(changed[:, None, None, None], placed.to(images.dtype), images)


def _source_pixels(size: int, length: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """For each pixel of an axis, (n, size): its source in grid_sample's coordinates, and whether it has one."""
    place = torch.arange(size, device=length.device) - first[:, None]
    inside = (place >= 0) & (place < length[:, None])
    return 2 * (place + 0.5).double() / length[:, None] - 1, inside


def _whole_numbers(u: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """Uniform whole numbers in [low, high) from u in [0, 1); low where high is not above it."""
    room = high - low
    room = room.clamp(min=1) if isinstance(room, Tensor) else max(room, 1)
    return low + (u * room).long().clamp(max=room - 1)


def translation_invariant(gradient: GradientFunction, *, size: int, sigma: float) -> GradientFunction:
    """The gradients of another source, blurred with a Gaussian kernel."""
    kernel = gaussian_kernel(size, sigma)

    def blurred(y: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = gradient(y, momentum)
        return value, blur(grad, kernel)

    return blurred


def gaussian_kernel(size: int, sigma: float) -> Tensor:
    """(size,) float64 weights proportional to exp(-t^2 / 2) at `size` even steps from t = -sigma to sigma; sum 1.

    This is the published kernel: its number counts the standard deviations that the kernel reaches, not pixels.
    """
    weights = torch.exp(-(torch.linspace(-sigma, sigma, size, dtype=torch.float64) ** 2) / 2)
    return weights / weights.sum()


def blur(grad: Tensor, kernel: Tensor) -> Tensor:
    """Each channel of (n, c, h, w) convolved with kernel along rows and along columns; zero outside."""
    c, reach = grad.shape[1], len(kernel) // 2
    kernel = to_device_of(kernel, grad, grad.dtype)
    with torch.autocast(grad.device.type, enabled=False):
        grad = F.conv2d(grad, kernel[None, None, :, None].expand(c, 1, -1, 1), padding=(reach, 0), groups=c)
        return F.conv2d(grad, kernel[None, None, None, :].expand(c, 1, 1, -1), padding=(0, reach), groups=c)


def variance_tuning(state: AttackState, *, samples: int, beta: float, restart: int) -> GradientFunction:
    """Gradient plus the mean difference to it of the gradients around the iterate before; see VMIFGSM."""
    noise = NoiseSource(len(state.x), generator=state.generator, ids=state.ids, restart=restart, purpose="variance")
    before: tuple[Tensor, Tensor] | None = None

    def variance() -> Tensor | float:  # asked for one step late, so that the last step does not pay for it
        if before is None:
            return 0.0
        y, grad = before
        around = torch.zeros_like(grad)
        for _ in range(samples):
            point = y + beta * (noise.random_start(y, state.config.threat) - y)
            around = around + state.evaluate(point, feasible=False)[1]
        return around / samples - grad

    def gradient(y: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal before
        tuning = variance()
        value, grad = state.evaluate(y)
        before = (y, grad)
        return value, grad + tuning

    return gradient
