"""Threat models: what an attacker may do to an image.  The only place where eps and the pixel range live."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from hsat.attacks.initialization import draw_noise, to_device_of
from hsat.attacks.projections import l2_norm, linf_bounds, project_l2_box, round_inside, step_toward
from hsat.types import ThreatModel

RANGE_TOLERANCE = 1e-6
"""Images may leave [low, high] by this much, for rounding in the pipeline that made them; they are clamped first."""

_Class = TypeVar("_Class")


def read_only(name: str, convert: Callable[[Any], Any]) -> Callable[[type[_Class]], type[_Class]]:
    """Class decorator: a field of a frozen dataclass keeps convert(value), and reading it gives a copy of a tensor.

    So nobody changes in place what an attack was made with.  The class itself reads the tensor with `kept`.
    """

    def decorate(owner: type[_Class]) -> type[_Class]:
        def read(self: Any) -> Any:
            value = kept(self, name)
            return value.clone() if isinstance(value, Tensor) else value

        def write(self: Any, value: Any) -> None:
            object.__setattr__(self, f"_{name}", convert(value))

        setattr(owner, name, property(read, write))  # written once, by __init__; a frozen dataclass refuses the rest
        return owner

    return decorate


def kept(owner: Any, name: str) -> Any:
    """What a `read_only` field keeps, and no copy of it: not to be changed."""
    return getattr(owner, f"_{name}")


def convert_eps(value: float | Tensor) -> float | Tensor:
    """eps as a float, or as a copy of a tensor of floats; TypeError for anything else."""
    if isinstance(value, Tensor):
        if not value.dtype.is_floating_point:
            raise TypeError(f"a tensor eps must hold floats, got {value.dtype}")
        return value.detach().clone()
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = f"; write {value} without the quotes" if isinstance(value, str) else ""
        raise TypeError(f"eps must be a number or a tensor, got {type(value).__name__} {value!r}{hint}")
    return float(value)


def check_eps(eps: float | Tensor, *, largest: float, reason: str, hint: str = "") -> None:
    """Raise ValueError unless 0 <= eps <= largest everywhere; reason: where the bound comes from; hint: what to do."""
    if isinstance(eps, Tensor):
        if eps.numel() == 0:
            raise ValueError("eps is an empty tensor")
        low, high = (float(v) for v in eps.double().aminmax())
        got = f"values from {low:g} to {high:g}"
    else:
        low = high = eps
        got = f"{eps:g}"
    if not (low >= 0 and high <= largest):  # written so that NaN fails
        bound = f"{largest:g}" if math.isfinite(largest) else "infinity"
        raise ValueError(f"eps must lie in [0, {bound}], {reason}; got {got}{hint}")


def broadcast_eps(eps: float | Tensor, x: Tensor) -> float | Tensor:
    """eps as a float, or as a float64 tensor that broadcasts against x (n, c, h, w) on the device of x."""
    if not isinstance(eps, Tensor):
        return eps
    if eps.ndim == 1 and eps.shape[0] == x.shape[0]:
        return to_device_of(eps, x, torch.float64)[:, None, None, None]
    if eps.ndim == 4 and all(e in (1, s) for e, s in zip(eps.shape, x.shape, strict=True)):
        return to_device_of(eps, x, torch.float64)
    raise ValueError(
        f"eps of shape {tuple(eps.shape)} does not fit images of shape {tuple(x.shape)}:"
        f" give a float, ({x.shape[0]},) for one eps per image, or four axes that broadcast to the images"
    )


def settings_number(value: float | Tensor) -> str:
    """eps or a step size as it is typed: 8/255 where that is exact, else all digits; a tensor as shape and digest."""
    if isinstance(value, Tensor):
        low, high = (float(v) for v in value.double().aminmax())
        return f"tensor(shape={tuple(value.shape)}, min={low:g}, max={high:g}, sha256={tensor_digest(value)[:8]})"
    grey = round(value * 255)
    return f"{grey}/255" if grey / 255 == value and 0 < grey < 255 else repr(value)


def tensor_digest(values: Tensor) -> str:
    """SHA-256 of shape and values."""
    exact = values.detach().double().cpu().contiguous()
    return hashlib.sha256(repr(tuple(values.shape)).encode() + exact.numpy().tobytes()).hexdigest()


def eps_text(eps: float | Tensor) -> str:
    """eps as people write it: "8/255" for whole grey levels, else plain digits ("0.5"), "4/255..8/255" for a tensor."""
    if isinstance(eps, Tensor):
        low, high = (eps_text(float(edge)) for edge in eps.double().aminmax())
        return low if low == high else f"{low}..{high}"
    levels = eps * 255
    whole = round(levels) > 0 and abs(levels - round(levels)) < 1e-4
    plain = abs(round(eps, 3) - eps) < 1e-7  # with room for the rounding of float32
    return f"{round(levels)}/255" if whole and not plain else f"{eps:g}"


def eps_value(eps: float | Tensor) -> float:
    """eps as a number; the largest entry of a tensor."""
    return float(eps.max()) if isinstance(eps, Tensor) else float(eps)


def clamp_to_range(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """x clamped to [low, high], and a 0-d bool: does x leave the range by more than RANGE_TOLERANCE or hold NaN?"""
    if x.ndim != 4:
        raise ValueError(f"images must be (n, c, h, w), got shape {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"images must be floats in [{low:g}, {high:g}], got {x.dtype}")
    if x.numel() == 0:
        return x, torch.zeros((), dtype=torch.bool, device=x.device)
    smallest, largest = x.aminmax()
    fits = (smallest.double() >= low - RANGE_TOLERANCE) & (largest.double() <= high + RANGE_TOLERANCE)
    return x.clamp(round_inside(low, x.dtype, up=True), round_inside(high, x.dtype, up=False)), ~fits


def require_range(x: Tensor, low: float, high: float) -> Tensor:
    """x clamped to [low, high]; raises ValueError where `clamp_to_range` says it must be refused (reads the device)."""
    clamped, refused = clamp_to_range(x, low, high)
    if bool(refused):
        raise_out_of_range(x, low, high)
    return clamped


def detach_images(x: Tensor) -> Tensor:
    """The images cut off from any graph; TypeError for arrays, lists and pictures."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"images must be a tensor (n, c, h, w) of floats, got {type(x).__name__}; write torch.as_tensor(images)"
        )
    return x.detach()


