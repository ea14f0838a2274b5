"""The report's tables as rows of text, before they become HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsat.eval.records import Record
from hsat.eval.reporting.evidence import Evidence
from hsat.eval.reporting.grouping import Cell, Column, cell_of, columns_of
from hsat.eval.statistics.paired import Difference
from hsat.types import LEVELS

OTHERS = "others"  # the surrogate of records that average over all surrogates but the target itself
TITLES = {"accuracy": "Acc", "mca": "MCA", "map": "mAP", "top2": "Top-2", "top3": "Top-3"}
TITLES |= {"accuracy_drop": "Acc-D", "mca_drop": "MCA-D"}
TITLES |= {"certified_accuracy": "certified Acc", "smallest_fraction": "smallest fraction"}


@dataclass(frozen=True)
class Entry:
    """A cell: its number, and in small type what qualifies it.  shade: share of colour behind it, in [0, 1]."""

    text: str
    small: str = ""
    shade: float = 0.0


@dataclass(frozen=True)
class Table:
    """groups: (label, columns below it); head: one label per column; rows: (label, entries); notes: below the table."""

    caption: str
    corner: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Entry, ...]], ...]
    groups: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()


def level_table(records: Sequence[Record], *, level: str, metrics: Sequence[str]) -> Table | None:
    """One row per condition, one group of columns per model; None without records of that level and these metrics."""
    here = [record for record in records if record.level == level and record.metric in metrics]
    if not here:
        return None
    used = [metric for metric in metrics if any(record.metric == metric for record in here)]
    models = list(dict.fromkeys(record.model for record in here))
    columns = columns_of(here)
    rows = []
    for column in columns:
        entries = []
        for model in models:
            mine = [record for record in here if record.model == model and column.holds(record)]
            entries += [entry(cell_of([record for record in mine if record.metric == name])) for name in used]
        rows.append((column.label, tuple(entries)))
    sizes = sorted({record.n for record in here})
    notes = _meanings(columns)
    if len(sizes) > 1:
        notes.append(f"The numbers of queries differ between cells: n = {', '.join(map(str, sizes))}.")
    return Table(
        caption=f"{level.capitalize()} level, % (n = {', '.join(map(str, sizes))})",
        corner="condition",
        head=tuple(TITLES.get(name, name) for _ in models for name in used),
        rows=tuple(rows),
        groups=tuple((model, len(used)) for model in models),
        notes=tuple(notes),
    )


def entry(cell: Cell | None) -> Entry:
    """A cell of a table in percent: with its interval, or with the standard deviation over several runs."""
    if cell is None:
        return Entry("–")
    if cell.sd is not None:
        small = f"± {100 * cell.sd:.1f}, {cell.runs} runs"
    elif cell.low is None or cell.high is None:
        small = ""
    else:
        small = f"{100 * cell.low:.1f} to {100 * cell.high:.1f}"
    return Entry(_minus(f"{100 * cell.value:.1f}"), _minus(small))


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _meanings(columns: Sequence[Column]) -> list[str]:
    return [f"{column.label}: {column.attack}" for column in columns if column.label != column.name]


def confusion_table(evidence: Evidence, condition: str, k: int, *, level: str = "patch") -> Table | None:
    """Shares of each true class (rows) by predicted class, in %; None where the evidence does not hold them."""
    found = evidence.conditions.get(condition)
    if found is None or (level, k) not in found.prediction or level not in found.label:
        return None
    names, truth = evidence.class_names, found.label[level]
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, (truth, found.prediction[level, k]), 1)
    rows = []
    for name, row in zip(names, counts, strict=True):
        total = int(row.sum())
        shares = [float(count) / total if total else 0.0 for count in row]
        entries = [Entry(f"{100 * share:.0f}" if total else "–", "", share) for share in shares]
        rows.append((f"{name} ({total})", tuple(entries)))
    return Table(caption=f"{evidence.model}, {condition}", corner="true class (n)", head=names, rows=tuple(rows))


def transfer_table(records: Sequence[Record], *, level: str, attack: str) -> Table | None:
    """Rows are surrogates, columns the drops of the encoders that were measured, under one attack.

    The first row has the clean numbers, the last the mean drop over the surrogates other than the target itself.  None
    without drops at that level.
    """
    at_level = [record for record in records if record.level == level]
    here = [r for r in at_level if r.attack_name == attack and r.metric.endswith("_drop")]
    if not here:
        return None
    targets, drops = tuple(dict.fromkeys(r.model for r in here)), tuple(dict.fromkeys(r.metric for r in here))
    places = [(target, metric) for target in targets for metric in drops]

    def cells(found: Sequence[Record], ending: str = "") -> tuple[Entry, ...]:
        return tuple(
            entry(cell_of([r for r in found if (r.model, r.metric) == (target, metric.removesuffix(ending))]))
            for target, metric in places
        )

    clean = [record for record in at_level if not record.attack]
    rows = [("(clean)", cells(clean, "_drop"))] if clean else []
    for surrogate in sorted(dict.fromkeys(record.surrogate for record in here), key=lambda name: name == OTHERS):
        label = "mean of the others" if surrogate == OTHERS else surrogate
        rows.append((label, cells([record for record in here if record.surrogate == surrogate])))
    sizes = ", ".join(map(str, sorted({record.n for record in here})))
    return Table(
        caption=f"{attack}, {level} level, points of % (n = {sizes})",
        corner="attack made on",
        head=tuple(TITLES.get(metric, metric) for _, metric in places),
        rows=tuple(rows),
        groups=tuple((target, len(drops)) for target in targets),
    )


def differences_of(differences: Sequence[Difference], *, metric: str, k: int) -> Table | None:
    """What each model has more than the one it is compared with, on the same patients; rows are conditions."""
    here = [each for each in differences if (each.metric, each.k) == (metric, k)]
    if not here:
        return None
    pairs = list(dict.fromkeys((each.model, each.against) for each in here))
    levels = [level for level in LEVELS if any(each.level == level for each in here)]
    rows = []
    for condition in dict.fromkeys(each.condition for each in here):
        found = {(e.model, e.against, e.level): e for e in here if e.condition == condition}
        entries = [_difference(found.get((*pair, level))) for pair in pairs for level in levels]
        rows.append((condition, tuple(entries)))
    return Table(
        caption=f"Differences of {TITLES.get(metric, metric)} on the same patients, points of %, k = {k}",
        corner="condition",
        head=tuple(level for _ in pairs for level in levels),
        rows=tuple(rows),
        groups=tuple((f"{model} − {against}", len(levels)) for model, against in pairs),
    )


def _difference(found: Difference | None) -> Entry:
    if found is None:
        return Entry("–")
    small = "" if found.low is None or found.high is None else f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
    return Entry(_minus(f"{100 * found.difference:+.1f}"), _minus(small))


def effort_table(records: Sequence[Record]) -> Table | None:
    """Per model and attack: what it spent, and the shares of images on which it may have failed."""
    shares = ("zero_gradient_share", "never_moved_share", "stationary_share")
    found: dict[tuple[str, ...], Record] = {}
    for record in records:
        if record.attack and shares[0] in record.settings:
            attacked = record.surrogate or record.model
            found.setdefault((attacked, record.target, record.attack_name, record.attack), record)
    rows = []
    for record in found.values():
        start = {"True": "yes", "False": "no"}.get(str(record.settings.get("random_start")), "–")
        spent = f"{record.forwards:g} / {record.backwards:g}"
        parts = [f"{100 * float(record.settings.get(share, 0.0)):.1f}" for share in shares]
        name = f"{record.surrogate or record.model}"
        rows.append((f"{name}, {record.attack_name} ({record.target})", tuple(map(Entry, (start, spent, *parts)))))
    if not rows:
        return None
    head = ("random start", "passes per image, forward / backward", "zero gradient, %", "never moved, %")
    return Table("How the attacks went", "model, attack", (*head, "stationary at the clean image, %"), tuple(rows))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names and text."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return found
