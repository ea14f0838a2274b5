"""What attacks are tried on: images, objectives whose answers are known, and the test of a single result."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hsat.types import ThreatModel

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def expect(condition: bool, message: str) -> None:
    """Raise AssertionError with the message unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def check_feasible(x_adv: Tensor, x: Tensor, threat: ThreatModel) -> None:
    """Raise AssertionError unless x_adv has the form of x and is, without tolerance, where the threat model allows.

    Args:
        x_adv: (n, c, h, w), what an attack made.
        x: (n, c, h, w), the clean images.
        threat: The threat model.

    Raises:
        AssertionError: Naming what is not as it must be.
    """
    expect(x_adv.shape == x.shape, f"shape {tuple(x_adv.shape)} from images of shape {tuple(x.shape)}")
    expect(x_adv.dtype == x.dtype, f"dtype {x_adv.dtype} from images of {x.dtype}")
    expect(x_adv.device == x.device, f"device {x_adv.device} from images on {x.device}")
    expect(not x_adv.requires_grad, "the result is still part of a graph")
    expect(bool(x_adv.isfinite().all()), "the result holds NaN or infinity")
    expect(
        torch.equal(threat.project(x_adv, x), x_adv), f"the result is not feasible: projection onto {threat} moves it"
    )
    name, eps = type(threat).__name__, threat.eps
    gap = x_adv.double() - x.double()
    eps = eps[:, None, None, None] if isinstance(eps, Tensor) and eps.ndim == 1 else eps
    if name == "Linf":
        expect(bool((gap.abs() <= eps).all()), f"a pixel moved by {float(gap.abs().max())}, more than {threat} allows")
    if name == "L2":
        norm = gap.flatten(1).norm(dim=1)[:, None, None, None]
        expect(bool((norm <= eps).all()), f"an image moved by {float(norm.max())}, more than {threat} allows")


def images(n: int = 4, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Images (n, 3, 5, 4) in [0, 1] with many pixels at the ends of the range."""
    x = torch.rand(n, 3, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.4 - 0.2
    return x.clamp(0, 1).to(dtype)


class Probe(nn.Module):
    """An objective with all that an attack must leave alone: parameters, one frozen, gradients, a buffer, modes.

    values: (images, weights (1, 3, 5, 4), none of them near zero) -> one value per image.
    """

    def __init__(self, values: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        slopes = torch.randn(1, 3, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.values = values
        self.weight = nn.Parameter(slopes + slopes.sign() * 0.1)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("count", torch.ones(2))
        self.dropout = nn.Dropout(0.0)
        self.eval()
        self.dropout.train()
        _fill_gradients(self)

    def forward(self, x: Tensor) -> Tensor:
        """One value per image, (n,)."""
        return self.values(x, self.weight.to(x.dtype))


def linear() -> Probe:
    """The sum of weighted pixels: every ball has one best point."""
    return Probe(lambda v, w: (v * w).sum((1, 2, 3)))


def flat() -> Probe:
    """Zero everywhere, with gradient zero."""
    return Probe(lambda v, w: (v * 0.0).sum((1, 2, 3)))


def infinite(only: int | None = None) -> Probe:
    """Infinite values and gradients: for all images, or for one of them."""

    def values(v: Tensor, w: Tensor) -> Tensor:
        scale = torch.full((len(v), 1, 1, 1), torch.inf if only is None else 1.0, dtype=v.dtype)
        if only is not None:
            scale[only] = torch.inf
        return (v * scale).sum((1, 2, 3))

    return Probe(values)


def curved() -> Probe:
    """Smooth, and elementwise up to a sum in order, so that no kernel rounds differently for other batch sizes."""
    return Probe(lambda v, w: ((v * w).sin() + v).flatten(1).cumsum(1)[:, -1])


def bumpy() -> Probe:
    """Many local maxima inside any ball, so that where an ascent ends depends on where it begins; else as `curved`."""
    return Probe(lambda v, w: (v * w * 400).sin().flatten(1).cumsum(1)[:, -1])


def lottery(sign: float) -> Probe:
    """A value without gradient that differs from point to point; of two points, one sign prefers the other."""

    def values(v: Tensor, w: Tensor) -> Tensor:
        drawn = (v.detach() * w * 1000).flatten(1).cumsum(1)[:, -1].sin()
        return sign * drawn + (v * 0.0).sum((1, 2, 3))

    return Probe(values)


def peak(top: Tensor) -> Probe:
    """Zero, with gradient zero, but one at `top` (n, 3, 5, 4): whoever begins there has nowhere better to go."""

    def values(v: Tensor, w: Tensor) -> Tensor:
        near = (v.detach() - top).abs().flatten(1).amax(1) < 1e-6
        return near.to(v.dtype) + (v * 0.0).sum((1, 2, 3))

    return Probe(values)


class Network(nn.Module):
    """A convolution, a batch norm whose statistics must stay, and a dropout that draws nothing."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # layers are made with random weights
            convolution = nn.Conv2d(3, 2, 3, dtype=torch.float32)
        dropout = nn.Dropout(0.0)
        self.layers = nn.Sequential(convolution, nn.BatchNorm2d(2, dtype=torch.float32), nn.ReLU(), dropout)
        self.eval()
        dropout.train()
        generator = torch.Generator().manual_seed(2)
        for parameter in convolution.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) / 5
        convolution.weight.requires_grad_(False)
        _fill_gradients(self)

    def forward(self, x: Tensor) -> Tensor:
        """One value per image, (n,)."""
        z: Tensor = self.layers(x)
        return z.square().flatten(1).sum(1)


def _fill_gradients(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)


class Failing(nn.Module):
    """An objective that raises `error` in its call number `first`, counted from 1, and in all after it."""

    def __init__(self, objective: nn.Module, error: Exception, first: int) -> None:
        super().__init__()
        self.objective, self.error, self.first, self.calls = objective, error, first, 0

    def forward(self, x: Tensor) -> Tensor:
        """The value of the objective, as long as there is one."""
        self.calls += 1
        if self.raised:
            raise self.error
        value: Tensor = self.objective(x)
        return value

    @property
    def raised(self) -> bool:
        """Whether it was asked often enough to raise."""
        return self.calls >= self.first
