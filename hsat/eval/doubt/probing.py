"""What diagnosis looks at, image by image: the attack under suspicion, and everything that it should beat."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hsat.attacks import PGD, Linf, RandomNoise, Square, feature_drift, soft_knn
from hsat.attacks.starts import image_seed
from hsat.classifiers import FittedKNN
from hsat.embedding import encode
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

MakeObjective = Callable[[Tensor, Tensor], Objective]
"""(clean images, labels as the bank numbers them) -> the objective that the attack maximises on them."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Suspect:
    """A model and the attack on it.

    attacked, scored: the layers that the attack moves and that kNN reads.  objective: see `MakeObjective`.
    surrogates: layers of other models, whose adversarial images are tried as well.
    """

    attack: Attack
    attacked: EmbeddingFunction
    scored: EmbeddingFunction
    knn: FittedKNN
    objective: MakeObjective
    surrogates: tuple[EmbeddingFunction, ...] = ()
    seed: int = 0

    @property
    def threat(self) -> Any:
        """The threat model of the attack."""
        return self.attack.threat  # type: ignore[attr-defined]


def probe(suspect: Suspect, images: Tensor, labels: Tensor, ids: Tensor) -> dict[str, np.ndarray]:
    """Outcomes by name, (n,) bool each: the signs of `hsat.eval.doubt.signs`, and which decisions were right.

    images: (n, c, h, w), in [0, 1].  labels, ids: (n,).  What is said about decisions
    counts for the images of "right_clean" only.
    """
    look = _Look(suspect, images, labels, ids)
    result = look.attacked(suspect.attack)
    noise = look.attacked(RandomNoise(suspect.threat), seed=suspect.seed + 1)
    black_value, black_right = look.black_box()
    clean, right = look.right(images), look.right(result.x_adv)
    start = look.attacked(RandomNoise(suspect.threat)).x_adv  # with the same seed: the attack's own random start
    still = _same(result.x_adv, images) | _same(result.x_adv, start)
    value = look.value(result.x_adv)
    found = {
        "right_clean": clean,
        "right_attack": right,
        "right_noise": look.right(noise.x_adv),
        "right_black_box": black_right,
        "zero_gradient": result.zero_gradient > 0,
        "never_moved": still,
        "noise_wins": look.value(noise.x_adv) >= value,
        "black_box_wins": look.beats(black_value, value, result),
        "black_box_fools": right & ~black_right,
        "not_rising": look.not_rising(result, value),
        "withstands_everything": look.withstands(result.x_adv),
        "not_repeatable": look.differs(),
        "jumps": look.jumps(),
    }
    return {name: outcome.cpu().numpy() for name, outcome in found.items()}


