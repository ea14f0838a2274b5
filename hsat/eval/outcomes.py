"""What an attack did to the queries, in counts, and which member of an ensemble broke which image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from hsat.eval.tables import Table
from hsat.types import AttackResult, MemberStats

_SUSPICIOUS_FRACTION = 0.01
_ROUNDING = 1e-6  # of arithmetic in float32 on pixels; images of less precision have more


@dataclass
class AttackStats:
    """What an attack did to the images of all batches, in counts.

    Attributes:
        images: Images that were attacked.
        forwards: Forward passes, times images.
        backwards: Backward passes, times images.
        zero_gradient: Images whose gradient was exactly zero in some step.
        never_moved: Images that came out as they went in.
        stationary: Images that were given a random start because the clean point was stationary.
        outside: Images that another library's attack left outside the threat model, by more than rounding.
        rounded: Those that were outside by no more than that.
        not_finite: Images that it left with NaN or infinity, for which the clean ones were taken.
        farthest: The most by which a pixel was outside.
    """

    images: int = 0
    forwards: int = 0
    backwards: int = 0
    zero_gradient: int = 0
    never_moved: int = 0
    stationary: int = 0
    outside: int = 0
    rounded: int = 0
    not_finite: int = 0
    farthest: float = 0.0

    def add(self, result: AttackResult, images: Tensor) -> None:
        """Add what an attack reports about a batch of images."""
        n = len(images)
        if result.members is None:
            self.forwards += n * result.forwards
            self.backwards += n * result.backwards
        else:  # members see fewer and fewer images
            self.forwards += sum(member.forwards for member in result.members)
            self.backwards += sum(member.backwards for member in result.members)
        still = result.never_moved
        if still is None:
            still = (result.x_adv == images).flatten(1).all(1)
        self.images += n
        self.zero_gradient += int((result.zero_gradient > 0).sum())
        self.never_moved += int(still.sum())
        self.stationary += 0 if result.stationary is None else int(result.stationary.sum())
        if result.outside is not None:
            self._add_outside(result.outside, max(_ROUNDING, torch.finfo(result.x_adv.dtype).eps))

    def _add_outside(self, distance: Tensor, rounding: float) -> None:
        """Add how far images were outside the threat model, (n,)."""
        finite = distance[distance.isfinite()]
        self.outside += int((finite > rounding).sum())
        self.rounded += int(((finite > 0) & (finite <= rounding)).sum())
        self.not_finite += len(distance) - len(finite)
        self.farthest = max(self.farthest, float(finite.max()) if len(finite) else 0.0)

    def merge(self, counts: Mapping[str, float]) -> None:
        """Add the counts of other batches, by name; of `farthest` the larger one stays."""
        for name, value in counts.items():
            own = getattr(self, name)
            setattr(self, name, max(own, value) if name == "farthest" else own + value)

    def counts(self) -> dict[str, float]:
        """The counts by name."""
        return {option.name: getattr(self, option.name) for option in fields(self)}

    def fraction(self, name: str) -> float:
        """A count per image; 0 for clean images, which are not attacked."""
        return float(getattr(self, name)) / max(1, self.images)

    def masking_flags(self, eps: float) -> tuple[str, ...]:
        """Reasons to take a number for a failed attack rather than for robustness; none where eps is 0."""
        if eps == 0:
            return ()
        flags = []
        if (fraction := self.fraction("zero_gradient")) > _SUSPICIOUS_FRACTION:
            flags.append(f"gradient exactly zero in some step for {fraction:.1%} of the images")
        if (fraction := self.fraction("never_moved")) > _SUSPICIOUS_FRACTION:
            flags.append(f"{fraction:.1%} of the images never moved")
        return tuple(flags)

    def feasibility_flags(self) -> tuple[str, ...]:
        """What another library's attack did that the threat model forbids; rounding is no flag."""
        flags = []
        if self.outside:
            flags.append(
                f"{self.outside} of {self.images} images left the threat model by up to {self.farthest:.3g} at a pixel;"
                " they were projected back and judged there"
            )
        if self.not_finite:
            flags.append(
                f"{self.not_finite} of {self.images} images came back with NaN or infinity; the clean ones were taken"
            )
        return tuple(flags)

    def flags(self, eps: float) -> tuple[str, ...]:
        """All reasons to distrust a number that these counts give."""
        return (*self.masking_flags(eps), *self.feasibility_flags())

    def feasibility_settings(self) -> dict[str, float]:
        """What records say of images outside the threat model; empty where there was none."""
        shares = {f"{name}_share": self.fraction(name) for name in ("outside", "rounded", "not_finite")}
        return shares | {"farthest_outside": self.farthest} if any(shares.values()) else {}


@dataclass(frozen=True, eq=False)
class EnsembleOutcome:
    """Which member of an ensemble broke which image.

    Attributes:
        patch: (n,) patch ids in the order of the queries.
        broken_by: (n,) names of members; "clean" for images that were wrong before any attack, "" for those that
            withstood all.
        margin: (n,) float64, margin of the decision at the image that is reported; above 0 where it is wrong.
        members: What each member did, in the order of their turns, "clean" first.
    """

    patch: np.ndarray
    broken_by: np.ndarray
    margin: np.ndarray
    members: tuple[MemberStats, ...]

    @property
    def robust(self) -> np.ndarray:
        """(n,) bool: no member broke the image."""
        robust: np.ndarray = self.broken_by == ""
        return robust

    def to_markdown(self) -> str:
        """A table: each member, the images it saw, those it newly broke, how many are robust afterwards, its passes."""
        rows, robust = [], len(self.patch)
        for member in self.members:
            robust -= member.newly_broken
            left = f"{robust} ({100 * robust / max(1, len(self.patch)):.1f} %)"
            counts = (member.seen, member.newly_broken, left, member.forwards, member.backwards)
            rows.append((member.name, *map(str, counts)))
        return Table(("attack", "seen", "newly broken", "robust", "forwards", "backwards"), rows).to_markdown()


def choose_examples(
    labels: Sequence[int], count: int, *, classes: int, before: Mapping[int, int] | None = None
) -> tuple[int, ...]:
    """Which images to keep to look at: the first of each class, then the second of each, as they come.

    Args:
        labels: Of images in their order.
        count: At most so many.
        classes: How many classes there are; each gives at most its share of `count`, rounded up.
        before: For a part of the images: how many came before it, by label.

    Returns:
        Rows in ascending order.  A part gives all that may be among those of the whole.

    Example:
        >>> choose_examples([0, 0, 0, 1, 2, 2], 4, classes=3)
        (0, 1, 3, 4)
    """
    share = -(-count // max(classes, 1))
    seen = Counter(before or {})
    ranked = []
    for row, label in enumerate(labels):
        if seen[label] < share:
            ranked.append((seen[label], row))
        seen[label] += 1
    chosen = sorted(ranked)[:count] if before is None else ranked
    return tuple(sorted(row for _, row in chosen))
