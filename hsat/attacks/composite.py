"""The strongest of several attacks, image by image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hsat.attacks import starts
from hsat.attacks.gradient import check_value
from hsat.types import Attack, AttackResult, Objective, ThreatModel

Success = Callable[[Tensor], Tensor]
MakeObjective = Callable[[Tensor], Objective]
Part = tuple[Attack, MakeObjective | None]


@dataclass(frozen=True, repr=False)
class WorstOf:
    """Several attacks on the same images, of which each image keeps the strongest; see `worst_of`.

    parts: the attacks, each with the maker of its own objective or None.  threat: that of all parts;
    `dataclasses.replace(attack, threat=...)` gives every part another one.
    """

    parts: tuple[Part, ...]
    threat: ThreatModel

    def __post_init__(self) -> None:
        moved = tuple((_under(attack, self.threat), make) for attack, make in self.parts)
        object.__setattr__(self, "parts", moved)

    def __repr__(self) -> str:
        shown = (repr(a) if make is None else f"({a!r}, {_name(make)})" for a, make in self.parts)
        return f"worst_of({', '.join(shown)})"

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
        success: Success | None = None,
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
        success: Success | None = None,
    ) -> AttackResult:
        """Each attack in turn; the objective is the judge.  Arguments as for PGD; `start` and `ids` go to every part.

        zero_gradient, forwards and backwards are sums over the parts, with one forward more for each part that climbs
        an objective of its own; `stationary` holds where it did in any part.  start_value: the judge's, where the
        first part began (at the images, if that part climbs its own).
        """
        starts.check_ids(ids, len(x))
        starts.check_start(start, x)
        turn = _Turn(x.detach(), objective, success)
        for attack, make in self.parts:
            if turn.all_fallen():
                break
            turn.take(attack, make, start=start, generator=generator, ids=ids)
        assert turn.best is not None  # there is at least one part
        return turn.best


class _Turn:
    """One call: the images, the judge, and the strongest result so far."""

    def __init__(self, x: Tensor, judge: Objective, success: Success | None) -> None:
        self.x, self.judge, self.success = x, judge, success
        self.best: AttackResult | None = None

    def all_fallen(self) -> bool:
        return self.best is not None and self.best.success is not None and bool(self.best.success.all())

    def take(self, attack: Attack, make: MakeObjective | None, **options: Any) -> None:
        """Run one attack on the images that are still standing and keep what is stronger."""
        objective = self.judge if make is None else make(self.x)
        keep = self._standing(attack, objective)
        result = self._run(attack, objective, keep, options)
        if make is not None:
            result = self._judged(result, keep)
        if keep is not None and self.best is not None:
            result = _spread(result, keep, self.best)
        self.best = result if self.best is None else stronger(self.best, result)

    def _standing(self, attack: Attack, objective: Objective) -> Tensor | None:
        """The images to attack, or None for all: some have fallen, and objective, judge and attack can be narrowed."""
        fallen = None if self.best is None else self.best.success
        if fallen is None or not bool(fallen.any()):
            return None
        if not (hasattr(objective, "select") and hasattr(self.judge, "select")):
            return None
        keep = (~fallen).nonzero().flatten()
        threat: ThreatModel = attack.threat  # type: ignore[attr-defined]  # worst_of has looked
        narrowable = starts.threat_of(threat, keep) is threat or dataclasses.is_dataclass(attack)
        return keep if narrowable else None

    def _run(self, attack: Any, objective: Any, keep: Tensor | None, options: dict[str, Any]) -> AttackResult:
        success = self.success
        if keep is None:
            result: AttackResult = attack.run(self.x, objective, success=success, **options)
        else:
            narrowed = _under(attack, starts.threat_of(attack.threat, keep))
            own = {name: options[name] if options[name] is None else options[name][keep] for name in ("start", "ids")}
            result = narrowed.run(self.x[keep], objective.select(keep), success=self._among(keep), **options | own)
        if success is not None and result.success is None:  # an attack of the user's that does not report it
            test = self._among(keep) if keep is not None else success
            with torch.no_grad():
                result = dataclasses.replace(result, success=test(result.x_adv))
        return result

    def _among(self, keep: Tensor) -> Success:
        """`success` for some of the images: it is asked about the whole batch, as its order may matter to it."""

        def among(images: Tensor) -> Tensor:
            assert self.success is not None and self.best is not None  # only then are images left out
            return self.success(self.best.x_adv.index_copy(0, keep, images))[keep]

        return among

    def _judged(self, result: AttackResult, keep: Tensor | None) -> AttackResult:
        """The result of another objective with the judge's values in the place of its own."""
        judge = self.judge if keep is None else self.judge.select(keep)  # type: ignore[attr-defined]
        with torch.no_grad():
            value = judge(result.x_adv).detach()
            begin = judge(self.x).detach() if self.best is None else value
        check_value(value, len(result.x_adv))
        forwards = result.forwards + (2 if self.best is None else 1)
        return dataclasses.replace(result, value=value, start_value=begin, forwards=forwards)