def clamp_images(x: Tensor, threat: ThreatModel) -> tuple[Tensor, Tensor]:
    """Images clamped to the threat model's range, and the flag of `clamp`; refused here on the CPU only."""
    if x.ndim != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"images must be (n, c, h, w) floats, got shape {tuple(x.shape)} of {x.dtype}")
    clamped, refused = threat.clamp(x)
    if x.device.type == "cpu" and bool(refused):
        raise_out_of_range(x, threat.low, threat.high)
    return clamped, refused


def require_images(x: Tensor, threat: ThreatModel) -> Tensor:
    """Images clamped to the threat model's range; raises ValueError where they must be refused (one device read)."""
    clamped, refused = clamp_images(x, threat)
    if bool(refused):
        raise_out_of_range(x, threat.low, threat.high)
    return clamped


def raise_out_of_range(x: Tensor, low: float, high: float) -> None:
    """Raise the error for images outside the range, with their extremes."""
    if bool(x.isnan().any()):
        raise ValueError("images hold NaN; attacks need finite pixels")
    raise ValueError(
        f"images must lie in [{low:g}, {high:g}]; got values from {float(x.min()):g} to {float(x.max()):g}."
        " Divide 8-bit pixels by 255 and keep normalisation inside the encoder."
    )


def check_threat(threat: ThreatModel) -> None:
    """Raise TypeError unless it is a threat model."""
    if isinstance(threat, ThreatModel):
        return
    if callable(getattr(threat, "project", None)):
        name = threat.__name__ if isinstance(threat, type) else type(threat).__name__
        raise TypeError(
            f"{name} is no threat model yet: derive it, class {name}(hsat.ThreatModel), and define eps,"
            " random_start(x, generator), steepest_ascent(grad) and project(x_adv, x)"
        )
    raise TypeError(f"threat must be a threat model such as Linf(8/255), got {threat!r}")


