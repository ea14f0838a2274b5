"""Convolutions that lay their weights out once, and not again in every pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hsat.models.constant.layer import ConstantLayer, is_channels_last

SMALLEST = 2**14  # weights; smaller ones are laid out faster than Python looks them up
_ALONE = 20480  # values of an image, at most
_SHAPES = 2  # kept per convolution: that of full batches and that of the last one
_OPERATIONS = (  # of torch's compiler, which lays out constant weights as well
    "_convolution_pointwise",
    "_convolution_transpose_pointwise",
    "_reorder_convolution_weight",
    "_reorder_convolution_transpose_weight",
    "_is_mkldnn_bf16_supported",
)


_STATE = ("_get_mkldnn_enabled", "_get_tracing_state", "_functorch", "_len_torch_dispatch_stack")  # what layers ask


def torch_lays_out() -> bool:
    """Whether this torch has the operations, and says what has to be known before they may be used."""
    known = all(hasattr(torch._C, name) for name in _STATE) and hasattr(torch.autograd.forward_ad, "_current_level")
    return (
        known
        and getattr(torch._C, "_has_mkldnn", False)
        and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATIONS)
    )


def is_large(conv: nn.Conv2d) -> bool:
    """Ungrouped, with zero padding and at least SMALLEST weights: where keeping the layout gains."""
    return (
        conv.groups == 1
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and conv.weight.numel() >= SMALLEST
    )


class PackedConvolution(ConstantLayer):
    """The same bits as torch's convolution, for images in channels_last; see `is_large`.

    torch arranges (and under autocast casts) the weights anew in each forward and each backward pass, which for small
    batches takes up to a third of the pass.
    """

    def takes(self, x: Tensor, dtype: torch.dtype) -> bool:
        """In channels_last; torch has other ways, with other bits, for small images alone and, on one thread, few."""
        n = x.shape[0]
        others = (n < 16 and torch.get_num_threads() == 1) or (n == 1 and x.numel() <= _ALONE)
        return is_channels_last(x) and not others

    def run(self, x: Tensor) -> Tensor:
        """Images (n, in, h, w) -> (n, out, ...)."""
        kept, key = self.kept(), (x.dtype, x.shape)
        layouts = kept.get(key)
        if layouts is None:
            if not _fits(self.layer, x):
                return self.usual(x)  # which says what is wrong
            layouts = _lay_out(self.layer, x)
            for old in list(kept)[: 1 - _SHAPES or None]:
                kept.pop(old, None)
            kept[key] = layouts
        found: Tensor = _Convolution.apply(x, layouts)
        return found


class _Geometry(NamedTuple):
    padding: list[int]
    stride: list[int]
    dilation: list[int]


class _Layouts(NamedTuple):
    """The weights as the forward and the backward pass want them; `extra` is the rest that a stride leaves."""

    forward: Tensor
    backward: Tensor
    bias: Tensor | None
    extra: list[int]
    plain: Tensor
    geometry: _Geometry


def _fits(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether images have the layer's channels and room for its kernel."""
    assert not isinstance(conv.padding, str)
    sides = zip(x.shape[2:], conv.padding, conv.dilation, conv.kernel_size, strict=True)
    return x.shape[1] == conv.in_channels and all(h + 2 * p > d * (k - 1) for h, p, d, k in sides)


@torch.inference_mode(False)  # for passes that want a graph, too
@torch.no_grad()
def _lay_out(conv: nn.Conv2d, x: Tensor) -> _Layouts:
    assert not isinstance(conv.padding, str)
    geometry = _Geometry(list(conv.padding), list(conv.stride), list(conv.dilation))
    plain = conv.weight.detach().to(x.dtype)
    each = list(zip(*geometry, strict=True))
    reach = [x.shape[2 + i] + 2 * p - d * (plain.shape[2 + i] - 1) - 1 for i, (p, _, d) in enumerate(each)]
    side = [r // s + 1 for r, (_, s, _) in zip(reach, each, strict=True)]
    extra = [r % s for r, (_, s, _) in zip(reach, each, strict=True)]
    output = [x.shape[0], plain.shape[0], *side]
    forward = torch.ops.mkldnn._reorder_convolution_weight(plain, *geometry, 1, list(x.shape))
    backward = torch.ops.mkldnn._reorder_convolution_transpose_weight(
        plain, geometry.padding, extra, geometry.stride, geometry.dilation, 1, output
    )
    bias = None if conv.bias is None else conv.bias.detach().to(x.dtype)
    return _Layouts(forward, backward, bias, extra, plain, geometry)


class _Convolution(torch.autograd.Function):
    """A convolution with laid-out weights; its gradient with respect to the images only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layouts: _Layouts) -> Tensor:
        ctx.layouts = layouts
        found: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, layouts.forward, layouts.bias, *layouts.geometry, 1, "none", [], ""
        )
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        layouts: _Layouts = ctx.layouts
        padding, stride, dilation = layouts.geometry
        if torch.is_grad_enabled():  # a graph of this pass is wanted
            with torch.autocast("cpu", enabled=False):  # of the caller's backward pass, which torch's gradients ignore
                again = F.conv_transpose2d(gradient, layouts.plain, None, stride, padding, layouts.extra, 1, dilation)
            return again, None
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        found: Tensor = torch.ops.mkldnn._convolution_transpose_pointwise(
            gradient, layouts.backward, None, padding, layouts.extra, stride, dilation, 1, "none", [], ""
        )
        return found, None
