"""Stimulated Raman images: from the two recorded channels to the three that encoders see."""

from __future__ import annotations

import torch
from torch import Tensor

RAW_RANGE = 65536
"""Raw 16-bit counts are divided by this, so raw values lie in [0, 65535/65536]."""

OFFSET = 5000 / RAW_RANGE
"""Added to CH3 - CH2, so that most differences stay above zero; exact in binary floating point."""


def srh_to_rgb(raw: Tensor) -> Tensor:
    """Three channels (CH3 - CH2 + 5000/65536, CH2, CH3), clamped to [0, 1], from the two raw ones.

    Equal bit for bit to the transform of the published code in float32.

    Args:
        raw: (..., 2, h, w) floats in [0, 1), CH2 first (the order of planes in the files).

    Returns:
        (..., 3, h, w) in the same dtype, differentiable in raw, so that an attack on the two recorded channels carries
        the third one along.

    Raises:
        TypeError: Anything but a floating tensor.
        ValueError: The third dimension from the end is not 2.
    """
    if not isinstance(raw, Tensor):
        raise TypeError(f"raw must be a tensor, got {type(raw).__name__}; for an array write torch.from_numpy(raw)")
    if not raw.dtype.is_floating_point:
        raise TypeError(f"raw must hold floats in [0, 1), got {raw.dtype}; divide 16-bit counts by {RAW_RANGE}")
    if raw.ndim < 3 or raw.shape[-3] != 2:
        raise ValueError(f"raw must be (..., 2, h, w) with channels CH2 and CH3, got shape {tuple(raw.shape)}")
    ch2, ch3 = raw.unbind(-3)
    return torch.stack((ch3 - ch2 + OFFSET, ch2, ch3), dim=-3).clamp(0.0, 1.0)
