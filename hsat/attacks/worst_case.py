"""The worst case of several attacks, image by image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hsat.attacks.initialization import check_ids, check_start
from hsat.attacks.loop import check_value
from hsat.attacks.threat import detach_images
from hsat.types import Attack, AttackResult, Objective, SuccessTest, ThreatModel

ObjectiveFactory = Callable[[Tensor], Objective]
"""Images (n, c, h, w) -> the objective that an attack climbs on them."""

Part = tuple[Attack, ObjectiveFactory | None]


@dataclass(frozen=True, repr=False)
class WorstCase:
    """Several attacks on the same images, of which each image keeps the strongest; see `worst_case`.

    Attributes:
        parts: The attacks, each with the function that makes its own objective, or None.
        threat: The threat model of all parts; `dataclasses.replace(attack, threat=...)` gives every part another one.
    """

    parts: tuple[Part, ...]
    threat: ThreatModel

    def __post_init__(self) -> None:
        moved = tuple((with_threat(attack, self.threat), make) for attack, make in self.parts)
        object.__setattr__(self, "parts", moved)

    def __repr__(self) -> str:
        shown = (repr(a) if make is None else f"({a!r}, {_name(make)})" for a, make in self.parts)
        return f"worst_case({', '.join(shown)})"

    @property
    def random_start(self) -> bool:
        """Whether any part begins at a random point."""
        return any(getattr(attack, "random_start", False) for attack, _ in self.parts)

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
        """The adversarial images of `run`."""
        return self.run(x, objective, start=start, generator=generator, ids=ids, success=success).x_adv

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
        """Each attack in turn; the objective is the judge.  Arguments as for PGD; `start` and `ids` go to every part.

        zero_gradient, forwards and backwards are sums over the parts, with one forward more for each part that climbs
        an objective of its own; `stationary` holds where it did in any part.  start_value: the judge's, where the
        first part began (at the images, if that part climbs its own).
        """
        check_ids(ids, len(x))
        check_start(start, x)
        state = _WorstCaseState(detach_images(x), objective, start=start, generator=generator, ids=ids, success=success)
        for attack, make in self.parts:
            if state.all_broken():
                break
            state.run_part(attack, make)
        assert state.best is not None  # there is at least one part
        return state.best


class _WorstCaseState:
    """One call: the images, the judge, and the strongest result so far."""

    def __init__(
        self,
        x: Tensor,
        judge: Objective,
        *,
        start: Tensor | None,
        generator: torch.Generator | None,
        ids: Tensor | None,
        success: SuccessTest | None,
    ) -> None:
        self.x, self.judge, self.success = x, judge, success
        self.start, self.generator, self.ids = start, generator, ids
        self.best: AttackResult | None = None

    def all_broken(self) -> bool:
        return self.best is not None and self.best.success is not None and bool(self.best.success.all())

    def run_part(self, attack: Attack, make: ObjectiveFactory | None) -> None:
        """Run one attack on the images that are still robust and keep what is stronger."""
        objective = self.judge if make is None else make(self.x)
        keep = self._robust_images(attack, objective)
        result = self._run(attack, objective, keep)
        if make is not None:
            result = self._with_judged_values(result, keep)
        if keep is not None and self.best is not None:
            result = _scatter(result, keep, self.best)
        self.best = result if self.best is None else keep_worst(self.best, result)

    def _robust_images(self, attack: Attack, objective: Objective) -> Tensor | None:
        """The images to attack, or None for all: some have broken, and objective, judge and attack can be narrowed."""
        broken = None if self.best is None else self.best.success
        if broken is None or not bool(broken.any()):
            return None
        if not (hasattr(objective, "select") and hasattr(self.judge, "select")):
            return None
        keep = (~broken).nonzero().flatten()
        threat: ThreatModel = attack.threat  # type: ignore[attr-defined]  # worst_case has looked
        narrowable = threat.select(keep) is threat or dataclasses.is_dataclass(attack)
        return keep if narrowable else None

    def _run(self, attack: Any, objective: Any, keep: Tensor | None) -> AttackResult:
        x, start, ids, success = self.x, self.start, self.ids, self.success
        if keep is not None:
            attack, objective = with_threat(attack, attack.threat.select(keep)), objective.select(keep)
            x, start, ids = x[keep], None if start is None else start[keep], None if ids is None else ids[keep]
            success = self._among(keep)
        result: AttackResult = attack.run(x, objective, start=start, generator=self.generator, ids=ids, success=success)
        if success is not None and result.success is None:  # an attack of the user's that does not report it
            with torch.no_grad():
                result = dataclasses.replace(result, success=success(result.x_adv))
        return result

    def _among(self, keep: Tensor) -> SuccessTest | None:
        """`success` for some of the images: it is asked about the whole batch, as its order may matter to it."""
        success, best = self.success, self.best
        if success is None or best is None:  # then no image is left out
            return None

        def among(images: Tensor) -> Tensor:
            return success(best.x_adv.index_copy(0, keep, images))[keep]

        return among

    def _with_judged_values(self, result: AttackResult, keep: Tensor | None) -> AttackResult:
        """The result of another objective with the judge's values in the place of its own."""
        judge = self.judge if keep is None else self.judge.select(keep)  # type: ignore[attr-defined]
        with torch.no_grad():
            value = judge(result.x_adv).detach()
            begin = judge(self.x).detach() if self.best is None else value
        check_value(value, len(result.x_adv))
        forwards = result.forwards + (2 if self.best is None else 1)
        return dataclasses.replace(result, value=value, start_value=begin, forwards=forwards)


