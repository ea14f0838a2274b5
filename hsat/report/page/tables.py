"""Tables that only the page has: confusion of classes, differences on the same patients, how attacks went."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hsat.eval import Difference, Record, Table, TableCell
from hsat.eval.doubts import is_shift
from hsat.eval.tables import ABSENT, Row
from hsat.report.aggregation import TITLES, minus_signs
from hsat.report.artifacts import Artifacts
from hsat.types import LEVELS


def confusion_table(artifacts: Artifacts, condition: str, k: int, *, level: str = "patch") -> Table | None:
    """Shares of each true class (rows) by predicted class, in %; None where the artifacts do not hold them."""
    arrays = artifacts.conditions.get(condition)
    if arrays is None or (level, k) not in arrays.prediction or level not in arrays.label:
        return None
    names, truth = artifacts.class_names, arrays.label[level]
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, (truth, arrays.prediction[level, k]), 1)
    rows: list[Row] = []
    for name, row in zip(names, counts, strict=True):
        total = int(row.sum())
        shares = [float(count) / total if total else 0.0 for count in row]
        cells = [TableCell(f"{100 * share:.0f}" if total else ABSENT, shade=share) for share in shares]
        rows.append((f"{name} ({total})", *cells))
    return Table(head=("true class (n)", *names), rows=rows, caption=f"{artifacts.model}, {condition}")


def page_differences_table(differences: Sequence[Difference], *, metric: str, k: int) -> Table | None:
    """What each model has more than the one it is compared with, on the same patients; rows are conditions."""
    here = [one for one in differences if (one.metric, one.k) == (metric, k)]
    if not here:
        return None
    here = [one for one in here if one.classifier == here[0].classifier]
    pairs = list(dict.fromkeys((one.model, one.against) for one in here))
    levels = [level for level in LEVELS if any(one.level == level for one in here)]
    rows: list[Row] = []
    for condition in dict.fromkeys(one.condition for one in here):
        by_place = {(one.model, one.against, one.level): one for one in here if one.condition == condition}
        rows.append((condition, *(_difference(by_place.get((*pair, level))) for pair in pairs for level in levels)))
    return Table(
        head=("condition", *(level for _ in pairs for level in levels)),
        rows=rows,
        caption=f"Differences of {TITLES.get(metric, metric)} on the same patients, points of %, k = {k}",
        groups=[(f"{model} − {against}", len(levels)) for model, against in pairs],
    )


def _difference(one: Difference | None) -> TableCell:
    if one is None:
        return TableCell(ABSENT)
    small = "" if one.low is None or one.high is None else f"{100 * one.low:+.1f} to {100 * one.high:+.1f}"
    return TableCell(minus_signs(f"{100 * one.difference:+.1f}"), minus_signs(small))


def effort_table(records: Sequence[Record]) -> Table | None:
    """Per model and attack: what it spent, and the shares of images on which it may have failed."""
    shares = ("zero_gradient_share", "never_moved_share", "stationary_share")
    attacks: dict[tuple[str, ...], Record] = {}
    for record in records:
        if record.attack and not is_shift(record) and shares[0] in record.settings:
            attacked = record.surrogate or record.model
            attacks.setdefault((attacked, record.target, record.attack_name, record.attack), record)
    rows: list[Row] = []
    for (name, target, attack, _), record in attacks.items():
        start = {"True": "yes", "False": "no"}.get(str(record.settings.get("random_start")), ABSENT)
        passes = f"{record.forwards:g} / {record.backwards:g}"
        parts = [f"{100 * float(record.settings.get(share, 0.0)):.1f}" for share in shares]
        rows.append((f"{name}, {attack} ({target})", start, passes, *parts))
    if not rows:
        return None
    head = ("model, attack", "random start", "passes per image, forward / backward", "zero gradient, %")
    return Table((*head, "never moved, %", "stationary at the clean image, %"), rows, "How the attacks went")
