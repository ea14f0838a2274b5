"""The state of one attack call, and how objectives are asked for values and gradients during it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hsat.attacks import starts
from hsat.attacks.gradient import ImageGradient, check_finite, check_value
from hsat.attacks.pixels import admit_to, refuse
from hsat.attacks.placing import beside
from hsat.types import Objective, ThreatModel

Escape = Callable[[], Tensor]
"""Gives a random feasible point for every image: the way out for images that are stationary at step 0."""

View = Callable[[Tensor, Tensor | None], Tensor]
"""(images, index of these images in the batch or None for all) -> what the objective is shown instead of them."""

Look = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(iterate, momentum) -> (value, gradient); may read the objective anywhere, and more than once."""


@dataclass(frozen=True, kw_only=True)
class Climb:
    """The numbers of a gradient ascent.  decay=None means no momentum (PGD); a float is MI-FGSM's decay factor.

    gradient=False: the path asks for values only.  The hooks take the call's state and the number of the restart.
    first: what random starts are; None: the threat model's.  look: made once per restart, gives the gradients; None
    reads them at the iterates.  path: all steps of a restart, to its last point and, where known, the value there;
    None is the gradient ascent of `ascend`.
    """

    threat: ThreatModel
    step_size: float | Tensor
    steps: int
    random_start: bool = False
    restarts: int = 1
    decay: float | None = None
    gradient: bool = True
    first: Callable[[Run, int], Tensor] | None = None
    look: Callable[[Run, int], Look] | None = None
    path: Callable[[Run, Tensor, Escape | None, int], tuple[Tensor, Tensor | None]] | None = None


@dataclass
class Point:
    """Where one restart ended."""

    x_adv: Tensor
    value: Tensor
    success: Tensor


