"""The one gradient loop behind every named attack: the loop itself, the state of a call, one gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hsat.attacks.initialization import check_ids, check_start, random_start, to_device_of
from hsat.attacks.threat import clamp_images, detach_images, raise_out_of_range
from hsat.types import AttackResult, Objective, SuccessTest, ThreatModel

RandomStart = Callable[[], Tensor]
"""Gives a random feasible point for every image: the way out for images that are stationary at step 0."""

InputTransform = Callable[[Tensor, Tensor | None], Tensor]
"""(images, index of these images in the batch or None for all) -> what the objective is shown instead of them."""

GradientFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(iterate, momentum) -> (value, gradient); may read the objective anywhere, and more than once."""

FIRST_SCALE = 2.0**12
"""Under float16 the objective is multiplied by this (a power of two, so directions stay) and halved on overflow."""


@dataclass(frozen=True, kw_only=True)
class AscentConfig:
    """The numbers of a gradient ascent, and hooks for attacks that are more than that.

    Attributes:
        threat: What the images must keep to.
        step_size: In units of the threat model's norm.
        steps: Gradient steps per restart.
        random_start: Whether the first restart begins at a random point.
        restarts: How often to begin anew; after the first always at random points.
        decay: None means no momentum (PGD); a float is MI-FGSM's decay factor.
        gradient: False where the path asks for values only.
        first_point: (state, restart) -> what random starts are; None: the threat model's.
        gradients: (state, restart) -> the source of gradients, made once per restart; None reads them at the iterates.
        path: (state, first point, random start, restart) -> all steps of a restart: its last point and, where known,
            the value there.  None is the gradient ascent of `ascend`.
    """

    threat: ThreatModel
    step_size: float | Tensor
    steps: int
    random_start: bool = False
    restarts: int = 1
    decay: float | None = None
    gradient: bool = True
    first_point: Callable[[AttackState, int], Tensor] | None = None
    gradients: Callable[[AttackState, int], GradientFunction] | None = None
    path: Callable[[AttackState, Tensor, RandomStart | None, int], tuple[Tensor, Tensor | None]] | None = None


def ascend(
    x: Tensor,
    objective: Objective,
    config: AscentConfig,
    *,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    ids: Tensor | None = None,
    success: SuccessTest | None = None,
    score: bool = True,
) -> AttackResult:
    """Projected gradient ascent y <- project(y + step_size * ascent(gradient)), with or without momentum.

    With per-image values restarts keep the worst per image (a success first, then the higher value); with a scalar the
    restart of the highest final value is kept whole.  The arguments, and what is raised, are those of
    `GradientAttack.run`.
    """
    if config.gradient and torch.is_inference_mode_enabled():
        raise RuntimeError(
            "attacks need gradients, which inference_mode forbids; use torch.no_grad() around them instead"
        )
    inference, x = getattr(x, "is_inference", bool)(), detach_images(x)
    check_ids(ids, len(x))
    check_start(start, x)
    x = x.clone() if inference else x
    state = AttackState(x, objective, config, generator=generator, ids=ids, success=success)
    best: RestartResult | None = None
    for restart in range(config.restarts):
        y, fallback = _first_point(state, restart, start)
        y, value = (config.path or follow_gradients)(state, y, fallback, restart)
        result = state.finish(y, score=score or config.restarts > 1, value=value)
        best = result if best is None else _keep_worst(best, result, per_image=state.per_image)
        if success is not None and bool(state.done.all()):
            break
    state.raise_flags(x)
    assert best is not None  # restarts >= 1 is checked by the attacks
    return AttackResult(
        x_adv=best.x_adv,
        value=best.value,
        start_value=best.value if state.start_value is None else state.start_value,
        zero_gradient=state.zero_gradient,
        success=None if success is None else state.done,
        forwards=state.forwards,
        backwards=state.backwards,
        stationary=state.stationary,
    )


def follow_gradients(state: AttackState, y: Tensor, fallback: RandomStart | None, restart: int) -> tuple[Tensor, None]:
    """All steps of one restart.  `fallback` gives the random point for images that are stationary at step 0."""
    config, momentum = state.config, torch.zeros_like(y)
    gradient, step_size = _gradient_function(state, restart), broadcast_size(config.step_size, y)
    for step in range(config.steps):
        if state.stop_early(y):
            break
        value, grad = gradient(y, momentum)
        flat = (grad == 0).flatten(1).all(1) & ~state.done
        if step == 0 and fallback is not None and bool(flat.any()):
            state.stationary |= flat
            y, gradient = torch.where(per_image(flat), fallback(), y), _gradient_function(state, restart)
            value, grad = gradient(y, momentum)
            flat = (grad == 0).flatten(1).all(1)
        if state.start_value is None:
            state.start_value = value
        state.zero_gradient += flat & ~state.done
        if config.decay is not None:
            grad = momentum = config.decay * momentum + grad / _l1_mean(grad)
        moved = state.project(y + step_size * config.threat.steepest_ascent(grad))
        y = torch.where(per_image(flat | state.done), y, moved)
    return y, None