def worst_case(*parts: Attack | tuple[Attack, ObjectiveFactory]) -> WorstCase:
    """An attack that runs several attacks and keeps, for each image, the strongest.

    The objective of the call judges: a success comes first (where `success` is given), then the higher value, then the
    earlier part.  With a scalar objective the batch of the highest value is kept whole, as restarts do.

    With `success`, images that have broken are kept as they are; later attacks do not see them, where the objectives
    have `.select`.  With `ids` all parts that start at random begin at the same points, so the result is the best of
    what each gives alone.  An ensemble in the sense of Croce and Hein, arXiv:2003.01690, section 4.

    Args:
        parts: Attacks, which climb the objective of the call; or pairs (attack, make), where make(x) gives the
            objective that this attack climbs on the images x (n, c, h, w), such as
            `lambda x: feature_drift(encoder, x)`.

    Raises:
        TypeError: For parts that are not attacks with a threat model.
        ValueError: For no part, and where threat models differ.
    """
    if not parts:
        raise ValueError("worst_case needs at least one attack: worst_case(PGD(...), MIFGSM(...))")
    pairs: list[Part] = []
    for part in parts:
        attack, make = part if isinstance(part, tuple) and len(part) == 2 else (part, None)
        if not (callable(getattr(attack, "run", None)) and isinstance(getattr(attack, "threat", None), ThreatModel)):
            raise TypeError(f"a part must be an attack with .run and .threat, or (attack, make); got {part!r}")
        if make is not None and not callable(make):
            raise TypeError(f"the objective of a part must be a function of the images that makes it, got {make!r}")
        pairs.append((attack, make))
    threats = [attack.threat for attack, _ in pairs]  # type: ignore[attr-defined]
    if other := [threat for threat in threats if threat != threats[0]]:
        raise ValueError(f"the attacks allow different things, so none is the strongest: {threats[0]} and {other[0]}")
    return WorstCase(tuple(pairs), threats[0])


def with_threat(attack: Any, threat: ThreatModel) -> Any:
    """The attack with another threat model."""
    if attack.threat is threat or attack.threat == threat:
        return attack
    if not dataclasses.is_dataclass(attack):
        raise TypeError(f"{attack!r} is no dataclass, so its threat model cannot be replaced by {threat}")
    return dataclasses.replace(attack, threat=threat)  # type: ignore[type-var]


def _name(make: ObjectiveFactory) -> str:
    return getattr(make, "__qualname__", "") or repr(make)


def _scatter(part: AttackResult, keep: Tensor, whole: AttackResult) -> AttackResult:
    """The result of the images `keep` as one of the whole batch, in which the others are worth nothing."""

    def put(into: Tensor, rows: Tensor) -> Tensor:
        return into.index_copy(0, keep, rows)

    none = torch.zeros_like(whole.zero_gradient, dtype=torch.bool)
    return dataclasses.replace(
        part,
        x_adv=put(whole.x_adv, part.x_adv),
        value=put(part.value.new_full((len(none),), -torch.inf), part.value),
        zero_gradient=put(torch.zeros_like(whole.zero_gradient), part.zero_gradient),
        success=None if part.success is None else put(none, part.success),
        stationary=None if part.stationary is None else put(none, part.stationary),
    )


def keep_worst(old: AttackResult, new: AttackResult) -> AttackResult:
    """The worse of two results for the model; what is counted is added.

    A success comes first, then the higher value, the old result on ties: per image where values are per image, else
    the batch as a whole.
    """
    value = new.value.to(old.value.dtype)
    better, success = torch.nan_to_num(value, nan=-torch.inf) > torch.nan_to_num(old.value, nan=-torch.inf), None
    if old.success is not None and new.success is not None:
        better, success = ~old.success & (new.success | better), old.success | new.success
    stationary = [result.stationary for result in (old, new) if result.stationary is not None]
    return AttackResult(
        x_adv=torch.where(better[:, None, None, None] if better.ndim else better, new.x_adv, old.x_adv),
        value=torch.where(better, value, old.value),
        start_value=old.start_value,
        zero_gradient=old.zero_gradient + new.zero_gradient,
        success=success,
        forwards=old.forwards + new.forwards,
        backwards=old.backwards + new.backwards,
        stationary=torch.stack(stationary).any(0) if stationary else None,
    )
