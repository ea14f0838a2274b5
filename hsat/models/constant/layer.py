"""What the replaced forwards have in common: when they step aside, and how they notice changed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class ConstantLayer:
    """The forward of one layer while its weights are constant.  A copy or a pickle of the layer gets its usual one."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self._of: tuple[tuple[Tensor, int], ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return usual_forward, (self.layer,)

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output; everything that the faster way does not cover goes the usual one."""
        if torch.compiler.is_compiling() or not _plain_images(x) or any(p.requires_grad for p in self._parameters()):
            return self.usual(x)
        dtype = self.dtype(x)
        return self.usual(x) if dtype is None or not self.takes(x, dtype) else self.run(x.to(dtype))

    def usual(self, x: Tensor) -> Tensor:
        """What torch does."""
        found: Tensor = type(self.layer).forward(self.layer, x)
        return found

    def takes(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether `run` is right for these images, to be computed in this dtype, and gains something."""
        raise NotImplementedError

    def run(self, x: Tensor) -> Tensor:
        """The layer's output for images in the dtype to compute in."""
        raise NotImplementedError

    def dtype(self, x: Tensor) -> torch.dtype | None:
        """What torch would compute in, or None for what is left to it."""
        found = x.dtype
        if torch.is_autocast_enabled("cpu") and found in (torch.float32, torch.bfloat16):
            found = torch.get_autocast_dtype("cpu")
        if found == torch.bfloat16:
            return found if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
        return found if found == torch.float32 else None

    def changed(self) -> bool:
        """Whether the weights or statistics are others than at the last call."""
        now = tuple((each, each._version) for each in (*self._parameters(), *self.layer.buffers(recurse=False)))
        same = len(now) == len(self._of) and all(
            a[0] is b[0] and a[1] == b[1] for a, b in zip(now, self._of, strict=True)
        )
        self._of = now
        return not same

    def _parameters(self) -> tuple[Tensor, ...]:
        return tuple(each for each in (self.layer.weight, self.layer.bias) if each is not None)


def usual_forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The forward that the layer's class gives it."""
    usual: Callable[[Tensor], Tensor] = type(layer).forward.__get__(layer)
    return usual


def is_channels_last(x: Tensor) -> bool:
    """Whether images lie in channels_last and not, as those of one pixel or one channel do, in both layouts."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _plain_images(x: Tensor) -> bool:
    """Images on CPU that torch would hand to oneDNN, outside of vmap, tracing and other dispatch."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.numel() > 0
        and torch._C._get_mkldnn_enabled()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
    )
