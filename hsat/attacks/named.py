"""The named attacks: frozen settings of one gradient loop."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from hsat.attacks import starts
from hsat.attacks.ascend import Climb
from hsat.attacks.calling import Ascent, Success, check_number, check_steps, check_threat
from hsat.attacks.gradient import check_value
from hsat.attacks.pixels import admitted_to
from hsat.types import AttackResult, Objective, ThreatModel


def _steps_of(attack: PGD | BIM | MIFGSM, *, decay: float | None = None) -> Climb:
    return Climb(
        threat=attack.threat,
        step_size=attack.step_size,
        steps=attack.steps,
        random_start=attack.random_start,
        restarts=attack.restarts,
        decay=decay,
    )


@dataclass(frozen=True, repr=False)
class PGD(Ascent):
    """Projected gradient ascent, x <- project(x + step_size * ascent(gradient)), from a random start.

    Madry et al., arXiv:1706.06083, section 2.1.  HSAT trains with Linf(8/255), step_size=2/255, steps=5.
    step_size is in units of the threat model's norm; steps, restarts >= 1.
    """

    threat: ThreatModel
    _: KW_ONLY
    step_size: float
    steps: int
    random_start: bool = True
    restarts: int = 1

    def __post_init__(self) -> None:
        check_steps(self.threat, self.step_size, self.steps, self.restarts)

    def _climb(self) -> Climb:
        return _steps_of(self)


@dataclass(frozen=True, repr=False)
class BIM(Ascent):
    """Basic iterative method: PGD that starts at the images themselves (Kurakin et al., arXiv:1607.02533, eq. 2).

    With random_start=True it is PGD, which is what the published HSAT evaluation runs under this name.  Restarts after
    the first begin at random points.
    """

    threat: ThreatModel
    _: KW_ONLY
    step_size: float
    steps: int
    random_start: bool = False
    restarts: int = 1

    def __post_init__(self) -> None:
        check_steps(self.threat, self.step_size, self.steps, self.restarts)

    def _climb(self) -> Climb:
        return _steps_of(self)


@dataclass(frozen=True, repr=False)
class MIFGSM(Ascent):
    """Momentum iterative method: m <- decay * m + g / mean|g| per image, then a step along ascent(m).

    Dong et al., arXiv:1710.06081, algorithm 1 (there with the sum |g|; a positive factor per image and step, and with
    it the published code's trajectories).  A zero gradient leaves the image in place for that step; the published
    code divides by zero there and never moves the image again.
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

    def _climb(self) -> Climb:
        return _steps_of(self, decay=self.decay)


@dataclass(frozen=True, repr=False)
class FGSM(Ascent):
    """One step of size eps from the images (Goodfellow et al., arXiv:1412.6572, section 4)."""

    threat: ThreatModel

    def __post_init__(self) -> None:
        check_threat(self.threat)

    def _climb(self) -> Climb:
        return Climb(threat=self.threat, step_size=self.threat.eps, steps=1)


@dataclass(frozen=True, repr=False)
class FFGSM(Ascent):
    """One step from a random start, project(start + step_size * ascent(gradient)).

    Wong et al., arXiv:2001.03994, algorithm 3.  step_size=None is their 1.25 eps; the published HSAT code uses 10/255
    whatever eps is.
    """

    threat: ThreatModel
    _: KW_ONLY
    step_size: float | None = None

    def __post_init__(self) -> None:
        check_threat(self.threat)
        if self.step_size is not None:
            check_steps(self.threat, self.step_size)

    def _climb(self) -> Climb:
        step_size = 1.25 * self.threat.eps if self.step_size is None else self.step_size
        return Climb(threat=self.threat, step_size=step_size, steps=1, random_start=True)


@dataclass(frozen=True)
class RandomNoise:
    """No attack at all: one random point of the feasible set.  The baseline every attack has to beat."""

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
        success: Success | None = None,
    ) -> Tensor:
        """Images with noise; the objective and `success` are not asked.  `start` replaces the noise."""
        starts.check_ids(ids, len(x))
        starts.check_start(start, x)
        if start is not None:
            return self.threat.project(start.detach().to(x), x.detach())
        inside = admitted_to(x.detach(), self.threat)
        return starts.random_start(inside, self.threat, generator=generator, ids=ids, restart=0, inside=True)

    def run(
        self,
        x: Tensor,
        objective: Objective,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
        success: Success | None = None,
        score: bool = True,
    ) -> AttackResult:
        """The same with the objective's value at the images and at the noisy images; see `unguided_result`."""
        x_adv = self(x, objective, start=start, generator=generator, ids=ids)
        return unguided_result(x_adv, x, objective, success=success, score=score)


def unguided_result(
    x_adv: Tensor, x: Tensor, objective: Objective, *, success: Success | None, score: bool
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
