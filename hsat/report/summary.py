"""What records say in a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from hsat.eval.doubts import is_noise, is_shift, norm_of
from hsat.eval.records import Record
from hsat.report.aggregation import CLEAN, Estimate, aggregate_runs, format_estimate, format_points, mean_chance
from hsat.types import LEVELS

_percent = partial(format_estimate, unit=" %")


@dataclass(frozen=True)
class AccuracyPoint:
    """A measured condition of one model at one level; eps is 0 for clean images, and eps_text is as people write it."""

    name: str
    eps: float
    eps_text: str
    estimate: Estimate


@dataclass(frozen=True)
class AccuracyLine:
    """A line of a figure of accuracy against eps.

    Attributes:
        model, target: Whose, and what was attacked, as in the records.
        kind: "attack", "noise", or "clean" for a model of which nothing else was measured.
        attack: The kind of the attacks, as "PGD" of "PGD-8"; "" for the strongest attack at each eps, and for noise.
        points: By growing eps, clean images first.
    """

    model: str
    target: str
    kind: str
    attack: str
    points: tuple[AccuracyPoint, ...]


@dataclass(frozen=True)
class RobustnessSummary:
    """What a model keeps.

    Attributes:
        model: Its name.
        clean: On clean images.
        noise: Under random noise of the largest eps.
        worst: Under the attack that left least at the largest eps.
        attacks: How many attacks there were at that eps.
        chance: What knowing nothing gives; None where no record states it.
    """

    model: str
    clean: AccuracyPoint | None
    noise: AccuracyPoint | None
    worst: AccuracyPoint | None
    attacks: int
    chance: float | None = None


def accuracy_points(records: Sequence[Record], *, kind: str) -> list[AccuracyPoint]:
    """The conditions of one kind of one model, level and metric, by growing eps.

    kind: "clean", "noise", "attack" or "shift".
    """
    chosen = [record for record in records if _kind(record) == kind]
    points = []
    for name, attack in dict.fromkeys((record.attack_name, record.attack) for record in chosen):
        runs = [record for record in chosen if (record.attack_name, record.attack) == (name, attack)]
        estimate = aggregate_runs(runs)
        if estimate is not None:
            points.append(AccuracyPoint(name, runs[0].eps_value, runs[0].eps, estimate))
    return sorted(points, key=lambda point: point.eps)


def strongest_per_eps(attacks: Sequence[AccuracyPoint]) -> list[AccuracyPoint]:
    """At each eps the attack that left least; of equals the first."""
    return [
        min((point for point in attacks if point.eps == eps), key=lambda point: point.estimate.value)
        for eps in dict.fromkeys(point.eps for point in attacks)
    ]


def accuracy_lines(records: Sequence[Record], *, every_attack: bool = False) -> list[AccuracyLine]:
    """The lines of a figure: per model and target those of the attacks, then that of random noise.

    Args:
        records: Of one level, metric, k and norm.
        every_attack: A line for each kind of attack instead of one for the strongest at each eps.
    """
    lines = []
    for model, target in dict.fromkeys((record.model, record.target) for record in records):
        mine = [record for record in records if (record.model, record.target) == (model, target)]
        clean, attacks, noise = (accuracy_points(mine, kind=kind) for kind in (CLEAN, "attack", "noise"))
        kinds = {"": strongest_per_eps(attacks)}
        if every_attack:
            names = dict.fromkeys(attack_kind(point.name) for point in attacks)
            kinds = {name: [point for point in attacks if attack_kind(point.name) == name] for name in names}
        parts = [("attack", name, points) for name, points in kinds.items() if points]
        parts += [("noise", "", noise)] if noise else []
        parts = parts or [(CLEAN, "", [])]
        lines += [
            AccuracyLine(model, target, kind, name, points=(*clean[:1], *points))
            for kind, name, points in parts
            if clean or points
        ]
    return lines


def attack_kind(name: str) -> str:
    """The name of an attack without its eps: "PGD" of "PGD-8"."""
    return name.rsplit("-", 1)[0]


def eps_ticks(values: Sequence[float]) -> list[float] | None:
    """Ticks at 0 and at the radii that were measured; None where they have no room beside each other."""
    radii = sorted({round(value, 4) for value in values} | {0.0})
    fits = len(radii) <= 7 and all(b - a > 0.08 * radii[-1] for a, b in pairwise(radii))
    return radii if fits else None


def main_norm(records: Sequence[Record]) -> str:
    """The norm that a summary speaks of: Linf where attacks had it, or else their first; "" where none is named.

    Without attacks it is that of random noise.
    """
    norms = [norm_of(record) for record in records if _kind(record) == "attack"]
    norms = norms or [norm_of(record) for record in records if _kind(record) == "noise"]
    return "Linf" if "Linf" in norms else next(iter(norms), "")


def summarize_model(records: Sequence[Record]) -> RobustnessSummary:
    """The summary of one model from its records of one level, metric and k.

    Where both norms occur, those in Linf (or the first norm there is) are summed up.

    Raises:
        ValueError: For no records and for records of several models.
    """
    models = {record.model for record in records}
    if len(models) != 1:
        raise ValueError(f"a summary is that of one model, got records of {sorted(models)}")
    norm = main_norm(records)
    records = [record for record in records if not is_shift(record)]
    mine = [record for record in records if record.attack_name == CLEAN or norm_of(record) == norm]
    attacks = accuracy_points(mine, kind="attack")
    worst = strongest_per_eps(attacks)[-1] if attacks else None
    noise = [point for point in accuracy_points(mine, kind="noise") if worst is None or point.eps == worst.eps]
    clean = accuracy_points(mine, kind=CLEAN)
    count = sum(point.eps == worst.eps for point in attacks) if worst else 0
    first, last = next(iter(clean), None), noise[-1] if noise else None
    return RobustnessSummary(models.pop(), first, last, worst, count, mean_chance(records))


def summary_sentence(summaries: Sequence[RobustnessSummary], *, metric: str = "accuracy") -> str:
    """What each model keeps under its strongest attack, the best first, with intervals."""
    attacked = sorted((o for o in summaries if o.worst), key=lambda o: -o.worst.estimate.value if o.worst else 0.0)
    if not attacked:
        clean = [f"{o.model} has {_percent(o.clean.estimate)}" for o in summaries if o.clean]
        return (
            f"No attack was measured. On clean patches {', '.join(clean)} {metric}." if clean else "Nothing measured."
        )
    parts: list[str] = []
    said: tuple[str, str] | None = None
    for summary in attacked:
        assert summary.worst is not None
        before = f" (clean {_percent(summary.clean.estimate, interval=False)})" if summary.clean else ""
        attack = f"the strongest of {summary.attacks} attacks" if summary.attacks > 1 else summary.worst.name
        where = (summary.worst.eps_text, attack)
        under = f" under {attack} at eps {summary.worst.eps_text}" if where != said else ""
        said = where
        what = " of the patches right" if metric == "accuracy" else f" {metric.upper()}"
        kept = _percent(summary.worst.estimate) + (what if not parts else "")
        parts.append(f"{summary.model} keeps {kept}{under}{before}")
    return f"{'; '.join(parts)}.{_chance_of(summary.chance for summary in summaries)}"


def _chance_of(levels: Iterable[float | None]) -> str:
    """The chance level as a sentence, "" where it is not known or differs between models."""
    stated = {format_points(level) for level in levels if level is not None}
    return f" Chance is {stated.pop()} %." if len(stated) == 1 else ""


def chance_line(records: Sequence[Record], *, metrics: Sequence[str] = ("accuracy", "mca")) -> str:
    """The chance level of records at each level in one line; "" where none states it."""
    parts = []
    for level in LEVELS:
        here = [record for record in records if record.level == level]
        found = [(name, mean_chance(record for record in here if record.metric == name)) for name in metrics]
        words = {"mca": "MCA", "map": "mAP", "top2": "top-2", "top3": "top-3"}
        shown = [f"{words.get(name, name)} {format_points(chance)} %" for name, chance in found if chance is not None]
        parts += [f"{level} {', '.join(shown)}"] if shown else []
    return f"Chance level: {'; '.join(parts)}." if parts else ""


def certificate_sentence(records: Sequence[Record]) -> str:
    """What a summary says of records without accuracies of patches: certificates, or that the tables tell.

    Certified accuracies of patches are those at the largest radius at which any is above 0.
    """
    certified = [r for r in records if (r.metric, r.level) == ("certified_accuracy", "patch")]
    if not certified:
        return "No accuracy of patches was measured; the tables show what was."
    radius = max((r.eps_value for r in certified if r.value > 0), default=0.0)
    at = [record for record in certified if record.eps_value == radius]
    parts = []
    for model, attack in dict.fromkeys((record.model, record.attack) for record in at):
        estimate = aggregate_runs([record for record in at if (record.model, record.attack) == (model, attack)])
        parts += [f"{model} keeps {_percent(estimate)}"] if estimate else []
    chance = _chance_of(record.chance for record in at)
    return f"Certified against every change of L2 norm below {at[0].eps}, patch level: {'; '.join(parts)}.{chance}"


def transfer_sentence(records: Sequence[Record]) -> str:
    """What attacks made on other encoders take from each, the least first, at the largest eps; "" without averages.

    records: of one setting and k.  Patch level, the attack that takes most on average.
    """
    averages = [r for r in records if (r.surrogate, r.metric, r.level) == ("others", "accuracy_drop", "patch")]
    largest = max((record.eps_value for record in averages), default=0.0)
    parts, taken = [], []
    for model in dict.fromkeys(record.model for record in averages):
        mine = [record for record in averages if record.model == model and record.eps_value == largest]
        worst = max(accuracy_points(mine, kind="attack"), key=lambda point: point.estimate.value, default=None)
        if worst is not None:
            shown = format_estimate(worst.estimate)
            parts.append((worst.estimate.value, f"{shown} points from {model} ({worst.name})"))
            taken.append(worst.eps_text)
    if not parts:
        return ""
    listed = "; ".join(text for _, text in sorted(parts))
    return f"Attacks at eps {taken[0]} that were made on other encoders take, on average over these, {listed}."


def _kind(record: Record) -> str:
    if record.attack_name == CLEAN:
        return CLEAN
    if is_shift(record):
        return "shift"
    return "noise" if is_noise(record) else "attack"
