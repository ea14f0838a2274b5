"""Floating-point numbers: the widest of a device, and rows of any scale brought to one where nothing overflows."""

from __future__ import annotations

import torch
from torch import Tensor

_EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def at_unit_scale(rows: Tensor) -> Tensor:
    """Rows (..., d) divided by the power of two below their largest absolute value, which loses no digit.

    Lengths and products of such rows neither overflow nor vanish, so what does not depend on the scale of a row can be
    computed from them, gradients included.  A row of zeros stays.

    Args:
        rows: float32 or float64.
    """
    integer, exponent = _EXPONENT[rows.dtype]
    largest = rows.detach().abs().amax(-1, keepdim=True)
    power = (largest.view(integer) & exponent).view(rows.dtype)  # 0 below the least normal number
    return rows / torch.where(largest == 0, 1.0, power.clamp_min(torch.finfo(rows.dtype).tiny))
