"""Threat models: what an attacker may do to an image.  The only place where eps and the pixel range live."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hsat.attacks import radius
from hsat.attacks.ball_and_box import nearest_in_ball_and_box, norm
from hsat.attacks.floating import next_float, round_inside
from hsat.attacks.pixels import admit, admitted, check_range, draw
from hsat.attacks.radius import kept, plain_radius, read_only

_T = TypeVar("_T", bound="Linf | L2")


def _select(threat: _T, index: Tensor) -> _T:
    eps = radius.select(kept(threat, "eps"), index)
    return threat if eps is kept(threat, "eps") else dataclasses.replace(threat, eps=eps)


def _key(threat: Linf | L2) -> tuple[object, ...]:
    return (type(threat), radius.key(kept(threat, "eps")), threat.low, threat.high)


def _text(threat: Linf | L2) -> str:
    return f"{type(threat).__name__}(eps={radius.text(kept(threat, 'eps'))}, low={threat.low}, high={threat.high})"


@read_only("eps", plain_radius)
@dataclass(frozen=True, repr=False, eq=False)
class Linf:
    """Every pixel may move by at most eps and stays inside [low, high].

    eps: a float in [0, high - low]; or (n,), one per image; or four axes that broadcast to the images, for instance
    (1, c, 1, 1) per channel.  A tensor is copied, compared and hashed by value.
    Projection is exact in float16, bfloat16, float32 and float64: (x_adv.double() - x.double()).abs() <= eps and
    low <= x_adv <= high hold without tolerance, feasible points stay as they are, and eps = 0 gives back x.
    Raises ValueError for an eps outside its range or of a shape that does not fit the images, and for images outside
    [low, high] by more than 1e-6 (less is clamped, and everything above refers to the clamped images).
    """

    eps: float | Tensor
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_range(self.low, self.high)
        hint = ". For 8 grey levels write eps=8/255."
        radius.check_radius(self.eps, largest=self.high - self.low, reason="the pixel range of the images", hint=hint)

    def start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x plus uniform noise in [-eps, eps], projected; dtype of x."""
        return self.start_inside(admitted(x, self.low, self.high), generator)

    def start_inside(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`start` for an x that is already inside [low, high]: nothing is read from the device."""
        noise = (draw(x, generator, torch.rand) * 2 - 1) * radius.broadcast(kept(self, "eps"), x)
        return self.around(x)((x + noise).to(x.dtype))

    def ascent(self, grad: Tensor) -> Tensor:
        """sign(grad)."""
        return grad.sign()

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Nearest point to x_adv in the ball around x and in the pixel range; the wider of the two dtypes."""
        return self.around(admitted(x, self.low, self.high))(x_adv)

    def around(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """`project` for a fixed x that is already inside [low, high]: the bounds are formed once per dtype."""
        bounds: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

        def project(x_adv: Tensor) -> Tensor:
            dtype = torch.promote_types(x_adv.dtype, x.dtype)
            if dtype not in bounds:
                bounds[dtype] = self._bounds(x, dtype)
            return torch.clamp(x_adv.to(dtype), *bounds[dtype])

        return project

    def _bounds(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        eps, exact = radius.broadcast(kept(self, "eps"), x), x.double()

        def edge(*, up: bool) -> Tensor:
            def inside(t: Tensor) -> Tensor:
                return (t.double() - exact).abs() <= eps

            near = (exact + eps if up else exact - eps).to(dtype)
            inner, outer = next_float(near, up=not up), next_float(near, up=up)
            # rounding to nearest errs by half a float at most, so one float inward always passes the check
            return torch.where(inside(near), torch.where(inside(outer), outer, near), inner)

        lower = edge(up=False).clamp(min=round_inside(self.low, dtype, up=True))
        return lower, edge(up=True).clamp(max=round_inside(self.high, dtype, up=False))

    def admit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x clamped to the pixel range, and a 0-d bool that says whether it must be refused (no device read)."""
        return admit(x, self.low, self.high)

    def select(self, index: Tensor) -> Linf:
        """The threat model of the images `index` of a batch."""
        return _select(self, index)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Linf) and _key(self) == _key(other)

    def __hash__(self) -> int:
        return hash(_key(self))

    def __repr__(self) -> str:
        return _text(self)


@read_only("eps", plain_radius)
@dataclass(frozen=True, repr=False, eq=False)
class L2:
    """The whole image may move by at most eps in Euclidean norm and stays inside [low, high].

    eps: a float, or (n,), one per image (or (n, 1, 1, 1)); at most (high - low) sqrt(c h w).
    Projection gives the nearest point of ball and box together, z = clip(x + t (x_adv - x)) with the largest
    feasible t in [0, 1] (the published form z = clip((x_adv + mu x) / (1 + mu)) with t = 1 / (1 + mu)); shrinking
    first and clipping after would stop short of it.  It is exact in all four float types: the float64 norm of
    x_adv - x is at most eps and low <= x_adv <= high, without tolerance; feasible points stay as they are.
    Raises ValueError as Linf does.
    """

    eps: float | Tensor
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_range(self.low, self.high)
        radius.check_radius(self.eps, largest=math.inf, reason="a Euclidean norm of images")

    def start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x plus noise drawn uniformly from the ball, projected; dtype of x."""
        return self.start_inside(admitted(x, self.low, self.high), generator)

    def start_inside(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`start` for an x that is already inside [low, high]: nothing is read from the device."""
        direction = self.ascent(draw(x, generator, torch.randn))
        reach = draw(x[:, :1, :1, :1], generator, torch.rand) ** (1.0 / max(1, x[0].numel() if len(x) else 1))
        return self.around(x)((x + direction * reach * self._radius(x)).to(x.dtype))

    def ascent(self, grad: Tensor) -> Tensor:
        """grad / |grad| per image; zero stays zero, and tiny gradients do not underflow."""
        largest = grad.abs().amax((1, 2, 3), keepdim=True)
        grad = grad / torch.where(largest > 0, largest, 1.0)
        length = norm(grad)
        return grad / torch.where(length > 0, length, 1.0)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Nearest point to x_adv in the ball around x and in the pixel range; the wider of the two dtypes."""
        return self.around(admitted(x, self.low, self.high))(x_adv)

    def around(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """`project` for a fixed x that is already inside [low, high]."""
        eps, exact = self._radius(x), x.double()

        def project(x_adv: Tensor) -> Tensor:
            dtype = torch.promote_types(x_adv.dtype, x.dtype)
            low, high = round_inside(self.low, dtype, up=True), round_inside(self.high, dtype, up=False)
            boxed = x_adv.to(dtype).clamp(low, high)
            feasible = norm(boxed.double() - exact) <= eps
            # a hair inside the sphere, so that no order of summation finds the norm above eps
            wanted = nearest_in_ball_and_box(x_adv.double(), exact, eps * (1 - 1e-12), self.low, self.high)
            near = wanted.to(dtype).clamp(low, high)
            inward = _toward(near, exact)
            over = (near.double() - exact).abs() > (wanted - exact).abs()
            for candidate in (torch.where(over, inward, near), inward):
                near = torch.where(norm(near.double() - exact) <= eps, near, candidate)
            return torch.where(feasible, boxed, near)

        return project

    def _radius(self, x: Tensor) -> float | Tensor:
        eps = kept(self, "eps")
        if isinstance(eps, Tensor) and eps.ndim == 4 and eps.shape[1:] != (1, 1, 1):
            raise ValueError(f"an L2 ball has one eps per image; got eps of shape {tuple(eps.shape)}")
        largest = (self.high - self.low) * math.sqrt(x[0].numel()) if len(x) else math.inf
        read = isinstance(eps, Tensor) and eps.device.type != "cpu"  # of a device, for what was checked at creation
        if not read:
            shape = tuple(x.shape[1:])
            radius.check_radius(eps, largest=largest, reason=f"the largest distance between two {shape} images")
        return radius.broadcast(eps, x)

    def admit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x clamped to the pixel range, and a 0-d bool that says whether it must be refused (no device read)."""
        return admit(x, self.low, self.high)

    def select(self, index: Tensor) -> L2:
        """The threat model of the images `index` of a batch."""
        return _select(self, index)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, L2) and _key(self) == _key(other)

    def __hash__(self) -> int:
        return hash(_key(self))

    def __repr__(self) -> str:
        return _text(self)


def _toward(y: Tensor, x: Tensor) -> Tensor:
    """Every element of y moved by one float towards x, unless it is there."""
    lower, upper = next_float(y, up=False), next_float(y, up=True)
    return torch.where(y.double() > x, lower, torch.where(y.double() < x, upper, y))
