"""One value and one gradient of an objective with respect to the images, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from hsat.types import Objective

FIRST_SCALE = 2.0**12
"""Under float16 the objective is multiplied by this (a power of two, so directions stay) and halved on overflow."""


def check_value(value: Tensor, n: int) -> None:
    """Raise unless the objective returned a scalar or one value per image."""
    if not isinstance(value, Tensor):
        raise TypeError(f"the objective must return a tensor, got {type(value).__name__}")
    if value.shape not in ((), (n,)):
        raise ValueError(
            f"the objective must return a scalar or one value per image, shape ({n},); got {tuple(value.shape)}"
        )


class ImageGradient:
    """Callable (images) -> (value detached, gradient in `work` dtype); keeps the float16 scale between steps.

    Gradients flow to the images only, whatever the caller's grad mode is.  Raises RuntimeError when the objective does
    not depend on the images, and FloatingPointError where `check_finite` finds a non-finite gradient.
    """

    def __init__(self, images: Tensor, work: torch.dtype) -> None:
        kind = images.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        self.work = work
        self.scale = FIRST_SCALE if autocast or images.dtype == torch.float16 else 1.0

    def __call__(self, objective: Objective, images: Tensor) -> tuple[Tensor, Tensor]:
        """Value, () or (n,), and gradient (n, c, h, w)."""
        while True:
            value, grad = self._once(objective, images)
            if self.scale == 1.0 or bool(grad.isfinite().all()):
                return value, grad.to(self.work) / self.scale
            self.scale /= 2.0

    def _once(self, objective: Objective, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            value = objective(leaf)
            check_value(value, len(images))
            if not value.requires_grad:
                raise RuntimeError(
                    "the objective does not depend on the images through the graph:"
                    " was something inside computed under no_grad, detached, or turned into numpy?"
                )
            total = value.sum() if self.scale == 1.0 else value.float().sum() * self.scale
            (grad,) = torch.autograd.grad(total, leaf, allow_unused=True)
        if grad is None:
            raise RuntimeError("the objective does not use the images it is given, so it has no gradient to climb")
        return value.detach(), grad.detach()


def name_images(bad: Tensor) -> str:
    """The indices of a (n,) mask in words, at most ten."""
    index = bad.nonzero().flatten().tolist()
    return f"{index[:10]}{' and more' if len(index) > 10 else ''} ({len(index)} of {len(bad)})"


def check_finite(bad: Tensor) -> None:
    """Raise FloatingPointError naming the images whose gradient was not finite (reads the device)."""
    if bool(bad.any()):
        raise FloatingPointError(
            f"the gradient of the objective is not finite for images {name_images(bad)} of the batch;"
            " look for a division by zero, a log of zero or an overflow in the encoder or the loss"
        )
