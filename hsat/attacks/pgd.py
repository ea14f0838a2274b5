"""PGD and its named relatives: frozen settings of one gradient loop."""

from __future__ import annotations

import dataclasses
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from hsat.attacks.base import GradientAttack, check_number, check_steps, settings_text
from hsat.attacks.initialization import check_ids, check_start, random_start
from hsat.attacks.loop import AscentConfig, check_value
from hsat.attacks.threat import Linf, check_threat, clamp_images, detach_images, require_images
from hsat.types import AttackResult, Objective, SuccessTest, ThreatModel


def _ascent_config(attack: PGD | BIM | MIFGSM, *, decay: float | None = None) -> AscentConfig:
    return AscentConfig(
        threat=attack.threat,
        step_size=attack.step_size,
        steps=attack.steps,
        random_start=attack.random_start,
        restarts=attack.restarts,
        decay=decay,
    )


@dataclass(frozen=True, repr=False)
class PGD(GradientAttack):
    """Projected gradient ascent, x <- project(x + step_size * ascent(gradient)), from a random start.

    HSAT trains with Linf(8/255), step_size=2/255, steps=5.

    Attributes:
        threat: What the attack may change, such as Linf(8/255).
        step_size: In units of the threat model's norm.
        steps: At least 1.
        random_start: Begin at a random feasible point instead of at the images.
        restarts: At least 1; each image keeps its best run.

    References:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv:1706.06083, section 2.1.

    Example:
        A linear objective is climbed to the corner of the ball:

        >>> x = torch.full((1, 1, 2, 2), 0.5)
        >>> attack = PGD(Linf(0.25), step_size=0.25, steps=2, random_start=False)
        >>> attack(x, lambda images: images.sum((1, 2, 3)))
        tensor([[[[0.7500, 0.7500],
                  [0.7500, 0.7500]]]])
        >>> PGD(Linf(8 / 255), step_size=2 / 255, steps=10)  # the repr is the complete setting
        PGD(threat=Linf(eps=8/255, low=0.0, high=1.0), step_size=2/255, steps=10, random_start=True, restarts=1)
    """

    threat: ThreatModel
    _: KW_ONLY
    step_size: float
    steps: int
    random_start: bool = True
    restarts: int = 1

    def __post_init__(self) -> None:
        check_steps(self.threat, self.step_size, self.steps, self.restarts)

    def _config(self) -> AscentConfig:
        return _ascent_config(self)


@dataclass(frozen=True, repr=False)
class BIM(GradientAttack):
    """Basic iterative method: PGD that starts at the images themselves.

    With random_start=True it is PGD, which is what the published HSAT evaluation runs under this name.

    Attributes:
        threat: What the attack may change, such as Linf(8/255).
        step_size: In units of the threat model's norm.
        steps: At least 1.
        random_start: Begin at a random feasible point instead of at the images.
        restarts: At least 1; those after the first begin at random points, and each image keeps its best run.

    Raises:
        ValueError: For numbers out of range.

    References:
        Kurakin et al., Adversarial Examples in the Physical World, arXiv:1607.02533, eq. 2.

    Example:
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> BIM(Linf(0.25), step_size=0.25, steps=2)(x, lambda images: images.sum((1, 2, 3)))
        tensor([[[[0.7500, 0.7500]]]])
    """

    threat: ThreatModel
    _: KW_ONLY
    step_size: float
    steps: int
    random_start: bool = False
    restarts: int = 1

    def __post_init__(self) -> None:
        check_steps(self.threat, self.step_size, self.steps, self.restarts)

    def _config(self) -> AscentConfig:
        return _ascent_config(self)


