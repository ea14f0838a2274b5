"""Whether tensors hold NaN or infinity: one reduction for all of them, one read of the device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

CHECKED = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}


def largest_magnitude(tensors: Iterable[Tensor]) -> Tensor | None:
    """Largest absolute value in the tensors, () on the device of the first: NaN or infinite where any value is.

    A maximum overflows only where a value has, which a sum of squares does not promise.  Nothing is read from the
    device.  None where there is no value of a floating-point or complex type.
    """
    values = [tensor.detach() for tensor in tensors if _is_checked(tensor)]
    return get_total_norm(values, math.inf) if values else None


def non_finite_entries(named: Mapping[str, Any]) -> list[str]:
    """Which tensors hold NaN or infinity, as "name (3 of 64 values)", in the order given; other values are passed over.

    One read of the device where all is finite; one more per tensor where something is not.
    """
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor) and _is_checked(value)}
    largest = largest_magnitude(tensors.values())
    if largest is None or math.isfinite(float(largest)):
        return []
    counts = {name: int((~value.detach().isfinite()).sum()) for name, value in tensors.items()}
    return [f"{name} ({count} of {tensors[name].numel()} values)" for name, count in counts.items() if count]


def listed_entries(entries: list[str], *, most: int = 3) -> str:
    """The first entries in words, with the number of those left out."""
    more = f" and {len(entries) - most} more" if len(entries) > most else ""
    return ", ".join(entries[:most]) + more


def _is_checked(tensor: Tensor) -> bool:
    return tensor.dtype in CHECKED and tensor.layout == torch.strided and tensor.numel() > 0
