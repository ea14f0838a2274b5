"""What the replaced forwards have in common: when they step aside, and how they notice changed weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class ConstantLayer(ABC):
    """The forward of one layer while its weights are constant.  A copy or a pickle of the layer gets its usual one."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self._kept: tuple[tuple[tuple[Tensor, int], ...], dict[Any, Any]] = (), {}

    def __reduce__(self) -> tuple[Any, ...]:
        return usual_forward, (self.layer,)

    def __call__(self, input: Tensor) -> Tensor:
        """The layer's output; everything that the faster way does not cover goes the usual one."""
        if torch.compiler.is_compiling() or not _plain_images(input) or not self._constant():
            return self.usual(input)
        dtype = self.dtype(input)
        return self.usual(input) if dtype is None or not self.takes(input, dtype) else self.run(input.to(dtype))

    def usual(self, x: Tensor) -> Tensor:
        """What torch does."""
        found: Tensor = type(self.layer).forward(self.layer, x)
        return found

    @abstractmethod
    def takes(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether `run` is right for these images, to be computed in this dtype, and gains something."""

    @abstractmethod
    def run(self, x: Tensor) -> Tensor:
        """The layer's output for images in the dtype to compute in."""

    def dtype(self, x: Tensor) -> torch.dtype | None:
        """What torch would compute in, or None for what is left to it."""
        found = x.dtype
        if torch.is_autocast_enabled("cpu") and found in (torch.float32, torch.bfloat16):
            found = torch.get_autocast_dtype("cpu")
        if found == torch.bfloat16:
            return found if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
        return found if found == torch.float32 else None

    def kept(self) -> dict[Any, Any]:
        """For `run`: what it made of weights and statistics; empty when they are others than at the last call."""
        now = tuple((each, each._version) for each in self._values())
        of, kept = self._kept
        if len(now) != len(of) or any(a[0] is not b[0] or a[1] != b[1] for a, b in zip(now, of, strict=True)):
            kept = {}
            self._kept = now, kept  # in one stroke: several threads may share a model
        return kept

    def _constant(self) -> bool:
        """Whether the weights are plain and want no gradient, also those that somebody put in for this call."""
        return all(is_plain(each) and not each.requires_grad for each in self._values())

    def _values(self) -> tuple[Tensor, ...]:
        layer = self.layer
        weights = (each for each in (layer.weight, layer.bias) if each is not None)
        return (*weights, *layer.buffers(recurse=False))


def is_plain(values: Tensor) -> bool:
    """float32 (or a counter) on the CPU, with a version to watch."""
    known = type(values) in (nn.Parameter, Tensor) and not values.is_inference()
    return known and values.device.type == "cpu" and (values.dtype == torch.float32 or not values.is_floating_point())


def usual_forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The forward that the layer's class gives it."""
    usual: Callable[[Tensor], Tensor] = type(layer).forward.__get__(layer)
    return usual


def is_channels_last(x: Tensor) -> bool:
    """Whether images lie in channels_last and not, as those of one pixel or one channel do, in both layouts."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _plain_images(x: Tensor) -> bool:
    """Images on CPU that torch would hand to oneDNN, outside of vmap, forward derivatives, tracing, other dispatch."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.numel() > 0
        and torch._C._get_mkldnn_enabled()
        and torch._C._get_tracing_state() is None
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
    )
