"""Reasons to distrust the records of an evaluation, the weightiest first: their flags, and what only several show."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from hsat.eval.records import Record

CLEAN = "clean"
_LARGER_LEAVES_MORE = 0.01
_BY_WEIGHT = (
    r"depends on the others of its batch|differ from call to call|not repeatable",
    r"gradient|never moved|black box|loss not increasing|noise beats attack|discontinuous|unbounded",
    r"no less than random noise|a larger eps leaves more",
    r"under attack above that of the clean",
    r"below chance",
    r"were trained on$",
    r"also in the bank|bank and queries share",
    r"can never be right|one class only|NaN or infinity|left the threat model",
)
_LAST = (r"no patients are known", r"without slides and patients", r"the attack was optimised for")


@dataclass(frozen=True)
class Flag:
    """A reason to distrust the numbers of a model under some conditions."""

    model: str
    conditions: tuple[str, ...]
    reason: str


def norm_of(record: Record) -> str:
    """The threat model's name in the attack's repr: "Linf", "L2", or "" where it names neither."""
    return next((name for name in ("Linf", "L2") if f"{name}(" in record.attack), "")


def is_noise(record: Record) -> bool:
    """Whether the condition is random noise and no attack."""
    return record.attack.startswith("RandomNoise(") or record.attack_name.startswith("noise-")


def is_shift(record: Record) -> bool:
    """Whether the condition is a natural shift: without an adversary, and without eps."""
    return record.attack.startswith("NaturalShift(")


def is_attack(record: Record) -> bool:
    """Whether the condition has an adversary."""
    return bool(record.attack) and not is_noise(record) and not is_shift(record)


def record_flags(records: Sequence[Record]) -> list[Flag]:
    """The flags that records carry, each once per model with the conditions it concerns."""
    conditions: dict[tuple[str, str], dict[str, None]] = {}
    for record in records:
        name = f"{record.surrogate} → {record.model}" if record.surrogate else record.model
        for flag in record.flags:
            conditions.setdefault((name, flag), {})[record.attack_name] = None
    return [Flag(model, tuple(names), flag) for (model, flag), names in conditions.items()]


class _Point(NamedTuple):
    """What one attack, or noise of one size, leaves."""

    eps: float
    eps_text: str
    name: str
    value: float


def cross_attack_flags(records: Sequence[Record]) -> list[Flag]:
    """Signs of a failed attack that only several records together show, for one model, level, metric and k.

    An attack that leaves as much as random noise of its size (and more than nothing), and one that leaves over one
    percentage point more at a larger eps than the strongest attack does at a smaller one: both happen when gradients
    are masked.
    """
    flags = []
    for norm in dict.fromkeys(norm_of(record) for record in records if _is_adversary(record)):
        mine = [record for record in records if norm_of(record) == norm]
        worst = _strongest([record for record in mine if _is_adversary(record)])
        noise = {point.eps: point.value for point in _points([record for record in mine if is_noise(record)])}
        for point in worst:
            beside = noise.get(point.eps)
            if beside is not None and point.value >= beside and point.value > 0:
                left = f"{100 * point.value:.1f} % against {100 * beside:.1f} %"
                reason = f"the strongest attack leaves no less than random noise of the same size ({left})"
                flags.append(Flag(records[0].model, (point.name,), reason))
        for smaller, larger in pairwise(worst):
            if larger.value > smaller.value + _LARGER_LEAVES_MORE:
                left = f"{100 * larger.value:.1f} % at {larger.eps_text}, {100 * smaller.value:.1f} % before"
                reason = f"a larger eps leaves more than a smaller one ({left})"
                flags.append(Flag(records[0].model, (larger.name,), reason))
    return flags


def _is_adversary(record: Record) -> bool:
    return record.attack_name != CLEAN and not is_noise(record) and not is_shift(record)


def _points(records: Sequence[Record]) -> list[_Point]:
    """The mean over the runs of each condition, by growing eps."""
    runs: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        runs.setdefault((record.attack_name, record.attack), []).append(record)
    means = [(group[0], statistics.mean(one.value for one in group)) for group in runs.values()]
    points = [_Point(first.eps_value, first.eps, first.attack_name, value) for first, value in means]
    return sorted(points, key=lambda point: point.eps)


def _strongest(records: Sequence[Record]) -> list[_Point]:
    """At each eps the attack that left least; of equals the first."""
    points = _points(records)
    sizes = dict.fromkeys(point.eps for point in points)
    return [min((one for one in points if one.eps == eps), key=lambda one: one.value) for eps in sizes]


def list_doubts(records: Sequence[Record]) -> tuple[str, ...]:
    """Reasons to distrust records in words, each once, the weightiest first.

    First come encoders that are not stable and masked gradients, then attacks that fail beside noise or a smaller eps,
    accuracies that cannot be right, patients and patches that are known already; last what only widens the reading of
    a number, such as patches without patients.

    Args:
        records: Of one evaluation, of any number of models.

    Returns:
        The reasons; with several models, the name of the model before one that does not concern all.
    """
    flags = record_flags(records)
    measured = [one for one in records if (one.level, one.metric) == ("patch", "accuracy") and not one.surrogate]
    for key in dict.fromkeys((one.model, one.target, one.classifier, one.k) for one in measured):
        flags += cross_attack_flags([one for one in measured if (one.model, one.target, one.classifier, one.k) == key])
    models: dict[str, dict[str, None]] = {}
    for flag in flags:
        models.setdefault(flag.reason, {})[flag.model] = None
    several = {record.model for record in records}
    texts = [
        (reason if set(names) >= several else f"{', '.join(names)}: {reason}", _weight(reason))
        for reason, names in models.items()
    ]
    return tuple(text for text, _ in sorted(texts, key=lambda pair: pair[1]))


def _weight(reason: str) -> int:
    """The place of a kind of reason; unknown ones stand before the last ones."""
    patterns = (*_BY_WEIGHT, r"(?!)", *_LAST)
    places = (place for place, pattern in enumerate(patterns) if re.search(pattern, reason))
    return next(places, len(_BY_WEIGHT))