class _Ball(ThreatModel):
    """What Linf and L2 share: a frozen eps and range, compared by value, and projections around checked images."""

    @abstractmethod
    def _projection(self, x: Tensor) -> Callable[[Tensor], Tensor]: ...

    @abstractmethod
    def _noise(self, x: Tensor, generator: torch.Generator | None) -> Tensor: ...

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x plus noise drawn uniformly from the ball, projected; dtype of x.

        Images out of range are refused on the CPU; elsewhere, where asking would make the device wait, only clamped.
        """
        x, _ = clamp_images(x, self)
        return self._projection(x)((x + self._noise(x, generator)).to(x.dtype))

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Nearest point to x_adv in the ball around x and in the pixel range; the wider of the two dtypes."""
        return self._projection(require_range(x, self.low, self.high))(x_adv)

    def projection_at(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """`project` for a fixed x that is already inside [low, high]."""
        return self._projection(x)

    def clamp(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x clamped to the pixel range, and a 0-d bool that says whether it must be refused (no device read)."""
        return clamp_to_range(x, self.low, self.high)

    def select(self, index: Tensor) -> Self:
        """The threat model of the images `index` of a batch."""
        eps = kept(self, "eps")
        if isinstance(eps, Tensor) and (eps.ndim == 1 or eps.shape[0] > 1):
            return dataclasses.replace(self, eps=eps[index.to(eps.device)])  # type: ignore[type-var]
        return self

    def _key(self) -> tuple[object, ...]:
        eps = kept(self, "eps")
        value = (tuple(eps.shape), str(eps.dtype), tensor_digest(eps)) if isinstance(eps, Tensor) else eps
        return (type(self), value, self.low, self.high)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Ball) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(eps={settings_number(kept(self, 'eps'))}, low={self.low}, high={self.high})"

    def _check_range(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"the pixel range needs low < high, both finite; got low={self.low}, high={self.high}")


@read_only("eps", convert_eps)
@dataclass(frozen=True, repr=False, eq=False)
class Linf(_Ball):
    """Every pixel may move by at most eps and stays inside [low, high].

    Projection is exact in float16, bfloat16, float32 and float64: (x_adv.double() - x.double()).abs() <= eps and
    low <= x_adv <= high hold without tolerance, points that are feasible in exact arithmetic stay as they are (in
    float64 one that is feasible because x_adv - x is rounded may move by that rounding), and eps = 0 gives back x.

    Attributes:
        eps: A float in [0, high - low]; or (n,), one per image; or four axes that broadcast to the images, for instance
            (1, c, 1, 1) per channel.  A tensor is copied, compared and hashed by value.
        low: Lower end of the pixel range.
        high: Upper end of the pixel range.

    Raises:
        ValueError: For an eps outside its range or of a shape that does not fit the images, and for images outside
            [low, high] by more than 1e-6 (less is clamped, and everything above refers to the clamped images).

    Example:
        >>> x = torch.tensor([0.0, 0.5, 0.5]).reshape(1, 3, 1, 1)
        >>> far = torch.tensor([-1.0, 0.6, 1.0]).reshape(1, 3, 1, 1)
        >>> Linf(0.25).project(far, x).flatten()
        tensor([0.0000, 0.6000, 0.7500])
        >>> Linf(8 / 255)
        Linf(eps=8/255, low=0.0, high=1.0)
    """

    eps: float | Tensor
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        self._check_range()
        hint = ". For 8 grey levels write eps=8/255."
        check_eps(self.eps, largest=self.high - self.low, reason="the pixel range of the images", hint=hint)

    def steepest_ascent(self, grad: Tensor) -> Tensor:
        """sign(grad).

        Args:
            grad: (n, c, h, w), the gradient of the objective.

        Returns:
            (n, c, h, w) of -1, 0 and 1.
        """
        return grad.sign()

    def _noise(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        return (draw_noise(x, generator, torch.rand) * 2 - 1) * broadcast_eps(kept(self, "eps"), x)

    def _projection(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        bounds: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

        def project(x_adv: Tensor) -> Tensor:
            dtype = torch.promote_types(x_adv.dtype, x.dtype)
            if dtype not in bounds:
                bounds[dtype] = linf_bounds(x, broadcast_eps(kept(self, "eps"), x), self.low, self.high, dtype=dtype)
            return torch.clamp(x_adv.to(dtype), *bounds[dtype])

        return project


@read_only("eps", convert_eps)
@dataclass(frozen=True, repr=False, eq=False)
class L2(_Ball):
    """The whole image may move by at most eps in Euclidean norm and stays inside [low, high].

    Projection gives the nearest point of ball and box together, z = clip(x + t (x_adv - x)) with the largest feasible t
    in [0, 1] (the published form z = clip((x_adv + mu x) / (1 + mu)) with t = 1 / (1 + mu)); shrinking first and
    clipping after would stop short of it.  It is exact in all four float types: the float64 norm of x_adv - x is at
    most eps and low <= x_adv <= high, without tolerance; feasible points stay as they are.

    Attributes:
        eps: A float, or (n,), one per image (or (n, 1, 1, 1)); at most (high - low) sqrt(c h w).
        low: Lower end of the pixel range.
        high: Upper end of the pixel range.

    Raises:
        ValueError: As for `Linf`.

    Example:
        >>> x = torch.zeros(1, 1, 1, 2)
        >>> L2(0.5).project(torch.tensor([0.6, 0.8]).reshape(x.shape), x)
        tensor([[[[0.3000, 0.4000]]]])
    """

    eps: float | Tensor
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        self._check_range()
        check_eps(self.eps, largest=math.inf, reason="a Euclidean norm of images")

    def steepest_ascent(self, grad: Tensor) -> Tensor:
        """grad / |grad| per image; zero stays zero, and tiny gradients do not underflow.

        Args:
            grad: (n, c, h, w), the gradient of the objective.

        Returns:
            (n, c, h, w), each image of Euclidean norm 1 or 0.
        """
        largest = grad.abs().amax((1, 2, 3), keepdim=True)
        grad = grad / torch.where(largest > 0, largest, 1.0)
        length = l2_norm(grad)
        return grad / torch.where(length > 0, length, 1.0)

    def _noise(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        direction = self.steepest_ascent(draw_noise(x, generator, torch.randn))
        share = draw_noise(x[:, :1, :1, :1], generator, torch.rand) ** (1.0 / max(1, x[0].numel() if len(x) else 1))
        return direction * share * self._radius(x)

    def _projection(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        eps, exact = self._radius(x), x.double()

        def project(x_adv: Tensor) -> Tensor:
            dtype = torch.promote_types(x_adv.dtype, x.dtype)
            low, high = round_inside(self.low, dtype, up=True), round_inside(self.high, dtype, up=False)
            boxed = x_adv.to(dtype).clamp(low, high)
            feasible = l2_norm(boxed.double() - exact) <= eps
            # a hair inside the sphere, so that no order of summation finds the norm above eps
            target = project_l2_box(x_adv.double(), exact, eps * (1 - 1e-12), self.low, self.high)
            near = target.to(dtype).clamp(low, high)
            inward = step_toward(near, exact)
            over = (near.double() - exact).abs() > (target - exact).abs()
            for candidate in (torch.where(over, inward, near), inward):
                near = torch.where(l2_norm(near.double() - exact) <= eps, near, candidate)
            return torch.where(feasible, boxed, near)

        return project

    def _radius(self, x: Tensor) -> float | Tensor:
        eps = kept(self, "eps")
        if isinstance(eps, Tensor) and eps.ndim == 4 and eps.shape[1:] != (1, 1, 1):
            raise ValueError(f"an L2 ball has one eps per image; got eps of shape {tuple(eps.shape)}")
        largest = (self.high - self.low) * math.sqrt(x[0].numel()) if len(x) else math.inf
        on_device = isinstance(eps, Tensor) and eps.device.type != "cpu"  # not read for what was checked at creation
        if not on_device:
            shape = tuple(x.shape[1:])
            check_eps(eps, largest=largest, reason=f"the largest distance between two {shape} images")
        return broadcast_eps(eps, x)
