"""An evaluation in a few lines of text: model, clean, noise, the strongest attack at each eps, chance, difference."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from hsat.eval import Difference, Record
from hsat.eval.doubts import is_shift, list_doubts, norm_of
from hsat.eval.transfer_drops import OTHERS
from hsat.quantities import LINE_WIDTH
from hsat.report.aggregation import Estimate, format_estimate, format_plain, format_points, mean_chance
from hsat.report.summary import AccuracyPoint, accuracy_points, attack_kind, main_norm, strongest_per_eps
from hsat.report.tables import MEAN_OF_OTHERS, list_surrogates, name_classifier

Item = TypeVar("Item")
MOST_LINES = 9
_MOST_DOUBTS = 3
_MOST_TARGETS, _MOST_SURROGATES = 6, 5  # of a transfer
_WIDE = 0.9  # an interval of a share that says next to nothing
_LABEL = 12  # characters of the first column


@dataclass(frozen=True)
class ModelNumbers:
    """What the short summary says of one model, at the level of patches.

    Attributes:
        model: Its name.
        clean: On clean images; None where only drift was measured.
        noise: Under random noise of the largest eps that has any.
        attacks: The strongest attack at each eps, by growing eps.
        chance: What knowing nothing gives.
        n: How many patches.
        classifier: What decided.
    """

    model: str
    clean: AccuracyPoint | None
    noise: AccuracyPoint | None
    attacks: tuple[AccuracyPoint, ...]
    chance: float | None
    n: int
    classifier: str

    @classmethod
    def of(cls, records: Sequence[Record]) -> ModelNumbers:
        """Of the records of one model, level, metric and classifier."""
        norm = main_norm(records)
        mine = [one for one in records if not one.attack or norm_of(one) in (norm, "")]
        clean, noise, attacks = (accuracy_points(mine, kind=kind) for kind in ("clean", "noise", "attack"))
        return cls(
            records[0].model or "encoder",
            clean[0] if clean else None,
            noise[-1] if noise else None,
            tuple(strongest_per_eps(attacks)),
            mean_chance(records),
            records[0].n,
            f"kNN, k = {records[0].k}" if records[0].k else records[0].classifier.partition("(")[0],
        )


def short_summary(
    records: Sequence[Record], *, differences: Sequence[Difference] = (), most: int = MOST_LINES
) -> tuple[str, ...]:
    """The numbers that matter, of patches, in a few lines of at most 100 characters.

    One model has a line for all its attacks where it fits; several have a column each.  Numbers are in percent with
    their intervals, of the first classifier; drift without labels is 1 - cos.  Below them stand the weightiest reasons
    for doubt, as many as have room, and why a number has no interval, or one that says nothing.

    Args:
        records: Of one evaluation, of any number of models.
        differences: Between models on the same patients.
        most: How many lines there may be, at least 7; of more radii than fit, the first, the last and some between.

    Returns:
        The lines.

    Raises:
        ValueError: Without records of patches.
    """
    direct = [one for one in records if one.level == "patch" and not one.surrogate and not is_shift(one)]
    metric = "accuracy" if any(one.metric == "accuracy" for one in direct) else "drift"
    chosen = [one for one in direct if one.metric == metric]
    if not chosen:
        raise ValueError("no accuracy and no drift of patches was measured, so there is nothing to sum up")
    chosen = [one for one in chosen if (one.classifier, one.k) == (chosen[0].classifier, chosen[0].k)]
    names = dict.fromkeys(one.model for one in chosen)
    models = [ModelNumbers.of([one for one in chosen if one.model == name]) for name in names]
    show = _percent if metric == "accuracy" else format_plain
    about = [one for one in direct if (one.classifier, one.k) == (chosen[0].classifier, chosen[0].k)]
    doubts, notes = list_doubts(about), _interval_notes(chosen, records)
    rows = partial(_one_model, models[0], show) if len(models) == 1 else partial(_several_models, models, differences)
    free = most - len(notes) - len(rows(most))
    said = _doubt_lines(doubts, max(1, min(_MOST_DOUBTS, free)))
    lines = (*rows(most - len(notes) - len(said)), *said, *notes)
    return tuple(clip_words(line, LINE_WIDTH) for line in lines)


def _percent(estimate: Estimate) -> str:
    return format_estimate(estimate, unit=" %")


def _one_model(numbers: ModelNumbers, show: Callable[[Estimate], str], room: int) -> list[str]:
    patches = f"{numbers.n} patches"
    if numbers.clean is None:
        about = f"{patches} without labels: drift of the features, 1 - cos"
    else:
        about = f"{patches}, {numbers.classifier}; accuracy with 95 % interval"
    rows = [("model", f"{_clipped(numbers.model, 38)} on {about}")]
    if numbers.clean is not None:
        rows.append(("clean", show(numbers.clean.estimate)))
    if numbers.noise is not None:
        rows.append(("noise", f"{show(numbers.noise.estimate)} at {numbers.noise.eps_text}"))
    after = [] if numbers.chance is None else [("chance", f"{format_points(numbers.chance)} %")]
    label, named = _attack_label([numbers])
    cells = [
        f"{one.eps_text}: {show(one.estimate)}{f' ({one.name})' if named else ''}"
        for one in _some(numbers.attacks, room - len(rows) - len(after))
    ]
    joined = "; ".join(cells)
    if cells and len(joined) + _LABEL <= LINE_WIDTH and len(cells) == len(numbers.attacks):
        rows.append((label, joined))
    else:
        rows += [(label, cell) for cell in cells]
    return [f"{head:<{_LABEL}}{text}" for head, text in (*rows, *after)]


def _several_models(models: Sequence[ModelNumbers], differences: Sequence[Difference], room: int) -> list[str]:
    """A column per model; as many as have room."""
    for interval in (True, False):
        width = 21 if interval else 13
        shown = models[: (LINE_WIDTH - _LABEL) // width]
        if len(shown) == len(models):
            break
    radii = list(dict.fromkeys((one.eps, one.eps_text) for numbers in models for one in numbers.attacks))
    label, _ = _attack_label(models)
    difference = _difference_row(shown, differences, interval=interval)
    rows: list[tuple[str, list[str]]] = [("model, %", [_clipped(one.model, width - 2) for one in shown])]
    rows.append(("clean", [_cell(one.clean, interval) for one in shown]))
    if any(one.noise for one in shown):
        rows.append(("noise", [_cell(one.noise, interval) for one in shown]))
    chance = next((one.chance for one in models if one.chance is not None), None)
    left = room - len(rows) - (chance is not None) - len(difference)
    for eps, text in _some(sorted(radii), left):
        at = [next((point for point in one.attacks if point.eps == eps), None) for one in shown]
        rows.append((f"{_clipped(label, 8)} {text.removesuffix('/255')}", [_cell(point, interval) for point in at]))
    if chance is not None:
        rows.append(("chance", [format_points(chance)] * len(shown)))
    lines = [
        f"{head:<{_LABEL}}" + "".join(f"{cell:<{width}}" for cell in cells) for head, cells in (*rows, *difference)
    ]
    if len(shown) < len(models):
        lines[0] += f"and {len(models) - len(shown)} more"
    return [line.rstrip() for line in lines]


def _difference_row(
    models: Sequence[ModelNumbers], differences: Sequence[Difference], *, interval: bool
) -> list[tuple[str, list[str]]]:
    """What each model has more than the first, under the strongest attack on the first at the largest eps."""
    if not models[0].attacks:
        return []
    condition = models[0].attacks[-1].name
    mine = {
        one.model: one
        for one in differences
        if (one.condition, one.level, one.metric, one.against) == (condition, "patch", "accuracy", models[0].model)
    }
    if not mine:
        return []
    cells = [f"at {condition}"]
    for numbers in models[1:]:
        one = mine.get(numbers.model)
        text = "–" if one is None else f"{100 * one.difference:+.1f}"
        if one is not None and interval and one.low is not None and one.high is not None:
            text += f" [{100 * one.low:.1f}, {100 * one.high:.1f}]"
        cells.append(text)
    return [("difference", cells)]


def _doubt_lines(doubts: Sequence[str], most: int) -> list[str]:
    """The first reasons to distrust the numbers, with the number of those that have no room."""
    lines: list[str] = []
    if most > 1 and doubts and len(doubts[0]) > LINE_WIDTH - _LABEL:
        shown = doubts[: most - 1]  # the first has two lines
    else:
        shown = doubts[:most]
    hidden = len(doubts) - len(shown)
    for place, doubt in enumerate(shown):
        following = len(shown) - place - 1  # have a line each
        room = most - len(lines) - following
        more = f" (and {hidden} more)" if hidden and not following else ""
        wrapped = textwrap.wrap(doubt, LINE_WIDTH - _LABEL, break_on_hyphens=False)
        fits = len(wrapped) <= room and len(wrapped[-1]) + len(more) <= LINE_WIDTH - _LABEL
        kept = wrapped if fits else [*wrapped[: room - 1], " ".join(wrapped[room - 1 :])]
        kept[-1] = clip_words(kept[-1], LINE_WIDTH - _LABEL - len(more)) + more
        lines += [f"{'' if number else 'doubt':<{_LABEL}}{line}" for number, line in enumerate(kept)]
    return lines


def _interval_notes(shown: Sequence[Record], records: Sequence[Record]) -> list[str]:
    """One line on numbers without interval, and on intervals that say next to nothing; none where all are well."""
    count = max((one.n for one in records if one.level == "patient"), default=0)
    patients = f"{count} patient{'s' if count != 1 else ''}" if count else "few patients"
    shown = [one for one in shown if one.metric == "drift" or one.level == "patch"]
    reasons = {str(one.settings["no_interval"]) for one in shown if one.low is None and one.settings.get("no_interval")}
    texts = [f"{'no interval':<{_LABEL}}{'; '.join(sorted(reasons))} ({patients})"] if reasons else []
    if any(one.low is not None and one.high is not None and one.high - one.low >= _WIDE for one in shown):
        texts.append(f"{'note':<{_LABEL}}an interval that spans nearly all from 0 to 100 says nothing: {patients}")
    return texts


def clip_words(text: str, length: int) -> str:
    """A text of at most so many characters, cut behind a word."""
    if len(text) <= length:
        return text
    return f"{text[: length - 3].rpartition(' ')[0].rstrip(' ,;:(')}..."


def _attack_label(models: Sequence[ModelNumbers]) -> tuple[str, bool]:
    """What the rows of attacks are called, and whether each has to be named beside that."""
    kinds = {attack_kind(point.name) for one in models for point in one.attacks}
    return (kinds.pop(), False) if len(kinds) == 1 else ("strongest", True)


def _cell(point: AccuracyPoint | None, interval: bool) -> str:
    return "–" if point is None else format_estimate(point.estimate, interval=interval)


def _clipped(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _some(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of the items, evenly, the first and the last among them."""
    places = np.unique(np.linspace(0, len(items) - 1, max(1, min(most, len(items)))).round().astype(int))
    return [items[place] for place in places] if items else []


