"""Auto-PGD: gradient ascent with momentum that finds its own step size, and keeps the best point of every image."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from hsat.attacks.base import GradientAttack, check_counts, check_number
from hsat.attacks.loop import AscentConfig, AttackState, RandomStart, broadcast_size, per_image
from hsat.attacks.threat import check_threat
from hsat.types import ThreatModel

MOMENTUM = 0.75
"""alpha of the paper: the share of the new step; the rest goes on in the direction of the last one."""


@dataclass(frozen=True, repr=False)
class APGD(GradientAttack):
    """Auto-PGD, algorithm 1 of Croce and Hein, arXiv:2003.01690: nothing to set but the number of steps.

    The step size of each image begins at 2 eps.  One step is z = project(x + step * ascent(gradient)), then
    x <- project(x + 0.75 (z - x) + 0.25 (x - x_before)).  At the checkpoints ceil(p_j * steps), p = 0.22, 0.41, 0.57,
    0.70, ..., the step size of an image is halved and the image goes back to its best point, if its value rose in fewer
    than rho of the steps since the last checkpoint, or if neither its step size nor its best value changed since.
    The result is the best point of each image: its value is never below that of its start.

    Any objective will do.  With values per image all of this happens image by image.  With a scalar (`hierarchical`)
    the batch is one image: it has one step size and one best point.  Images that `success` stops stay where they
    succeeded.  One restart costs steps + 1 forward and `steps` backward passes.
    Deviations: random starts are the threat model's (the published code scales its noise to the border of the ball);
    conditions are asked for at the checkpoint itself, as in the published code and not one step later; an image
    without a gradient stays in place for that step, momentum or not.
    steps, restarts >= 1; rho in [0, 1].  Restarts after the first begin at random points.
    """

    threat: ThreatModel
    _: KW_ONLY
    steps: int
    random_start: bool = True
    restarts: int = 1
    rho: float = 0.75

    def __post_init__(self) -> None:
        check_threat(self.threat)
        check_counts(steps=self.steps, restarts=self.restarts)
        check_number("rho", self.rho, high=1.0)

    def _config(self) -> AscentConfig:
        return AscentConfig(
            threat=self.threat,
            step_size=self.threat.eps,
            steps=self.steps,
            random_start=self.random_start,
            restarts=self.restarts,
            path=self._path,
        )

    def _path(
        self, state: AttackState, y: Tensor, fallback: RandomStart | None, restart: int
    ) -> tuple[Tensor, Tensor | None]:
        """One restart: the best points, and their values where all are known."""
        y, value, grad = _first_gradient(state, y, fallback)
        if state.stop_early(y):  # asked after the pass: who remembers its logits needs no other one
            return y, None
        search, checkpoints = _Search(state, y, value, grad), checkpoint_steps(self.steps)
        for step in range(1, self.steps + 1):
            search.move(first=step == 1)
            if step == self.steps:
                search.update(state.value(search.y), None)
            else:
                search.update(*state.evaluate(search.y))
            if state.stop_early(search.y):
                break
            if step in checkpoints:
                search.check(self.rho * (step - checkpoints[step]))
        best = torch.where(per_image(state.done), search.y, search.best)
        if state.success is not None or len(state.x) == 0:  # a finished image's last value was perhaps never asked for
            return best, None
        return best, search.best_value if state.per_image else search.best_value[0]


def checkpoint_steps(steps: int) -> dict[int, int]:
    """The steps after which step sizes are looked at, each with the checkpoint before it; section 3 of the paper.

    p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), in whole per cent so that ceil is exact.
    """
    marks, before, percent, gap = {}, 0, 22, 22
    while percent < 100:
        mark = -(-percent * steps // 100)
        if before < mark < steps:
            marks[mark] = before
            before = mark
        gap = max(gap - 3, 6)
        percent += gap
    return marks


def _first_gradient(state: AttackState, y: Tensor, fallback: RandomStart | None) -> tuple[Tensor, Tensor, Tensor]:
    value, grad = state.evaluate(y)
    if fallback is not None:
        flat = (grad == 0).flatten(1).all(1) & ~state.done
        if bool(flat.any()):
            state.stationary |= flat
            y = torch.where(per_image(flat), fallback(), y)
            value, grad = state.evaluate(y)
    if state.start_value is None:
        state.start_value = value
    return y, value, grad


class _Search:
    """The state of one restart, one entry per image: iterate, best point, share of the largest step, rises so far."""

    def __init__(self, state: AttackState, y: Tensor, value: Tensor, grad: Tensor) -> None:
        n = len(y)
        self.state, self.eps = state, broadcast_size(state.config.threat.eps, y)
        self.y = self.before = self.best = y
        self.grad = self.best_grad = grad
        self.value = self.best_value = self.checked_value = value.expand(n)
        self.step = torch.full((n,), 2.0, dtype=y.dtype, device=y.device)
        self.rises = torch.zeros(n, dtype=torch.int64, device=y.device)
        self.halved = torch.zeros(n, dtype=torch.bool, device=y.device)

    def move(self, *, first: bool) -> None:
        """The next iterate; images without a gradient and finished ones stay."""
        y, state = self.y, self.state
        flat = (self.grad == 0).flatten(1).all(1)
        state.zero_gradient += flat & ~state.done
        moved = state.project(y + per_image(self.step) * self.eps * state.config.threat.steepest_ascent(self.grad))
        if not first:
            moved = state.project(y + MOMENTUM * (moved - y) + (1 - MOMENTUM) * (y - self.before))
        self.before, self.y = y, torch.where(per_image(flat | state.done), y, moved)

    def update(self, value: Tensor, grad: Tensor | None) -> None:
        """Take in the value, and but for the last step the gradient, at the iterate."""
        value = value.expand(len(self.y))
        self.rises += value > self.value
        better = value > self.best_value
        self.value, self.best_value = value, torch.where(better, value, self.best_value)
        self.best = torch.where(per_image(better), self.y, self.best)
        if grad is not None:
            self.grad, self.best_grad = grad, torch.where(per_image(better), grad, self.best_grad)

    def check(self, least_rises: float) -> None:
        """Conditions 1 and 2 of the paper: halve the step size where they hold and go back to the best point."""
        stalled = ~self.halved & (self.best_value <= self.checked_value)
        halve = ((self.rises < least_rises) | stalled) & ~self.state.done
        self.step = torch.where(halve, self.step / 2, self.step)
        self.y = torch.where(per_image(halve), self.best, self.y)
        self.grad = torch.where(per_image(halve), self.best_grad, self.grad)
        self.value = torch.where(halve, self.best_value, self.value)
        self.rises, self.halved, self.checked_value = torch.zeros_like(self.rises), halve, self.best_value
