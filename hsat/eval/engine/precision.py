"""How an encoder computes, where that is not the plain way: it moves the last bits, and so belongs to a number."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hsat.types import EmbeddingFunction


def unusual_computing(encoder: EmbeddingFunction) -> dict[str, Any]:
    """{"computed": {...}} for a record's settings; nothing for a contiguous float32 encoder as it was built.

    memory_format: channels_last weights.  autocast: the dtype of the `torch.autocast` block around the call.
    batchnorm: "folded", by `hsat.models.fold_batchnorm`.  dtype: of the weights.
    """
    if not isinstance(encoder, nn.Module):
        return {}
    found: dict[str, str] = {}
    weights = [parameter for parameter in encoder.parameters() if parameter.is_floating_point()]
    if any(layout_of(weight) == "channels_last" for weight in weights if weight.ndim == 4):
        found["memory_format"] = "channels_last"
    if dtypes := {str(weight.dtype).removeprefix("torch.") for weight in weights} - {"float32"}:
        found["dtype"] = ",".join(sorted(dtypes))
    if name := autocast_name(weights[0].device.type if weights else "cpu"):
        found["autocast"] = name
    if getattr(encoder, "batchnorm_folded", False):
        found["batchnorm"] = "folded"
    return {"computed": found} if found else {}


def autocast_name(device_type: str) -> str:
    """The dtype of the autocast block that is open on a kind of device, such as "bfloat16"; "" for none."""
    if not torch.is_autocast_enabled(device_type):
        return ""
    return str(torch.get_autocast_dtype(device_type)).removeprefix("torch.")


def layout_of(weight: torch.Tensor) -> str:
    """Either "contiguous" or "channels_last", of weights (o, i, h, w)."""
    plain = weight.is_contiguous() or not weight.is_contiguous(memory_format=torch.channels_last)
    return "contiguous" if plain else "channels_last"