class _Look:
    """A batch of images under a suspect's attack."""

    def __init__(self, suspect: Suspect, images: Tensor, labels: Tensor, ids: Tensor) -> None:
        self.suspect, self.images, self.ids = suspect, images, ids
        self.labels = labels.to(images.device)
        self.objective = suspect.objective(images, self.labels)

    def attacked(self, attack: Attack, objective: Objective | None = None, *, seed: int | None = None) -> AttackResult:
        seed = self.suspect.seed if seed is None else seed
        generator = torch.Generator().manual_seed(seed)
        return attack.run(self.images, objective or self.objective, generator=generator, ids=self.ids)

    def value(self, images: Tensor) -> Tensor:
        """The objective, (n,); a scalar objective counts for every image."""
        with torch.no_grad():
            value = self.objective(images).detach()
        return value.expand(len(images))

    def right(self, images: Tensor) -> Tensor:
        """Does kNN give the true class?  (n,) bool."""
        answer = self.suspect.knn.predict(encode(self.suspect.scored, images))
        return torch.from_numpy(answer).to(self.labels.device) == self.labels

    def black_box(self) -> tuple[Tensor, Tensor]:
        """The best value of a search without gradients, (n,), and whether kNN is right at all of its points."""
        best, right = torch.full((len(self.images),), -torch.inf, device=self.images.device), None
        for points in self._points():
            value, ok = self.value(points), self.right(points)
            best = torch.maximum(best, value.to(best))
            right = ok if right is None else right & ok
        assert right is not None  # POINTS is not zero
        return best, right

    def _points(self) -> Iterator[Tensor]:
        threat = self.suspect.threat
        for number in range(POINTS // 2):
            yield self.attacked(RandomNoise(threat), seed=image_seed(self.suspect.seed, number, -2)).x_adv
            yield self._corner(number)
        yield self.attacked(Square(threat, queries=QUERIES, area=_AREA)).x_adv
        for surrogate in self.suspect.surrogates:
            yield self.attacked(self.suspect.attack, feature_drift(surrogate, self.images)).x_adv

    def _corner(self, draw: int) -> Tensor:
        """A point of the border of the ball in a random direction, which depends on the image's id and the draw."""
        noise = []
        for patch in self.ids.tolist():
            generator = torch.Generator().manual_seed(image_seed(self.suspect.seed, patch, -3 - draw))
            noise.append(torch.randn(self.images.shape[1:], generator=generator))
        threat = self.suspect.threat
        away = 2 * _wide(threat.eps, self.images) * threat.ascent(torch.stack(noise).to(self.images))
        point: Tensor = threat.project(self.images + away, self.images)
        return point

    def beats(self, black: Tensor, value: Tensor, result: AttackResult) -> Tensor:
        """Did the search rise higher than the attack, by more than a tenth of the attack's own rise?  (n,) bool."""
        rise = (value - result.start_value.expand(len(value)).to(value)).clamp_min(0.0)
        return black.to(value) > value + _CLEARLY * rise + _ROUNDING

    def not_rising(self, result: AttackResult, value: Tensor) -> Tensor:
        """Is the value no higher than at the start, or much lower again after twice the steps?  (n,) bool."""
        start = result.start_value.expand(len(value)).to(value)
        stuck = value <= start
        steps = getattr(self.suspect.attack, "steps", None)
        if not isinstance(steps, int) or not dataclasses.is_dataclass(self.suspect.attack):
            return stuck
        best = value
        for count in {1, max(1, steps // 2)} - {steps}:
            best = torch.maximum(best, self._after(count))
        return stuck | (self._after(2 * steps) < best - _FALL * (best - start) - _ROUNDING)

    def _after(self, steps: int) -> Tensor:
        attack: Any = self.suspect.attack
        return self.value(self.attacked(dataclasses.replace(attack, steps=steps)).x_adv)

    def withstands(self, start: Tensor) -> Tensor:
        """Is kNN right, too, when nothing bounds the perturbation?  (n,) bool.

        From where the attack ended, the margin of the vote is climbed until the vote is wrong: with small steps, for
        sign steps of a tenth leap over the boundary of most networks, then with large ones that cross the pixel range.
        """
        knn, threat = self.suspect.knn, self.suspect.threat
        if len(np.unique(knn.table.label)) == 1:
            return torch.zeros_like(self.labels, dtype=torch.bool)  # no vote can be wrong
        low, high = float(getattr(threat, "low", 0.0)), float(getattr(threat, "high", 1.0))
        vote = soft_knn(
            self.suspect.scored,
            knn.table,
            self.labels,
            k=knn.k,
            temperature=knn.settings.temperature,
            classes=len(knn.class_names),
        )
        point = start
        for size in _FULL_SIZES:
            attack = PGD(Linf(high - low, low, high), step_size=size * (high - low), steps=FULL_STEPS)
            point = attack(self.images, vote, start=point, success=vote.success)
        return self.right(start) & self.right(point)

    def differs(self) -> Tensor:
        """Does a second pass over the same images, in reverse order, give other embeddings?  (n,) bool."""
        first = self._unit(self.images)
        moved: Tensor = (self._unit(self.images.flip(0)).flip(0) - first).norm(dim=1)
        return moved > NEGLIGIBLE

    def jumps(self) -> Tensor:
        """Does a thousandth of a perturbation do more than a tenth of the whole?  (n,) bool."""
        whole = self._corner(POINTS)
        little = self.images + _SMALL * (whole - self.images)
        centre, near, far = (self._unit(images) for images in (self.images, little, whole))
        small, large = (near - centre).norm(dim=1), (far - centre).norm(dim=1)
        jumped: Tensor = (small > NEGLIGIBLE) & (small > _JUMP * large)
        return jumped

    def _unit(self, images: Tensor) -> Tensor:
        return F.normalize(encode(self.suspect.attacked, images).double(), dim=1)


def _same(one: Tensor, other: Tensor) -> Tensor:
    return (one == other).flatten(1).all(1)


def _wide(eps: float | Tensor, x: Tensor) -> float | Tensor:
    if not isinstance(eps, Tensor):
        return eps
    eps = eps.to(x.device, x.dtype)
    return eps[:, None, None, None] if eps.ndim == 1 else eps
