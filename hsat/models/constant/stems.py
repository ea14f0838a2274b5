"""The gradient with respect to the images of a strided convolution on few channels, as one dense convolution.

Stems (7 x 7 with stride 2, patch embeddings of 16 x 16) are where an attack's backward pass ends.  With three channels
to fill, the kernels for strided gradients leave most of a vector register empty.  Written per residue of the stride,
the same sums are a plain convolution of the gradient with stride^2 times as many channels, then a rearrangement
(sub-pixel convolution, Shi et al., arXiv:1609.05158): in our measurements two to seven times faster on CPUs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hsat.models.constant.layer import ConstantLayer, is_channels_last

CHANNELS = 4  # at most; more fill a register by themselves


class DenseKernel(NamedTuple):
    """weight: (in * stride^2, out, taps, taps), to be applied to the gradient; output i takes taps from i - before."""

    weight: Tensor
    before: int
    after: int
    stride: int


def is_stem(conv: nn.Conv2d) -> bool:
    """Square, strided, undilated, ungrouped, on at most CHANNELS channels: where the dense form gains."""
    (k, other), (stride, stride_x), padding = conv.kernel_size, conv.stride, conv.padding
    return (
        conv.in_channels <= CHANNELS
        and k == other
        and stride == stride_x > 1
        and not isinstance(padding, str)
        and padding[0] == padding[1] < k
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def dense_kernel(weight: Tensor, *, stride: int, padding: int) -> DenseKernel:
    """The kernel for a convolution's weight (out, in, k, k).

    With x at s i + r, and tap t of the output at i + t: grad_x[s i + r] = sum_t grad_y[i + t] w[r + padding - s t].
    """
    out, channels, k, _ = weight.shape
    first, last = math.ceil((padding - k + 1) / stride), (stride - 1 + padding) // stride
    taps = [
        (r, t - first, at)
        for r in range(stride)
        for t in range(first, last + 1)
        if 0 <= (at := r + padding - stride * t) < k
    ]
    length = last - first + 1
    dense = weight.new_zeros(channels, stride, stride, out, length, length)
    row, tap, place = (torch.tensor(each, device=weight.device) for each in zip(*taps, strict=True))
    for r, t, at in taps:
        dense[:, r, row, :, t, tap] = weight[:, :, at, place].permute(2, 1, 0)
    return DenseKernel(dense.reshape(channels * stride**2, out, length, length), -first, last, stride)


def image_gradient(gradient: Tensor, kernel: DenseKernel, size: tuple[int, int]) -> Tensor:
    """The gradient (n, in, *size) with respect to the images, of that (n, out, h, w) with respect to the output."""
    wanted = [math.ceil(side / kernel.stride) for side in size]
    after = [n - 1 + kernel.after - (have - 1) for n, have in zip(wanted, gradient.shape[2:], strict=True)]
    padding = max(kernel.before, *after, 0)
    dense = F.conv2d(gradient, kernel.weight, padding=padding)
    begin = padding - kernel.before
    dense = dense[:, :, begin : begin + wanted[0], begin : begin + wanted[1]]
    return F.pixel_shuffle(dense, kernel.stride)[:, :, : size[0], : size[1]]


class Stem(NamedTuple):
    """A constant convolution: its weight and bias as torch takes them, and the kernel for the gradient."""

    weight: Tensor
    bias: Tensor | None
    padding: int
    kernel: DenseKernel


class StemConvolution(ConstantLayer):
    """torch's convolution, whose gradient with respect to the images is `image_gradient`, in their layout.

    exact: leave float32 to torch, whose gradient differs in the last bits.
    """

    def __init__(self, layer: nn.Conv2d, *, exact: bool) -> None:
        super().__init__(layer)
        self._exact = exact

    def takes(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Where the images want a gradient."""
        return x.requires_grad and torch.is_grad_enabled() and not (self._exact and dtype == torch.float32)

    def run(self, x: Tensor) -> Tensor:
        """Images (n, in, h, w) -> (n, out, ...)."""
        kept = self.kept()
        stem = kept.get(x.dtype)
        if stem is None:
            stem = kept[x.dtype] = _constant(self.layer, x.dtype)
        found: Tensor = _Convolution.apply(x, stem)
        return found


def _constant(conv: nn.Conv2d, dtype: torch.dtype) -> Stem:
    assert not isinstance(conv.padding, str)
    weight, padding = conv.weight.detach().to(dtype), conv.padding[0]
    kernel = dense_kernel(weight, stride=conv.stride[0], padding=padding)
    laid = kernel.weight.contiguous(memory_format=torch.channels_last)
    bias = None if conv.bias is None else conv.bias.detach().to(dtype)
    return Stem(weight, bias, padding, kernel._replace(weight=laid))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stem: Stem) -> Tensor:
        ctx.kernel, ctx.size = stem.kernel, (x.shape[2], x.shape[3])
        ctx.layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        return F.conv2d(x, stem.weight, stem.bias, stem.kernel.stride, stem.padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        with torch.autocast("cpu", enabled=False):  # of the caller's backward pass, which torch's gradients ignore
            return image_gradient(gradients[0], ctx.kernel, ctx.size).contiguous(memory_format=ctx.layout), None
