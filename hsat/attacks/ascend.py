"""The one gradient loop behind every named attack."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hsat.attacks import starts
from hsat.attacks.running import Climb, Escape, Look, Point, Run, shaped, wide
from hsat.types import AttackResult, Objective

__all__ = ["Climb", "ascend"]


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
    if climb.gradient and torch.is_inference_mode_enabled():
        raise RuntimeError(
            "attacks need gradients, which inference_mode forbids; use torch.no_grad() around them instead"
        )
    starts.check_ids(ids, len(x))
    starts.check_start(start, x)
    x = x.detach().clone() if x.is_inference() else x.detach()
    run = Run(x, objective, climb, generator=generator, ids=ids, success=success)
    best: Point | None = None
    for restart in range(climb.restarts):
        y, escape = _first_point(run, restart, start)
        y, known = (climb.path or _momentum_path)(run, y, escape, restart)
        point = run.finish(y, score=score or climb.restarts > 1, known=known)
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


def _momentum_path(run: Run, y: Tensor, escape: Escape | None, restart: int) -> tuple[Tensor, None]:
    """All steps of one restart.  `escape` gives the random point for images that are stationary at step 0."""
    climb, momentum = run.climb, torch.zeros_like(y)
    look, step_size = _look(run, restart), shaped(climb.step_size, y)
    for step in range(climb.steps):
        if run.stop_early(y):
            break
        value, grad = look(y, momentum)
        still = (grad == 0).flatten(1).all(1) & ~run.done
        if step == 0 and escape is not None and bool(still.any()):
            run.stationary |= still
            y, look = torch.where(wide(still), escape(), y), _look(run, restart)
            value, grad = look(y, momentum)
            still = (grad == 0).flatten(1).all(1)
        if run.start_value is None:
            run.start_value = value
        run.zero += still & ~run.done
        if climb.decay is not None:
            grad = momentum = climb.decay * momentum + grad / _mean_size(grad)
        moved = run.project(y + step_size * climb.threat.ascent(grad))
        y = torch.where(wide(still | run.done), y, moved)
    return y, None


def _look(run: Run, restart: int) -> Look:
    return run.climb.look(run, restart) if run.climb.look is not None else run.look


def _first_point(run: Run, restart: int, start: Tensor | None) -> tuple[Tensor, Escape | None]:
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


def _stronger(old: Point, new: Point, *, per_image: bool) -> Point:
    """Keep the worse outcome for the model: per image where values are per image, else one whole batch."""
    old_value, new_value = (torch.nan_to_num(v, nan=-torch.inf) for v in (old.value, new.value))
    better = new_value > old_value
    if per_image:
        better = ~old.success & (new.success | better)  # images that fell before were not attacked again
    pick = wide(better) if per_image else better
    return Point(
        torch.where(pick, new.x_adv, old.x_adv), torch.where(better, new.value, old.value), new.success | old.success
    )


def _mean_size(grad: Tensor) -> Tensor:
    """mean |g| per image, floored so that a zero gradient gives zero and not NaN."""
    return grad.abs().mean((1, 2, 3), keepdim=True).clamp_min(torch.finfo(grad.dtype).tiny)