@dataclass(frozen=True, repr=False)
class MIFGSM(GradientAttack):
    """Momentum iterative method: m <- decay * m + g / mean|g| per image, then a step along ascent(m).

    The paper divides by the sum |g|, which changes no step.  A zero gradient leaves the image in place for that step;
    the published code divides by zero there and never moves the image again.

    Attributes:
        threat, step_size, steps, random_start, restarts: As in `BIM`.
        decay: Share of the old momentum that is kept, at least 0.

    Raises:
        ValueError: For numbers out of range.

    References:
        Dong et al., Boosting Adversarial Attacks with Momentum, arXiv:1710.06081, algorithm 1.

    Example:
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> MIFGSM(Linf(0.25), step_size=0.25, steps=2)(x, lambda images: images.sum((1, 2, 3)))
        tensor([[[[0.7500, 0.7500]]]])
    """

    threat: ThreatModel
    _: KW_ONLY
    step_size: float
    steps: int
    decay: float = 1.0
    random_start: bool = False
    restarts: int = 1

    def __post_init__(self) -> None:
        check_steps(self.threat, self.step_size, self.steps, self.restarts)
        check_number("decay", self.decay)

    def _config(self) -> AscentConfig:
        return _ascent_config(self, decay=self.decay)


@dataclass(frozen=True, repr=False)
class FGSM(GradientAttack):
    """One step of size eps from the images.

    Attributes:
        threat: What the attack may change, such as Linf(8/255).

    References:
        Goodfellow et al., Explaining and Harnessing Adversarial Examples, arXiv:1412.6572, section 4.

    Example:
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> FGSM(Linf(0.25))(x, lambda images: images.sum((1, 2, 3)))
        tensor([[[[0.7500, 0.7500]]]])
    """

    threat: ThreatModel

    def __post_init__(self) -> None:
        check_threat(self.threat)

    def _config(self) -> AscentConfig:
        return AscentConfig(threat=self.threat, step_size=self.threat.eps, steps=1)


@dataclass(frozen=True, repr=False)
class FFGSM(GradientAttack):
    """One step from a random start, project(start + step_size * ascent(gradient)).

    Attributes:
        threat: What the attack may change, such as Linf(8/255).
        step_size: In units of the threat model's norm; None is the paper's 1.25 eps.  The published HSAT code uses
            10/255 whatever eps is.

    Raises:
        ValueError: For a step size that is not above 0.

    References:
        Wong et al., Fast is Better than Free, arXiv:2001.03994, algorithm 3.

    Example:
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> x_adv = FFGSM(Linf(0.25))(x, lambda images: images.sum((1, 2, 3)))
        >>> bool((x_adv - x).abs().max() <= 0.25)
        True
    """

    threat: ThreatModel
    _: KW_ONLY
    step_size: float | None = None

    def __post_init__(self) -> None:
        check_threat(self.threat)
        if self.step_size is not None:
            check_steps(self.threat, self.step_size)

    def _config(self) -> AscentConfig:
        step_size = 1.25 * self.threat.eps if self.step_size is None else self.step_size
        return AscentConfig(threat=self.threat, step_size=step_size, steps=1, random_start=True)