def transfer_summary(records: Sequence[Record]) -> tuple[str, ...]:
    """The drops of a transfer at the level of patches, under the attack that takes most at the largest eps.

    A row per surrogate, a column per target, for the first classifier; as many of both as have room.

    Args:
        records: Of `evaluate_transfer`.

    Returns:
        At most 9 lines of at most 100 characters.

    Raises:
        ValueError: Without drops of patches.
    """
    drops = [one for one in records if (one.level, one.metric) == ("patch", "accuracy_drop")]
    if not drops:
        raise ValueError("no drop of patches was measured, so there is nothing to sum up; evaluate_transfer makes them")
    first, largest = drops[0], max(one.eps_value for one in drops)
    drops = [one for one in drops if (one.classifier, one.k, one.eps_value) == (first.classifier, first.k, largest)]
    names = dict.fromkeys(one.attack_name for one in drops)
    attack = max(names, key=lambda name: np.mean([one.value for one in drops if one.attack_name == name]))
    drops = [one for one in drops if one.attack_name == attack]
    clean = [one for one in records if (one.level, one.metric, one.surrogate) == ("patch", "accuracy", "")]
    clean = [one for one in clean if (one.classifier, one.k) == (first.classifier, first.k)]
    targets, surrogates = list(dict.fromkeys(one.model for one in drops)), list_surrogates(drops)
    shown, rows = targets[:_MOST_TARGETS], surrogates[:_MOST_SURROGATES]

    def line(head: str, cells: Sequence[Record | None]) -> str:
        texts = ("–" if one is None else format_points(one.value) for one in cells)
        return f"{_clipped(head, 20):<21}" + "".join(f"{text:>13}" for text in texts)

    def find(among: Sequence[Record], **values: str) -> Record | None:
        return next((one for one in among if all(getattr(one, key) == value for key, value in values.items())), None)

    lines = [f"accuracy of patches lost to {attack}, {name_classifier(first)}: clean minus attacked, in points of %"]
    lines.append(f"{'attacked on':<21}" + "".join(f"{_clipped(name, 12):>13}" for name in shown))
    lines.append(line("(clean, %)", [find(clean, model=name) for name in shown]))
    lines += [
        line(MEAN_OF_OTHERS if row == OTHERS else row, [find(drops, surrogate=row, model=name) for name in shown])
        for row in rows
    ]
    if len(shown) < len(targets) or len(rows) < len(surrogates):
        lines.append(f"and {len(targets) - len(shown)} more targets, {len(surrogates) - len(rows)} more surrogates")
    return tuple(clip_words(one, LINE_WIDTH) for one in lines)
