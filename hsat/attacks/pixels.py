"""The pixel range: which images an attack admits, and the noise it starts from."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hsat.attacks.floating import round_inside
from hsat.types import ThreatModel

RANGE_TOLERANCE = 1e-6
"""Images may leave [low, high] by this much, for rounding in the pipeline that made them; they are clamped first."""


def check_range(low: float, high: float) -> None:
    """Raise ValueError unless low < high, both finite."""
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"the pixel range needs low < high, both finite; got low={low}, high={high}")


def admit(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
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


def refuse(x: Tensor, low: float, high: float) -> None:
    """Raise the error for images outside the range, with their extremes."""
    if bool(x.isnan().any()):
        raise ValueError("images hold NaN; attacks need finite pixels")
    raise ValueError(
        f"images must lie in [{low:g}, {high:g}]; got values from {float(x.min()):g} to {float(x.max()):g}."
        " Divide 8-bit pixels by 255 and keep normalisation inside the encoder."
    )


def admitted(x: Tensor, low: float, high: float) -> Tensor:
    """x clamped to [low, high]; raises ValueError where `admit` says it must be refused (reads the device)."""
    clamped, outside = admit(x, low, high)
    if bool(outside):
        refuse(x, low, high)
    return clamped


def admit_to(x: Tensor, threat: ThreatModel) -> tuple[Tensor, Tensor]:
    """Images clamped to the threat model's range, and `admit`'s flag; out of range they raise here only on the CPU."""
    if x.ndim != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"images must be (n, c, h, w) floats, got shape {tuple(x.shape)} of {x.dtype}")
    admit = getattr(threat, "admit", None)
    if admit is None:
        return x, torch.zeros((), dtype=torch.bool, device=x.device)
    clamped, outside = admit(x)
    if x.device.type == "cpu" and bool(outside):
        refuse(x, threat.low, threat.high)  # type: ignore[attr-defined]
    return clamped, outside


def admitted_to(x: Tensor, threat: ThreatModel) -> Tensor:
    """Images clamped to the threat model's range; raises ValueError where they must be refused (one device read)."""
    inside, outside = admit_to(x, threat)
    if bool(outside):
        refuse(x, threat.low, threat.high)  # type: ignore[attr-defined]
    return inside


def draw(x: Tensor, generator: torch.Generator | None, source: Callable[..., Tensor]) -> Tensor:
    """Noise of the shape of x, drawn where the generator lives and moved to x; float32, or float64 for float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    device = x.device if generator is None else generator.device
    aside = device.type == "cpu" and x.is_cuda  # page-locked: nothing waits for the copy
    noise = source(x.shape, generator=generator, device=device, dtype=dtype, pin_memory=aside)
    return noise.to(x.device, non_blocking=aside)