@dataclass(frozen=True, repr=False)
class NFGSM:
    """One step from strong noise that is not clipped afterwards: x + noise + step_size * sign(gradient there).

    An attack to train with, which prevents catastrophic overfitting.  Its images leave the ball on purpose: they stay
    in the pixel range and inside `reach`, of radius noise * eps + step_size.  So its result is no measure of
    robustness.

    Attributes:
        threat: The ball to defend against.
        noise: The start is uniform in noise * eps around the images; 2 in the paper.
        step_size: In units of the pixel range; None is eps, as in the paper.

    Raises:
        TypeError: For a threat model that is not Linf.
        ValueError: For numbers out of range.

    References:
        de Jorge et al., Make Some Noise, arXiv:2202.01181, section 4.
    """

    threat: Linf
    _: KW_ONLY
    noise: float = 2.0
    step_size: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Linf):
            raise TypeError(f"NFGSM is defined for Linf balls, got {self.threat!r}")
        if isinstance(self.threat.eps, Tensor):
            raise TypeError("NFGSM takes one eps for all images, such as Linf(8/255); got a tensor")
        check_number("noise", self.noise)
        if self.step_size is not None:
            check_number("step_size", self.step_size)

    def __repr__(self) -> str:
        return settings_text(self)

    @property
    def reach(self) -> Linf:
        """The ball that the images stay in."""
        return self._ball(self.noise * self._eps + self._step)

    def __call__(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: SuccessTest | None = None,
    ) -> Tensor:
        """Training images; arguments as for every attack."""
        first = self._first(x, generator, ids) if start is None else start
        return self._step_attack()(x, objective, start=first, ids=ids, success=success)

    def run(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: SuccessTest | None = None,
    ) -> AttackResult:
        """The same with its record.

        Args:
            x: (n, c, h, w) images in the threat model's range.
            objective: What is maximised.
            start, generator, ids, success: As in every attack's `run`; `start` replaces the noise.

        Returns:
            The images, the objective's values, and what the run cost.
        """
        first = self._first(x, generator, ids) if start is None else start
        return self._step_attack().run(x, objective, start=first, ids=ids, success=success)

    @property
    def _eps(self) -> float:
        return float(self.threat.eps)

    @property
    def _step(self) -> float:
        return self._eps if self.step_size is None else self.step_size

    def _ball(self, eps: float) -> Linf:
        return dataclasses.replace(self.threat, eps=min(eps, self.threat.high - self.threat.low))

    def _step_attack(self) -> PGD:
        return PGD(self.reach, step_size=self._step, steps=1)

    def _first(self, x: Tensor, generator: torch.Generator | None, ids: Tensor | None) -> Tensor:
        inside, _ = clamp_images(detach_images(x), self.threat)  # the attack itself refuses images out of range
        ball = self._ball(self.noise * self._eps)
        return random_start(inside, ball, generator=generator, ids=ids, restart=0)


@dataclass(frozen=True)
class RandomNoise:
    """No attack at all: one random point of the feasible set.  The baseline every attack has to beat.

    Attributes:
        threat: What the attack may change, such as Linf(8/255).

    Example:
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> noisy = RandomNoise(Linf(0.25))(x, lambda images: images.sum((1, 2, 3)))
        >>> bool((noisy - x).abs().max() <= 0.25)
        True
    """

    threat: ThreatModel

    def __post_init__(self) -> None:
        check_threat(self.threat)

    @property
    def uses_objective(self) -> bool:
        """False: the objective is not asked."""
        return False

    def __call__(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: SuccessTest | None = None,
    ) -> Tensor:
        """Images with noise; the objective and `success` are not asked.  `start` replaces the noise."""
        check_ids(ids, len(x))
        check_start(start, x)
        if start is not None:
            if bool(start.isnan().any()):  # no gradient will say so here
                raise ValueError("start holds NaN")
            return self.threat.project(start.detach().to(x), x.detach())
        inside = require_images(detach_images(x), self.threat)
        return random_start(inside, self.threat, generator=generator, ids=ids, restart=0)

    def run(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: SuccessTest | None = None,
        score: bool = True,
    ) -> AttackResult:
        """The same with the objective's value at the images and at the noisy images; see `unguided_result`.

        Args:
            x: (n, c, h, w) images in the threat model's range.
            objective: Its values at both images are reported; it decides nothing.
            start, generator, ids, success: As in every attack's `run`; `start` replaces the noise.
            score: False leaves the objective alone; its values are then 0.

        Returns:
            The images with noise, and the objective's values.
        """
        x_adv = self(x, objective, start=start, generator=generator, ids=ids)
        return unguided_result(x_adv, x, objective, success=success, score=score)


def unguided_result(
    x_adv: Tensor, x: Tensor, objective: Objective, *, success: SuccessTest | None, score: bool
) -> AttackResult:
    """The result of an attack that asked the objective nothing on its way.

    score=False does not ask it for the values at x and x_adv either: both are then 0, after no forward pass.
    """
    start_value = value = torch.zeros((), device=x.device)
    if score:
        with torch.no_grad():
            start_value, value = objective(x).detach(), objective(x_adv).detach()
        check_value(value, len(x))
    return AttackResult(
        x_adv=x_adv,
        value=value,
        start_value=start_value,
        zero_gradient=torch.zeros(len(x), dtype=torch.int64, device=x.device),
        success=None if success is None else success(x_adv),
        forwards=2 if score else 0,
        backwards=0,
    )
