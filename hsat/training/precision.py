"""How a training computes: number formats, the optimiser, parallel and compiled encoders."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

FORMATS = {"bf16": torch.bfloat16, "16": torch.float16}


def make_autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """The context of every pass through the encoder, for precision "32", "bf16" or "16"."""
    dtype = FORMATS.get(precision, torch.bfloat16)
    return partial(torch.autocast, device.type, dtype, enabled=precision in FORMATS)


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss so that float16 gradients do not vanish; does nothing for other precisions."""
    return torch.amp.GradScaler(device.type, enabled=precision == "16")


def make_adamw(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, fused: one pass over weights, gradients and moments instead of a dozen, on CPUs and GPUs.

    Args:
        model: Its parameters are optimised.
        lr: Peak learning rate.
        weight_decay: Of AdamW.

    Returns:
        The optimiser.
    """
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in model.parameters())
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=fused or None)


def average_gradients(model: nn.Module) -> DistributedDataParallel:
    """The encoder with gradients averaged over the ranks.

    Buffers are not broadcast: a pass may follow another before the backward pass; see `average_statistics`.
    """
    known = inspect.signature(DistributedDataParallel).parameters  # newer versions of torch call the option otherwise
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: Any = {name: False}
    return DistributedDataParallel(model, **options)


def compile_in_place(model: nn.Module, device: torch.device) -> None:
    """Compile calls of the model, for outer and inner passes; keys of the state dict stay.

    Where its graph breaks, torch says itself under TORCH_LOGS=graph_breaks.

    Raises:
        ValueError: Without a compiler for C++, which torch.compile needs on the CPU.
    """
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise ValueError("--train.compile needs a compiler for C++ (g++ or clang++), and none is in the PATH")
    model.compile()
