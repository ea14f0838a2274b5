"""Whether one model is better than another: differences on the same patients, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hsat.eval.conventions import Absent, Arithmetic, Compat, How, Keys, resolve_arithmetic
from hsat.eval.scoring import METRICS, pooled_levels
from hsat.eval.statistics.bootstrap import check_options, no_interval
from hsat.eval.statistics.intervals import Interval, Method, interval_around
from hsat.eval.statistics.resampling import metric_values, patient_draws, without_each
from hsat.eval.statistics.score_files import ScoreTable
from hsat.eval.tables import table_row
from hsat.types import LEVELS


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of model `model` minus the same of model `against`, on the same patients.

    value, value_against: the two numbers; difference: the first minus the second, in [-1, 1], with its interval.
    not_above: share of the resamples in which the difference is not above zero (None without resamples): near 0 where
    `model` is reliably better, near 1 where it is not.  n: rows at this level; patients: how many were resampled.
    reason: why there is no interval.
    """

    model: str
    against: str
    condition: str
    k: int
    level: str
    metric: str
    value: float
    value_against: float
    difference: float
    low: float | None
    high: float | None
    not_above: float | None
    n: int
    patients: int
    reason: str = ""


def paired_difference(  # noqa: PLR0913
    a: ScoreTable,
    b: ScoreTable,
    *,
    generator: np.random.Generator,
    names: Sequence[str] = METRICS,
    levels: Sequence[str] = LEVELS,
    resamples: int = 1000,
    confidence: float = 0.95,
    method: Method = "t",
    how: How | None = None,
    absent: Absent | None = None,
    keys: Keys | None = None,
    compat: Compat | None = None,
) -> tuple[Difference, ...]:
    """How much higher each metric of `a` is than that of `b`, at each level, with an interval from resampled patients.

    Rows are matched by patch id, in whatever order they stand; both tables must hold the same patches of one cohort,
    with the same slides, patients and classes (matched by name).  Every resample draws the same patients for both
    models and for all levels, so what makes a patient hard for both cancels: this interval is the right one for the
    question which model is better, and usually far shorter than the two models' own intervals suggest.

    method, confidence, resamples: see `bootstrap_intervals`; "t" works on the plain scale here.  how, absent, keys,
    compat: see `score_levels`.  Where every resample gives the same difference, as for two equal models, there is no
    interval, and `reason` says so.

    Raises ValueError for tables that do not match, naming what differs, and for unknown options.
    """
    check_options(names, resamples, confidence, method)
    if unknown := [level for level in levels if level not in LEVELS]:
        raise ValueError(f"unknown levels {unknown}; choose from {list(LEVELS)}")
    arithmetic = resolve_arithmetic(compat, how=how, absent=absent, keys=keys)
    b = _in_the_order_of(a, b)
    people = np.unique(a.patient)
    reason = no_interval(len(people), resamples)
    weights = [np.ones((1, len(people)))]  # every patient once, then the resamples, then each patient left out
    if not reason:
        weights.append(patient_draws(len(people), resamples, generator))
        weights += [without_each(len(people))] if method == "bca" else []
    pooled = [_pooled(table, arithmetic) for table in (a, b)]
    found = []
    for level in levels:
        of_a, of_b = (_values(each[level], people, weights, names, arithmetic.absent) for each in pooled)
        for name in names:
            values = [first[name] - second[name] for first, second in zip(of_a, of_b, strict=True)]
            found.append(
                Difference(
                    model=a.model,
                    against=b.model,
                    condition=a.condition,
                    k=a.k,
                    level=level,
                    metric=name,
                    value=float(of_a[0][name][0]),
                    value_against=float(of_b[0][name][0]),
                    n=len(pooled[0][level][1]),
                    patients=len(people),
                    **_measured(values, len(people), reason, method, confidence),
                )
            )
    return tuple(found)


_Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def _pooled(table: ScoreTable, arithmetic: Arithmetic) -> dict[str, _Rows]:
    """(scores, labels, patients) at each level."""
    return pooled_levels(
        table.scores, table.label, table.slide, table.patient, how=arithmetic.how, keys=arithmetic.keys
    )


def _values(
    rows: _Rows, people: np.ndarray, weights: Sequence[np.ndarray], names: Sequence[str], absent: Absent
) -> list[dict[str, np.ndarray]]:
    """The metrics of a level under each of the arrays of weights."""
    scores, labels, patients = rows
    member_of = np.searchsorted(people, patients)
    return [metric_values(scores, labels, member_of, part, names=names, absent=absent) for part in weights]


