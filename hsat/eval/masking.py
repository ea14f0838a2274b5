"""Checks for masked gradients, image by image: an attack, and everything that it should beat.

Every criterion is a yes or no for each image.  A sound model meets it for a tolerated share of the images at most; a
flag is raised when the count is too high for that share, by an exact one-sided binomial test.  The criteria follow
Athalye et al., arXiv:1802.00420, section 3.1, and Carlini et al., arXiv:1902.06705.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hsat.attacks import BIM, MIFGSM, PGD, Linf, RandomNoise, Square, feature_drift, margin
from hsat.attacks.initialization import image_seed
from hsat.classifiers import DecisionModel
from hsat.embedding import attack_unscored, encode
from hsat.eval.confidence import binomial_tail
from hsat.types import Attack, AttackResult, EmbeddingFunction, Objective

_T = TypeVar("_T")

POINTS = 20  # random points of the search without gradients, half of them at the border of the ball
QUERIES = 50  # of the Square attack: a rough search, which a gradient attack on a sound model leaves far behind
_AREA = 0.3  # of its first squares; the paper's 0.05 is for thousands of queries
FULL_STEPS = 20  # of the attack without a bound, twice: with steps of 2/255, then of a tenth of the pixel range
NEGLIGIBLE = 1e-3  # distance between unit embeddings that rounding explains, also on GPUs with short floats
UNBOUNDED_SIZES = (2 / 255, 0.1)
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
        decides: Whether the objective is the margin of the model's own decision, so that its sign is the decision.
        surrogates: Layers of other models, whose adversarial images are tried as well.
        seed: Of all noise.
    """

    attack: Attack
    attacked: EmbeddingFunction
    model: DecisionModel
    objective: DiagnosisObjective
    decides: bool = False
    surrogates: tuple[EmbeddingFunction, ...] = ()
    seed: int = 0

    @property
    def threat(self) -> Any:
        """The threat model of the attack."""
        return self.attack.threat  # type: ignore[attr-defined]


class SharedOutcomes:
    """What attacks on one model have in common on one batch, computed when it is first asked for.

    Random points depend on the threat model, the attack without a bound on the model alone; nothing on who asks first.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], Any] = {}

    def get(self, key: tuple[str, ...], compute: Callable[[], _T]) -> _T:
        """The outcome of this name, from `compute` the first time."""
        if key not in self._known:
            self._known[key] = compute()
        known: _T = self._known[key]
        return known


def run_checks(
    subject: DiagnosisTarget,
    images: Tensor,
    labels: Tensor,
    ids: Tensor,
    shared: SharedOutcomes | None = None,
) -> dict[str, np.ndarray]:
    """Outcomes by name: the criteria in `CRITERIA`, and which decisions were right.

    Args:
        subject: Model and attack.
        images: (n, c, h, w), in [0, 1].
        labels: (n,) classes as the classifier numbers them.
        ids: (n,) patch ids, on which noise depends.
        shared: What diagnoses of other attacks on the same model, objective and images leave, and may use.

    Returns:
        (n,) bool each.  What is said about decisions counts for the images of "right_clean" only.
    """
    checks = _Checks(subject, images, labels, ids)
    shared = shared or SharedOutcomes()
    threat = repr(subject.threat)
    climb = shared.get(("climb", same_climb(subject.attack)), checks.climb)
    noise_value, noise_right = shared.get(("noise", threat), checks.noise)
    black_value, black_right = checks.with_surrogates(*shared.get(("black box", threat), checks.black_box))
    result, value = climb.result, climb.value
    outcomes = {
        "right_clean": shared.get(("clean",), lambda: checks.right(images)),
        "right_attack": climb.right,
        "right_noise": noise_right,
        "right_black_box": black_right,
        "zero_gradient": result.zero_gradient > 0,
        "never_moved": climb.still,
        "noise_beats_attack": noise_value >= value,
        "black_box_beats_white_box": checks.black_box_is_stronger(black_value, value, result),
        "black_box_breaks": climb.right & ~black_right,
        "loss_not_increasing": climb.falls,
        "robust_to_unbounded_attack": climb.right & shared.get(("unbounded",), checks.robust_to_unbounded),
        "not_repeatable": shared.get(("second pass",), checks.is_random),
        "discontinuous": shared.get(("little", threat), checks.is_discontinuous),
    }
    return {name: outcome.cpu().numpy() for name, outcome in outcomes.items()}


def is_plain(attack: Attack) -> bool:
    """Whether the attack reads its objective once per step, at the iterate, and begins once."""
    return isinstance(attack, PGD | BIM | MIFGSM) and attack.restarts == 1


def same_climb(attack: Attack) -> str:
    """What attacks that do the same have in common: BIM with a random start is PGD."""
    text = repr(attack)
    return text.replace("BIM(", "PGD(", 1) if isinstance(attack, BIM) else text


@dataclass(frozen=True, eq=False)
class _Climb:
    """What an attack did: its result, the value there, and which images stayed, fell again or are right still."""

    result: AttackResult
    value: Tensor
    right: Tensor
    still: Tensor
    falls: Tensor


class _Watched:
    """An objective that keeps the values it gives."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self.stationary_at_clean = bool(getattr(objective, "stationary_at_clean", False))
        self.values: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        value = self._objective(images)
        self.values.append(value.detach().expand(len(images)))
        return value


