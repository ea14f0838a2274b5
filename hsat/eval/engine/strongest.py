"""The strongest attack: several attacks in turn, each on the images that still stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import numpy as np

from hsat.attacks import APGD, MIFGSM, PGD, Linf, Square
from hsat.attacks.calling import check_counts, check_number, check_threat, settings_text
from hsat.eval.records import eps_text, eps_value
from hsat.types import Attack, ThreatModel

Climbs = Literal["features", "embedding", "vote", "vote-ce", "scores"]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One attack of the ensemble.

    climbs: what it maximises: the cosine drift of a layer, the margin or the cross-entropy of the kNN vote, or the
    margin of the class scores, of which it sees nothing but the numbers.  surrogate: the encoder on which it is made;
    "" is the one that is measured.  common_start: its noise is that of the attacks of `evaluate_whitebox`; other
    members have noise of their own.
    """

    name: str
    attack: Attack
    climbs: Climbs
    surrogate: str = ""
    common_start: bool = False

    @property
    def black_box(self) -> bool:
        """Whether it has no gradients of the encoder that is measured."""
        return bool(self.surrogate) or self.climbs == "scores"


@dataclass(frozen=True, repr=False)
class Strongest:
    """An ensemble of attacks for `evaluate_whitebox`: an image counts as robust only if none of them fells it.

    An image has fallen when its kNN vote is wrong, by the neighbours, k (the first) and temperature that score it;
    images that are wrong as they are have fallen before the first attack.  Each member sees those that still stand:
    1. the paper's attacks, PGD and MI-FGSM from random points on the drift of the features and of the embedding, with
       the noise that `evaluate_whitebox` gives them (BIM with a random start is PGD);
    2. Auto-PGD on the vote itself (`soft_knn`): `restarts` times on its margin, once on its cross-entropy;
    3. transfer: MI-FGSM on the drift of the features of every surrogate;
    4. Square, which sees class scores only.
    Within white-box and black-box members the cheap ones come first.  Black-box members come last: what they fell
    withstood every gradient, and if that is more than a few images, a flag says so.
    Attacks under the same threat model in the same call count as members as well; they cost nothing again.

    All stay in the same ball.  Noise depends on (seed, patch id, member, restart) only, not on who has fallen.  The
    idea of an ensemble with a per-image worst case is that of Croce and Hein, arXiv:2003.01690, section 4.

    threat: a ball of pixels.  steps, step_size: of the drift members; step_size=None is eps / 4.  vote_steps,
    restarts: of Auto-PGD.  queries, area: of Square.  Raises ValueError for counts below 1 and as these attacks do.
    """

    threat: ThreatModel
    _: KW_ONLY
    steps: int = 10
    step_size: float | None = None
    vote_steps: int = 20
    restarts: int = 3
    queries: int = 200
    area: float = 0.3

    def __post_init__(self) -> None:
        check_threat(self.threat)
        check_counts(steps=self.steps, vote_steps=self.vote_steps, restarts=self.restarts, queries=self.queries)
        check_number("area", self.area, high=1.0)
        if self.step_size is not None:
            check_number("step_size", self.step_size)

    def __repr__(self) -> str:
        return settings_text(self)

    @property
    def random_start(self) -> bool:
        """Members begin at random points."""
        return True

    def members(self, *, layers: Sequence[str], surrogates: Sequence[str]) -> tuple[Member, ...]:
        """The members in their order.  layers: the layers that differ; surrogates: names of other encoders."""
        size = eps_value(self.threat.eps) / 4 if self.step_size is None else self.step_size
        pgd = PGD(self.threat, step_size=size, steps=self.steps)
        momentum = MIFGSM(self.threat, step_size=size, steps=self.steps, random_start=True)
        vote = APGD(self.threat, steps=self.vote_steps)
        found = [
            Member(name=f"{kind} {layer}", attack=attack, climbs=layer, common_start=True)  # type: ignore[arg-type]
            for kind, attack in (("PGD", pgd), ("MIFGSM", momentum))
            for layer in layers
        ]
        found += [Member(name=f"APGD vote {i + 1}", attack=vote, climbs="vote") for i in range(self.restarts)]
        found.append(Member(name="APGD vote-ce", attack=vote, climbs="vote-ce"))
        found += [
            Member(name=f"transfer from {name}", attack=momentum, climbs="features", surrogate=name)
            for name in surrogates
        ]
        square = Square(self.threat, queries=self.queries, area=self.area)
        return (*found, Member(name="Square", attack=square, climbs="scores"))


def strongest_attacks(
    eps_values: Sequence[float] = (4 / 255, 8 / 255),
    *,
    steps: int = 10,
    step_size: float | None = 2 / 255,
    vote_steps: int = 20,
    restarts: int = 3,
    queries: int = 200,
) -> dict[str, Strongest]:
    """Linf ensembles {"strongest-4": ..., "strongest-8": ...}; steps and step_size are those of `paper_attacks`."""
    return {
        f"strongest-{eps_text(eps).removesuffix('/255')}": Strongest(
            Linf(eps), steps=steps, step_size=step_size, vote_steps=vote_steps, restarts=restarts, queries=queries
        )
        for eps in eps_values
    }


@dataclass(frozen=True, kw_only=True)
class MemberCount:
    """What one member of the ensemble did: images it saw, images it newly felled, passes (times images) it spent."""

    name: str
    attack: str
    black_box: bool
    seen: int = 0
    felled: int = 0
    forwards: int = 0
    backwards: int = 0


@dataclass(frozen=True, eq=False)
class Casualties:
    """Which attack felled which image.

    patch: (n,) ids in the order of the queries.  felled_by: (n,) names; "clean" for images that were wrong before any
    attack, "" for those that withstood all.  margin: (n,) float64, log-odds of the best wrong class in the kNN vote at
    the image that is reported; above 0 where it is wrong.  members: in the order of their turns, "clean" first.
    """

    patch: np.ndarray
    felled_by: np.ndarray
    margin: np.ndarray
    members: tuple[MemberCount, ...]

    @property
    def robust(self) -> np.ndarray:
        """(n,) bool: no attack felled the image."""
        found: np.ndarray = self.felled_by == ""
        return found


def casualties_table(found: Casualties) -> str:
    """A Markdown table: each member, the images it saw, those it newly felled, what stood afterwards, its passes."""
    lines = ["| attack | seen | newly felled | standing | forwards | backwards |", "|" + " --- |" * 6]
    standing = len(found.patch)
    for each in found.members:
        standing -= each.felled
        share = f"{standing} ({100 * standing / max(1, len(found.patch)):.1f} %)"
        passes = f"{each.forwards} | {each.backwards}"
        lines.append(f"| {each.name} | {each.seen} | {each.felled} | {share} | {passes} |")
    return "\n".join(lines) + "\n"
