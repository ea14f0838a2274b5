"""From the class scores of one condition to its records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsat.classifiers import FittedKNN
from hsat.eval.conventions import Absent, Arithmetic, Compat, How, Keys, resolve_arithmetic
from hsat.eval.records import Record, eps_text, eps_value, software_versions
from hsat.eval.scoring import METRICS, Metrics, level_scores, metrics
from hsat.eval.statistics.bootstrap import Interval, bootstrap_intervals
from hsat.eval.tally import Tally, attack_settings, shared_patients, suspicions
from hsat.types import Attack, EmbeddingTable


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What all records of one evaluation have in common.

    identity: fields of Record.  settings: what goes into `Record.settings`.  flags: doubts about all of them.
    knn: the classifier, whose index is measured under each condition where it is approximate.
    """

    identity: dict[str, Any]
    settings: dict[str, Any]
    flags: tuple[str, ...]
    class_names: tuple[str, ...]
    arithmetic: Arithmetic
    bootstrap: int
    knn: FittedKNN


def evaluation_frame(
    knn: FittedKNN,
    queries: EmbeddingTable,
    *,
    target: str,
    layer: str,
    seed: int,
    how: How | None,
    compat: Compat | None,
    bootstrap: int,
    model: str,
    checkpoint: str,
    absent: Absent | None = None,
    keys: Keys | None = None,
    attack_branch: str | None = None,
) -> Frame:
    """The frame of an evaluation of these queries, embedded clean, by this classifier."""
    bank = knn.table
    arithmetic = resolve_arithmetic(compat, how=how, absent=absent, keys=keys)
    return Frame(
        identity={
            "model": model,
            "target": target,
            "temperature": knn.settings.temperature,
            "seed": seed,
            "checkpoint": checkpoint,
            "cohort": queries.cohort,
            "split": queries.split,
            "versions": software_versions(),
        },
        settings={
            "layer": layer,
            **dataclasses.asdict(arithmetic),
            "compat": compat or "",
            **({"attack_branch": attack_branch} if attack_branch else {}),
            "bootstrap": bootstrap,
            "index": knn.settings.index,
            "bank_rows": len(bank),
            "bank_cohort": bank.cohort,
            "bank_split": bank.split,
        },
        flags=shared_patients(bank, queries),
        class_names=knn.class_names,
        arithmetic=arithmetic,
        bootstrap=bootstrap,
        knn=knn,
    )


def condition_records(
    frame: Frame,
    *,
    name: str,
    attack: Attack | None,
    tally: Tally,
    table: EmbeddingTable,
    scores: Mapping[int, np.ndarray],
) -> list[Record]:
    """One record per k, level and metric of a condition; scores: class scores by k."""
    eps = getattr(getattr(attack, "threat", attack), "eps", 0.0)  # attacks in a space of their own have eps, no threat
    head = Record(
        **frame.identity,
        attack="" if attack is None else repr(attack),
        attack_name=name,
        eps=eps_text(eps),
        eps_value=eps_value(eps),
        flags=frame.flags + suspicions(tally, eps_value(eps)),
        forwards=tally.share("forwards"),
        backwards=tally.share("backwards"),
        settings=frame.settings
        | frame.knn.index_quality(table, seed=frame.identity["seed"])
        | attack_settings(attack, tally),
        level="",
        metric="",
        value=0.0,
        n=0,
        k=0,
    )
    found = []
    for k, rows in scores.items():
        levels = measure_levels(
            rows,
            table,
            class_names=frame.class_names,
            arithmetic=frame.arithmetic,
            bootstrap=frame.bootstrap,
            seed=head.seed,
        )
        for level, (measured, intervals) in levels.items():
            place = dataclasses.replace(head, k=k, level=level, n=measured.n)
            found += [
                measured_record(place, metric, getattr(measured, metric), intervals[metric]) for metric in METRICS
            ]
    return found


def measure_levels(
    scores: np.ndarray,
    table: EmbeddingTable,
    *,
    class_names: tuple[str, ...],
    arithmetic: Arithmetic,
    bootstrap: int,
    seed: int,
) -> dict[str, tuple[Metrics, dict[str, Interval]]]:
    """Metrics and their intervals at each level."""
    levels = level_scores(scores, table, class_names=class_names, how=arithmetic.how, keys=arithmetic.keys)
    return {
        level: (
            metrics(pooled, labels, absent=arithmetic.absent),
            bootstrap_intervals(
                pooled,
                labels,
                patients,
                generator=np.random.default_rng(seed),
                resamples=bootstrap,
                absent=arithmetic.absent,
            ),
        )
        for level, (pooled, labels, patients) in levels.items()
    }


def measured_record(place: Record, metric: str, value: float, interval: Interval) -> Record:
    """A record with its number and interval; where the interval is missing or unusual its settings say why."""
    word = "no_interval" if interval.low is None else "interval"
    rest = {name: value for name, value in place.settings.items() if name not in ("interval", "no_interval")}
    settings = rest | ({word: interval.reason} if interval.reason else {})
    return dataclasses.replace(
        place, metric=metric, value=value, low=interval.low, high=interval.high, settings=settings
    )
