"""Objective, ThreatModel and Attack: what the loop that climbs needs to know of the things it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Objective = Callable[[Tensor], Tensor]
"""Images (n, c, h, w) -> a scalar, or one value per image (n,); attacks MAXIMISE it."""

Encoder = Callable[[Tensor], Tensor]
"""Images (n, c, h, w) in [0, 1] -> embeddings (n, d); normalisation of the pixels happens inside."""


@runtime_checkable
class ThreatModel(Protocol):
    """What the attacker may do to an image: the only place where eps and the pixel range live."""

    @property
    def eps(self) -> float | Tensor:
        """Size of the ball; a float, or a tensor per image (n,) or broadcastable to (n, c, h, w)."""

    def start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random point of the feasible set around x (n, c, h, w)."""

    def ascent(self, grad: Tensor) -> Tensor:
        """Steepest-ascent direction of unit size in this norm, per image; a zero gradient gives zero."""

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Nearest feasible point to x_adv: inside the ball around x and inside the pixel range."""


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What an attack did.  All tensors are detached and live on the device of the images.

    x_adv: (n, c, h, w), dtype of x.  value: the objective at x_adv, (n,) for per-image objectives, else ().
    start_value: the same at the first point the objective saw.  zero_gradient: (n,) int64, number of gradient steps
    in which the image's gradient was exactly zero.  success: (n,) bool, or None when no `success` test was given.
    forwards, backwards: how many times the whole batch went through the objective and back.
    stationary: (n,) bool, images that were given a random start because the clean point was stationary.
    """

    x_adv: Tensor
    value: Tensor
    start_value: Tensor
    zero_gradient: Tensor
    success: Tensor | None
    forwards: int
    backwards: int
    stationary: Tensor | None = None


@runtime_checkable
class Attack(Protocol):
    """A frozen set of numbers that is called on images and any function of images."""

    def __call__(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Adversarial images: same shape, dtype and device as x; detached."""

    def run(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: Callable[[Tensor], Tensor] | None = None,
    ) -> AttackResult:
        """The same, with what is worth knowing about the run."""
