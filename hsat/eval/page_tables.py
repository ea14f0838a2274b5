"""The report's tables as rows of text, before they become HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsat.eval.evidence import Evidence
from hsat.eval.grouping import Cell, Column, cell_of, columns_of
from hsat.eval.records import Record

OTHERS = "others"  # the surrogate of records that average over all surrogates but the target itself
TITLES = {"accuracy": "Acc", "mca": "MCA", "map": "mAP", "top2": "Top-2", "top3": "Top-3"}
TITLES |= {"accuracy_drop": "Acc-D", "mca_drop": "MCA-D"}


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
        return Entry(f"{100 * cell.value:.1f}", f"± {100 * cell.sd:.1f}, {cell.runs} runs")
    if cell.low is None or cell.high is None:
        return Entry(f"{100 * cell.value:.1f}")
    return Entry(f"{100 * cell.value:.1f}", f"{100 * cell.low:.1f} to {100 * cell.high:.1f}")


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


def transfer_table(records: Sequence[Record], *, level: str, metric: str, attack: str) -> Table | None:
    """Rows are surrogates, columns the encoders that were measured, under one attack; None without such records.

    The first row has the clean numbers, the last the mean drop over the surrogates other than the target itself.
    """
    here = [r for r in records if (r.level, r.metric, r.attack_name) == (level, metric, attack)]
    if not here:
        return None
    targets = tuple(dict.fromkeys(record.model for record in here))
    plain = [r for r in records if (r.level, r.metric, r.surrogate) == (level, metric.removesuffix("_drop"), "")]
    rows = []
    if plain:
        clean = tuple(entry(cell_of([record for record in plain if record.model == target])) for target in targets)
        rows.append((f"(clean {TITLES.get(plain[0].metric, plain[0].metric)})", clean))
    for surrogate in sorted(dict.fromkeys(record.surrogate for record in here), key=lambda name: name == OTHERS):
        mine = [record for record in here if record.surrogate == surrogate]
        entries = tuple(entry(cell_of([record for record in mine if record.model == target])) for target in targets)
        rows.append(("mean of the others" if surrogate == OTHERS else surrogate, entries))
    caption = f"{TITLES.get(metric, metric)} under {attack}, {level} level, %"
    return Table(caption=caption, corner="attack made on", head=targets, rows=tuple(rows), groups=())


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
