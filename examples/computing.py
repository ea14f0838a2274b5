"""Ways to compute that are faster on some machines and move the last bits: --compute of evaluate_whitebox.py."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from hsat.models import Encoder, fold_batchnorm

Way = Literal["channels_last", "bfloat16", "fold_batchnorm"]


def computing_as(encoder: Encoder, ways: Sequence[Way]) -> Encoder:
    """The encoder, or a copy of it with BatchNorm folded, its weights laid out as asked for."""
    if "fold_batchnorm" in ways:
        encoder = fold_batchnorm(encoder)
    return encoder.to(memory_format=torch.channels_last) if "channels_last" in ways else encoder


def precision(ways: Sequence[Way], device: torch.device) -> AbstractContextManager[object]:
    """The block in which to evaluate: autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if "bfloat16" in ways else nullcontext()