def _gradient_function(state: AttackState, restart: int) -> GradientFunction:
    gradients = state.config.gradients
    return state.gradient if gradients is None else gradients(state, restart)


def _first_point(state: AttackState, restart: int, start: Tensor | None) -> tuple[Tensor, RandomStart | None]:
    """The first iterate of a restart, and a way out for images whose gradient is zero there."""
    if restart == 0 and start is not None:
        if start.device.type == "cpu" and bool(start.isnan().any()):  # elsewhere the gradient will say so
            raise ValueError("start holds NaN")
        return state.project(start.detach().to(state.x.device, state.work)), None
    if restart > 0 or state.config.random_start:
        return state.random_start(restart), None
    if getattr(state.objective, "stationary_at_clean", False):
        state.stationary |= True
        return state.random_start(restart), None
    return state.x.to(state.work), lambda: state.random_start(restart)


def _l1_mean(grad: Tensor) -> Tensor:
    """mean |g| per image, floored so that a zero gradient gives zero and not NaN."""
    return grad.abs().mean((1, 2, 3), keepdim=True).clamp_min(torch.finfo(grad.dtype).tiny)


@dataclass
class RestartResult:
    """Where one restart ended."""

    x_adv: Tensor
    value: Tensor
    success: Tensor


def _keep_worst(old: RestartResult, new: RestartResult, *, per_image: bool) -> RestartResult:
    """Keep the worse outcome for the model: per image where values are per image, else one whole batch."""
    old_value, new_value = (torch.nan_to_num(v, nan=-torch.inf) for v in (old.value, new.value))
    better = new_value > old_value
    if per_image:
        better = ~old.success & (new.success | better)  # images that succeeded before were not attacked again
    pick = better[:, None, None, None] if per_image else better
    return RestartResult(
        torch.where(pick, new.x_adv, old.x_adv), torch.where(better, new.value, old.value), new.success | old.success
    )