class _Checks:
    """A batch of images under a subject's attack."""

    def __init__(self, subject: DiagnosisTarget, images: Tensor, labels: Tensor, ids: Tensor) -> None:
        self.subject, self.images, self.ids = subject, images, ids
        self.labels = labels.to(images.device)
        self.objective = subject.objective(images, self.labels)

    def attacked(
        self,
        attack: Attack,
        objective: Objective | None = None,
        *,
        seed: int | None = None,
        start: Tensor | None = None,
    ) -> AttackResult:
        chosen = objective or self.objective
        generator = torch.Generator().manual_seed(self.subject.seed if seed is None else seed)
        if start is not None:
            return attack.run(self.images, chosen, start=start, generator=generator, ids=self.ids)
        return attack_unscored(attack, self.images, chosen, generator=generator, ids=self.ids)

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

    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The objective, (n,), and whether the decision is right, (n,) bool; of a margin one pass tells both."""
        value = self.value(images)
        if self.subject.decides:
            return value, value <= 0  # the logit of the winner is the highest by at least one float
        return value, self.right(images)

    def climb(self) -> _Climb:
        """The attack, and how its objective went on the way and after as many steps again."""
        attack, watched = self.subject.attack, _Watched(self.objective)
        # what comes from elsewhere may ask the objective for its model; then nothing on the way is seen, or needed
        result = self.attacked(attack, watched if is_plain(attack) else self.objective)
        value, right = self.judge(result.x_adv)
        start = self.attacked(RandomNoise(self.subject.threat)).x_adv  # with the same seed: the attack's own start
        still = _same(result.x_adv, self.images) | _same(result.x_adv, start)
        falls = self._loss_not_increasing(result, value, watched.values)
        return _Climb(result, value, right, still, falls)

    def noise(self) -> tuple[Tensor, Tensor]:
        """Value and decision at one random point of the ball."""
        return self.judge(self.attacked(RandomNoise(self.subject.threat), seed=self.subject.seed + 1).x_adv)

    def black_box(self) -> tuple[Tensor, Tensor]:
        """The best value of a search without gradients, (n,), and whether the decision is right at all."""
        return self._best_of(self._points())

    def with_surrogates(self, value: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """The same, where images that the attack makes on surrogates count as well."""
        images = [
            self.attacked(self.subject.attack, feature_drift(surrogate, self.images)).x_adv
            for surrogate in self.subject.surrogates
        ]
        lent, right_lent = self._best_of(iter(images))
        return torch.maximum(value, lent), right & right_lent

    def _best_of(self, images: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        best = torch.full((len(self.images),), -torch.inf, device=self.images.device)
        right = torch.ones_like(best, dtype=torch.bool)
        for points in images:
            value, ok = self.judge(points)
            best, right = torch.maximum(best, value.to(best)), right & ok
        return best, right

    def _points(self) -> Iterator[Tensor]:
        threat = self.subject.threat
        for number in range(POINTS // 2):
            yield self.attacked(RandomNoise(threat), seed=image_seed(self.subject.seed, number, -2)).x_adv
            yield self._random_vertex(number)
        yield self.attacked(Square(threat, queries=QUERIES, area=_AREA)).x_adv

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

    def _loss_not_increasing(self, result: AttackResult, value: Tensor, seen: Sequence[Tensor]) -> Tensor:
        """Is the value no higher than at the start, or much lower again after twice the steps?  (n,) bool.

        seen: The values that the attack saw; of a plain attack the last `steps` are those at its iterates.
        """
        start = result.start_value.expand(len(value)).to(value)
        stuck = value <= start
        attack = self.subject.attack
        steps = getattr(attack, "steps", None)
        if not (isinstance(steps, int) and dataclasses.is_dataclass(attack)):
            return stuck
        earlier = {1, max(1, steps // 2)} - {steps}
        best = value
        if is_plain(self.subject.attack):  # the values on the way are known, and the steps go on from where they ended
            for count in earlier:
                best = torch.maximum(best, seen[count - steps].to(best))
            twice = self.attacked(self.subject.attack, start=result.x_adv).value.expand(len(value))
        else:
            after = {n: self._after(n) for n in (*earlier, 2 * steps)}
            for count in earlier:
                best = torch.maximum(best, after[count])
            twice = after[2 * steps]
        return stuck | (twice < best - _FALL * (best - start) - _ROUNDING)

    def _after(self, steps: int) -> Tensor:
        attack: Any = self.subject.attack
        return self.value(self.attacked(dataclasses.replace(attack, steps=steps)).x_adv)

    def robust_to_unbounded(self) -> Tensor:
        """Is the decision right when nothing bounds the perturbation?  (n,) bool.

        The margin of the decision is climbed until it is wrong: with small steps, for sign steps of a tenth leap over
        the boundary of most networks, then with large ones that cross the pixel range.
        """
        model, threat = self.subject.model, self.subject.threat
        if model.fitted.classes_with_rows < 2:
            return torch.zeros_like(self.labels, dtype=torch.bool)  # no decision can be wrong
        low, high = threat.low, threat.high
        objective = margin(model, self.labels)
        point = self.images
        for size in UNBOUNDED_SIZES:
            attack = PGD(Linf(high - low, low, high), step_size=size * (high - low), steps=FULL_STEPS)
            point = attack(self.images, objective, start=point, success=objective.success)
        return self.right(point)

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
