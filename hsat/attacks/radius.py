"""The size of a ball: a float, or one per image, or one per channel or pixel."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from hsat.attacks.placing import beside

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


def plain_radius(value: float | Tensor) -> float | Tensor:
    """eps as a float, or as a copy of a tensor of floats; TypeError for anything else."""
    if isinstance(value, Tensor):
        if not value.dtype.is_floating_point:
            raise TypeError(f"a tensor eps must hold floats, got {value.dtype}")
        return value.detach().clone()
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = f"; write {value} without the quotes" if isinstance(value, str) else ""
        raise TypeError(f"eps must be a number or a tensor, got {type(value).__name__} {value!r}{hint}")
    return float(value)


def check_radius(eps: float | Tensor, *, largest: float, reason: str, hint: str = "") -> None:
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


def broadcast(eps: float | Tensor, x: Tensor) -> float | Tensor:
    """eps as a float, or as a float64 tensor that broadcasts against x (n, c, h, w) on the device of x."""
    if not isinstance(eps, Tensor):
        return eps
    if eps.ndim == 1 and eps.shape[0] == x.shape[0]:
        return beside(eps, x, torch.float64)[:, None, None, None]
    if eps.ndim == 4 and all(e in (1, s) for e, s in zip(eps.shape, x.shape, strict=True)):
        return beside(eps, x, torch.float64)
    raise ValueError(
        f"eps of shape {tuple(eps.shape)} does not fit images of shape {tuple(x.shape)}:"
        f" give a float, ({x.shape[0]},) for one eps per image, or four axes that broadcast to the images"
    )


def select(eps: float | Tensor, index: Tensor) -> float | Tensor:
    """eps of the images `index` of a batch."""
    if isinstance(eps, Tensor) and (eps.ndim == 1 or eps.shape[0] > 1):
        return eps[index.to(eps.device)]
    return eps


def text(eps: float | Tensor) -> str:
    """eps as it is written: 8/255 where that is exact, else all digits; a tensor as shape, range and digest."""
    if isinstance(eps, Tensor):
        low, high = (float(v) for v in eps.double().aminmax())
        return f"tensor(shape={tuple(eps.shape)}, min={low:g}, max={high:g}, sha256={digest(eps)[:8]})"
    grey = round(eps * 255)
    return f"{grey}/255" if grey / 255 == eps and 0 < grey < 255 else repr(eps)


def digest(eps: Tensor) -> str:
    """SHA-256 of shape and values."""
    values = eps.detach().double().cpu().contiguous()
    return hashlib.sha256(repr(tuple(eps.shape)).encode() + values.numpy().tobytes()).hexdigest()


def key(eps: float | Tensor) -> object:
    """What eps is compared and hashed by."""
    return (tuple(eps.shape), str(eps.dtype), digest(eps)) if isinstance(eps, Tensor) else eps


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