def _measured(
    values: Sequence[np.ndarray], people: int, reason: str, method: Method, confidence: float
) -> dict[str, Any]:
    """The fields of a Difference that come from the resamples."""
    point = float(values[0][0])
    interval, not_above = Interval(None, None, reason), None
    if not reason:
        interval = interval_around(
            point,
            values[1],
            people=people,
            method=method,
            confidence=confidence,
            left_out=values[2] if len(values) > 2 else None,
            difference=True,
        )
        not_above = float((values[1] <= 0).mean())
    return {
        "difference": point,
        "low": interval.low,
        "high": interval.high,
        "not_above": not_above,
        "reason": interval.reason,
    }


def _in_the_order_of(a: ScoreTable, b: ScoreTable) -> ScoreTable:
    """The rows of b in the order of a's; ValueError unless both describe the same patches."""
    if a.cohort and b.cohort and a.cohort != b.cohort:
        raise ValueError(
            f"the tables come from different cohorts (fingerprints {a.cohort[:12]} and {b.cohort[:12]}),"
            " whose ids mean different patches; evaluate both models on one cohort"
        )
    alone = [np.setdiff1d(one.patch, other.patch) for one, other in ((a, b), (b, a))]
    if len(alone[0]) or len(alone[1]):
        both = np.concatenate(alone)
        shown = ", ".join(map(str, both[:5])) + (", ..." if len(both) > 5 else "")
        raise ValueError(
            f"a paired difference needs the same patches in both tables: {len(alone[0])} are only in the first and"
            f" {len(alone[1])} only in the second (patch ids {shown})"
        )
    rows = np.argsort(b.patch)[np.argsort(np.argsort(a.patch))]
    own, other = np.array(a.class_names)[a.label], np.array(b.class_names)[b.label[rows]]
    pairs = [("class", own, other)]
    pairs += [(name, getattr(a, name), getattr(b, name)[rows]) for name in ("slide", "patient")]
    for name, first, second in pairs:
        if (different := first != second).any():
            at = int(np.flatnonzero(different)[0])
            raise ValueError(
                f"patch {a.patch[at]} has {name} {first[at]} in the first table and {second[at]} in the second;"
                f" {different.sum()} patches differ so"
            )
    columns = {name: getattr(b, name)[rows] for name in ("scores", "label", "patch", "slide", "patient")}
    return replace(b, **columns)


def compare_models(
    tables: Iterable[ScoreTable], *, against: str | None = None, seed: int = 0, **options: Any
) -> tuple[Difference, ...]:
    """Paired differences of every model's tables from those of one model, condition by condition and k by k.

    tables: of several models, as `score_tables` or `load_scores` gives them.  against: the model that the others are
    compared with; the first one's by default.  Conditions or k that it lacks are left out.  The resamples depend on the
    seed and the number of patients only.  options: of `paired_difference`.

    Raises ValueError for fewer than two models, an unknown `against`, and a (model, condition, k) that comes twice.
    """
    tables = tuple(tables)
    models = list(dict.fromkeys(table.model for table in tables))
    reference = models[0] if against is None and models else against
    if len(models) < 2 or reference not in models:
        raise ValueError(f"to compare models {reference!r} and at least one other are needed; there are {models}")
    places = {(table.model, table.condition, table.k): table for table in tables}
    if len(places) < len(tables):
        raise ValueError(f"{len(tables)} tables but {len(places)} combinations of model, condition and k; name models")
    found: list[Difference] = []
    for (model, condition, k), table in places.items():
        other = places.get((str(reference), condition, k))
        if model != reference and other is not None:
            found += paired_difference(table, other, generator=np.random.default_rng(seed), **options)
    return tuple(found)


def differences_table(
    differences: Sequence[Difference],
    *,
    levels: Sequence[str] = LEVELS,
    metrics: Sequence[str] = ("accuracy", "mca"),
) -> str:
    """A Markdown table: one row per model, condition, k, level and metric, in points of a percent."""
    lines = [
        "| model | against | condition | k | level | metric | model, % | against, % | difference | interval"
        " | resamples not above 0 | patients |",
        "|" + " --- |" * 12,
    ]
    for each in differences:
        if each.level not in levels or each.metric not in metrics:
            continue
        interval = "–" if each.low is None or each.high is None else f"[{100 * each.low:+.1f}, {100 * each.high:+.1f}]"
        share = "–" if each.not_above is None else f"{each.not_above:.3f}"
        cells = (each.model, each.against, each.condition, each.k, each.level, each.metric)
        numbers = f"{100 * each.value:.1f} | {100 * each.value_against:.1f} | {100 * each.difference:+.1f}"
        lines.append(f"{table_row([str(cell) for cell in cells])} {numbers} | {interval} | {share} | {each.patients} |")
    return "\n".join(lines) + "\n"
