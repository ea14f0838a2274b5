"""BatchNorm in evaluation mode as what it is then: one factor and one summand per channel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hsat.models.constant.layer import ConstantLayer


class _Affine(NamedTuple):
    """Shaped (1, c, 1, 1).  gradient: the factor in the dtype of the images, for the backward pass."""

    factor: Tensor
    summand: Tensor
    gradient: Tensor


class ScalingNorm(ConstantLayer):
    """x * factor + summand; torch's own backward pass reads the images again, for gradients that nobody wants here.

    In bfloat16 the forward pass is torch's, which computes in float32 inside.
    """

    def dtype(self, x: Tensor) -> torch.dtype | None:
        """That of the images: autocast leaves BatchNorm alone."""
        return x.dtype if x.dtype in (torch.float32, torch.bfloat16) else None

    def takes(self, x: Tensor, dtype: torch.dtype) -> bool:
        """In evaluation mode with statistics, where the images want a gradient."""
        norm = self.layer
        return (
            x.requires_grad
            and torch.is_grad_enabled()
            and not norm.training
            and norm.running_mean is not None
            and norm.running_var is not None
        )

    def run(self, x: Tensor) -> Tensor:
        """Maps (n, c, h, w) -> the same shape."""
        kept = self.kept()
        affine = kept.get(x.dtype)
        if affine is None:
            affine = kept[x.dtype] = _affine(self.layer, x.dtype)
        found: Tensor = _Scale.apply(x, affine, self)
        return found


def scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """(scale, shift), both (c,) float64, of a BatchNorm that keeps statistics, in evaluation mode."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _affine(norm: nn.BatchNorm2d, dtype: torch.dtype) -> _Affine:
    with torch.no_grad():
        factor, summand = (each.float().view(1, -1, 1, 1) for each in scale_and_shift(norm))
    return _Affine(factor, summand, factor.to(dtype))


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, affine: _Affine, norm: ScalingNorm) -> Tensor:
        ctx.factor = affine.gradient
        return torch.addcmul(affine.summand, x, affine.factor) if x.dtype == torch.float32 else norm.usual(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.factor, None, None
