"""The one gradient loop behind every named attack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hsat.attacks import starts
from hsat.attacks.gradient import ImageGradient, check_finite, check_value
from hsat.attacks.pixels import admit_to, refuse
from hsat.types import AttackResult, Objective, ThreatModel


@dataclass(frozen=True, kw_only=True)
class Climb:
    """The numbers of a gradient ascent.  decay=None means no momentum (PGD); a float is MI-FGSM's decay factor."""

    threat: ThreatModel
    step_size: float | Tensor
    steps: int
    random_start: bool = False
    restarts: int = 1
    decay: float | None = None


@dataclass
class _Point:
    """Where one restart ended."""

    x_adv: Tensor
    value: Tensor
    success: Tensor


class _Run:
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
        return starts.random_start(
            self.x, self.climb.threat, generator=self.generator, ids=self.ids, restart=restart, inside=True
        ).to(self.work)

    def seen(self, y: Tensor) -> Tensor:
        """What the objective is shown: the iterate in the images' dtype, feasible in that dtype."""
        return y if y.dtype == self.x.dtype else self.project(y.to(self.x.dtype))

    def climb_from(self, y: Tensor, *, escape: Callable[[], Tensor] | None) -> Tensor:
        """All steps of one restart.  `escape` gives the random point for images that are stationary at step 0."""
        decay, momentum = self.climb.decay, torch.zeros_like(y)
        step_size = _shaped(self.climb.step_size, y)
        for step in range(self.climb.steps):
            if self.stop_early(y):
                break
            value, grad = self.evaluate(y)
            still = (grad == 0).flatten(1).all(1) & ~self.done
            if step == 0 and escape is not None and bool(still.any()):
                self.stationary |= still
                y = torch.where(_wide(still), escape(), y)
                value, grad = self.evaluate(y)
                still = (grad == 0).flatten(1).all(1)
            if self.start_value is None:
                self.start_value = value
            self.zero += still & ~self.done
            if decay is not None:
                grad = momentum = decay * momentum + grad / _mean_size(grad)
            moved = self.project(y + step_size * self.climb.threat.ascent(grad))
            y = torch.where(_wide(still | self.done), y, moved)
        return y

    def evaluate(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient at an iterate; finished images are left out where the objective can be narrowed."""
        images, objective = self.seen(y), self.objective
        keep = self._active()
        if keep is not None:
            objective, images = objective.select(keep), images[keep]  # type: ignore[attr-defined]
        value, grad = self.gradient(objective, images)
        self.forwards += 1
        self.backwards += 1
        self.per_image = value.ndim == 1
        if self.success is not None and not self.per_image:
            raise ValueError(
                "`success` stops images one by one, so the objective must return one value per image;"
                " it returned a scalar"
            )
        if keep is not None:
            value = value.new_full((len(self.x),), torch.nan).index_put((keep,), value)
            grad = torch.zeros_like(y).index_put((keep,), grad)
        bad = ~grad.isfinite().flatten(1).all(1) & ~self.done
        if y.device.type == "cpu":
            check_finite(bad)
        self.bad |= bad
        return value, torch.where(_wide(bad), 0.0, grad)

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

    def finish(self, y: Tensor, *, score: bool) -> _Point:
        """The last point of a restart in the images' dtype, with its value when that is wanted."""
        x_adv = self.project(y.to(self.x.dtype))
        self.stop_early(x_adv)
        value = self.start_value if self.start_value is not None else self.x.new_zeros(())
        if score:
            with torch.no_grad():
                value = self.objective(x_adv).detach()
            check_value(value, len(self.x))
            self.forwards += 1
            self.per_image = value.ndim == 1
            if self.start_value is not None:  # images that were done before the first gradient have not moved since
                self.start_value = torch.where(self.start_value.isnan() & self.done, value, self.start_value)
        return _Point(x_adv, value, self.done.clone())

    def raise_flags(self, x: Tensor) -> None:
        """The single device read of a call: were the images in range, were all gradients finite?"""
        if bool(self.outside | self.bad.any()):
            if bool(self.outside):
                refuse(x, self.climb.threat.low, self.climb.threat.high)  # type: ignore[attr-defined]
            check_finite(self.bad)


def ascend(
    x: Tensor,
    objective: Objective,
    climb: Climb,
    *,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    ids: Tensor | None = None,
    success: Callable[[Tensor], Tensor] | None = None,
    score: bool = True,
) -> AttackResult:
    """Projected gradient ascent y <- project(y + step_size * ascent(gradient)), with or without momentum.

    x: (n, c, h, w) images in the threat model's range.  start: (n, c, h, w) first point of the first restart, projected
    before use.  generator, ids: the source of random starts, see `starts.random_start`.  success: (x_adv) -> (n,)
    bool; images that succeed stop where they are.  score=False saves the last forward pass, and `value` is then not
    the value at x_adv.
    With per-image values restarts keep the worst per image (a success first, then the higher value); with a scalar the
    restart of the highest final value is kept whole.
    Raises ValueError for images out of range, wrong shapes or a scalar objective with `success`, RuntimeError under
    inference_mode or for an objective without a gradient path, FloatingPointError for non-finite gradients.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "attacks need gradients, which inference_mode forbids; use torch.no_grad() around them instead"
        )
    starts.check_ids(ids, len(x))
    starts.check_start(start, x)
    x = x.detach().clone() if x.is_inference() else x.detach()
    run = _Run(x, objective, climb, generator=generator, ids=ids, success=success)
    best: _Point | None = None
    for restart in range(climb.restarts):
        y, escape = _first_point(run, restart, start)
        point = run.finish(run.climb_from(y, escape=escape), score=score or climb.restarts > 1)
        best = point if best is None else _stronger(best, point, per_image=run.per_image)
        if success is not None and bool(run.done.all()):
            break
    run.raise_flags(x)
    assert best is not None  # restarts >= 1 is checked by the attacks
    return AttackResult(
        x_adv=best.x_adv,
        value=best.value,
        start_value=best.value if run.start_value is None else run.start_value,
        zero_gradient=run.zero,
        success=None if success is None else run.done,
        forwards=run.forwards,
        backwards=run.backwards,
        stationary=run.stationary,
    )


def _first_point(run: _Run, restart: int, start: Tensor | None) -> tuple[Tensor, Callable[[], Tensor] | None]:
    """The first iterate of a restart, and a way out for images whose gradient is zero there."""
    if restart == 0 and start is not None:
        if start.device.type == "cpu" and bool(start.isnan().any()):  # elsewhere the gradient will say so
            raise ValueError("start holds NaN")
        return run.project(start.detach().to(run.x.device, run.work)), None
    if restart > 0 or run.climb.random_start:
        return run.random(restart), None
    if getattr(run.objective, "stationary_at_clean", False):
        run.stationary |= True
        return run.random(restart), None
    return run.x.to(run.work), lambda: run.random(restart)


def _stronger(old: _Point, new: _Point, *, per_image: bool) -> _Point:
    """Keep the worse outcome for the model: per image where values are per image, else one whole batch."""
    old_value, new_value = (torch.nan_to_num(v, nan=-torch.inf) for v in (old.value, new.value))
    better = new_value > old_value
    if per_image:
        better = ~old.success & (new.success | better)  # images that fell before were not attacked again
    pick = _wide(better) if per_image else better
    return _Point(
        torch.where(pick, new.x_adv, old.x_adv), torch.where(better, new.value, old.value), new.success | old.success
    )


def _wide(mask: Tensor) -> Tensor:
    return mask[:, None, None, None]


def _mean_size(grad: Tensor) -> Tensor:
    """mean |g| per image, floored so that a zero gradient gives zero and not NaN."""
    return grad.abs().mean((1, 2, 3), keepdim=True).clamp_min(torch.finfo(grad.dtype).tiny)


def _shaped(step_size: float | Tensor, y: Tensor) -> float | Tensor:
    if not isinstance(step_size, Tensor):
        return step_size
    step_size = step_size.to(y.device, y.dtype)
    return _wide(step_size) if step_size.ndim == 1 else step_size