def worst_of(*parts: Attack | tuple[Attack, MakeObjective]) -> WorstOf:
    """An attack that runs several attacks and keeps, for each image, the strongest.

    parts: attacks, which climb the objective of the call; or pairs (attack, make), where make(x) gives the objective
    that this attack climbs on the images x (n, c, h, w), such as `lambda x: feature_drift(encoder, x)`.  The objective
    of the call judges in any case: a success first (where `success` is given), then the higher value; the earlier part
    on ties.  With a scalar objective the batch of the highest value is kept whole, as restarts do.

    With `success`, images that have fallen are kept as they are; later attacks do not see them, where the objectives
    have `.select`.  With `ids` all parts that start at random begin at the same points, so the result is the best of
    what each gives alone.  An ensemble in the sense of Croce and Hein, arXiv:2003.01690, section 4.
    Raises TypeError for parts that are not attacks with a threat model, ValueError where their threat models differ.
    """
    if not parts:
        raise ValueError("worst_of needs at least one attack: worst_of(PGD(...), MIFGSM(...))")
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
    return WorstOf(tuple(pairs), threats[0])


def _under(attack: Any, threat: ThreatModel) -> Any:
    """The attack with another threat model."""
    if attack.threat is threat or attack.threat == threat:
        return attack
    if not dataclasses.is_dataclass(attack):
        raise TypeError(f"{attack!r} is no dataclass, so its threat model cannot be replaced by {threat}")
    return dataclasses.replace(attack, threat=threat)  # type: ignore[type-var]


def _name(make: MakeObjective) -> str:
    return getattr(make, "__qualname__", "") or repr(make)


def _spread(part: AttackResult, keep: Tensor, whole: AttackResult) -> AttackResult:
    """The result of the images `keep` as one of the whole batch, in which the others are worth nothing."""

    def put(into: Tensor, rows: Tensor) -> Tensor:
        return into.index_copy(0, keep, rows)

    nobody = torch.zeros_like(whole.zero_gradient, dtype=torch.bool)
    return dataclasses.replace(
        part,
        x_adv=put(whole.x_adv, part.x_adv),
        value=put(part.value.new_full((len(nobody),), -torch.inf), part.value),
        zero_gradient=put(torch.zeros_like(whole.zero_gradient), part.zero_gradient),
        success=None if part.success is None else put(nobody, part.success),
        stationary=None if part.stationary is None else put(nobody, part.stationary),
    )


def stronger(old: AttackResult, new: AttackResult) -> AttackResult:
    """The stronger of the two per image, or as a whole where values are scalars; what is counted is added."""
    value = new.value.to(old.value.dtype)
    better, success = value > old.value, None
    if old.success is not None and new.success is not None:
        better, success = ~old.success & (new.success | better), old.success | new.success
    seen = [result.stationary for result in (old, new) if result.stationary is not None]
    return AttackResult(
        x_adv=torch.where(better[:, None, None, None] if better.ndim else better, new.x_adv, old.x_adv),
        value=torch.where(better, value, old.value),
        start_value=old.start_value,
        zero_gradient=old.zero_gradient + new.zero_gradient,
        success=success,
        forwards=old.forwards + new.forwards,
        backwards=old.backwards + new.backwards,
        stationary=torch.stack(seen).any(0) if seen else None,
    )
