"""Checks for masked gradients, image by image: an attack, and everything that it should beat.

Every criterion is a yes or no for each image.  A sound model meets it for a tolerated share of the images at most; a
flag is raised when the count is too high for that share, by an exact one-sided binomial test.  The criteria follow
Athalye et al., arXiv:1802.00420, section 3.1, and Carlini et al., arXiv:1902.06705.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hsat.attacks import PGD, Linf, RandomNoise, Square, feature_drift, margin
from hsat.attacks.initialization import image_seed
from hsat.classifiers import DecisionModel
from hsat.embedding import attack_unscored, encode
from hsat.eval.confidence import binomial_tail
from hsat.types import Attack, AttackResult, EmbeddingFunction, Objective

POINTS = 20  # random points of the search without gradients, half of them at the border of the ball
QUERIES = 50  # of the Square attack: a rough search, which a gradient attack on a sound model leaves far behind
_AREA = 0.3  # of its first squares; the paper's 0.05 is for thousands of queries
FULL_STEPS = 20  # of the attack without a bound, twice: with steps of 2/255, then of a tenth of the pixel range
NEGLIGIBLE = 1e-3  # distance between unit embeddings that rounding explains, also on GPUs with short floats
_FULL_SIZES = (2 / 255, 0.1)
_CLEARLY = 0.1  # of the attack's rise: both may end near the same maximum, on small images above all
_ROUNDING = 5e-7  # of a value in float32: at eps of 1e-5 and below a drift is no larger, and who wins is chance
_FALL = 0.25  # share of the rise that the objective may lose again between all steps and twice as many
_SMALL, _JUMP = 1e-3, 0.1  # a thousandth of the perturbation should do about a thousandth, not a tenth, of its effect

DiagnosisObjective = Callable[[Tensor, Tensor], Objective]
"""(clean images, labels as the bank numbers them) -> the objective that the attack maximises on them."""

FALSE_ALARM = 0.01
"""Probability that a sound model, at all its tolerated shares, gets any flag: shared out over the criteria."""


@dataclass(frozen=True)
class Criterion:
    """One criterion of masked gradients.

    Attributes:
        name: Its name; records carry its share under it.
        tolerated: The share of images in which a sound model may meet it.
        text: What was seen, for the flag.
    """

    name: str
    tolerated: float
    text: str


CRITERIA = (
    # A dead ReLU network loses all its gradient at an image now and then; more than one in a hundred is a pattern.
    Criterion("zero_gradient", 0.01, "the gradient was exactly zero in some step"),
    Criterion("never_moved", 0.01, "the attack ended where it began, at the image or at its random start"),
    # Random directions in thousands of dimensions are nearly orthogonal to the gradient: noise has no chance against it
    # but by an attack that went astray in single images.
    Criterion("noise_beats_attack", 0.05, "random noise of the same size reached the value of the attack"),
    Criterion("black_box_beats_white_box", 0.05, "a search without gradients rose clearly higher than the attack"),
    # Steps of one size end up circling around the maximum, so that a little up and down is no criterion.
    Criterion("loss_not_increasing", 0.05, "the objective did not rise, or fell again with twice the steps"),
    # The vote is not what a drift maximises: an image may be moved far and still be recognised.
    Criterion("black_box_breaks", 0.10, "a search without gradients changed the decision and the attack did not"),
    # Without a bound on the perturbation any image can become any other.
    Criterion("robust_to_unbounded_attack", 0.10, "the decision stayed right under an attack of unlimited size"),
    # Equal arithmetic gives equal results, and small changes of an image small changes of its embedding.
    Criterion("not_repeatable", 0.01, "the same image gave another embedding in a second pass (a randomised model)"),
    Criterion(
        "discontinuous",
        0.05,
        "a thousandth of a perturbation moved the embedding by over a tenth of what all of it did",
    ),
)


def judge_criterion(criterion: Criterion, seen: np.ndarray) -> tuple[float, str]:
    """(share of images, flag) for a criterion; seen: (n,) bool.  The flag is "" where the share can be tolerated."""
    if not len(seen):
        return 0.0, ""
    count = int(seen.sum())
    share = count / len(seen)
    if share <= criterion.tolerated or binomial_tail(count, len(seen), criterion.tolerated) >= FALSE_ALARM / len(
        CRITERIA
    ):
        return share, ""
    name = criterion.name.replace("_", " ")
    return (
        share,
        f"{name}: {criterion.text} for {count} of {len(seen)} images ({criterion.tolerated:.0%} would be tolerated)",
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class DiagnosisTarget:
    """A model and the attack on it.

    Attributes:
        attack: The attack under diagnosis; it has a threat model.
        attacked: The layer that the attack moves.
        model: Images -> logits of the classifier that decides.
        objective: See `DiagnosisObjective`.
        surrogates: Layers of other models, whose adversarial images are tried as well.
        seed: Of all noise.
    """

    attack: Attack
    attacked: EmbeddingFunction
    model: DecisionModel
    objective: DiagnosisObjective
    surrogates: tuple[EmbeddingFunction, ...] = ()
    seed: int = 0

    @property
    def threat(self) -> Any:
        """The threat model of the attack."""
        return self.attack.threat  # type: ignore[attr-defined]


def run_checks(subject: DiagnosisTarget, images: Tensor, labels: Tensor, ids: Tensor) -> dict[str, np.ndarray]:
    """Outcomes by name: the criteria in `CRITERIA`, and which decisions were right.

    Args:
        subject: Model and attack.
        images: (n, c, h, w), in [0, 1].
        labels: (n,) classes as the classifier numbers them.
        ids: (n,) patch ids, on which noise depends.

    Returns:
        (n,) bool each.  What is said about decisions counts for the images of "right_clean" only.
    """
    checks = _Checks(subject, images, labels, ids)
    result = checks.attacked(subject.attack)
    noise = checks.attacked(RandomNoise(subject.threat), seed=subject.seed + 1)
    black_value, black_right = checks.black_box()
    clean, right = checks.right(images), checks.right(result.x_adv)
    start = checks.attacked(RandomNoise(subject.threat)).x_adv  # with the same seed: the attack's own random start
    still = _same(result.x_adv, images) | _same(result.x_adv, start)
    value = checks.value(result.x_adv)
    outcomes = {
        "right_clean": clean,
        "right_attack": right,
        "right_noise": checks.right(noise.x_adv),
        "right_black_box": black_right,
        "zero_gradient": result.zero_gradient > 0,
        "never_moved": still,
        "noise_beats_attack": checks.value(noise.x_adv) >= value,
        "black_box_beats_white_box": checks.black_box_is_stronger(black_value, value, result),
        "black_box_breaks": right & ~black_right,
        "loss_not_increasing": checks.loss_not_increasing(result, value),
        "robust_to_unbounded_attack": checks.robust_to_unbounded(result.x_adv),
        "not_repeatable": checks.is_random(),
        "discontinuous": checks.is_discontinuous(),
    }
    return {name: outcome.cpu().numpy() for name, outcome in outcomes.items()}


class _Checks:
    """A batch of images under a subject's attack."""

    def __init__(self, subject: DiagnosisTarget, images: Tensor, labels: Tensor, ids: Tensor) -> None:
        self.subject, self.images, self.ids = subject, images, ids
        self.labels = labels.to(images.device)
        self.objective = subject.objective(images, self.labels)

    def attacked(self, attack: Attack, objective: Objective | None = None, *, seed: int | None = None) -> AttackResult:
        seed = self.subject.seed if seed is None else seed
        generator = torch.Generator().manual_seed(seed)
        return attack_unscored(attack, self.images, objective or self.objective, generator=generator, ids=self.ids)

    def value(self, images: Tensor) -> Tensor:
        """The objective, (n,); a scalar objective counts for every image."""
        with torch.no_grad():
            value = self.objective(images).detach()
        return value.expand(len(images))

    def right(self, images: Tensor) -> Tensor:
        """Is the decision right?  (n,) bool."""
        with torch.no_grad():
            right: Tensor = self.subject.model(images).argmax(1) == self.labels
        return right

    def black_box(self) -> tuple[Tensor, Tensor]:
        """The best value of a search without gradients, (n,), and whether the decision is right at all."""
        best, right = torch.full((len(self.images),), -torch.inf, device=self.images.device), None
        for points in self._points():
            value, ok = self.value(points), self.right(points)
            best = torch.maximum(best, value.to(best))
            right = ok if right is None else right & ok
        assert right is not None  # POINTS is not zero
        return best, right

    def _points(self) -> Iterator[Tensor]:
        threat = self.subject.threat
        for number in range(POINTS // 2):
            yield self.attacked(RandomNoise(threat), seed=image_seed(self.subject.seed, number, -2)).x_adv
            yield self._random_vertex(number)
        yield self.attacked(Square(threat, queries=QUERIES, area=_AREA)).x_adv
        for surrogate in self.subject.surrogates:
            yield self.attacked(self.subject.attack, feature_drift(surrogate, self.images)).x_adv

    def _random_vertex(self, draw: int) -> Tensor:
        """A point of the border of the ball in a random direction, which depends on the image's id and the draw."""
        noise = []
        for patch in self.ids.tolist():
            generator = torch.Generator().manual_seed(image_seed(self.subject.seed, patch, -3 - draw))
            noise.append(torch.randn(self.images.shape[1:], generator=generator))
        threat = self.subject.threat
        away = 2 * _wide(threat.eps, self.images) * threat.steepest_ascent(torch.stack(noise).to(self.images))
        point: Tensor = threat.project(self.images + away, self.images)
        return point

    def black_box_is_stronger(self, black: Tensor, value: Tensor, result: AttackResult) -> Tensor:
        """Did the search rise higher than the attack, by more than a tenth of the attack's own rise?  (n,) bool."""
        rise = (value - result.start_value.expand(len(value)).to(value)).clamp_min(0.0)
        return black.to(value) > value + _CLEARLY * rise + _ROUNDING

    def loss_not_increasing(self, result: AttackResult, value: Tensor) -> Tensor:
        """Is the value no higher than at the start, or much lower again after twice the steps?  (n,) bool."""
        start = result.start_value.expand(len(value)).to(value)
        stuck = value <= start
        steps = getattr(self.subject.attack, "steps", None)
        if not isinstance(steps, int) or not dataclasses.is_dataclass(self.subject.attack):
            return stuck
        best = value
        for count in {1, max(1, steps // 2)} - {steps}:
            best = torch.maximum(best, self._after(count))
        return stuck | (self._after(2 * steps) < best - _FALL * (best - start) - _ROUNDING)

    def _after(self, steps: int) -> Tensor:
        attack: Any = self.subject.attack
        return self.value(self.attacked(dataclasses.replace(attack, steps=steps)).x_adv)

    def robust_to_unbounded(self, start: Tensor) -> Tensor:
        """Is the decision right, too, when nothing bounds the perturbation?  (n,) bool.

        From where the attack ended, the margin of the decision is climbed until it is wrong: with small steps, for
        sign steps of a tenth leap over the boundary of most networks, then with large ones that cross the pixel range.
        """
        model, threat = self.subject.model, self.subject.threat
        if model.fitted.classes_with_rows < 2:
            return torch.zeros_like(self.labels, dtype=torch.bool)  # no decision can be wrong
        low, high = threat.low, threat.high
        objective = margin(model, self.labels)
        point = start
        for size in _FULL_SIZES:
            attack = PGD(Linf(high - low, low, high), step_size=size * (high - low), steps=FULL_STEPS)
            point = attack(self.images, objective, start=point, success=objective.success)
        return self.right(start) & self.right(point)

    def is_random(self) -> Tensor:
        """Does a second pass over the same images, in reverse order, give other embeddings?  (n,) bool."""
        first = self._unit(self.images)
        moved: Tensor = (self._unit(self.images.flip(0)).flip(0) - first).norm(dim=1)
        return moved > NEGLIGIBLE

    def is_discontinuous(self) -> Tensor:
        """Does a thousandth of a perturbation do more than a tenth of the whole?  (n,) bool."""
        whole = self._random_vertex(POINTS)
        little = self.images + _SMALL * (whole - self.images)
        centre, near, far = (self._unit(images) for images in (self.images, little, whole))
        small, large = (near - centre).norm(dim=1), (far - centre).norm(dim=1)
        jumped: Tensor = (small > NEGLIGIBLE) & (small > _JUMP * large)
        return jumped

    def _unit(self, images: Tensor) -> Tensor:
        return F.normalize(encode(self.subject.attacked, images).double(), dim=1)


def _same(one: Tensor, other: Tensor) -> Tensor:
    return (one == other).flatten(1).all(1)


def _wide(eps: float | Tensor, x: Tensor) -> float | Tensor:
    if not isinstance(eps, Tensor):
        return eps
    eps = eps.to(x.device, x.dtype)
    return eps[:, None, None, None] if eps.ndim == 1 else eps