class Run:
    """State of one attack call: the clamped images, the projection, and the flags that are read once at the end."""

    def __init__(
        self,
        x: Tensor,
        objective: Objective,
        climb: Climb,
        *,
        generator: torch.Generator | None,
        ids: Tensor | None,
        success: Callable[[Tensor], Tensor] | None,
    ) -> None:
        n, device = len(x), x.device
        self.objective, self.climb, self.success = objective, climb, success
        self.generator, self.ids = generator, ids
        self.x, self.outside = admit_to(x, climb.threat)
        self.work = torch.promote_types(x.dtype, torch.float32)
        around = starts.shortcut(climb.threat, "around", instead_of="project")
        self.project: Callable[[Tensor], Tensor] = (
            around(self.x) if around is not None else lambda y: climb.threat.project(y, self.x)
        )
        self.gradient = ImageGradient(self.x, self.work)
        self.bad = torch.zeros(n, dtype=torch.bool, device=device)
        self.done = torch.zeros(n, dtype=torch.bool, device=device)
        self.zero = torch.zeros(n, dtype=torch.int64, device=device)
        self.stationary = torch.zeros(n, dtype=torch.bool, device=device)
        self.start_value: Tensor | None = None
        self.per_image = False
        self.forwards = self.backwards = 0

    def random(self, restart: int) -> Tensor:
        """A random feasible point around every image."""
        if self.climb.first is not None:
            return self.climb.first(self, restart)
        return starts.random_start(
            self.x, self.climb.threat, generator=self.generator, ids=self.ids, restart=restart, inside=True
        ).to(self.work)

    def seen(self, y: Tensor) -> Tensor:
        """What the objective is shown: the iterate in the images' dtype, feasible in that dtype."""
        return y if y.dtype == self.x.dtype else self.project(y.to(self.x.dtype))

    def in_range(self, y: Tensor) -> Tensor:
        """A point where gradients are read but no result lies: in the pixel range, perhaps not in the ball."""
        admit = getattr(self.climb.threat, "admit", None)
        return y.to(self.x.dtype) if admit is None else admit(y.to(self.x.dtype))[0]

    def evaluate(self, y: Tensor, *, view: View | None = None, feasible: bool = True) -> tuple[Tensor, Tensor]:
        """Value and gradient at an iterate; finished images are left out where the objective can be narrowed.

        view: a differentiable change of the images before the objective sees them.  feasible=False: y is no iterate.
        """
        images, objective, keep = self._narrowed(self.seen(y) if feasible else self.in_range(y))
        shown = objective if view is None else lambda v: objective(view(v, keep))
        value, grad = self.gradient(shown, images)
        self.forwards += 1
        self.backwards += 1
        self._note(value)
        if keep is not None:
            value = value.new_full((len(self.x),), torch.nan).index_put((keep,), value)
            grad = torch.zeros_like(y).index_put((keep,), grad)
        bad = ~grad.isfinite().flatten(1).all(1) & ~self.done
        if y.device.type == "cpu":
            check_finite(bad)
        self.bad |= bad
        return value, torch.where(wide(bad), 0.0, grad)

    def look(self, y: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        """`evaluate` as a Look: value and gradient at the iterate, whatever the momentum."""
        return self.evaluate(y)

    def value(self, y: Tensor) -> Tensor:
        """The value alone, as `evaluate` gives it: one pass without a graph."""
        images, objective, keep = self._narrowed(self.seen(y))
        with torch.no_grad():
            value = objective(images)
        check_value(value, len(images))
        self.forwards += 1
        self._note(value)
        return value if keep is None else value.new_full((len(self.x),), torch.nan).index_put((keep,), value)

    def _narrowed(self, images: Tensor) -> tuple[Tensor, Objective, Tensor | None]:
        """Images and objective without the finished images, where that is possible, and the index of what is left."""
        keep = self._active()
        if keep is None:
            return images, self.objective, None
        return images[keep], self.objective.select(keep), keep  # type: ignore[attr-defined]

    def _note(self, value: Tensor) -> None:
        self.per_image = value.ndim == 1
        if self.success is not None and not self.per_image:
            raise ValueError(
                "`success` stops images one by one, so the objective must return one value per image;"
                " it returned a scalar"
            )

    def _active(self) -> Tensor | None:
        if self.success is None or not hasattr(self.objective, "select") or not bool(self.done.any()):
            return None
        return (~self.done).nonzero().flatten()

    def stop_early(self, y: Tensor) -> bool:
        """Ask `success` about the images still climbing; True when none is left."""
        if self.success is None:
            return False
        with torch.no_grad():
            found = self.success(self.seen(y))
        if found.shape != (len(self.x),) or found.dtype != torch.bool:
            raise ValueError(f"success must return ({len(self.x)},) bools, got {tuple(found.shape)} {found.dtype}")
        self.done |= found.to(self.done.device)
        return bool(self.done.all())

    def finish(self, y: Tensor, *, score: bool, known: Tensor | None = None) -> Point:
        """The last point of a restart in the images' dtype, with its value when that is wanted and not `known`."""
        x_adv = self.project(y.to(self.x.dtype))
        self.stop_early(x_adv)
        value = self.start_value if self.start_value is not None else self.x.new_zeros(())
        if known is not None:
            value = known
        elif score:
            with torch.no_grad():
                value = self.objective(x_adv).detach()
            check_value(value, len(self.x))
            self.forwards += 1
            self.per_image = value.ndim == 1
            if self.start_value is not None:  # images that were done before the first gradient have not moved since
                self.start_value = torch.where(self.start_value.isnan() & self.done, value, self.start_value)
        return Point(x_adv, value, self.done.clone())

    def raise_flags(self, x: Tensor) -> None:
        """The single device read of a call: were the images in range, were all gradients finite?"""
        if bool(self.outside | self.bad.any()):
            if bool(self.outside):
                refuse(x, self.climb.threat.low, self.climb.threat.high)  # type: ignore[attr-defined]
            check_finite(self.bad)


def wide(mask: Tensor) -> Tensor:
    """(n,) -> (n, 1, 1, 1), to go with images."""
    return mask[:, None, None, None]


def shaped(size: float | Tensor, y: Tensor) -> float | Tensor:
    """A float, or a tensor per image or per pixel, in the form that broadcasts against images."""
    if not isinstance(size, Tensor):
        return size
    size = beside(size, y, y.dtype)
    return wide(size) if size.ndim == 1 else size