class AttackState:
    """State of one attack call: the clamped images, the projection, and the flags that are read once at the end."""

    def __init__(
        self,
        x: Tensor,
        objective: Objective,
        config: AscentConfig,
        *,
        generator: torch.Generator | None,
        ids: Tensor | None,
        success: SuccessTest | None,
    ) -> None:
        n, device = len(x), x.device
        self.objective, self.config, self.success = objective, config, success
        self.generator, self.ids = generator, ids
        self.x, self.refused = clamp_images(x, config.threat)
        self.work = torch.promote_types(x.dtype, torch.float32)
        self.project = config.threat.projection_at(self.x)
        self.image_gradient = ImageGradient(self.x, self.work)
        self.bad = torch.zeros(n, dtype=torch.bool, device=device)
        self.done = torch.zeros(n, dtype=torch.bool, device=device)
        self.zero_gradient = torch.zeros(n, dtype=torch.int64, device=device)
        self.stationary = torch.zeros(n, dtype=torch.bool, device=device)
        self.start_value: Tensor | None = None
        self.per_image = False
        self.forwards = self.backwards = 0

    def random_start(self, restart: int) -> Tensor:
        """A random feasible point around every image."""
        if self.config.first_point is not None:
            return self.config.first_point(self, restart)
        return random_start(self.x, self.config.threat, generator=self.generator, ids=self.ids, restart=restart).to(
            self.work
        )

    def shown(self, y: Tensor) -> Tensor:
        """What the objective is shown: the iterate in the images' dtype, feasible in that dtype."""
        return y if y.dtype == self.x.dtype else self.project(y.to(self.x.dtype))

    def evaluate(
        self, y: Tensor, *, transform: InputTransform | None = None, feasible: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Value and gradient at an iterate; finished images are left out where the objective can be narrowed.

        transform: a differentiable change of the images before the objective sees them.  feasible=False: no result lies
        at y, which is clamped to the pixel range but perhaps not in the ball.
        """
        shown = self.shown(y) if feasible else self.config.threat.clamp(y.to(self.x.dtype))[0]
        images, objective, keep = self._narrow(shown)
        transformed = objective if transform is None else lambda v: objective(transform(v, keep))
        value, grad = self.image_gradient(transformed, images)
        self.forwards += 1
        self.backwards += 1
        self._note_form(value)
        if keep is not None:
            value = value.new_full((len(self.x),), torch.nan).index_put((keep,), value)
            grad = torch.zeros_like(y).index_put((keep,), grad)
        bad = ~grad.isfinite().flatten(1).all(1) & ~self.done
        if y.device.type == "cpu":
            check_finite(bad)
        self.bad |= bad
        return value, torch.where(per_image(bad), 0.0, grad)

    def gradient(self, y: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        """`evaluate` as a GradientFunction: value and gradient at the iterate, whatever the momentum."""
        return self.evaluate(y)

    def value(self, y: Tensor) -> Tensor:
        """The value alone, as `evaluate` gives it: one pass without a graph."""
        images, objective, keep = self._narrow(self.shown(y))
        with torch.no_grad():
            value = objective(images)
        check_value(value, len(images))
        self.forwards += 1
        self._note_form(value)
        return value if keep is None else value.new_full((len(self.x),), torch.nan).index_put((keep,), value)

    def _narrow(self, images: Tensor) -> tuple[Tensor, Objective, Tensor | None]:
        """Images and objective without the finished images, where that is possible, and the index of what is left."""
        if self.success is None or not hasattr(self.objective, "select") or not bool(self.done.any()):
            return images, self.objective, None
        keep = (~self.done).nonzero().flatten()
        return images[keep], self.objective.select(keep), keep

    def _note_form(self, value: Tensor) -> None:
        self.per_image = value.ndim == 1
        if self.success is not None and not self.per_image:
            raise ValueError(
                "`success` stops images one by one, so the objective must return one value per image;"
                " it returned a scalar"
            )

    def stop_early(self, y: Tensor) -> bool:
        """Ask `success` about the images that are not finished; True when none is left."""
        if self.success is None:
            return False
        with torch.no_grad():
            done = self.success(self.shown(y))
        if done.shape != (len(self.x),) or done.dtype != torch.bool:
            raise ValueError(f"success must return ({len(self.x)},) bools, got {tuple(done.shape)} {done.dtype}")
        self.done |= done.to(self.done.device)
        return bool(self.done.all())

    def finish(self, y: Tensor, *, score: bool, value: Tensor | None = None) -> RestartResult:
        """The last point of a restart in the images' dtype, with its value where it is known or wanted."""
        x_adv = self.project(y.to(self.x.dtype))
        self.stop_early(x_adv)
        if value is None and score:
            with torch.no_grad():
                value = self.objective(x_adv).detach()
            check_value(value, len(self.x))
            self.forwards += 1
            self.per_image = value.ndim == 1
            if self.start_value is not None:  # images that were done before the first gradient have not moved since
                self.start_value = torch.where(self.start_value.isnan() & self.done, value, self.start_value)
        if value is None:
            value = self.start_value if self.start_value is not None else self.x.new_zeros(())
        return RestartResult(x_adv, value, self.done.clone())

    def raise_flags(self, x: Tensor) -> None:
        """The single device read of a call: were the images in range, were all gradients finite?"""
        if bool(self.refused | self.bad.any()):
            if bool(self.refused):
                raise_out_of_range(x, self.config.threat.low, self.config.threat.high)
            check_finite(self.bad)


class ImageGradient:
    """Callable (images) -> (value detached, gradient in `work` dtype); keeps the float16 scale between steps.

    Gradients flow to the images only, whatever the caller's grad mode is.  Raises RuntimeError when the objective does
    not depend on the images.
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


def check_value(value: Tensor, n: int) -> None:
    """Raise unless the objective returned a scalar or one value per image."""
    if not isinstance(value, Tensor):
        raise TypeError(f"the objective must return a tensor, got {type(value).__name__}")
    if value.shape not in ((), (n,)):
        raise ValueError(
            f"the objective must return a scalar or one value per image, shape ({n},); got {tuple(value.shape)}"
        )


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


def per_image(values: Tensor) -> Tensor:
    """(n,) -> (n, 1, 1, 1), to go with images."""
    return values[:, None, None, None]


def broadcast_size(size: float | Tensor, y: Tensor) -> float | Tensor:
    """A float, or a tensor per image or per pixel, in the form that broadcasts against images."""
    if not isinstance(size, Tensor):
        return size
    size = to_device_of(size, y, y.dtype)
    return per_image(size) if size.ndim == 1 else size
